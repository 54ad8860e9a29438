//! The hashes of the crate: document keys, and SHA-256 as text.

use sha2::{Digest, Sha256};

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut text = String::with_capacity(2 * bytes.len());
    for b in bytes {
        // Writing to a String cannot fail.
        let _ = write!(text, "{b:02x}");
    }
    text
}

/// SHA-256 of `bytes`.
pub(crate) fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// Identifies a document by its text: the first 128 bits of the text's SHA-256,
/// read big-endian so that numeric order is the order of the hex digits. Two of
/// 10⁹ different texts share a key with probability below 2⁻⁶⁸.
pub(crate) fn key_of(digest: &[u8; 32]) -> u128 {
    let mut first = [0u8; 16];
    first.copy_from_slice(&digest[..16]);
    u128::from_be_bytes(first)
}

/// The share of all documents that come before this one when they are ordered
/// by `SHA-256(seed, key)`: uniform in [0, 1), and independent of the key order
/// that caps the corpus.
pub(crate) fn split_position(key: u128, seed: u64) -> f64 {
    let mut hash = Sha256::new();
    hash.update(b"split");
    hash.update(seed.to_le_bytes());
    hash.update(key.to_be_bytes());
    let digest: [u8; 32] = hash.finalize().into();
    let mut first = [0u8; 8];
    first.copy_from_slice(&digest[..8]);
    // 53 bits: all that an f64 in [0, 1) can tell apart.
    (u64::from_be_bytes(first) >> 11) as f64 / (1u64 << 53) as f64
}

/// A hash of a multiset of texts in constant memory: the sum of their SHA-256
/// modulo 2²⁵⁶, and their number. The same texts in any order, read by any number
/// of machines, give the same hash, and sums of parts add up. It tells inputs
/// apart that differ by accident; against an adversary who chooses the texts a sum
/// modulo 2²⁵⁶ is too short (Wagner, "A generalized birthday problem", 2002).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Multiset {
    /// The sum, lowest limb first.
    sum: [u64; 4],
    pub(crate) count: u64,
}

impl Multiset {
    pub(crate) fn add(&mut self, digest: &[u8; 32]) {
        let mut limbs = [0u64; 4];
        for (limb, bytes) in limbs.iter_mut().rev().zip(digest.chunks_exact(8)) {
            let mut eight = [0; 8];
            eight.copy_from_slice(bytes);
            *limb = u64::from_be_bytes(eight);
        }
        self.merge(&Self { sum: limbs, count: 1 });
    }

    /// Adds what another has counted.
    pub(crate) fn merge(&mut self, other: &Self) {
        let mut carry = 0;
        for (limb, &more) in self.sum.iter_mut().zip(&other.sum) {
            let sum = u128::from(*limb) + u128::from(more) + carry;
            *limb = sum as u64;
            carry = sum >> 64;
        }
        self.count = self.count.wrapping_add(other.count);
    }

    /// The sum as 64 hexadecimal digits.
    pub(crate) fn sum_hex(&self) -> String {
        self.sum.iter().rev().map(|limb| format!("{limb:016x}")).collect()
    }

    /// Takes back [`sum_hex`](Self::sum_hex); `None` where it is no such text.
    pub(crate) fn from_hex(sum: &str, count: u64) -> Option<Self> {
        if sum.len() != 64 || !sum.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        let mut limbs = [0u64; 4];
        for (i, limb) in limbs.iter_mut().rev().enumerate() {
            *limb = u64::from_str_radix(&sum[16 * i..16 * i + 16], 16).ok()?;
        }
        Some(Self { sum: limbs, count })
    }

    /// SHA-256 of sum and number, in hexadecimal.
    pub(crate) fn hash(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(b"multiset");
        hash.update(self.count.to_le_bytes());
        self.sum.iter().for_each(|limb| hash.update(limb.to_le_bytes()));
        hex(&hash.finalize())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sha256_matches_the_published_vector() {
        // FIPS 180-2, appendix B.1.
        assert_eq!(
            hex(&sha256(b"abc")),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_eq!(key_of(&sha256(b"abc")), 0xba78_16bf_8f01_cfea_4141_40de_5dae_2223);
    }

    #[test]
    fn a_multiset_counts_copies_and_forgets_the_order() {
        let of = |texts: &[&str]| {
            let mut set = Multiset::default();
            texts.iter().for_each(|t| set.add(&sha256(t.as_bytes())));
            set
        };
        assert_eq!(of(&["abc"]).sum_hex(), hex(&sha256(b"abc")));
        assert_eq!(of(&["a", "b", "c", "b"]), of(&["b", "c", "b", "a"]));
        assert_ne!(of(&["a", "b"]).hash(), of(&["a", "b", "b"]).hash());
        assert_ne!(of(&["a", "b"]).hash(), of(&["a", "c"]).hash());
        let mut joined = of(&["a", "b"]);
        joined.merge(&of(&["c", "a"]));
        assert_eq!(joined, of(&["a", "a", "b", "c"]));
        assert_eq!(Multiset::from_hex(&joined.sum_hex(), 4), Some(joined));
        assert_eq!(Multiset::from_hex("12", 1), None);
        // Carries run through all limbs: 2²⁵⁶ - 1 and 1 make 0.
        let mut full = Multiset::from_hex(&"f".repeat(64), 1).unwrap();
        full.merge(&Multiset::from_hex(&format!("{:064x}", 1), 1).unwrap());
        assert_eq!(full, Multiset { sum: [0; 4], count: 2 });
    }

    #[test]
    fn split_positions_are_spread_evenly() {
        let n = 20_000u64;
        let below = |share: f64| {
            (0..n).filter(|&i| split_position(u128::from(i), 7) < share).count() as f64 / n as f64
        };
        // Four standard deviations of a binomial with n = 20000.
        for share in [0.01, 0.1, 0.5] {
            let sigma = (share * (1.0 - share) / n as f64).sqrt();
            assert!((below(share) - share).abs() < 4.0 * sigma);
        }
        assert_ne!(split_position(1, 7), split_position(1, 8));
    }
}

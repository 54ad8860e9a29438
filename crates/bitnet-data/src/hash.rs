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

/// Identifies a document by its text: the first 128 bits of its SHA-256, read
/// big-endian so that numeric order is the order of the hex digits. Two of
/// 10⁹ different texts share a key with probability below 2⁻⁶⁸.
pub(crate) fn document_key(text: &str) -> u128 {
    let digest = sha256(text.as_bytes());
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
        assert_eq!(document_key("abc"), 0xba78_16bf_8f01_cfea_4141_40de_5dae_2223);
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

//! Random rows, made as bytes: ternary ones directly in their layout, floats
//! directly in their type, at a gigabyte a second, so that the disk is slower.

use bitnet_core::matrix::{BLOCK_BYTES, p5_byte};
use bitnet_core::{Dtype, Layout};
use bitnet_format::pack::encode;

/// So many of the 256 values of a random byte give -1, and as many 1.
const MINUS: u8 = 74;

/// Share of zeros among ternary weights, 0.42: about BitNet b1.58 2B4T's.
pub(crate) const ZEROS: f64 = 1.0 - 2.0 * MINUS as f64 / 256.0;

/// Random bits of a float; it is looked up in a table, five to a 64-bit number.
const BITS: u32 = 12;
/// Entries of a table.
const ENTRIES: usize = 1 << BITS;

/// SplitMix64 (Steele, Lea and Flood, 2014): small, fast, the same everywhere.
pub(crate) struct Rng(u64);

impl Rng {
    /// The generator of one row, independent of all others: rows may be made in
    /// any order and by any number of threads.
    pub(crate) fn of_row(seed: u64, tensor: u64, row: u64) -> Self {
        let mut state = seed;
        for word in [tensor, row] {
            state = Self(state).next().wrapping_add(word);
        }
        Self(Self(state).next())
    }

    #[inline(always)]
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A random entry of the table for every place of `out`.
    #[inline(always)]
    fn choose<T: Copy>(&mut self, table: &[T; ENTRIES], out: &mut [T]) {
        for five in out.chunks_mut(5) {
            let mut bits = self.next();
            for place in five {
                *place = table[bits as usize % ENTRIES];
                bits >>= BITS;
            }
        }
    }
}

/// What the rows of a tensor are made of.
pub(crate) enum Fill {
    /// Packed trits, [`ZEROS`] of them zero and the others as often 1 as -1.
    Ternary(Layout),
    /// Floats of two bytes.
    Half(Box<[[u8; 2]; ENTRIES]>),
    /// Floats of four bytes.
    Single(Box<[[u8; 4]; ENTRIES]>),
}

impl Fill {
    /// Floats from -`limit` to `limit`, all as likely.
    pub(crate) fn uniform(limit: f32, dtype: Dtype) -> Self {
        let value = |i| (2.0 * (i as f32 + 0.5) / ENTRIES as f32 - 1.0) * limit;
        let bytes = encode(&(0..ENTRIES).map(value).collect::<Vec<f32>>(), dtype);
        match dtype {
            Dtype::F16 | Dtype::Bf16 => Self::Half(table(bytes.as_chunks().0)),
            Dtype::F32 => Self::Single(table(bytes.as_chunks().0)),
        }
    }

    /// One row of `cols` values; `out` has the bytes of a row.
    pub(crate) fn row(&self, mut rng: Rng, cols: usize, out: &mut [u8]) {
        match self {
            Self::Ternary(layout) => trits(*layout, &mut rng, cols, out),
            Self::Half(table) => rng.choose(table, out.as_chunks_mut().0),
            Self::Single(table) => rng.choose(table, out.as_chunks_mut().0),
        }
    }
}

fn table<T: Copy + Default>(values: &[T]) -> Box<[T; ENTRIES]> {
    let mut out = Box::new([T::default(); ENTRIES]);
    out.copy_from_slice(values);
    out
}

/// The codes (trit + 1) of `n` weights, a random byte each. They do not depend on
/// the layout: a seed is the same model in every one.
#[inline(always)]
fn codes(rng: &mut Rng, n: usize, out: &mut [u8]) {
    let (random, padding) = out.split_at_mut(n);
    let (eights, rest) = random.as_chunks_mut::<8>();
    eights.iter_mut().for_each(|eight| *eight = rng.next().to_le_bytes());
    if !rest.is_empty() {
        let last = rng.next().to_le_bytes();
        rest.copy_from_slice(&last[..rest.len()]);
    }
    for byte in random {
        *byte = u8::from(*byte >= MINUS) + u8::from(*byte > u8::MAX - MINUS);
    }
    // The zero weight.
    padding.fill(1);
}

/// A row of trits; `out` has [`Layout::row_bytes`] bytes.
fn trits(layout: Layout, rng: &mut Rng, cols: usize, out: &mut [u8]) {
    match layout {
        Layout::P2 => blocks::<4>(rng, cols, out, |c| c[0] | c[1] << 2 | c[2] << 4 | c[3] << 6),
        Layout::P5 => blocks::<5>(rng, cols, out, p5_byte),
    }
}

/// [`Layout::pack_row`] block by block, in a form that compiles to vector code;
/// `N` codes go to a byte.
#[inline(always)]
fn blocks<const N: usize>(
    rng: &mut Rng,
    cols: usize,
    out: &mut [u8],
    byte: impl Fn([u8; N]) -> u8,
) {
    let mut planes = [[0u8; BLOCK_BYTES]; N];
    let mut left = cols;
    for block in out.as_chunks_mut::<BLOCK_BYTES>().0 {
        let n = left.min(N * BLOCK_BYTES);
        codes(rng, n, planes.as_flattened_mut());
        left -= n;
        for (j, out) in block.iter_mut().enumerate() {
            *out = byte(std::array::from_fn(|p| planes[p][j]));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_packed_by_the_definition() {
        for cols in [1, 7, 63, 64, 65, 255, 256, 257, 319, 320, 321, 576, 6400] {
            let mut unpacked = Vec::new();
            for layout in Layout::ALL {
                let mut bytes = vec![0; layout.row_bytes(cols)];
                Fill::Ternary(layout).row(Rng::of_row(1, 2, 3), cols, &mut bytes);
                let mut trits = vec![0i8; cols];
                layout.unpack_row(&bytes, &mut trits).unwrap();
                let mut packed = vec![0; bytes.len()];
                layout.pack_row(&trits, &mut packed);
                assert_eq!(packed, bytes);
                unpacked.push(trits);
            }
            // A row is the same in every layout.
            assert_eq!(unpacked[0], unpacked[1], "{cols}");
        }
    }

    #[test]
    fn rows_have_their_share_of_zeros() {
        let mut bytes = vec![0; Layout::P2.row_bytes(100_000)];
        Fill::Ternary(Layout::P2).row(Rng::of_row(1, 2, 3), 100_000, &mut bytes);
        let mut trits = vec![0i8; 100_000];
        Layout::P2.unpack_row(&bytes, &mut trits).unwrap();
        let share = |t: i8| trits.iter().filter(|x| **x == t).count() as f64 / 1e5;
        assert!((share(0) - ZEROS).abs() < 0.01 && (ZEROS - 0.42).abs() < 0.005);
        assert!((share(1) - share(-1)).abs() < 0.01);
    }

    #[test]
    fn floats_are_finite_and_within_their_limit() {
        let mut bytes = vec![0; 4 * 5000];
        Fill::uniform(0.5, Dtype::F32).row(Rng::of_row(0, 0, 0), 5000, &mut bytes);
        let values = bytes.as_chunks().0.iter().map(|b| f64::from(f32::from_le_bytes(*b)));
        let (sum, squares) = values.fold((0.0, 0.0), |(s, q), x| {
            assert!(x.abs() <= 0.5);
            (s + x, q + x * x)
        });
        // Mean 0, variance limit²/3.
        assert!((sum / 5000.0).abs() < 0.02 && (squares / 5000.0 - 0.25 / 3.0).abs() < 0.005);
        let mut bytes = vec![0; 2 * 5000];
        Fill::uniform(0.5, Dtype::F16).row(Rng::of_row(0, 0, 0), 5000, &mut bytes);
        let values = bytes.as_chunks().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32());
        assert!(values.into_iter().all(|x| x.abs() <= 0.5 && x != 0.0));
    }

    #[test]
    fn every_row_is_another() {
        let first = |seed, tensor, row| Rng::of_row(seed, tensor, row).next();
        let all = [first(0, 0, 0), first(1, 0, 0), first(0, 1, 0), first(0, 0, 1)];
        for (i, a) in all.iter().enumerate() {
            assert!(all[..i].iter().all(|b| a != b));
            assert_eq!(*a, [first(0, 0, 0), first(1, 0, 0), first(0, 1, 0), first(0, 0, 1)][i]);
        }
    }
}

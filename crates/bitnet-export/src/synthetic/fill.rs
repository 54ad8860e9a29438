//! Random rows, made as bytes: ternary ones directly in their layout, floats
//! directly in their type. Twelve random bits look a value up in a table, five
//! values to a 64-bit number, so that the disk is slower than this.

use bitnet_core::matrix::BLOCK_BYTES;
use bitnet_core::{Dtype, Layout};

use crate::pack::encode;

/// Share of zeros among ternary weights, about BitNet b1.58 2B4T's.
pub(crate) const ZEROS: f64 = 0.42;

/// Random bits of a value.
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
pub(crate) enum Fill<'t> {
    /// Packed trits, [`ZEROS`] of them zero and the others as often 1 as -1.
    Ternary(&'t Trits),
    /// Floats of two bytes.
    Half(Box<[[u8; 2]; ENTRIES]>),
    /// Floats of four bytes.
    Single(Box<[[u8; 4]; ENTRIES]>),
}

impl Fill<'_> {
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
            Self::Ternary(trits) => trits.row(&mut rng, cols, out),
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

/// Tables of the bytes of a layout, each as often as its trits are likely.
pub(crate) struct Trits {
    layout: Layout,
    /// `tables[n]`: the first `n` trits of a byte are random, the rest zero, as
    /// the padding of a row must be.
    tables: Vec<Box<[u8; ENTRIES]>>,
}

impl Trits {
    pub(crate) fn new(layout: Layout) -> Self {
        let most = layout.block_weights() / BLOCK_BYTES;
        Self { layout, tables: (0..=most).map(|n| bytes(layout, n)).collect() }
    }

    fn row(&self, rng: &mut Rng, cols: usize, out: &mut [u8]) {
        let block = self.layout.block_weights();
        let (whole, last) = out.split_at_mut(cols / block * BLOCK_BYTES);
        rng.choose(&self.tables[self.tables.len() - 1], whole);
        // Trit p of byte j is weight 64p + j of the block.
        let rest = cols % block;
        for (j, byte) in last.iter_mut().enumerate() {
            let live = rest.saturating_sub(j).div_ceil(BLOCK_BYTES);
            rng.choose(&self.tables[live], std::slice::from_mut(byte));
        }
    }
}

/// The table of bytes whose first `n` trits are random: combination after
/// combination, each up to where its share of the probability ends.
fn bytes(layout: Layout, n: usize) -> Box<[u8; ENTRIES]> {
    let mut out = Box::new([0u8; ENTRIES]);
    let mut packed = [0u8; BLOCK_BYTES];
    let (mut end, mut filled) = (0.0, 0);
    let combinations = 3usize.pow(n as u32);
    for combination in 0..combinations {
        let mut trits = vec![0i8; layout.block_weights()];
        let mut probability = 1.0;
        for p in 0..n {
            let trit = (combination / 3usize.pow(p as u32) % 3) as i8 - 1;
            probability *= if trit == 0 { ZEROS } else { (1.0 - ZEROS) / 2.0 };
            trits[BLOCK_BYTES * p] = trit;
        }
        layout.pack_row(&trits, &mut packed);
        end += probability;
        let last = combination + 1 == combinations;
        let until = if last { ENTRIES } else { (end * ENTRIES as f64).round() as usize };
        out[filled..until].fill(packed[0]);
        filled = until;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_valid_and_have_their_share_of_zeros() {
        for layout in Layout::ALL {
            let trits = Trits::new(layout);
            for cols in [1, 63, 64, 65, 255, 256, 257, 319, 320, 321, 576, 6400] {
                let mut counts = [0usize; 3];
                let rows = 40_000 / cols + 1;
                for row in 0..rows {
                    let mut bytes = vec![0; layout.row_bytes(cols)];
                    Fill::Ternary(&trits).row(Rng::of_row(1, 2, row as u64), cols, &mut bytes);
                    let mut found = vec![0i8; cols];
                    layout.unpack_row(&bytes, &mut found).unwrap();
                    found.iter().for_each(|t| counts[(t + 1) as usize] += 1);
                }
                let share = |n: usize| n as f64 / (rows * cols) as f64;
                let [minus, zero, plus] = counts.map(share);
                assert!((zero - ZEROS).abs() < 0.015, "{layout:?} {cols}: {zero}");
                assert!((minus - plus).abs() < 0.02, "{layout:?} {cols}: {minus} {plus}");
            }
        }
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

//! Rows of small blocks of integers with a scale: the int8 and 4-bit linear layers of
//! float twins, in the blocks of GGUF's Q8_0 and Q4_0.
//!
//! A weight is `integer · scale`. Both have few bits (8 and 11), so the product is
//! exact in f32, and a row's product is by definition the one of its values as f32,
//! in that one's order: activations stay float, and every instruction set gives the
//! same bits.

use bitnet_core::ternary::LANES;
use half::f16;

use crate::dense::{Rows, Share};
use crate::simd::{Simd, array, widen_f16};

/// Weights of a block.
pub const ROW_BLOCK: usize = 32;
/// Bytes of a block of int8.
pub const INT8_BYTES: usize = 2 + ROW_BLOCK;
/// Bytes of a block of 4-bit integers.
pub const INT4_BYTES: usize = 2 + ROW_BLOCK / 2;

/// A block is two vectors of lanes.
const _: () = assert!(ROW_BLOCK == 2 * LANES);

/// A block of [`ROW_BLOCK`] integers.
pub(crate) trait Block {
    /// What multiplies them.
    fn scale(&self) -> f32;
    /// What an integer is stored with added to it.
    const OFFSET: f32;
    /// Integers `16 half..16 half + 16`, as they are stored.
    fn stored(&self, half: usize) -> [u8; LANES];
}

/// The same bytes.
#[inline(always)]
fn signed(bytes: &[u8; LANES]) -> &[i8; LANES] {
    // SAFETY: as many bytes, none of them invalid, of the same alignment.
    unsafe { &*std::ptr::from_ref(bytes).cast() }
}

/// The 16 bytes of `block` from `at` on.
#[inline(always)]
fn lanes<const N: usize>(block: &[u8; N], at: usize) -> [u8; LANES] {
    let mut out = [0; LANES];
    out.copy_from_slice(&block[at..at + LANES]);
    out
}

#[inline(always)]
fn scale(low: u8, high: u8) -> f32 {
    widen_f16(f16::from_le_bytes([low, high]))
}

impl Block for [u8; INT8_BYTES] {
    #[inline(always)]
    fn scale(&self) -> f32 {
        scale(self[0], self[1])
    }

    const OFFSET: f32 = 0.0;

    #[inline(always)]
    fn stored(&self, half: usize) -> [u8; LANES] {
        lanes(self, 2 + LANES * half)
    }
}

impl Block for [u8; INT4_BYTES] {
    #[inline(always)]
    fn scale(&self) -> f32 {
        scale(self[0], self[1])
    }

    const OFFSET: f32 = 8.0;

    #[inline(always)]
    fn stored(&self, half: usize) -> [u8; LANES] {
        // One number, so that all are shifted and masked together.
        let bytes = u128::from_le_bytes(lanes(self, 2));
        (bytes >> (4 * half) & (u128::MAX / 255 * 15)).to_le_bytes()
    }
}

/// Writes the values of a row.
pub(crate) fn read<B: Block>(row: &[B], out: &mut [f32]) {
    for (block, out) in row.iter().zip(out.chunks_exact_mut(ROW_BLOCK)) {
        let scale = block.scale();
        for (half, out) in out.chunks_exact_mut(LANES).enumerate() {
            for (x, q) in out.iter_mut().zip(signed(&block.stored(half))) {
                *x = (f32::from(*q) - B::OFFSET) * scale;
            }
        }
    }
}

impl<const N: usize> Rows for &[[u8; N]]
where
    [u8; N]: Block,
{
    #[inline(always)]
    fn row(self, n: usize, cols: usize) -> Self {
        let blocks = cols / ROW_BLOCK;
        &self[n * blocks..(n + 1) * blocks]
    }

    #[inline(always)]
    fn dot_tile<S: Simd, const R: usize, const T: usize>(
        isa: S,
        w: [Self; R],
        x: [&[f32]; T],
        cols: usize,
        share: Share,
    ) -> [[f32; R]; T] {
        let blocks = cols / ROW_BLOCK;
        let (mut ahead, step) = share.ahead(blocks * N, N);
        let w = array!(R, r => &w[r][..blocks]);
        let x = array!(T, t => &x[t].as_chunks::<LANES>().0[..2 * blocks]);
        let mut sums = [[isa.splat(0.0); R]; T];
        for b in 0..blocks {
            let scales = array!(R, r => {
                isa.prefetch(w[r].as_ptr().cast::<u8>().wrapping_add(ahead));
                w[r][b].scale()
            });
            ahead += step;
            for half in 0..2 {
                // Products and differences of so few bits are exact. A zero's sign
                // may differ from the value's, which changes no sum that began at +0.
                let w = array!(R, r => {
                    let q = isa.load_i8(signed(&w[r][b].stored(half)));
                    let begin = isa.splat(-<[u8; N] as Block>::OFFSET * scales[r]);
                    isa.mul_add(begin, q, isa.splat(scales[r]))
                });
                for t in 0..T {
                    let x = isa.load_f32(&x[t][2 * b + half]);
                    for r in 0..R {
                        sums[t][r] = isa.fma(sums[t][r], w[r], x);
                    }
                }
            }
        }
        let mut out = [[0.0; R]; T];
        for t in 0..T {
            for r in 0..R {
                out[t][r] = isa.lane_sum(sums[t][r]);
            }
        }
        out
    }
}

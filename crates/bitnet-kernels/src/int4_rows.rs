//! Rows of 4-bit integers times int8 vectors: the cheap scan of a head that is
//! scored exactly afterwards. Sums are exact, so every instruction set gives the
//! same ones.

use crate::mat::MatMut;
use crate::simd::{Simd, array};
use crate::ternary::TokensRef;

/// Most columns: 2^16 products of at most 15 · 128 stay below 2^27.
pub const INT4_MAX_COLS: usize = 1 << 16;

/// Columns of a block of 64 bytes.
const BLOCK: usize = 128;

/// Rows that share each vector of activations. They lie a quarter of all apart, so
/// that each is a stream that runs through memory without a gap.
const ROWS: usize = 4;

/// How far ahead of the block in use memory is asked for.
const PREFETCH_BYTES: usize = 4096;

/// Rows of integers 0 to 15, two in a byte.
///
/// Byte `j` of a row's block `b` holds column `128b + j` in its low half and
/// column `128b + 64 + j` in its high half.
#[derive(Debug, Clone, Copy)]
pub struct Int4Rows<'a> {
    /// Columns, without padding; at most [`INT4_MAX_COLS`].
    pub cols: usize,
    /// Whole rows of [`Int4Rows::stride`] bytes; the padding may be any value.
    pub bytes: &'a [u8],
}

impl<'a> Int4Rows<'a> {
    /// Bytes from one row to the next: whole blocks of 64.
    #[must_use]
    pub const fn stride(cols: usize) -> usize {
        cols.div_ceil(BLOCK) * 64
    }

    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len() / Self::stride(self.cols).max(1)
    }

    /// Whether there is no row.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Rows `start..end`.
    ///
    /// # Panics
    /// If the range is outside the matrix.
    #[must_use]
    pub fn rows(&self, start: usize, end: usize) -> Int4Rows<'a> {
        let stride = Self::stride(self.cols);
        Int4Rows { bytes: &self.bytes[start * stride..end * stride], ..*self }
    }

    /// What every product of `tokens` with them relies on.
    pub(crate) fn check(&self, x: &TokensRef<'_>) {
        let stride = Self::stride(self.cols);
        assert!(self.cols <= INT4_MAX_COLS, "{} columns", self.cols);
        assert_eq!(self.bytes.len(), self.len() * stride, "whole 4-bit rows");
        assert!(x.stride >= 2 * stride, "vectors are padded to whole blocks");
        assert!(x.q.len() >= x.len() * x.stride, "vectors");
    }
}

/// The rows from the first to the last; see [`crate::Kernels::int4_sums`].
#[inline(always)]
pub(crate) fn all<S: Simd>(
    isa: S,
    w: Int4Rows<'_>,
    then: Int4Rows<'_>,
    x: TokensRef<'_>,
    out: MatMut<'_, i32>,
) {
    let stride = Int4Rows::stride(w.cols);
    let (apart, then_apart) = (w.len().div_ceil(ROWS), then.len().div_ceil(ROWS));
    // Behind a stream lies the same one of the rows that are read next.
    let later = |n: usize, r: usize, row: *const [u8; 64]| {
        let at = n * stride + PREFETCH_BYTES;
        if at < apart * stride || then.is_empty() {
            return row.wrapping_byte_add(PREFETCH_BYTES);
        }
        let first = then.bytes.as_ptr().cast::<[u8; 64]>();
        first.wrapping_byte_add(r * then_apart * stride + at - apart * stride)
    };
    product(isa, w, w.len(), x, out, |i| i, later);
}

/// Some rows; see [`crate::Kernels::int4_sums_of`].
#[inline(always)]
pub(crate) fn listed<S: Simd>(
    isa: S,
    w: Int4Rows<'_>,
    rows: &[u32],
    x: TokensRef<'_>,
    out: MatMut<'_, i32>,
) {
    let blocks = Int4Rows::stride(w.cols) / 64;
    let bytes = w.bytes.as_chunks::<64>().0.as_ptr();
    let apart = rows.len().div_ceil(ROWS);
    let later = |n: usize, r: usize, row| match rows.get(n + r * apart + 1) {
        Some(&later) => bytes.wrapping_add(later as usize * blocks),
        None => row,
    };
    product(isa, w, rows.len(), x, out, |i| rows[i] as usize, later);
}

/// The rows `row(0..count)`; `later` says where the stream of the `n`th row of stream `r`
/// goes on.
#[inline(always)]
fn product<S: Simd>(
    isa: S,
    w: Int4Rows<'_>,
    count: usize,
    x: TokensRef<'_>,
    mut out: MatMut<'_, i32>,
    row: impl Fn(usize) -> usize + Copy,
    later: impl Fn(usize, usize, *const [u8; 64]) -> *const [u8; 64] + Copy,
) {
    let blocks = Int4Rows::stride(w.cols) / 64;
    let bytes = w.bytes.as_chunks::<64>().0;
    let acts = |t: usize| &x.token(t).as_chunks::<64>().0[..2 * blocks];
    let apart = count.div_ceil(ROWS);
    for n in 0..apart {
        // Behind the last row it is repeated and its sum dropped.
        let (mut rows, mut next) = ([&bytes[..0]; ROWS], [bytes.as_ptr(); ROWS]);
        for r in 0..ROWS {
            let i = (n + r * apart).min(count - 1);
            let at = row(i) * blocks;
            rows[r] = &bytes[at..at + blocks];
            next[r] = later(n, r, rows[r].as_ptr());
        }
        let mut t = 0;
        while t < x.len() {
            // Where registers are few, the rows come from the cache once more for
            // every vector.
            let mut sums = [[0; ROWS]; 4];
            let done = match x.len() - t {
                4.. if S::WIDE => {
                    sums = dot_rows::<S, 4>(isa, rows, next, array!(4, i => acts(t + i)));
                    4
                }
                2.. if S::WIDE => {
                    [sums[0], sums[1]] = dot_rows::<S, 2>(isa, rows, next, [acts(t), acts(t + 1)]);
                    2
                }
                _ => {
                    [sums[0]] = dot_rows::<S, 1>(isa, rows, next, [acts(t)]);
                    1
                }
            };
            for (t, sums) in (t..).zip(&sums[..done]) {
                let out = out.row(t);
                for (r, &sum) in sums.iter().enumerate() {
                    if let Some(out) = out.get_mut(n + r * apart) {
                        *out = sum;
                    }
                }
            }
            t += done;
        }
    }
}

/// `Σ w · q` of four rows and `T` vectors, asking for the rows `next`.
#[inline(always)]
fn dot_rows<S: Simd, const T: usize>(
    isa: S,
    rows: [&[[u8; 64]]; ROWS],
    next: [*const [u8; 64]; ROWS],
    acts: [&[[i8; 64]]; T],
) -> [[i32; ROWS]; T] {
    let blocks = rows[0].len();
    let rows = array!(ROWS, r => &rows[r][..blocks]);
    let acts = array!(T, t => &acts[t][..2 * blocks]);
    let mut sums = [[isa.sums_zero(); ROWS]; T];
    for b in 0..blocks {
        let w = array!(ROWS, r => {
            isa.prefetch(next[r].wrapping_add(b).cast());
            isa.nibbles(isa.load(&rows[r][b]))
        });
        for half in 0..2 {
            let q = array!(T, t => isa.load_acts(&acts[t][2 * b + half]));
            for r in 0..ROWS {
                for t in 0..T {
                    sums[t][r] = isa.dot_nibbles(sums[t][r], w[r][half], q[t]);
                }
            }
        }
    }
    array!(T, t => isa.totals(sums[t]))
}

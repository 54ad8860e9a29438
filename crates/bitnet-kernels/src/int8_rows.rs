//! Int8 rows times int8 vectors: the cheap scan of a head that is scored exactly
//! afterwards. Sums are exact, so every instruction set gives the same ones.

use crate::mat::MatMut;
use crate::simd::{Simd, array};
use crate::ternary::TokensRef;

/// Most columns: 2^16 products of at most 255 · 128 stay below 2^31.
pub const INT8_MAX_COLS: usize = 1 << 16;

/// Rows that share each vector of activations.
const ROWS: usize = 4;

/// How far ahead of the block in use memory is asked for.
const PREFETCH_BYTES: usize = 4096;

/// Int8 rows, each value stored as `value + 128`: the unsigned operand that the
/// int8 instructions of x86 ask for.
#[derive(Debug, Clone, Copy)]
pub struct Int8Rows<'a> {
    /// Columns, without padding; at most [`INT8_MAX_COLS`].
    pub cols: usize,
    /// Whole rows of [`Int8Rows::stride`] bytes; the padding may be any value.
    pub bytes: &'a [u8],
}

impl<'a> Int8Rows<'a> {
    /// Bytes from one row to the next: whole vectors of 64.
    #[must_use]
    pub const fn stride(cols: usize) -> usize {
        cols.next_multiple_of(64)
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
    pub fn rows(&self, start: usize, end: usize) -> Int8Rows<'a> {
        let stride = Self::stride(self.cols);
        Int8Rows { bytes: &self.bytes[start * stride..end * stride], ..*self }
    }
}

/// See [`crate::Kernels::int8_sums`].
#[inline(always)]
pub(crate) fn product<S: Simd>(
    isa: S,
    w: Int8Rows<'_>,
    x: TokensRef<'_>,
    mut out: MatMut<'_, i32>,
) {
    let blocks = Int8Rows::stride(w.cols) / 64;
    let bytes = w.bytes.as_chunks::<64>().0;
    let acts = |t: usize| &x.token(t).as_chunks::<64>().0[..blocks];
    let mut n = 0;
    while n < w.len() {
        // Behind the last row its neighbour is repeated and its sum dropped.
        let rows: [&[[u8; 64]]; ROWS] = array!(ROWS, r => {
            let row = (n + r).min(w.len() - 1);
            &bytes[row * blocks..(row + 1) * blocks]
        });
        let valid = ROWS.min(w.len() - n);
        let mut t = 0;
        while t < x.len() {
            // Where registers are few, the rows come from the cache a second time.
            let (sums, count) = if S::WIDE && x.len() - t >= 2 {
                (dot_rows::<S, 2>(isa, rows, [acts(t), acts(t + 1)]), 2)
            } else {
                let [sums] = dot_rows::<S, 1>(isa, rows, [acts(t)]);
                ([sums; 2], 1)
            };
            for (t, sums) in (t..).zip(&sums[..count]) {
                for (out, &sum) in out.row(t)[n..n + valid].iter_mut().zip(sums) {
                    *out = sum - 128 * x.sums[t];
                }
            }
            t += count;
        }
        n += ROWS;
    }
}

/// `Σ (value + 128) · q` of four rows and `T` vectors.
#[inline(always)]
fn dot_rows<S: Simd, const T: usize>(
    isa: S,
    rows: [&[[u8; 64]]; ROWS],
    acts: [&[[i8; 64]]; T],
) -> [[i32; ROWS]; T] {
    let blocks = rows[0].len();
    let rows = array!(ROWS, r => &rows[r][..blocks]);
    let acts = array!(T, t => &acts[t][..blocks]);
    let mut sums = [[isa.sums_zero(); ROWS]; T];
    for b in 0..blocks {
        let q = array!(T, t => isa.load_acts(&acts[t][b]));
        for r in 0..ROWS {
            isa.prefetch(rows[r][b].as_ptr().wrapping_add(PREFETCH_BYTES));
            let w = isa.load(&rows[r][b]);
            for t in 0..T {
                sums[t][r] = isa.dot_bytes(sums[t][r], w, q[t]);
            }
        }
    }
    array!(T, t => isa.totals(sums[t]))
}

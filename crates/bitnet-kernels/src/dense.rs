//! Dense rows times a float vector: the head, the embedding and the linear
//! layers of float twins.

use half::{bf16, f16};

use bitnet_core::ternary::LANES;

use crate::mat::MatMut;
use crate::simd::{Element, Simd, array};

/// The rows of a dense matrix, row-major, in one of the stored precisions.
#[derive(Debug, Clone, Copy)]
pub enum DenseRows<'a> {
    /// IEEE single precision.
    F32(&'a [f32]),
    /// IEEE half precision.
    F16(&'a [f16]),
    /// bfloat16.
    Bf16(&'a [bf16]),
}

impl<'a> DenseRows<'a> {
    /// Elements in all rows.
    #[must_use]
    pub fn len(self) -> usize {
        match self {
            Self::F32(x) => x.len(),
            Self::F16(x) => x.len(),
            Self::Bf16(x) => x.len(),
        }
    }

    /// Whether there is no row.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// Rows `start..end` of a matrix of `cols` columns.
    ///
    /// # Panics
    /// If the range is outside the matrix.
    #[must_use]
    pub fn rows(self, cols: usize, start: usize, end: usize) -> DenseRows<'a> {
        let range = start * cols..end * cols;
        match self {
            Self::F32(x) => DenseRows::F32(&x[range]),
            Self::F16(x) => DenseRows::F16(&x[range]),
            Self::Bf16(x) => DenseRows::Bf16(&x[range]),
        }
    }

    /// Writes row `row` as f32 (the look-up of an embedding).
    ///
    /// # Panics
    /// If there is no such row of `out.len()` columns.
    pub fn read_row(self, row: usize, out: &mut [f32]) {
        let range = row * out.len()..(row + 1) * out.len();
        match self {
            Self::F32(x) => out.copy_from_slice(&x[range]),
            Self::F16(x) => out.iter_mut().zip(&x[range]).for_each(|(o, x)| *o = x.widen()),
            Self::Bf16(x) => out.iter_mut().zip(&x[range]).for_each(|(o, x)| *o = x.widen()),
        }
    }
}

/// Tokens whose vectors are kept in the cache while all rows pass by.
const TOKENS: usize = 32;

/// `out[t, n] = rows[n] · xs[t]`; see [`crate::Kernels::dense_matmul`].
#[inline(always)]
pub(crate) fn matmul<S: Simd>(
    isa: S,
    rows: DenseRows<'_>,
    xs: &[f32],
    cols: usize,
    out: MatMut<'_, f32>,
) {
    match rows {
        DenseRows::F32(w) => matmul_of(isa, w, xs, cols, out),
        DenseRows::F16(w) => matmul_of(isa, w, xs, cols, out),
        DenseRows::Bf16(w) => matmul_of(isa, w, xs, cols, out),
    }
}

#[inline(always)]
fn matmul_of<S: Simd, E: Element>(
    isa: S,
    w: &[E],
    xs: &[f32],
    cols: usize,
    mut out: MatMut<'_, f32>,
) {
    let (tokens, rows) = (out.rows(), out.cols());
    for first in (0..tokens).step_by(TOKENS) {
        let end = tokens.min(first + TOKENS);
        let mut n = 0;
        while n < rows {
            // A tile's sums stay in registers: 16 of 32, or 4 of 8.
            let (r, t) = match (rows - n, S::WIDE, end - first) {
                (4.., _, 1) => (4, 1),
                (4.., true, _) => (4, 4),
                (2.., _, _) => (2, 2),
                _ => (1, 1),
            };
            let mut at = first;
            while at < end {
                let mut tile = Tile { isa, w, xs, cols, n, t: at, out: out.reborrow() };
                at += match (r, t.min(end - at)) {
                    (4, 4) => tile.run::<4, 4>(),
                    (4, 1) => tile.run::<4, 1>(),
                    (4, _) => tile.run::<4, 2>(),
                    (2, 2) => tile.run::<2, 2>(),
                    (2, _) => tile.run::<2, 1>(),
                    _ => tile.run::<1, 1>(),
                };
            }
            n += r;
        }
    }
}

/// Some rows from `n` on and some tokens from `t` on.
struct Tile<'a, S, E> {
    isa: S,
    w: &'a [E],
    xs: &'a [f32],
    cols: usize,
    n: usize,
    t: usize,
    out: MatMut<'a, f32>,
}

impl<S: Simd, E: Element> Tile<'_, S, E> {
    /// Writes the products of `R` rows and `T` tokens; returns `T`.
    #[inline(always)]
    fn run<const R: usize, const T: usize>(&mut self) -> usize {
        let Self { isa, cols, .. } = *self;
        let (w, x) = (&self.w[self.n * cols..], &self.xs[self.t * cols..]);
        let w = array!(R, r => &w[r * cols..(r + 1) * cols]);
        let x = array!(T, t => &x[t * cols..(t + 1) * cols]);
        let sums = dot_tile(isa, w, x, cols);
        for (t, sums) in sums.iter().enumerate() {
            self.out.row(self.t + t)[self.n..self.n + R].copy_from_slice(sums);
        }
        T
    }
}

/// The dot products of `R` rows and `T` vectors, each in the order of lanes.
#[inline(always)]
fn dot_tile<S: Simd, E: Element, const R: usize, const T: usize>(
    isa: S,
    w: [&[E]; R],
    x: [&[f32]; T],
    cols: usize,
) -> [[f32; R]; T] {
    let whole = cols / LANES;
    let chunks_w = array!(R, r => &w[r].as_chunks::<LANES>().0[..whole]);
    let chunks_x = array!(T, t => &x[t].as_chunks::<LANES>().0[..whole]);
    let mut sums = [[isa.splat(0.0); R]; T];
    for k in 0..whole {
        let w = array!(R, r => E::load(isa, &chunks_w[r][k]));
        for t in 0..T {
            let x = isa.load_f32(&chunks_x[t][k]);
            for r in 0..R {
                sums[t][r] = isa.mul_add(sums[t][r], w[r], x);
            }
        }
    }
    let mut out = [[0.0; R]; T];
    for t in 0..T {
        for r in 0..R {
            if !cols.is_multiple_of(LANES) {
                let w = E::load_rest(isa, &w[r][whole * LANES..]);
                let x = f32::load_rest(isa, &x[t][whole * LANES..]);
                sums[t][r] = isa.mul_add(sums[t][r], w, x);
            }
            out[t][r] = isa.lane_sum(sums[t][r]);
        }
    }
    out
}

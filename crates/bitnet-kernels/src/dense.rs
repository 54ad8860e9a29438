//! Dense rows times a float vector: the head, the embedding and the linear
//! layers of float twins. Each of sixteen lanes is a chain of fused multiply-adds over
//! ascending columns, and the lanes are added in their tree. Rows of blocks
//! ([`crate::dense_blocks`]) give the bits that their values give as f32.

use half::{bf16, f16};

use bitnet_core::ternary::LANES;

use crate::dense_blocks::{self, INT4_BYTES, INT8_BYTES, ROW_BLOCK};
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
    /// Blocks of [`ROW_BLOCK`] int8 with a scale, GGUF's Q8_0: a half, then the
    /// integers.
    Int8(&'a [[u8; INT8_BYTES]]),
    /// Blocks of [`ROW_BLOCK`] 4-bit integers with a scale, GGUF's Q4_0: a half, then
    /// `integer + 8` of elements `j` and `j + 16` in the low and high half of byte `j`.
    Int4(&'a [[u8; INT4_BYTES]]),
}

impl<'a> DenseRows<'a> {
    /// Elements in all rows.
    #[must_use]
    pub fn len(self) -> usize {
        match self {
            Self::F32(x) => x.len(),
            Self::F16(x) => x.len(),
            Self::Bf16(x) => x.len(),
            Self::Int8(x) => x.len() * ROW_BLOCK,
            Self::Int4(x) => x.len() * ROW_BLOCK,
        }
    }

    /// The name of what they are stored as.
    #[must_use]
    pub fn type_name(self) -> &'static str {
        match self {
            Self::F32(_) => "f32",
            Self::F16(_) => "f16",
            Self::Bf16(_) => "bf16",
            Self::Int8(_) => "int8",
            Self::Int4(_) => "int4",
        }
    }

    /// Bytes of all rows.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::F32(x) => x.len() * 4,
            Self::F16(x) => x.len() * 2,
            Self::Bf16(x) => x.len() * 2,
            Self::Int8(x) => x.len() * INT8_BYTES,
            Self::Int4(x) => x.len() * INT4_BYTES,
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
    /// If the range is outside the matrix, or rows of blocks are not whole blocks.
    #[must_use]
    pub fn rows(self, cols: usize, start: usize, end: usize) -> DenseRows<'a> {
        let range = start * cols..end * cols;
        self.check(cols);
        let blocks = range.start / ROW_BLOCK..range.end / ROW_BLOCK;
        match self {
            Self::F32(x) => DenseRows::F32(&x[range]),
            Self::F16(x) => DenseRows::F16(&x[range]),
            Self::Bf16(x) => DenseRows::Bf16(&x[range]),
            Self::Int8(x) => DenseRows::Int8(&x[blocks]),
            Self::Int4(x) => DenseRows::Int4(&x[blocks]),
        }
    }

    /// What every use of them as rows of `cols` columns relies on.
    pub(crate) fn check(self, cols: usize) {
        let blocks = matches!(self, Self::Int8(_) | Self::Int4(_));
        assert!(!blocks || cols.is_multiple_of(ROW_BLOCK), "{cols} columns in whole blocks");
    }

    /// Writes row `row` as f32 (the look-up of an embedding).
    ///
    /// # Panics
    /// If there is no such row of `out.len()` columns.
    pub fn read_row(self, row: usize, out: &mut [f32]) {
        self.check(out.len());
        let range = row * out.len()..(row + 1) * out.len();
        match self {
            Self::F32(x) => out.copy_from_slice(&x[range]),
            Self::F16(x) => out.iter_mut().zip(&x[range]).for_each(|(o, x)| *o = x.widen()),
            Self::Bf16(x) => out.iter_mut().zip(&x[range]).for_each(|(o, x)| *o = x.widen()),
            Self::Int8(x) => dense_blocks::read(x.row(row, out.len()), out),
            Self::Int4(x) => dense_blocks::read(x.row(row, out.len()), out),
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
        DenseRows::Int8(w) => matmul_of(isa, w, xs, cols, out),
        DenseRows::Int4(w) => matmul_of(isa, w, xs, cols, out),
    }
}

/// Rows in one of the stored forms.
pub(crate) trait Rows: Copy {
    /// Row `n` of rows of `cols` columns.
    fn row(self, n: usize, cols: usize) -> Self;

    /// The dot products of `R` rows and `T` vectors, each in the order of lanes. Memory
    /// is asked for the share of this tile in what lies behind the rows.
    fn dot_tile<S: Simd, const R: usize, const T: usize>(
        isa: S,
        w: [Self; R],
        x: [&[f32]; T],
        cols: usize,
        share: Share,
    ) -> [[f32; R]; T];
}

/// One of the tiles that use the same rows. All of them together ask for what the rows
/// behind will need: were it the first one alone, it would wait for memory and memory
/// for the others.
#[derive(Clone, Copy)]
pub(crate) struct Share {
    pub(crate) tile: usize,
    pub(crate) tiles: usize,
}

impl Share {
    /// How far behind each row of `bytes` bytes it begins, and how far it goes on where
    /// the rows go on by `step` bytes.
    #[inline(always)]
    pub(crate) fn ahead(self, bytes: usize, step: usize) -> (usize, usize) {
        (PREFETCH_BYTES + bytes * self.tile / self.tiles, step.div_ceil(self.tiles))
    }
}

impl<E: Element> Rows for &[E] {
    #[inline(always)]
    fn row(self, n: usize, cols: usize) -> Self {
        &self[n * cols..(n + 1) * cols]
    }

    #[inline(always)]
    fn dot_tile<S: Simd, const R: usize, const T: usize>(
        isa: S,
        w: [Self; R],
        x: [&[f32]; T],
        cols: usize,
        share: Share,
    ) -> [[f32; R]; T] {
        dot_tile(isa, w, x, cols, share)
    }
}

#[inline(always)]
fn matmul_of<S: Simd, W: Rows>(isa: S, w: W, xs: &[f32], cols: usize, mut out: MatMut<'_, f32>) {
    let (tokens, rows) = (out.rows(), out.cols());
    // Four rows side by side, each a stream through a quarter of the matrix.
    let apart = rows / 4;
    for first in (0..tokens).step_by(TOKENS) {
        let end = tokens.min(first + TOKENS);
        for n in 0..apart {
            let fours = [n, n + apart, n + 2 * apart, n + 3 * apart];
            // A tile's sums stay in registers: 24 of 32, or 4 of 8. Tiles of nearly
            // one size: 4 and 3 tokens, not 6 and 1.
            let tiles = (end - first).div_ceil(if S::WIDE { 6 } else { 2 });
            let share = Share { tile: 0, tiles };
            let mut tile = Tile { isa, w, xs, cols, t: first, out: out.reborrow(), share };
            while tile.t < end {
                let left = end - tile.t;
                match left.div_ceil(tiles - tile.share.tile) {
                    1 => tile.run::<4, 1>(fours),
                    2 if S::WIDE => tile.run::<4, 2>(fours),
                    3 if S::WIDE => tile.run::<4, 3>(fours),
                    4 if S::WIDE => tile.run::<4, 4>(fours),
                    5 if S::WIDE => tile.run::<4, 5>(fours),
                    6 if S::WIDE => tile.run::<4, 6>(fours),
                    _ => {
                        let t = tile.t;
                        tile.run::<2, 2>([fours[0], fours[1]]);
                        tile.t = t;
                        tile.run::<2, 2>([fours[2], fours[3]]);
                    }
                }
                tile.share.tile += 1;
            }
        }
        for n in 4 * apart..rows {
            let share = Share { tile: 0, tiles: 1 };
            let mut tile = Tile { isa, w, xs, cols, t: first, out: out.reborrow(), share };
            while tile.t < end {
                tile.run::<1, 1>([n]);
            }
        }
    }
}

/// Some tokens from `t` on.
struct Tile<'a, S, W> {
    isa: S,
    w: W,
    xs: &'a [f32],
    cols: usize,
    t: usize,
    out: MatMut<'a, f32>,
    share: Share,
}

impl<S: Simd, W: Rows> Tile<'_, S, W> {
    /// Writes the products of `R` rows and `T` tokens, and goes past the tokens.
    #[inline(always)]
    fn run<const R: usize, const T: usize>(&mut self, rows: [usize; R]) {
        let Self { isa, w, cols, .. } = *self;
        let x = &self.xs[self.t * cols..];
        let w = array!(R, r => w.row(rows[r], cols));
        let x = array!(T, t => &x[t * cols..(t + 1) * cols]);
        let sums = W::dot_tile(isa, w, x, cols, self.share);
        for (t, sums) in sums.iter().enumerate() {
            let out = self.out.row(self.t + t);
            for (&n, &sum) in rows.iter().zip(sums) {
                out[n] = sum;
            }
        }
        self.t += T;
    }
}

/// How far ahead of the vector in use memory is asked for, in each stream.
const PREFETCH_BYTES: usize = 2048;

/// The dot products of `R` rows and `T` vectors, each in the order of lanes.
#[inline(always)]
fn dot_tile<S: Simd, E: Element, const R: usize, const T: usize>(
    isa: S,
    w: [&[E]; R],
    x: [&[f32]; T],
    cols: usize,
    share: Share,
) -> [[f32; R]; T] {
    let whole = cols / LANES;
    let (mut ahead, step) = share.ahead(size_of_val(w[0]), size_of::<[E; LANES]>());
    let chunks_w = array!(R, r => &w[r].as_chunks::<LANES>().0[..whole]);
    let chunks_x = array!(T, t => &x[t].as_chunks::<LANES>().0[..whole]);
    let mut sums = [[isa.splat(0.0); R]; T];
    for k in 0..whole {
        let lanes = array!(R, r => {
            isa.prefetch(w[r].as_ptr().cast::<u8>().wrapping_add(ahead));
            E::load(isa, &chunks_w[r][k])
        });
        ahead += step;
        for t in 0..T {
            let x = isa.load_f32(&chunks_x[t][k]);
            for r in 0..R {
                sums[t][r] = isa.fma(sums[t][r], lanes[r], x);
            }
        }
    }
    let mut out = [[0.0; R]; T];
    for t in 0..T {
        for r in 0..R {
            if !cols.is_multiple_of(LANES) {
                let w = E::load_rest(isa, &w[r][whole * LANES..]);
                let x = f32::load_rest(isa, &x[t][whole * LANES..]);
                sums[t][r] = isa.fma(sums[t][r], w, x);
            }
            out[t][r] = isa.lane_sum(sums[t][r]);
        }
    }
    out
}

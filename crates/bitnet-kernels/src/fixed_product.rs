//! The products of a linear layer's backward pass in fixed point.
//!
//! One side of such a product is integers: ternary weights, int8 activations, or the rows of
//! a head that were rounded to int8. The other, the gradient, is rounded to integers of 24 bits, `v = round(g / step)` with
//! `step = absmax / (127 · 2^16)`, or of 16 bits, `absmax / (127 · 2^8)`. Their products are
//! added exactly, `absmax` being that of the terms which one element adds up, and the sum is
//! rounded to f32 once. So an element is off by at most half a step times the magnitudes that
//! it meets, beside the roundings of `g / step` and of the sum: with 24 bits normwise what
//! a chain of f32 additions loses.
//!
//! How the integers are added up is an instruction set's affair. Where an instruction
//! multiplies four times as many bytes as floats they have signed digits of 8 bits,
//! `v = d0 + 2^8 · d1 + 2^16 · d2`, and three products of bytes take less time than one of
//! floats. Elsewhere the gradients of weights take digits of 12 bits, or one of 16, and
//! products of 16-bit words, which take as long as floats. Sums of digits fit an i32.
//!
//! A gradient that is infinite or not a number makes all that it has a part in NaN; where
//! `absmax` is less than 2^-100 the terms count as zeros.

use std::mem::MaybeUninit;

use bitnet_core::Layout;

use crate::float_product::MatRef;
use crate::isa::{Kernels, dispatch};
use crate::mat::{MatMut, init};
use crate::panel;
use crate::product::P2;
use crate::simd::{Simd, array};
use crate::ternary::{TernaryRows, TokensRef};

mod left;

use left::{Block, Lanes, MOST, split, split_rows};

/// The digits of 8 bits that a gradient is written with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Digits {
    /// 16 bits.
    Two,
    /// 24 bits.
    Three,
}

impl Digits {
    /// How many there are.
    #[must_use]
    pub const fn count(self) -> usize {
        match self {
            Self::Two => 2,
            Self::Three => 3,
        }
    }
}

/// Evaluates an expression with the number of digits as a constant.
macro_rules! of_digits {
    ($digits:expr, $D:ident => $body:expr) => {
        match $digits {
            Digits::Two => {
                const $D: usize = 2;
                $body
            }
            Digits::Three => {
                const $D: usize = 3;
                $body
            }
        }
    };
}

/// Tokens whose products are added as integers. Their activations of one panel and the
/// gradients of one strip lie in the nearest cache.
pub const FIXED_DEPTH: usize = 512;

/// Most ternary values that one element of a product in fixed point meets: their sums of two
/// digits, at most 32 896 each, fit an i32.
pub const FIXED_MOST_COLS: usize = 65_280;

/// Columns in a vector.
const UNIT: usize = 16;

/// Vectors in a panel.
const PANEL: usize = 2;

/// Rows of the output in a strip.
const STRIP: usize = 4;

/// Rows of the output whose gradients are rounded together.
const BLOCK_ROWS: usize = 96;

/// What `absmax` becomes.
const fn largest(digits: usize) -> f32 {
    (127 << (8 * (digits - 1))) as f32
}

/// Smaller gradients are zero: their step would be no normal float.
const SMALLEST: f32 = f32::from_bits((127 - 100) << 23);

/// What makes the digits unsigned: 128 each.
const fn unsigned(digits: usize) -> i32 {
    0x80_8080 >> (8 * 3usize.saturating_sub(digits))
}

/// One cache line of packed activations: some tokens of sixteen columns.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub struct Line([u8; 64]);

impl Default for Line {
    fn default() -> Self {
        Self([0; 64])
    }
}

/// Packed activations `[tokens, cols]`, the right operand of a weights' gradient (or the rows
/// of a head in their place, that of its input's gradient).
#[derive(Debug, Clone, Copy)]
pub struct PackedActs<'a> {
    data: &'a [Line],
    scales: &'a [f32],
    cols: usize,
}

impl<'a> PackedActs<'a> {
    /// What [`Kernels::pack_acts`] wrote, block after block of [`FIXED_DEPTH`] tokens, and
    /// the scale of every token.
    #[must_use]
    pub fn new(data: &'a [Line], scales: &'a [f32], cols: usize) -> Self {
        Self { data, scales, cols }
    }

    /// The panel of the columns from `col` on of the block from token `first` on, and the
    /// vectors of a group of `group` tokens.
    #[inline(always)]
    fn panel(&self, group: usize, first: usize, col: usize) -> (&'a [Line], usize) {
        let (width, col) = (self.cols.div_ceil(UNIT), col / UNIT);
        let groups = FIXED_DEPTH.min(self.scales.len() - first).div_ceil(group);
        let own = PANEL.min(width - col);
        let start = first / group * width + groups * col;
        (&self.data[start..start + groups * own], own)
    }
}

/// The rounding of gradients whose largest magnitude has these bits: what they are
/// multiplied by, and the step.
#[inline(always)]
fn steps(digits: usize, absmax: u32) -> (f32, f32) {
    let absmax = f32::from_bits(absmax);
    if !absmax.is_finite() {
        return (0.0, f32::NAN);
    }
    if absmax < SMALLEST {
        return (0.0, 0.0);
    }
    (largest(digits) / absmax, absmax / largest(digits))
}

/// `x · inv` to the nearest integer, halves to even; its magnitude is below 2^23. Of
/// what is not a number it makes some integer.
#[inline(always)]
fn round(x: f32, inv: f32) -> i32 {
    const TWO_23: f32 = (1 << 23) as f32;
    let scaled = x * inv;
    // Between 2^23 and 2^24 the floats are the integers.
    let magnitude = ((scaled.abs() + TWO_23).to_bits() & 0x7f_ffff) as i32;
    let sign = scaled.to_bits() as i32 >> 31;
    (magnitude ^ sign) - sign
}

/// Joins the sums of the digits of 8 bits. An i32 holds the two low ones of [`FIXED_DEPTH`]
/// products with int8 or [`FIXED_MOST_COLS`] with ternary values; those that are too large by the same
/// amount as `extra`, on their way, wrap around and back.
#[inline(always)]
fn join<const D: usize>(sums: [i32; D], extra: [i32; 2]) -> f32 {
    let low = sums[0].wrapping_add(sums[1.min(D - 1)] << 8).wrapping_sub(extra[0]);
    if D < 3 {
        return low as f32;
    }
    whole(sums[D - 1].wrapping_sub(extra[1]), 65536.0, low)
}

/// `high · unit + low`, rounded once.
#[inline(always)]
fn whole(high: i32, unit: f64, low: i32) -> f32 {
    (f64::from(high) * unit + f64::from(low)) as f32
}

impl Kernels {
    /// Tokens of a lane.
    fn group(self) -> usize {
        dispatch!(self, isa => group(isa))
    }

    /// Lines that the activations of `tokens` tokens occupy, packed.
    #[must_use]
    pub fn packed_acts_len(self, tokens: usize, cols: usize) -> usize {
        tokens.div_ceil(self.group()) * cols.div_ceil(UNIT)
    }

    /// Writes the digits of the gradient of one token, least significant first, zeroes the
    /// padding behind them and returns the step; `sums` become the sums of the digits. The
    /// step is NaN where the gradient is not finite, and 0 where it counts as zero.
    ///
    /// # Shapes
    /// `x` is `[N]`, `q` is `[digits, stride]`, `sums` is `[digits]`.
    ///
    /// # Panics
    /// If the shapes do not fit, or a row of `q` is shorter than `x`.
    pub fn digits(self, digits: Digits, x: &[f32], q: &mut [i8], sums: &mut [i32]) -> f32 {
        let stride = q.len() / digits.count();
        assert!(stride * digits.count() == q.len() && stride >= x.len(), "digits of {}", x.len());
        of_digits!(digits, D => {
            let Some(sums) = sums.as_mut_array::<D>() else { panic!("{} sums", sums.len()) };
            dispatch!(self, _isa => write_digits::<D>(x, q, stride, sums))
        })
    }

    /// The product of packed rows and tokens in fixed point:
    /// `out[t, n] = step[t] · weight_scale · Σ_k trit[n, k] · v[t, k]`.
    ///
    /// # Shapes
    /// `w` is `[N, K]` in layout P2; `x` holds the digits of every token one after another,
    /// each as a token whose scale is the step; `out` is `[tokens, N]`.
    ///
    /// # Panics
    /// If the shapes do not fit, or K is more than [`FIXED_MOST_COLS`].
    pub fn ternary_matmul_fixed(
        self,
        digits: Digits,
        w: TernaryRows<'_>,
        x: TokensRef<'_>,
        out: MatMut<'_, f32>,
    ) {
        assert_eq!(w.layout, Layout::P2, "the layout of training");
        let shape = (digits.count() * out.rows(), out.cols());
        assert_eq!((x.len(), w.len()), shape, "shapes of a product");
        assert!(x.stride >= w.layout.padded_cols(w.cols), "tokens are padded");
        assert!(w.cols <= FIXED_MOST_COLS, "sums of {} products", w.cols);
        if !x.is_empty() {
            of_digits!(digits, D => dispatch!(self, isa => inputs::<_, D>(isa, w, x, out)));
        }
    }

    /// Packs the activations of one block, at most [`FIXED_DEPTH`] tokens: the panels of the
    /// columns from `col` on, a multiple of 32, as many as `out` has room for.
    ///
    /// # Panics
    /// If the shapes do not fit.
    pub fn pack_acts(self, tokens: TokensRef<'_>, col: usize, out: &mut [Line]) {
        assert!(tokens.len() <= FIXED_DEPTH, "{} tokens of a block", tokens.len());
        assert!(col.is_multiple_of(PANEL * UNIT), "a panel begins at {col}");
        let groups = tokens.len().div_ceil(self.group()).max(1);
        assert!(
            out.len().is_multiple_of(groups) && col + out.len() / groups * UNIT <= tokens.stride,
            "{} lines of {groups} groups",
            out.len()
        );
        dispatch!(self, isa => pack_acts(isa, tokens, col, out));
    }

    /// The gradient of weights in fixed point: `out[n, k] = Σ_t g[n, t] · scale[t] · q[t, k]`,
    /// or that added to `out` where `accumulate`, one addition for every block of
    /// [`FIXED_DEPTH`] tokens.
    ///
    /// # Shapes
    /// `g` is `[N, tokens]`, transposed or not; `acts` is `[tokens, K]`, `out` is `[N, K]`.
    ///
    /// # Panics
    /// If the shapes do not fit.
    pub fn fixed_product(
        self,
        digits: Digits,
        g: MatRef<'_>,
        acts: PackedActs<'_>,
        out: MatMut<'_, f32>,
        accumulate: bool,
    ) {
        assert_eq!((g.rows(), acts.cols), (out.rows(), out.cols()), "shapes of a product");
        assert_eq!(g.cols(), acts.scales.len(), "tokens of a product");
        let packed = self.packed_acts_len(g.cols(), acts.cols);
        assert_eq!(acts.data.len(), packed, "packed activations");
        dispatch!(self, isa => weights(isa, digits, g, acts, out, accumulate));
    }
}

/// [`Simd::GROUP`] of a value.
#[inline(always)]
fn group<S: Simd>(_isa: S) -> usize {
    S::GROUP
}

/// See [`Kernels::ternary_matmul_fixed`].
#[inline(always)]
fn inputs<S: Simd, const D: usize>(
    isa: S,
    w: TernaryRows<'_>,
    x: TokensRef<'_>,
    out: MatMut<'_, f32>,
) {
    panel::product::<S, P2, f32, D, _>(
        isa,
        w,
        x,
        out,
        #[inline(always)]
        |t| {
            // Codes are one more than their weights.
            let own = &x.sums[t * D..][..D];
            let extra = [own[0].wrapping_add(own[1] << 8), if D < 3 { 0 } else { own[D - 1] }];
            let scale = x.scales[t * D] * w.weight_scale;
            #[inline(always)]
            move |sums| join::<D>(sums, extra) * scale
        },
    );
}

/// See [`Kernels::digits`].
#[inline(always)]
fn write_digits<const D: usize>(
    x: &[f32],
    q: &mut [i8],
    stride: usize,
    sums: &mut [i32; D],
) -> f32 {
    let mut absmax = 0u32;
    for v in x {
        absmax = absmax.max(v.abs().to_bits());
    }
    let (inv, step) = steps(D, absmax);
    *sums = [0; D];
    let (full, rest) = x.as_chunks::<64>();
    for (i, x) in full.iter().enumerate() {
        let mut v = [0i32; 64];
        for (v, &x) in v.iter_mut().zip(x) {
            *v = round(x, inv) + unsigned(D);
        }
        for (d, sum) in sums.iter_mut().enumerate() {
            let mut own = 0;
            let out = &mut q[d * stride + 64 * i..][..64];
            for (out, v) in out.iter_mut().zip(v) {
                let digit = ((v >> (8 * d)) & 0xff) - 128;
                own += digit;
                *out = digit as i8;
            }
            *sum += own;
        }
    }
    let done = x.len() - rest.len();
    for (d, sum) in sums.iter_mut().enumerate() {
        let (out, padding) = q[d * stride + done..(d + 1) * stride].split_at_mut(rest.len());
        for (out, &x) in out.iter_mut().zip(rest) {
            let digit = (((round(x, inv) + unsigned(D)) >> (8 * d)) & 0xff) - 128;
            *sum += digit;
            *out = digit as i8;
        }
        padding.fill(0);
    }
    step
}

/// See [`Kernels::pack_acts`].
#[inline(always)]
fn pack_acts<S: Simd>(_isa: S, tokens: TokensRef<'_>, col: usize, out: &mut [Line]) {
    if S::GROUP == 4 {
        let flip = if S::UNSIGNED_BYTES { 0x8080_8080 } else { 0 };
        // Row after row: the compiler makes vectors of that, of lane after lane it does not.
        pack_lines::<4>(tokens, col, out, |rows, line| {
            let mut lanes = [flip; UNIT];
            for (j, row) in rows.iter().enumerate() {
                for (lane, &q) in lanes.iter_mut().zip(*row) {
                    *lane ^= u32::from(q as u8) << (8 * j);
                }
            }
            for (to, lane) in line.as_chunks_mut::<4>().0.iter_mut().zip(lanes) {
                *to = lane.to_le_bytes();
            }
        });
    } else {
        pack_lines::<2>(tokens, col, out, |rows, line| {
            for (c, lane) in line.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                let word = |q: i8, at: u32| u32::from(i16::from(q) as u16) << (16 * at);
                *lane = (word(rows[0][c], 0) | word(rows[1][c], 1)).to_le_bytes();
            }
        });
    }
}

/// Writes the lines that `interleave` makes of `G` tokens.
#[inline(always)]
fn pack_lines<const G: usize>(
    tokens: TokensRef<'_>,
    mut col: usize,
    out: &mut [Line],
    interleave: impl Fn([&[i8; UNIT]; G], &mut [u8; 64]),
) {
    let groups = tokens.len().div_ceil(G);
    for panel in out.chunks_mut(groups * PANEL) {
        let own = panel.len() / groups;
        for (g, lines) in panel.chunks_exact_mut(own).enumerate() {
            for (u, line) in lines.iter_mut().enumerate() {
                let from = col + u * UNIT;
                // A group's last tokens may not be there.
                let mut rows = [&[0i8; UNIT]; G];
                for (j, row) in rows.iter_mut().enumerate() {
                    let token = G * g + j;
                    if token < tokens.len()
                        && let Some(own) = tokens.token(token)[from..].first_chunk::<UNIT>()
                    {
                        *row = own;
                    }
                }
                interleave(rows, &mut line.0);
            }
        }
        col += own * UNIT;
    }
}

/// See [`Kernels::fixed_product`].
#[inline(always)]
fn weights<S: Simd>(
    isa: S,
    digits: Digits,
    g: MatRef<'_>,
    acts: PackedActs<'_>,
    out: MatMut<'_, f32>,
    accumulate: bool,
) {
    match (digits, S::GROUP) {
        (Digits::Two, 4) => product::<S, 2, 4>(isa, g, acts, out, accumulate),
        (Digits::Three, 4) => product::<S, 3, 4>(isa, g, acts, out, accumulate),
        (Digits::Two, _) => product::<S, 1, 2>(isa, g, acts, out, accumulate),
        (Digits::Three, _) => product::<S, 2, 2>(isa, g, acts, out, accumulate),
    }
}

/// Digits of 8 bits that a gradient has whose lanes hold `D` parts of `G` tokens.
const fn digits_of(parts: usize, group: usize) -> usize {
    if group == 4 { parts } else { parts + 1 }
}

/// See [`Kernels::fixed_product`]; lanes hold `D` parts of `G` tokens.
#[inline(always)]
fn product<S: Simd, const D: usize, const G: usize>(
    isa: S,
    g: MatRef<'_>,
    acts: PackedActs<'_>,
    mut out: MatMut<'_, f32>,
    accumulate: bool,
) {
    let (tokens, cols) = (g.cols(), out.cols());
    if tokens == 0 && !accumulate {
        (0..out.rows()).for_each(|n| out.row(n).fill(0.0));
    }
    let mut block = Block {
        lanes: [const { MaybeUninit::uninit() }; BLOCK_ROWS / STRIP * MOST],
        steps: [0.0; BLOCK_ROWS],
        sums: [[0; 2]; BLOCK_ROWS],
    };
    for top in (0..g.rows()).step_by(BLOCK_ROWS) {
        let rows = BLOCK_ROWS.min(g.rows() - top);
        for first in (0..tokens).step_by(FIXED_DEPTH) {
            let depth = FIXED_DEPTH.min(tokens - first);
            let own = g.slice_rows(top, top + rows);
            let scales = &acts.scales[first..first + depth];
            if g.is_transposed() {
                split::<S, D, G>(isa, own, first, scales, &mut block);
            } else {
                split_rows::<D, G>(own, first, scales, &mut block);
            }
            let add = accumulate || first > 0;
            let length = depth.div_ceil(G) * D;
            let lanes = &block.lanes[..rows.div_ceil(STRIP) * length];
            // SAFETY: either has written all lanes of these strips.
            let lanes = unsafe { init(lanes) };
            for col in (0..cols).step_by(PANEL * UNIT) {
                let (panel, width) = acts.panel(G, first, col);
                for (s, strip) in lanes.chunks_exact(length).enumerate() {
                    let row = s * STRIP;
                    let count = STRIP.min(rows - row);
                    for next in row + STRIP..rows.min(row + 2 * STRIP) {
                        let end = cols.min(col + width * UNIT);
                        for line in out.row(top + next)[col..end].chunks(UNIT) {
                            isa.prefetch(line.as_ptr().cast());
                        }
                    }
                    let own = Own {
                        steps: &block.steps[row..row + count],
                        sums: &block.sums[row..row + count],
                        row: top + row,
                        col,
                        add,
                    };
                    macro_rules! tiles {
                        ($rows:literal, $vectors:literal, $width:literal) => {
                            for at in (0..STRIP).step_by($rows) {
                                for from in (0..$width).step_by($vectors) {
                                    tile::<S, D, $rows, $vectors, $width>(
                                        isa, strip, at, panel, from, own, &mut out,
                                    );
                                }
                            }
                        };
                    }
                    match width {
                        2 if S::WIDE => tiles!(4, 2, 2),
                        1 if S::WIDE => tiles!(4, 1, 1),
                        2 if D == 1 => tiles!(4, 1, 2),
                        2 => tiles!(2, 1, 2),
                        _ => tiles!(2, 1, 1),
                    }
                }
            }
        }
    }
}

/// Where a tile's results go, and what they are multiplied by.
#[derive(Clone, Copy)]
struct Own<'a> {
    steps: &'a [f32],
    sums: &'a [[i32; 2]],
    row: usize,
    col: usize,
    add: bool,
}

/// `R` rows of a strip from `at` on, with `U` vectors of a panel `W` wide from `from` on.
#[inline(always)]
fn tile<S: Simd, const D: usize, const R: usize, const U: usize, const W: usize>(
    isa: S,
    strip: &[Lanes],
    at: usize,
    panel: &[Line],
    from: usize,
    own: Own<'_>,
    out: &mut MatMut<'_, f32>,
) {
    let mut sums = [[[isa.sums_zero(); U]; D]; R];
    for (lines, parts) in panel.as_chunks::<W>().0.iter().zip(strip.as_chunks::<D>().0) {
        let acts = array!(U, u => isa.load(&lines[from + u].0));
        for d in 0..D {
            for r in 0..R {
                let part = isa.splat_acts(parts[d][at + r].to_le_bytes().map(|b| b as i8));
                for u in 0..U {
                    sums[r][d][u] = isa.dot_lanes(sums[r][d][u], acts[u], part);
                }
            }
        }
    }
    let offset = if S::UNSIGNED_BYTES { 128 } else { 0 };
    let count = own.steps.len().saturating_sub(at).min(R);
    for (r, sums) in sums.iter().enumerate().take(count) {
        let step = own.steps[at + r];
        let extra = array!(2, i => own.sums[at + r][i].wrapping_mul(offset));
        let row = &mut out.row(own.row + at + r)[own.col + from * UNIT..];
        for (u, to) in row.chunks_mut(UNIT).enumerate().take(U) {
            let lanes = array!(D, d => isa.sum_lanes(sums[d][u]));
            let mut values = [0.0f32; UNIT];
            for i in 0..UNIT {
                let parts = array!(D, d => lanes[d][i]);
                let sum = match (S::GROUP, D) {
                    (4, _) => join(parts, extra),
                    (_, 1) => parts[0] as f32,
                    _ => whole(parts[D - 1], 4096.0, parts[0]),
                };
                values[i] = sum * step;
            }
            match to.as_mut_array::<UNIT>() {
                Some(to) if own.add => {
                    for i in 0..UNIT {
                        to[i] += values[i];
                    }
                }
                Some(to) => *to = values,
                None => {
                    for (to, value) in to.iter_mut().zip(values) {
                        *to = if own.add { *to + value } else { value };
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;

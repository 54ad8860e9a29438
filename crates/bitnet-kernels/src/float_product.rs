//! The float matrix product of training.
//!
//! An element of the product is one chain of fused multiply-adds,
//! `acc = fma(a[m, k], b[k, n], acc)` over ascending k from `acc = 0`, whatever
//! the instruction set, the size of a tile or the number of threads: training
//! gives the same bits on every machine.
//!
//! The right operand is packed once into panels of 32 columns, in blocks of
//! [`PACK_DEPTH`] rows, which the nearest cache holds, from floats, from packed ternary weights or from int8
//! activations; the left operand is read where it lies, or, transposed, through a
//! copy on the stack. One thread: callers split packing and product by rows.

use std::mem::MaybeUninit;

use bitnet_core::Layout;

use crate::isa::{Kernels, dispatch};
use crate::mat::MatMut;
use crate::simd::{Simd, array};
use crate::ternary::TokensRef;

/// Rows of the right operand in a block.
pub const PACK_DEPTH: usize = 256;

/// Columns of a panel, but for the last.
const PANEL: usize = 32;

/// Columns in a vector; panels are whole vectors.
const UNIT: usize = 16;

/// Rows of a transposed left operand that are copied side by side: the largest tile.
const STRIP: usize = 12;

/// Rows that meet a panel while it lies in the nearest cache.
const BLOCK_ROWS: usize = 8 * STRIP;

/// How many rows ahead a transposed operand is asked for.
const AHEAD: usize = 8;

/// A read-only view `[rows, cols]` of f32, row-major or transposed.
#[derive(Debug, Clone, Copy)]
pub struct MatRef<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    stride: usize,
    transposed: bool,
}

impl<'a> MatRef<'a> {
    /// A row-major view whose rows are `stride` apart.
    ///
    /// # Panics
    /// If `data` does not reach the last element, or rows overlap.
    #[must_use]
    pub fn new(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        let needed = if rows == 0 || cols == 0 { 0 } else { (rows - 1) * stride + cols };
        assert!(data.len() >= needed, "[{rows}, {cols}] view of {} elements", data.len());
        assert!(stride >= cols, "rows of {cols} are {stride} apart");
        Self { data, rows, cols, stride, transposed: false }
    }

    /// The transposed view.
    #[must_use]
    pub fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, transposed: !self.transposed, ..self }
    }

    /// Rows `start..end` of the view.
    ///
    /// # Panics
    /// If the range is outside the view.
    #[must_use]
    pub fn slice_rows(self, start: usize, end: usize) -> Self {
        assert!(start <= end && end <= self.rows, "rows {start}..{end} of {}", self.rows);
        let offset = if self.transposed { start } else { start * self.stride };
        Self { data: &self.data[offset.min(self.data.len())..], rows: end - start, ..self }
    }

    /// Number of rows.
    #[must_use]
    pub fn rows(self) -> usize {
        self.rows
    }

    /// Number of columns.
    #[must_use]
    pub fn cols(self) -> usize {
        self.cols
    }

    /// Whether the columns of the view are what lies side by side.
    #[must_use]
    pub fn is_transposed(self) -> bool {
        self.transposed
    }

    /// Asks for `len` elements of the stored row `row`, which may not exist.
    #[inline(always)]
    pub(crate) fn prefetch<S: Simd>(&self, isa: S, row: usize, len: usize) {
        let row = self.data.as_ptr().wrapping_add(row * self.stride);
        for line in (0..len).step_by(UNIT) {
            isa.prefetch(row.wrapping_add(line).cast());
        }
    }

    /// `len` elements of the stored row `row`, from `from` on.
    #[inline(always)]
    pub(crate) fn stored(&self, row: usize, from: usize, len: usize) -> &'a [f32] {
        &self.data[row * self.stride + from..][..len]
    }
}

/// Rows of the right operand of a product, `[rows, cols]`, to be packed.
#[derive(Debug, Clone, Copy)]
pub enum PackSource<'a> {
    /// Floats as they are.
    Floats(MatRef<'a>),
    /// Packed ternary weights of layout P2, times a scale.
    Ternary {
        /// Whole rows of [`Layout::row_bytes`] bytes.
        bytes: &'a [u8],
        /// Columns, without padding.
        cols: usize,
        /// Multiplies the ternary value.
        scale: f32,
    },
    /// Int8 activations, each row times its scale.
    Int8 {
        /// One row a token.
        tokens: TokensRef<'a>,
        /// Columns, without padding.
        cols: usize,
    },
}

impl PackSource<'_> {
    fn rows(&self) -> usize {
        match self {
            Self::Floats(m) => m.rows,
            Self::Ternary { bytes, cols, .. } => bytes.len() / Layout::P2.row_bytes(*cols).max(1),
            Self::Int8 { tokens, .. } => tokens.len(),
        }
    }

    fn cols(&self) -> usize {
        match self {
            Self::Floats(m) => m.cols,
            Self::Ternary { cols, .. } | Self::Int8 { cols, .. } => *cols,
        }
    }
}

/// Sixteen packed elements, aligned so that a vector of them is one cache line.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[repr(C, align(64))]
pub struct Unit([f32; UNIT]);

/// Units that `rows` rows of `cols` columns occupy, packed.
#[must_use]
pub const fn packed_len(rows: usize, cols: usize) -> usize {
    rows * cols.div_ceil(UNIT)
}

/// A packed right operand `[rows, cols]`.
#[derive(Debug, Clone, Copy)]
pub struct PackedRef<'a> {
    data: &'a [Unit],
    rows: usize,
    cols: usize,
}

impl<'a> PackedRef<'a> {
    /// What [`Kernels::pack_block`] wrote, block after block.
    ///
    /// # Panics
    /// If `data` is not [`packed_len`] long.
    #[must_use]
    pub fn new(data: &'a [Unit], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), packed_len(rows, cols), "packed [{rows}, {cols}]");
        Self { data, rows, cols }
    }

    /// The first `depth` rows that the block from row `first` holds of the panel of
    /// columns from `col` on, and the units in a row.
    #[inline(always)]
    fn panel(&self, first: usize, depth: usize, col: usize) -> (&'a [Unit], usize) {
        let (width, col) = (self.cols.div_ceil(UNIT), col / UNIT);
        let block = PACK_DEPTH.min(self.rows - first);
        let own = (PANEL / UNIT).min(width - col);
        let start = first * width + block * col;
        (&self.data[start..start + depth * own], own)
    }
}

impl Kernels {
    /// Packs rows of a right operand: all of one block, at most [`PACK_DEPTH`].
    ///
    /// # Shapes
    /// `source` is `[rows, cols]`, `out` has [`packed_len`] units.
    ///
    /// # Panics
    /// If the shapes do not fit.
    pub fn pack_block(self, source: PackSource<'_>, out: &mut [Unit]) {
        let (rows, cols) = (source.rows(), source.cols());
        assert!(rows <= PACK_DEPTH, "{rows} rows of a block");
        assert_eq!(out.len(), packed_len(rows, cols), "packed [{rows}, {cols}]");
        dispatch!(self, isa => pack(isa, source, rows, cols, out));
    }

    /// Copies rows that lie apart side by side.
    ///
    /// # Shapes
    /// `from` is `[rows, cols]`, as is `out`.
    ///
    /// # Panics
    /// If the shapes do not fit, or `from` is transposed.
    pub fn gather(self, from: MatRef<'_>, out: &mut [f32]) {
        assert!(!from.transposed, "rows lie side by side");
        assert_eq!(out.len(), from.rows * from.cols, "[{}, {}]", from.rows, from.cols);
        if from.cols > 0 {
            dispatch!(self, isa => gather(isa, from, out));
        }
    }

    /// `out = a · b`, or `out += a · b` where `accumulate`: the chain then begins
    /// with what is there. `b` may have more rows than `a` has columns and more
    /// columns than `out`; they do not count.
    ///
    /// # Shapes
    /// `a` is `[M, K]`, `b` is `[K, N]`, `out` is `[M, N]`.
    ///
    /// # Panics
    /// If the shapes do not fit.
    pub fn float_product(
        self,
        a: MatRef<'_>,
        b: PackedRef<'_>,
        out: MatMut<'_, f32>,
        accumulate: bool,
    ) {
        assert_eq!(a.rows, out.rows(), "rows of a product");
        assert!(a.cols <= b.rows && out.cols() <= b.cols, "shapes of a product");
        if a.transposed {
            dispatch!(self, isa => product::<_, true>(isa, a, b, out, accumulate));
        } else {
            dispatch!(self, isa => product::<_, false>(isa, a, b, out, accumulate));
        }
    }
}

/// See [`Kernels::gather`].
#[inline(always)]
fn gather<S: Simd>(isa: S, from: MatRef<'_>, out: &mut [f32]) {
    for (t, out) in out.chunks_exact_mut(from.cols).enumerate() {
        from.prefetch(isa, t + AHEAD, from.cols);
        out.copy_from_slice(from.stored(t, 0, from.cols));
    }
}

/// See [`Kernels::pack_block`].
#[inline(always)]
fn pack<S: Simd>(isa: S, source: PackSource<'_>, rows: usize, cols: usize, out: &mut [Unit]) {
    let mut out = Panels { out, rows, cols };
    match source {
        PackSource::Floats(m) if m.transposed => pack_columns(isa, m, &mut out),
        PackSource::Floats(m) => {
            for k in 0..rows {
                let row = m.stored(k, 0, cols);
                for col in (0..cols).step_by(PANEL) {
                    let from = &row[col..cols.min(col + PANEL)];
                    let to = out.row(k, col);
                    // Of known length it is two moves, not a call.
                    match (to.as_mut_array::<PANEL>(), from.as_array::<PANEL>()) {
                        (Some(to), Some(from)) => *to = *from,
                        _ => to[..from.len()].copy_from_slice(from),
                    }
                }
            }
        }
        PackSource::Ternary { bytes, cols, scale } => {
            let row_bytes = Layout::P2.row_bytes(cols);
            for (k, bytes) in bytes.chunks_exact(row_bytes).enumerate() {
                // A panel is half of one plane of a block.
                for col in (0..cols).step_by(PANEL) {
                    let codes = &bytes.as_chunks::<64>().0[col / 256][col % 64..];
                    let shift = 2 * (col / 64 % 4);
                    let out = out.row(k, col);
                    for (out, &code) in out.iter_mut().zip(codes) {
                        *out = (i32::from(code >> shift & 3) - 1) as f32 * scale;
                    }
                }
            }
        }
        PackSource::Int8 { tokens, cols } => {
            for k in 0..rows {
                let (q, scale) = (&tokens.token(k)[..cols], tokens.scales[k]);
                for col in (0..cols).step_by(PANEL) {
                    let from = &q[col..cols.min(col + PANEL)];
                    for (out, &q) in out.row(k, col).iter_mut().zip(from) {
                        *out = f32::from(q) * scale;
                    }
                }
            }
        }
    }
    // Columns behind the last are never read into a result; they are zero so that
    // what is computed of them stays finite.
    if !cols.is_multiple_of(UNIT) {
        for k in 0..rows {
            let col = cols / PANEL * PANEL;
            out.row(k, col)[cols - col..].fill(0.0);
        }
    }
}

/// A block that is being packed.
struct Panels<'a> {
    out: &'a mut [Unit],
    rows: usize,
    cols: usize,
}

impl Panels<'_> {
    /// Row `k` of the panel that begins with column `col`.
    #[inline(always)]
    fn row(&mut self, k: usize, col: usize) -> &mut [f32] {
        let col = col / UNIT;
        let own = (PANEL / UNIT).min(self.cols.div_ceil(UNIT) - col);
        let units = &mut self.out[self.rows * col + k * own..][..own];
        // SAFETY: a unit is sixteen floats and nothing else.
        unsafe { std::slice::from_raw_parts_mut(units.as_mut_ptr().cast(), own * UNIT) }
    }
}

/// Packs a transposed matrix, sixteen stored rows at a time.
#[inline(always)]
fn pack_columns<S: Simd>(isa: S, m: MatRef<'_>, out: &mut Panels<'_>) {
    let (rows, cols) = (m.rows, m.cols);
    for col in (0..cols).step_by(UNIT) {
        let panel = col / PANEL * PANEL;
        let count = UNIT.min(cols - col);
        let mut k = 0;
        while count == UNIT && k + UNIT <= rows {
            let words = array!(UNIT, i => float_bytes(m.stored(col + i, k, UNIT)));
            let words = isa.transpose_words(array!(UNIT, i => &words[i]));
            for (i, words) in words.iter().enumerate() {
                let out = &mut out.row(k + i, panel)[col - panel..][..UNIT];
                for (out, word) in out.iter_mut().zip(words.as_chunks::<4>().0) {
                    *out = f32::from_le_bytes(*word);
                }
            }
            k += UNIT;
        }
        for n in col..col + count {
            for (k, &x) in (k..rows).zip(m.stored(n, k, rows - k)) {
                out.row(k, panel)[n - panel] = x;
            }
        }
    }
}

/// Sixteen floats as bytes.
#[inline(always)]
fn float_bytes(x: &[f32]) -> [u8; 64] {
    let mut out = [0u8; 64];
    for (out, x) in out.as_chunks_mut::<4>().0.iter_mut().zip(x) {
        *out = x.to_le_bytes();
    }
    out
}

/// See [`Kernels::float_product`].
#[inline(always)]
fn product<S: Simd, const TRANSPOSED: bool>(
    isa: S,
    a: MatRef<'_>,
    b: PackedRef<'_>,
    mut out: MatMut<'_, f32>,
    accumulate: bool,
) {
    if a.cols == 0 && !accumulate {
        (0..out.rows()).for_each(|m| out.row(m).fill(0.0));
    }
    let cols = out.cols();
    let mut copy = [const { MaybeUninit::uninit() }; BLOCK_ROWS / STRIP * PACK_DEPTH];
    for first in (0..a.cols).step_by(PACK_DEPTH) {
        let depth = PACK_DEPTH.min(a.cols - first);
        let add = accumulate || first > 0;
        for top in (0..a.rows).step_by(BLOCK_ROWS) {
            let rows = BLOCK_ROWS.min(a.rows - top);
            let copied: &[[f32; STRIP]] = if TRANSPOSED {
                copy_transposed(isa, &a, first, depth, top, rows, &mut copy)
            } else {
                &[]
            };
            for col in (0..cols).step_by(PANEL) {
                let (panel, width) = b.panel(first, depth, col);
                let own = PANEL.min(cols - col);
                let mut row = 0;
                while row < rows {
                    let (left, most) = if TRANSPOSED {
                        let (strip, at) = (row / STRIP, row % STRIP);
                        let strip = &copied[strip * depth..(strip + 1) * depth];
                        (Left::Copied { strip, at }, (rows - row).min(STRIP - at))
                    } else {
                        (Left::Rows { a: &a, top: top + row, first }, rows - row)
                    };
                    let at = (top + row, col, own);
                    macro_rules! tile {
                        ($rows:literal) => {{
                            // What the next tile adds to or writes.
                            let next = top + row + $rows;
                            for next in next..(next + $rows).min(top + rows) {
                                for line in out.row(next)[col..col + own].chunks(UNIT) {
                                    isa.prefetch(line.as_ptr().cast());
                                }
                            }
                            tile::<S, $rows>(isa, left, depth, panel, width, &mut out, at, add);
                            row += $rows;
                        }};
                    }
                    // Twelve rows of a copy are one address, eight rows of a matrix as
                    // many addresses as there are registers for.
                    match most {
                        12.. if S::WIDE && TRANSPOSED => tile!(12),
                        8.. if S::WIDE => tile!(8),
                        6.. if !S::WIDE => tile!(6),
                        4.. => tile!(4),
                        2.. => tile!(2),
                        _ => tile!(1),
                    }
                }
            }
        }
    }
}

/// Copies rows `top..top + rows` and columns `first..first + depth` of a transposed
/// operand in strips of [`STRIP`] rows, each `[depth, STRIP]`, zeros behind them.
#[inline(always)]
fn copy_transposed<'c, S: Simd>(
    isa: S,
    a: &MatRef<'_>,
    first: usize,
    depth: usize,
    top: usize,
    rows: usize,
    copy: &'c mut [MaybeUninit<[f32; STRIP]>; BLOCK_ROWS / STRIP * PACK_DEPTH],
) -> &'c [[f32; STRIP]] {
    let used = &mut copy[..rows.div_ceil(STRIP) * depth];
    for k in 0..depth {
        // Rows lie pages apart, which no prefetcher of the machine follows.
        for line in (0..rows).step_by(UNIT) {
            let ahead = (first + k + AHEAD) * a.stride + top + line;
            isa.prefetch(a.data.as_ptr().wrapping_add(ahead).cast());
        }
        let (strips, rest) = a.stored(first + k, top, rows).as_chunks::<STRIP>();
        for (i, strip) in strips.iter().enumerate() {
            used[i * depth + k].write(*strip);
        }
        if !rest.is_empty() {
            let mut last = [0.0; STRIP];
            last[..rest.len()].copy_from_slice(rest);
            used[strips.len() * depth + k].write(last);
        }
    }
    // SAFETY: every strip has been written in each of its `depth` rows.
    unsafe { &*(std::ptr::from_ref(used) as *const [[f32; STRIP]]) }
}

/// The left operand of a tile.
#[derive(Clone, Copy)]
enum Left<'a> {
    /// Rows from `top` on, columns from `first` on.
    Rows { a: &'a MatRef<'a>, top: usize, first: usize },
    /// Rows from `at` on of a copied strip.
    Copied { strip: &'a [[f32; STRIP]], at: usize },
}

/// `R` rows of the product with one panel, at `(row, col)` and `own` columns wide.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "operands and places of one tile")]
fn tile<S: Simd, const R: usize>(
    isa: S,
    left: Left<'_>,
    depth: usize,
    panel: &[Unit],
    width: usize,
    out: &mut MatMut<'_, f32>,
    (row, col, own): (usize, usize, usize),
    add: bool,
) {
    if S::WIDE && own == PANEL {
        let start = array!(R, r => {
            let row = out.row(row + r)[col..col + PANEL].as_chunks::<UNIT>().0;
            array!(2, v => if add { isa.load_f32(&row[v]) } else { isa.splat(0.0) })
        });
        let sums = chain_of::<S, R, 2, 2>(isa, left, depth, panel, 0, start);
        for (r, sums) in sums.into_iter().enumerate() {
            let row = out.row(row + r)[col..col + PANEL].as_chunks_mut::<UNIT>().0;
            for (to, sum) in row.iter_mut().zip(sums) {
                *to = isa.floats(sum);
            }
        }
        return;
    }
    for v in 0..own.div_ceil(UNIT) {
        let start = array!(R, r => [begin(isa, out, row + r, col, own, v, add)]);
        let sums = match width {
            2 => chain_of::<S, R, 1, 2>(isa, left, depth, panel, v, start),
            _ => chain_of::<S, R, 1, 1>(isa, left, depth, panel, v, start),
        };
        for (r, [sum]) in sums.into_iter().enumerate() {
            store(isa, out, row + r, col, own, v, sum);
        }
    }
}

/// What the chain of sixteen neighbours begins with.
#[inline(always)]
fn begin<S: Simd>(
    isa: S,
    out: &mut MatMut<'_, f32>,
    row: usize,
    col: usize,
    own: usize,
    v: usize,
    add: bool,
) -> S::Floats {
    let mut lanes = [0.0; UNIT];
    if add {
        let out = &out.row(row)[col..col + own];
        let from = &out[(v * UNIT).min(own)..own.min((v + 1) * UNIT)];
        match from.as_array::<UNIT>() {
            Some(all) => return isa.load_f32(all),
            None => lanes[..from.len()].copy_from_slice(from),
        }
    }
    isa.load_f32(&lanes)
}

/// Writes sixteen neighbours, or those of them that are the tile's own.
#[inline(always)]
fn store<S: Simd>(
    isa: S,
    out: &mut MatMut<'_, f32>,
    row: usize,
    col: usize,
    own: usize,
    v: usize,
    sums: S::Floats,
) {
    let out = &mut out.row(row)[col..col + own];
    let to = &mut out[(v * UNIT).min(own)..own.min((v + 1) * UNIT)];
    let lanes = isa.floats(sums);
    match to.as_mut_array::<UNIT>() {
        Some(all) => *all = lanes,
        None => to.copy_from_slice(&lanes[..to.len()]),
    }
}

/// Goes on with the chains of `R` rows and `V` vectors of a panel `W` units wide,
/// from vector `from` on.
#[inline(always)]
fn chain_of<S: Simd, const R: usize, const V: usize, const W: usize>(
    isa: S,
    left: Left<'_>,
    depth: usize,
    panel: &[Unit],
    from: usize,
    start: [[S::Floats; V]; R],
) -> [[S::Floats; V]; R] {
    let panel = panel.as_chunks::<W>().0;
    let panel = &panel[..depth];
    match left {
        Left::Rows { a, top, first } => {
            let a = array!(R, r => a.stored(top + r, first, depth));
            // SAFETY: each of these rows has `depth` elements, as many as the panel.
            chain::<S, R, V, W>(
                isa,
                #[inline(always)]
                |r, k| unsafe { *a[r].get_unchecked(k) },
                panel,
                from,
                start,
            )
        }
        Left::Copied { strip, at } => {
            let strip = &strip[..depth];
            assert!(at + R <= STRIP, "a tile of a strip");
            chain::<S, R, V, W>(
                isa,
                // SAFETY: the strip has `depth` rows, as many as the panel, and the
                // tile lies in it.
                #[inline(always)]
                |r, k| unsafe { *strip.get_unchecked(k).get_unchecked(at + r) },
                panel,
                from,
                start,
            )
        }
    }
}

/// The same, `element(r, k)` being the left operand: k goes up to the panel's rows.
#[inline(always)]
fn chain<S: Simd, const R: usize, const V: usize, const W: usize>(
    isa: S,
    element: impl Fn(usize, usize) -> f32,
    panel: &[[Unit; W]],
    from: usize,
    start: [[S::Floats; V]; R],
) -> [[S::Floats; V]; R] {
    let mut sums = start;
    for (k, b) in panel.iter().enumerate() {
        let b = array!(V, v => isa.load_f32(&b[from + v].0));
        for (r, sums) in sums.iter_mut().enumerate() {
            let x = isa.splat(element(r, k));
            for (sum, &b) in sums.iter_mut().zip(&b) {
                *sum = isa.fma(*sum, x, b);
            }
        }
    }
    sums
}

#[cfg(test)]
mod tests;

//! The products of linear layers over slices, by all threads: what the fused
//! operations are made of.
//!
//! Work is split into blocks of a fixed size and every element is one chain of
//! additions, so that the number of threads changes no bit.

use std::ops::Range;

use bitnet_core::ternary::{self, inv_weight_scale};
use bitnet_core::{Layout, WeightScheme};
use bitnet_kernels::{
    Digits, FIXED_DEPTH, Line, MatMut, MatRef, PACK_DEPTH, PackSource, PackedActs, PackedRef,
    QuantizedTokens, TernaryRows, TokensRef, Unit, packed_len,
};
use rayon::prelude::*;

use super::cpu::{Buffer, kernels};
use super::linear::{Gradients, LinearRecipe};
use super::scratch::{self, Scratch};
use crate::profile;

/// The layout of the weights between the forward and the backward pass.
const LAYOUT: Layout = Layout::P2;

/// Rows that one task of a loop over rows takes.
pub(super) const ROWS: usize = 64;

/// Tokens of a task of products: enough to pay for unpacking the weights, and few
/// enough for what lies between two products to stay in the cache.
pub(super) const CHUNK: usize = 128;

/// Output rows of a task of a float product: whole tiles of the kernel.
const FLOAT_ROWS: usize = 96;

/// A packed right operand `[rows, cols]` of a float product.
pub(super) struct Packed {
    data: Scratch<Unit>,
    rows: usize,
    cols: usize,
}

/// A right operand to be packed: its shape, and what gives the rows of a block.
pub(super) type Packing<'a> =
    (usize, usize, Box<dyn Fn(Range<usize>) -> PackSource<'a> + Sync + 'a>);

impl Packed {
    /// Packs right operands in one parallel loop.
    pub(super) fn all(sources: &[Packing<'_>]) -> Vec<Self> {
        let room = |&(rows, cols, _): &Packing<'_>| {
            let data = Scratch::any(packed_len(rows, cols));
            Self { data, rows, cols }
        };
        let mut all: Vec<Self> = sources.iter().map(room).collect();
        let tasks: Vec<_> = all
            .iter_mut()
            .zip(sources)
            .flat_map(|(packed, source)| {
                let block = packed_len(PACK_DEPTH, packed.cols).max(1);
                packed.data.chunks_mut(block).enumerate().map(move |(i, out)| (source, i, out))
            })
            .collect();
        tasks.into_par_iter().with_max_len(1).for_each(|((rows, _, source), i, out)| {
            let first = i * PACK_DEPTH;
            kernels().pack_block(source(first..(*rows).min(first + PACK_DEPTH)), out);
        });
        all
    }

    /// Packs floats.
    pub(super) fn floats(b: MatRef<'_>) -> Self {
        let (rows, cols) = (b.rows(), b.cols());
        let mut data = Scratch::any(packed_len(rows, cols));
        data.par_chunks_mut(packed_len(PACK_DEPTH, cols).max(1)).enumerate().for_each(
            |(i, out)| {
                let rows = b.slice_rows(i * PACK_DEPTH, rows.min((i + 1) * PACK_DEPTH));
                kernels().pack_block(PackSource::Floats(rows), out);
            },
        );
        Self { data, rows, cols }
    }

    pub(super) fn view(&self) -> PackedRef<'_> {
        PackedRef::new(&self.data, self.rows, self.cols)
    }
}

/// `out = a · b`, or `out += a · b`, for contiguous `out` `[M, N]`.
pub(super) fn product(a: MatRef<'_>, b: &Packed, out: &mut [f32], accumulate: bool) {
    let cols = b.cols;
    out.par_chunks_mut((FLOAT_ROWS * cols).max(1)).enumerate().with_max_len(1).for_each(
        |(i, out)| {
            let rows = out.len() / cols;
            let a = a.slice_rows(i * FLOAT_ROWS, i * FLOAT_ROWS + rows);
            kernels().float_product(a, b.view(), MatMut::new(out, rows, cols), accumulate);
        },
    );
}

/// `a · b` of floats.
pub(crate) fn matmul(a: MatRef<'_>, b: MatRef<'_>) -> Vec<f32> {
    let mut out = Scratch::any(a.rows() * b.cols());
    product(a, &Packed::floats(b), &mut out, false);
    out.into_vec()
}

/// The weights of a layer as they are multiplied, `[rows, cols]`.
pub(super) struct Weights {
    rows: usize,
    cols: usize,
    kind: WeightsKind,
}

enum WeightsKind {
    /// Packed as the engine stores them.
    Ternary { bytes: Scratch<u8>, scale: f32 },
    /// The master weights.
    Float(Buffer),
}

impl Weights {
    /// Quantises and packs master weights, or takes them as they are; each with its
    /// columns and recipe.
    pub(super) fn all<const M: usize>(masters: [(&Buffer, usize, LinearRecipe); M]) -> [Self; M] {
        let _span = profile::span("weight quantisation");
        let ternary: Vec<_> = masters
            .iter()
            .filter(|(_, _, recipe)| !recipe.is_float())
            .map(|(master, cols, recipe)| (master.data(), *cols, recipe.weights))
            .collect();
        let mut packed = pack_weights(&ternary).into_iter();
        masters.map(|(master, cols, recipe)| {
            let rows = master.data().len() / cols;
            let own = if recipe.is_float() { None } else { packed.next() };
            let kind = match own {
                Some((bytes, scale)) => WeightsKind::Ternary { bytes, scale },
                None => WeightsKind::Float(master.clone()),
            };
            Self { rows, cols, kind }
        })
    }

    /// Rows.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// As the engine multiplies them.
    fn ternary(&self) -> TernaryRows<'_> {
        let WeightsKind::Ternary { bytes, scale } = &self.kind else {
            unreachable!("int8 inputs meet ternary weights");
        };
        TernaryRows { layout: LAYOUT, cols: self.cols, weight_scale: *scale, bytes }
    }

    /// Floats as the right operand of the forward product, `[cols, rows]`.
    fn transposed(&self) -> Option<Packed> {
        match &self.kind {
            WeightsKind::Ternary { .. } => None,
            WeightsKind::Float(master) => {
                let all = MatRef::new(master.data(), self.rows, self.cols, self.cols);
                Some(Packed::floats(all.t()))
            }
        }
    }

    /// As the right operand of the gradient's product, `[rows, cols]`.
    fn packing(&self) -> Packing<'_> {
        (self.rows, self.cols, Box::new(|rows| self.source(rows)))
    }

    /// Rows `rows` as those of a right operand.
    fn source(&self, rows: Range<usize>) -> PackSource<'_> {
        match &self.kind {
            WeightsKind::Ternary { bytes, scale } => {
                let row = LAYOUT.row_bytes(self.cols);
                let bytes = &bytes[rows.start * row..rows.end * row];
                PackSource::Ternary { bytes, cols: self.cols, scale: *scale }
            }
            WeightsKind::Float(master) => {
                let all = MatRef::new(master.data(), self.rows, self.cols, self.cols);
                PackSource::Floats(all.slice_rows(rows.start, rows.end))
            }
        }
    }
}

/// The input of linear layers as it is multiplied, `[tokens, cols]`.
pub(super) enum Input {
    Int8(QuantizedTokens),
    Float(Scratch<f32>),
}

impl Drop for Input {
    fn drop(&mut self) {
        if let Self::Int8(tokens) = self {
            scratch::give(std::mem::take(&mut tokens.q));
        }
    }
}

impl Input {
    /// An input to be filled.
    pub(super) fn any(tokens: usize, cols: usize, int8: bool) -> Self {
        if !int8 {
            return Self::Float(Scratch::any(tokens * cols));
        }
        let q = Scratch::any(tokens * QuantizedTokens::stride(cols)).into_vec();
        let mut out = QuantizedTokens { q, ..QuantizedTokens::default() };
        out.resize(tokens, cols);
        Self::Int8(out)
    }

    /// Its tokens in chunks of `rows`.
    pub(super) fn chunks_mut(&mut self, cols: usize, rows: usize) -> Vec<InputMut<'_>> {
        match self {
            Self::Int8(all) => {
                let stride = all.stride;
                let q = all.q.chunks_mut(rows * stride);
                let tokens = q.zip(all.scales.chunks_mut(rows)).zip(all.sums.chunks_mut(rows));
                tokens
                    .map(|((q, scales), sums)| InputMut::Int8 { q, stride, scales, sums })
                    .collect()
            }
            Self::Float(x) => x.chunks_mut(rows * cols).map(InputMut::Float).collect(),
        }
    }

    /// Some tokens.
    pub(super) fn tokens(&self, cols: usize, range: Range<usize>) -> InputRef<'_> {
        match self {
            Self::Int8(q) => InputRef::Int8(q.view().tokens(range.start, range.end)),
            Self::Float(x) => InputRef::Float(&x[range.start * cols..range.end * cols]),
        }
    }

    fn len(&self, cols: usize) -> usize {
        match self {
            Self::Int8(q) => q.scales.len(),
            Self::Float(x) => x.len() / cols,
        }
    }
}

/// Some tokens of an input that are being made.
pub(super) enum InputMut<'a> {
    Int8 { q: &'a mut [i8], stride: usize, scales: &'a mut [f32], sums: &'a mut [i32] },
    Float(&'a mut [f32]),
}

impl InputMut<'_> {
    /// Makes the tokens: `row` writes the floats of one to its last argument and,
    /// given room for integers, quantises them there and returns (`act_scale`, sum).
    pub(super) fn fill(
        &mut self,
        cols: usize,
        mut row: impl FnMut(usize, Option<&mut [i8]>, &mut [f32]) -> (f32, i32),
    ) {
        match self {
            Self::Int8 { q, stride, scales, sums } => {
                let mut floats = Scratch::any(cols);
                let results = scales.iter_mut().zip(sums.iter_mut());
                for (i, (q, (scale, sum))) in q.chunks_exact_mut(*stride).zip(results).enumerate() {
                    (*scale, *sum) = row(i, Some(q), &mut floats);
                }
            }
            Self::Float(out) => {
                for (i, out) in out.chunks_exact_mut(cols).enumerate() {
                    row(i, None, out);
                }
            }
        }
    }

    /// What was made.
    pub(super) fn view(&self) -> InputRef<'_> {
        match self {
            Self::Int8 { q, stride, scales, sums } => {
                InputRef::Int8(TokensRef { q, stride: *stride, sums, scales })
            }
            Self::Float(x) => InputRef::Float(x),
        }
    }
}

/// Some tokens of an input.
#[derive(Clone, Copy)]
pub(super) enum InputRef<'a> {
    Int8(TokensRef<'a>),
    Float(&'a [f32]),
}

impl InputRef<'_> {
    /// As the right operand of the weights' gradient.
    fn packing<'a>(&'a self, cols: usize) -> Packing<'a> {
        match *self {
            Self::Int8(q) => (
                q.len(),
                cols,
                Box::new(move |r| PackSource::Int8 { tokens: q.tokens(r.start, r.end), cols }),
            ),
            Self::Float(x) => {
                let x = MatRef::new(x, x.len() / cols, cols, cols);
                let rows = move |r: Range<usize>| PackSource::Floats(x.slice_rows(r.start, r.end));
                (x.rows(), cols, Box::new(rows))
            }
        }
    }
}

/// Linear layers that read one input, ready to multiply.
pub(super) struct Forward<'a> {
    weights: &'a [&'a Weights],
    /// Float weights, turned.
    packed: Vec<Packed>,
    cols: usize,
    /// Columns of their outputs side by side.
    pub(super) width: usize,
}

impl<'a> Forward<'a> {
    pub(super) fn new(weights: &'a [&'a Weights]) -> Self {
        let width = weights.iter().map(|w| w.rows).sum();
        let packed = weights.iter().filter_map(|w| w.transposed()).collect();
        Self { weights, packed, cols: weights[0].cols, width }
    }

    /// The outputs for some tokens, `[tokens, width]`. One thread.
    pub(super) fn chunk(&self, x: InputRef<'_>, out: &mut [f32]) {
        let tokens = out.len() / self.width;
        let mut rest = MatMut::new(out, tokens, self.width);
        match x {
            InputRef::Int8(x) => {
                for w in self.weights {
                    let (own, right) = rest.split_cols(w.rows);
                    kernels().ternary_matmul(w.ternary(), x, own);
                    rest = right;
                }
            }
            InputRef::Float(x) => {
                let x = MatRef::new(x, tokens, self.cols, self.cols);
                for packed in &self.packed {
                    let (own, right) = rest.split_cols(packed.cols);
                    kernels().float_product(x, packed.view(), own, false);
                    rest = right;
                }
            }
        }
    }

    /// Adds the outputs for some tokens to `out`. One thread.
    pub(super) fn add_chunk(&self, x: InputRef<'_>, out: &mut [f32]) {
        let mut apart = Scratch::any(out.len());
        self.chunk(x, &mut apart);
        kernels().add_assign(out, &apart);
    }
}

/// Their outputs side by side, `[tokens, ΣN]`.
pub(super) fn forward(x: &Input, weights: &[&Weights]) -> Scratch<f32> {
    let layers = Forward::new(weights);
    let (cols, width) = (layers.cols, layers.width);
    let mut out = Scratch::any(x.len(cols) * width);
    out.par_chunks_mut(CHUNK * width).enumerate().with_max_len(1).for_each(|(i, out)| {
        let tokens = i * CHUNK..i * CHUNK + out.len() / width;
        layers.chunk(x.tokens(cols, tokens), out);
    });
    out
}

/// The way back through linear layers that read one input: from the gradient of
/// their outputs `[tokens, ΣN]` to that of the input `[tokens, K]`.
pub(super) struct Backward<'a> {
    weights: &'a [&'a Weights],
    kind: BackwardKind,
    cols: usize,
    width: usize,
}

enum BackwardKind {
    /// The weights as right operands.
    Float(Vec<Packed>),
    /// The weights turned, `[K, ΣN]`, packed.
    Integer {
        turned: Scratch<u8>,
        /// The digits of a token's gradient; none: it is quantised to int8 (SwitchBack,
        /// arXiv:2304.13013).
        digits: Option<Digits>,
    },
}

impl<'a> Backward<'a> {
    pub(super) fn new(weights: &'a [&'a Weights], recipe: LinearRecipe) -> Self {
        let (cols, width) = (weights[0].cols, weights.iter().map(|w| w.rows).sum());
        let Gradients { digits, int8_inputs } = recipe.gradients;
        let kind = if (int8_inputs || digits.is_some()) && !recipe.is_float() {
            let digits = digits.filter(|_| !int8_inputs);
            BackwardKind::Integer { turned: turn(weights, width), digits }
        } else {
            let sources: Vec<Packing<'_>> = weights.iter().map(|w| w.packing()).collect();
            BackwardKind::Float(Packed::all(&sources))
        };
        Self { weights, kind, cols, width }
    }

    /// The gradient for some tokens. One thread.
    pub(super) fn chunk(&self, grad: &[f32], out: &mut [f32]) {
        let tokens = out.len() / self.cols;
        match &self.kind {
            BackwardKind::Float(all) => {
                let mut first = 0;
                for (part, packed) in all.iter().enumerate() {
                    let own = MatRef::new(&grad[first..], tokens, packed.rows, self.width);
                    let to = MatMut::new(&mut *out, tokens, self.cols);
                    kernels().float_product(own, packed.view(), to, part > 0);
                    first += packed.rows;
                }
            }
            BackwardKind::Integer { turned, digits } => {
                self.chunk_integer(turned, *digits, grad, out);
            }
        }
    }

    /// The same with the gradient of every token as integers. The scales of the weights
    /// are multiplied in first, so that one scale serves all layers.
    fn chunk_integer(&self, turned: &[u8], digits: Option<Digits>, grad: &[f32], out: &mut [f32]) {
        let (tokens, width) = (out.len() / self.cols, self.width);
        let count = digits.map_or(1, Digits::count);
        let mut x = Input::any(tokens * count, width, true);
        let Input::Int8(all) = &mut x else { unreachable!("the input is int8") };
        let mut scaled = Scratch::any(width);
        for (t, grad) in grad.chunks_exact(width).enumerate() {
            let (mut from, mut to) = (grad, &mut scaled[..]);
            for w in self.weights {
                let (own, right) = from.split_at(w.rows);
                let (own_to, right_to) = to.split_at_mut(w.rows);
                kernels().scaled(own, w.ternary().weight_scale, own_to);
                (from, to) = (right, right_to);
            }
            let rows = t * count..(t + 1) * count;
            let q = &mut all.q[rows.start * all.stride..rows.end * all.stride];
            match digits {
                None => (all.scales[t], all.sums[t]) = kernels().quantize_gradient(&scaled, q),
                Some(digits) => {
                    let step = kernels().digits(digits, &scaled, q, &mut all.sums[rows.clone()]);
                    all.scales[rows].fill(step);
                }
            }
        }
        let rows = TernaryRows { layout: LAYOUT, cols: width, weight_scale: 1.0, bytes: turned };
        let out = MatMut::new(out, tokens, self.cols);
        match digits {
            None => kernels().ternary_matmul(rows, all.view(), out),
            Some(digits) => kernels().ternary_matmul_fixed(digits, rows, all.view(), out),
        }
    }
}

/// The gradient of the layers' one input, `[tokens, K]`, from that of their outputs
/// `[tokens, ΣN]`.
pub(super) fn backward_input(
    grad: &[f32],
    weights: &[&Weights],
    recipe: LinearRecipe,
) -> Scratch<f32> {
    let _span = profile::span("input gradients");
    let back = Backward::new(weights, recipe);
    let (cols, width) = (back.cols, back.width);
    let mut out = Scratch::any(grad.len() / width * cols);
    out.par_chunks_mut(CHUNK * cols)
        .zip(grad.par_chunks(CHUNK * width))
        .with_max_len(1)
        .for_each(|(out, grad)| back.chunk(grad, out));
    out
}

/// The layers' weights side by side and turned, `[K, ΣN]`, packed.
fn turn(weights: &[&Weights], width: usize) -> Scratch<u8> {
    // The columns of one plane of a block become as many rows.
    const COLS: usize = 64;
    let (cols, row) = (weights[0].cols, LAYOUT.row_bytes(width));
    let mut out = Scratch::any(cols * row);
    out.par_chunks_mut(COLS * row).enumerate().for_each(|(task, out)| {
        out.fill(0);
        let (block, shift) = (task / 4, 2 * (task % 4));
        let all = weights.iter().flat_map(|w| {
            let bytes = w.ternary().bytes;
            bytes.chunks_exact(LAYOUT.row_bytes(cols))
        });
        for (n, bytes) in all.enumerate() {
            let at = n / 256 * 64 + n % 64;
            let codes = &bytes[block * COLS..][..COLS];
            for (row, code) in out.chunks_exact_mut(row).zip(codes) {
                row[at] |= (code >> shift & 3) << (2 * (n / 64 % 4));
            }
        }
    });
    out
}

/// Room for the gradients of layers' weights, `[N, K]` each.
pub(super) fn gradients_of(weights: &[&Weights]) -> Vec<Vec<f32>> {
    weights.iter().map(|w| Scratch::any(w.rows * w.cols).into_vec()).collect()
}

/// The gradients of the layers' weights, `[N, K]` each.
pub(super) fn backward_weights(
    grad: &[f32],
    x: &Input,
    weights: &[&Weights],
    recipe: LinearRecipe,
) -> Vec<Vec<f32>> {
    let mut out = gradients_of(weights);
    let cols = weights[0].cols;
    let x = x.tokens(cols, 0..x.len(cols));
    add_weight_gradients([WeightGradients { grad, x, weights, recipe, out: &mut out }], false);
    out
}

/// Some tokens' share in the gradients of layers that read one input.
pub(super) struct WeightGradients<'a> {
    /// The gradient of their outputs, `[tokens, ΣN]`.
    pub(super) grad: &'a [f32],
    /// Their input.
    pub(super) x: InputRef<'a>,
    pub(super) weights: &'a [&'a Weights],
    pub(super) recipe: LinearRecipe,
    /// Where it goes, `[N, K]` each.
    pub(super) out: &'a mut [Vec<f32>],
}

/// The input of layers as the right operand of their weights' gradient.
enum Right<'a> {
    Float(Packed),
    Fixed { digits: Digits, lines: Scratch<Line>, tokens: TokensRef<'a>, cols: usize },
}

impl<'a> Right<'a> {
    /// Packs the inputs of some layers, each with its columns and recipe.
    fn all<const J: usize>(inputs: [(InputRef<'a>, usize, LinearRecipe); J]) -> Vec<Self> {
        let fixed = |x: InputRef<'a>, recipe: LinearRecipe| match x {
            InputRef::Int8(tokens) => recipe.gradients.digits.map(|digits| (tokens, digits)),
            InputRef::Float(_) => None,
        };
        let sources: Vec<Packing<'_>> = inputs
            .iter()
            .filter(|(x, _, recipe)| fixed(*x, *recipe).is_none())
            .map(|(x, cols, _)| x.packing(*cols))
            .collect();
        let mut floats = Packed::all(&sources).into_iter();
        let mut all: Vec<Self> = inputs
            .iter()
            .filter_map(|&(x, cols, recipe)| match fixed(x, recipe) {
                Some((tokens, digits)) => {
                    let lines = Scratch::any(kernels().packed_acts_len(tokens.len(), cols));
                    Some(Self::Fixed { digits, lines, tokens, cols })
                }
                None => floats.next().map(Self::Float),
            })
            .collect();
        /// Columns of a task: two panels.
        const COLS: usize = 64;
        let mut tasks = Vec::new();
        for right in &mut all {
            let Self::Fixed { lines, tokens, cols, .. } = right else { continue };
            let blocks = lines.chunks_mut(kernels().packed_acts_len(FIXED_DEPTH, *cols));
            for (i, block) in blocks.enumerate() {
                let end = tokens.len().min((i + 1) * FIXED_DEPTH);
                let tokens = tokens.tokens(i * FIXED_DEPTH, end);
                let parts = block.chunks_mut(kernels().packed_acts_len(tokens.len(), COLS));
                tasks.extend(parts.enumerate().map(|(part, out)| (tokens, part * COLS, out)));
            }
        }
        tasks.into_par_iter().for_each(|(tokens, col, out)| kernels().pack_acts(tokens, col, out));
        all
    }

    /// `out = gᵀ · self`, or that added to `out`. One thread.
    fn product(&self, grad: MatRef<'_>, out: MatMut<'_, f32>, add: bool) {
        match self {
            Self::Float(packed) => kernels().float_product(grad, packed.view(), out, add),
            Self::Fixed { digits, lines, tokens, cols } => {
                let acts = PackedActs::new(lines, tokens.scales, *cols);
                kernels().fixed_product(*digits, grad, acts, out, add);
            }
        }
    }
}

/// Writes, or where `add` adds, what some tokens give to weights' gradients.
pub(super) fn add_weight_gradients<const J: usize>(jobs: [WeightGradients<'_>; J], add: bool) {
    let _span = profile::span("weight gradients");
    let inputs = jobs.each_ref().map(|job| (job.x, job.weights[0].cols, job.recipe));
    let rights = Right::all(inputs);
    let mut tasks = Vec::new();
    for (job, right) in jobs.into_iter().zip(&rights) {
        let cols = job.weights[0].cols;
        let width: usize = job.weights.iter().map(|w| w.rows).sum();
        let tokens = job.grad.len() / width;
        // Few rows in small tasks, so that no thread waits long for another.
        let rows = if width < 1024 { FLOAT_ROWS / 2 } else { FLOAT_ROWS };
        let mut first = 0;
        for (out, w) in job.out.iter_mut().zip(job.weights) {
            let own = MatRef::new(&job.grad[first.min(job.grad.len())..], tokens, w.rows, width);
            tasks.extend(out.chunks_mut(rows * cols).enumerate().map(|(i, out)| {
                let count = out.len() / cols;
                let own = own.t().slice_rows(i * rows, i * rows + count);
                (own, right, MatMut::new(out, count, cols))
            }));
            first += w.rows;
        }
    }
    tasks.into_par_iter().with_max_len(1).for_each(|(grad, right, out)| {
        right.product(grad, out, add);
    });
}

/// Master weights, their columns and how they are quantised.
type Master<'a> = (&'a [f32], usize, WeightScheme);

/// Quantises and packs master weights `[rows, cols]`: rows of bytes, and the scale.
fn pack_weights(masters: &[Master<'_>]) -> Vec<(Scratch<u8>, f32)> {
    let k = kernels();
    // Sums of all rows of all matrices in one loop.
    let mut sums: Vec<Vec<f64>> =
        masters.iter().map(|(w, cols, _)| vec![0.0; w.len() / cols]).collect();
    let tasks: Vec<_> = masters
        .iter()
        .zip(&mut sums)
        .flat_map(|((weights, cols, _), sums)| {
            let rows = weights.chunks(ROWS * cols).zip(sums.chunks_mut(ROWS));
            rows.map(|(weights, sums)| (*cols, weights, sums))
        })
        .collect();
    tasks.into_par_iter().for_each(|(cols, weights, sums)| {
        for (row, sum) in weights.chunks_exact(cols).zip(sums) {
            *sum = k.row_abs_sum(row);
        }
    });
    let mut out: Vec<(Scratch<u8>, f32)> = masters
        .iter()
        .zip(&sums)
        .map(|((weights, cols, scheme), sums)| {
            if *scheme != WeightScheme::B158 {
                return pack_other(weights, *cols, *scheme);
            }
            let scale = ternary::absmean_from_row_sums(sums, weights.len());
            (Scratch::any(weights.len() / cols * LAYOUT.row_bytes(*cols)), scale)
        })
        .collect();
    let tasks: Vec<_> = masters
        .iter()
        .zip(&mut out)
        .filter(|((_, _, scheme), _)| *scheme == WeightScheme::B158)
        .flat_map(|((weights, cols, _), (bytes, scale))| {
            let inv = inv_weight_scale(*scale);
            let rows = weights.chunks(ROWS * cols);
            let bytes = bytes.chunks_mut(ROWS * LAYOUT.row_bytes(*cols));
            rows.zip(bytes).map(move |(weights, bytes)| (*cols, inv, weights, bytes))
        })
        .collect();
    tasks.into_par_iter().for_each(|(cols, inv, weights, bytes)| {
        let bytes = bytes.chunks_exact_mut(LAYOUT.row_bytes(cols));
        for (row, bytes) in weights.chunks_exact(cols).zip(bytes) {
            k.pack_weight_row(row, inv, bytes);
        }
    });
    out
}

/// The same by the scalar definition, for the schemes that have no kernel.
fn pack_other(weights: &[f32], cols: usize, scheme: WeightScheme) -> (Scratch<u8>, f32) {
    let mut values = vec![0i8; weights.len()];
    let scale = scheme.quantize_group(weights, cols, &mut values);
    let mut bytes = Scratch::any(weights.len() / cols * LAYOUT.row_bytes(cols));
    bytes
        .par_chunks_mut(LAYOUT.row_bytes(cols))
        .zip(values.par_chunks(cols))
        .with_min_len(ROWS)
        .for_each(|(bytes, values)| LAYOUT.pack_row(values, bytes));
    (bytes, scale)
}

/// Quantised weights `[rows, cols]`, multiplied back to floats.
pub(super) fn dequantize(weights: &[f32], cols: usize, scheme: WeightScheme) -> Vec<f32> {
    let mut packed = pack_weights(&[(weights, cols, scheme)]);
    let Some((bytes, scale)) = packed.pop() else { return Vec::new() };
    let mut out = vec![0.0f32; weights.len()];
    out.par_chunks_mut(cols)
        .zip(bytes.par_chunks(LAYOUT.row_bytes(cols)))
        .with_min_len(ROWS)
        .for_each_init(
            || vec![0i8; cols],
            |trits, (out, bytes)| {
                if let Err(e) = LAYOUT.unpack_row(bytes, trits) {
                    unreachable!("weights that were just packed: {e}");
                }
                for (w, &t) in out.iter_mut().zip(trits.iter()) {
                    *w = f32::from(t) * scale;
                }
            },
        );
    out
}

#[cfg(test)]
mod tests {
    use super::testing::recipes;
    use super::*;
    use crate::ops::cpu::testing::random;

    /// Two layers that read one input.
    fn two_layers(rows: [usize; 2], cols: usize) -> Vec<Weights> {
        let masters = [0, 1].map(|i| {
            let data = random([rows[i], cols], 0.05 * (1 + i) as f32, 3 + i as u64);
            data.try_to_vec::<f32>().unwrap()
        });
        let scheme = recipes()[0].weights;
        let packed = masters.each_ref().map(|w| pack_weights(&[(w, cols, scheme)]));
        packed
            .into_iter()
            .zip(rows)
            .map(|(mut packed, rows)| {
                let (bytes, scale) = packed.pop().unwrap();
                Weights { rows, cols, kind: WeightsKind::Ternary { bytes, scale } }
            })
            .collect()
    }

    /// Half a step, times the magnitudes that it meets, and what f32 rounds.
    #[test]
    fn gradients_in_fixed_point_are_within_half_a_step_of_the_exact_ones() {
        let (tokens, cols, rows) = (600, 300, [70, 33]);
        let weights = two_layers(rows, cols);
        let weights: Vec<&Weights> = weights.iter().collect();
        let width: usize = rows.iter().sum();
        let mut x = Input::any(tokens, cols, true);
        let activations = random([tokens, cols], 3.0, 4).try_to_vec::<f32>().unwrap();
        for part in &mut x.chunks_mut(cols, tokens) {
            part.fill(cols, |t, q, _| {
                kernels().quantize(&activations[t * cols..][..cols], q.unwrap())
            });
        }
        let grad = random([tokens, width], 1e-6, 9).try_to_vec::<f32>().unwrap();
        let Input::Int8(q) = &x else { unreachable!() };
        let value = |t: usize, k: usize| f64::from(q.q[t * q.stride + k]);
        let mut trits = Vec::new();
        for w in &weights {
            let mut own = vec![0i8; cols];
            for bytes in w.ternary().bytes.chunks_exact(LAYOUT.row_bytes(cols)) {
                LAYOUT.unpack_row(bytes, &mut own).unwrap();
                let scale = f64::from(w.ternary().weight_scale);
                trits.extend(own.iter().map(|&t| f64::from(t) * scale));
            }
        }
        for (digits, bits) in [(Digits::Two, 127.0 * 256.0), (Digits::Three, 127.0 * 65536.0)] {
            let gradients = Gradients { digits: Some(digits), int8_inputs: false };
            let recipe = LinearRecipe { gradients, ..recipes()[0] };
            let dweights = backward_weights(&grad, &x, &weights, recipe).concat();
            let scale = |t: usize| f64::from(q.scales[t]);
            let largest = (0..tokens).map(scale).fold(0.0, f64::max) * 1e-6;
            for (at, got) in dweights.iter().enumerate() {
                let (n, k) = (at / cols, at % cols);
                let term = |t: usize| f64::from(grad[t * width + n]) * scale(t) * value(t, k);
                let exact: f64 = (0..tokens).map(term).sum();
                let met: f64 = (0..tokens).map(|t| value(t, k).abs()).sum();
                let sizes: f64 = (0..tokens).map(|t| term(t).abs()).sum();
                let bound = 0.5 * largest / bits * met + 4.0 * 2f64.powi(-24) * sizes;
                let off = (f64::from(*got) - exact).abs();
                assert!(off <= bound, "{digits:?}: {got} and {exact}, bound {bound}");
            }
            let dx = backward_input(&grad, &weights, recipe);
            for (at, got) in dx.iter().enumerate() {
                let (t, k) = (at / cols, at % cols);
                let term = |n: usize| f64::from(grad[t * width + n]) * trits[n * cols + k];
                let exact: f64 = (0..width).map(term).sum();
                let met = (0..width).map(|n| trits[n * cols + k].abs()).sum::<f64>();
                let sizes: f64 = (0..width).map(|n| term(n).abs()).sum();
                // The step is that of gradients times scales: the larger layer's counts.
                let ratio = f64::from(weights[0].ternary().weight_scale)
                    / f64::from(weights[1].ternary().weight_scale);
                let bound =
                    0.5 * 1e-6 / bits * met * ratio.max(1.0 / ratio) + 4.0 * 2f64.powi(-24) * sizes;
                let off = (f64::from(*got) - exact).abs();
                assert!(off <= bound, "{digits:?}: {got} and {exact}, bound {bound}");
            }
        }
    }

    /// Within the rounding of the gradient to int8: half of 1/127 of its largest
    /// magnitude, times the magnitudes of the weights it meets.
    #[test]
    fn int8_gradients_of_inputs_are_near_the_exact_ones() {
        let (tokens, cols, rows) = (5, 300, [70, 33]);
        let exact = recipes()[0];
        let int8 =
            LinearRecipe { gradients: Gradients { digits: None, int8_inputs: true }, ..exact };
        let weights = two_layers(rows, cols);
        let weights: Vec<&Weights> = weights.iter().collect();
        // As small as gradients are, and one token without any.
        let mut grad = random([tokens, 103], 1e-6, 9).try_to_vec::<f32>().unwrap();
        grad[103..206].fill(0.0);
        let near = backward_input(&grad, &weights, int8);
        let right = backward_input(&grad, &weights, exact);
        assert!(near[cols..2 * cols].iter().all(|&x| x == 0.0));
        assert_ne!(near[..], right[..]);
        let scale = weights.iter().map(|w| w.ternary().weight_scale).fold(0.0, f32::max);
        let bound = 103.0 * 0.5 / 127.0 * 1e-6 * scale;
        for (near, right) in near.iter().zip(right.iter()) {
            assert!((near - right).abs() <= bound, "{near} and {right}, bound {bound}");
        }
        let size = right.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        assert!(bound < 0.2 * size, "the bound {bound} says something of {size}");
    }
}

#[cfg(test)]
pub(super) mod testing {
    //! The recipes that a fused layer computes.

    use bitnet_core::quantizer::{Granularity, ScaleStatistic};
    use bitnet_core::{ActivationQuantizer, WeightQuantizer, WeightScheme};
    use bitnet_kernels::Digits;

    use crate::ops::{Gradients, LinearRecipe};

    /// Ternary, binary and float, and ternary with gradients in fixed point.
    pub(crate) fn recipes() -> Vec<LinearRecipe> {
        let of = |quantizer, activations| LinearRecipe {
            weights: WeightScheme {
                quantizer,
                statistic: ScaleStatistic::Absmean,
                granularity: Granularity::Tensor,
            },
            activations,
            rotate: false,
            keep: 1.0,
            blend: 1.0,
            gradients: Gradients::FLOAT,
            bf16: false,
        };
        let ternary = of(WeightQuantizer::Ternary, ActivationQuantizer::Int8);
        let gradients = Gradients { digits: Some(Digits::Three), int8_inputs: false };
        vec![
            ternary,
            of(WeightQuantizer::Binary, ActivationQuantizer::Int8),
            of(WeightQuantizer::None, ActivationQuantizer::None),
            LinearRecipe { gradients, ..ternary },
        ]
    }
}

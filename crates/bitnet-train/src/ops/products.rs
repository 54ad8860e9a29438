//! The products of linear layers over slices, by all threads: what the fused
//! operations are made of.
//!
//! Work is split into blocks of a fixed size and every element is one chain of
//! additions, so that the number of threads changes no bit.

use std::ops::Range;

use bitnet_core::ternary::{self, inv_weight_scale};
use bitnet_core::{Layout, WeightScheme};
use bitnet_kernels::{
    MatMut, MatRef, PACK_DEPTH, PackSource, PackedRef, QuantizedTokens, TernaryRows, TokensRef,
    Unit, packed_len,
};
use rayon::prelude::*;

use super::cpu::{Buffer, kernels};
use super::linear::LinearRecipe;
use super::scratch::{self, Scratch};
use crate::profile;

mod gradients;

pub(super) use gradients::{
    Backward, Right, WeightGradients, add_weight_gradients, backward_input, backward_weights,
    gradients_of, product,
};

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
        Self::floats_within(b, packed_len(b.rows(), b.cols()))
    }

    /// The same in a buffer of `room` units, which are enough: operands of many sizes share
    /// buffers.
    pub(super) fn floats_within(b: MatRef<'_>, room: usize) -> Self {
        let (rows, cols) = (b.rows(), b.cols());
        let mut data = Scratch::any(room);
        data[..packed_len(rows, cols)]
            .par_chunks_mut(packed_len(PACK_DEPTH, cols).max(1))
            .enumerate()
            .for_each(|(i, out)| {
                let rows = b.slice_rows(i * PACK_DEPTH, rows.min((i + 1) * PACK_DEPTH));
                kernels().pack_block(PackSource::Floats(rows), out);
            });
        Self { data, rows, cols }
    }

    pub(super) fn view(&self) -> PackedRef<'_> {
        let own = packed_len(self.rows, self.cols);
        PackedRef::new(&self.data[..own], self.rows, self.cols)
    }
}

/// Rows of each of the tasks that a float product of `rows` rows is cut into: whole tiles
/// of `tile` rows, and as many for every thread as can be.
pub(super) fn task_rows(rows: usize, tile: usize) -> usize {
    let threads = rayon::current_num_threads();
    let fewest = rows.div_ceil(FLOAT_ROWS).max(1).next_multiple_of(threads);
    let own = |tasks: usize| rows.div_ceil(tasks).next_multiple_of(tile).max(tile);
    let counts = (0..3).map(|more| fewest + more * threads);
    // The first of those that take the least time.
    counts.min_by_key(|&tasks| own(tasks) * tasks).map_or(tile, own)
}

/// `a · b` of floats.
pub(crate) fn matmul(a: MatRef<'_>, b: MatRef<'_>) -> Vec<f32> {
    let mut out = Scratch::any(a.rows() * b.cols());
    product(a, &Right::Float(Packed::floats(b)), b.cols(), &mut out, false);
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

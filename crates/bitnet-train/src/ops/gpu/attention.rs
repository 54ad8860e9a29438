//! Causal attention: rotary positions and the way from tokens to heads in one kernel,
//! scale, mask and softmax in another; the products are burn's.
//!
//! Kept for the backward pass are queries, keys and values. It computes the probabilities
//! again, and those of a whole batch never exist.

use std::ops::Range;

use burn::backend::cubecl::dtype_to_storage_type;
use burn::backend::ops::FloatTensorOps;
use burn::backend::{Cube, DispatchKindConversion, DispatchTensor, TensorMetadata};
use burn::tensor::{Device, Int, Slice, Tensor, TensorData};
use burn_cubecl::cubecl;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::reduce::{cube_max, cube_sum, scratch_len};
use super::{GpuOp, apply, by_element, by_row, count, empty, low, matmul, primitive};
use crate::ops::attention::AttentionShape;
use crate::ops::cpu::InnerMost;

/// Probabilities that exist at one time, at least of one sequence: 256 MiB.
const ROUND: usize = 1 << 26;

/// As [`crate::ops::attention`].
pub(in crate::ops) fn attention(
    q: Tensor<2>,
    k: Tensor<2>,
    v: Tensor<2>,
    shape: AttentionShape,
) -> Tensor<2> {
    in_rounds([q, k, v], shape, ROUND)
}

/// The same with at most so many probabilities at one time.
pub(super) fn in_rounds(qkv: [Tensor<2>; 3], shape: AttentionShape, round: usize) -> Tensor<2> {
    let device = qkv[0].device();
    let rows = Rows::new(&shape, &device.clone().inner_most());
    let inputs = qkv.map(Tensor::into_dispatch);
    apply(Attention { shape, rows, round }, inputs, device.is_autodiff())
}

/// What the rows of a batch are: where in its sequence the part begins that a row may
/// see, `[B·T]`, and the angles of positions, `[T, C/2]`.
#[derive(Debug, Clone)]
struct Rows {
    starts: CubeTensor,
    cos: CubeTensor,
    sin: CubeTensor,
}

impl Rows {
    fn new(shape: &AttentionShape, device: &Device) -> Self {
        let (t, half) = (shape.time, shape.head_dim / 2);
        let starts = TensorData::new(shape.starts(), [shape.batch * t]);
        let starts = Tensor::<1, Int>::from_data(starts, device).into_dispatch();
        let starts = <DispatchTensor as DispatchKindConversion<Cube>>::try_into_backend(starts)
            .unwrap_or_else(|e| panic!("operation of a GPU: {e}"))
            .int();
        let tables = shape.tables();
        let table = |data: &[f32]| {
            let data = TensorData::new(data.to_vec(), [t, half]);
            let table = Tensor::<2>::from_data(data, device);
            primitive(table.into_dispatch())
        };
        let starts = into_contiguous(starts);
        Self { starts, cos: table(&tables.cos), sin: table(&tables.sin) }
    }
}

#[derive(Debug, Clone)]
struct Attention {
    shape: AttentionShape,
    rows: Rows,
    round: usize,
}

/// A unit takes the pair of elements that is rotated together. `back`: from heads to
/// tokens, rotated the other way.
#[cube(launch)]
fn split<I: Numeric>(
    x: &[f32],
    cos: &[f32],
    sin: &[f32],
    starts: &[I],
    out: &mut [f32],
    pairs: u32,
    time: u32,
    heads: u32,
    half: u32,
    #[comptime] rotate: bool,
    #[comptime] back: bool,
    #[define(I)] _int: ElemType,
) {
    let mut at = ABSOLUTE_POS;
    while at < pairs as usize {
        let (half, heads, time) = (half as usize, heads as usize, time as usize);
        let i = at % half;
        let head = at / half % heads;
        let token = at / (half * heads);
        let t = token % time;
        let by_token = (token * heads + head) * 2 * half + i;
        let by_head = ((token / time * heads + head) * time + t) * 2 * half + i;
        let mut from = by_token;
        let mut to = by_head;
        if comptime!(back) {
            from = by_head;
            to = by_token;
        }
        let low = x[from];
        let high = x[from + half];
        if comptime!(rotate) {
            let angle = (t - u32::cast_from(starts[token]) as usize) * half + i;
            let c = cos[angle];
            let mut s = sin[angle];
            if comptime!(back) {
                s = -s;
            }
            out[to] = low * c - high * s;
            out[to + half] = high * c + low * s;
        } else {
            out[to] = low;
            out[to + half] = high;
        }
        at += CUBE_COUNT * CUBE_DIM as usize;
    }
}

impl Attention {
    /// Tokens `[B·T, n·C]` to heads `[B, n, T, C]`, rotated or not; the queries of heads
    /// that share keys and values lie one after another, `[B, K, H/K·T, C]`.
    fn heads(&self, x: CubeTensor, n: usize, rotate: bool) -> CubeTensor {
        let s = &self.shape;
        let heads = self.split(x, n, rotate, false);
        let shape = [s.batch, s.kv_heads, n / s.kv_heads * s.time, s.head_dim];
        let heads = Cube::float_reshape(heads, shape.into());
        if s.bf16 { low(heads) } else { heads }
    }

    /// The way back, rotated the other way or not.
    fn tokens(&self, heads: CubeTensor, n: usize, rotate: bool) -> CubeTensor {
        self.split(into_contiguous(heads), n, rotate, true)
    }

    fn split(&self, x: CubeTensor, n: usize, rotate: bool, back: bool) -> CubeTensor {
        let AttentionShape { batch, time, head_dim, .. } = self.shape;
        let (tokens, half) = (batch * time, head_dim / 2);
        let shape = if back { [tokens, n * head_dim] } else { [tokens * n, head_dim] };
        let out = empty(&x, shape);
        let pairs = tokens * n * half;
        let (cubes, dim) = by_element(&x, pairs);
        let Rows { starts, cos, sin } = self.rows.clone();
        let int = dtype_to_storage_type(starts.dtype);
        split::launch(
            &x.client.clone(),
            cubes,
            dim,
            x.into_buffer_arg(),
            cos.into_buffer_arg(),
            sin.into_buffer_arg(),
            starts.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            count(pairs),
            count(time),
            count(n),
            count(half),
            rotate,
            back,
            int,
        );
        out
    }

    /// Ranges of sequences whose probabilities may exist together.
    fn rounds(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let AttentionShape { batch, time, heads, .. } = self.shape;
        let most = (self.round / (heads * time * time)).max(1);
        (0..batch).step_by(most).map(move |first| first..batch.min(first + most))
    }

    /// Probabilities of some sequences, `[b, K, H/K·T, T]`, from their queries and keys.
    fn probabilities(&self, q: CubeTensor, k: CubeTensor, round: &Range<usize>) -> CubeTensor {
        let AttentionShape { time, heads, bf16, .. } = self.shape;
        let scores = into_contiguous(matmul(q, Cube::float_swap_dims(k, 2, 3), bf16));
        let shape = scores.shape();
        let rows = round.len() * heads * time;
        let out = empty(&scores, [rows, time]);
        let (cubes, dim, units) = by_row(&scores, rows, time);
        let starts = self.rows.starts.clone();
        let int = dtype_to_storage_type(starts.dtype);
        softmax::launch(
            &scores.client.clone(),
            cubes,
            dim,
            scores.into_buffer_arg(),
            starts.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            count(round.start * time),
            count(rows),
            count(time),
            count(heads),
            self.shape.scale(),
            units,
            int,
        );
        Cube::float_reshape(out, shape)
    }

    /// The gradient of scores from probabilities and their gradient.
    fn score_gradients(&self, weights: CubeTensor, grad: CubeTensor) -> CubeTensor {
        let (shape, time) = (weights.shape(), self.shape.time);
        let (grad, rows) = (into_contiguous(grad), shape.num_elements() / time);
        let out = empty(&weights, [rows, time]);
        let (cubes, dim, units) = by_row(&weights, rows, time);
        softmax_backward::launch(
            &weights.client.clone(),
            cubes,
            dim,
            weights.into_buffer_arg(),
            grad.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            count(rows),
            count(time),
            self.shape.scale(),
            units,
        );
        Cube::float_reshape(out, shape)
    }
}

/// Some sequences of heads `[B, ..]`.
fn take(heads: &CubeTensor, round: &Range<usize>) -> CubeTensor {
    let shape: [usize; 4] = heads.shape().dims();
    if round.len() == shape[0] {
        return heads.clone();
    }
    let slices = shape.map(|n| Slice::from(0..n));
    let slices = [Slice::from(round.clone()), slices[1], slices[2], slices[3]];
    into_contiguous(Cube::float_slice(heads.clone(), &slices))
}

#[cube(launch)]
fn softmax<I: Numeric>(
    scores: &[f32],
    starts: &[I],
    out: &mut [f32],
    first_token: u32,
    rows: u32,
    time: u32,
    heads: u32,
    scale: f32,
    #[comptime] units: u32,
    #[define(I)] _int: ElemType,
) {
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(scratch_len(units)));
    let mut row = CUBE_POS;
    while row < rows as usize {
        let time = time as usize;
        let t = row % time;
        let token = first_token as usize + row / (time * heads as usize) * time + t;
        let start = u32::cast_from(starts[token]) as usize;
        let first = row * time;
        let mut top = scores[first + t] * scale;
        let mut key = start + UNIT_POS as usize;
        while key <= t {
            top = max(top, scores[first + key] * scale);
            key += units as usize;
        }
        let top = cube_max(top, &mut scratch, units);
        let mut sum = 0.0f32;
        let mut key = start + UNIT_POS as usize;
        while key <= t {
            sum += (scores[first + key] * scale - top).exp();
            key += units as usize;
        }
        let inv = 1.0f32 / cube_sum(sum, &mut scratch, units);
        let mut key = UNIT_POS as usize;
        while key < time {
            let mut p = 0.0f32;
            if key >= start && key <= t {
                p = (scores[first + key] * scale - top).exp() * inv;
            }
            out[first + key] = p;
            key += units as usize;
        }
        row += CUBE_COUNT;
    }
}

/// `scale · p · (grad - Σ grad · p)`; p is 0 where nothing is seen.
#[cube(launch)]
fn softmax_backward(
    weights: &[f32],
    grad: &[f32],
    out: &mut [f32],
    rows: u32,
    time: u32,
    scale: f32,
    #[comptime] units: u32,
) {
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(scratch_len(units)));
    let mut row = CUBE_POS;
    while row < rows as usize {
        let first = row * time as usize;
        let mut sum = 0.0f32;
        let mut key = UNIT_POS as usize;
        while key < time as usize {
            sum += weights[first + key] * grad[first + key];
            key += units as usize;
        }
        let dot = cube_sum(sum, &mut scratch, units);
        let mut key = UNIT_POS as usize;
        while key < time as usize {
            out[first + key] = scale * weights[first + key] * (grad[first + key] - dot);
            key += units as usize;
        }
        row += CUBE_COUNT;
    }
}

impl GpuOp<3> for Attention {
    /// Queries and keys, rotated, and values, as heads.
    type Saved = [CubeTensor; 3];

    fn forward(
        &self,
        [q, k, v]: [CubeTensor; 3],
        track: bool,
    ) -> (CubeTensor, Option<Self::Saved>) {
        let AttentionShape { heads, kv_heads, bf16, .. } = self.shape;
        let q = self.heads(q, heads, true);
        let (k, v) = (self.heads(k, kv_heads, true), self.heads(v, kv_heads, false));
        let out = self.rounds().map(|round| {
            let weights = self.probabilities(take(&q, &round), take(&k, &round), &round);
            matmul(weights, take(&v, &round), bf16)
        });
        let out = self.tokens(Cube::float_cat(out.collect(), 0), heads, false);
        (out, track.then_some([q, k, v]))
    }

    fn backward(
        &self,
        [q, k, v]: Self::Saved,
        grad: CubeTensor,
        wanted: [bool; 3],
    ) -> [Option<CubeTensor>; 3] {
        let AttentionShape { heads, kv_heads, bf16, .. } = self.shape;
        let turned = |t: CubeTensor| Cube::float_swap_dims(t, 2, 3);
        let grad = self.heads(grad, heads, false);
        let (mut dq, mut dk, mut dv) = (Vec::new(), Vec::new(), Vec::new());
        for round in self.rounds() {
            let [q, k, v, grad] = [&q, &k, &v, &grad].map(|t| take(t, &round));
            let weights = self.probabilities(q.clone(), k.clone(), &round);
            dv.push(matmul(turned(weights.clone()), grad.clone(), bf16));
            let dweights = matmul(grad, turned(v), bf16);
            let dscores = self.score_gradients(weights, dweights);
            dq.push(matmul(dscores.clone(), k, bf16));
            dk.push(matmul(turned(dscores), q, bf16));
        }
        let join = |parts, n, rotate| self.tokens(Cube::float_cat(parts, 0), n, rotate);
        [
            wanted[0].then(|| join(dq, heads, true)),
            wanted[1].then(|| join(dk, kv_heads, true)),
            wanted[2].then(|| join(dv, kv_heads, false)),
        ]
    }
}

//! Causal attention: rotary positions and the way from tokens to heads in one kernel,
//! scale, mask and softmax in another; the two products are burn's.
//!
//! The probabilities of a layer are kept for the backward pass, `[B, H, T, T]`.

use burn::backend::cubecl::dtype_to_storage_type;
use burn::backend::{Cube, DispatchKindConversion, DispatchTensor};
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_cubecl::cubecl;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::reduce::{cube_max, cube_sum, scratch_len};
use super::{GpuOp, apply, by_element, by_row, count, dims, empty, primitive};
use crate::ops::attention::AttentionShape;
use crate::ops::bf16;
use crate::ops::cpu::InnerMost;

/// As [`crate::ops::attention`].
pub(in crate::ops) fn attention(
    q: Tensor<2>,
    k: Tensor<2>,
    v: Tensor<2>,
    shape: AttentionShape,
) -> Tensor<2> {
    let AttentionShape { batch: b, time: t, heads: h, kv_heads, head_dim: c, .. } = shape;
    let device = q.device();
    let rows = Rows::new(&shape, &device.clone().inner_most());
    let split = |x: Tensor<2>, n: usize, rotate: bool| -> Tensor<4> {
        let op = Split { batch: b, time: t, heads: n, head_dim: c, rotate, rows: rows.clone() };
        let out: Tensor<2> = apply(op, [x.into_dispatch()], device.is_autodiff());
        out.reshape([b, n, t, c])
    };
    // The queries of the heads that share keys lie one after another.
    let q = split(q, h, true).reshape([b, kv_heads, h / kv_heads * t, c]);
    let (k, v) = (split(k, kv_heads, true), split(v, kv_heads, false));
    let scores = bf16::matmul(q, k.swap_dims(2, 3), shape.bf16).reshape([b * h * t, t]);
    let op = CausalSoftmax { time: t, heads: h, scale: shape.scale(), rows };
    let weights: Tensor<2> = apply(op, [scores.into_dispatch()], device.is_autodiff());
    let out = bf16::matmul(weights.reshape([b, kv_heads, h / kv_heads * t, t]), v, shape.bf16);
    out.reshape([b, h, t, c]).swap_dims(1, 2).reshape([b * t, h * c])
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
        let table = |data: Vec<f32>| {
            let table = Tensor::<2>::from_data(TensorData::new(data, [t, half]), device);
            primitive(table.into_dispatch())
        };
        let starts = into_contiguous(starts);
        Self { starts, cos: table(tables.cos), sin: table(tables.sin) }
    }
}

/// Tokens `[B·T, n·C]` to heads `[B·n·T, C]`, rotated.
#[derive(Debug, Clone)]
struct Split {
    batch: usize,
    time: usize,
    heads: usize,
    head_dim: usize,
    rotate: bool,
    rows: Rows,
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

impl Split {
    fn run(&self, x: CubeTensor, back: bool) -> CubeTensor {
        let (tokens, half) = (self.batch * self.time, self.head_dim / 2);
        let shape = if back {
            [tokens, self.heads * self.head_dim]
        } else {
            [tokens * self.heads, self.head_dim]
        };
        let out = empty(&x, shape);
        let pairs = tokens * self.heads * half;
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
            count(self.time),
            count(self.heads),
            count(half),
            self.rotate,
            back,
            int,
        );
        out
    }
}

impl GpuOp<1> for Split {
    type Saved = ();

    fn forward(&self, [x]: [CubeTensor; 1], track: bool) -> (CubeTensor, Option<()>) {
        (self.run(x, false), track.then_some(()))
    }

    fn backward(&self, (): (), grad: CubeTensor, [wanted]: [bool; 1]) -> [Option<CubeTensor>; 1] {
        [wanted.then(|| self.run(grad, true))]
    }
}

/// Scores `[B·H·T, T]` to probabilities over what a query may see.
#[derive(Debug, Clone)]
struct CausalSoftmax {
    time: usize,
    heads: usize,
    scale: f32,
    rows: Rows,
}

#[cube(launch)]
fn softmax<I: Numeric>(
    scores: &[f32],
    starts: &[I],
    out: &mut [f32],
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
        let token = row / (time * heads as usize) * time + t;
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

impl GpuOp<1> for CausalSoftmax {
    type Saved = CubeTensor;

    fn forward(&self, [scores]: [CubeTensor; 1], track: bool) -> (CubeTensor, Option<CubeTensor>) {
        let [rows, time] = dims(&scores);
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
            count(rows),
            count(self.time),
            count(self.heads),
            self.scale,
            units,
            int,
        );
        (out.clone(), track.then_some(out))
    }

    fn backward(
        &self,
        weights: CubeTensor,
        grad: CubeTensor,
        [wanted]: [bool; 1],
    ) -> [Option<CubeTensor>; 1] {
        let dscores = wanted.then(|| {
            let [rows, time] = dims(&weights);
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
                self.scale,
                units,
            );
            out
        });
        [dscores]
    }
}

//! `BitLinear`: the quantisers as one kernel each, the scales as another.

use bitnet_core::{WeightScheme, ternary};
use burn::backend::Cube;
use burn::backend::ops::FloatTensorOps;
use burn::tensor::Tensor;
use burn_cubecl::cubecl;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::reduce::{cube_max, cube_sum, scratch_len};
use super::{GpuOp, apply, by_element, by_row, count, dims, empty, low, matmul, primitive};
use crate::ops::LinearRecipe;
use crate::ops::cpu::InnerMost;

/// Weights whose magnitudes one cube sums.
const CHUNK: usize = 1 << 14;

/// Whether [`bit_linears`] computes a recipe.
pub(in crate::ops) fn computes(recipe: LinearRecipe) -> bool {
    recipe.is_integer() && recipe.weights == WeightScheme::B158
}

/// [`crate::ops::bit_linear`] through several layers that read one input, which is
/// quantised once.
pub(in crate::ops) fn bit_linears<const N: usize>(
    x: &Tensor<2>,
    weights: [Tensor<2>; N],
    recipe: LinearRecipe,
) -> [Tensor<2>; N] {
    let device = x.device();
    let values = if device.is_autodiff() { x.clone().inner() } else { x.clone() };
    debug_assert_eq!(values.device(), device.clone().inner_most());
    let input = Quantized::of(&super::contiguous(primitive(values.into_dispatch())));
    weights.map(|weight| {
        let op = BitLinear { input: input.clone(), bf16: recipe.bf16 };
        let inputs = [x.clone().into_dispatch(), weight.into_dispatch()];
        apply(op, inputs, device.is_autodiff())
    })
}

/// Activations as integers, and the scale of every row.
#[derive(Debug, Clone)]
struct Quantized {
    values: CubeTensor,
    scales: CubeTensor,
}

impl Quantized {
    /// By absmax per row: [`ternary::quantize_activations`].
    fn of(x: &CubeTensor) -> Self {
        let [rows, cols] = dims(x);
        let (values, scales) = (empty(x, [rows, cols]), empty(x, [rows]));
        let (cubes, dim, units) = by_row(x, rows, cols);
        quantize_rows::launch(
            &x.client,
            cubes,
            dim,
            x.clone().into_buffer_arg(),
            values.clone().into_buffer_arg(),
            scales.clone().into_buffer_arg(),
            count(rows),
            count(cols),
            ternary::EPSILON,
            units,
        );
        Self { values, scales }
    }
}

/// Ternary values of master weights and their scale `[1]`, by absmean.
fn ternarize(weight: &CubeTensor) -> (CubeTensor, CubeTensor) {
    let [rows, cols] = dims(weight);
    let elements = rows * cols;
    let chunks = elements.div_ceil(CHUNK);
    let partial = empty(weight, [chunks]);
    let (cubes, dim, units) = by_row(weight, chunks, CHUNK);
    sum_magnitudes::launch(
        &weight.client,
        cubes,
        dim,
        weight.clone().into_buffer_arg(),
        partial.clone().into_buffer_arg(),
        count(elements),
        count(chunks),
        count(CHUNK),
        units,
    );
    let total = Cube::float_sum(partial);
    let (values, scale) = (empty(weight, [rows, cols]), empty(weight, [1]));
    let (cubes, dim) = by_element(weight, elements);
    quantize_weights::launch(
        &weight.client,
        cubes,
        dim,
        weight.clone().into_buffer_arg(),
        total.into_buffer_arg(),
        values.clone().into_buffer_arg(),
        scale.clone().into_buffer_arg(),
        count(elements),
        ternary::EPSILON,
    );
    (values, scale)
}

#[cube(launch)]
fn quantize_rows(
    x: &[f32],
    values: &mut [f32],
    scales: &mut [f32],
    rows: u32,
    cols: u32,
    floor: f32,
    #[comptime] units: u32,
) {
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(scratch_len(units)));
    let mut row = CUBE_POS;
    while row < rows as usize {
        let first = row * cols as usize;
        let mut top = floor;
        let mut i = UNIT_POS as usize;
        while i < cols as usize {
            top = max(top, x[first + i].abs());
            i += units as usize;
        }
        let absmax = cube_max(top, &mut scratch, units);
        let inv = 127.0f32 / absmax;
        let mut i = UNIT_POS as usize;
        while i < cols as usize {
            let q = (x[first + i] * inv).round();
            values[first + i] = min(max(q, -128.0f32), 127.0f32);
            i += units as usize;
        }
        if UNIT_POS == 0 {
            scales[row] = absmax / 127.0f32;
        }
        row += CUBE_COUNT;
    }
}

#[cube(launch)]
fn sum_magnitudes(
    weight: &[f32],
    partial: &mut [f32],
    elements: u32,
    chunks: u32,
    chunk: u32,
    #[comptime] units: u32,
) {
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(scratch_len(units)));
    let mut at = CUBE_POS;
    while at < chunks as usize {
        let first = at * chunk as usize;
        let mut sum = 0.0f32;
        let mut i = UNIT_POS as usize;
        while i < chunk as usize && first + i < elements as usize {
            sum += weight[first + i].abs();
            i += units as usize;
        }
        let total = cube_sum(sum, &mut scratch, units);
        if UNIT_POS == 0 {
            partial[at] = total;
        }
        at += CUBE_COUNT;
    }
}

#[cube(launch)]
fn quantize_weights(
    weight: &[f32],
    total: &[f32],
    values: &mut [f32],
    scale: &mut [f32],
    elements: u32,
    floor: f32,
) {
    let mean = max(total[0] / f32::cast_from(elements), floor);
    let inv = 1.0f32 / mean;
    let mut at = ABSOLUTE_POS;
    while at < elements as usize {
        let q = (weight[at] * inv).round();
        values[at] = min(max(q, -1.0f32), 1.0f32);
        at += CUBE_COUNT * CUBE_DIM as usize;
    }
    if ABSOLUTE_POS == 0 {
        scale[0] = mean;
    }
}

/// `sums · (act_scale · weight_scale)`, in place.
#[cube(launch)]
fn dequantize(
    sums: &mut [f32],
    act_scales: &[f32],
    weight_scale: &[f32],
    elements: u32,
    cols: u32,
) {
    let mut at = ABSOLUTE_POS;
    while at < elements as usize {
        sums[at] *= act_scales[at / cols as usize] * weight_scale[0];
        at += CUBE_COUNT * CUBE_DIM as usize;
    }
}

/// Every row times its scale.
#[cube(launch)]
fn scale_rows(x: &[f32], scales: &[f32], out: &mut [f32], elements: u32, cols: u32) {
    let mut at = ABSOLUTE_POS;
    while at < elements as usize {
        out[at] = x[at] * scales[at / cols as usize];
        at += CUBE_COUNT * CUBE_DIM as usize;
    }
}

#[derive(Debug, Clone)]
struct BitLinear {
    input: Quantized,
    bf16: bool,
}

#[derive(Debug, Clone)]
struct Saved {
    /// Integers, both; in bf16, which holds them exactly, where gradients are.
    input: CubeTensor,
    weight: CubeTensor,
    act_scales: CubeTensor,
    weight_scale: CubeTensor,
}

impl GpuOp<2> for BitLinear {
    type Saved = Saved;

    fn forward(&self, [x, weight]: [CubeTensor; 2], track: bool) -> (CubeTensor, Option<Saved>) {
        let ([tokens, _], [rows, _]) = (dims(&x), dims(&weight));
        let (trits, weight_scale) = ternarize(&weight);
        let Quantized { values, scales } = self.input.clone();
        let turned = Cube::float_transpose(trits.clone());
        let out = super::contiguous(Cube::float_matmul(values.clone(), turned));
        let (cubes, dim) = by_element(&out, tokens * rows);
        dequantize::launch(
            &out.client,
            cubes,
            dim,
            out.clone().into_buffer_arg(),
            scales.clone().into_buffer_arg(),
            weight_scale.clone().into_buffer_arg(),
            count(tokens * rows),
            count(rows),
        );
        let saved = track.then(|| {
            let keep = |t: CubeTensor| if self.bf16 { low(t) } else { t };
            Saved { input: keep(values), weight: keep(trits), act_scales: scales, weight_scale }
        });
        (out, saved)
    }

    fn backward(
        &self,
        Saved { input, weight, act_scales, weight_scale }: Saved,
        grad: CubeTensor,
        wanted: [bool; 2],
    ) -> [Option<CubeTensor>; 2] {
        let dx = wanted[0].then(|| {
            let product = matmul(grad.clone(), weight, self.bf16);
            Cube::float_mul(product, Cube::float_reshape(weight_scale, [1, 1].into()))
        });
        let dweight = wanted[1].then(|| {
            let [tokens, rows] = dims(&grad);
            let scaled = empty(&grad, [tokens, rows]);
            let (cubes, dim) = by_element(&grad, tokens * rows);
            scale_rows::launch(
                &grad.client,
                cubes,
                dim,
                grad.clone().into_buffer_arg(),
                act_scales.into_buffer_arg(),
                scaled.clone().into_buffer_arg(),
                count(tokens * rows),
                count(rows),
            );
            matmul(Cube::float_transpose(scaled), input, self.bf16)
        });
        [dx, dweight]
    }
}

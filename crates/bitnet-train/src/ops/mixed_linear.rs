//! Linear layers whose product is one of floats: scales by row or group, 4-bit or
//! unquantised activations, and the blend of a float model into a quantised one.
//!
//! Weights and inputs are quantised by the definitions of
//! [`bitnet_core::quantizer`], multiplied back to floats, and those are
//! multiplied.

use bitnet_core::quantizer::{INT4_MAX, ScaleStatistic};
use bitnet_core::{ActivationQuantizer, WeightQuantizer, WeightScheme, ternary};
use bitnet_kernels::MatRef;
use burn::tensor::Tensor;
use rayon::prelude::*;

use super::bf16;
use super::cpu::{Buffer, CpuOp, apply, is_cpu};
use super::linear::LinearRecipe;
use super::products::{self, ROWS, matmul};

pub(super) fn mixed_linear(x: Tensor<2>, weight: Tensor<2>, recipe: LinearRecipe) -> Tensor<2> {
    let device = x.device();
    if !is_cpu(&device) {
        return plain(x, weight, recipe);
    }
    let ([tokens, cols], [rows, _]) = (x.dims(), weight.dims());
    let op = MixedLinear { tokens, rows, cols, recipe };
    let inputs = [x.into_dispatch(), weight.into_dispatch()];
    apply(op, inputs, device.is_autodiff(), [tokens, rows])
}

/// The same with tensor operations.
pub(super) fn plain(x: Tensor<2>, weight: Tensor<2>, recipe: LinearRecipe) -> Tensor<2> {
    let blend = |exact: Tensor<2>, quantized: Tensor<2>| {
        let step = (quantized - exact.clone().detach()).mul_scalar(recipe.blend);
        exact + step.detach()
    };
    let x = match recipe.activations {
        ActivationQuantizer::None => x,
        quantizer => blend(x.clone(), plain_activations(x.detach(), quantizer)),
    };
    let weight = match recipe.weights.quantizer {
        WeightQuantizer::None => weight,
        _ => blend(weight.clone(), plain_weights(weight.detach(), recipe.weights)),
    };
    if recipe.is_float() {
        return bf16::matmul(x, weight.transpose(), recipe.bf16);
    }
    bf16::exact_matmul(x, weight.transpose(), recipe.bf16)
}

fn plain_activations(x: Tensor<2>, quantizer: ActivationQuantizer) -> Tensor<2> {
    let max = |x: Tensor<2>| x.abs().max_dim(1).clamp_min(ternary::EPSILON);
    let (step, low, high) = match quantizer {
        ActivationQuantizer::Int8 => (max(x.clone()) / ternary::ACTIVATION_MAX, -128.0, 127.0),
        ActivationQuantizer::Int4 => (max(x.clone()) / INT4_MAX, -8.0, 7.0),
        ActivationQuantizer::Int4Absmean => {
            let mean = x.clone().abs().mean_dim(1).clamp_min(ternary::EPSILON);
            (mean / INT4_MAX.sqrt(), -8.0, 7.0)
        }
        ActivationQuantizer::None => return x,
    };
    (x / step.clone()).round().clamp(low, high) * step
}

/// De-quantised weights, with statistics taken on the device.
fn plain_weights(weight: Tensor<2>, scheme: WeightScheme) -> Tensor<2> {
    let [rows, cols] = weight.dims();
    let group = scheme.granularity.group(rows, cols);
    let groups = weight.reshape([rows * cols / group, group]);
    let scale = plain_scale(groups.clone(), scheme.statistic);
    let values = match scheme.quantizer {
        WeightQuantizer::Binary => plain_binary(groups),
        _ => (groups * scale.clone().recip()).round().clamp(-1.0, 1.0),
    };
    (values * scale).reshape([rows, cols])
}

/// The scale of every row of `[groups, group]`, `[groups, 1]`.
pub(super) fn plain_scale(groups: Tensor<2>, statistic: ScaleStatistic) -> Tensor<2> {
    let [_, group] = groups.dims();
    let magnitudes = groups.abs();
    let scale = match statistic {
        ScaleStatistic::Absmean => magnitudes.mean_dim(1),
        ScaleStatistic::Absmedian => magnitudes.sort(1).narrow(1, (group - 1) / 2, 1),
    };
    scale.clamp_min(ternary::EPSILON)
}

/// The binary values of every row of `[groups, group]`.
pub(super) fn plain_binary(groups: Tensor<2>) -> Tensor<2> {
    let mean = groups.clone().mean_dim(1);
    let above = (groups - mean).greater_elem(0.0).float();
    above.mul_scalar(2.0).sub_scalar(1.0)
}

#[derive(Debug, Clone)]
struct MixedLinear {
    tokens: usize,
    rows: usize,
    cols: usize,
    recipe: LinearRecipe,
}

/// What was multiplied.
struct Saved {
    x: Operand,
    weight: Operand,
}

/// An operand: as it came, or changed.
enum Operand {
    Given(Buffer),
    Made(Vec<f32>),
}

impl Operand {
    fn data(&self) -> &[f32] {
        match self {
            Self::Given(buffer) => buffer.data(),
            Self::Made(values) => values,
        }
    }
}

impl MixedLinear {
    fn activations(&self, x: Buffer) -> Operand {
        let quantizer = self.recipe.activations;
        if quantizer == ActivationQuantizer::None {
            return Operand::Given(x);
        }
        let (cols, blend) = (self.cols, self.recipe.blend);
        let mut out = vec![0.0f32; x.data().len()];
        out.par_chunks_mut(ROWS * cols).zip(x.data().par_chunks(ROWS * cols)).for_each(
            |(out, x)| {
                let mut q = vec![0i8; cols];
                for (out, x) in out.chunks_exact_mut(cols).zip(x.chunks_exact(cols)) {
                    let scale = quantizer.quantize(x, &mut q);
                    for ((out, &x), &q) in out.iter_mut().zip(x).zip(&q) {
                        *out = mix(x, f32::from(q) * scale, blend);
                    }
                }
            },
        );
        Operand::Made(out)
    }

    fn weights(&self, weight: Buffer) -> Operand {
        let (cols, blend) = (self.cols, self.recipe.blend);
        let scheme = self.recipe.weights;
        if scheme.quantizer == WeightQuantizer::None {
            return Operand::Given(weight);
        }
        let mut out = if scheme == WeightScheme::B158 {
            products::dequantize(weight.data(), cols, scheme)
        } else {
            dequantized(weight.data(), cols, scheme)
        };
        if blend < 1.0 {
            let pairs = out.par_iter_mut().zip(weight.data()).with_min_len(1 << 14);
            pairs.for_each(|(q, &w)| *q = mix(w, *q, blend));
        }
        Operand::Made(out)
    }
}

/// `exact + blend · (quantized - exact)`; the quantised value itself where
/// `blend` is 1.
fn mix(exact: f32, quantized: f32, blend: f32) -> f32 {
    if blend == 1.0 { quantized } else { exact + blend * (quantized - exact) }
}

/// Weights quantised and multiplied back.
fn dequantized(weights: &[f32], cols: usize, scheme: WeightScheme) -> Vec<f32> {
    let group = scheme.granularity.group(weights.len() / cols, cols);
    let mut out = vec![0.0f32; weights.len()];
    let groups = out.par_chunks_mut(group).zip(weights.par_chunks(group));
    groups.with_min_len((1 << 12) / group + 1).for_each(|(out, w)| {
        let mut values = vec![0i8; w.len()];
        let scale = scheme.quantize_group(w, cols.min(w.len()), &mut values);
        out.iter_mut().zip(values).for_each(|(o, v)| *o = f32::from(v) * scale);
    });
    out
}

impl CpuOp<2> for MixedLinear {
    type Saved = Saved;

    fn forward(&self, [x, weight]: [Buffer; 2], track: bool) -> (Vec<f32>, Option<Saved>) {
        let (x, weight) = (self.activations(x), self.weights(weight));
        let (tokens, rows, cols) = (self.tokens, self.rows, self.cols);
        let w = MatRef::new(weight.data(), rows, cols, cols);
        let out = matmul(MatRef::new(x.data(), tokens, cols, cols), w.t());
        (out, track.then_some(Saved { x, weight }))
    }

    fn backward(
        &self,
        saved: &Saved,
        grad: &[f32],
        [want_x, want_weight]: [bool; 2],
    ) -> [Option<Vec<f32>>; 2] {
        let (tokens, rows, cols) = (self.tokens, self.rows, self.cols);
        let grad = MatRef::new(grad, tokens, rows, rows);
        let w = MatRef::new(saved.weight.data(), rows, cols, cols);
        let x = MatRef::new(saved.x.data(), tokens, cols, cols);
        [want_x.then(|| matmul(grad, w)), want_weight.then(|| matmul(grad.t(), x))]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bitnet_core::quantizer::Granularity;
    use burn::tensor::Device;

    use crate::ops::Gradients;
    use crate::ops::cpu::testing::{check_gradients, random, to_vec};

    fn recipes() -> Vec<LinearRecipe> {
        let mut all = Vec::new();
        for quantizer in [WeightQuantizer::Ternary, WeightQuantizer::Binary, WeightQuantizer::None]
        {
            for statistic in [ScaleStatistic::Absmean, ScaleStatistic::Absmedian] {
                for granularity in [Granularity::Tensor, Granularity::Row, Granularity::Group(16)] {
                    for activations in [
                        ActivationQuantizer::Int8,
                        ActivationQuantizer::Int4,
                        ActivationQuantizer::Int4Absmean,
                        ActivationQuantizer::None,
                    ] {
                        let weights = WeightScheme { quantizer, statistic, granularity };
                        let blend = if all.len() % 3 == 0 { 0.25 } else { 1.0 };
                        let rotate = false;
                        all.push(LinearRecipe {
                            weights,
                            activations,
                            rotate,
                            keep: 1.0,
                            blend,
                            gradients: Gradients::FLOAT,
                            bf16: false,
                        });
                    }
                }
            }
        }
        all
    }

    /// What is multiplied is what the definitions say.
    #[test]
    fn follows_the_definitions() {
        let (tokens, rows, cols) = (5, 6, 48);
        let (x, w) = (random([tokens, cols], 3.0, 7), random([rows, cols], 0.05, 8));
        let (xs, ws) = (x.try_to_vec::<f32>().unwrap(), w.try_to_vec::<f32>().unwrap());
        for recipe in recipes() {
            let mut want_x = xs.clone();
            if recipe.activations != ActivationQuantizer::None {
                for row in want_x.chunks_exact_mut(cols) {
                    let mut q = vec![0i8; cols];
                    let scale = recipe.activations.quantize(row, &mut q);
                    row.iter_mut()
                        .zip(q)
                        .for_each(|(x, q)| *x = mix(*x, f32::from(q) * scale, recipe.blend));
                }
            }
            let mut want_w = ws.clone();
            if recipe.weights.quantizer != WeightQuantizer::None {
                let q = recipe.weights.quantize(&ws, cols).dequantize();
                want_w.iter_mut().zip(q).for_each(|(w, q)| *w = mix(*w, q, recipe.blend));
            }
            let device = Device::flex();
            let out = mixed_linear(
                Tensor::from_data(x.clone(), &device),
                Tensor::from_data(w.clone(), &device),
                recipe,
            );
            for (i, got) in to_vec(out).into_iter().enumerate() {
                let (t, n) = (i / rows, i % rows);
                let products = want_x[t * cols..][..cols].iter().zip(&want_w[n * cols..][..cols]);
                let want: f64 = products.map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                // 48 products of at most 3 · 0.05.
                assert!((f64::from(got) - want).abs() < 1e-5, "{recipe:?}: {got} and {want}");
            }
        }
    }

    #[test]
    fn gradients_agree_between_the_versions() {
        for recipe in recipes() {
            check_gradients(
                [random([40, 48], 2.0, 1), random([33, 48], 0.05, 2)],
                |[x, w]| mixed_linear(x, w, recipe),
                |[x, w]| plain(x, w, recipe),
                // Sums of 33 to 48 products in another order, and scales whose last
                // bit differs: no value of these seeds lies so near a half that it
                // rounds the other way.
                5e-6,
            );
        }
    }
}

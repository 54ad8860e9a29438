//! `BitLinear`: ternary weights (absmean), int8 activations (absmax), straight-
//! through gradients. The heart of BitNet b1.58 ("The Era of 1-bit LLMs: Training
//! Tips, Code and FAQ", figures 3 and 4).
//!
//! Both versions multiply *integers* and apply the two scales afterwards, in the
//! order of [`bitnet_core::ternary::dequantize`], so that the output is the bit
//! pattern that the packed engine computes from the same input.

use bitnet_core::{WeightQuantizer, WeightScheme, ternary};
use burn::tensor::{Tensor, TensorData};

use super::bf16;
use super::cpu::{Buffer, CpuOp, apply, is_cpu};
use super::linear::{LinearRecipe, on_host};
use super::mixed_linear::{plain_binary, plain_scale};
use super::norm::Norm;
use super::products::{self, Input, Weights};

/// A linear layer with ternary weights of one scale, by any scheme, and int8
/// activations.
///
/// # Shapes
/// `x` is `[tokens, K]`, `weight` the master weights `[N, K]`, the result
/// `[tokens, N]`.
///
/// # Gradients
/// Straight-through (arXiv:1308.3432): those of `x_q · w_qᵀ` with the de-quantised
/// values as constants, handed to `x` and `weight` unchanged.
pub fn bit_linear(x: Tensor<2>, weight: Tensor<2>, recipe: LinearRecipe) -> Tensor<2> {
    let device = x.device();
    if !is_cpu(&device) {
        #[cfg(any(feature = "wgpu", feature = "cuda"))]
        if super::gpu::is_gpu(&device) && super::gpu::computes(recipe) {
            let [out] = super::gpu::bit_linears(&x, [weight], recipe);
            return out;
        }
        return plain(x, weight, recipe);
    }
    let ([tokens, cols], [rows, _]) = (x.dims(), weight.dims());
    let op = BitLinear { cols, recipe };
    let inputs = [x.into_dispatch(), weight.into_dispatch()];
    apply(op, inputs, device.is_autodiff(), [tokens, rows])
}

/// Master weights to (ternary values with straight-through gradient, scale `[1, 1]`).
///
/// The values are exact integers: the gradient path adds `w − w`, which is 0.
fn quantize_weight_ste(weight: Tensor<2>, scheme: WeightScheme) -> (Tensor<2>, Tensor<2>) {
    let [rows, cols] = weight.dims();
    let (values, scale) = quantize_weight(weight.clone().detach(), scheme);
    let scaled = weight * scale.clone().recip();
    (straight_through(values.reshape([rows, cols]), scaled), scale)
}

/// The value of `value` with the gradient of `path`.
fn straight_through(value: Tensor<2>, path: Tensor<2>) -> Tensor<2> {
    value.detach() + (path.clone() - path.detach())
}

/// Ternary values and their scale `[1, 1]`.
///
/// A mean depends on the order of additions. On a CPU it comes from the one
/// definition; a GPU adds in an order of its own rather than send every weight to
/// the host on every step, and its scale may differ from the exporter's in the
/// last bits.
fn quantize_weight(weight: Tensor<2>, scheme: WeightScheme) -> (Tensor<2>, Tensor<2>) {
    let device = weight.device();
    let [rows, cols] = weight.dims();
    if !on_host(&device) {
        let flat = weight.reshape([1, rows * cols]);
        let scale = plain_scale(flat.clone(), scheme.statistic);
        let values = match scheme.quantizer {
            WeightQuantizer::Binary => plain_binary(flat),
            _ => (flat * scale.clone().recip()).round().clamp(-1.0, 1.0),
        };
        return (values, scale);
    }
    let data = weight.into_data();
    let mut values = vec![0i8; rows * cols];
    let scale = match data.as_slice::<f32>() {
        Ok(weights) => scheme.quantize_group(weights, cols, &mut values),
        Err(e) => unreachable!("[{rows}, {cols}] master weights are f32: {e:?}"),
    };
    let values: Vec<f32> = values.into_iter().map(f32::from).collect();
    let values = Tensor::from_data(TensorData::new(values, [rows, cols]), &device);
    (values, Tensor::from_floats([[scale]], &device))
}

/// The same with tensor operations.
pub fn plain(x: Tensor<2>, weight: Tensor<2>, recipe: LinearRecipe) -> Tensor<2> {
    let scheme = recipe.weights;
    let (trits, weight_scale) = quantize_weight_ste(weight, scheme);
    let absmax = x.clone().detach().abs().max_dim(1).clamp_min(ternary::EPSILON);
    let inv_act_scale = absmax.clone().recip_of(ternary::ACTIVATION_MAX);
    let act_scale = absmax / ternary::ACTIVATION_MAX;
    let scaled = x * inv_act_scale;
    let q = scaled.clone().detach().round().clamp(-128.0, 127.0);
    let product = bf16::exact_matmul(straight_through(q, scaled), trits.transpose(), recipe.bf16);
    product * (act_scale * weight_scale)
}

trait RecipOf {
    fn recip_of(self, numerator: f32) -> Self;
}

impl RecipOf for Tensor<2> {
    /// `numerator / self`: one rounding, as the definition has it.
    fn recip_of(self, numerator: f32) -> Self {
        self.full_like(numerator) / self
    }
}

#[derive(Debug, Clone)]
struct BitLinear {
    cols: usize,
    recipe: LinearRecipe,
}

struct Saved {
    x: Input,
    weight: Weights,
}

impl CpuOp<2> for BitLinear {
    type Saved = Saved;

    fn forward(&self, [x, weight]: [Buffer; 2], track: bool) -> (Vec<f32>, Option<Saved>) {
        let none = Norm { weight: None, eps: 0.0 };
        let x = none.input(x.data(), self.cols, true);
        let [weight] = Weights::all([(&weight, self.cols, self.recipe)]);
        let out = products::forward(&x, &[&weight]).into_vec();
        (out, track.then_some(Saved { x, weight }))
    }

    fn backward(
        &self,
        Saved { x, weight }: &Saved,
        grad: &[f32],
        [want_x, want_weight]: [bool; 2],
    ) -> [Option<Vec<f32>>; 2] {
        let dx = want_x.then(|| products::backward_input(grad, &[weight], self.recipe).into_vec());
        let dweight =
            want_weight.then(|| products::backward_weights(grad, x, &[weight], self.recipe));
        [dx, dweight.and_then(|mut d| d.pop())]
    }
}

#[cfg(test)]
mod tests {
    use bitnet_core::quantizer::{Granularity, ScaleStatistic};
    use burn::tensor::Device;

    use super::*;
    use crate::ops::cpu::testing::{check_gradients, random, to_vec};
    use crate::ops::products::testing::recipes;

    fn recipe(weights: WeightScheme) -> LinearRecipe {
        LinearRecipe { weights, ..recipes()[0] }
    }

    #[test]
    fn both_versions_equal_the_definition_bit_for_bit() {
        for [tokens, rows, cols] in [[1, 1, 1], [3, 5, 7], [70, 33, 300], [2, 16, 1024]] {
            let x = random([tokens, cols], 3.0, 7);
            let w = random([rows, cols], 0.05, 8);
            let (xs, ws) = (x.try_to_vec::<f32>().unwrap(), w.try_to_vec::<f32>().unwrap());
            let want: Vec<u32> = xs
                .chunks_exact(cols)
                .flat_map(|x| ternary::bit_linear(&ws, x))
                .map(f32::to_bits)
                .collect();
            for device in [Device::flex(), Device::flex().autodiff()] {
                let tensor = |data: &TensorData| Tensor::<2>::from_data(data.clone(), &device);
                for run in [bit_linear, plain] {
                    let out = to_vec(run(tensor(&x), tensor(&w), recipe(WeightScheme::B158)));
                    let got: Vec<u32> = out.iter().map(|v| v.to_bits()).collect();
                    assert_eq!(got, want, "[{tokens}, {rows}, {cols}] on {device:?}");
                }
            }
        }
    }

    #[test]
    fn every_scheme_of_one_scale_equals_its_definition_bit_for_bit() {
        let [tokens, rows, cols] = [40, 33, 300];
        let (x, w) = (random([tokens, cols], 3.0, 7), random([rows, cols], 0.05, 8));
        let (xs, ws) = (x.try_to_vec::<f32>().unwrap(), w.try_to_vec::<f32>().unwrap());
        let granularity = Granularity::Tensor;
        for quantizer in [WeightQuantizer::Ternary, WeightQuantizer::Binary] {
            for statistic in [ScaleStatistic::Absmean, ScaleStatistic::Absmedian] {
                let scheme = WeightScheme { quantizer, statistic, granularity };
                let weights = scheme.quantize(&ws, cols);
                let want = xs.chunks_exact(cols).flat_map(|x| {
                    let mut q = vec![0i8; cols];
                    let act_scale = ternary::quantize_activations(x, &mut q);
                    let sums = ternary::ternary_sums(&weights.values, &q).into_iter();
                    let scale = weights.scales[0];
                    sums.map(move |s| ternary::dequantize(s, act_scale, scale).to_bits())
                });
                let want: Vec<u32> = want.collect();
                for run in [bit_linear, plain] {
                    let device = Device::flex().autodiff();
                    let tensor = |data: &TensorData| Tensor::<2>::from_data(data.clone(), &device);
                    let out = to_vec(run(tensor(&x), tensor(&w), recipe(scheme)));
                    let got: Vec<u32> = out.iter().map(|v| v.to_bits()).collect();
                    assert_eq!(got, want, "{scheme:?}");
                }
            }
        }
    }

    #[test]
    fn gradients_agree_between_the_versions() {
        for gradients in [recipes()[0].gradients, recipes()[3].gradients] {
            let recipe = LinearRecipe { gradients, ..recipe(WeightScheme::B158) };
            check_gradients(
                [random([70, 96], 2.0, 1), random([33, 96], 0.05, 2)],
                |[x, w]| bit_linear(x, w, recipe),
                |[x, w]| plain(x, w, recipe),
                // Sums of 33 and 70 products in another order, and one more rounding of
                // scale and reciprocal in the plain version.
                2e-6,
            );
        }
    }

    #[test]
    fn gradients_are_the_analytic_straight_through_ones() {
        let (tokens, rows, cols) = (9, 6, 40);
        let (x, w) = (random([tokens, cols], 2.0, 3), random([rows, cols], 0.05, 4));
        let upstream = random([tokens, rows], 1.0, 5);
        let (xs, ws) = (x.try_to_vec::<f32>().unwrap(), w.try_to_vec::<f32>().unwrap());
        let dy = upstream.try_to_vec::<f32>().unwrap();
        let (trits, weight_scale) = ternary::quantize_weights(&ws, cols);
        let mut want_dx = vec![0.0f64; tokens * cols];
        let mut want_dw = vec![0.0f64; rows * cols];
        for t in 0..tokens {
            let mut q = vec![0i8; cols];
            let act_scale = ternary::quantize_activations(&xs[t * cols..(t + 1) * cols], &mut q);
            for n in 0..rows {
                let g = f64::from(dy[t * rows + n]);
                for k in 0..cols {
                    let w = f64::from(trits[n * cols + k]) * f64::from(weight_scale);
                    want_dx[t * cols + k] += g * w;
                    want_dw[n * cols + k] += g * f64::from(q[k]) * f64::from(act_scale);
                }
            }
        }
        let device = Device::flex().autodiff();
        for run in [bit_linear, plain] {
            let x = Tensor::<2>::from_data(x.clone(), &device).require_grad();
            let w = Tensor::<2>::from_data(w.clone(), &device).require_grad();
            let dy = Tensor::<2>::from_data(upstream.clone(), &device);
            let grads =
                (run(x.clone(), w.clone(), recipe(WeightScheme::B158)) * dy).sum().backward();
            let dx = to_vec(x.grad(&grads).unwrap());
            let dw = to_vec(w.grad(&grads).unwrap());
            // f32 sums of at most 9 products of order one.
            for (got, want) in dx.iter().zip(&want_dx).chain(dw.iter().zip(&want_dw)) {
                assert!((f64::from(*got) - want).abs() < 2e-5, "{got} and {want}");
            }
        }
    }
}

//! `BitLinear`: ternary weights (absmean), int8 activations (absmax), straight-
//! through gradients. The heart of BitNet b1.58 ("The Era of 1-bit LLMs: Training
//! Tips, Code and FAQ", figures 3 and 4).
//!
//! Both versions multiply *integers* and apply the two scales afterwards, in the
//! order of [`bitnet_core::ternary::dequantize`], so that the output is the bit
//! pattern that the packed engine computes from the same input.

use bitnet_core::Layout;
use bitnet_core::ternary::{self, inv_weight_scale};
use bitnet_kernels::{MatMut, MatRef, QuantizedTokens, TernaryRows};
use burn::tensor::{Device, Tensor};
use rayon::prelude::*;

#[cfg(feature = "ndarray")]
use super::cpu::InnerMost;
use super::cpu::{Buffer, CpuOp, ROWS, apply, is_cpu, kernels, matmul};

/// A linear layer with ternary weights and int8 activations.
///
/// # Shapes
/// `x` is `[tokens, K]`, `weight` the master weights `[N, K]`, the result
/// `[tokens, N]`.
///
/// # Gradients
/// Straight-through (arXiv:1308.3432): those of `x_q · w_qᵀ` with the de-quantised
/// values as constants, handed to `x` and `weight` unchanged.
pub fn bit_linear(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    let device = x.device();
    if !is_cpu(&device) {
        return plain(x, weight);
    }
    let ([tokens, cols], [rows, _]) = (x.dims(), weight.dims());
    let op = BitLinear { tokens, rows, cols };
    let inputs = [x.into_dispatch(), weight.into_dispatch()];
    apply(op, inputs, device.is_autodiff(), [tokens, rows])
}

/// The linear layer of the float twin: `x · weightᵀ`, nothing quantised.
///
/// # Shapes
/// As [`bit_linear`].
pub fn linear(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    x.matmul(weight.transpose())
}

/// Master weights to (ternary values with straight-through gradient, scale `[1, 1]`).
///
/// The values are exact integers: the gradient path adds `w − w`, which is 0.
pub fn quantize_weight_ste(weight: Tensor<2>) -> (Tensor<2>, Tensor<2>) {
    let scale = weight_scale(weight.clone().detach());
    let scaled = weight * scale.clone().recip();
    let trits = scaled.clone().detach().round().clamp(-1.0, 1.0);
    (straight_through(trits, scaled), scale)
}

/// The value of `value` with the gradient of `path`.
fn straight_through(value: Tensor<2>, path: Tensor<2>) -> Tensor<2> {
    value.detach() + (path.clone() - path.detach())
}

/// The absmean scale, `[1, 1]`.
///
/// A mean depends on the order of additions. On a CPU it comes from the one
/// definition; a GPU adds in an order of its own rather than send every weight to
/// the host on every step, and its scale may differ from the exporter's in the
/// last bits.
fn weight_scale(weight: Tensor<2>) -> Tensor<2> {
    let device = weight.device();
    let [rows, cols] = weight.dims();
    if !on_host(&device) {
        let mean = weight.abs().mean_dim(1).mean_dim(0);
        return mean.clamp_min(ternary::EPSILON).reshape([1, 1]);
    }
    let data = weight.into_data();
    let scale = match data.as_slice::<f32>() {
        Ok(weights) => ternary::absmean_scale(weights, cols),
        Err(e) => unreachable!("[{rows}, {cols}] master weights are f32: {e:?}"),
    };
    Tensor::from_floats([[scale]], &device)
}

/// Whether a device's memory is the host's.
fn on_host(device: &Device) -> bool {
    #[cfg(feature = "ndarray")]
    if device.clone().inner_most() == Device::ndarray() {
        return true;
    }
    is_cpu(device)
}

/// The same with tensor operations.
pub fn plain(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    let (trits, weight_scale) = quantize_weight_ste(weight);
    let absmax = x.clone().detach().abs().max_dim(1).clamp_min(ternary::EPSILON);
    let inv_act_scale = absmax.clone().recip_of(ternary::ACTIVATION_MAX);
    let act_scale = absmax / ternary::ACTIVATION_MAX;
    let scaled = x * inv_act_scale;
    let q = scaled.clone().detach().round().clamp(-128.0, 127.0);
    straight_through(q, scaled).matmul(trits.transpose()) * (act_scale * weight_scale)
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
    tokens: usize,
    rows: usize,
    cols: usize,
}

struct Saved {
    x: QuantizedTokens,
    /// `[N, K]` ternary values, packed as the engine stores them.
    weight: Vec<u8>,
    weight_scale: f32,
}

/// The layout of the weights between the forward and the backward pass.
const LAYOUT: Layout = Layout::P2;

/// Quantises `[tokens, cols]` activations.
pub(crate) fn quantize_tokens(x: &[f32], cols: usize) -> QuantizedTokens {
    let k = kernels();
    let mut out = QuantizedTokens::default();
    out.resize(x.len() / cols, cols);
    let stride = out.stride;
    out.q
        .par_chunks_mut(ROWS * stride)
        .zip(out.scales.par_chunks_mut(ROWS).zip(out.sums.par_chunks_mut(ROWS)))
        .zip(x.par_chunks(ROWS * cols))
        .for_each(|((q, (scales, sums)), x)| {
            let outputs = scales.iter_mut().zip(sums);
            for ((q, (scale, sum)), x) in
                q.chunks_exact_mut(stride).zip(outputs).zip(x.chunks_exact(cols))
            {
                (*scale, *sum) = k.quantize(x, q);
            }
        });
    out
}

/// Quantises and packs `[rows, cols]` master weights: rows of bytes, and the scale.
fn pack_weights(weights: &[f32], cols: usize) -> (Vec<u8>, f32) {
    let k = kernels();
    let sums: Vec<f64> =
        weights.par_chunks(cols).with_min_len(ROWS).map(|row| k.row_abs_sum(row)).collect();
    let scale = ternary::absmean_from_row_sums(&sums, weights.len());
    let inv = inv_weight_scale(scale);
    let mut bytes = vec![0u8; weights.len() / cols * LAYOUT.row_bytes(cols)];
    bytes
        .par_chunks_mut(LAYOUT.row_bytes(cols))
        .zip(weights.par_chunks(cols))
        .with_min_len(ROWS)
        .for_each(|(bytes, weights)| k.pack_weight_row(weights, inv, bytes));
    (bytes, scale)
}

/// De-quantised weights `[rows, cols]`.
fn dequantize_weights(saved: &Saved, rows: usize, cols: usize) -> Vec<f32> {
    let mut out = vec![0.0f32; rows * cols];
    out.par_chunks_mut(cols)
        .zip(saved.weight.par_chunks(LAYOUT.row_bytes(cols)))
        .with_min_len(ROWS)
        .for_each_init(
            || vec![0i8; cols],
            |trits, (out, bytes)| {
                if let Err(e) = LAYOUT.unpack_row(bytes, trits) {
                    unreachable!("weights packed by the forward pass: {e}");
                }
                for (w, &t) in out.iter_mut().zip(trits.iter()) {
                    *w = f32::from(t) * saved.weight_scale;
                }
            },
        );
    out
}

/// De-quantised activations `[tokens, cols]`.
fn dequantize_tokens(x: &QuantizedTokens, cols: usize) -> Vec<f32> {
    let mut out = vec![0.0f32; x.scales.len() * cols];
    out.par_chunks_mut(cols)
        .zip(x.q.par_chunks(x.stride).zip(&x.scales))
        .with_min_len(ROWS)
        .for_each(|(out, (q, &scale))| {
            for (o, &q) in out.iter_mut().zip(q) {
                *o = f32::from(q) * scale;
            }
        });
    out
}

impl CpuOp<2> for BitLinear {
    type Saved = Saved;

    fn forward(&self, [x, weight]: [Buffer; 2], track: bool) -> (Vec<f32>, Option<Saved>) {
        let (k, rows) = (kernels(), self.rows);
        let q = quantize_tokens(x.data(), self.cols);
        let (bytes, weight_scale) = pack_weights(weight.data(), self.cols);
        let w = TernaryRows { layout: LAYOUT, cols: self.cols, weight_scale, bytes: &bytes };
        let mut out = vec![0.0f32; self.tokens * rows];
        out.par_chunks_mut(ROWS * rows).enumerate().for_each(|(i, out)| {
            let tokens = out.len() / rows;
            let x = q.view().tokens(i * ROWS, i * ROWS + tokens);
            k.ternary_matmul(w, x, MatMut::new(out, tokens, rows));
        });
        (out, track.then_some(Saved { x: q, weight: bytes, weight_scale }))
    }

    fn backward(
        &self,
        saved: &Saved,
        grad: &[f32],
        [want_x, want_weight]: [bool; 2],
    ) -> [Option<Vec<f32>>; 2] {
        let (tokens, rows, cols) = (self.tokens, self.rows, self.cols);
        let grad = MatRef::new(grad, tokens, rows, rows);
        let dx = want_x.then(|| {
            let w = dequantize_weights(saved, rows, cols);
            matmul(grad, MatRef::new(&w, rows, cols, cols))
        });
        let dweight = want_weight.then(|| {
            let x = dequantize_tokens(&saved.x, cols);
            matmul(grad.t(), MatRef::new(&x, tokens, cols, cols))
        });
        [dx, dweight]
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::TensorData;

    use super::*;
    use crate::ops::cpu::testing::{check_gradients, random, to_vec};

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
                    let out = to_vec(run(tensor(&x), tensor(&w)));
                    let got: Vec<u32> = out.iter().map(|v| v.to_bits()).collect();
                    assert_eq!(got, want, "[{tokens}, {rows}, {cols}] on {device:?}");
                }
            }
        }
    }

    #[test]
    fn gradients_agree_between_the_versions() {
        check_gradients(
            [random([70, 96], 2.0, 1), random([33, 96], 0.05, 2)],
            |[x, w]| bit_linear(x, w),
            |[x, w]| plain(x, w),
            // Sums of 33 and 70 products in another order, and one more rounding of
            // scale and reciprocal in the plain version.
            2e-6,
        );
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
            let grads = (run(x.clone(), w.clone()) * dy).sum().backward();
            let dx = to_vec(x.grad(&grads).unwrap());
            let dw = to_vec(w.grad(&grads).unwrap());
            // f32 sums of at most 9 products of order one.
            for (got, want) in dx.iter().zip(&want_dx).chain(dw.iter().zip(&want_dw)) {
                assert!((f64::from(*got) - want).abs() < 2e-5, "{got} and {want}");
            }
        }
    }
}

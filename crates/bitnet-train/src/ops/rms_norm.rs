//! RMSNorm (arXiv:1910.07467): `y = (x · inv_rms) · weight`.

use burn::tensor::Tensor;
use rayon::prelude::*;

use super::cpu::{Buffer, CpuOp, apply, is_cpu, kernels, sum_in_order};
use super::products::ROWS;

/// Normalises every row.
///
/// # Shapes
/// `x` and the result are `[tokens, D]`, `weight` is `[D]`.
pub fn rms_norm(x: Tensor<2>, weight: Tensor<1>, eps: f32) -> Tensor<2> {
    let device = x.device();
    if !is_cpu(&device) {
        #[cfg(any(feature = "wgpu", feature = "cuda"))]
        if super::gpu::is_gpu(&device) {
            return super::gpu::rms_norm(x, weight, eps);
        }
        return plain(x, weight, eps);
    }
    let shape = x.dims();
    let op = RmsNorm { cols: shape[1], eps };
    apply(op, [x.into_dispatch(), weight.into_dispatch()], device.is_autodiff(), shape)
}

/// The same with tensor operations.
pub fn plain(x: Tensor<2>, weight: Tensor<1>, eps: f32) -> Tensor<2> {
    let mean = x.clone().square().mean_dim(1);
    let inv = (mean + eps).sqrt().recip();
    x * inv * weight.unsqueeze()
}

#[derive(Debug, Clone)]
struct RmsNorm {
    cols: usize,
    eps: f32,
}

struct Saved {
    x: Buffer,
    weight: Buffer,
    inv_rms: Vec<f32>,
}

impl CpuOp<2> for RmsNorm {
    type Saved = Saved;

    fn forward(&self, [x, weight]: [Buffer; 2], track: bool) -> (Vec<f32>, Option<Saved>) {
        let (k, cols) = (kernels(), self.cols);
        let mut out = vec![0.0f32; x.data().len()];
        let mut inv_rms = vec![0.0f32; x.data().len() / cols];
        out.par_chunks_mut(ROWS * cols)
            .zip(inv_rms.par_chunks_mut(ROWS))
            .zip(x.data().par_chunks(ROWS * cols))
            .for_each(|((out, inv), x)| {
                let rows = out.chunks_exact_mut(cols).zip(x.chunks_exact(cols)).zip(inv);
                for ((out, x), inv) in rows {
                    *inv = k.rms_norm(x, weight.data(), self.eps, out);
                }
            });
        (out, track.then_some(Saved { x, weight, inv_rms }))
    }

    fn backward(
        &self,
        saved: &Saved,
        grad: &[f32],
        [want_x, want_weight]: [bool; 2],
    ) -> [Option<Vec<f32>>; 2] {
        let cols = self.cols;
        let weight = saved.weight.data();
        let mut dx = vec![0.0f32; grad.len()];
        let partials: Vec<Vec<f32>> = dx
            .par_chunks_mut(ROWS * cols)
            .zip(grad.par_chunks(ROWS * cols))
            .zip(saved.x.data().par_chunks(ROWS * cols))
            .zip(saved.inv_rms.par_chunks(ROWS))
            .map(|(((dx, grad), x), inv)| {
                let mut dweight = vec![0.0f32; cols];
                let rows = dx
                    .chunks_exact_mut(cols)
                    .zip(grad.chunks_exact(cols))
                    .zip(x.chunks_exact(cols))
                    .zip(inv);
                for (((dx, g), x), &inv) in rows {
                    kernels().rms_norm_backward(x, weight, inv, g, dx, &mut dweight);
                }
                dweight
            })
            .collect();
        [want_x.then_some(dx), want_weight.then(|| sum_in_order(partials))]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cpu::testing::{check_gradients, random};

    #[test]
    fn equals_the_plain_version_in_value_and_gradient() {
        // Reductions in another order: a few ULP of values of order one.
        check_gradients(
            [random([70, 48], 1.5, 1), random([1, 48], 1.0, 2)],
            |[x, w]| rms_norm(x, w.reshape([48]), 1e-5),
            |[x, w]| plain(x, w.reshape([48]), 1e-5),
            1e-5,
        );
    }
}

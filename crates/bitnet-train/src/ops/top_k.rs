//! Top-K sparsification before `o_proj` and `down_proj` (BitNet a4.8,
//! arXiv:2411.04965), with the straight-through gradient of Q-Sparse
//! (arXiv:2407.10969): the mask is left out of the backward pass.

use bitnet_core::top_k;
use burn::tensor::Tensor;
use rayon::prelude::*;

use super::cpu::{Buffer, CpuOp, apply, is_cpu};
use super::products::ROWS;
use super::scratch;

/// Keeps a share of every row of `[tokens, K]`, see [`top_k::top_k`]. What is left out
/// becomes `x - blend · x`: 0 where `blend` is 1.
pub(super) fn sparsify(x: Tensor<2>, share: f64, blend: f32) -> Tensor<2> {
    let device = x.device();
    if !is_cpu(&device) {
        return plain(x, share, blend);
    }
    let shape = x.dims();
    let op = TopK { cols: shape[1], keep: top_k::kept(share, shape[1]), blend };
    apply(op, [x.into_dispatch()], device.is_autodiff(), shape)
}

/// The same with tensor operations. (burn 0.22 sorts on the host.)
pub(super) fn plain(x: Tensor<2>, share: f64, blend: f32) -> Tensor<2> {
    let [_, cols] = x.dims();
    let keep = top_k::kept(share, cols);
    let exact = x.clone().detach();
    let magnitude = exact.clone().abs();
    let least = magnitude.clone().sort_descending(1).narrow(1, keep - 1, 1);
    let above = magnitude.clone().greater(least.clone()).float();
    let level = magnitude.equal(least).float();
    let room = above.clone().sum_dim(1).neg().add_scalar(keep as f32);
    let first = level.clone().cumsum(1).lower_equal(room).float() * level;
    let step = exact.clone() * (above + first) - exact;
    x + step.mul_scalar(blend).detach()
}

#[derive(Debug, Clone)]
struct TopK {
    cols: usize,
    keep: usize,
    blend: f32,
}

impl CpuOp<1> for TopK {
    type Saved = ();

    fn forward(&self, [x]: [Buffer; 1], track: bool) -> (Vec<f32>, Option<()>) {
        let mut out = scratch::copy(x.data());
        let len = ROWS * self.cols;
        out.par_chunks_mut(len).zip(x.data().par_chunks(len)).for_each(|(out, x)| {
            let mut space = Vec::with_capacity(self.cols);
            for (out, x) in out.chunks_exact_mut(self.cols).zip(x.chunks_exact(self.cols)) {
                top_k::top_k(out, self.keep, &mut space);
                if self.blend < 1.0 {
                    out.iter_mut().zip(x).for_each(|(out, &x)| *out = x + self.blend * (*out - x));
                }
            }
        });
        (out, track.then_some(()))
    }

    fn backward(&self, (): &(), grad: &[f32], [want]: [bool; 1]) -> [Option<Vec<f32>>; 1] {
        [want.then(|| scratch::copy(grad))]
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;
    use crate::ops::cpu::testing::{check_gradients, random, to_vec};

    /// Rows with ties: few different values.
    fn coarse(tokens: usize, cols: usize) -> TensorData {
        let values = (0..tokens * cols).map(|i| ((i * 29 + i / 7) % 11) as f32 - 5.0);
        TensorData::new(values.collect::<Vec<f32>>(), [tokens, cols])
    }

    #[test]
    fn both_versions_are_the_definition() {
        for (tokens, cols, share) in [(70, 48, 0.5), (3, 7, 0.3), (5, 100, 0.05), (2, 5, 1.0)] {
            for data in [coarse(tokens, cols), random([tokens, cols], 2.0, 3)] {
                let mut want = data.try_to_vec::<f32>().unwrap();
                let keep = top_k::kept(share, cols);
                let mut space = Vec::new();
                want.chunks_exact_mut(cols).for_each(|row| top_k::top_k(row, keep, &mut space));
                for run in [sparsify, plain] {
                    let x = Tensor::<2>::from_data(data.clone(), &Device::flex());
                    assert_eq!(to_vec(run(x, share, 1.0)), want, "{share} of [{tokens}, {cols}]");
                }
            }
        }
    }

    #[test]
    fn the_gradient_goes_straight_through_whatever_the_blend() {
        for blend in [1.0, 0.25] {
            // The same values; the gradient is the one that arrives, in every element.
            check_gradients(
                [random([70, 48], 2.0, 1)],
                |[x]| sparsify(x, 0.5, blend),
                |[x]| plain(x, 0.5, blend),
                1e-6,
            );
            let device = Device::flex().autodiff();
            for run in [sparsify, plain] {
                let x = Tensor::<2>::from_data(coarse(3, 8), &device).require_grad();
                let upstream = random([3, 8], 1.0, 5);
                let given = Tensor::<2>::from_data(upstream.clone(), &device);
                let gradients = (run(x.clone(), 0.25, blend) * given).sum().backward();
                let got = to_vec(x.grad(&gradients).unwrap());
                assert_eq!(got, upstream.try_to_vec::<f32>().unwrap());
            }
        }
    }
}

//! The Hadamard rotation of BitNet v2 (arXiv:2504.18415), before `o_proj` and
//! `down_proj`: it spreads outliers over a block, so that 4 bits suffice.

use bitnet_core::quantizer::{hadamard, hadamard_block};
use burn::tensor::Tensor;
use rayon::prelude::*;

use super::cpu::{Buffer, CpuOp, apply, is_cpu};
use super::linear::hadamard_matrix;
use super::products::ROWS;

/// Rotates every row of `[tokens, K]` in blocks of the largest power of two that
/// divides K.
pub(super) fn rotate(x: Tensor<2>) -> Tensor<2> {
    let device = x.device();
    if !is_cpu(&device) {
        return plain(x);
    }
    let shape = x.dims();
    apply(Rotation { cols: shape[1] }, [x.into_dispatch()], device.is_autodiff(), shape)
}

/// The same with tensor operations.
pub(super) fn plain(x: Tensor<2>) -> Tensor<2> {
    let [tokens, cols] = x.dims();
    let block = hadamard_block(cols);
    let matrix = hadamard_matrix(cols, &x.device());
    x.reshape([tokens * cols / block, block]).matmul(matrix).reshape([tokens, cols])
}

#[derive(Debug, Clone)]
struct Rotation {
    cols: usize,
}

impl Rotation {
    fn run(&self, x: &[f32]) -> Vec<f32> {
        let mut out = x.to_vec();
        out.par_chunks_mut(ROWS * self.cols)
            .for_each(|rows| rows.chunks_exact_mut(self.cols).for_each(hadamard));
        out
    }
}

impl CpuOp<1> for Rotation {
    type Saved = ();

    fn forward(&self, [x]: [Buffer; 1], track: bool) -> (Vec<f32>, Option<()>) {
        (self.run(x.data()), track.then_some(()))
    }

    /// The matrix is symmetric.
    fn backward(&self, (): &(), grad: &[f32], [want]: [bool; 1]) -> [Option<Vec<f32>>; 1] {
        [want.then(|| self.run(grad))]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cpu::testing::{check_gradients, random};

    #[test]
    fn equals_the_plain_version_in_value_and_gradient() {
        for cols in [16, 48, 7] {
            // Sums of at most 16 terms in another order.
            check_gradients([random([70, cols], 2.0, 1)], |[x]| rotate(x), |[x]| plain(x), 1e-6);
        }
    }
}

//! The gated activation of the feed-forward network: `act(gate) · up`.

use bitnet_core::Activation;
use burn::tensor::{Tensor, activation};
use rayon::prelude::*;

use super::cpu::{Buffer, CpuOp, apply, is_cpu, kernels};
use super::scratch;

/// Elements that one task takes.
const CHUNK: usize = 16 * 1024;

/// `relu(gate)² · up` or `silu(gate) · up`, elementwise.
///
/// # Shapes
/// All `[tokens, F]`.
pub fn gated(act: Activation, gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
    let device = gate.device();
    if !is_cpu(&device) {
        #[cfg(any(feature = "wgpu", feature = "cuda"))]
        if super::gpu::is_gpu(&device) {
            return super::gpu::gated(act, gate, up);
        }
        return plain(act, gate, up);
    }
    let shape = gate.dims();
    let inputs = [gate.into_dispatch(), up.into_dispatch()];
    apply(Gated(act), inputs, device.is_autodiff(), shape)
}

/// The same with tensor operations.
pub fn plain(act: Activation, gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
    match act {
        Activation::Relu2 => activation::relu(gate).square() * up,
        Activation::Silu => activation::silu(gate) * up,
    }
}

#[derive(Debug, Clone)]
struct Gated(Activation);

impl CpuOp<2> for Gated {
    type Saved = [Buffer; 2];

    fn forward(&self, [gate, up]: [Buffer; 2], track: bool) -> (Vec<f32>, Option<[Buffer; 2]>) {
        let k = kernels();
        let mut out = vec![0.0f32; gate.data().len()];
        out.par_chunks_mut(CHUNK)
            .zip(gate.data().par_chunks(CHUNK).zip(up.data().par_chunks(CHUNK)))
            .for_each(|(out, (gate, up))| match self.0 {
                Activation::Relu2 => k.relu2_mul(gate, up, out),
                Activation::Silu => k.silu_mul(gate, up, out),
            });
        (out, track.then_some([gate, up]))
    }

    fn backward(
        &self,
        [gate, up]: &[Buffer; 2],
        grad: &[f32],
        wanted: [bool; 2],
    ) -> [Option<Vec<f32>>; 2] {
        let k = kernels();
        let (mut dgate, mut dup) = (scratch::copy(gate.data()), scratch::copy(up.data()));
        dgate
            .par_chunks_mut(CHUNK)
            .zip(dup.par_chunks_mut(CHUNK))
            .zip(grad.par_chunks(CHUNK))
            .for_each(|((gate, up), grad)| match self.0 {
                Activation::Relu2 => k.relu2_mul_backward(gate, up, grad),
                Activation::Silu => k.silu_mul_backward(gate, up, grad),
            });
        [wanted[0].then_some(dgate), wanted[1].then_some(dup)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cpu::testing::{check_gradients, random};

    #[test]
    fn equals_the_plain_version_in_value_and_gradient() {
        for act in [Activation::Relu2, Activation::Silu] {
            check_gradients(
                [random([37, 90], 4.0, 1), random([37, 90], 2.0, 2)],
                |[g, u]| gated(act, g, u),
                |[g, u]| plain(act, g, u),
                // Our exponential is within 2 ULP.
                1e-6,
            );
        }
    }
}

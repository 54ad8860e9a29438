//! The token embedding, in the precision in which it will be stored.

use bitnet_core::Dtype;
use burn::tensor::{DType, Int, Tensor};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use super::cpu::{Buffer, CpuOp, apply, is_cpu};
use super::scratch::Scratch;

/// Elements that one task takes.
const CHUNK: usize = 16 * 1024;

/// Rounds to the precision that the packed model stores, with the identity as
/// gradient: the forward pass sees exactly what the engine will read.
///
/// # Shapes
/// `weight` and the result are `[V, D]`.
pub fn round_to(weight: Tensor<2>, dtype: Dtype) -> Tensor<2> {
    let device = weight.device();
    if dtype == Dtype::F32 {
        return weight;
    }
    if !is_cpu(&device) {
        let stored = if dtype == Dtype::F16 { DType::F16 } else { DType::BF16 };
        let rounded = weight.clone().detach().cast(stored).cast(DType::F32);
        return rounded + (weight.clone() - weight.detach());
    }
    let shape = weight.dims();
    apply(Round(dtype), [weight.into_dispatch()], device.is_autodiff(), shape)
}

#[derive(Debug, Clone)]
struct Round(Dtype);

impl CpuOp<1> for Round {
    type Saved = ();

    const PASSES: bool = true;

    fn forward(&self, [weight]: [Buffer; 1], track: bool) -> (Vec<f32>, Option<()>) {
        let mut out = Scratch::any(weight.data().len());
        out.par_chunks_mut(CHUNK).zip(weight.data().par_chunks(CHUNK)).for_each(|(out, x)| {
            round_slice(self.0, x, out);
        });
        (out.into_vec(), track.then_some(()))
    }

    fn backward(&self, (): &(), grad: &[f32], _wanted: [bool; 1]) -> [Option<Vec<f32>>; 1] {
        [Some(grad.to_vec())]
    }
}

/// Rounds to `dtype` and back, in pieces that vector instructions convert.
fn round_slice(dtype: Dtype, x: &[f32], out: &mut [f32]) {
    const PIECE: usize = 1024;
    for (x, out) in x.chunks(PIECE).zip(out.chunks_mut(PIECE)) {
        match dtype {
            Dtype::F32 => out.copy_from_slice(x),
            Dtype::F16 => {
                let halves = &mut [f16::ZERO; PIECE][..x.len()];
                halves.convert_from_f32_slice(x);
                halves.convert_to_f32_slice(out);
            }
            Dtype::Bf16 => {
                let halves = &mut [bf16::ZERO; PIECE][..x.len()];
                halves.convert_from_f32_slice(x);
                halves.convert_to_f32_slice(out);
            }
        }
    }
}

/// Looks tokens up.
///
/// # Shapes
/// `weight` is `[V, D]`, `tokens` is `[B, T]`, the result `[B · T, D]`.
pub fn embed(weight: Tensor<2>, tokens: Tensor<2, Int>) -> Tensor<2> {
    let device = weight.device();
    let [batch, time] = tokens.dims();
    if !is_cpu(&device) {
        return weight.select(0, tokens.reshape([batch * time]));
    }
    let [_, cols] = weight.dims();
    let op = Embed { tokens: host_tokens(tokens), cols };
    apply(op, [weight.into_dispatch()], device.is_autodiff(), [batch * time, cols])
}

/// Token ids on the host.
pub(crate) fn host_tokens<const D: usize>(tokens: Tensor<D, Int>) -> Vec<usize> {
    tokens.into_data().iter::<i64>().map(|t| usize::try_from(t).unwrap_or(usize::MAX)).collect()
}

#[derive(Debug, Clone)]
struct Embed {
    tokens: Vec<usize>,
    cols: usize,
}

impl CpuOp<1> for Embed {
    /// Elements of the embedding.
    type Saved = usize;

    fn forward(&self, [weight]: [Buffer; 1], track: bool) -> (Vec<f32>, Option<usize>) {
        let mut out = Scratch::any(self.tokens.len() * self.cols);
        for (out, &token) in out.chunks_exact_mut(self.cols).zip(&self.tokens) {
            out.copy_from_slice(&weight.data()[token * self.cols..(token + 1) * self.cols]);
        }
        (out.into_vec(), track.then_some(weight.data().len()))
    }

    fn backward(&self, &len: &usize, grad: &[f32], _wanted: [bool; 1]) -> [Option<Vec<f32>>; 1] {
        let mut dweight = Scratch::any(len);
        dweight.par_chunks_mut(CHUNK).for_each(|part| part.fill(0.0));
        for (grad, &token) in grad.chunks_exact(self.cols).zip(&self.tokens) {
            let row = &mut dweight[token * self.cols..(token + 1) * self.cols];
            row.iter_mut().zip(grad).for_each(|(d, g)| *d += g);
        }
        [Some(dweight.into_vec())]
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::ops::cpu::testing::{check_gradients, random, to_vec};

    #[test]
    fn looks_up_and_scatters_back() {
        let tokens = [[3, 0, 3, 5], [1, 3, 2, 0]];
        check_gradients(
            [random([6, 10], 1.0, 1)],
            |[w]| {
                let tokens = Tensor::<2, Int>::from_data(tokens, &w.device());
                embed(w, tokens)
            },
            |[w]| {
                let tokens = Tensor::<2, Int>::from_data(tokens, &w.device());
                w.select(0, tokens.reshape([8]))
            },
            1e-6,
        );
    }

    #[test]
    fn rounds_with_the_identity_as_gradient() {
        let data = random([5, 7], 1.0, 3);
        let device = Device::flex().autodiff();
        let w = Tensor::<2>::from_data(data.clone(), &device).require_grad();
        let out = round_to(w.clone(), Dtype::F16);
        let grads = out.clone().sum().backward();
        assert!(to_vec(w.grad(&grads).unwrap()).iter().all(|&g| g == 1.0));
        for (got, x) in to_vec(out).iter().zip(data.iter::<f32>()) {
            assert_eq!(*got, f16::from_f32(x).to_f32());
        }
    }
}

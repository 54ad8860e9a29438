//! AdamW with decoupled weight decay (arXiv:1711.05101): one fused pass over a
//! parameter on the CPU, the same arithmetic in tensor operations elsewhere.

use burn::tensor::Tensor;
use rayon::prelude::*;

use super::{CHUNK, OptimizerConfig, slice, slice_mut, take};
use crate::schedule::Rates;

/// The running means of a parameter's gradient and of its square.
#[derive(Debug)]
pub(super) struct Moments {
    pub(super) first: Tensor<1>,
    pub(super) second: Tensor<1>,
}

/// The constants of one step of a parameter: p ← keep · p - rate · m / (√v · root + eps).
#[derive(Debug, Clone, Copy)]
pub(super) struct Update {
    beta1: f32,
    beta2: f32,
    eps: f32,
    /// Takes the sum of gradients to their clipped mean.
    scale: f32,
    /// `1 - lr · weight_decay`.
    keep: f32,
    /// `lr` over the first moment's bias.
    rate: f32,
    /// One over the root of the second moment's bias.
    root: f32,
}

impl Update {
    /// The constants of step `step` (from 1) for gradients that are to be multiplied
    /// by `scale`.
    pub(super) fn new(config: &OptimizerConfig, rates: Rates, step: u64, scale: f64) -> Self {
        // A power of 2^31 steps is 0 for any beta below 1.
        let power = i32::try_from(step).unwrap_or(i32::MAX);
        Self {
            beta1: config.beta1 as f32,
            beta2: config.beta2 as f32,
            eps: config.eps as f32,
            scale: scale as f32,
            keep: (1.0 - rates.lr * rates.weight_decay) as f32,
            rate: (rates.lr / (1.0 - config.beta1.powi(power))) as f32,
            root: (1.0 / (1.0 - config.beta2.powi(power)).sqrt()) as f32,
        }
    }

    /// `host`: the tensors lie in host memory.
    pub(super) fn apply(
        &self,
        host: bool,
        p: Tensor<1>,
        g: Tensor<1>,
        moments: &mut Moments,
    ) -> Tensor<1> {
        if host { self.apply_host(p, g, moments) } else { self.apply_tensors(p, g, moments) }
    }

    /// The definition: one element.
    #[inline]
    fn element(&self, p: &mut f32, g: f32, m: &mut f32, v: &mut f32) {
        let g = g * self.scale;
        *m = *m * self.beta1 + g * (1.0 - self.beta1);
        *v = *v * self.beta2 + g * g * (1.0 - self.beta2);
        *p = *p * self.keep - self.rate * *m / (v.sqrt() * self.root + self.eps);
    }

    /// In place, where the tensors own their memory.
    fn apply_host(&self, p: Tensor<1>, g: Tensor<1>, moments: &mut Moments) -> Tensor<1> {
        let device = moments.first.device();
        let mut p = p.into_data();
        let g = g.into_data();
        let mut m = take(&mut moments.first, &device);
        let mut v = take(&mut moments.second, &device);
        let parts = slice_mut(&mut p).par_chunks_mut(CHUNK).zip(slice(&g).par_chunks(CHUNK));
        let state = slice_mut(&mut m).par_chunks_mut(CHUNK);
        let state = state.zip(slice_mut(&mut v).par_chunks_mut(CHUNK));
        parts.zip(state).for_each(|((p, g), (m, v))| {
            for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
                self.element(p, *g, m, v);
            }
        });
        moments.first = Tensor::from_data(m, &device);
        moments.second = Tensor::from_data(v, &device);
        Tensor::from_data(p, &device)
    }

    /// The same in tensor operations, on the device.
    fn apply_tensors(&self, p: Tensor<1>, g: Tensor<1>, moments: &mut Moments) -> Tensor<1> {
        let g = g.mul_scalar(self.scale);
        let m = moments.first.clone().mul_scalar(self.beta1);
        let m = m.add(g.clone().mul_scalar(1.0 - self.beta1));
        let v = moments.second.clone().mul_scalar(self.beta2);
        let v = v.add(g.square().mul_scalar(1.0 - self.beta2));
        let root = v.clone().sqrt().mul_scalar(self.root).add_scalar(self.eps);
        let delta = m.clone().mul_scalar(self.rate).div(root);
        (moments.first, moments.second) = (m, v);
        p.mul_scalar(self.keep).sub(delta)
    }
}

//! AdamW with decoupled weight decay (arXiv:1711.05101): one fused pass over all
//! parameters on the CPU, the same arithmetic in tensor operations elsewhere.

use bitnet_kernels::AdamW;
use burn::tensor::{Device, Shape, Tensor, TensorData};
use rayon::prelude::*;

use super::{CHUNK, OptimizerConfig, slice, slice_mut, take};
use crate::ops::cpu::kernels;
use crate::ops::scratch;
use crate::schedule::Rates;

/// The running means of a parameter's gradient and of its square.
#[derive(Debug)]
pub(super) struct Moments {
    pub(super) first: Tensor<1>,
    pub(super) second: Tensor<1>,
}

/// The constants of one step of a parameter.
#[derive(Debug, Clone, Copy)]
pub(super) struct Update(AdamW);

impl Update {
    /// The constants of step `step` (from 1) for gradients that are to be multiplied
    /// by `scale`.
    pub(super) fn new(config: &OptimizerConfig, rates: Rates, step: u64, scale: f64) -> Self {
        // A power of 2^31 steps is 0 for any beta below 1.
        let power = i32::try_from(step).unwrap_or(i32::MAX);
        Self(AdamW {
            beta1: config.beta1 as f32,
            beta2: config.beta2 as f32,
            eps: config.eps as f32,
            scale: scale as f32,
            keep: (1.0 - rates.lr * rates.weight_decay) as f32,
            rate: (rates.lr / (1.0 - config.beta1.powi(power))) as f32,
            root: (1.0 / (1.0 - config.beta2.powi(power)).sqrt()) as f32,
        })
    }

    /// What the step needs, as data of the host; the moments come back with
    /// [`Taken::finish`].
    pub(super) fn take(
        self,
        p: Tensor<1>,
        g: Tensor<1>,
        moments: &mut Moments,
        shape: Shape,
    ) -> Taken {
        let device = moments.first.device();
        Taken {
            step: self.0,
            p: p.into_data(),
            g: g.into_data(),
            first: take(&mut moments.first, &device),
            second: take(&mut moments.second, &device),
            shape,
        }
    }

    /// The step in tensor operations, on the device.
    pub(super) fn apply_tensors(
        &self,
        p: Tensor<1>,
        g: Tensor<1>,
        moments: &mut Moments,
    ) -> Tensor<1> {
        let Self(step) = self;
        #[cfg(any(feature = "wgpu", feature = "cuda"))]
        if crate::ops::gpu::is_gpu(&p.device()) {
            let old = [moments.first.clone(), moments.second.clone()];
            let [p, first, second] = crate::ops::gpu::adamw_step(step, p, g, old);
            (moments.first, moments.second) = (first, second);
            return p;
        }
        let g = g.mul_scalar(step.scale);
        let m = moments.first.clone().mul_scalar(step.beta1);
        let m = m.add(g.clone().mul_scalar(1.0 - step.beta1));
        let v = moments.second.clone().mul_scalar(step.beta2);
        let v = v.add(g.square().mul_scalar(1.0 - step.beta2));
        let root = v.clone().sqrt().mul_scalar(step.root).add_scalar(step.eps);
        let delta = m.clone().mul_scalar(step.rate).div(root);
        (moments.first, moments.second) = (m, v);
        p.mul_scalar(step.keep).sub(delta)
    }
}

/// A parameter, its gradient and its moments on the host.
pub(super) struct Taken {
    step: AdamW,
    p: TensorData,
    g: TensorData,
    first: TensorData,
    second: TensorData,
    shape: Shape,
}

impl Taken {
    /// The parameter; its moments go back to their place.
    pub(super) fn finish<const D: usize>(
        self,
        moments: &mut Moments,
        device: &Device,
    ) -> Tensor<D> {
        moments.first = Tensor::from_data(self.first, device);
        moments.second = Tensor::from_data(self.second, device);
        if let Ok(gradient) = self.g.try_into_vec::<f32>() {
            scratch::give(gradient);
        }
        let flat: Tensor<1> = Tensor::from_data(self.p, device);
        flat.reshape(self.shape)
    }
}

/// The step of all of them, in place, in one parallel loop.
pub(super) fn step_all<'t>(all: impl Iterator<Item = &'t mut Taken>) {
    let mut tasks = Vec::new();
    for taken in all {
        let p = slice_mut(&mut taken.p).chunks_mut(CHUNK);
        let g = slice(&taken.g).chunks(CHUNK);
        let m = slice_mut(&mut taken.first).chunks_mut(CHUNK);
        let v = slice_mut(&mut taken.second).chunks_mut(CHUNK);
        let step = taken.step;
        tasks.extend(p.zip(g).zip(m.zip(v)).map(|((p, g), (m, v))| (step, p, g, m, v)));
    }
    tasks.into_par_iter().for_each(|(step, p, g, m, v)| kernels().adamw(&step, p, g, m, v));
}

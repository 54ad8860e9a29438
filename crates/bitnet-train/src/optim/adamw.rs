//! AdamW with decoupled weight decay (arXiv:1711.05101): one fused pass over all
//! parameters on the CPU, the same arithmetic in tensor operations elsewhere.

use std::mem;

use bitnet_kernels::{AdamW, MOMENT_BLOCK, MomentsMut};
use burn::tensor::{Device, Shape, Tensor, TensorData};
use rayon::prelude::*;

use super::{CHUNK, OptimizerConfig, SlotState, slice, slice_mut, take};
use crate::ops::cpu::kernels;
use crate::ops::scratch;
use crate::schedule::Rates;

/// The running means of a parameter's gradient and of its square.
#[derive(Debug)]
pub(super) struct Moments {
    pub(super) first: Tensor<1>,
    pub(super) second: Tensor<1>,
}

/// The same as bytes, in host memory.
#[derive(Debug, Default)]
pub(super) struct ByteMoments {
    pub(super) first: Vec<u8>,
    /// Of the roots of the second moments.
    pub(super) second: Vec<u8>,
    /// Two for every [`MOMENT_BLOCK`] elements.
    pub(super) scales: Vec<[f32; 2]>,
}

impl ByteMoments {
    /// The moments of `len` elements, zero.
    pub(super) fn zeros(len: usize) -> Self {
        let scales = vec![[0.0; 2]; len.div_ceil(MOMENT_BLOCK)];
        Self { first: vec![128; len], second: vec![0; len], scales }
    }
}

/// The seed of the roundings of parameter `slot` in step `step`.
fn seed(step: u64, slot: usize) -> u32 {
    // Steele, Lea and Flood 2014: one output of SplitMix64.
    let mut x = step.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(slot as u64);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (x >> 32) as u32
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
        let first = take(&mut moments.first, &device);
        let second = take(&mut moments.second, &device);
        let moments = TakenMoments::Floats { first, second };
        Taken { step: self.0, p: p.into_data(), g: g.into_data(), moments, shape }
    }

    /// The same for moments that are kept as bytes, of parameter `slot` in step `step`.
    pub(super) fn take_bytes(
        self,
        p: Tensor<1>,
        g: Tensor<1>,
        moments: &mut ByteMoments,
        shape: Shape,
        (step, slot): (u64, usize),
    ) -> Taken {
        let moments = TakenMoments::Bytes { seed: seed(step, slot), moments: mem::take(moments) };
        Taken { step: self.0, p: p.into_data(), g: g.into_data(), moments, shape }
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
    moments: TakenMoments,
    shape: Shape,
}

enum TakenMoments {
    Floats { first: TensorData, second: TensorData },
    Bytes { seed: u32, moments: ByteMoments },
}

impl Taken {
    /// The parameter; its moments go back to their place.
    pub(super) fn finish<const D: usize>(
        self,
        state: &mut SlotState,
        device: &Device,
    ) -> Tensor<D> {
        match (self.moments, state) {
            (TakenMoments::Floats { first, second }, SlotState::Adamw(moments)) => {
                moments.first = Tensor::from_data(first, device);
                moments.second = Tensor::from_data(second, device);
            }
            (TakenMoments::Bytes { moments, .. }, SlotState::AdamwBytes(place)) => {
                **place = moments
            }
            _ => unreachable!("moments go back to where they were taken from"),
        }
        if let Ok(gradient) = self.g.try_into_vec::<f32>() {
            scratch::give(gradient);
        }
        let flat: Tensor<1> = Tensor::from_data(self.p, device);
        flat.reshape(self.shape)
    }
}

/// One task of the step: a part of a parameter, of its gradient and of its moments.
struct Part<'a> {
    step: AdamW,
    p: &'a mut [f32],
    g: &'a [f32],
    moments: PartMoments<'a>,
}

enum PartMoments<'a> {
    Floats(&'a mut [f32], &'a mut [f32]),
    Bytes { seed: u32, index: usize, moments: MomentsMut<'a> },
}

/// The step of all of them, in place, in one parallel loop.
pub(super) fn step_all<'t>(all: impl Iterator<Item = &'t mut Taken>) {
    let mut tasks = Vec::new();
    for taken in all {
        let step = taken.step;
        let parts = slice_mut(&mut taken.p).chunks_mut(CHUNK).zip(slice(&taken.g).chunks(CHUNK));
        match &mut taken.moments {
            TakenMoments::Floats { first, second } => {
                let m = slice_mut(first).chunks_mut(CHUNK).zip(slice_mut(second).chunks_mut(CHUNK));
                tasks.extend(parts.zip(m).map(|((p, g), (m, v))| {
                    let moments = PartMoments::Floats(m, v);
                    Part { step, p, g, moments }
                }));
            }
            TakenMoments::Bytes { seed, moments } => {
                let seed = *seed;
                let ByteMoments { first, second, scales } = moments;
                let bytes = first.chunks_mut(CHUNK).zip(second.chunks_mut(CHUNK));
                let all = parts.zip(bytes.zip(scales.chunks_mut(CHUNK / MOMENT_BLOCK)));
                tasks.extend(all.enumerate().map(|(i, ((p, g), ((first, second), scales)))| {
                    let moments = MomentsMut { first, second, scales };
                    let moments = PartMoments::Bytes { seed, index: i * CHUNK, moments };
                    Part { step, p, g, moments }
                }));
            }
        }
    }
    tasks.into_par_iter().for_each(|Part { step, p, g, moments }| match moments {
        PartMoments::Floats(m, v) => kernels().adamw(&step, p, g, m, v),
        PartMoments::Bytes { seed, index, moments } => {
            kernels().adamw_bytes(&step, (seed, index), p, g, moments);
        }
    });
}

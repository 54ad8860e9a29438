//! One step of AdamW for some elements.

use crate::isa::{Kernels, dispatch};

/// The constants of one step of AdamW with decoupled weight decay
/// (arXiv:1711.05101), the same for all elements of a parameter:
/// `g = scale · gradient`, `m = beta1 · m + (1 - beta1) · g`,
/// `v = beta2 · v + (1 - beta2) · g²`, `p = keep · p - rate · m / (√v · root + eps)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Decay of the mean of gradients.
    pub beta1: f32,
    /// Decay of the mean of their squares.
    pub beta2: f32,
    /// Keeps the quotient finite.
    pub eps: f32,
    /// Takes the sum of gradients to their clipped mean.
    pub scale: f32,
    /// `1 - lr · weight_decay`.
    pub keep: f32,
    /// `lr` over the first moment's bias.
    pub rate: f32,
    /// One over the root of the second moment's bias.
    pub root: f32,
}

impl AdamW {
    /// The definition: one element. Nothing is fused.
    #[inline(always)]
    fn element(&self, p: &mut f32, g: f32, m: &mut f32, v: &mut f32) {
        let g = g * self.scale;
        *m = *m * self.beta1 + g * (1.0 - self.beta1);
        *v = *v * self.beta2 + g * g * (1.0 - self.beta2);
        *p = *p * self.keep - self.rate * *m / (v.sqrt() * self.root + self.eps);
    }
}

impl Kernels {
    /// Takes a step: parameters `p` along gradients `g`, with the moments `m` and
    /// `v`. The same bits on every instruction set.
    ///
    /// # Panics
    /// If the slices are not of one length.
    pub fn adamw(self, step: &AdamW, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
        assert!([g.len(), m.len(), v.len()].iter().all(|&n| n == p.len()), "one length");
        dispatch!(self, _isa => {
            for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
                step.element(p, g, m, v);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_set_takes_the_defined_step() {
        let step = AdamW {
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            scale: 0.25,
            keep: 0.9997,
            rate: 4e-3,
            root: 3.1,
        };
        let values = |seed: u32| {
            let value = |i: u32| ((i * 2_654_435_761).wrapping_add(seed) >> 8) as f32 / 1e7 - 0.8;
            (0..77).map(value).collect::<Vec<f32>>()
        };
        let (p, g, m) = (values(1), values(2), values(3));
        let v: Vec<f32> = values(4).iter().map(|x| x * x).collect();
        let (mut p0, mut m0, mut v0) = (p.clone(), m.clone(), v.clone());
        for i in 0..p.len() {
            step.element(&mut p0[i], g[i], &mut m0[i], &mut v0[i]);
        }
        assert!(p0.iter().all(|x| x.is_finite()) && p0 != p);
        for kernels in Kernels::all() {
            let (mut p, mut m, mut v) = (p.clone(), m.clone(), v.clone());
            kernels.adamw(&step, &mut p, &g, &mut m, &mut v);
            assert_eq!((&p, &m, &v), (&p0, &m0, &v0), "{}", kernels.name());
        }
    }
}

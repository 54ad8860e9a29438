//! The backward passes of the float operations, for training.
//!
//! A gradient need not have the same bits as anything in the engine, but it is
//! the same on every instruction set, so that a run does not depend on the
//! machine.

use crate::float::{dot, exp};
use crate::isa::{Kernels, dispatch};
use crate::simd::Simd;

/// Gradient of `y = (x · inv) · weight` where `inv = 1 / sqrt(mean(x²) + eps)`:
/// `dx = inv · (g·w − x · inv² · mean(g·w·x))`, and `dweight += g · x · inv`.
#[inline(always)]
fn rms_norm_backward<S: Simd>(
    isa: S,
    x: &[f32],
    weight: &[f32],
    inv_rms: f32,
    grad: &[f32],
    dx: &mut [f32],
    dweight: &mut [f32],
) {
    for ((dx, &g), &w) in dx.iter_mut().zip(grad).zip(weight) {
        *dx = g * w;
    }
    let mean = dot(isa, dx, x) / x.len() as f32;
    let pull = inv_rms * inv_rms * mean;
    for ((dx, dw), (&x, &g)) in dx.iter_mut().zip(dweight).zip(x.iter().zip(grad)) {
        *dx = inv_rms * (*dx - x * pull);
        *dw += g * (x * inv_rms);
    }
}

/// Gradient of `y = silu(gate) · up`, in its inputs' place.
#[inline(always)]
fn silu_mul_backward(gate: &mut [f32], up: &mut [f32], grad: &[f32]) {
    for ((gate, up), &dy) in gate.iter_mut().zip(up).zip(grad) {
        let (g, u) = (*gate, *up);
        let sigmoid = 1.0 / (1.0 + exp(-g));
        *up = dy * (g * sigmoid);
        *gate = dy * u * (sigmoid * (1.0 + g * (1.0 - sigmoid)));
    }
}

/// Gradient of `y = relu(gate)² · up`, in its inputs' place.
#[inline(always)]
fn relu2_mul_backward(gate: &mut [f32], up: &mut [f32], grad: &[f32]) {
    for ((gate, up), &dy) in gate.iter_mut().zip(up).zip(grad) {
        let (r, u) = (gate.max(0.0), *up);
        *up = dy * (r * r);
        *gate = dy * u * (2.0 * r);
    }
}

/// Gradient of a softmax: `dp ← p · (dp − Σ p · dp) · scale`.
#[inline(always)]
fn softmax_backward<S: Simd>(isa: S, p: &[f32], dp: &mut [f32], scale: f32) {
    let mean = dot(isa, dp, p);
    for (d, &p) in dp.iter_mut().zip(p) {
        *d = p * (*d - mean) * scale;
    }
}

impl Kernels {
    /// The backward pass of a softmax of `scale` times some scores: `p` are the
    /// probabilities, `dp` their gradient, which becomes that of the scores.
    ///
    /// # Panics
    /// If the slices are not of one length.
    pub fn softmax_backward(self, p: &[f32], dp: &mut [f32], scale: f32) {
        assert_eq!(p.len(), dp.len(), "one length");
        dispatch!(self, isa => softmax_backward(isa, p, dp, scale));
    }

    /// `x *= factor`, elementwise.
    pub fn scale(self, x: &mut [f32], factor: f32) {
        dispatch!(self, _isa => x.iter_mut().for_each(|x| *x *= factor));
    }

    /// `out = x · factor`, elementwise.
    ///
    /// # Panics
    /// If the slices are not of one length.
    pub fn scaled(self, x: &[f32], factor: f32, out: &mut [f32]) {
        assert_eq!(x.len(), out.len(), "one length");
        dispatch!(self, _isa => out.iter_mut().zip(x).for_each(|(out, x)| *out = x * factor));
    }

    /// The backward pass of [`Kernels::rms_norm`] for one token.
    ///
    /// # Shapes
    /// All slices are `[D]`. `dx` is written, `dweight` is added to.
    pub fn rms_norm_backward(
        self,
        x: &[f32],
        weight: &[f32],
        inv_rms: f32,
        grad: &[f32],
        dx: &mut [f32],
        dweight: &mut [f32],
    ) {
        dispatch!(self, isa => rms_norm_backward(isa, x, weight, inv_rms, grad, dx, dweight));
    }

    /// The backward pass of [`Kernels::silu_mul`], elementwise: the gradients of gate and up
    /// take their place.
    pub fn silu_mul_backward(self, gate: &mut [f32], up: &mut [f32], grad: &[f32]) {
        dispatch!(self, _isa => silu_mul_backward(gate, up, grad));
    }

    /// The backward pass of [`Kernels::relu2_mul`], elementwise: the gradients of gate and up
    /// take their place.
    pub fn relu2_mul_backward(self, gate: &mut [f32], up: &mut [f32], grad: &[f32]) {
        dispatch!(self, _isa => relu2_mul_backward(gate, up, grad));
    }
}

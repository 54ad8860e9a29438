//! RMSNorm as part of a fused operation: followed by the quantisation of what it
//! gives, and its backward pass with the residual stream's gradient added.

use rayon::prelude::*;

use super::cpu::{kernels, sum_in_order};
use super::products::{Input, InputMut, ROWS};
use super::scratch::Scratch;
use crate::profile;

/// A norm, or none.
pub(super) struct Norm<'a> {
    /// Its weight; none: no norm.
    pub(super) weight: Option<&'a [f32]>,
    pub(super) eps: f32,
}

impl Norm<'_> {
    /// The normed `x` `[tokens, cols]` as the input of linear layers.
    pub(super) fn input(&self, x: &[f32], cols: usize, int8: bool) -> Input {
        let mut out = Input::any(x.len() / cols, cols, int8);
        out.chunks_mut(cols, ROWS)
            .into_par_iter()
            .zip(x.par_chunks(ROWS * cols))
            .for_each(|(mut out, x)| self.chunk(x, cols, &mut out));
        out
    }

    /// The same of some tokens. One thread.
    pub(super) fn chunk(&self, x: &[f32], cols: usize, out: &mut InputMut<'_>) {
        let k = kernels();
        out.fill(cols, |token, q, out| {
            let x = &x[token * cols..][..cols];
            match (self.weight, q) {
                (Some(weight), Some(q)) => k.rms_norm_quantize(x, weight, self.eps, out, q),
                (Some(weight), None) => {
                    k.rms_norm(x, weight, self.eps, out);
                    (0.0, 0)
                }
                (None, Some(q)) => k.quantize(x, q),
                (None, None) => {
                    out.copy_from_slice(x);
                    (0.0, 0)
                }
            }
        });
    }
}

/// The gradients of `x` and of the weight from that of the normed `x`.
pub(super) fn backward(
    x: &[f32],
    weight: &[f32],
    eps: f32,
    grad: &[f32],
) -> (Scratch<f32>, Vec<f32>) {
    let _span = profile::span("norm backward");
    let rows = ROWS * weight.len();
    let mut dx = Scratch::any(x.len());
    let partials: Vec<Vec<f32>> = dx
        .par_chunks_mut(rows)
        .zip(x.par_chunks(rows))
        .zip(grad.par_chunks(rows))
        .map(|((dx, x), grad)| backward_chunk(x, weight, eps, grad, None, dx))
        .collect();
    (dx, sum_in_order(partials))
}

/// The same of some tokens; `residual`, the gradient that reaches `x` past the norm,
/// is added. Writes `dx` and returns the share in the weight's gradient. One thread.
pub(super) fn backward_chunk(
    x: &[f32],
    weight: &[f32],
    eps: f32,
    grad: &[f32],
    residual: Option<&[f32]>,
    dx: &mut [f32],
) -> Vec<f32> {
    let (k, cols) = (kernels(), weight.len());
    let mut dweight = vec![0.0f32; cols];
    let rows = dx.chunks_exact_mut(cols).zip(x.chunks_exact(cols));
    for (i, ((dx, x), grad)) in rows.zip(grad.chunks_exact(cols)).enumerate() {
        let inv = k.inv_rms(x, eps);
        k.rms_norm_backward(x, weight, inv, grad, dx, &mut dweight);
        if let Some(residual) = residual {
            k.add_assign(dx, &residual[i * cols..][..cols]);
        }
    }
    dweight
}

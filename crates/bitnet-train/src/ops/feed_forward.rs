//! The feed-forward half of a block as one operation: RMSNorm, the gate and up
//! projections, the gated activation, the norm before the down projection, that
//! projection and the residual stream.
//!
//! A chunk of tokens goes through all of it while it lies in the cache; only integers
//! are kept for the backward pass, which computes gate and up again (an integer
//! product, a few per cent of a step) and goes through the tokens in rounds, so that
//! no float of the inner width is held for all of them.

use bitnet_core::Activation;
use burn::tensor::Tensor;
use rayon::prelude::*;

use super::attention_layer::LayerRecipe;
use super::cpu::{Buffer, CpuOp, apply, is_cpu, kernels, sum_in_order};
use super::linear::quantized_linears;
use super::norm::{self, Norm};
use super::products::{self, Backward, CHUNK, Forward, Input, InputMut, WeightGradients, Weights};
use super::scratch::Scratch;
use super::{gated, quantized_linear, rms_norm};
use crate::profile;

/// The parameters of the feed-forward half of a block.
#[derive(Debug, Clone)]
pub struct FeedForwardWeights {
    /// Weight of the first norm, `[D]`.
    pub norm: Tensor<1>,
    /// Gate projection `[F, D]`.
    pub gate: Tensor<2>,
    /// Up projection `[F, D]`.
    pub up: Tensor<2>,
    /// Weight of the norm before the down projection, `[F]`.
    pub sub_norm: Option<Tensor<1>>,
    /// Down projection `[D, F]`.
    pub down: Tensor<2>,
}

/// `x + down(sub_norm(act(gate(h)) · up(h)))` with `h = norm(x)`.
///
/// # Shapes
/// `x` and the result are `[tokens, D]`.
pub fn feed_forward(
    x: Tensor<2>,
    weights: FeedForwardWeights,
    act: Activation,
    recipe: LayerRecipe,
) -> Tensor<2> {
    let device = x.device();
    if !is_cpu(&device) || !recipe.is_fused() {
        return plain(x, weights, act, recipe);
    }
    let dims = x.dims();
    let op = FeedForward { act, recipe, hidden: dims[1] };
    let w = weights;
    let inputs = [
        x.into_dispatch(),
        w.norm.into_dispatch(),
        w.gate.into_dispatch(),
        w.up.into_dispatch(),
        w.down.into_dispatch(),
    ];
    match w.sub_norm {
        None => apply(op, inputs, device.is_autodiff(), dims),
        Some(sub) => {
            let [x, norm, gate, up, down] = inputs;
            let inputs = [x, norm, gate, up, down, sub.into_dispatch()];
            apply(op, inputs, device.is_autodiff(), dims)
        }
    }
}

/// The same as operations of their own.
pub fn plain(
    x: Tensor<2>,
    weights: FeedForwardWeights,
    act: Activation,
    LayerRecipe { linear, output, eps }: LayerRecipe,
) -> Tensor<2> {
    let h = rms_norm(x.clone(), weights.norm, eps);
    let [gate, up] = quantized_linears(h, [weights.gate, weights.up], linear);
    let mut inner = gated(act, gate, up);
    if let Some(sub_norm) = weights.sub_norm {
        inner = rms_norm(inner, sub_norm, eps);
    }
    x + quantized_linear(inner, weights.down, output)
}

#[derive(Debug, Clone)]
struct FeedForward {
    act: Activation,
    recipe: LayerRecipe,
    hidden: usize,
}

pub(super) struct Saved {
    x: Buffer,
    norm: Buffer,
    h: Input,
    /// Gate and up projections.
    weights: [Weights; 2],
    /// Their outputs `[tokens, 2F]`, where computing them again costs much.
    gate_up: Option<Scratch<f32>>,
    sub_norm: Option<Buffer>,
    inner: Input,
    down: Weights,
}

/// Tokens of a round of the backward pass.
const ROUND: usize = 8 * CHUNK;

impl FeedForward {
    /// `act(gate) · up` of one token.
    fn activate(&self, gate_up: &[f32], out: &mut [f32]) {
        let (gate, up) = gate_up.split_at(out.len());
        match self.act {
            Activation::Relu2 => kernels().relu2_mul(gate, up, out),
            Activation::Silu => kernels().silu_mul(gate, up, out),
        }
    }

    /// The input of the down projection for some tokens. One thread.
    fn inner(
        &self,
        gate_up: &[f32],
        width: usize,
        sub_norm: Option<&[f32]>,
        out: &mut InputMut<'_>,
    ) {
        let (k, eps) = (kernels(), self.recipe.eps);
        let mut inner = Scratch::any(width);
        out.fill(width, |token, q, out| {
            let gate_up = &gate_up[token * 2 * width..][..2 * width];
            let (gate, up) = gate_up.split_at(width);
            match (sub_norm, q) {
                (Some(weight), Some(q)) => {
                    k.gated_norm_quantize(self.act, gate, up, weight, eps, out, q)
                }
                (Some(weight), None) => {
                    self.activate(gate_up, &mut inner);
                    k.rms_norm(&inner, weight, eps, out);
                    (0.0, 0)
                }
                (None, Some(q)) => {
                    self.activate(gate_up, out);
                    k.quantize(out, q)
                }
                (None, None) => {
                    self.activate(gate_up, out);
                    (0.0, 0)
                }
            }
        });
    }

    /// From the gradient of the down projection's input, `[tokens, F]`, that of gate
    /// and up, which takes their place, `[tokens, 2F]`. Returns the share in the
    /// gradient of the norm's weight. One thread.
    fn inner_backward(
        &self,
        gate_up: &mut [f32],
        sub_norm: Option<&[f32]>,
        grad: &[f32],
        width: usize,
    ) -> Vec<f32> {
        let (k, eps) = (kernels(), self.recipe.eps);
        let mut dweight = vec![0.0f32; sub_norm.map_or(0, <[f32]>::len)];
        let (mut inner, mut dinner) = (Scratch::any(width), Scratch::any(width));
        let rows = gate_up.chunks_exact_mut(2 * width).zip(grad.chunks_exact(width));
        for (gate_up, mut grad) in rows {
            if let Some(weight) = sub_norm {
                self.activate(gate_up, &mut inner);
                let inv = k.inv_rms(&inner, eps);
                k.rms_norm_backward(&inner, weight, inv, grad, &mut dinner, &mut dweight);
                grad = &dinner;
            }
            let (gate, up) = gate_up.split_at_mut(width);
            match self.act {
                Activation::Relu2 => k.relu2_mul_backward(gate, up, grad),
                Activation::Silu => k.silu_mul_backward(gate, up, grad),
            }
        }
        dweight
    }
}

/// The layers as the backward pass multiplies them.
struct Layers<'a> {
    /// Gate and up, where they are computed again.
    again: Option<Forward<'a>>,
    gate_up: Backward<'a>,
    down: Backward<'a>,
}

/// The tokens from `first` on, on their way back.
struct ChunkBackward<'a> {
    first: usize,
    /// Input, and the gradient of the output, `[tokens, D]`.
    x: &'a [f32],
    grad: &'a [f32],
    /// Become the gradient of the input, and of gate and up, `[tokens, 2F]`.
    dx: &'a mut [f32],
    inner: &'a mut [f32],
}

impl FeedForward {
    /// Writes the chunk's gradients; returns its shares in those of the two norms'
    /// weights. One thread.
    fn chunk_backward(
        &self,
        s: &Saved,
        layers: &Layers<'_>,
        ChunkBackward { first, x, grad, dx, inner }: ChunkBackward<'_>,
    ) -> (Vec<f32>, Vec<f32>) {
        let (hidden, width) = (self.hidden, s.weights[0].rows());
        let tokens = first..first + grad.len() / hidden;
        match (&s.gate_up, &layers.again) {
            (Some(kept), _) => inner.copy_from_slice(&kept[first * 2 * width..][..inner.len()]),
            (None, Some(again)) => again.chunk(s.h.tokens(hidden, tokens), inner),
            (None, None) => unreachable!("gate and up are kept or computed again"),
        }
        let mut dinner = Scratch::any(inner.len() / 2);
        layers.down.chunk(grad, &mut dinner);
        let sub_norm = s.sub_norm.as_ref().map(Buffer::data);
        let dsub = self.inner_backward(inner, sub_norm, &dinner, width);
        let mut dh = Scratch::any(grad.len());
        layers.gate_up.chunk(inner, &mut dh);
        let (weight, eps) = (s.norm.data(), self.recipe.eps);
        (norm::backward_chunk(x, weight, eps, &dh, Some(grad), dx), dsub)
    }
}

impl<const N: usize> CpuOp<N> for FeedForward {
    type Saved = Saved;

    fn forward(&self, inputs: [Buffer; N], track: bool) -> (Vec<f32>, Option<Saved>) {
        let mut inputs = inputs.into_iter();
        let mut next = || match inputs.next() {
            Some(input) => input,
            None => unreachable!("a feed-forward network has at least 5 inputs"),
        };
        let (x, norm, gate, up, down) = (next(), next(), next(), next(), next());
        let sub_norm = inputs.next();
        let LayerRecipe { linear, output, eps } = self.recipe;
        let (hidden, tokens) = (self.hidden, x.data().len() / self.hidden);

        let width = gate.data().len() / hidden;
        let [gate, up, down] =
            Weights::all([(&gate, hidden, linear), (&up, hidden, linear), (&down, width, output)]);
        let weights = [gate, up];
        let first = Norm { weight: Some(norm.data()), eps };
        let second = sub_norm.as_ref().map(Buffer::data);
        let mut h = Input::any(tokens, hidden, linear.is_integer());
        let mut inner = Input::any(tokens, width, output.is_integer());
        let mut out = Scratch::any(x.data().len());
        let mut kept = (track && !linear.is_integer()).then(|| Scratch::any(tokens * 2 * width));

        let span = profile::span("feed-forward");
        let refs = (weights.each_ref(), [&down]);
        let (gate_up_layers, down_layer) = (Forward::new(&refs.0), Forward::new(&refs.1));
        let chunks = tokens.div_ceil(CHUNK);
        let kept_chunks: Vec<Option<&mut [f32]>> = match &mut kept {
            Some(kept) => kept.chunks_mut(CHUNK * 2 * width).map(Some).collect(),
            None => (0..chunks).map(|_| None).collect(),
        };
        h.chunks_mut(hidden, CHUNK)
            .into_par_iter()
            .zip(inner.chunks_mut(width, CHUNK))
            .zip(kept_chunks)
            .zip(x.data().par_chunks(CHUNK * hidden).zip(out.par_chunks_mut(CHUNK * hidden)))
            .with_max_len(1)
            .for_each(|(((mut h, mut inner), kept), (x, out))| {
                first.chunk(x, hidden, &mut h);
                let mut own =
                    Scratch::any(if kept.is_some() { 0 } else { x.len() / hidden * 2 * width });
                let gate_up = kept.unwrap_or(&mut own);
                gate_up_layers.chunk(h.view(), gate_up);
                self.inner(gate_up, width, second, &mut inner);
                out.copy_from_slice(x);
                down_layer.add_chunk(inner.view(), out);
            });
        drop(span);

        let saved = || Saved { x, norm, h, weights, gate_up: kept, sub_norm, inner, down };
        (out.into_vec(), track.then(saved))
    }

    fn backward(&self, saved: &Saved, grad: &[f32], wanted: [bool; N]) -> [Option<Vec<f32>>; N] {
        let s = saved;
        let LayerRecipe { linear, output, .. } = self.recipe;
        let (hidden, width) = (self.hidden, s.weights[0].rows());
        let (gate_up, down) = (s.weights.each_ref(), [&s.down]);
        let layers = Layers {
            again: s.gate_up.is_none().then(|| Forward::new(&gate_up)),
            gate_up: Backward::new(&gate_up, linear),
            down: Backward::new(&down, output),
        };
        let (mut dgate_up, mut ddown) =
            (products::gradients_of(&gate_up), products::gradients_of(&down));
        let mut dx = Scratch::any(grad.len());
        let mut partials = Vec::new();
        let own = CHUNK * hidden;
        for (round, (grad, dx)) in
            grad.chunks(ROUND * hidden).zip(dx.chunks_mut(ROUND * hidden)).enumerate()
        {
            let span = profile::span("feed-forward backward");
            let (first, tokens) = (round * ROUND, grad.len() / hidden);
            let mut inner_grad = Scratch::any(tokens * 2 * width);
            let x = &s.x.data()[first * hidden..][..grad.len()];
            let parts: Vec<(Vec<f32>, Vec<f32>)> = dx
                .par_chunks_mut(own)
                .zip(grad.par_chunks(own))
                .zip(x.par_chunks(own).zip(inner_grad.par_chunks_mut(CHUNK * 2 * width)))
                .enumerate()
                .with_max_len(1)
                .map(|(i, ((dx, grad), (x, inner)))| {
                    let chunk = ChunkBackward { first: first + i * CHUNK, x, grad, dx, inner };
                    self.chunk_backward(s, &layers, chunk)
                })
                .collect();
            partials.extend(parts);
            drop(span);
            let range = first..first + tokens;
            let jobs = [
                WeightGradients {
                    grad: &inner_grad,
                    x: s.h.tokens(hidden, range.clone()),
                    weights: &gate_up,
                    recipe: linear,
                    out: &mut dgate_up,
                },
                WeightGradients {
                    grad,
                    x: s.inner.tokens(width, range),
                    weights: &down,
                    recipe: output,
                    out: &mut ddown,
                },
            ];
            products::add_weight_gradients(jobs, round > 0);
        }
        let (dnorms, dsubs): (Vec<_>, Vec<_>) = partials.into_iter().unzip();

        let mut all = vec![dx.into_vec(), sum_in_order(dnorms)];
        all.append(&mut dgate_up);
        all.append(&mut ddown);
        all.extend(s.sub_norm.as_ref().map(|_| sum_in_order(dsubs)));
        let mut all = all.into_iter().zip(wanted).map(|(grad, wanted)| wanted.then_some(grad));
        std::array::from_fn(|_| all.next().flatten())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cpu::testing::{check_gradients, random};
    use crate::ops::products::testing::recipes;

    #[test]
    fn equals_its_parts_in_value_and_gradient() {
        let (tokens, hidden, width) = (70, 48, 80);
        for recipe in recipes() {
            let recipe = LayerRecipe { linear: recipe, output: recipe, eps: 1e-5 };
            for (act, sub_norms) in
                [(Activation::Silu, false), (Activation::Relu2, true), (Activation::Silu, true)]
            {
                let weights = |[x, n, gate, up, down, s]: [Tensor<2>; 6]| {
                    // Every leaf has a gradient, also where the norm is left out.
                    let x = x + s.clone().sum().mul_scalar(0.0).reshape([1, 1]);
                    let sub_norm = sub_norms.then(|| s.reshape([width]));
                    let norm = n.reshape([hidden]);
                    (x, FeedForwardWeights { norm, gate, up, sub_norm, down })
                };
                check_gradients(
                    [
                        random([tokens, hidden], 2.0, 1),
                        random([1, hidden], 1.0, 2),
                        random([width, hidden], 0.3, 3),
                        random([width, hidden], 0.3, 4),
                        random([hidden, width], 0.3, 5),
                        random([1, width], 1.0, 6),
                    ],
                    |inputs| {
                        let (x, w) = weights(inputs);
                        feed_forward(x, w, act, recipe)
                    },
                    |inputs| {
                        let (x, w) = weights(inputs);
                        plain(x, w, act, recipe)
                    },
                    // The same kernels; sums of gradients come in another order.
                    1e-5,
                );
            }
        }
    }
}

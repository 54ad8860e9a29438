//! The attention half of a block as one operation: RMSNorm, the query, key and value
//! projections, attention, the norm before the output projection, that projection
//! and the residual stream.
//!
//! One pass makes the integers that three products read, nothing between the
//! products is held in floats but queries, keys, values and the attention's output,
//! and one product each gives the gradients that the parts would have to add up.

use bitnet_kernels::MatMut;
use burn::tensor::Tensor;
use rayon::prelude::*;

use super::attention::{self, AttentionShape, Heads, Qkv, QkvMut};
use super::cpu::{Buffer, CpuOp, apply, is_cpu, sum_in_order};
use super::linear::quantized_linears;
use super::norm::{self, Norm};
use super::products::{self, Backward, CHUNK, Forward, Input, Weights};
use super::scratch::Scratch;
use super::{LinearRecipe, quantized_linear, rms_norm};
use crate::profile;

/// The parameters of the attention half of a block.
#[derive(Debug, Clone)]
pub struct AttentionWeights {
    /// Weight of the first norm, `[D]`.
    pub norm: Tensor<1>,
    /// Query projection `[H·C, D]`.
    pub q: Tensor<2>,
    /// Key projection `[K·C, D]`.
    pub k: Tensor<2>,
    /// Value projection `[K·C, D]`.
    pub v: Tensor<2>,
    /// Weight of the norm before the output projection, `[H·C]`.
    pub sub_norm: Option<Tensor<1>>,
    /// Output projection `[D, H·C]`.
    pub o: Tensor<2>,
}

/// What the linear layers and norms of half a block have in common.
#[derive(Debug, Clone, Copy)]
pub struct LayerRecipe {
    /// The recipe of the linear layers that read the first norm.
    pub linear: LinearRecipe,
    /// The recipe of the last.
    pub output: LinearRecipe,
    /// The norms' epsilon.
    pub eps: f32,
}

impl LayerRecipe {
    /// Whether one operation can compute it.
    pub(super) fn is_fused(&self) -> bool {
        let fused =
            |r: LinearRecipe| !r.rotate && !r.sparsifies() && (r.is_integer() || r.is_float());
        fused(self.linear) && fused(self.output)
    }
}

/// `x + o(sub_norm(attention(q(h), k(h), v(h))))` with `h = norm(x)`.
///
/// # Shapes
/// `x` and the result are `[B·T, D]`.
pub fn attention_layer(
    x: Tensor<2>,
    weights: AttentionWeights,
    shape: AttentionShape,
    recipe: LayerRecipe,
) -> Tensor<2> {
    let device = x.device();
    if !is_cpu(&device) || !recipe.is_fused() {
        return plain(x, weights, shape, recipe);
    }
    let dims = x.dims();
    let op = AttentionLayer { shape, recipe, hidden: dims[1] };
    let w = weights;
    let inputs = [
        x.into_dispatch(),
        w.norm.into_dispatch(),
        w.q.into_dispatch(),
        w.k.into_dispatch(),
        w.v.into_dispatch(),
        w.o.into_dispatch(),
    ];
    match w.sub_norm {
        None => apply(op, inputs, device.is_autodiff(), dims),
        Some(sub) => {
            let [x, norm, q, k, v, o] = inputs;
            let inputs = [x, norm, q, k, v, o, sub.into_dispatch()];
            apply(op, inputs, device.is_autodiff(), dims)
        }
    }
}

/// The same as operations of their own.
pub fn plain(
    x: Tensor<2>,
    weights: AttentionWeights,
    shape: AttentionShape,
    LayerRecipe { linear, output, eps }: LayerRecipe,
) -> Tensor<2> {
    let h = rms_norm(x.clone(), weights.norm, eps);
    let [q, k, v] = quantized_linears(h, [weights.q, weights.k, weights.v], linear);
    let mut mixed = attention::attention(q, k, v, shape);
    if let Some(sub_norm) = weights.sub_norm {
        mixed = rms_norm(mixed, sub_norm, eps);
    }
    x + quantized_linear(mixed, weights.o, output)
}

#[derive(Debug, Clone)]
struct AttentionLayer {
    shape: AttentionShape,
    recipe: LayerRecipe,
    hidden: usize,
}

pub(super) struct Saved {
    x: Buffer,
    norm: Buffer,
    h: Input,
    /// Query, key and value projections.
    qkv_weights: [Weights; 3],
    /// Their outputs `[B·T, (H + 2K)·C]`.
    qkv: Scratch<f32>,
    /// The attention's output, where a norm follows.
    mixed: Option<(Scratch<f32>, Buffer)>,
    o_input: Input,
    o_weights: Weights,
}

impl AttentionLayer {
    /// Columns of queries, and of keys or values.
    fn widths(&self) -> (usize, usize) {
        let s = &self.shape;
        (s.heads * s.head_dim, s.kv_heads * s.head_dim)
    }

    fn qkv<'a>(&self, data: &'a [f32]) -> Qkv<'a> {
        let (q, kv) = self.widths();
        let heads = |first| Heads { data, stride: q + 2 * kv, first };
        Qkv { q: heads(0), k: heads(q), v: heads(q + kv) }
    }
}

impl<const N: usize> CpuOp<N> for AttentionLayer {
    type Saved = Saved;

    fn forward(&self, inputs: [Buffer; N], track: bool) -> (Vec<f32>, Option<Saved>) {
        let mut inputs = inputs.into_iter();
        let mut next = || match inputs.next() {
            Some(input) => input,
            None => unreachable!("an attention layer has at least 6 inputs"),
        };
        let (x, norm, wq, wk, wv, wo) = (next(), next(), next(), next(), next(), next());
        let sub_norm = inputs.next();
        let LayerRecipe { linear, output, eps } = self.recipe;
        let ((q_width, kv_width), tokens) = (self.widths(), self.shape.batch * self.shape.time);

        let own = |w| (w, self.hidden, linear);
        let [q, k, v, o_weights] =
            Weights::all([own(&wq), own(&wk), own(&wv), (&wo, q_width, output)]);
        let weights = [q, k, v];
        let first = Norm { weight: Some(norm.data()), eps };
        let span = profile::span("projections");
        let h = first.input(x.data(), self.hidden, linear.is_integer());
        let qkv = products::forward(&h, &weights.each_ref());
        drop(span);
        debug_assert_eq!(qkv.len(), tokens * (q_width + 2 * kv_width));
        let mut mixed = Scratch::any(tokens * q_width);
        attention::forward(&self.shape, self.qkv(&qkv), &mut mixed);
        let second = Norm { weight: sub_norm.as_ref().map(Buffer::data), eps };
        let mut o_input = Input::any(tokens, q_width, output.is_integer());
        let mut out = Scratch::any(x.data().len());
        let span = profile::span("output projection");
        let (o, own) = (&[&o_weights][..], CHUNK * self.hidden);
        let o = Forward::new(o);
        o_input
            .chunks_mut(q_width, CHUNK)
            .into_par_iter()
            .zip(mixed.par_chunks(CHUNK * q_width))
            .zip(x.data().par_chunks(own).zip(out.par_chunks_mut(own)))
            .with_max_len(1)
            .for_each(|((mut input, mixed), (x, out))| {
                second.chunk(mixed, q_width, &mut input);
                out.copy_from_slice(x);
                o.add_chunk(input.view(), out);
            });
        drop(span);
        let out = out.into_vec();

        let mixed = sub_norm.map(|sub_norm| (mixed, sub_norm));
        let saved = || Saved { x, norm, h, qkv_weights: weights, qkv, mixed, o_input, o_weights };
        (out, track.then(saved))
    }

    fn backward(&self, saved: &Saved, grad: &[f32], wanted: [bool; N]) -> [Option<Vec<f32>>; N] {
        let s = saved;
        let ((q_width, kv_width), eps) = (self.widths(), self.recipe.eps);
        let tokens = grad.len() / self.hidden;
        let dmixed = products::backward_input(grad, &[&s.o_weights], self.recipe.output);
        let mut do_weight =
            products::backward_weights(grad, &s.o_input, &[&s.o_weights], self.recipe.output);
        let (dmixed, dsub) = match &s.mixed {
            None => (dmixed, None),
            Some((mixed, weight)) => {
                let (dx, dweight) = norm::backward(mixed, weight.data(), eps, &dmixed);
                (dx, Some(dweight))
            }
        };
        let width = q_width + 2 * kv_width;
        let mut dqkv = Scratch::any(tokens * width);
        let (q, rest) = MatMut::new(&mut dqkv, tokens, width).split_cols(q_width);
        let (k, v) = rest.split_cols(kv_width);
        attention::backward(&self.shape, self.qkv(&s.qkv), &dmixed, QkvMut { q, k, v });
        let weights = s.qkv_weights.each_ref();
        let dweights = products::backward_weights(&dqkv, &s.h, &weights, self.recipe.linear);
        let span = profile::span("input gradients");
        let (back, own) = (Backward::new(&weights, self.recipe.linear), CHUNK * self.hidden);
        let mut dx = Scratch::any(grad.len());
        let partials: Vec<Vec<f32>> = dx
            .par_chunks_mut(own)
            .zip(s.x.data().par_chunks(own).zip(grad.par_chunks(own)))
            .zip(dqkv.par_chunks(CHUNK * width))
            .with_max_len(1)
            .map(|((dx, (x, grad)), dqkv)| {
                let mut dh = Scratch::any(dx.len());
                back.chunk(dqkv, &mut dh);
                norm::backward_chunk(x, s.norm.data(), eps, &dh, Some(grad), dx)
            })
            .collect();
        drop(span);
        let dnorm = sum_in_order(partials);

        let mut all = vec![dx.into_vec(), dnorm];
        all.extend(dweights);
        all.append(&mut do_weight);
        all.extend(dsub);
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
        let (heads, kv_heads, head_dim, hidden) = (4, 2, 8, 48);
        let (batch, time) = (2, 37);
        let shape = AttentionShape {
            batch,
            time,
            heads,
            kv_heads,
            head_dim,
            rope_theta: 1e4,
            documents: Some([7, 30, 37].into()),
            bf16: false,
        };
        for recipe in recipes() {
            let recipe = LayerRecipe { linear: recipe, output: recipe, eps: 1e-5 };
            for sub_norms in [false, true] {
                let weights = |[x, n, q, k, v, o, s]: [Tensor<2>; 7]| {
                    let width = s.dims()[1];
                    // Every leaf has a gradient, also where the norm is left out.
                    let x = x + s.clone().sum().mul_scalar(0.0).reshape([1, 1]);
                    let sub_norm = sub_norms.then(|| s.reshape([width]));
                    let norm = n.reshape([hidden]);
                    (x, AttentionWeights { norm, q, k, v, sub_norm, o })
                };
                let (q, kv) = (heads * head_dim, kv_heads * head_dim);
                check_gradients(
                    [
                        random([batch * time, hidden], 2.0, 1),
                        random([1, hidden], 1.0, 2),
                        random([q, hidden], 0.3, 3),
                        random([kv, hidden], 0.3, 4),
                        random([kv, hidden], 0.3, 5),
                        random([hidden, q], 0.3, 6),
                        random([1, q], 1.0, 7),
                    ],
                    |inputs| {
                        let (x, w) = weights(inputs);
                        attention_layer(x, w, shape.clone(), recipe)
                    },
                    |inputs| {
                        let (x, w) = weights(inputs);
                        plain(x, w, shape.clone(), recipe)
                    },
                    // The same kernels; sums of gradients come in another order.
                    1e-5,
                );
            }
        }
    }
}

//! The modules of one block.

use std::sync::Arc;

use bitnet_core::names::{Linear, Norm};
use bitnet_core::{Activation, ModelConfig};
use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};

use super::transformer::{Init, LayerTrace};
use crate::ops::{
    self, AttentionShape, AttentionWeights, FeedForwardWeights, LayerRecipe, LinearRecipe,
};

/// A linear layer without bias whose master weights are quantised in the forward
/// pass, or not, for the float twin.
#[derive(Module, Debug)]
pub struct BitLinear {
    /// Master weights `[out, in]`.
    pub weight: Param<Tensor<2>>,
    #[module(skip)]
    recipe: LinearRecipe,
}

impl BitLinear {
    pub(super) fn new(linear: Linear, layer: usize, init: &mut Init<'_>) -> Self {
        let shape = linear.shape(init.config);
        Self {
            weight: Param::from_tensor(init.matrix(&linear.hf(layer), shape)),
            recipe: LinearRecipe::new(init.config, linear),
        }
    }

    /// `[tokens, in]` to `[tokens, out]`; see [`ops::quantized_linear`].
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        ops::quantized_linear(x, self.weight.val(), self.recipe)
    }

    /// What happens to weights and inputs.
    #[must_use]
    pub fn recipe(&self) -> LinearRecipe {
        self.recipe
    }

    /// Changes it: a stage of training begins.
    pub fn set_recipe(&mut self, recipe: LinearRecipe) {
        self.recipe = recipe;
    }

    /// The same, handing input and output to `trace`.
    fn traced(&self, x: Tensor<2>, which: Linear, trace: LayerTrace<'_>) -> Tensor<2> {
        let y = self.forward(x.clone());
        trace(which, x, y.clone());
        y
    }
}

/// RMSNorm with a learned weight.
#[derive(Module, Debug)]
pub struct RmsNorm {
    /// Weight `[D]`.
    pub weight: Param<Tensor<1>>,
    #[module(skip)]
    eps: f32,
}

impl RmsNorm {
    pub(super) fn new(size: usize, eps: f32, device: &Device) -> Self {
        Self { weight: Param::from_tensor(Tensor::ones([size], device)), eps }
    }

    /// `[tokens, D]` to the same shape; see [`ops::rms_norm`].
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        ops::rms_norm(x, self.weight.val(), self.eps)
    }
}

/// How the rows of `[B·T, D]` belong together.
#[derive(Debug, Clone)]
pub struct Rows {
    /// Sequences B.
    pub batch: usize,
    /// The documents that do not see each other; see [`AttentionShape::documents`].
    pub documents: Option<Arc<[usize]>>,
}

impl Rows {
    /// Sequences that are one document each.
    #[must_use]
    pub fn whole(batch: usize) -> Self {
        Self { batch, documents: None }
    }
}

/// Causal grouped-query attention.
#[derive(Module, Debug)]
pub struct Attention {
    /// Query projection.
    pub q: BitLinear,
    /// Key projection.
    pub k: BitLinear,
    /// Value projection.
    pub v: BitLinear,
    /// The norm before the output projection.
    pub sub_norm: Option<RmsNorm>,
    /// Output projection.
    pub o: BitLinear,
    #[module(skip)]
    heads: usize,
    #[module(skip)]
    kv_heads: usize,
    #[module(skip)]
    head_dim: usize,
    #[module(skip)]
    rope_theta: f32,
}

impl Attention {
    fn shape(&self, tokens: usize, rows: &Rows) -> AttentionShape {
        AttentionShape {
            batch: rows.batch,
            time: tokens / rows.batch,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            rope_theta: self.rope_theta,
            documents: rows.documents.clone(),
            bf16: self.q.recipe.bf16,
        }
    }

    /// `x + attention(norm(x))`; see [`ops::attention_layer`].
    fn forward(&self, x: Tensor<2>, norm: &RmsNorm, rows: &Rows) -> Tensor<2> {
        let shape = self.shape(x.dims()[0], rows);
        let weights = AttentionWeights {
            norm: norm.weight.val(),
            q: self.q.weight.val(),
            k: self.k.weight.val(),
            v: self.v.weight.val(),
            sub_norm: self.sub_norm.as_ref().map(|norm| norm.weight.val()),
            o: self.o.weight.val(),
        };
        let recipe = LayerRecipe { linear: self.q.recipe, output: self.o.recipe, eps: norm.eps };
        ops::attention_layer(x, weights, shape, recipe)
    }

    fn traced(&self, h: Tensor<2>, rows: &Rows, trace: LayerTrace<'_>) -> Tensor<2> {
        let shape = self.shape(h.dims()[0], rows);
        let q = self.q.traced(h.clone(), Linear::Q, trace);
        let k = self.k.traced(h.clone(), Linear::K, trace);
        let v = self.v.traced(h, Linear::V, trace);
        let mixed = ops::attention(q, k, v, shape);
        let mixed = match &self.sub_norm {
            Some(norm) => norm.forward(mixed),
            None => mixed,
        };
        self.o.traced(mixed, Linear::O, trace)
    }
}

/// The gated feed-forward network.
#[derive(Module, Debug)]
pub struct FeedForward {
    /// Gate projection.
    pub gate: BitLinear,
    /// Up projection.
    pub up: BitLinear,
    /// The norm before the down projection.
    pub sub_norm: Option<RmsNorm>,
    /// Down projection.
    pub down: BitLinear,
    #[module(skip)]
    act: Act,
}

/// [`Activation`] as a field of a module.
#[derive(Debug, Clone, Copy)]
struct Act(Activation);

impl FeedForward {
    /// `x + feed_forward(norm(x))`; see [`ops::feed_forward`].
    fn forward(&self, x: Tensor<2>, norm: &RmsNorm) -> Tensor<2> {
        let weights = FeedForwardWeights {
            norm: norm.weight.val(),
            gate: self.gate.weight.val(),
            up: self.up.weight.val(),
            sub_norm: self.sub_norm.as_ref().map(|norm| norm.weight.val()),
            down: self.down.weight.val(),
        };
        let (linear, output) = (self.gate.recipe, self.down.recipe);
        let recipe = LayerRecipe { linear, output, eps: norm.eps };
        ops::feed_forward(x, weights, self.act.0, recipe)
    }

    fn traced(&self, h: Tensor<2>, trace: LayerTrace<'_>) -> Tensor<2> {
        let gate = self.gate.traced(h.clone(), Linear::Gate, trace);
        let up = self.up.traced(h, Linear::Up, trace);
        let mixed = ops::gated(self.act.0, gate, up);
        let mixed = match &self.sub_norm {
            Some(norm) => norm.forward(mixed),
            None => mixed,
        };
        self.down.traced(mixed, Linear::Down, trace)
    }
}

/// One block: attention and feed-forward network, each behind a norm and added to
/// the residual stream.
#[derive(Module, Debug)]
pub struct Block {
    /// Norm before the attention.
    pub attention_norm: RmsNorm,
    /// The attention.
    pub attention: Attention,
    /// Norm before the feed-forward network.
    pub feed_forward_norm: RmsNorm,
    /// The feed-forward network.
    pub feed_forward: FeedForward,
}

impl Block {
    pub(super) fn new(layer: usize, init: &mut Init<'_>) -> Self {
        let config: &ModelConfig = init.config;
        let device = init.device.clone();
        let norm = |n: Norm| RmsNorm::new(n.size(config), config.rms_norm_eps, &device);
        let sub = |n: Norm| config.sub_norms.then(|| norm(n));
        Self {
            attention_norm: norm(Norm::Attention),
            attention: Attention {
                q: BitLinear::new(Linear::Q, layer, init),
                k: BitLinear::new(Linear::K, layer, init),
                v: BitLinear::new(Linear::V, layer, init),
                sub_norm: sub(Norm::AttentionSub),
                o: BitLinear::new(Linear::O, layer, init),
                heads: config.num_attention_heads,
                kv_heads: config.num_key_value_heads,
                head_dim: config.head_dim(),
                rope_theta: config.rope_theta,
            },
            feed_forward_norm: norm(Norm::FeedForward),
            feed_forward: FeedForward {
                gate: BitLinear::new(Linear::Gate, layer, init),
                up: BitLinear::new(Linear::Up, layer, init),
                sub_norm: sub(Norm::FeedForwardSub),
                down: BitLinear::new(Linear::Down, layer, init),
                act: Act(config.hidden_act),
            },
        }
    }

    /// `[B·T, D]` to the same shape.
    pub fn forward(&self, x: Tensor<2>, rows: &Rows) -> Tensor<2> {
        let x = self.attention.forward(x, &self.attention_norm, rows);
        self.feed_forward.forward(x, &self.feed_forward_norm)
    }

    /// The same, operation by operation, with every linear layer handed to `trace`.
    pub fn forward_traced(&self, x: Tensor<2>, rows: &Rows, trace: LayerTrace<'_>) -> Tensor<2> {
        let h = self.attention_norm.forward(x.clone());
        let x = x + self.attention.traced(h, rows, trace);
        let h = self.feed_forward_norm.forward(x.clone());
        x + self.feed_forward.traced(h, trace)
    }

    /// The linear layer of that name.
    #[must_use]
    pub fn linear(&self, which: Linear) -> &BitLinear {
        match which {
            Linear::Q => &self.attention.q,
            Linear::K => &self.attention.k,
            Linear::V => &self.attention.v,
            Linear::O => &self.attention.o,
            Linear::Gate => &self.feed_forward.gate,
            Linear::Up => &self.feed_forward.up,
            Linear::Down => &self.feed_forward.down,
        }
    }

    pub(super) fn linear_mut(&mut self, which: Linear) -> &mut BitLinear {
        match which {
            Linear::Q => &mut self.attention.q,
            Linear::K => &mut self.attention.k,
            Linear::V => &mut self.attention.v,
            Linear::O => &mut self.attention.o,
            Linear::Gate => &mut self.feed_forward.gate,
            Linear::Up => &mut self.feed_forward.up,
            Linear::Down => &mut self.feed_forward.down,
        }
    }

    pub(super) fn norm(&self, which: Norm) -> Option<&RmsNorm> {
        match which {
            Norm::Attention => Some(&self.attention_norm),
            Norm::AttentionSub => self.attention.sub_norm.as_ref(),
            Norm::FeedForward => Some(&self.feed_forward_norm),
            Norm::FeedForwardSub => self.feed_forward.sub_norm.as_ref(),
        }
    }

    pub(super) fn norm_mut(&mut self, which: Norm) -> Option<&mut RmsNorm> {
        match which {
            Norm::Attention => Some(&mut self.attention_norm),
            Norm::AttentionSub => self.attention.sub_norm.as_mut(),
            Norm::FeedForward => Some(&mut self.feed_forward_norm),
            Norm::FeedForwardSub => self.feed_forward.sub_norm.as_mut(),
        }
    }
}

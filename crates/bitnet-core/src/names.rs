//! The names of a model's tensors: Hugging Face's in checkpoints, GGUF's in
//! packed files.

use crate::config::ModelConfig;

/// The token embedding, `[vocab_size, hidden_size]`.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// The norm before the head, `[hidden_size]`.
pub const FINAL_NORM: &str = "model.norm.weight";
/// The head of a model with untied embeddings, `[vocab_size, hidden_size]`.
pub const LM_HEAD: &str = "lm_head.weight";

/// The seven linear layers of a block, in the order they run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Linear {
    /// Query projection.
    Q,
    /// Key projection.
    K,
    /// Value projection.
    V,
    /// Output projection of the attention.
    O,
    /// Gate projection of the feed-forward network.
    Gate,
    /// Up projection of the feed-forward network.
    Up,
    /// Down projection of the feed-forward network.
    Down,
}

/// The four norms of a block (two of them only with sub-norms).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Norm {
    /// Before the attention.
    Attention,
    /// Before the output projection (SubLN).
    AttentionSub,
    /// Before the feed-forward network.
    FeedForward,
    /// Before the down projection (SubLN).
    FeedForwardSub,
}

impl Linear {
    /// Every linear layer of a block.
    pub const ALL: [Self; 7] =
        [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// Whether its output is added to the residual stream: `o_proj`, `down_proj`.
    #[must_use]
    pub fn writes_residual(self) -> bool {
        matches!(self, Self::O | Self::Down)
    }

    /// The Hugging Face name in block `layer`.
    #[must_use]
    pub fn hf(self, layer: usize) -> String {
        let part = match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        };
        format!("model.layers.{layer}.{part}.weight")
    }

    /// The GGUF name in block `layer`, without `.weight` or `.scale`.
    #[must_use]
    pub fn gguf(self, layer: usize) -> String {
        let part = match self {
            Self::Q => "attn_q",
            Self::K => "attn_k",
            Self::V => "attn_v",
            Self::O => "attn_output",
            Self::Gate => "ffn_gate",
            Self::Up => "ffn_up",
            Self::Down => "ffn_down",
        };
        format!("blk.{layer}.{part}")
    }

    /// The shape `[out, in]` of the weight.
    #[must_use]
    pub fn shape(self, config: &ModelConfig) -> [usize; 2] {
        let (d, f) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (config.query_size(), config.key_value_size());
        match self {
            Self::Q => [q, d],
            Self::K | Self::V => [kv, d],
            Self::O => [d, q],
            Self::Gate | Self::Up => [f, d],
            Self::Down => [d, f],
        }
    }
}

impl Norm {
    /// The norms that a model of this configuration has in every block.
    #[must_use]
    pub fn of(config: &ModelConfig) -> &'static [Self] {
        if config.sub_norms {
            &[Self::Attention, Self::AttentionSub, Self::FeedForward, Self::FeedForwardSub]
        } else {
            &[Self::Attention, Self::FeedForward]
        }
    }

    /// The Hugging Face name in block `layer`.
    #[must_use]
    pub fn hf(self, layer: usize) -> String {
        let part = match self {
            Self::Attention => "input_layernorm",
            Self::AttentionSub => "self_attn.attn_sub_norm",
            Self::FeedForward => "post_attention_layernorm",
            Self::FeedForwardSub => "mlp.ffn_sub_norm",
        };
        format!("model.layers.{layer}.{part}.weight")
    }

    /// The GGUF name in block `layer`.
    #[must_use]
    pub fn gguf(self, layer: usize) -> String {
        let part = match self {
            Self::Attention => "attn_norm",
            Self::AttentionSub => "attn_sub_norm",
            Self::FeedForward => "ffn_norm",
            Self::FeedForwardSub => "ffn_sub_norm",
        };
        format!("blk.{layer}.{part}.weight")
    }

    /// The length of the weight.
    #[must_use]
    pub fn size(self, config: &ModelConfig) -> usize {
        match self {
            Self::Attention | Self::FeedForward => config.hidden_size,
            Self::AttentionSub => config.query_size(),
            Self::FeedForwardSub => config.intermediate_size,
        }
    }
}

/// A tensor of a model, by what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Tensor {
    /// The token embedding, `[vocab_size, hidden_size]`.
    Embedding,
    /// A norm of a block.
    Norm(usize, Norm),
    /// A linear layer of a block, `[out, in]`.
    Linear(usize, Linear),
    /// The norm before the head.
    FinalNorm,
    /// The head of a model with untied embeddings, `[vocab_size, hidden_size]`.
    Head,
}

impl Tensor {
    /// Every tensor of a model of this configuration, in the order of files.
    #[must_use]
    pub fn all(config: &ModelConfig) -> Vec<Self> {
        let mut all = vec![Self::Embedding];
        for layer in 0..config.num_hidden_layers {
            all.extend(Norm::of(config).iter().map(|n| Self::Norm(layer, *n)));
            all.extend(Linear::ALL.map(|l| Self::Linear(layer, l)));
        }
        all.push(Self::FinalNorm);
        if !config.tie_word_embeddings {
            all.push(Self::Head);
        }
        all
    }

    /// The Hugging Face name.
    #[must_use]
    pub fn hf(self) -> String {
        match self {
            Self::Embedding => EMBEDDING.to_owned(),
            Self::Norm(layer, norm) => norm.hf(layer),
            Self::Linear(layer, linear) => linear.hf(layer),
            Self::FinalNorm => FINAL_NORM.to_owned(),
            Self::Head => LM_HEAD.to_owned(),
        }
    }

    /// The GGUF name of the weight.
    #[must_use]
    pub fn gguf(self) -> String {
        match self {
            Self::Embedding => "token_embd.weight".to_owned(),
            Self::Norm(layer, norm) => norm.gguf(layer),
            Self::Linear(layer, linear) => format!("{}.weight", linear.gguf(layer)),
            Self::FinalNorm => "output_norm.weight".to_owned(),
            Self::Head => "output.weight".to_owned(),
        }
    }

    /// Whether it is a norm: it has one dimension.
    #[must_use]
    pub fn is_norm(self) -> bool {
        matches!(self, Self::Norm(..) | Self::FinalNorm)
    }

    /// Rows and columns; a norm is one row.
    #[must_use]
    pub fn shape(self, config: &ModelConfig) -> [usize; 2] {
        match self {
            Self::Embedding | Self::Head => [config.vocab_size, config.hidden_size],
            Self::Norm(_, norm) => [1, norm.size(config)],
            Self::Linear(_, linear) => linear.shape(config),
            Self::FinalNorm => [1, config.hidden_size],
        }
    }

    /// The dimensions, as files have them: a norm has one.
    #[must_use]
    pub fn dims(self, config: &ModelConfig) -> Vec<usize> {
        let shape = self.shape(config);
        if self.is_norm() { vec![shape[1]] } else { shape.to_vec() }
    }
}

/// Every tensor of a checkpoint as (Hugging Face name, shape), in file order.
#[must_use]
pub fn tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    Tensor::all(config).into_iter().map(|t| (t.hf(), t.dims(config))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tensors_hold_every_parameter() {
        for tie in [true, false] {
            for sub_norms in [true, false] {
                let config =
                    ModelConfig { tie_word_embeddings: tie, sub_norms, ..ModelConfig::tiny() };
                let total: usize =
                    tensors(&config).iter().map(|(_, s)| s.iter().product::<usize>()).sum();
                assert_eq!(total as u64, config.parameter_count().total());
            }
        }
    }
}

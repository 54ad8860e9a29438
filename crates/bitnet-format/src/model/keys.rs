//! The keys of our own packed files, both ways (docs/file-format.md).

use bitnet_core::{Activation, Dtype, Layout, ModelConfig, Recipe, WeightQuantizer};

use super::Golden;
use crate::gguf::{Directory, FromValue, GgufError, Header};

/// `general.architecture` of our packed files, and the prefix of their own keys.
pub const ARCHITECTURE: &str = "bitnet-packed";
/// The version of the keys and layouts.
pub const FORMAT_VERSION: u32 = 1;

fn own(key: &str) -> String {
    format!("{ARCHITECTURE}.{key}")
}

/// Writes the configuration of a packed file.
///
/// # Errors
/// A key that was written before.
pub fn put_own_config(h: &mut Header, c: &ModelConfig, layout: Layout) -> Result<(), GgufError> {
    // Validated: every size is at most 2^28.
    for (key, value) in [
        ("format_version", FORMAT_VERSION as usize),
        ("vocab_size", c.vocab_size),
        ("context_length", c.max_position_embeddings),
        ("embedding_length", c.hidden_size),
        ("block_count", c.num_hidden_layers),
        ("feed_forward_length", c.intermediate_size),
        ("attention.head_count", c.num_attention_heads),
        ("attention.head_count_kv", c.num_key_value_heads),
        ("attention.key_length", c.head_dim()),
    ] {
        h.put(&own(key), value as u32)?;
    }
    h.put(&own("attention.layer_norm_rms_epsilon"), c.rms_norm_eps)?;
    h.put(&own("rope.freq_base"), c.rope_theta)?;
    h.put(&own("hidden_act"), c.hidden_act.name())?;
    h.put(&own("sub_norms"), c.sub_norms)?;
    h.put(&own("tie_word_embeddings"), c.tie_word_embeddings)?;
    h.put(&own("weight_quantizer"), c.weight_quantizer.name())?;
    h.put(&own("layout"), layout.name())
}

/// Writes the golden logits of a packed file.
///
/// # Errors
/// A key that was written before.
pub fn put_own_golden(h: &mut Header, golden: &Golden) -> Result<(), GgufError> {
    h.put(&own("golden.tokens"), &golden.tokens[..])?;
    h.put(&own("golden.logits"), &golden.logits[..])
}

/// The configuration of a packed file, without the embedding's type, and the
/// layout of its ternary matrices.
pub(super) fn own_config(dir: &Directory<'_>) -> Result<(ModelConfig, Layout), GgufError> {
    let invalid = |what: String| GgufError::Invalid { file: dir.file().into(), what };
    let version: u32 = get(dir, "format_version")?;
    if version != FORMAT_VERSION {
        let what = format!("key {} = {version} is not supported", own("format_version"));
        return Err(invalid(what));
    }
    let unknown = |key: &str, value: &str| invalid(format!("key {} = {value:?}", own(key)));
    let act: String = get(dir, "hidden_act")?;
    let quantizer: String = get(dir, "weight_quantizer")?;
    let layout: String = get(dir, "layout")?;
    let hidden_size: usize = get(dir, "embedding_length")?;
    let heads: usize = get(dir, "attention.head_count")?;
    let head_dim: usize = get(dir, "attention.key_length")?;
    let implied = head_dim.checked_mul(heads) == Some(hidden_size);
    let config = ModelConfig {
        hidden_size,
        intermediate_size: get(dir, "feed_forward_length")?,
        num_hidden_layers: get(dir, "block_count")?,
        num_attention_heads: heads,
        num_key_value_heads: get(dir, "attention.head_count_kv")?,
        head_dim: if implied { None } else { Some(head_dim) },
        vocab_size: get(dir, "vocab_size")?,
        max_position_embeddings: get(dir, "context_length")?,
        rms_norm_eps: get(dir, "attention.layer_norm_rms_epsilon")?,
        rope_theta: get(dir, "rope.freq_base")?,
        hidden_act: (activation(&act)).ok_or_else(|| unknown("hidden_act", &act))?,
        tie_word_embeddings: get(dir, "tie_word_embeddings")?,
        sub_norms: get(dir, "sub_norms")?,
        weight_quantizer: [WeightQuantizer::Ternary, WeightQuantizer::None]
            .into_iter()
            .find(|q| q.name() == quantizer)
            .ok_or_else(|| unknown("weight_quantizer", &quantizer))?,
        embedding_dtype: Dtype::F32,
        recipe: Recipe::default(),
    };
    let layout = Layout::from_name(&layout).ok_or_else(|| unknown("layout", &layout))?;
    Ok((config, layout))
}

/// The golden logits of a packed file, where it has them.
pub(super) fn own_golden(dir: &Directory<'_>) -> Result<Option<Golden>, GgufError> {
    let Some(tokens) = dir.find(&own("golden.tokens"))? else { return Ok(None) };
    Ok(Some(Golden { tokens, logits: get(dir, "golden.logits")? }))
}

fn get<T: FromValue>(dir: &Directory<'_>, key: &str) -> Result<T, GgufError> {
    dir.get(&own(key))
}

/// The activation of that name.
pub(super) fn activation(name: &str) -> Option<Activation> {
    [Activation::Relu2, Activation::Silu].into_iter().find(|a| a.name() == name)
}

//! Where the weights of a run come from when not from its seed: another run, a
//! checkpoint, or a float model in a Hugging Face folder.

use std::path::{Path, PathBuf};

use bitnet_core::ModelConfig;
use bitnet_core::names::{self, Norm};
use bitnet_format::hf::Checkpoint;
use bitnet_format::model::find_checkpoint;
use burn::tensor::Device;
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::model::Transformer;

/// The `[start]` table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartConfig {
    /// A run, a checkpoint or a Hugging Face folder (LLaMA-style, f32, f16 or bf16)
    /// whose weights the run begins with, as master weights. The optimizer begins
    /// anew; to go on with a run as it was, use `--resume`.
    pub from: PathBuf,
}

/// What came with the weights.
#[derive(Debug, Clone, PartialEq)]
pub struct Start {
    /// What the user should know, a line each.
    pub notes: Vec<String>,
}

fn open(path: &Path) -> Result<Checkpoint, TrainError> {
    let checkpoint = Checkpoint::open_any(find_checkpoint(path)?)?;
    if checkpoint.packed().is_some() {
        let what = "holds packed ternary weights; training needs master or float weights";
        return Err(TrainError::checkpoint(checkpoint.folder(), what));
    }
    Ok(checkpoint)
}

/// Reads a whole model, with its own configuration.
///
/// # Errors
/// A folder that holds no model with master or float weights.
pub fn read_model(path: &Path, device: &Device) -> Result<(Transformer, ModelConfig), TrainError> {
    let files = open(path)?;
    let config = files.config().clone();
    let model = Transformer::new(&config, 0, device);
    let model = model.load_tensors(|name, _| files.read(name))?;
    Ok((model, config))
}

/// The configuration of such a model, its weights left alone.
///
/// # Errors
/// As [`read_model`].
pub fn read_config(path: &Path) -> Result<ModelConfig, TrainError> {
    Ok(open(path)?.config().clone())
}

/// Gives a fresh model of `config` the weights of another one. Quantisers, the
/// precision of the embedding and the longest sequence may differ; sub-norms that
/// the other has not begin at 1, an untied head as a copy of the embedding.
///
/// # Errors
/// A folder that holds no such model, and one whose shape differs, with the key.
pub fn load(
    path: &Path,
    config: &ModelConfig,
    model: Transformer,
    tokenizer: &str,
) -> Result<(Transformer, Start), TrainError> {
    let files = open(path)?;
    let found = files.config();
    let same = ModelConfig {
        weight_quantizer: config.weight_quantizer,
        recipe: config.recipe,
        embedding_dtype: config.embedding_dtype,
        max_position_embeddings: config.max_position_embeddings,
        sub_norms: config.sub_norms,
        tie_word_embeddings: config.tie_word_embeddings,
        head_dim: config.head_dim,
        ..found.clone()
    };
    if same != *config || found.head_dim() != config.head_dim() {
        let what = crate::checkpoint::difference(found, config);
        return Err(TrainError::checkpoint(files.folder(), what));
    }
    let mut notes = vec![format!("starting from {}", files.folder().display())];
    if found.sub_norms && !config.sub_norms {
        let what = "has sub-norms, model.sub_norms = false would leave them out";
        return Err(TrainError::checkpoint(files.folder(), what));
    }
    if config.sub_norms && !found.sub_norms {
        notes.push("the sub-norms, which it has not, begin at 1".into());
    }
    if config.tie_word_embeddings && !found.tie_word_embeddings {
        let what = "has a head of its own, model.tie_word_embeddings = true would lose it";
        return Err(TrainError::checkpoint(files.folder(), what));
    }
    let its = std::fs::read_to_string(files.folder().join("tokenizer.json")).unwrap_or_default();
    if its != tokenizer {
        notes.push("warning: its tokenizer.json is not that of the data: ids must agree".into());
    }
    let own_head = !found.tie_word_embeddings;
    let new_norm = |name: &str| {
        let sub = [Norm::AttentionSub, Norm::FeedForwardSub];
        !found.sub_norms
            && (0..config.num_hidden_layers).any(|l| sub.iter().any(|n| n.hf(l) == name))
    };
    let model = model.load_tensors(|name, shape| {
        if new_norm(name) {
            return Ok(vec![1.0; shape.iter().product()]);
        }
        let name = if name == names::LM_HEAD && !own_head { names::EMBEDDING } else { name };
        files.read(name)
    })?;
    Ok((model, Start { notes }))
}

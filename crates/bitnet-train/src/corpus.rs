//! The data of a run: which prepared folders it reads, in what proportion, and what
//! of a batch the model learns from.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bitnet_data::{
    Batch, BatchStream, Dataset, MixtureSource, MixtureStream, Split, StreamState, TokenStream,
    Tokenizer,
};
use burn::tensor::{Device, Int, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::config::TrainConfig;
use crate::distill::Examples;

/// The `[data]` table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// The folder that `bitnet-data prepare` wrote (`--data`): tokenizer, validation
    /// split and, without a mixture, the training split.
    pub dir: PathBuf,
    /// Seed of the order of the sequences.
    pub seed: u64,
    /// Whether a token sees those of its own document alone. The default lets it
    /// see all before it in its sequence. Validation does not mask.
    #[serde(default)]
    pub mask_documents: bool,
    /// How the losses of a step's tokens are put together.
    #[serde(default)]
    pub loss: Reduction,
    /// Training splits with weights, in place of that of `dir`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mixture: Vec<MixtureConfig>,
}

/// How the losses of tokens become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reduction {
    /// The mean over the tokens of a micro-batch that count.
    #[default]
    Mean,
    /// Their sum, in units of a micro-batch: every token that counts weighs as much,
    /// however many its micro-batch has. For chats, where most tokens are masked
    /// (BitNet b1.58 2B4T, arXiv:2504.12285).
    Sum,
}

/// One corpus of a mixture: `[[data.mixture]]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MixtureConfig {
    /// A prepared folder with the tokenizer of `data.dir`.
    pub dir: PathBuf,
    /// Its name in checkpoints [default: that of the folder's manifest].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Its weight among the sources.
    pub weight: f64,
    /// Other weights later: pairs of a share of the run's steps and the weight from
    /// there on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub later: Vec<(f64, f64)>,
}

impl DataConfig {
    /// Checks the values; the folders are checked when they are opened.
    ///
    /// # Errors
    /// The first key whose value cannot be used.
    pub fn validate(&self) -> Result<(), TrainError> {
        for source in &self.mixture {
            let dir = source.dir.display();
            let weights = source.later.iter().map(|(_, w)| *w);
            for weight in weights.chain([source.weight]) {
                if !(weight >= 0.0 && weight.is_finite()) {
                    let reason = format!("of {dir} must be at least 0 and finite");
                    return Err(TrainError::value("data.mixture.weight", weight, reason));
                }
            }
            let shares: Vec<f64> = source.later.iter().map(|(share, _)| *share).collect();
            let ascending = shares.is_sorted_by(|a, b| a < b);
            if !ascending || shares.iter().any(|s| !(*s > 0.0 && *s < 1.0)) {
                let reason = format!("of {dir} must be ascending shares between 0 and 1");
                return Err(TrainError::value("data.mixture.later", format!("{shares:?}"), reason));
            }
        }
        Ok(())
    }

    fn sources(&self, steps: u64) -> Result<Vec<MixtureSource>, TrainError> {
        let source = |config: &MixtureConfig| {
            let dataset = Dataset::open(&config.dir, Split::Train)?;
            let name = config.name.clone().unwrap_or_else(|| dataset.manifest().name.clone());
            let later = config.later.iter().map(|(s, w)| ((s * steps as f64).round() as u64, *w));
            let weights = [(0, config.weight)].into_iter().chain(later).collect();
            Ok(MixtureSource { name, dataset: Arc::new(dataset), weights })
        };
        self.mixture.iter().map(source).collect()
    }
}

/// The stream of a run from its beginning. `train` is the split of `data.dir`.
///
/// # Errors
/// Folders that cannot be read or do not go together.
pub(crate) fn stream(config: &TrainConfig, train: Arc<Dataset>) -> Result<TokenStream, TrainError> {
    let (context, seed) = (config.batch.sequence, config.data.seed);
    if config.data.mixture.is_empty() {
        return Ok(BatchStream::new(train, context, seed)?.into());
    }
    let sources = config.data.sources(config.schedule.steps)?;
    for (source, given) in sources.iter().zip(&config.data.mixture) {
        let (own, other) = (&train.manifest().tokenizer, &source.dataset.manifest().tokenizer);
        if own.sha256 != other.sha256 {
            let reason = format!("its tokenizer is not that of {}", config.data.dir.display());
            return Err(TrainError::value("data.mixture.dir", given.dir.display(), reason));
        }
    }
    Ok(MixtureStream::new(sources, context, seed)?.into())
}

/// The stream where a checkpoint left it.
///
/// # Errors
/// As [`stream`], another seed, other data, and a mixture where there was none.
pub(crate) fn resume(
    config: &TrainConfig,
    train: Arc<Dataset>,
    saved: &StreamState,
    path: &Path,
) -> Result<TokenStream, TrainError> {
    let seed = match saved {
        StreamState::Single(state) => state.seed,
        StreamState::Mixture(state) => state.seed,
    };
    if seed != config.data.seed {
        let reason = format!("the checkpoint {} was trained with {seed}", path.display());
        return Err(TrainError::value("data.seed", config.data.seed, reason));
    }
    let context = config.batch.sequence;
    match (saved, config.data.mixture.is_empty()) {
        (StreamState::Single(state), true) => {
            Ok(BatchStream::from_state(train, context, *state)?.into())
        }
        (StreamState::Mixture(state), false) => {
            let sources = config.data.sources(config.schedule.steps)?;
            Ok(MixtureStream::from_state(sources, context, state)?.into())
        }
        (StreamState::Single(_), false) => {
            Err(TrainError::checkpoint(path, "was trained without data.mixture"))
        }
        (StreamState::Mixture(_), true) => {
            Err(TrainError::checkpoint(path, "was trained with data.mixture"))
        }
    }
}

/// What can only be checked against the data.
///
/// # Errors
/// A vocabulary larger than the model's, a split without a window, a prompt that
/// cannot be encoded.
pub(crate) fn check(
    config: &TrainConfig,
    train: &Dataset,
    validation: &Dataset,
    tokenizer: &Tokenizer,
) -> Result<(), TrainError> {
    let vocab = config.model.vocab_size;
    for (what, needed) in [("shards", train.vocab_size()), ("tokenizer", tokenizer.vocab_size())] {
        if (needed as usize) > vocab {
            let dir = config.data.dir.display();
            let reason = format!("the {what} in {dir} have a vocabulary of {needed} tokens");
            return Err(TrainError::value("model.vocab_size", vocab, reason));
        }
    }
    // A split too short for one window is an error before anything is written.
    validation.windows(config.batch.sequence)?;
    for prompt in &config.sample.prompts {
        tokenizer.encode(prompt)?;
    }
    Ok(())
}

/// Token ids as a tensor `[rows, ids / rows]`.
pub(crate) fn ids(ids: &[u32], rows: usize, device: &Device) -> Tensor<2, Int> {
    // A vocabulary is checked to be far below 2^31.
    let values: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
    let columns = values.len() / rows.max(1);
    Tensor::from_data(TensorData::new(values, [rows, columns]), device)
}

/// A batch as a model learns from it, and how many of its tokens count. `end`: the
/// token that ends a document, where documents do not see each other.
pub(crate) fn examples(
    batch: &Batch,
    end: Option<u32>,
    loss: Reduction,
    device: &Device,
) -> (Examples, u64) {
    let all = batch.targets.len();
    let counted = match &batch.loss_mask {
        Some(mask) => mask.iter().filter(|m| **m != 0).count(),
        None => all,
    };
    let unit = match loss {
        Reduction::Mean => 1.0 / counted.max(1) as f32,
        Reduction::Sum => 1.0 / all.max(1) as f32,
    };
    let weight = |m: &u8| if *m == 0 { 0.0 } else { unit };
    let weights = batch.loss_mask.as_ref().map(|mask| mask.iter().map(weight).collect());
    let documents = end.map(|end| lengths(&batch.document_starts(end), batch.context).into());
    let tokens = ids(&batch.inputs, batch.batch, device);
    let targets = ids(&batch.targets, batch.batch, device);
    (Examples { tokens, targets, documents, weights }, counted as u64)
}

/// The lengths of documents in windows of `context` tokens, from where each token's
/// document begins in its window.
fn lengths(starts: &[u32], context: usize) -> Vec<usize> {
    let mut lengths = Vec::new();
    for window in starts.chunks(context) {
        lengths.extend(window.chunk_by(|a, b| a == b).map(<[u32]>::len));
    }
    lengths
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(loss_mask: Option<Vec<u8>>) -> Batch {
        let inputs = vec![5, 0, 7, 8, 0, 0, 3, 4, 0, 1, 2, 3];
        let targets = inputs.clone();
        Batch { inputs, targets, loss_mask, begins: None, batch: 3, context: 4 }
    }

    #[test]
    fn documents_end_with_their_token_or_their_window() {
        let device = Device::flex();
        let (examples, counted) = examples(&batch(None), Some(0), Reduction::Mean, &device);
        assert_eq!(examples.documents.unwrap()[..], [2, 2, 1, 1, 2, 1, 3]);
        assert_eq!((counted, examples.weights), (12, None));
    }

    #[test]
    fn masked_tokens_weigh_nothing() {
        let device = Device::flex();
        let mask = vec![0, 0, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0];
        let with = |loss| examples(&batch(Some(mask.clone())), None, loss, &device);
        for (loss, unit) in [(Reduction::Mean, 1.0 / 3.0), (Reduction::Sum, 1.0 / 12.0)] {
            let (examples, counted) = with(loss);
            let want: Vec<f32> = mask.iter().map(|m| f32::from(*m) * unit).collect();
            assert_eq!((examples.weights.unwrap(), counted), (want, 3));
            assert!(examples.documents.is_none());
        }
    }

    #[test]
    fn values_are_checked() {
        let mixture = |weight, later: &[(f64, f64)]| DataConfig {
            dir: "a".into(),
            seed: 1,
            mask_documents: false,
            loss: Reduction::Mean,
            mixture: vec![MixtureConfig {
                dir: "b".into(),
                name: None,
                weight,
                later: later.to_vec(),
            }],
        };
        mixture(1.0, &[(0.5, 0.0), (0.75, 2.0)]).validate().unwrap();
        for (config, message) in [
            (mixture(-1.0, &[]), "data.mixture.weight = -1: of b must be"),
            (mixture(1.0, &[(0.5, f64::NAN)]), "data.mixture.weight = NaN: of b"),
            (mixture(1.0, &[(0.5, 1.0), (0.5, 2.0)]), "data.mixture.later = [0.5, 0.5]: of b"),
            (mixture(1.0, &[(1.5, 1.0)]), "data.mixture.later = [1.5]: of b"),
        ] {
            let error = config.validate().unwrap_err().to_string();
            assert!(error.starts_with(message), "{error}");
        }
    }
}

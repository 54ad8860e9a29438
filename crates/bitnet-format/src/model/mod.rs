//! A model as any file of the ecosystem holds it, behind one face: configuration,
//! texts, and tensors one at a time under the names of this project.
//!
//! [`open`] tells the files apart: Hugging Face folders (master weights, packed
//! ternary, floats), GGUF files of others, and packed files of our own. What
//! reads a [`Source`] need not know which it is.

mod find;
mod folder;
mod foreign;
mod gguf_file;
mod keys;
mod packed;
mod vocabulary;

use std::path::{Path, PathBuf};

use bitnet_core::names::Tensor;
use bitnet_core::{
    Activation, ConfigError, Dtype, MatrixError, ModelConfig, WeightQuantizer, WeightScheme,
};
use serde::Deserialize;

use crate::gguf::GgufError;
use crate::gguf::blocks::{BlockError, I2sLayout, RowType};
use crate::hf::{HfError, SpecialTokens, Trits};
use crate::pack::Form;
use crate::tokenizer::TokenizerError;

pub use find::find_checkpoint;
pub use keys::{ARCHITECTURE, FORMAT_VERSION, put_own_config, put_own_golden};
pub use vocabulary::tokenizer_json;

/// A model, open for reading.
pub trait Source: Send {
    /// The file or folder.
    fn path(&self) -> &Path;

    /// All but the tensors.
    fn facts(&self) -> &Facts;

    /// Rows `first..` of a tensor as floats, `out.len()` elements, whole rows;
    /// a norm is one row. Not for the linear layers of [`Linears::Trits`].
    ///
    /// # Errors
    /// No such tensor, a type that cannot be read, I/O errors.
    fn floats(&self, tensor: Tensor, first: usize, out: &mut [f32]) -> Result<(), ModelError>;

    /// The ternary values of a linear layer and their scale: as they are stored,
    /// or by the one definition from master weights.
    ///
    /// # Errors
    /// As [`Source::floats`]; weights that are not finite or not ternary.
    fn ternary(&self, tensor: Tensor) -> Result<Trits, ModelError>;
}

/// What a model is besides its tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct Facts {
    /// The kind of file, for people: `GGUF, architecture bitnet`.
    pub kind: String,
    /// The configuration. Its `embedding_dtype` is the precision that embedding
    /// and head have in the file, or are to be rounded to.
    pub config: ModelConfig,
    /// What the linear layers are stored as.
    pub linears: Linears,
    /// The type that holds their values exactly, where they are floats; f16 for
    /// types of a few bits.
    pub linear_dtype: Dtype,
    /// The blocks that hold them in a packed file of ours, where those do.
    pub linear_rows: Option<RowType>,
    /// The model's name, from the file or the folder.
    pub name: String,
    /// Tokenizer and chat template.
    pub text: Text,
    /// A prompt with the logits that training computed for it.
    pub golden: Option<Golden>,
}

impl Facts {
    /// The form in which a dense model's linear layers stay as they are.
    #[must_use]
    pub fn linear_form(&self) -> Form {
        self.linear_rows.map_or(Form::Float(self.linear_dtype), Form::Rows)
    }
}

/// What the linear layers of a source are stored as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Linears {
    /// Ternary values and a scale.
    Trits,
    /// Floats that are quantised on use.
    Masters,
    /// Floats that are used as they are.
    Floats,
}

/// What turns text to tokens and back.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Text {
    /// The whole `tokenizer.json`.
    pub tokenizer: String,
    /// What errors call it.
    pub tokenizer_file: String,
    /// The tokens that begin and end a text.
    pub special: SpecialTokens,
    /// The token that ends a turn of a chat, where it is another one.
    pub eot: Option<u32>,
    /// A chat template (Jinja).
    pub chat_template: Option<String>,
}

/// A prompt and the logits at its last position, as training computed them.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Golden {
    /// The prompt.
    pub tokens: Vec<u32>,
    /// The logits, one for each token of the vocabulary.
    pub logits: Vec<f32>,
}

/// What the caller knows and a file may leave open.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// The activation of a GGUF file whose architecture means another one.
    pub hidden_act: Option<Activation>,
    /// The layout of I2_S data, which is that of x86 builds where nothing is said.
    pub i2s: Option<I2sLayout>,
    /// A `tokenizer.json` that takes the place of the file's.
    pub tokenizer: Option<PathBuf>,
    /// Leave tokenizer and chat template out: for looking at weights alone.
    pub without_text: bool,
    /// Take the float weights of a dense model for master weights and quantise
    /// them: a measurement, since the quality collapses.
    pub ptq: bool,
}

/// A model that cannot be read; every message begins with the path.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum ModelError {
    /// A Hugging Face folder.
    #[error(transparent)]
    Hf(#[from] HfError),
    /// A GGUF file.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// A tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// There is nothing of that name.
    #[error("{}: there is no such folder", .0.display())]
    NoFolder(PathBuf),
    /// A folder without a model.
    #[error(
        "{}: holds no checkpoint (config.json and model.safetensors), and no checkpoints folder \
         with one",
        .0.display()
    )]
    NoCheckpoint(PathBuf),
    /// A model without a tokenizer.
    #[error(
        "{}: holds no tokenizer; --tokenizer FILE gives one (bitnet-export import has it, where \
         another command has not)",
        .0.display()
    )]
    NoTokenizer(PathBuf),
    /// A file that cannot be read.
    #[error("{}: cannot be read", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    /// A part that makes no sense.
    #[error("{}: {what}", path.display())]
    Invalid { path: PathBuf, what: String },
    /// Something that this project does not have.
    #[error("{}: {what}", path.display())]
    Unsupported { path: PathBuf, what: String },
    /// Keys that make no model.
    #[error("{}: the configuration is invalid", path.display())]
    Config { path: PathBuf, source: ConfigError },
    /// A model trained with a recipe that only training knows.
    #[error("{}: was trained with a recipe that cannot be packed", path.display())]
    Recipe { path: PathBuf, source: ConfigError },
    /// A tensor whose data cannot be decoded.
    #[error("{}: tensor {tensor}", path.display())]
    Block { path: PathBuf, tensor: String, source: BlockError },
    /// A packed matrix with a byte that no packing produces.
    #[error("{}: tensor {tensor}", path.display())]
    Matrix { path: PathBuf, tensor: String, source: MatrixError },
    /// A weight that is NaN or infinite.
    #[error("{}: tensor {tensor}, element {at:?}: {value} is not a finite f32", path.display())]
    NotFinite { path: PathBuf, tensor: String, at: Vec<usize>, value: f32 },
}

impl OpenOptions {
    /// Whether they change anything about a packed file of our own.
    #[must_use]
    pub fn is_default(&self) -> bool {
        self.hidden_act.is_none() && self.i2s.is_none() && self.tokenizer.is_none() && !self.ptq
    }
}

/// Opens a model: a Hugging Face folder (or see [`find_checkpoint`]), a GGUF
/// file, or a packed file.
///
/// # Errors
/// A file that is missing, foreign or broken, and a model that this project
/// cannot run; the message names the path and the part.
pub fn open(path: &Path, options: &OpenOptions) -> Result<Box<dyn Source>, ModelError> {
    if path.is_dir() {
        return Ok(Box::new(folder::Folder::open(&find_checkpoint(path)?, options)?));
    }
    let file = gguf_file::GgufFile::open(path)?;
    if file.architecture()? == ARCHITECTURE {
        return Ok(Box::new(packed::Packed::new(file, options)?));
    }
    Ok(Box::new(foreign::Foreign::new(file, options)?))
}

/// Applies [`OpenOptions::ptq`] to a model whose linear layers are these.
fn quantise_later(
    path: &Path,
    options: &OpenOptions,
    config: &mut ModelConfig,
    linears: Linears,
) -> Result<Linears, ModelError> {
    match (options.ptq, linears) {
        (false, linears) => Ok(linears),
        (true, Linears::Floats) => {
            config.weight_quantizer = WeightQuantizer::Ternary;
            Ok(Linears::Masters)
        }
        (true, _) => Err(ModelError::Unsupported {
            path: path.into(),
            what: "the model is ternary already: there is nothing to quantise after training"
                .into(),
        }),
    }
}

/// Refuses what is for GGUF files of other tools: an activation for a file that
/// states its own, a layout of I2_S for one without it.
fn refuse_for_gguf(path: &Path, options: &OpenOptions) -> Result<(), ModelError> {
    if let Some(act) = options.hidden_act {
        return Err(ModelError::Unsupported {
            path: path.into(),
            what: format!("states its activation; {} cannot take its place", act.name()),
        });
    }
    refuse_i2s(path, options)
}

/// Refuses a layout of I2_S for a model that has none.
fn refuse_i2s(path: &Path, options: &OpenOptions) -> Result<(), ModelError> {
    match options.i2s {
        None => Ok(()),
        Some(layout) => Err(ModelError::Unsupported {
            path: path.into(),
            what: format!("holds no I2_S tensors: --i2s {} has no meaning", layout.name()),
        }),
    }
}

/// The text of the tokenizer that takes the place of the file's.
fn given_tokenizer(options: &OpenOptions) -> Result<Option<(String, String)>, ModelError> {
    let Some(path) = &options.tokenizer else { return Ok(None) };
    let text = std::fs::read_to_string(path)
        .map_err(|source| ModelError::Read { path: path.clone(), source })?;
    Ok(Some((text, path.display().to_string())))
}

/// Quantises the master weights of a linear layer, one scale for all of it.
fn quantised(
    source: &dyn Source,
    tensor: Tensor,
    scheme: WeightScheme,
) -> Result<Trits, ModelError> {
    let [rows, cols] = tensor.shape(&source.facts().config);
    let mut weights = vec![0.0; rows * cols];
    source.floats(tensor, 0, &mut weights)?;
    if let Some(at) = weights.iter().position(|x| !x.is_finite()) {
        return Err(ModelError::NotFinite {
            path: source.path().into(),
            tensor: tensor.hf(),
            at: vec![at / cols, at % cols],
            value: weights[at],
        });
    }
    let mut values = vec![0; weights.len()];
    let scale = scheme.quantize_group(&weights, cols, &mut values);
    Ok(Trits { values, scale })
}

/// Checks a prompt and its logits against the model.
fn check_golden(golden: &Golden, config: &ModelConfig) -> Result<(), String> {
    let (tokens, logits) = (&golden.tokens, &golden.logits);
    let (context, vocab) = (config.max_position_embeddings, config.vocab_size);
    if tokens.is_empty() || tokens.len() > context {
        return Err(format!("{} tokens, of 1..={context}", tokens.len()));
    }
    if let Some(t) = tokens.iter().find(|t| **t as usize >= vocab) {
        return Err(format!("token {t}, the model has {vocab}"));
    }
    if logits.len() != vocab {
        return Err(format!("{} logits, the model has {vocab} tokens", logits.len()));
    }
    if let Some(at) = logits.iter().position(|x| !x.is_finite()) {
        return Err(format!("the logit of token {at} is {}", logits[at]));
    }
    Ok(())
}

#[cfg(test)]
mod tests;

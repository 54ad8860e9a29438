//! Hugging Face model folders: `config.json`, safetensors in one file or in
//! shards. What training writes, what export and resume read.

mod checkpoint;
mod config;
mod safetensors;

pub use checkpoint::{Checkpoint, Trits};
pub use config::{HfConfig, PackedScale, SpecialTokens, from_json, to_json};
pub use safetensors::{Stored, TensorFile, TensorFileWriter, TensorSpec, save};

use std::path::{Path, PathBuf};

/// A model folder that cannot be read or written; every message begins with
/// the path, and the cause is its `source`.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum HfError {
    /// Reading failed, or there is no such file.
    #[error("{}: cannot be read", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    /// Writing failed.
    #[error("{}: cannot be written", path.display())]
    Write { path: PathBuf, source: std::io::Error },
    /// Not JSON; the source says at which line.
    #[error("{}: not valid JSON", path.display())]
    Json { path: PathBuf, source: serde_json::Error },
    /// A key is missing or has another type than expected.
    #[error("{}: key {key}: expected {expected}, found {found}", path.display())]
    Key { path: PathBuf, key: String, expected: &'static str, found: String },
    /// A value that asks for something this project does not have.
    #[error("{}: key {key} = {value} is not supported: {reason}", path.display())]
    Unsupported { path: PathBuf, key: String, value: String, reason: String },
    /// The values are of the right types and make no model.
    #[error("{}: the configuration is invalid", path.display())]
    Config { path: PathBuf, source: bitnet_core::ConfigError },
    /// Not a whole safetensors file.
    #[error("{}: not a readable safetensors file: {reason}", path.display())]
    Safetensors { path: PathBuf, reason: String },
    /// A tensor of another shape than the configuration gives it.
    #[error("{}: tensor {tensor}: expected {expected:?}, found {found:?}", path.display())]
    Shape { path: PathBuf, tensor: String, expected: Vec<usize>, found: Vec<usize> },
    /// A tensor that does not hold f32, f16 or bf16 (or, packed, bytes).
    #[error("{}: tensor {tensor}: type {dtype} cannot be read ({expected} can)", path.display())]
    Dtype { path: PathBuf, tensor: String, dtype: String, expected: &'static str },
    /// Tensors that the configuration needs are not there.
    #[error("{}: {count} tensor(s) missing: {names}", path.display())]
    Missing { path: PathBuf, count: usize, names: String },
    /// Tensors that a model of this configuration does not have.
    #[error("{}: {count} unexpected tensor(s): {names}", path.display())]
    Unexpected { path: PathBuf, count: usize, names: String },
}

impl HfError {
    fn read(path: &Path, source: std::io::Error) -> Self {
        Self::Read { path: path.into(), source }
    }

    fn write(path: &Path, source: std::io::Error) -> Self {
        Self::Write { path: path.into(), source }
    }

    fn safetensors(path: &Path, reason: impl ToString) -> Self {
        Self::Safetensors { path: path.into(), reason: reason.to_string() }
    }
}

/// An error and its causes as a binary prints them.
#[cfg(test)]
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |e| e.source());
    causes.fold(error.to_string(), |text, e| format!("{text}: {e}"))
}

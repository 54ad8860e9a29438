//! What can go wrong, and whose fault it is.

use bitnet_core::{ConfigError, Exit, ExitError};
use bitnet_format::gguf::GgufError;
use bitnet_format::pack::PackError;
use bitnet_kernels::IsaError;

/// A model that cannot be opened or run.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum EngineError {
    /// The file is missing or cannot be mapped.
    #[error("{file}: cannot be read")]
    Io { file: String, source: std::io::Error },
    /// The file is not a whole GGUF file, or a key or tensor of it is missing.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// A model of another tool that cannot be packed.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// A key whose value cannot be used.
    #[error("{file}: key {key}: {why}")]
    Key { file: String, key: String, why: String },
    /// The keys describe no possible model.
    #[error("{file}: the configuration is invalid")]
    Config { file: String, source: ConfigError },
    /// A tensor that does not fit the configuration.
    #[error("{file}: tensor {tensor}: {why}")]
    Tensor { file: String, tensor: String, why: String },
    /// The tokenizer in the file cannot be used.
    #[error("{file}: tokenizer: {why}")]
    Tokenizer { file: String, why: String },
    /// The instruction set asked for cannot be used.
    #[error(transparent)]
    Isa(#[from] IsaError),
    /// An option whose value cannot be used.
    #[error("{option} = {value}: {why}")]
    Option { option: &'static str, value: String, why: String },
    /// More tokens than the session has room for.
    #[error(
        "{tokens} tokens do not fit: {position} of the session's {context} positions are in use"
    )]
    Context { tokens: usize, position: usize, context: usize },
    /// There is nothing to run.
    #[error("no token to run: the prompt is empty")]
    Empty,
    /// A token outside the vocabulary.
    #[error("token {token} at position {position} is outside the vocabulary of {vocab_size}")]
    Token { token: u32, position: usize, vocab_size: usize },
    /// A sequence that a batch does not have.
    #[error("sequence {sequence}: the batch has {sequences}, counted from 0")]
    Sequence { sequence: usize, sequences: usize },
    /// A sequence that is given two tokens in one step.
    #[error("sequence {sequence} is given two tokens in one step of a batch")]
    Repeated { sequence: usize },
    /// Logits that cannot be sampled from.
    #[error("the logit of token {token} is {value}: the model's output cannot be sampled")]
    Logit { token: usize, value: f32 },
    /// Text that cannot be encoded.
    #[error("the text cannot be encoded: {why}")]
    Encode { why: String },
    /// The threads could not be started.
    #[error("{threads} threads could not be started: {why}")]
    Threads { threads: usize, why: String },
}

impl EngineError {
    /// The exit code of a binary that ends with this error: bad input for a
    /// file that cannot be run, usage for an option, failed for the rest.
    #[must_use]
    pub fn exit(&self) -> Exit {
        match self {
            Self::Pack(e) => e.exit(),
            Self::Io { .. }
            | Self::Gguf(_)
            | Self::Key { .. }
            | Self::Config { .. }
            | Self::Tensor { .. }
            | Self::Tokenizer { .. }
            | Self::Token { .. } => Exit::BadInput,
            Self::Isa(_)
            | Self::Option { .. }
            | Self::Context { .. }
            | Self::Empty
            | Self::Sequence { .. }
            | Self::Repeated { .. } => Exit::Usage,
            Self::Logit { .. } | Self::Encode { .. } | Self::Threads { .. } => Exit::Failed,
        }
    }
}

impl From<EngineError> for ExitError {
    fn from(error: EngineError) -> Self {
        Self::new(error.exit(), error)
    }
}

//! What can go wrong while scoring or measuring, and the exit code of each.

use std::path::PathBuf;

use bitnet_core::Exit;

/// An error of this crate; its message names the option or file and the numbers.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// The model could not be opened or run.
    #[error(transparent)]
    Engine(#[from] bitnet_engine::EngineError),
    /// The token shards could not be read.
    #[error(transparent)]
    Data(#[from] bitnet_data::DataError),
    /// A file could not be read.
    #[error("{path}: cannot be read")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A file without content.
    #[error("{path}: empty")]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A text file that is not UTF-8.
    #[error("{path}: not UTF-8 text (byte {at})")]
    NotText {
        /// The file.
        path: PathBuf,
        /// The first byte that is wrong.
        at: usize,
    },
    /// The shards were made with another tokenizer than the model's.
    #[error(
        "{data}: tokenised with another tokenizer (sha256 {found}) than the model's ({expected}); \
         its token ids mean other text"
    )]
    Tokenizer {
        /// The folder of shards.
        data: PathBuf,
        /// Hash of the model's tokenizer, in hex.
        expected: String,
        /// Hash recorded in the shards, in hex.
        found: String,
    },
    /// A context longer than the model was made for.
    #[error("context {context} is longer than the model's context of {limit} tokens")]
    LongContext {
        /// What was asked for.
        context: usize,
        /// What the model has.
        limit: usize,
    },
    /// A context the mode cannot use.
    #[error("context {context} is too short for mode {mode}: at least {smallest} tokens")]
    Context {
        /// What was asked for.
        context: usize,
        /// The mode.
        mode: &'static str,
        /// The shortest that works.
        smallest: usize,
    },
    /// A stride the sliding window cannot use.
    #[error("stride {stride} cannot be used with context {context}: 1 to context - 1")]
    Stride {
        /// What was asked for.
        stride: usize,
        /// The context.
        context: usize,
    },
    /// Too little text for one window.
    #[error(
        "{tokens} tokens are too few: mode {mode} with context {context} needs at least {needed}"
    )]
    TooShort {
        /// What there is.
        tokens: u64,
        /// What the mode needs.
        needed: u64,
        /// The mode.
        mode: &'static str,
        /// The context.
        context: usize,
    },
    /// Nothing that counts among what was read.
    #[error("nothing to score: no token counts (mode {mode})")]
    NothingScored {
        /// The mode.
        mode: &'static str,
    },
    /// Conversations packed into rows, and another mode or context than theirs.
    #[error(
        "mode {mode}, context {context}: conversations packed into rows of {row} inputs are scored \
         row by row, in mode windows with context {row}"
    )]
    Rows {
        /// The mode asked for.
        mode: &'static str,
        /// The context asked for.
        context: usize,
        /// Inputs in a row.
        row: usize,
    },
    /// A row of a task's file that is not what it should be.
    #[error("{path}:{line}: {what}")]
    Row {
        /// The file.
        path: PathBuf,
        /// The line, or the row of a parquet file, counted from 1.
        line: u64,
        /// What was expected and what was found.
        what: String,
    },
    /// A file of a task that is not what it should be.
    #[error("{path}: {what}")]
    TaskFile {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found.
        what: String,
    },
    /// A file that `bitnet-eval bench --json` did not write.
    #[error("{path}: not the JSON of a bench: {why}")]
    BenchFile {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A results file without scores of tasks.
    #[error("{path}: no results of tasks: {why}")]
    ResultsFile {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A page that could not be made.
    #[error("the page could not be made: {0}")]
    Page(String),
    /// Nothing has the name that was given.
    #[error("{name}: no model, no training config, and no name of a file in a folder `configs`")]
    NoSubject {
        /// The name.
        name: String,
    },
    /// A training config that cannot be used.
    #[error("{path}: {what}")]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A picture that could not be drawn.
    #[error("{path}: cannot be drawn: {why}")]
    Plot {
        /// The file.
        path: PathBuf,
        /// Why not.
        why: String,
    },
    /// A result could not be written.
    #[error("{path}: cannot be written")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// An option that makes no sense.
    #[error("{0}")]
    Usage(String),
    /// A log-probability that is no number.
    #[error("token {position} of the sequence has log-probability {value}: the model is broken")]
    NotFinite {
        /// Position in the sequence.
        position: u64,
        /// What came out.
        value: f64,
    },
}

impl EvalError {
    /// The exit code this error stands for.
    #[must_use]
    pub fn exit(&self) -> Exit {
        match self {
            Self::Engine(e) => e.exit(),
            Self::Data(e) => e.exit(),
            Self::Read { .. }
            | Self::Empty { .. }
            | Self::NotText { .. }
            | Self::BenchFile { .. }
            | Self::ResultsFile { .. }
            | Self::NoSubject { .. }
            | Self::Config { .. }
            | Self::Tokenizer { .. }
            | Self::TooShort { .. }
            | Self::NothingScored { .. }
            | Self::Row { .. }
            | Self::TaskFile { .. }
            | Self::NotFinite { .. } => Exit::BadInput,
            Self::Plot { .. } | Self::Write { .. } | Self::Page(_) => Exit::Failed,
            Self::LongContext { .. }
            | Self::Context { .. }
            | Self::Stride { .. }
            | Self::Rows { .. }
            | Self::Usage(_) => Exit::Usage,
        }
    }
}

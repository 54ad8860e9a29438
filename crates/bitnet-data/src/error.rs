//! The one error type of the crate, and the exit code each kind stands for.

use std::io;
use std::path::{Path, PathBuf};

use bitnet_core::exit::Exit;

/// What can go wrong between a text and a batch. Every message names the file
/// (and the line, row or token where there is one) and the numbers involved.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// An input cannot be read.
    #[error("{}: cannot be read", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// An output cannot be written; the source's message names the path.
    #[error("cannot be written")]
    Write(#[source] io::Error),
    /// A file is not what it should be.
    #[error("{}: {what}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found.
        what: String,
    },
    /// A line of a text file is not what it should be.
    #[error("{}:{line}: {what}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: u64,
        /// What was expected and what was found.
        what: String,
    },
    /// A conversation cannot be rendered.
    #[error("{name}: {what}")]
    Conversation {
        /// Where it comes from: a file and a line.
        name: String,
        /// What is wrong with it.
        what: String,
    },
    /// The sources hold no usable text.
    #[error("{what}")]
    Empty {
        /// Where text was looked for and what would help.
        what: String,
    },
    /// The tokenizer cannot be trained or cannot encode a text.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// An option has a value that cannot be used.
    #[error("{option}: {what}")]
    Option {
        /// The option's name on the command line.
        option: &'static str,
        /// What is wrong with its value.
        what: String,
    },
    /// The output folder holds something else.
    #[error("{}: {what}", path.display())]
    Output {
        /// The output folder.
        path: PathBuf,
        /// How it differs.
        what: String,
    },
    /// The user asked to stop; nothing that was finished is lost.
    #[error("interrupted")]
    Interrupted,
}

impl DataError {
    /// The exit code of a command that fails with this error.
    #[must_use]
    pub fn exit(&self) -> Exit {
        match self {
            Self::Read { .. }
            | Self::File { .. }
            | Self::Line { .. }
            | Self::Conversation { .. }
            | Self::Empty { .. } => Exit::BadInput,
            Self::Option { .. } | Self::Output { .. } => Exit::Usage,
            Self::Write(_) | Self::Tokenizer(_) => Exit::Failed,
            Self::Interrupted => Exit::Interrupted,
        }
    }

    pub(crate) fn read(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        |source| Self::Read { path: path.to_path_buf(), source }
    }

    pub(crate) fn file(path: &Path, what: impl Into<String>) -> Self {
        Self::File { path: path.to_path_buf(), what: what.into() }
    }

    pub(crate) fn line(path: &Path, line: u64, what: impl Into<String>) -> Self {
        Self::Line { path: path.to_path_buf(), line, what: what.into() }
    }

    pub(crate) fn option(option: &'static str, what: impl Into<String>) -> Self {
        Self::Option { option, what: what.into() }
    }
}

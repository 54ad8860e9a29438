//! What can go wrong in training, and the exit code each error stands for.

use std::io;
use std::path::{Path, PathBuf};

use bitnet_core::{ConfigError, Exit};
use bitnet_data::DataError;
use bitnet_format::hf::HfError;
use bitnet_format::model::ModelError;

/// An error of this crate. Each message names the file, key or step it is about.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// A config file that is not there.
    #[error(
        "config {name}: no such file, and none of that name in a `configs` folder here or above the program"
    )]
    NoConfig {
        /// What `--config` said.
        name: String,
    },
    /// A config file whose text is not a config.
    #[error("{}:{line}: {what}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// The key and what is wrong with it.
        what: String,
    },
    /// A `--set` that cannot be applied.
    #[error("--set {text}: {what}")]
    Override {
        /// What `--set` said.
        text: String,
        /// What is wrong with it.
        what: String,
    },
    /// A config whose values do not go together.
    #[error("{key} = {value}: {reason}")]
    Value {
        /// The key, with its table.
        key: &'static str,
        /// Its value, as text.
        value: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A model that cannot exist.
    #[error(transparent)]
    Model(#[from] ConfigError),
    /// A device that this program was not built for, or a name that is none.
    #[error("--device {name}: {reason}")]
    DeviceName {
        /// What `--device` said.
        name: String,
        /// What is wrong with it, and what would help.
        reason: String,
    },
    /// A device that is compiled in but cannot be used here.
    #[error("--device {name}: cannot be opened: {reason}")]
    DeviceLost {
        /// What `--device` said.
        name: String,
        /// What its driver said.
        reason: String,
    },
    /// A device that failed in the middle of a step.
    #[error("a device of --device stopped computing: {0}")]
    DeviceStopped(String),
    /// The run folder holds something that this command must not touch.
    #[error("run folder {}: {what}", path.display())]
    RunFolder {
        /// The folder.
        path: PathBuf,
        /// What it holds and what to do.
        what: String,
    },
    /// A folder that is to be read as a run and is none.
    #[error("{}: no run folder: {what}", path.display())]
    NoRun {
        /// The folder.
        path: PathBuf,
        /// What it lacks.
        what: String,
    },
    /// A sweep that asks for runs that cannot be.
    #[error("{0}")]
    Sweep(String),
    /// Runs that cannot be compared by size.
    #[error("{0}")]
    Scaling(String),
    /// A report that could not be made.
    #[error("report: {0}")]
    Report(String),
    /// A checkpoint that cannot be gone on from.
    #[error("checkpoint {}: {what}", path.display())]
    Checkpoint {
        /// The checkpoint's folder or the file in it.
        path: PathBuf,
        /// What was expected and what was found.
        what: String,
    },
    /// The tokens cannot be used.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A checkpoint's model cannot be read or written.
    #[error(transparent)]
    Format(#[from] HfError),
    /// A model to start from, or a teacher, that cannot be read.
    #[error(transparent)]
    Start(#[from] ModelError),
    /// The processes of a run cannot work together.
    #[error("ranks: {0}")]
    Ranks(String),
    /// Something could not be read or written; the message names the path.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The plot could not be drawn.
    #[error("plot {}: {what}", path.display())]
    Plot {
        /// The file.
        path: PathBuf,
        /// What the drawing library said.
        what: String,
    },
    /// The loss or a gradient is not a number any more.
    #[error("{what} is {value} at step {step}; {}", last_good(checkpoint.as_deref()))]
    NonFinite {
        /// "the loss" or "the gradient's norm".
        what: &'static str,
        /// NaN or an infinity.
        value: f64,
        /// The step that would have been the next one, counted from 1.
        step: u64,
        /// The newest checkpoint, saved before that step.
        checkpoint: Option<PathBuf>,
    },
    /// The user asked to stop; a checkpoint was saved.
    #[error(
        "interrupted after step {step}; saved {}; go on with: bitnet-train --resume --run {}",
        checkpoint.display(), run_dir.display()
    )]
    Interrupted {
        /// Complete steps.
        step: u64,
        /// The checkpoint that was saved.
        checkpoint: PathBuf,
        /// The run folder.
        run_dir: PathBuf,
    },
}

fn last_good(checkpoint: Option<&Path>) -> String {
    match checkpoint {
        Some(path) => format!("the last good checkpoint is {}", path.display()),
        None => "no checkpoint had been saved".to_owned(),
    }
}

impl TrainError {
    /// The exit code of a command that fails with this error.
    #[must_use]
    pub fn exit(&self) -> Exit {
        match self {
            Self::NoConfig { .. }
            | Self::Config { .. }
            | Self::Override { .. }
            | Self::Value { .. }
            | Self::Model(_)
            | Self::DeviceName { .. }
            | Self::RunFolder { .. }
            | Self::Sweep(_)
            | Self::Scaling(_)
            | Self::Ranks(_) => Exit::Usage,
            Self::Format(HfError::Write { .. }) => Exit::Failed,
            Self::Checkpoint { .. } | Self::Format(_) | Self::Start(_) | Self::NoRun { .. } => {
                Exit::BadInput
            }
            Self::Data(e) => e.exit(),
            Self::DeviceLost { .. }
            | Self::DeviceStopped(_)
            | Self::Io(_)
            | Self::Plot { .. }
            | Self::Report(_)
            | Self::NonFinite { .. } => Exit::Failed,
            Self::Interrupted { .. } => Exit::Interrupted,
        }
    }

    pub(crate) fn value(
        key: &'static str,
        value: impl ToString,
        reason: impl Into<String>,
    ) -> Self {
        Self::Value { key, value: value.to_string(), reason: reason.into() }
    }

    /// Refuses a value outside `low..below`.
    pub(crate) fn check_range(key: &'static str, v: f64, low: f64, below: f64) -> Result<(), Self> {
        if v >= low && v < below {
            return Ok(());
        }
        let low = if low > 0.0 { "greater than 0".into() } else { format!("at least {low}") };
        Err(Self::value(key, v, format!("must be {low} and less than {below}")))
    }

    pub(crate) fn checkpoint(path: &Path, what: impl Into<String>) -> Self {
        Self::Checkpoint { path: path.to_path_buf(), what: what.into() }
    }
}

/// The same kind of error with the path before its text.
pub(crate) fn with_path(path: &Path) -> impl FnOnce(io::Error) -> io::Error + '_ {
    |e| io::Error::new(e.kind(), format!("{}: {e}", path.display()))
}

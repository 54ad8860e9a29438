//! What can go wrong in an export, and whose fault it is.

use std::io;
use std::path::{Path, PathBuf};

use bitnet_core::{ConfigError, Exit, ExitError, Layout};
use bitnet_engine::EngineError;
use bitnet_format::gguf::GgufError;
use bitnet_format::gguf::blocks::BlockError;
use bitnet_format::hf::HfError;
use bitnet_format::model::ModelError;
use bitnet_format::pack::{DenseType, PackError};
use bitnet_format::tokenizer::TokenizerError;

use crate::format::Format;

/// An export that failed. Nothing lies under the destination's name that did
/// not lie there before.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum ExportError {
    /// A folder stands where the file should go.
    #[error("{}: is a folder, the name of a file is needed", .0.display())]
    DestinationIsFolder(PathBuf),
    /// A training config that is nowhere.
    #[error("no config {0}: neither a file nor a name in a folder `configs`")]
    NoConfig(String),
    /// A training config without a usable `[model]` table.
    #[error("{}: {what}", path.display())]
    Config { path: PathBuf, what: String },
    /// A change of the config that is none.
    #[error("--set {text}: {what}")]
    Set { text: String, what: String },
    /// A model that cannot exist.
    #[error(transparent)]
    Shape(#[from] ConfigError),
    /// The disk is too small for the file.
    #[error("{}: needs {needs} bytes, the disk has {has} free", path.display())]
    Space { path: PathBuf, needs: u64, has: u64 },
    /// A folder that holds something else, or the source, stands where a folder
    /// should go.
    #[error("{}: holds something that must not be replaced by a model folder", .0.display())]
    DestinationHoldsOther(PathBuf),
    /// A form that cannot hold the model.
    #[error("--format {format} cannot hold this model: {what}")]
    Format { format: Format, what: String },
    /// A type of dense rows that the output does not have.
    #[error("--dense {}: {what}", dense.name())]
    Dense { dense: DenseType, what: String },
    /// A layout that the output does not have.
    #[error("--layout {}: {what}", layout.name())]
    Layout { layout: Layout, what: String },
    /// The model cannot be read.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// What was written cannot be read back.
    #[error("the output cannot be read back")]
    ReadBack(#[source] ModelError),
    /// The folder cannot be written.
    #[error("the model folder")]
    Folder(#[from] HfError),
    /// Its tokenizer cannot be used.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A file beside the weights cannot be read.
    #[error("{}: cannot be read", path.display())]
    Read { path: PathBuf, source: io::Error },
    /// A file beside the weights makes no sense.
    #[error("{}: {what}", path.display())]
    Invalid { path: PathBuf, what: String },
    /// It cannot be packed.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// A matrix could not be encoded.
    #[error("tensor {tensor}")]
    Block { tensor: String, source: BlockError },
    /// The destination cannot be written.
    #[error("{}: cannot be written", path.display())]
    Write { path: PathBuf, source: io::Error },
    /// The container could not be written or read back.
    #[error("the output file")]
    Container(#[from] GgufError),
    /// The file differs from the checkpoint.
    #[error("read back, tensor {tensor}, element {at:?}: expected {expected}, found {found}")]
    Differs { tensor: String, at: Vec<usize>, expected: String, found: String },
    /// The engine cannot run the file.
    #[error("the engine cannot run the packed file")]
    Engine(#[from] EngineError),
    /// The engine's logits are not training's.
    #[error(
        "golden logits: at token {token} training has {expected}, the engine {found}: they differ \
         by {difference:e}, {tolerance:e} is allowed"
    )]
    Golden { token: usize, expected: f32, found: f32, difference: f32, tolerance: f32 },
    /// The engine's logits are near training's, and choose another token.
    #[error(
        "golden logits: training's largest is at token {expected} ({expected_logit}), the \
         engine's at token {found} ({found_logit})"
    )]
    GoldenArgmax { expected: usize, expected_logit: f32, found: usize, found_logit: f32 },
    /// The user broke it off.
    #[error("interrupted")]
    Interrupted,
}

impl ExportError {
    /// The exit code of a binary that ends with this error.
    #[must_use]
    pub fn exit(&self) -> Exit {
        match self {
            Self::Pack(e) => e.exit(),
            Self::Model(_) | Self::Tokenizer(_) | Self::Read { .. } | Self::Invalid { .. } => {
                Exit::BadInput
            }
            Self::DestinationIsFolder(_)
            | Self::DestinationHoldsOther(_)
            | Self::Format { .. }
            | Self::Dense { .. }
            | Self::Layout { .. }
            | Self::NoConfig(_)
            | Self::Config { .. }
            | Self::Set { .. }
            | Self::Shape(_) => Exit::Usage,
            Self::Space { .. }
            | Self::Block { .. }
            | Self::Folder(_)
            | Self::ReadBack(_)
            | Self::Write { .. }
            | Self::Container(_)
            | Self::Differs { .. }
            | Self::Engine(_)
            | Self::Golden { .. }
            | Self::GoldenArgmax { .. } => Exit::Failed,
            Self::Interrupted => Exit::Interrupted,
        }
    }
}

impl From<ExportError> for ExitError {
    fn from(error: ExportError) -> Self {
        Self::new(error.exit(), error)
    }
}

/// Gives an I/O error on the destination its path.
pub(crate) trait Named<T> {
    /// The same result with the path in the error.
    fn named(self, path: &Path) -> Result<T, ExportError>;
}

impl<T> Named<T> for io::Result<T> {
    fn named(self, path: &Path) -> Result<T, ExportError> {
        self.map_err(|source| ExportError::Write { path: path.into(), source })
    }
}

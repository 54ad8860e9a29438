//! Where a model is written: one tensor after the other, in the order of the
//! plan. What is written has no name until it was compared.

mod gguf;
mod hf;
mod packed;

use std::path::Path;

use bitnet_format::atomic::{AtomicDir, AtomicFile};
use bitnet_format::pack::{self, Item, Keys, PackedFile, Plan};

use crate::ExportError;
use crate::error::Named;
use crate::format::Format;

/// An output in one of the forms.
pub(crate) trait Sink: pack::Sink<Error = ExportError> {
    /// Completes the output, but for its name.
    fn finish(self: Box<Self>) -> Result<Unnamed, ExportError>;

    /// Bytes of a ternary item and its scale.
    fn ternary_bytes(&self, item: &Item) -> u64;

    /// How many tensors there are.
    fn tensors(&self) -> u64;
}

/// A complete output without its name.
pub(crate) enum Unnamed {
    File(AtomicFile),
    Folder(AtomicDir),
}

impl Unnamed {
    /// Where it lies.
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::File(file) => file.temp_path(),
            Self::Folder(folder) => folder.path(),
        }
    }

    /// Bytes of the file, or of all files of the folder.
    pub(crate) fn bytes(&self) -> std::io::Result<u64> {
        match self {
            Self::File(file) => Ok(std::fs::metadata(file.temp_path())?.len()),
            Self::Folder(folder) => {
                std::fs::read_dir(folder.path())?.map(|entry| Ok(entry?.metadata()?.len())).sum()
            }
        }
    }

    /// Gives it its name.
    pub(crate) fn commit(self) -> std::io::Result<()> {
        match self {
            Self::File(file) => file.commit(),
            Self::Folder(folder) => folder.commit(),
        }
    }
}

/// Blocks of integers for a form that has none.
fn no_rows(format: Format, item: &Item) -> ExportError {
    let what = format!("tensor {}: only packed files have rows of integers", item.hf);
    ExportError::Format { format, what }
}

/// Opens an output in the form `format` that is to be called `dst`.
pub(crate) fn create(
    format: Format,
    dst: &Path,
    keys: &Keys<'_>,
    plan: &Plan,
) -> Result<Box<dyn Sink>, ExportError> {
    if format.is_folder() {
        return Ok(Box::new(hf::Folder::create(format, dst, keys, plan)?));
    }
    let file = AtomicFile::create(dst).named(dst)?;
    match format.ternary_type() {
        None => Ok(Box::new(packed::Packed(PackedFile::start(file, keys, plan)?))),
        Some(ty) => Ok(Box::new(gguf::Gguf::create(file, format, ty, keys, plan)?)),
    }
}

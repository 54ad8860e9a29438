//! What an export reads: the model that a path names.

use std::fs;
use std::path::{Path, PathBuf};

use bitnet_format::model::{self, OpenOptions, Source};

use crate::ExportError;

/// The checkpoint that a path names: the folder itself where it holds one, else
/// the newest (the highest step) in it or in its `checkpoints` folder.
///
/// # Errors
/// A path that is no folder, or a folder without a checkpoint.
pub fn find_checkpoint(path: &Path) -> Result<PathBuf, ExportError> {
    if !path.is_dir() {
        return Err(ExportError::NoFolder(path.into()));
    }
    if holds_weights(path) {
        return Ok(path.into());
    }
    let inside = [path.join("checkpoints"), path.to_path_buf()];
    let newest = inside.iter().find_map(|folder| newest(folder));
    if let Some(found) = newest {
        return Ok(found);
    }
    // A folder with a configuration was meant to be one: opening it will say
    // what is missing.
    if path.join("config.json").exists() {
        return Ok(path.into());
    }
    Err(ExportError::NoCheckpoint(path.into()))
}

/// Opens the model that a path names: a GGUF file, or see [`find_checkpoint`].
pub(crate) fn open(path: &Path, options: &OpenOptions) -> Result<Box<dyn Source>, ExportError> {
    if path.is_file() {
        return Ok(model::open(path, options)?);
    }
    Ok(model::open(&find_checkpoint(path)?, options)?)
}

fn holds_weights(folder: &Path) -> bool {
    ["model.safetensors", "model.safetensors.index.json"].iter().any(|f| folder.join(f).exists())
}

/// The folder with the highest number as its name that holds weights.
fn newest(folder: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(folder).ok()?.flatten();
    entries
        .filter_map(|e| Some((e.file_name().to_str()?.parse::<u64>().ok()?, e.path())))
        .filter(|(_, path)| holds_weights(path))
        .max()
        .map(|(_, path)| path)
}

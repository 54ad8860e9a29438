//! Which folder a path means: a model's own, or the newest checkpoint of a run.

use std::fs;
use std::path::{Path, PathBuf};

use super::ModelError;

/// The folder of a model that a path names: the path itself where it holds one,
/// else the newest checkpoint (the highest step) in it or in its `checkpoints`
/// folder.
///
/// # Errors
/// A path that is no folder, or a folder without a model.
pub fn find_checkpoint(path: &Path) -> Result<PathBuf, ModelError> {
    if !path.is_dir() {
        return Err(ModelError::NoFolder(path.into()));
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
    Err(ModelError::NoCheckpoint(path.into()))
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

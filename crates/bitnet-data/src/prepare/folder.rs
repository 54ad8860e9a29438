//! The output folder: what in it is ours, and how it is emptied.

use std::fs;
use std::io;
use std::path::Path;

use super::journal::JOURNAL_FILE;
use crate::dataset::Split;
use crate::error::DataError;
use crate::manifest::{MANIFEST_FILE, TEMPLATE_FILE, TOKENIZER_FILE};
use crate::part::KEYS_FILE;

/// Removes what an earlier, perhaps unfinished, run left, all but the files that
/// `keep` names: the manifest first.
pub(crate) fn clear(folder: &Path, keep: &[String]) -> Result<(), DataError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(write_error(folder, e)),
    };
    let remove = |path: &Path| match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(write_error(path, e)),
        _ => Ok(()),
    };
    remove(&folder.join(MANIFEST_FILE))?;
    for entry in entries {
        let path = entry.map_err(|e| write_error(folder, e))?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or("");
        // An unfinished file is called `.NAME.tmp-…`.
        let final_name =
            name.strip_prefix('.').and_then(|n| Some(n.split_once(".tmp-")?.0)).unwrap_or(name);
        if is_ours(final_name) && !(final_name == name && keep.iter().any(|k| k == name)) {
            remove(&path)?;
        }
    }
    Ok(())
}

fn is_ours(name: &str) -> bool {
    let is_shard = |split: Split| {
        name.strip_prefix(split.name())
            .and_then(|n| n.strip_prefix('-')?.strip_suffix(".bin"))
            .is_some_and(|n| n.len() == 5 && n.bytes().all(|b| b.is_ascii_digit()))
    };
    name == TOKENIZER_FILE
        || name == MANIFEST_FILE
        || name == JOURNAL_FILE
        || name == KEYS_FILE
        || name == TEMPLATE_FILE
        || is_shard(Split::Train)
        || is_shard(Split::Validation)
}

pub(crate) fn write_error(path: &Path, e: io::Error) -> DataError {
    DataError::Write(io::Error::new(e.kind(), format!("{}: {e}", path.display())))
}

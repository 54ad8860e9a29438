//! Files and folders named by the user, resolved into a fixed list of inputs.

use std::fs;
use std::path::Path;
use std::time::UNIX_EPOCH;

use walkdir::WalkDir;

use super::jsonl::Compression;
use super::{FileOptions, Input, Kind};
use crate::error::DataError;

/// Endings taken from folders without being asked for.
const TEXT_ENDINGS: [&str; 2] = ["txt", "md"];

pub(super) fn find(options: &FileOptions) -> Result<Vec<Input>, DataError> {
    let mut inputs = Vec::new();
    for path in &options.paths {
        let meta = fs::metadata(path).map_err(DataError::read(path))?;
        if meta.is_dir() {
            find_in_folder(path, options, &mut inputs)?;
        } else {
            let kind = kind_of(path).unwrap_or(Kind::Text);
            inputs.push(input(path, kind, &meta));
        }
    }
    // The order of the command line is not part of the corpus.
    inputs.sort_by(|a, b| a.path.cmp(&b.path));
    if inputs.is_empty() {
        let mut endings: Vec<&str> = TEXT_ENDINGS.to_vec();
        endings.extend(["jsonl", "jsonl.zst", "jsonl.gz", "parquet"]);
        endings.extend(options.extensions.iter().map(String::as_str));
        let paths: Vec<String> = options.paths.iter().map(|p| p.display().to_string()).collect();
        return Err(DataError::Empty {
            what: format!(
                "{}: no file that ends in .{}; name other endings with --ext",
                paths.join(", "),
                endings.join(", .")
            ),
        });
    }
    Ok(inputs)
}

/// The files of lines of JSON among them; naming another file is an error, in a
/// folder others are passed over.
pub(super) fn find_conversations(options: &FileOptions) -> Result<Vec<Input>, DataError> {
    let is_lines = |input: &Input| matches!(input.kind, Kind::Jsonl(_));
    let named = |input: &Input| options.paths.contains(&input.path);
    let mut inputs = find(options)?;
    if let Some(other) = inputs.iter().find(|i| named(i) && !is_lines(i)) {
        let what = "conversations are read from .jsonl, .jsonl.zst and .jsonl.gz";
        return Err(DataError::file(&other.path, what));
    }
    inputs.retain(is_lines);
    if inputs.is_empty() {
        let paths: Vec<String> = options.paths.iter().map(|p| p.display().to_string()).collect();
        let what =
            format!("{}: no file that ends in .jsonl, .jsonl.zst, .jsonl.gz", paths.join(", "));
        return Err(DataError::Empty { what });
    }
    Ok(inputs)
}

fn find_in_folder(
    folder: &Path,
    options: &FileOptions,
    into: &mut Vec<Input>,
) -> Result<(), DataError> {
    for entry in WalkDir::new(folder).follow_links(true).sort_by_file_name() {
        let entry = entry.map_err(|e| walk_error(folder, e))?;
        if !entry.file_type().is_file() {
            continue;
        }
        let path = entry.path();
        let ending = path.extension().and_then(|e| e.to_str()).unwrap_or("");
        let is_text =
            TEXT_ENDINGS.contains(&ending) || options.extensions.iter().any(|e| e == ending);
        let kind = kind_of(path).or(is_text.then_some(Kind::Text));
        if let Some(kind) = kind {
            let meta = entry.metadata().map_err(|e| walk_error(folder, e))?;
            into.push(input(path, kind, &meta));
        }
    }
    Ok(())
}

/// The kind that an ending alone decides.
fn kind_of(path: &Path) -> Option<Kind> {
    let name = path.file_name()?.to_str()?;
    let kinds = [
        (".jsonl", Kind::Jsonl(Compression::None)),
        (".jsonl.gz", Kind::Jsonl(Compression::Gzip)),
        (".jsonl.zst", Kind::Jsonl(Compression::Zstd)),
        (".parquet", Kind::Parquet),
    ];
    kinds.into_iter().find(|(ending, _)| name.ends_with(ending)).map(|(_, kind)| kind)
}

fn input(path: &Path, kind: Kind, meta: &fs::Metadata) -> Input {
    let modified = meta
        .modified()
        .ok()
        .and_then(|t| t.duration_since(UNIX_EPOCH).ok())
        .map_or(0, |d| d.as_nanos());
    Input {
        path: path.to_path_buf(),
        name: path.display().to_string(),
        kind,
        size: meta.len(),
        modified,
    }
}

pub(super) fn walk_error(folder: &Path, error: walkdir::Error) -> DataError {
    let path = error.path().unwrap_or(folder).to_path_buf();
    let source = error
        .into_io_error()
        .unwrap_or_else(|| std::io::Error::other("a link that leads back to itself"));
    DataError::Read { path, source }
}

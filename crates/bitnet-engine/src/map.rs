//! The one memory map: a model file's bytes without reading them.

use std::fs::File;
use std::io;
use std::path::Path;

use memmap2::{Advice, Mmap};

/// Maps a file, read-only.
///
/// The file must not be truncated or written while it is mapped; files of this
/// project are replaced by rename, which leaves an open map as it was.
#[allow(unsafe_code)]
pub(crate) fn map(path: &Path, prefetch: bool) -> io::Result<Mmap> {
    let file = File::open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
    }
    // SAFETY: the map is read-only and private to this process. That no other
    // process shrinks or rewrites the file in place is the documented condition
    // of `Model::open`.
    let map = unsafe { Mmap::map(&file)? };
    if prefetch && !map.is_empty() {
        #[cfg(unix)]
        if let Err(e) = map.advise(Advice::WillNeed) {
            tracing::debug!("read-ahead is not available: {e}");
        }
    }
    Ok(map)
}

//! The one memory map of the project: a file's bytes without reading them.

use std::fs::File;
use std::io;
use std::path::Path;

pub use memmap2::Mmap;

/// Maps a regular file, read-only. `prefetch` asks the system to read it ahead.
///
/// The file must not be truncated or written in place while it is mapped. Files of
/// this project are replaced by rename ([`crate::atomic`]), which leaves an open map
/// as it was.
///
/// # Errors
/// The file cannot be opened, is not a regular file, or cannot be mapped.
pub fn map(path: &Path, prefetch: bool) -> io::Result<Mmap> {
    map_file(&File::open(path)?, prefetch)
}

/// [`map`] of an open file, which may have no name.
///
/// # Errors
/// As [`map`].
#[allow(unsafe_code)]
pub fn map_file(file: &File, prefetch: bool) -> io::Result<Mmap> {
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
    }
    // SAFETY: the map is read-only and private to this process. That no other
    // process shrinks or rewrites the file in place is the documented condition.
    let map = unsafe { Mmap::map(file)? };
    #[cfg(unix)]
    if prefetch && !map.is_empty() {
        // Advice alone: without it the pages are read on use.
        let _ = map.advise(memmap2::Advice::WillNeed);
    }
    Ok(map)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_files_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        std::fs::write(&path, b"bytes").unwrap();
        for prefetch in [false, true] {
            assert_eq!(&map(&path, prefetch).unwrap()[..], b"bytes");
        }
        assert!(map(dir.path(), false).is_err());
        assert!(map(&dir.path().join("none"), false).is_err());
    }
}

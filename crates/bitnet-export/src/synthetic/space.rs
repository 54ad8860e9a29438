//! Whether the disk has room, asked before minutes of writing.

use std::io;
use std::path::Path;

use crate::ExportError;

/// Refuses a destination whose disk has less than `needs` bytes free. Where the
/// system does not tell, nothing is refused: writing will fail when it is full.
pub(crate) fn check(dst: &Path, needs: u64) -> Result<(), ExportError> {
    // The destination's folder may not be there yet; its disk is.
    let folder = dst.ancestors().skip(1).find(|p| p.exists());
    match free(folder.unwrap_or(Path::new("."))) {
        Ok(Some(has)) if has < needs => Err(ExportError::Space { path: dst.into(), needs, has }),
        Ok(_) => Ok(()),
        Err(error) => {
            tracing::debug!(%error, "free space is not known");
            Ok(())
        }
    }
}

/// Bytes that this user may still write.
#[cfg(unix)]
fn free(folder: &Path) -> io::Result<Option<u64>> {
    let stat = nix::sys::statvfs::statvfs(folder)?;
    // The fields' types differ between systems.
    #[allow(clippy::useless_conversion, clippy::unnecessary_cast)]
    let (all, blocks, size) =
        (stat.blocks() as u64, stat.blocks_available() as u64, stat.fragment_size() as u64);
    // A file system of no size at all does not count its blocks.
    Ok((all > 0).then(|| blocks.saturating_mul(size)))
}

#[cfg(not(unix))]
fn free(_: &Path) -> io::Result<Option<u64>> {
    Ok(None)
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_refused_with_both_numbers() {
        let dir = tempfile::tempdir().unwrap();
        let dst = dir.path().join("not/yet/there.gguf");
        check(&dst, 1).unwrap();
        check(Path::new("here.gguf"), 1).unwrap();
        let e = check(&dst, u64::MAX).unwrap_err();
        assert_eq!(e.exit(), bitnet_core::Exit::Failed);
        let text = e.to_string();
        assert!(text.contains(&format!("needs {} bytes, the disk has ", u64::MAX)), "{text}");
        assert!(!dir.path().join("not").exists());
    }
}

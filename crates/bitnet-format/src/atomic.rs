//! Files and folders that appear under their final name only when complete.
//! Everything the project writes and later reads goes through here: a kill at
//! any moment leaves the old content or none, never half of the new one.
//!
//! The content is written beside its destination (a rename is atomic only
//! within one file system), flushed to the disk, then renamed.

use std::fs::{self, File};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Bytes gathered before a write reaches the file.
const BUFFER: usize = 1 << 18;

/// A file that is being written and has no name yet.
///
/// Dropping it without [`AtomicFile::commit`] removes what was written.
#[derive(Debug)]
pub struct AtomicFile {
    writer: BufWriter<tempfile::NamedTempFile>,
    dest: PathBuf,
}

impl AtomicFile {
    /// Opens a temporary file in the folder of `path`, creating that folder
    /// where it is missing.
    ///
    /// # Errors
    /// Any I/O error, with the path in its message; `path` being a folder.
    pub fn create(path: impl AsRef<Path>) -> io::Result<Self> {
        let dest = path.as_ref().to_path_buf();
        let (folder, name) = split(&dest)?;
        if dest.is_dir() {
            let e = io::Error::new(io::ErrorKind::IsADirectory, "is a folder");
            return Err(with_path(e, &dest));
        }
        fs::create_dir_all(folder).map_err(|e| with_path(e, folder))?;
        let prefix = format!(".{name}.tmp-");
        let mut builder = tempfile::Builder::new();
        builder.prefix(&prefix);
        // Temporary files are 0600 otherwise, and the rename would keep that;
        // the process's umask still applies.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let temp = builder.tempfile_in(folder).map_err(|e| with_path(e, &dest))?;
        Ok(Self { writer: BufWriter::with_capacity(BUFFER, temp), dest })
    }

    /// Where the unfinished content lies, for a reader that checks it before
    /// it is committed. Call [`AtomicFile::flush`] first.
    pub fn temp_path(&self) -> &Path {
        self.writer.get_ref().path()
    }

    /// The name the file gets on commit.
    pub fn dest(&self) -> &Path {
        &self.dest
    }

    /// Makes the content durable, then visible under its final name, replacing
    /// what was there.
    ///
    /// # Errors
    /// Any I/O error, with the path in its message; the temporary file is gone
    /// and the old content untouched.
    pub fn commit(self) -> io::Result<()> {
        let Self { writer, dest } = self;
        let temp = writer.into_inner().map_err(|e| with_path(e.into_error(), &dest))?;
        temp.as_file().sync_all().map_err(|e| with_path(e, &dest))?;
        temp.persist(&dest).map_err(|e| with_path(e.error, &dest))?;
        sync_folder(split(&dest)?.0).map_err(|e| with_path(e, &dest))
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.writer.write(bytes).map_err(|e| with_path(e, &self.dest))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush().map_err(|e| with_path(e, &self.dest))
    }
}

impl Seek for AtomicFile {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.writer.seek(to)
    }
}

/// Writes a file in one go: `fill` gets a buffered writer, and `path` appears
/// only when it has returned without an error.
///
/// # Errors
/// What `fill` returns, or any I/O error, with the path in its message.
pub fn write_atomic<F>(path: impl AsRef<Path>, fill: F) -> io::Result<()>
where
    F: FnOnce(&mut BufWriter<File>) -> io::Result<()>,
{
    let file = AtomicFile::create(&path)?;
    let dest = path.as_ref();
    let mut writer = BufWriter::with_capacity(
        BUFFER,
        file.writer.get_ref().as_file().try_clone().map_err(|e| with_path(e, dest))?,
    );
    fill(&mut writer).and_then(|()| writer.flush()).map_err(|e| with_path(e, dest))?;
    file.commit()
}

/// A folder that is being filled under a temporary name, `.<name>.tmp-<pid>`
/// beside its destination.
///
/// Dropping it without [`AtomicDir::commit`] removes it.
#[derive(Debug)]
pub struct AtomicDir {
    temp: PathBuf,
    dest: PathBuf,
    committed: bool,
}

impl AtomicDir {
    /// Makes the temporary folder, and the parents of `path`.
    ///
    /// # Errors
    /// Any I/O error, with the path in its message.
    pub fn create(path: impl AsRef<Path>) -> io::Result<Self> {
        let dest = path.as_ref().to_path_buf();
        let (parent, name) = split(&dest)?;
        fs::create_dir_all(parent).map_err(|e| with_path(e, parent))?;
        let temp = parent.join(format!(".{name}.tmp-{}", std::process::id()));
        // A process of the same id, long dead, may have left one.
        remove_tree(&temp)?;
        fs::create_dir(&temp).map_err(|e| with_path(e, &temp))?;
        Ok(Self { temp, dest, committed: false })
    }

    /// The folder to write into.
    pub fn path(&self) -> &Path {
        &self.temp
    }

    /// Makes every file in the folder durable, then gives it its final name.
    /// A folder already there is replaced; between the two renames that this
    /// takes, it lies beside under `.<name>.old-<pid>`.
    ///
    /// # Errors
    /// Any I/O error, with the path in its message; the old folder stays.
    pub fn commit(mut self) -> io::Result<()> {
        sync_tree(&self.temp)?;
        let (parent, name) = split(&self.dest)?;
        let old = parent.join(format!(".{name}.old-{}", std::process::id()));
        let replaces = self.dest.exists();
        if replaces {
            remove_tree(&old)?;
            fs::rename(&self.dest, &old).map_err(|e| with_path(e, &self.dest))?;
        }
        if let Err(e) = fs::rename(&self.temp, &self.dest) {
            if replaces {
                fs::rename(&old, &self.dest).map_err(|e| with_path(e, &self.dest))?;
            }
            return Err(with_path(e, &self.dest));
        }
        self.committed = true;
        sync_folder(parent).map_err(|e| with_path(e, parent))?;
        if replaces {
            remove_tree(&old)?;
        }
        Ok(())
    }
}

impl Drop for AtomicDir {
    fn drop(&mut self) {
        if !self.committed {
            let _ = fs::remove_dir_all(&self.temp);
        }
    }
}

/// The folder a path lies in and its last component.
fn split(path: &Path) -> io::Result<(&Path, &str)> {
    let name = path.file_name().and_then(|n| n.to_str()).ok_or_else(|| {
        let e = io::Error::new(io::ErrorKind::InvalidInput, "names no file (in UTF-8)");
        with_path(e, path)
    })?;
    let folder = match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    Ok((folder, name))
}

/// The same kind of error with the path before its text, once.
fn with_path(e: io::Error, path: &Path) -> io::Error {
    let path = path.display().to_string();
    let text = e.to_string();
    if text.starts_with(&path) {
        return e;
    }
    io::Error::new(e.kind(), format!("{path}: {text}"))
}

fn remove_tree(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(with_path(e, path)),
        _ => Ok(()),
    }
}

/// Flushes every file below `folder`, then the folders themselves.
fn sync_tree(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder).map_err(|e| with_path(e, folder))? {
        let path = entry.map_err(|e| with_path(e, folder))?.path();
        let kind = fs::symlink_metadata(&path).map_err(|e| with_path(e, &path))?;
        if kind.is_dir() {
            sync_tree(&path)?;
        } else if kind.is_file() {
            // Windows flushes only through a handle opened for writing.
            let file = fs::OpenOptions::new().read(true).write(true).open(&path);
            file.and_then(|f| f.sync_all()).map_err(|e| with_path(e, &path))?;
        }
    }
    sync_folder(folder).map_err(|e| with_path(e, folder))
}

/// A rename is durable when the folder that holds the name is.
#[cfg(unix)]
fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Other systems cannot open a folder as a file.
#[cfg(not(unix))]
fn sync_folder(_folder: &Path) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut v: Vec<String> = fs::read_dir(folder)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        v.sort();
        v
    }

    #[test]
    fn a_file_appears_on_commit_and_replaces() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/a.bin");
        fs::create_dir(dir.path().join("sub")).unwrap();
        fs::write(&path, "old").unwrap();
        let mut f = AtomicFile::create(&path).unwrap();
        f.write_all(b"new content").unwrap();
        f.flush().unwrap();
        assert_eq!(fs::read(f.temp_path()).unwrap(), b"new content");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        f.commit().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new content");
        assert_eq!(names(&dir.path().join("sub")), ["a.bin"]);
    }

    #[test]
    fn a_dropped_or_failed_file_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.bin");
        let mut f = AtomicFile::create(&path).unwrap();
        f.write_all(b"half").unwrap();
        f.flush().unwrap();
        drop(f);
        assert!(names(dir.path()).is_empty());
        let e = write_atomic(&path, |w| {
            w.write_all(b"half")?;
            Err(io::Error::other("no more"))
        })
        .unwrap_err();
        assert_eq!(e.to_string(), format!("{}: no more", path.display()));
        assert!(names(dir.path()).is_empty());
    }

    #[test]
    fn write_atomic_writes_all_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.bin");
        let content = vec![7u8; 3 * BUFFER + 1];
        write_atomic(&path, |w| w.write_all(&content)).unwrap();
        assert_eq!(fs::read(&path).unwrap(), content);
    }

    #[cfg(unix)]
    #[test]
    fn a_committed_file_has_the_usual_permissions() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let (plain, atomic) = (dir.path().join("p"), dir.path().join("a"));
        fs::write(&plain, "x").unwrap();
        write_atomic(&atomic, |w| w.write_all(b"x")).unwrap();
        let mode = |p: &Path| fs::metadata(p).unwrap().permissions().mode();
        assert_eq!(mode(&plain), mode(&atomic));
    }

    #[test]
    fn errors_name_the_path() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "x").unwrap();
        for path in [file.join("below"), dir.path().to_path_buf()] {
            let e = AtomicFile::create(&path).unwrap_err().to_string();
            assert!(e.contains(&file.display().to_string()) || e.contains("is a folder"), "{e}");
        }
        assert!(AtomicFile::create("..").is_err());
    }

    #[test]
    fn a_folder_appears_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let dest = dir.path().join("00000010");
        for round in ["first", "second"] {
            let d = AtomicDir::create(&dest).unwrap();
            fs::create_dir(d.path().join("deep")).unwrap();
            fs::write(d.path().join("deep/x"), round).unwrap();
            d.commit().unwrap();
            assert_eq!(fs::read_to_string(dest.join("deep/x")).unwrap(), round);
            assert_eq!(names(dir.path()), ["00000010"]);
        }
        let d = AtomicDir::create(&dest).unwrap();
        fs::write(d.path().join("y"), "half").unwrap();
        drop(d);
        assert_eq!(names(dir.path()), ["00000010"]);
        assert!(!dest.join("y").exists());
    }
}

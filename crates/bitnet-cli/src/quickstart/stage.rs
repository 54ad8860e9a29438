//! Stages and their stamps: what was made, from what, and whether that still holds.
//!
//! `<dir>/stages/<name>.json` is written as `started` before a stage runs and as
//! `done` after. Its key hashes the command and the content of the inputs, and
//! the key of the stage before: a change anywhere runs all that follows again.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::Context;
use bitnet_format::json::write_json;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// One command of the path, before it runs.
#[derive(Debug)]
pub(crate) struct Stage {
    /// Its name, that of the stamp.
    pub(crate) name: &'static str,
    /// What it does, for the reader.
    pub(crate) title: &'static str,
    /// The program that runs.
    pub(crate) program: &'static str,
    /// Its arguments, without what only changes how it reports or goes on.
    pub(crate) args: Vec<OsString>,
    /// Files whose content decides the result.
    pub(crate) inputs: Vec<PathBuf>,
    /// Files and folders that are there when it is complete.
    pub(crate) outputs: Vec<PathBuf>,
}

/// Whether a stage has run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum State {
    Started,
    Done,
}

/// What is remembered of a stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Stamp {
    pub(crate) key: String,
    pub(crate) state: State,
    /// Time spent, all attempts together.
    pub(crate) seconds: f64,
}

impl Stamp {
    fn path(dir: &Path, stage: &str) -> PathBuf {
        dir.join("stages").join(format!("{stage}.json"))
    }

    /// The stamp of a stage; none where there is none that can be read.
    pub(crate) fn read(dir: &Path, stage: &str) -> Option<Self> {
        let text = std::fs::read_to_string(Self::path(dir, stage)).ok()?;
        serde_json::from_str(&text).ok()
    }

    /// # Errors
    /// The file cannot be written.
    pub(crate) fn write(&self, dir: &Path, stage: &str) -> anyhow::Result<()> {
        let path = Self::path(dir, stage);
        let dest = path.to_str().with_context(|| format!("{}: not UTF-8", path.display()))?;
        write_json(dest, self).context("cannot write the stage's stamp")
    }
}

impl Stage {
    /// The key of this stage after a stage of key `before`.
    ///
    /// # Errors
    /// An input cannot be read.
    pub(crate) fn key(&self, before: &str) -> anyhow::Result<String> {
        let mut hash = Sha256::new();
        let mut field = |bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        field(before.as_bytes());
        field(self.program.as_bytes());
        for arg in &self.args {
            field(arg.as_encoded_bytes());
        }
        for input in &self.inputs {
            let content = std::fs::read(input)
                .with_context(|| format!("{}: cannot be read", input.display()))?;
            field(&content);
        }
        Ok(hex(&hash.finalize()))
    }

    /// Whether all outputs are there.
    pub(crate) fn complete(&self) -> bool {
        self.outputs.iter().all(|p| p.exists())
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stage(args: &[&str], inputs: &[&Path]) -> Stage {
        Stage {
            name: "s",
            title: "t",
            program: "p",
            args: args.iter().map(OsString::from).collect(),
            inputs: inputs.iter().map(|p| p.to_path_buf()).collect(),
            outputs: vec![],
        }
    }

    #[test]
    fn the_key_follows_arguments_inputs_and_what_came_before() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        std::fs::write(&file, "1").unwrap();
        let key = stage(&["a", "b"], &[&file]).key("x").unwrap();
        assert_eq!(stage(&["a", "b"], &[&file]).key("x").unwrap(), key);
        assert_ne!(stage(&["ab"], &[&file]).key("x").unwrap(), key);
        assert_ne!(stage(&["a", "b"], &[&file]).key("y").unwrap(), key);
        std::fs::write(&file, "2").unwrap();
        assert_ne!(stage(&["a", "b"], &[&file]).key("x").unwrap(), key);
        assert!(stage(&[], &[Path::new("missing/x")]).key("x").is_err());
    }

    #[test]
    fn stamps_read_back_and_broken_ones_count_as_none() {
        let dir = tempfile::tempdir().unwrap();
        let stamp = Stamp { key: "k".into(), state: State::Started, seconds: 1.5 };
        stamp.write(dir.path(), "train").unwrap();
        assert_eq!(Stamp::read(dir.path(), "train"), Some(stamp));
        std::fs::write(Stamp::path(dir.path(), "train"), "{").unwrap();
        assert_eq!(Stamp::read(dir.path(), "train"), None);
        assert_eq!(Stamp::read(dir.path(), "export"), None);
    }
}

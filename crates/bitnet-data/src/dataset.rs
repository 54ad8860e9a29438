//! A prepared folder as training and evaluation see it: one split, one long
//! sequence of tokens.

use std::path::{Path, PathBuf};

use crate::error::DataError;
use crate::hash::hex;
use crate::manifest::{Manifest, TOKENIZER_FILE};
use crate::shard::ShardReader;
use crate::stream::Windows;
use crate::tokenizer::Tokenizer;

/// Which part of a corpus.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// What the model learns from.
    Train,
    /// What it is measured on; no document is in both.
    Validation,
}

impl Split {
    /// `train` or `val`, as shard files begin.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Validation => "val",
        }
    }
}

/// One split of a prepared folder, its shards mapped one behind the other.
#[derive(Debug)]
pub struct Dataset {
    folder: PathBuf,
    split: Split,
    manifest: Manifest,
    shards: Vec<ShardReader>,
    /// Where each shard begins in the sequence, and the end of the last.
    starts: Vec<u64>,
}

impl Dataset {
    /// Opens a split and checks the tokenizer and every shard's header against
    /// the manifest; the payloads are not read (see [`verify`](Self::verify)).
    ///
    /// # Errors
    /// [`DataError::Read`] and [`DataError::File`], naming the file and what
    /// differs.
    pub fn open(folder: impl AsRef<Path>, split: Split) -> Result<Self, DataError> {
        let folder = folder.as_ref();
        let manifest = Manifest::load(folder)?;
        let info = match split {
            Split::Train => &manifest.train,
            Split::Validation => &manifest.validation,
        };
        if info.shards.is_empty() {
            let what = format!("has no {} split", split.name());
            return Err(DataError::file(folder, what));
        }
        check_tokenizer(folder, &manifest)?;
        let mut shards = Vec::with_capacity(info.shards.len());
        let mut starts = vec![0u64];
        for expected in &info.shards {
            let path = folder.join(&expected.file);
            let shard = ShardReader::open(&path)?;
            let header = shard.header();
            let differs =
                |what: &str, expected: &dyn std::fmt::Display, found: &dyn std::fmt::Display| {
                    let what = format!("{what}: the manifest says {expected}, the shard {found}");
                    Err(DataError::file(&path, what))
                };
            let found_tokenizer = hex(&header.tokenizer_sha256);
            if found_tokenizer != manifest.tokenizer.sha256 {
                return differs("tokenizer", &manifest.tokenizer.sha256, &found_tokenizer);
            }
            if header.vocab_size != manifest.tokenizer.vocab_size {
                return differs("vocabulary", &manifest.tokenizer.vocab_size, &header.vocab_size);
            }
            let rows = manifest.chat.as_ref().map(|chat| chat.context as u64 + 1);
            let found_rows = header.row_tokens.map(u64::from);
            if found_rows != rows {
                let text = |rows: Option<u64>| rows.map_or("none".into(), |r| r.to_string());
                return differs("tokens in a row", &text(rows), &text(found_rows));
            }
            if header.tokens != expected.tokens {
                return differs("tokens", &expected.tokens, &header.tokens);
            }
            if header.documents != expected.documents {
                return differs("documents", &expected.documents, &header.documents);
            }
            if hex(&header.payload_sha256) != expected.sha256 {
                return differs("sha256", &expected.sha256, &hex(&header.payload_sha256));
            }
            // Each is a file's length, so that the sum fits.
            starts.push(starts[starts.len() - 1] + header.tokens);
            shards.push(shard);
        }
        Ok(Self { folder: folder.to_path_buf(), split, manifest, shards, starts })
    }

    /// The folder it was opened from.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Which split this is.
    #[must_use]
    pub fn split(&self) -> Split {
        self.split
    }

    /// What the folder holds.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Tokens in the split, end tokens included.
    #[must_use]
    pub fn tokens(&self) -> u64 {
        self.starts[self.shards.len()]
    }

    /// Bytes of text in the split: what bits per byte are counted over.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        match self.split {
            Split::Train => self.manifest.train.bytes,
            Split::Validation => self.manifest.validation.bytes,
        }
    }

    /// Every token is below it.
    #[must_use]
    pub fn vocab_size(&self) -> u32 {
        self.manifest.tokenizer.vocab_size
    }

    /// The token that ends each document.
    #[must_use]
    pub fn eos_id(&self) -> u32 {
        self.manifest.tokenizer.eos_id
    }

    /// The tokenizer beside the shards.
    ///
    /// # Errors
    /// [`DataError::Read`] and [`DataError::File`].
    pub fn tokenizer(&self) -> Result<Tokenizer, DataError> {
        Tokenizer::from_file(self.folder.join(TOKENIZER_FILE))
    }

    /// Tokens in a row where conversations were packed into rows; such a split is
    /// read in windows of `row_tokens - 1` inputs, one a row. `None` for plain text.
    #[must_use]
    pub fn row_tokens(&self) -> Option<usize> {
        self.manifest.chat.as_ref().map(|chat| chat.context + 1)
    }

    /// Copies tokens `start..start + into.len()` of the sequence.
    ///
    /// # Errors
    /// [`DataError::File`] for a range beyond the split and for a token that is
    /// not below the vocabulary size.
    pub fn read(&self, start: u64, into: &mut [u32]) -> Result<(), DataError> {
        self.each_shard(start, into, ShardReader::read)
    }

    /// Copies the flags of the same tokens: see [`ShardReader::read_flags`].
    ///
    /// # Errors
    /// [`DataError::File`] for a range beyond the split.
    pub fn read_flags(&self, start: u64, into: &mut [u8]) -> Result<(), DataError> {
        self.each_shard(start, into, ShardReader::read_flags)
    }

    fn each_shard<T>(
        &self,
        start: u64,
        into: &mut [T],
        read: impl Fn(&ShardReader, u64, &mut [T]) -> Result<(), DataError>,
    ) -> Result<(), DataError> {
        let end = start.checked_add(into.len() as u64);
        if end.is_none_or(|end| end > self.tokens()) {
            let what = format!(
                "tokens {start} and {} on: the {} split has {}",
                into.len(),
                self.split.name(),
                self.tokens()
            );
            return Err(DataError::file(&self.folder, what));
        }
        let mut start = start;
        let mut rest = into;
        while !rest.is_empty() {
            // The last shard that begins at or before `start`; no shard is empty.
            let i = self.starts.partition_point(|&s| s <= start) - 1;
            let here = usize::try_from(self.starts[i + 1] - start).unwrap_or(usize::MAX);
            let (now, later) = rest.split_at_mut(here.min(rest.len()));
            read(&self.shards[i], start - self.starts[i], now)?;
            start += now.len() as u64;
            rest = later;
        }
        Ok(())
    }

    /// How many windows of `context` inputs and targets the split holds: each
    /// begins `context` tokens behind the one before, and the last target needs
    /// one token more. Where conversations were packed, a window is a row, and
    /// there are none of another context.
    #[must_use]
    pub fn window_count(&self, context: usize) -> u64 {
        match (context, self.row_tokens()) {
            (0, _) => 0,
            (_, None) => self.tokens().saturating_sub(1) / context as u64,
            (_, Some(row)) if row == context + 1 => self.tokens() / row as u64,
            (_, Some(_)) => 0,
        }
    }

    /// Where window `index` of `context` inputs begins.
    pub(crate) fn window_start(&self, index: u64, context: usize) -> u64 {
        index * self.row_tokens().unwrap_or(context) as u64
    }

    /// All windows of `context` tokens once, in order: what validation runs
    /// over. The tokens behind the last whole window are left out.
    ///
    /// # Errors
    /// [`DataError::File`] where the split is shorter than one window.
    pub fn windows(&self, context: usize) -> Result<Windows<'_>, DataError> {
        Windows::new(self, context)
    }

    /// Reads all shards: checksums and every token.
    ///
    /// # Errors
    /// [`DataError::File`], naming the first damaged shard.
    pub fn verify(&self) -> Result<(), DataError> {
        self.shards.iter().try_for_each(ShardReader::verify)
    }
}

fn check_tokenizer(folder: &Path, manifest: &Manifest) -> Result<(), DataError> {
    let path = folder.join(TOKENIZER_FILE);
    let json = std::fs::read(&path).map_err(DataError::read(&path))?;
    let found = hex(&crate::hash::sha256(&json));
    if found != manifest.tokenizer.sha256 {
        let what = format!(
            "sha256: the manifest says {}, the file has {found}",
            manifest.tokenizer.sha256
        );
        return Err(DataError::file(&path, what));
    }
    Ok(())
}

//! What an unfinished folder says about itself, so that the same command can go
//! on: `unfinished.json` lists the shards that are whole. It is replaced
//! atomically when a shard is finished and removed when the manifest is there.
//!
//! A shard counts when the journal lists it, its header agrees and its payload
//! has the checksum that both name. The texts are read again in any case (which
//! documents are copies is not written down), but not tokenised again.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use bitnet_format::atomic::write_atomic;
use serde::{Deserialize, Serialize};

use super::Progress;
use super::folder::{clear, write_error};
use crate::dataset::Split;
use crate::error::DataError;
use crate::hash::hex;
use crate::manifest::{ChatCounts, Request, ShardInfo, TOKENIZER_FILE};
use crate::shard::ShardReader;
use crate::tokenizer::Tokenizer;

/// The journal's file name.
pub(crate) const JOURNAL_FILE: &str = "unfinished.json";

/// What a run must have in common with the one it continues.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Identity {
    pub(super) program: String,
    pub(super) name: String,
    pub(super) request: Request,
    pub(super) source_fingerprint: String,
    pub(super) corpus_hash: String,
}

/// One split up to the end of one of its shards.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SplitState {
    /// Documents of the split that have been seen.
    pub(super) seen: u64,
    /// Documents written.
    pub(super) documents: u64,
    /// Bytes of their text.
    pub(super) bytes: u64,
    /// Tokens written.
    pub(super) tokens: u64,
    /// What became of conversations.
    #[serde(default)]
    pub(super) chat: ChatCounts,
}

/// A whole shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    /// [`Split::name`].
    pub(super) split: String,
    pub(super) shard: ShardInfo,
    /// Where the split stood behind it.
    pub(super) state: SplitState,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    tokenizer_sha256: String,
    identity: Identity,
    shards: Vec<Entry>,
}

/// An unfinished folder that answers the same request.
pub(super) struct Found {
    pub(super) tokenizer: Tokenizer,
    shards: Vec<Entry>,
}

/// The journal of the folder being written.
pub(super) struct Journal {
    path: PathBuf,
    content: Content,
}

impl Journal {
    /// What an earlier run of the same request left; `None` where there is
    /// nothing, or nothing that can be trusted.
    pub(super) fn load(folder: &Path, identity: &Identity) -> Option<Found> {
        let text = fs::read_to_string(folder.join(JOURNAL_FILE)).ok()?;
        let content: Content = serde_json::from_str(&text).ok()?;
        let tokenizer = Tokenizer::from_file(folder.join(TOKENIZER_FILE)).ok()?;
        let same =
            content.identity == *identity && tokenizer.hash_hex() == content.tokenizer_sha256;
        same.then(|| Found { shards: whole_shards(folder, content.shards), tokenizer })
    }

    /// Makes the folder ready: what `found` holds stays, all else of ours goes.
    pub(super) fn start(
        folder: &Path,
        identity: Identity,
        found: Option<Found>,
        tokenizer: &Tokenizer,
        progress: &mut dyn Progress,
    ) -> Result<Self, DataError> {
        let shards = found.map_or_else(Vec::new, |f| f.shards);
        let mut keep = vec![JOURNAL_FILE.to_owned(), TOKENIZER_FILE.to_owned()];
        keep.extend(shards.iter().map(|entry| entry.shard.file.clone()));
        if shards.is_empty() {
            clear(folder, &[])?;
        } else {
            progress.note(&format!(
                "going on behind {} whole shards of an unfinished run",
                shards.len()
            ));
            clear(folder, &keep)?;
        }
        write_atomic(folder.join(TOKENIZER_FILE), |w| w.write_all(tokenizer.to_json().as_bytes()))
            .map_err(DataError::Write)?;
        let journal = Self {
            path: folder.join(JOURNAL_FILE),
            content: Content { tokenizer_sha256: tokenizer.hash_hex(), identity, shards },
        };
        journal.save()?;
        Ok(journal)
    }

    /// Notes a shard that is whole.
    pub(super) fn push(&mut self, entry: Entry) -> Result<(), DataError> {
        self.content.shards.push(entry);
        self.save()
    }

    /// Shards listed.
    pub(super) fn shards(&self) -> usize {
        self.content.shards.len()
    }

    /// The shards of a split, in order.
    pub(super) fn of(&self, split: Split) -> impl Iterator<Item = &Entry> {
        self.content.shards.iter().filter(move |entry| entry.split == split.name())
    }

    pub(super) fn into_identity(self) -> Identity {
        self.content.identity
    }

    fn save(&self) -> Result<(), DataError> {
        write_atomic(&self.path, |w| {
            serde_json::to_writer(&mut *w, &self.content)?;
            w.write_all(b"\n")
        })
        .map_err(DataError::Write)
    }
}

/// The listed shards that are there and whole, up to the first of each split
/// that is not.
fn whole_shards(folder: &Path, listed: Vec<Entry>) -> Vec<Entry> {
    let mut counts = [0usize; 2];
    let mut broken = [false; 2];
    let mut whole = Vec::new();
    for entry in listed {
        let Some(i) =
            [Split::Train, Split::Validation].iter().position(|s| s.name() == entry.split)
        else {
            break;
        };
        let expected = shard_name(if i == 0 { Split::Train } else { Split::Validation }, counts[i]);
        if broken[i] || entry.shard.file != expected || !is_whole(folder, &entry.shard) {
            broken[i] = true;
            continue;
        }
        counts[i] += 1;
        whole.push(entry);
    }
    whole
}

fn is_whole(folder: &Path, info: &ShardInfo) -> bool {
    let Ok(shard) = ShardReader::open(folder.join(&info.file)) else {
        return false;
    };
    let header = shard.header();
    header.tokens == info.tokens
        && header.documents == info.documents
        && hex(&header.payload_sha256) == info.sha256
        && shard.verify().is_ok()
}

/// The name of a split's shard.
pub(crate) fn shard_name(split: Split, index: usize) -> String {
    format!("{}-{index:05}.bin", split.name())
}

/// Removes the journal of a folder that has its manifest.
pub(super) fn remove(folder: &Path) -> Result<(), DataError> {
    let path = folder.join(JOURNAL_FILE);
    match fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(write_error(&path, e)),
        _ => Ok(()),
    }
}

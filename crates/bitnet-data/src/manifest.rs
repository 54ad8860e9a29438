//! `manifest.json`: what a prepared folder holds and how it came about. It is
//! written last, so a folder without it is incomplete.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use bitnet_format::atomic::write_atomic;
use serde::{Deserialize, Serialize};

use crate::error::DataError;
use crate::part::{Part, PartInfo};
use crate::source::Source;

/// The manifest version that this code writes and reads.
pub const MANIFEST_VERSION: u32 = 1;
/// The manifest's file name.
pub const MANIFEST_FILE: &str = "manifest.json";
/// The tokenizer's file name.
pub const TOKENIZER_FILE: &str = "tokenizer.json";
/// The file name of the chat template that conversations were rendered with.
pub const TEMPLATE_FILE: &str = "chat_template.jinja";

/// What a prepared folder holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`MANIFEST_VERSION`].
    pub version: u32,
    /// The program that wrote it, with its version.
    pub program: String,
    /// The corpus's name.
    pub name: String,
    /// What was asked for; the same request on the same input is not repeated.
    pub request: Request,
    /// SHA-256 over the names, sizes and times of the input files.
    pub source_fingerprint: String,
    /// Input files read.
    pub files: u64,
    /// Packages read, where the source is cargo's.
    pub packages: u64,
    /// Packages that the lock file names and this machine does not have.
    pub packages_missing: u64,
    /// Documents in both splits.
    pub documents: u64,
    /// Bytes of text in both splits.
    pub bytes: u64,
    /// Tokens in both splits, one end token a document included.
    pub tokens: u64,
    /// Exact copies that were left out.
    pub duplicates: u64,
    /// Documents without text that were left out.
    pub empty_documents: u64,
    /// Documents left out to stay below the cap.
    pub beyond_cap: u64,
    /// SHA-256 over the sorted 128-bit keys of the documents (the first half of
    /// each text's SHA-256): the same texts give the same hash in any order. Where
    /// duplicates are kept, SHA-256 of the number of documents and of the sum of
    /// their SHA-256 modulo 2²⁵⁶, which does the same in constant memory.
    pub corpus_hash: String,
    /// The tokenizer beside the shards.
    pub tokenizer: TokenizerInfo,
    /// The training split.
    pub train: SplitInfo,
    /// The validation split; no shards where none was asked for.
    pub validation: SplitInfo,
    /// Which part of a corpus this is; `None` for a whole one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part: Option<PartInfo>,
    /// How conversations were packed; `None` where documents are plain text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chat: Option<ChatInfo>,
}

/// Every option that decides what a prepared folder holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// Where the text comes from.
    pub source: Source,
    /// The vocabulary asked for; `None` with a given tokenizer.
    pub vocab_size: Option<u32>,
    /// SHA-256 of the given `tokenizer.json`; `None` where one is trained.
    pub given_tokenizer: Option<String>,
    /// The token given as the end of a document, by name.
    pub eos: Option<String>,
    /// Bytes of text the tokenizer is trained on, at most.
    pub tokenizer_bytes: u64,
    /// Bytes of text, at most.
    pub max_bytes: Option<u64>,
    /// The share of documents held out.
    pub validation_share: f64,
    /// Decides which documents are held out.
    pub seed: u64,
    /// Tokens after which a new shard begins.
    pub shard_tokens: u64,
    /// Whether copies of a document stay in the corpus.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keep_duplicates: bool,
    /// The part asked for; `None` for all of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part: Option<Part>,
    /// How conversations are rendered; `None` where documents are plain text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chat: Option<ChatRequest>,
}

/// How conversations are rendered and packed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatRequest {
    /// Inputs in a window; a row of a shard has one token more.
    pub context: usize,
    /// SHA-256 of the chat template.
    pub template_sha256: String,
}

/// What became of the conversations, both splits together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatInfo {
    /// Inputs in a window; a row of a shard has one token more.
    pub context: usize,
    /// Counts.
    #[serde(flatten)]
    pub counts: ChatCounts,
}

impl ChatInfo {
    pub(crate) fn add(mut self, other: Self) -> Self {
        self.counts.add(&other.counts);
        self
    }
}

/// Counts of conversations and tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatCounts {
    /// Conversations longer than a row, cut at its end.
    pub truncated: u64,
    /// Conversations left out because a message holds the name of a special token.
    pub special_in_text: u64,
    /// Conversations left out because no answer is in them, or none before the cut.
    pub without_answer: u64,
    /// Tokens that the loss is taken over.
    pub loss_tokens: u64,
    /// Tokens that fill up rows.
    pub padding_tokens: u64,
}

impl ChatCounts {
    pub(crate) fn add(&mut self, other: &Self) {
        self.truncated += other.truncated;
        self.special_in_text += other.special_in_text;
        self.without_answer += other.without_answer;
        self.loss_tokens += other.loss_tokens;
        self.padding_tokens += other.padding_tokens;
    }
}

/// The tokenizer of a prepared folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenizerInfo {
    /// SHA-256 of `tokenizer.json`.
    pub sha256: String,
    /// One more than its largest id.
    pub vocab_size: u32,
    /// The token that ends each document.
    pub eos_id: u32,
}

/// One split of a prepared folder.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SplitInfo {
    /// Documents.
    pub documents: u64,
    /// Bytes of text.
    pub bytes: u64,
    /// Tokens, one end token a document included.
    pub tokens: u64,
    /// The shards, in order.
    pub shards: Vec<ShardInfo>,
}

/// One shard of a split.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardInfo {
    /// The file's name in the folder.
    pub file: String,
    /// Documents.
    pub documents: u64,
    /// Tokens.
    pub tokens: u64,
    /// SHA-256 of the payload.
    pub sha256: String,
}

impl Manifest {
    /// Bytes of text a token stands for on average.
    #[must_use]
    pub fn bytes_per_token(&self) -> f64 {
        self.bytes as f64 / self.tokens.max(1) as f64
    }

    /// Reads the manifest of a prepared folder.
    ///
    /// # Errors
    /// [`DataError::File`] where the folder is missing, incomplete or foreign.
    pub fn load(folder: &Path) -> Result<Self, DataError> {
        let path = folder.join(MANIFEST_FILE);
        let text = fs::read_to_string(&path).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound if folder.is_dir() => DataError::file(
                folder,
                format!("no {MANIFEST_FILE}: nothing prepared here, or not finished; run `bitnet-data prepare`"),
            ),
            io::ErrorKind::NotFound => DataError::file(
                folder,
                "no such folder; run `bitnet-data prepare`",
            ),
            _ => DataError::read(&path)(e),
        })?;
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let bad = |e: serde_json::Error| DataError::file(&path, format!("is not a manifest: {e}"));
        let found: Versioned = serde_json::from_str(&text).map_err(bad)?;
        if found.version != MANIFEST_VERSION {
            let what = format!(
                "manifest version {}; this program reads version {MANIFEST_VERSION}",
                found.version
            );
            return Err(DataError::file(&path, what));
        }
        serde_json::from_str(&text).map_err(bad)
    }

    pub(crate) fn save(&self, folder: &Path) -> Result<(), DataError> {
        write_atomic(folder.join(MANIFEST_FILE), |w| {
            serde_json::to_writer_pretty(&mut *w, self)?;
            w.write_all(b"\n")
        })
        .map_err(DataError::Write)
    }
}

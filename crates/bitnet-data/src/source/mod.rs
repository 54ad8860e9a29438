//! Where text comes from: the first station of the path. A [`Source`] is opened
//! into [`Inputs`], a fixed list of files, whose documents can be streamed any
//! number of times in the same order.

mod blocks;
mod cargo;
mod files;
pub(crate) mod jsonl;
mod parquet;
mod queue;
mod rows;
mod text;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::DataError;
use crate::hash::hex;
use jsonl::Compression;
pub use rows::{Row, read_rows};
pub use text::TextSplit;

/// One piece of text that is trained on, split and counted as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// Where it comes from: a path, with a line, row or part number behind it
    /// where one file holds several.
    pub name: String,
    /// The text, as it will be tokenised.
    pub text: String,
}

/// What to read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Source {
    /// The `.rs` and `.md` files of the registry packages that a workspace's
    /// `Cargo.lock` pins, as cargo has unpacked them on this machine.
    Cargo {
        /// The workspace, or any folder below it.
        workspace: PathBuf,
    },
    /// Files and folders.
    Files(FileOptions),
    /// Conversations in lines of JSON; the text of a document is then the list of
    /// its messages, as JSON.
    Chat {
        /// `.jsonl`, `.jsonl.zst` and `.jsonl.gz` files, and folders of them.
        paths: Vec<PathBuf>,
    },
}

/// Files and folders, and how they are taken apart.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FileOptions {
    /// Files (`.jsonl`, `.jsonl.zst`, `.jsonl.gz` and `.parquet` by their ending,
    /// all others as text) and folders, searched for `.txt`, `.md`, these and
    /// [`extensions`](Self::extensions).
    pub paths: Vec<PathBuf>,
    /// More endings, without the dot, of text files to take from folders.
    pub extensions: Vec<String>,
    /// How a text file becomes documents.
    pub split: TextSplit,
    /// The field of a jsonl line that holds the text.
    pub field: String,
    /// The column of a parquet file that holds the text.
    pub column: String,
}

impl Default for FileOptions {
    fn default() -> Self {
        Self {
            paths: Vec::new(),
            extensions: Vec::new(),
            split: TextSplit::File,
            field: "text".into(),
            column: "text".into(),
        }
    }
}

/// A stream of documents, or the first error in it.
type Documents<'a> = Box<dyn Iterator<Item = Result<Document, DataError>> + 'a>;

/// How one input file is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A package's source file: skipped when it is not UTF-8 or says that a
    /// program wrote it.
    Package,
    Text,
    Jsonl(Compression),
    Parquet,
}

/// One input file.
#[derive(Debug, Clone)]
pub(crate) struct Input {
    pub(crate) path: PathBuf,
    /// The name its documents carry; the same on every machine for packages.
    pub(crate) name: String,
    pub(crate) kind: Kind,
    /// Bytes.
    pub(crate) size: u64,
    /// Nanoseconds since 1970; 0 for packages, whose content never changes.
    pub(crate) modified: u128,
}

/// The files of an opened [`Source`], in a fixed order.
#[derive(Debug)]
pub struct Inputs {
    inputs: Vec<Input>,
    options: FileOptions,
    /// Whether a line of JSON is a conversation.
    chat: bool,
    missing_packages: Vec<String>,
    packages: usize,
}

impl Source {
    /// Finds the input files.
    ///
    /// # Errors
    /// [`DataError::Read`] for a path that is not there, [`DataError::Empty`]
    /// where no input file is found.
    pub fn open(&self) -> Result<Inputs, DataError> {
        match self {
            Self::Cargo { workspace } => {
                let found = cargo::find(workspace)?;
                Ok(Inputs {
                    inputs: found.inputs,
                    options: FileOptions::default(),
                    chat: false,
                    missing_packages: found.missing,
                    packages: found.packages,
                })
            }
            Self::Files(options) => Ok(Inputs {
                inputs: files::find(options)?,
                options: options.clone(),
                chat: false,
                missing_packages: Vec::new(),
                packages: 0,
            }),
            Self::Chat { paths } => {
                let options = FileOptions { paths: paths.clone(), ..FileOptions::default() };
                Ok(Inputs {
                    inputs: files::find_conversations(&options)?,
                    options,
                    chat: true,
                    missing_packages: Vec::new(),
                    packages: 0,
                })
            }
        }
    }
}

impl Inputs {
    /// Files to read.
    #[must_use]
    pub fn files(&self) -> usize {
        self.inputs.len()
    }

    /// Their bytes on disk, compressed where they are (parquet).
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.inputs.iter().map(|i| i.size).sum()
    }

    /// Packages found; 0 for other sources.
    #[must_use]
    pub fn packages(&self) -> usize {
        self.packages
    }

    /// Packages (`name-version`) that the lock file names and cargo has not
    /// fetched, such as those of other platforms.
    #[must_use]
    pub fn missing_packages(&self) -> &[String] {
        &self.missing_packages
    }

    /// SHA-256 over the names, sizes and modification times of the files: a
    /// change means that the corpus may have changed.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        for i in &self.inputs {
            hash.update(format!("{}\0{}\0{}\n", i.name, i.size, i.modified));
        }
        hex(&hash.finalize())
    }

    /// The documents of lines of JSON.
    fn parse_lines(&self, input: &Input, lines: &jsonl::Lines) -> Vec<Result<Document, DataError>> {
        if self.chat {
            return jsonl::documents(lines, input, &crate::chat::canonical);
        }
        jsonl::documents(lines, input, &|object| jsonl::field(object, &self.options.field))
    }
}

/// A stream of one error.
fn failed<'a>(error: DataError) -> Documents<'a> {
    Box::new(std::iter::once(Err(error)))
}

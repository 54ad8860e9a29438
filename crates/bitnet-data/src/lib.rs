//! Text to tokenizer to token shards to batches: everything that happens to
//! data before training sees it.
//!
//! [`prepare`] turns a [`Source`] (cargo's unpacked packages, text, JSON lines,
//! parquet) into a folder: `tokenizer.json`, `train-00000.bin` … and
//! `val-00000.bin` … in the format of [`shard`], and `manifest.json`, written
//! last. [`Dataset`] maps one split of it as one sequence of tokens, and
//! [`BatchStream`] cuts that into batches: same seed, same order, and a state
//! that goes into a checkpoint.
//!
//! What comes out depends on the texts and the options alone: not on the order
//! of files, the number of threads or the machine.
//!
//! ```no_run
//! use bitnet_data::{BatchStream, Dataset, FileOptions, PrepareOptions, Source, Split, prepare};
//!
//! # fn main() -> Result<(), bitnet_data::DataError> {
//! let source = Source::Files(FileOptions {
//!     paths: vec!["stories.jsonl".into()],
//!     ..FileOptions::default()
//! });
//! let prepared = prepare(&PrepareOptions::new(source, "data/stories"), &mut ())?;
//! println!("{} tokens", prepared.manifest.tokens);
//!
//! let train = Dataset::open("data/stories", Split::Train)?;
//! let mut stream = BatchStream::new(train, 256, 0)?;
//! let batch = stream.next_batch(8)?;
//! assert_eq!(batch.inputs.len(), 8 * 256);
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod batch;
pub mod chat;
pub mod dataset;
mod error;
mod hash;
pub mod manifest;
mod merge;
pub mod mixture;
pub mod part;
mod prepare;
mod scan;
pub mod shard;
pub mod source;
pub mod stream;
pub mod token_stream;
pub mod tokenizer;
mod words;

pub use batch::Batch;
pub use chat::ChatOptions;
pub use dataset::{Dataset, Split};
pub use error::DataError;
pub use manifest::Manifest;
pub use merge::{MergeOptions, merge};
pub use mixture::{MixtureSource, MixtureState, MixtureStream};
pub use part::Part;
pub use prepare::{PrepareOptions, Prepared, Progress, prepare};
pub use shard::{ShardReader, ShardWriter};
pub use source::{Document, FileOptions, Row, Source, TextSplit, read_rows};
pub use stream::{BatchState, BatchStream, Windows};
pub use token_stream::{StreamState, TokenStream};
pub use tokenizer::Tokenizer;

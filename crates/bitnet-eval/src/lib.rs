//! Scores and measures what is shipped: perplexity of a packed model on token
//! shards or text, and its speed.
//!
//! The last stage of the path of data. What is scored goes through
//! [`LanguageModel`], so that the arithmetic of windows and means is tested
//! without a model; [`EngineModel`] is the packed model on the CPU, [`BatchedModel`] the
//! same for many short sequences.

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod batched;
pub mod bench;
pub mod compare;
pub mod energy;
mod error;
pub mod growth;
mod model;
mod perplexity;
pub mod plan;
mod ratio;
mod source;
pub mod tasks;
mod windows;
pub mod words;

pub use batched::BatchedModel;
pub use error::EvalError;
pub use model::{EngineModel, LanguageModel, Sequence, TokenScore, log_prob, token_score};
pub use perplexity::{Perplexity, PerplexityOptions, TokenText, perplexity};
pub use ratio::{mean_error, ratio};
pub use source::{TextDocument, TokenSource, open_shards, read_text, sha256_hex};
pub use windows::{Mode, Window, Windows};

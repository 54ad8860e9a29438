//! Files that enter and leave the project: the GGUF container, Hugging Face
//! checkpoints, tokenizers, JSON results, and the atomic writes beneath them.
//!
//! Everything read from a file is hostile until checked: counts, lengths,
//! offsets and shapes are compared with the file's own size by checked
//! arithmetic before anything is allocated, and an error names the file, the
//! key or tensor, and the numbers.

#![deny(unsafe_code)] // The memory map, in `map`, is the exception.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod atomic;
pub mod byte_level;
pub mod chat_template;
pub mod gguf;
pub mod hf;
pub mod json;
pub mod map;
pub mod model;
pub mod pack;
pub mod tokenizer;

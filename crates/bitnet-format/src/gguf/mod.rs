//! The GGUF container: typed metadata, a directory of tensors, aligned data.
//!
//! [`Reader`] borrows from a byte slice (usually a memory map) and copies no
//! tensor; [`Writer`] streams, tensor by tensor. Layout of a file, all little
//! endian: `GGUF`, version u32, tensor count u64, key count u64, the keys, the
//! tensor directory, padding to `general.alignment`, the data.
//! Specification: docs/gguf.md of the ggml project.

pub mod blocks;
mod reader;
mod types;
mod value;
mod writer;

pub use reader::{Directory, Reader, TensorInfo, read_head};
pub use types::{GgmlType, TypeSize};
pub use value::{Array, FromValue, Value, ValueType};
pub use writer::{Header, Writer};

/// The first four bytes of a file.
pub const MAGIC: [u8; 4] = *b"GGUF";
/// The version that is written.
pub const VERSION: u32 = 3;
/// The alignment of a file that does not state one.
pub const DEFAULT_ALIGNMENT: u64 = 32;
/// The key that states the alignment.
pub const ALIGNMENT_KEY: &str = "general.alignment";

/// A GGUF file that cannot be read or written; every message begins with the
/// file's name.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum GgufError {
    /// The file does not begin with `GGUF`.
    #[error("{file}: not a GGUF file (it begins with {found:02x?})")]
    Magic { file: String, found: Vec<u8> },
    /// A version other than 2 and 3.
    #[error("{file}: GGUF version {found} is not supported (2 and 3 are)")]
    Version { file: String, found: u32 },
    /// The file ends inside something.
    #[error("{file}: truncated: {what} at byte {at} needs {need} bytes, {left} are left")]
    Truncated { file: String, what: String, at: u64, need: u64, left: u64 },
    /// Something in the file contradicts the specification.
    #[error("{file}: {what}")]
    Invalid { file: String, what: String },
    /// A key that is needed is not there.
    #[error("{file}: key {key} is missing")]
    MissingKey { file: String, key: String },
    /// A key holds another type than expected.
    #[error("{file}: key {key}: expected {expected}, found {found}")]
    KeyType { file: String, key: String, expected: &'static str, found: String },
    /// A tensor that is needed is not there.
    #[error("{file}: tensor {tensor} is missing")]
    MissingTensor { file: String, tensor: String },
    /// A tensor whose type has no known size.
    #[error("{file}: tensor {tensor}: type {ty} is not known, so its data cannot be read")]
    UnknownType { file: String, tensor: String, ty: GgmlType },
    /// Reading failed.
    #[error("{file}: cannot be read")]
    Read { file: String, source: std::io::Error },
    /// Writing failed.
    #[error("{file}: cannot be written")]
    Write { file: String, source: std::io::Error },
}

#[cfg(test)]
mod tests;

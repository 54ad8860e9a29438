//! Where the tokens to score come from.

use std::path::Path;

use bitnet_data::{Dataset, Split};
use sha2::{Digest, Sha256};

use crate::EvalError;

/// A long sequence of tokens with random access.
#[derive(Debug)]
pub enum TokenSource {
    /// Tokens in memory; `text`: they are a whole text, scored to its end.
    Tokens {
        /// The tokens.
        tokens: Vec<u32>,
        /// Whether what is left behind the last whole window is scored too.
        text: bool,
    },
    /// All shards of one split, as one sequence.
    Shards(Box<Dataset>),
}

impl TokenSource {
    /// How many tokens there are.
    #[must_use]
    pub fn len(&self) -> u64 {
        match self {
            Self::Tokens { tokens, .. } => tokens.len() as u64,
            Self::Shards(shards) => shards.tokens(),
        }
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether it is one whole text.
    #[must_use]
    pub fn is_text(&self) -> bool {
        matches!(self, Self::Tokens { text: true, .. })
    }

    /// Puts tokens `start..start + len` into `out`.
    ///
    /// # Errors
    /// A range beyond the end, a shard that is damaged.
    pub fn read(&self, start: u64, len: usize, out: &mut Vec<u32>) -> Result<(), EvalError> {
        out.clear();
        match self {
            Self::Tokens { tokens, .. } => {
                let from = usize::try_from(start).unwrap_or(usize::MAX);
                let range = tokens.get(from..from.saturating_add(len)).ok_or_else(|| {
                    let n = tokens.len();
                    EvalError::Usage(format!("tokens {start} to {start} + {len} of {n}"))
                })?;
                out.extend_from_slice(range);
            }
            Self::Shards(shards) => {
                out.resize(len, 0);
                shards.read(start, out)?;
            }
        }
        Ok(())
    }
}

/// Opens one split of a folder of token shards for a model whose tokenizer is
/// `tokenizer_json`.
///
/// # Errors
/// Missing or damaged shards, and shards made with another tokenizer: the same
/// numbers would stand for other text.
pub fn open_shards(
    folder: &Path,
    split: Split,
    tokenizer_json: &str,
) -> Result<TokenSource, EvalError> {
    let shards = Dataset::open(folder, split)?;
    let found = shards.tokenizer()?.hash_hex();
    let expected = sha256_hex(tokenizer_json.as_bytes());
    if found != expected {
        return Err(EvalError::Tokenizer { data: folder.into(), expected, found });
    }
    Ok(TokenSource::Shards(Box::new(shards)))
}

/// Reads a text file; returns it with its hash.
///
/// # Errors
/// A file that cannot be read, is empty or is not UTF-8.
pub fn read_text(path: &Path) -> Result<(String, String), EvalError> {
    let bytes =
        std::fs::read(path).map_err(|source| EvalError::Read { path: path.into(), source })?;
    let hash = sha256_hex(&bytes);
    let text = String::from_utf8(bytes)
        .map_err(|e| EvalError::NotText { path: path.into(), at: e.utf8_error().valid_up_to() })?;
    if text.is_empty() {
        return Err(EvalError::Empty { path: path.into() });
    }
    Ok((text, hash))
}

/// SHA-256 in hexadecimal.
#[must_use]
pub fn sha256_hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_ranges_and_refuses_those_beyond_the_end() {
        let source = TokenSource::Tokens { tokens: (0..10).collect(), text: true };
        let mut out = Vec::new();
        source.read(3, 4, &mut out).unwrap();
        assert_eq!(out, [3, 4, 5, 6]);
        assert!(source.read(8, 3, &mut out).is_err());
        assert!(source.read(u64::MAX, 3, &mut out).is_err());
        assert_eq!((source.len(), source.is_empty(), source.is_text()), (10, false, true));
    }

    #[test]
    fn text_errors_name_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.txt");
        let message = |path: &Path| {
            let error = read_text(path).unwrap_err();
            assert_eq!(error.exit().code(), 3);
            error.to_string()
        };
        assert!(message(&path).contains("t.txt: cannot be read"));
        std::fs::write(&path, "").unwrap();
        assert!(message(&path).contains("t.txt: empty"));
        std::fs::write(&path, b"ab\xff").unwrap();
        assert!(message(&path).contains("byte 2"));
        std::fs::write(&path, "abc").unwrap();
        let (text, hash) = read_text(&path).unwrap();
        assert_eq!(text, "abc");
        assert!(hash.starts_with("ba7816bf8f01cfea"), "FIPS 180-4's example");
    }
}

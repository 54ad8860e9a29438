//! Token shards: the files between tokenisation and training.
//!
//! # Format, versions 1 and 2
//!
//! All integers little-endian; a header of 128 bytes, then the payload.
//!
//! | offset | bytes | content |
//! |---|---|---|
//! | 0 | 4 | magic `BNSH` |
//! | 4 | 4 | version, 1 or 2 |
//! | 8 | 4 | bytes per token: 2 (vocabulary up to 65 536) or 4 |
//! | 12 | 4 | vocabulary size: every token is below it |
//! | 16 | 32 | SHA-256 of the `tokenizer.json` |
//! | 48 | 8 | tokens |
//! | 56 | 8 | documents |
//! | 64 | 32 | SHA-256 of the payload |
//! | 96 | 4 | the token that ends a document |
//! | 100 | 4 | version 2: tokens in a row; version 1: zero |
//! | 104 | 24 | zero |
//! | 128 | | the payload |
//!
//! The payload begins at a multiple of 64 bytes and ends with the file.
//!
//! Version 1, plain text: the tokens. Each document is its tokens followed by the
//! end token; there is no other table of documents. A document never spans two
//! shards.
//!
//! Version 2, conversations packed into rows: for each row its tokens, then one
//! byte of flags for each of them: bit 0, the loss is taken over predicting this
//! token; bit 1, a conversation (or the padding behind the last) begins here. A
//! conversation never spans two rows; rows are filled up with the end token.

use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use bitnet_format::atomic::AtomicFile;
use bitnet_format::map::{Mmap, map};
use sha2::{Digest, Sha256};

use crate::error::DataError;
use crate::hash::{hex, sha256};

const MAGIC: [u8; 4] = *b"BNSH";
/// The format version of plain text.
pub const VERSION: u32 = 1;
/// The format version of packed rows with flags.
pub const VERSION_PACKED: u32 = 2;
/// Flag of a token: the loss is taken over predicting it.
pub const FLAG_LOSS: u8 = 1;
/// Flag of a token: a document begins here.
pub const FLAG_BEGINS: u8 = 2;
/// Bytes before the payload: a multiple of 64.
pub const HEADER_BYTES: usize = 128;

/// The header of a shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardHeader {
    /// Bytes per token: 2 or 4.
    pub token_bytes: u32,
    /// Every token is below it.
    pub vocab_size: u32,
    /// SHA-256 of the `tokenizer.json` the tokens come from.
    pub tokenizer_sha256: [u8; 32],
    /// Tokens in the payload, end tokens included.
    pub tokens: u64,
    /// Documents in the payload.
    pub documents: u64,
    /// SHA-256 of the payload.
    pub payload_sha256: [u8; 32],
    /// The token that ends a document.
    pub eos_id: u32,
    /// Tokens in a row of a packed shard; `None` for plain text.
    pub row_tokens: Option<u32>,
}

impl ShardHeader {
    fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC);
        let version = if self.row_tokens.is_some() { VERSION_PACKED } else { VERSION };
        bytes[4..8].copy_from_slice(&version.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.token_bytes.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.vocab_size.to_le_bytes());
        bytes[16..48].copy_from_slice(&self.tokenizer_sha256);
        bytes[48..56].copy_from_slice(&self.tokens.to_le_bytes());
        bytes[56..64].copy_from_slice(&self.documents.to_le_bytes());
        bytes[64..96].copy_from_slice(&self.payload_sha256);
        bytes[96..100].copy_from_slice(&self.eos_id.to_le_bytes());
        bytes[100..104].copy_from_slice(&self.row_tokens.unwrap_or(0).to_le_bytes());
        bytes
    }

    fn decode(file: &[u8]) -> Result<Self, String> {
        if file.len() < MAGIC.len() || file[..4] != MAGIC {
            let found = &file[..file.len().min(4)];
            return Err(format!(
                "is not a token shard: expected the magic `BNSH`, found `{}`",
                found.escape_ascii()
            ));
        }
        if file.len() < HEADER_BYTES {
            return Err(format!(
                "truncated: {} bytes, and the header alone is {HEADER_BYTES}",
                file.len()
            ));
        }
        let version = u32_at(file, 4);
        if version != VERSION && version != VERSION_PACKED {
            return Err(format!(
                "shard version {version}; this program reads versions {VERSION} and {VERSION_PACKED}"
            ));
        }
        let header = Self {
            token_bytes: u32_at(file, 8),
            vocab_size: u32_at(file, 12),
            tokenizer_sha256: array_at(file, 16),
            tokens: u64::from_le_bytes(array_at(file, 48)),
            documents: u64::from_le_bytes(array_at(file, 56)),
            payload_sha256: array_at(file, 64),
            eos_id: u32_at(file, 96),
            row_tokens: (version == VERSION_PACKED).then(|| u32_at(file, 100)),
        };
        if header.token_bytes != 2 && header.token_bytes != 4 {
            return Err(format!("{} bytes per token; expected 2 or 4", header.token_bytes));
        }
        if let Some(row) = header.row_tokens
            && (row < 2 || !header.tokens.is_multiple_of(u64::from(row)))
        {
            return Err(format!("{} tokens in rows of {row}", header.tokens));
        }
        let expected = header
            .tokens
            .checked_mul(header.bytes_per_token())
            .and_then(|n| n.checked_add(HEADER_BYTES as u64));
        if expected != Some(file.len() as u64) {
            return Err(format!(
                "truncated or damaged: {} tokens of {} bytes need {} bytes, the file has {}",
                header.tokens,
                header.bytes_per_token(),
                expected.map_or_else(|| "more than 2⁶⁴".into(), |n| n.to_string()),
                file.len()
            ));
        }
        Ok(header)
    }

    /// Bytes of the payload for each token, flags included.
    fn bytes_per_token(&self) -> u64 {
        u64::from(self.token_bytes) + u64::from(self.row_tokens.is_some())
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}

/// `bytes[at..at + N]`; the caller has checked the length.
fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at..at + N]);
    array
}

/// Writes one shard, which appears under its name when it is complete.
#[derive(Debug)]
pub struct ShardWriter {
    file: AtomicFile,
    header: ShardHeader,
    payload: Sha256,
    /// The bytes of the document being written.
    bytes: Vec<u8>,
}

impl ShardWriter {
    /// Begins a shard of tokens below `vocab_size` whose documents end with
    /// `eos_id`.
    ///
    /// # Errors
    /// [`DataError::Write`].
    pub fn create(
        path: &Path,
        vocab_size: u32,
        eos_id: u32,
        tokenizer_sha256: [u8; 32],
    ) -> Result<Self, DataError> {
        Self::create_rows(path, vocab_size, eos_id, tokenizer_sha256, None)
    }

    /// Begins a shard of rows of `row_tokens` tokens with flags (version 2).
    ///
    /// # Errors
    /// [`DataError::Write`].
    pub(crate) fn create_rows(
        path: &Path,
        vocab_size: u32,
        eos_id: u32,
        tokenizer_sha256: [u8; 32],
        row_tokens: Option<u32>,
    ) -> Result<Self, DataError> {
        let mut file = AtomicFile::create(path).map_err(DataError::Write)?;
        file.write_all(&[0; HEADER_BYTES]).map_err(|e| write_error(path, e))?;
        Ok(Self {
            file,
            header: ShardHeader {
                token_bytes: if vocab_size <= 1 << 16 { 2 } else { 4 },
                vocab_size,
                tokenizer_sha256,
                tokens: 0,
                documents: 0,
                payload_sha256: [0; 32],
                eos_id,
                row_tokens,
            },
            payload: Sha256::new(),
            bytes: Vec::new(),
        })
    }

    /// Tokens written so far.
    #[must_use]
    pub fn tokens(&self) -> u64 {
        self.header.tokens
    }

    /// Appends a document's `tokens` and the end token.
    ///
    /// # Errors
    /// [`DataError::Write`]; [`DataError::File`] for a token that is not below
    /// the vocabulary size.
    pub fn push_document(&mut self, tokens: &[u32]) -> Result<(), DataError> {
        self.bytes.clear();
        for &token in tokens {
            self.encode(token)?;
        }
        self.encode(self.header.eos_id)?;
        self.write()?;
        self.header.tokens += tokens.len() as u64 + 1;
        self.header.documents += 1;
        Ok(())
    }

    /// Appends a whole row that holds so many documents, with the flags of its
    /// tokens.
    pub(crate) fn push_row(
        &mut self,
        tokens: &[u32],
        flags: &[u8],
        documents: u64,
    ) -> Result<(), DataError> {
        debug_assert_eq!(self.header.row_tokens, u32::try_from(tokens.len()).ok());
        self.bytes.clear();
        for &token in tokens {
            self.encode(token)?;
        }
        self.bytes.extend_from_slice(flags);
        self.write()?;
        self.header.tokens += tokens.len() as u64;
        self.header.documents += documents;
        Ok(())
    }

    fn encode(&mut self, token: u32) -> Result<(), DataError> {
        if token >= self.header.vocab_size {
            let vocab = self.header.vocab_size;
            let what = format!("token {token} is not below the vocabulary of {vocab}");
            return Err(DataError::file(self.file.dest(), what));
        }
        // A width of 2 implies that tokens are below 2¹⁶.
        let width = self.header.token_bytes as usize;
        self.bytes.extend_from_slice(&token.to_le_bytes()[..width]);
        Ok(())
    }

    fn write(&mut self) -> Result<(), DataError> {
        self.payload.update(&self.bytes);
        self.file.write_all(&self.bytes).map_err(|e| write_error(self.file.dest(), e))
    }

    /// Writes the header and gives the file its name.
    ///
    /// # Errors
    /// [`DataError::Write`].
    pub fn finish(mut self) -> Result<ShardHeader, DataError> {
        self.header.payload_sha256 = self.payload.finalize().into();
        let path = self.file.dest().to_path_buf();
        self.file
            .seek(SeekFrom::Start(0))
            .and_then(|_| self.file.write_all(&self.header.encode()))
            .map_err(|e| write_error(&path, e))?;
        self.file.commit().map_err(DataError::Write)?;
        Ok(self.header)
    }
}

fn write_error(path: &Path, e: std::io::Error) -> DataError {
    DataError::Write(std::io::Error::new(e.kind(), format!("{}: {e}", path.display())))
}

/// A memory-mapped shard.
#[derive(Debug)]
pub struct ShardReader {
    path: PathBuf,
    map: Mmap,
    header: ShardHeader,
}

impl ShardReader {
    /// Maps a shard and checks its magic, version and size; the payload is not
    /// read (see [`verify`](Self::verify)).
    ///
    /// # Errors
    /// [`DataError::Read`] and [`DataError::File`], naming the file and the
    /// numbers.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, DataError> {
        let path = path.as_ref();
        let map = map(path, false).map_err(DataError::read(path))?;
        let header = ShardHeader::decode(&map).map_err(|what| DataError::file(path, what))?;
        Ok(Self { path: path.to_path_buf(), map, header })
    }

    /// The checked header.
    #[must_use]
    pub fn header(&self) -> &ShardHeader {
        &self.header
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Copies tokens `start..start + into.len()` of the payload.
    ///
    /// # Errors
    /// [`DataError::File`] for a range beyond the shard and for a token that is
    /// not below the vocabulary size.
    pub fn read(&self, start: u64, into: &mut [u32]) -> Result<(), DataError> {
        self.check_range(start, into.len())?;
        let width = self.header.token_bytes as usize;
        let mut largest = 0;
        let mut rest = &mut *into;
        let mut at = start;
        while !rest.is_empty() {
            let (row_start, column, in_row) = self.place(at);
            let (now, later) = rest.split_at_mut(in_row.min(rest.len()));
            let first = row_start + column * width;
            let bytes = &self.payload()[first..first + now.len() * width];
            if width == 2 {
                for (token, b) in now.iter_mut().zip(bytes.chunks_exact(2)) {
                    *token = u32::from(u16::from_le_bytes([b[0], b[1]]));
                    largest = largest.max(*token);
                }
            } else {
                for (token, b) in now.iter_mut().zip(bytes.chunks_exact(4)) {
                    *token = u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                    largest = largest.max(*token);
                }
            }
            at += now.len() as u64;
            rest = later;
        }
        if largest >= self.header.vocab_size {
            let at = into.iter().position(|&t| t == largest).unwrap_or(0) as u64;
            let what = format!(
                "token {largest} at position {} is not below the vocabulary of {}",
                start + at,
                self.header.vocab_size
            );
            return Err(DataError::file(&self.path, what));
        }
        Ok(())
    }

    /// Copies the flags of tokens `start..start + into.len()`; zeros for a shard
    /// of plain text, which has none.
    ///
    /// # Errors
    /// [`DataError::File`] for a range beyond the shard.
    pub fn read_flags(&self, start: u64, into: &mut [u8]) -> Result<(), DataError> {
        self.check_range(start, into.len())?;
        let Some(row) = self.header.row_tokens else {
            into.fill(0);
            return Ok(());
        };
        let flags_at = row as usize * self.header.token_bytes as usize;
        let (mut rest, mut at) = (into, start);
        while !rest.is_empty() {
            let (row_start, column, in_row) = self.place(at);
            let (now, later) = rest.split_at_mut(in_row.min(rest.len()));
            let first = row_start + flags_at + column;
            now.copy_from_slice(&self.payload()[first..first + now.len()]);
            at += now.len() as u64;
            rest = later;
        }
        Ok(())
    }

    fn check_range(&self, start: u64, len: usize) -> Result<(), DataError> {
        let end = start.checked_add(len as u64);
        if end.is_none_or(|end| end > self.header.tokens) {
            let what = format!("tokens {start} and {len} on: the shard has {}", self.header.tokens);
            return Err(DataError::file(&self.path, what));
        }
        Ok(())
    }

    /// Where token `at` lies: the byte of the payload at which its row begins, its
    /// column, and the tokens of the row from there on. Plain text is one row. The
    /// whole payload fits the address space.
    fn place(&self, at: u64) -> (usize, usize, usize) {
        let row = self.header.row_tokens.map_or(self.header.tokens.max(1), u64::from);
        let row_bytes = row * self.header.bytes_per_token();
        let column = (at % row) as usize;
        ((at / row * row_bytes) as usize, column, row as usize - column)
    }

    /// Reads the whole payload: its checksum, every token, and the end of the
    /// last document.
    ///
    /// # Errors
    /// [`DataError::File`] with what was expected and what was found.
    pub fn verify(&self) -> Result<(), DataError> {
        let bad = |what: String| Err(DataError::file(&self.path, what));
        let found = sha256(self.payload());
        if found != self.header.payload_sha256 {
            return bad(format!(
                "damaged: the header says sha256 {}, the payload has {}",
                hex(&self.header.payload_sha256),
                hex(&found)
            ));
        }
        let mut buffer = vec![0; 1 << 16];
        let mut last = None;
        let mut start = 0;
        while start < self.header.tokens {
            let n =
                buffer.len().min(usize::try_from(self.header.tokens - start).unwrap_or(usize::MAX));
            self.read(start, &mut buffer[..n])?;
            last = Some(buffer[n - 1]);
            start += n as u64;
        }
        // Rows end with whatever fills them.
        if self.header.row_tokens.is_none() && last.is_some_and(|t| t != self.header.eos_id) {
            return bad(format!(
                "the last document ends with token {}, not {}",
                last.unwrap_or(0),
                self.header.eos_id
            ));
        }
        Ok(())
    }

    fn payload(&self) -> &[u8] {
        &self.map[HEADER_BYTES..]
    }
}

#[cfg(test)]
mod tests;

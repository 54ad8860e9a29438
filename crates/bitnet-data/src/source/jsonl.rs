//! JSON lines, plain or compressed: one object a line. One thread reads and
//! decompresses blocks of whole lines, others take the lines apart.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Map, Value};

use super::{Document, Input};
use crate::error::DataError;

/// How a file's bytes become lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    /// One or several gzip members (RFC 1952).
    Gzip,
    /// One or several Zstandard frames (RFC 8878) with windows of up to 128 MiB.
    Zstd,
}

/// Whole lines of a file.
#[derive(Debug)]
pub(super) struct Lines {
    /// The number of the first, counted from 1.
    pub(super) first: u64,
    pub(super) bytes: Vec<u8>,
}

/// Reads a file a block of lines at a time.
pub(super) struct LineReader<'a> {
    reader: Box<dyn BufRead + Send + 'a>,
    input: &'a Input,
    line: u64,
}

impl<'a> LineReader<'a> {
    /// `read` counts the bytes taken from the disk.
    pub(super) fn open(
        input: &'a Input,
        compression: Compression,
        read: &'a AtomicU64,
    ) -> Result<Self, DataError> {
        let failed = DataError::read(&input.path);
        let file = match File::open(&input.path) {
            Ok(file) => BufReader::with_capacity(1 << 17, Counted { file, read }),
            Err(e) => return Err(failed(e)),
        };
        let reader: Box<dyn BufRead + Send + 'a> = match compression {
            Compression::None => Box::new(file),
            Compression::Gzip => {
                let decoder = flate2::bufread::MultiGzDecoder::new(file);
                Box::new(BufReader::with_capacity(1 << 16, decoder))
            }
            Compression::Zstd => {
                let decoder = zstd::stream::read::Decoder::with_buffer(file).map_err(failed)?;
                Box::new(BufReader::with_capacity(1 << 17, decoder))
            }
        };
        Ok(Self { reader, input, line: 0 })
    }

    /// The next lines, `at_least` bytes of them; `None` at the end of the file.
    pub(super) fn next(&mut self, at_least: u64) -> Result<Option<Lines>, DataError> {
        let mut bytes = Vec::with_capacity(at_least as usize + (8 << 10));
        let read = (&mut self.reader)
            .take(at_least)
            .read_to_end(&mut bytes)
            .and_then(|_| self.reader.read_until(b'\n', &mut bytes));
        read.map_err(DataError::read(&self.input.path))?;
        if bytes.is_empty() {
            return Ok(None);
        }
        let first = self.line + 1;
        self.line += bytes.iter().filter(|&&b| b == b'\n').count() as u64;
        Ok(Some(Lines { first, bytes }))
    }
}

struct Counted<'a> {
    file: File,
    read: &'a AtomicU64,
}

impl Read for Counted<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read(into)?;
        self.read.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
}

/// The documents of a block of lines; nothing behind the first error.
pub(super) fn documents(
    lines: &Lines,
    input: &Input,
    text_of: &(impl Fn(Map<String, Value>) -> Result<String, String> + ?Sized),
) -> Vec<Result<Document, DataError>> {
    let mut documents = Vec::new();
    for (number, line) in (lines.first..).zip(lines.bytes.split(|&b| b == b'\n')) {
        let document = document(line, number, input, text_of).transpose();
        let failed = matches!(document, Some(Err(_)));
        documents.extend(document);
        if failed {
            break;
        }
    }
    documents
}

/// `None` for a blank line.
fn document(
    line: &[u8],
    number: u64,
    input: &Input,
    text_of: &(impl Fn(Map<String, Value>) -> Result<String, String> + ?Sized),
) -> Result<Option<Document>, DataError> {
    let bad = |what: String| DataError::line(&input.path, number, what);
    let line = std::str::from_utf8(line).map_err(|e| {
        let at = e.valid_up_to();
        bad(format!("byte {at} of the line (0x{:02x}) is not UTF-8", line[at]))
    })?;
    if line.trim().is_empty() {
        return Ok(None);
    }
    let value: Value = serde_json::from_str(line).map_err(|e| bad(format!("is not JSON: {e}")))?;
    let Value::Object(object) = value else {
        return Err(bad(format!("expected an object, found {}", kind(&value))));
    };
    let text = text_of(object).map_err(bad)?;
    Ok(Some(Document { name: format!("{}:{number}", input.name), text }))
}

/// A field's text; `null` counts as an empty document.
pub(super) fn field(mut object: Map<String, Value>, field: &str) -> Result<String, String> {
    match object.remove(field) {
        Some(Value::String(text)) => Ok(text),
        Some(Value::Null) => Ok(String::new()),
        Some(other) => Err(format!("field `{field}`: expected a string, found {}", kind(&other))),
        None => {
            let fields: Vec<&str> = object.keys().map(String::as_str).collect();
            let fields = fields.join(", ");
            Err(format!("no field `{field}` among {fields}; choose one with --field"))
        }
    }
}

/// What a JSON value is, in words.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

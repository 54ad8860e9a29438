//! Plain text files, whole or taken apart into documents, line by line so that
//! a file of any size passes through.

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{Document, Documents, Input, failed};
use crate::error::DataError;

/// How a text file becomes documents. As text: `file`, `blank-line`,
/// `wikitext`, `bytes:65536`, `line:<|endoftext|>`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum TextSplit {
    /// One file, one document.
    #[default]
    File,
    /// Paragraphs: one or more blank lines lie between documents.
    BlankLine,
    /// A WikiText article begins at a heading of level one, ` = Title = `.
    WikiText,
    /// A line equal to this one (white space at its ends aside) lies between
    /// documents and belongs to neither.
    Line(String),
    /// A new document at the first line end after this many bytes.
    Bytes(usize),
}

impl fmt::Display for TextSplit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File => f.write_str("file"),
            Self::BlankLine => f.write_str("blank-line"),
            Self::WikiText => f.write_str("wikitext"),
            Self::Line(line) => write!(f, "line:{line}"),
            Self::Bytes(n) => write!(f, "bytes:{n}"),
        }
    }
}

impl From<TextSplit> for String {
    fn from(split: TextSplit) -> Self {
        split.to_string()
    }
}

impl TryFrom<String> for TextSplit {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl FromStr for TextSplit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(line) = text.strip_prefix("line:") {
            let line = line.trim();
            if line.is_empty() {
                return Err(
                    "line: needs the separating line behind it; for empty lines use blank-line"
                        .into(),
                );
            }
            return Ok(Self::Line(line.into()));
        }
        if let Some(n) = text.strip_prefix("bytes:") {
            return match n.parse() {
                Ok(n) if n > 0 => Ok(Self::Bytes(n)),
                _ => Err(format!("bytes:{n}: needs a number of bytes above 0")),
            };
        }
        match text {
            "file" => Ok(Self::File),
            "blank-line" => Ok(Self::BlankLine),
            "wikitext" => Ok(Self::WikiText),
            _ => Err(format!("`{text}` is none of file, blank-line, wikitext, line:TEXT, bytes:N")),
        }
    }
}

/// What a line does to the document being gathered.
enum Act {
    /// The line belongs to it.
    Keep,
    /// It is complete; the line begins the next one.
    Begin,
    /// It is complete; the line belongs to neither.
    Drop,
}

impl TextSplit {
    fn act(&self, line: &str, gathered: usize) -> Act {
        match self {
            Self::File => Act::Keep,
            Self::BlankLine if line.trim().is_empty() => Act::Drop,
            Self::WikiText if is_article_heading(line) => Act::Begin,
            Self::Line(separator) if line.trim() == separator => Act::Drop,
            Self::Bytes(n) if gathered >= *n => Act::Begin,
            _ => Act::Keep,
        }
    }
}

/// ` = Title = `, and not ` = = Section = = `.
fn is_article_heading(line: &str) -> bool {
    let line = line.trim();
    let Some(title) = line.strip_prefix("= ").and_then(|l| l.strip_suffix(" =")) else {
        return false;
    };
    !title.starts_with("= ") && !title.ends_with(" =") && !title.trim().is_empty()
}

pub(super) fn documents<'a>(input: &'a Input, split: &'a TextSplit) -> Documents<'a> {
    match File::open(&input.path) {
        Ok(file) => Box::new(Lines {
            reader: BufReader::with_capacity(1 << 16, file),
            input,
            split,
            part: 0,
            line: 0,
            pending: String::new(),
            done: false,
        }),
        Err(e) => failed(DataError::read(&input.path)(e)),
    }
}

struct Lines<'a> {
    reader: BufReader<File>,
    input: &'a Input,
    split: &'a TextSplit,
    /// Documents given so far.
    part: u64,
    /// Lines read so far.
    line: u64,
    /// The line that began the document being gathered.
    pending: String,
    done: bool,
}

impl Lines<'_> {
    /// The next line with its end, `None` at the end of the file.
    fn read_line(&mut self) -> Result<Option<String>, DataError> {
        let mut bytes = Vec::new();
        let n =
            self.reader.read_until(b'\n', &mut bytes).map_err(DataError::read(&self.input.path))?;
        if n == 0 {
            return Ok(None);
        }
        self.line += 1;
        let mut text = utf8(&self.input.path, self.line, bytes)?;
        // A byte order mark is no part of the text.
        if self.line == 1 && text.starts_with('\u{feff}') {
            text.drain(..'\u{feff}'.len_utf8());
        }
        Ok(Some(text))
    }

    /// Documents of white space alone are not worth a name, except that a whole
    /// file is one in any case: it is counted as empty.
    fn next_text(&mut self) -> Result<Option<String>, DataError> {
        let mut text = std::mem::take(&mut self.pending);
        loop {
            let Some(line) = self.read_line()? else {
                self.done = true;
                let whole = *self.split == TextSplit::File;
                return Ok((whole || !text.trim().is_empty()).then_some(text));
            };
            let act = self.split.act(&line, text.len());
            if matches!(act, Act::Keep) {
                text.push_str(&line);
                continue;
            }
            let next = if matches!(act, Act::Begin) { line } else { String::new() };
            if text.trim().is_empty() {
                text = next;
                continue;
            }
            self.pending = next;
            return Ok(Some(text));
        }
    }
}

impl Iterator for Lines<'_> {
    type Item = Result<Document, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let text = match self.next_text() {
            Ok(text) => text?,
            Err(e) => {
                self.done = true;
                return Some(Err(e));
            }
        };
        self.part += 1;
        let name = match self.split {
            TextSplit::File => self.input.name.clone(),
            _ => format!("{}#{}", self.input.name, self.part),
        };
        Some(Ok(Document { name, text }))
    }
}

/// The bytes as text, or where they stop being UTF-8.
pub(super) fn utf8(path: &Path, line: u64, bytes: Vec<u8>) -> Result<String, DataError> {
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        DataError::line(
            path,
            line,
            format!("byte {at} of the line (0x{:02x}) is not UTF-8", e.as_bytes()[at]),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::super::Kind;
    use super::*;

    fn split(content: &[u8], split: &str) -> Result<Vec<String>, DataError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.txt");
        std::fs::write(&path, content).unwrap();
        let input = Input { name: "t".into(), path, kind: Kind::Text, size: 0, modified: 0 };
        documents(&input, &split.parse().unwrap()).map(|d| d.map(|d| d.text)).collect()
    }

    #[test]
    fn each_way_to_split() {
        for (content, how, expected) in [
            ("a\nb\n", "file", vec!["a\nb\n"]),
            ("\u{feff}a\r\n", "file", vec!["a\r\n"]),
            ("", "file", vec![""]),
            ("a\n\n\n b\nc\n\n", "blank-line", vec!["a\n", " b\nc\n"]),
            (
                "x\n<|endoftext|>\ny\nz\n <|endoftext|> \n\n<|endoftext|>\n",
                "line:<|endoftext|>",
                vec!["x\n", "y\nz\n"],
            ),
            (
                " \n = A = \n\n b\n = = S = = \n c\n = D = \n e\n",
                "wikitext",
                vec![" = A = \n\n b\n = = S = = \n c\n", " = D = \n e\n"],
            ),
            ("aaa\nbbb\nccc\nd", "bytes:5", vec!["aaa\nbbb\n", "ccc\nd"]),
        ] {
            assert_eq!(split(content.as_bytes(), how).unwrap(), expected, "{how}");
        }
    }

    #[test]
    fn text_that_is_not_utf8_is_refused_with_its_place() {
        let e = split(b"good\nbad \xff\n", "file").unwrap_err().to_string();
        assert!(e.ends_with("t.txt:2: byte 4 of the line (0xff) is not UTF-8"), "{e}");
    }

    #[test]
    fn splits_read_back_as_written() {
        for text in ["file", "blank-line", "wikitext", "line:<|endoftext|>", "bytes:65536"] {
            assert_eq!(text.parse::<TextSplit>().unwrap().to_string(), text);
        }
        for bad in ["", "pages", "bytes:0", "bytes:x", "line:", "line:  "] {
            assert!(bad.parse::<TextSplit>().is_err(), "{bad}");
        }
    }
}

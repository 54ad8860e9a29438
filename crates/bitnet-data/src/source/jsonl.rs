//! JSON lines: one object a line, the text in one of its fields.

use std::fs::File;
use std::io::{BufRead, BufReader};

use serde_json::Value;

use super::{Document, Documents, Input, failed, text};
use crate::error::DataError;

pub(super) fn documents<'a>(input: &'a Input, field: &'a str) -> Documents<'a> {
    match File::open(&input.path) {
        Ok(file) => Box::new(Objects {
            reader: BufReader::with_capacity(1 << 16, file),
            input,
            field,
            line: 0,
            failed: false,
        }),
        Err(e) => failed(DataError::read(&input.path)(e)),
    }
}

struct Objects<'a> {
    reader: BufReader<File>,
    input: &'a Input,
    field: &'a str,
    line: u64,
    failed: bool,
}

impl Objects<'_> {
    fn next_document(&mut self) -> Result<Option<Document>, DataError> {
        loop {
            let mut bytes = Vec::new();
            let path = &self.input.path;
            let n = self.reader.read_until(b'\n', &mut bytes).map_err(DataError::read(path))?;
            if n == 0 {
                return Ok(None);
            }
            self.line += 1;
            let line = text::utf8(path, self.line, bytes)?;
            if line.trim().is_empty() {
                continue;
            }
            return Ok(Some(Document {
                name: format!("{}:{}", self.input.name, self.line),
                text: self.text_of(&line)?,
            }));
        }
    }

    /// The field's text; `null` counts as an empty document.
    fn text_of(&self, line: &str) -> Result<String, DataError> {
        let bad = |what: String| DataError::line(&self.input.path, self.line, what);
        let value: Value =
            serde_json::from_str(line).map_err(|e| bad(format!("is not JSON: {e}")))?;
        let Value::Object(mut object) = value else {
            return Err(bad(format!("expected an object, found {}", kind(&value))));
        };
        match object.remove(self.field) {
            Some(Value::String(text)) => Ok(text),
            Some(Value::Null) => Ok(String::new()),
            Some(other) => Err(bad(format!(
                "field `{}`: expected a string, found {}",
                self.field,
                kind(&other)
            ))),
            None => {
                let fields: Vec<&str> = object.keys().map(String::as_str).collect();
                Err(bad(format!(
                    "no field `{}` among {}; choose one with --field",
                    self.field,
                    fields.join(", ")
                )))
            }
        }
    }
}

impl Iterator for Objects<'_> {
    type Item = Result<Document, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let next = self.next_document().transpose();
        self.failed = matches!(next, Some(Err(_)));
        next
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

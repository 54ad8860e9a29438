//! Rows of one file as JSON objects: what evaluation reads its questions from.

use std::fs::File;
use std::path::Path;
use std::sync::atomic::AtomicU64;

use parquet::file::reader::SerializedFileReader;
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row as ParquetRow};
use serde_json::{Map, Value};

use super::jsonl::{Compression, LineReader, kind};
use super::parquet::guarded;
use super::{Input, Kind};
use crate::error::DataError;

/// Bytes of lines that are read at a time.
const BLOCK: u64 = 1 << 20;

/// A row of a file.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Its line, or in a parquet file its row, counted from 1.
    pub number: u64,
    /// Its fields.
    pub fields: Map<String, Value>,
}

/// Reads every row of a file: parquet by its ending, else lines of JSON objects
/// (`.gz` and `.zst` decompressed); blank lines are passed over.
///
/// # Errors
/// [`DataError::Read`]; [`DataError::Line`] for a line that is no JSON object;
/// [`DataError::File`] for a parquet file that is damaged or holds what JSON cannot.
pub fn read_rows(path: &Path) -> Result<Vec<Row>, DataError> {
    let name = path.to_string_lossy();
    if name.ends_with(".parquet") {
        return parquet_rows(path);
    }
    let compression = match () {
        () if name.ends_with(".gz") => Compression::Gzip,
        () if name.ends_with(".zst") => Compression::Zstd,
        () => Compression::None,
    };
    let size = std::fs::metadata(path).map_err(DataError::read(path))?.len();
    let kind = Kind::Jsonl(compression);
    let input = Input { path: path.into(), name: name.into_owned(), kind, size, modified: 0 };
    let read = AtomicU64::new(0);
    let mut reader = LineReader::open(&input, compression, &read)?;
    let mut rows = Vec::new();
    while let Some(lines) = reader.next(BLOCK)? {
        for (number, line) in (lines.first..).zip(lines.bytes.split(|&b| b == b'\n')) {
            if let Some(fields) = line_fields(line, number, path)? {
                rows.push(Row { number, fields });
            }
        }
    }
    Ok(rows)
}

/// `None` for a blank line.
fn line_fields(
    line: &[u8],
    number: u64,
    path: &Path,
) -> Result<Option<Map<String, Value>>, DataError> {
    if line.iter().all(u8::is_ascii_whitespace) {
        return Ok(None);
    }
    match serde_json::from_slice(line) {
        Ok(Value::Object(fields)) => Ok(Some(fields)),
        Ok(other) => {
            let what = format!("expected an object, found {}", kind(&other));
            Err(DataError::line(path, number, what))
        }
        Err(e) => Err(DataError::line(path, number, format!("is not JSON: {e}"))),
    }
}

fn parquet_rows(path: &Path) -> Result<Vec<Row>, DataError> {
    let bad = |what: String| DataError::file(path, what);
    let not = |e| bad(format!("is not a parquet file: {e}"));
    let file = File::open(path).map_err(DataError::read(path))?;
    let reader = guarded(|| SerializedFileReader::new(file)).map_err(not)?;
    let mut rows = guarded(|| Ok(RowIter::from_file_into(Box::new(reader)))).map_err(not)?;
    let mut out = Vec::new();
    for number in 1.. {
        let row =
            guarded(|| rows.next().transpose()).map_err(|e| bad(format!("row {number}: {e}")))?;
        let Some(row) = row else { break };
        let fields = object(&row).map_err(|what| bad(format!("row {number}: {what}")))?;
        out.push(Row { number, fields });
    }
    Ok(out)
}

fn object(row: &ParquetRow) -> Result<Map<String, Value>, String> {
    row.get_column_iter()
        .map(|(name, field)| match value(field) {
            Ok(value) => Ok((name.clone(), value)),
            Err(what) => Err(format!("column `{name}`: {what}")),
        })
        .collect()
}

fn value(field: &Field) -> Result<Value, String> {
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(v) => (*v).into(),
        Field::Byte(v) => (*v).into(),
        Field::Short(v) => (*v).into(),
        Field::Int(v) => (*v).into(),
        Field::Long(v) => (*v).into(),
        Field::UByte(v) => (*v).into(),
        Field::UShort(v) => (*v).into(),
        Field::UInt(v) => (*v).into(),
        Field::ULong(v) => (*v).into(),
        Field::Float(v) => (*v).into(),
        Field::Double(v) => (*v).into(),
        Field::Str(v) => v.as_str().into(),
        Field::Bytes(v) => match std::str::from_utf8(v.data()) {
            Ok(text) => text.into(),
            Err(e) => return Err(format!("byte {} is not UTF-8", e.valid_up_to())),
        },
        Field::Group(row) => Value::Object(object(row)?),
        Field::ListInternal(list) => {
            Value::Array(list.elements().iter().map(value).collect::<Result<_, _>>()?)
        }
        other => return Err(format!("holds {other}, which is none of text, number, list, group")),
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    use super::*;

    #[test]
    fn lines_become_rows_with_their_numbers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.jsonl");
        std::fs::write(&path, "{\"a\": 1}\n\n  {\"b\": [\"x\"]}").unwrap();
        let rows = read_rows(&path).unwrap();
        assert_eq!(rows.iter().map(|r| r.number).collect::<Vec<_>>(), [1, 3]);
        assert_eq!(rows[1].fields["b"], serde_json::json!(["x"]));
        for (text, message) in [
            ("{}\n[1]", "a.jsonl:2: expected an object, found an array"),
            ("{}\n{\"a\": }", "a.jsonl:2: is not JSON"),
            ("{\"a\": \"\u{fffd}\"}\n\u{0}", "a.jsonl:2: is not JSON"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = read_rows(&path).unwrap_err();
            assert!(error.to_string().contains(message), "{error}");
            assert_eq!(error.exit().code(), 3);
        }
        std::fs::write(&path, b"{\"a\": \"\xff\"}").unwrap();
        assert!(read_rows(&path).unwrap_err().to_string().contains("a.jsonl:1: is not JSON"));
        assert!(read_rows(&dir.path().join("none")).is_err());
    }

    #[test]
    fn nested_columns_become_lists_and_objects() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.parquet");
        let schema = "message m { required binary question (UTF8); required int64 label;
            required group choices { required group text (LIST) {
                repeated group list { required binary element (UTF8); } } } }";
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let file = File::create(&path).unwrap();
        let mut writer = SerializedFileWriter::new(file, schema, Arc::default()).unwrap();
        let mut group = writer.next_row_group().unwrap();
        let strings = |v: &[&str]| v.iter().map(|s| ByteArray::from(*s)).collect::<Vec<_>>();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&strings(&["q", "r"]), None, None).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<Int64Type>().write_batch(&[1, 0], None, None).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let values = strings(&["x", "y", "z"]);
        let levels = (Some(&[1i16, 1, 1][..]), Some(&[0i16, 1, 0][..]));
        column.typed::<ByteArrayType>().write_batch(&values, levels.0, levels.1).unwrap();
        column.close().unwrap();
        group.close().unwrap();
        writer.close().unwrap();
        let rows = read_rows(&path).unwrap();
        let expected =
            serde_json::json!({"question": "q", "label": 1, "choices": {"text": ["x", "y"]}});
        assert_eq!(Value::Object(rows[0].fields.clone()), expected);
        assert_eq!((rows[1].number, &rows[1].fields["choices"]["text"][0]), (2, &"z".into()));
        // Cut short, anywhere: an error, and no panic.
        let whole = std::fs::read(&path).unwrap();
        for len in [0, 3, 4, 20, whole.len() / 2, whole.len() - 1] {
            std::fs::write(&path, &whole[..len]).unwrap();
            assert_eq!(read_rows(&path).unwrap_err().exit().code(), 3, "{len} bytes");
        }
    }
}

//! Parquet files: one row a document, the text in one string column. Only that
//! column is read, a batch of rows at a time.

use std::cell::Cell;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::{Arc, Once};

use parquet::basic::Type as Physical;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use parquet::schema::types::Type;

use super::{Document, Documents, Input, failed};
use crate::error::DataError;

pub(super) fn documents<'a>(input: &'a Input, column: &'a str) -> Documents<'a> {
    match rows(input, column) {
        Ok(rows) => Box::new(Texts { rows: Some(rows), input, column, row: 0 }),
        Err(e) => failed(e),
    }
}

fn rows(input: &Input, column: &str) -> Result<RowIter<'static>, DataError> {
    let path = &input.path;
    let bad = |e: ParquetError| DataError::file(path, format!("is not a parquet file: {e}"));
    let file = File::open(path).map_err(DataError::read(path))?;
    let reader = guarded(|| SerializedFileReader::new(file)).map_err(bad)?;
    let schema = reader.metadata().file_metadata().schema().clone();
    let projection = project(&schema, column).map_err(|what| DataError::file(path, what))?;
    guarded(|| RowIter::from_file_into(Box::new(reader)).project(Some(projection))).map_err(bad)
}

/// The schema reduced to one column of strings.
fn project(schema: &Type, column: &str) -> Result<Type, String> {
    let fields = schema.get_fields();
    let Some(field) = fields.iter().find(|f| f.name() == column) else {
        let names: Vec<&str> = fields.iter().map(|f| f.name()).collect();
        return Err(format!(
            "no column `{column}` among {}; choose one with --column",
            names.join(", ")
        ));
    };
    if !field.is_primitive() || field.get_physical_type() != Physical::BYTE_ARRAY {
        return Err(format!("column `{column}` does not hold strings"));
    }
    Type::group_type_builder(schema.name())
        .with_fields(vec![Arc::clone(field)])
        .build()
        .map_err(|e| e.to_string())
}

struct Texts<'a> {
    /// `None` after an error.
    rows: Option<RowIter<'static>>,
    input: &'a Input,
    column: &'a str,
    row: u64,
}

impl Iterator for Texts<'_> {
    type Item = Result<Document, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        let rows = self.rows.as_mut()?;
        let next = guarded(|| rows.next().transpose());
        self.row += 1;
        let text = match next {
            Ok(Some(row)) => text_of(&row),
            Ok(None) => return None,
            Err(e) => Err(e.to_string()),
        };
        Some(match text {
            Ok(text) => Ok(Document { name: format!("{}:{}", self.input.name, self.row), text }),
            Err(what) => {
                self.rows = None;
                let what = format!("row {}, column `{}`: {what}", self.row, self.column);
                Err(DataError::file(&self.input.path, what))
            }
        })
    }
}

/// The row's only field; null counts as an empty document.
fn text_of(row: &Row) -> Result<String, String> {
    match row.get_column_iter().next().map(|(_, field)| field) {
        Some(Field::Str(text)) => Ok(text.clone()),
        Some(Field::Bytes(bytes)) => String::from_utf8(bytes.data().to_vec())
            .map_err(|e| format!("byte {} is not UTF-8", e.utf8_error().valid_up_to())),
        Some(Field::Null) | None => Ok(String::new()),
        Some(other) => Err(format!("expected a string, found {other}")),
    }
}

thread_local! {
    /// Whether a panic on this thread is about to become an error.
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// The reader of the parquet crate asserts what a well-formed file promises; a
/// damaged one must end in an error all the same, and without a backtrace.
pub(super) fn guarded<T>(
    read: impl FnOnce() -> Result<T, ParquetError>,
) -> Result<T, ParquetError> {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| {
        let usual = take_hook();
        set_hook(Box::new(move |info| {
            if !GUARDED.get() {
                usual(info);
            }
        }));
    });
    GUARDED.set(true);
    let done = catch_unwind(AssertUnwindSafe(read));
    GUARDED.set(false);
    done.unwrap_or_else(|panic| {
        let what = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or("unreadable");
        Err(ParquetError::General(what.to_owned()))
    })
}

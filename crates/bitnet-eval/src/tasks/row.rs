//! Fields of a row, with errors that name them.

use serde_json::{Map, Value};

/// The fields of a row.
#[derive(Debug, Clone, Copy)]
pub struct Fields<'a>(pub &'a Map<String, Value>);

impl<'a> Fields<'a> {
    /// A field, where there is one that is not null.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|v| !v.is_null())
    }

    /// A field.
    ///
    /// # Errors
    /// That it is missing, and what there is.
    pub fn get(&self, name: &str) -> Result<&'a Value, String> {
        self.find(name).ok_or_else(|| {
            let names: Vec<&str> = self.0.keys().map(String::as_str).collect();
            format!("no field `{name}` among {}", names.join(", "))
        })
    }

    /// A text.
    ///
    /// # Errors
    /// That it is missing or something else.
    pub fn text(&self, name: &str) -> Result<&'a str, String> {
        text(name, self.get(name)?)
    }

    /// A list of texts.
    ///
    /// # Errors
    /// That it is missing or something else.
    pub fn texts(&self, name: &str) -> Result<Vec<String>, String> {
        list(name, self.get(name)?)?.iter().map(|v| text(name, v).map(str::to_owned)).collect()
    }

    /// A group of fields.
    ///
    /// # Errors
    /// That it is missing or something else.
    pub fn group(&self, name: &str) -> Result<Fields<'a>, String> {
        group(name, self.get(name)?)
    }

    /// A whole number from 0 on, written as one or as text.
    ///
    /// # Errors
    /// That it is missing or something else.
    pub fn index(&self, name: &str) -> Result<usize, String> {
        let value = self.get(name)?;
        let number = match value {
            Value::Number(n) => n.as_u64(),
            Value::String(text) => text.trim().parse().ok(),
            _ => None,
        };
        number.and_then(|n| usize::try_from(n).ok()).ok_or_else(|| {
            format!("field `{name}`: expected an answer's number, found {}", shown(value))
        })
    }
}

pub(super) fn text<'v>(name: &str, value: &'v Value) -> Result<&'v str, String> {
    value.as_str().ok_or_else(|| format!("field `{name}`: expected text, found {}", shown(value)))
}

pub(super) fn list<'v>(name: &str, value: &'v Value) -> Result<&'v [Value], String> {
    let list = value.as_array().map(Vec::as_slice);
    list.ok_or_else(|| format!("field `{name}`: expected a list, found {}", shown(value)))
}

pub(super) fn group<'v>(name: &str, value: &'v Value) -> Result<Fields<'v>, String> {
    let object = value.as_object().map(Fields);
    object.ok_or_else(|| format!("field `{name}`: expected an object, found {}", shown(value)))
}

/// A value for an error, cut short.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(40) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}

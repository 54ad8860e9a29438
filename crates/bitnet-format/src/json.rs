//! Results for programs: what every command writes for `--json FILE|-`.

use std::io::{self, Write};

use serde::Serialize;

use crate::atomic::write_atomic;

/// Writes `value` as indented JSON and a newline to the file `dest`, which
/// appears only when complete; `-` is standard output.
///
/// # Errors
/// A value JSON cannot hold, or any I/O error, with the path in its message.
pub fn write_json(dest: &str, value: &(impl Serialize + ?Sized)) -> io::Result<()> {
    let mut text = serde_json::to_vec_pretty(value)?;
    text.push(b'\n');
    if dest == "-" {
        let mut out = io::stdout().lock();
        out.write_all(&text)?;
        return out.flush();
    }
    write_atomic(dest, |w| w.write_all(&text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_a_file_that_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.json");
        let value = serde_json::json!({"a": 1.5, "b": ["x"]});
        write_json(path.to_str().unwrap(), &value).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.ends_with("}\n"));
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), value);
    }
}

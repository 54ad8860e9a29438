//! Plain text tables and numbers that a human reads.

use std::fmt::Write as _;

/// Lines of `name  value`, the names padded to one width.
#[derive(Debug, Default)]
pub(crate) struct Table(Vec<(String, String)>);

impl Table {
    pub(crate) fn row(&mut self, name: impl Into<String>, value: impl Into<String>) -> &mut Self {
        self.0.push((name.into(), value.into()));
        self
    }

    pub(crate) fn render(&self) -> String {
        let width = self.0.iter().map(|(n, _)| n.chars().count()).max().unwrap_or(0);
        let mut text = String::new();
        for (name, value) in &self.0 {
            let line = format!("{name:width$}  {value}");
            let _ = writeln!(text, "{}", line.trim_end());
        }
        text
    }
}

/// `12345678` as `12,345,678`.
pub(crate) fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(c);
    }
    text
}

/// Bytes with a binary unit: `1.50 MiB (1,572,864 bytes)`.
pub(crate) fn bytes(n: u64) -> String {
    let mut value = n as f64;
    let mut unit = "";
    for next in ["KiB", "MiB", "GiB", "TiB"] {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    if unit.is_empty() {
        return format!("{n} bytes");
    }
    format!("{value:.2} {unit} ({} bytes)", thousands(n))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        for (n, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (1234567, "1,234,567")] {
            assert_eq!(thousands(n), text);
        }
        assert_eq!(bytes(1023), "1023 bytes");
        assert_eq!(bytes(1_572_864), "1.50 MiB (1,572,864 bytes)");
    }

    #[test]
    fn tables_align() {
        let mut t = Table::default();
        t.row("a", "1").row("long", "2");
        assert_eq!(t.render(), "a     1\nlong  2\n");
    }
}

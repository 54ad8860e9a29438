//! The result of a command: a table for people, one JSON object for programs.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;

use anyhow::{Context, Result};
use bitnet_data::Manifest;
use bitnet_format::atomic::write_atomic;
use serde_json::{Map, Value, json};

/// The manifest's keys, and `folder` and `bytes_per_token`.
pub(crate) fn object(manifest: &Manifest, folder: &Path) -> Result<Map<String, Value>> {
    let Value::Object(mut object) = serde_json::to_value(manifest)? else {
        anyhow::bail!("the manifest is no JSON object");
    };
    object.insert("folder".into(), json!(folder));
    object.insert("bytes_per_token".into(), json!(manifest.bytes_per_token()));
    Ok(object)
}

/// The table on stdout, the object where `--json` says.
pub(crate) fn print(
    manifest: &Manifest,
    folder: &Path,
    object: &Map<String, Value>,
    json: Option<&Path>,
) -> Result<()> {
    let json_text = || serde_json::to_string_pretty(object).map(|t| t + "\n");
    let mut stdout = std::io::stdout().lock();
    match json {
        Some(path) if path.as_os_str() == "-" => {
            stdout.write_all(json_text()?.as_bytes()).context("stdout")?;
        }
        _ => {
            stdout.write_all(table(manifest, folder).as_bytes()).context("stdout")?;
            if let Some(path) = json {
                let text = json_text()?;
                write_atomic(path, |w| w.write_all(text.as_bytes())).context("--json")?;
            }
        }
    }
    Ok(())
}

fn table(m: &Manifest, folder: &Path) -> String {
    let mut text = String::new();
    let mut row = |name: &str, value: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{name:<12} {value}");
    };
    row("corpus", format!("{} in {}", m.name, folder.display()));
    row(
        "documents",
        format!(
            "{} (train {}, validation {}); left out: {} duplicate, {} empty, {} beyond the cap",
            m.documents,
            m.train.documents,
            m.validation.documents,
            m.duplicates,
            m.empty_documents,
            m.beyond_cap
        ),
    );
    row("bytes", m.bytes.to_string());
    row(
        "tokens",
        format!("{} (train {}, validation {})", m.tokens, m.train.tokens, m.validation.tokens),
    );
    row("bytes/token", format!("{:.3}", m.bytes_per_token()));
    if let Some(chat) = &m.chat {
        let c = &chat.counts;
        row(
            "chat",
            format!(
                "context {}; {} tokens learned, {} of padding; {} conversations cut; left out: {} \
                 without an answer, {} with the name of a special token",
                chat.context,
                c.loss_tokens,
                c.padding_tokens,
                c.truncated,
                c.without_answer,
                c.special_in_text
            ),
        );
    }
    if let Some(part) = &m.part {
        row("part", part.part.to_string());
    }
    row("shards", format!("{} + {}", m.train.shards.len(), m.validation.shards.len()));
    row("vocabulary", m.tokenizer.vocab_size.to_string());
    row("tokenizer", format!("sha256 {}", m.tokenizer.sha256));
    row("corpus hash", m.corpus_hash.clone());
    text
}

//! The end of the quickstart: what the stages reported, in one table.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use bitnet_format::json::write_json;
use serde::Serialize;
use serde_json::Value;

use super::Paths;
use crate::generate::show;
use crate::table::{Table, bytes, thousands};

/// The JSON files that the stages wrote.
#[derive(Debug)]
pub(crate) struct Results {
    dir: PathBuf,
}

impl Results {
    pub(crate) fn new(dir: &Path) -> Self {
        Self { dir: dir.into() }
    }

    fn stage(&self, stage: &str) -> anyhow::Result<Value> {
        let path = self.dir.join(format!("{stage}.json"));
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("{}: cannot be read", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{}: not JSON", path.display()))
    }

    fn get<T>(
        &self,
        stage: &str,
        key: &str,
        of: impl Fn(&Value) -> Option<T>,
    ) -> anyhow::Result<T> {
        let value = self.stage(stage)?;
        of(&value[key]).ok_or_else(|| {
            let path = self.dir.join(format!("{stage}.json"));
            anyhow!("{}: key {key}: unexpected {}", path.display(), value[key])
        })
    }

    fn number(&self, stage: &str, key: &str) -> anyhow::Result<f64> {
        self.get(stage, key, Value::as_f64)
    }

    fn text(&self, stage: &str, key: &str) -> anyhow::Result<String> {
        self.get(stage, key, |v| v.as_str().map(str::to_owned))
    }

    /// The last checkpoint of the training.
    pub(crate) fn checkpoint(&self) -> anyhow::Result<PathBuf> {
        self.get("train", "checkpoint", |v| v.as_str().map(PathBuf::from))
    }
}

/// The quickstart's result; its keys are stable.
#[derive(Debug, Serialize)]
pub(crate) struct Summary {
    parameters: u64,
    fp32_bytes: u64,
    fp16_bytes: u64,
    packed_bytes: u64,
    train_val_loss: f64,
    packed_val_loss: f64,
    train_tokens_per_second: f64,
    decode_tokens_per_second: f64,
    seconds: f64,
    stage_seconds: BTreeMap<&'static str, f64>,
    sample: String,
    dir: PathBuf,
    config: PathBuf,
    data_dir: PathBuf,
    run_dir: PathBuf,
    checkpoint: PathBuf,
    model: PathBuf,
    #[serde(skip)]
    stages: Vec<(&'static str, f64)>,
}

impl Summary {
    pub(crate) fn collect(
        results: &Results,
        paths: &Paths,
        stages: Vec<(&'static str, f64)>,
    ) -> anyhow::Result<Self> {
        let parameters = results.get("train", "parameters", Value::as_u64)?;
        let packed = std::fs::metadata(&paths.model)
            .with_context(|| format!("{}: cannot be read", paths.model.display()))?;
        Ok(Self {
            parameters,
            fp32_bytes: 4 * parameters,
            fp16_bytes: 2 * parameters,
            packed_bytes: packed.len(),
            train_val_loss: results.number("train", "val_loss")?,
            packed_val_loss: results.number("perplexity", "nats")?,
            train_tokens_per_second: results.number("train", "tokens_per_second")?,
            decode_tokens_per_second: results.number("generate", "decode_tokens_per_second")?,
            seconds: stages.iter().map(|(_, s)| s).sum(),
            stage_seconds: stages.iter().copied().collect(),
            sample: results.text("generate", "prompt")? + &results.text("generate", "text")?,
            dir: paths.dir.clone(),
            config: paths.config.clone(),
            data_dir: paths.data.clone(),
            run_dir: paths.run.clone(),
            checkpoint: results.checkpoint()?,
            model: paths.model.clone(),
            stages,
        })
    }

    /// The table on stdout and JSON to `json`; the table goes to stderr where
    /// JSON takes stdout.
    pub(crate) fn print(&self, json: Option<&str>) -> anyhow::Result<()> {
        let text = self.render();
        if json == Some("-") {
            eprint!("\n{text}");
        } else {
            show(&format!("\n{text}"))?;
        }
        match json {
            Some(dest) => write_json(dest, self).context("cannot write the summary"),
            None => Ok(()),
        }
    }

    fn render(&self) -> String {
        let ratio = |b: u64| {
            format!("{:.1} times the packed file", b as f64 / self.packed_bytes.max(1) as f64)
        };
        let difference = (self.train_val_loss - self.packed_val_loss).abs();
        let mut t = Table::default();
        t.row("parameters", thousands(self.parameters))
            .row("as fp32", format!("{}, {}", bytes(self.fp32_bytes), ratio(self.fp32_bytes)))
            .row("as fp16", format!("{}, {}", bytes(self.fp16_bytes), ratio(self.fp16_bytes)))
            .row("packed", bytes(self.packed_bytes))
            .row("validation loss, training", format!("{:.6} nats/token", self.train_val_loss))
            .row(
                "validation loss, packed",
                format!("{:.6} nats/token (difference {difference:.1e})", self.packed_val_loss),
            )
            .row("training", format!("{:.0} tokens/s", self.train_tokens_per_second))
            .row("generation", format!("{:.0} tokens/s", self.decode_tokens_per_second));
        let stages: Vec<String> =
            self.stages.iter().map(|(n, s)| format!("{n} {s:.1} s")).collect();
        t.row("time", format!("{:.1} s: {}", self.seconds, stages.join(", ")))
            .row("data", self.data_dir.display().to_string())
            .row("run", self.run_dir.display().to_string())
            .row("model", self.model.display().to_string());
        let sample = self.sample.trim_end().replace('\n', "\n  | ");
        format!(
            "{}\nsample:\n  | {sample}\n\nNow try: bitnet generate {} \"pub fn \"\n",
            t.render(),
            self.model.display()
        )
    }
}

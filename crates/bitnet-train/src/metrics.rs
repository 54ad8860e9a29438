//! `metrics.jsonl` and `samples.jsonl`: one object a line, appended as the run
//! goes, the truth that plots and summaries are made of.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use bitnet_format::atomic::write_atomic;
use serde::{Deserialize, Serialize};

use crate::error::with_path;

/// A line of `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Metric {
    /// A training step.
    Train(TrainMetric),
    /// An evaluation.
    Eval(EvalMetric),
}

/// What is known of a training step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainMetric {
    /// Complete steps, this one included.
    pub step: u64,
    /// Mean loss over the step's tokens, before its update; nats per token.
    pub loss: f64,
    /// Learning rate.
    pub lr: f64,
    /// Norm of the mean gradient, before clipping.
    pub grad_norm: f64,
    /// Tokens seen so far.
    pub tokens: u64,
    /// Tokens per second of this step.
    pub tokens_per_second: f64,
    /// Seconds since the run began, interruptions left out.
    pub seconds: f64,
}

/// What is known of an evaluation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalMetric {
    /// Complete steps.
    pub step: u64,
    /// Mean loss over the first windows of the validation split; nats per token.
    pub val_loss: f64,
    /// Tokens predicted.
    pub tokens: u64,
    /// Seconds since the run began, interruptions left out.
    pub seconds: f64,
}

impl Metric {
    /// Complete steps when it was written.
    #[must_use]
    pub fn step(&self) -> u64 {
        match self {
            Self::Train(m) => m.step,
            Self::Eval(m) => m.step,
        }
    }
}

/// A line of `samples.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Complete steps.
    pub step: u64,
    /// What the sample begins with.
    pub prompt: String,
    /// What the model wrote after it.
    pub text: String,
}

/// A file of JSON lines that is appended to.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    file: File,
}

/// All that a line must say for a log to be cut back to a step.
#[derive(Deserialize)]
struct Step {
    step: u64,
}

impl Log {
    /// Opens a log for appending after `step`: lines of later steps, which a run
    /// wrote after its last checkpoint, and a line cut off by a kill are removed.
    ///
    /// # Errors
    /// Any I/O error, with the path.
    pub fn open(path: &Path, step: u64) -> io::Result<Self> {
        let keep = match fs::read_to_string(path) {
            Ok(text) => keep_until(&text, step),
            Err(e) if e.kind() == io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(with_path(path)(e)),
        };
        write_atomic(path, |w| w.write_all(keep.as_bytes()))?;
        let file = OpenOptions::new().append(true).open(path).map_err(with_path(path))?;
        Ok(Self { path: path.to_path_buf(), file })
    }

    /// Appends a line, at once: a kill loses nothing that was logged.
    ///
    /// # Errors
    /// Any I/O error, with the path.
    pub fn write(&mut self, line: &impl Serialize) -> io::Result<()> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        self.file.write_all(&text).map_err(with_path(&self.path))
    }
}

fn keep_until(text: &str, step: u64) -> String {
    let kept = |line: &&str| {
        line.ends_with('\n') && serde_json::from_str::<Step>(line).is_ok_and(|l| l.step <= step)
    };
    text.split_inclusive('\n').filter(kept).collect()
}

/// Reads `metrics.jsonl`, a line cut off at the end left out.
///
/// # Errors
/// Any I/O error, with the path; lines that are no metrics.
pub fn read(path: &Path) -> io::Result<Vec<Metric>> {
    let lines = BufReader::new(File::open(path).map_err(with_path(path))?).lines();
    let mut metrics = Vec::new();
    let mut broken: Option<(usize, serde_json::Error)> = None;
    for (index, line) in lines.enumerate() {
        if let Some((index, e)) = broken {
            let text = format!("{}:{}: {e}", path.display(), index + 1);
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        match serde_json::from_str(&line.map_err(with_path(path))?) {
            Ok(metric) => metrics.push(metric),
            Err(e) => broken = Some((index, e)),
        }
    }
    Ok(metrics)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn train(step: u64) -> Metric {
        let (loss, lr, grad_norm, tokens_per_second) = (1.5, 1e-3, 0.5, 1e4);
        let (tokens, seconds) = (step * 128, step as f64);
        let m = TrainMetric { step, loss, lr, grad_norm, tokens, tokens_per_second, seconds };
        Metric::Train(m)
    }

    fn eval(step: u64) -> Metric {
        Metric::Eval(EvalMetric { step, val_loss: 2.0, tokens: 64, seconds: 1.0 })
    }

    #[test]
    fn resuming_cuts_later_lines_and_a_torn_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut log = Log::open(&path, 0).unwrap();
        for line in [train(1), train(2), eval(2), train(3), eval(3)] {
            log.write(&line).unwrap();
        }
        let torn = fs::read_to_string(&path).unwrap() + "{\"kind\":\"train\",\"st";
        fs::write(&path, torn).unwrap();
        assert_eq!(read(&path).unwrap().len(), 5);
        let mut log = Log::open(&path, 2).unwrap();
        log.write(&train(3)).unwrap();
        assert_eq!(read(&path).unwrap(), [train(1), train(2), eval(2), train(3)]);
        assert_eq!(read(&path).unwrap().last().unwrap().step(), 3);
    }

    #[test]
    fn a_broken_line_within_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        fs::write(&path, "{\"kind\":\"other\",\"step\":1}\n{}\n").unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains("metrics.jsonl:1: unknown variant `other`"), "{error}");
    }
}

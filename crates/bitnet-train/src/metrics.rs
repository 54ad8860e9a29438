//! `metrics.jsonl` and `samples.jsonl`: one object a line, appended as the run
//! goes, the truth that plots and summaries are made of.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use bitnet_format::atomic::write_atomic;
use serde::de::DeserializeOwned;
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
    /// Statistics of the quantised weights.
    Weights(WeightMetric),
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
    /// Seconds of this step spent waiting for its tokens.
    #[serde(default)]
    pub data_seconds: f64,
    /// Resident memory after the step, bytes; none where the system does not say.
    #[serde(default)]
    pub rss_bytes: Option<u64>,
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

/// What is known of the quantised weights at a step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WeightMetric {
    /// Complete steps.
    pub step: u64,
    /// Tokens seen so far.
    pub tokens: u64,
    /// Seconds since the run began, interruptions left out.
    pub seconds: f64,
    /// The step that flips are counted from; none where nothing was seen before.
    pub since: Option<u64>,
    /// Of all weights in linear layers, the share that is 0.
    pub zero_share: f64,
    /// Of all weights in linear layers, the share that is another value than at
    /// `since`.
    pub flip_rate: Option<f64>,
    /// Every linear layer, in the order of the model.
    pub layers: Vec<LayerWeights>,
}

/// The quantised weights of one linear layer, counted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerWeights {
    /// The layer's name, as in `model.layers.0.mlp.up_proj`.
    pub layer: String,
    /// All of its weights.
    pub weights: u64,
    /// Weights that are -1.
    pub minus: u64,
    /// Weights that are 0.
    pub zero: u64,
    /// Weights that are 1.
    pub plus: u64,
    /// Weights whose value changed; none where nothing was seen before.
    pub flips: Option<u64>,
}

impl LayerWeights {
    /// A count as a share of the layer's weights.
    #[must_use]
    pub fn share(&self, count: u64) -> f64 {
        count as f64 / self.weights.max(1) as f64
    }

    /// The share of the layer's weights whose value changed.
    #[must_use]
    pub fn flip_rate(&self) -> Option<f64> {
        self.flips.map(|n| self.share(n))
    }
}

impl WeightMetric {
    /// Sums the layers up.
    #[must_use]
    pub fn new(
        (step, tokens, seconds): (u64, u64, f64),
        since: Option<u64>,
        layers: Vec<LayerWeights>,
    ) -> Self {
        let share = |n: u64| n as f64 / layers.iter().map(|l| l.weights).sum::<u64>().max(1) as f64;
        let flips: Option<u64> = layers.iter().map(|l| l.flips).sum();
        Self {
            step,
            tokens,
            seconds,
            since,
            zero_share: share(layers.iter().map(|l| l.zero).sum()),
            flip_rate: flips.map(share),
            layers,
        }
    }
}

impl Metric {
    /// Complete steps when it was written.
    #[must_use]
    pub fn step(&self) -> u64 {
        match self {
            Self::Train(m) => m.step,
            Self::Eval(m) => m.step,
            Self::Weights(m) => m.step,
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
    /// Opens a log for appending after step `after`: lines of later steps, which a
    /// run wrote after its last checkpoint, and a line cut off by a kill are removed;
    /// all of them where nothing is gone on from.
    ///
    /// # Errors
    /// Any I/O error, with the path.
    pub fn open(path: &Path, after: Option<u64>) -> io::Result<Self> {
        let keep = match fs::read_to_string(path) {
            Ok(text) => after.map_or_else(String::new, |step| keep_until(&text, step)),
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
    read_lines(path)
}

/// Reads `samples.jsonl`, a line cut off at the end left out.
///
/// # Errors
/// Any I/O error, with the path; lines that are no samples.
pub fn read_samples(path: &Path) -> io::Result<Vec<Sample>> {
    read_lines(path)
}

fn read_lines<T: DeserializeOwned>(path: &Path) -> io::Result<Vec<T>> {
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
        Metric::Train(TrainMetric {
            step,
            loss,
            lr,
            grad_norm,
            tokens,
            tokens_per_second,
            seconds,
            data_seconds: 0.01,
            rss_bytes: Some(1 << 20),
        })
    }

    fn weights(step: u64) -> Metric {
        let layer = |name: &str, zero, flips| {
            let (layer, weights, minus) = (name.to_owned(), 100, 20);
            LayerWeights { layer, weights, minus, zero, plus: 80 - zero, flips }
        };
        let (a, b) = (layer("a", 30, Some(4)), layer("b", 50, Some(8)));
        Metric::Weights(WeightMetric::new((step, 128, 2.0), Some(step - 1), vec![a, b]))
    }

    #[test]
    fn layers_are_summed_up() {
        let Metric::Weights(m) = weights(2) else { panic!("it is one of weights") };
        assert_eq!((m.zero_share, m.flip_rate), (0.4, Some(0.06)));
        assert_eq!(m.layers[1].flip_rate(), Some(0.08));
        let mut layers = m.layers;
        layers[1].flips = None;
        assert_eq!(WeightMetric::new((2, 0, 0.0), None, layers).flip_rate, None);
    }

    #[test]
    fn lines_of_earlier_versions_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let line = "{\"kind\":\"train\",\"step\":1,\"loss\":1.5,\"lr\":0.1,\"grad_norm\":1.0,\
                    \"tokens\":8,\"tokens_per_second\":4.0,\"seconds\":2.0}\n";
        fs::write(&path, line).unwrap();
        let [Metric::Train(m)] = &read(&path).unwrap()[..] else { panic!("one step") };
        assert_eq!((m.data_seconds, m.rss_bytes), (0.0, None));
    }

    fn eval(step: u64) -> Metric {
        Metric::Eval(EvalMetric { step, val_loss: 2.0, tokens: 64, seconds: 1.0 })
    }

    #[test]
    fn resuming_cuts_later_lines_and_a_torn_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut log = Log::open(&path, None).unwrap();
        for line in [train(1), train(2), eval(2), weights(2), train(3), weights(3)] {
            log.write(&line).unwrap();
        }
        let torn = fs::read_to_string(&path).unwrap() + "{\"kind\":\"train\",\"st";
        fs::write(&path, torn).unwrap();
        assert_eq!(read(&path).unwrap().len(), 6);
        let mut log = Log::open(&path, Some(2)).unwrap();
        log.write(&train(3)).unwrap();
        assert_eq!(read(&path).unwrap(), [train(1), train(2), eval(2), weights(2), train(3)]);
        assert_eq!(read(&path).unwrap().last().unwrap().step(), 3);
        drop(Log::open(&path, None).unwrap());
        assert_eq!(read(&path).unwrap(), []);
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

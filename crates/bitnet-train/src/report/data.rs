//! A run folder as a report sees it: read, never written, finished or not.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use toml::Table;

use crate::config_file::flatten;
use crate::metrics::{self, EvalMetric, Metric, Sample, TrainMetric, WeightMetric};
use crate::run::LAST_STEPS;
use crate::run_info::RunInfo;
use crate::{TrainError, error};

/// What a run folder holds.
#[derive(Debug, Clone)]
pub struct RunData {
    /// What the run is called in the report: its folder's name.
    pub label: String,
    /// The folder.
    pub folder: PathBuf,
    /// Every key of its config as `table.key`, with its value as TOML.
    pub config: BTreeMap<String, String>,
    /// The training steps.
    pub steps: Vec<TrainMetric>,
    /// The evaluations.
    pub evals: Vec<EvalMetric>,
    /// The statistics of the weights.
    pub weights: Vec<WeightMetric>,
    /// The samples.
    pub samples: Vec<Sample>,
    /// What made it; none in the folder of an earlier version.
    pub info: Option<RunInfo>,
}

impl RunData {
    /// Reads a run folder.
    ///
    /// # Errors
    /// A folder that is none of a run, with what it lacks; files that are broken.
    pub fn load(folder: &Path) -> Result<Self, TrainError> {
        let bad = |what: String| TrainError::NoRun { path: folder.to_path_buf(), what };
        if !folder.is_dir() {
            return Err(bad("there is no such folder".into()));
        }
        let read = |name: &str| {
            let path = folder.join(name);
            fs::read_to_string(path).map_err(|e| bad(format!("{name}: {e}")))
        };
        let text = read("config.toml")?;
        let table: Table = text
            .parse()
            .map_err(|e: toml::de::Error| bad(format!("config.toml: {}", e.message())))?;
        let mut config = BTreeMap::new();
        flatten("", &table, &mut config);
        let broken = |e: std::io::Error| bad(e.to_string());
        let all = metrics::read(&folder.join("metrics.jsonl")).map_err(broken)?;
        let (mut steps, mut evals, mut weights) = (Vec::new(), Vec::new(), Vec::new());
        for metric in all {
            match metric {
                Metric::Train(m) => steps.push(m),
                Metric::Eval(m) => evals.push(m),
                Metric::Weights(m) => weights.push(m),
            }
        }
        let samples = folder.join("samples.jsonl");
        let samples = match samples.exists() {
            true => metrics::read_samples(&samples).map_err(broken)?,
            false => Vec::new(),
        };
        let name = fs::canonicalize(folder).map_err(error::with_path(folder))?;
        let label = name.file_name().unwrap_or(name.as_os_str()).to_string_lossy().into_owned();
        let info = RunInfo::load(folder)?;
        let folder = folder.to_path_buf();
        Ok(Self { label, folder, config, steps, evals, weights, samples, info })
    }

    /// Reads several; runs whose folders have one name are told apart by their paths.
    ///
    /// # Errors
    /// The first error of [`RunData::load`].
    pub fn load_all(folders: &[PathBuf]) -> Result<Vec<Self>, TrainError> {
        let mut runs: Vec<Self> =
            folders.iter().map(|f| Self::load(f)).collect::<Result<_, _>>()?;
        let labels: Vec<String> = runs.iter().map(|r| r.label.clone()).collect();
        for run in &mut runs {
            if labels.iter().filter(|l| **l == run.label).count() > 1 {
                run.label = run.folder.display().to_string();
            }
        }
        Ok(runs)
    }

    /// Complete steps.
    #[must_use]
    pub fn step(&self) -> u64 {
        self.steps.last().map_or(0, |m| m.step)
    }

    /// Steps of the whole schedule.
    #[must_use]
    pub fn steps_planned(&self) -> Option<u64> {
        self.config.get("schedule.steps")?.parse().ok()
    }

    /// Whether the last step of the schedule was made and evaluated.
    #[must_use]
    pub fn finished(&self) -> bool {
        let evaluated = self.evals.last().is_some_and(|m| m.step == self.step());
        self.steps_planned() == Some(self.step()) && evaluated
    }

    /// Mean training loss of the last 100 steps, nats per token.
    #[must_use]
    pub fn train_loss(&self) -> Option<f64> {
        let last = &self.steps[self.steps.len().saturating_sub(LAST_STEPS)..];
        (!last.is_empty()).then(|| last.iter().map(|m| m.loss).sum::<f64>() / last.len() as f64)
    }

    /// Validation loss at the last evaluation, nats per token.
    #[must_use]
    pub fn val_loss(&self) -> Option<f64> {
        self.evals.last().map(|m| m.val_loss)
    }

    /// Seconds of training so far, interruptions left out.
    #[must_use]
    pub fn seconds(&self) -> Option<f64> {
        let last = [self.steps.last().map(|m| m.seconds), self.evals.last().map(|m| m.seconds)];
        last.into_iter().flatten().reduce(f64::max)
    }

    /// Seconds spent in steps: forward, backward and update alone.
    fn step_seconds(&self) -> f64 {
        let mut before = 0;
        let mut sum = 0.0;
        for m in &self.steps {
            sum += (m.tokens - before.min(m.tokens)) as f64 / m.tokens_per_second.max(1e-9);
            before = m.tokens;
        }
        sum
    }

    /// Training tokens per second of the steps alone.
    #[must_use]
    pub fn tokens_per_second(&self) -> Option<f64> {
        let tokens = self.steps.last()?.tokens;
        Some(tokens as f64 / self.step_seconds().max(1e-9))
    }

    /// Of the time of the steps, the share spent waiting for tokens.
    #[must_use]
    pub fn data_share(&self) -> Option<f64> {
        let waited: f64 = self.steps.iter().map(|m| m.data_seconds).sum();
        (!self.steps.is_empty()).then(|| waited / self.step_seconds().max(1e-9))
    }

    /// The most memory that was resident after a step, bytes.
    #[must_use]
    pub fn peak_rss_bytes(&self) -> Option<u64> {
        self.steps.iter().filter_map(|m| m.rss_bytes).max()
    }
}

/// Of the keys in which the runs differ, the values of every run; where a run has
/// no such key, none. The run folder is not among them.
pub(crate) fn differences(runs: &[RunData]) -> Vec<(&str, Vec<Option<&str>>)> {
    let mut keys: Vec<&str> =
        runs.iter().flat_map(|r| r.config.keys().map(String::as_str)).collect();
    keys.sort_unstable();
    keys.dedup();
    keys.into_iter()
        .filter(|key| *key != "run_dir")
        .map(|key| (key, runs.iter().map(|r| r.config.get(key).map(String::as_str)).collect()))
        .filter(|(_, values): &(&str, Vec<Option<&str>>)| values.windows(2).any(|w| w[0] != w[1]))
        .collect()
}

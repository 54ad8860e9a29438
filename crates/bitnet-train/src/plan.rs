//! What a run will take, before it runs (`--dry-run`), and the micro-batch that
//! fits the memory (`batch.micro_batch = "auto"`).

use std::fmt;
use std::fs;

use bitnet_core::ParameterCount;
use bitnet_core::training_memory::TeacherShape;
use bitnet_data::{Dataset, Split};
use serde::Serialize;

use crate::config::TrainConfig;
use crate::corpus;
use crate::device::DeviceChoice;
use crate::distill::DistillConfig;
use crate::estimate::{self, Parts};
use crate::run::RunOptions;
use crate::{TrainError, config_file, memory};

/// What an estimate may be short of the peak by: a micro-batch is chosen so that
/// this share of it is left.
const MARGIN: f64 = 0.15;

/// What a run will take; the keys of `--dry-run --json`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// The run's name.
    pub name: String,
    /// Parameters by part.
    pub parameters: ParameterCount,
    /// All parameters.
    pub total_parameters: u64,
    /// "adamw" or "muon".
    pub optimizer: &'static str,
    /// Sequences that go through the model at once.
    pub micro_batch: usize,
    /// Micro-steps of a step.
    pub micro_steps: usize,
    /// Whether activations are recomputed.
    pub recompute: bool,
    /// Tensors that are live at the peak, in bytes.
    pub tensors: Parts,
    /// Pages of the token shards that the run reads, in bytes.
    pub data_bytes: u64,
    /// What the process holds before it has a model, see [`memory::program_bytes`].
    pub program_bytes: u64,
    /// The phase of the run that needs most.
    pub peak_in: &'static str,
    /// The predicted peak of resident memory.
    pub predicted_peak_bytes: u64,
    /// What the system could give now; none where it does not say.
    pub available_bytes: Option<u64>,
}

/// Plans a run and writes nothing.
///
/// # Errors
/// Those of a config or data that cannot be trained on.
pub fn dry_run(options: &RunOptions) -> Result<Plan, TrainError> {
    let mut config = options.config.clone();
    config.validate()?;
    config.quantization.check_device(options.device.first())?;
    config.optimizer.check_device(options.device.first())?;
    let train = Dataset::open(&config.data.dir, Split::Train)?;
    let validation = Dataset::open(&config.data.dir, Split::Validation)?;
    let tokenizer = train.tokenizer()?;
    corpus::check(&config, &train, &validation, &tokenizer)?;
    resolve(&mut config, options, &train, &validation)?;
    let teacher = teacher(&config)?;
    Ok(Plan::new(&config, teacher.as_ref(), &train, &validation))
}

/// The teacher of a config with `[distill]`.
fn teacher(config: &TrainConfig) -> Result<Option<TeacherShape>, TrainError> {
    let shape = |distill: &DistillConfig| distill.shape(&config.model);
    config.distill.as_ref().map(shape).transpose()
}

/// Replaces an automatic micro-batch by a number: that of the run that is gone on
/// with, or the greatest that fits. The plan, where one was made for it.
///
/// # Errors
/// A device whose memory is not known, or too little of it.
pub(crate) fn resolve(
    config: &mut TrainConfig,
    options: &RunOptions,
    train: &Dataset,
    validation: &Dataset,
) -> Result<Option<Plan>, TrainError> {
    if config.batch.micro_batch != 0 {
        return Ok(None);
    }
    let saved = config.run_dir.join("config.toml");
    if options.resume && saved.is_file() {
        config.batch.micro_batch = config_file::load(&saved, &[])?.batch.micro_batch;
        config.validate()?;
        if config.batch.micro_batch != 0 {
            return Ok(None);
        }
    }
    if options.device.first() != DeviceChoice::Cpu {
        return Err(auto(format!("is for the CPU alone; give a number for {}", options.device)));
    }
    let Some(available) = memory::available_bytes() else {
        return Err(auto("the system does not say how much memory is free; give a number".into()));
    };
    let teacher = teacher(config)?;
    let teacher = teacher.as_ref();
    let mut smallest = None;
    for micro_batch in divisors(config.batch.tokens / config.batch.sequence) {
        config.batch.micro_batch = micro_batch;
        let plan = Plan::new(config, teacher, train, validation);
        if plan.fits(available) {
            return Ok(Some(plan));
        }
        smallest = Some(plan.needed());
    }
    let mut reason =
        format!("even 1 needs {} bytes, {available} are free", smallest.unwrap_or_default());
    if !config.batch.recompute {
        config.batch.recompute = true;
        let plan = Plan::new(config, teacher, train, validation);
        reason += &format!("; with batch.recompute = true it needs {}", plan.needed());
    }
    Err(auto(reason))
}

fn auto(reason: String) -> TrainError {
    TrainError::value("batch.micro_batch", "\"auto\"", reason)
}

/// From the greatest down.
fn divisors(n: usize) -> impl Iterator<Item = usize> {
    (1..=n).rev().filter(move |d| n.is_multiple_of(*d))
}

impl Plan {
    /// The plan of a config whose micro-batch is a number, and of its teacher.
    fn new(
        config: &TrainConfig,
        teacher: Option<&TeacherShape>,
        train: &Dataset,
        validation: &Dataset,
    ) -> Self {
        let parameters = config.model.parameter_count();
        let (tensors, peak_in) = estimate::tensors(config, teacher);
        let data_bytes = data_bytes(config, train, validation);
        let program_bytes = memory::program_bytes().unwrap_or(0);
        Self {
            name: config.name.clone(),
            parameters,
            total_parameters: parameters.total(),
            optimizer: config.optimizer.kind.name(),
            micro_batch: config.batch.micro_batch,
            micro_steps: config.batch.micro_steps(),
            recompute: config.batch.recompute,
            tensors,
            data_bytes,
            program_bytes,
            peak_in,
            predicted_peak_bytes: tensors.total() + data_bytes + program_bytes,
            available_bytes: memory::available_bytes(),
        }
    }

    /// Bytes that are to be allocated yet, with the margin.
    fn needed(&self) -> u64 {
        ((self.predicted_peak_bytes - self.program_bytes) as f64 * (1.0 + MARGIN)) as u64
    }

    fn fits(&self, available: u64) -> bool {
        self.needed() <= available
    }
}

/// Pages of the mapped shards that are read: all of a file, or as many windows as
/// the run reads, each with the pages that the system maps around it.
fn data_bytes(config: &TrainConfig, train: &Dataset, validation: &Dataset) -> u64 {
    /// Linux maps 64 KiB around a page that is read for the first time.
    const AROUND: u64 = 64 << 10;
    let files = |dataset: &Dataset| -> u64 {
        let manifest = dataset.manifest();
        let shards = match dataset.split() {
            Split::Train => &manifest.train.shards,
            Split::Validation => &manifest.validation.shards,
        };
        let path = |name: &String| dataset.folder().join(name);
        shards.iter().map(|s| fs::metadata(path(&s.file)).map_or(0, |m| m.len())).sum()
    };
    let window = |bytes: u64, tokens: u64| {
        // Bytes a token, at least one.
        let width = bytes.div_ceil(tokens.max(1)).max(1);
        config.batch.sequence as u64 * width
    };
    let train_file = files(train);
    let sequences = (config.batch.tokens / config.batch.sequence) as u64;
    let windows = config.schedule.steps.saturating_mul(sequences);
    let read = windows.saturating_mul(window(train_file, train.tokens()) + AROUND);
    let validation_file = files(validation);
    let scored = match config.eval.windows {
        0 => u64::MAX,
        n => n.saturating_mul(window(validation_file, validation.tokens())).saturating_add(AROUND),
    };
    train_file.min(read) + validation_file.min(scored)
}

/// Bytes as `1.25 GiB` or `37.2 MiB`.
#[must_use]
pub fn readable(bytes: u64) -> String {
    let mib = bytes as f64 / f64::from(1 << 20);
    if mib < 1024.0 { format!("{mib:.1} MiB") } else { format!("{:.2} GiB", mib / 1024.0) }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let p = &self.parameters;
        writeln!(f, "parameters       {}", self.total_parameters)?;
        for (name, count) in [
            ("embedding", p.embedding),
            ("head", p.head),
            ("linear layers", p.linear),
            ("norms", p.norms),
        ] {
            writeln!(f, "  {name:<14} {count}")?;
        }
        let recompute = if self.recompute { ", activations recomputed" } else { "" };
        writeln!(
            f,
            "micro-batch      {} sequences, {} micro-steps a step{recompute}",
            self.micro_batch, self.micro_steps
        )?;
        writeln!(f, "memory at the peak, in the {}:", self.peak_in)?;
        let t = &self.tensors;
        for (name, bytes) in [
            ("weights", t.weights),
            ("gradients", t.gradients),
            (self.optimizer, t.optimizer),
            ("activations", t.activations),
            ("head, logits", t.head),
            ("checkpoint", t.checkpoint),
            ("teacher", t.teacher),
            ("data", self.data_bytes),
            ("program", self.program_bytes),
        ] {
            // Few runs have a teacher.
            if bytes > 0 || name != "teacher" {
                writeln!(f, "  {name:<14} {}", readable(bytes))?;
            }
        }
        writeln!(f, "predicted peak   {}", readable(self.predicted_peak_bytes))?;
        match self.available_bytes {
            Some(bytes) => write!(f, "available        {}", readable(bytes)),
            None => write!(f, "available        unknown"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divisors_come_from_the_greatest_down() {
        assert_eq!(divisors(12).collect::<Vec<_>>(), [12, 6, 4, 3, 2, 1]);
        assert_eq!(divisors(1).collect::<Vec<_>>(), [1]);
    }

    #[test]
    fn bytes_are_readable() {
        assert_eq!(readable(37 << 20), "37.0 MiB");
        assert_eq!(readable(1280 << 20), "1.25 GiB");
    }
}

//! `bitnet-train reproduce`: a run made again from its folder, and its losses
//! compared with the old ones, bit for bit.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};

use bitnet_data::{Dataset, Split};
use serde::Serialize;

use crate::config::MetricsConfig;
use crate::device::DeviceChoice;
use crate::devices::DeviceList;
use crate::metrics::{self, Metric};
use crate::progress::View;
use crate::report::RunData;
use crate::run_info::{Data, Machine, Program, RunInfo, Start};
use crate::{Ranks, RunOptions, Stop, TrainConfig, TrainError, config_file, run_on};

/// What to make again.
#[derive(Debug, Clone)]
pub struct Request {
    /// The run folder.
    pub run: PathBuf,
    /// The folder of the new run.
    pub into: PathBuf,
    /// The steps to make, from the first one on; none: as many as the run has.
    pub steps: Option<u64>,
    /// Where the tokens lie, if not where they did.
    pub data: Option<PathBuf>,
    /// The device, if not the run's.
    pub device: Option<DeviceList>,
}

/// How the two runs compare.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// Steps that both have.
    pub steps: u64,
    /// Values compared: training losses, gradient norms and validation losses.
    pub values: u64,
    /// Whether every value has the same bits.
    pub identical: bool,
    /// The first value that differs.
    pub first: Option<Difference>,
    /// The greatest difference of a loss.
    pub largest: Option<Difference>,
    /// What differs between then and now and may be the cause.
    pub warnings: Vec<String>,
}

/// A value that is not the same.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Difference {
    /// Complete steps.
    pub step: u64,
    /// `loss`, `grad_norm` or `val_loss`.
    pub value: &'static str,
    /// In the old run.
    pub old: f64,
    /// In the new one.
    pub new: f64,
}

impl Difference {
    fn size(&self) -> f64 {
        (self.new - self.old).abs()
    }
}

/// Runs again and compares. What differs between then and now, and may be why the
/// losses do, is told on standard error first.
///
/// # Errors
/// A folder that is none of a run, a config that this version cannot read, and the
/// errors of a run.
pub fn reproduce(request: &Request, stop: &Stop, view: View) -> Result<Comparison, TrainError> {
    let old = RunData::load(&request.run)?;
    let no_run = |what: &str| TrainError::NoRun { path: request.run.clone(), what: what.into() };
    if old.steps.is_empty() {
        return Err(no_run("it has not made a step yet"));
    }
    let start = RunInfo::load(&request.run)?.and_then(|info| info.starts.into_iter().last());
    let config = config(request)?;
    let until = request.steps.unwrap_or(u64::MAX).min(old.step());
    let device = match (request.device.clone(), &start) {
        (Some(device), _) => device,
        (None, Some(start)) => start.device.parse().map_err(|reason: String| no_run(&reason))?,
        (None, None) => DeviceChoice::Cpu.into(),
    };
    let data = Dataset::open(&config.data.dir, Split::Train)?;
    let data = Data::of(&config.data.dir, data.manifest());
    let warnings = match &start {
        Some(start) => warnings(&old, start, &Start::now(0, &device, data)),
        None => vec!["there is no run.json: what made the run is not known".to_owned()],
    };
    for warning in &warnings {
        eprintln!("warning: {warning}");
    }
    let options = RunOptions { config, device, resume: false, until: Some(until) };
    run_on(&Ranks::alone("a run is reproduced in one")?, &options, stop, view)?;
    let file = |folder: &Path| metrics::read(&folder.join("metrics.jsonl"));
    let (a, b) = (values(&file(&request.run)?, until), values(&file(&request.into)?, until));
    Ok(compare(&a, &b, warnings))
}

/// The run's config, with what is of no influence on losses turned off.
fn config(request: &Request) -> Result<TrainConfig, TrainError> {
    let mut config = config_file::load(&request.run.join("config.toml"), &[])?;
    config.run_dir.clone_from(&request.into);
    if let Some(data) = &request.data {
        config.data.dir.clone_from(data);
    }
    config.sample.every = 0;
    config.sample.prompts.clear();
    config.checkpoint.every = 0;
    config.checkpoint.keep = 1;
    config.metrics = MetricsConfig { weights_every: 0, tensorboard: false };
    Ok(config)
}

fn warnings(run: &RunData, old: &Start, new: &Start) -> Vec<String> {
    let mut all = Vec::new();
    let mut differ = |what: &str, old: &str, new: &str| {
        if old != new {
            all.push(format!("{what}: the run had {old}, here it is {new}"));
        }
    };
    differ("corpus hash", &old.data.corpus_hash, &new.data.corpus_hash);
    differ("tokenizer", &old.data.tokenizer_sha256, &new.data.tokenizer_sha256);
    let Program { target, features, .. } = &new.program;
    differ("program", &old.program.summary(), &new.program.summary());
    differ("platform", &old.program.target, target);
    differ("features", &old.program.features.join(","), &features.join(","));
    differ("device", &old.device, &new.device);
    let Machine { instruction_set, .. } = &new.machine;
    differ("instruction set", &old.machine.instruction_set, instruction_set);
    let starts = run.info.iter().flat_map(|info| &info.starts);
    for start in starts {
        for change in &start.changed {
            all.push(format!(
                "the run was gone on with another config at step {}: {change}",
                start.step
            ));
        }
    }
    all
}

type Values = Vec<(u64, &'static str, f64)>;

/// Every value that depends on the arithmetic alone, up to a step.
fn values(metrics: &[Metric], until: u64) -> Values {
    let mut all = Values::new();
    for metric in metrics.iter().filter(|m| m.step() <= until) {
        match metric {
            Metric::Train(m) => {
                all.push((m.step, "loss", m.loss));
                all.push((m.step, "grad_norm", m.grad_norm));
            }
            Metric::Eval(m) => all.push((m.step, "val_loss", m.val_loss)),
            Metric::Weights(_) => {}
        }
    }
    all
}

fn compare(old: &Values, new: &Values, warnings: Vec<String>) -> Comparison {
    let (mut first, mut largest): (Option<Difference>, Option<Difference>) = (None, None);
    let (mut count, mut steps) = (0, 0);
    let new: HashMap<_, f64> = new.iter().map(|&(step, name, x)| ((step, name), x)).collect();
    for &(step, value, old) in old {
        // An evaluation is made before the step that follows it: the last one may lack.
        let Some(&new) = new.get(&(step, value)) else { continue };
        count += 1;
        steps += u64::from(value == "loss");
        if old.to_bits() == new.to_bits() {
            continue;
        }
        let difference = Difference { step, value, old, new };
        first.get_or_insert_with(|| difference.clone());
        let larger = largest.as_ref().is_none_or(|l| difference.size() > l.size());
        if larger && value != "grad_norm" {
            largest = Some(difference);
        }
    }
    Comparison { steps, values: count, identical: first.is_none(), first, largest, warnings }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { step, value, old, new } = self;
        write!(f, "step {step}: {value} {old} then, {new} now, {:.3e} apart", self.size())
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { steps, values, .. } = self;
        if self.identical {
            return write!(f, "identical: {values} values of {steps} steps, bit for bit");
        }
        write!(f, "different: {values} values of {steps} steps compared")?;
        if let Some(first) = &self.first {
            write!(f, "\nfirst difference    {first}")?;
        }
        if let Some(largest) = &self.largest {
            write!(f, "\nlargest difference  {largest}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_and_the_largest_difference_are_found() {
        let old: Values = vec![
            (1, "loss", 5.0),
            (1, "grad_norm", 1.0),
            (2, "loss", 4.0),
            (2, "grad_norm", 2.0),
            (2, "val_loss", 4.5),
        ];
        let same = compare(&old, &old, Vec::new());
        assert!(same.identical && same.first.is_none() && same.largest.is_none());
        assert_eq!(same.to_string(), "identical: 5 values of 2 steps, bit for bit");
        let mut new = old.clone();
        new[1].2 = 9.0;
        new[2].2 = 4.0 + f64::EPSILON * 4.0;
        new[4].2 = 4.25;
        let text = compare(&old, &new, Vec::new()).to_string();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "different: 5 values of 2 steps compared");
        assert!(lines[1].ends_with("step 1: grad_norm 1 then, 9 now, 8.000e0 apart"), "{text}");
        assert!(lines[2].ends_with("step 2: val_loss 4.5 then, 4.25 now, 2.500e-1 apart"));
        // A value that only one has is not compared.
        let part = compare(&old, &old[..3].to_vec(), Vec::new());
        assert_eq!((part.values, part.steps, part.identical), (3, 2, true));
        assert_eq!(values(&[], 3), []);
    }
}

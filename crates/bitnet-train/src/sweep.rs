//! `bitnet-train sweep`: one run after the other, for every combination of some
//! settings or for every line of a list; resumable, with a table at the end.

use std::any::Any;
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use bitnet_core::exit;
use bitnet_format::atomic::write_atomic;
use bitnet_format::json::write_json;
use serde::Serialize;

use crate::devices::DeviceList;
use crate::error::with_path;
use crate::progress::{View, duration};
use crate::report::RunData;
use crate::{Ranks, RunOptions, Stop, TrainConfig, TrainError, config_file, run_on};

/// One run of a sweep.
#[derive(Debug, Clone, PartialEq)]
pub struct Variant {
    /// The name of its folder.
    pub name: String,
    /// What it changes in the config, each as `table.key=value`.
    pub overrides: Vec<String>,
}

/// How far a run of a sweep is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Its schedule is done.
    Finished,
    /// It has not begun, or not ended.
    Unfinished,
    /// It ended with an error.
    Failed,
}

/// What a run of a sweep came to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// The name of its folder.
    pub name: String,
    /// What it changes in the config.
    pub overrides: Vec<String>,
    /// How far it is.
    pub status: Status,
    /// Why it failed.
    pub error: Option<String>,
    /// Complete steps.
    pub steps: u64,
    /// Validation loss at the last evaluation, nats per token.
    pub val_loss: Option<f64>,
    /// Mean training loss of the last 100 steps, nats per token.
    pub train_loss: Option<f64>,
    /// Training tokens per second of the steps alone.
    pub tokens_per_second: Option<f64>,
    /// Seconds of training.
    pub seconds: Option<f64>,
}

/// A table of [`Outcome`]s, the best validation loss first.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Table {
    /// The runs.
    pub runs: Vec<Outcome>,
}

/// Every combination of the values of `--grid key=v1,v2,…`, the last key changing
/// fastest.
///
/// # Errors
/// A grid without key or value, or with a key twice.
pub fn grid(grids: &[String]) -> Result<Vec<Variant>, TrainError> {
    let mut sets: Vec<Vec<String>> = vec![Vec::new()];
    let mut keys = BTreeSet::new();
    for text in grids {
        let bad = |what: &str| TrainError::Sweep(format!("--grid {text}: {what}"));
        let (key, values) = text.split_once('=').ok_or_else(|| bad("expected table.key=v1,v2"))?;
        if !keys.insert(key.trim()) {
            return Err(bad("this key stands in another --grid"));
        }
        let values = split(values, |c| c == ',');
        if key.trim().is_empty() || values.iter().any(|v| v.trim().is_empty()) {
            return Err(bad("a key or a value is empty"));
        }
        let extend = |set: &Vec<String>, value: &str| {
            let new = format!("{}={}", key.trim(), value.trim());
            set.iter().cloned().chain([new]).collect()
        };
        sets = sets.iter().flat_map(|set| values.iter().map(|v| extend(set, v))).collect();
    }
    named(sets)
}

/// The runs that a file lists: one a line, as `table.key=value`s with spaces between
/// them; `#` begins a comment line.
///
/// # Errors
/// A file that cannot be read or lists nothing, a line that is none.
pub fn list(path: &Path) -> Result<Vec<Variant>, TrainError> {
    let text = fs::read_to_string(path).map_err(with_path(path))?;
    let mut sets = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let set: Vec<String> = (split(line, char::is_whitespace).into_iter())
            .filter(|word| !word.is_empty())
            .map(str::to_owned)
            .collect();
        if let Some(word) = set.iter().find(|word| !word.contains('=')) {
            let place = format!("{}:{}", path.display(), index + 1);
            return Err(TrainError::Sweep(format!("{place}: {word}: expected table.key=value")));
        }
        sets.push(set);
    }
    if sets.is_empty() {
        return Err(TrainError::Sweep(format!("{}: lists no runs", path.display())));
    }
    named(sets)
}

/// The parts of a text between separators that stand outside quotes and brackets.
fn split(text: &str, separates: impl Fn(char) -> bool) -> Vec<&str> {
    let (mut parts, mut start) = (Vec::new(), 0);
    let (mut depth, mut quote) = (0i32, None);
    for (at, c) in text.char_indices() {
        match (c, quote) {
            (_, Some(q)) if c == q => quote = None,
            (_, Some(_)) => {}
            ('"' | '\'', None) => quote = Some(c),
            ('[' | '{', None) => depth += 1,
            (']' | '}', None) => depth -= 1,
            _ if depth == 0 && separates(c) => {
                parts.push(&text[start..at]);
                start = at + c.len_utf8();
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
}

/// Names every set by the last parts of its keys and its values; where that is not
/// unique, by whole keys.
fn named(sets: Vec<Vec<String>>) -> Result<Vec<Variant>, TrainError> {
    let name = |set: &[String], whole: bool| -> String {
        let parts = set.iter().map(|text| {
            let (key, value) = text.split_once('=').unwrap_or((text, ""));
            let key = if whole { key } else { key.rsplit('.').next().unwrap_or(key) };
            format!("{key}-{value}").replace(['"', '\''], "")
        });
        let safe = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' };
        parts.collect::<Vec<_>>().join("_").chars().map(safe).collect()
    };
    for whole in [false, true] {
        let names: Vec<String> = sets.iter().map(|set| name(set, whole)).collect();
        if names.iter().collect::<BTreeSet<_>>().len() == sets.len() {
            let make = |(name, overrides)| Variant { name, overrides };
            return Ok(names.into_iter().zip(sets).map(make).collect());
        }
    }
    Err(TrainError::Sweep("two runs of the sweep are the same".to_owned()))
}

/// Runs every variant in a folder of its own below `dir`; a finished one is left as
/// it is, an unfinished one gone on with. `dir` gets `sweep.json` and `sweep.md`,
/// written anew after each run. A run that fails does not keep the others from
/// running.
///
/// # Errors
/// An override that cannot be applied, before anything runs; `stop`, once the
/// current run has saved a checkpoint; I/O errors with the path.
pub fn sweep(
    config: &TrainConfig,
    variants: &[Variant],
    dir: &Path,
    device: &DeviceList,
    stop: &Stop,
    view: View,
) -> Result<Table, TrainError> {
    let mut configs = Vec::new();
    for variant in variants {
        let mut config = config_file::with_overrides(config.clone(), &variant.overrides)?;
        config.run_dir = dir.join(&variant.name);
        config.validate()?;
        configs.push(config);
    }
    fs::create_dir_all(dir).map_err(with_path(dir))?;
    let mut errors: Vec<Option<String>> = vec![None; variants.len()];
    let mut interrupted = None;
    for (index, config) in configs.iter().enumerate() {
        let Variant { name, .. } = &variants[index];
        eprintln!("run {} of {}: {name}", index + 1, variants.len());
        let result = catch_unwind(AssertUnwindSafe(|| one(config, device, stop, view)));
        errors[index] = match result {
            Ok(Ok(())) => None,
            Ok(Err(error @ TrainError::Interrupted { .. })) => {
                interrupted = Some(error);
                None
            }
            Ok(Err(error)) => Some(exit::chain(&error)),
            Err(panic) => Some(format!("it broke off: {}", panic_text(&*panic))),
        };
        if let Some(error) = &errors[index] {
            eprintln!("error: {name}: {error}");
        }
        save(&table(variants, &configs, &errors), dir)?;
        if let Some(error) = interrupted {
            return Err(error);
        }
    }
    Ok(table(variants, &configs, &errors))
}

fn one(
    config: &TrainConfig,
    device: &DeviceList,
    stop: &Stop,
    view: View,
) -> Result<(), TrainError> {
    let folder = &config.run_dir;
    if let Ok(saved) = fs::read_to_string(folder.join("config.toml")) {
        if let Some(change) = config_file::changes(&saved, config).first() {
            let what = format!("it is of another config, {change}; choose another folder");
            return Err(TrainError::RunFolder { path: folder.clone(), what });
        }
        if RunData::load(folder).is_ok_and(|run| run.finished()) {
            eprintln!("it is finished");
            return Ok(());
        }
    }
    let options =
        RunOptions { config: config.clone(), device: device.clone(), resume: true, until: None };
    run_on(
        &Ranks::alone("a sweep trains its runs one after the other in one")?,
        &options,
        stop,
        view,
    )
    .map(|_| ())
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no reason was given")
}

/// Read from the run folders, so that it does not matter which call made a run.
fn table(variants: &[Variant], configs: &[TrainConfig], errors: &[Option<String>]) -> Table {
    let outcome = |((variant, config), error): ((&Variant, &TrainConfig), &Option<String>)| {
        let run = RunData::load(&config.run_dir).ok();
        let run = run.as_ref();
        let status = match error {
            Some(_) => Status::Failed,
            None if run.is_some_and(RunData::finished) => Status::Finished,
            None => Status::Unfinished,
        };
        Outcome {
            name: variant.name.clone(),
            overrides: variant.overrides.clone(),
            status,
            error: error.clone(),
            steps: run.map_or(0, RunData::step),
            val_loss: run.and_then(RunData::val_loss),
            train_loss: run.and_then(RunData::train_loss),
            tokens_per_second: run.and_then(RunData::tokens_per_second),
            seconds: run.and_then(RunData::seconds),
        }
    };
    let mut runs: Vec<Outcome> = variants.iter().zip(configs).zip(errors).map(outcome).collect();
    // Finished runs first, then by validation loss; those without one last.
    runs.sort_by(|a, b| {
        let key = |o: &Outcome| (o.status != Status::Finished, o.val_loss.unwrap_or(f64::INFINITY));
        let ((a0, a1), (b0, b1)) = (key(a), key(b));
        a0.cmp(&b0).then(a1.total_cmp(&b1))
    });
    Table { runs }
}

fn save(table: &Table, dir: &Path) -> Result<(), TrainError> {
    write_json(&dir.join("sweep.json").to_string_lossy(), table)?;
    let path = dir.join("sweep.md");
    let text = table.to_string();
    write_atomic(&path, |w| w.write_all(text.as_bytes())).map_err(with_path(&path))?;
    Ok(())
}

impl Table {
    /// How many runs failed.
    #[must_use]
    pub fn failed(&self) -> usize {
        self.runs.iter().filter(|r| r.status == Status::Failed).count()
    }

    /// The folders of the runs that have begun, for a report.
    #[must_use]
    pub fn folders(&self, dir: &Path) -> Vec<PathBuf> {
        let begun = self.runs.iter().filter(|r| r.steps > 0);
        begun.map(|r| dir.join(&r.name)).collect()
    }

    /// Heads and rows of text.
    fn cells(&self) -> Vec<[String; 7]> {
        let loss = |x: Option<f64>| x.map_or("-".into(), |x| format!("{x:.4}"));
        let head =
            ["run", "status", "validation loss", "training loss", "steps", "tokens/s", "time"];
        let row = |r: &Outcome| {
            let status = match r.status {
                Status::Finished => "finished",
                Status::Unfinished => "unfinished",
                Status::Failed => "failed",
            };
            [
                r.name.clone(),
                status.to_owned(),
                loss(r.val_loss),
                loss(r.train_loss),
                r.steps.to_string(),
                r.tokens_per_second.map_or("-".into(), |x| format!("{x:.0}")),
                r.seconds.map_or("-".into(), duration),
            ]
        };
        std::iter::once(head.map(str::to_owned)).chain(self.runs.iter().map(row)).collect()
    }
}

impl std::fmt::Display for Table {
    /// A Markdown table with aligned columns.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let cells = self.cells();
        let width: [usize; 7] = std::array::from_fn(|i| {
            cells.iter().map(|row| row[i].chars().count()).max().unwrap_or(0)
        });
        for (index, row) in cells.iter().enumerate() {
            let mut line = String::from("|");
            for (text, width) in row.iter().zip(width) {
                write!(line, " {text:<width$} |")?;
            }
            writeln!(f, "{line}")?;
            if index == 0 {
                let rules: Vec<String> = width.iter().map(|w| "-".repeat(w + 2)).collect();
                writeln!(f, "|{}|", rules.join("|"))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(all: &[&str]) -> Vec<String> {
        all.iter().map(|s| (*s).to_owned()).collect()
    }

    #[test]
    fn a_grid_is_every_combination() {
        let all = grid(&strings(&["schedule.lr=1e-3, 2e-3", "seed=1,2"])).unwrap();
        let names: Vec<&str> = all.iter().map(|v| v.name.as_str()).collect();
        assert_eq!(names, ["lr-1e-3_seed-1", "lr-1e-3_seed-2", "lr-2e-3_seed-1", "lr-2e-3_seed-2"]);
        assert_eq!(all[1].overrides, ["schedule.lr=1e-3", "seed=2"]);
        let all = grid(&strings(&["sample.prompts=[\"a, b\", \"c\"],[]"])).unwrap();
        assert_eq!(all[0].overrides, ["sample.prompts=[\"a, b\", \"c\"]"]);
        assert_eq!(all[0].name, "prompts-_a__b__c_");
        let all = grid(&strings(&["seed=1", "data.seed=2"])).unwrap();
        assert_eq!(all[0].name, "seed-1_seed-2");
        for (bad, message) in [
            (&["seed"][..], "--grid seed: expected"),
            (&["seed=1,"], "a key or a value is empty"),
            (&["=1"], "a key or a value is empty"),
            (&["seed=1", "seed=2"], "stands in another"),
            (&["seed=1,1"], "two runs of the sweep are the same"),
        ] {
            let error = grid(&strings(bad)).unwrap_err();
            assert_eq!(error.exit(), bitnet_core::Exit::Usage);
            assert!(error.to_string().contains(message), "{error}");
        }
    }

    #[test]
    fn a_list_is_a_run_a_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("list.txt");
        fs::write(&path, "# a\n\nseed=1  schedule.lr=0.1\ndata.seed=1 schedule.lr=0.1\n").unwrap();
        let all = list(&path).unwrap();
        // By the last parts alone both would be `seed-1_lr-0.1`.
        let names: Vec<&str> = all.iter().map(|v| v.name.as_str()).collect();
        assert_eq!(names, ["seed-1_schedule.lr-0.1", "data.seed-1_schedule.lr-0.1"]);
        fs::write(&path, "seed=1\nsed\n").unwrap();
        let error = list(&path).unwrap_err().to_string();
        assert!(error.contains("list.txt:2: sed: expected table.key=value"), "{error}");
        fs::write(&path, "# nothing\n").unwrap();
        assert!(list(&path).unwrap_err().to_string().contains("lists no runs"));
    }

    #[test]
    fn a_table_has_the_best_first_and_failures_last() {
        let outcome = |name: &str, status, val_loss| Outcome {
            name: name.into(),
            overrides: Vec::new(),
            status,
            error: None,
            steps: 3,
            val_loss,
            train_loss: None,
            tokens_per_second: Some(10.4),
            seconds: Some(61.0),
        };
        let runs = vec![
            outcome("best", Status::Finished, Some(2.0)),
            outcome("bad", Status::Failed, None),
        ];
        let table = Table { runs };
        let text = table.to_string();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4);
        assert!(lines.iter().all(|l| l.chars().count() == lines[0].chars().count()));
        assert!(lines[2].starts_with("| best | finished | 2.0000 "), "{text}");
        assert!(lines[3].contains("| 1 m 01 s |"), "{text}");
        assert_eq!(table.failed(), 1);
    }
}

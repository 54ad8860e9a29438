//! `bitnet-train scaling`: how loss falls with size, and what separates two kinds of
//! model of the same sizes, such as ternary models and their float twins.
//!
//! The runs may differ in size, seed, learning rate and the key that tells the kinds
//! apart; a difference in anything else is an error, so that conditions are the same by
//! construction. Of each kind and size the learning rate with the lowest validation loss
//! counts, judged by the seeds that every rate was tried with.

mod draw;
mod fit;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write as _};
use std::path::{Path, PathBuf};

use serde::Serialize;

pub use self::draw::draw;
pub use self::fit::{Interval, Noise, Point, PowerLaw, Trend, resample};
use crate::report::RunData;
use crate::{TrainError, config_file};

/// Keys in which runs of one law may differ: what makes size, seed and rate.
const FREE: [&str; 12] = [
    "name",
    "run_dir",
    "seed",
    "data.seed",
    "data.dir",
    "model.hidden_size",
    "model.intermediate_size",
    "model.num_hidden_layers",
    "model.num_attention_heads",
    "model.num_key_value_heads",
    "schedule.lr",
    "schedule.lr_stage2",
];

/// Spectra's fits of ternary models and their float twins, from 99M to 3.9B parameters
/// at 300 billion tokens (arXiv:2407.12327, section 4.3).
pub const SPECTRA: [PowerLaw; 2] = [
    PowerLaw { floor: 1.76, scale: 185.0, exponent: 0.26 },
    PowerLaw { floor: 1.67, scale: 159.0, exponent: 0.26 },
];

/// One finished run.
#[derive(Debug, Clone, PartialEq)]
struct Run {
    folder: PathBuf,
    kind: String,
    parameters: u64,
    linear: u64,
    rate: f64,
    seed: u64,
    loss: f64,
}

/// A learning rate that was tried.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Tried {
    /// The rate.
    pub rate: f64,
    /// Seed and validation loss of each run, nats per token, the lowest seed first.
    pub losses: Vec<(u64, f64)>,
}

impl Tried {
    fn of_seeds(&self, seeds: &BTreeSet<u64>) -> f64 {
        let of = self.losses.iter().filter(|l| seeds.contains(&l.0)).map(|l| l.1);
        of.sum::<f64>() / seeds.len() as f64
    }
}

/// The runs of one kind and size.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Cell {
    /// All parameters, N.
    pub parameters: u64,
    /// Weights of the linear layers.
    pub linear: u64,
    /// The rates, the lowest first.
    pub tried: Vec<Tried>,
    /// Which of them counts.
    pub best: usize,
    /// Whether that is the lowest or the highest of several, or the only one: a better
    /// rate may lie outside.
    pub at_edge: bool,
    /// Mean validation loss of the runs with that rate, nats per token.
    pub mean: f64,
}

impl Cell {
    fn best(&self) -> &Tried {
        &self.tried[self.best]
    }

    fn point(&self) -> Point {
        let runs = self.best().losses.len();
        Point { parameters: self.parameters as f64, mean: self.mean, runs }
    }

    fn losses(&self) -> Vec<f64> {
        self.best().losses.iter().map(|l| l.1).collect()
    }
}

/// A power law with its intervals of 95 %.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Law {
    /// The best fit.
    pub fit: PowerLaw,
    /// Whether the points tell its exponent.
    pub identified: bool,
    /// E.
    pub floor: Option<Interval>,
    /// α.
    pub exponent: Option<Interval>,
}

/// One kind of model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Kind {
    /// The value of the key.
    pub name: String,
    /// Its sizes, the smallest first.
    pub cells: Vec<Cell>,
    /// How far its seeds lie apart.
    pub noise: Option<Noise>,
    /// The law, from four sizes on.
    pub law: Option<Law>,
}

/// The difference of two kinds at one size.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Gap {
    /// Parameters, N.
    pub parameters: u64,
    /// Mean difference over the seeds that both have, nats per token.
    pub mean: f64,
    /// The differences by seed.
    pub by_seed: Vec<(u64, f64)>,
    /// 95 % by Student's t from the noise pooled over the sizes.
    pub interval: Option<Interval>,
    /// What Spectra's fits give at this size, far below their smallest model.
    pub spectra: f64,
}

/// The differences of two kinds over the sizes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Gaps {
    /// The kind that has the greater part of the difference.
    pub kind: String,
    /// The kind that is subtracted.
    pub baseline: String,
    /// By size.
    pub sizes: Vec<Gap>,
    /// Noise of a difference.
    pub noise: Option<Noise>,
    /// A line over the decades of size, and the interval of its slope.
    pub trend: Option<(Trend, Option<Interval>)>,
}

/// What a set of runs says.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Scaling {
    /// The key that tells the kinds apart.
    pub by: String,
    /// Runs read.
    pub runs: usize,
    /// Training tokens of every run.
    pub tokens: u64,
    /// The kinds.
    pub kinds: Vec<Kind>,
    /// Their difference, where there are two.
    pub gaps: Option<Gaps>,
}

/// Reads finished runs and fits their laws; `by` is the config key that tells kinds
/// apart, `baseline` the value of it whose loss is subtracted.
///
/// # Errors
/// A folder that is none of a run, a run that is not finished, runs that differ in
/// another key or in their corpus, a size one of whose rates shares no seed with the others, a baseline
/// that no run has.
pub fn scaling(folders: &[PathBuf], by: &str, baseline: &str) -> Result<Scaling, TrainError> {
    let loaded = RunData::load_all(folders)?;
    let bad = |folder: &Path, what: &str| {
        Err(TrainError::Scaling(format!("{}: {what}", folder.display())))
    };
    let mut runs = Vec::new();
    let mut tokens = 0;
    for run in &loaded {
        if !run.finished() {
            return bad(&run.folder, "the run is not finished");
        }
        if let Some(key) = differing(&loaded[0], run, by) {
            let first = loaded[0].folder.display();
            return bad(&run.folder, &format!("{key} is not that of {first}: not comparable"));
        }
        if corpus(run) != corpus(&loaded[0]) {
            let first = loaded[0].folder.display();
            return bad(&run.folder, &format!("its corpus is not that of {first}"));
        }
        let Some(kind) = run.config.get(by) else {
            return bad(&run.folder, &format!("its config has no key {by}"));
        };
        let config = config_file::load(&run.folder.join("config.toml"), &[])?;
        let count = config.model.parameter_count();
        tokens = run.steps.last().map_or(0, |m| m.tokens);
        runs.push(Run {
            folder: run.folder.clone(),
            kind: kind.trim_matches('"').to_owned(),
            parameters: count.total(),
            linear: count.linear,
            rate: config.schedule.lr,
            seed: config.seed,
            loss: run.val_loss().unwrap_or(f64::NAN),
        });
    }
    let names: BTreeSet<&String> = runs.iter().map(|r| &r.kind).collect();
    if names.len() > 1 && !names.iter().any(|n| *n == baseline) {
        let all: Vec<&str> = names.iter().map(|n| n.as_str()).collect();
        let what = format!("no run has {by} = {baseline}: there are {}", all.join(", "));
        return Err(TrainError::Scaling(what));
    }
    let kinds = names.iter().map(|name| kind(name, &runs)).collect::<Result<Vec<_>, _>>()?;
    let gaps = match kinds.as_slice() {
        [a, b] if a.name == baseline => Some(gaps(b, a)),
        [a, b] => Some(gaps(a, b)),
        _ => None,
    };
    Ok(Scaling { by: by.to_owned(), runs: runs.len(), tokens, kinds, gaps })
}

/// The hash of the tokens that a run was last started on.
fn corpus(run: &RunData) -> Option<&str> {
    run.info.as_ref()?.starts.last().map(|start| start.data.corpus_hash.as_str())
}

/// The first key in which two runs differ and may not.
fn differing<'r>(a: &'r RunData, b: &'r RunData, by: &str) -> Option<&'r str> {
    let keys = a.config.keys().chain(b.config.keys());
    keys.map(String::as_str)
        .filter(|key| *key != by && !FREE.contains(key))
        .find(|key| a.config.get(*key) != b.config.get(*key))
}

fn kind(name: &str, runs: &[Run]) -> Result<Kind, TrainError> {
    let mut sizes: BTreeMap<u64, Vec<&Run>> = BTreeMap::new();
    for run in runs.iter().filter(|r| r.kind == name) {
        sizes.entry(run.parameters).or_default().push(run);
    }
    let cells = sizes.values().map(|runs| cell(runs)).collect::<Result<Vec<_>, _>>()?;
    let losses: Vec<Vec<f64>> = cells.iter().map(Cell::losses).collect();
    let noise = Noise::pooled(losses.iter().map(Vec::as_slice));
    let points: Vec<Point> = cells.iter().map(Cell::point).collect();
    let law = PowerLaw::fit(&points).map(|fit| {
        let figures = |p: &[Point]| PowerLaw::fit(p).map(|f| [f.floor, f.exponent]);
        let found = noise.and_then(|noise| resample(&points, noise, figures));
        let [floor, exponent] = found.map_or([None, None], |f| f.map(Some));
        Law { fit, identified: fit.identified(), floor, exponent }
    });
    Ok(Kind { name: name.to_owned(), cells, noise, law })
}

fn cell(runs: &[&Run]) -> Result<Cell, TrainError> {
    let mut tried: Vec<Tried> = Vec::new();
    let mut sorted = runs.to_vec();
    sorted.sort_by(|a, b| a.rate.total_cmp(&b.rate).then(a.seed.cmp(&b.seed)));
    for run in sorted {
        let entry = (run.seed, run.loss);
        match tried.last_mut().filter(|t| t.rate == run.rate) {
            Some(t) if t.losses.iter().any(|l| l.0 == run.seed) => {
                let what = format!(
                    "{}: a second run of its kind, size, rate and seed",
                    run.folder.display()
                );
                return Err(TrainError::Scaling(what));
            }
            Some(t) => t.losses.push(entry),
            None => tried.push(Tried { rate: run.rate, losses: vec![entry] }),
        }
    }
    let seeds = |t: &Tried| t.losses.iter().map(|l| l.0).collect::<BTreeSet<_>>();
    let shared = tried.iter().map(seeds).reduce(|a, b| &a & &b).unwrap_or_default();
    if shared.is_empty() {
        let what = "its rates share no seed with the others of its size: which is best?";
        return Err(TrainError::Scaling(format!("{}: {what}", runs[0].folder.display())));
    }
    let by_loss =
        |a: &usize, b: &usize| tried[*a].of_seeds(&shared).total_cmp(&tried[*b].of_seeds(&shared));
    let best = (0..tried.len()).min_by(by_loss).unwrap_or(0);
    let mean = tried[best].of_seeds(&seeds(&tried[best]));
    Ok(Cell {
        parameters: runs[0].parameters,
        linear: runs[0].linear,
        at_edge: best == 0 || best + 1 == tried.len(),
        tried,
        best,
        mean,
    })
}

fn gaps(kind: &Kind, baseline: &Kind) -> Gaps {
    let mut sizes = Vec::new();
    for cell in &kind.cells {
        let Some(twin) = baseline.cells.iter().find(|c| c.parameters == cell.parameters) else {
            continue;
        };
        let twins: BTreeMap<u64, f64> = twin.best().losses.iter().copied().collect();
        let by_seed: Vec<(u64, f64)> = (cell.best().losses.iter())
            .filter_map(|&(seed, loss)| Some((seed, loss - twins.get(&seed)?)))
            .collect();
        let n = cell.parameters as f64;
        if !by_seed.is_empty() {
            sizes.push(Gap {
                parameters: cell.parameters,
                mean: by_seed.iter().map(|d| d.1).sum::<f64>() / by_seed.len() as f64,
                by_seed,
                interval: None,
                spectra: SPECTRA[0].at(n) - SPECTRA[1].at(n),
            });
        }
    }
    let differences: Vec<Vec<f64>> =
        sizes.iter().map(|g| g.by_seed.iter().map(|d| d.1).collect()).collect();
    let noise = Noise::pooled(differences.iter().map(Vec::as_slice));
    if let Some(noise) = noise {
        for gap in &mut sizes {
            let half = noise.half(gap.by_seed.len());
            gap.interval = Some(Interval { low: gap.mean - half, high: gap.mean + half });
        }
    }
    let points: Vec<Point> = sizes
        .iter()
        .map(|g| Point { parameters: g.parameters as f64, mean: g.mean, runs: g.by_seed.len() })
        .collect();
    let trend = Trend::fit(&points).map(|trend| {
        let figures = |p: &[Point]| Trend::fit(p).map(|t| [t.per_decade]);
        let found = noise.and_then(|noise| resample(&points, noise, figures));
        (trend, found.map(|[slope]| slope))
    });
    Gaps { kind: kind.name.clone(), baseline: baseline.name.clone(), sizes, noise, trend }
}

/// Millions with three digits.
fn millions(parameters: u64) -> String {
    match parameters as f64 / 1e6 {
        m if m < 10.0 => format!("{m:.2}M"),
        m if m < 100.0 => format!("{m:.1}M"),
        m => format!("{m:.0}M"),
    }
}

impl fmt::Display for Interval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.3} to {:.3}", self.low, self.high)
    }
}

impl fmt::Display for Scaling {
    /// Markdown: the losses, the laws, the gap.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} runs of {} tokens; validation loss in nats per token.\n",
            self.runs, self.tokens
        )?;
        writeln!(
            f,
            "| {} | parameters | in linear layers | seeds | learning rate | loss | tried: rate loss |",
            self.by
        )?;
        writeln!(f, "|---|---|---|---|---|---|---|")?;
        let mut edge = false;
        for kind in &self.kinds {
            for cell in &kind.cells {
                let mut tried = String::new();
                for t in &cell.tried {
                    let first = t.losses.first().map_or(f64::NAN, |l| l.1);
                    write!(
                        tried,
                        "{}{:e} {first:.4}",
                        if tried.is_empty() { "" } else { ", " },
                        t.rate
                    )?;
                }
                edge |= cell.at_edge;
                writeln!(
                    f,
                    "| {} | {} | {} | {} | {:e}{} | {:.4} | {tried} |",
                    kind.name,
                    millions(cell.parameters),
                    millions(cell.linear),
                    cell.best().losses.len(),
                    cell.best().rate,
                    if cell.at_edge { "*" } else { "" },
                    cell.mean,
                )?;
            }
        }
        if edge {
            writeln!(f, "\n\\* at an end of the rates tried: a better one may lie outside.")?;
        }
        for kind in &self.kinds {
            let Some(law) = &kind.law else { continue };
            let interval =
                |i: Option<Interval>| i.map_or("no seeds to tell".into(), |i| i.to_string());
            writeln!(
                f,
                "\n{} = {}: L(N) = {:.3} + {:.4e} · N^-{:.4}; 95 %: floor {}, exponent {}{}",
                self.by,
                kind.name,
                law.fit.floor,
                law.fit.scale,
                law.fit.exponent,
                interval(law.floor),
                interval(law.exponent),
                if law.identified { "" } else { "; these points do not tell an exponent" },
            )?;
            if let Some(noise) = kind.noise {
                writeln!(
                    f,
                    "(one run's standard deviation: {:.4}, {} degrees of freedom)",
                    noise.sd, noise.freedom
                )?;
            }
        }
        if let Some(gaps) = &self.gaps {
            writeln!(
                f,
                "\n| parameters | {} less {} | 95 % | by seed | Spectra's fits, extrapolated |",
                gaps.kind, gaps.baseline
            )?;
            writeln!(f, "|---|---|---|---|---|")?;
            for gap in &gaps.sizes {
                let seeds: Vec<String> =
                    gap.by_seed.iter().map(|d| format!("{:+.4}", d.1)).collect();
                let interval =
                    gap.interval.map_or("-".into(), |i| format!("{:+.4} to {:+.4}", i.low, i.high));
                writeln!(
                    f,
                    "| {} | {:+.4} | {interval} | {} | {:+.3} |",
                    millions(gap.parameters),
                    gap.mean,
                    seeds.join(", "),
                    gap.spectra,
                )?;
            }
            if let Some((trend, slope)) = &gaps.trend {
                let slope = slope
                    .map_or(String::new(), |s| format!(" (95 %: {:+.4} to {:+.4})", s.low, s.high));
                writeln!(
                    f,
                    "\nThe gap is {:+.4} at 1M parameters and changes by {:+.4} a decade{slope}.",
                    trend.at_1m, trend.per_decade
                )?;
            }
        }
        Ok(())
    }
}

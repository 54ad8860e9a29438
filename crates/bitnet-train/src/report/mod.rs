//! `bitnet-train report`: one HTML page that compares runs. It loads nothing, from
//! nowhere: style and charts are in it, and there is no script.

mod charts;
mod data;
#[cfg(test)]
mod tests;

use std::io::Write;
use std::path::{Path, PathBuf};

use bitnet_format::atomic::write_atomic;
use minijinja::{Environment, Value, context};
use plotters::style::RGBColor;

use self::charts::{COLORS, Chart, Line, Unit};
pub use self::data::RunData;
use crate::TrainError;
use crate::error::with_path;
use crate::metrics::TrainMetric;
use crate::plot::{Points, smooth};
use crate::progress::duration;

/// Samples of one prompt and run that are shown, at most.
const SAMPLES: usize = 8;
/// The share of a run at its start that the axes of losses leave out.
const SKIP: f64 = 0.03;

/// Writes the page that compares the runs of `folders` to `out`.
///
/// # Errors
/// A folder that is none of a run; I/O errors with the path.
pub fn write(folders: &[PathBuf], out: &Path) -> Result<(), TrainError> {
    let page = render(&RunData::load_all(folders)?)?;
    write_atomic(out, |w| w.write_all(page.as_bytes())).map_err(with_path(out))?;
    Ok(())
}

/// The page as text.
///
/// # Errors
/// What the libraries for charts and templates say; nothing that a run can cause.
pub fn render(runs: &[RunData]) -> Result<String, TrainError> {
    let mut charts = Vec::new();
    for chart in all_charts(runs) {
        if let Some(svg) = chart.draw() {
            let svg = svg.map_err(TrainError::Report)?;
            charts.push(context! { title => chart.title, svg => Value::from_safe_string(svg) });
        }
    }
    let differences: Vec<Value> = data::differences(runs)
        .into_iter()
        .map(|(key, values)| context! { key => key.to_owned(), values => owned(values) })
        .collect();
    let mut environment = Environment::new();
    let page = environment
        .add_template("page.html", include_str!("page.html"))
        .and_then(|()| environment.get_template("page.html"))
        .and_then(|template| {
            template.render(context! {
                runs => runs.iter().enumerate().map(|(i, r)| run(i, r, runs)).collect::<Vec<_>>(),
                charts,
                differences,
                prompts => prompts(runs),
                skip => format!("{:.0} %", SKIP * 100.0),
                version => env!("CARGO_PKG_VERSION"),
            })
        });
    page.map_err(|e| TrainError::Report(e.to_string()))
}

/// What the page shows of a run outside the charts, as text.
fn run(index: usize, run: &RunData, all: &[RunData]) -> Value {
    let loss = |x: Option<f64>| x.map_or("–".into(), |x| format!("{x:.4}"));
    let percent = |x: Option<f64>| x.map_or("–".into(), |x| format!("{:.2} %", x * 100.0));
    let best = all.iter().filter_map(RunData::val_loss).reduce(f64::min);
    let counted = run.weights.last();
    let start = run.info.as_ref().and_then(|info| info.starts.last());
    let text = |x: Option<String>| x.unwrap_or_else(|| "–".into());
    let steps = match run.steps_planned() {
        Some(planned) if run.finished() => planned.to_string(),
        Some(planned) => format!("{} of {planned}", run.step()),
        None => run.step().to_string(),
    };
    let lowest = run.evals.iter().map(|m| m.val_loss).reduce(f64::min);
    let resumed = run.info.as_ref().map_or(0, |info| info.starts.len().saturating_sub(1));
    let figures = [
        ("validation loss, last", loss(run.val_loss())),
        ("validation loss, best", loss(lowest)),
        ("training loss, last 100 steps", loss(run.train_loss())),
        ("steps", steps),
        ("tokens", text(run.steps.last().map(|m| m.tokens.to_string()))),
        ("time", text(run.seconds().map(duration))),
        ("tokens per second", text(run.tokens_per_second().map(|x| format!("{x:.0}")))),
        ("waiting for data", percent(run.data_share())),
        ("peak memory", text(run.peak_rss_bytes().map(mebibytes))),
        ("zero weights", percent(counted.map(|m| m.zero_share))),
        ("flip rate, last", percent(counted.and_then(|m| m.flip_rate))),
        ("resumed", format!("{resumed}×")),
        ("device", text(start.map(|s| s.device.clone()))),
        ("processor", text(start.and_then(|s| s.machine.cpu.clone()))),
        ("threads", text(start.map(|s| s.threads.to_string()))),
        ("program", text(start.map(|s| s.program.summary()))),
        ("corpus", text(start.map(|s| short(&s.data.corpus_hash)))),
        ("started", text(run.info.as_ref().and_then(|i| Some(i.starts.first()?.time.clone())))),
    ];
    let layers = counted.map(|m| &m.layers[..]).unwrap_or_default();
    let layer = |l: &crate::metrics::LayerWeights| {
        context! {
            name => l.layer.trim_start_matches("model.layers.").to_owned(),
            shares => [l.minus, l.zero, l.plus].map(|n| format!("{:.1}", l.share(n) * 100.0)),
            flips => percent(l.flip_rate()),
        }
    };
    context! {
        label => run.label.clone(),
        folder => run.folder.display().to_string(),
        color => hex(COLORS[index % COLORS.len()]),
        state => if run.finished() { "finished" } else { "unfinished" },
        best => all.len() > 1 && run.val_loss().is_some() && run.val_loss() == best,
        figures => pairs(figures),
        layers => layers.iter().map(layer).collect::<Vec<_>>(),
        counted => counted.map(|m| context! { step => m.step, since => m.since }),
        config => pairs(run.config.iter().map(|(k, v)| (k.as_str(), v.clone()))),
    }
}

fn owned(values: Vec<Option<&str>>) -> Vec<Option<String>> {
    values.into_iter().map(|v| v.map(str::to_owned)).collect()
}

fn pairs<'p>(all: impl IntoIterator<Item = (&'p str, String)>) -> Vec<Value> {
    all.into_iter().map(|(name, value)| context! { name => name.to_owned(), value }).collect()
}

fn hex(RGBColor(r, g, b): RGBColor) -> String {
    format!("#{r:02x}{g:02x}{b:02x}")
}

fn short(hash: &str) -> String {
    hash.get(..12).unwrap_or(hash).to_owned()
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.0} MiB", bytes as f64 / f64::from(1 << 20))
}

/// Every prompt with what each run wrote after it, the newest first.
fn prompts(runs: &[RunData]) -> Vec<Value> {
    let mut prompts: Vec<&str> = Vec::new();
    for sample in runs.iter().flat_map(|r| &r.samples) {
        if !prompts.contains(&sample.prompt.as_str()) {
            prompts.push(&sample.prompt);
        }
    }
    let of = |run: &RunData, prompt: &str| {
        let all = run.samples.iter().rev().filter(|s| s.prompt == prompt).take(SAMPLES);
        all.map(|s| context! { step => s.step, text => s.text.clone() }).collect::<Vec<_>>()
    };
    prompts
        .into_iter()
        .map(|prompt| {
            let samples: Vec<_> = runs.iter().map(|run| of(run, prompt)).collect();
            context! { prompt => prompt.to_owned(), samples }
        })
        .collect()
}

fn all_charts(runs: &[RunData]) -> Vec<Chart> {
    let steps = ("step", Unit::Number);
    let loss = |title, x, by: fn(&At) -> f64| Chart {
        title,
        x,
        y: ("loss (nats per token)", Unit::Number),
        lines: lines(runs, true, |r| r.evals.iter().map(|m| (by(&At::eval(r, m)), m.val_loss))),
        skip: SKIP,
    };
    let training = |title, x, by: fn(&TrainMetric) -> f64| Chart {
        title,
        x,
        y: ("loss (nats per token)", Unit::Number),
        lines: smoothed(runs, by, |m| m.loss),
        skip: SKIP,
    };
    let plain = |title, y, lines| Chart { title, x: steps, y, lines, skip: 0.0 };
    let step = |m: &TrainMetric| m.step as f64;
    let tokens = ("tokens", Unit::Number);
    let time = ("time", Unit::Seconds);
    vec![
        loss("Validation loss by step", steps, |at| at.step),
        training("Training loss by step, smoothed", steps, |m| m.step as f64),
        loss("Validation loss by tokens", tokens, |at| at.tokens),
        training("Training loss by tokens, smoothed", tokens, |m| m.tokens as f64),
        loss("Validation loss by time", time, |at| at.seconds),
        training("Training loss by time, smoothed", time, |m| m.seconds),
        plain(
            "Flip rate: weights that changed since the last count",
            ("flip rate", Unit::Percent),
            lines(runs, true, |r| {
                r.weights.iter().filter_map(|m| Some((m.step as f64, m.flip_rate?)))
            }),
        ),
        plain(
            "Zero share: weights that are 0",
            ("zero share", Unit::Percent),
            lines(runs, true, |r| r.weights.iter().map(|m| (m.step as f64, m.zero_share))),
        ),
        plain(
            "Memory resident after a step",
            ("MiB", Unit::Mebibytes),
            lines(runs, false, |r| {
                r.steps.iter().filter_map(|m| Some((m.step as f64, m.rss_bytes? as f64)))
            }),
        ),
        plain(
            "Learning rate",
            ("learning rate", Unit::Scientific),
            lines(runs, false, |r| r.steps.iter().map(|m| (m.step as f64, m.lr))),
        ),
        plain(
            "Gradient norm, smoothed",
            ("gradient norm", Unit::Number),
            smoothed(runs, step, |m| m.grad_norm),
        ),
        plain(
            "Tokens per second, smoothed",
            ("tokens/s", Unit::Number),
            smoothed(runs, step, |m| m.tokens_per_second),
        ),
    ]
}

/// Where an evaluation stands on each axis.
struct At {
    step: f64,
    tokens: f64,
    seconds: f64,
}

impl At {
    fn eval(run: &RunData, m: &crate::metrics::EvalMetric) -> Self {
        // An evaluation counts its own tokens; those of training are the step's.
        let after = run.steps.partition_point(|s| s.step <= m.step);
        let tokens = after.checked_sub(1).map_or(0, |i| run.steps[i].tokens);
        Self { step: m.step as f64, tokens: tokens as f64, seconds: m.seconds }
    }
}

fn lines<'r, I: Iterator<Item = (f64, f64)>>(
    runs: &'r [RunData],
    marked: bool,
    points: impl Fn(&'r RunData) -> I,
) -> Vec<Line> {
    let line = |(run, r)| {
        let points: Points = points(r).collect();
        Line { run, marked: marked && points.len() <= 60, points }
    };
    runs.iter().enumerate().map(line).collect()
}

fn smoothed(
    runs: &[RunData],
    x: impl Fn(&TrainMetric) -> f64,
    y: impl Fn(&TrainMetric) -> f64,
) -> Vec<Line> {
    let mut all = lines(runs, false, |r| r.steps.iter().map(|m| (x(m), y(m))));
    for line in &mut all {
        line.points = smooth(&line.points);
    }
    all
}

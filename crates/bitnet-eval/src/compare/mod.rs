//! Several models side by side, each against the first: what was measured, a Markdown
//! table and an HTML page. Measuring is the command's, in `bitnet-eval compare`.

mod charts;
mod page;
mod spec;
mod summary;
mod table;
mod tasks;

use serde::Serialize;

pub use page::page;
pub use spec::{Spec, Variant};
pub use tasks::{TaskScore, read_tasks};

use crate::energy::EnergyReport;

/// All that was measured; the keys are stable.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// What was the same for all models.
    pub conditions: Conditions,
    /// The models, the first being what the others are compared with.
    pub models: Vec<Figures>,
    /// The counters of energy.
    pub energy: Option<EnergyReport>,
}

/// What was the same for all models.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Conditions {
    /// Instruction set.
    pub isa: String,
    /// Threads.
    pub threads: usize,
    /// Element type of the key and value cache.
    pub kv: String,
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Tokens decoded.
    pub generate: usize,
    /// Measured rounds, in which the models take turns.
    pub repeats: usize,
    /// The text or the shards that perplexity is of.
    pub text: Option<String>,
    /// Hash of it.
    pub text_hash: Option<String>,
    /// How it was cut.
    pub mode: Option<String>,
    /// Tokens of a window of it.
    pub context: Option<u64>,
    /// Tokens of it that were scored.
    pub tokens: Option<u64>,
    /// Whether all models have one tokenizer: perplexities of tokens compare only then.
    pub one_tokenizer: bool,
}

/// A speed, in tokens a second.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Rate {
    /// The median of the rounds.
    pub median: f64,
    /// The slowest round.
    pub min: f64,
    /// The fastest round.
    pub max: f64,
}

/// How likely the text is under a model.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Quality {
    /// Nats per token.
    pub nats: f64,
    /// `e^nats`.
    pub perplexity: f64,
    /// Bits per byte of the text; none where its tokens stand for no text.
    pub bits_per_byte: Option<f64>,
}

/// What was measured of one model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figures {
    /// What it is called.
    pub label: String,
    /// What was given: a path, or a path and a variant.
    pub model: String,
    /// How its linear layers are stored.
    pub form: String,
    /// Parameters.
    pub parameters: u64,
    /// Size of the packed file.
    pub file_bytes: u64,
    /// Bits that a weight of the linear layers takes.
    pub bits_per_weight: f64,
    /// Bytes that a decoded token reads.
    pub bytes_per_token: u64,
    /// The most memory of a process that runs it alone; none where the system does not
    /// tell.
    pub memory_bytes: Option<u64>,
    /// Median seconds to open it, its pages in the system's cache.
    pub load_seconds: f64,
    /// Prefill.
    pub prefill: Rate,
    /// Decoding one by one.
    pub decode: Rate,
    /// Joules of a token of the prompt, above the idle machine.
    pub joules_per_prefill_token: Option<f64>,
    /// Joules of a decoded token, above the idle machine.
    pub joules_per_decode_token: Option<f64>,
    /// On the text, where one was given.
    pub quality: Option<Quality>,
    /// Scores of tasks, where they were given.
    pub tasks: Vec<TaskScore>,
}

/// A figure that all models have: how it is called, what is good, and its values.
struct Metric {
    name: String,
    /// Whether less of it is better; none of what is neither.
    less: Option<bool>,
    values: Vec<Option<f64>>,
    text: fn(f64) -> String,
    /// Whether it is shown as a bar.
    chart: bool,
}

impl Metric {
    /// The value of a model against that of the first, where both are known.
    fn ratio(&self, model: usize) -> Option<f64> {
        let (first, value) = (self.values[0]?, self.values[model]?);
        (model > 0 && first > 0.0).then(|| value / first)
    }

    /// Whether a value reads as the best does, of at least two that read differently.
    fn is_best(&self, value: f64) -> bool {
        let known = || self.values.iter().flatten().copied();
        let ends = known().reduce(f64::min).zip(known().reduce(f64::max));
        let (Some((low, high)), Some(less)) = (ends, self.less) else { return false };
        let [low, high, value] = [low, high, value].map(self.text);
        low != high && value == if less { low } else { high }
    }
}

impl Comparison {
    /// Every figure that at least one model has, in the order of tables.
    fn metrics(&self) -> Vec<Metric> {
        let models = &self.models;
        let metric = |name: &str, less, text, chart, value: &dyn Fn(&Figures) -> Option<f64>| {
            let values: Vec<_> = models.iter().map(value).collect();
            Metric { name: name.to_owned(), less, values, text, chart }
        };
        let nats = self.conditions.one_tokenizer;
        let mut all = vec![
            metric("file", Some(true), bytes, true, &|m| Some(m.file_bytes as f64)),
            metric("bits per linear weight", Some(true), short, false, &|m| {
                Some(m.bits_per_weight)
            }),
            metric("read per token", Some(true), bytes, false, &|m| Some(m.bytes_per_token as f64)),
            metric("memory", Some(true), bytes, true, &|m| m.memory_bytes.map(|b| b as f64)),
            metric("load", Some(true), seconds, false, &|m| Some(m.load_seconds)),
            metric("prefill, tokens/s", Some(false), short, true, &|m| Some(m.prefill.median)),
            metric("decode, tokens/s", Some(false), short, true, &|m| Some(m.decode.median)),
            metric("energy, J per prefill token", Some(true), short, false, &|m| {
                m.joules_per_prefill_token
            }),
            metric("energy, J per decoded token", Some(true), short, true, &|m| {
                m.joules_per_decode_token
            }),
            metric("perplexity", Some(true), short4, nats, &|m| {
                m.quality.filter(|_| nats).map(|q| q.perplexity)
            }),
            metric("bits per byte", Some(true), short4, !nats, &|m| m.quality?.bits_per_byte),
        ];
        let mut names: Vec<(&str, &str)> = Vec::new();
        for score in models.iter().flat_map(|m| &m.tasks) {
            if !names.contains(&(&score.task, &score.metric)) {
                names.push((&score.task, &score.metric));
            }
        }
        for (task, name) in names {
            let of = |m: &Figures| {
                let found =
                    m.tasks.iter().find(|t| (t.task.as_str(), t.metric.as_str()) == (task, name));
                found.map(|t| t.value)
            };
            all.push(metric(&format!("{task}, {name}"), Some(false), percent, true, &of));
        }
        all.retain(|metric| metric.values.iter().any(Option::is_some));
        all
    }
}

/// Three digits.
fn short(x: f64) -> String {
    match x.abs() {
        a if a >= 99.95 => format!("{x:.0}"),
        a if a >= 9.995 => format!("{x:.1}"),
        a if a >= 0.1 || a == 0.0 => format!("{x:.2}"),
        _ => format!("{x:.4}"),
    }
}

/// As many digits as qualities differ in.
fn short4(x: f64) -> String {
    match x.abs() {
        a if a >= 1000.0 => format!("{x:.0}"),
        a if a >= 100.0 => format!("{x:.1}"),
        _ => format!("{x:.3}"),
    }
}

fn percent(x: f64) -> String {
    format!("{:.1} %", 100.0 * x)
}

/// A count of parameters.
fn count(n: u64) -> String {
    match n as f64 {
        x if x >= 1e9 => format!("{}B", short(x * 1e-9)),
        x if x >= 1e6 => format!("{}M", short(x * 1e-6)),
        x => format!("{}k", short(x * 1e-3)),
    }
}

fn bytes(x: f64) -> String {
    match x {
        x if x >= 1e9 => format!("{} GB", short(x * 1e-9)),
        x if x >= 1e6 => format!("{} MB", short(x * 1e-6)),
        x => format!("{} kB", short(x * 1e-3)),
    }
}

fn seconds(x: f64) -> String {
    if x >= 1.0 { format!("{} s", short(x)) } else { format!("{} ms", short(x * 1e3)) }
}

#[cfg(test)]
mod tests;

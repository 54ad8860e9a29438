//! Results with the keys of lm-evaluation-harness: `results`, `configs`, `versions`,
//! `n-shot`, and a line of samples for each question.

use serde_json::{Map, Value, json};

use super::{FOLLOWS, Item, Kind, Metric, Sampler, Task, TaskResult};
use crate::source::sha256_hex;

/// What a run's results say about the run.
#[derive(Debug, Clone)]
pub struct RunFacts {
    /// The model as it was named.
    pub model: String,
    /// SHA-256 of the packed model.
    pub model_sha256: String,
    /// Inputs the model can read.
    pub max_length: usize,
    /// Precision of the key and value cache.
    pub kv: &'static str,
    /// Threads.
    pub threads: usize,
    /// Instruction set.
    pub isa: &'static str,
    /// Examples before each question.
    pub num_fewshot: usize,
    /// How they were chosen; none where there are none.
    pub sampler: Option<Sampler>,
    /// Most questions of each task.
    pub limit: Option<usize>,
    /// Time spent, in seconds.
    pub seconds: f64,
    /// Seconds since 1970 when the run began.
    pub date: f64,
}

/// The filter that the harness names in its keys; there is none here.
const FILTER: &str = "none";

/// All results, as the harness' `results_*.json` has them. `truncated` and `resumed` in
/// `n-samples` are ours.
#[must_use]
pub fn results(tasks: &[(Task, TaskResult)], facts: &RunFacts) -> Value {
    let object = |value: &dyn Fn(&Task, &TaskResult) -> Value| -> Value {
        let entries = tasks.iter().map(|(t, r)| (t.kind.name().to_owned(), value(t, r)));
        Value::Object(entries.collect())
    };
    json!({
        "results": object(&metrics),
        "group_subtasks": {},
        "configs": object(&|t, _| config(t, facts)),
        "versions": object(&|t, _| t.kind.version()),
        "n-shot": object(&|_, _| facts.num_fewshot.into()),
        "higher_is_better": object(&|t, _| {
            let names = t.kind.metrics().into_iter().map(|m| (m.name().to_owned(), true.into()));
            Value::Object(names.collect())
        }),
        "n-samples": object(&|t, r| json!({
            "original": t.items.len(),
            "effective": r.outcomes.len(),
            "truncated": r.truncated,
            "resumed": r.resumed,
        })),
        "config": {
            "model": "bitnet-eval",
            "model_args": {
                "pretrained": facts.model,
                "sha256": facts.model_sha256,
                "kv": facts.kv,
                "threads": facts.threads,
                "isa": facts.isa,
            },
            "limit": facts.limit,
            "fewshot_seed": facts.sampler.and_then(Sampler::seed),
            "bitnet_eval_version": env!("CARGO_PKG_VERSION"),
        },
        "follows_lm_eval_version": FOLLOWS,
        "model_source": "bitnet-eval",
        "model_name": facts.model,
        "max_length": facts.max_length,
        "date": facts.date,
        "total_evaluation_time_seconds": facts.seconds.to_string(),
    })
}

fn metrics(task: &Task, result: &TaskResult) -> Value {
    let name = task.kind.name();
    let mut entries = Map::new();
    entries.insert("name".into(), name.into());
    entries.insert("alias".into(), name.into());
    entries.insert("sample_len".into(), result.outcomes.len().into());
    for metric in task.kind.metrics() {
        let (mean, error) = result.mean(metric);
        let error = error.map_or_else(|| "N/A".into(), Value::from);
        entries.insert(format!("{},{FILTER}", metric.name()), mean.into());
        entries.insert(format!("{}_stderr,{FILTER}", metric.name()), error);
    }
    Value::Object(entries)
}

fn config(task: &Task, facts: &RunFacts) -> Value {
    let delimiters = task.kind.delimiters();
    let metrics: Vec<Value> = task
        .kind
        .metrics()
        .into_iter()
        .map(|m| json!({"metric": m.name(), "aggregation": "mean", "higher_is_better": true}))
        .collect();
    let mut config = json!({
        "task": task.kind.name(),
        "dataset_path": task.path,
        "dataset_sha256": task.sha256,
        "output_type": "multiple_choice",
        "description": delimiters.description,
        "target_delimiter": delimiters.target,
        "fewshot_delimiter": delimiters.fewshot,
        "num_fewshot": facts.num_fewshot,
        "fewshot_config": facts.sampler.map(|s| json!({"sampler": s.name()})),
        "metric_list": metrics,
        "metadata": {"version": task.kind.version()},
    });
    if let Kind::Custom(custom) = &task.kind {
        config["task_file"] = json!(custom.path());
    }
    config
}

/// The lines of a task's samples file, one for each question that was asked.
///
/// `doc_hash` is the SHA-256 of the row as compact JSON with sorted keys: the harness
/// hashes another spelling of it. The other hashes are the harness'.
pub fn samples<'a>(
    task: &'a Task,
    result: &'a TaskResult,
) -> impl Iterator<Item = Value> + use<'a> {
    let metrics = task.kind.metrics();
    task.items.iter().zip(&result.outcomes).enumerate().map(move |(id, (item, outcome))| {
        let pairs = task.pairs(id, item);
        let arguments = pairs.iter().enumerate().map(|(i, (context, continuation))| {
            (format!("gen_args_{i}"), json!({"arg_0": context, "arg_1": continuation}))
        });
        let arguments: Map<String, Value> = arguments.collect();
        // Text, as the harness writes them.
        let response = |s: &super::Scored| {
            let greedy = if s.greedy { "True" } else { "False" };
            json!([format!("{:?}", s.log_prob), greedy])
        };
        let responses: Vec<Value> = outcome.scores.iter().map(response).collect();
        let target = item.question.target();
        let mut sample = json!({
            "doc_id": id,
            "doc": item.row,
            "target": target,
            "arguments": arguments,
            "resps": responses.iter().map(|r| json!([r])).collect::<Vec<_>>(),
            "filtered_resps": responses,
            "filter": FILTER,
            "metrics": metrics.iter().map(|m| m.name()).collect::<Vec<_>>(),
            "doc_hash": sha256_hex(row_json(item).as_bytes()),
            "prompt_hash": sha256_hex(pairs.first().map_or("", |p| p.0.as_str()).as_bytes()),
            "target_hash": sha256_hex(target.as_bytes()),
        });
        for metric in &metrics {
            let right = f64::from(u8::from(outcome.is_right(*metric)));
            sample[metric.name()] = right.into();
        }
        sample
    })
}

fn row_json(item: &Item) -> String {
    Value::Object(item.row.clone()).to_string()
}

/// The table that the harness prints, in Markdown.
#[must_use]
pub fn table(tasks: &[(Task, TaskResult)], num_fewshot: usize) -> String {
    let mut rows = vec![
        ["Task", "Version", "n-shot", "Questions", "Metric", "Value", "Stderr"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for (task, result) in tasks {
        for (i, metric) in task.kind.metrics().into_iter().enumerate() {
            let (mean, error) = result.mean(metric);
            let first = |text: String| if i == 0 { text } else { String::new() };
            rows.push(vec![
                first(task.kind.name().to_owned()),
                first(version(&task.kind.version())),
                first(num_fewshot.to_string()),
                first(result.outcomes.len().to_string()),
                Metric::name(metric).to_owned(),
                format!("{mean:.4}"),
                error.map_or_else(|| "N/A".to_owned(), |e| format!("± {e:.4}")),
            ]);
        }
    }
    let widths: Vec<usize> = (0..rows[0].len())
        .map(|column| rows.iter().map(|r| r[column].chars().count()).max().unwrap_or(0))
        .collect();
    let rule: String = widths.iter().map(|w| format!("|{}", "-".repeat(w + 2))).collect();
    let mut out = String::new();
    for (i, row) in rows.iter().enumerate() {
        for (cell, width) in row.iter().zip(&widths) {
            out += &format!("| {cell:width$} ");
        }
        out += "|\n";
        if i == 0 {
            out += &format!("{rule}|\n");
        }
    }
    out
}

fn version(version: &Value) -> String {
    version.as_str().map_or_else(|| version.to_string(), str::to_owned)
}

//! Scores of tasks from a results file in the schema of lm-evaluation-harness, as
//! `bitnet-eval tasks` writes it too: `results.TASK."METRIC,FILTER"`.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::EvalError;

/// The metrics that are read.
const METRICS: [&str; 2] = ["acc", "acc_norm"];

/// One score of a task.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TaskScore {
    /// The task.
    pub task: String,
    /// `acc`, or `acc_norm`: divided by the length of the choice.
    pub metric: String,
    /// The share of questions answered right.
    pub value: f64,
    /// Its standard error, where the file has it.
    pub stderr: Option<f64>,
}

#[derive(Deserialize)]
struct File {
    results: Map<String, Value>,
}

/// Reads a results file.
///
/// # Errors
/// A file that cannot be read, is no such JSON, or has no `acc` or `acc_norm`.
pub fn read_tasks(path: &Path) -> Result<Vec<TaskScore>, EvalError> {
    let bytes = fs::read(path).map_err(|source| EvalError::Read { path: path.into(), source })?;
    let bad = |why: String| EvalError::ResultsFile { path: path.into(), why };
    let file: File = serde_json::from_slice(&bytes).map_err(|e| bad(e.to_string()))?;
    let mut scores = Vec::new();
    for (task, keys) in &file.results {
        for metric in METRICS {
            let number = |name: &str| {
                // The filter behind the comma is `none` of multiple choice.
                let keys = keys.as_object()?;
                keys.iter().find(|(key, _)| key.split(',').next() == Some(name))?.1.as_f64()
            };
            if let Some(value) = number(metric) {
                let stderr = number(&format!("{metric}_stderr"));
                scores.push(TaskScore { task: task.clone(), metric: metric.into(), value, stderr });
            }
        }
    }
    match scores.is_empty() {
        true => Err(bad("no task in `results` has an `acc` or `acc_norm`".into())),
        false => Ok(scores),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_harness_schema() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.json");
        let json = serde_json::json!({ "results": {
            "piqa": { "alias": "piqa", "acc,none": 0.625, "acc_stderr,none": 0.05,
                "acc_norm,none": 0.75, "acc_norm_stderr,none": "N/A" },
            "perplexity": { "word_perplexity,none": 12.0 },
        } });
        fs::write(&path, json.to_string()).unwrap();
        let scores = read_tasks(&path).unwrap();
        assert_eq!(scores.len(), 2);
        assert_eq!((scores[0].value, scores[0].stderr), (0.625, Some(0.05)));
        assert_eq!((scores[1].metric.as_str(), scores[1].stderr), ("acc_norm", None));
        for (text, why) in [
            ("{}", "missing field `results`"),
            (r#"{"results":{"x":{"f1,none":1.0}}}"#, "no task in `results`"),
        ] {
            fs::write(&path, text).unwrap();
            let error = read_tasks(&path).unwrap_err().to_string();
            assert!(error.contains("r.json") && error.contains(why), "{error}");
        }
    }
}

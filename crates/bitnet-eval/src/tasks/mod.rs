//! Multiple choice: questions with several answers, of which a model is said to
//! choose the one it finds most probable.
//!
//! Prompts, tokens and scores are those of lm-evaluation-harness (the version in
//! [`FOLLOWS`]), so that numbers compare: a row of a file becomes a [`Question`]
//! ([`builtin`], [`custom`]), a question becomes pairs of context and continuation,
//! a pair becomes tokens of which the continuation's are scored (`scoring`), and
//! the results have the harness' keys (`report`). What was scored is noted in a
//! [`Journal`], so that a run can be gone on with.

mod asking;
pub mod builtin;
pub mod custom;
mod fewshot;
mod journal;
mod python_random;
mod question;
mod report;
mod row;
mod scoring;

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

pub use self::asking::{TaskResult, ask};
pub use self::builtin::Builtin;
pub use self::custom::CustomTask;
pub use self::fewshot::{Examples, Sampler};
pub use self::journal::{Journal, JournalIdentity};
pub use self::question::{Delimiters, Question};
pub use self::report::{RunFacts, results, samples, table};
pub use self::row::Fields;
pub use self::scoring::{Encode, Metric, Outcome, Request, Scored, encode_pair, outcome};
use crate::EvalError;
use crate::source::sha256_hex;

/// The version of lm-evaluation-harness whose prompts and rules these are.
pub const FOLLOWS: &str = "0.4.13";

/// What turns rows into questions.
#[derive(Debug)]
pub enum Kind {
    /// One of the tasks that are built in.
    Builtin(Builtin),
    /// A task that a file describes.
    Custom(Box<CustomTask>),
}

impl Kind {
    fn question(&self, fields: &Fields<'_>) -> Result<Question, String> {
        match self {
            Self::Builtin(task) => task.question(fields),
            Self::Custom(task) => task.question(fields),
        }
    }

    fn delimiters(&self) -> Delimiters {
        match self {
            Self::Builtin(_) => Delimiters::default(),
            Self::Custom(task) => task.delimiters(),
        }
    }

    /// The name in results.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Builtin(task) => task.name(),
            Self::Custom(task) => task.name(),
        }
    }

    /// The version of the task, as the harness counts them.
    #[must_use]
    pub fn version(&self) -> Value {
        match self {
            Self::Builtin(task) => task.version().into(),
            Self::Custom(task) => task.version(),
        }
    }

    /// Whether the harness, drawing examples by lot, leaves out the question itself: it
    /// does where a task's examples and tests are of one split, or neither is named.
    fn leaves_itself_out(&self) -> bool {
        match self {
            Self::Builtin(task) => task.leaves_itself_out(),
            Self::Custom(task) => task.leaves_itself_out(),
        }
    }

    /// What is reported.
    #[must_use]
    pub fn metrics(&self) -> Vec<Metric> {
        match self {
            Self::Builtin(task) => task.metrics().to_vec(),
            Self::Custom(task) => task.metrics(),
        }
    }
}

/// A question of a file.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    /// Its line or row, counted from 1.
    pub line: u64,
    /// The row.
    pub row: Map<String, Value>,
    /// What is asked.
    pub question: Question,
}

/// A task and its questions.
#[derive(Debug)]
pub struct Task {
    /// What it is.
    pub kind: Kind,
    /// Where the questions are from.
    pub path: PathBuf,
    /// SHA-256 of that file.
    pub sha256: String,
    /// The questions, in order.
    pub items: Vec<Item>,
    /// Solved examples that are put before each question.
    pub examples: Examples,
}

impl Task {
    /// Reads the questions of a file; `labels`: the answers, a number a line, where
    /// they are a file of their own. By default that is looked for where the original
    /// data have it (`valid-labels.lst` beside `valid.jsonl`), if rows hold none.
    ///
    /// # Errors
    /// A file that cannot be read, is empty, or has a row that is not the task's; the
    /// message names the line and the field.
    pub fn open(kind: Kind, path: &Path, labels: Option<&Path>) -> Result<Self, EvalError> {
        let items = read_items(&kind, path, labels)?;
        let bytes =
            std::fs::read(path).map_err(|source| EvalError::Read { path: path.into(), source })?;
        let sha256 = sha256_hex(&bytes);
        Ok(Self { kind, path: path.into(), sha256, items, examples: Examples::default() })
    }

    /// Puts `count` questions of a file, with their answers, before every question.
    ///
    /// # Errors
    /// As [`Task::open`]; fewer questions than that.
    pub fn with_examples(
        mut self,
        path: &Path,
        count: usize,
        sampler: Sampler,
    ) -> Result<Self, EvalError> {
        let pool = read_items(&self.kind, path, None)?;
        let apart = self.kind.leaves_itself_out();
        self.examples = Examples::choose(pool, &self.items, count, sampler, apart, path)?;
        Ok(self)
    }

    /// The texts to score for a question, the `number`th from 0: a context and a
    /// continuation for each choice.
    #[must_use]
    pub fn pairs(&self, number: usize, item: &Item) -> Vec<(String, String)> {
        let delimiters = self.kind.delimiters();
        item.question.pairs(&delimiters.before(self.examples.of(number)), &delimiters)
    }
}

fn read_items(kind: &Kind, path: &Path, labels: Option<&Path>) -> Result<Vec<Item>, EvalError> {
    let mut rows = bitnet_data::read_rows(path)?;
    if rows.is_empty() {
        return Err(EvalError::Empty { path: path.into() });
    }
    if let Kind::Builtin(task) = kind {
        task.add_labels(&mut rows, path, labels)?;
    } else if labels.is_some() {
        let message = format!("--labels {}: its rows name their answers", kind.name());
        return Err(EvalError::Usage(message));
    }
    rows.into_iter()
        .map(|row| {
            let wrong = |what| EvalError::Row { path: path.into(), line: row.number, what };
            let question = kind.question(&Fields(&row.fields)).map_err(wrong)?;
            question.check().map_err(wrong)?;
            Ok(Item { line: row.number, row: row.fields, question })
        })
        .collect()
}

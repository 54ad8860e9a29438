//! Asking the questions of a task: as many together as the model takes.

use super::journal::{self, Journal};
use super::scoring::{self, Encode, Metric, Outcome, Request, Scored, encode_pair, outcome};
use super::{Item, Task};
use crate::model::LanguageModel;
use crate::{EvalError, ratio};

/// How a task went.
#[derive(Debug, Clone, PartialEq)]
pub struct TaskResult {
    /// For each question that was asked, in order, what came out.
    pub outcomes: Vec<Outcome>,
    /// Questions whose contexts were cut from the left to fit the model.
    pub truncated: usize,
    /// Questions whose scores were taken from the journal.
    pub resumed: usize,
}

impl TaskResult {
    /// The mean of a metric over the questions and its standard error, that of a mean
    /// of independent values (sample deviation over the root of their number); none for
    /// a single question.
    #[must_use]
    pub fn mean(&self, metric: Metric) -> (f64, Option<f64>) {
        let values = self.outcomes.iter().map(|o| (f64::from(u8::from(o.is_right(metric))), 1.0));
        let (mean, error) = ratio(&values.collect::<Vec<_>>());
        (mean.unwrap_or(f64::NAN), error)
    }
}

/// Asks the first `limit` questions of a task (all: `None`), as many together as
/// [`LanguageModel::together`] says. Those that the journal holds are not asked again.
/// `progress` gets the questions done and in all.
///
/// # Errors
/// A continuation longer than the model's context or without a token of its own, named
/// by file and line; what the model or the journal returns.
pub fn ask(
    model: &mut dyn LanguageModel,
    encoder: &dyn Encode,
    task: &Task,
    limit: Option<usize>,
    journal: &mut Journal,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<TaskResult, EvalError> {
    let items = &task.items[..limit.unwrap_or(usize::MAX).min(task.items.len())];
    let mut asked = Asked { task, items, outcomes: vec![None; items.len()], waiting: Vec::new() };
    let (mut truncated, mut resumed) = (0, 0);
    for (i, item) in items.iter().enumerate() {
        let requests = requests(task, i, item, encoder, model.context())?;
        truncated += usize::from(requests.iter().any(|r| r.truncated));
        let key = journal::key(&requests);
        if let Some(scores) = journal.find(task.kind.name(), &key) {
            resumed += 1;
            asked.outcomes[i] = Some(outcome(&item.question, scores));
            progress(asked.done(i + 1), items.len());
            continue;
        }
        if asked.requests() + requests.len() > model.together() {
            asked.score(model, journal)?;
        }
        asked.waiting.push(Waiting { item: i, key, requests });
        progress(asked.done(i + 1), items.len());
    }
    asked.score(model, journal)?;
    progress(items.len(), items.len());
    let outcomes = asked.outcomes.into_iter().flatten().collect();
    Ok(TaskResult { outcomes, truncated, resumed })
}

/// The tokens of a question, one request for each choice.
fn requests(
    task: &Task,
    number: usize,
    item: &Item,
    encoder: &dyn Encode,
    context: usize,
) -> Result<Vec<Request>, EvalError> {
    let wrong = |what| EvalError::Row { path: task.path.clone(), line: item.line, what };
    let pairs = task.pairs(number, item);
    let request = |(text, continuation): &(String, String)| {
        encode_pair(encoder, text, continuation)?
            .and_then(|request| request.fit(context))
            .map_err(wrong)
    };
    pairs.iter().map(request).collect()
}

/// A question that is asked with the next ones.
struct Waiting {
    item: usize,
    key: String,
    requests: Vec<Request>,
}

/// Where asking stands.
struct Asked<'t> {
    task: &'t Task,
    items: &'t [Item],
    outcomes: Vec<Option<Outcome>>,
    waiting: Vec<Waiting>,
}

impl Asked<'_> {
    /// Requests that wait.
    fn requests(&self) -> usize {
        self.waiting.iter().map(|w| w.requests.len()).sum()
    }

    /// Of so many questions, those whose outcome is known.
    fn done(&self, seen: usize) -> usize {
        seen - self.waiting.len()
    }

    /// Scores the questions that wait, and notes them in their order.
    fn score(
        &mut self,
        model: &mut dyn LanguageModel,
        journal: &mut Journal,
    ) -> Result<(), EvalError> {
        let requests: Vec<&Request> = self.waiting.iter().flat_map(|w| &w.requests).collect();
        let mut scores = scoring::score(model, &requests)?.into_iter();
        for Waiting { item, key, requests } in std::mem::take(&mut self.waiting) {
            let own: Vec<Scored> = scores.by_ref().take(requests.len()).collect();
            journal.add(self.task.kind.name(), &key, &own)?;
            self.outcomes[item] = Some(outcome(&self.items[item].question, own));
        }
        Ok(())
    }
}

//! Solved examples that are put before a question.

use std::path::Path;

use super::python_random::PythonRandom;
use super::{Item, Question};
use crate::EvalError;

/// How the examples of a question are chosen from those of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sampler {
    /// The first ones, the same for every question: the harness' sampler `first_n`.
    FirstN,
    /// By lot, anew for every question: the harness' default. The numbers are those of
    /// Python's generator, so that the examples are the harness', too.
    Default {
        /// The harness' `fewshot_random_seed`, by default 1234 there.
        seed: u64,
    },
}

impl Sampler {
    /// The harness' name of it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::FirstN => "first_n",
            Self::Default { .. } => "default",
        }
    }

    /// The seed, where there is one.
    #[must_use]
    pub fn seed(self) -> Option<u64> {
        match self {
            Self::FirstN => None,
            Self::Default { seed } => Some(seed),
        }
    }
}

/// The examples of every question of a task.
#[derive(Debug, Default)]
pub struct Examples {
    pool: Vec<Question>,
    /// For each question those of the pool; empty: all of it for every one.
    drawn: Vec<Vec<usize>>,
}

impl Examples {
    /// Chooses `count` of the solved questions `pool`, which are from `path`, for each
    /// of `items`. With `apart` a question is no example of itself: the harness then
    /// draws one more and leaves it out.
    ///
    /// # Errors
    /// Fewer questions than that.
    pub(super) fn choose(
        pool: Vec<Item>,
        items: &[Item],
        count: usize,
        sampler: Sampler,
        apart: bool,
        path: &Path,
    ) -> Result<Self, EvalError> {
        let few = |there: usize, needed: usize| {
            let what = format!("{there} questions, and {needed} examples are asked for");
            EvalError::TaskFile { path: path.into(), what }
        };
        let seed = match sampler {
            Sampler::FirstN if pool.len() < count => return Err(few(pool.len(), count)),
            Sampler::FirstN => {
                let pool = pool.into_iter().take(count).map(|item| item.question).collect();
                return Ok(Self { pool, drawn: Vec::new() });
            }
            Sampler::Default { seed } => seed,
        };
        let most = count + usize::from(apart);
        if pool.len() < most {
            return Err(few(pool.len(), most));
        }
        let mut random = PythonRandom::new(seed);
        let mut drawn = Vec::with_capacity(items.len());
        for item in items {
            let mut own = random.sample(pool.len(), most);
            if apart {
                let other = |i: &usize| pool[*i].row != item.row;
                own.retain(other);
                own.truncate(count);
                if own.len() < count {
                    // Rows that are equal to the question were drawn more than once.
                    let others: Vec<usize> = (0..pool.len()).filter(other).collect();
                    if others.len() < count {
                        return Err(few(others.len(), count));
                    }
                    let again = random.sample(others.len(), count);
                    own = again.into_iter().map(|i| others[i]).collect();
                }
            }
            drawn.push(own);
        }
        Ok(Self { pool: pool.into_iter().map(|item| item.question).collect(), drawn })
    }

    /// The examples of a question, counted from 0.
    pub fn of(&self, question: usize) -> impl Iterator<Item = &Question> {
        let drawn = self.drawn.get(question);
        let all = if drawn.is_none() { &self.pool[..] } else { &[] };
        all.iter().chain(drawn.into_iter().flatten().map(|&i| &self.pool[i]))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn items(names: &[u64]) -> Vec<Item> {
        let item = |&name: &u64| {
            let question = Question::Answers {
                prompt: name.to_string(),
                choices: vec!["a".into(), "b".into()],
                gold: 0,
            };
            let row = json!({ "name": name }).as_object().unwrap().clone();
            Item { line: 1, row, question }
        };
        names.iter().map(item).collect()
    }

    fn chosen(pool: &[u64], count: usize, sampler: Sampler, apart: bool) -> Vec<Vec<String>> {
        let (items, path) = (items(&[0, 1, 2, 3]), Path::new("f"));
        let examples =
            Examples::choose(self::items(pool), &items, count, sampler, apart, path).unwrap();
        let prompt = |q: &Question| match q {
            Question::Answers { prompt, .. } => prompt.clone(),
            Question::Contexts { .. } => unreachable!(),
        };
        (0..items.len()).map(|i| examples.of(i).map(prompt).collect()).collect()
    }

    /// Recorded with lm_eval 0.4.13: `ContextSampler(pool).set_rnd(5).sample(n, doc)`.
    #[test]
    fn examples_are_the_harness() {
        let lot = Sampler::Default { seed: 5 };
        let pool: Vec<u64> = (0..10).collect();
        assert_eq!(chosen(&pool, 3, Sampler::FirstN, true), [["0", "1", "2"]; 4]);
        assert_eq!(
            chosen(&pool, 3, lot, false),
            [["9", "4", "5"], ["8", "0", "7"], ["3", "0", "2"], ["1", "5", "7"]]
        );
        assert_eq!(
            chosen(&pool, 3, lot, true),
            [["9", "4", "5"], ["8", "0", "7"], ["3", "0", "8"], ["5", "7", "8"]]
        );
        // Rows that are there several times: the first question's are drawn again.
        assert_eq!(
            chosen(&[0, 0, 0, 0, 0, 0, 1, 2], 2, lot, true),
            [["1", "2"], ["0", "0"], ["0", "0"], ["2", "1"]]
        );
    }

    #[test]
    fn too_few_are_refused() {
        let lot = Sampler::Default { seed: 5 };
        for (pool, sampler, apart, message) in [
            (&[0, 1][..], Sampler::FirstN, false, "2 questions, and 3 examples"),
            (&[0, 1], lot, false, "2 questions, and 3 examples"),
            (&[4, 5, 6], lot, true, "3 questions, and 4 examples"),
            (&[0, 0, 0, 5], lot, true, "1 questions, and 3 examples"),
        ] {
            let pool = items(pool);
            let path = Path::new("f");
            let error = Examples::choose(pool, &items(&[0]), 3, sampler, apart, path).unwrap_err();
            assert!(error.to_string().contains(message), "{error}");
        }
    }
}

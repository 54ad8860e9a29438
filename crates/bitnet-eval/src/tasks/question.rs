//! A question with several answers, and the texts that are scored for it.

use serde::Serialize;

/// What is asked, and which answer is right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Question {
    /// One context, a continuation for each choice.
    Answers {
        /// The text before the answer.
        prompt: String,
        /// The answers.
        choices: Vec<String>,
        /// Index of the right one.
        gold: usize,
    },
    /// A context for each choice, the same continuation (the harness' "multiple
    /// inputs").
    Contexts {
        /// The texts before the continuation.
        contexts: Vec<String>,
        /// What follows.
        continuation: String,
        /// Index of the right context.
        gold: usize,
    },
}

/// What stands between the parts of a prompt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Delimiters {
    /// Before everything.
    pub description: String,
    /// Between a context and its continuation.
    pub target: String,
    /// Behind each example.
    pub fewshot: String,
}

impl Default for Delimiters {
    fn default() -> Self {
        Self { description: String::new(), target: " ".into(), fewshot: "\n\n".into() }
    }
}

impl Delimiters {
    /// What stands before every question: the description and solved examples.
    #[must_use]
    pub fn before<'q>(&self, examples: impl IntoIterator<Item = &'q Question>) -> String {
        let mut text = self.description.clone();
        for example in examples {
            let (prompt, answer) = example.solved();
            text.extend([prompt, &self.target, answer, &self.fewshot]);
        }
        text
    }
}

impl Question {
    /// The right answer's index.
    #[must_use]
    pub fn gold(&self) -> usize {
        match self {
            Self::Answers { gold, .. } | Self::Contexts { gold, .. } => *gold,
        }
    }

    /// The texts that tell the choices apart; their lengths are what `acc_norm` and
    /// `acc_bytes` divide by.
    #[must_use]
    pub fn choices(&self) -> &[String] {
        match self {
            Self::Answers { choices, .. } => choices,
            Self::Contexts { contexts, .. } => contexts,
        }
    }

    /// A context and a continuation for each choice; `before` is put before them.
    #[must_use]
    pub fn pairs(&self, before: &str, delimiters: &Delimiters) -> Vec<(String, String)> {
        let delimiter = &delimiters.target;
        match self {
            Self::Answers { prompt, choices, .. } => {
                let context = format!("{before}{prompt}");
                choices.iter().map(|c| (context.clone(), format!("{delimiter}{c}"))).collect()
            }
            Self::Contexts { contexts, continuation, .. } => contexts
                .iter()
                .map(|c| (format!("{before}{c}"), format!("{delimiter}{continuation}")))
                .collect(),
        }
    }

    /// What the harness logs as the target: the answer's index, or the continuation.
    #[must_use]
    pub fn target(&self) -> String {
        match self {
            Self::Answers { gold, .. } => gold.to_string(),
            Self::Contexts { continuation, .. } => continuation.clone(),
        }
    }

    /// The context and the continuation of the right choice.
    fn solved(&self) -> (&str, &str) {
        match self {
            Self::Answers { prompt, choices, gold } => (prompt, &choices[*gold]),
            Self::Contexts { contexts, continuation, gold } => (&contexts[*gold], continuation),
        }
    }

    /// Whether it can be asked: at least two choices, none empty, the right one among
    /// them. The message says what is wrong.
    pub(super) fn check(&self) -> Result<(), String> {
        let choices = self.choices();
        if choices.len() < 2 {
            return Err(format!("{} choices; expected at least 2", choices.len()));
        }
        if let Some(empty) = choices.iter().position(String::is_empty) {
            return Err(format!("choice {empty} (counted from 0) is empty"));
        }
        if matches!(self, Self::Contexts { continuation, .. } if continuation.is_empty()) {
            return Err("nothing follows the blank".into());
        }
        let gold = self.gold();
        if gold >= choices.len() {
            return Err(format!("answer {gold} (counted from 0) of {} choices", choices.len()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(choices: &[&str], gold: usize) -> Question {
        let choices = choices.iter().map(|c| (*c).to_owned()).collect();
        Question::Answers { prompt: "Q:".into(), choices, gold }
    }

    #[test]
    fn examples_are_solved_questions() {
        let delimiters = Delimiters { description: "Choose.\n".into(), ..Delimiters::default() };
        let blank = Question::Contexts {
            contexts: vec!["Ann".into(), "Bob".into()],
            continuation: "left.".into(),
            gold: 1,
        };
        let before = delimiters.before(&[question(&["a", "b"], 1), blank.clone()]);
        assert_eq!(before, "Choose.\nQ: b\n\nBob left.\n\n");
        let pair = |c: &str, t: &str| (c.to_owned(), t.to_owned());
        assert_eq!(
            question(&["a", "b"], 0).pairs("x\n", &delimiters),
            [pair("x\nQ:", " a"), pair("x\nQ:", " b")]
        );
        assert_eq!(blank.pairs("", &delimiters), [pair("Ann", " left."), pair("Bob", " left.")]);
        assert_eq!(
            (blank.target(), question(&["a", "b"], 1).target()),
            ("left.".into(), "1".into())
        );
    }

    #[test]
    fn questions_that_cannot_be_asked_say_why() {
        for (question, message) in [
            (question(&["a"], 0), "1 choices; expected at least 2"),
            (question(&["a", ""], 0), "choice 1 (counted from 0) is empty"),
            (question(&["a", "b"], 2), "answer 2 (counted from 0) of 2 choices"),
        ] {
            assert_eq!(question.check().unwrap_err(), message);
        }
        assert!(question(&["a", "b"], 1).check().is_ok());
    }
}

//! From a context and a continuation to tokens, scores, and what is right.

use bitnet_engine::Tokenizer;
use serde::{Deserialize, Serialize};

use super::question::Question;
use crate::EvalError;
use crate::model::{LanguageModel, Sequence, TokenScore};
use crate::words::is_space;

/// Text to tokens.
pub trait Encode {
    /// The tokens of a text; with `whole`, and what the tokenizer puts around a text.
    ///
    /// # Errors
    /// A text that cannot be encoded.
    fn encode(&self, text: &str, whole: bool) -> Result<Vec<u32>, EvalError>;

    /// The token that stands before a continuation without a context: BOS, else EOS.
    fn prefix(&self) -> Option<u32>;
}

impl Encode for Tokenizer {
    fn encode(&self, text: &str, whole: bool) -> Result<Vec<u32>, EvalError> {
        Ok(if whole { self.encode_prompt(text)? } else { self.encode(text)? })
    }

    fn prefix(&self) -> Option<u32> {
        self.bos_id().or(self.eos_ids().first().copied())
    }
}

/// Tokens of which those from `first` on are scored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The context and the continuation.
    pub tokens: Vec<u32>,
    /// The first token of the continuation; at least 1.
    pub first: usize,
    /// Whether the context was cut.
    pub truncated: bool,
}

impl Request {
    /// Cuts the context from the left, so that a model of `context` inputs can read all
    /// but the last token.
    ///
    /// # Errors
    /// A continuation of more than `context` tokens.
    pub fn fit(mut self, context: usize) -> Result<Self, String> {
        let continuation = self.tokens.len() - self.first;
        if continuation > context {
            return Err(format!(
                "a continuation of {continuation} tokens, and the context is {context}"
            ));
        }
        let cut = self.tokens.len().saturating_sub(context + 1);
        self.tokens.drain(..cut);
        self.first -= cut;
        self.truncated = cut > 0;
        Ok(self)
    }
}

/// The tokens of a context and a continuation, as the harness makes them: white space
/// at the context's end belongs to the continuation, both are encoded as one text, and
/// the continuation's tokens are those behind as many as the context alone has. Without
/// a context there is [`Encode::prefix`].
///
/// # Errors
/// A text that cannot be encoded; inside, a pair that cannot be scored: a context or a
/// continuation that has no token.
pub fn encode_pair(
    encoder: &dyn Encode,
    context: &str,
    continuation: &str,
) -> Result<Result<Request, String>, EvalError> {
    let (mut tokens, first) = if context.is_empty() {
        let Some(prefix) = encoder.prefix() else {
            return Ok(Err("no context, and the tokenizer has no BOS and no EOS".into()));
        };
        let mut tokens = encoder.encode(continuation, false)?;
        // A continuation that begins with that token brings its context itself.
        if tokens.first() != Some(&prefix) {
            tokens.insert(0, prefix);
        }
        (tokens, 1)
    } else {
        let head = context.trim_end_matches(is_space);
        let first = encoder.encode(head, true)?.len();
        let tokens = encoder.encode(&format!("{context}{continuation}"), true)?;
        (tokens, first)
    };
    if first == 0 {
        return Ok(Err("the context has no token".into()));
    }
    if first >= tokens.len() {
        return Ok(Err(format!(
            "the continuation {continuation:?} has no token of its own behind its context"
        )));
    }
    tokens.shrink_to_fit();
    Ok(Ok(Request { tokens, first, truncated: false }))
}

/// What a model says about a continuation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scored {
    /// The sum of its tokens' log-probabilities, in nats.
    pub log_prob: f64,
    /// Whether each of its tokens is the most probable one.
    pub greedy: bool,
}

/// Scores continuations, of one question or of several.
///
/// # Errors
/// A log-probability that is no number; what the model returns.
pub(super) fn score(
    model: &mut dyn LanguageModel,
    requests: &[&Request],
) -> Result<Vec<Scored>, EvalError> {
    let sequences: Vec<Sequence<'_>> =
        requests.iter().map(|r| Sequence { tokens: &r.tokens, first: r.first }).collect();
    let scores = model.score_all(&sequences)?;
    let scored = |(request, tokens): (&&Request, Vec<TokenScore>)| {
        if let Some(i) = tokens.iter().position(|t| !t.log_prob.is_finite()) {
            let position = (request.first + i) as u64;
            return Err(EvalError::NotFinite { position, value: tokens[i].log_prob });
        }
        Ok(Scored {
            log_prob: tokens.iter().map(|t| t.log_prob).sum(),
            greedy: tokens.iter().all(|t| t.greedy),
        })
    };
    requests.iter().zip(scores).map(scored).collect()
}

/// How a choice is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// The largest log-probability.
    Acc,
    /// The largest log-probability for each character of the choice.
    AccNorm,
    /// The same for each byte of its UTF-8 form.
    AccBytes,
}

impl Metric {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Acc, Self::AccNorm, Self::AccBytes];

    /// The harness' name of it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Acc => "acc",
            Self::AccNorm => "acc_norm",
            Self::AccBytes => "acc_bytes",
        }
    }

    fn length(self, choice: &str) -> f64 {
        match self {
            Self::Acc => 1.0,
            Self::AccNorm => choice.chars().count() as f64,
            Self::AccBytes => choice.len() as f64,
        }
    }
}

/// What a model chose.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// What it says about each choice.
    pub scores: Vec<Scored>,
    /// The choice that is right.
    pub gold: usize,
    /// Its choice by each of [`Metric::ALL`].
    pub chosen: [usize; 3],
}

impl Outcome {
    /// Its choice.
    #[must_use]
    pub fn chosen(&self, metric: Metric) -> usize {
        self.chosen[metric as usize]
    }

    /// Whether that is the right one.
    #[must_use]
    pub fn is_right(&self, metric: Metric) -> bool {
        self.chosen(metric) == self.gold
    }
}

/// What these scores, one for each choice, mean for a question.
#[must_use]
pub fn outcome(question: &Question, scores: Vec<Scored>) -> Outcome {
    let chosen = Metric::ALL.map(|metric| {
        let values = scores.iter().zip(question.choices());
        argmax(values.map(|(score, choice)| score.log_prob / metric.length(choice)))
    });
    Outcome { scores, gold: question.gold(), chosen }
}

/// The index of the largest value, of equals the first (NumPy's `argmax`).
fn argmax(values: impl Iterator<Item = f64>) -> usize {
    let mut best = (0, f64::NEG_INFINITY);
    for (i, value) in values.enumerate() {
        if value > best.1 {
            best = (i, value);
        }
    }
    best.0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A character is a token, its code point; ` t` and `th` are one (1000, 1001).
    /// Whole texts begin with 2.
    struct Letters {
        bos: bool,
    }

    impl Encode for Letters {
        fn encode(&self, text: &str, whole: bool) -> Result<Vec<u32>, EvalError> {
            let mut tokens: Vec<u32> = (whole && self.bos).then_some(2).into_iter().collect();
            let mut rest = text;
            while let Some(c) = rest.chars().next() {
                let (token, len) = match rest {
                    r if r.starts_with(" t") => (1000, 2),
                    r if r.starts_with("th") => (1001, 2),
                    _ => (u32::from(c), c.len_utf8()),
                };
                tokens.push(token);
                rest = &rest[len..];
            }
            Ok(tokens)
        }

        fn prefix(&self) -> Option<u32> {
            Some(2)
        }
    }

    fn pair(bos: bool, context: &str, continuation: &str) -> Result<(Vec<u32>, usize), String> {
        let request = encode_pair(&Letters { bos }, context, continuation).unwrap();
        request.map(|r| (r.tokens, r.first))
    }

    #[test]
    fn a_pair_is_encoded_whole_and_split_by_its_context() {
        let [a, b, h, t] = ['a', 'b', 'h', 't'].map(u32::from);
        assert_eq!(pair(false, "a", " th").unwrap(), (vec![a, 1000, h], 1));
        assert_eq!(pair(true, "a", " th").unwrap(), (vec![2, a, 1000, h], 2));
        // White space at the end of the context goes to the continuation.
        assert_eq!(pair(false, "a \n", "tb").unwrap(), (vec![a, 32, 10, t, b], 1));
        assert_eq!(pair(false, "a ", "tb").unwrap(), (vec![a, 1000, b], 1));
        // A merge over the border takes the token from the continuation.
        assert_eq!(pair(false, "at", "ha").unwrap(), (vec![a, 1000 + 1, a], 2));
        // No context: the prefix, once, and no first token of a text.
        assert_eq!(pair(true, "", " b").unwrap(), (vec![2, 32, b], 1));
        assert_eq!(pair(true, "", "\u{2}b").unwrap(), (vec![2, b], 1));
    }

    #[test]
    fn pairs_without_tokens_are_refused() {
        assert!(pair(false, "at", "h").unwrap_err().contains("\"h\" has no token of its own"));
        assert!(pair(false, " ", "b").unwrap_err().contains("the context has no token"));
        assert!(pair(true, "", "").unwrap_err().contains("no token of its own"));
    }

    #[test]
    fn contexts_are_cut_from_the_left() {
        let request = || Request { tokens: (0..10).collect(), first: 7, truncated: false };
        let whole = request().fit(9).unwrap();
        assert_eq!((whole.tokens.len(), whole.first, whole.truncated), (10, 7, false));
        let cut = request().fit(8).unwrap();
        assert_eq!(
            (&cut.tokens[..], cut.first, cut.truncated),
            (&[1, 2, 3, 4, 5, 6, 7, 8, 9][..], 6, true)
        );
        let most = request().fit(3).unwrap();
        assert_eq!((&most.tokens[..], most.first), (&[6, 7, 8, 9][..], 1));
        assert!(request().fit(2).unwrap_err().contains("3 tokens, and the context is 2"));
    }

    #[test]
    fn choices_are_weighed_by_characters_and_bytes() {
        let question = |choices: [&str; 3]| Question::Answers {
            prompt: "Q".into(),
            choices: choices.map(str::to_owned).to_vec(),
            gold: 1,
        };
        let scores =
            |values: [f64; 3]| values.map(|log_prob| Scored { log_prob, greedy: false }).to_vec();
        // Per character -2, -1.5, -1.25; per byte -2, -1.5 (ASCII), -0.625 (é is two).
        let o = outcome(&question(["a", "ab", "éééé"]), scores([-2.0, -3.0, -5.0]));
        assert_eq!(o.chosen, [0, 2, 2]);
        let o = outcome(&question(["ab", "éé", "abc"]), scores([-4.0, -5.0, -9.0]));
        assert_eq!(o.chosen, [0, 0, 1], "-2 -2.5 -3 per character, -2 -1.25 -3 per byte");
        assert!(o.is_right(Metric::AccBytes) && !o.is_right(Metric::Acc));
        // Of equals the first.
        assert_eq!(outcome(&question(["a", "b", "c"]), scores([-1.0; 3])).chosen, [0; 3]);
    }
}

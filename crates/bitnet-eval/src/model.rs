//! What can be scored: log-probabilities of a token sequence.

use bitnet_engine::Session;

use crate::EvalError;

/// What a model says about one token of a sequence.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenScore {
    /// `ln p` of the token after those before it, in nats.
    pub log_prob: f64,
    /// Whether it is the most probable token there; of equals, the smallest id.
    pub greedy: bool,
}

/// Tokens of which those from `first` on are scored.
#[derive(Debug, Clone, Copy)]
pub struct Sequence<'t> {
    /// All of them.
    pub tokens: &'t [u32],
    /// The first that is scored, at least 1.
    pub first: usize,
}

impl<'t> Sequence<'t> {
    /// What a model reads: the last token is predicted only.
    pub(crate) fn inputs(&self) -> &'t [u32] {
        self.tokens.split_last().map_or(&[], |(_, inputs)| inputs)
    }
}

/// A model that predicts the next token.
pub trait LanguageModel {
    /// The longest sequence it reads, in tokens.
    fn context(&self) -> usize;

    /// How many tokens its vocabulary has.
    fn vocab_size(&self) -> usize;

    /// `ln p(tokens[i] | tokens[..i])` for `i` in `first..tokens.len()`.
    ///
    /// # Shapes
    /// The model reads `tokens.len() - 1` tokens; `first` is at least 1; the
    /// result has `tokens.len() - first` values.
    ///
    /// # Errors
    /// A sequence longer than the context, a token outside the vocabulary.
    fn score(&mut self, tokens: &[u32], first: usize) -> Result<Vec<TokenScore>, EvalError>;

    /// How many sequences it scores together, where they are short.
    fn together(&self) -> usize {
        1
    }

    /// The scores of each of some sequences, as [`LanguageModel::score`] gives them.
    ///
    /// # Errors
    /// As there.
    fn score_all(&mut self, sequences: &[Sequence<'_>]) -> Result<Vec<Vec<TokenScore>>, EvalError> {
        sequences.iter().map(|s| self.score(s.tokens, s.first)).collect()
    }
}

/// `ln softmax(logits)[target]`, summed in f64.
///
/// # Shapes
/// `logits` is `[V]` and `target` below V.
#[must_use]
pub fn log_prob(logits: &[f32], target: usize) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let max = f64::from(max);
    let sum: f64 = logits.iter().map(|&l| (f64::from(l) - max).exp()).sum();
    f64::from(logits[target]) - max - sum.ln()
}

/// The score of `target` after `logits`.
///
/// # Shapes
/// `logits` is `[V]` and `target` below V.
#[must_use]
pub fn token_score(logits: &[f32], target: usize) -> TokenScore {
    let mine = logits[target];
    let greedy = logits[..target].iter().all(|&l| l < mine)
        && logits[target + 1..].iter().all(|&l| l <= mine);
    TokenScore { log_prob: log_prob(logits, target), greedy }
}

/// A packed model on the CPU.
///
/// A sequence that begins as the one before it is run from where they part, so
/// that the answers to one question share the question.
#[derive(Debug)]
pub struct EngineModel {
    session: Session,
}

impl EngineModel {
    /// Scores with `session`; what it holds is forgotten.
    #[must_use]
    pub fn new(session: Session) -> Self {
        Self { session }
    }

    /// The session.
    #[must_use]
    pub fn session(&self) -> &Session {
        &self.session
    }
}

impl LanguageModel for EngineModel {
    fn context(&self) -> usize {
        self.session.context()
    }

    fn vocab_size(&self) -> usize {
        self.session.model().config().vocab_size
    }

    fn score(&mut self, tokens: &[u32], first: usize) -> Result<Vec<TokenScore>, EvalError> {
        let vocab_size = self.vocab_size();
        let first = first.max(1);
        if first >= tokens.len() {
            return Ok(Vec::new());
        }
        let inputs = &tokens[..tokens.len() - 1];
        // The last token is a target alone, which the session does not check.
        let last = tokens[inputs.len()];
        if last as usize >= vocab_size {
            let position = inputs.len();
            return Err(
                bitnet_engine::EngineError::Token { token: last, position, vocab_size }.into()
            );
        }
        // The logits that predict token `first` are those of the token before it.
        let wanted = first - 1;
        let common = self.session.tokens().iter().zip(inputs).take_while(|(a, b)| a == b).count();
        self.session.truncate(common.min(wanted));
        let at = self.session.position();
        if at < wanted {
            self.session.prefill(&inputs[at..wanted])?;
        }
        let mut scores = Vec::with_capacity(tokens.len() - first);
        self.session.score(&inputs[wanted..], |i, logits| {
            scores.push(token_score(logits, tokens[first + i] as usize));
        })?;
        Ok(scores)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_probs_are_those_of_softmax() {
        // softmax([0, ln 2, ln 5]) = [1, 2, 5] / 8
        let logits = [0.0, 2f32.ln(), 5f32.ln()];
        for (target, p) in [(0, 0.125f64), (1, 0.25), (2, 0.625)] {
            assert!((log_prob(&logits, target) - p.ln()).abs() < 1e-6);
        }
        let shifted: Vec<f32> = logits.iter().map(|l| l + 1000.0).collect();
        assert!((log_prob(&shifted, 2) - 0.625f64.ln()).abs() < 1e-4, "no overflow");
        assert!((log_prob(&[-1e30, 0.0], 0) + 1e30).abs() < 1e24, "no underflow to infinity");
        assert!(!log_prob(&[f32::NAN, 0.0], 1).is_finite());
        assert!(!log_prob(&[f32::INFINITY, 0.0], 1).is_finite());
    }

    #[test]
    fn greedy_is_the_first_of_the_largest() {
        let greedy = |target| token_score(&[0.5, 2.0, 2.0, -1.0], target).greedy;
        assert_eq!([0, 1, 2, 3].map(greedy), [false, true, false, false]);
        assert!(!token_score(&[f32::NAN, 0.0], 0).greedy);
    }

    #[test]
    fn a_flat_distribution_costs_ln_v() {
        assert!((log_prob(&[0.3; 4096], 7) + 4096f64.ln()).abs() < 1e-12);
    }
}

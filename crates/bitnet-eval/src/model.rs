//! What can be scored: log-probabilities of a token sequence.

use bitnet_engine::Session;

use crate::EvalError;

/// A model that predicts the next token.
pub trait LanguageModel {
    /// The longest sequence it reads, in tokens.
    fn context(&self) -> usize;

    /// How many tokens its vocabulary has.
    fn vocab_size(&self) -> usize;

    /// `ln p(tokens[i] | tokens[..i])` for `i` in `first..tokens.len()`, in nats.
    ///
    /// # Shapes
    /// The model reads `tokens.len() - 1` tokens; `first` is at least 1; the
    /// result has `tokens.len() - first` values.
    ///
    /// # Errors
    /// A sequence longer than the context, a token outside the vocabulary.
    fn score(&mut self, tokens: &[u32], first: usize) -> Result<Vec<f64>, EvalError>;
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

/// A packed model on the CPU.
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

    fn score(&mut self, tokens: &[u32], first: usize) -> Result<Vec<f64>, EvalError> {
        let vocab_size = self.vocab_size();
        let Some((&last, inputs)) = tokens.split_last() else { return Ok(Vec::new()) };
        // The last token is a target alone, which the session does not check.
        if last as usize >= vocab_size {
            let position = inputs.len();
            return Err(
                bitnet_engine::EngineError::Token { token: last, position, vocab_size }.into()
            );
        }
        let mut scores = Vec::with_capacity(tokens.len().saturating_sub(first));
        self.session.reset();
        self.session.score(inputs, |at, logits| {
            if at + 1 >= first {
                scores.push(log_prob(logits, tokens[at + 1] as usize));
            }
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
    fn a_flat_distribution_costs_ln_v() {
        assert!((log_prob(&[0.3; 4096], 7) + 4096f64.ln()).abs() < 1e-12);
    }
}

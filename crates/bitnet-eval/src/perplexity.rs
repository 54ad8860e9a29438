//! Perplexity: the mean negative log-likelihood of a sequence under a model.

use std::time::{Duration, Instant};

use serde::Serialize;

use crate::EvalError;
use crate::model::LanguageModel;
use crate::source::TokenSource;
use crate::windows::{Mode, Windows};

/// How a sequence is scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PerplexityOptions {
    /// How it is cut.
    pub mode: Mode,
    /// Length of the windows in tokens; at most the model's context.
    pub context: usize,
    /// Distance of sliding windows.
    pub stride: usize,
    /// Stops after the window that reaches this many scored tokens. Only whole
    /// windows are scored, so the count may be a little larger.
    pub max_tokens: Option<u64>,
    /// Stops after so many windows, as training's `eval.windows` does.
    pub max_windows: Option<u64>,
    /// What the first token of each chunk is replaced by in [`Mode::LlamaCpp`].
    pub bos: Option<u32>,
}

/// How likely a sequence is under a model.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Perplexity {
    /// Tokens scored.
    pub tokens: u64,
    /// Windows the sequence was cut into.
    pub windows: u64,
    /// Mean negative log-likelihood, in nats per token.
    pub nats: f64,
    /// `e^nats`.
    pub perplexity: f64,
    /// Bits per byte of the text that the scored tokens stand for; none where
    /// they stand for no text. Special tokens cost bits and have no bytes.
    pub bits_per_byte: Option<f64>,
    /// Bytes of that text.
    pub bytes: u64,
    /// Tokens the model read, per second.
    pub tokens_per_second: f64,
    /// Time spent, in seconds.
    pub seconds: f64,
}

/// Scores `source` with `model`. `token_bytes` tells how many bytes of text a
/// token stands for; `progress` gets (tokens scored, tokens in all, nats so far)
/// after each window.
///
/// The mean is taken over all scored tokens in f64, in their order, so that it
/// does not depend on how windows are batched.
///
/// # Errors
/// A context that does not fit the model, a sequence too short, and what reading
/// the source or running the model returns.
pub fn perplexity(
    model: &mut dyn LanguageModel,
    source: &TokenSource,
    options: &PerplexityOptions,
    token_bytes: &dyn Fn(u32) -> usize,
    progress: &mut dyn FnMut(u64, u64, f64),
) -> Result<Perplexity, EvalError> {
    let limit = model.context();
    if options.context > limit {
        return Err(EvalError::LongContext { context: options.context, limit });
    }
    let windows = Windows::new(
        options.mode,
        source.len(),
        options.context,
        options.stride,
        source.is_text(),
    )?;
    let goal = options.max_tokens.unwrap_or(u64::MAX);
    let most = options.max_windows.unwrap_or(u64::MAX);
    let total = expected(&windows, goal, most);
    let (mut scored, mut count, mut read, mut bytes) = (0u64, 0u64, 0u64, 0u64);
    let mut sum = 0.0f64;
    let mut seconds = Duration::ZERO;
    let mut tokens = Vec::new();
    for window in windows {
        if scored >= goal || count >= most {
            break;
        }
        source.read(window.start, window.len, &mut tokens)?;
        let scored_tokens = &tokens[window.first..];
        bytes += scored_tokens.iter().map(|&t| token_bytes(t) as u64).sum::<u64>();
        if let (Mode::LlamaCpp, Some(bos)) = (options.mode, options.bos) {
            tokens[0] = bos;
        }
        let started = Instant::now();
        let log_probs = model.score(&tokens, window.first)?;
        seconds += started.elapsed();
        for (i, log_prob) in log_probs.into_iter().enumerate() {
            if !log_prob.is_finite() {
                let position = window.start + (window.first + i) as u64;
                return Err(EvalError::NotFinite { position, value: log_prob });
            }
            sum -= log_prob;
        }
        scored += window.scored() as u64;
        read += window.len as u64 - 1;
        count += 1;
        progress(scored, total, sum / scored as f64);
    }
    let nats = sum / scored as f64;
    let seconds = seconds.as_secs_f64();
    Ok(Perplexity {
        tokens: scored,
        windows: count,
        nats,
        perplexity: nats.exp(),
        bits_per_byte: (bytes > 0).then(|| sum / std::f64::consts::LN_2 / bytes as f64),
        bytes,
        tokens_per_second: read as f64 / seconds.max(1e-9),
        seconds,
    })
}

/// How many tokens will be scored.
fn expected(windows: &Windows, goal: u64, most: u64) -> u64 {
    let mut scored = 0;
    if goal == u64::MAX && most == u64::MAX {
        return windows.total_scored();
    }
    for (window, _) in windows.clone().zip(0..most) {
        if scored >= goal {
            break;
        }
        scored += window.scored() as u64;
    }
    scored
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `ln p` of a token depends on it and on how many tokens stand before it,
    /// so that a window cut in the wrong place gives another sum.
    struct Fake {
        context: usize,
        seen: Vec<Vec<u32>>,
    }

    impl LanguageModel for Fake {
        fn context(&self) -> usize {
            self.context
        }

        fn vocab_size(&self) -> usize {
            1000
        }

        fn score(&mut self, tokens: &[u32], first: usize) -> Result<Vec<f64>, EvalError> {
            assert!(tokens.len() - 1 <= self.context, "{} inputs", tokens.len() - 1);
            self.seen.push(tokens.to_vec());
            Ok((first..tokens.len()).map(|i| -f64::from(tokens[i]) - 0.001 * i as f64).collect())
        }
    }

    fn run(
        mode: Mode,
        tokens: &[u32],
        max_tokens: Option<u64>,
        text: bool,
    ) -> (Perplexity, Vec<Vec<u32>>) {
        let mut model = Fake { context: 4, seen: Vec::new() };
        let source = TokenSource::Tokens { tokens: tokens.to_vec(), text };
        let options = PerplexityOptions {
            mode,
            context: 4,
            stride: 2,
            max_tokens,
            max_windows: None,
            bos: Some(999),
        };
        let result =
            perplexity(&mut model, &source, &options, &|t| t as usize % 2 + 1, &mut |_, _, _| {})
                .unwrap();
        (result, model.seen)
    }

    #[test]
    fn windows_score_all_but_the_first_token() {
        let tokens: Vec<u32> = (0..11).collect();
        let (p, seen) = run(Mode::Windows, &tokens, None, false);
        assert_eq!(seen, [vec![0, 1, 2, 3, 4], vec![4, 5, 6, 7, 8]]);
        let expected = ((1..=8).sum::<u32>() as f64 + 2.0 * 0.001 * 10.0) / 8.0;
        assert!((p.nats - expected).abs() < 1e-12, "{p:?}");
        assert_eq!((p.tokens, p.windows, p.bytes), (8, 2, 12));
        assert!((p.perplexity - p.nats.exp()).abs() < 1e-12);
        let bits = p.nats * 8.0 / std::f64::consts::LN_2 / 12.0;
        assert!((p.bits_per_byte.unwrap() - bits).abs() < 1e-12);
        assert_eq!(run(Mode::Windows, &tokens, None, true).0.tokens, 10);
    }

    #[test]
    fn llama_cpp_replaces_the_first_token_and_scores_the_second_half() {
        let tokens: Vec<u32> = (0..11).collect();
        let (p, seen) = run(Mode::LlamaCpp, &tokens, None, false);
        assert_eq!(seen, [vec![999, 1, 2, 3], vec![999, 5, 6, 7]]);
        assert_eq!(p.tokens, 2);
        assert!((p.nats - (3.0 + 7.0 + 0.006) / 2.0).abs() < 1e-12, "{p:?}");
    }

    #[test]
    fn sliding_scores_each_token_once() {
        let tokens: Vec<u32> = (0..7).collect();
        let (p, seen) = run(Mode::Sliding, &tokens, None, false);
        assert_eq!(seen, [vec![0, 1, 2, 3], vec![2, 3, 4, 5], vec![4, 5, 6]]);
        let places = 0.001 * f64::from(1 + 2 + 3 + 2 + 3 + 2);
        assert!((p.nats - (21.0 + places) / 6.0).abs() < 1e-12, "{p:?}");
    }

    #[test]
    fn stops_at_whole_windows() {
        let tokens: Vec<u32> = (0..41).collect();
        for (max, scored) in [(1, 4), (4, 4), (5, 8), (40, 40), (100, 40)] {
            assert_eq!(run(Mode::Windows, &tokens, Some(max), false).0.tokens, scored);
        }
    }

    #[test]
    fn stops_after_so_many_windows_and_announces_how_many() {
        let source = TokenSource::Tokens { tokens: (0..41).collect(), text: false };
        for (max_tokens, max_windows, scored) in
            [(None, Some(3), 12), (Some(5), Some(3), 8), (None, Some(99), 40), (Some(5), None, 8)]
        {
            let mut model = Fake { context: 4, seen: Vec::new() };
            let options = PerplexityOptions {
                mode: Mode::Windows,
                context: 4,
                stride: 2,
                max_tokens,
                max_windows,
                bos: None,
            };
            let mut announced = Vec::new();
            let result = perplexity(&mut model, &source, &options, &|_| 1, &mut |done, of, _| {
                announced.push((done, of));
            })
            .unwrap();
            assert_eq!(result.tokens, scored);
            assert_eq!(announced.last(), Some(&(scored, scored)));
        }
    }

    #[test]
    fn refuses_a_context_longer_than_the_models() {
        let mut model = Fake { context: 4, seen: Vec::new() };
        let source = TokenSource::Tokens { tokens: vec![0; 100], text: true };
        let options = PerplexityOptions {
            mode: Mode::Windows,
            context: 5,
            stride: 1,
            max_tokens: None,
            max_windows: None,
            bos: None,
        };
        let error =
            perplexity(&mut model, &source, &options, &|_| 1, &mut |_, _, _| {}).unwrap_err();
        assert_eq!(error.exit().code(), 2);
        assert_eq!(error.to_string(), "context 5 is longer than the model's context of 4 tokens");
    }

    #[test]
    fn a_broken_model_is_an_error() {
        struct Broken;
        impl LanguageModel for Broken {
            fn context(&self) -> usize {
                8
            }
            fn vocab_size(&self) -> usize {
                8
            }
            fn score(&mut self, tokens: &[u32], first: usize) -> Result<Vec<f64>, EvalError> {
                Ok(vec![f64::NAN; tokens.len() - first])
            }
        }
        let source = TokenSource::Tokens { tokens: vec![0; 20], text: true };
        let options = PerplexityOptions {
            mode: Mode::Windows,
            context: 8,
            stride: 1,
            max_tokens: None,
            max_windows: None,
            bos: None,
        };
        let error =
            perplexity(&mut Broken, &source, &options, &|_| 1, &mut |_, _, _| {}).unwrap_err();
        assert!(error.to_string().contains("token 1 "), "{error}");
    }
}

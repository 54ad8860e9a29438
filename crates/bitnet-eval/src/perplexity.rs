//! Perplexity: the mean negative log-likelihood of a sequence under a model.

use std::time::{Duration, Instant};

use serde::Serialize;

use crate::EvalError;
use crate::model::LanguageModel;
use crate::ratio::{mean_error, ratio};
use crate::source::{Piece, TokenSource};
use crate::windows::Mode;
use crate::words;

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
    /// What the first token of each chunk is replaced by in [`Mode::LlamaCpp`], and
    /// what stands before each document of token shards in [`Mode::Rolling`].
    pub bos: Option<u32>,
}

/// What tokens mean as text.
pub trait TokenText {
    /// The bytes of text that a token stands for; none where it is a mark for the
    /// model, which also ends a word.
    fn bytes(&self, token: u32) -> &[u8];
}

impl TokenText for bitnet_engine::Tokenizer {
    fn bytes(&self, token: u32) -> &[u8] {
        if self.is_special(token) { &[] } else { self.token_bytes(token) }
    }
}

/// How likely a sequence is under a model. A standard error takes the windows (in
/// [`Mode::Rolling`] the documents) as independent; there is none for a single one.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Perplexity {
    /// Tokens scored.
    pub tokens: u64,
    /// Windows the sequence was cut into.
    pub windows: u64,
    /// Documents, in [`Mode::Rolling`].
    pub documents: Option<u64>,
    /// Mean negative log-likelihood, in nats per token.
    pub nats: f64,
    /// Its standard error.
    pub nats_stderr: Option<f64>,
    /// The same with every token taken as independent, which is too small: tokens
    /// of a text are not. llama.cpp prints this, times the perplexity.
    pub nats_stderr_tokens: Option<f64>,
    /// `e^nats`.
    pub perplexity: f64,
    /// Its standard error, `perplexity · nats_stderr`.
    pub perplexity_stderr: Option<f64>,
    /// `e^(nats in all / words)`; none where no word is scored.
    pub word_perplexity: Option<f64>,
    /// Its standard error.
    pub word_perplexity_stderr: Option<f64>,
    /// Words: those that begin in the scored tokens; in [`Mode::Rolling`] of a text
    /// [`words::count_words`] of the documents.
    pub words: u64,
    /// Bits per byte of the text that the scored tokens stand for; none where
    /// they stand for no text. Special tokens cost bits and have no bytes.
    pub bits_per_byte: Option<f64>,
    /// Its standard error.
    pub bits_per_byte_stderr: Option<f64>,
    /// Bytes of that text.
    pub bytes: u64,
    /// Tokens the model read, per second.
    pub tokens_per_second: f64,
    /// Time spent, in seconds.
    pub seconds: f64,
}

/// Scores `source` with `model`. `text` tells what tokens stand for; `progress` gets
/// (tokens scored, tokens in all, nats so far) after each window.
///
/// The mean is taken over all scored tokens in f64, in their order, so that it
/// does not depend on how windows are batched.
///
/// # Errors
/// A context that does not fit the model, a mode that does not fit the source, a
/// sequence too short, and what reading the source or running the model returns.
pub fn perplexity(
    model: &mut dyn LanguageModel,
    source: &TokenSource,
    options: &PerplexityOptions,
    text: &dyn TokenText,
    progress: &mut dyn FnMut(u64, u64, f64),
) -> Result<Perplexity, EvalError> {
    let limit = model.context();
    if options.context > limit {
        return Err(EvalError::LongContext { context: options.context, limit });
    }
    let goal = options.max_tokens.unwrap_or(u64::MAX);
    let most = options.max_windows.unwrap_or(u64::MAX);
    let mut pieces = source.pieces(options)?;
    let total = pieces.expected(goal, most);
    let mut sums = Sums::default();
    while let Some(piece) = pieces.next(source)? {
        // A document that was begun is scored to its end.
        if !piece.goes_on && (sums.tokens >= goal || sums.windows >= most) {
            break;
        }
        let started = Instant::now();
        let scores = model.score(&piece.tokens, piece.first)?;
        sums.time += started.elapsed();
        sums.add(&piece, scores.iter().map(|s| s.log_prob), text)?;
        progress(sums.tokens, total, sums.nats / sums.tokens.max(1) as f64);
    }
    if sums.tokens == 0 {
        return Err(EvalError::NothingScored { mode: options.mode.name() });
    }
    let documents = (options.mode == Mode::Rolling).then_some(sums.clusters.len() as u64);
    Ok(sums.result(documents))
}

/// What a window or document adds.
#[derive(Debug, Default, Clone, Copy)]
struct Cluster {
    nats: f64,
    tokens: u64,
    bytes: u64,
    words: u64,
}

#[derive(Debug, Default)]
struct Sums {
    clusters: Vec<Cluster>,
    windows: u64,
    tokens: u64,
    /// Tokens the model was asked about, those that do not count included.
    read: u64,
    nats: f64,
    squares: f64,
    time: Duration,
}

impl Sums {
    fn add(
        &mut self,
        piece: &Piece,
        log_probs: impl Iterator<Item = f64>,
        text: &dyn TokenText,
    ) -> Result<(), EvalError> {
        self.windows += 1;
        self.read += piece.tokens.len() as u64 - 1;
        if piece.first >= piece.tokens.len() {
            return Ok(());
        }
        if !piece.goes_on {
            self.clusters.push(Cluster::default());
        }
        let Some(cluster) = self.clusters.last_mut() else { return Ok(()) };
        for (i, log_prob) in log_probs.enumerate() {
            let at = piece.first + i;
            if piece.counted.as_ref().is_some_and(|counted| !counted[at]) {
                continue;
            }
            if !log_prob.is_finite() {
                let position = piece.start + at as u64;
                return Err(EvalError::NotFinite { position, value: log_prob });
            }
            self.nats -= log_prob;
            self.squares += log_prob * log_prob;
            self.tokens += 1;
            cluster.nats -= log_prob;
            cluster.tokens += 1;
        }
        let (words, bytes) = match piece.size {
            // A document's size is counted once.
            Some(_) if piece.goes_on => (0, 0),
            Some(size) => size,
            None => text_size(piece, text),
        };
        cluster.words += words;
        cluster.bytes += bytes;
        Ok(())
    }

    fn result(&self, documents: Option<u64>) -> Perplexity {
        let per = |b: &dyn Fn(&Cluster) -> u64| {
            let pieces: Vec<_> = self.clusters.iter().map(|c| (c.nats, b(c) as f64)).collect();
            ratio(&pieces)
        };
        let (_, nats_stderr) = per(&|c| c.tokens);
        let (nats_per_word, word_stderr) = per(&|c| c.words);
        let (nats_per_byte, byte_stderr) = per(&|c| c.bytes);
        let nats = self.nats / self.tokens as f64;
        let word_perplexity = nats_per_word.map(f64::exp);
        let bits = |nats: f64| nats / std::f64::consts::LN_2;
        let seconds = self.time.as_secs_f64();
        Perplexity {
            tokens: self.tokens,
            windows: self.windows,
            documents,
            nats,
            nats_stderr,
            nats_stderr_tokens: mean_error(self.tokens, self.nats, self.squares),
            perplexity: nats.exp(),
            perplexity_stderr: nats_stderr.map(|e| e * nats.exp()),
            word_perplexity,
            word_perplexity_stderr: word_perplexity.zip(word_stderr).map(|(p, e)| p * e),
            words: self.clusters.iter().map(|c| c.words).sum(),
            bits_per_byte: nats_per_byte.map(bits),
            bits_per_byte_stderr: byte_stderr.map(bits),
            bytes: self.clusters.iter().map(|c| c.bytes).sum(),
            tokens_per_second: self.read as f64 / seconds.max(1e-9),
            seconds,
        }
    }
}

/// Words that begin in the tokens of a piece that count, and their bytes.
fn text_size(piece: &Piece, text: &dyn TokenText) -> (u64, u64) {
    let counts = |at: usize| piece.counted.as_ref().is_none_or(|counted| counted[at]);
    let (mut words, mut bytes) = (0, 0);
    let mut run = Vec::new();
    let mut at = piece.first;
    while at < piece.tokens.len() {
        if !counts(at) {
            at += 1;
            continue;
        }
        // A run of tokens that count is a text behind the token before it.
        let mut space = ends_in_space(text.bytes(piece.tokens[at - 1]));
        while at < piece.tokens.len() && counts(at) {
            let own = text.bytes(piece.tokens[at]);
            if own.is_empty() {
                words += begun(&run, space);
                run.clear();
                space = true;
            }
            run.extend_from_slice(own);
            bytes += own.len() as u64;
            at += 1;
        }
        words += begun(&run, space);
        run.clear();
    }
    (words, bytes)
}

/// Words that begin in `bytes`.
fn begun(bytes: &[u8], after_space: bool) -> u64 {
    words::count_begun(&String::from_utf8_lossy(bytes), after_space)
}

/// Whether a word can begin behind these bytes; a mark for the model has none.
fn ends_in_space(bytes: &[u8]) -> bool {
    String::from_utf8_lossy(bytes).chars().next_back().is_none_or(words::is_space)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::TokenScore;
    use crate::source::TextDocument;

    /// An even token is `x`, an odd one ` x`; 999 is a mark.
    struct Letters;

    impl TokenText for Letters {
        fn bytes(&self, token: u32) -> &[u8] {
            match token {
                999 => &[],
                t if t % 2 == 0 => b"x",
                _ => b" x",
            }
        }
    }

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

        fn score(&mut self, tokens: &[u32], first: usize) -> Result<Vec<TokenScore>, EvalError> {
            assert!(tokens.len() - 1 <= self.context, "{} inputs", tokens.len() - 1);
            self.seen.push(tokens.to_vec());
            let score = |i: usize| TokenScore {
                log_prob: -f64::from(tokens[i]) - 0.001 * i as f64,
                greedy: false,
            };
            Ok((first..tokens.len()).map(score).collect())
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
            perplexity(&mut model, &source, &options, &Letters, &mut |_, _, _| {}).unwrap();
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
    fn words_bytes_and_errors_are_those_of_the_formulas() {
        // Windows [1 2 3 4] and [5 6 7 8] after 0 and 4: words begin at the odd ones.
        let tokens: Vec<u32> = (0..9).collect();
        let (p, _) = run(Mode::Windows, &tokens, None, false);
        assert_eq!((p.words, p.bytes, p.documents), (4, 12, None));
        let (a, b) = (10.010f64, 26.010f64);
        assert!((p.word_perplexity.unwrap() / ((a + b) / 4.0).exp() - 1.0).abs() < 1e-12);
        // Two windows of 4 tokens: R = (a + b) / 8, each a piece of residual ±(a - b) / 2.
        let residual = (a - b) / 2.0;
        let error = (2.0 * (2.0 * residual * residual)).sqrt() / 8.0;
        assert!((p.nats_stderr.unwrap() - error).abs() < 1e-12, "{p:?}");
        assert!((p.perplexity_stderr.unwrap() / (p.perplexity * error) - 1.0).abs() < 1e-12);
        // The windows have equal bytes and words too.
        let bits = 8.0 / 12.0 / std::f64::consts::LN_2;
        assert!((p.bits_per_byte_stderr.unwrap() - error * bits).abs() < 1e-12);
        let word = 2.0 * error * p.word_perplexity.unwrap();
        assert!((p.word_perplexity_stderr.unwrap() / word - 1.0).abs() < 1e-12);
        let x: Vec<f64> = (1..=8).map(|i| i as f64 + 0.001 * ((i - 1) % 4 + 1) as f64).collect();
        let mean = x.iter().sum::<f64>() / 8.0;
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 8.0 / 7.0;
        assert!((p.nats_stderr_tokens.unwrap() - variance.sqrt()).abs() < 1e-9);
        // A single window has no error.
        let (one, _) = run(Mode::Windows, &tokens[..5], None, false);
        assert_eq!((one.nats_stderr, one.perplexity_stderr), (None, None));
        // A word begins behind a mark, whatever it begins with.
        let (marked, _) = run(Mode::Windows, &[2, 2, 999, 2, 2], None, false);
        assert_eq!((marked.words, marked.bytes), (1, 3));
    }

    #[test]
    fn blocks_score_what_lies_inside_them() {
        let tokens: Vec<u32> = (0..11).collect();
        let (p, seen) = run(Mode::Blocks, &tokens, None, true);
        assert_eq!(seen, [vec![0, 1, 2, 3], vec![4, 5, 6, 7]]);
        assert_eq!((p.tokens, p.windows), (6, 2));
        assert!((p.nats - (1 + 2 + 3 + 5 + 6 + 7) as f64 / 6.0 - 0.002).abs() < 1e-12);
    }

    #[test]
    fn rolling_scores_whole_documents_by_their_own_size() {
        let documents =
            [(&[999, 1, 2, 3, 4, 5, 6][..], "a b c "), (&[999, 7], "d"), (&[999, 8], "e")];
        let documents = documents.map(|(t, text)| TextDocument::new(t.to_vec(), text));
        let source = TokenSource::Documents(documents.to_vec());
        let options = |max_tokens| PerplexityOptions {
            mode: Mode::Rolling,
            context: 4,
            stride: 1,
            max_tokens,
            max_windows: None,
            bos: None,
        };
        let run = |max_tokens| {
            let mut model = Fake { context: 4, seen: Vec::new() };
            let p =
                perplexity(&mut model, &source, &options(max_tokens), &Letters, &mut |_, _, _| {});
            (p.unwrap(), model.seen)
        };
        let (p, seen) = run(None);
        assert_eq!(seen[1], [2, 3, 4, 5, 6], "filled up to the context");
        assert_eq!((p.tokens, p.documents, p.windows), (8, Some(3), 4));
        assert_eq!((p.words, p.bytes), (4 + 1 + 1, 8));
        let nats = 36.0 + 0.001 * f64::from(1 + 2 + 3 + 4 + 3 + 4 + 1 + 1);
        assert!((p.word_perplexity.unwrap() / (nats / 6.0).exp() - 1.0).abs() < 1e-12);
        // A document that was begun is finished.
        let (p, _) = run(Some(1));
        assert_eq!((p.tokens, p.documents, p.words), (6, Some(1), 4));
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
            let result = perplexity(&mut model, &source, &options, &Letters, &mut |done, of, _| {
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
            perplexity(&mut model, &source, &options, &Letters, &mut |_, _, _| {}).unwrap_err();
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
            fn score(
                &mut self,
                tokens: &[u32],
                first: usize,
            ) -> Result<Vec<TokenScore>, EvalError> {
                Ok(vec![TokenScore { log_prob: f64::NAN, greedy: false }; tokens.len() - first])
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
            perplexity(&mut Broken, &source, &options, &Letters, &mut |_, _, _| {}).unwrap_err();
        assert!(error.to_string().contains("token 1 "), "{error}");
    }
}

//! Which tokens are scored, and from which context: pure arithmetic on
//! positions, the same for a text and for token shards of any size.

use serde::Serialize;

use crate::EvalError;

/// How a long sequence is cut into pieces that fit the context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Non-overlapping windows of `context` inputs, each predicting the token
    /// after it; every prediction is scored. Training's evaluation does this.
    Windows,
    /// llama.cpp's and bitnet.cpp's `perplexity`: non-overlapping chunks of
    /// `context` tokens, the first replaced by BOS where the tokenizer has one,
    /// and only the second half scored (`context - context / 2 - 1` tokens).
    LlamaCpp,
    /// Overlapping windows of `context` tokens, `stride` apart (the Hugging Face
    /// guide's evaluation): each token but the first is scored once, with at
    /// least `context - stride` tokens before it after the first window.
    Sliding,
    /// The BitNet papers' blocks: non-overlapping blocks of `context` tokens (2048
    /// there), every prediction inside a block scored (`context - 1` of them), no
    /// token added, what is left behind the last whole block left out.
    Blocks,
    /// lm-evaluation-harness' rolling log-likelihood of a document: a token put in
    /// front of it, every token of it scored once, `context` inputs at a time; the
    /// last window is filled up with tokens scored before. The sequence is that
    /// token and one document.
    Rolling,
}

impl Mode {
    /// The name in options and reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Windows => "windows",
            Self::LlamaCpp => "llama-cpp",
            Self::Sliding => "sliding",
            Self::Blocks => "blocks",
            Self::Rolling => "rolling",
        }
    }
}

/// A piece of the sequence: the model reads its tokens but the last, and those
/// from `first` on are scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Position in the sequence of the first token.
    pub start: u64,
    /// How many tokens there are, the last target included.
    pub len: usize,
    /// Index in the window of the first token that is scored; at least 1.
    pub first: usize,
}

impl Window {
    /// How many tokens are scored.
    #[must_use]
    pub fn scored(self) -> usize {
        self.len - self.first
    }
}

/// The windows of a sequence, in order.
#[derive(Debug, Clone)]
pub struct Windows {
    mode: Mode,
    tokens: u64,
    context: usize,
    stride: usize,
    keep_tail: bool,
    next: u64,
    scored_to: u64,
}

impl Windows {
    /// Windows over `tokens` tokens. `stride` is used by [`Mode::Sliding`] alone.
    /// `keep_tail`: whether [`Mode::Windows`] scores what is left behind the last
    /// whole window too (a text's end), or not (training's evaluation).
    ///
    /// # Errors
    /// A context or stride that the mode cannot use; a sequence too short for a
    /// single window.
    pub fn new(
        mode: Mode,
        tokens: u64,
        context: usize,
        stride: usize,
        keep_tail: bool,
    ) -> Result<Self, EvalError> {
        let smallest = match mode {
            Mode::Windows | Mode::Rolling => 1,
            Mode::Blocks => 2,
            Mode::LlamaCpp | Mode::Sliding => 4,
        };
        if context < smallest {
            return Err(EvalError::Context { context, mode: mode.name(), smallest });
        }
        if mode == Mode::Sliding && (stride == 0 || stride >= context) {
            return Err(EvalError::Stride { stride, context });
        }
        let needed = match mode {
            Mode::Windows if !keep_tail => context as u64 + 1,
            Mode::LlamaCpp => 2 * context as u64,
            Mode::Blocks => context as u64,
            Mode::Windows | Mode::Sliding | Mode::Rolling => 2,
        };
        if tokens < needed {
            return Err(EvalError::TooShort { tokens, needed, mode: mode.name(), context });
        }
        Ok(Self { mode, tokens, context, stride, keep_tail, next: 0, scored_to: 1 })
    }

    /// How many tokens all windows together score.
    #[must_use]
    pub fn total_scored(&self) -> u64 {
        let (tokens, context) = (self.tokens, self.context as u64);
        match self.mode {
            Mode::Windows if !self.keep_tail => (tokens - 1) / context * context,
            Mode::Windows | Mode::Sliding | Mode::Rolling => tokens - 1,
            Mode::Blocks => tokens / context * (context - 1),
            Mode::LlamaCpp => tokens / context * (context - context / 2 - 1),
        }
    }
}

impl Iterator for Windows {
    type Item = Window;

    fn next(&mut self) -> Option<Window> {
        let left = self.tokens.saturating_sub(self.next);
        let start = self.next;
        match self.mode {
            Mode::Windows => {
                let whole = self.context as u64 + 1;
                if left < 2 || (left < whole && !self.keep_tail) {
                    return None;
                }
                self.next += self.context as u64;
                Some(Window { start, len: left.min(whole) as usize, first: 1 })
            }
            Mode::LlamaCpp => {
                if left < self.context as u64 {
                    return None;
                }
                self.next += self.context as u64;
                Some(Window { start, len: self.context, first: self.context / 2 + 1 })
            }
            Mode::Blocks => {
                if left < self.context as u64 {
                    return None;
                }
                self.next += self.context as u64;
                Some(Window { start, len: self.context, first: 1 })
            }
            Mode::Rolling => {
                let from = self.scored_to;
                if from >= self.tokens {
                    return None;
                }
                let to = self.tokens.min(from + self.context as u64);
                let start = to.saturating_sub(self.context as u64 + 1);
                self.scored_to = to;
                Some(Window { start, len: (to - start) as usize, first: (from - start) as usize })
            }
            Mode::Sliding => {
                if self.scored_to >= self.tokens {
                    return None;
                }
                let len = left.min(self.context as u64);
                let first = (self.scored_to - start) as usize;
                self.scored_to = start + len;
                self.next += self.stride as u64;
                Some(Window { start, len: len as usize, first })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cut(mode: Mode, tokens: u64, context: usize, stride: usize, tail: bool) -> Vec<Window> {
        Windows::new(mode, tokens, context, stride, tail).unwrap().collect()
    }

    fn w(start: u64, len: usize, first: usize) -> Window {
        Window { start, len, first }
    }

    #[test]
    fn windows_share_one_token_and_drop_or_keep_the_tail() {
        let whole = [w(0, 5, 1), w(4, 5, 1)];
        assert_eq!(cut(Mode::Windows, 9, 4, 0, false), whole);
        assert_eq!(cut(Mode::Windows, 12, 4, 0, false), whole);
        assert_eq!(cut(Mode::Windows, 13, 4, 0, false).len(), 3);
        assert_eq!(cut(Mode::Windows, 9, 4, 0, true), whole);
        assert_eq!(cut(Mode::Windows, 10, 4, 0, true), [w(0, 5, 1), w(4, 5, 1), w(8, 2, 1)]);
        assert_eq!(cut(Mode::Windows, 2, 4, 0, true), [w(0, 2, 1)]);
    }

    #[test]
    fn llama_cpp_scores_the_second_half_of_whole_chunks() {
        // n_ctx 512: positions 256..511 predict 257..512, that is 255 tokens.
        let chunks = cut(Mode::LlamaCpp, 1100, 512, 0, false);
        assert_eq!(chunks, [w(0, 512, 257), w(512, 512, 257)]);
        assert!(chunks.iter().all(|c| c.scored() == 512 - 512 / 2 - 1));
        assert_eq!(cut(Mode::LlamaCpp, 10, 5, 0, false)[0].scored(), 5 - 5 / 2 - 1);
    }

    #[test]
    fn sliding_windows_score_the_last_stride_of_each() {
        let cuts = cut(Mode::Sliding, 11, 4, 2, false);
        assert_eq!(cuts[..3], [w(0, 4, 1), w(2, 4, 2), w(4, 4, 2)]);
        assert_eq!(*cuts.last().unwrap(), w(8, 3, 2));
    }

    #[test]
    fn blocks_share_no_token() {
        assert_eq!(cut(Mode::Blocks, 11, 4, 0, false), [w(0, 4, 1), w(4, 4, 1)]);
        assert_eq!(cut(Mode::Blocks, 4, 4, 0, true), [w(0, 4, 1)]);
        assert_eq!(cut(Mode::Blocks, 4096, 2048, 0, false)[1].scored(), 2047);
    }

    /// `get_rolling_token_windows` of lm-evaluation-harness with a context of one
    /// token, as (inputs and target, scored).
    fn harness(tokens: usize, most: usize) -> Vec<Window> {
        let first = most.min(tokens);
        let mut windows = vec![w(0, first + 1, 1)];
        let mut predicted = first;
        while predicted < tokens {
            let scored = (tokens - predicted).min(most);
            let end = predicted + scored;
            // Position 0 is the prefix token, so its token i is ours i + 1.
            windows.push(w((end - most) as u64, most + 1, most + 1 - scored));
            predicted = end;
        }
        windows
    }

    #[test]
    fn rolling_windows_are_those_of_the_harness() {
        for tokens in 1..40 {
            for context in 1..12 {
                let found = cut(Mode::Rolling, tokens as u64 + 1, context, 0, false);
                assert_eq!(found, harness(tokens, context), "{tokens} tokens, {context}");
            }
        }
        assert_eq!(cut(Mode::Rolling, 11, 4, 0, false)[2], w(6, 5, 3));
    }

    #[test]
    fn refuses_what_cannot_be_cut() {
        let cases = [
            (Mode::Windows, 100, 0, 1, "context 0"),
            (Mode::LlamaCpp, 100, 3, 1, "context 3"),
            (Mode::Blocks, 100, 1, 1, "context 1"),
            (Mode::Blocks, 7, 8, 1, "at least 8"),
            (Mode::Rolling, 1, 8, 1, "at least 2"),
            (Mode::Sliding, 100, 8, 8, "stride 8"),
            (Mode::Sliding, 100, 8, 0, "stride 0"),
            (Mode::Windows, 8, 8, 1, "8 tokens"),
            (Mode::LlamaCpp, 15, 8, 1, "at least 16"),
            (Mode::Sliding, 1, 8, 1, "1 tokens"),
        ];
        for (mode, tokens, context, stride, part) in cases {
            let error = Windows::new(mode, tokens, context, stride, false).unwrap_err();
            assert!(error.to_string().contains(part), "{error}");
        }
    }

    proptest! {
        #[test]
        fn every_token_is_scored_at_most_once_and_counted(
            tokens in 2u64..400, context in 4usize..40, stride in 1usize..39, tail: bool,
            mode in prop_oneof![
                Just(Mode::Windows), Just(Mode::LlamaCpp), Just(Mode::Sliding),
                Just(Mode::Blocks), Just(Mode::Rolling)
            ],
        ) {
            let Ok(windows) = Windows::new(mode, tokens, context, stride, tail) else {
                return Ok(());
            };
            let total = windows.total_scored();
            let mut seen = vec![0u32; tokens as usize];
            for w in windows {
                prop_assert!(w.first >= 1 && w.first < w.len && w.len <= context + 1);
                let from = w.start as usize;
                seen[from + w.first..from + w.len].iter_mut().for_each(|n| *n += 1);
            }
            prop_assert!(seen.iter().all(|n| *n <= 1));
            prop_assert_eq!(seen.iter().map(|n| u64::from(*n)).sum::<u64>(), total);
            if matches!(mode, Mode::Sliding | Mode::Rolling) || (mode == Mode::Windows && tail) {
                prop_assert_eq!(total, tokens - 1);
            }
        }
    }
}

//! A session: a model, threads, and the cache of one sequence of tokens.

use bitnet_kernels::Kernels;

use crate::cache::{KvCache, KvType, Place};
use crate::error::EngineError;
use crate::forward::{self, Hook, TracePoint};
use crate::head::{HeadCounts, HeadMode, TokenLogit, Top};
use crate::model::Model;
use crate::parallel::{Workers, physical_cores};
use crate::runner::{Output, Runner};

/// Elements of the logits that [`Session::score`] holds at a time: 8 MiB.
pub(crate) const SCORE_ELEMENTS: usize = 2 << 20;

/// How a session runs.
#[derive(Debug, Clone)]
pub struct SessionOptions {
    /// Element type of the key and value cache.
    pub kv: KvType,
    /// Most tokens of the sequence; the model's `max_position_embeddings` when
    /// absent, and never more.
    pub context: Option<usize>,
    /// Threads; the physical cores when absent.
    pub threads: Option<usize>,
    /// Instruction set; `BITNET_ISA`, else the fastest, when absent.
    pub kernels: Option<Kernels>,
    /// Tokens that a prompt is run in at a time.
    pub chunk: usize,
    /// How [`Session::decode_top`] finds the best tokens.
    pub head: HeadMode,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self {
            kv: KvType::F32,
            context: None,
            threads: None,
            kernels: None,
            chunk: 256,
            head: HeadMode::Stored,
        }
    }
}

/// A sequence of tokens being run through a model.
///
/// The results of [`prefill`](Self::prefill), [`decode`](Self::decode) and
/// [`score`](Self::score) have the same bits for the same sequence, however it
/// is divided between them.
#[derive(Debug)]
pub struct Session {
    runner: Runner,
    cache: KvCache,
    /// The tokens whose keys and values are in the cache.
    tokens: Vec<u32>,
    /// Logits of the last token run, `[V]`.
    logits: Vec<f32>,
    /// Logits of several tokens, for scoring.
    scored: Vec<f32>,
    top: Top,
}

impl Session {
    /// A session with threads of its own.
    ///
    /// # Errors
    /// An option that cannot be used, or threads that cannot be started.
    pub fn new(model: &Model, options: &SessionOptions) -> Result<Self, EngineError> {
        let workers = Workers::new(options.threads.unwrap_or_else(physical_cores))?;
        Self::with_workers(model, options, workers)
    }

    /// A session on threads that others use too; `options.threads` is not read.
    ///
    /// # Errors
    /// An option that cannot be used.
    pub fn with_workers(
        model: &Model,
        options: &SessionOptions,
        workers: Workers,
    ) -> Result<Self, EngineError> {
        let runner = Runner::new(model, options, workers)?;
        Ok(Self {
            cache: runner.cache(options)?,
            tokens: Vec::with_capacity(runner.heads.context),
            logits: vec![0.0; model.config().vocab_size],
            scored: Vec::new(),
            top: Top::new(options.head),
            runner,
        })
    }

    /// Appends tokens; returns the logits `[V]` at the last of them.
    ///
    /// # Errors
    /// No token, a token outside the vocabulary, or more tokens than there is
    /// room for; the session is as it was before.
    pub fn prefill(&mut self, tokens: &[u32]) -> Result<&[f32], EngineError> {
        self.runner.check(self.position(), tokens)?;
        self.append(tokens, None);
        Ok(&self.logits)
    }

    /// Makes the sequence be `tokens`, running only what differs from the
    /// sequence there is, and at least the last token. Returns how many were
    /// run; [`Session::logits`] are those of the last.
    ///
    /// # Errors
    /// As [`Session::prefill`]; the common beginning stays.
    pub fn prompt(&mut self, tokens: &[u32]) -> Result<usize, EngineError> {
        let common = self.tokens.iter().zip(tokens).take_while(|(a, b)| a == b).count();
        self.truncate(common.min(tokens.len().saturating_sub(1)));
        let rest = &tokens[self.position()..];
        self.prefill(rest)?;
        Ok(rest.len())
    }

    /// Appends one token; returns its logits `[V]`.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn decode(&mut self, token: u32) -> Result<&[f32], EngineError> {
        self.prefill(&[token])
    }

    /// Appends one token; returns the `k` most probable tokens after it with
    /// their logits, the best first and of equals the smaller id first.
    ///
    /// They are the same, bit for bit, in every [`HeadMode`]. In a mode that scans
    /// a copy of the head no other logits are made, and [`Session::logits`] stay
    /// those of an earlier token.
    ///
    /// # Errors
    /// As [`Session::prefill`], or a logit that is NaN or infinite upwards, or
    /// none that is finite.
    pub fn decode_top(&mut self, token: u32, k: usize) -> Result<&[TokenLogit], EngineError> {
        self.runner.check(self.position(), &[token])?;
        let place = Place { cache: 0, position: self.tokens.len() };
        let cache = std::slice::from_mut(&mut self.cache);
        let places = std::iter::once(place);
        if self.top.mode() == HeadMode::Stored {
            let output = Output::Last(&mut self.logits);
            self.runner.pass(cache, places, &[token], output, None);
            self.top.of_logits(&self.logits, self.logits.len(), k);
        } else {
            let output = Output::Top(&mut self.top, k);
            self.runner.pass(cache, places, &[token], output, None);
        }
        self.tokens.push(token);
        self.top.result()
    }

    /// The `k` most probable tokens after a final hidden state `h` `[D]` (the
    /// input of the head), found as [`Session::decode_top`] finds them. The
    /// sequence does not change.
    ///
    /// # Errors
    /// A hidden state that is not D long; logits as [`Session::decode_top`].
    pub fn top_of_hidden(&mut self, h: &[f32], k: usize) -> Result<&[TokenLogit], EngineError> {
        let model = &self.runner.model.0;
        let config = &model.weights.config;
        if h.len() != config.hidden_size {
            let why = format!("the model's hidden size is {}", config.hidden_size);
            let value = format!("{} elements", h.len());
            return Err(EngineError::Option { option: "hidden state", value, why });
        }
        let (top, scored, kernels) = (&mut self.top, &mut self.scored, self.runner.kernels);
        let vocab = config.vocab_size;
        self.runner.workers.run(model.head().len(), |split| {
            if top.mode() == HeadMode::Stored {
                scored.resize(vocab.max(scored.len()), 0.0);
                forward::logits(kernels, split, model, h, &mut scored[..vocab]);
                top.of_logits(&scored[..vocab], vocab, k);
            } else {
                top.find(kernels, split, model, h, k);
            }
        });
        self.top.result()
    }

    /// What the searches of [`Session::decode_top`] read so far.
    #[must_use]
    pub fn head_counts(&self) -> HeadCounts {
        self.top.counts()
    }

    /// Appends tokens and calls `each` with the position in `tokens` and the
    /// logits `[V]` of every one, in order.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn score(
        &mut self,
        tokens: &[u32],
        mut each: impl FnMut(usize, &[f32]),
    ) -> Result<(), EngineError> {
        self.runner.check(self.position(), tokens)?;
        let config = self.runner.model.config();
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let block = (SCORE_ELEMENTS / vocab).clamp(1, self.runner.chunk);
        let (mut at, chunk) = (0, self.runner.chunk);
        for tokens in tokens.chunks(chunk) {
            self.pass(tokens, Want::Normed, None);
            for first in (0..tokens.len()).step_by(block) {
                let count = block.min(tokens.len() - first);
                self.scored.resize(block * vocab, 0.0);
                let h = &self.runner.buffers.h[first * hidden..][..count * hidden];
                let out = &mut self.scored[..count * vocab];
                let (model, kernels) = (&self.runner.model.0, self.runner.kernels);
                let bytes = model.head().len() * 2 * count;
                let head = |split| forward::logits(kernels, split, model, h, out);
                self.runner.workers.run(bytes, head);
                for (i, logits) in self.scored[..count * vocab].chunks_exact(vocab).enumerate() {
                    each(at + first + i, logits);
                }
                self.logits.copy_from_slice(&self.scored[(count - 1) * vocab..count * vocab]);
            }
            at += tokens.len();
        }
        Ok(())
    }

    /// [`Session::prefill`], showing values inside the pass to `hook`, chunk by
    /// chunk; the final norm is run for all tokens.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn trace(
        &mut self,
        tokens: &[u32],
        hook: &mut (dyn FnMut(TracePoint<'_>) + Send),
    ) -> Result<&[f32], EngineError> {
        self.runner.check(self.position(), tokens)?;
        self.append(tokens, Some(hook));
        Ok(&self.logits)
    }

    /// The logits `[V]` at the last token that was run; zeros before the first.
    #[must_use]
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// The tokens of the sequence so far.
    #[must_use]
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// How many tokens the sequence has.
    #[must_use]
    pub fn position(&self) -> usize {
        self.tokens.len()
    }

    /// How many it can have.
    #[must_use]
    pub fn context(&self) -> usize {
        self.runner.heads.context
    }

    /// Forgets all tokens but the first `len`; nothing where there are fewer.
    pub fn truncate(&mut self, len: usize) {
        self.tokens.truncate(len);
    }

    /// Forgets all tokens.
    pub fn reset(&mut self) {
        self.truncate(0);
    }

    /// The model.
    #[must_use]
    pub fn model(&self) -> &Model {
        &self.runner.model
    }

    /// The instruction set.
    #[must_use]
    pub fn kernels(&self) -> Kernels {
        self.runner.kernels
    }

    /// The threads.
    #[must_use]
    pub fn workers(&self) -> &Workers {
        &self.runner.workers
    }

    /// How [`Session::decode_top`] finds the best tokens.
    #[must_use]
    pub fn head(&self) -> HeadMode {
        self.top.mode()
    }

    /// Element type of the key and value cache.
    #[must_use]
    pub fn kv(&self) -> KvType {
        self.cache.kv_type()
    }

    /// Runs checked tokens in chunks, and the head for the last.
    fn append(&mut self, tokens: &[u32], mut hook: Option<Hook<'_>>) {
        let chunk = self.runner.chunk;
        let last = tokens.len().div_ceil(chunk) - 1;
        for (i, tokens) in tokens.chunks(chunk).enumerate() {
            let hook = hook.as_mut().map(|hook| &mut **hook as Hook<'_>);
            self.pass(tokens, if i == last { Want::Logits } else { Want::Nothing }, hook);
        }
    }

    /// Runs one chunk.
    fn pass(&mut self, tokens: &[u32], want: Want, hook: Option<Hook<'_>>) {
        let output = match want {
            Want::Nothing => Output::Nothing,
            Want::Normed => Output::Normed,
            Want::Logits => Output::Last(&mut self.logits),
        };
        let start = self.tokens.len();
        let places = (start..start + tokens.len()).map(|position| Place { cache: 0, position });
        self.runner.pass(std::slice::from_mut(&mut self.cache), places, tokens, output, hook);
        self.tokens.extend_from_slice(tokens);
    }
}

/// What a chunk leaves.
enum Want {
    Nothing,
    /// The head's input of all its tokens, in the buffers.
    Normed,
    /// The logits of its last token.
    Logits,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_can_move_between_threads() {
        fn is_send<T: Send>() {}
        is_send::<Session>();
        is_send::<Model>();
    }
}

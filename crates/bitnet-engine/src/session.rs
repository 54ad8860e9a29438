//! A session: a model, threads, and the cache of one sequence of tokens.

use bitnet_core::rope;
use bitnet_kernels::Kernels;

use crate::cache::{Heads, KvCache, KvType};
use crate::error::EngineError;
use crate::forward::{self, Buffers, Hook, Pass, TracePoint};
use crate::model::Model;
use crate::parallel::{Workers, physical_cores};

/// Elements of the logits that [`Session::score`] holds at a time: 8 MiB.
const SCORE_ELEMENTS: usize = 2 << 20;

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
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self { kv: KvType::F32, context: None, threads: None, kernels: None, chunk: 256 }
    }
}

/// A sequence of tokens being run through a model.
///
/// The results of [`prefill`](Self::prefill), [`decode`](Self::decode) and
/// [`score`](Self::score) have the same bits for the same sequence, however it
/// is divided between them.
#[derive(Debug)]
pub struct Session {
    model: Model,
    kernels: Kernels,
    workers: Workers,
    heads: Heads,
    chunk: usize,
    frequencies: Vec<f32>,
    cache: KvCache,
    buffers: Buffers,
    /// The tokens whose keys and values are in the cache.
    tokens: Vec<u32>,
    /// Logits of the last token run, `[V]`.
    logits: Vec<f32>,
    /// Logits of several tokens, for scoring.
    scored: Vec<f32>,
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
        let config = model.config();
        let most = config.max_position_embeddings;
        let context = options.context.unwrap_or(most);
        if context == 0 || context > most {
            let why = format!("must be in 1..={most}, the model's context");
            let value = context.to_string();
            return Err(EngineError::Option { option: "context", value, why });
        }
        if options.chunk == 0 {
            let (value, why) = ("0".to_owned(), "must be at least 1".to_owned());
            return Err(EngineError::Option { option: "chunk", value, why });
        }
        let kernels = match options.kernels {
            Some(kernels) => kernels,
            None => Kernels::from_env()?,
        };
        let heads = Heads::new(config, context);
        Ok(Self {
            kernels,
            workers,
            heads,
            chunk: options.chunk.min(context),
            frequencies: rope::frequencies(config.head_dim(), config.rope_theta),
            cache: KvCache::new(options.kv, config, heads)?,
            buffers: Buffers::default(),
            tokens: Vec::with_capacity(context),
            logits: vec![0.0; config.vocab_size],
            scored: Vec::new(),
            model: model.clone(),
        })
    }

    /// Appends tokens; returns the logits `[V]` at the last of them.
    ///
    /// # Errors
    /// No token, a token outside the vocabulary, or more tokens than there is
    /// room for; the session is as it was before.
    pub fn prefill(&mut self, tokens: &[u32]) -> Result<&[f32], EngineError> {
        self.check(tokens)?;
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
        self.check(tokens)?;
        let config = self.model.config();
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let block = (SCORE_ELEMENTS / vocab).clamp(1, self.chunk);
        let (mut at, chunk) = (0, self.chunk);
        for tokens in tokens.chunks(chunk) {
            self.pass(tokens, true, None);
            for first in (0..tokens.len()).step_by(block) {
                let count = block.min(tokens.len() - first);
                self.scored.resize(block * vocab, 0.0);
                let h = &self.buffers.h[first * hidden..][..count * hidden];
                let out = &mut self.scored[..count * vocab];
                let (model, kernels) = (&self.model.0, self.kernels);
                let bytes = model.head().len() * 2 * count;
                self.workers.run(bytes, |split| forward::logits(kernels, split, model, h, out));
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
        self.check(tokens)?;
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
        self.heads.context
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
        &self.model
    }

    /// The instruction set.
    #[must_use]
    pub fn kernels(&self) -> Kernels {
        self.kernels
    }

    /// The threads.
    #[must_use]
    pub fn workers(&self) -> &Workers {
        &self.workers
    }

    /// Element type of the key and value cache.
    #[must_use]
    pub fn kv(&self) -> KvType {
        self.cache.kv_type()
    }

    fn check(&self, tokens: &[u32]) -> Result<(), EngineError> {
        if tokens.is_empty() {
            return Err(EngineError::Empty);
        }
        let (position, context) = (self.position(), self.heads.context);
        if tokens.len() > context - position {
            return Err(EngineError::Context { tokens: tokens.len(), position, context });
        }
        let vocab_size = self.model.config().vocab_size;
        match tokens.iter().position(|&t| t as usize >= vocab_size) {
            Some(i) => {
                let (token, position) = (tokens[i], position + i);
                Err(EngineError::Token { token, position, vocab_size })
            }
            None => Ok(()),
        }
    }

    /// Runs checked tokens in chunks, and the head for the last.
    fn append(&mut self, tokens: &[u32], mut hook: Option<Hook<'_>>) {
        let chunk = self.chunk;
        let last = tokens.len().div_ceil(chunk) - 1;
        for (i, tokens) in tokens.chunks(chunk).enumerate() {
            let hook = hook.as_mut().map(|hook| &mut **hook as Hook<'_>);
            self.pass(tokens, i == last, hook);
        }
    }

    /// Runs one chunk. With `head`, the final norm of all tokens is left in the
    /// buffers and the logits of the last are made.
    fn pass(&mut self, tokens: &[u32], head: bool, hook: Option<Hook<'_>>) {
        let start = self.tokens.len();
        let (model, kernels, heads) = (&*self.model.0, self.kernels, self.heads);
        let scores = heads.scores_len() * self.workers.max_parts();
        let frequencies = &self.frequencies[..];
        let (cache, buffers, logits) = (&mut self.cache, &mut self.buffers, &mut self.logits);
        let bytes = pass_bytes(&self.model) * tokens.len();
        self.workers.run(bytes, |split| {
            let pass = Pass { model, kernels, split, heads, scores, frequencies, start, tokens };
            let traced = hook.is_some();
            pass.run(cache, buffers, head || traced, hook);
            if head {
                let hidden = model.weights.config.hidden_size;
                let h = &buffers.h[(tokens.len() - 1) * hidden..];
                forward::logits(kernels, split, model, h, logits);
            }
        });
        self.tokens.extend_from_slice(tokens);
    }
}

/// Bytes that a pass of one token reads, or as many as fit a number.
fn pass_bytes(model: &Model) -> usize {
    usize::try_from(model.bytes_per_token()).unwrap_or(usize::MAX)
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

//! Several sequences at once: one pass takes a token of each, so that weights
//! are read once for all of them.

mod score;

pub use score::Piece;

use crate::cache::{KvCache, Place};
use crate::error::EngineError;
use crate::head::{HeadCounts, HeadMode, TokenLogit, Top};
use crate::model::Model;
use crate::parallel::{Workers, physical_cores};
use crate::runner::{Output, Runner};
use crate::session::SessionOptions;

/// Independent sequences being run through one model.
///
/// Each has a cache and a position of its own. The logits of every sequence have
/// the same bits as those of a lone [`crate::Session`] with the same tokens,
/// whoever else is in the batch.
#[derive(Debug)]
pub struct BatchSession {
    runner: Runner,
    caches: Vec<KvCache>,
    /// The tokens in each cache.
    sequences: Vec<Vec<u32>>,
    /// The tokens of a step.
    step: Vec<u32>,
    /// Logits of the last step, `[steps, V]`.
    logits: Vec<f32>,
    /// The head's inputs that are scored, `[rows, D]`.
    hidden: Vec<f32>,
    top: Top,
}

impl BatchSession {
    /// Room for `sequences` sequences, with threads of their own. All have the
    /// context and the cache type of `options`.
    ///
    /// # Errors
    /// An option that cannot be used, no sequence, or threads that cannot be
    /// started.
    pub fn new(
        model: &Model,
        options: &SessionOptions,
        sequences: usize,
    ) -> Result<Self, EngineError> {
        let workers = Workers::new(options.threads.unwrap_or_else(physical_cores))?;
        Self::with_workers(model, options, sequences, workers)
    }

    /// The same on threads that others use too; `options.threads` is not read.
    ///
    /// # Errors
    /// As [`BatchSession::new`].
    pub fn with_workers(
        model: &Model,
        options: &SessionOptions,
        sequences: usize,
        workers: Workers,
    ) -> Result<Self, EngineError> {
        if sequences == 0 {
            let (value, why) = ("0".to_owned(), "must be at least 1".to_owned());
            return Err(EngineError::Option { option: "sequences", value, why });
        }
        let runner = Runner::new(model, options, workers)?;
        let caches = (0..sequences).map(|_| runner.cache(options)).collect::<Result<_, _>>()?;
        Ok(Self {
            runner,
            caches,
            sequences: vec![Vec::new(); sequences],
            step: Vec::new(),
            logits: Vec::new(),
            hidden: Vec::new(),
            top: Top::new(options.head),
        })
    }

    /// Appends tokens to one sequence; returns the logits `[V]` at the last.
    ///
    /// # Errors
    /// No such sequence, no token, a token outside the vocabulary, or more tokens
    /// than there is room for; the sequences are as they were before.
    pub fn prefill(&mut self, sequence: usize, tokens: &[u32]) -> Result<&[f32], EngineError> {
        let start = self.known(sequence)?.len();
        self.runner.check(start, tokens)?;
        self.logits.resize(self.runner.model.config().vocab_size, 0.0);
        let chunk = self.runner.chunk;
        let last = tokens.len().div_ceil(chunk) - 1;
        for (i, tokens) in tokens.chunks(chunk).enumerate() {
            let start = start + i * chunk;
            let places = (start..).map(|position| Place { cache: sequence, position });
            let output = if i == last { Output::Last(&mut self.logits) } else { Output::Nothing };
            let places = places.take(tokens.len());
            self.runner.pass(&mut self.caches, places, tokens, output, None);
        }
        self.sequences[sequence].extend_from_slice(tokens);
        Ok(&self.logits)
    }

    /// Appends one token to each of some sequences; returns their logits
    /// `[steps, V]`, in the order of `steps`.
    ///
    /// # Errors
    /// As [`BatchSession::prefill`], or a sequence that is named twice.
    pub fn decode(&mut self, steps: &[(usize, u32)]) -> Result<&[f32], EngineError> {
        self.check(steps)?;
        self.logits.resize(steps.len() * self.runner.model.config().vocab_size, 0.0);
        self.step(steps, None);
        Ok(&self.logits)
    }

    /// Appends one token to each of some sequences; returns the `k` most probable
    /// tokens after each, `[steps, k]` (or `[steps, V]` if k is larger), each
    /// sequence's as [`crate::Session::decode_top`] gives them alone.
    ///
    /// In a mode that scans a copy of the head, one scan serves all sequences.
    ///
    /// # Errors
    /// As [`BatchSession::decode`]; or, once the tokens have been appended, a
    /// sequence whose logits cannot be ranked.
    pub fn decode_top(
        &mut self,
        steps: &[(usize, u32)],
        k: usize,
    ) -> Result<&[TokenLogit], EngineError> {
        self.check(steps)?;
        if self.top.mode() == HeadMode::Stored {
            let vocab = self.runner.model.config().vocab_size;
            self.logits.resize(steps.len() * vocab, 0.0);
            self.step(steps, None);
            self.top.of_logits(&self.logits, vocab, k);
        } else {
            self.step(steps, Some(k));
        }
        self.top.result()
    }

    /// Whether a step can be made.
    fn check(&self, steps: &[(usize, u32)]) -> Result<(), EngineError> {
        if steps.is_empty() {
            return Err(EngineError::Empty);
        }
        for (i, &(sequence, token)) in steps.iter().enumerate() {
            let position = self.known(sequence)?.len();
            if steps[..i].iter().any(|s| s.0 == sequence) {
                return Err(EngineError::Repeated { sequence });
            }
            self.runner.check(position, &[token])?;
        }
        Ok(())
    }

    /// Makes a step that was checked, for all logits or the best `k`.
    fn step(&mut self, steps: &[(usize, u32)], k: Option<usize>) {
        self.step.clear();
        self.step.extend(steps.iter().map(|s| s.1));
        let sequences = &self.sequences;
        let places =
            steps.iter().map(|&(cache, _)| Place { cache, position: sequences[cache].len() });
        let output = match k {
            Some(k) => Output::Top(&mut self.top, k),
            None => Output::All(&mut self.logits),
        };
        self.runner.pass(&mut self.caches, places, &self.step, output, None);
        for &(sequence, token) in steps {
            self.sequences[sequence].push(token);
        }
    }

    /// How [`BatchSession::decode_top`] finds the best tokens.
    #[must_use]
    pub fn head(&self) -> HeadMode {
        self.top.mode()
    }

    /// What its searches read so far.
    #[must_use]
    pub fn head_counts(&self) -> HeadCounts {
        self.top.counts()
    }

    /// Forgets all tokens of a sequence but the first `len`; nothing where there
    /// are fewer.
    ///
    /// # Errors
    /// No such sequence.
    pub fn truncate(&mut self, sequence: usize, len: usize) -> Result<(), EngineError> {
        self.known(sequence)?;
        self.sequences[sequence].truncate(len);
        Ok(())
    }

    /// The tokens of a sequence so far.
    ///
    /// # Errors
    /// No such sequence.
    pub fn tokens(&self, sequence: usize) -> Result<&[u32], EngineError> {
        self.known(sequence).map(Vec::as_slice)
    }

    /// How many sequences there is room for.
    #[must_use]
    pub fn sequences(&self) -> usize {
        self.sequences.len()
    }

    /// How many tokens each can have.
    #[must_use]
    pub fn context(&self) -> usize {
        self.runner.heads.context
    }

    /// The model.
    #[must_use]
    pub fn model(&self) -> &Model {
        &self.runner.model
    }

    /// The threads.
    #[must_use]
    pub fn workers(&self) -> &Workers {
        &self.runner.workers
    }

    fn known(&self, sequence: usize) -> Result<&Vec<u32>, EngineError> {
        let sequences = self.sequences.len();
        self.sequences.get(sequence).ok_or(EngineError::Sequence { sequence, sequences })
    }
}

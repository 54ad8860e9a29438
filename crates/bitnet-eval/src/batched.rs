//! A packed model that scores many short sequences together: what they begin with in
//! common is computed once, and the rest goes through the model in one batch.

mod waves;

use bitnet_engine::{BatchSession, EngineError, Model, Piece, SessionOptions, Workers};

use crate::EvalError;
use crate::model::{LanguageModel, Sequence, TokenScore, token_score};
use waves::{Wave, waves};

/// Bytes that the keys and values of all sequences take at most, unless one alone takes
/// more.
const CACHE_BYTES: u64 = 1 << 30;

/// The shortest sequence that there is room for.
const SHORTEST: usize = 256;

/// A packed model on the CPU, that scores several sequences at a time.
///
/// The scores are those of [`crate::EngineModel`], bit for bit: a token's logits do not
/// depend on who else is in the batch.
#[derive(Debug)]
pub struct BatchedModel {
    model: Model,
    options: SessionOptions,
    workers: Workers,
    /// Sequences at a time, at most.
    most: usize,
    session: BatchSession,
}

impl BatchedModel {
    /// Scores up to `most` sequences at a time: fewer where the keys and values of that
    /// many would take more than a gibibyte.
    ///
    /// # Errors
    /// No sequence, an option that cannot be used.
    pub fn new(model: &Model, options: &SessionOptions, most: usize) -> Result<Self, EvalError> {
        let threads = options.threads.unwrap_or_else(bitnet_engine::physical_cores);
        let workers = Workers::new(threads)?;
        let session = session(model, options, &workers, most, SHORTEST)?;
        Ok(Self { model: model.clone(), options: options.clone(), workers, most, session })
    }

    /// How many threads it has.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.workers.threads()
    }

    /// Makes room for sequences of `tokens` tokens.
    fn grow(&mut self, tokens: usize) -> Result<(), EvalError> {
        if tokens > self.session.context() {
            self.session = session(&self.model, &self.options, &self.workers, self.most, tokens)?;
        }
        Ok(())
    }

    /// Scores as many sequences as there is room for.
    fn score_together(
        &mut self,
        sequences: &[Sequence<'_>],
        scores: &mut [Vec<TokenScore>],
    ) -> Result<(), EvalError> {
        // Sequences that begin alike become neighbours.
        let mut order: Vec<usize> = (0..sequences.len()).collect();
        order.sort_by_key(|&i| sequences[i].inputs());
        let inputs: Vec<&[u32]> = order.iter().map(|&i| sequences[i].inputs()).collect();
        let wanted: Vec<usize> = order.iter().map(|&i| sequences[i].first - 1).collect();
        let known: Result<Vec<&[u32]>, _> =
            (0..inputs.len()).map(|slot| self.session.tokens(slot)).collect();
        let plan = waves(&inputs, &wanted, &known?);
        for Wave { copies, pieces } in plan {
            for (from, to, len) in copies {
                self.session.share(from, to, len)?;
            }
            let mut run = Vec::new();
            for (slot, range) in pieces {
                self.session.truncate(slot, range.start)?;
                let first = wanted[slot].saturating_sub(range.start).min(range.len());
                run.push(Piece { sequence: slot, tokens: &inputs[slot][range], first });
            }
            if run.is_empty() {
                continue;
            }
            self.session.score(&run, |piece, at, logits| {
                let Piece { sequence: slot, tokens: run, .. } = run[piece];
                let tokens = sequences[order[slot]].tokens;
                // What is wanted is the end of the inputs, each the token behind it.
                let target = tokens[tokens.len() - run.len() + at];
                scores[order[slot]].push(token_score(logits, target as usize));
            })?;
        }
        Ok(())
    }
}

fn session(
    model: &Model,
    options: &SessionOptions,
    workers: &Workers,
    most: usize,
    tokens: usize,
) -> Result<BatchSession, EvalError> {
    let config = model.config();
    let limit = options.context.unwrap_or(config.max_position_embeddings);
    // In powers of two, so that growing is seldom.
    let context = tokens.max(1).checked_next_power_of_two().unwrap_or(limit).min(limit);
    let each = options.kv.bytes(config, context).max(1);
    let fitting = usize::try_from(CACHE_BYTES / each).unwrap_or(usize::MAX).max(1);
    let options = SessionOptions { context: Some(context), ..options.clone() };
    Ok(BatchSession::with_workers(model, &options, most.min(fitting), workers.clone())?)
}

impl LanguageModel for BatchedModel {
    fn context(&self) -> usize {
        self.options.context.unwrap_or(self.model.config().max_position_embeddings)
    }

    fn vocab_size(&self) -> usize {
        self.model.config().vocab_size
    }

    fn together(&self) -> usize {
        self.session.sequences()
    }

    fn score(&mut self, tokens: &[u32], first: usize) -> Result<Vec<TokenScore>, EvalError> {
        let all = self.score_all(&[Sequence { tokens, first }])?;
        Ok(all.into_iter().next().unwrap_or_default())
    }

    fn score_all(&mut self, sequences: &[Sequence<'_>]) -> Result<Vec<Vec<TokenScore>>, EvalError> {
        let mut scores = vec![Vec::new(); sequences.len()];
        // Those that have a token to score, with a token before it.
        let mut asked: Vec<usize> = Vec::new();
        let mut longest = 0;
        for (i, sequence) in sequences.iter().enumerate() {
            if let Some(&token) = sequence.tokens.last()
                && sequence.first.max(1) < sequence.tokens.len()
            {
                let (position, vocab_size) = (sequence.tokens.len() - 1, self.vocab_size());
                // The last token is a target alone, which the session does not check.
                if token as usize >= vocab_size {
                    return Err(EngineError::Token { token, position, vocab_size }.into());
                }
                longest = longest.max(position);
                asked.push(i);
            }
        }
        // A sequence that is too long for the model is the session's to refuse.
        self.grow(longest.min(self.context()))?;
        for asked in asked.chunks(self.together()) {
            let together: Vec<Sequence<'_>> = asked
                .iter()
                .map(|&i| Sequence { first: sequences[i].first.max(1), ..sequences[i] })
                .collect();
            let mut found = vec![Vec::new(); together.len()];
            self.score_together(&together, &mut found)?;
            for (&i, found) in asked.iter().zip(found) {
                scores[i] = found;
            }
        }
        Ok(scores)
    }
}

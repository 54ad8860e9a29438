//! Several sequences through the model together, with the logits of the tokens that
//! are asked for, and sequences that begin alike without computing it twice: what
//! scoring many short continuations needs.

use super::BatchSession;
use crate::cache::Place;
use crate::error::EngineError;
use crate::forward;
use crate::runner::Output;
use crate::session::SCORE_ELEMENTS;

/// Tokens for one sequence of a batch, see [`BatchSession::score`].
#[derive(Debug, Clone, Copy)]
pub struct Piece<'t> {
    /// The sequence.
    pub sequence: usize,
    /// What is appended to it.
    pub tokens: &'t [u32],
    /// The first of `tokens` whose logits are wanted; their number: none is.
    pub first: usize,
}

impl BatchSession {
    /// Appends tokens to several sequences and calls `each` with the number of the
    /// piece, the position in its tokens and the logits `[V]` there, for every token
    /// from the piece's `first` on, in order.
    ///
    /// The tokens of all pieces go through the model together, `chunk` at a time. Each
    /// has the logits that a lone [`crate::Session`] gives it, bit for bit.
    ///
    /// # Errors
    /// As [`BatchSession::prefill`], no piece, or a sequence that is named twice; the
    /// sequences are as they were before.
    pub fn score(
        &mut self,
        pieces: &[Piece<'_>],
        mut each: impl FnMut(usize, usize, &[f32]),
    ) -> Result<(), EngineError> {
        if pieces.is_empty() {
            return Err(EngineError::Empty);
        }
        let (mut tokens, mut places, mut wanted) = (Vec::new(), Vec::new(), Vec::new());
        for (i, piece) in pieces.iter().enumerate() {
            let start = self.known(piece.sequence)?.len();
            if pieces[..i].iter().any(|p| p.sequence == piece.sequence) {
                return Err(EngineError::Repeated { sequence: piece.sequence });
            }
            self.runner.check(start, piece.tokens)?;
            let cache = piece.sequence;
            places.extend(
                (start..).take(piece.tokens.len()).map(|position| Place { cache, position }),
            );
            wanted.extend((0..piece.tokens.len()).map(|at| (at >= piece.first).then_some((i, at))));
            tokens.extend_from_slice(piece.tokens);
        }
        let chunk = self.runner.chunk;
        for start in (0..tokens.len()).step_by(chunk) {
            let range = start..tokens.len().min(start + chunk);
            let wanted = &wanted[range.clone()];
            let any = wanted.iter().any(Option::is_some);
            let output = if any { Output::Normed } else { Output::Nothing };
            let (places, tokens) = (places[range.clone()].iter().copied(), &tokens[range]);
            self.runner.pass(&mut self.caches, places, tokens, output, None);
            self.head_of(wanted, &mut each);
        }
        for piece in pieces {
            self.sequences[piece.sequence].extend_from_slice(piece.tokens);
        }
        Ok(())
    }

    /// The head for the tokens of the last pass that are wanted, some at a time.
    fn head_of(
        &mut self,
        wanted: &[Option<(usize, usize)>],
        each: &mut impl FnMut(usize, usize, &[f32]),
    ) {
        let (model, kernels) = (&self.runner.model.0, self.runner.kernels);
        let (vocab, hidden) = (model.weights.config.vocab_size, model.weights.config.hidden_size);
        let rows: Vec<(usize, (usize, usize))> =
            wanted.iter().enumerate().filter_map(|(row, w)| Some((row, (*w)?))).collect();
        for rows in rows.chunks((SCORE_ELEMENTS / vocab).max(1)) {
            self.hidden.clear();
            for (row, _) in rows {
                self.hidden.extend_from_slice(&self.runner.buffers.h[row * hidden..][..hidden]);
            }
            self.logits.resize(rows.len() * vocab, 0.0);
            let (h, out) = (&self.hidden[..], &mut self.logits[..]);
            let bytes = model.head().len() * 2 * rows.len();
            self.runner.workers.run(bytes, |split| forward::logits(kernels, split, model, h, out));
            for (&(_, (piece, at)), logits) in rows.iter().zip(self.logits.chunks_exact(vocab)) {
                each(piece, at, logits);
            }
        }
    }

    /// Makes a sequence be the first `len` tokens of another one, or all where it has
    /// fewer: what differs is forgotten, and keys and values are copied where they
    /// would be computed again. Returns how many tokens were copied.
    ///
    /// # Errors
    /// No such sequence.
    pub fn share(&mut self, from: usize, to: usize, len: usize) -> Result<usize, EngineError> {
        let source = self.known(from)?;
        let tokens = &source[..len.min(source.len())];
        let own = self.known(to)?;
        let common = own.iter().zip(tokens).take_while(|(a, b)| a == b).count();
        let missing = tokens[common..].to_vec();
        self.sequences[to].truncate(common);
        if missing.is_empty() {
            return Ok(0);
        }
        let heads = self.runner.heads;
        // Two different ones: a sequence has its own tokens in common with itself.
        let (low, high) = self.caches.split_at_mut(from.max(to));
        let (source, target) = match from < to {
            true => (&low[from], &mut high[0]),
            false => (&high[0], &mut low[to]),
        };
        target.copy_from(source, heads, common..common + missing.len());
        self.sequences[to].extend_from_slice(&missing);
        Ok(missing.len())
    }
}

//! The products of one decoded token, alone: all ternary matrices of a model, or
//! its head, with the session's kernels and threads, but without a barrier
//! between them and without everything else that a token needs.

use std::collections::BTreeMap;
use std::hint::black_box;

use bitnet_core::names::Linear;
use bitnet_engine::{LinearRef, Model};
use bitnet_kernels::{MatMut, QuantizedTokens, TernaryRows};

use super::share::share_out;
use super::{Setting, rounds};

/// Bytes of rows that a thread multiplies before it takes the next piece.
const PIECE_BYTES: usize = 128 << 10;

/// Rows that a kernel takes together.
const ROW_BLOCK: usize = 16;

/// The matrices of a model, cut into pieces of rows.
pub(super) struct Products<'a> {
    model: &'a Model,
    setting: Setting,
    ternary: Vec<TernaryRows<'a>>,
    /// A token of each width that the matrices have.
    tokens: BTreeMap<usize, QuantizedTokens>,
    hidden: Vec<f32>,
    /// Passes in a measurement, once known.
    ternary_passes: usize,
    head_passes: usize,
}

impl<'a> Products<'a> {
    pub(super) fn new(model: &'a Model, setting: Setting) -> Self {
        let config = model.config();
        let mut ternary = Vec::new();
        let mut tokens = BTreeMap::new();
        for layer in 0..config.num_hidden_layers {
            for linear in Linear::ALL {
                let LinearRef::Ternary(w) = model.linear_for(setting.kernels, layer, linear) else {
                    continue;
                };
                let row_bytes = (w.bytes.len() / w.len().max(1)).max(1);
                let rows = piece_rows(row_bytes);
                let starts = (0..w.len()).step_by(rows);
                ternary.extend(starts.map(|start| w.rows(start, w.len().min(start + rows))));
                tokens.entry(w.cols).or_insert_with(|| token(setting, w.cols));
            }
        }
        let hidden = values(config.hidden_size);
        Self { model, setting, ternary, tokens, hidden, ternary_passes: 0, head_passes: 0 }
    }

    /// Whether there is a ternary matrix.
    pub(super) fn has_ternary(&self) -> bool {
        !self.ternary.is_empty()
    }

    /// Tokens per second of the ternary products.
    pub(super) fn ternary(&mut self) -> f64 {
        let Setting { kernels, threads } = self.setting;
        let (pieces, tokens) = (&self.ternary, &self.tokens);
        let job = |i: usize, out: &mut Vec<f32>| {
            let w = pieces[i % pieces.len()];
            out.resize(w.len(), 0.0);
            let out = MatMut::new(&mut out[..], 1, w.len());
            kernels.ternary_matmul(w, tokens[&w.cols].view(), out);
        };
        per_second(threads, pieces.len(), &mut self.ternary_passes, job)
    }

    /// Tokens per second of the head.
    pub(super) fn head(&mut self) -> f64 {
        let Setting { kernels, threads } = self.setting;
        let (head, hidden) = (self.model.head(), &self.hidden);
        let (cols, vocab) = (hidden.len(), self.model.config().vocab_size);
        // Two bytes an element, give or take a factor of two.
        let rows = piece_rows(cols * 2);
        let pieces = vocab.div_ceil(rows);
        let job = |i: usize, out: &mut Vec<f32>| {
            let start = i % pieces * rows;
            let end = vocab.min(start + rows);
            out.resize(end - start, 0.0);
            kernels.dense_matvec(head.rows(cols, start, end), hidden, out);
        };
        per_second(threads, pieces, &mut self.head_passes, job)
    }
}

/// Rows of a piece: whole blocks, about [`PIECE_BYTES`].
fn piece_rows(row_bytes: usize) -> usize {
    (PIECE_BYTES / row_bytes).next_multiple_of(ROW_BLOCK).max(ROW_BLOCK)
}

/// Passes a second; the first call finds out how many a measurement needs.
fn per_second(
    threads: usize,
    pieces: usize,
    passes: &mut usize,
    job: impl Fn(usize, &mut Vec<f32>) + Sync,
) -> f64 {
    let job = |i: usize, out: &mut Vec<f32>| {
        job(i, out);
        black_box(&*out);
    };
    if *passes == 0 {
        *passes = rounds(share_out(threads, pieces, Vec::new, job));
    }
    *passes as f64 / share_out(threads, pieces * *passes, Vec::new, job)
}

/// A token whose integers take all values.
fn token(setting: Setting, cols: usize) -> QuantizedTokens {
    let mut tokens = QuantizedTokens::default();
    tokens.resize(1, cols);
    let (scale, sum) = setting.kernels.quantize(&values(cols), &mut tokens.q);
    (tokens.scales[0], tokens.sums[0]) = (scale, sum);
    tokens
}

/// Values between -1 and 1.
fn values(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i * 37 % 255) as f32 / 127.0 - 1.0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_whole_blocks() {
        for (row_bytes, rows) in [(640, 208), (1, 131_072), (1 << 20, 16)] {
            assert_eq!(piece_rows(row_bytes), rows);
        }
    }
}

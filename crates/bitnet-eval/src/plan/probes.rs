//! What [`super::rates`] measures: the operations of a forward pass with the engine's
//! kernels, on made-up data.

use std::hint::black_box;
use std::time::Instant;

use bitnet_core::{Dtype, ModelConfig};
use bitnet_format::gguf::blocks::RowType;
use bitnet_kernels::{
    AttendQuery, DenseRows, INT4_BYTES, INT8_BYTES, Kernels, KvHead, MatMut, QuantizedTokens,
    ROW_BLOCK, TernaryRows, attend_scores_len, key_blocks_len,
};
use half::{bf16, f16};

use super::Form;
use super::rates::CHUNK;
use crate::bench::share::share_out;

/// Bytes that a thread reads before it takes the next piece.
pub(super) const PIECE: usize = 256 << 10;

/// Bytes of the rows of a product in the cache.
const ROWS: usize = 192 << 10;

/// Positions that the queries of the attention's probe see.
pub(super) const POSITIONS: usize = 256;

/// How much one pass does, and the seconds of some passes.
pub(super) type Probe<'p> = (f64, Box<dyn Fn(usize) -> f64 + 'p>);

/// Some rows of one form.
pub(super) struct Weights {
    pub(super) form: Form,
    cols: usize,
    pub(super) bytes: usize,
    /// Weights, padding included.
    pub(super) elements: usize,
    rows: usize,
    data: Vec<u64>,
}

impl Weights {
    /// As many rows as the cache of a core holds.
    pub(super) fn few(form: Form, cols: usize) -> Self {
        Self::new(form, cols, (ROWS / form.row_bytes(cols).max(1)).max(16))
    }

    pub(super) fn new(form: Form, cols: usize, rows: usize) -> Self {
        // Blocks of integers need whole ones.
        let cols = match form {
            Form::Rows(_) => cols.next_multiple_of(ROW_BLOCK),
            _ => cols,
        };
        let row = form.row_bytes(cols);
        let padded = match form {
            Form::Ternary(layout) => layout.padded_cols(cols),
            _ => cols,
        };
        let bytes = rows * row;
        // Zeros, but for the scales of blocks: a NaN or a subnormal would be slow.
        Self { form, cols, bytes, elements: rows * padded, rows, data: vec![0; bytes.div_ceil(8)] }
    }

    fn as_bytes(&self) -> &[u8] {
        &bytemuck::cast_slice::<u64, u8>(&self.data)[..self.bytes]
    }

    fn dense(&self) -> Option<DenseRows<'_>> {
        let bytes = self.as_bytes();
        Some(match self.form {
            Form::Ternary(_) => return None,
            Form::Float(Dtype::F32) => DenseRows::F32(bytemuck::cast_slice::<u8, f32>(bytes)),
            Form::Float(Dtype::F16) => DenseRows::F16(bytemuck::cast_slice::<u8, f16>(bytes)),
            Form::Float(Dtype::Bf16) => DenseRows::Bf16(bytemuck::cast_slice::<u8, bf16>(bytes)),
            Form::Rows(RowType::Int8) => DenseRows::Int8(bytes.as_chunks::<INT8_BYTES>().0),
            Form::Rows(RowType::Int4) => DenseRows::Int4(bytes.as_chunks::<INT4_BYTES>().0),
        })
    }
}

/// Activations of some tokens, and room for what is made of them.
pub(super) struct Rows {
    width: usize,
    x: Vec<f32>,
    weight: Vec<f32>,
}

impl Rows {
    pub(super) fn new(tokens: usize, width: usize) -> Self {
        let x = (0..tokens * width).map(|i| (i * 37 % 255) as f32 / 127.0 - 1.0).collect();
        Self { width, x, weight: vec![1.0; width] }
    }

    fn row(&self, token: usize, width: usize) -> &[f32] {
        &self.x[token * self.width..][..width]
    }
}

/// Where and for what is measured.
#[derive(Clone, Copy)]
pub(super) struct Probes<'c> {
    pub(super) kernels: Kernels,
    pub(super) threads: usize,
    pub(super) config: &'c ModelConfig,
}

/// Steps of the int8 probe in a piece.
const STEPS: usize = 2000;

impl Probes<'_> {
    pub(super) fn read(self, bytes: &[u8], passes: usize) -> f64 {
        let pieces = bytes.len() / PIECE;
        let job = |i: usize, sum: &mut u32| {
            *sum ^= black_box(self.kernels.read_probe(&bytes[i % pieces * PIECE..][..PIECE]));
        };
        share_out(self.threads, pieces * passes, || 0, job)
    }

    pub(super) fn int8_operations(self) -> f64 {
        (self.threads as u64 * self.kernels.int8_peak_probe(STEPS)) as f64
    }

    pub(super) fn int8(self, passes: usize) -> f64 {
        let job = |_: usize, sum: &mut u64| {
            *sum += black_box(self.kernels.int8_peak_probe(STEPS));
        };
        share_out(self.threads, self.threads * passes, || 0, job)
    }

    /// A product of a chunk of tokens.
    pub(super) fn panel<'p>(self, weights: &'p Weights) -> Probe<'p>
    where
        Self: 'p,
    {
        let macs = (CHUNK * weights.elements) as f64;
        // Four parts a thread, as the engine divides it.
        let parts = 4 * self.threads;
        (macs, Box::new(move |passes| self.product(weights, CHUNK, parts, passes)))
    }

    /// The seconds in which all threads together do `passes` products of all rows, each
    /// in `parts` parts of rows.
    pub(super) fn product(
        self,
        weights: &Weights,
        tokens: usize,
        parts: usize,
        passes: usize,
    ) -> f64 {
        let x = Rows::new(tokens, weights.cols);
        let mut q = QuantizedTokens::default();
        if matches!(weights.form, Form::Ternary(_)) {
            q.resize(tokens, weights.cols);
            for t in 0..tokens {
                let stride = q.stride;
                let row = &mut q.q[t * stride..(t + 1) * stride];
                (q.scales[t], q.sums[t]) = self.kernels.quantize(x.row(t, weights.cols), row);
            }
        }
        let job = |i: usize, out: &mut Vec<f32>| {
            out.resize(tokens * weights.rows, 0.0);
            let part = i % parts;
            let [start, end] = [part, part + 1].map(|n| weights.rows * n / parts);
            let out = MatMut::new(&mut out[..], tokens, weights.rows);
            let out = out.split_cols(start).1.split_cols(end - start).0;
            match (weights.form, weights.dense()) {
                (Form::Ternary(layout), _) => {
                    let (cols, bytes) = (weights.cols, weights.as_bytes());
                    let w = TernaryRows { layout, cols, weight_scale: 1.0, bytes };
                    self.kernels.ternary_matmul(w.rows(start, end), q.view(), out);
                }
                (_, Some(rows)) => {
                    let rows = rows.rows(weights.cols, start, end);
                    self.kernels.dense_matmul(rows, &x.x, weights.cols, out);
                }
                (_, None) => {}
            }
        };
        share_out(self.threads, passes * parts, Vec::new, job)
    }

    pub(super) fn attention(self, queries: usize, passes: usize) -> f64 {
        let dim = self.config.head_dim();
        let (keys, values) =
            (vec![0.01; key_blocks_len(POSITIONS, dim)], vec![0.01; POSITIONS * dim]);
        let q = vec![0.1; queries * dim];
        let tile: Vec<_> =
            (0..queries).map(|i| AttendQuery { at: i * dim, len: POSITIONS }).collect();
        let job = |_: usize, (scores, out): &mut (Vec<f32>, Vec<f32>)| {
            scores.resize(attend_scores_len(queries, POSITIONS), 0.0);
            out.resize(queries * dim, 0.0);
            let kv = KvHead::F32 { keys: &keys, values: &values };
            self.kernels.attend_tile(&tile, &q, kv, dim, 0.1, scores, out);
        };
        share_out(self.threads, passes, Default::default, job)
    }

    pub(super) fn norm(self, rows: &Rows, tokens: usize, passes: usize) -> f64 {
        let d = self.config.hidden_size;
        self.by_rows(d, tokens, passes, |t, out, q| {
            let (x, weight) = (rows.row(t, d), &rows.weight[..d]);
            black_box(self.kernels.rms_norm_quantize(x, weight, 1e-5, out, q));
        })
    }

    pub(super) fn gate(self, rows: &Rows, tokens: usize, passes: usize) -> f64 {
        let f = self.config.intermediate_size;
        self.by_rows(f, tokens, passes, |t, out, q| {
            let (gate, weight) = (rows.row(t, f), &rows.weight[..f]);
            let (act, up) = (self.config.hidden_act, rows.row(CHUNK - 1 - t, f));
            black_box(self.kernels.gated_norm_quantize(act, gate, up, weight, 1e-5, out, q));
        })
    }

    /// Seconds of `passes` times `tokens` rows: one token on one thread, more on all.
    fn by_rows(
        self,
        width: usize,
        tokens: usize,
        passes: usize,
        row: impl Fn(usize, &mut [f32], &mut [i8]) + Sync,
    ) -> f64 {
        let scratch = || (vec![0.0; width], vec![0; QuantizedTokens::stride(width)]);
        if tokens == 1 {
            let (mut out, mut q) = scratch();
            let start = Instant::now();
            (0..passes).for_each(|_| row(0, &mut out, &mut q));
            return start.elapsed().as_secs_f64();
        }
        share_out(self.threads, passes * tokens, scratch, |i, (out, q)| row(i % tokens, out, q))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every form of weights can be measured.
    #[test]
    fn every_form_can_be_measured() {
        let config = ModelConfig::tiny();
        for form in Form::ALL {
            let weights = Weights::new(form, config.hidden_size, 40);
            let probes = Probes { kernels: Kernels::detect(), threads: 1, config: &config };
            for tokens in [1, 3] {
                let seconds = probes.product(&weights, tokens, 3, 1);
                assert!(seconds > 0.0, "{form:?}");
            }
        }
    }
}

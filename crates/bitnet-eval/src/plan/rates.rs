//! How fast this machine is at what a forward pass consists of: reading memory, and
//! every kind of operation on data that lies in the caches, each with the engine's own
//! kernels. [`super::speed`] adds them up.

use std::hint::black_box;
use std::time::Instant;

use bitnet_core::names::Linear;
use bitnet_core::{Dtype, Layout, ModelConfig};
use bitnet_format::gguf::blocks::RowType;
use bitnet_kernels::{
    AttendQuery, DenseRows, INT4_BYTES, INT8_BYTES, Kernels, KvHead, MatMut, QuantizedTokens,
    ROW_BLOCK, TernaryRows, attend_scores_len, key_blocks_len,
};
use half::{bf16, f16};
use serde::Serialize;

use super::{Form, available_bytes};
use crate::bench::share::share_out;
use crate::bench::{Spread, rounds};

/// Bytes that are read together, for the speed of reading at that size: from what the
/// caches of a core hold to more than any cache holds.
const WORKING_SETS: [usize; 6] = [8 << 20, 32 << 20, 64 << 20, 128 << 20, 256 << 20, 1536 << 20];

/// Bytes that a thread reads before it takes the next piece.
const PIECE: usize = 256 << 10;

/// Bytes of the rows of a product in the cache.
const ROWS: usize = 192 << 10;

/// Tokens of a chunk of a prompt, as [`bitnet_engine::SessionOptions`] has them.
pub(super) const CHUNK: usize = 256;

/// Positions that the queries of the attention's probe see.
const POSITIONS: usize = 256;

/// Measured rounds, after one that is not; the median counts, as in a bench.
const REPEATS: usize = 9;

/// The speed of reading at one size.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ReadRate {
    /// Bytes that are read again and again.
    pub bytes: u64,
    /// 10^9 bytes a second, all threads.
    pub gb_per_second: f64,
}

/// The speed of a product with weights of one form, all threads together.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ProductRate {
    /// 10^9 stored bytes a second for one token, from the cache.
    pub cached_gb_per_second: f64,
    /// 10^9 multiply-adds a second for a chunk of tokens, padding included.
    pub panel_gmac_per_second: f64,
}

/// The machine, as the operations of a model see it; all threads together but for what
/// one token is too little for.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Rates {
    /// Instruction set.
    pub isa: &'static str,
    /// Threads.
    pub threads: usize,
    /// Reading memory, from few bytes to many.
    pub read: Vec<ReadRate>,
    /// The int8 product in registers, 10^9 operations a second.
    pub int8_gop_per_second: f64,
    /// The linear layers.
    pub linear: ProductRate,
    /// The head.
    pub head: ProductRate,
    /// Multiply-adds of the attention of one token a second, 10^9.
    pub attention_gmac_per_second: f64,
    /// The same of a chunk of a prompt.
    pub attention_panel_gmac_per_second: f64,
    /// RMSNorm and quantisation of one token, ns an element, one thread.
    pub norm_ns: f64,
    /// Gated activation, norm and quantisation of one token, ns an element, one thread.
    pub gate_ns: f64,
    /// The norm of a chunk of tokens, ns an element.
    pub norm_panel_ns: f64,
    /// The gated activation of a chunk of tokens, ns an element.
    pub gate_panel_ns: f64,
    /// Float products of a chunk of tokens, 10^9 operations a second. The engine rounds
    /// products and sums apart; with fused operations training's own take half the
    /// instructions.
    pub float_gflop_per_second: f64,
}

impl Rates {
    /// Measures them for a model whose linear layers and head have these forms.
    #[must_use]
    pub fn measure(config: &ModelConfig, linear: Form, kernels: Kernels, threads: usize) -> Self {
        let head = Form::of_dtype(config.embedding_dtype);
        let (d, f) = (config.hidden_size, config.intermediate_size);
        let probes = Probes { kernels, threads, config };
        let sets = working_sets(available_bytes());
        let buffer = vec![1u8; sets.last().copied().unwrap_or(PIECE)];
        let [linear, head, float] =
            [linear, head, Form::Float(Dtype::F32)].map(|form| Weights::few(form, d));
        // A matrix as the products of a prompt meet it: no cache of a core holds it.
        let [linear_panel, head_panel, float_panel] =
            [&linear, &head, &float].map(|few| Weights::new(few.form, d, f));
        let rows = Rows::new(CHUNK, d.max(f));
        // Of each: how much it does, and the seconds of so many passes.
        let mut all: Vec<Probe<'_>> = Vec::new();
        for &bytes in &sets {
            let buffer = &buffer[..bytes];
            all.push((bytes as f64, Box::new(move |passes| probes.read(buffer, passes))));
        }
        all.push((probes.int8_operations(), Box::new(|passes| probes.int8(passes))));
        for (few, panel) in [(&linear, &linear_panel), (&head, &head_panel)] {
            all.push((few.bytes as f64, Box::new(|passes| probes.product(few, 1, 1, passes))));
            all.push(probes.panel(panel));
        }
        let group = config.num_attention_heads / config.num_key_value_heads;
        for queries in [group.min(8), 8] {
            let macs = (2 * queries * POSITIONS * config.head_dim()) as f64;
            all.push((macs, Box::new(move |passes| probes.attention(queries, passes))));
        }
        all.push((d as f64, Box::new(|passes| probes.norm(&rows, 1, passes))));
        all.push((f as f64, Box::new(|passes| probes.gate(&rows, 1, passes))));
        let of_chunk = |width: usize| (CHUNK * width) as f64;
        all.push((of_chunk(d), Box::new(|passes| probes.norm(&rows, CHUNK, passes))));
        all.push((of_chunk(f), Box::new(|passes| probes.gate(&rows, CHUNK, passes))));
        all.push(probes.panel(&float_panel));

        let mut passes = vec![1; all.len()];
        let mut found = vec![Vec::new(); all.len()];
        // The first round pages memory in and finds out how many passes take 30 ms.
        for round in 0..=REPEATS {
            for (i, (amount, probe)) in all.iter().enumerate() {
                let seconds = probe(passes[i]);
                if round == 0 {
                    passes[i] = rounds(seconds);
                } else {
                    found[i].push(amount * passes[i] as f64 / seconds / 1e9);
                }
            }
        }
        let mut medians = found.iter().map(|rates| Spread::of(rates).median);
        let mut next = || medians.next().unwrap_or(0.0);
        let read = sets
            .iter()
            .map(|&bytes| ReadRate { bytes: bytes as u64, gb_per_second: next() })
            .collect();
        let product = |next: &mut dyn FnMut() -> f64| ProductRate {
            cached_gb_per_second: next(),
            panel_gmac_per_second: next(),
        };
        Self {
            isa: kernels.name(),
            threads,
            read,
            int8_gop_per_second: next(),
            linear: product(&mut next),
            head: product(&mut next),
            attention_gmac_per_second: next(),
            attention_panel_gmac_per_second: next(),
            norm_ns: 1.0 / next(),
            gate_ns: 1.0 / next(),
            norm_panel_ns: 1.0 / next(),
            gate_panel_ns: 1.0 / next(),
            float_gflop_per_second: 2.0 * next(),
        }
    }

    /// A machine that reads so many 10^9 bytes a second at every size.
    #[must_use]
    pub fn with_bandwidth(mut self, gb_per_second: f64) -> Self {
        self.read = vec![ReadRate { bytes: 0, gb_per_second }];
        self
    }

    /// A machine whose int8 peak is that many 10^9 operations a second: everything that
    /// is bound by arithmetic changes in proportion.
    #[must_use]
    pub fn with_int8_peak(mut self, gop_per_second: f64) -> Self {
        let factor = gop_per_second / self.int8_gop_per_second.max(1e-9);
        self.int8_gop_per_second = gop_per_second;
        for rate in [
            &mut self.linear.cached_gb_per_second,
            &mut self.linear.panel_gmac_per_second,
            &mut self.head.cached_gb_per_second,
            &mut self.head.panel_gmac_per_second,
            &mut self.attention_gmac_per_second,
            &mut self.attention_panel_gmac_per_second,
            &mut self.float_gflop_per_second,
        ] {
            *rate *= factor;
        }
        for time in
            [&mut self.norm_ns, &mut self.gate_ns, &mut self.norm_panel_ns, &mut self.gate_panel_ns]
        {
            *time /= factor;
        }
        self
    }

    /// The share of `bytes` read again and again that comes from memory and not from the
    /// caches, by how much slower they are read than few bytes are.
    #[must_use]
    pub fn memory_share(&self, bytes: f64) -> f64 {
        let (Some(cache), Some(memory)) = (self.read.first(), self.read.last()) else { return 1.0 };
        let (cache, memory) = (cache.gb_per_second, memory.gb_per_second);
        // Of times, not of speeds: a byte from the cache takes 1 / cache.
        let time = |rate: f64| 1.0 / rate.max(1e-9);
        let span = time(memory) - time(cache);
        if span <= 0.0 {
            return 1.0;
        }
        ((time(self.read_at(bytes)) - time(cache)) / span).clamp(0.0, 1.0)
    }

    /// The speed of reading `bytes` again and again, 10^9 bytes a second: between the
    /// sizes measured by the logarithm of the size.
    #[must_use]
    pub fn read_at(&self, bytes: f64) -> f64 {
        let above = self.read.iter().position(|r| r.bytes as f64 >= bytes);
        match above {
            None => self.read.last().map_or(0.0, |r| r.gb_per_second),
            Some(0) => self.read[0].gb_per_second,
            Some(i) => {
                let (low, high) = (self.read[i - 1], self.read[i]);
                let ln = |x: f64| x.max(1.0).ln();
                let span = ln(high.bytes as f64) - ln(low.bytes as f64);
                let at = (ln(bytes) - ln(low.bytes as f64)) / span;
                low.gb_per_second + at * (high.gb_per_second - low.gb_per_second)
            }
        }
    }
}

/// How much one pass does, and the seconds of some passes.
type Probe<'p> = (f64, Box<dyn Fn(usize) -> f64 + 'p>);

/// The sizes at which reading is measured: at most a quarter of the memory.
fn working_sets(available: Option<u64>) -> Vec<usize> {
    let most = available.map_or(usize::MAX, |n| usize::try_from(n / 4).unwrap_or(usize::MAX));
    WORKING_SETS.into_iter().filter(|&bytes| bytes <= most.max(WORKING_SETS[0])).collect()
}

/// Some rows of one form.
struct Weights {
    form: Form,
    cols: usize,
    bytes: usize,
    /// Weights, padding included.
    elements: usize,
    rows: usize,
    data: Vec<u64>,
}

impl Weights {
    /// As many rows as the cache of a core holds.
    fn few(form: Form, cols: usize) -> Self {
        Self::new(form, cols, (ROWS / form.row_bytes(cols).max(1)).max(16))
    }

    fn new(form: Form, cols: usize, rows: usize) -> Self {
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
struct Rows {
    width: usize,
    x: Vec<f32>,
    weight: Vec<f32>,
}

impl Rows {
    fn new(tokens: usize, width: usize) -> Self {
        let x = (0..tokens * width).map(|i| (i * 37 % 255) as f32 / 127.0 - 1.0).collect();
        Self { width, x, weight: vec![1.0; width] }
    }

    fn row(&self, token: usize, width: usize) -> &[f32] {
        &self.x[token * self.width..][..width]
    }
}

#[derive(Clone, Copy)]
struct Probes<'c> {
    kernels: Kernels,
    threads: usize,
    config: &'c ModelConfig,
}

/// Steps of the int8 probe in a piece.
const STEPS: usize = 2000;

impl Probes<'_> {
    fn read(self, bytes: &[u8], passes: usize) -> f64 {
        let pieces = bytes.len() / PIECE;
        let job = |i: usize, sum: &mut u32| {
            *sum ^= black_box(self.kernels.read_probe(&bytes[i % pieces * PIECE..][..PIECE]));
        };
        share_out(self.threads, pieces * passes, || 0, job)
    }

    fn int8_operations(self) -> f64 {
        (self.threads as u64 * self.kernels.int8_peak_probe(STEPS)) as f64
    }

    fn int8(self, passes: usize) -> f64 {
        let job = |_: usize, sum: &mut u64| {
            *sum += black_box(self.kernels.int8_peak_probe(STEPS));
        };
        share_out(self.threads, self.threads * passes, || 0, job)
    }

    /// A product of a chunk of tokens.
    fn panel<'p>(self, weights: &'p Weights) -> Probe<'p>
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
    fn product(self, weights: &Weights, tokens: usize, parts: usize, passes: usize) -> f64 {
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

    fn attention(self, queries: usize, passes: usize) -> f64 {
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

    fn norm(self, rows: &Rows, tokens: usize, passes: usize) -> f64 {
        let d = self.config.hidden_size;
        self.by_rows(d, tokens, passes, |t, out, q| {
            let (x, weight) = (rows.row(t, d), &rows.weight[..d]);
            black_box(self.kernels.rms_norm_quantize(x, weight, 1e-5, out, q));
        })
    }

    fn gate(self, rows: &Rows, tokens: usize, passes: usize) -> f64 {
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

/// Bytes of the linear layers of one block.
pub(super) fn block_bytes(config: &ModelConfig, form: Form) -> u64 {
    let bytes = |linear: &Linear| {
        let [rows, cols] = linear.shape(config);
        (rows * form.for_cols(cols).row_bytes(cols)) as u64
    };
    Linear::ALL.iter().map(bytes).sum()
}

/// Multiply-adds of one token in the linear layers of one block, padding included.
pub(super) fn block_macs(config: &ModelConfig, form: Form) -> f64 {
    let macs = |linear: &Linear| {
        let [rows, cols] = linear.shape(config);
        let cols = match form {
            Form::Ternary(layout) => Layout::padded_cols(layout, cols),
            _ => cols,
        };
        (rows * cols) as f64
    };
    Linear::ALL.iter().map(macs).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(read: &[(u64, f64)]) -> Rates {
        let product = ProductRate { cached_gb_per_second: 1.0, panel_gmac_per_second: 2.0 };
        Rates {
            isa: "x",
            threads: 1,
            read: read
                .iter()
                .map(|&(bytes, gb_per_second)| ReadRate { bytes, gb_per_second })
                .collect(),
            int8_gop_per_second: 100.0,
            linear: product,
            head: product,
            attention_gmac_per_second: 1.0,
            attention_panel_gmac_per_second: 1.0,
            norm_ns: 1.0,
            gate_ns: 1.0,
            norm_panel_ns: 1.0,
            gate_panel_ns: 1.0,
            float_gflop_per_second: 1.0,
        }
    }

    #[test]
    fn no_more_memory_is_read_than_there_is() {
        assert_eq!(working_sets(None).len(), WORKING_SETS.len());
        assert_eq!(working_sets(Some(200 << 20)), [8 << 20, 32 << 20]);
        assert_eq!(working_sets(Some(0)), [8 << 20]);
    }

    #[test]
    fn reading_is_interpolated_between_sizes() {
        let rates = rates(&[(100, 40.0), (10_000, 20.0)]);
        for (bytes, expected) in [(1.0, 40.0), (100.0, 40.0), (1000.0, 30.0), (1e6, 20.0)] {
            assert!((rates.read_at(bytes) - expected).abs() < 1e-9, "{bytes}");
        }
        // 1/30 lies a third of the way from 1/40 to 1/20.
        assert!((rates.memory_share(1000.0) - 1.0 / 3.0).abs() < 1e-9);
        assert_eq!((rates.memory_share(1.0), rates.memory_share(1e9)), (0.0, 1.0));
        let stated = rates.with_bandwidth(7.0);
        assert_eq!((stated.read_at(1e9), stated.memory_share(1e9)), (7.0, 1.0));
    }

    #[test]
    fn a_stated_peak_scales_arithmetic_and_nothing_else() {
        let fast = rates(&[(1, 10.0)]).with_int8_peak(400.0);
        assert_eq!(fast.int8_gop_per_second, 400.0);
        assert_eq!((fast.linear.cached_gb_per_second, fast.norm_ns), (4.0, 0.25));
        assert_eq!(fast.read_at(5.0), 10.0);
    }

    /// Every form of weights can be measured, and every rate is one.
    #[test]
    fn a_machine_has_all_rates() {
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

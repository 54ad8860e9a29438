//! How fast this machine is at what a forward pass consists of: reading memory, and
//! every kind of operation on data that lies in the caches, each with the engine's own
//! kernels. [`super::speed`] adds them up.

use bitnet_core::names::Linear;
use bitnet_core::{Layout, ModelConfig};
use bitnet_kernels::Kernels;
use serde::Serialize;

use super::float_probes::FloatProducts;
use super::probes::{PIECE, POSITIONS, Probe, Probes, Rows, Weights};
use super::{Form, available_bytes};
use crate::bench::{Spread, rounds};

/// Bytes that are read together, for the speed of reading at that size: from what the
/// caches of a core hold to more than any cache holds.
const WORKING_SETS: [usize; 6] = [8 << 20, 32 << 20, 64 << 20, 128 << 20, 256 << 20, 1536 << 20];

/// Tokens of a chunk of a prompt, as [`bitnet_engine::SessionOptions`] has them.
pub(super) const CHUNK: usize = 256;

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
    /// Fused multiply-adds of floats in registers, 10^9 operations a second.
    pub float_peak_gflop_per_second: f64,
    /// Training's products that give gradients of inputs, 10^9 operations a second.
    pub input_gradient_gflop_per_second: f64,
    /// Training's products that give gradients of weights.
    pub weight_gradient_gflop_per_second: f64,
    /// The same in fixed point, of gradients with 24 bits.
    pub fixed_weight_gradient_gflop_per_second: f64,
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
        let [linear, head] = [linear, head].map(|form| Weights::few(form, d));
        // A matrix as the products of a prompt meet it: no cache of a core holds it.
        let [linear_panel, head_panel] = [&linear, &head].map(|few| Weights::new(few.form, d, f));
        let training = FloatProducts::new(kernels, threads, config);
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
        all.extend([training.peak(), training.input_gradient(), training.weight_gradient()]);
        all.push(training.fixed_weight_gradient());

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
            float_peak_gflop_per_second: next(),
            input_gradient_gflop_per_second: next(),
            weight_gradient_gflop_per_second: next(),
            fixed_weight_gradient_gflop_per_second: next(),
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
            &mut self.float_peak_gflop_per_second,
            &mut self.input_gradient_gflop_per_second,
            &mut self.weight_gradient_gflop_per_second,
            &mut self.fixed_weight_gradient_gflop_per_second,
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

/// The sizes at which reading is measured: at most a quarter of the memory.
fn working_sets(available: Option<u64>) -> Vec<usize> {
    let most = available.map_or(usize::MAX, |n| usize::try_from(n / 4).unwrap_or(usize::MAX));
    WORKING_SETS.into_iter().filter(|&bytes| bytes <= most.max(WORKING_SETS[0])).collect()
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
            float_peak_gflop_per_second: 1.0,
            input_gradient_gflop_per_second: 1.0,
            weight_gradient_gflop_per_second: 1.0,
            fixed_weight_gradient_gflop_per_second: 1.0,
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
        assert_eq!(rates.with_bandwidth(7.0).read_at(1e9), 7.0);
    }

    #[test]
    fn a_stated_peak_scales_arithmetic_and_nothing_else() {
        let fast = rates(&[(1, 10.0)]).with_int8_peak(400.0);
        assert_eq!(fast.int8_gop_per_second, 400.0);
        assert_eq!((fast.linear.cached_gb_per_second, fast.norm_ns), (4.0, 0.25));
        assert_eq!(fast.read_at(5.0), 10.0);
    }
}

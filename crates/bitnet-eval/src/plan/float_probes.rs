//! The products of training's backward pass, as `bitnet-train` divides them between threads,
//! on made-up data.

use std::hint::black_box;

use bitnet_core::ModelConfig;
use bitnet_kernels::{
    Digits, FIXED_DEPTH, Kernels, Line, MatMut, MatRef, PACK_DEPTH, PackSource, PackedActs,
    PackedRef, QuantizedTokens, Unit, packed_len,
};

use super::probes::Probe;
use crate::bench::share::share_out;

/// Tokens of a task of a gradient of inputs, and of the products that give one of weights
/// (`bitnet-train`'s `CHUNK` and `ROUND`).
const TOKENS: usize = 128;
const ROUND: usize = 1024;

/// Rows of a task of a gradient of weights.
const ROWS: usize = 96;

/// The widest matrix: wider ones are as fast, and take memory.
const WIDEST: usize = 4096;

/// Steps of the peak's probe in a piece.
const STEPS: usize = 20_000;

/// What is multiplied.
pub(super) struct FloatProducts {
    kernels: Kernels,
    threads: usize,
    hidden: usize,
    width: usize,
    /// Gradients of gate and up, `[ROUND, 2 · width]`.
    grads: Vec<f32>,
    /// A weight `[width, hidden]` and an input `[ROUND, hidden]` as right operands.
    weight: Vec<Unit>,
    input: Vec<Unit>,
    /// The input as int8, and the scales of its tokens.
    acts: Vec<Line>,
    scales: Vec<f32>,
}

impl FloatProducts {
    pub(super) fn new(kernels: Kernels, threads: usize, config: &ModelConfig) -> Self {
        let hidden = config.hidden_size.min(WIDEST);
        let width = config.intermediate_size.min(WIDEST);
        Self {
            kernels,
            threads,
            hidden,
            width,
            grads: (0..ROUND * 2 * width).map(|i| (i * 37 % 255) as f32 / 1e4 - 0.01).collect(),
            weight: packed(kernels, width, hidden),
            input: packed(kernels, ROUND, hidden),
            acts: packed_acts(kernels, hidden),
            scales: vec![0.01; ROUND],
        }
    }

    /// Fused multiply-adds in registers.
    pub(super) fn peak(&self) -> Probe<'_> {
        let amount = self.threads as u64 * self.kernels.float_peak_probe(STEPS);
        let job = |_: usize, sum: &mut u64| {
            *sum += black_box(self.kernels.float_peak_probe(STEPS));
        };
        let pass = move |passes| share_out(self.threads, self.threads * passes, || 0, job);
        (amount as f64, Box::new(pass))
    }

    /// The gradient of a layer's input: a chunk of tokens for each thread.
    pub(super) fn input_gradient(&self) -> Probe<'_> {
        let (hidden, width) = (self.hidden, self.width);
        let amount = 2 * self.threads * TOKENS * hidden * width;
        let job = move |i: usize, out: &mut Vec<f32>| {
            let first = i % (ROUND / TOKENS) * TOKENS;
            let grad = MatRef::new(&self.grads[first * 2 * width..], TOKENS, width, 2 * width);
            let weight = PackedRef::new(&self.weight, width, hidden);
            let out = MatMut::new(&mut out[..TOKENS * hidden], TOKENS, hidden);
            self.kernels.float_product(grad, weight, out, false);
        };
        (amount as f64, self.passes(TOKENS * hidden, job))
    }

    /// The gradient of weights: some rows for each thread, from columns of the gradient.
    pub(super) fn weight_gradient(&self) -> Probe<'_> {
        let input = PackedRef::new(&self.input, ROUND, self.hidden);
        self.weight_gradient_by(move |grads, out| {
            self.kernels.float_product(grads, input, out, false);
        })
    }

    /// The same in fixed point, of three digits.
    pub(super) fn fixed_weight_gradient(&self) -> Probe<'_> {
        let acts = PackedActs::new(&self.acts, &self.scales, self.hidden);
        self.weight_gradient_by(move |grads, out| {
            self.kernels.fixed_product(Digits::Three, grads, acts, out, false);
        })
    }

    fn weight_gradient_by<'p>(
        &'p self,
        product: impl Fn(MatRef<'_>, MatMut<'_, f32>) + Copy + Sync + 'p,
    ) -> Probe<'p> {
        let (hidden, width) = (self.hidden, 2 * self.width);
        let rows = ROWS.min(width);
        let amount = 2 * self.threads * rows * hidden * ROUND;
        let job = move |i: usize, out: &mut Vec<f32>| {
            let first = i % (width / rows) * rows;
            let grads = MatRef::new(&self.grads, ROUND, width, width).t();
            let out = MatMut::new(&mut out[..rows * hidden], rows, hidden);
            product(grads.slice_rows(first, first + rows), out);
        };
        (amount as f64, self.passes(rows * hidden, job))
    }

    /// Passes of one job for each thread, with room for `out` elements.
    fn passes<'p>(
        &'p self,
        out: usize,
        job: impl Fn(usize, &mut Vec<f32>) + Copy + Sync + 'p,
    ) -> Box<dyn Fn(usize) -> f64 + 'p> {
        let scratch = move || vec![0.0; out];
        Box::new(move |passes| share_out(self.threads, self.threads * passes, scratch, job))
    }
}

/// A right operand `[rows, cols]`.
fn packed(kernels: Kernels, rows: usize, cols: usize) -> Vec<Unit> {
    let data = vec![0.01f32; PACK_DEPTH.min(rows) * cols];
    let mut out = vec![Unit::default(); packed_len(rows, cols)];
    for (i, out) in out.chunks_mut(packed_len(PACK_DEPTH, cols)).enumerate() {
        let rows = PACK_DEPTH.min(rows - i * PACK_DEPTH);
        kernels.pack_block(PackSource::Floats(MatRef::new(&data, rows, cols, cols)), out);
    }
    out
}

/// `[ROUND, cols]` of some activations.
fn packed_acts(kernels: Kernels, cols: usize) -> Vec<Line> {
    let mut x = QuantizedTokens::default();
    x.resize(FIXED_DEPTH, cols);
    let mut out = vec![Line::default(); kernels.packed_acts_len(ROUND, cols)];
    for block in out.chunks_mut(kernels.packed_acts_len(FIXED_DEPTH, cols)) {
        kernels.pack_acts(x.view(), 0, block);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_product_can_be_measured() {
        // Fewer rows than a task has, and no whole blocks.
        let narrow = ModelConfig { intermediate_size: 40, ..ModelConfig::tiny() };
        for config in [ModelConfig::tiny(), narrow] {
            let products = FloatProducts::new(Kernels::detect(), 2, &config);
            for (amount, probe) in [
                products.peak(),
                products.input_gradient(),
                products.weight_gradient(),
                products.fixed_weight_gradient(),
            ] {
                assert!(amount > 0.0 && probe(3) > 0.0);
            }
        }
    }
}

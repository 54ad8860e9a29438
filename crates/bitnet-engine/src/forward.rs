//! The forward pass of some tokens. Its operations and their order are those of
//! the training forward: the results have the same bits.

use bitnet_core::names::Linear;
use bitnet_core::rope;
use bitnet_core::{Activation, ModelConfig, WeightQuantizer};
use bitnet_kernels::{Kernels, MatMut, QuantizedTokens, TokensRef};

use crate::cache::{Attention, Heads, KvCache, Place};
use crate::model::{Inner, Layer, LinearRef};
use crate::parallel::{Divide, Rows, RowsMut, Split, divide};

/// A value inside the forward pass, as [`crate::Session::trace`] shows it.
/// Matrices are row-major, a row a token.
#[derive(Debug, Clone, Copy)]
pub enum TracePoint<'a> {
    /// The embedded tokens, `[T, D]`.
    Embedding {
        /// The residual stream before the first block.
        x: &'a [f32],
    },
    /// A linear layer, in the order they run.
    Linear {
        /// The block.
        layer: usize,
        /// The layer in it.
        linear: Linear,
        /// `[T, in]`, before activations are quantised.
        input: &'a [f32],
        /// `[T, out]`, before rotation and activation.
        output: &'a [f32],
        /// T.
        tokens: usize,
    },
    /// The residual stream after a block, `[T, D]`.
    Block {
        /// The block.
        layer: usize,
        /// The residual stream.
        x: &'a [f32],
    },
    /// The input of the head, `[T, D]`.
    Final {
        /// The residual stream after the last norm.
        x: &'a [f32],
    },
}

/// What a trace calls.
pub(crate) type Hook<'h> = &'h mut (dyn FnMut(TracePoint<'_>) + Send);

/// The buffers of a pass. They grow to the largest chunk seen and stay.
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    /// Residual stream, `[T, D]`.
    x: Vec<f32>,
    /// Normed input of the linear layers; after a pass the head's, `[T, D]`.
    pub(crate) h: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    /// Attention output, `[T, H·C]`, and what its norm makes of it.
    attention: Vec<f32>,
    attention_normed: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    /// Gated activation, `[T, F]`, and what its norm makes of it. A ternary model
    /// with that norm makes both at once and needs no room for the first.
    gated: Vec<f32>,
    gated_normed: Vec<f32>,
    /// Output of the projections back to the residual stream, `[T, D]`.
    projected: Vec<f32>,
    quantized_h: QuantizedTokens,
    quantized_attention: QuantizedTokens,
    quantized_gated: QuantizedTokens,
    /// `[T, C/2]`.
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// A buffer of scores for each part of the attention.
    scores: Vec<f32>,
}

impl Buffers {
    fn resize(&mut self, tokens: usize, config: &ModelConfig, scores: usize) {
        let (d, f) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (config.query_size(), config.key_value_size());
        for (buffer, width) in [
            (&mut self.x, d),
            (&mut self.h, d),
            (&mut self.q, q),
            (&mut self.k, kv),
            (&mut self.v, kv),
            (&mut self.attention, q),
            (&mut self.gate, f),
            (&mut self.up, f),
            (&mut self.projected, d),
            (&mut self.cos, config.head_dim() / 2),
            (&mut self.sin, config.head_dim() / 2),
        ] {
            buffer.resize(tokens * width, 0.0);
        }
        if config.sub_norms {
            self.attention_normed.resize(tokens * q, 0.0);
            self.gated_normed.resize(tokens * f, 0.0);
        }
        if !config.sub_norms || config.weight_quantizer == WeightQuantizer::None {
            self.gated.resize(tokens * f, 0.0);
        }
        if config.weight_quantizer == WeightQuantizer::Ternary {
            self.quantized_h.resize(tokens, d);
            self.quantized_attention.resize(tokens, q);
            self.quantized_gated.resize(tokens, f);
        }
        if self.scores.len() < scores {
            // Zeros that the system provides page by page as they are written.
            self.scores = vec![0.0; scores];
        }
    }
}

/// A pass over `tokens` at their `places`, all checked.
pub(crate) struct Pass<'a> {
    pub(crate) model: &'a Inner,
    pub(crate) kernels: Kernels,
    pub(crate) split: Split,
    pub(crate) heads: Heads,
    /// Elements of all score buffers together.
    pub(crate) scores: usize,
    pub(crate) frequencies: &'a [f32],
    pub(crate) places: &'a [Place],
    pub(crate) tokens: &'a [u32],
}

impl Pass<'_> {
    /// Runs every block; leaves the head's input of all tokens in `b.h` where
    /// `normed` asks for it.
    pub(crate) fn run(
        &self,
        caches: &mut [KvCache],
        b: &mut Buffers,
        normed: bool,
        mut hook: Option<Hook<'_>>,
    ) {
        let weights = &self.model.weights;
        b.resize(self.tokens.len(), &weights.config, self.scores);
        self.embed(b);
        trace(&mut hook, || TracePoint::Embedding { x: &b.x });
        for (i, layer) in weights.layers.iter().enumerate() {
            self.attention(i, layer, caches, b, &mut hook);
            self.feed_forward(i, layer, b, &mut hook);
            trace(&mut hook, || TracePoint::Block { layer: i, x: &b.x });
        }
        if normed {
            self.norm(&b.x, &weights.final_norm, &mut b.h, None);
            trace(&mut hook, || TracePoint::Final { x: &b.h });
        }
    }

    /// Looks the tokens up and makes the rotations of their positions.
    fn embed(&self, b: &mut Buffers) {
        let config = &self.model.weights.config;
        let table = self.model.dense(&self.model.weights.embedding);
        let half = config.head_dim() / 2;
        let (cos, sin) = (b.cos.chunks_exact_mut(half), b.sin.chunks_exact_mut(half));
        let rows = b.x.chunks_exact_mut(config.hidden_size).zip(cos).zip(sin);
        for (t, ((x, cos), sin)) in rows.enumerate() {
            table.read_row(self.tokens[t] as usize, x);
            rope::cos_sin(self.places[t].position, self.frequencies, cos, sin);
        }
    }

    fn attention(
        &self,
        i: usize,
        layer: &Layer,
        caches: &mut [KvCache],
        b: &mut Buffers,
        hook: &mut Option<Hook<'_>>,
    ) {
        self.norm(&b.x, &layer.attention_norm, &mut b.h, self.quantized(&mut b.quantized_h));
        let input = Input { float: &b.h, quantized: b.quantized_h.view() };
        let [q, k, v] =
            [Linear::Q, Linear::K, Linear::V].map(|l| self.model.linear_for(self.kernels, i, l));
        let bytes = (q.bytes() + k.bytes() + v.bytes()) * self.tokens.len();
        let parts = self.split.parts(bytes);
        let (parts_q, parts_k, parts_v) = share(parts, [q.bytes(), k.bytes(), v.bytes()]);
        let (q, k, v) = (
            self.product(q, input, &mut b.q),
            self.product(k, input, &mut b.k),
            self.product(v, input, &mut b.v),
        );
        if parts == 1 {
            q.run_all();
            k.run_all();
            v.run_all();
        } else {
            rayon::join(|| q.run(parts_q), || rayon::join(|| k.run(parts_k), || v.run(parts_v)));
        }
        self.trace_linear(hook, i, Linear::Q, &b.h, &b.q);
        self.trace_linear(hook, i, Linear::K, &b.h, &b.k);
        self.trace_linear(hook, i, Linear::V, &b.h, &b.v);
        self.rotate(b);
        let attention = Attention {
            kernels: self.kernels,
            split: self.split,
            heads: self.heads,
            layer: i,
            places: self.places,
            q: &b.q,
            k: &b.k,
            v: &b.v,
        };
        attention.run(caches, &mut b.scores, &mut b.attention);
        let quantized = self.quantized(&mut b.quantized_attention);
        let float = match &layer.attention_sub_norm {
            Some(weight) => {
                self.norm(&b.attention, weight, &mut b.attention_normed, quantized);
                &b.attention_normed
            }
            None => {
                self.quantize(&b.attention, self.model.weights.config.query_size(), quantized);
                &b.attention
            }
        };
        let input = Input { float, quantized: b.quantized_attention.view() };
        self.project(i, Linear::O, input, &mut b.projected, hook);
        self.add(&mut b.x, &b.projected);
    }

    fn feed_forward(&self, i: usize, layer: &Layer, b: &mut Buffers, hook: &mut Option<Hook<'_>>) {
        self.norm(&b.x, &layer.ffn_norm, &mut b.h, self.quantized(&mut b.quantized_h));
        let input = Input { float: &b.h, quantized: b.quantized_h.view() };
        let [gate, up] =
            [Linear::Gate, Linear::Up].map(|l| self.model.linear_for(self.kernels, i, l));
        let parts = self.split.parts((gate.bytes() + up.bytes()) * self.tokens.len());
        let gate = self.product(gate, input, &mut b.gate);
        let up = self.product(up, input, &mut b.up);
        if parts == 1 {
            gate.run_all();
            up.run_all();
        } else {
            rayon::join(|| gate.run(parts / 2), || up.run(parts - parts / 2));
        }
        self.trace_linear(hook, i, Linear::Gate, &b.h, &b.gate);
        self.trace_linear(hook, i, Linear::Up, &b.h, &b.up);
        let quantized = self.quantized(&mut b.quantized_gated);
        let float = match (&layer.ffn_sub_norm, quantized) {
            (Some(weight), Some(q)) => {
                self.gated_norm(&b.gate, &b.up, weight, &mut b.gated_normed, q);
                &b.gated_normed
            }
            (Some(weight), None) => {
                self.activate(&b.gate, &b.up, &mut b.gated);
                self.norm(&b.gated, weight, &mut b.gated_normed, None);
                &b.gated_normed
            }
            (None, quantized) => {
                self.activate(&b.gate, &b.up, &mut b.gated);
                self.quantize(&b.gated, self.model.weights.config.intermediate_size, quantized);
                &b.gated
            }
        };
        let input = Input { float, quantized: b.quantized_gated.view() };
        self.project(i, Linear::Down, input, &mut b.projected, hook);
        self.add(&mut b.x, &b.projected);
    }

    /// A linear layer that stands alone.
    fn project(
        &self,
        layer: usize,
        linear: Linear,
        input: Input<'_>,
        out: &mut [f32],
        hook: &mut Option<Hook<'_>>,
    ) {
        let w = self.model.linear_for(self.kernels, layer, linear);
        let parts = self.split.parts(w.bytes() * self.tokens.len());
        self.product(w, input, out).run(parts);
        self.trace_linear(hook, layer, linear, input.float, out);
    }

    fn product<'p>(
        &self,
        weight: LinearRef<'p>,
        input: Input<'p>,
        out: &'p mut [f32],
    ) -> Product<'p> {
        let out = MatMut::new(out, self.tokens.len(), weight.out_features());
        Product { kernels: self.kernels, weight, input, out }
    }

    /// The integers of a ternary model; a float twin has none.
    fn quantized<'q>(&self, q: &'q mut QuantizedTokens) -> Option<&'q mut QuantizedTokens> {
        let ternary = self.model.weights.config.weight_quantizer == WeightQuantizer::Ternary;
        ternary.then_some(q)
    }

    /// RMSNorm of every token, then its integers.
    fn norm(&self, x: &[f32], weight: &[f32], out: &mut [f32], q: Option<&mut QuantizedTokens>) {
        let (kernels, eps) = (self.kernels, self.model.weights.config.rms_norm_eps);
        let width = weight.len();
        let item = (Rows(x, width), RowsMut(out, width), q.map(quantized_rows));
        self.split.rows(x.len() * 16, self.tokens.len(), item, &|_, (x, out, q)| {
            let rows = x.iter().zip(out.iter());
            match q {
                None => rows.for_each(|(x, out)| {
                    kernels.rms_norm(x, weight, eps, out);
                }),
                Some((q, sums, scales)) => {
                    let quantized = q.iter().zip(sums.0).zip(scales.0);
                    for ((x, out), ((q, sum), scale)) in rows.zip(quantized) {
                        (*scale, *sum) = kernels.rms_norm_quantize(x, weight, eps, out, q);
                    }
                }
            }
        });
    }

    /// The integers of every token.
    fn quantize(&self, x: &[f32], width: usize, q: Option<&mut QuantizedTokens>) {
        let Some(q) = q else { return };
        let kernels = self.kernels;
        let item = (Rows(x, width), quantized_rows(q));
        self.split.rows(x.len() * 8, self.tokens.len(), item, &|_, (x, (q, sums, scales))| {
            for ((x, q), (sum, scale)) in
                x.iter().zip(q.iter()).zip(sums.0.iter_mut().zip(scales.0))
            {
                (*scale, *sum) = kernels.quantize(x, q);
            }
        });
    }

    fn rotate(&self, b: &mut Buffers) {
        let (kernels, Heads { queries, key_values, dim, .. }) = (self.kernels, self.heads);
        let item = (
            RowsMut(&mut b.q[..], queries * dim),
            RowsMut(&mut b.k[..], key_values * dim),
            Rows(&b.cos, dim / 2),
            Rows(&b.sin, dim / 2),
        );
        let bytes = (queries + key_values) * dim * 8 * self.tokens.len();
        self.split.rows(bytes, self.tokens.len(), item, &|_, (q, k, cos, sin)| {
            for (((q, k), cos), sin) in q.iter().zip(k.iter()).zip(cos.iter()).zip(sin.iter()) {
                for head in q.chunks_exact_mut(dim).chain(k.chunks_exact_mut(dim)) {
                    kernels.rotate(head, cos, sin);
                }
            }
        });
    }

    fn activate(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        let (kernels, width) = (self.kernels, self.model.weights.config.intermediate_size);
        let act = self.model.weights.config.hidden_act;
        let item = (Rows(gate, width), Rows(up, width), RowsMut(out, width));
        self.split.rows(
            gate.len() * 12,
            self.tokens.len(),
            item,
            &|_, (gate, up, out)| match act {
                Activation::Relu2 => kernels.relu2_mul(gate.0, up.0, out.0),
                Activation::Silu => kernels.silu_mul(gate.0, up.0, out.0),
            },
        );
    }

    /// The gated activation of every token, its norm and its integers.
    fn gated_norm(
        &self,
        gate: &[f32],
        up: &[f32],
        weight: &[f32],
        out: &mut [f32],
        q: &mut QuantizedTokens,
    ) {
        let (kernels, width) = (self.kernels, weight.len());
        let ModelConfig { hidden_act, rms_norm_eps, .. } = self.model.weights.config;
        let item = (Rows(gate, width), Rows(up, width), RowsMut(out, width), quantized_rows(q));
        let tokens = self.tokens.len();
        self.split.rows(gate.len() * 24, tokens, item, &|_, (gate, up, out, (q, sums, scales))| {
            let rows = gate.iter().zip(up.iter()).zip(out.iter());
            let quantized = q.iter().zip(sums.0).zip(scales.0);
            for (((gate, up), out), ((q, sum), scale)) in rows.zip(quantized) {
                let eps = rms_norm_eps;
                (*scale, *sum) =
                    kernels.gated_norm_quantize(hidden_act, gate, up, weight, eps, out, q);
            }
        });
    }

    fn add(&self, x: &mut [f32], y: &[f32]) {
        let (kernels, width) = (self.kernels, self.model.weights.config.hidden_size);
        let item = (RowsMut(x, width), Rows(y, width));
        self.split.rows(y.len() * 8, self.tokens.len(), item, &|_, (x, y)| {
            kernels.add_assign(x.0, y.0);
        });
    }

    fn trace_linear(
        &self,
        hook: &mut Option<Hook<'_>>,
        layer: usize,
        linear: Linear,
        input: &[f32],
        output: &[f32],
    ) {
        let tokens = self.tokens.len();
        trace(hook, || TracePoint::Linear { layer, linear, input, output, tokens });
    }
}

/// Calls the hook where there is one.
fn trace<'t>(hook: &mut Option<Hook<'_>>, point: impl FnOnce() -> TracePoint<'t>) {
    if let Some(hook) = hook {
        hook(point());
    }
}

type QuantizedRows<'a> = (RowsMut<'a, i8>, RowsMut<'a, i32>, RowsMut<'a, f32>);

fn quantized_rows(q: &mut QuantizedTokens) -> QuantizedRows<'_> {
    (RowsMut(&mut q.q, q.stride), RowsMut(&mut q.sums, 1), RowsMut(&mut q.scales, 1))
}

/// Shares the parts of a region between its products by their bytes.
fn share(parts: usize, bytes: [usize; 3]) -> (usize, usize, usize) {
    let total = bytes.iter().sum::<usize>().max(1);
    let [a, b, c] = bytes.map(|bytes| (parts * bytes / total).max(1));
    (a, b, c)
}

/// Logits of tokens' final hidden states: `out[t] = head · h[t]`.
///
/// # Shapes
/// `h` is `[T, D]`, `out` is `[T, V]`.
pub(crate) fn logits(kernels: Kernels, split: Split, model: &Inner, h: &[f32], out: &mut [f32]) {
    let config = &model.weights.config;
    let weight = LinearRef::Dense { rows: model.head(), cols: config.hidden_size };
    let tokens = h.len() / config.hidden_size;
    let quantized = TokensRef { q: &[], stride: 0, sums: &[], scales: &[] };
    let out = MatMut::new(out, tokens, config.vocab_size);
    let product = Product { kernels, weight, input: Input { float: h, quantized }, out };
    product.run(split.parts(weight.bytes() * tokens));
}

/// The input of a linear layer in both forms; a layer reads the one it needs.
#[derive(Clone, Copy)]
struct Input<'a> {
    /// `[T, in]`.
    float: &'a [f32],
    /// Empty in a float twin.
    quantized: TokensRef<'a>,
}

/// A product of some rows of a weight with all tokens.
struct Product<'a> {
    kernels: Kernels,
    weight: LinearRef<'a>,
    input: Input<'a>,
    /// `[T, rows]`.
    out: MatMut<'a, f32>,
}

/// Rows of a weight that stay together: whole vectors of outputs.
const ROW_BLOCK: usize = 16;

impl Divide for Product<'_> {
    /// Divides by blocks of rows, not single ones.
    fn divide(self, blocks: usize, _: usize) -> (Self, Self) {
        let mid = blocks * ROW_BLOCK;
        let (out, out_rest) = self.out.split_cols(mid);
        let rest = self.weight.rows(mid, self.weight.out_features());
        let weight = self.weight.rows(0, mid);
        (Self { weight, out, ..self }, Self { weight: rest, out: out_rest, ..self })
    }
}

impl Product<'_> {
    /// Computes it in at most `parts` parts.
    fn run(self, parts: usize) {
        let blocks = self.weight.out_features().div_ceil(ROW_BLOCK);
        divide(parts, 0, blocks, self, &|_, product: Self| product.run_all());
    }

    fn run_all(self) {
        let (kernels, input) = (self.kernels, self.input);
        match self.weight {
            LinearRef::Ternary(w) => kernels.ternary_matmul(w, input.quantized, self.out),
            LinearRef::Dense { rows, cols } => {
                kernels.dense_matmul(rows, input.float, cols, self.out);
            }
        }
    }
}

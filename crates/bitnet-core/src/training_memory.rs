//! What memory a training run will take, before it runs: a ledger of what the code of
//! a step allocates and frees, walked through in the code's own order.
//!
//! It describes `bitnet-train` on the CPU device and stands here, in plain arithmetic,
//! because `bitnet-train --dry-run` and `bitnet-eval plan` both ask for it, and the
//! second knows no training code. Every line stands for an allocation in bitnet-train's
//! `ops`, `optim` or `recompute`; who changes what an operation saves for its backward
//! pass changes its line here. `experiments/0005-memory` compares the result with
//! measured peaks.

mod fused;
mod teacher;

use std::collections::BTreeMap;

use serde::Serialize;

use crate::names::{Linear, Norm};
use crate::quantizer::{ActivationQuantizer, Granularity};
use crate::{Dtype, Layout, ModelConfig, ParameterCount, WeightQuantizer};

pub use teacher::{RelationShape, TeacherShape};

/// What of a training run its memory depends on.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainingShape {
    /// The model.
    pub model: ModelConfig,
    /// Sequences that go through the model at once, B.
    pub micro_batch: usize,
    /// Tokens of a sequence, T.
    pub sequence: usize,
    /// Micro-steps of a step.
    pub micro_steps: usize,
    /// Whether the blocks are run again in the backward pass.
    pub recompute: bool,
    /// Whether the matrices are Muon's, with one moment instead of two.
    pub muon: bool,
    /// Whether AdamW's moments are kept as bytes.
    pub byte_moments: bool,
    /// Whether quantisation is blended in: products are of floats then.
    pub blends: bool,
    /// The teacher that is followed, if there is one.
    pub teacher: Option<TeacherShape>,
}

/// How a linear layer multiplies: what it saves depends on it.
#[derive(Debug, Clone, Copy, PartialEq)]
struct LinearForm {
    /// Nothing is quantised.
    float: bool,
    /// Integers are multiplied and one scale applied.
    integer: bool,
    /// Its weights are quantised.
    weights: bool,
    /// Its input is saved as it is.
    keeps_input: bool,
}

/// Bytes by what they are for, at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Parts {
    /// Master weights, f32.
    pub weights: u64,
    /// AdamW's moments, Muon's momentum and its products.
    pub optimizer: u64,
    /// Gradients of parameters: of a backward pass and their sum.
    pub gradients: u64,
    /// What the forward pass leaves to the backward pass of a micro-batch, and the
    /// gradients of it.
    pub activations: u64,
    /// Embedding and head as stored, logits, and their gradients.
    pub head: u64,
    /// A checkpoint's copy of the weights.
    pub checkpoint: u64,
    /// A teacher: its weights, its predictions and the relations of both models.
    pub teacher: u64,
}

impl Parts {
    /// All of it.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.weights
            + self.optimizer
            + self.gradients
            + self.activations
            + self.head
            + self.checkpoint
            + self.teacher
    }
}

/// Live bytes and their peak.
#[derive(Debug, Default)]
struct Ledger {
    live: Parts,
    peak: Parts,
    moment: &'static str,
    peak_moment: &'static str,
    /// Buffers that wait to be used again, by size: they stay live.
    waiting: BTreeMap<u64, (Part, usize)>,
}

type Part = fn(&mut Parts) -> &mut u64;

const WEIGHTS: Part = |p| &mut p.weights;
const OPTIMIZER: Part = |p| &mut p.optimizer;
const GRADIENTS: Part = |p| &mut p.gradients;
const ACTIVATIONS: Part = |p| &mut p.activations;
const HEAD: Part = |p| &mut p.head;
const CHECKPOINT: Part = |p| &mut p.checkpoint;
const TEACHER: Part = |p| &mut p.teacher;

impl Ledger {
    fn hold(&mut self, part: Part, bytes: u64) {
        *part(&mut self.live) += bytes;
        if self.live.total() > self.peak.total() {
            (self.peak, self.peak_moment) = (self.live, self.moment);
        }
    }

    fn free(&mut self, part: Part, bytes: u64) {
        *part(&mut self.live) -= bytes;
    }

    /// Takes a buffer that waits, or makes one.
    fn take(&mut self, part: Part, bytes: u64) {
        match self.waiting.get_mut(&bytes) {
            Some((of, count)) if *count > 0 => {
                *count -= 1;
                let of = *of;
                *of(&mut self.live) -= bytes;
                *part(&mut self.live) += bytes;
            }
            _ => self.hold(part, bytes),
        }
    }

    /// Lets a buffer wait to be used again.
    fn give(&mut self, part: Part, bytes: u64) {
        let (of, count) = self.waiting.entry(bytes).or_insert((part, 0));
        *part(&mut self.live) -= bytes;
        *of(&mut self.live) += bytes;
        *count += 1;
    }

    fn briefly(&mut self, part: Part, bytes: u64) {
        self.hold(part, bytes);
        self.free(part, bytes);
    }
}

/// The peak of a run's own tensors: what is live when it is reached, and the
/// phase of the run in which that is.
#[must_use]
pub fn tensors(run: &TrainingShape) -> (Parts, &'static str) {
    let walk = Walk::new(run);
    let mut ledger = Ledger::default();
    walk.run(&mut ledger);
    (ledger.peak, ledger.peak_moment)
}

/// Bytes of an optimizer's state: AdamW's two moments of every parameter, in f32 or, but
/// for the norms', as bytes with two scales for every 64, or Muon's one f32 of every element
/// of a linear layer.
#[must_use]
pub fn optimizer_bytes(count: &ParameterCount, muon: bool, byte_moments: bool) -> u64 {
    let linear = if muon { 0 } else { count.linear };
    let large = count.embedding + count.head + linear;
    let moments = if byte_moments { 2 * large + 8 * large.div_ceil(64) } else { 2 * F32 * large };
    let muon = if muon { F32 * count.linear } else { 0 };
    moments + 2 * F32 * count.norms + muon
}

/// The sizes of a run, in elements.
struct Walk<'c> {
    run: &'c TrainingShape,
    model: &'c ModelConfig,
    /// Tokens N of a micro-batch.
    n: u64,
    d: u64,
    f: u64,
    q: u64,
    kv: u64,
    /// Elements of the embedding, V·D.
    table: u64,
    vocab: u64,
}

/// Bytes of f32.
const F32: u64 = 4;

impl<'c> Walk<'c> {
    fn new(run: &'c TrainingShape) -> Self {
        let model = &run.model;
        let (d, vocab) = (model.hidden_size as u64, model.vocab_size as u64);
        Self {
            run,
            model,
            n: (run.micro_batch * run.sequence) as u64,
            d,
            f: model.intermediate_size as u64,
            q: model.query_size() as u64,
            kv: model.key_value_size() as u64,
            table: vocab * d,
            vocab,
        }
    }

    /// How a linear layer multiplies.
    fn form(&self, which: Linear) -> LinearForm {
        let scheme = self.model.weight_scheme();
        let weights = scheme.quantizer != WeightQuantizer::None;
        let activations = self.model.activations(which);
        let keeps_input = activations == ActivationQuantizer::None;
        LinearForm {
            float: !weights && keeps_input,
            // While it is blended in, the quantised form is one of floats.
            integer: !self.run.blends
                && weights
                && scheme.granularity == Granularity::Tensor
                && activations == ActivationQuantizer::Int8,
            weights,
            keeps_input,
        }
    }

    /// Whether a linear layer saves its input as it is.
    fn keeps_input(&self, which: Linear) -> bool {
        self.form(which).keeps_input
    }

    /// A matrix of activations `[N, width]`.
    fn rows(&self, width: u64) -> u64 {
        F32 * self.n * width
    }

    /// The stored form of embedding or head; none of its own where it is f32.
    fn stored(&self) -> u64 {
        if self.model.embedding_dtype == Dtype::F32 { 0 } else { F32 * self.table }
    }

    fn run(&self, l: &mut Ledger) {
        let count = self.model.parameter_count();
        let weights = F32 * count.total();
        l.moment = "start";
        l.hold(WEIGHTS, weights);
        let muon = self.run.muon;
        l.hold(OPTIMIZER, optimizer_bytes(&count, muon, self.run.byte_moments));
        if let Some(teacher) = &self.run.teacher {
            l.hold(TEACHER, F32 * teacher.model.parameter_count().total());
        }

        l.moment = "evaluation";
        self.evaluation(l);
        l.moment = "checkpoint";
        l.briefly(CHECKPOINT, weights);

        // In the second step the buffers of the first one wait.
        for _ in 0..2 {
            self.micro_step(l, true);
            if self.run.micro_steps > 1 {
                self.micro_step(l, false);
            }
            l.moment = "update";
            if muon {
                l.briefly(OPTIMIZER, self.muon());
            }
            l.free(GRADIENTS, weights);
        }
    }

    /// Muon's product, Gram matrix and polynomial of the matrix that needs most.
    fn muon(&self) -> u64 {
        let bytes = |linear: &Linear| {
            let [rows, cols] = linear.shape(self.model).map(|x| x as u64);
            let small = rows.min(cols);
            F32 * (rows * cols + 2 * small * small)
        };
        Linear::ALL.iter().map(bytes).max().unwrap_or(0)
    }

    fn evaluation(&self, l: &mut Ledger) {
        l.hold(HEAD, self.stored());
        l.hold(ACTIVATIONS, self.rows(self.d));
        self.block_forward(l, false);
        l.free(ACTIVATIONS, self.rows(self.d));
        self.loss(l, false);
        l.free(ACTIVATIONS, self.rows(self.d));
        l.free(HEAD, self.stored());
    }

    /// Leaves the sum of gradients behind: its own where it is the `first`, added
    /// to those of the micro-steps before where it is not.
    fn micro_step(&self, l: &mut Ledger, first: bool) {
        if self.run.recompute {
            self.recomputed(l, first);
        } else {
            self.ordinary(l, first);
        }
    }

    fn ordinary(&self, l: &mut Ledger, first: bool) {
        let (hidden, layers) = (self.rows(self.d), self.model.num_hidden_layers);
        let count = self.model.parameter_count();
        let watched = self.watched();
        self.teacher_forward(l);
        l.moment = "forward";
        // The stored head lives until the loss, the stored embedding until the
        // look-up.
        l.hold(HEAD, self.stored());
        if !self.model.tie_word_embeddings {
            l.briefly(HEAD, self.stored());
        }
        l.hold(ACTIVATIONS, hidden);
        for layer in 0..layers {
            match watched == Some(layer) {
                true => self.separate_forward(l, true),
                false => self.block_forward(l, true),
            }
        }
        l.moment = "loss";
        self.loss(l, true);
        l.free(HEAD, self.stored());
        self.relations(l);
        l.moment = "backward";
        self.relations_backward(l);
        self.loss_backward(l);
        for layer in (0..layers).rev() {
            match watched == Some(layer) {
                true => self.watched_backward(l),
                false => self.block_backward(l),
            }
        }
        // The look-up's gradient is a whole table; a shared head's is added to it.
        let table = F32 * self.table;
        l.hold(GRADIENTS, table);
        l.free(ACTIVATIONS, hidden);
        l.briefly(HEAD, table);
        // The head's gradient becomes that of a parameter of its own, or is gone.
        l.free(HEAD, table);
        if !self.model.tie_word_embeddings {
            l.hold(GRADIENTS, table);
        }
        l.hold(GRADIENTS, F32 * count.norms);
        if !first {
            l.free(GRADIENTS, F32 * count.total());
        }
    }

    fn recomputed(&self, l: &mut Ledger, first: bool) {
        let (hidden, layers) = (self.rows(self.d), self.model.num_hidden_layers as u64);
        let count = self.model.parameter_count();
        let (table, linear) = (F32 * self.table, F32 * count.linear / layers.max(1));
        self.teacher_forward(l);
        l.moment = "forward";
        l.briefly(HEAD, self.stored());
        l.hold(ACTIVATIONS, hidden);
        for _ in 0..layers {
            // The input stays, the output is the next one's.
            self.block_forward(l, false);
        }
        l.moment = "loss";
        // With f32 a shared head is the embedding itself.
        l.hold(HEAD, self.stored());
        self.loss(l, true);
        self.loss_backward(l);
        l.free(HEAD, self.stored());
        if !self.model.tie_word_embeddings {
            l.free(HEAD, table);
            if first {
                l.hold(GRADIENTS, table);
            }
        }
        l.moment = "backward";
        for _ in 0..layers {
            self.block_forward(l, true);
            // The output, multiplied in place, and the gradient of the sum.
            l.hold(ACTIVATIONS, hidden);
            l.free(ACTIVATIONS, hidden);
            l.free(ACTIVATIONS, hidden);
            self.block_backward(l);
            // Its input was one of those kept.
            if !first {
                l.free(GRADIENTS, linear);
            }
        }
        l.moment = "backward of the embedding";
        l.hold(HEAD, self.stored());
        l.hold(GRADIENTS, table);
        l.free(ACTIVATIONS, hidden);
        if self.model.tie_word_embeddings {
            // The stored table times the head's gradient, then the sum's gradient.
            l.briefly(HEAD, table);
            l.free(HEAD, table);
        }
        l.free(HEAD, self.stored());
        l.briefly(GRADIENTS, table);
        if !first {
            l.free(GRADIENTS, table);
        } else {
            l.hold(GRADIENTS, F32 * count.norms);
        }
    }

    /// One linear layer on an input that the caller holds; leaves its output.
    fn linear(&self, l: &mut Ledger, which: Linear, tracked: bool) {
        let [rows, _] = which.shape(self.model).map(|x| x as u64);
        let saved = self.saved_by(which);
        l.hold(ACTIVATIONS, saved);
        l.hold(ACTIVATIONS, self.rows(rows));
        if !tracked {
            l.free(ACTIVATIONS, saved);
        }
    }

    /// int8 activations and packed weights of a linear layer, or both as floats; the
    /// float twin saves its input as it is.
    fn saved_by(&self, which: Linear) -> u64 {
        let [rows, cols] = which.shape(self.model);
        let form = self.form(which);
        if form.float {
            return 0;
        }
        if !form.integer {
            let tokens = if form.keeps_input { 0 } else { self.rows(cols as u64) };
            return tokens + if form.weights { F32 * (rows * cols) as u64 } else { 0 };
        }
        // Integers padded for any layout, a scale and a sum for each token.
        let stride = Layout::ALL.iter().map(|l| l.padded_cols(cols)).max().unwrap_or(cols);
        let tokens = self.n * (stride as u64 + 8);
        tokens + (rows * Layout::P2.row_bytes(cols)) as u64
    }

    /// The gradients of input and weight of a linear layer, from that of its
    /// output, which the caller holds.
    fn linear_backward(&self, l: &mut Ledger, which: Linear) {
        let [rows, cols] = which.shape(self.model).map(|x| x as u64);
        let weight = F32 * rows * cols;
        let integers = self.form(which).integer;
        let quantised = if integers { weight } else { 0 };
        l.hold(ACTIVATIONS, quantised);
        l.hold(ACTIVATIONS, self.rows(cols));
        l.free(ACTIVATIONS, quantised);
        let quantised = if integers { self.rows(cols) } else { 0 };
        l.hold(ACTIVATIONS, quantised);
        l.hold(GRADIENTS, weight);
        l.free(ACTIVATIONS, quantised);
        l.free(ACTIVATIONS, self.saved_by(which));
    }

    /// What follows the attention or the gate: a norm, if there is one, and the
    /// projection of its `width` columns. Leaves the output and what is saved.
    fn projected(&self, l: &mut Ledger, which: Linear, width: u64, tracked: bool) {
        let normed = if self.model.sub_norms { self.rows(width) } else { 0 };
        l.hold(ACTIVATIONS, normed);
        if self.model.keeps(which) < 1.0 {
            // What is kept takes the place of all.
            l.briefly(ACTIVATIONS, self.rows(width));
        }
        self.linear(l, which, tracked);
        // The norm saves its input, the float projection its own.
        if !tracked {
            l.free(ACTIVATIONS, normed + self.rows(width));
            return;
        }
        let saved = self.projection_saved(which, width);
        l.free(ACTIVATIONS, normed + self.rows(width) - saved);
    }

    /// f32 that norm and projection save.
    fn projection_saved(&self, which: Linear, width: u64) -> u64 {
        let norm = u64::from(self.model.sub_norms);
        let linear = u64::from(self.keeps_input(which));
        self.rows(width) * (norm + linear)
    }

    /// The input `[N, D]` is held before; after it the output is too, and, where it
    /// is `tracked`, all that the block saves.
    fn block_forward(&self, l: &mut Ledger, tracked: bool) {
        if self.is_fused() {
            return self.fused_forward(l, tracked);
        }
        self.separate_forward(l, tracked);
    }

    /// A block as operations of their own.
    fn separate_forward(&self, l: &mut Ledger, tracked: bool) {
        let hidden = self.rows(self.d);
        let norms = Norm::of(self.model).len() as u64 * self.rows(1);
        if tracked {
            l.hold(ACTIVATIONS, norms);
        }
        // Attention: q, k and v are saved by it.
        l.hold(ACTIVATIONS, hidden);
        for which in [Linear::Q, Linear::K, Linear::V] {
            self.linear(l, which, tracked);
        }
        if !self.keeps_input(Linear::Q) || !tracked {
            l.free(ACTIVATIONS, hidden);
        }
        // The heads one by one, then together.
        l.hold(ACTIVATIONS, 2 * self.rows(self.q));
        l.free(ACTIVATIONS, self.rows(self.q));
        if !tracked {
            l.free(ACTIVATIONS, self.rows(self.q + 2 * self.kv));
        }
        // The sum with the residual stream takes the place of the output.
        self.projected(l, Linear::O, self.q, tracked);

        // Feed-forward: gate and up are saved by the gated activation.
        l.hold(ACTIVATIONS, hidden);
        for which in [Linear::Gate, Linear::Up] {
            self.linear(l, which, tracked);
        }
        if !self.keeps_input(Linear::Gate) || !tracked {
            l.free(ACTIVATIONS, hidden);
        }
        l.hold(ACTIVATIONS, self.rows(self.f));
        if !tracked {
            l.free(ACTIVATIONS, 2 * self.rows(self.f));
        }
        self.projected(l, Linear::Down, self.f, tracked);
        if !tracked {
            l.free(ACTIVATIONS, hidden);
        }
    }

    /// The reverse of [`Self::block_forward`]: the gradient of the output is held
    /// before, that of the input after it.
    fn block_backward(&self, l: &mut Ledger) {
        if self.is_fused() {
            return self.fused_backward(l);
        }
        self.separate_backward(l);
    }

    /// The reverse of [`Self::separate_forward`].
    fn separate_backward(&self, l: &mut Ledger) {
        let hidden = self.rows(self.d);
        let (gate, qkv) = (2 * self.rows(self.f), self.rows(self.q + 2 * self.kv));
        let input = if self.keeps_input(Linear::Q) { hidden } else { 0 };
        // The residual stream keeps the gradient that the branch takes, too.
        self.linear_backward(l, Linear::Down);
        self.projection_backward(l, Linear::Down, self.f);
        l.hold(ACTIVATIONS, gate);
        l.free(ACTIVATIONS, self.rows(self.f) + gate);
        for which in [Linear::Up, Linear::Gate] {
            self.linear_backward(l, which);
            l.free(ACTIVATIONS, self.rows(self.f));
        }
        // Both gradients of the normed input, added; the norm's; its saved input.
        l.free(ACTIVATIONS, hidden + input);
        l.briefly(ACTIVATIONS, hidden);
        l.free(ACTIVATIONS, 2 * hidden);

        self.linear_backward(l, Linear::O);
        self.projection_backward(l, Linear::O, self.q);
        l.hold(ACTIVATIONS, 2 * qkv);
        l.free(ACTIVATIONS, qkv + self.rows(self.q) + qkv);
        for (which, width) in [(Linear::V, self.kv), (Linear::K, self.kv), (Linear::Q, self.q)] {
            self.linear_backward(l, which);
            l.free(ACTIVATIONS, self.rows(width));
        }
        l.free(ACTIVATIONS, 2 * hidden + input);
        l.briefly(ACTIVATIONS, hidden);
        l.free(ACTIVATIONS, 2 * hidden);
        l.free(ACTIVATIONS, Norm::of(self.model).len() as u64 * self.rows(1));
    }

    /// The gradient of a projection's input becomes that of the norm's input; what
    /// both saved is freed.
    fn projection_backward(&self, l: &mut Ledger, which: Linear, width: u64) {
        if self.model.sub_norms {
            l.briefly(ACTIVATIONS, self.rows(width));
        }
        l.free(ACTIVATIONS, self.projection_saved(which, width));
    }

    /// The last norm and the cross-entropy, which computes its gradients at once;
    /// the stored head is held before. Leaves them and the last block's output.
    fn loss(&self, l: &mut Ledger, tracked: bool) {
        /// Tokens of a round of the cross-entropy.
        const ROUND: u64 = 576;
        let round = self.n.min(ROUND);
        let (table, hidden) = (F32 * self.table, self.rows(self.d));
        let turned = F32 * self.d * self.vocab.next_multiple_of(16);
        let logits = F32 * round * self.vocab;
        l.hold(ACTIVATIONS, hidden);
        l.take(HEAD, turned);
        if tracked {
            // Floats. With int8 gradients of inputs it is integers, which take less but in
            // the narrowest models.
            l.take(HEAD, table);
            // Its gradients, which wait for the backward pass.
            l.take(HEAD, hidden);
            l.take(HEAD, table);
        }
        l.take(HEAD, logits);
        if tracked {
            self.teacher_logits(l, round);
            l.take(HEAD, F32 * round * self.d);
            l.give(HEAD, F32 * round * self.d);
            l.give(HEAD, table);
        }
        l.give(HEAD, logits);
        l.give(HEAD, turned);
        l.free(ACTIVATIONS, hidden);
    }

    /// Both gradients are copied, times that of the loss; then the last norm's.
    fn loss_backward(&self, l: &mut Ledger) {
        let (hidden, table) = (self.rows(self.d), F32 * self.table);
        l.hold(HEAD, hidden + table);
        l.give(HEAD, hidden);
        l.give(HEAD, table);
        // The gradient of the last block's output takes that output's place.
        l.briefly(ACTIVATIONS, hidden);
        l.free(HEAD, hidden);
        self.teacher_done(l);
    }
}

#[cfg(test)]
mod tests;

//! How long a training token takes on the CPU: the operations of `bitnet-train`'s fused
//! step, each at the machine's rate for it.
//!
//! The linear layers run forward in int8 and their gradients in fixed point (a float twin's
//! in f32), the head in f32 but for what `int8_backward` makes integers. A few constants stand for what is not measured. They were chosen on the
//! profile of a step and the two speeds in `experiments/0010-training-speed`, and are the
//! same for every size of model.

use bitnet_core::names::Linear;
use bitnet_core::{ModelConfig, WeightQuantizer};
use serde::Serialize;

use super::config::Training;
use super::rates::{Rates, block_macs};
use super::speed::Shape;

/// What packing and moving its operands adds to a product, in columns of the model's
/// width: a product of a narrow model waits for them, one of a wide model does not.
const NARROW: f64 = 85.0;

/// The share of the attention kernel's rate that the forward pass reaches: sequences are
/// shorter than what is measured, and heads are gathered and rotated for it.
pub(super) const ATTENTION_FORWARD: f64 = 0.45;

/// The share of the rate of gradients of inputs at which attention's backward pass
/// multiplies: its matrices are as narrow as a head, and softmax runs between them.
pub(super) const ATTENTION_BACKWARD: f64 = 0.27;

/// Products of attention's backward pass (scores again, and the gradients of
/// probabilities, queries, keys and values) for every two of the forward pass.
const ATTENTION_PRODUCTS: f64 = 2.5;

/// Norms, quantisation, activation and rotation of a step, forward and backward, in
/// times of the forward pass.
pub(super) const ELEMENTWISE: f64 = 4.0;

/// The same of a logit: exponential, sum, gradient, in norms of an element.
const LOGIT: f64 = 4.0;

/// Bytes that quantising a weight and packing it for its gradients' products move, in
/// every micro-step.
const WEIGHT_BYTES: f64 = 16.0;

/// Bytes that adding up a gradient moves, in every micro-step of several.
const SUM_BYTES: f64 = 12.0;

/// Bytes of a parameter that AdamW and the norm of the gradient move in a step.
const OPTIMIZER_BYTES: f64 = 32.0;

/// What moments as bytes spare of them: neither those of norms nor Muon's are.
const SPARED_BYTES: f64 = 12.0;

/// Muon's Newton-Schulz steps.
const MUON_STEPS: f64 = 5.0;

/// How much longer a product takes in a step of a model than alone.
fn longer(config: &ModelConfig) -> f64 {
    1.0 + NARROW / config.hidden_size as f64
}

/// What a training token takes, by part, in seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct TrainingTime {
    /// Products of the linear layers forward, and again in the backward pass where they
    /// are.
    pub forward: f64,
    /// Gradients of the linear layers' inputs.
    pub input_gradients: f64,
    /// Gradients of their weights.
    pub weight_gradients: f64,
    /// The head, forward and backward, and the loss.
    pub head: f64,
    /// Attention, forward and backward.
    pub attention: f64,
    /// Norms, quantisation of activations, activation, rotation.
    pub elementwise: f64,
    /// Quantisation of weights and the optimizer: the step's share of a token.
    pub step: f64,
    /// How much longer products take than alone, as assumed in all that.
    #[serde(skip)]
    pub longer: f64,
}

impl TrainingTime {
    /// All of it.
    #[must_use]
    pub fn total(&self) -> f64 {
        self.parts().iter().map(|(_, seconds)| seconds).sum()
    }

    /// The parts by name.
    #[must_use]
    pub fn parts(&self) -> [(&'static str, f64); 7] {
        [
            ("forward", self.forward),
            ("inputs' gradients", self.input_gradients),
            ("weights' gradients", self.weight_gradients),
            ("head", self.head),
            ("attention", self.attention),
            ("elementwise", self.elementwise),
            ("optimizer", self.step),
        ]
    }

    /// That of a training token on a machine of these rates, with `micro_batch` sequences
    /// at once.
    #[must_use]
    pub fn of(shape: &Shape<'_>, training: &Training, micro_batch: usize, rates: &Rates) -> Self {
        let config = shape.config;
        let ternary = config.weight_quantizer != WeightQuantizer::None;
        let layers = config.num_hidden_layers as f64;
        let (hidden, vocab) = (config.hidden_size as f64, config.vocab_size as f64);
        let parameters = config.parameter_count();
        let linear = parameters.linear as f64;
        // A multiply-add is two operations.
        let longer = longer(config);
        let float = rates.input_gradient_gflop_per_second * 1e9 / 2.0;
        let inputs = float / longer;
        let weights = rates.weight_gradient_gflop_per_second * 1e9 / 2.0 / longer;
        let int8 = rates.linear.panel_gmac_per_second * 1e9 / longer;
        let again = if training.recompute { 1.0 } else { 0.0 };

        let forward = match ternary {
            true => {
                let gate_up = 2.0 * layers * hidden * config.intermediate_size as f64;
                let blocks = layers * block_macs(config, shape.linear);
                (blocks * (1.0 + again) + gate_up) / int8
            }
            false => linear * (1.0 + again) / inputs,
        };
        // A digit of a gradient is a product of bytes.
        let digits = training.digits.filter(|_| ternary).map(f64::from);
        let fixed = rates.fixed_weight_gradient_gflop_per_second * 1e9 / 2.0 / longer;
        let input_gradients = match digits {
            _ if ternary && training.int8_backward => linear / int8,
            Some(digits) => linear * digits / int8,
            None => linear / inputs,
        };
        let weight_gradients =
            digits.map_or(linear / weights, |digits| linear * digits / 3.0 / fixed);
        let softmax = LOGIT * vocab * rates.norm_panel_ns * 1e-9;
        // Two digits of the logits' gradient meet the head's rows as int8: two of three
        // products of bytes (of words it is one of two).
        let hidden_gradient = match ternary && training.int8_backward {
            true => 2.0 / 3.0 / fixed,
            false => 1.0 / inputs,
        };
        let head = vocab * hidden * (1.0 / inputs + hidden_gradient + 1.0 / weights) + softmax;
        // The mean token sees half of its sequence, in two products.
        let sequence = training.sequence as f64;
        let seen = layers * config.query_size() as f64 * (sequence + 1.0);
        let attend = rates.attention_panel_gmac_per_second * 1e9 * ATTENTION_FORWARD;
        let attention = seen * (1.0 + again) / attend
            + seen * ATTENTION_PRODUCTS / (float * ATTENTION_BACKWARD);
        let (norms, gates) = shape.elements();
        let elementwise = (norms * rates.norm_panel_ns + gates * rates.gate_panel_ns) * 1e-9;

        let (in_step, at_once) = (training.batch_tokens as f64, micro_batch as f64 * sequence);
        let all = parameters.total() as f64;
        let read = rates.read_at(4.0 * all) * 1e9;
        let sums = if at_once < in_step { SUM_BYTES * all } else { 0.0 };
        let micro_step = (WEIGHT_BYTES * linear + sums) / read / at_once;
        let of_muon = if training.muon { parameters.linear } else { 0 };
        let of_adamw = parameters.total() - parameters.norms - of_muon;
        let spared = if training.byte_moments { SPARED_BYTES * of_adamw as f64 } else { 0.0 };
        let moved = OPTIMIZER_BYTES * all - spared;
        let muon = if training.muon { newton_schulz_macs(config) / inputs } else { 0.0 };
        Self {
            forward,
            input_gradients,
            weight_gradients,
            head,
            attention,
            elementwise: elementwise * (ELEMENTWISE + again),
            longer,
            step: micro_step + (moved / read + muon) / in_step,
        }
    }
}

/// Multiply-adds of Muon's step for all matrices of the blocks: for `[n, k]`, n the
/// shorter, `X·Xᵀ`, its square, and the polynomial times X.
fn newton_schulz_macs(config: &ModelConfig) -> f64 {
    let macs = |linear: &Linear| {
        let [rows, cols] = linear.shape(config);
        let (n, k) = (rows.min(cols) as f64, rows.max(cols) as f64);
        MUON_STEPS * (2.0 * n * n * k + n * n * n)
    };
    config.num_hidden_layers as f64 * Linear::ALL.iter().map(macs).sum::<f64>()
}

//! How long a token takes: the operations of a forward pass, each at the machine's rate
//! for it. There is no constant for a size of model in it.
//!
//! A product of one token reads its weights and computes with them; part of the
//! arithmetic hides behind the reading, so that its time is
//! `bytes / read + EXPOSED · bytes / cached`, where `cached` is the speed of the same
//! product on rows that lie in the cache. Norms, quantisation and activation of one
//! token run on one thread while the others wait.

use bitnet_core::ModelConfig;
use bitnet_core::names::Norm;
use serde::Serialize;

use super::Form;
use super::rates::{CHUNK, ProductRate, Rates, block_bytes, block_macs};

/// The share of a ternary product's arithmetic that does not hide behind reading its
/// weights. `experiments/0009-plan` has the measurements.
const EXPOSED: f64 = 0.6;

/// The same of the head's rows, which have at most an eighth of the multiply-adds of a
/// ternary product for each byte.
const HEAD_EXPOSED: f64 = 0.25;

/// Seconds to divide an operation between threads and to wait for the last of them: the
/// engine's regions cost 0.6 to 1.8 µs.
const REGION: f64 = 1.5e-6;

/// Seconds until the keys, or the values, of one head are being read: they lie apart, on
/// pages of their own, and nothing asked for them ahead.
const HEAD_START: f64 = 1e-6;

/// Operations of a block that are divided between threads while one token is decoded:
/// q, k and v; attention; o; gate and up; down.
const REGIONS: f64 = 5.0;

/// What a token takes, by part, in seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct TokenTime {
    /// Products of the linear layers.
    pub linear: f64,
    /// The head.
    pub head: f64,
    /// Attention, keys and values.
    pub attention: f64,
    /// Norms, quantisation, activation, rotation, sums.
    pub elementwise: f64,
    /// Dividing work between threads.
    pub threads: f64,
}

impl TokenTime {
    /// All of it.
    #[must_use]
    pub fn total(&self) -> f64 {
        self.linear + self.head + self.attention + self.elementwise + self.threads
    }

    /// Tokens a second.
    #[must_use]
    pub fn per_second(&self) -> f64 {
        1.0 / self.total()
    }
}

/// A model as its tokens see it.
#[derive(Debug, Clone, Copy)]
pub struct Shape<'c> {
    /// Its configuration.
    pub config: &'c ModelConfig,
    /// The form of its linear layers.
    pub linear: Form,
    /// Bytes of an element of the key and value cache.
    pub kv_bytes: f64,
}

impl Shape<'_> {
    fn layers(&self) -> f64 {
        self.config.num_hidden_layers as f64
    }

    fn linear_bytes(&self) -> f64 {
        self.layers() * block_bytes(self.config, self.linear) as f64
    }

    fn head_elements(&self) -> f64 {
        self.config.vocab_size as f64 * self.config.hidden_size as f64
    }

    fn head_bytes(&self) -> f64 {
        self.head_elements() * self.config.embedding_dtype.bytes() as f64
    }

    /// Bytes that a token reads: weights of linear layers and head.
    #[must_use]
    pub fn weight_bytes(&self) -> f64 {
        self.linear_bytes() + self.head_bytes()
    }

    /// Bytes of the keys and values of `positions` positions.
    fn kv(&self, positions: f64) -> f64 {
        2.0 * self.layers() * self.config.key_value_size() as f64 * self.kv_bytes * positions
    }

    /// Elements of a token that norms take, and that the gated activation takes.
    pub(super) fn elements(&self) -> (f64, f64) {
        let config = self.config;
        let norms = Norm::of(config).iter().filter(|n| **n != Norm::FeedForwardSub);
        // The sub-norm before `down` is part of the gated activation. Without sub-norms
        // the attention's output is quantised alone.
        let mut norms: f64 = norms.map(|n| n.size(config) as f64).sum();
        if !config.sub_norms {
            norms += config.query_size() as f64;
        }
        // Rotation and the two sums move about as much as the norms of two rows.
        let moved = (config.query_size() + config.key_value_size() + 2 * config.hidden_size) as f64;
        (self.layers() * (norms + moved / 2.0), self.layers() * config.intermediate_size as f64)
    }

    /// Bytes of activations that a token of a chunk writes and reads again, because the
    /// caches of a core do not hold a chunk's: inputs and outputs of the products.
    fn activations(&self) -> f64 {
        let config = self.config;
        let (d, f) = (config.hidden_size as f64, config.intermediate_size as f64);
        let (q, kv) = (config.query_size() as f64, config.key_value_size() as f64);
        self.layers() * 2.0 * 4.0 * (4.0 * d + 3.0 * q + 2.0 * kv + 3.0 * f)
    }

    /// The time of one decoded token behind `context` others.
    #[must_use]
    pub fn decode(&self, rates: &Rates, context: f64) -> TokenTime {
        let (linear, head, kv) = (self.linear_bytes(), self.head_bytes(), self.kv(context));
        let all = linear + head + kv;
        let read = rates.read_at(all) * 1e9;
        let product = |bytes: f64, rate: &ProductRate, exposed: f64| {
            bytes / read + exposed * bytes / (rate.cached_gb_per_second * 1e9)
        };
        let macs = 2.0 * self.layers() * self.config.query_size() as f64 * context;
        let (norms, gates) = self.elements();
        let shared = rates.threads > 1;
        let heads = 2.0 * self.layers() * self.config.num_key_value_heads as f64;
        let starts = HEAD_START * heads / rates.threads as f64;
        TokenTime {
            linear: product(linear, &rates.linear, EXPOSED),
            head: product(head, &rates.head, HEAD_EXPOSED),
            attention: starts + kv / read + macs / (rates.attention_gmac_per_second * 1e9),
            elementwise: (norms * rates.norm_ns + gates * rates.gate_ns) * 1e-9,
            threads: if shared { REGION * (REGIONS * self.layers() + 1.0) } else { 0.0 },
        }
    }

    /// The mean time of a token of a prompt of `tokens` tokens from an empty context.
    #[must_use]
    pub fn prefill(&self, rates: &Rates, tokens: usize) -> TokenTime {
        let n = tokens as f64;
        let macs = self.layers() * block_macs(self.config, self.linear);
        // The mean token sees half of the prompt.
        let attention = 2.0 * self.layers() * self.config.query_size() as f64 * (n + 1.0) / 2.0;
        let (norms, gates) = self.elements();
        let last = self.decode(rates, 0.0);
        let moved = self.activations();
        let chunk = moved / self.layers() * tokens.min(CHUNK) as f64;
        TokenTime {
            linear: macs / (rates.linear.panel_gmac_per_second * 1e9),
            head: last.head / n,
            attention: attention / (rates.attention_panel_gmac_per_second * 1e9),
            elementwise: (norms * rates.norm_panel_ns + gates * rates.gate_panel_ns) * 1e-9
                + moved / (rates.read_at(chunk) * 1e9),
            threads: last.threads / n,
        }
    }
}

/// Float operations of a training token, forward and backward: six for every weight
/// that a token meets (a multiply-add forward, two backward, arXiv:2001.08361), and the
/// attention's, `12 · L · H·C · T / 2`. `recompute` runs the blocks forward again.
#[must_use]
pub fn training_flop(config: &ModelConfig, sequence: usize, recompute: bool) -> f64 {
    let linear = config.parameter_count().linear as f64;
    let head = config.vocab_size as f64 * config.hidden_size as f64;
    let attention = config.num_hidden_layers as f64 * config.query_size() as f64 * sequence as f64;
    let blocks = 6.0 * linear + 6.0 * attention;
    blocks * if recompute { 4.0 / 3.0 } else { 1.0 } + 6.0 * head
}

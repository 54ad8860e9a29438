//! What a model needs on disk and in memory, in bytes, from its shape alone.

use bitnet_core::names::{Linear, Norm};
use bitnet_core::training_memory::optimizer_bytes;
use bitnet_core::{ModelConfig, WeightQuantizer};
use bitnet_engine::KvType;
use bitnet_kernels::{ATTEND_TILE, QuantizedTokens, attend_scores_len};
use serde::Serialize;

use super::rates::{CHUNK, block_bytes};
use super::{Form, Training};

/// Tensors of a packed file begin at multiples of this.
const ALIGNMENT: u64 = 64;

/// Bytes of a packed file's tokenizer for each token of the vocabulary, about: the
/// quickstart's 4096 tokens take 60 each, with the golden logits.
const TOKENIZER: u64 = 60;

/// Bytes of a tensor's entry in the directory of a file, about.
const ENTRY: u64 = 80;

/// A packed file, by part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct FileBytes {
    /// Weights of the linear layers.
    pub linear: u64,
    /// The token embedding.
    pub embedding: u64,
    /// The head; 0 when tied.
    pub head: u64,
    /// All norms.
    pub norms: u64,
    /// Keys, tokenizer and directory, about; exact of a file.
    pub metadata: u64,
}

impl FileBytes {
    /// Of a model whose linear layers have this form.
    #[must_use]
    pub fn of(config: &ModelConfig, form: Form) -> Self {
        let layers = config.num_hidden_layers as u64;
        let count = config.parameter_count();
        let dtype = config.embedding_dtype.bytes() as u64;
        let scales = match form {
            Form::Ternary(_) => layers * Linear::ALL.len() as u64,
            _ => 0,
        };
        let norms = Norm::of(config).len() as u64 * layers + 1;
        let tensors = 2 + norms + scales + layers * Linear::ALL.len() as u64;
        Self {
            linear: layers * block_bytes(config, form) + scales * ALIGNMENT,
            embedding: count.embedding * dtype,
            head: count.head * dtype,
            norms: count.norms * 4,
            metadata: TOKENIZER * config.vocab_size as u64 + tensors * (ENTRY + ALIGNMENT / 2),
        }
    }

    /// All of it.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.linear + self.embedding + self.head + self.norms + self.metadata
    }
}

/// Memory while a model runs, by part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct RunBytes {
    /// The packed file, all of it read.
    pub file: u64,
    /// Keys and values of all sequences, their context full.
    pub kv_cache: u64,
    /// Activations of a chunk, scores of the attention, logits.
    pub buffers: u64,
    /// Ternary rows in another layout, where the instruction set reads the file's badly.
    pub repacked: u64,
    /// Of the program itself.
    pub program: u64,
}

impl RunBytes {
    /// Of `sequences` sequences of `context` tokens each.
    #[must_use]
    pub fn of(
        config: &ModelConfig,
        file: u64,
        kv: KvType,
        context: usize,
        sequences: usize,
        threads: usize,
    ) -> Self {
        Self {
            file,
            kv_cache: kv.bytes(config, context) * sequences as u64,
            buffers: buffers(config, context, sequences, threads),
            repacked: 0,
            program: program_bytes().unwrap_or(0),
        }
    }

    /// All of it.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.file + self.kv_cache + self.buffers + self.repacked + self.program
    }
}

/// The engine's buffers for chunks of a prompt.
fn buffers(config: &ModelConfig, context: usize, sequences: usize, threads: usize) -> u64 {
    let (d, f) = (config.hidden_size, config.intermediate_size);
    let (q, kv) = (config.query_size(), config.key_value_size());
    // Residual stream, its norm, projections; queries and attention; keys and values;
    // gate and up; cosines and sines.
    let mut floats = 3 * d + 2 * q + 2 * kv + 2 * f + config.head_dim();
    if config.sub_norms {
        floats += q + f;
    }
    let ternary = config.weight_quantizer != WeightQuantizer::None;
    if !config.sub_norms || !ternary {
        floats += f;
    }
    let stride = QuantizedTokens::stride;
    let integers = if ternary { stride(d) + stride(q) + stride(f) + 24 } else { 0 };
    let tokens = CHUNK.min(context).max(sequences) as u64;
    // Four parts a thread, each with a tile of queries.
    let scores = 4 * attend_scores_len(ATTEND_TILE, context) * 4 * threads;
    let logits = 4 * config.vocab_size * sequences;
    let norms = 4 * config.parameter_count().norms;
    tokens * (4 * floats + integers) as u64 + (scores + logits) as u64 + norms
}

/// What this process holds now, and its code, which becomes resident as it runs; none
/// where the system does not tell.
fn program_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let field = |name: &str| -> Option<u64> {
        let line = status.lines().find_map(|l| l.strip_prefix(name))?;
        Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
    };
    Some(field("RssAnon:")? + field("RssFile:")?)
}

/// Memory that can be had without swapping, in bytes; none where the system does not
/// tell.
#[must_use]
pub fn available_bytes() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// A checkpoint on disk: master weights in f32 and the optimizer's state.
#[must_use]
pub fn checkpoint_bytes(config: &ModelConfig, training: &Training) -> (u64, u64) {
    let count = config.parameter_count();
    (4 * count.total(), optimizer_bytes(&count, training.muon, training.byte_moments))
}

//! Small random models for the tests, and a naive forward pass to compare with.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "each test uses a part of it")]

pub mod reference;

use std::collections::BTreeMap;
use std::path::PathBuf;

use bitnet_core::names::{Linear, Norm};
use bitnet_core::{Activation, Dtype, Layout, ModelConfig, TernaryMatrix, WeightQuantizer};
use bitnet_engine::{ARCHITECTURE, LoadOptions, Model};
use bitnet_format::gguf::{GgmlType, Header, Value, Writer};
use half::{bf16, f16};

/// A generator of test data (SplitMix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Between -1 and 1.
    pub fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }

    pub fn tokens(&mut self, n: usize, config: &ModelConfig) -> Vec<u32> {
        (0..n).map(|_| (self.next() % config.vocab_size as u64) as u32).collect()
    }
}

/// A float matrix as it is used: rounded to its stored precision.
#[derive(Clone)]
pub struct Dense {
    pub values: Vec<f32>,
    pub dtype: Dtype,
}

/// A linear layer of a random model.
#[derive(Clone)]
pub enum Weight {
    Ternary { trits: Vec<i8>, scale: f32 },
    Dense(Dense),
}

#[derive(Clone)]
pub struct Block {
    pub norms: BTreeMap<&'static str, Vec<f32>>,
    pub linears: Vec<Weight>,
}

/// A random model in plain numbers.
#[derive(Clone)]
pub struct RandomModel {
    pub config: ModelConfig,
    pub embedding: Dense,
    pub head: Option<Dense>,
    pub final_norm: Vec<f32>,
    pub blocks: Vec<Block>,
}

pub fn norm_name(norm: Norm) -> &'static str {
    match norm {
        Norm::Attention => "attention",
        Norm::AttentionSub => "attention_sub",
        Norm::FeedForward => "ffn",
        Norm::FeedForwardSub => "ffn_sub",
    }
}

fn dense(random: &mut Random, n: usize, scale: f32, dtype: Dtype) -> Dense {
    let round = |x: f32| match dtype {
        Dtype::F32 => x,
        Dtype::F16 => f16::from_f32(x).to_f32(),
        Dtype::Bf16 => bf16::from_f32(x).to_f32(),
    };
    Dense { values: random.floats(n).into_iter().map(|x| round(x * scale)).collect(), dtype }
}

impl RandomModel {
    pub fn new(config: &ModelConfig, seed: u64) -> Self {
        config.validate().unwrap();
        let mut r = Random(seed);
        let table = config.vocab_size * config.hidden_size;
        let norm = |r: &mut Random, n: usize| -> Vec<f32> {
            (0..n).map(|_| 1.0 + 0.3 * r.float()).collect()
        };
        let embedding = dense(&mut r, table, 0.5, config.embedding_dtype);
        let head = (!config.tie_word_embeddings)
            .then(|| dense(&mut r, table, 0.5, config.embedding_dtype));
        let final_norm = norm(&mut r, config.hidden_size);
        let blocks = (0..config.num_hidden_layers)
            .map(|layer| {
                let norms = Norm::of(config)
                    .iter()
                    .map(|n| (norm_name(*n), norm(&mut r, n.size(config))))
                    .collect();
                let linears = Linear::ALL
                    .map(|l| {
                        let n = l.shape(config).iter().product();
                        match config.weight_quantizer {
                            WeightQuantizer::Ternary | WeightQuantizer::Binary => Weight::Ternary {
                                trits: (0..n).map(|_| (r.next() % 3) as i8 - 1).collect(),
                                scale: 0.08 + 0.04 * r.float(),
                            },
                            WeightQuantizer::None => {
                                // Both precisions that a twin's weights come in.
                                let dtype = if layer % 2 == 0 { Dtype::F32 } else { Dtype::F16 };
                                Weight::Dense(dense(&mut r, n, 0.2, dtype))
                            }
                        }
                    })
                    .to_vec();
                Block { norms, linears }
            })
            .collect();
        Self { config: config.clone(), embedding, head, final_norm, blocks }
    }

    /// The file of the model.
    pub fn file(&self) -> File {
        self.file_in(Layout::P2)
    }

    /// The file in a layout.
    pub fn file_in(&self, layout: Layout) -> File {
        let mut file = File::new(&self.config);
        file.set("layout", layout.name());
        let (vocab, hidden) = (self.config.vocab_size, self.config.hidden_size);
        file.dense("token_embd.weight", &self.embedding, vocab, hidden);
        for (i, block) in self.blocks.iter().enumerate() {
            for norm in Norm::of(&self.config) {
                file.floats(&norm.gguf(i), &block.norms[norm_name(*norm)]);
            }
            for (linear, weight) in Linear::ALL.into_iter().zip(&block.linears) {
                let ([rows, cols], name) = (linear.shape(&self.config), linear.gguf(i));
                match weight {
                    Weight::Dense(w) => file.dense(&format!("{name}.weight"), w, rows, cols),
                    Weight::Ternary { trits, scale } => {
                        let m = TernaryMatrix::pack(layout, rows, cols, trits, *scale).unwrap();
                        let dims = vec![layout.row_bytes(cols) as u64, rows as u64];
                        file.tensors.push((format!("{name}.weight"), dims, GgmlType::I8, m.bytes));
                        file.floats(&format!("{name}.scale"), &[*scale]);
                    }
                }
            }
        }
        file.floats("output_norm.weight", &self.final_norm);
        if let Some(head) = &self.head {
            file.dense("output.weight", head, vocab, hidden);
        }
        file
    }

    /// Writes and opens the model.
    pub fn open(&self) -> (Model, tempfile::TempDir) {
        self.open_in(Layout::P2)
    }

    /// Writes and opens the model in a layout.
    pub fn open_in(&self, layout: Layout) -> (Model, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let path = self.file_in(layout).write(&dir);
        (
            Model::open(
                &path,
                &LoadOptions { verify: true, prefetch: true, ..LoadOptions::default() },
            )
            .unwrap(),
            dir,
        )
    }
}

/// Keys and tensors of a file, to be changed before it is written.
#[derive(Clone)]
pub struct File {
    pub keys: Vec<(String, Value<'static>)>,
    pub tensors: Vec<(String, Vec<u64>, GgmlType, Vec<u8>)>,
    pub alignment: u64,
}

impl File {
    pub fn new(c: &ModelConfig) -> Self {
        let mut file = Self { keys: Vec::new(), tensors: Vec::new(), alignment: 64 };
        file.keys.push(("general.architecture".into(), ARCHITECTURE.into()));
        file.keys.push(("general.name".into(), "random".into()));
        file.set("format_version", 1u32);
        file.set("layout", "p2");
        for (key, value) in [
            ("vocab_size", c.vocab_size),
            ("context_length", c.max_position_embeddings),
            ("embedding_length", c.hidden_size),
            ("block_count", c.num_hidden_layers),
            ("feed_forward_length", c.intermediate_size),
            ("attention.head_count", c.num_attention_heads),
            ("attention.head_count_kv", c.num_key_value_heads),
            ("attention.key_length", c.head_dim()),
        ] {
            file.set(key, value as u32);
        }
        file.set("attention.layer_norm_rms_epsilon", c.rms_norm_eps);
        file.set("rope.freq_base", c.rope_theta);
        file.set("hidden_act", c.hidden_act.name());
        file.set("sub_norms", c.sub_norms);
        file.set("tie_word_embeddings", c.tie_word_embeddings);
        file.set("weight_quantizer", c.weight_quantizer.name());
        file.keys.push(("tokenizer.huggingface.json".into(), tokenizer_json().into()));
        file.keys.push(("tokenizer.ggml.eos_token_id".into(), EOS.into()));
        file
    }

    /// Sets a key under `bitnet-packed.`.
    pub fn set(&mut self, key: &str, value: impl Into<Value<'static>>) {
        let key = format!("{ARCHITECTURE}.{key}");
        self.keys.retain(|(k, _)| *k != key);
        self.keys.push((key, value.into()));
    }

    pub fn remove(&mut self, name: &str) {
        let before = self.keys.len() + self.tensors.len();
        self.keys.retain(|(k, _)| k != name);
        self.tensors.retain(|(k, ..)| k != name);
        assert_eq!(self.keys.len() + self.tensors.len(), before - 1, "{name}");
    }

    pub fn tensor(&mut self, name: &str) -> &mut (String, Vec<u64>, GgmlType, Vec<u8>) {
        self.tensors.iter_mut().find(|t| t.0 == name).unwrap()
    }

    fn floats(&mut self, name: &str, values: &[f32]) {
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.tensors.push((name.into(), vec![values.len() as u64], GgmlType::F32, bytes));
    }

    fn dense(&mut self, name: &str, w: &Dense, rows: usize, cols: usize) {
        let dims = vec![cols as u64, rows as u64];
        let values = w.values.iter();
        let (ty, bytes) = match w.dtype {
            Dtype::F32 => (GgmlType::F32, values.flat_map(|x| x.to_le_bytes()).collect()),
            Dtype::F16 => {
                (GgmlType::F16, values.flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect())
            }
            Dtype::Bf16 => {
                (GgmlType::BF16, values.flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect())
            }
        };
        self.tensors.push((name.into(), dims, ty, bytes));
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut header = Header::new("model.gguf", self.alignment).unwrap();
        for (key, value) in &self.keys {
            header.put(key, value.clone()).unwrap();
        }
        for (name, dims, ty, _) in &self.tensors {
            header.tensor(name, dims, *ty).unwrap();
        }
        let mut writer = Writer::start(Vec::new(), header).unwrap();
        for (name, .., bytes) in &self.tensors {
            writer.write(name, bytes).unwrap();
        }
        writer.finish().unwrap()
    }

    pub fn write(&self, dir: &tempfile::TempDir) -> PathBuf {
        let path = dir.path().join("model.gguf");
        std::fs::write(&path, self.bytes()).unwrap();
        path
    }
}

/// The end-of-text token of [`tokenizer_json`].
pub const EOS: u32 = 256;

/// A byte-level tokenizer without merges: ids 0..256 are the bytes.
pub fn tokenizer_json() -> String {
    let vocab: serde_json::Map<String, serde_json::Value> = (0..=0x400u32)
        .filter_map(char::from_u32)
        .filter_map(|c| Some((c.to_string(), bitnet_format::byte_level::byte_of(c)?.into())))
        .collect();
    let byte_level = serde_json::json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
    });
    serde_json::json!({
        "version": "1.0",
        "added_tokens": [{
            "id": EOS, "content": "<|endoftext|>", "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true,
        }],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    })
    .to_string()
}

/// Every kind of model there is, small, by name.
pub fn variants() -> Vec<(&'static str, ModelConfig)> {
    let tiny = ModelConfig::tiny;
    let twin = WeightQuantizer::None;
    vec![
        ("ternary", tiny()),
        ("silu, untied", {
            ModelConfig { hidden_act: Activation::Silu, tie_word_embeddings: false, ..tiny() }
        }),
        ("no sub-norms", ModelConfig { sub_norms: false, ..tiny() }),
        ("no sub-norms, silu, one kv head", {
            ModelConfig {
                sub_norms: false,
                hidden_act: Activation::Silu,
                num_key_value_heads: 1,
                embedding_dtype: Dtype::Bf16,
                ..tiny()
            }
        }),
        ("wide heads, odd sizes", {
            ModelConfig {
                hidden_size: 70,
                head_dim: Some(26),
                num_attention_heads: 3,
                num_key_value_heads: 3,
                intermediate_size: 257,
                vocab_size: 301,
                embedding_dtype: Dtype::F32,
                ..tiny()
            }
        }),
        ("twin", ModelConfig { weight_quantizer: twin, ..tiny() }),
        ("twin, untied, no sub-norms", {
            ModelConfig {
                weight_quantizer: twin,
                tie_word_embeddings: false,
                sub_norms: false,
                hidden_act: Activation::Silu,
                ..tiny()
            }
        }),
    ]
}

/// An error and its causes in one line, as binaries print it.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(e) = next {
        text = format!("{text}: {e}");
        next = e.source();
    }
    text
}

pub fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

pub fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

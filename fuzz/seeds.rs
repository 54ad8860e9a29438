//! Writes small inputs of every kind, made by the project's own writers, for the
//! fuzzers to begin with: `cargo run --example seeds -- corpus`.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use bitnet_core::names::Tensor;
use bitnet_core::{Activation, Dtype, Layout, ModelConfig, WeightQuantizer};
use bitnet_data::ShardWriter;
use bitnet_format::gguf::blocks::{RowType, encode_ternary};
use bitnet_format::gguf::{self, Array, GgmlType, Header, Writer};
use bitnet_format::hf::{SpecialTokens, Stored, TensorFileWriter, Trits, to_json};
use bitnet_format::model::Golden;
use bitnet_format::pack::{Form, Keys, PackedFile, Plan, Sink};
use bitnet_format::tokenizer::GgufTokenizer;
use serde_json::{Value, json};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const VOCAB: usize = 8;

fn main() -> Result<()> {
    let out = PathBuf::from(std::env::args().nth(1).ok_or("where to?")?);
    for target in ["gguf", "safetensors", "folder", "tokenizer", "shard"] {
        fs::create_dir_all(out.join(target))?;
    }
    ggufs(&out.join("gguf"))?;
    folders(&out)?;
    tokenizers(&out.join("tokenizer"))?;
    shards(&out.join("shard"))
}

fn config(hidden_size: usize) -> ModelConfig {
    ModelConfig {
        hidden_size,
        intermediate_size: hidden_size,
        num_hidden_layers: 1,
        num_attention_heads: 1,
        num_key_value_heads: 1,
        vocab_size: VOCAB,
        max_position_embeddings: 16,
        ..ModelConfig::tiny()
    }
}

fn float_config(hidden_size: usize) -> ModelConfig {
    ModelConfig {
        weight_quantizer: WeightQuantizer::None,
        hidden_act: Activation::Silu,
        sub_norms: false,
        embedding_dtype: Dtype::F32,
        ..config(hidden_size)
    }
}

fn wide() -> ModelConfig {
    ModelConfig { intermediate_size: 40, ..float_config(64) }
}

fn byte_level() -> Value {
    json!({
        "version": "1.0",
        "added_tokens": [{"id": 7, "content": "<|end|>", "special": true}],
        "pre_tokenizer": {"type": "ByteLevel", "use_regex": true},
        "model": {
            "type": "BPE",
            "vocab": {"a": 0, "b": 1, "ab": 2, "Ġ": 3, "Ġab": 4},
            "merges": [["a", "b"], ["Ġ", "ab"]],
        },
    })
}

fn sentence_piece() -> Value {
    json!({
        "added_tokens": [{"id": 0, "content": "<unk>", "special": true}],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]},
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}]},
        "model": {
            "type": "BPE", "byte_fallback": true, "unk_token": "<unk>",
            "vocab": {"<unk>": 0, "<s>": 1, "<0x0A>": 2, "▁": 3, "a": 4, "▁a": 5},
            "merges": ["▁ a"],
        },
    })
}

/// Values that differ, all small.
fn values(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i * 7 % 13) as f32 / 8.0 - 0.75).collect()
}

fn trits(n: usize) -> Vec<i8> {
    (0..n).map(|i| (i * 7 % 3) as i8 - 1).collect()
}

fn ggufs(folder: &Path) -> Result<()> {
    let special = SpecialTokens { bos: None, eos: Some(7) };
    let golden = Golden { tokens: vec![1, 2], logits: vec![0.5; VOCAB] };
    let tokenizer = GgufTokenizer::parse(&byte_level().to_string(), VOCAB, "seed")?;
    for (name, config, linear) in [
        ("packed-p2", config(16), Form::Ternary),
        ("packed-float", float_config(8), Form::Float(Dtype::F16)),
        ("packed-int8", float_config(32), Form::Rows(RowType::Int8)),
        ("packed-int4", float_config(32), Form::Rows(RowType::Int4)),
        // Rows of two blocks; those of `down` are no whole ones and stay halves.
        ("packed-int8-wide", wide(), Form::Rows(RowType::Int8)),
    ] {
        let plan = Plan::new(&config, Layout::P2, linear);
        let keys = Keys {
            config: &config,
            name: "seed",
            golden: Some(&golden),
            tokenizer: &tokenizer,
            special,
            eot: Some(6),
            chat_template: Some("{{ messages }}"),
        };
        let mut file = PackedFile::start(Vec::new(), &keys, &plan)?;
        for item in &plan.items {
            let n = item.elements();
            match item.form {
                Form::Ternary => file.ternary(item, &Trits { values: trits(n), scale: 0.5 })?,
                Form::Float(dtype) => file.floats(item, dtype, &values(n))?,
                Form::Rows(ty) => file.blocks(item, &ty.encode(&values(n))?)?,
            }
        }
        fs::write(folder.join(name), file.finish()?)?;
    }
    foreign(&folder.join("bitnet-i2_s"), "bitnet", &config(128), GgmlType::I2_S)?;
    foreign(&folder.join("llama-q8_0"), "llama", &float_config(32), GgmlType::Q8_0)?;
    foreign(&folder.join("llama-q4_0"), "llama", &float_config(32), GgmlType::Q4_0)?;
    foreign(&folder.join("llama-f32"), "llama", &float_config(4), GgmlType::F32)?;
    foreign(&folder.join("bitnet25-f16"), "bitnet-25", &config(4), GgmlType::F16)?;
    // One block of every type.
    let mut header = Header::new("seed", 32)?;
    let all = [
        (GgmlType::F32, 2),
        (GgmlType::F16, 2),
        (GgmlType::BF16, 2),
        (GgmlType::Q4_0, 32),
        (GgmlType::Q8_0, 32),
        (GgmlType::Q4_K, 256),
        (GgmlType::Q6_K, 256),
        (GgmlType::TQ1_0, 256),
        (GgmlType::TQ2_0, 256),
        (GgmlType::I2_S, 128),
        (GgmlType::I8, 4),
    ];
    for (ty, n) in all {
        header.tensor(&ty.to_string(), &[n], ty)?;
    }
    let mut writer = Writer::start(Vec::new(), header)?;
    for (ty, n) in all {
        let bytes = ty.tensor_bytes(&[n])? as usize;
        writer.write(&ty.to_string(), &(0..bytes).map(|i| i as u8).collect::<Vec<_>>())?;
    }
    fs::write(folder.join("blocks"), writer.finish()?)?;
    // Vocabularies without a tokenizer.json.
    for (name, json) in [("vocabulary-bpe", byte_level()), ("vocabulary-spm", sentence_piece())] {
        let tokenizer = GgufTokenizer::parse(&json.to_string(), VOCAB, "seed")?;
        let mut header = Header::new("seed", 32)?;
        vocabulary(&mut header, &tokenizer)?;
        fs::write(folder.join(name), Writer::start(Vec::new(), header)?.finish()?)?;
    }
    Ok(())
}

/// The keys that other tools write.
fn vocabulary(header: &mut Header, tokenizer: &GgufTokenizer) -> Result<()> {
    let put = |header: &mut Header, key: &str, value: gguf::Value<'_>| {
        header.put(&format!("tokenizer.ggml.{key}"), value)
    };
    match &tokenizer.scores {
        None => {
            put(header, "model", "gpt2".into())?;
            put(header, "pre", tokenizer.pre.into())?;
            put(header, "merges", Array::strings(&tokenizer.merges).into())?;
        }
        Some(scores) => {
            put(header, "model", "llama".into())?;
            put(header, "scores", scores[..].into())?;
            put(header, "unknown_token_id", 0u32.into())?;
        }
    }
    put(header, "tokens", Array::strings(&tokenizer.tokens).into())?;
    put(header, "token_type", tokenizer.token_types[..].into())?;
    put(header, "add_bos_token", true.into())?;
    put(header, "bos_token_id", 1u32.into())?;
    Ok(())
}

/// A model as llama.cpp or bitnet.cpp would write it.
fn foreign(path: &Path, arch: &str, c: &ModelConfig, linear: GgmlType) -> Result<()> {
    let mut header = Header::new("seed", 32)?;
    header.put("general.architecture", arch)?;
    if linear == GgmlType::I2_S {
        header.put("general.file_type", 40u32)?;
    }
    for (key, value) in [
        ("context_length", c.max_position_embeddings),
        ("embedding_length", c.hidden_size),
        ("block_count", c.num_hidden_layers),
        ("feed_forward_length", c.intermediate_size),
        ("attention.head_count", c.num_attention_heads),
        ("attention.head_count_kv", c.num_key_value_heads),
        ("rope.dimension_count", c.head_dim()),
    ] {
        header.put(&format!("{arch}.{key}"), value as u32)?;
    }
    header.put(&format!("{arch}.attention.layer_norm_rms_epsilon"), 1e-5f32)?;
    header.put(&format!("{arch}.rope.freq_base"), 10_000.0f32)?;
    let json = byte_level().to_string();
    vocabulary(&mut header, &GgufTokenizer::parse(&json, VOCAB, "seed")?)?;
    let all: Vec<(String, Vec<u64>, GgmlType)> = Tensor::all(c)
        .into_iter()
        .map(|t| {
            let ty = if matches!(t, Tensor::Linear(..)) { linear } else { GgmlType::F32 };
            (t.gguf(), t.dims(c).iter().rev().map(|d| *d as u64).collect(), ty)
        })
        .collect();
    for (name, dims, ty) in &all {
        header.tensor(name, dims, *ty)?;
    }
    let mut writer = Writer::start(Vec::new(), header)?;
    for (name, dims, ty) in &all {
        let bytes = ty.tensor_bytes(dims)? as usize;
        let n = dims.iter().product::<u64>() as usize;
        let data = match ty {
            GgmlType::I2_S => encode_ternary(*ty, &trits(n), 0.5)?,
            GgmlType::F32 => values(n).iter().flat_map(|x| x.to_le_bytes()).collect(),
            _ => (0..bytes).map(|i| (i * 7 % 61) as u8).collect(),
        };
        writer.write(name, &data)?;
    }
    fs::write(path, writer.finish()?)?;
    Ok(())
}

/// Folders in the form of the target `folder`, and their tensors.
fn folders(out: &Path) -> Result<()> {
    let special = SpecialTokens { bos: Some(0), eos: Some(7) };
    let golden = json!({"tokens": [1, 2], "logits": vec![0.5; VOCAB]}).to_string();
    let template = json!({"chat_template": [{"name": "default", "template": "{{ m }}"}]});
    let generation = json!({"eos_token_id": [7, 6]});
    for (name, config, packed, sharded) in [
        ("masters", config(4), false, false),
        ("floats", float_config(4), false, true),
        ("packed", config(4), true, false),
    ] {
        let mut json = to_json(&config, special);
        if packed {
            json["quantization_config"] = json!({
                "quant_method": "bitnet", "linear_class": "autobitlinear",
                "quantization_mode": "offline",
            });
        }
        let mut tensors = Vec::new();
        for tensor in Tensor::all(&config) {
            let (name, mut dims) = (tensor.hf(), tensor.dims(&config));
            let dtype = if tensor.is_norm() { Dtype::F32 } else { config.embedding_dtype };
            if packed && matches!(tensor, Tensor::Linear(..)) {
                dims[0] = dims[0].div_ceil(4);
                let scale = format!("{name}_scale");
                tensors.push((name, dims, Stored::U8));
                tensors.push((scale, vec![1], Stored::Float(Dtype::F32)));
            } else {
                tensors.push((name, dims, Stored::Float(dtype)));
            }
        }
        let index: serde_json::Map<String, Value> =
            tensors.iter().map(|t| (t.0.clone(), "1.safetensors".into())).collect();
        let path = out.join("safetensors").join(name);
        let mut writer = TensorFileWriter::with_types(&path, &[("step", "1")], tensors.clone())?;
        for (name, dims, stored) in &tensors {
            let n = dims.iter().product();
            let bytes: Vec<u8> = match stored {
                Stored::U8 => vec![0b01_10_00_01; n],
                Stored::Float(Dtype::F32) => {
                    values(n).iter().flat_map(|x| (x + 1.0).to_le_bytes()).collect()
                }
                Stored::Float(_) => [0x00, 0x3c].repeat(n),
            };
            writer.write_bytes(name, &bytes)?;
        }
        writer.commit()?;
        let index = json!({"weight_map": index}).to_string();
        let texts = [
            json.to_string(),
            if sharded { index } else { String::new() },
            golden.clone(),
            template.to_string(),
            generation.to_string(),
        ];
        let mut input = texts.join("\0").into_bytes();
        input.push(0);
        input.extend(fs::read(&path)?);
        fs::write(out.join("folder").join(name), input)?;
    }
    Ok(())
}

fn tokenizers(folder: &Path) -> Result<()> {
    for (name, json) in [("byte-level", byte_level()), ("sentence-piece", sentence_piece())] {
        let mut input = (VOCAB as u16).to_le_bytes().to_vec();
        input.extend(json.to_string().into_bytes());
        fs::write(folder.join(name), input)?;
    }
    Ok(())
}

fn shards(folder: &Path) -> Result<()> {
    for (name, vocab) in [("two-bytes", 300), ("four-bytes", 70_000)] {
        let mut writer = ShardWriter::create(&folder.join(name), vocab, 0, [7; 32])?;
        writer.push_document(&[1, 2, 3])?;
        writer.push_document(&[299])?;
        writer.finish()?;
    }
    // Version 2 has no public writer: rows of three tokens of two bytes with flags.
    let plain = fs::read(folder.join("two-bytes"))?;
    let mut rows = plain[..128].to_vec();
    rows[4] = 2;
    rows[100] = 3;
    rows.extend([1, 0, 2, 0, 3, 0, 2, 1, 1, 4, 0, 0, 0, 0, 0, 2, 3, 0]);
    fs::write(folder.join("rows"), rows)?;
    Ok(())
}

//! Opening files: what is read, and everything that is refused.
#![allow(clippy::unwrap_used)]

mod common;

use bitnet_core::{Dtype, Exit, ModelConfig, WeightQuantizer};
use bitnet_engine::{EngineError, LoadOptions, Model};
use bitnet_format::gguf::GgmlType;
use common::{EOS, File, RandomModel, chain, variants};

fn open(bytes: &[u8]) -> Result<Model, EngineError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("some.gguf");
    std::fs::write(&path, bytes).unwrap();
    // On every system we run on, a mapped file outlives its name.
    Model::open(&path, &LoadOptions::default())
}

#[test]
fn a_model_describes_itself() {
    for (name, config) in variants() {
        let (model, dir) = RandomModel::new(&config, 1).open();
        let parts = model.parts();
        let count = config.parameter_count();
        assert_eq!((model.config(), model.name()), (&config, "random"), "{name}");
        assert!(model.file().starts_with(dir.path().to_str().unwrap()));
        assert_eq!(parts.total(), model.bytes());
        assert_eq!(parts.embedding, count.embedding * config.embedding_dtype.bytes() as u64);
        assert_eq!(parts.head, count.head * config.embedding_dtype.bytes() as u64);
        assert_eq!(parts.norms, count.norms * 4);
        match config.weight_quantizer {
            WeightQuantizer::Ternary | WeightQuantizer::Binary => {
                assert!(parts.ternary >= count.linear / 4 && parts.dense == 0);
            }
            WeightQuantizer::None => {
                // One block in f32, one in f16.
                assert_eq!((parts.dense, parts.ternary), (count.linear * 3, 0));
            }
        }
        assert_eq!(model.tokenizer().unwrap().eos_ids(), [EOS]);
        assert!(model.golden().is_none() && model.chat_template().is_none());
    }
}

#[test]
fn golden_logits_and_chat_template_are_read() {
    let config = ModelConfig::tiny();
    let mut file = RandomModel::new(&config, 2).file();
    file.set("golden.tokens", &[1u32, 2][..]);
    file.set("golden.logits", &vec![0.5f32; 320][..]);
    file.keys.push(("tokenizer.chat_template".into(), "{{ x }}".into()));
    file.keys.push(("tokenizer.ggml.bos_token_id".into(), 7u32.into()));
    file.keys.push(("tokenizer.ggml.eot_token_id".into(), 8u32.into()));
    let model = open(&file.bytes()).unwrap();
    let golden = model.golden().unwrap();
    assert_eq!((&golden.tokens[..], golden.logits.len()), (&[1, 2][..], 320));
    assert_eq!(model.chat_template(), Some("{{ x }}"));
    let tokenizer = model.tokenizer().unwrap();
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_ids()), (Some(7), &[EOS, 8][..]));
}

type Edit = fn(&mut File);

#[test]
fn every_fault_of_a_file_is_named() {
    let cases: Vec<(Edit, &[&str])> = vec![
        (|f| f.keys[0].1 = "gptj".into(), &["architecture = \"gptj\" is not supported", "llama"]),
        (|f| f.remove("general.architecture"), &["general.architecture is missing"]),
        (|f| f.set("format_version", 2u32), &["format_version: 2 is not supported"]),
        (|f| f.set("layout", "p9"), &["layout: unknown layout `p9`", "p2"]),
        (|f| f.set("layout", 3u32), &["bitnet-packed.layout", "expected string"]),
        (|f| f.set("hidden_act", "gelu"), &["unknown activation `gelu`"]),
        (|f| f.set("weight_quantizer", "int4"), &["unknown quantiser `int4`"]),
        (|f| f.set("sub_norms", 1u32), &["sub_norms", "expected bool"]),
        (|f| f.set("embedding_length", -5i32), &["embedding_length"]),
        (|f| f.set("embedding_length", 0u32), &["model.hidden_size = 0"]),
        (|f| f.set("attention.head_count_kv", 3u32), &["model.num_key_value_heads = 3"]),
        (|f| f.set("attention.key_length", 7u32), &["model.head_dim = 7"]),
        (|f| f.set("attention.key_length", u32::MAX), &["model.head_dim"]),
        (|f| f.set("rope.freq_base", f32::NAN), &["model.rope_theta = NaN"]),
        (|f| f.remove("bitnet-packed.block_count"), &["bitnet-packed.block_count is missing"]),
        (|f| f.set("block_count", 3u32), &["blk.2.attn_norm.weight is missing"]),
        (|f| f.set("block_count", 1u32), &["blk.1.", "does not belong"]),
        (|f| f.set("sub_norms", false), &["sub_norm.weight", "does not belong"]),
        (|f| f.set("tie_word_embeddings", false), &["tensor output.weight is missing"]),
        (|f| f.set("weight_quantizer", "none"), &["blk.0.attn_q.weight", "expected F32 or F16"]),
        (|f| f.set("vocab_size", 321u32), &["token_embd.weight", "[64, 321]", "[64, 320]"]),
        (
            |f| f.set("feed_forward_length", 161u32),
            &["blk.0.ffn_sub_norm.weight: expected F32 [161], found F32 [160]"],
        ),
        (|f| f.remove("output_norm.weight"), &["tensor output_norm.weight is missing"]),
        (|f| f.remove("blk.1.ffn_down.weight"), &["tensor blk.1.ffn_down.weight is missing"]),
        (|f| f.remove("blk.1.ffn_down.scale"), &["tensor blk.1.ffn_down.scale is missing"]),
        (
            |f| {
                let t = f.tensor("blk.0.attn_k.weight");
                t.1 = vec![32, 64];
            },
            &["blk.0.attn_k.weight: expected I8 [64, 32], found I8 [32, 64]"],
        ),
        (
            |f| f.tensor("blk.1.attn_v.scale").3 = (-1.0f32).to_le_bytes().to_vec(),
            &["blk.1.attn_v.scale: a scale of -1"],
        ),
        (
            |f| f.tensor("blk.1.attn_v.scale").3 = f32::NAN.to_le_bytes().to_vec(),
            &["blk.1.attn_v.scale: element 0 is NaN"],
        ),
        (
            |f| {
                f.tensor("output_norm.weight").3[8..12]
                    .copy_from_slice(&f32::INFINITY.to_le_bytes())
            },
            &["output_norm.weight: element 2 is inf"],
        ),
        (
            |f| f.tensors.push(("extra".into(), vec![4], GgmlType::I8, vec![0; 4])),
            &["tensor extra: does not belong"],
        ),
        (
            |f| {
                f.alignment = 4;
                f.tensors.insert(0, ("extra".into(), vec![4], GgmlType::I8, vec![0; 4]));
            },
            &["not 64-aligned"],
        ),
        (|f| f.remove("tokenizer.huggingface.json"), &["tokenizer.huggingface.json is missing"]),
        (
            |f| {
                f.remove("tokenizer.ggml.eos_token_id");
                f.keys.push(("tokenizer.ggml.eos_token_id".into(), 320u32.into()));
            },
            &["tokenizer.ggml.eos_token_id: 320 is outside the vocabulary of 320"],
        ),
        (|f| f.set("golden.tokens", &[1u32][..]), &["golden.logits: is missing"]),
        (
            |f| {
                f.set("golden.tokens", &[320u32][..]);
                f.set("golden.logits", &vec![0f32; 320][..]);
            },
            &["golden.tokens: token 320 is outside"],
        ),
        (
            |f| {
                f.set("golden.tokens", &[1u32][..]);
                f.set("golden.logits", &[0f32; 3][..]);
            },
            &["golden.logits: 3 logits for a vocabulary of 320"],
        ),
    ];
    let good = RandomModel::new(&ModelConfig::tiny(), 3).file();
    for (edit, texts) in cases {
        let mut file = good.clone();
        edit(&mut file);
        let error = open(&file.bytes()).err().unwrap_or_else(|| panic!("accepted: {texts:?}"));
        let message = chain(&error);
        for text in texts {
            assert!(message.contains(text), "`{text}` is not in `{message}`");
        }
        assert!(message.contains("some.gguf"), "{message}");
        assert_eq!(error.exit(), Exit::BadInput, "{message}");
    }
}

#[test]
fn a_tokenizer_that_does_not_fit_is_refused() {
    let good = RandomModel::new(&ModelConfig::tiny(), 3).file();
    let small = ModelConfig { vocab_size: 200, ..ModelConfig::tiny() };
    let mut broken = good.clone();
    broken.remove("tokenizer.huggingface.json");
    broken.keys.push(("tokenizer.huggingface.json".into(), "{}".into()));
    let mut few = RandomModel::new(&small, 3).file();
    few.remove("tokenizer.ggml.eos_token_id");
    for (file, text) in [(broken, "cannot be read"), (few, "the model has 200 tokens")] {
        let error = open(&file.bytes()).unwrap().tokenizer().unwrap_err();
        let message = chain(&error);
        assert!(message.contains("some.gguf: tokenizer: ") && message.contains(text), "{message}");
        assert_eq!(error.exit(), Exit::BadInput);
    }
}

#[test]
fn a_file_that_ends_early_is_refused_wherever_it_ends() {
    let config =
        ModelConfig { num_hidden_layers: 1, embedding_dtype: Dtype::F32, ..ModelConfig::tiny() };
    let bytes = RandomModel::new(&config, 4).file().bytes();
    let last = bytes.len() - 64; // The end may be padding only.
    let ends = (0..100).chain((100..last).step_by(997)).chain([last]);
    for end in ends {
        let error = open(&bytes[..end]).err().unwrap_or_else(|| panic!("{end} bytes accepted"));
        assert_eq!(error.exit(), Exit::BadInput);
        assert!(chain(&error).contains("some.gguf"), "{error}");
    }
    assert!(open(&bytes).is_ok());
}

#[test]
fn foreign_and_missing_files_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let missing = Model::open(&dir.path().join("no.gguf"), &LoadOptions::default()).unwrap_err();
    assert!(chain(&missing).contains("no.gguf: cannot be read: No such file"), "{missing}");
    let folder = Model::open(dir.path(), &LoadOptions::default()).unwrap_err();
    assert!(chain(&folder).contains("holds no checkpoint"), "{}", chain(&folder));
    for bytes in [&b""[..], b"GG", b"hello world, this is text", b"GGUF\x09\0\0\0"] {
        assert_eq!(open(bytes).unwrap_err().exit(), Exit::BadInput);
    }
    assert_eq!((missing.exit(), folder.exit()), (Exit::BadInput, Exit::BadInput));
}

#[test]
fn a_bit_of_damage_never_panics() {
    let config = ModelConfig { num_hidden_layers: 1, ..ModelConfig::tiny() };
    let good = RandomModel::new(&config, 6).file().bytes();
    let mut random = common::Random(8);
    // Keys and directory come first; the tokenizer is most of them.
    let head = good.len() / 3;
    for _ in 0..600 {
        let mut bytes = good.clone();
        let at = (random.next() % head as u64) as usize;
        bytes[at] ^= 1 << (random.next() % 8);
        match open(&bytes) {
            Ok(model) => drop(model.tokenizer()),
            Err(e) => assert_eq!(e.exit(), Exit::BadInput, "{e}"),
        }
    }
}

#[test]
fn verify_finds_what_opening_does_not_look_for() {
    let good = RandomModel::new(&ModelConfig::tiny(), 3).file();
    let cases: [(Edit, &str); 3] = [
        // Two blocks' worth of codes: row 1 of the second block's down weight.
        (
            |f| f.tensor("blk.1.ffn_down.weight").3[64 + 5] = 0xff,
            "blk.1.ffn_down.weight: row 1: byte 5",
        ),
        // 64 columns fill a quarter of a block; the rest is padding, code 1.
        (|f| f.tensor("blk.0.attn_q.weight").3[0] ^= 0b01_00_00_00, "blk.0.attn_q.weight: row 0"),
        (
            |f| f.tensor("token_embd.weight").3[130..132].copy_from_slice(&[0, 0x7c]),
            "token_embd.weight: row 1, column 1 is not finite",
        ),
    ];
    for (edit, text) in cases {
        let mut file = good.clone();
        edit(&mut file);
        let dir = tempfile::tempdir().unwrap();
        let path = file.write(&dir);
        let model = Model::open(&path, &LoadOptions::default()).unwrap();
        let error = model.verify().unwrap_err();
        assert!(chain(&error).contains(text), "{error}");
        assert_eq!(error.exit(), Exit::BadInput);
        let options = LoadOptions { verify: true, ..LoadOptions::default() };
        assert!(Model::open(&path, &options).is_err());
    }
    open(&good.bytes()).unwrap().verify().unwrap();
}

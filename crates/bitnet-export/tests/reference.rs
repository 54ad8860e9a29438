//! Models of other tools, imported and run, against the logits of NumPy's
//! exact-integer forward pass (fixtures/README.md): both meanings of a packed
//! scale, master weights, and GGUF files of bitnet.cpp and llama.cpp.
//!
//! These random models are chaotic: where an activation lies so near to a half
//! that f32 rounds it the other way than f64, what follows differs. Such a flip
//! is allowed where the f64 pass of this test says so, and is named by position.

#![allow(clippy::unwrap_used)]

#[path = "../../bitnet-engine/tests/common/mod.rs"]
mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bitnet_core::names::{Linear, Norm, Tensor};
use bitnet_core::{Activation, Dtype};
use bitnet_engine::{KvType, LoadOptions, Model, Session, SessionOptions};
use bitnet_export::{ExportOptions, OpenOptions, export};
use bitnet_format::model::{self, Source};
use common::{Block, Dense, RandomModel, Weight, max_difference, norm_name, reference};
use serde_json::{Value, json};

/// Sequence and position at which an activation rounds the other way. The logits
/// of later positions are not compared.
type Flip = (usize, usize);

/// What a comparison found.
#[derive(Debug, PartialEq)]
struct Found {
    /// Where the engine and the f64 pass of this test part.
    flips: Vec<Flip>,
    /// Where the engine and the stored logits part.
    flips_of_reference: Vec<Flip>,
    /// First token of the greedy text that differs, of each sequence.
    greedy: Vec<Option<usize>>,
    embedding: Dtype,
}

fn crates() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// 512 tokens; the reference folders have no tokenizer.
fn tokenizer(folder: &Path) -> PathBuf {
    let vocab: serde_json::Map<String, Value> =
        (0..512).map(|i| (format!("t{i}"), i.into())).collect();
    let json = json!({ "model": { "type": "BPE", "vocab": vocab, "merges": [] } });
    let path = folder.join("tokenizer.json");
    std::fs::write(&path, json.to_string()).unwrap();
    path
}

/// The model of a source in plain numbers.
fn plain(source: &dyn Source) -> RandomModel {
    let config = source.facts().config.clone();
    let floats = |tensor: Tensor| {
        let mut out = vec![0.0; tensor.shape(&config).iter().product()];
        source.floats(tensor, 0, &mut out).unwrap();
        out
    };
    let dense = |tensor| Dense { values: floats(tensor), dtype: config.embedding_dtype };
    let blocks = (0..config.num_hidden_layers)
        .map(|layer| Block {
            norms: Norm::of(&config)
                .iter()
                .map(|n| (norm_name(*n), floats(Tensor::Norm(layer, *n))))
                .collect::<BTreeMap<_, _>>(),
            linears: Linear::ALL
                .iter()
                .map(|l| {
                    let t = source.ternary(Tensor::Linear(layer, *l)).unwrap();
                    Weight::Ternary { trits: t.values, scale: t.scale }
                })
                .collect(),
        })
        .collect();
    let head = (!config.tie_word_embeddings).then(|| dense(Tensor::Head));
    let embedding = dense(Tensor::Embedding);
    RandomModel { embedding, head, final_norm: floats(Tensor::FinalNorm), blocks, config }
}

/// The float32 matrix of a `.npy` file of version 1 in C order.
fn npy(path: &Path) -> Vec<f32> {
    let bytes = std::fs::read(path).unwrap();
    assert_eq!(&bytes[..8], b"\x93NUMPY\x01\0");
    let header = usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    let text = std::str::from_utf8(&bytes[10..10 + header]).unwrap();
    assert!(text.contains("'<f4'") && text.contains("'fortran_order': False"), "{text}");
    bytes[10 + header..].as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

fn numbers(v: &Value) -> Vec<u32> {
    v.as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect()
}

fn argmax(logits: &[f32]) -> u32 {
    logits.iter().zip(0u32..).reduce(|a, b| if b.0 > a.0 { b } else { a }).unwrap().1
}

/// Imports `src` and compares it with the logits in the folder `want`. A
/// difference is a failure where no activation lies near enough to a half.
fn check(src: &Path, want: &Path, hidden_act: Option<Activation>) -> Found {
    let temp = tempfile::tempdir().unwrap();
    let open = OpenOptions {
        hidden_act,
        tokenizer: Some(tokenizer(temp.path())),
        ..OpenOptions::default()
    };
    let source = model::open(src, &open).unwrap();
    let dst = temp.path().join("model.gguf");
    let report = export(src, &dst, &ExportOptions { open, ..ExportOptions::default() }).unwrap();
    assert_eq!(report.weights_compared, source.facts().config.parameter_count().linear);
    let model = Model::open(&dst, &LoadOptions { verify: true, ..LoadOptions::default() }).unwrap();
    let plain = plain(&*source);
    let options = SessionOptions { threads: Some(1), kv: KvType::F32, ..SessionOptions::default() };
    let mut session = Session::new(&model, &options).unwrap();
    let json = std::fs::read_to_string(want.join("ref.json")).unwrap();
    let json: Value = serde_json::from_str(&json).unwrap();
    let embedding = source.facts().config.embedding_dtype;
    let mut result =
        Found { flips: Vec::new(), flips_of_reference: Vec::new(), greedy: Vec::new(), embedding };
    for (i, sequence) in json["sequences"].as_array().unwrap().iter().enumerate() {
        let tokens = numbers(&sequence["tokens"]);
        let greedy = numbers(&sequence["greedy_no_cache"]);
        let all: Vec<u32> = tokens.iter().chain(&greedy).copied().collect();
        let logits = npy(&want.join(format!("seq{i}.npy")));
        assert_eq!(logits.len(), tokens.len() * 512);
        let exact = reference::run(&plain, &all);
        // Activations reach 127 and carry relative errors of a few 1e-7.
        let may_flip = |t: usize, difference: f32| {
            let margin = exact[t].margin;
            assert!(margin < 2e-5, "{i}, position {t}: {difference}, no flip: {margin}");
        };
        let (mut flipped, mut flipped_of_reference, mut differs) = (false, false, None);
        session.reset();
        session
            .score(&all, |t, found| {
                let difference = max_difference(found, &exact[t].logits);
                if !flipped && difference >= 1e-5 {
                    may_flip(t, difference);
                    flipped = true;
                    result.flips.push((i, t));
                }
                if t < tokens.len() && !flipped_of_reference {
                    let difference = max_difference(found, &logits[t * 512..(t + 1) * 512]);
                    if difference >= 1e-5 {
                        may_flip(t, difference);
                        flipped_of_reference = true;
                        result.flips_of_reference.push((i, t));
                    }
                }
                let next = (t + 1).checked_sub(tokens.len()).filter(|n| *n < greedy.len());
                if let Some(n) = next
                    && differs.is_none()
                    && argmax(found) != greedy[n]
                {
                    differs = Some(n);
                }
            })
            .unwrap();
        result.greedy.push(differs);
    }
    result
}

#[test]
fn a_packed_model_whose_scale_multiplies() {
    let folder = crates().join("bitnet-engine/tests/fixtures/bitnet_tiny_packed");
    let found = Found {
        flips: vec![(0, 27), (1, 47)],
        flips_of_reference: vec![],
        greedy: vec![Some(21), None, None],
        embedding: Dtype::Bf16,
    };
    assert_eq!(check(&folder, &folder, None), found);
}

#[test]
fn a_packed_model_whose_scale_divides() {
    let folder = crates().join("bitnet-export/tests/fixtures/llama_bitlinear_tiny_packed");
    let found = Found {
        flips: vec![(0, 16), (2, 1)],
        flips_of_reference: vec![(1, 18), (2, 1)],
        greedy: vec![None, None, None],
        embedding: Dtype::Bf16,
    };
    assert_eq!(check(&folder, &folder, None), found);
}

/// The files say `bitnet`, which means SiLU; the model has relu².
#[test]
fn gguf_files_of_other_tools() {
    let want = crates().join("bitnet-engine/tests/fixtures/bitnet_tiny_packed");
    for name in ["tiny-i2_s.gguf", "tiny-tq1_0.gguf", "tiny-tq2_0.gguf"] {
        let src = crates().join("bitnet-format/tests/fixtures").join(name);
        let found = Found {
            flips: vec![(0, 27), (1, 47)],
            flips_of_reference: vec![],
            greedy: vec![Some(21), None, None],
            embedding: Dtype::F16,
        };
        assert_eq!(check(&src, &want, Some(Activation::Relu2)), found, "{name}");
    }
}

/// The master weights are too large to be kept here: the folder that
/// `BITNET_REFERENCE` names holds `bitnet_tiny_bf16_master` and its logits.
#[test]
#[ignore = "needs the folder that BITNET_REFERENCE names"]
fn master_weights() {
    let folder = PathBuf::from(std::env::var("BITNET_REFERENCE").unwrap());
    let want = folder.join("logits/bitnet_master_numpy_int8_f64");
    let found = Found {
        flips: vec![(1, 26), (2, 20)],
        flips_of_reference: vec![(1, 26)],
        greedy: vec![None, None, None],
        embedding: Dtype::Bf16,
    };
    assert_eq!(check(&folder.join("bitnet_tiny_bf16_master"), &want, None), found);
}

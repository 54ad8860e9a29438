//! Parity with a model and logits of other tools: transformers' packed weights,
//! NumPy's exact-integer forward pass (fixtures/README.md).
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::path::PathBuf;

use bitnet_core::names::{self, Linear, Norm};
use bitnet_core::{Activation, Dtype, ModelConfig};
use bitnet_engine::{Session, SessionOptions};
use common::{Block, Dense, RandomModel, Weight, max_difference, norm_name, reference};
use half::bf16;
use safetensors::SafeTensors;

fn fixture(name: &str) -> Vec<u8> {
    let folder =
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/bitnet_tiny_packed");
    std::fs::read(folder.join(name)).unwrap()
}

fn config() -> ModelConfig {
    ModelConfig {
        hidden_size: 256,
        intermediate_size: 512,
        num_hidden_layers: 4,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: None,
        vocab_size: 512,
        max_position_embeddings: 256,
        rms_norm_eps: 1e-5,
        rope_theta: 500_000.0,
        hidden_act: Activation::Relu2,
        tie_word_embeddings: true,
        sub_norms: true,
        embedding_dtype: Dtype::Bf16,
        ..ModelConfig::tiny()
    }
}

/// The fixture in plain numbers.
fn model() -> RandomModel {
    let bytes = fixture("model.safetensors");
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let floats = |name: &str| -> Vec<f32> {
        let data = tensors.tensor(name).unwrap().data();
        data.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect()
    };
    let config = config();
    let linear = |l: Linear, layer: usize| {
        let [rows, cols] = l.shape(&config);
        let packed = tensors.tensor(&l.hf(layer)).unwrap();
        assert_eq!(packed.shape(), [rows / 4, cols]);
        // Byte [r, c], bits 2i and 2i+1: the code of row r + i·(rows/4).
        let trits = (0..rows * cols)
            .map(|at| {
                let (row, col) = (at / cols, at % cols);
                let byte = packed.data()[row % (rows / 4) * cols + col];
                (byte >> (2 * (row / (rows / 4))) & 3) as i8 - 1
            })
            .collect();
        Weight::Ternary { trits, scale: floats(&format!("{}_scale", l.hf(layer)))[0] }
    };
    let blocks = (0..config.num_hidden_layers)
        .map(|layer| Block {
            norms: Norm::of(&config)
                .iter()
                .map(|n| (norm_name(*n), floats(&n.hf(layer))))
                .collect::<BTreeMap<_, _>>(),
            linears: Linear::ALL.iter().map(|l| linear(*l, layer)).collect(),
        })
        .collect();
    let embedding = Dense { values: floats(names::EMBEDDING), dtype: Dtype::Bf16 };
    let final_norm = floats(names::FINAL_NORM);
    RandomModel { embedding, head: None, final_norm, blocks, config }
}

/// The float32 matrix of a `.npy` file of version 1 in C order.
fn npy(bytes: &[u8]) -> Vec<f32> {
    assert_eq!(&bytes[..8], b"\x93NUMPY\x01\0");
    let header = usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    let text = std::str::from_utf8(&bytes[10..10 + header]).unwrap();
    assert!(text.contains("'<f4'") && text.contains("'fortran_order': False"), "{text}");
    bytes[10 + header..].as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

#[test]
fn logits_and_greedy_tokens_equal_the_reference() {
    let plain = model();
    let (model, _dir) = plain.open();
    let options = SessionOptions { threads: Some(1), ..SessionOptions::default() };
    let mut session = Session::new(&model, &options).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&fixture("ref.json")).unwrap();
    let sequences = json["sequences"].as_array().unwrap();
    assert_eq!(sequences.len(), 3);
    let numbers = |v: &serde_json::Value| -> Vec<u32> {
        v.as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect()
    };
    let mut equal = 0;
    for (i, sequence) in sequences.iter().enumerate() {
        let tokens = numbers(&sequence["tokens"]);
        let want = npy(&fixture(&format!("seq{i}.npy")));
        assert_eq!(want.len(), tokens.len() * 512);
        session.reset();
        let (mut worst, mut nll) = (0f32, 0f64);
        session
            .score(&tokens, |t, logits| {
                worst = worst.max(max_difference(logits, &want[t * 512..(t + 1) * 512]));
                if let Some(&next) = tokens.get(t + 1) {
                    let sum: f64 = logits.iter().map(|x| f64::from(*x).exp()).sum();
                    nll += sum.ln() - f64::from(logits[next as usize]);
                }
            })
            .unwrap();
        assert!(worst < 1e-4, "sequence {i}: {worst}");
        let nll = nll / (tokens.len() - 1) as f64;
        assert!((nll - sequence["nll_mean_next_token"].as_f64().unwrap()).abs() < 1e-5);

        let mut greedy = Vec::new();
        for _ in 0..24 {
            greedy.push(argmax(session.logits()));
            session.decode(greedy[greedy.len() - 1]).unwrap();
        }
        let want = numbers(&sequence["greedy_no_cache"]);
        let all: Vec<u32> = tokens.iter().chain(&want).copied().collect();
        let steady = steady_positions(&plain, &mut session, &all);
        // Token n of the text is the answer of position tokens - 1 + n.
        let exact = (steady + 1 - tokens.len()).min(24);
        assert!(exact >= 12 && greedy[..exact] == want[..exact], "{i}: {want:?} {greedy:?}");
        equal += usize::from(greedy == want);
    }
    // In the first, an activation rounds the other way in f32 than in f64, and
    // a few tokens later the best two logits are closer than what that moves.
    assert!(equal >= 2, "{equal} of 3 greedy texts are the reference's");
}

fn argmax(logits: &[f32]) -> u32 {
    logits.iter().zip(0u32..).reduce(|a, b| if b.0 > a.0 { b } else { a }).unwrap().1
}

/// How many positions have the logits of an f64 forward pass, within 1e-5: all,
/// or those before the first at which an activation lies so near to a half that
/// f32 rounds it the other way.
fn steady_positions(plain: &RandomModel, session: &mut Session, tokens: &[u32]) -> usize {
    let want = reference::run(plain, tokens);
    let mut differences = Vec::new();
    session.reset();
    session
        .score(tokens, |t, found| differences.push(max_difference(found, &want[t].logits)))
        .unwrap();
    let steady = differences.iter().position(|d| *d >= 1e-5).unwrap_or(tokens.len());
    if let Some(flipped) = want.get(steady) {
        // Activations reach 127 and carry relative errors of a few 1e-7.
        let (margin, difference) = (flipped.margin, differences[steady]);
        assert!(margin < 2e-5, "position {steady}: {difference}, no flip explains it: {margin}");
    }
    steady
}

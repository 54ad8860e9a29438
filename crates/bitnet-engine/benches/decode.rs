//! Decode beside itself: the int8 head against the stored one, and batches of
//! sequences against one, at the shapes of a 2B model with random weights.
//!
//! Medians of interleaved steps in one process (with `--best` the fastest, for a
//! machine that is busy with other work).
//! `cargo bench -p bitnet-engine -- [head|batch] [--threads N] [--best]`

#![allow(clippy::unwrap_used)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::hint::black_box;
use std::time::Instant;

use bitnet_core::{Dtype, ModelConfig};
use bitnet_engine::{BatchSession, HeadMode, Model, Session, SessionOptions, physical_cores};
use common::RandomModel;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let at = args.iter().position(|a| a == "--threads");
    let threads = at.and_then(|i| args.get(i + 1)?.parse().ok()).unwrap_or_else(physical_cores);
    let names = ["head", "batch"];
    let all = !args.iter().any(|a| names.contains(&a.as_str()));
    let wanted = |name: &str| all || args.iter().any(|a| a == name);
    println!("{threads} threads");
    if wanted("head") {
        head(threads);
    }
    if wanted("batch") {
        // With next to no head, and with one of a fifth of the weights.
        batch(threads, 320);
        batch(threads, 64_000);
    }
}

/// The shapes of BitNet b1.58 2B4T, with fewer layers.
fn shapes(layers: usize, vocab: usize) -> ModelConfig {
    ModelConfig {
        hidden_size: 2560,
        intermediate_size: 6912,
        num_hidden_layers: layers,
        num_attention_heads: 20,
        num_key_value_heads: 5,
        vocab_size: vocab,
        max_position_embeddings: 1024,
        embedding_dtype: Dtype::F16,
        ..ModelConfig::tiny()
    }
}

fn options(threads: usize, head: HeadMode) -> SessionOptions {
    let (context, threads) = (Some(512), Some(threads));
    SessionOptions { head, context, threads, ..SessionOptions::default() }
}

/// Median (or best) milliseconds of each of some runs, taken in turns.
fn medians(rounds: usize, runs: &mut [&mut dyn FnMut()]) -> Vec<f64> {
    let best = std::env::args().any(|arg| arg == "--best");
    let mut times = vec![Vec::new(); runs.len()];
    for round in 0..=rounds {
        for (run, times) in runs.iter_mut().zip(&mut times) {
            let start = Instant::now();
            run();
            if round > 0 {
                times.push(start.elapsed().as_secs_f64() * 1e3);
            }
        }
    }
    let median = |mut t: Vec<f64>| {
        t.sort_by(f64::total_cmp);
        if best { t[0] } else { t[t.len() / 2] }
    };
    times.into_iter().map(median).collect()
}

/// 128 256 rows of 2560 in f16; the one small block is measured by itself and
/// taken off.
fn head(threads: usize) {
    let config = ModelConfig { intermediate_size: 256, ..shapes(1, 128_256) };
    let (model, _dir) = RandomModel::new(&config, 1).open();
    let rest = ModelConfig { vocab_size: 320, ..config };
    let (rest, _dir) = RandomModel::new(&rest, 1).open();
    let session = |model: &Model, head| Session::new(model, &options(threads, head)).unwrap();
    let start = Instant::now();
    let mut int8 = session(&model, HeadMode::Int8Exact);
    println!("int8 copy of the head made in {:.2} s", start.elapsed().as_secs_f64());
    let mut stored = session(&model, HeadMode::Stored);
    let mut rest = session(&rest, HeadMode::Stored);
    let step = |s: &mut Session| {
        s.truncate(8);
        let token = (s.position() % 300) as u32;
        black_box(s.decode_top(token, 1).unwrap());
    };
    let best = |s: &mut Session| s.decode_top(7, 20).unwrap().to_vec();
    assert!((0..40).all(|_| best(&mut stored) == best(&mut int8)));
    let [stored, int8, rest] = medians(
        40,
        &mut [&mut || step(&mut stored), &mut || step(&mut int8), &mut || step(&mut rest)],
    )[..] else {
        unreachable!("three runs")
    };
    let (stored, int8) = (stored - rest, int8 - rest);
    println!("head 128256 x 2560, ms a token: f16 {stored:.2}, int8 exact {int8:.2}");
    println!(
        "ratio {:.2}; {:.1} GB/s of f16, {:.1} GB/s of int8",
        stored / int8,
        0.656_671 / stored * 1e3,
        0.329_874 / int8 * 1e3
    );
}

/// Steps of 1 to 16 sequences at about 100 positions each.
fn batch(threads: usize, vocab: usize) {
    println!("8 layers, vocabulary {vocab}");
    let (model, _dir) = RandomModel::new(&shapes(8, vocab), 2).open();
    let sizes = [1, 2, 4, 8, 16];
    let mut batch = BatchSession::new(&model, &options(threads, HeadMode::Stored), 16).unwrap();
    for i in 0..16 {
        batch.prefill(i, &[i as u32; 100]).unwrap();
    }
    let batch = std::cell::RefCell::new(batch);
    let step = |size: usize| {
        let steps: Vec<(usize, u32)> = (0..size).map(|i| (i, 5)).collect();
        let mut batch = batch.borrow_mut();
        black_box(batch.decode(&steps).unwrap());
        (0..size).for_each(|i| batch.truncate(i, 100).unwrap());
    };
    let step = &step;
    let mut runs = sizes.map(|size| move || step(size));
    let mut runs: Vec<&mut dyn FnMut()> =
        runs.iter_mut().map(|run| run as &mut dyn FnMut()).collect();
    let times = medians(30, &mut runs);
    for (size, ms) in sizes.into_iter().zip(&times) {
        let rate = size as f64 / ms * 1e3;
        let ratio = rate / (1e3 / times[0]);
        println!("batch of {size:2}: {ms:7.2} ms a step, {rate:7.1} tokens/s, {ratio:.2} of one");
    }
}

//! Decode beside itself: the scans of the head against the stored one, and batches
//! of sequences against one, at the shapes of a 2B model with random weights.
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

/// 128 256 rows of 2560 in f16, after hidden states that point nowhere and after
/// some that point towards a row.
fn head(threads: usize) {
    let config = ModelConfig { intermediate_size: 256, ..shapes(1, 128_256) };
    let (model, _dir) = RandomModel::new(&config, 1).open();
    let session = |head| Session::new(&model, &options(threads, head)).unwrap();
    let mut sessions = HeadMode::ALL.map(|head| {
        let start = Instant::now();
        let session = session(head);
        if head == HeadMode::Int8Exact {
            println!("copy of the head made in {:.2} s", start.elapsed().as_secs_f64());
        }
        session
    });
    for cosine in [0.25, 0.0] {
        let hs: Vec<Vec<f32>> = (0..8).map(|i| hidden(&model, i, cosine)).collect();
        for h in &hs {
            let [stored, int8, int4] = sessions.each_mut().map(|s| s.top_of_hidden(h, 20).unwrap());
            assert!(stored == int8 && stored == int4);
        }
        let before = sessions.each_ref().map(Session::head_counts);
        let mut runs = sessions.each_mut().map(|session| {
            let hs = &hs;
            let mut i = 0;
            move || {
                i += 1;
                black_box(session.top_of_hidden(&hs[i % hs.len()], 1).unwrap());
            }
        });
        let mut runs: Vec<&mut dyn FnMut()> =
            runs.iter_mut().map(|run| run as &mut dyn FnMut()).collect();
        let times = medians(80, &mut runs);
        println!("head 128256 x 2560, best token, cosine {cosine} with a row:");
        for (i, (session, ms)) in sessions.iter().zip(&times).enumerate() {
            let (now, before) = (session.head_counts(), before[i]);
            let mean = |now: u64, before: u64| (now - before) as f64 / 81.0;
            println!(
                "  {:6} {ms:7.2} ms, {:.2} times stored; a search: {:.2} full scans, \
                 {:.1} rows refined, {:.1} scored",
                session.head().name(),
                times[0] / ms,
                mean(now.full_scans, before.full_scans),
                mean(now.refined, before.refined),
                mean(now.scored, before.scored),
            );
        }
    }
}

/// A hidden state with that cosine with row `1000·i` of the head, or one that points
/// nowhere.
fn hidden(model: &Model, i: usize, cosine: f32) -> Vec<f32> {
    let norm = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>().sqrt();
    let mut row = vec![0.0; model.config().hidden_size];
    model.head().read_row(1000 * i, &mut row);
    let noise = common::Random(i as u64).floats(row.len());
    let (a, b) = (cosine / norm(&row), (1.0 - cosine * cosine).sqrt() / norm(&noise));
    row.iter().zip(&noise).map(|(w, x)| 50.0 * (a * w + b * x)).collect()
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

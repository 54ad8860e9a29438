//! Synthetic models: the engine takes them, a seed decides every byte, memory
//! does not grow with the file, and what cannot be written is refused.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Command;

use bitnet_core::names::Linear;
use bitnet_core::{Activation, Dtype, Exit, Layout, ModelConfig, WeightQuantizer};
use bitnet_engine::{LinearRef, LoadOptions, Model, Session, SessionOptions};
use bitnet_export::{
    ExportError, LayoutChoice, Phase, SyntheticOptions, SyntheticReport, model_config, synthesize,
};
use serde_json::Value;

fn options(layout: LayoutChoice, seed: u64) -> SyntheticOptions {
    SyntheticOptions { layout, seed, name: "noise".into() }
}

fn write(config: &ModelConfig, dst: &Path, options: &SyntheticOptions) -> SyntheticReport {
    synthesize(config, dst, options, &mut |_| ControlFlow::Continue(())).unwrap()
}

/// Every weight is looked at on opening.
fn verified() -> LoadOptions {
    LoadOptions { verify: true, ..LoadOptions::default() }
}

/// A config of the project.
fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs").join(format!("{name}.toml"))
}

/// The likeliest tokens after one another, and the largest logit of all.
fn greedy(model: &Model, count: usize) -> (Vec<u32>, f32) {
    let options = SessionOptions { context: Some(32), ..SessionOptions::default() };
    let mut session = Session::new(model, &options).unwrap();
    let mut largest = 0.0f32;
    let mut best = |logits: &[f32]| {
        assert!(logits.iter().all(|x| x.is_finite()));
        let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
        largest = largest.max(logits[best]);
        best as u32
    };
    let mut tokens = vec![best(session.prefill(&[5, 1, 42, 42, 7]).unwrap())];
    while tokens.len() < count {
        tokens.push(best(session.decode(*tokens.last().unwrap()).unwrap()));
    }
    (tokens, largest)
}

#[test]
fn the_engine_verifies_and_runs_them() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["tiny", "125m"] {
        let config = model_config(shipped(name).to_str().unwrap(), &[]).unwrap();
        let mut said = Vec::new();
        for layout in Layout::ALL {
            let path = dir.path().join("m.gguf");
            let report = write(&config, &path, &options(layout.into(), 7));
            assert_eq!(report.bytes, fs::metadata(&path).unwrap().len());
            assert_eq!((report.layout, &report.layout_reason[..]), (layout.name(), "asked for"));
            let count = config.parameter_count();
            assert_eq!(
                (report.parameters, report.linear_parameters),
                (count.total(), count.linear)
            );

            let model = Model::open(&path, &verified()).unwrap();
            assert_eq!((model.layout(), model.name()), (layout, "noise"));
            assert_eq!(model.config(), &config);
            assert!(model.norm(0, bitnet_core::names::Norm::Attention).unwrap()[0] == 1.0);
            let tokenizer = model.tokenizer().unwrap();
            assert_eq!(tokenizer.decode(&tokenizer.encode("a € b").unwrap()), "a € b");
            let (tokens, largest) = greedy(&model, 6);
            assert_eq!(greedy(&model, 6).0, tokens);
            // Logits of a model at the start of its training: about a normal
            // distribution's, of variance hidden · 0.02².
            assert!(largest > 0.1 && largest < 20.0, "{name} {layout:?}: {largest}");
            said.push(tokens);
        }
        // Same seed, same weights, whatever the layout.
        assert_eq!(said[0], said[1], "{name}");
    }
}

#[test]
fn every_kind_of_model_can_be_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let tiny = ModelConfig::tiny();
    let cases = [
        ModelConfig { weight_quantizer: WeightQuantizer::None, ..tiny.clone() },
        ModelConfig { sub_norms: false, hidden_act: Activation::Silu, ..tiny.clone() },
        ModelConfig { embedding_dtype: Dtype::F32, tie_word_embeddings: false, ..tiny.clone() },
        ModelConfig { embedding_dtype: Dtype::Bf16, head_dim: Some(32), ..tiny.clone() },
        ModelConfig { vocab_size: 257, ..tiny },
    ];
    for config in cases {
        let report = write(&config, &path, &options(LayoutChoice::Auto, 0));
        assert_eq!(report.layout, "p2");
        let model = Model::open(&path, &verified()).unwrap();
        assert_eq!(model.config(), &config);
        greedy(&model, 3);
    }
}

#[test]
fn a_seed_decides_every_byte() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = |seed, threads| {
        let path = dir.path().join("m.gguf");
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let config = ModelConfig { hidden_size: 512, ..ModelConfig::tiny() };
        pool.install(|| write(&config, &path, &options(Layout::P5.into(), seed)));
        fs::read(&path).unwrap()
    };
    let first = bytes(3, 1);
    assert!(first == bytes(3, 1) && first == bytes(3, 4));
    assert!(first != bytes(4, 1));
}

#[test]
fn tensors_differ_and_have_zeros_like_a_trained_model() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let config = ModelConfig { hidden_size: 640, ..ModelConfig::tiny() };
    write(&config, &path, &options(Layout::P5.into(), 0));
    let model = Model::open(&path, &LoadOptions::default()).unwrap();
    let trits = |layer, linear| {
        let LinearRef::Ternary(rows) = model.linear(layer, linear) else { panic!() };
        let mut all = Vec::new();
        let mut row = vec![0i8; rows.cols];
        for bytes in rows.bytes.chunks_exact(rows.layout.row_bytes(rows.cols)) {
            rows.layout.unpack_row(bytes, &mut row).unwrap();
            all.extend_from_slice(&row);
        }
        all
    };
    let (q, o, next) = (trits(0, Linear::Q), trits(0, Linear::O), trits(1, Linear::Q));
    assert!(q != o && q != next && q[..640] != q[640..1280]);
    let zeros = q.iter().filter(|t| **t == 0).count() as f64 / q.len() as f64;
    assert!((zeros - 0.42).abs() < 0.01, "{zeros}");
}

#[test]
fn what_is_broken_off_or_refused_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let dst = dir.path().join("m.gguf");
    let tiny = ModelConfig::tiny();
    let run = |config: &ModelConfig, dst: &Path, stop: Option<Phase>| {
        synthesize(config, dst, &options(LayoutChoice::Auto, 0), &mut |p| {
            if Some(p.phase) == stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .unwrap_err()
    };
    for phase in [Phase::Generate, Phase::Flush] {
        assert!(matches!(run(&tiny, &dst, Some(phase)), ExportError::Interrupted));
    }
    let small = ModelConfig { vocab_size: 256, ..tiny.clone() };
    let error = run(&small, &dst, None);
    assert_eq!(error.exit(), Exit::Usage);
    assert_eq!(
        error.to_string(),
        "model.vocab_size = 256: a synthetic model has at least 257 tokens"
    );
    assert_eq!(run(&tiny, dir.path(), None).exit(), Exit::Usage);
    // Larger than any disk: 10 000 blocks of the widest matrices.
    let vast = ModelConfig {
        hidden_size: 131_072,
        intermediate_size: 131_072,
        num_hidden_layers: 10_000,
        ..tiny
    };
    let error = run(&vast, &dst, None);
    assert_eq!(error.exit(), Exit::Failed);
    assert!(matches!(error, ExportError::Space { needs, has, .. } if needs > has), "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn the_command_reports_and_exits_as_documented() {
    let dir = tempfile::tempdir().unwrap();
    let dst = dir.path().join("m.gguf");
    let dst = dst.to_str().unwrap();
    let call = |args: &[&str]| {
        let exe = env!("CARGO_BIN_EXE_bitnet-export");
        let out = Command::new(exe).args(args).env_remove("RUST_LOG").output().unwrap();
        let text = |b: Vec<u8>| String::from_utf8(b).unwrap();
        (out.status.code(), text(out.stdout), text(out.stderr))
    };
    let config = shipped("700m");
    let config = config.to_str().unwrap();
    let args = ["synthetic", "--config", config, "--seed", "5", "-o", dst, "--json", "-"];
    let (code, stdout, stderr) = call(&args);
    assert_eq!(code, Some(0), "{stderr}");
    let report: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(report["parameters"], 728_839_680);
    assert_eq!((report["layout"].as_str(), report["seed"].as_u64()), (Some("p5"), Some(5)));
    assert_eq!(report["name"], "700m-synthetic");
    assert_eq!(report["bytes"], fs::metadata(dst).unwrap().len());
    assert!(stderr.contains("writing (") && stderr.contains("MB/s"), "{stderr}");
    // 241 MB were written.
    if cfg!(target_os = "linux") {
        let peak = report["peak_rss_bytes"].as_u64().unwrap();
        assert!(peak < 64 << 20, "{peak} bytes of memory");
    }

    let set = "model.num_hidden_layers=2";
    let args = ["synthetic", "--config", config, "--set", set, "--layout", "p5", "-o", dst];
    let (code, stdout, _) = call(&args);
    assert_eq!(code, Some(0));
    assert!(stdout.contains("layout      p5 (asked for)"), "{stdout}");

    // As a name: the program lies below the workspace's folder, or is called in it.
    let out = Command::new(env!("CARGO_BIN_EXE_bitnet-export"))
        .args(["synthetic", "--config", "tiny", "-o", dst])
        .current_dir(shipped("tiny").ancestors().nth(2).unwrap())
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(0));

    for args in [
        &["synthetic", "--config", "no-such", "-o", dst][..],
        &["synthetic", "--config", config],
        &["synthetic", "-o", dst],
        &["synthetic", "--config", config, "-o", dst, "--set", "model.vocab_size=12"],
        &["synthetic", "--config", config, "-o", dst, "--set", "batch.tokens=12"],
        &["synthetic", "--config", config, "-o", dst, "--layout", "p9"],
        &["synthetic", "--config", config, "-o", dst, "--dense", "f16"],
        &["folder", "synthetic", "--config", config, "-o", dst],
        &["-o", dst],
        &[],
    ] {
        let (code, stdout, stderr) = call(args);
        assert_eq!((code, stdout.as_str()), (Some(2), ""), "{args:?}: {stderr}");
    }
    let (code, _, stderr) = call(&["synthetic", "--config", config, "-o", "/proc/m.gguf"]);
    assert_eq!((code, stderr.contains("/proc/m.gguf")), (Some(1), true), "{stderr}");
}

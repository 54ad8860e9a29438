//! `bitnet-train --dry-run`: what it says, that it is true, and the micro-batch
//! that is chosen by it.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use common::prepared;
use serde_json::Value;

/// A model large enough that the program itself is a small part of its memory.
const MODEL: [&str; 7] = [
    "model.vocab_size=320",
    "model.hidden_size=256",
    "model.intermediate_size=640",
    "model.num_hidden_layers=4",
    "batch.tokens=4096",
    "batch.micro_batch=16",
    "eval.windows=4",
];

fn command(dir: &Path, name: &str, set: &[&str]) -> Command {
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../../configs/{name}.toml"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_bitnet-train"));
    command.current_dir(dir).arg("--config").arg(config);
    command.args(["--data", "data", "--run", "run", "--steps", "2", "--threads", "2"]);
    for pair in set {
        command.args(["--set", pair]);
    }
    command
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn json(command: &mut Command) -> Value {
    let output = command.args(["--json", "-"]).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_dry_run_writes_nothing_and_names_every_part() {
    let dir = tempfile::tempdir().unwrap();
    prepared(dir.path(), "data", 0);
    let files = || fs::read_dir(dir.path()).unwrap().count();
    let before = files();
    let output = command(dir.path(), "tiny", &MODEL).arg("--dry-run").output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    let parts = ["weights", "gradients", "adamw", "activations", "head, logits", "data", "program"];
    for part in parts.iter().chain(&["embedding", "linear layers", "norms", "predicted peak"]) {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_eq!(files(), before);
    // What the run would refuse is not planned.
    for (key, words) in [
        ("optimizer.moments=int8", "optimizer.moments = int8: is for --device cpu, not ndarray"),
        ("quantization.gradients=fixed16", "quantization.gradients = fixed16: is for --device cpu"),
    ] {
        let mut command = command(dir.path(), "tiny", &MODEL);
        let output = command.args(["--dry-run", "--device", "ndarray", "--set", key]).output();
        let output = output.unwrap();
        assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
        assert!(stderr(&output).contains(words), "{}", stderr(&output));
    }
    assert_eq!(files(), before);
    let plan = json(command(dir.path(), "tiny", &MODEL).arg("--dry-run"));
    assert_eq!(plan["micro_batch"], 16);
    assert_eq!(plan["micro_steps"], 2);
    let tensors = plan["tensors"].as_object().unwrap().values();
    let sum: u64 = tensors.map(|v| v.as_u64().unwrap()).sum();
    let rest = plan["data_bytes"].as_u64().unwrap() + plan["program_bytes"].as_u64().unwrap();
    assert_eq!(plan["predicted_peak_bytes"], sum + rest);
    assert_eq!(files(), before);
    let mut wrong = command(dir.path(), "tiny", &["model.vocab_size=100"]);
    assert_eq!(wrong.arg("--dry-run").output().unwrap().status.code(), Some(2));
}

/// The promise: within 15 % of the measured peak, with and without recomputation.
#[cfg(target_os = "linux")]
#[test]
fn the_prediction_is_near_the_measured_peak() {
    let dir = tempfile::tempdir().unwrap();
    prepared(dir.path(), "data", 0);
    let mut peaks = Vec::new();
    for recompute in ["batch.recompute=false", "batch.recompute=true"] {
        let set: Vec<&str> = MODEL.into_iter().chain([recompute]).collect();
        let dry = json(command(dir.path(), "tiny", &set).arg("--dry-run"));
        let predicted = dry["predicted_peak_bytes"].as_f64().unwrap();
        let run = json(&mut command(dir.path(), "tiny", &set));
        let measured = run["peak_rss_bytes"].as_f64().unwrap();
        let error = predicted / measured - 1.0;
        assert!(error.abs() < 0.15, "{recompute}: {predicted} and {measured}: {error:+.3}");
        fs::remove_dir_all(dir.path().join("run")).unwrap();
        peaks.push(measured);
    }
    // Program, data and the state of the optimizer stay.
    assert!(peaks[1] < 0.8 * peaks[0], "{peaks:?}");
}

/// The same promise of a run with a teacher: its predictions, and the relations too.
#[cfg(target_os = "linux")]
#[test]
fn a_teacher_is_in_the_prediction() {
    let dir = tempfile::tempdir().unwrap();
    prepared(dir.path(), "data", 0);
    // Of other widths than the student's, with a head of its own.
    let wide = [
        "model.hidden_size=320",
        "model.weight_quantizer=none",
        "model.tie_word_embeddings=false",
        "eval.windows=1",
    ];
    let set: Vec<&str> = MODEL.into_iter().chain(wide).collect();
    let output = command(dir.path(), "tiny", &set).args(["--until", "1"]).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    fs::rename(dir.path().join("run"), dir.path().join("teacher")).unwrap();
    let teacher = ["distill.teacher=\"teacher\"", "distill.relation_heads=2"];
    let mut alone = command(dir.path(), "tiny", &MODEL);
    let alone = json(alone.arg("--dry-run"))["predicted_peak_bytes"].as_f64().unwrap();
    for (what, recompute) in [
        (["distill.logits=1", "distill.relations=0"], "batch.recompute=false"),
        (["distill.logits=1", "distill.relations=0"], "batch.recompute=true"),
        (["distill.logits=0", "distill.relations=1"], "batch.recompute=false"),
    ] {
        let set: Vec<&str> =
            MODEL.into_iter().chain(teacher).chain(what).chain([recompute]).collect();
        let plan = json(command(dir.path(), "tiny", &set).arg("--dry-run"));
        // More than the weights of its 4 blocks: 3 matrices 320 · 320 and 3 of 640 · 320.
        assert!(plan["tensors"]["teacher"].as_u64().unwrap() > 4 * 4 * 921_600, "{plan}");
        let predicted = plan["predicted_peak_bytes"].as_f64().unwrap();
        assert!(recompute.ends_with("true") || predicted > alone + 16e6, "{predicted} {alone}");
        let run = json(&mut command(dir.path(), "tiny", &set));
        let error = predicted / run["peak_rss_bytes"].as_f64().unwrap() - 1.0;
        assert!(error.abs() < 0.15, "{what:?}, {recompute}: {plan} {run}: {error:+.3}");
        fs::remove_dir_all(dir.path().join("run")).unwrap();
    }
    let set: Vec<&str> = MODEL.into_iter().chain(teacher).chain(["distill.logits=1"]).collect();
    fs::rename(dir.path().join("teacher"), dir.path().join("gone")).unwrap();
    let output = command(dir.path(), "tiny", &set).arg("--dry-run").output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
}

#[cfg(target_os = "linux")]
#[test]
fn an_automatic_micro_batch_is_chosen_once() {
    let dir = tempfile::tempdir().unwrap();
    prepared(dir.path(), "data", 0);
    let small = ["model.vocab_size=320", "batch.tokens=1024", "batch.micro_batch=auto"];
    let output = command(dir.path(), "tiny", &small).args(["--until", "1"]).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    // All eight sequences of the step fit.
    assert!(stderr(&output).contains("batch.micro_batch = 8: the greatest that fits"));
    let saved = dir.path().join("run/config.toml");
    let text = fs::read_to_string(&saved).unwrap();
    assert!(text.contains("micro_batch = 8\n"), "{text}");
    // A resumed run takes the number that it began with, whatever would fit now.
    fs::write(&saved, text.replace("micro_batch = 8\n", "micro_batch = 4\n")).unwrap();
    let output = command(dir.path(), "tiny", &small).arg("--resume").output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(!stderr(&output).contains("changed since"), "{}", stderr(&output));
    assert!(fs::read_to_string(&saved).unwrap().contains("micro_batch = 4\n"));
}

#[cfg(target_os = "linux")]
#[test]
fn what_cannot_fit_is_refused_with_the_bytes() {
    let dir = tempfile::tempdir().unwrap();
    prepared(dir.path(), "data", 0);
    // Weights, moments and gradients of 100B parameters are more than a terabyte.
    let set = ["batch.sequence=32", "batch.tokens=64", "batch.micro_batch=auto"];
    let mut command = command(dir.path(), "100b", &set);
    let output = command.arg("--dry-run").output().unwrap();
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{text}");
    let start = "error: batch.micro_batch = \"auto\": even 1 needs ";
    let rest = text.strip_prefix(start).unwrap();
    let bytes: u64 = rest.split(' ').next().unwrap().parse().unwrap();
    assert!(bytes > 1 << 40, "{text}");
    assert!(text.contains("are free; with batch.recompute = true it needs "), "{text}");
}

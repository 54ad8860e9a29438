//! What the program does with runs: `report`, `sweep`, `reproduce`, and what a run
//! leaves for them.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use bitnet_train::metrics::{self, Metric};
use common::prepared;
use serde_json::Value;

fn program(dir: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bitnet-train"));
    command.current_dir(dir).args(arguments);
    command
}

/// The tiny model's config on the tests' data, 12 steps.
fn settings(command: &mut Command) -> &mut Command {
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/tiny.toml");
    command.arg("--config").arg(config).args(["--data", "data"]);
    for set in [
        "model.vocab_size=320",
        "batch.tokens=128",
        "batch.sequence=32",
        "batch.micro_batch=4",
        "schedule.steps=12",
        "schedule.warmup_steps=2",
        "eval.every=4",
        "eval.windows=4",
        "sample.prompts=[\"the cat \"]",
        "sample.every=4",
        "sample.tokens=3",
        "checkpoint.every=5",
        "metrics.weights_every=3",
    ] {
        command.args(["--set", set]);
    }
    command
}

fn train(dir: &Path, run: &str, more: &[&str]) -> Output {
    let output = settings(&mut program(dir, &[])).args(["--run", run]).args(more).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    output
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// Steps and bits of the losses.
fn losses(run: &Path) -> Vec<(u64, u64)> {
    let all = metrics::read(&run.join("metrics.jsonl")).unwrap();
    let loss = |m: &Metric| match m {
        Metric::Train(m) => Some((m.step, m.loss.to_bits())),
        _ => None,
    };
    all.iter().filter_map(loss).collect()
}

#[test]
fn every_start_of_a_run_is_recorded() {
    let dir = tempfile::tempdir().unwrap();
    prepared(dir.path(), "data", 0);
    train(dir.path(), "run", &["--until", "7", "--threads", "1"]);
    train(dir.path(), "run", &["--resume", "--set", "eval.windows=2"]);
    let info = json(&dir.path().join("run/run.json"));
    let starts = info["starts"].as_array().unwrap();
    assert_eq!(starts.len(), 2);
    let manifest = json(&dir.path().join("data/manifest.json"));
    assert_eq!((&starts[0]["step"], &starts[1]["step"]), (&0.into(), &7.into()));
    assert_eq!(starts[0]["threads"], 1);
    assert_eq!(starts[1]["changed"][0], "eval.windows: 4 → 2");
    assert_eq!(starts[0]["data"]["corpus_hash"], manifest["corpus_hash"]);
    assert_eq!(starts[0]["data"]["tokenizer_sha256"], manifest["tokenizer"]["sha256"]);
    let command = starts[1]["command"].as_array().unwrap();
    assert!(command.contains(&"--resume".into()), "{command:?}");
    let events = fs::read_dir(dir.path().join("run/tensorboard")).unwrap().count();
    assert_eq!(events, 2);
    train(
        dir.path(),
        "bare",
        &["--set", "metrics.tensorboard=false", "--set", "metrics.weights_every=0"],
    );
    assert!(!dir.path().join("bare/tensorboard").exists());
    let all = metrics::read(&dir.path().join("bare/metrics.jsonl")).unwrap();
    assert!(!all.iter().any(|m| matches!(m, Metric::Weights(_))));
    assert_eq!(losses(&dir.path().join("bare")), losses(&dir.path().join("run")));
}

#[test]
fn a_run_is_reproduced_or_the_difference_told() {
    let dir = tempfile::tempdir().unwrap();
    prepared(dir.path(), "data", 0);
    train(dir.path(), "run", &["--until", "6"]);
    train(dir.path(), "run", &["--resume"]);
    let output = program(dir.path(), &["reproduce", "run", "--threads", "1"]).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    // A loss and a norm a step, and three evaluations.
    assert_eq!(stdout(&output), "identical: 27 values of 12 steps, bit for bit\n");
    assert!(!stderr(&output).contains("warning"), "{}", stderr(&output));
    // The last bit of one loss.
    let path = dir.path().join("run/metrics.jsonl");
    let text = fs::read_to_string(&path).unwrap();
    let (_, bits) = losses(&dir.path().join("run"))[4];
    let (old, new) = (f64::from_bits(bits), f64::from_bits(bits ^ 1));
    let spoiled = text.replacen(&format!("\"loss\":{old:?}"), &format!("\"loss\":{new:?}"), 1);
    assert_ne!(spoiled, text);
    fs::write(&path, spoiled).unwrap();
    let args = ["reproduce", "run", "--steps", "4", "--json", "-"];
    let output = program(dir.path(), &args).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&value["steps"], &value["identical"]), (&4.into(), &true.into()));
    let args = ["reproduce", "run", "--into", "again"];
    let output = program(dir.path(), &args).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stdout(&output).contains("first difference    step 5: loss "), "{}", stdout(&output));
    assert!(stderr(&output).contains("run: the losses are not those of the run"));
    assert_eq!(losses(&dir.path().join("again")).len(), 12);
    // Other tokens: a warning before, a difference after.
    prepared(dir.path(), "other", 7);
    let text = fs::read_to_string(dir.path().join("run/run.json")).unwrap();
    let hash = json(&dir.path().join("other/manifest.json"))["tokenizer"]["sha256"].clone();
    let args = ["reproduce", "run", "--steps", "2", "--data", "other"];
    let output = program(dir.path(), &args).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let changed = !text.contains(hash.as_str().unwrap());
    assert_eq!(stderr(&output).contains("warning: tokenizer: the run had "), changed);
    for (args, code, message) in [
        (&["reproduce", "no"][..], 3, "no: no run folder: there is no such folder"),
        (&["reproduce", "run", "--steps", "0"], 2, "--steps"),
        (&["reproduce", "run", "--data", "nowhere"], 3, "nowhere"),
        (&["report", "no"], 3, "no: no run folder: there is no such folder"),
        (&["report"], 2, "<RUN>"),
    ] {
        let output = program(dir.path(), args).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{}", stderr(&output));
        assert!(stderr(&output).contains(message), "{}", stderr(&output));
    }
    let output = program(dir.path(), &["report", "run", "again", "-o", "r.html"]).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let page = fs::read_to_string(dir.path().join("r.html")).unwrap();
    assert!(page.contains("resumed</th><td>1×</td><td>0×</td>"));
}

#[test]
fn a_sweep_goes_on_and_survives_a_failure() {
    let dir = tempfile::tempdir().unwrap();
    prepared(dir.path(), "data", 0);
    // The second one's weights grow until the loss is no number.
    fs::write(
        dir.path().join("list.txt"),
        "# seeds\nseed=1\nschedule.lr=9.0 schedule.weight_decay=9.0 schedule.warmup_steps=0 \
         schedule.steps=60\nseed=2\n",
    )
    .unwrap();
    let sweep = |more: &[&str]| {
        let mut command = program(dir.path(), &["sweep", "--list", "list.txt", "--dir", "all"]);
        settings(&mut command).args(more).output().unwrap()
    };
    // As if the sweep had been stopped in its first run.
    train(dir.path(), "all/seed-1", &["--until", "7"]);
    train(dir.path(), "whole", &[]);
    let output = sweep(&["--report", "r.html"]);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("run 2 of 3: ") && text.contains("error: lr-9.0_"), "{text}");
    assert!(text.contains("1 of 3 runs failed; see all"), "{text}");
    assert_eq!(losses(&dir.path().join("all/seed-1")), losses(&dir.path().join("whole")));
    let table = json(&dir.path().join("all/sweep.json"));
    let runs = table["runs"].as_array().unwrap();
    let statuses: Vec<&str> = runs.iter().map(|r| r["status"].as_str().unwrap()).collect();
    assert_eq!(statuses, ["finished", "finished", "failed"]);
    assert!(runs[0]["val_loss"].as_f64() <= runs[1]["val_loss"].as_f64());
    assert!(runs[2]["error"].as_str().unwrap().contains(" at step "), "{}", runs[2]);
    assert_eq!(stdout(&output).lines().count(), 5);
    assert_eq!(stdout(&output), fs::read_to_string(dir.path().join("all/sweep.md")).unwrap());
    assert!(fs::read_to_string(dir.path().join("r.html")).unwrap().contains("seed-2"));
    // Again, without the bad line: there is nothing to do.
    fs::write(dir.path().join("list.txt"), "seed=1\nseed=2\n").unwrap();
    let before = fs::read(dir.path().join("all/seed-1/run.json")).unwrap();
    let output = sweep(&[]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(stderr(&output).matches("it is finished").count(), 2);
    assert_eq!(fs::read(dir.path().join("all/seed-1/run.json")).unwrap(), before);
    // Another config in the same folders is refused.
    let output = sweep(&["--set", "eval.windows=2"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("it is of another config, eval.windows: 4 → 2"));
    // Mistakes are found before anything runs.
    for (grid, message) in [
        ("schedule.lr=1e-3,x", "--set schedule.lr=x: invalid type"),
        ("schedule.lr=1e-3,11", "schedule.lr = 11"),
        ("schedule.lr", "--grid schedule.lr: expected"),
    ] {
        let mut command = program(dir.path(), &["sweep", "--grid", grid, "--dir", "none"]);
        let output = settings(&mut command).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
        assert!(stderr(&output).contains(message), "{}", stderr(&output));
        assert!(!dir.path().join("none").exists());
    }
}

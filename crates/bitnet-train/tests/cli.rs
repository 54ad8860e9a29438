//! The program `bitnet-train`: exit codes, messages, Ctrl-C and `--json`.

#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::process::{Command, Output};

use common::prepared;
use serde_json::Value;

fn command(dir: &Path, args: &[&str]) -> Command {
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/tiny.toml");
    let mut command = Command::new(env!("CARGO_BIN_EXE_bitnet-train"));
    command.current_dir(dir).arg("--config").arg(config);
    command.args(["--data", "data", "--run", "run", "--set", "model.vocab_size=320"]);
    command.args(["--set", "batch.tokens=128", "--set", "batch.sequence=32"]);
    command.args(["--set", "batch.micro_batch=4", "--set", "eval.windows=4"]);
    command.args(args);
    command
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn every_mistake_has_its_exit_code_and_message() {
    let dir = tempfile::tempdir().unwrap();
    prepared(dir.path(), "data", 0);
    let cases: &[(&[&str], i32, &str)] = &[
        (&["--set", "batch.token=1"], 2, "--set batch.token=1: unknown field `token`"),
        (&["--set", "batch.tokens=x"], 2, "--set batch.tokens=x: invalid type"),
        (&["--set", "schedule.lr=-1"], 2, "schedule.lr = -1: must be between 0 and 10"),
        (&["--set", "model.vocab_size=100"], 2, "model.vocab_size = 100: the shards in data"),
        (&["--set", "batch.sequence=4096"], 2, "batch.sequence = 4096: is longer than"),
        (&["--steps", "0"], 2, "schedule.steps = 0"),
        (&["--threads", "0"], 2, "--threads"),
        (&["--device", "gpu"], 2, "expected cpu, ndarray, wgpu[:n|:rank] or cuda[:n|:rank]"),
        #[cfg(not(feature = "cuda"))]
        (&["--device", "cuda:3"], 2, "--device cuda:3: not compiled in; build with"),
        (&["--data", "nowhere"], 3, "nowhere"),
        (&["--json", "data"], 1, "data"),
    ];
    for (args, code, message) in cases {
        // A later flag of the same name wins.
        let mut args = args.to_vec();
        if args[0] != "--steps" {
            args.extend(["--steps", "1"]);
        }
        let output = command(dir.path(), &args).args(["--resume"]).output().unwrap();
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(*code), "{args:?}: {text}");
        assert!(text.contains("error: ") && text.contains(message), "{args:?}: {text}");
        assert!(!text.contains("panicked"), "{text}");
    }
    let program = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bitnet-train"));
        command.current_dir(dir.path());
        command
    };
    let output = program().args(["--config", "none.toml"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).starts_with("error: config none.toml: no such file"));
    let output = program().args(["--config", "x"]).env("BITNET_ISA", "mmx").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("mmx"), "{}", stderr(&output));
    let output = program().output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
}

#[test]
fn a_broken_config_names_file_line_and_key() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("configs")).unwrap();
    let good = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/tiny.toml");
    let text = std::fs::read_to_string(good).unwrap().replace("hidden_size", "hiden_size");
    std::fs::write(dir.path().join("configs/mine.toml"), &text).unwrap();
    let line = text.lines().position(|l| l.starts_with("hiden_size")).unwrap() + 1;
    let output = Command::new(env!("CARGO_BIN_EXE_bitnet-train"))
        .current_dir(dir.path())
        .args(["--config", "mine"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let expected =
        format!("configs/mine.toml:{line}: model.hiden_size: unknown field `hiden_size`");
    assert!(stderr(&output).contains(&expected), "{}", stderr(&output));
}

#[test]
fn results_for_programs() {
    let dir = tempfile::tempdir().unwrap();
    prepared(dir.path(), "data", 0);
    let output = command(dir.path(), &["--steps", "3", "--json", "-"]).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    let keys = [
        "val_loss",
        "train_loss",
        "tokens_per_second",
        "steps",
        "tokens",
        "parameters",
        "run_dir",
        "checkpoint",
        "seconds",
        "peak_rss_bytes",
        "device",
    ];
    let found: Vec<&String> = value.as_object().unwrap().keys().collect();
    assert!(keys.iter().all(|k| found.contains(&&(*k).to_owned())), "{found:?}");
    assert_eq!(found.len(), keys.len());
    assert_eq!(value["steps"], 3);
    assert!(value["val_loss"].as_f64().unwrap() < 7.0);
    assert!(stderr(&output).contains("validation loss"));
}

/// Ctrl-C while it trains: a checkpoint, the way to go on, 130; and going on works
/// with the run folder alone.
#[cfg(unix)]
#[test]
fn an_interrupt_saves_and_says_how_to_go_on() {
    use std::io::{BufRead, BufReader, Read};
    use std::process::Stdio;

    let dir = tempfile::tempdir().unwrap();
    prepared(dir.path(), "data", 0);
    let mut child = command(dir.path(), &["--steps", "1000000", "--set", "eval.every=0"])
        .args(["--set", "checkpoint.every=0"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.starts_with("step 1/") {
        line.clear();
        assert!(lines.read_line(&mut line).unwrap() > 0, "it ended");
    }
    let id = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &id]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let mut rest = String::new();
    lines.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("error: interrupted after step "), "{rest}");
    let (_, how) = rest.split_once("go on with: bitnet-train ").unwrap();
    let arguments: Vec<&str> = how.lines().next().unwrap().split(' ').collect();
    assert_eq!(arguments, ["--resume", "--run", "run"]);
    let (_, rest) = rest.split_once("after step ").unwrap();
    let step: u64 = rest.split(';').next().unwrap().parse().unwrap();
    let until = (step + 2).to_string();
    let output = Command::new(env!("CARGO_BIN_EXE_bitnet-train"))
        .current_dir(dir.path())
        .args(arguments)
        .args(["--until", &until, "--json", "-"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(value["steps"], step + 2);
    assert!(!stderr(&output).contains("changed since"), "{}", stderr(&output));
}

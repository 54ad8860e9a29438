//! The quickstart's order, skipping, resuming, interruption and errors, with
//! scripts in place of the other programs: they note how they were called and
//! write what the real ones would. The real path is tested by its README command.

#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../../bitnet-engine/tests/common/mod.rs"]
mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use bitnet_core::ModelConfig;
use common::RandomModel;
use serde_json::Value;

/// Notes the call; finds the values of the options that matter.
const HEAD: &str = r#"#!/bin/sh
echo "$(basename "$0") $*" >> "$CALLS"
first=$1
while [ $# -gt 0 ]; do
    case $1 in
        -o) out=$2 ;;
        --run) run=$2 ;;
        --json) json=$2 ;;
    esac
    shift
done
"#;

const DATA: &str = r#"mkdir -p "$out"; echo '{}' > "$out/manifest.json"; echo '{}' > "$json""#;

const TRAIN: &str = r#"mkdir -p "$run/checkpoints/00000010"
if [ -n "$TRAIN_EXIT" ]; then echo "error: no luck" >&2; exit "$TRAIN_EXIT"; fi
if [ -n "$TRAIN_WAITS" ]; then
    trap 'echo INT >> "$run/signals"; kill $!; exit 130' INT
    echo ready > "$run/ready"
    sleep 60 & wait
fi
echo "{\"val_loss\": 2.5, \"tokens_per_second\": 1000.5, \"parameters\": 81600," \
    "\"checkpoint\": \"$run/checkpoints/00000010\"}" > "$json""#;

const EXPORT: &str = r#"[ -d "$first" ] || exit 3; cp "$MODEL" "$out"; echo '{}' > "$json""#;

const EVAL: &str = r#"echo '{"nats": 2.50001}' > "$json"; echo "loss 2.5""#;

struct Setup {
    dir: tempfile::TempDir,
    bin: PathBuf,
}

impl Setup {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let bin = dir.path().join("bin");
        fs::create_dir(&bin).unwrap();
        RandomModel::new(&ModelConfig::tiny(), 1).file().write(&dir);
        for (name, body) in [
            ("bitnet-data", DATA),
            ("bitnet-train", TRAIN),
            ("bitnet-export", EXPORT),
            ("bitnet-eval", EVAL),
        ] {
            let path = bin.join(name);
            fs::write(&path, format!("{HEAD}{body}\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let real = Path::new(env!("CARGO_BIN_EXE_bitnet"));
        fs::hard_link(real, bin.join("bitnet"))
            .or_else(|_| fs::copy(real, bin.join("bitnet")).map(drop))
            .unwrap();
        fs::write(dir.path().join("Cargo.lock"), "version = 4\n").unwrap();
        let s = Self { dir, bin };
        s.config(7);
        s
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A config in the working directory's `configs` folder.
    fn config(&self, windows: u32) {
        fs::create_dir_all(self.path("configs")).unwrap();
        let text = format!(
            "[model]\nvocab_size = 320\n[batch]\nsequence = 64\n[eval]\nwindows = {windows}\n"
        );
        fs::write(self.path("configs/quickstart.toml"), text).unwrap();
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.bin.join("bitnet"));
        command.arg("quickstart").args(args).current_dir(self.dir.path());
        command.env("CALLS", self.path("calls")).env("MODEL", self.path("model.gguf"));
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// The calls since the last time, one a line.
    fn calls(&self) -> Vec<String> {
        let text = fs::read_to_string(self.path("calls")).unwrap_or_default();
        let _ = fs::remove_file(self.path("calls"));
        text.lines().map(str::to_owned).collect()
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn names(calls: &[String]) -> Vec<&str> {
    calls.iter().map(|c| c.split(' ').next().unwrap()).collect()
}

const ALL: [&str; 4] = ["bitnet-data", "bitnet-train", "bitnet-export", "bitnet-eval"];

#[test]
fn runs_every_stage_once_and_sums_up() {
    let s = Setup::new();
    let output = s.run(&["--json", "summary.json"]);
    let message = stderr(&output);
    assert!(output.status.success(), "{message}");
    let dir = "runs/quickstart";
    assert_eq!(
        s.calls(),
        [
            format!(
                "bitnet-data prepare cargo -o {dir}/data --vocab-size 320 --max-bytes 24MiB --json {dir}/prepare.json"
            ),
            format!(
                "bitnet-train --config configs/quickstart.toml --data {dir}/data --run {dir}/run --json {dir}/train.json"
            ),
            format!(
                "bitnet-export {dir}/run/checkpoints/00000010 -o {dir}/model.gguf --name quickstart --json {dir}/export.json"
            ),
            format!(
                "bitnet-eval perplexity {dir}/model.gguf --data {dir}/data --split val --context 64 --windows 7 --json {dir}/perplexity.json"
            ),
        ]
    );
    assert!(message.contains("$ bitnet-train --config configs/quickstart.toml"), "{message}");
    assert!(message.contains("loss 2.5"), "results of the stages go to stderr: {message}");
    let table = String::from_utf8_lossy(&output.stdout).into_owned();
    for words in ["81,600", "2.500000 nats/token", "(difference 1.0e-5)", "sample:", "/// Returns"]
    {
        assert!(table.contains(words), "`{words}` is not in\n{table}");
    }
    let summary: Value =
        serde_json::from_slice(&fs::read(s.path("summary.json")).unwrap()).unwrap();
    let packed = fs::metadata(s.path("runs/quickstart/model.gguf")).unwrap().len();
    for (key, value) in [
        ("parameters", Value::from(81_600)),
        ("fp32_bytes", Value::from(4 * 81_600)),
        ("fp16_bytes", Value::from(2 * 81_600)),
        ("packed_bytes", Value::from(packed)),
        ("train_val_loss", Value::from(2.5)),
        ("packed_val_loss", Value::from(2.50001)),
        ("train_tokens_per_second", Value::from(1000.5)),
        ("model", Value::from("runs/quickstart/model.gguf")),
        ("run_dir", Value::from("runs/quickstart/run")),
    ] {
        assert_eq!(summary[key], value, "{key}");
    }
    assert!(summary["decode_tokens_per_second"].as_f64().unwrap() > 0.0);
    assert!(summary["seconds"].as_f64().unwrap() > 0.0);
    assert_eq!(summary["stage_seconds"].as_object().unwrap().len(), 5);
    assert!(summary["sample"].as_str().unwrap().starts_with("/// Returns the"));
}

#[test]
fn skips_what_is_up_to_date_and_follows_changes() {
    let s = Setup::new();
    assert!(s.run(&[]).status.success());
    s.calls();
    let again = s.run(&["--json", "-"]);
    assert_eq!(stderr(&again).matches("up to date, skipped").count(), 5, "{}", stderr(&again));
    assert!(s.calls().is_empty());
    let summary: Value = serde_json::from_slice(&again.stdout).expect("JSON alone on stdout");
    assert!(summary["seconds"].as_f64().unwrap() > 0.0, "the time of the stages, not of skipping");

    // Another config: the data stays, the stale run goes, everything after runs.
    s.config(9);
    let output = s.run(&[]);
    let calls = s.calls();
    assert_eq!(names(&calls), ALL[1..]);
    assert!(!calls[0].contains("--resume") && calls[2].contains("--windows 9"), "{calls:?}");
    assert!(stderr(&output).contains("deleting the stale runs/quickstart/run"));

    // A lost model is made again; a new lock file means new text.
    fs::remove_file(s.path("runs/quickstart/model.gguf")).unwrap();
    assert!(s.run(&[]).status.success());
    assert_eq!(names(&s.calls()), ALL[2..]);
    fs::write(s.path("Cargo.lock"), "version = 4\n# other\n").unwrap();
    assert!(s.run(&[]).status.success());
    assert_eq!(names(&s.calls()), ALL);

    assert!(s.run(&["--steps", "5"]).status.success());
    let calls = s.calls();
    assert_eq!(names(&calls), ALL[1..]);
    assert!(calls[0].contains("--steps 5"), "{calls:?}");
    assert!(s.run(&["--steps", "5", "--force"]).status.success());
    let calls = s.calls();
    assert_eq!(names(&calls), ALL);
    assert!(calls[0].contains(" --force "), "{calls:?}");
}

#[test]
fn passes_on_how_a_stage_failed_and_goes_on_from_there() {
    let s = Setup::new();
    for (code, expected) in [("1", 1), ("2", 2), ("3", 3), ("130", 130), ("101", 1)] {
        let output = s.command(&[]).env("TRAIN_EXIT", code).output().unwrap();
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(expected), "{message}");
        assert!(message.contains("stopped at stage 2 (train)"), "{message}");
        assert!(message.contains("error: no luck"), "the stage's own message: {message}");
    }
    let calls = s.calls();
    assert_eq!(calls.iter().filter(|c| c.starts_with("bitnet-data")).count(), 1, "{calls:?}");
    let output = s.run(&[]);
    assert!(output.status.success(), "{}", stderr(&output));
    let calls = s.calls();
    assert_eq!(names(&calls), ALL[1..]);
    assert!(calls[0].contains(" --resume "), "{calls:?}");
}

#[test]
fn ctrl_c_reaches_the_stage_once_and_the_next_run_resumes() {
    let s = Setup::new();
    let mut child = s.command(&[]).env("TRAIN_WAITS", "1").spawn().unwrap();
    let ready = s.path("runs/quickstart/run/ready");
    let begin = Instant::now();
    while !ready.exists() {
        assert!(begin.elapsed() < Duration::from_secs(30), "training never began");
        std::thread::sleep(Duration::from_millis(10));
    }
    let id = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &id]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let signals = fs::read_to_string(s.path("runs/quickstart/run/signals")).unwrap();
    assert_eq!(signals, "INT\n");
    s.calls();
    assert!(s.run(&[]).status.success());
    assert!(s.calls()[0].contains(" --resume "));
}

#[test]
fn errors_name_what_is_missing() {
    let s = Setup::new();
    fs::remove_file(s.bin.join("bitnet-export")).unwrap();
    let output = s.run(&[]);
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("bitnet-export is missing in "), "{message}");
    assert!(message.contains("cargo build --release"), "{message}");
    assert!(s.calls().is_empty(), "nothing runs before all programs are found");

    let s = Setup::new();
    let output = s.run(&["--config", "no-such.toml"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("no config no-such.toml: looked at"));

    fs::create_dir_all(s.path("mine/run")).unwrap();
    fs::write(s.path("mine/run/precious"), "x").unwrap();
    for args in [&["--dir", "mine"][..], &["--dir", "mine", "--force"]] {
        let output = s.run(args);
        assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
        assert!(stderr(&output).contains("did not make"));
    }
    assert!(s.path("mine/run/precious").exists());

    fs::remove_file(s.path("Cargo.lock")).unwrap();
    let output = s.run(&[]);
    assert_eq!(output.status.code(), Some(3));
    assert!(stderr(&output).contains("no Cargo.lock"), "{}", stderr(&output));
}

//! A run that is interrupted, killed or resumed comes to the same numbers as one
//! that is not.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::thread::sleep;
use std::time::{Duration, Instant};

use bitnet_kernels::Kernels;
use bitnet_tests::{bin, ok, prepare, train};
use serde_json::Value;

/// The loss of every step in `metrics.jsonl`, as its text: bit for bit.
fn losses(run: &Path) -> Vec<(u64, String)> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .filter(|line| line.get("loss").is_some())
        .map(|line| (line["step"].as_u64().unwrap(), line["loss"].to_string()))
        .collect()
}

/// The newest checkpoint's weights and optimizer state.
fn newest(run: &Path) -> Vec<Vec<u8>> {
    let folder = run.join("checkpoints");
    let mut all: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.file_name().is_some_and(|n| !n.to_string_lossy().starts_with('.')))
        .collect();
    all.sort();
    let last = all.pop().unwrap();
    ["model.safetensors", "optimizer.safetensors"].map(|f| fs::read(last.join(f)).unwrap()).into()
}

#[test]
fn ten_and_ten_steps_are_twenty() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    prepare(&data);
    let (whole, halves) = (folder.path().join("whole"), folder.path().join("halves"));
    let _ = ok(&mut train(&data, &whole, 20));
    let _ = ok(train(&data, &halves, 20).args(["--until", "10"]));
    assert_eq!(losses(&halves).len(), 10);
    // The second half with another number of threads.
    let _ = ok(train(&data, &halves, 20).args(["--resume", "--threads", "1"]));
    assert_eq!(losses(&halves), losses(&whole));
    assert_eq!(newest(&halves), newest(&whole), "weights and optimizer state");
}

#[test]
fn a_kill_at_any_moment_leaves_the_last_checkpoint_usable() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    prepare(&data);
    let (whole, killed) = (folder.path().join("whole"), folder.path().join("killed"));
    let steps = 40;
    let often = ["--set", "checkpoint.every=2", "--set", "eval.every=6"];
    let start = Instant::now();
    let _ = ok(train(&data, &whole, steps).args(often));
    let whole_time = start.elapsed();
    // Twenty kills at random moments: of the start, of steps, evaluations and the
    // writing of checkpoints.
    let mut state = 2026u32;
    for _ in 0..20 {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let moment = f64::from(state >> 8) / f64::from(1 << 24);
        let mut child = train(&data, &killed, steps)
            .args(often)
            .arg("--resume")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        sleep(whole_time.mul_f64(0.02 + 0.18 * moment));
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let _ = ok(train(&data, &killed, steps).args(often).arg("--resume"));
    assert_eq!(losses(&killed), losses(&whole));
    assert_eq!(newest(&killed), newest(&whole), "weights and optimizer state");
}

#[cfg(unix)]
#[test]
fn an_interrupt_saves_and_says_how_to_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let (data, run) = (folder.path().join("data"), folder.path().join("run"));
    prepare(&data);
    let child = train(&data, &run, 100_000)
        .args(["--set", "eval.every=0", "--set", "checkpoint.every=0"])
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    // Once a step is logged, the run is inside its loop.
    let metrics = run.join("metrics.jsonl");
    let deadline = Instant::now() + Duration::from_secs(120);
    while fs::metadata(&metrics).map_or(0, |m| m.len()) == 0 {
        assert!(Instant::now() < deadline, "no step was logged");
        sleep(Duration::from_millis(20));
    }
    let _ = ok(std::process::Command::new("kill").args(["-INT", &child.id().to_string()]));
    let output = child.wait_with_output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{message}");
    assert!(message.contains("--resume"), "{message}");
    let steps = losses(&run).len() as u32;
    let _ = ok(train(&data, &run, 100_000).args(["--resume", "--until", &(steps + 1).to_string()]));
    assert_eq!(losses(&run).len() as u32, steps + 1);
}

#[test]
fn a_model_that_cannot_be_trained_stops_with_the_step() {
    let folder = tempfile::tempdir().unwrap();
    let (data, run) = (folder.path().join("data"), folder.path().join("run"));
    prepare(&data);
    let mut command = train(&data, &run, 60);
    // A decay at which the weights grow eightyfold with every step.
    for setting in ["schedule.lr=9.0", "schedule.weight_decay=9.0", "schedule.warmup_steps=0"] {
        command.args(["--set", setting]);
    }
    let output = command.output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("step"), "{message}");
    let inspect = bin("bitnet-data").arg("inspect").arg(&data).output().unwrap();
    assert!(inspect.status.success());
}

/// Forward and backward pass, loss and optimizer give the same bits on every
/// instruction set of this machine: what one machine trained, another trains again.
#[test]
fn every_instruction_set_trains_the_same_model() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    prepare(&data);
    let mut runs = Vec::new();
    for kernels in Kernels::all() {
        let run = folder.path().join(kernels.name());
        let mut command = train(&data, &run, 4);
        // Little to do: portable code computes fused multiply-adds one by one.
        command.args(["--set", "eval.windows=1", "--set", "batch.tokens=512"]);
        let _ = ok(command.env("BITNET_ISA", kernels.name()));
        runs.push((kernels.name(), losses(&run), newest(&run)));
    }
    let (first, others) = runs.split_first().unwrap();
    assert_eq!(first.1.len(), 4);
    for (name, losses, state) in others {
        assert_eq!(*losses, first.1, "losses of {name} and {}", first.0);
        assert!(*state == first.2, "weights or optimizer of {name} and {}", first.0);
    }
}

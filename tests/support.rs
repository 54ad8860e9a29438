//! What the tests that span crates share: the workspace's folder, its binaries
//! and one small model, trained and exported once for all of them.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use serde_json::Value;

/// The workspace's folder.
#[must_use]
pub fn workspace() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests).to_path_buf()
}

/// A binary of the workspace, from the folder that this test runs from.
///
/// # Panics
/// If it was not built: `cargo build --release --workspace --bins` does.
#[must_use]
pub fn bin(name: &str) -> Command {
    let test = std::env::current_exe().unwrap();
    // <target>/<profile>/deps/<test>
    let folder = test.parent().and_then(Path::parent).unwrap();
    let path = folder.join(name);
    assert!(
        path.is_file(),
        "{}: not built; run `cargo build --release --workspace --bins` first",
        path.display()
    );
    let mut command = Command::new(path);
    // A test must not depend on the caller's settings.
    command.env_remove("BITNET_ISA").env_remove("RUST_LOG");
    command
}

/// Runs a command to its end; panics with its output unless it exits with 0.
#[must_use]
pub fn ok(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// A JSON file.
#[must_use]
pub fn json(path: &Path) -> Value {
    let text = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&text).unwrap()
}

/// One small model and everything on its way.
#[derive(Debug)]
pub struct Trained {
    /// Token shards.
    pub data: PathBuf,
    /// The run folder.
    pub run: PathBuf,
    /// Its last checkpoint.
    pub checkpoint: PathBuf,
    /// The packed model.
    pub model: PathBuf,
    /// What `bitnet-train --json` wrote.
    pub summary: Value,
    _folder: Option<tempfile::TempDir>,
}

/// Changes to `configs/tiny.toml` that make a run of the tests: a context that
/// holds 256 generated tokens, the vocabulary of the tests' shards, SwiGLU in place
/// of relu² for the second activation.
pub const SETTINGS: [&str; 8] = [
    "model.vocab_size=512",
    "model.max_position_embeddings=320",
    "model.hidden_size=128",
    "model.intermediate_size=344",
    "batch.tokens=1024",
    "batch.sequence=64",
    "batch.micro_batch=8",
    "sample.prompts=[]",
];

/// Shards of this workspace's own sources.
pub fn prepare(folder: &Path) {
    let _ = ok(bin("bitnet-data")
        .current_dir(workspace())
        .args(["prepare", "crates/bitnet-core/src", "crates/bitnet-kernels/src"])
        .args(["crates/bitnet-data/src", "--ext", "rs", "--vocab-size", "512"])
        .args(["--validation-share", "0.1", "--name", "own-sources", "-o"])
        .arg(folder));
}

/// A training command on prepared shards, with the settings of the tests.
#[must_use]
pub fn train(data: &Path, run: &Path, steps: u32) -> Command {
    let mut command = bin("bitnet-train");
    command.current_dir(workspace()).args(["--config", "tiny.toml", "--steps"]);
    command.arg(steps.to_string()).arg("--data").arg(data).arg("--run").arg(run);
    for setting in SETTINGS {
        command.args(["--set", setting]);
    }
    command
}

/// The small model, trained on first use: prepare → train → export. Nothing drops it, so
/// its folder lies beside the test program, where the next run clears it.
///
/// # Panics
/// If a stage fails.
pub fn trained() -> &'static Trained {
    static TRAINED: OnceLock<Trained> = OnceLock::new();
    TRAINED.get_or_init(|| {
        let folder = std::env::current_exe().unwrap().with_extension("trained");
        if folder.exists() {
            std::fs::remove_dir_all(&folder).unwrap();
        }
        std::fs::create_dir(&folder).unwrap();
        make_in(&folder, &[])
    })
}

/// Prepares, trains with further settings and exports, in a folder of its own.
///
/// # Panics
/// If a stage fails.
#[must_use]
pub fn make(settings: &[&str]) -> Trained {
    let folder = tempfile::tempdir().unwrap();
    let trained = make_in(folder.path(), settings);
    Trained { _folder: Some(folder), ..trained }
}

fn make_in(folder: &Path, settings: &[&str]) -> Trained {
    let (data, run) = (folder.join("data"), folder.join("run"));
    let (model, summary) = (folder.join("model.gguf"), folder.join("train.json"));
    prepare(&data);
    let mut command = train(&data, &run, 60);
    for setting in settings {
        command.args(["--set", setting]);
    }
    let _ = ok(command.arg("--json").arg(&summary));
    let _ = ok(bin("bitnet-export").arg(&run).arg("-o").arg(&model));
    let summary = json(&summary);
    let checkpoint = PathBuf::from(summary["checkpoint"].as_str().unwrap());
    let checkpoint = workspace().join(checkpoint);
    Trained { data, run, checkpoint, model, summary, _folder: None }
}

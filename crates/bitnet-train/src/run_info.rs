//! `run.json`: what made a run, so that it can be made again. One entry for every
//! time the run was started or gone on with.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use bitnet_data::Manifest;
use bitnet_format::json::write_json;
use bitnet_kernels::Kernels;
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::error::with_path;

/// The file in a run folder.
pub const FILE: &str = "run.json";

/// The version of `run.json` that this program writes and reads.
const VERSION: u32 = 1;

/// Everything in `run.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunInfo {
    /// Version of this file.
    pub version: u32,
    /// Every start of the run, the first one first.
    pub starts: Vec<Start>,
}

/// One start of a run, or one time it was gone on with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Start {
    /// When: RFC 3339, in UTC.
    pub time: String,
    /// Complete steps before it.
    pub step: u64,
    /// The command, with its arguments.
    pub command: Vec<String>,
    /// The folder it was given in.
    pub directory: Option<PathBuf>,
    /// Keys of the config that were changed with it, as `key: old → new`.
    #[serde(default)]
    pub changed: Vec<String>,
    /// What `--device` said.
    pub device: String,
    /// Threads of the CPU.
    pub threads: usize,
    /// The program.
    pub program: Program,
    /// The machine.
    pub machine: Machine,
    /// The tokens.
    pub data: Data,
}

/// What program ran: known when it was compiled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// Its version.
    pub version: String,
    /// The commit of the source tree that it was compiled from; none where that
    /// was no git repository.
    pub commit: Option<String>,
    /// Whether the sources differed from that commit when it was compiled.
    pub modified: Option<bool>,
    /// The compiler.
    pub rustc: String,
    /// The platform it was compiled for.
    pub target: String,
    /// Cargo features of `bitnet-train`.
    pub features: Vec<String>,
}

/// What machine it ran on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// The processor's name, where the system tells it.
    pub cpu: Option<String>,
    /// Processors this process may use.
    pub cpus: usize,
    /// The instruction set that the kernels use.
    pub instruction_set: String,
    /// Memory, where the system tells it, in bytes.
    pub memory_bytes: Option<u64>,
    /// The operating system, with its version where it tells it.
    pub system: String,
}

/// What tokens it was trained on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Data {
    /// The folder of shards.
    pub folder: PathBuf,
    /// The corpus's name.
    pub name: String,
    /// Hash of the corpus.
    pub corpus_hash: String,
    /// SHA-256 of `tokenizer.json`.
    pub tokenizer_sha256: String,
    /// Tokens of the training split.
    pub train_tokens: u64,
}

impl Program {
    /// The program that runs.
    #[must_use]
    pub fn this() -> Self {
        let known = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            commit: known(env!("BITNET_BUILD_COMMIT")),
            modified: env!("BITNET_BUILD_DIRTY").parse().ok(),
            rustc: env!("BITNET_BUILD_RUSTC").to_owned(),
            target: env!("BITNET_BUILD_TARGET").to_owned(),
            features: env!("BITNET_BUILD_FEATURES").split(',').filter_map(known).collect(),
        }
    }

    /// Version and commit in a few words, as in `0.1.0 (1a2b3c4d, modified)`.
    #[must_use]
    pub fn summary(&self) -> String {
        let commit = self.commit.as_deref().unwrap_or("unknown commit");
        let commit = commit.get(..10).unwrap_or(commit);
        let modified = if self.modified == Some(true) { ", modified" } else { "" };
        format!("{} ({commit}{modified})", self.version)
    }
}

impl Machine {
    /// The machine that this process runs on.
    #[must_use]
    pub fn this() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let release = read("/proc/sys/kernel/osrelease");
        let system = format!("{} {}", std::env::consts::OS, release.trim());
        Self {
            cpu: field(&cpuinfo, "model name").map(str::to_owned),
            cpus: std::thread::available_parallelism().map_or(1, Into::into),
            instruction_set: Kernels::from_env().map_or("unknown", |k| k.name()).to_owned(),
            memory_bytes: field(&read("/proc/meminfo"), "MemTotal")
                .and_then(|kib| kib.strip_suffix("kB")?.trim().parse::<u64>().ok())
                .and_then(|kib| kib.checked_mul(1024)),
            system: system.trim().to_owned(),
        }
    }
}

/// The value of the first line `key : value`.
fn field<'t>(text: &'t str, key: &str) -> Option<&'t str> {
    let mut lines = text.lines().filter_map(|line| line.split_once(':'));
    lines.find(|(name, _)| name.trim() == key).map(|(_, value)| value.trim())
}

impl Data {
    /// What a prepared folder says of itself.
    #[must_use]
    pub fn of(folder: &Path, manifest: &Manifest) -> Self {
        Self {
            folder: folder.to_path_buf(),
            name: manifest.name.clone(),
            corpus_hash: manifest.corpus_hash.clone(),
            tokenizer_sha256: manifest.tokenizer.sha256.clone(),
            train_tokens: manifest.train.tokens,
        }
    }
}

impl Start {
    /// A start of this process, at `step`.
    #[must_use]
    pub fn now(step: u64, device: impl ToString, data: Data) -> Self {
        Self {
            time: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
            step,
            command: std::env::args_os().map(|a| a.to_string_lossy().into_owned()).collect(),
            directory: std::env::current_dir().ok(),
            changed: Vec::new(),
            device: device.to_string(),
            threads: rayon::current_num_threads(),
            program: Program::this(),
            machine: Machine::this(),
            data,
        }
    }
}

impl RunInfo {
    /// Appends a start to a run's `run.json`; the first one of a run that begins
    /// replaces what was there.
    ///
    /// # Errors
    /// I/O errors with the path; a file that cannot be read.
    pub fn append(run_dir: &Path, start: Start, resumed: bool) -> Result<(), TrainError> {
        let found = if resumed { Self::load(run_dir)? } else { None };
        let mut info = found.unwrap_or(Self { version: VERSION, starts: Vec::new() });
        info.starts.push(start);
        Ok(write_json(&run_dir.join(FILE).to_string_lossy(), &info)?)
    }

    /// Reads `run.json`; none in the folder of an earlier version.
    ///
    /// # Errors
    /// I/O errors with the path; a file that is none, or of another version.
    pub fn load(run_dir: &Path) -> Result<Option<Self>, TrainError> {
        let path = run_dir.join(FILE);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(with_path(&path)(e).into()),
        };
        let bad = |what: String| TrainError::NoRun {
            path: run_dir.to_path_buf(),
            what: format!("{FILE}: {what}"),
        };
        let info: Self = serde_json::from_str(&text).map_err(|e| bad(e.to_string()))?;
        if info.version != VERSION {
            return Err(bad(format!("version {}, this program reads {VERSION}", info.version)));
        }
        Ok(Some(info))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(step: u64) -> Start {
        let data = Data {
            folder: "data".into(),
            name: "x".into(),
            corpus_hash: "aa".into(),
            tokenizer_sha256: "bb".into(),
            train_tokens: 9,
        };
        Start::now(step, "cpu", data)
    }

    #[test]
    fn every_start_is_kept_and_a_new_run_begins_anew() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(RunInfo::load(dir.path()).unwrap(), None);
        for (step, resumed, count) in [(0, true, 1), (5, true, 2), (0, false, 1), (7, true, 2)] {
            RunInfo::append(dir.path(), start(step), resumed).unwrap();
            let info = RunInfo::load(dir.path()).unwrap().unwrap();
            assert_eq!(info.starts.len(), count);
            assert_eq!(info.starts[count - 1].step, step);
        }
        fs::write(dir.path().join(FILE), "{\"version\":2,\"starts\":[]}").unwrap();
        let error = RunInfo::append(dir.path(), start(1), true).unwrap_err();
        assert_eq!(error.exit(), bitnet_core::Exit::BadInput);
        assert!(error.to_string().contains("run.json: version 2, this program reads 1"));
    }

    #[test]
    fn program_and_machine_are_known() {
        let program = Program::this();
        assert!(program.rustc.starts_with("rustc 1."), "{}", program.rustc);
        assert!(program.target.contains(std::env::consts::ARCH), "{}", program.target);
        if let Some(commit) = &program.commit {
            assert!(commit.len() >= 40 && commit.bytes().all(|b| b.is_ascii_hexdigit()));
            assert!(program.modified.is_some());
        }
        let machine = Machine::this();
        assert!(machine.cpus > 0 && machine.system.starts_with(std::env::consts::OS));
        assert_ne!(machine.instruction_set, "unknown");
        let now = start(0).time;
        assert!(now.ends_with('Z') && humantime::parse_rfc3339(&now).is_ok(), "{now}");
    }
}

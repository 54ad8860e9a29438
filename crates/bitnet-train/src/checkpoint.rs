//! Checkpoints: Hugging Face model folders that a run can be gone on from.
//!
//! `<run>/checkpoints/<step>/` holds `model.safetensors` (f32), `config.json`,
//! `tokenizer.json`, `optimizer.safetensors`, `state.json`, `golden.json` and, for
//! the flip rate, `trits.safetensors`. A folder gets its name when all of it is on
//! the disk, so that a kill at any moment, or a full disk, leaves the checkpoints
//! before it as they are.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::{fs, process};

use bitnet_core::{Dtype, ModelConfig};
use bitnet_data::{StreamState, Tokenizer};
use bitnet_format::atomic::AtomicDir;
use bitnet_format::hf::{self, SpecialTokens, Stored, TensorFile, TensorFileWriter};
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::error::with_path;
use crate::model::Transformer;
use crate::optim::{Optimizer, ReadState, StateTensor, StateValues};
use crate::weights::Trits;

/// The version of `state.json` that this program writes and reads.
const VERSION: u32 = 1;

const MODEL: &str = "model.safetensors";
const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
const OPTIMIZER: &str = "optimizer.safetensors";
/// The key in the header of `optimizer.safetensors` that says what wrote it.
const KIND: &str = "optimizer";
/// And the one that says what its moments are kept as.
const MOMENTS: &str = "moments";
const STATE: &str = "state.json";
const GOLDEN: &str = "golden.json";
/// In the folders of chats that `bitnet-data` prepares, and in Hugging Face's.
const CHAT_TEMPLATE: &str = "chat_template.jinja";
const FILES: [&str; 6] = [MODEL, CONFIG, TOKENIZER, OPTIMIZER, STATE, GOLDEN];

/// `state.json`: where the run stands beside its tensors. There is no generator
/// among it: every random number is a function of a seed in the config and of
/// the step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Version of this file.
    pub version: u32,
    /// Complete steps.
    pub step: u64,
    /// Tokens seen.
    pub tokens: u64,
    /// Seconds of training so far.
    pub seconds: f64,
    /// Where the stream of batches stands.
    pub batches: StreamState,
    /// The step of the last evaluation.
    pub evaluated_at: Option<u64>,
    /// Its result, in nats per token.
    pub val_loss: Option<f64>,
    /// The step of the last samples.
    pub sampled_at: Option<u64>,
    /// Hash of the corpus.
    pub corpus_hash: String,
    /// SHA-256 of `tokenizer.json`.
    pub tokenizer_sha256: String,
}

impl State {
    /// The state of a run that has not begun.
    #[must_use]
    pub fn new(batches: StreamState, corpus_hash: String, tokenizer_sha256: String) -> Self {
        Self {
            version: VERSION,
            step: 0,
            tokens: 0,
            seconds: 0.0,
            batches,
            evaluated_at: None,
            val_loss: None,
            sampled_at: None,
            corpus_hash,
            tokenizer_sha256,
        }
    }
}

/// `golden.json`: a prompt and the logits at its last position, so that export
/// can prove that the engine computes what training did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Golden {
    /// The prompt.
    pub tokens: Vec<u32>,
    /// One logit for each token of the vocabulary.
    pub logits: Vec<f32>,
}

/// Everything that goes into a checkpoint.
#[derive(Debug)]
pub struct Snapshot<'s> {
    /// Where the run stands.
    pub state: &'s State,
    /// The model's configuration.
    pub config: &'s ModelConfig,
    /// The model.
    pub model: &'s Transformer,
    /// The optimizer.
    pub optimizer: &'s Optimizer,
    /// The tokenizer.
    pub tokenizer: &'s Tokenizer,
    /// The chat template that the data was rendered with.
    pub chat_template: Option<&'s str>,
    /// The golden logits.
    pub golden: &'s Golden,
    /// The quantised weights last counted.
    pub trits: Option<&'s Trits>,
}

/// Writes a checkpoint and removes all but the newest `keep`.
///
/// # Errors
/// I/O errors with the path; the checkpoints before it stay.
pub fn save(run_dir: &Path, keep: usize, snapshot: &Snapshot<'_>) -> Result<PathBuf, TrainError> {
    let path = folder(run_dir).join(format!("{:08}", snapshot.state.step));
    let dir = AtomicDir::create(&path)?;
    write_files(dir.path(), snapshot)?;
    dir.commit()?;
    let mut old = list(run_dir)?;
    old.truncate(old.len().saturating_sub(keep));
    for (_, path) in old {
        remove(&path)?;
    }
    Ok(path)
}

fn write_files(dir: &Path, s: &Snapshot<'_>) -> Result<(), TrainError> {
    let tensors = s.model.named_tensors();
    let refs = tensors.iter().map(|t| (t.name.clone(), t.shape.clone(), &t.data[..]));
    hf::save(dir.join(MODEL), &[], refs)?;
    drop(tensors);
    let special = SpecialTokens { bos: s.tokenizer.bos_id(), eos: s.tokenizer.eos_id() };
    write_json(&dir.join(CONFIG), &hf::to_json(s.config, special))?;
    let path = dir.join(TOKENIZER);
    fs::write(&path, s.tokenizer.to_json()).map_err(with_path(&path))?;
    if let Some(template) = s.chat_template {
        let path = dir.join(CHAT_TEMPLATE);
        fs::write(&path, template).map_err(with_path(&path))?;
    }
    write_optimizer(&dir.join(OPTIMIZER), s.optimizer)?;
    s.trits.map_or(Ok(()), |trits| trits.save(dir))?;
    write_json(&dir.join(GOLDEN), s.golden)?;
    write_json(&dir.join(STATE), s.state)
}

fn write_optimizer(path: &Path, optimizer: &Optimizer) -> Result<(), TrainError> {
    let about = [(KIND, optimizer.kind().name()), (MOMENTS, optimizer.moments().name())];
    let spec = |(name, values): StateTensor<'_>| {
        let stored = match values {
            StateValues::Bytes(_) => Stored::U8,
            _ => Stored::Float(Dtype::F32),
        };
        (name, vec![values.count()], stored)
    };
    let specs = optimizer.state().map(spec).collect();
    let mut out = TensorFileWriter::with_types(path, &about, specs)?;
    for (name, values) in optimizer.state() {
        match values {
            StateValues::Tensor(tensor) => {
                let data = tensor.to_data();
                out.write(&name, data.as_slice().expect("the state is f32"))?;
            }
            StateValues::Floats(values) => out.write(&name, values)?,
            StateValues::Bytes(values) => out.write_bytes(&name, values)?,
        }
    }
    Ok(out.commit()?)
}

/// Reads `optimizer.safetensors`.
struct OptimizerFile(TensorFile);

impl OptimizerFile {
    fn checked<T>(&self, name: &str, values: Vec<T>, len: usize) -> Result<Vec<T>, TrainError> {
        if values.len() == len {
            return Ok(values);
        }
        let what = format!("tensor {name}: expected [{len}], found [{}]", values.len());
        Err(TrainError::checkpoint(self.0.path(), what))
    }
}

impl ReadState for OptimizerFile {
    type Error = TrainError;

    fn floats(&mut self, name: &str, len: usize) -> Result<Vec<f32>, TrainError> {
        self.checked(name, self.0.read(name)?, len)
    }

    fn bytes(&mut self, name: &str, len: usize) -> Result<Vec<u8>, TrainError> {
        self.checked(name, self.0.read_bytes(name)?, len)
    }
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<(), TrainError> {
    let mut text = serde_json::to_vec_pretty(value).map_err(io::Error::from)?;
    text.push(b'\n');
    let write = || fs::File::create(path)?.write_all(&text);
    Ok(write().map_err(with_path(path))?)
}

/// The chat template of a prepared folder; none where it holds no chats.
///
/// # Errors
/// One that cannot be read.
pub(crate) fn chat_template(data: &Path) -> io::Result<Option<String>> {
    let path = data.join(CHAT_TEMPLATE);
    match fs::read_to_string(&path) {
        Ok(template) => Ok(Some(template)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(with_path(&path)(e)),
    }
}

fn folder(run_dir: &Path) -> PathBuf {
    run_dir.join("checkpoints")
}

/// The complete checkpoints of a run, oldest first. Folders that were being
/// written or removed when a process was killed are not among them.
///
/// # Errors
/// I/O errors with the path.
pub fn list(run_dir: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let folder = folder(run_dir);
    let entries = match fs::read_dir(&folder) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(with_path(&folder))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(with_path(&folder))?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or("");
        let digits = name.len() >= 8 && name.bytes().all(|b| b.is_ascii_digit());
        let Some(step) = name.parse().ok().filter(|_| digits) else { continue };
        if FILES.iter().all(|f| path.join(f).is_file()) {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found)
}

/// Removes what a killed process left half written or half removed.
///
/// # Errors
/// I/O errors with the path.
pub fn sweep(run_dir: &Path) -> io::Result<()> {
    let folder = folder(run_dir);
    let Ok(entries) = fs::read_dir(&folder) else { return Ok(()) };
    for entry in entries {
        let path = entry.map_err(with_path(&folder))?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or("");
        if name.starts_with('.') && (name.contains(".tmp-") || name.contains(".old-")) {
            fs::remove_dir_all(&path).map_err(with_path(&path))?;
        }
    }
    Ok(())
}

/// Removes a checkpoint; a kill meanwhile leaves no half of it under its name.
fn remove(path: &Path) -> io::Result<()> {
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or("checkpoint");
    let gone = path.with_file_name(format!(".{name}.old-{}", process::id()));
    fs::rename(path, &gone).map_err(with_path(path))?;
    fs::remove_dir_all(&gone).map_err(with_path(&gone))
}

/// Reads `state.json`.
///
/// # Errors
/// A file that is not there, no state, or of another version.
pub fn load_state(checkpoint: &Path) -> Result<State, TrainError> {
    let path = checkpoint.join(STATE);
    let bad = |what: String| TrainError::checkpoint(&path, what);
    let text = fs::read_to_string(&path).map_err(|e| bad(e.to_string()))?;
    let state: State = serde_json::from_str(&text).map_err(|e| bad(e.to_string()))?;
    if state.version != VERSION {
        return Err(bad(format!("version {}, this program reads {VERSION}", state.version)));
    }
    Ok(state)
}

/// Reads the tensors of a checkpoint into a model and its optimizer.
///
/// # Errors
/// A model of another configuration, tensors that are missing or of another
/// shape, files that are cut off.
pub fn load(
    checkpoint: &Path,
    config: &ModelConfig,
    model: Transformer,
    optimizer: &mut Optimizer,
) -> Result<Transformer, TrainError> {
    let files = hf::Checkpoint::open(checkpoint)?;
    if files.config() != config {
        let path = checkpoint.join(CONFIG);
        return Err(TrainError::checkpoint(&path, difference(files.config(), config)));
    }
    let step = load_state(checkpoint)?.step;
    let model = model.load_tensors(|name, _| files.read(name))?;
    let file = TensorFile::open(checkpoint.join(OPTIMIZER))?;
    // Older files do not say.
    for (key, name, absent, expected) in [
        (KIND, "kind", "adamw", optimizer.kind().name()),
        (MOMENTS, "moments", "f32", optimizer.moments().name()),
    ] {
        let found = file.meta(key).unwrap_or(absent);
        if found != expected {
            let what = format!(
                "is a state with optimizer.{name} = \"{found}\", the config says \"{expected}\""
            );
            return Err(TrainError::checkpoint(file.path(), what));
        }
    }
    optimizer.load(step, &mut OptimizerFile(file))?;
    Ok(model)
}

/// The first key in which two models differ.
pub(crate) fn difference(found: &ModelConfig, expected: &ModelConfig) -> String {
    let object = |c: &ModelConfig| match serde_json::to_value(c) {
        Ok(serde_json::Value::Object(map)) => map,
        _ => serde_json::Map::new(),
    };
    let (found, expected) = (object(found), object(expected));
    let key = expected.keys().chain(found.keys()).find(|&k| expected.get(k) != found.get(k));
    let show = |v: Option<&serde_json::Value>| v.map_or("(absent)".into(), ToString::to_string);
    match key {
        Some(k) => format!(
            "the checkpoint was trained with model.{k} = {}, the config says {}",
            show(found.get(k)),
            show(expected.get(k))
        ),
        None => "the checkpoint was trained with another model".into(),
    }
}

#[cfg(test)]
mod tests {
    use bitnet_data::BatchState;

    use super::*;

    fn fake(run: &Path, name: &str, files: &[&str]) {
        let dir = folder(run).join(name);
        fs::create_dir_all(&dir).unwrap();
        for file in files {
            fs::write(dir.join(file), "x").unwrap();
        }
    }

    #[test]
    fn only_complete_checkpoints_count() {
        let run = tempfile::tempdir().unwrap();
        let run = run.path();
        assert!(list(run).unwrap().is_empty());
        fake(run, "00000020", &FILES);
        fake(run, "00000003", &FILES);
        fake(run, "123456789", &FILES);
        fake(run, "00000030", &FILES[..5]);
        fake(run, ".00000040.tmp-1", &FILES);
        fake(run, ".00000001.old-1", &FILES[..2]);
        fake(run, "40", &FILES);
        fake(run, "notes", &FILES);
        let steps = || list(run).unwrap().into_iter().map(|(s, _)| s).collect::<Vec<_>>();
        assert_eq!(steps(), [3, 20, 123_456_789]);
        sweep(run).unwrap();
        assert_eq!(steps(), [3, 20, 123_456_789]);
        assert!(!folder(run).join(".00000040.tmp-1").exists());
        assert!(!folder(run).join(".00000001.old-1").exists());
        assert!(folder(run).join("notes").exists());
        remove(&folder(run).join("00000003")).unwrap();
        assert_eq!(steps(), [20, 123_456_789]);
    }

    #[test]
    fn a_state_says_what_is_wrong_with_it() {
        let run = tempfile::tempdir().unwrap();
        let path = run.path().join(STATE);
        let batches = BatchState { epoch: 1, position: 2, seed: 3, windows: 4 };
        let state = State::new(StreamState::Single(batches), "a".into(), "b".into());
        write_json(&path, &state).unwrap();
        assert_eq!(load_state(run.path()).unwrap(), state);
        let good = fs::read_to_string(&path).unwrap();
        for (text, message) in [
            (good.replace("\"version\": 1", "\"version\": 2"), "version 2, this program reads 1"),
            (good.replace("step", "stop"), "unknown field `stop`"),
            (good[..40].to_owned(), "EOF while parsing"),
        ] {
            fs::write(&path, text).unwrap();
            let error = load_state(run.path()).unwrap_err();
            assert_eq!(error.exit(), bitnet_core::Exit::BadInput);
            assert!(error.to_string().contains(message), "{error}");
        }
    }

    #[test]
    fn a_difference_names_the_key() {
        let tiny = ModelConfig::tiny();
        let other = ModelConfig { num_hidden_layers: 3, ..tiny.clone() };
        assert_eq!(
            difference(&tiny, &other),
            "the checkpoint was trained with model.num_hidden_layers = 2, the config says 3"
        );
    }
}

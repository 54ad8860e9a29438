//! What an export reads: the checkpoint that a path names, with the files
//! beside its weights.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bitnet_format::hf::Checkpoint;
use bitnet_format::tokenizer::GgufTokenizer;
use serde::Deserialize;
use serde_json::Value;

use crate::ExportError;

/// A prompt and the logits at its last position, as training computed them.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Golden {
    pub(crate) tokens: Vec<u32>,
    pub(crate) logits: Vec<f32>,
}

/// A checkpoint that was opened and checked.
pub(crate) struct Source {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) tokenizer: GgufTokenizer,
    pub(crate) chat_template: Option<String>,
    pub(crate) golden: Option<Golden>,
}

/// The checkpoint that a path names: the folder itself where it holds one, else
/// the newest (the highest step) in it or in its `checkpoints` folder.
///
/// # Errors
/// A path that is no folder, or a folder without a checkpoint.
pub fn find_checkpoint(path: &Path) -> Result<PathBuf, ExportError> {
    if !path.is_dir() {
        return Err(ExportError::NoFolder(path.into()));
    }
    if holds_weights(path) {
        return Ok(path.into());
    }
    let inside = [path.join("checkpoints"), path.to_path_buf()];
    let newest = inside.iter().find_map(|folder| newest(folder));
    if let Some(found) = newest {
        return Ok(found);
    }
    // A folder with a configuration was meant to be one: opening it will say
    // what is missing.
    if path.join("config.json").exists() {
        return Ok(path.into());
    }
    Err(ExportError::NoCheckpoint(path.into()))
}

fn holds_weights(folder: &Path) -> bool {
    ["model.safetensors", "model.safetensors.index.json"].iter().any(|f| folder.join(f).exists())
}

/// The folder with the highest number as its name that holds weights.
fn newest(folder: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(folder).ok()?.flatten();
    entries
        .filter_map(|e| Some((e.file_name().to_str()?.parse::<u64>().ok()?, e.path())))
        .filter(|(_, path)| holds_weights(path))
        .max()
        .map(|(_, path)| path)
}

impl Source {
    pub(crate) fn open(path: &Path) -> Result<Self, ExportError> {
        let folder = find_checkpoint(path)?;
        let checkpoint = Checkpoint::open(&folder)?;
        let vocab_size = checkpoint.config().vocab_size;
        let file = folder.join("tokenizer.json");
        let json = fs::read_to_string(&file)
            .map_err(|source| ExportError::Read { path: file.clone(), source })?;
        let tokenizer = GgufTokenizer::parse(&json, vocab_size, &file.display().to_string())?;
        let golden = golden(&folder, checkpoint.config().max_position_embeddings, vocab_size)?;
        let chat_template = chat_template(&folder)?;
        Ok(Self { checkpoint, tokenizer, chat_template, golden })
    }

    pub(crate) fn folder(&self) -> &Path {
        self.checkpoint.folder()
    }

    /// The run's name for `<run>/checkpoints/<step>`, else the folder's own.
    pub(crate) fn default_name(&self) -> String {
        let folder = self.folder();
        let folder = folder.canonicalize().unwrap_or_else(|_| folder.into());
        let parent = folder.parent().filter(|p| p.ends_with("checkpoints"));
        let named = parent.and_then(Path::parent).unwrap_or(&folder);
        let name = named.file_name().map(|n| n.to_string_lossy().into_owned());
        name.unwrap_or_else(|| "model".into())
    }
}

/// Reads a file that may be absent.
fn read_if_there(path: &Path) -> Result<Option<String>, ExportError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ExportError::Read { path: path.into(), source }),
    }
}

fn golden(folder: &Path, context: usize, vocab: usize) -> Result<Option<Golden>, ExportError> {
    let path = folder.join("golden.json");
    let Some(text) = read_if_there(&path)? else { return Ok(None) };
    let bad = |what: String| ExportError::Invalid { path: path.clone(), what };
    let golden: Golden =
        serde_json::from_str(&text).map_err(|e| bad(format!("not golden logits: {e}")))?;
    let (tokens, logits) = (&golden.tokens, &golden.logits);
    if tokens.is_empty() || tokens.len() > context {
        return Err(bad(format!("{} tokens, of 1..={context}", tokens.len())));
    }
    if let Some(t) = tokens.iter().find(|t| **t as usize >= vocab) {
        return Err(bad(format!("token {t}, the model has {vocab}")));
    }
    if logits.len() != vocab {
        return Err(bad(format!("{} logits, the model has {vocab} tokens", logits.len())));
    }
    if let Some(at) = logits.iter().position(|x| !x.is_finite()) {
        return Err(bad(format!("the logit of token {at} is {}", logits[at])));
    }
    Ok(Some(golden))
}

/// `chat_template.jinja`, or the key of that name in `tokenizer_config.json`.
fn chat_template(folder: &Path) -> Result<Option<String>, ExportError> {
    if let Some(text) = read_if_there(&folder.join("chat_template.jinja"))? {
        return Ok(Some(text));
    }
    let path = folder.join("tokenizer_config.json");
    let Some(text) = read_if_there(&path)? else { return Ok(None) };
    let json: Value = serde_json::from_str(&text).map_err(|e| ExportError::Invalid {
        path: path.clone(),
        what: format!("not valid JSON: {e}"),
    })?;
    Ok(json["chat_template"].as_str().map(str::to_owned))
}

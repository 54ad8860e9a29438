//! A Hugging Face folder: a checkpoint of ours, packed ternary weights, master
//! weights, or a float model.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bitnet_core::names::Tensor;
use bitnet_core::{Recipe, WeightQuantizer, WeightScheme};
use serde_json::Value;

use super::{
    Facts, Golden, Linears, ModelError, OpenOptions, Source, Text, check_golden, given_tokenizer,
    quantise_later, quantised, refuse_for_gguf,
};
use crate::hf::{Checkpoint, HfError, PackedScale, SpecialTokens, Trits};

/// An open folder.
pub(super) struct Folder {
    checkpoint: Checkpoint,
    /// What makes ternary values of master weights.
    scheme: WeightScheme,
    facts: Facts,
}

impl Folder {
    pub(super) fn open(path: &Path, options: &OpenOptions) -> Result<Self, ModelError> {
        let checkpoint = Checkpoint::open_any(path)?;
        refuse_for_gguf(path, options)?;
        let mut config = checkpoint.config().clone();
        let (stored, kind) = match (checkpoint.packed(), config.weight_quantizer) {
            (Some(PackedScale::Multiplies), _) => (Linears::Trits, "packed (autobitlinear)"),
            (Some(PackedScale::Divides), _) => (Linears::Trits, "packed (bitlinear)"),
            (None, WeightQuantizer::Ternary) => (Linears::Masters, "master weights"),
            (None, WeightQuantizer::Binary) => (Linears::Masters, "binary master weights"),
            (None, WeightQuantizer::None) => (Linears::Floats, "float weights"),
        };
        // Nothing but this folder knows the recipe: what it gives out is ternary
        // values with a scale, as those of BitNet b1.58 are.
        config.packable().map_err(|source| ModelError::Recipe { path: path.into(), source })?;
        let linears = quantise_later(path, options, &mut config, stored)?;
        let scheme = config.weight_scheme();
        config.recipe = Recipe::default();
        if config.weight_quantizer == WeightQuantizer::Binary {
            config.weight_quantizer = WeightQuantizer::Ternary;
        }
        let text = text(path, options, checkpoint.special())?;
        let golden = match options.ptq {
            true => None,
            false => golden(path, &config)?,
        };
        let kind = format!("Hugging Face folder, {kind}");
        let linear_dtype = checkpoint.linear_dtype();
        let name = name(path);
        let facts =
            Facts { kind, config, linears, linear_dtype, linear_rows: None, name, text, golden };
        Ok(Self { checkpoint, scheme, facts })
    }
}

impl Source for Folder {
    fn path(&self) -> &Path {
        self.checkpoint.folder()
    }

    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn floats(&self, tensor: Tensor, first: usize, out: &mut [f32]) -> Result<(), ModelError> {
        let cols = tensor.shape(&self.facts.config)[1];
        Ok(self.checkpoint.read_at(&tensor.hf(), first * cols, out)?)
    }

    fn ternary(&self, tensor: Tensor) -> Result<Trits, ModelError> {
        match (tensor, self.facts.linears) {
            (Tensor::Linear(layer, linear), Linears::Trits) => {
                Ok(self.checkpoint.read_packed(layer, linear)?)
            }
            _ => quantised(self, tensor, self.scheme),
        }
    }
}

/// The run's name for `<run>/checkpoints/<step>`, else the folder's own.
fn name(folder: &Path) -> String {
    let folder = folder.canonicalize().unwrap_or_else(|_| folder.into());
    let parent = folder.parent().filter(|p| p.ends_with("checkpoints"));
    let named = parent.and_then(Path::parent).unwrap_or(&folder);
    let name = named.file_name().map(|n| n.to_string_lossy().into_owned());
    name.unwrap_or_else(|| "model".into())
}

fn text(folder: &Path, options: &OpenOptions, special: SpecialTokens) -> Result<Text, ModelError> {
    if options.without_text {
        return Ok(Text::default());
    }
    let (tokenizer, tokenizer_file) = match given_tokenizer(options)? {
        Some(given) => given,
        None => {
            let file = folder.join("tokenizer.json");
            let missing = || ModelError::NoTokenizer(folder.into());
            let text = read_if_there(&file)?.ok_or_else(missing)?;
            (text, file.display().to_string())
        }
    };
    let chat_template = chat_template(folder)?;
    let eot = end_of_turn(folder, special.eos)?;
    Ok(Text { tokenizer, tokenizer_file, special, eot, chat_template })
}

/// Reads a file that may be absent.
fn read_if_there(path: &Path) -> Result<Option<String>, ModelError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ModelError::Read { path: path.into(), source }),
    }
}

/// Reads a JSON file that may be absent.
fn json_if_there(path: PathBuf) -> Result<Option<Value>, ModelError> {
    let Some(text) = read_if_there(&path)? else { return Ok(None) };
    match serde_json::from_str(&text) {
        Ok(json) => Ok(Some(json)),
        Err(source) => Err(HfError::Json { path, source }.into()),
    }
}

fn golden(folder: &Path, config: &bitnet_core::ModelConfig) -> Result<Option<Golden>, ModelError> {
    let path = folder.join("golden.json");
    let Some(text) = read_if_there(&path)? else { return Ok(None) };
    let bad = |what: String| ModelError::Invalid { path: path.clone(), what };
    let golden: Golden =
        serde_json::from_str(&text).map_err(|e| bad(format!("not golden logits: {e}")))?;
    check_golden(&golden, config).map_err(bad)?;
    Ok(Some(golden))
}

/// `chat_template.jinja`, or the key of that name in `tokenizer_config.json`:
/// a text, or a list of named ones of which `default` is taken.
fn chat_template(folder: &Path) -> Result<Option<String>, ModelError> {
    if let Some(text) = read_if_there(&folder.join("chat_template.jinja"))? {
        return Ok(Some(text));
    }
    let Some(json) = json_if_there(folder.join("tokenizer_config.json"))? else {
        return Ok(None);
    };
    let key = &json["chat_template"];
    let named = key.as_array().into_iter().flatten().find(|t| t["name"] == "default");
    let text = named.map_or(key, |t| &t["template"]);
    Ok(text.as_str().map(str::to_owned))
}

/// The second of several tokens that end a text: in `generation_config.json`,
/// else in `config.json`.
fn end_of_turn(folder: &Path, eos: Option<u32>) -> Result<Option<u32>, ModelError> {
    for file in ["generation_config.json", "config.json"] {
        let Some(json) = json_if_there(folder.join(file))? else { continue };
        let ids = json["eos_token_id"].as_array().into_iter().flatten();
        let mut ids = ids.filter_map(|v| u32::try_from(v.as_u64()?).ok());
        if let Some(id) = ids.find(|id| Some(*id) != eos) {
            return Ok(Some(id));
        }
    }
    Ok(None)
}

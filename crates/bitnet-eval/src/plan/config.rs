//! What a plan reads of a training config: the model, and what of the rest decides
//! memory and time. Every other key is training's to check.

use std::path::{Path, PathBuf};
use std::{env, fs};

use bitnet_core::ModelConfig;
use serde::Deserialize;

use super::Subject;
use crate::EvalError;

/// How a model is trained.
#[derive(Debug, Clone, PartialEq)]
pub struct Training {
    /// Tokens of a step.
    pub batch_tokens: usize,
    /// Tokens of a sequence.
    pub sequence: usize,
    /// Sequences at once; none: as many as fit.
    pub micro_batch: Option<usize>,
    /// Whether blocks are run again in the backward pass.
    pub recompute: bool,
    /// Whether the matrices are Muon's.
    pub muon: bool,
    /// Whether AdamW's moments are kept as bytes.
    pub byte_moments: bool,
    /// Whether quantisation is blended in.
    pub blends: bool,
    /// Digits of 8 bits of the linear layers' gradients; none: they are floats.
    pub digits: Option<u8>,
    /// Whether gradients of the linear layers' inputs are int8 instead.
    pub int8_backward: bool,
    /// Whether a teacher is followed, whose shape is in its own folder.
    pub distills: bool,
    /// Tokens of the whole schedule.
    pub tokens: u64,
}

#[derive(Deserialize)]
struct File {
    name: Option<String>,
    model: ModelConfig,
    batch: Option<Batch>,
    schedule: Option<Schedule>,
    #[serde(default)]
    optimizer: Optimizer,
    #[serde(default)]
    quantization: Quantization,
    distill: Option<toml::Table>,
}

#[derive(Deserialize)]
struct Batch {
    tokens: usize,
    sequence: usize,
    micro_batch: MicroBatch,
    #[serde(default)]
    recompute: bool,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum MicroBatch {
    Number(usize),
    Auto(String),
}

#[derive(Deserialize)]
struct Schedule {
    steps: u64,
}

#[derive(Deserialize, Default)]
struct Optimizer {
    kind: Option<String>,
    moments: Option<String>,
}

#[derive(Deserialize, Default)]
struct Quantization {
    #[serde(default)]
    blend: f64,
    #[serde(default)]
    int8_backward: bool,
    gradients: Option<String>,
}

/// The subject of a training config: a path, or the bare name of a file in a folder
/// `configs` of the working directory, or of the program's folder or one above it;
/// `.toml` may be left out of a bare name.
///
/// # Errors
/// No such file, one that cannot be read, a model that cannot exist, a batch that is
/// none.
pub fn load(name: &str) -> Result<Subject, EvalError> {
    let program = env::current_exe().ok();
    let above = program.as_deref().into_iter().flat_map(Path::ancestors).skip(1);
    let path = find(name, std::iter::once(Path::new("")).chain(above))
        .ok_or_else(|| EvalError::NoSubject { name: name.to_owned() })?;
    let text = fs::read_to_string(&path)
        .map_err(|source| EvalError::Read { path: path.clone(), source })?;
    let bad = |what: String| EvalError::Config { path: path.clone(), what };
    let file: File = toml::from_str(&text).map_err(|e| bad(e.to_string().trim().to_owned()))?;
    file.model.validate().map_err(|e| bad(e.to_string()))?;
    let stem = path.file_stem().map(|s| s.to_string_lossy().into_owned());
    let name = file.name.or(stem).unwrap_or_default();
    let training = match (file.batch, file.schedule) {
        (Some(batch), Some(schedule)) => {
            let training = training(&batch, &schedule, &file.optimizer, &file.quantization);
            Some(Training { distills: file.distill.is_some(), ..training.map_err(bad)? })
        }
        _ => None,
    };
    Ok(Subject { name, config: file.model, file: None, training })
}

fn training(
    batch: &Batch,
    schedule: &Schedule,
    optimizer: &Optimizer,
    quantization: &Quantization,
) -> Result<Training, String> {
    let micro_batch = match &batch.micro_batch {
        MicroBatch::Number(0) => None,
        MicroBatch::Number(n) => Some(*n),
        MicroBatch::Auto(text) if text == "auto" => None,
        MicroBatch::Auto(text) => {
            return Err(format!("batch.micro_batch = {text:?}: a number or \"auto\""));
        }
    };
    let at_once = batch.sequence.checked_mul(micro_batch.unwrap_or(1)).unwrap_or(0);
    if at_once == 0 || batch.tokens == 0 || !batch.tokens.is_multiple_of(at_once) {
        return Err(format!(
            "batch.tokens = {}: must be a multiple of batch.sequence · batch.micro_batch, \
             {} · {}",
            batch.tokens,
            batch.sequence,
            micro_batch.unwrap_or(1)
        ));
    }
    let muon = match optimizer.kind.as_deref() {
        None | Some("adamw") => false,
        Some("muon") => true,
        Some(other) => return Err(format!("optimizer.kind = {other:?}: adamw or muon")),
    };
    let byte_moments = match optimizer.moments.as_deref() {
        None | Some("f32") => false,
        Some("int8") => true,
        Some(other) => return Err(format!("optimizer.moments = {other:?}: f32 or int8")),
    };
    let digits = match quantization.gradients.as_deref() {
        None | Some("fixed24") => Some(3),
        Some("fixed16") => Some(2),
        Some("float") => None,
        Some(other) => {
            return Err(format!("quantization.gradients = {other:?}: fixed24, fixed16 or float"));
        }
    };
    Ok(Training {
        batch_tokens: batch.tokens,
        sequence: batch.sequence,
        micro_batch,
        recompute: batch.recompute,
        muon,
        byte_moments,
        blends: quantization.blend > 0.0,
        digits,
        int8_backward: quantization.int8_backward,
        distills: false,
        tokens: schedule.steps.saturating_mul(batch.tokens as u64),
    })
}

fn find<'p>(name: &str, mut folders: impl Iterator<Item = &'p Path>) -> Option<PathBuf> {
    let path = PathBuf::from(name);
    if path.is_file() {
        return Some(path);
    }
    if path.components().count() != 1 {
        return None;
    }
    folders.find_map(|folder| {
        let files = [name.to_owned(), format!("{name}.toml")];
        files.into_iter().map(|file| folder.join("configs").join(file)).find(|p| p.is_file())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        fs::write(&path, text).unwrap();
        load(path.to_str().unwrap()).unwrap_err().to_string()
    }

    #[test]
    fn reads_every_config_of_the_project() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs");
        let mut seen = 0;
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|e| e == "toml") {
                let subject = load(path.to_str().unwrap()).unwrap();
                assert!(subject.training.is_some_and(|t| t.tokens > 0), "{}", path.display());
                seen += 1;
            }
        }
        assert!(seen >= 10, "{seen}");
    }

    #[test]
    fn names_what_is_wrong() {
        let model = toml::to_string(&ModelConfig::tiny()).unwrap();
        let rest = |batch: &str| {
            format!("[model]\n{model}\n[schedule]\nsteps = 3\n[batch]\nsequence = 32\n{batch}\n")
        };
        let error_of = |batch: &str| error(&rest(batch));
        assert!(error_of("tokens = 100\nmicro_batch = 1").contains("batch.tokens = 100: "));
        assert!(error_of("tokens = 64\nmicro_batch = \"all\"").contains("\"auto\""));
        let bad = rest("tokens = 64\nmicro_batch = 2\n[optimizer]\nkind = \"sgd\"");
        assert!(error(&bad).contains("optimizer.kind = \"sgd\""));
        let bad = bad.replace("kind = \"sgd\"", "moments = \"int4\"");
        assert!(error(&bad).contains("optimizer.moments = \"int4\": f32 or int8"));
        let spoilt = model.replace("hidden_size = 64", "hidden_size = 65");
        let wrong = error(&format!("[model]\n{spoilt}"));
        assert!(wrong.contains("c.toml: model.hidden_size = 65: "), "{wrong}");
        assert!(error("").contains("missing field `model`"));
        let error = load("no-such-config").unwrap_err();
        assert!(error.to_string().contains("no-such-config"), "{error}");
        assert_eq!(error.exit(), bitnet_core::Exit::BadInput);
    }
}

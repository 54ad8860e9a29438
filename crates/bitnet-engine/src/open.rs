//! From a path to the bytes of a packed file: mapped in place where it is one,
//! packed on the spot where it is a model of another tool.

use std::path::Path;
use std::time::{Duration, Instant};

use bitnet_core::Layout;
use bitnet_format::map::{Mmap, map, map_file};
use bitnet_format::model::{self, ModelError, OpenOptions};
use bitnet_format::pack::{DenseType, LayoutChoice, PackError, Plan, Temporary, pack_temporary};
use bitnet_kernels::Kernels;

use crate::error::EngineError;
use crate::load;
use crate::model::{LoadOptions, Weights};

/// A long packing says how far it is, this often.
const LINES_EVERY: Duration = Duration::from_secs(5);

/// How a model of another tool was packed when it was opened, see
/// [`crate::Model::packing`].
#[derive(Debug, Clone, PartialEq)]
pub struct Packing {
    /// What it was made from: `Hugging Face folder, master weights`.
    pub kind: String,
    /// Bytes of the packed file, which lies in the folder for temporary files
    /// without a name as long as the model is open.
    pub bytes: u64,
    /// How long it took.
    pub seconds: f64,
    /// The command that does it once for all.
    pub command: String,
}

/// A checked model and the bytes that it lies in.
pub(crate) struct Opened {
    pub(crate) map: Mmap,
    pub(crate) weights: Weights,
    pub(crate) packing: Option<Packing>,
}

/// Opens what `path` names; `file` is what errors call it.
pub(crate) fn open(path: &Path, file: &str, options: &LoadOptions) -> Result<Opened, EngineError> {
    if !path.is_dir() && options.source.is_default() && options.dense == DenseType::Auto {
        let map = map(path, options.prefetch)
            .map_err(|source| EngineError::Io { file: file.into(), source })?;
        if let Some(weights) = load::load(&map, file)? {
            return Ok(Opened { map, weights, packing: None });
        }
    }
    let (Temporary { file: temporary, .. }, packing) =
        pack(path, file, &options.source, options.dense)?;
    let map = map_file(&temporary, false)
        .map_err(|source| EngineError::Io { file: file.into(), source })?;
    let weights = load::load(&map, file)?.ok_or_else(|| {
        // The writer names its architecture; only another process can change that.
        EngineError::Pack(PackError::Model(ModelError::Invalid {
            path: path.into(),
            what: "its packed copy was changed while it was opened".into(),
        }))
    })?;
    Ok(Opened { map, weights, packing: Some(packing) })
}

/// Packs a model of another tool, and says so.
fn pack(
    path: &Path,
    file: &str,
    options: &OpenOptions,
    dense: DenseType,
) -> Result<(Temporary, Packing), EngineError> {
    let start = Instant::now();
    let source = model::open(path, options).map_err(PackError::from)?;
    let facts = source.facts();
    if !dense.suits(&facts.config) {
        let why = format!("{file} ({}) is not a float model", facts.kind);
        return Err(EngineError::Option { option: "dense", value: dense.name().into(), why });
    }
    let mut last = start;
    let packed = pack_temporary(&*source, layout(), dense, &mut |done, total| {
        if last.elapsed() >= LINES_EVERY {
            last = Instant::now();
            let percent = 100.0 * done as f64 / total.max(1) as f64;
            tracing::warn!("{file}: packing, {percent:.0} %");
        }
    })?;
    let packing = Packing {
        kind: facts.kind.clone(),
        bytes: packed.bytes,
        seconds: start.elapsed().as_secs_f64(),
        command: command(file, options, dense),
    };
    let Packing { kind, bytes, seconds, command } = &packing;
    tracing::warn!(
        "{file} ({kind}) was packed in {seconds:.2} s into {:.1} MB of temporary file, mapped; \
         `{command}` does it once for all",
        *bytes as f64 / 1e6,
    );
    let form = Plan::packed_form(&facts.config, dense, facts.linear_form());
    let f16: Vec<_> = Plan::not_whole(&facts.config, form).iter().map(|l| l.hf(0)).collect();
    if !f16.is_empty() {
        tracing::warn!(
            "{file}: {} are f16, since their rows are not whole blocks of 32 (in every block)",
            f16.join(", ")
        );
    }
    if options.ptq {
        tracing::warn!("{file}: its weights were not trained to be ternary, the quality collapses");
    }
    Ok((packed, packing))
}

/// The layout that this machine reads well; an export chooses for every machine.
fn layout() -> LayoutChoice {
    match Kernels::from_env() {
        Ok(kernels) if !kernels.reads_well(Layout::P5) => Layout::P2.into(),
        // A name that is not known is refused where the kernels are needed.
        _ => LayoutChoice::Auto,
    }
}

/// The command that packs once for all.
fn command(file: &str, options: &OpenOptions, dense: DenseType) -> String {
    let mut command = format!("bitnet-export import {file} -o model.gguf");
    if let Some(act) = options.hidden_act {
        command += &format!(" --hidden-act {}", act.name());
    }
    if let Some(layout) = options.i2s {
        command += &format!(" --i2s {}", layout.name());
    }
    if let Some(tokenizer) = &options.tokenizer {
        command += &format!(" --tokenizer {}", tokenizer.display());
    }
    if options.ptq {
        command += " --ptq ternary";
    }
    if dense != DenseType::Auto {
        command += &format!(" --dense {}", dense.name());
    }
    command
}

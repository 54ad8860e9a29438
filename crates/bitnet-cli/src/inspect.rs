//! `bitnet inspect`: what is in a model file or a checkpoint folder.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::anyhow;
use bitnet_core::config::ParameterCount;
use bitnet_core::matrix::BLOCK_BYTES;
use bitnet_core::{ExitError, Layout, ModelConfig, WeightQuantizer, names};
use bitnet_engine::{ARCHITECTURE, LoadOptions, Model};
use bitnet_format::gguf::{Directory, read_head};
use bitnet_format::hf::Checkpoint;
use bitnet_format::json::write_json;
use serde::Serialize;

use crate::generate::show;
use crate::table::{Table, bytes, thousands};

/// Show what a model file or a checkpoint folder holds
///
/// Configuration, bytes by part, bits per ternary weight and the tensors. Reads
/// packed models, GGUF files of other programs (their tensors and keys) and
/// checkpoint folders.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  bitnet inspect model.gguf
  bitnet inspect model.gguf --verify --tensors
  bitnet inspect runs/quickstart/run/checkpoints/00000300
  bitnet inspect model.gguf --json - | jq .parts

JSON keys: path, kind (packed, gguf, checkpoint), bytes, name, architecture, layout,
config, parameters, parts, bits_per_ternary_weight {stored, unpadded}, verified,
tensors [{name, type, shape, bytes}], keys (kind gguf only).")]
pub(crate) struct Args {
    /// Packed model, GGUF file or checkpoint folder
    model: PathBuf,
    /// Read every weight and check that it is valid
    #[arg(long)]
    verify: bool,
    /// List all tensors
    #[arg(long)]
    tensors: bool,
    /// Write the result as JSON to FILE, or to stdout with -
    #[arg(long, value_name = "FILE|-")]
    json: Option<String>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let report = if args.model.is_dir() {
        checkpoint(&args.model, args.verify)?
    } else {
        gguf(&args.model, args.verify)?
    };
    if args.json.as_deref() != Some("-") {
        show(&report.render(args.tensors))?;
    }
    match &args.json {
        Some(dest) => Ok(write_json(dest, &report)?),
        None => Ok(()),
    }
}

/// What was found; its keys are stable.
#[derive(Debug, Default, Serialize)]
struct Report {
    path: PathBuf,
    kind: &'static str,
    bytes: u64,
    name: Option<String>,
    architecture: Option<String>,
    layout: Option<Layout>,
    config: Option<ModelConfig>,
    parameters: Option<Parameters>,
    parts: Option<Parts>,
    bits_per_ternary_weight: Option<Bits>,
    /// Whether every weight was read and is valid; none: not asked for.
    verified: Option<bool>,
    tensors: Vec<Tensor>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    keys: Vec<Key>,
}

#[derive(Debug, Serialize)]
struct Parameters {
    total: u64,
    #[serde(flatten)]
    parts: ParameterCount,
}

/// Bytes of the file by part.
#[derive(Debug, Serialize)]
struct Parts {
    ternary: u64,
    dense: u64,
    embedding: u64,
    head: u64,
    norms: u64,
    metadata: u64,
}

/// Bits that a ternary weight takes in the file, and would take in rows that
/// need no padding to whole blocks.
#[derive(Debug, Serialize)]
struct Bits {
    stored: f64,
    unpadded: f64,
}

#[derive(Debug, Serialize)]
struct Tensor {
    name: String,
    #[serde(rename = "type")]
    ty: String,
    /// Outermost dimension first: `[out, in]`; of packed rows `[rows, row bytes]`.
    shape: Vec<u64>,
    /// None for a type whose size is not known.
    bytes: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Key {
    key: String,
    #[serde(rename = "type")]
    ty: String,
    value: String,
}

fn gguf(path: &Path, verify: bool) -> anyhow::Result<Report> {
    let name = path.display().to_string();
    let mut file = File::open(path).map_err(|e| ExitError::bad_input(anyhow!("{name}: {e}")))?;
    let (head, total) = read_head(&mut file, &name).map_err(ExitError::bad_input)?;
    let directory = Directory::parse(&head, total, &name).map_err(ExitError::bad_input)?;
    let architecture = directory.find::<String>("general.architecture");
    let architecture = architecture.map_err(ExitError::bad_input)?;
    let tensors = directory
        .tensors()
        .iter()
        .map(|t| Tensor {
            name: t.name.clone(),
            ty: t.ty.to_string(),
            shape: t.dims.iter().rev().copied().collect(),
            bytes: t.bytes(),
        })
        .collect();
    let report =
        Report { path: path.into(), bytes: total, architecture, tensors, ..Report::default() };
    if report.architecture.as_deref() == Some(ARCHITECTURE) {
        return packed(path, verify, report);
    }
    if verify {
        let found = report.architecture.as_deref().unwrap_or("none");
        return Err(ExitError::usage(anyhow!(
            "{name}: --verify checks files of architecture {ARCHITECTURE}, found {found}"
        ))
        .into());
    }
    let mut keys: Vec<Key> = Vec::new();
    for (key, value) in directory.metadata() {
        keys.push(Key {
            key: (*key).to_owned(),
            ty: value.describe(),
            value: shortened(&value.to_string()),
        });
    }
    let model_name = directory.find::<String>("general.name").map_err(ExitError::bad_input)?;
    Ok(Report { kind: "gguf", name: model_name, keys, ..report })
}

fn packed(path: &Path, verify: bool, report: Report) -> anyhow::Result<Report> {
    let options = LoadOptions { verify, ..LoadOptions::default() };
    let model = Model::open(path, &options).map_err(ExitError::from)?;
    let config = model.config().clone();
    let count = config.parameter_count();
    let p = model.parts();
    let ternary = config.weight_quantizer == WeightQuantizer::Ternary;
    let layout = model.layout();
    Ok(Report {
        kind: "packed",
        name: Some(model.name().to_owned()),
        layout: ternary.then_some(layout),
        parameters: Some(Parameters { total: count.total(), parts: count }),
        parts: Some(Parts {
            ternary: p.ternary,
            dense: p.dense,
            embedding: p.embedding,
            head: p.head,
            norms: p.norms,
            metadata: p.metadata,
        }),
        bits_per_ternary_weight: ternary.then(|| Bits {
            stored: 8.0 * p.ternary as f64 / count.linear as f64,
            unpadded: 8.0 * BLOCK_BYTES as f64 / layout.block_weights() as f64,
        }),
        verified: verify.then_some(true),
        config: Some(config),
        ..report
    })
}

fn checkpoint(folder: &Path, verify: bool) -> anyhow::Result<Report> {
    let open = Checkpoint::open(folder).map_err(ExitError::bad_input)?;
    let config = open.config().clone();
    let count = config.parameter_count();
    let tensors: Vec<Tensor> = names::tensors(&config)
        .into_iter()
        .map(|(name, shape)| {
            let shape: Vec<u64> = shape.iter().map(|d| *d as u64).collect();
            let bytes = Some(4 * shape.iter().product::<u64>());
            Tensor { name, ty: "master".into(), shape, bytes }
        })
        .collect();
    if verify {
        for tensor in &tensors {
            let values = open.read(&tensor.name).map_err(ExitError::bad_input)?;
            if let Some(at) = values.iter().position(|v| !v.is_finite()) {
                return Err(ExitError::bad_input(anyhow!(
                    "{}: tensor {}: element {at} is {}",
                    folder.display(),
                    tensor.name,
                    values[at]
                ))
                .into());
            }
        }
    }
    Ok(Report {
        path: folder.into(),
        kind: "checkpoint",
        bytes: tensors.iter().filter_map(|t| t.bytes).sum(),
        parameters: Some(Parameters { total: count.total(), parts: count }),
        verified: verify.then_some(true),
        config: Some(config),
        tensors,
        ..Report::default()
    })
}

/// The beginning of a value that is too long for a line.
fn shortened(text: &str) -> String {
    const MOST: usize = 100;
    if text.chars().count() <= MOST {
        return text.to_owned();
    }
    text.chars().take(MOST).chain("…".chars()).collect()
}

impl Report {
    fn render(&self, list_tensors: bool) -> String {
        let mut t = Table::default();
        t.row("path", self.path.display().to_string());
        let kind = match self.kind {
            "packed" => "packed model",
            "gguf" => "GGUF file that the engine does not run",
            _ => "checkpoint of f32 master weights",
        };
        t.row("kind", kind);
        for (name, value) in [("name", &self.name), ("architecture", &self.architecture)] {
            if let Some(value) = value.as_deref().filter(|v| !v.is_empty()) {
                t.row(name, value);
            }
        }
        let size = if self.kind == "checkpoint" { "weights as f32" } else { "file" };
        t.row(size, bytes(self.bytes));
        if let Some(config) = &self.config {
            describe_config(&mut t, config);
        }
        if let Some(p) = &self.parameters {
            let ParameterCount { embedding, head, linear, norms } = p.parts;
            t.row("parameters", thousands(p.total));
            for (name, n) in
                [("linear", linear), ("embedding", embedding), ("head", head), ("norms", norms)]
            {
                t.row(format!("  {name}"), thousands(n));
            }
        }
        if let Some(p) = &self.parts {
            t.row("bytes", thousands(self.bytes));
            for (name, n) in [
                ("ternary", p.ternary),
                ("dense", p.dense),
                ("embedding", p.embedding),
                ("head", p.head),
                ("norms", p.norms),
                ("metadata", p.metadata),
            ] {
                let share = 100.0 * n as f64 / self.bytes.max(1) as f64;
                t.row(format!("  {name}"), format!("{} ({share:.1} %)", thousands(n)));
            }
        }
        if let (Some(b), Some(layout)) = (&self.bits_per_ternary_weight, self.layout) {
            t.row("layout", layout.name());
            t.row(
                "bits per ternary weight",
                format!("{:.3} stored, {:.3} without padding and scales", b.stored, b.unpadded),
            );
        }
        if self.verified == Some(true) {
            t.row("verified", "every weight is valid");
        }
        t.row("tensors", self.tensors.len().to_string());
        let mut text = t.render();
        if list_tensors {
            text.push_str(&self.render_tensors());
        }
        let mut keys = Table::default();
        for k in &self.keys {
            keys.row(format!("  {}", k.key), format!("{} = {}", k.ty, k.value));
        }
        text + &keys.render()
    }

    fn render_tensors(&self) -> String {
        let mut t = Table::default();
        for tensor in &self.tensors {
            let size = tensor.bytes.map_or("? bytes".into(), |b| format!("{} bytes", thousands(b)));
            t.row(format!("  {}", tensor.name), format!("{} {:?} {size}", tensor.ty, tensor.shape));
        }
        t.render()
    }
}

fn describe_config(t: &mut Table, c: &ModelConfig) {
    let tied = if c.tie_word_embeddings { "tied" } else { "untied" };
    let sub_norms = if c.sub_norms { ", sub-norms" } else { "" };
    t.row(
        "model",
        format!(
            "{} layers, hidden {}, ffn {} ({}), {} heads of {}, {} key/value heads{sub_norms}",
            c.num_hidden_layers,
            c.hidden_size,
            c.intermediate_size,
            c.hidden_act.name(),
            c.num_attention_heads,
            c.head_dim(),
            c.num_key_value_heads,
        ),
    )
    .row("weights", c.weight_quantizer.name())
    .row(
        "vocabulary",
        format!("{} tokens, {tied} embedding in {}", c.vocab_size, c.embedding_dtype.name()),
    )
    .row("context", format!("{} tokens", c.max_position_embeddings))
    .row("rope_theta, rms_norm_eps", format!("{}, {}", c.rope_theta, c.rms_norm_eps));
}

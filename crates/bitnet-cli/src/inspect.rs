//! `bitnet inspect`: what is in a model file or folder, and what differs between
//! two.

mod diff;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::anyhow;
use bitnet_core::config::ParameterCount;
use bitnet_core::exit;
use bitnet_core::matrix::BLOCK_BYTES;
use bitnet_core::{Dtype, ExitError, Layout, ModelConfig, WeightQuantizer};
use bitnet_engine::{ARCHITECTURE, LoadOptions, Model, OpenOptions};
use bitnet_format::gguf::{Directory, read_head};
use bitnet_format::hf::TensorFile;
use bitnet_format::json::write_json;
use bitnet_format::model::{self, Facts, Linears, Source, find_checkpoint};
use bitnet_format::pack::{DenseType, Form, Plan, for_chunks};
use serde::Serialize;

use crate::generate::show;
use crate::options::WeightArgs;
use crate::table::{Table, bytes, thousands};

/// Show what a model file or folder holds, or what differs between two
///
/// Configuration, bytes by part, bits per ternary weight and the tensors. Reads
/// packed models, GGUF files of other programs (their tensors and keys too),
/// checkpoint and run folders and Hugging Face folders. --diff compares two of
/// any of these tensor by tensor, as the engine uses them: ternary values (master
/// weights are quantised), scales, floats and configuration, but no tokenizers.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  bitnet inspect model.gguf
  bitnet inspect model.gguf --verify --tensors
  bitnet inspect runs/quickstart/run/checkpoints/00000300
  bitnet inspect model.gguf --json - | jq .parts
  bitnet inspect --diff model.gguf hugging-face-folder

JSON keys: path, kind (packed, gguf, checkpoint, folder), source (what kind of model, in
words), refused (why the engine does not run it), bytes, name, architecture, layout,
config, parameters, parts, bits_per_ternary_weight {stored, unpadded}, verified,
tensors [{name, type, shape, bytes}], keys (kind gguf only).
With --diff: a, b, equal, config [{key, a, b}], missing (in A alone), extra (in B alone),
tensors [{name, equal, kind (ternary, float), shapes, different, values, first, scales,
scale_relative_difference, largest_difference}].

Exit codes with --diff: 0 equal, 1 different, 2 bad usage, 3 a model that cannot be read.")]
pub(crate) struct Args {
    /// Packed model, GGUF file, checkpoint, run or Hugging Face folder
    #[arg(required_unless_present = "diff", conflicts_with = "diff")]
    model: Option<PathBuf>,
    /// Compare two models
    #[arg(long, num_args = 2, value_names = ["A", "B"], conflicts_with_all = ["verify", "tensors"])]
    diff: Vec<PathBuf>,
    /// Read every weight and check that it is valid
    #[arg(long)]
    verify: bool,
    /// List all tensors
    #[arg(long)]
    tensors: bool,
    /// Write the result as JSON to FILE, or to stdout with -
    #[arg(long, value_name = "FILE|-")]
    json: Option<String>,
    #[command(flatten)]
    weights: WeightArgs,
}

/// Runs the command; its exit code tells whether two models are equal.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    if let [a, b] = &args.diff[..] {
        let found = diff::diff(a, b, &args.weights.options())?;
        args.print(&found.render(), &found)?;
        return Ok(if found.equal { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    // Clap asks for it where there is no --diff.
    let path = args.model.as_deref().unwrap_or("".as_ref());
    let report = if path.is_dir() { folder(path, args)? } else { gguf(path, args)? };
    args.print(&report.render(args.tensors), &report)?;
    Ok(ExitCode::SUCCESS)
}

impl Args {
    fn print(&self, table: &str, result: &impl Serialize) -> anyhow::Result<()> {
        if self.json.as_deref() != Some("-") {
            show(table)?;
        }
        match &self.json {
            Some(dest) => Ok(write_json(dest, result)?),
            None => Ok(()),
        }
    }

    /// How weights are read for looking at them.
    fn weights_alone(&self) -> OpenOptions {
        OpenOptions { without_text: true, ..self.weights.options() }
    }
}

/// What was found; its keys are stable.
#[derive(Debug, Default, Serialize)]
struct Report {
    path: PathBuf,
    kind: &'static str,
    /// The kind of model, in words.
    source: Option<String>,
    /// Why the engine does not run it.
    refused: Option<String>,
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

fn gguf(path: &Path, args: &Args) -> anyhow::Result<Report> {
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
        return packed(path, args, report);
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
    let report = Report { kind: "gguf", name: model_name, keys, ..report };
    match model::open(path, &args.weights_alone()) {
        Ok(source) => {
            if args.verify {
                verify(&*source)?;
            }
            Ok(report.with_facts(source.facts(), args.verify))
        }
        Err(why) if args.verify => Err(ExitError::bad_input(why).into()),
        Err(why) => Ok(Report { refused: Some(exit::chain(&why)), ..report }),
    }
}

fn packed(path: &Path, args: &Args, report: Report) -> anyhow::Result<Report> {
    let (verify, source) = (args.verify, args.weights.options());
    let options = LoadOptions { verify, source, ..LoadOptions::default() };
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

/// A model folder: a checkpoint of ours, or a Hugging Face folder of any kind.
fn folder(path: &Path, args: &Args) -> anyhow::Result<Report> {
    let folder = find_checkpoint(path).map_err(ExitError::bad_input)?;
    let source = model::open(&folder, &args.weights_alone()).map_err(ExitError::bad_input)?;
    if args.verify {
        verify(&*source)?;
    }
    let tensors = stored_tensors(&folder)?;
    let facts = source.facts();
    let is_checkpoint = facts.linears == Linears::Masters;
    let report = Report {
        path: folder,
        kind: if is_checkpoint { "checkpoint" } else { "folder" },
        bytes: tensors.iter().filter_map(|t| t.bytes).sum(),
        tensors,
        ..Report::default()
    };
    Ok(report.with_facts(facts, args.verify))
}

/// The tensors of all safetensors files of a folder, as they are stored.
fn stored_tensors(folder: &Path) -> anyhow::Result<Vec<Tensor>> {
    let entries = std::fs::read_dir(folder).map_err(ExitError::bad_input)?;
    let mut paths = entries.map(|e| Ok(e?.path())).collect::<std::io::Result<Vec<_>>>()?;
    paths.retain(|p| {
        let name = p.file_name().map(|n| n.to_string_lossy());
        name.is_some_and(|n| n.starts_with("model") && n.ends_with(".safetensors"))
    });
    paths.sort();
    let mut tensors = Vec::new();
    for path in paths {
        let file = TensorFile::open(&path).map_err(ExitError::bad_input)?;
        for name in file.names() {
            let dims = file.shape(&name).unwrap_or_default();
            let shape: Vec<u64> = dims.iter().map(|d| *d as u64).collect();
            let dtype = file.float_type(&name);
            let width = dtype.map_or(1, Dtype::bytes) as u64;
            let bytes = Some(width * shape.iter().product::<u64>());
            let ty = dtype.map_or("u8", Dtype::name).to_owned();
            tensors.push(Tensor { name, ty, shape, bytes });
        }
    }
    Ok(tensors)
}

/// Reads every weight of a model: codes that are no ternary value, and floats that
/// are not finite.
fn verify(source: &dyn Source) -> anyhow::Result<()> {
    let facts = source.facts();
    let form = Plan::packed_form(&facts.config, DenseType::Auto, facts.linear_form());
    for item in &Plan::new(&facts.config, Layout::P2, form).items {
        if item.form == Form::Ternary {
            source.ternary(item.tensor).map_err(ExitError::bad_input)?;
            continue;
        }
        for_chunks(source, item, |first, values| {
            match values.iter().position(|x| !x.is_finite()) {
                None => Ok(()),
                Some(at) => Err(anyhow::Error::from(ExitError::bad_input(anyhow!(
                    "{}: tensor {}, element {:?}: {} is not finite",
                    source.path().display(),
                    item.hf,
                    item.position(first + at),
                    values[at]
                )))),
            }
        })?;
    }
    Ok(())
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
    /// What a source says.
    fn with_facts(self, facts: &Facts, verified: bool) -> Self {
        let count = facts.config.parameter_count();
        Self {
            source: Some(facts.kind.clone()),
            parameters: Some(Parameters { total: count.total(), parts: count }),
            config: Some(facts.config.clone()),
            verified: verified.then_some(true),
            ..self
        }
    }

    fn render(&self, list_tensors: bool) -> String {
        let mut t = Table::default();
        t.row("path", self.path.display().to_string());
        let kind = match self.kind {
            "packed" => "packed model",
            "gguf" => "GGUF file of another program",
            "folder" => "model folder",
            _ => "checkpoint of master weights",
        };
        t.row("kind", kind);
        for (name, value) in [("source", &self.source), ("the engine refuses it", &self.refused)] {
            if let Some(value) = value {
                t.row(name, value);
            }
        }
        for (name, value) in [("name", &self.name), ("architecture", &self.architecture)] {
            if let Some(value) = value.as_deref().filter(|v| !v.is_empty()) {
                t.row(name, value);
            }
        }
        let is_folder = matches!(self.kind, "checkpoint" | "folder");
        let size = if is_folder { "weights" } else { "file" };
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

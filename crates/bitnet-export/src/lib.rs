//! From a checkpoint, or any file of the ternary ecosystem, to a packed model or
//! to another of those forms: quantise with the one definition, pack, write, read
//! back, compare every weight, let the engine reproduce the logits that training
//! computed, and only then give the output its name.
//!
//! ```no_run
//! use bitnet_export::{ExportOptions, export};
//!
//! let report = export("runs/first".as_ref(), "model.gguf".as_ref(), &ExportOptions::default())?;
//! println!("{report}");
//! # Ok::<(), bitnet_export::ExportError>(())
//! ```
//!
//! [`synthesize`] writes a file of random weights in the shape of any config.
//!
//! Memory holds one tensor at a time, whatever the size of the model. An
//! existing file (or folder that holds a model) of the destination's name is
//! replaced, atomically and only by one that passed; a failed export leaves it as
//! it was.

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod compare;
mod error;
mod format;
mod golden;
mod report;
mod sink;
mod synthetic;

use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use bitnet_core::{Dtype, ModelConfig, WeightQuantizer};
use bitnet_format::model::{self, Facts, Linears, Source};
use bitnet_format::pack::{self, Form, Keys, Plan};

pub use bitnet_format::gguf::blocks::RowType;
pub use bitnet_format::model::{OpenOptions, find_checkpoint};
pub use bitnet_format::pack::{AUTO_P2_BYTES, DenseType, LayoutChoice};
pub use error::ExportError;
pub use format::Format;
pub use golden::GOLDEN_TOLERANCE;
pub use report::Report;
pub use synthetic::{SyntheticOptions, SyntheticReport, model_config, synthesize};

use error::Named;

/// What an export may choose.
#[derive(Debug, Clone, Default)]
pub struct ExportOptions {
    /// The form of the output.
    pub format: Format,
    /// Byte layout of the ternary matrices of a packed file.
    pub layout: LayoutChoice,
    /// The model's name; the file's, run's or folder's when absent.
    pub name: Option<String>,
    /// Type of a float model's linear weights in a packed file. Where they are
    /// rounded training's logits cannot be reproduced: the file is checked
    /// weight by weight only, and holds no golden logits.
    pub dense: DenseType,
    /// What the source leaves open.
    pub open: OpenOptions,
}

/// What an export is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Quantising, packing and writing.
    Pack,
    /// Reading back and comparing.
    Compare,
    /// Running the prompt of the golden logits.
    Golden,
    /// Making and writing a synthetic model; counted in bytes.
    Generate,
    /// Waiting for the disk to have them.
    Flush,
}

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// What is being done.
    pub phase: Phase,
    /// Parameters (or bytes, see [`Phase`]) done in this phase.
    pub done: u64,
    /// Parameters of the model, or bytes of the file.
    pub total: u64,
}

/// Writes the model that `src` names (a checkpoint, see [`find_checkpoint`], a
/// Hugging Face folder, or a GGUF file) to `dst`.
///
/// # Errors
/// A model that is missing, broken, not finite, or not one that the form can
/// hold; a destination that cannot be written; and any difference between what
/// was written and the source. Nothing appears under the destination's name then.
pub fn export(src: &Path, dst: &Path, options: &ExportOptions) -> Result<Report, ExportError> {
    export_with(src, dst, options, &mut |_| ControlFlow::Continue(()))
}

/// [`export`], reporting to `progress`, which may break it off.
///
/// # Errors
/// As [`export`], and [`ExportError::Interrupted`].
pub fn export_with(
    src: &Path,
    dst: &Path,
    options: &ExportOptions,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Report, ExportError> {
    let start = Instant::now();
    let format = options.format;
    check_destination(src, dst, format)?;
    let source = model::open(src, &options.open)?;
    let facts = source.facts();
    let config = &facts.config;
    format.check(config).map_err(|what| ExportError::Format { format, what })?;
    let tokenizer = pack::tokenizer(facts)?;
    let (layout, layout_reason) = options.layout.resolve(config);
    check_dense(config, format, options.dense)?;
    check_layout(config, format, options.layout)?;
    let form = linear_form(facts, format, options.dense);
    let plan = Plan::new(config, layout, form);
    let name = options.name.clone().unwrap_or_else(|| facts.name.clone());
    tracing::debug!(source = %source.path().display(), name, "writing");
    let has_place = matches!(format, Format::Packed | Format::HfPacked);
    let golden = pack::golden(facts, form).filter(|_| has_place);

    let keys = Keys::of(facts, &name, golden, &tokenizer);
    let mut sink = sink::create(format, dst, &keys, &plan)?;
    let mut step = Step::new(Phase::Pack, &plan, progress);
    pack::write(&*source, &plan, &mut *sink, &mut |parameters| step.add(parameters))?;
    let tensors = sink.tensors();
    let linear_bytes = linear_bytes(&plan, &*sink);
    let out = sink.finish()?;

    let mut step = Step::new(Phase::Compare, &plan, progress);
    let written =
        model::open(out.path(), &OpenOptions::default()).map_err(ExportError::ReadBack)?;
    check_config(config, &written.facts().config)?;
    let counts = compare::compare(&*source, &plan, &*written, format, &mut step)?;
    drop(written);
    let mut step = Step::new(Phase::Golden, &plan, progress);
    step.add(0)?;
    let golden_error = match golden.filter(|_| format == Format::Packed) {
        Some(golden) => Some(golden::reproduce(out.path(), golden)?),
        None => None,
    };
    let packed_bytes = out.bytes().named(dst)?;
    out.commit().named(dst)?;

    let warnings = warnings(&*source, options, golden_error.is_some(), form);
    let numbers = report::Numbers { packed_bytes, tensors, linear_bytes, golden_error };
    let facts = report::Facts { name, format, layout_reason, numbers, warnings };
    Ok(Report::new(&*source, &plan, dst, &counts, facts, start.elapsed()))
}

/// A file is not written over a folder, and a folder neither over a file nor over
/// one that holds something else than a model.
fn check_destination(src: &Path, dst: &Path, format: Format) -> Result<(), ExportError> {
    if !format.is_folder() {
        return match dst.is_dir() {
            true => Err(ExportError::DestinationIsFolder(dst.into())),
            false => Ok(()),
        };
    }
    let same = |a: &Path, b: &Path| a.canonicalize().ok().zip(b.canonicalize().ok());
    let is_source = same(src, dst).is_some_and(|(a, b)| a.starts_with(b));
    let holds_other = dst.is_dir()
        && !dst.join("config.json").exists()
        && dst.read_dir().is_ok_and(|mut entries| entries.next().is_some());
    if dst.is_file() || is_source || holds_other {
        return Err(ExportError::DestinationHoldsOther(dst.into()));
    }
    Ok(())
}

/// A type for dense rows is for a packed file of a dense model.
fn check_dense(config: &ModelConfig, format: Format, dense: DenseType) -> Result<(), ExportError> {
    let wrong = |what: String| Err(ExportError::Dense { dense, what });
    if !dense.suits(config) {
        return wrong("the model is not a float model".into());
    }
    if dense != DenseType::Auto && format != Format::Packed {
        return wrong(format!("it is for --format packed, not {format}"));
    }
    Ok(())
}

/// A layout is for the ternary weights of a packed file.
fn check_layout(
    config: &ModelConfig,
    format: Format,
    layout: LayoutChoice,
) -> Result<(), ExportError> {
    let LayoutChoice::Fixed(layout) = layout else { return Ok(()) };
    let what = match (format, config.weight_quantizer) {
        (Format::Packed, WeightQuantizer::None) => "the model has no ternary weights".to_owned(),
        (Format::Packed, _) => return Ok(()),
        _ => format!("it is for --format packed, not {format}"),
    };
    Err(ExportError::Layout { layout, what })
}

/// The form of the linear layers.
fn linear_form(facts: &Facts, format: Format, dense: DenseType) -> Form {
    match (format, facts.linears) {
        (Format::Packed, _) => Plan::packed_form(&facts.config, dense, facts.linear_form()),
        // Master weights stay master weights.
        (Format::HfBf16, Linears::Masters | Linears::Floats) => Form::Float(Dtype::Bf16),
        (_, Linears::Floats) => Form::Float(Dtype::F16),
        (_, Linears::Trits | Linears::Masters) => Form::Ternary,
    }
}

/// What was written says the same configuration, but for a head size that is
/// spelt out and for the precision of master weights.
fn check_config(expected: &ModelConfig, found: &ModelConfig) -> Result<(), ExportError> {
    let plain = |c: &ModelConfig| ModelConfig { head_dim: Some(c.head_dim()), ..c.clone() };
    let (e, f) = (plain(expected), plain(found));
    if e == f {
        return Ok(());
    }
    Err(ExportError::Differs {
        tensor: "(the configuration)".into(),
        at: Vec::new(),
        expected: format!("{e:?}"),
        found: format!("{f:?}"),
    })
}

/// Bytes of the linear layers, their scales included.
fn linear_bytes(plan: &Plan, sink: &dyn sink::Sink) -> u64 {
    let linears = plan.items.iter().filter(|item| item.is_linear());
    linears
        .map(|item| match item.form {
            Form::Ternary => sink.ternary_bytes(item),
            Form::Float(dtype) => (item.elements() * dtype.bytes()) as u64,
            Form::Rows(ty) => (item.rows * ty.row_bytes(item.cols)) as u64,
        })
        .sum()
}

fn warnings(
    source: &dyn Source,
    options: &ExportOptions,
    reproduced: bool,
    form: Form,
) -> Vec<String> {
    let facts = source.facts();
    let mut all = Vec::new();
    if options.open.ptq {
        all.push(
            "--ptq ternary: the weights were not trained to be ternary, the quality collapses; \
             measure it (bitnet-eval perplexity) and do not use it"
                .to_owned(),
        );
    }
    if options.format == Format::HfBf16 && facts.linears == Linears::Masters {
        all.push(
            "master weights were rounded to bf16: those near a threshold can quantise differently"
                .to_owned(),
        );
    }
    let names: Vec<_> = Plan::not_whole(&facts.config, form).into_iter().map(|l| l.hf(0)).collect();
    if let (Some(name), false) = (form.dense_name(), names.is_empty()) {
        all.push(format!(
            "{}: f16 instead of {name}, its rows are not whole blocks of 32 (in every block)",
            names.join(", "),
        ));
    }
    if options.format != Format::Packed || reproduced {
        return all;
    }
    if facts.golden.is_none() {
        all.push(format!(
            "{} holds no logits of training (golden.json): every weight was compared, the \
             model's output with nothing",
            source.path().display()
        ));
    } else if let Some(name) = form.dense_name() {
        all.push(format!("weights were rounded to {name}: the output was not compared"));
    }
    all
}

/// A phase's progress, and the place where it can be broken off.
struct Step<'p> {
    now: Progress,
    report: &'p mut dyn FnMut(Progress) -> ControlFlow<()>,
}

impl<'p> Step<'p> {
    fn new(
        phase: Phase,
        plan: &Plan,
        report: &'p mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Self {
        Self { now: Progress { phase, done: 0, total: plan.parameters() }, report }
    }

    fn add(&mut self, parameters: usize) -> Result<(), ExportError> {
        self.now.done += parameters as u64;
        match (self.report)(self.now) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(ExportError::Interrupted),
        }
    }
}

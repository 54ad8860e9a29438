//! From a checkpoint to a packed model: quantise with the one definition, pack,
//! write, read back, compare every weight, let the engine reproduce the logits
//! that training computed, and only then give the file its name.
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
//! existing file of the destination's name is replaced, atomically and only by
//! a file that passed; a failed export leaves it as it was.

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod compare;
mod error;
mod golden;
mod layout;
mod pack;
mod plan;
mod report;
mod source;
mod synthetic;

use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use bitnet_format::gguf::Writer;

pub use error::ExportError;
pub use golden::GOLDEN_TOLERANCE;
pub use layout::{AUTO_P2_BYTES, LayoutChoice};
pub use plan::DenseType;
pub use report::Report;
pub use source::find_checkpoint;
pub use synthetic::{SyntheticOptions, SyntheticReport, model_config, synthesize};

use error::Named;
use pack::Keys;
use plan::Plan;
use source::Source;

/// What an export may choose.
#[derive(Debug, Clone, Default)]
pub struct ExportOptions {
    /// Byte layout of the ternary matrices.
    pub layout: LayoutChoice,
    /// `general.name`; the run's or the folder's name when absent.
    pub name: Option<String>,
    /// Type of a float twin's linear weights. With [`DenseType::F16`] they are
    /// rounded, so training's logits cannot be reproduced: the file is checked
    /// weight by weight only, and holds no golden logits.
    pub dense: DenseType,
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

/// Packs the checkpoint that `src` names (see [`find_checkpoint`]) into the
/// file `dst`.
///
/// # Errors
/// A checkpoint that is missing, broken or not finite, a destination that
/// cannot be written, and any difference between the file and the checkpoint;
/// nothing appears under the destination's name then.
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
    if dst.is_dir() {
        return Err(ExportError::DestinationIsFolder(dst.into()));
    }
    let source = Source::open(src)?;
    let config = source.checkpoint.config();
    let (layout, layout_reason) = options.layout.resolve(config);
    let plan = Plan::new(config, layout, options.dense);
    let name = options.name.clone().unwrap_or_else(|| source.default_name());
    tracing::debug!(checkpoint = %source.folder().display(), name, "packing");
    let golden = source.golden.as_ref().filter(|_| plan.is_exact());

    let out = bitnet_format::atomic::AtomicFile::create(dst).named(dst)?;
    let keys = Keys {
        config,
        name: &name,
        golden,
        tokenizer: &source.tokenizer,
        special: source.checkpoint.special(),
        chat_template: source.chat_template.as_deref(),
    };
    let header = pack::header(&keys, &plan)?;
    let mut writer = Writer::start(out, header)?;
    let mut step = Step::new(Phase::Pack, &plan, progress);
    pack::write(&source, &plan, &mut writer, &mut step)?;
    let out = writer.finish()?;

    let mut step = Step::new(Phase::Compare, &plan, progress);
    let counts = compare::compare(&source, &plan, out.temp_path(), &mut step)?;
    let mut step = Step::new(Phase::Golden, &plan, progress);
    step.add(0)?;
    let golden_error = match golden {
        Some(golden) => Some(golden::reproduce(out.temp_path(), golden)?),
        None => None,
    };
    let packed_bytes = std::fs::metadata(out.temp_path()).named(dst)?.len();
    out.commit().named(dst)?;

    let mut warnings = Vec::new();
    if source.golden.is_none() {
        warnings.push(format!(
            "{} has no golden.json: the file equals the checkpoint, but its output was not \
             compared with training's",
            source.folder().display()
        ));
    } else if golden.is_none() {
        warnings.push("weights were rounded to f16: the output was not compared".to_owned());
    }
    let facts = report::Facts { name, layout_reason, packed_bytes, golden_error, warnings };
    Ok(Report::new(&source, &plan, dst, &counts, facts, start.elapsed()))
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

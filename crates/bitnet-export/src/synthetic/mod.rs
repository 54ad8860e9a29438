//! Synthetic models: files of random weights in a real shape, for measuring and
//! testing at sizes that nobody here can train.
//!
//! The bytes are made in the layout, several megabytes at a time, while those
//! before are written: memory does not grow with the model. A seed gives the
//! same weights on every machine and in every layout, whatever the number of
//! threads.

mod config;
mod fill;
mod space;
mod tokenizer;

use std::fmt;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use bitnet_core::{ConfigError, Dtype, ModelConfig};
use bitnet_format::atomic::AtomicFile;
use bitnet_format::gguf::{GgufError, Header, Writer};
use bitnet_format::pack::{DenseType, Form, Item, Keys, LayoutChoice, Plan, header};
use rayon::prelude::*;
use serde::Serialize;

pub use config::model_config;

use crate::error::Named;
use crate::report::grouped;
use crate::{ExportError, Phase, Progress};
use fill::{Fill, Rng, ZEROS};

/// Bytes that are made at a time, and as many again while these are written.
const BATCH_BYTES: usize = 8 << 20;

/// Largest magnitude of an embedding or head weight: with a standard deviation
/// of `limit / √3` = 0.02, the usual at the start of training.
const TABLE_LIMIT: f32 = 0.034_641;

/// What a synthetic model may choose besides its shape.
#[derive(Debug, Clone)]
pub struct SyntheticOptions {
    /// Byte layout of the ternary matrices.
    pub layout: LayoutChoice,
    /// Seed of every weight.
    pub seed: u64,
    /// `general.name`.
    pub name: String,
}

/// What was written; the keys of `--json` are these fields.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SyntheticReport {
    /// The packed file.
    pub path: String,
    /// `general.name` in the file.
    pub name: String,
    /// Parameters of the model.
    pub parameters: u64,
    /// Those of them in linear layers.
    pub linear_parameters: u64,
    /// Size of the file.
    pub bytes: u64,
    /// Byte layout of the ternary matrices.
    pub layout: &'static str,
    /// Why it is that one.
    pub layout_reason: String,
    /// Seed of the weights.
    pub seed: u64,
    /// Wall time, the flush to the disk included.
    pub seconds: f64,
    /// The most memory this process has used, where Linux tells.
    pub peak_rss_bytes: Option<u64>,
}

/// Writes a valid model of random weights to `dst`. Norms are ones; scales keep
/// the variance of activations at about one; the tokenizer has a token for each
/// byte and one that ends a text.
///
/// # Errors
/// A model that cannot exist or has fewer than 257 tokens, a disk without room
/// for it, a destination that cannot be written; nothing appears under its name
/// then.
pub fn synthesize(
    config: &ModelConfig,
    dst: &Path,
    options: &SyntheticOptions,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<SyntheticReport, ExportError> {
    let start = Instant::now();
    if dst.is_dir() {
        return Err(ExportError::DestinationIsFolder(dst.into()));
    }
    config.validate()?;
    if config.vocab_size < tokenizer::MIN_VOCAB {
        return Err(ExportError::Shape(ConfigError {
            key: "vocab_size",
            value: config.vocab_size.to_string(),
            reason: format!("a synthetic model has at least {} tokens", tokenizer::MIN_VOCAB),
        }));
    }
    let (layout, layout_reason) = options.layout.resolve(config);
    let plan = Plan::new(
        config,
        layout,
        Plan::packed_form(config, DenseType::Auto, Form::Float(Dtype::F32)),
    );
    let tokenizer = tokenizer::bytes_only(config.vocab_size)?;
    let keys = Keys {
        config,
        name: &options.name,
        golden: None,
        tokenizer: &tokenizer,
        special: tokenizer::SPECIAL,
        eot: None,
        chat_template: None,
    };
    let header = header(&keys, &plan)?;
    drop(tokenizer);
    let total = file_bytes(&header)?;
    space::check(dst, total)?;

    let out = AtomicFile::create(dst).named(dst)?;
    let mut writer = Writer::start(out, header)?;
    let maker = Maker { plan: &plan, seed: options.seed };
    let mut now = Progress { phase: Phase::Generate, done: 0, total };
    maker.write(&mut writer, |bytes| {
        now.done += bytes;
        match progress(now) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(ExportError::Interrupted),
        }
    })?;
    let out = writer.finish()?;
    if progress(Progress { phase: Phase::Flush, ..now }).is_break() {
        return Err(ExportError::Interrupted);
    }
    let bytes = std::fs::metadata(out.temp_path()).named(dst)?.len();
    out.commit().named(dst)?;
    let count = config.parameter_count();
    Ok(SyntheticReport {
        path: dst.display().to_string(),
        name: options.name.clone(),
        parameters: count.total(),
        linear_parameters: count.linear,
        bytes,
        layout: layout.name(),
        layout_reason,
        seed: options.seed,
        seconds: start.elapsed().as_secs_f64(),
        peak_rss_bytes: peak_rss_bytes(),
    })
}

/// Bytes of the whole file.
fn file_bytes(header: &Header) -> Result<u64, GgufError> {
    let mut head = Vec::new();
    Writer::start(&mut head, header.clone())?;
    Ok(head.len() as u64 + header.data_bytes())
}

/// Some rows of a tensor.
#[derive(Debug, Clone, Copy)]
struct Piece {
    /// Index of the tensor in the plan.
    item: usize,
    first: usize,
    rows: usize,
    bytes: usize,
}

/// Makes and writes the tensors of a plan.
struct Maker<'p> {
    plan: &'p Plan,
    seed: u64,
}

impl Maker<'_> {
    /// All data in the file's order; `step` gets the bytes of every batch.
    fn write<W: Write + Send>(
        &self,
        out: &mut Writer<W>,
        mut step: impl FnMut(u64) -> Result<(), ExportError>,
    ) -> Result<(), ExportError> {
        let mut pieces = self.pieces().peekable();
        let mut next_batch = || {
            let (mut batch, mut bytes) = (Vec::new(), 0);
            while let Some(piece) = pieces.next_if(|p| bytes == 0 || bytes + p.bytes <= BATCH_BYTES)
            {
                bytes += piece.bytes;
                batch.push(piece);
            }
            batch
        };
        let (mut ready, mut following) = (Vec::new(), Vec::new());
        let mut batch = next_batch();
        self.fill(&batch, &mut ready);
        while !batch.is_empty() {
            let next = next_batch();
            let (written, ()) = rayon::join(
                || self.write_batch(&batch, &ready, out),
                || self.fill(&next, &mut following),
            );
            written?;
            step(ready.len() as u64)?;
            std::mem::swap(&mut ready, &mut following);
            batch = next;
        }
        Ok(())
    }

    /// Every tensor, in pieces of at most [`BATCH_BYTES`] or one row.
    fn pieces(&self) -> impl Iterator<Item = Piece> {
        self.plan.items.iter().enumerate().flat_map(|(index, item)| {
            let row_bytes = self.row_bytes(item);
            let most = (BATCH_BYTES / row_bytes).max(1);
            (0..item.rows).step_by(most).map(move |first| {
                let rows = most.min(item.rows - first);
                Piece { item: index, first, rows, bytes: rows * row_bytes }
            })
        })
    }

    fn row_bytes(&self, item: &Item) -> usize {
        match item.form {
            Form::Ternary => self.plan.layout.row_bytes(item.cols),
            Form::Float(dtype) => item.cols * dtype.bytes(),
            Form::Rows(ty) => ty.row_bytes(item.cols),
        }
    }

    /// Makes the bytes of a batch, one piece after the other.
    fn fill(&self, batch: &[Piece], out: &mut Vec<u8>) {
        out.resize(batch.iter().map(|p| p.bytes).sum(), 0);
        let mut rest = &mut out[..];
        for piece in batch {
            let (bytes, after) = rest.split_at_mut(piece.bytes);
            rest = after;
            let item = &self.plan.items[piece.item];
            let fill = match item.form {
                _ if item.is_vector => {
                    // A norm: ones.
                    bytes.as_chunks_mut().0.fill(1.0f32.to_le_bytes());
                    continue;
                }
                Form::Ternary => Fill::Ternary(self.plan.layout),
                Form::Float(dtype) if item.is_linear() => {
                    // A variance of 1 / fan-in.
                    Fill::uniform((3.0 / item.cols as f32).sqrt(), dtype)
                }
                Form::Float(dtype) => Fill::uniform(TABLE_LIMIT, dtype),
                Form::Rows(_) => unreachable!("the plan of a synthetic model has floats"),
            };
            bytes.par_chunks_mut(self.row_bytes(item)).enumerate().for_each(|(i, row)| {
                let rng = Rng::of_row(self.seed, piece.item as u64, (piece.first + i) as u64);
                fill.row(rng, item.cols, row);
            });
        }
    }

    fn write_batch<W: Write>(
        &self,
        batch: &[Piece],
        mut bytes: &[u8],
        out: &mut Writer<W>,
    ) -> Result<(), GgufError> {
        for piece in batch {
            let item = &self.plan.items[piece.item];
            let (this, after) = bytes.split_at(piece.bytes);
            bytes = after;
            out.write(&item.weight(), this)?;
            if item.form == Form::Ternary && piece.first + piece.rows == item.rows {
                // A trit's variance is the share that is not zero.
                let variance = item.cols as f64 * (1.0 - ZEROS);
                let scale = (1.0 / variance.sqrt()) as f32;
                out.write(&item.scale(), &scale.to_le_bytes())?;
            }
        }
        Ok(())
    }
}

/// The most memory this process has used, in bytes, where Linux tells.
fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

/// A short table.
impl fmt::Display for SyntheticReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "synthetic   {}", self.path)?;
        writeln!(
            f,
            "parameters  {} ({} in linear layers), random from seed {}",
            grouped(self.parameters),
            grouped(self.linear_parameters),
            self.seed
        )?;
        writeln!(
            f,
            "bytes       {} ({:.0} MB/s)",
            grouped(self.bytes),
            self.bytes as f64 / 1e6 / self.seconds
        )?;
        writeln!(f, "layout      {} ({})", self.layout, self.layout_reason)?;
        write!(f, "seconds     {:.1}", self.seconds)
    }
}

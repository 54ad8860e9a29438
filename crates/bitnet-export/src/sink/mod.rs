//! Where a model is written: one tensor after the other, in the order of the
//! plan. What is written has no name until it was compared.

mod gguf;
mod hf;
pub(crate) mod packed;

use std::path::Path;

use bitnet_core::{Dtype, ModelConfig};
use bitnet_format::atomic::{AtomicDir, AtomicFile};
use bitnet_format::gguf::GgmlType;
use bitnet_format::hf::{SpecialTokens, Trits};
use bitnet_format::model::{Golden, Source};
use bitnet_format::tokenizer::GgufTokenizer;

use crate::error::Named;
use crate::format::Format;
use crate::plan::{Form, Item, Plan};
use crate::{ExportError, Step};

/// Floats that are read and written at a time, where a tensor is not one piece.
const CHUNK: usize = 1 << 20;

/// An output in one of the forms.
pub(crate) trait Sink {
    /// The next tensor of the plan, which is ternary there.
    fn ternary(&mut self, item: &Item, trits: &Trits) -> Result<(), ExportError>;

    /// The next rows of the next tensor of the plan, which is of floats there.
    /// A linear layer comes in one piece.
    fn floats(&mut self, item: &Item, dtype: Dtype, values: &[f32]) -> Result<(), ExportError>;

    /// Completes the output, but for its name.
    fn finish(self: Box<Self>) -> Result<Unnamed, ExportError>;

    /// Bytes of a ternary item and its scale.
    fn ternary_bytes(&self, item: &Item) -> u64;

    /// How many tensors there are.
    fn tensors(&self) -> u64;
}

/// A complete output without its name.
pub(crate) enum Unnamed {
    File(AtomicFile),
    Folder(AtomicDir),
}

impl Unnamed {
    /// Where it lies.
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::File(file) => file.temp_path(),
            Self::Folder(folder) => folder.path(),
        }
    }

    /// Bytes of the file, or of all files of the folder.
    pub(crate) fn bytes(&self) -> std::io::Result<u64> {
        match self {
            Self::File(file) => Ok(std::fs::metadata(file.temp_path())?.len()),
            Self::Folder(folder) => {
                std::fs::read_dir(folder.path())?.map(|entry| Ok(entry?.metadata()?.len())).sum()
            }
        }
    }

    /// Gives it its name.
    pub(crate) fn commit(self) -> std::io::Result<()> {
        match self {
            Self::File(file) => file.commit(),
            Self::Folder(folder) => folder.commit(),
        }
    }
}

/// What a model says besides its tensors.
pub(crate) struct Keys<'k> {
    pub(crate) config: &'k ModelConfig,
    pub(crate) name: &'k str,
    pub(crate) golden: Option<&'k Golden>,
    pub(crate) tokenizer: &'k GgufTokenizer,
    pub(crate) special: SpecialTokens,
    pub(crate) eot: Option<u32>,
    pub(crate) chat_template: Option<&'k str>,
}

/// Opens an output in the form `format` that is to be called `dst`.
pub(crate) fn create(
    format: Format,
    dst: &Path,
    keys: &Keys<'_>,
    plan: &Plan,
) -> Result<Box<dyn Sink>, ExportError> {
    if format.is_folder() {
        return Ok(Box::new(hf::Folder::create(format, dst, keys, plan)?));
    }
    let file = AtomicFile::create(dst).named(dst)?;
    match format.ternary_type() {
        None => Ok(Box::new(packed::Packed::create(file, keys, plan)?)),
        Some(ty) => Ok(Box::new(gguf::Gguf::create(file, format, ty, keys, plan)?)),
    }
}

/// Writes every tensor of `source`.
pub(crate) fn write(
    source: &dyn Source,
    plan: &Plan,
    sink: &mut dyn Sink,
    step: &mut Step<'_>,
) -> Result<(), ExportError> {
    for item in &plan.items {
        match item.form {
            Form::Ternary => {
                sink.ternary(item, &source.ternary(item.tensor)?)?;
                step.add(item.elements())?;
            }
            Form::Float(dtype) => for_chunks(source, item, |first, values| {
                check_finite(source, item, first, values, dtype)?;
                sink.floats(item, dtype, values)?;
                step.add(values.len())
            })?,
        }
    }
    Ok(())
}

/// Goes through a tensor of floats by rows: a linear layer in one piece, others
/// in about [`CHUNK`] elements. `each` gets the first element's index.
pub(crate) fn for_chunks(
    source: &dyn Source,
    item: &Item,
    mut each: impl FnMut(usize, &[f32]) -> Result<(), ExportError>,
) -> Result<(), ExportError> {
    let at_once = if item.is_linear() { item.rows } else { (CHUNK / item.cols).max(1) };
    let mut values = vec![0.0; at_once.min(item.rows) * item.cols];
    for first in (0..item.rows).step_by(at_once) {
        let values = &mut values[..at_once.min(item.rows - first) * item.cols];
        source.floats(item.tensor, first, values)?;
        each(first * item.cols, values)?;
    }
    Ok(())
}

/// The bytes of values in the type they are stored in, ties to even.
pub(crate) fn encode(values: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect(),
        Dtype::Bf16 => values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect(),
    }
}

/// A value as it comes back from the type it is stored in.
pub(crate) fn rounded(x: f32, dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F32 => x,
        Dtype::F16 => half::f16::from_f32(x).to_f32(),
        Dtype::Bf16 => half::bf16::from_f32(x).to_f32(),
    }
}

/// The type of GGUF for floats.
fn gguf_type(dtype: Dtype) -> GgmlType {
    match dtype {
        Dtype::F32 => GgmlType::F32,
        Dtype::F16 => GgmlType::F16,
        Dtype::Bf16 => GgmlType::BF16,
    }
}

/// Refuses NaN and infinity, before or after rounding to `dtype`.
fn check_finite(
    source: &dyn Source,
    item: &Item,
    first: usize,
    values: &[f32],
    dtype: Dtype,
) -> Result<(), ExportError> {
    match values.iter().position(|&x| !rounded(x, dtype).is_finite()) {
        None => Ok(()),
        Some(at) => Err(ExportError::NotFinite {
            path: source.path().into(),
            tensor: item.hf.clone(),
            at: item.position(first + at),
            value: values[at],
            dtype: dtype.name(),
        }),
    }
}

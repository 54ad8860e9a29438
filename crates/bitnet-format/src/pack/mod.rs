//! From an open model to a packed file, one tensor after the other: what the
//! exporter writes to disk, and what the engine makes of a file of another tool
//! when it opens one.

mod file;
mod layout;
mod plan;

use std::fs::File;
use std::io::BufWriter;
use std::path::PathBuf;

use bitnet_core::{Dtype, Exit, MatrixError};

use crate::gguf::blocks::BlockError;
use crate::gguf::{GgmlType, GgufError};
use crate::hf::Trits;
use crate::model::{Facts, Golden, ModelError, Source};
use crate::tokenizer::{GgufTokenizer, TokenizerError};

pub use file::{Keys, PackedFile, header};
pub use layout::{AUTO_P2_BYTES, LayoutChoice};
pub use plan::{DenseType, Form, Item, Plan};

/// Floats that are read and written at a time, where a tensor is not one piece.
const CHUNK: usize = 1 << 20;

/// A model that cannot be packed.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum PackError {
    /// The model cannot be read.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Its tokenizer cannot be used.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A weight that is NaN or infinite, or becomes so in the type it is
    /// stored in.
    #[error("{}: tensor {tensor}, element {at:?}: {value} is not a finite {dtype}", path.display())]
    NotFinite { path: PathBuf, tensor: String, at: Vec<usize>, value: f32, dtype: &'static str },
    /// A matrix could not be packed.
    #[error("tensor {tensor}")]
    Matrix { tensor: String, source: MatrixError },
    /// Weights that have no blocks of integers.
    #[error("{}: tensor {tensor}", path.display())]
    Block { path: PathBuf, tensor: String, source: BlockError },
    /// The container could not be written.
    #[error("the output file")]
    Container(#[from] GgufError),
    /// No temporary file.
    #[error("{}: no temporary file (TMPDIR chooses another folder)", folder.display())]
    Temporary { folder: PathBuf, source: std::io::Error },
}

impl PackError {
    /// The exit code of a binary that ends with this error.
    #[must_use]
    pub fn exit(&self) -> Exit {
        match self {
            Self::Model(_) | Self::Tokenizer(_) | Self::NotFinite { .. } | Self::Block { .. } => {
                Exit::BadInput
            }
            Self::Matrix { .. } | Self::Container(_) | Self::Temporary { .. } => Exit::Failed,
        }
    }
}

/// Where the tensors of a [`Plan`] go, in its order.
pub trait Sink {
    /// What can go wrong.
    type Error: From<PackError>;

    /// The next tensor of the plan, which is ternary there.
    ///
    /// # Errors
    /// It cannot be written.
    fn ternary(&mut self, item: &Item, trits: &Trits) -> Result<(), Self::Error>;

    /// The next rows of the next tensor of the plan, which is of floats there.
    /// A linear layer comes in one piece.
    ///
    /// # Errors
    /// They cannot be written.
    fn floats(&mut self, item: &Item, dtype: Dtype, values: &[f32]) -> Result<(), Self::Error>;

    /// The next tensor of the plan, which is blocks of integers there.
    ///
    /// # Errors
    /// It cannot be written.
    fn blocks(&mut self, item: &Item, blocks: &[u8]) -> Result<(), Self::Error>;
}

/// Writes every tensor of `source`; `step` gets the number of parameters that
/// were written since it was called last.
///
/// # Errors
/// Those of source, sink and `step`; floats that are not finite.
pub fn write<S: Sink + ?Sized>(
    source: &dyn Source,
    plan: &Plan,
    sink: &mut S,
    step: &mut dyn FnMut(usize) -> Result<(), S::Error>,
) -> Result<(), S::Error> {
    for item in &plan.items {
        match item.form {
            Form::Ternary => {
                sink.ternary(item, &source.ternary(item.tensor).map_err(PackError::from)?)?;
                step(item.elements())?;
            }
            Form::Float(dtype) => for_chunks(source, item, |first, values| {
                check_finite(source, item, first, values, dtype)?;
                sink.floats(item, dtype, values)?;
                step(values.len())
            })?,
            Form::Rows(ty) => for_chunks(source, item, |first, values| {
                check_finite(source, item, first, values, Dtype::F32)?;
                let blocks = ty.encode(values).map_err(|error| PackError::Block {
                    path: source.path().into(),
                    tensor: item.hf.clone(),
                    source: error,
                })?;
                sink.blocks(item, &blocks)?;
                step(values.len())
            })?,
        }
    }
    Ok(())
}

/// Goes through a tensor of floats by rows: a linear layer in one piece, others
/// in about a million elements. `each` gets the first element's index.
///
/// # Errors
/// Those of the source and of `each`.
pub fn for_chunks<E: From<PackError>>(
    source: &dyn Source,
    item: &Item,
    mut each: impl FnMut(usize, &[f32]) -> Result<(), E>,
) -> Result<(), E> {
    let at_once = if item.is_linear() { item.rows } else { (CHUNK / item.cols).max(1) };
    let mut values = vec![0.0; at_once.min(item.rows) * item.cols];
    for first in (0..item.rows).step_by(at_once) {
        let values = &mut values[..at_once.min(item.rows - first) * item.cols];
        source.floats(item.tensor, first, values).map_err(PackError::from)?;
        each(first * item.cols, values)?;
    }
    Ok(())
}

/// A model that was packed into a file without a name.
#[derive(Debug)]
pub struct Temporary {
    /// The packed file; it is gone when this is closed.
    pub file: File,
    /// Its size.
    pub bytes: u64,
}

/// Packs `source` as an export does, into a file without a name in the folder for
/// temporary files. `layout` is that of the ternary matrices, `dense` the type of a
/// float model's; `step` gets parameters done and in all.
///
/// # Errors
/// A model that cannot be read, a disk that is full.
pub fn pack_temporary(
    source: &dyn Source,
    layout: LayoutChoice,
    dense: DenseType,
    step: &mut dyn FnMut(u64, u64),
) -> Result<Temporary, PackError> {
    let facts = source.facts();
    let tokenizer = tokenizer(facts)?;
    let form = Plan::packed_form(&facts.config, dense, facts.linear_form());
    let plan = Plan::new(&facts.config, layout.resolve(&facts.config).0, form);
    let keys = Keys::of(facts, &facts.name, golden(facts, form), &tokenizer);
    let folder = std::env::temp_dir();
    let io = |source| PackError::Temporary { folder: folder.clone(), source };
    let full = |error| match error {
        PackError::Container(GgufError::Write { source, .. }) => io(source),
        other => other,
    };
    let file = tempfile::tempfile().map_err(io)?;
    let mut out = PackedFile::start(BufWriter::new(file), &keys, &plan).map_err(full)?;
    let (mut done, total) = (0, plan.parameters());
    write(source, &plan, &mut out, &mut |parameters| {
        done += parameters as u64;
        step(done, total);
        Ok(())
    })
    .map_err(full)?;
    let file = out.finish().map_err(full)?.into_inner().map_err(|e| io(e.into_error()))?;
    let bytes = file.metadata().map_err(io)?.len();
    Ok(Temporary { file, bytes })
}

/// The tokenizer of a source, checked against the model.
///
/// # Errors
/// One that cannot be used.
pub fn tokenizer(facts: &Facts) -> Result<GgufTokenizer, TokenizerError> {
    GgufTokenizer::parse(&facts.text.tokenizer, facts.config.vocab_size, &facts.text.tokenizer_file)
}

/// The golden logits that still hold when the linear layers have this form.
/// (Embedding and head are rounded to the type that training rounds them to.)
#[must_use]
pub fn golden(facts: &Facts, form: Form) -> Option<&Golden> {
    let exact = match form {
        Form::Ternary => true,
        Form::Float(dtype) => dtype == Dtype::F32 || dtype == facts.linear_dtype,
        Form::Rows(ty) => facts.linear_rows == Some(ty),
    };
    facts.golden.as_ref().filter(|_| exact)
}

/// The bytes of values in the type they are stored in, ties to even.
#[must_use]
pub fn encode(values: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect(),
        Dtype::Bf16 => values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect(),
    }
}

/// A value as it comes back from the type it is stored in.
#[must_use]
pub fn rounded(x: f32, dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F32 => x,
        Dtype::F16 => half::f16::from_f32(x).to_f32(),
        Dtype::Bf16 => half::bf16::from_f32(x).to_f32(),
    }
}

/// The type of GGUF for floats.
#[must_use]
pub fn gguf_type(dtype: Dtype) -> GgmlType {
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
) -> Result<(), PackError> {
    match values.iter().position(|&x| !rounded(x, dtype).is_finite()) {
        None => Ok(()),
        Some(at) => Err(PackError::NotFinite {
            path: source.path().into(),
            tensor: item.hf.clone(),
            at: item.position(first + at),
            value: values[at],
            dtype: dtype.name(),
        }),
    }
}

//! The packed file of this project (docs/file-format.md).

use std::io::Write;

use bitnet_core::{Dtype, Layout, ModelConfig, TernaryMatrix};

use super::{Form, Item, PackError, Plan, Sink, encode, gguf_type};
use crate::gguf::{GgmlType, Header, Writer};
use crate::hf::{SpecialTokens, Trits};
use crate::model::{ARCHITECTURE, Facts, Golden, put_own_config, put_own_golden};
use crate::tokenizer::GgufTokenizer;

/// Alignment of every tensor: a block of packed weights, a cache line.
const ALIGNMENT: u64 = 64;

/// What a model says besides its tensors.
#[derive(Debug, Clone, Copy)]
pub struct Keys<'k> {
    /// The configuration.
    pub config: &'k ModelConfig,
    /// The model's name.
    pub name: &'k str,
    /// A prompt with its logits.
    pub golden: Option<&'k Golden>,
    /// The tokenizer, checked against the model.
    pub tokenizer: &'k GgufTokenizer,
    /// The tokens that begin and end a text.
    pub special: SpecialTokens,
    /// The token that ends a turn of a chat, where it is another one.
    pub eot: Option<u32>,
    /// A chat template (Jinja).
    pub chat_template: Option<&'k str>,
}

impl<'k> Keys<'k> {
    /// What a source says.
    #[must_use]
    pub fn of(
        facts: &'k Facts,
        name: &'k str,
        golden: Option<&'k Golden>,
        tokenizer: &'k GgufTokenizer,
    ) -> Self {
        let text = &facts.text;
        Self {
            config: &facts.config,
            name,
            golden,
            tokenizer,
            special: text.special,
            eot: text.eot,
            chat_template: text.chat_template.as_deref(),
        }
    }
}

/// A packed file that is being written to `W`.
#[derive(Debug)]
pub struct PackedFile<W: Write> {
    out: Writer<W>,
    layout: Layout,
    tensors: u64,
}

impl<W: Write> PackedFile<W> {
    /// Writes the keys and the tensor directory.
    ///
    /// # Errors
    /// Keys that make no file, I/O errors of `out`.
    pub fn start(out: W, keys: &Keys<'_>, plan: &Plan) -> Result<Self, PackError> {
        let header = header(keys, plan)?;
        let tensors = header.tensors().len() as u64;
        Ok(Self { out: Writer::start(out, header)?, layout: plan.layout, tensors })
    }

    /// Ends the file and hands the output back, flushed.
    ///
    /// # Errors
    /// A tensor that was not written, I/O errors.
    pub fn finish(self) -> Result<W, PackError> {
        Ok(self.out.finish()?)
    }

    /// Bytes of a ternary item and its scale.
    #[must_use]
    pub fn ternary_bytes(&self, item: &Item) -> u64 {
        (item.rows * self.layout.row_bytes(item.cols)) as u64 + 4
    }

    /// How many tensors there are.
    #[must_use]
    pub fn tensors(&self) -> u64 {
        self.tensors
    }
}

impl<W: Write> Sink for PackedFile<W> {
    type Error = PackError;

    fn ternary(&mut self, item: &Item, trits: &Trits) -> Result<(), PackError> {
        let packed =
            TernaryMatrix::pack(self.layout, item.rows, item.cols, &trits.values, trits.scale)
                .map_err(|e| PackError::Matrix { tensor: item.hf.clone(), source: e })?;
        self.out.write(&item.weight(), &packed.bytes)?;
        Ok(self.out.write(&item.scale(), &packed.weight_scale.to_le_bytes())?)
    }

    fn floats(&mut self, item: &Item, dtype: Dtype, values: &[f32]) -> Result<(), PackError> {
        Ok(self.out.write(&item.weight(), &encode(values, dtype))?)
    }

    fn blocks(&mut self, item: &Item, blocks: &[u8]) -> Result<(), PackError> {
        Ok(self.out.write(&item.weight(), blocks)?)
    }
}

/// The keys and the tensor directory of a packed file.
///
/// # Errors
/// A key or tensor twice, a size beyond 64 bits.
pub fn header(keys: &Keys<'_>, plan: &Plan) -> Result<Header, PackError> {
    let mut h = Header::new("the packed file", ALIGNMENT)?;
    h.put("general.architecture", ARCHITECTURE)?;
    h.put("general.name", keys.name)?;
    h.put("general.parameter_count", plan.parameters())?;
    put_own_config(&mut h, keys.config, plan.layout)?;
    if let Some(golden) = keys.golden {
        put_own_golden(&mut h, golden)?;
    }
    keys.tokenizer.put(&mut h, keys.special, keys.chat_template)?;
    if let Some(id) = keys.eot {
        h.put("tokenizer.ggml.eot_token_id", id)?;
    }
    for item in &plan.items {
        match item.form {
            Form::Ternary => {
                let dims = item.gguf_dims(plan.layout.row_bytes(item.cols));
                h.tensor(&item.weight(), &dims, GgmlType::I8)?;
                h.tensor(&item.scale(), &[1], GgmlType::F32)?;
            }
            Form::Float(dtype) => {
                h.tensor(&item.weight(), &item.gguf_dims(item.cols), gguf_type(dtype))?;
            }
            Form::Rows(ty) => {
                h.tensor(&item.weight(), &item.gguf_dims(item.cols), ty.ggml())?;
            }
        }
    }
    Ok(h)
}

//! GGUF files that llama.cpp and bitnet.cpp read.

use bitnet_core::names::{Linear, Tensor};
use bitnet_core::{Dtype, ModelConfig};
use bitnet_format::atomic::AtomicFile;
use bitnet_format::gguf::blocks::encode_ternary;
use bitnet_format::gguf::{DEFAULT_ALIGNMENT, GgmlType, GgufError, Header, Writer};
use bitnet_format::hf::Trits;
use bitnet_format::pack::{self, Form, Item, Keys, Plan, encode, gguf_type};

use super::{Sink, Unnamed, no_rows};
use crate::ExportError;
use crate::format::{Format, architecture};

/// A file that is being written.
pub(super) struct Gguf {
    out: Writer<AtomicFile>,
    format: Format,
    /// The type of ternary matrices.
    ty: GgmlType,
    /// The size of a head, where rows of q and k are permuted.
    permuted: Option<usize>,
    tensors: u64,
}

impl Gguf {
    pub(super) fn create(
        file: AtomicFile,
        format: Format,
        ty: GgmlType,
        keys: &Keys<'_>,
        plan: &Plan,
    ) -> Result<Self, ExportError> {
        let (arch, permuted) =
            architecture(keys.config).map_err(|what| ExportError::Format { format, what })?;
        let mut h = Header::new("the GGUF file", DEFAULT_ALIGNMENT)?;
        h.put("general.architecture", arch)?;
        h.put("general.name", keys.name)?;
        h.put("general.file_type", format.file_type())?;
        h.put("general.quantization_version", 2u32)?;
        put_config(&mut h, arch, keys.config)?;
        keys.tokenizer.put(&mut h, keys.special, keys.chat_template)?;
        if let Some(id) = keys.eot {
            h.put("tokenizer.ggml.eot_token_id", id)?;
        }
        for item in &plan.items {
            let dims = item.gguf_dims(item.cols);
            match item.form {
                Form::Float(dtype) => h.tensor(&item.weight(), &dims, gguf_type(dtype))?,
                Form::Rows(_) => return Err(no_rows(format, item)),
                Form::Ternary => {
                    h.tensor(&item.weight(), &dims, ty)?;
                    if has_scale(ty) {
                        h.tensor(&item.scale(), &[1], GgmlType::F32)?;
                    }
                }
            }
        }
        let tensors = h.tensors().len() as u64;
        let permuted = permuted.then(|| keys.config.head_dim());
        Ok(Self { out: Writer::start(file, h)?, format, ty, permuted, tensors })
    }

    /// The rows in the order of the file: for `llama`, the two halves of a head's
    /// rotary pairs side by side.
    fn rows<T: Copy>(&self, item: &Item, values: &[T]) -> Option<Vec<T>> {
        let head_dim = self.permuted?;
        let Tensor::Linear(_, Linear::Q | Linear::K) = item.tensor else { return None };
        let row = |row: usize| {
            let (head, r) = (row / head_dim, row % head_dim);
            let from = head * head_dim + r % 2 * (head_dim / 2) + r / 2;
            values[from * item.cols..][..item.cols].iter().copied()
        };
        Some((0..item.rows).flat_map(row).collect())
    }
}

/// Whether the scale stands in a tensor of its own; I2_S holds it.
fn has_scale(ty: GgmlType) -> bool {
    ty != GgmlType::I2_S
}

impl pack::Sink for Gguf {
    type Error = ExportError;

    fn ternary(&mut self, item: &Item, trits: &Trits) -> Result<(), ExportError> {
        let permuted = self.rows(item, &trits.values);
        let values = permuted.as_deref().unwrap_or(&trits.values);
        let bytes = match self.ty {
            GgmlType::F16 => {
                values.iter().flat_map(|&t| half::f16::from_f32(t.into()).to_le_bytes()).collect()
            }
            ty => encode_ternary(ty, values, trits.scale)
                .map_err(|source| ExportError::Block { tensor: item.weight(), source })?,
        };
        self.out.write(&item.weight(), &bytes)?;
        if has_scale(self.ty) {
            self.out.write(&item.scale(), &trits.scale.to_le_bytes())?;
        }
        Ok(())
    }

    fn floats(&mut self, item: &Item, dtype: Dtype, values: &[f32]) -> Result<(), ExportError> {
        let permuted = self.rows(item, values);
        let values = permuted.as_deref().unwrap_or(values);
        Ok(self.out.write(&item.weight(), &encode(values, dtype))?)
    }

    fn blocks(&mut self, item: &Item, _: &[u8]) -> Result<(), ExportError> {
        Err(no_rows(self.format, item))
    }
}

impl Sink for Gguf {
    fn finish(self: Box<Self>) -> Result<Unnamed, ExportError> {
        Ok(Unnamed::File(self.out.finish()?))
    }

    fn ternary_bytes(&self, item: &Item) -> u64 {
        let bytes = self.ty.tensor_bytes(&item.gguf_dims(item.cols)).unwrap_or(0);
        bytes + if has_scale(self.ty) { 4 } else { 0 }
    }

    fn tensors(&self) -> u64 {
        self.tensors
    }
}

fn put_config(h: &mut Header, arch: &str, c: &ModelConfig) -> Result<(), GgufError> {
    let key = |key: &str| format!("{arch}.{key}");
    // Validated: every size is at most 2^28.
    for (name, value) in [
        ("vocab_size", c.vocab_size),
        ("context_length", c.max_position_embeddings),
        ("embedding_length", c.hidden_size),
        ("block_count", c.num_hidden_layers),
        ("feed_forward_length", c.intermediate_size),
        ("attention.head_count", c.num_attention_heads),
        ("attention.head_count_kv", c.num_key_value_heads),
        ("attention.key_length", c.head_dim()),
        ("attention.value_length", c.head_dim()),
        ("rope.dimension_count", c.head_dim()),
    ] {
        h.put(&key(name), value as u32)?;
    }
    h.put(&key("attention.layer_norm_rms_epsilon"), c.rms_norm_eps)?;
    h.put(&key("rope.freq_base"), c.rope_theta)
}

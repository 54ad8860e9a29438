//! The packed file of this project (docs/file-format.md).

use bitnet_core::{Dtype, TernaryMatrix};
use bitnet_format::atomic::AtomicFile;
use bitnet_format::gguf::{GgmlType, Header, Writer};
use bitnet_format::hf::Trits;
use bitnet_format::model::{ARCHITECTURE, put_own_config, put_own_golden};

use super::{Keys, Sink, Unnamed, encode, gguf_type};
use crate::ExportError;
use crate::plan::{Form, Item, Plan};

/// Alignment of every tensor: a block of packed weights, a cache line.
const ALIGNMENT: u64 = 64;

/// A packed file that is being written.
pub(super) struct Packed {
    out: Writer<AtomicFile>,
    layout: bitnet_core::Layout,
    tensors: u64,
}

impl Packed {
    pub(super) fn create(
        file: AtomicFile,
        keys: &Keys<'_>,
        plan: &Plan,
    ) -> Result<Self, ExportError> {
        let header = header(keys, plan)?;
        let tensors = header.tensors().len() as u64;
        Ok(Self { out: Writer::start(file, header)?, layout: plan.layout, tensors })
    }
}

impl Sink for Packed {
    fn ternary(&mut self, item: &Item, trits: &Trits) -> Result<(), ExportError> {
        let packed =
            TernaryMatrix::pack(self.layout, item.rows, item.cols, &trits.values, trits.scale)
                .map_err(|e| ExportError::Matrix { tensor: item.hf.clone(), source: e })?;
        self.out.write(&item.weight(), &packed.bytes)?;
        Ok(self.out.write(&item.scale(), &packed.weight_scale.to_le_bytes())?)
    }

    fn floats(&mut self, item: &Item, dtype: Dtype, values: &[f32]) -> Result<(), ExportError> {
        Ok(self.out.write(&item.weight(), &encode(values, dtype))?)
    }

    fn finish(self: Box<Self>) -> Result<Unnamed, ExportError> {
        Ok(Unnamed::File(self.out.finish()?))
    }

    fn ternary_bytes(&self, item: &Item) -> u64 {
        (item.rows * self.layout.row_bytes(item.cols)) as u64 + 4
    }

    fn tensors(&self) -> u64 {
        self.tensors
    }
}

/// The keys and the tensor directory.
pub(crate) fn header(keys: &Keys<'_>, plan: &Plan) -> Result<Header, ExportError> {
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
        }
    }
    Ok(h)
}

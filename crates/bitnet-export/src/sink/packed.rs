//! The packed file of this project.

use bitnet_core::Dtype;
use bitnet_format::atomic::AtomicFile;
use bitnet_format::hf::Trits;
use bitnet_format::pack::{self, Item, PackedFile};

use super::{Sink, Unnamed};
use crate::ExportError;

/// A packed file that is being written.
pub(super) struct Packed(pub(super) PackedFile<AtomicFile>);

impl pack::Sink for Packed {
    type Error = ExportError;

    fn ternary(&mut self, item: &Item, trits: &Trits) -> Result<(), ExportError> {
        Ok(self.0.ternary(item, trits)?)
    }

    fn floats(&mut self, item: &Item, dtype: Dtype, values: &[f32]) -> Result<(), ExportError> {
        Ok(self.0.floats(item, dtype, values)?)
    }

    fn blocks(&mut self, item: &Item, blocks: &[u8]) -> Result<(), ExportError> {
        Ok(self.0.blocks(item, blocks)?)
    }
}

impl Sink for Packed {
    fn finish(self: Box<Self>) -> Result<Unnamed, ExportError> {
        Ok(Unnamed::File(self.0.finish()?))
    }

    fn ternary_bytes(&self, item: &Item) -> u64 {
        self.0.ternary_bytes(item)
    }

    fn tensors(&self) -> u64 {
        self.0.tensors()
    }
}

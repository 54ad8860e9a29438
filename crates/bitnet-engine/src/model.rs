//! An opened model: its configuration and its tensors, in place in the file.

use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use bitnet_core::names::{Linear, Norm};
use bitnet_core::{Dtype, Layout, ModelConfig, WeightQuantizer};
use bitnet_format::gguf::blocks::RowType;
use bitnet_format::map::Mmap;
use bitnet_format::model::OpenOptions;
use bitnet_format::pack::DenseType;
use bitnet_kernels::{DenseRows, Kernels, TernaryRows, repack_row};
use half::{bf16, f16};

use crate::error::EngineError;
use crate::head::NestedHead;
use crate::load::{self, ALIGNMENT};
use crate::open::{self, Packing};
use crate::parallel::{Rows, RowsMut, Split, Workers};
use crate::tokenizer::Tokenizer;

/// `general.architecture` of the files that [`Model::open`] uses in place.
pub const ARCHITECTURE: &str = "bitnet-packed";

/// How a model file is opened.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// Scan every weight for values that no exporter writes ([`Model::verify`]).
    pub verify: bool,
    /// Ask the system to read the file ahead, instead of page by page on use.
    pub prefetch: bool,
    /// What a model of another tool leaves open. A packed file is packed anew
    /// where these change it.
    pub source: OpenOptions,
    /// The type of a float model's linear layers. Where it is another than the
    /// file's, the model is packed when it is opened.
    pub dense: DenseType,
}

/// A packed model, memory-mapped. Cloning shares it.
#[derive(Debug, Clone)]
pub struct Model(pub(crate) Arc<Inner>);

/// What a [`Model`] shares.
#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) map: Mmap,
    pub(crate) file: String,
    pub(crate) weights: Weights,
    /// Where the file is not a packed one.
    packing: Option<Packing>,
    /// A copy of the head in few bits, made for the first session that asks for it.
    pub(crate) nested: OnceLock<NestedHead>,
    /// The ternary rows in layout P2, made for the first session whose instruction
    /// set reads those of the file badly.
    repacked: OnceLock<Repacked>,
}

/// Every ternary matrix once more, in another layout.
#[derive(Debug)]
struct Repacked {
    bytes: Vec<u8>,
    /// Where each matrix lies: `[layers]`, in the order of [`Linear::ALL`].
    ranges: Vec<[Range<usize>; 7]>,
    report: Repack,
}

/// A copy of a model's ternary rows that was made in another layout, see
/// [`Model::repacked`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Repack {
    /// The layout of the file.
    pub from: Layout,
    /// The layout of the copy.
    pub to: Layout,
    /// Memory that the copy takes, beside the file's.
    pub bytes: u64,
    /// How long it took to make.
    pub seconds: f64,
}

/// What the file says, and where its tensors lie in the map.
#[derive(Debug)]
pub(crate) struct Weights {
    pub(crate) name: String,
    pub(crate) config: ModelConfig,
    pub(crate) layout: Layout,
    pub(crate) tokenizer: TokenizerSource,
    pub(crate) golden: Option<Golden>,
    pub(crate) embedding: DenseTensor,
    pub(crate) head: Option<DenseTensor>,
    pub(crate) final_norm: Vec<f32>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) parts: Parts,
}

/// The tokenizer as the file holds it, parsed on demand.
#[derive(Debug, Clone, Default)]
pub(crate) struct TokenizerSource {
    pub(crate) json: String,
    pub(crate) bos: Option<u32>,
    pub(crate) eos: Vec<u32>,
    pub(crate) chat_template: Option<String>,
}

/// A block's tensors.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) attention_norm: Vec<f32>,
    pub(crate) attention_sub_norm: Option<Vec<f32>>,
    pub(crate) ffn_norm: Vec<f32>,
    pub(crate) ffn_sub_norm: Option<Vec<f32>>,
    /// In the order of [`Linear::ALL`].
    pub(crate) linears: [LinearTensor; 7],
}

/// Where a linear layer lies.
#[derive(Debug)]
pub(crate) enum LinearTensor {
    /// Packed rows with one scale.
    Ternary { range: Range<usize>, cols: usize, weight_scale: f32 },
    /// Float rows, or blocks of integers that stand for them.
    Dense(DenseTensor),
}

/// Where a float matrix lies.
#[derive(Debug)]
pub(crate) struct DenseTensor {
    pub(crate) range: Range<usize>,
    pub(crate) cols: usize,
    pub(crate) stored: Stored,
}

/// What the values of a float matrix are stored as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stored {
    Float(Dtype),
    Rows(RowType),
}

/// The weight of a linear layer, in place.
#[derive(Debug, Clone, Copy)]
pub enum LinearRef<'a> {
    /// Packed ternary rows; activations are quantised to int8.
    Ternary(TernaryRows<'a>),
    /// Float rows of a twin, or blocks of integers that stand for them; activations
    /// stay float.
    Dense {
        /// The rows.
        rows: DenseRows<'a>,
        /// Their length.
        cols: usize,
    },
}

/// A prompt and what training computed for it, stored by the exporter.
#[derive(Debug, Clone, PartialEq)]
pub struct Golden {
    /// The prompt.
    pub tokens: Vec<u32>,
    /// The logits at its last position, `[V]`.
    pub logits: Vec<f32>,
}

/// Bytes of a model file by part; the sum is the size of the file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Parts {
    /// Packed ternary rows, padding to whole blocks included, and their scales.
    pub ternary: u64,
    /// Weights of the linear layers of float twins, whatever type they have.
    pub dense: u64,
    /// The token embedding.
    pub embedding: u64,
    /// The head; 0 when tied to the embedding.
    pub head: u64,
    /// All norms.
    pub norms: u64,
    /// Keys, tokenizer, tensor directory and alignment.
    pub metadata: u64,
}

impl Parts {
    /// The size of the file.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.ternary + self.dense + self.embedding + self.head + self.norms + self.metadata
    }
}

impl Model {
    /// Opens a packed model: maps it, checks every key and tensor against the
    /// configuration, and copies nothing but the norms.
    ///
    /// A model of another tool (a Hugging Face folder, a checkpoint or run
    /// folder, a GGUF file) is packed first, as `bitnet-export import` does, into
    /// a temporary file without a name that is used like a packed one; a warning
    /// says so. Memory holds one tensor of it at a time.
    ///
    /// The file must not be rewritten in place or truncated while the model is
    /// in use; replacing it by rename is safe.
    ///
    /// # Errors
    /// A file that is missing, truncated, foreign, or whose keys and tensors do
    /// not make the model they describe; the message names the part. No room for
    /// a temporary file.
    pub fn open(path: &Path, options: &LoadOptions) -> Result<Self, EngineError> {
        let file = path.display().to_string();
        let open::Opened { map, weights, packing } = open::open(path, &file, options)?;
        let model = Self(Arc::new(Inner {
            map,
            file,
            weights,
            packing,
            nested: OnceLock::new(),
            repacked: OnceLock::new(),
        }));
        if options.verify {
            model.verify()?;
        }
        Ok(model)
    }

    /// Reads every weight: packed codes that are no ternary value, and float
    /// weights that are not finite. Takes as long as reading the file.
    ///
    /// # Errors
    /// The first such weight, with its tensor and row.
    pub fn verify(&self) -> Result<(), EngineError> {
        load::verify(&self.0)
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.0.weights.config
    }

    /// The name in the file (`general.name`), empty when it has none.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.weights.name
    }

    /// The file it was opened from.
    #[must_use]
    pub fn file(&self) -> &str {
        &self.0.file
    }

    /// How it was packed, where what was opened is no packed file.
    #[must_use]
    pub fn packing(&self) -> Option<&Packing> {
        self.0.packing.as_ref()
    }

    /// The byte layout of the ternary matrices.
    #[must_use]
    pub fn layout(&self) -> Layout {
        self.0.weights.layout
    }

    /// The tokenizer, parsed anew: keep it.
    ///
    /// # Errors
    /// A tokenizer that cannot be parsed, that is not byte-level, or that has
    /// tokens outside the model's vocabulary.
    pub fn tokenizer(&self) -> Result<Tokenizer, EngineError> {
        let source = &self.0.weights.tokenizer;
        Tokenizer::from_json(&source.json, source.bos, &source.eos, self.config().vocab_size)
            .map_err(|why| EngineError::Tokenizer { file: self.0.file.clone(), why })
    }

    /// The whole `tokenizer.json` that the file holds.
    #[must_use]
    pub fn tokenizer_json(&self) -> &str {
        &self.0.weights.tokenizer.json
    }

    /// The chat template (Jinja), where the file has one.
    #[must_use]
    pub fn chat_template(&self) -> Option<&str> {
        self.0.weights.tokenizer.chat_template.as_deref()
    }

    /// The prompt and logits that the exporter stored, where it did.
    #[must_use]
    pub fn golden(&self) -> Option<&Golden> {
        self.0.weights.golden.as_ref()
    }

    /// Bytes by part.
    #[must_use]
    pub fn parts(&self) -> Parts {
        self.0.weights.parts
    }

    /// The size of the file in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0.map.len() as u64
    }

    /// The file's bytes, in place.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0.map
    }

    /// Bytes of weights that one decoded token reads: all linear layers and the
    /// head (the tied embedding), not the embedding look-up.
    #[must_use]
    pub fn bytes_per_token(&self) -> u64 {
        let parts = self.parts();
        let head = if self.0.weights.head.is_some() { parts.head } else { parts.embedding };
        parts.ternary + parts.dense + head + parts.norms
    }

    /// The weight `[out, in]` of a linear layer.
    ///
    /// # Panics
    /// If there is no block `layer`.
    #[must_use]
    pub fn linear(&self, layer: usize, linear: Linear) -> LinearRef<'_> {
        self.0.linear(layer, linear)
    }

    /// The weight of a linear layer as a session with these kernels reads it: in
    /// place, or from the copy that was made for such kernels.
    ///
    /// # Panics
    /// If there is no block `layer`.
    #[must_use]
    pub fn linear_for(&self, kernels: Kernels, layer: usize, linear: Linear) -> LinearRef<'_> {
        self.0.linear_for(kernels, layer, linear)
    }

    /// The copy of the ternary rows in layout P2, where a session was opened whose
    /// instruction set reads the file's layout badly ([`Kernels::reads_well`]).
    /// Results are the same.
    #[must_use]
    pub fn repacked(&self) -> Option<Repack> {
        self.0.repacked.get().map(|r| r.report)
    }

    /// Bytes of the linear layers that a token reads in a session with these
    /// kernels: the file's, or those of the copy in [`Model::repacked`].
    #[must_use]
    pub fn linear_bytes(&self, kernels: Kernels) -> u64 {
        match self.repacked() {
            Some(copy) if !kernels.reads_well(self.layout()) => copy.bytes,
            _ => self.parts().ternary + self.parts().dense,
        }
    }

    /// The weight of a norm; none where the model has no such norm.
    ///
    /// # Panics
    /// If there is no block `layer`.
    #[must_use]
    pub fn norm(&self, layer: usize, norm: Norm) -> Option<&[f32]> {
        let layer = &self.0.weights.layers[layer];
        match norm {
            Norm::Attention => Some(&layer.attention_norm),
            Norm::AttentionSub => layer.attention_sub_norm.as_deref(),
            Norm::FeedForward => Some(&layer.ffn_norm),
            Norm::FeedForwardSub => layer.ffn_sub_norm.as_deref(),
        }
    }

    /// The token embedding, `[V, D]`.
    #[must_use]
    pub fn embedding(&self) -> DenseRows<'_> {
        self.0.dense(&self.0.weights.embedding)
    }

    /// The head, `[V, D]`: the embedding when tied.
    #[must_use]
    pub fn head(&self) -> DenseRows<'_> {
        self.0.head()
    }
}

impl Inner {
    pub(crate) fn linear(&self, layer: usize, linear: Linear) -> LinearRef<'_> {
        // The variants are declared in the order of `Linear::ALL`.
        match &self.weights.layers[layer].linears[linear as usize] {
            LinearTensor::Ternary { range, cols, weight_scale } => {
                LinearRef::Ternary(TernaryRows {
                    layout: self.weights.layout,
                    cols: *cols,
                    weight_scale: *weight_scale,
                    bytes: &self.map[range.clone()],
                })
            }
            LinearTensor::Dense(t) => LinearRef::Dense { rows: self.dense(t), cols: t.cols },
        }
    }

    pub(crate) fn linear_for(
        &self,
        kernels: Kernels,
        layer: usize,
        linear: Linear,
    ) -> LinearRef<'_> {
        match (self.linear(layer, linear), self.repacked.get()) {
            (LinearRef::Ternary(w), Some(copy)) if !kernels.reads_well(w.layout) => {
                let bytes = &copy.bytes[copy.ranges[layer][linear as usize].clone()];
                LinearRef::Ternary(TernaryRows { layout: copy.report.to, bytes, ..w })
            }
            (w, _) => w,
        }
    }

    /// Repacks the ternary rows on these threads, once, where `kernels` read those
    /// of the file badly.
    pub(crate) fn repack_for(&self, kernels: Kernels, workers: &Workers) {
        let ternary = self.weights.config.weight_quantizer == WeightQuantizer::Ternary;
        if ternary && !kernels.reads_well(self.weights.layout) {
            self.repacked.get_or_init(|| {
                let copy = workers.run(usize::MAX, |split| self.repack(split));
                let Repack { from, to, bytes, seconds } = copy.report;
                tracing::warn!(
                    "{}: {} cannot look up the bytes of layout {}; its ternary weights were \
                     repacked to {}: {:.1} MB of memory beside the file, {seconds:.2} s \
                     (a file in layout {} needs neither)",
                    self.file,
                    kernels.name(),
                    from.name(),
                    to.name(),
                    bytes as f64 / 1e6,
                    to.name(),
                );
                copy
            });
        }
    }

    fn repack(&self, split: Split) -> Repacked {
        let start = Instant::now();
        let (from, to) = (self.weights.layout, Layout::P2);
        let layers = 0..self.weights.layers.len();
        let rows = |layer, linear| match self.linear(layer, linear) {
            LinearRef::Ternary(w) => Some(w),
            LinearRef::Dense { .. } => None,
        };
        let mut end = 0;
        let mut place = |layer, linear| {
            let begin = end;
            end += rows(layer, linear).map_or(0, |w| w.len() * to.row_bytes(w.cols));
            begin..end
        };
        let mut ranges: Vec<_> =
            layers.map(|layer| Linear::ALL.map(|linear| place(layer, linear))).collect();
        // Rows begin at whole cache lines, as they do in the file.
        let mut bytes: Vec<u8> = bytemuck::zeroed_vec(end + ALIGNMENT);
        let shift = bytes.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        for range in ranges.iter_mut().flatten() {
            *range = range.start + shift..range.end + shift;
        }
        for (layer, ranges) in ranges.iter().enumerate() {
            for (linear, range) in Linear::ALL.into_iter().zip(ranges) {
                let Some(w) = rows(layer, linear) else { continue };
                let (old, new) = (from.row_bytes(w.cols), to.row_bytes(w.cols));
                let item = (Rows(w.bytes, old), RowsMut(&mut bytes[range.clone()], new));
                // A byte takes about as long as reading sixteen.
                split.rows(w.bytes.len() * 16, w.len(), item, &|_, (old, new)| {
                    old.iter().zip(new.iter()).for_each(|(old, new)| repack_row(old, new));
                });
            }
        }
        let seconds = start.elapsed().as_secs_f64();
        let report = Repack { from, to, bytes: bytes.len() as u64, seconds };
        Repacked { bytes, ranges, report }
    }

    pub(crate) fn head(&self) -> DenseRows<'_> {
        self.dense(self.weights.head.as_ref().unwrap_or(&self.weights.embedding))
    }

    /// The copy of the head in few bits, made on these threads where there is none.
    pub(crate) fn nested_head(&self, workers: &Workers) -> &NestedHead {
        let cols = self.weights.config.hidden_size;
        let make = || workers.run(usize::MAX, |split| NestedHead::new(self.head(), cols, split));
        self.nested.get_or_init(make)
    }

    pub(crate) fn dense(&self, tensor: &DenseTensor) -> DenseRows<'_> {
        tensor.rows(&self.map)
    }
}

impl DenseTensor {
    /// The rows in the map that the tensor was found in.
    pub(crate) fn rows<'a>(&self, map: &'a [u8]) -> DenseRows<'a> {
        let bytes = &map[self.range.clone()];
        // Loading refuses a tensor that is not 64-byte aligned, or whose size is
        // not whole elements: what `cast_slice` demands, and blocks have no rest.
        match self.stored {
            Stored::Float(Dtype::F32) => DenseRows::F32(bytemuck::cast_slice::<u8, f32>(bytes)),
            Stored::Float(Dtype::F16) => DenseRows::F16(bytemuck::cast_slice::<u8, f16>(bytes)),
            Stored::Float(Dtype::Bf16) => DenseRows::Bf16(bytemuck::cast_slice::<u8, bf16>(bytes)),
            Stored::Rows(RowType::Int8) => DenseRows::Int8(bytes.as_chunks().0),
            Stored::Rows(RowType::Int4) => DenseRows::Int4(bytes.as_chunks().0),
        }
    }
}

impl<'a> LinearRef<'a> {
    /// Outputs of the layer.
    #[must_use]
    pub fn out_features(&self) -> usize {
        match self {
            Self::Ternary(w) => w.len(),
            Self::Dense { rows, cols } => rows.len() / cols,
        }
    }

    /// Inputs of the layer.
    #[must_use]
    pub fn in_features(&self) -> usize {
        match self {
            Self::Ternary(w) => w.cols,
            Self::Dense { cols, .. } => *cols,
        }
    }

    /// The name of what it is stored as: a byte layout, or a type of dense rows.
    #[must_use]
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::Ternary(w) => w.layout.name(),
            Self::Dense { rows, .. } => rows.type_name(),
        }
    }

    /// Bytes that a product with it reads.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Ternary(w) => w.bytes.len(),
            Self::Dense { rows, .. } => rows.bytes(),
        }
    }

    /// Rows `start..end`.
    pub(crate) fn rows(&self, start: usize, end: usize) -> LinearRef<'a> {
        match self {
            Self::Ternary(w) => LinearRef::Ternary(w.rows(start, end)),
            Self::Dense { rows, cols } => {
                LinearRef::Dense { rows: rows.rows(*cols, start, end), cols: *cols }
            }
        }
    }
}

//! Which tensor goes where, in which form: the one list that the header, the
//! weights and the comparison all follow.

use bitnet_core::names::{EMBEDDING, FINAL_NORM, LM_HEAD, Linear, Norm};
use bitnet_core::{Dtype, Layout, ModelConfig, WeightQuantizer};
use bitnet_format::gguf::GgmlType;

/// How the linear weights of a float twin are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DenseType {
    /// As training has them.
    #[default]
    F32,
    /// Rounded to half precision.
    F16,
}

/// The form of a tensor in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// Packed rows, and a scale in a tensor of its own.
    Ternary,
    /// Floats of this type.
    Float(Dtype),
}

/// A tensor of the checkpoint and its place in the file.
#[derive(Debug, Clone)]
pub(crate) struct Item {
    /// Its name in the checkpoint.
    pub(crate) hf: String,
    /// Its name in the file, without `.weight` and `.scale`.
    pub(crate) gguf: String,
    /// Its rows and columns; a norm is one row.
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// A norm has one dimension in both files.
    pub(crate) is_vector: bool,
    pub(crate) form: Form,
}

impl Item {
    pub(crate) fn elements(&self) -> usize {
        self.rows * self.cols
    }

    pub(crate) fn weight(&self) -> String {
        format!("{}.weight", self.gguf)
    }

    pub(crate) fn scale(&self) -> String {
        format!("{}.scale", self.gguf)
    }

    /// The position of an element, as errors show it.
    pub(crate) fn position(&self, element: usize) -> Vec<usize> {
        if self.is_vector { vec![element] } else { vec![element / self.cols, element % self.cols] }
    }

    /// Dimensions and type of the weight in the file, the fastest first.
    pub(crate) fn directory(&self, layout: Layout) -> (Vec<u64>, GgmlType) {
        let (cols, ty) = match self.form {
            Form::Ternary => (layout.row_bytes(self.cols), GgmlType::I8),
            Form::Float(Dtype::F32) => (self.cols, GgmlType::F32),
            Form::Float(Dtype::F16) => (self.cols, GgmlType::F16),
            Form::Float(Dtype::Bf16) => (self.cols, GgmlType::BF16),
        };
        let mut dims = vec![cols as u64];
        if !self.is_vector {
            dims.push(self.rows as u64);
        }
        (dims, ty)
    }
}

/// All tensors of a file, in its order.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) layout: Layout,
    pub(crate) items: Vec<Item>,
    rounds_linears: bool,
}

impl Plan {
    pub(crate) fn new(config: &ModelConfig, layout: Layout, dense: DenseType) -> Self {
        let table = Form::Float(config.embedding_dtype);
        let linear_form = match (config.weight_quantizer, dense) {
            (WeightQuantizer::Ternary, _) => Form::Ternary,
            (WeightQuantizer::None, DenseType::F32) => Form::Float(Dtype::F32),
            (WeightQuantizer::None, DenseType::F16) => Form::Float(Dtype::F16),
        };
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let mut items = vec![matrix(EMBEDDING.into(), "token_embd", [vocab, hidden], table)];
        for layer in 0..config.num_hidden_layers {
            for norm in Norm::of(config) {
                let gguf = norm.gguf(layer);
                let gguf = gguf.strip_suffix(".weight").unwrap_or(&gguf);
                items.push(vector(norm.hf(layer), gguf, norm.size(config)));
            }
            for linear in Linear::ALL {
                let (shape, gguf) = (linear.shape(config), linear.gguf(layer));
                items.push(matrix(linear.hf(layer), &gguf, shape, linear_form));
            }
        }
        items.push(vector(FINAL_NORM.into(), "output_norm", hidden));
        if !config.tie_word_embeddings {
            items.push(matrix(LM_HEAD.into(), "output", [vocab, hidden], table));
        }
        let rounds_linears = linear_form == Form::Float(Dtype::F16);
        Self { layout, items, rounds_linears }
    }

    /// Whether the file computes what training computed. (Embedding and head
    /// are rounded to the type that training rounds them to.)
    pub(crate) fn is_exact(&self) -> bool {
        !self.rounds_linears
    }

    pub(crate) fn parameters(&self) -> u64 {
        self.items.iter().map(|i| i.elements() as u64).sum()
    }
}

fn matrix(hf: String, gguf: &str, [rows, cols]: [usize; 2], form: Form) -> Item {
    Item { hf, gguf: gguf.into(), rows, cols, is_vector: false, form }
}

fn vector(hf: String, gguf: &str, cols: usize) -> Item {
    let form = Form::Float(Dtype::F32);
    Item { hf, gguf: gguf.into(), rows: 1, cols, is_vector: true, form }
}

//! Which tensor goes where, in which form: the one list that the header, the
//! weights and the comparison all follow.

use std::str::FromStr;

use bitnet_core::names::{Linear, Tensor};
use bitnet_core::{Dtype, Layout, ModelConfig, WeightQuantizer};

use crate::gguf::blocks::RowType;

/// How the linear weights of a float model are stored in a packed file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DenseType {
    /// As the source has them; f16 where a file of another tool has them in a few
    /// bits.
    #[default]
    Auto,
    /// Single precision.
    F32,
    /// Rounded to half precision.
    F16,
    /// Blocks of integers.
    Rows(RowType),
}

impl DenseType {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::Auto, Self::F32, Self::F16, Self::Rows(RowType::Int8), Self::Rows(RowType::Int4)];

    /// Whether a model can have it: the linear layers of a ternary model have no
    /// other type than [`DenseType::Auto`].
    #[must_use]
    pub fn suits(self, config: &ModelConfig) -> bool {
        self == Self::Auto || config.weight_quantizer == WeightQuantizer::None
    }

    /// The name in options.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Rows(ty) => ty.name(),
        }
    }
}

impl FromStr for DenseType {
    type Err = String;

    /// That of a name in options.
    fn from_str(name: &str) -> Result<Self, String> {
        let known = || Self::ALL.map(Self::name).join(", ");
        let found = Self::ALL.into_iter().find(|dense| dense.name() == name);
        found.ok_or_else(|| format!("unknown type; known: {}", known()))
    }
}

/// The form of a tensor in the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Ternary values and a scale.
    Ternary,
    /// Floats of this type.
    Float(Dtype),
    /// Blocks of integers that stand for floats.
    Rows(RowType),
}

impl Form {
    /// The type of dense weights; none of ternary ones.
    #[must_use]
    pub fn dense_name(self) -> Option<&'static str> {
        match self {
            Self::Ternary => None,
            Self::Float(dtype) => Some(dtype.name()),
            Self::Rows(ty) => Some(ty.name()),
        }
    }
}

/// A tensor of the model and its form.
#[derive(Debug, Clone)]
pub struct Item {
    /// The tensor.
    pub tensor: Tensor,
    /// Its name in checkpoints.
    pub hf: String,
    /// Its name in GGUF files, without `.weight` and `.scale`.
    pub gguf: String,
    /// Its rows; a norm has one.
    pub rows: usize,
    /// Its columns.
    pub cols: usize,
    /// A norm has one dimension in all files.
    pub is_vector: bool,
    /// Its form in the output.
    pub form: Form,
}

impl Item {
    fn new(tensor: Tensor, config: &ModelConfig, form: Form) -> Self {
        let [rows, cols] = tensor.shape(config);
        let gguf = tensor.gguf();
        let gguf = gguf.strip_suffix(".weight").unwrap_or(&gguf).to_owned();
        Self { tensor, hf: tensor.hf(), gguf, rows, cols, is_vector: tensor.is_norm(), form }
    }

    /// How many values it has.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.rows * self.cols
    }

    /// The name of its values in GGUF files.
    #[must_use]
    pub fn weight(&self) -> String {
        format!("{}.weight", self.gguf)
    }

    /// The name of its scale in GGUF files.
    #[must_use]
    pub fn scale(&self) -> String {
        format!("{}.scale", self.gguf)
    }

    /// Whether it is the weight of a linear layer.
    #[must_use]
    pub fn is_linear(&self) -> bool {
        matches!(self.tensor, Tensor::Linear(..))
    }

    /// The position of an element, as errors show it.
    #[must_use]
    pub fn position(&self, element: usize) -> Vec<usize> {
        if self.is_vector { vec![element] } else { vec![element / self.cols, element % self.cols] }
    }

    /// The dimensions in a GGUF file, the fastest first, for rows of `cols`.
    #[must_use]
    pub fn gguf_dims(&self, cols: usize) -> Vec<u64> {
        let rows = (!self.is_vector).then_some(self.rows as u64);
        [cols as u64].into_iter().chain(rows).collect()
    }
}

/// All tensors of an output, in its order.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Byte layout of the ternary matrices of a packed file.
    pub layout: Layout,
    /// The tensors.
    pub items: Vec<Item>,
}

impl Plan {
    /// The plan of a model whose linear layers have the form `linear`; f16 where that
    /// is blocks and their rows are not whole ones.
    #[must_use]
    pub fn new(config: &ModelConfig, layout: Layout, linear: Form) -> Self {
        let form = |tensor| match tensor {
            Tensor::Embedding | Tensor::Head => Form::Float(config.embedding_dtype),
            Tensor::Norm(..) | Tensor::FinalNorm => Form::Float(Dtype::F32),
            Tensor::Linear(_, l) => match linear {
                Form::Rows(ty) if !ty.fits(l.shape(config)[1]) => Form::Float(Dtype::F16),
                linear => linear,
            },
        };
        let items = Tensor::all(config).into_iter().map(|t| Item::new(t, config, form(t)));
        Self { layout, items: items.collect() }
    }

    /// The linear layers of every block that are f16 though `linear` is blocks, since
    /// their rows are not whole ones.
    #[must_use]
    pub fn not_whole(config: &ModelConfig, linear: Form) -> Vec<Linear> {
        let Form::Rows(ty) = linear else { return Vec::new() };
        Linear::ALL.into_iter().filter(|l| !ty.fits(l.shape(config)[1])).collect()
    }

    /// The form of the linear layers in a packed file; `stored` is that of a dense
    /// model's in the source.
    #[must_use]
    pub fn packed_form(config: &ModelConfig, dense: DenseType, stored: Form) -> Form {
        match (config.weight_quantizer, dense) {
            (WeightQuantizer::Ternary | WeightQuantizer::Binary, _) => Form::Ternary,
            (WeightQuantizer::None, DenseType::Auto) => stored,
            (WeightQuantizer::None, DenseType::F32) => Form::Float(Dtype::F32),
            (WeightQuantizer::None, DenseType::F16) => Form::Float(Dtype::F16),
            (WeightQuantizer::None, DenseType::Rows(ty)) => Form::Rows(ty),
        }
    }

    /// Parameters of the model.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        self.items.iter().map(|i| i.elements() as u64).sum()
    }
}

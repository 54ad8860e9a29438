//! The forms in which the weights of linear layers are stored, and their sizes.

use std::fmt;

use bitnet_core::{Dtype, Layout, ModelConfig, WeightQuantizer};
use bitnet_engine::{LinearRef, Model};
use bitnet_format::gguf::blocks::RowType;
use bitnet_format::pack::LayoutChoice;
use serde::{Serialize, Serializer};

/// How the weights of the linear layers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Packed ternary rows.
    Ternary(Layout),
    /// Floats of a twin.
    Float(Dtype),
    /// Blocks of integers of a twin.
    Rows(RowType),
}

impl Form {
    /// All there are.
    pub const ALL: [Self; 7] = [
        Self::Ternary(Layout::P2),
        Self::Ternary(Layout::P5),
        Self::Float(Dtype::F32),
        Self::Float(Dtype::F16),
        Self::Float(Dtype::Bf16),
        Self::Rows(RowType::Int8),
        Self::Rows(RowType::Int4),
    ];

    /// Those that a model of this configuration can be exported in.
    #[must_use]
    pub fn of(config: &ModelConfig) -> Vec<Self> {
        let ternary = config.weight_quantizer != WeightQuantizer::None;
        let fits = |form: &Self| matches!(form, Self::Ternary(_)) == ternary;
        // bf16 is as large as f16.
        Self::ALL.into_iter().filter(|f| *f != Self::Float(Dtype::Bf16) && fits(f)).collect()
    }

    /// The one that an export without options takes: of a float twin's weights, f32 as
    /// its checkpoint has them.
    #[must_use]
    pub fn usual(config: &ModelConfig) -> Self {
        match config.weight_quantizer {
            WeightQuantizer::None => Self::Float(Dtype::F32),
            _ => Self::Ternary(LayoutChoice::Auto.resolve(config).0),
        }
    }

    /// That of an opened model.
    #[must_use]
    pub fn of_model(model: &Model) -> Self {
        match model.linear(0, bitnet_core::names::Linear::Q) {
            LinearRef::Ternary(w) => Self::Ternary(w.layout),
            LinearRef::Dense { rows, .. } => {
                Self::from_name(rows.type_name()).unwrap_or(Self::Float(Dtype::F32))
            }
        }
    }

    /// Floats of a type.
    #[must_use]
    pub fn of_dtype(dtype: Dtype) -> Self {
        Self::Float(dtype)
    }

    /// The name in options and files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ternary(layout) => layout.name(),
            Self::Float(dtype) => dtype.name(),
            Self::Rows(rows) => rows.name(),
        }
    }

    /// The form of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|form| form.name() == name)
    }

    /// The form that rows of `cols` columns really get: f16 where blocks of integers
    /// would not be whole.
    #[must_use]
    pub fn for_cols(self, cols: usize) -> Self {
        match self {
            Self::Rows(rows) if !rows.fits(cols) => Self::Float(Dtype::F16),
            form => form,
        }
    }

    /// Bytes of a row of `cols` weights, padding included.
    #[must_use]
    pub fn row_bytes(self, cols: usize) -> usize {
        match self {
            Self::Ternary(layout) => layout.row_bytes(cols),
            Self::Float(dtype) => dtype.bytes() * cols,
            Self::Rows(rows) => rows.row_bytes(cols),
        }
    }
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Serialize for Form {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_and_blocks_need_whole_rows() {
        for form in Form::ALL {
            assert_eq!(Form::from_name(form.name()), Some(form));
        }
        assert_eq!(Form::from_name("auto"), None);
        let int4 = Form::Rows(RowType::Int4);
        assert_eq!((int4.for_cols(64), int4.for_cols(65)), (int4, Form::Float(Dtype::F16)));
        assert_eq!((int4.row_bytes(64), Form::Ternary(Layout::P2).row_bytes(64)), (36, 64));
        let config = ModelConfig::tiny();
        assert_eq!(Form::of(&config).len(), 2);
        let twin = ModelConfig { weight_quantizer: WeightQuantizer::None, ..config };
        let names: Vec<_> = Form::of(&twin).iter().map(|f| f.name()).collect();
        assert_eq!(names, ["f32", "f16", "int8", "int4"]);
    }
}

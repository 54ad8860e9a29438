//! The forms that a model is written in.

use std::fmt;

use bitnet_core::names::Linear;
use bitnet_core::{Activation, ModelConfig, WeightQuantizer};
use bitnet_format::gguf::GgmlType;

/// The form of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// The packed file of this project, which the engine maps.
    #[default]
    Packed,
    /// GGUF of llama.cpp, 1.6875 bits a weight, the scales beside it.
    GgufTq1,
    /// GGUF of llama.cpp, 2.0625 bits a weight, the scales beside it.
    GgufTq2,
    /// GGUF of bitnet.cpp, 2 bits a weight, in its x86 layout.
    GgufI2s,
    /// GGUF of half-precision floats: of a ternary model -1, 0 and 1, the scales
    /// beside them.
    GgufF16,
    /// Hugging Face folder of packed ternary weights (`autobitlinear`, `offline`).
    HfPacked,
    /// Hugging Face folder of bf16 weights, master weights of a ternary model
    /// (`autobitlinear`, `online`).
    HfBf16,
}

impl Format {
    /// Every form.
    pub const ALL: [Self; 7] = [
        Self::Packed,
        Self::GgufTq1,
        Self::GgufTq2,
        Self::GgufI2s,
        Self::GgufF16,
        Self::HfPacked,
        Self::HfBf16,
    ];

    /// The name in options.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Packed => "packed",
            Self::GgufTq1 => "gguf-tq1_0",
            Self::GgufTq2 => "gguf-tq2_0",
            Self::GgufI2s => "gguf-i2_s",
            Self::GgufF16 => "gguf-f16",
            Self::HfPacked => "hf-packed",
            Self::HfBf16 => "hf-bf16",
        }
    }

    /// The form of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|f| f.name() == name)
    }

    /// Whether it is a folder.
    #[must_use]
    pub fn is_folder(self) -> bool {
        matches!(self, Self::HfPacked | Self::HfBf16)
    }

    /// The type of ternary matrices in a GGUF file of others.
    pub(crate) fn ternary_type(self) -> Option<GgmlType> {
        match self {
            Self::GgufTq1 => Some(GgmlType::TQ1_0),
            Self::GgufTq2 => Some(GgmlType::TQ2_0),
            Self::GgufI2s => Some(GgmlType::I2_S),
            Self::GgufF16 => Some(GgmlType::F16),
            Self::Packed | Self::HfPacked | Self::HfBf16 => None,
        }
    }

    /// `general.file_type` of a GGUF file of others.
    pub(crate) fn file_type(self) -> u32 {
        match self {
            Self::GgufTq1 => 36,
            Self::GgufTq2 => 37,
            Self::GgufI2s => 40,
            _ => 1,
        }
    }

    /// Whether this form can hold a model of this configuration.
    ///
    /// # Errors
    /// Why not, as text.
    pub(crate) fn check(self, config: &ModelConfig) -> Result<(), String> {
        let ternary = config.weight_quantizer == WeightQuantizer::Ternary;
        match self {
            Self::GgufTq1 | Self::GgufTq2 | Self::GgufI2s | Self::HfPacked if !ternary => {
                return Err("the model is not ternary".to_owned());
            }
            _ => {}
        }
        let Some(ty) = self.ternary_type() else { return Ok(()) };
        architecture(config)?;
        let block = match (ternary, ty) {
            (true, GgmlType::TQ1_0 | GgmlType::TQ2_0) => 256,
            (true, GgmlType::I2_S) => 128,
            _ => 1,
        };
        for linear in Linear::ALL {
            let cols = linear.shape(config)[1];
            if !cols.is_multiple_of(block) {
                return Err(format!(
                    "tensor {}: its rows of {cols} weights are not whole blocks of {block}",
                    linear.hf(0)
                ));
            }
        }
        Ok(())
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The architecture of llama.cpp or bitnet.cpp that computes what such a model
/// does, and whether it wants the rows of q and k permuted.
///
/// # Errors
/// There is none, as text.
pub(crate) fn architecture(config: &ModelConfig) -> Result<(&'static str, bool), String> {
    let tied = config.tie_word_embeddings;
    match (config.sub_norms, config.hidden_act) {
        (true, Activation::Relu2) if tied => Ok(("bitnet-b1.58", false)),
        (true, Activation::Silu) if tied => Ok(("bitnet", false)),
        (true, _) => Err("GGUF has no architecture with sub-norms and a head of its own \
                          (tie_word_embeddings = false)"
            .to_owned()),
        (false, Activation::Silu) => Ok(("llama", true)),
        (false, Activation::Relu2) => Err("GGUF has no architecture without sub-norms and with \
                                           hidden_act = relu2"
            .to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for format in Format::ALL {
            assert_eq!(Format::from_name(format.name()), Some(format));
        }
        assert_eq!(Format::from_name("gguf"), None);
    }

    #[test]
    fn what_cannot_be_held_is_said() {
        let tiny = ModelConfig::tiny();
        let wide = ModelConfig { hidden_size: 256, intermediate_size: 512, ..tiny.clone() };
        let twin = ModelConfig { weight_quantizer: WeightQuantizer::None, ..wide.clone() };
        let untied = ModelConfig { tie_word_embeddings: false, ..wide.clone() };
        let bare = ModelConfig { sub_norms: false, ..wide.clone() };
        let cases = [
            (Format::GgufTq1, &tiny, "rows of 64 weights are not whole blocks of 256"),
            (Format::GgufI2s, &tiny, "rows of 64 weights are not whole blocks of 128"),
            (Format::HfPacked, &twin, "not ternary"),
            (Format::GgufTq2, &twin, "not ternary"),
            (Format::GgufF16, &untied, "a head of its own"),
            (Format::GgufF16, &bare, "without sub-norms"),
        ];
        for (format, config, text) in cases {
            let error = format.check(config).unwrap_err();
            assert!(error.contains(text), "{format}: {error}");
        }
        for format in Format::ALL {
            format.check(&wide).unwrap();
        }
        for format in [Format::Packed, Format::HfBf16, Format::GgufF16] {
            format.check(&twin).unwrap();
        }
    }
}

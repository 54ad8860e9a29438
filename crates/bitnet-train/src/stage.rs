//! Stages of quantisation: when a run's model becomes what its config says.

use bitnet_core::names::Linear;
use bitnet_core::quantizer::ActivationRecipe;
use bitnet_core::{ActivationQuantizer, ModelConfig, WeightQuantizer};
use bitnet_kernels::Digits;
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::device::DeviceChoice;
use crate::model::Transformer;
use crate::ops::{Gradients, LinearRecipe};

/// The `[quantization]` table: shares of the run's steps. Its default quantises
/// from the first step on.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StageConfig {
    /// Until then the model is trained as a float one: 16 → 1.58 bits
    /// (arXiv:2502.11895).
    pub float_until: f64,
    /// For so long after it the quantised weights and activations are blended in,
    /// in equal steps; 0 switches at once.
    pub blend: f64,
    /// Until then activations that end with 4 bits have 8, and none is left out by top-K
    /// (arXiv:2411.04965).
    pub int8_until: f64,
    /// What the gradients of integer products are computed with. On the CPU.
    pub gradients: GradientProducts,
    /// Whether the gradients of the linear layers' inputs are integer products too,
    /// of gradients quantised to int8 per token (SwitchBack, arXiv:2304.13013), and that of
    /// the head's input one with its rows as int8: faster, and no longer the exact
    /// gradients. On the CPU.
    pub int8_backward: bool,
}

/// What the gradients of the linear layers' integer products are computed with; see
/// [`Gradients`]. The same bits on every instruction set, each of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GradientProducts {
    /// Integers of 24 bits where the products of the forward pass are integers and the
    /// device is the CPU, else floats: as exact either way.
    #[default]
    Fixed24,
    /// Integers of 16 bits: faster, and each element off by at most 2^-16 of the largest
    /// that it is added to.
    Fixed16,
    /// Floats.
    Float,
}

impl GradientProducts {
    /// The digits; none: floats.
    fn digits(self) -> Option<Digits> {
        match self {
            Self::Fixed24 => Some(Digits::Three),
            Self::Fixed16 => Some(Digits::Two),
            Self::Float => None,
        }
    }
}

/// What holds at one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stage {
    /// The share of the quantised; see [`LinearRecipe::blend`].
    pub blend: f32,
    /// Whether activations have 8 bits and all are kept, whatever the recipe says.
    pub int8: bool,
    /// See [`LinearRecipe::gradients`].
    pub gradients: Gradients,
    /// See [`LinearRecipe::bf16`].
    pub bf16: bool,
}

impl Stage {
    /// The finished model.
    pub const FINAL: Self =
        Self { blend: 1.0, int8: false, gradients: Gradients::FLOAT, bf16: false };

    /// The recipe of a linear layer in this stage.
    #[must_use]
    pub fn recipe(self, config: &ModelConfig, linear: Linear) -> LinearRecipe {
        let Self { blend, gradients, bf16, .. } = self;
        let recipe = LinearRecipe { blend, gradients, bf16, ..LinearRecipe::new(config, linear) };
        let narrow = [ActivationQuantizer::Int4, ActivationQuantizer::Int4Absmean];
        if !self.int8 {
            return recipe;
        }
        let recipe = LinearRecipe { keep: 1.0, ..recipe };
        if narrow.contains(&recipe.activations) {
            return LinearRecipe { activations: ActivationQuantizer::Int8, ..recipe };
        }
        recipe
    }

    /// Puts a model into this stage.
    pub fn apply(self, config: &ModelConfig, model: &mut Transformer) {
        model.set_recipes(|linear| self.recipe(config, linear));
    }
}

impl StageConfig {
    /// What holds in the step that follows `step` complete ones of `steps`; after
    /// the last, the finished model.
    #[must_use]
    pub fn at(&self, step: u64, steps: u64) -> Stage {
        if step >= steps {
            return Stage::FINAL;
        }
        let share = |x: f64| (steps as f64 * x).round() as u64;
        let (start, width) = (share(self.float_until), share(self.blend));
        let blend = if step < start {
            0.0
        } else if step < start + width {
            ((step - start + 1) as f64 / (width + 1) as f64) as f32
        } else {
            1.0
        };
        let int8 = step < share(self.int8_until);
        let gradients =
            Gradients { digits: self.gradients.digits(), int8_inputs: self.int8_backward };
        Stage { blend, int8, gradients, bf16: false }
    }

    /// Checks the table against the model.
    ///
    /// # Errors
    /// The first key whose value cannot be used.
    pub fn validate(&self, model: &ModelConfig) -> Result<(), TrainError> {
        for (key, value) in [
            ("quantization.float_until", self.float_until),
            ("quantization.blend", self.blend),
            ("quantization.int8_until", self.int8_until),
        ] {
            if !(0.0..=1.0).contains(&value) {
                return Err(TrainError::value(key, value, "must be between 0 and 1"));
            }
            if value > 0.0 && model.weight_quantizer == WeightQuantizer::None {
                let reason = "has no use with model.weight_quantizer = none";
                return Err(TrainError::value(key, value, reason));
            }
        }
        if self.float_until + self.blend > 1.0 {
            let reason = "ends after the last step (float_until + blend > 1)";
            return Err(TrainError::value("quantization.blend", self.blend, reason));
        }
        let four_bits = [ActivationRecipe::Int4, ActivationRecipe::A48];
        let keeps_all = model.recipe.keeps().iter().all(|(_, share)| *share == 1.0);
        if self.int8_until > 0.0 && keeps_all && !four_bits.contains(&model.recipe.activations) {
            let reason = "has no use: model.recipe.activations is neither int4 nor a4.8, and all \
                          are kept";
            return Err(TrainError::value("quantization.int8_until", self.int8_until, reason));
        }
        let all_integer = Linear::ALL.iter().all(|&l| LinearRecipe::new(model, l).is_integer());
        let reason = "needs weights of one scale and int8 activations in all linear layers";
        if self.int8_backward && !all_integer {
            return Err(TrainError::value("quantization.int8_backward", true, reason));
        }
        if self.gradients == GradientProducts::Fixed16 && !all_integer {
            return Err(TrainError::value("quantization.gradients", "fixed16", reason));
        }
        Ok(())
    }

    /// Checks the table against the device.
    ///
    /// # Errors
    /// A key that this device cannot follow.
    pub fn check_device(&self, device: DeviceChoice) -> Result<(), TrainError> {
        if self.int8_backward && device != DeviceChoice::Cpu {
            let reason = format!("is for --device cpu, not {device}");
            return Err(TrainError::value("quantization.int8_backward", true, reason));
        }
        if self.gradients == GradientProducts::Fixed16 && device != DeviceChoice::Cpu {
            let reason = format!("is for --device cpu, not {device}");
            return Err(TrainError::value("quantization.gradients", "fixed16", reason));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_the_finished_model_throughout() {
        for step in [0, 1, 99, 100] {
            let digits = GradientProducts::default().digits().filter(|_| step < 100);
            let gradients = Gradients { digits, int8_inputs: false };
            let want = Stage { gradients, ..Stage::FINAL };
            assert_eq!(StageConfig::default().at(step, 100), want);
        }
    }

    #[test]
    fn float_then_blend_then_ternary() {
        let stages =
            StageConfig { float_until: 0.4, blend: 0.3, int8_until: 0.9, ..StageConfig::default() };
        let blend: Vec<f32> = (0..11).map(|s| stages.at(s, 10).blend).collect();
        assert_eq!(blend, [0.0, 0.0, 0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]);
        let int8: Vec<bool> = (0..11).map(|s| stages.at(s, 10).int8).collect();
        assert_eq!(int8.iter().filter(|b| **b).count(), 9);
        assert!(!int8[9] && !int8[10]);
        let all_float = StageConfig { float_until: 1.0, ..StageConfig::default() };
        assert_eq!((all_float.at(9, 10).blend, all_float.at(10, 10).blend), (0.0, 1.0));
    }

    #[test]
    fn what_has_no_use_is_refused() {
        let tiny = ModelConfig::tiny();
        let four = ModelConfig {
            recipe: serde_json::from_str(r#"{"activations":"a4.8"}"#).unwrap(),
            ..tiny.clone()
        };
        let twin = ModelConfig { weight_quantizer: WeightQuantizer::None, ..tiny.clone() };
        let stages = |float_until, blend, int8_until| StageConfig {
            float_until,
            blend,
            int8_until,
            ..StageConfig::default()
        };
        stages(0.0, 0.0, 0.5).validate(&four).unwrap();
        stages(0.5, 0.5, 0.0).validate(&tiny).unwrap();
        for (stages, model, message) in [
            (stages(0.0, 0.0, 0.5), &tiny, "quantization.int8_until = 0.5: has no use"),
            (stages(0.6, 0.5, 0.0), &tiny, "quantization.blend = 0.5: ends after"),
            (stages(1.1, 0.0, 0.0), &tiny, "quantization.float_until = 1.1: must be"),
            (stages(f64::NAN, 0.0, 0.0), &tiny, "quantization.float_until = NaN: must be"),
            (stages(0.1, 0.0, 0.0), &twin, "quantization.float_until = 0.1: has no use"),
        ] {
            let error = stages.validate(model).unwrap_err().to_string();
            assert!(error.starts_with(message), "{error}");
        }
        let fixed16 =
            StageConfig { gradients: GradientProducts::Fixed16, ..StageConfig::default() };
        fixed16.validate(&tiny).unwrap();
        let digits = fixed16.at(0, 10).gradients.digits;
        assert_eq!(digits, Some(Digits::Two));
        let message = "quantization.gradients = fixed16: needs weights of one scale";
        let error = fixed16.validate(&twin).unwrap_err().to_string();
        assert!(error.starts_with(message), "{error}");
        fixed16.check_device(DeviceChoice::Cpu).unwrap();
    }

    #[test]
    fn eight_bits_stand_in_for_four() {
        let config = ModelConfig {
            recipe: serde_json::from_str(r#"{"activations":"a4.8","o_proj_keep":0.5}"#).unwrap(),
            ..ModelConfig::tiny()
        };
        let early = Stage { int8: true, ..Stage::FINAL };
        assert_eq!(early.recipe(&config, Linear::Q).activations, ActivationQuantizer::Int8);
        let last = Stage::FINAL;
        assert_eq!(last.recipe(&config, Linear::Q).activations, ActivationQuantizer::Int4Absmean);
        assert_eq!(last.recipe(&config, Linear::Down).activations, ActivationQuantizer::Int8);
        let keep = |stage: Stage, linear| stage.recipe(&config, linear).keep;
        assert_eq!((keep(early, Linear::O), keep(last, Linear::O)), (1.0, 0.5));
        assert_eq!(keep(last, Linear::Down), 1.0);
    }
}

//! The configuration of a model: plain data, checked by one pure function.
//!
//! Keys are Hugging Face's. The same struct is the `[model]` table of a training
//! config, the source of a checkpoint's `config.json` and what a packed file's
//! metadata describes.

use serde::{Deserialize, Serialize};

use crate::names::{Linear, Norm};
use crate::quantizer::{ActivationQuantizer, ActivationRecipe, Granularity, Recipe, WeightScheme};
use crate::ternary::MAX_EXACT_COLS;

/// The activation of the gated feed-forward network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Activation {
    /// `relu(gate)² · up` (BitNet b1.58 2B4T, arXiv:2504.12285).
    Relu2,
    /// `silu(gate) · up` (SwiGLU, as in LLaMA).
    Silu,
}

impl Activation {
    /// The name in configs and files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Relu2 => "relu2",
            Self::Silu => "silu",
        }
    }
}

/// How the weights of the linear layers are quantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightQuantizer {
    /// {-1, 0, 1} by absmean, with int8 absmax activations: W1.58A8.
    Ternary,
    /// {-1, 1}: the sign of what is centred (BitNet, arXiv:2310.11453).
    Binary,
    /// Neither weights nor activations are quantised: the float twin.
    None,
}

impl WeightQuantizer {
    /// The name in configs and files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ternary => "ternary",
            Self::Binary => "binary",
            Self::None => "none",
        }
    }
}

/// The precision in which embedding and head are stored *and used in training*:
/// the training forward rounds them to it, so that nothing changes at export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
}

impl Dtype {
    /// The name in configs and files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }

    /// Bytes of one element.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

/// A configuration that cannot be used; the message names the key and the value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("model.{key} = {value}: {reason}")]
pub struct ConfigError {
    /// The key of [`ModelConfig`].
    pub key: &'static str,
    /// Its value, as text.
    pub value: String,
    /// What is wrong with it.
    pub reason: String,
}

/// The shape and arithmetic of a decoder-only transformer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Width D of the residual stream.
    pub hidden_size: usize,
    /// Width F of the feed-forward network.
    pub intermediate_size: usize,
    /// Number L of blocks.
    pub num_hidden_layers: usize,
    /// Number H of query heads.
    pub num_attention_heads: usize,
    /// Number K of key and value heads; divides H.
    pub num_key_value_heads: usize,
    /// Size C of a head; `hidden_size / num_attention_heads` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<usize>,
    /// Number V of tokens in the vocabulary.
    pub vocab_size: usize,
    /// The longest sequence, in tokens.
    pub max_position_embeddings: usize,
    /// Added to the mean square in RMSNorm.
    #[serde(default = "default_eps")]
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    #[serde(default = "default_theta")]
    pub rope_theta: f32,
    /// Activation of the feed-forward network.
    pub hidden_act: Activation,
    /// Whether the head shares the embedding's weights.
    pub tie_word_embeddings: bool,
    /// Whether a norm stands before `o_proj` and before `down_proj` (SubLN).
    #[serde(default = "default_true")]
    pub sub_norms: bool,
    /// Quantiser of the linear layers' weights.
    #[serde(default = "default_quantizer")]
    pub weight_quantizer: WeightQuantizer,
    /// Precision of embedding and head.
    #[serde(default = "default_embedding_dtype")]
    pub embedding_dtype: Dtype,
    /// The rest of the recipe; its default is BitNet b1.58.
    #[serde(default, skip_serializing_if = "is_default")]
    pub recipe: Recipe,
}

fn is_default(recipe: &Recipe) -> bool {
    *recipe == Recipe::default()
}

fn default_eps() -> f32 {
    1e-5
}
fn default_theta() -> f32 {
    10_000.0
}
fn default_true() -> bool {
    true
}
fn default_quantizer() -> WeightQuantizer {
    WeightQuantizer::Ternary
}
fn default_embedding_dtype() -> Dtype {
    Dtype::F16
}

/// The parameters of a model, by part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ParameterCount {
    /// The token embedding.
    pub embedding: u64,
    /// The head, 0 when tied.
    pub head: u64,
    /// The linear layers of all blocks: the ternary weights.
    pub linear: u64,
    /// All norms.
    pub norms: u64,
}

impl ParameterCount {
    /// All parameters.
    #[must_use]
    pub fn total(self) -> u64 {
        self.embedding + self.head + self.linear + self.norms
    }
}

impl ModelConfig {
    /// A model of 0.1M parameters for tests and examples.
    #[must_use]
    pub fn tiny() -> Self {
        Self {
            hidden_size: 64,
            intermediate_size: 160,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: None,
            vocab_size: 320,
            max_position_embeddings: 128,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            hidden_act: Activation::Relu2,
            tie_word_embeddings: true,
            sub_norms: true,
            weight_quantizer: WeightQuantizer::Ternary,
            embedding_dtype: Dtype::F16,
            recipe: Recipe::default(),
        }
    }

    /// How the weights of the linear layers are quantised.
    #[must_use]
    pub fn weight_scheme(&self) -> WeightScheme {
        WeightScheme {
            quantizer: self.weight_quantizer,
            statistic: self.recipe.weight_scale,
            granularity: self.recipe.granularity,
        }
    }

    /// How the input of a linear layer is quantised. The float twin's are not.
    #[must_use]
    pub fn activations(&self, linear: Linear) -> ActivationQuantizer {
        if self.weight_quantizer == WeightQuantizer::None {
            return ActivationQuantizer::None;
        }
        match self.recipe.activations {
            ActivationRecipe::Int8 => ActivationQuantizer::Int8,
            ActivationRecipe::Int4 => ActivationQuantizer::Int4,
            ActivationRecipe::A48 if linear.writes_residual() => ActivationQuantizer::Int8,
            ActivationRecipe::A48 => ActivationQuantizer::Int4Absmean,
            ActivationRecipe::None => ActivationQuantizer::None,
        }
    }

    /// Whether the input of a linear layer is rotated before it is quantised.
    #[must_use]
    pub fn rotates(&self, linear: Linear) -> bool {
        self.recipe.hadamard && linear.writes_residual()
    }

    /// The share of a linear layer's inputs that is kept before it is quantised.
    #[must_use]
    pub fn keeps(&self, linear: Linear) -> f64 {
        match linear {
            Linear::O => self.recipe.o_proj_keep,
            Linear::Down => self.recipe.down_proj_keep,
            _ => 1.0,
        }
    }

    /// Checks that the packed format, and so the engine, can hold this recipe:
    /// one scale a matrix and int8 activations, or no quantiser at all.
    ///
    /// # Errors
    /// The first key of the recipe that it cannot, with the reason.
    pub fn packable(&self) -> Result<(), ConfigError> {
        let recipe = &self.recipe;
        let refuse = |key, value: &str, reason: &str| {
            Err(ConfigError { key, value: value.to_owned(), reason: reason.to_owned() })
        };
        match recipe.granularity {
            Granularity::Tensor => {}
            Granularity::Row => {
                let reason = "a packed file has one scale for each matrix";
                return refuse("recipe.granularity", "row", reason);
            }
            Granularity::Group(n) => {
                let reason = "a packed file has one scale for each matrix";
                return refuse("recipe.granularity", &n.to_string(), reason);
            }
        }
        if recipe.hadamard {
            let reason = "the engine does not rotate activations";
            return refuse("recipe.hadamard", "true", reason);
        }
        for (key, share) in recipe.keeps() {
            if share != 1.0 {
                let reason = "the engine multiplies all activations, none is left out";
                return refuse(key, &share.to_string(), reason);
            }
        }
        let value = match recipe.activations {
            ActivationRecipe::Int8 => return Ok(()),
            ActivationRecipe::Int4 => "int4",
            ActivationRecipe::A48 => "a4.8",
            ActivationRecipe::None => "none",
        };
        refuse("recipe.activations", value, "the engine multiplies int8 activations")
    }

    /// Size C of a head.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads.max(1))
    }

    /// `H · C`: the width of the queries.
    #[must_use]
    pub fn query_size(&self) -> usize {
        self.num_attention_heads * self.head_dim()
    }

    /// `K · C`: the width of the keys, and of the values.
    #[must_use]
    pub fn key_value_size(&self) -> usize {
        self.num_key_value_heads * self.head_dim()
    }

    /// The parameters, by part.
    #[must_use]
    pub fn parameter_count(&self) -> ParameterCount {
        let layers = self.num_hidden_layers as u64;
        let table = self.vocab_size as u64 * self.hidden_size as u64;
        let linear: u64 =
            Linear::ALL.iter().map(|l| l.shape(self)).map(|[n, k]| n as u64 * k as u64).sum();
        let norms: u64 = Norm::of(self).iter().map(|n| n.size(self) as u64).sum();
        ParameterCount {
            embedding: table,
            head: if self.tie_word_embeddings { 0 } else { table },
            linear: layers * linear,
            norms: layers * norms + self.hidden_size as u64,
        }
    }

    /// Checks that a model of this configuration can exist.
    ///
    /// # Errors
    /// The first key whose value cannot be used, with the reason.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let error = |key, value: &dyn ToString, reason: &str| {
            Err(ConfigError { key, value: value.to_string(), reason: reason.to_owned() })
        };
        for (key, value, limit) in [
            ("hidden_size", self.hidden_size, MAX_EXACT_COLS),
            ("intermediate_size", self.intermediate_size, MAX_EXACT_COLS),
            ("num_hidden_layers", self.num_hidden_layers, 10_000),
            ("num_attention_heads", self.num_attention_heads, 65_536),
            ("num_key_value_heads", self.num_key_value_heads, 65_536),
            ("vocab_size", self.vocab_size, 1 << 28),
            ("max_position_embeddings", self.max_position_embeddings, 1 << 24),
        ] {
            if value == 0 {
                return error(key, &value, "must be at least 1");
            }
            if value > limit {
                return error(key, &value, &format!("must be at most {limit}"));
            }
        }
        if self.head_dim.is_none() && !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            let reason = format!(
                "not a multiple of num_attention_heads = {}, and head_dim is not given",
                self.num_attention_heads
            );
            return error("hidden_size", &self.hidden_size, &reason);
        }
        let head_dim = self.head_dim();
        if head_dim == 0 || !head_dim.is_multiple_of(2) || head_dim > 65_536 {
            return error("head_dim", &head_dim, "must be even (rotary pairs) and in 2..=65536");
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            let reason =
                format!("does not divide num_attention_heads = {}", self.num_attention_heads);
            return error("num_key_value_heads", &self.num_key_value_heads, &reason);
        }
        if self.query_size() > MAX_EXACT_COLS {
            let reason = format!("heads times head_dim must be at most {MAX_EXACT_COLS}");
            return error("num_attention_heads", &self.num_attention_heads, &reason);
        }
        if !(self.rms_norm_eps > 0.0 && self.rms_norm_eps < 1.0) {
            return error("rms_norm_eps", &self.rms_norm_eps, "must be between 0 and 1");
        }
        if !(self.rope_theta > 1.0 && self.rope_theta.is_finite()) {
            return error("rope_theta", &self.rope_theta, "must be greater than 1 and finite");
        }
        self.validate_recipe()
    }

    fn validate_recipe(&self) -> Result<(), ConfigError> {
        let error = |key, value: &dyn ToString, reason: String| {
            Err(ConfigError { key, value: value.to_string(), reason })
        };
        if self.weight_quantizer == WeightQuantizer::None && !is_default(&self.recipe) {
            let reason = "has no use with weight_quantizer = none".to_owned();
            return error("recipe", &"(given)", reason);
        }
        for (key, share) in self.recipe.keeps() {
            if !(share > 0.0 && share <= 1.0) {
                return error(key, &share, "must be greater than 0 and at most 1".to_owned());
            }
            if share < 1.0 && self.recipe.hadamard {
                let reason = "has no use with recipe.hadamard = true, which spreads the \
                              magnitudes that it would choose by";
                return error(key, &share, reason.to_owned());
            }
        }
        let Granularity::Group(group) = self.recipe.granularity else { return Ok(()) };
        for linear in Linear::ALL {
            let [_, cols] = linear.shape(self);
            if group == 0 || !cols.is_multiple_of(group) {
                let reason = format!("does not divide the {cols} columns of {}", linear.hf(0));
                return error("recipe.granularity", &group, reason);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_the_2b4t_model() {
        let config = ModelConfig {
            hidden_size: 2560,
            intermediate_size: 6912,
            num_hidden_layers: 30,
            num_attention_heads: 20,
            num_key_value_heads: 5,
            vocab_size: 128_256,
            max_position_embeddings: 4096,
            rope_theta: 500_000.0,
            ..ModelConfig::tiny()
        };
        config.validate().unwrap();
        let count = config.parameter_count();
        assert_eq!(count.embedding, 128_256 * 2560);
        assert_eq!(count.head, 0);
        let block = 2 * 2560 * 2560 + 2 * 640 * 2560 + 3 * 2560 * 6912;
        assert_eq!(count.linear, 30 * block);
        assert_eq!(count.norms, 30 * (3 * 2560 + 6912) + 2560);
    }

    #[test]
    fn names_the_key_that_is_wrong() {
        let tiny = ModelConfig::tiny();
        let cases = [
            (ModelConfig { hidden_size: 0, ..tiny.clone() }, "hidden_size"),
            (ModelConfig { hidden_size: 66, ..tiny.clone() }, "hidden_size"),
            (ModelConfig { head_dim: Some(3), ..tiny.clone() }, "head_dim"),
            (ModelConfig { num_key_value_heads: 3, ..tiny.clone() }, "num_key_value_heads"),
            (ModelConfig { rms_norm_eps: 0.0, ..tiny.clone() }, "rms_norm_eps"),
            (ModelConfig { rope_theta: f32::NAN, ..tiny.clone() }, "rope_theta"),
            (ModelConfig { intermediate_size: 1 << 20, ..tiny.clone() }, "intermediate_size"),
        ];
        for (config, key) in cases {
            let error = config.validate().unwrap_err();
            assert_eq!(error.key, key, "{error}");
            assert!(error.to_string().starts_with(&format!("model.{key} = ")));
        }
        tiny.validate().unwrap();
    }

    #[test]
    fn what_the_engine_cannot_run_is_named() {
        let tiny = ModelConfig::tiny();
        tiny.packable().unwrap();
        let binary = ModelConfig { weight_quantizer: WeightQuantizer::Binary, ..tiny.clone() };
        binary.packable().unwrap();
        let with = |recipe: &str| {
            let recipe = serde_json::from_str(recipe).unwrap();
            ModelConfig { recipe, ..ModelConfig::tiny() }
        };
        with(r#"{"weight_scale":"absmedian"}"#).packable().unwrap();
        for (recipe, message) in [
            (r#"{"granularity":"row"}"#, "model.recipe.granularity = row: "),
            (r#"{"granularity":32}"#, "model.recipe.granularity = 32: "),
            (r#"{"activations":"a4.8"}"#, "model.recipe.activations = a4.8: "),
            (r#"{"activations":"none"}"#, "model.recipe.activations = none: "),
            (r#"{"hadamard":true}"#, "model.recipe.hadamard = true: "),
            (r#"{"o_proj_keep":0.5}"#, "model.recipe.o_proj_keep = 0.5: the engine"),
            (r#"{"down_proj_keep":0.9}"#, "model.recipe.down_proj_keep = 0.9: the engine"),
        ] {
            let config = with(recipe);
            config.validate().unwrap();
            let error = config.packable().unwrap_err().to_string();
            assert!(error.starts_with(message), "{error}");
        }
        let error = with(r#"{"granularity":48}"#).validate().unwrap_err().to_string();
        assert!(error.contains("48: does not divide the 64 columns of model.layers.0"), "{error}");
        for (recipe, message) in [
            (r#"{"o_proj_keep":0.0}"#, "model.recipe.o_proj_keep = 0: must be"),
            (r#"{"down_proj_keep":1.5}"#, "model.recipe.down_proj_keep = 1.5: must be"),
            (
                r#"{"o_proj_keep":0.5,"hadamard":true}"#,
                "model.recipe.o_proj_keep = 0.5: has no use with recipe.hadamard",
            ),
        ] {
            let error = with(recipe).validate().unwrap_err().to_string();
            assert!(error.starts_with(message), "{error}");
        }
        let twin =
            ModelConfig { weight_quantizer: WeightQuantizer::None, ..with(r#"{"hadamard":true}"#) };
        assert_eq!(twin.validate().unwrap_err().key, "recipe");
    }

    #[test]
    fn refuses_unknown_keys_and_round_trips() {
        let text = serde_json::to_string(&ModelConfig::tiny()).unwrap();
        assert_eq!(serde_json::from_str::<ModelConfig>(&text).unwrap(), ModelConfig::tiny());
        let wrong = text.replacen("hidden_size", "hiden_size", 1);
        assert!(serde_json::from_str::<ModelConfig>(&wrong).is_err());
    }
}

//! `config.json` to and from [`ModelConfig`].
//!
//! What is written can be loaded by transformers: `BitNetForCausalLM` with
//! sub-norms, `LlamaForCausalLM` without; master weights of a ternary model are
//! announced by a `quantization_config` (`autobitlinear`, `online`), a float
//! twin has none. What transformers has no key for is kept in an object of our
//! own:
//!
//! ```json
//! "bitnet": { "sub_norms": true, "weight_quantizer": "ternary", "embedding_dtype": "f16" }
//! ```

use std::path::Path;

use bitnet_core::{Activation, Dtype, ModelConfig, Recipe, WeightQuantizer};
use serde_json::{Map, Value, json};

use super::HfError;

/// The tokens that begin and end a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SpecialTokens {
    /// `bos_token_id`
    pub bos: Option<u32>,
    /// `eos_token_id`; of a list the first.
    pub eos: Option<u32>,
}

/// What a `config.json` says.
#[derive(Debug, Clone, PartialEq)]
pub struct HfConfig {
    /// The model.
    pub model: ModelConfig,
    /// Its special tokens.
    pub special: SpecialTokens,
    /// How the linear weights are packed; none where they are master weights or
    /// floats.
    pub packed: Option<PackedScale>,
    /// Whether the file states the precision of the embedding in a key of our
    /// own: else it is that of the stored tensor.
    pub states_embedding_dtype: bool,
}

/// What the `weight_scale` of packed weights (`offline`) means, by `linear_class`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PackedScale {
    /// `autobitlinear`: it multiplies the ternary value, mean |W|.
    Multiplies,
    /// `bitlinear`, the default: it divides, 1 / mean |W|.
    Divides,
}

/// The content of `config.json` for a checkpoint of f32 master weights.
#[must_use]
pub fn to_json(config: &ModelConfig, special: SpecialTokens) -> Value {
    let (architecture, model_type) = if config.sub_norms {
        ("BitNetForCausalLM", "bitnet")
    } else {
        ("LlamaForCausalLM", "llama")
    };
    let mut out = json!({
        "architectures": [architecture],
        "attention_bias": false,
        "attention_dropout": 0.0,
        "bos_token_id": special.bos,
        "dtype": "float32",
        "eos_token_id": special.eos,
        "hidden_act": config.hidden_act.name(),
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "mlp_bias": false,
        "model_type": model_type,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "pad_token_id": null,
        "rms_norm_eps": shortest(config.rms_norm_eps),
        "rope_parameters": { "rope_theta": shortest(config.rope_theta), "rope_type": "default" },
        "rope_theta": shortest(config.rope_theta),
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": "float32",
        "use_cache": true,
        "vocab_size": config.vocab_size,
        "bitnet": {
            "sub_norms": config.sub_norms,
            "weight_quantizer": config.weight_quantizer.name(),
            "embedding_dtype": config.embedding_dtype.name(),
        },
    });
    if let Some(head_dim) = config.head_dim {
        out["head_dim"] = head_dim.into();
    }
    // transformers knows the one recipe.
    let recipe = serde_json::to_value(config.recipe).unwrap_or_default();
    if config.recipe != Recipe::default() {
        out["bitnet"]["recipe"] = recipe;
    } else if config.weight_quantizer == WeightQuantizer::Ternary {
        let head = if config.tie_word_embeddings { Value::Null } else { json!(["lm_head"]) };
        out["quantization_config"] = json!({
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "online",
            "modules_to_not_convert": head,
        });
    }
    out
}

/// The f64 whose text is that of the f32: 1e-5, not 9.999999747378752e-6.
fn shortest(x: f32) -> f64 {
    x.to_string().parse().unwrap_or_else(|_| f64::from(x))
}

/// Reads the text of a `config.json`; `path` is what errors call it.
///
/// # Errors
/// Anything but the configuration of a model that this project has, with the
/// key and its value.
pub fn from_json(text: &str, path: &Path) -> Result<HfConfig, HfError> {
    let json: Value =
        serde_json::from_str(text).map_err(|source| HfError::Json { path: path.into(), source })?;
    let top = Keys { map: object(&json), path, prefix: "" };
    if !json.is_object() {
        return Err(top.expected("(the whole file)", "an object", Some(&json)));
    }
    let is_bitnet = match (top.string("model_type")?, architecture(&top)?) {
        (_, Some("BitNetForCausalLM")) | (Some("bitnet"), None) => true,
        (_, Some("LlamaForCausalLM")) | (Some("llama"), None) => false,
        (model_type, architecture) => {
            let (key, value) = match architecture {
                Some(a) => ("architectures", a),
                None => ("model_type", model_type.unwrap_or("(absent)")),
            };
            let reason = "BitNetForCausalLM and LlamaForCausalLM are";
            return Err(top.unsupported(key, value, reason));
        }
    };
    refuse_what_is_missing_here(&top)?;
    let (quantizer, packed) = quantization(&top)?;
    let own = Keys { map: object(&json["bitnet"]), path, prefix: "bitnet." };
    if let Some(key) = own.map.keys().find(|k| !OWN_KEYS.contains(&k.as_str())) {
        return Err(own.unsupported(key, &own.map[key].to_string(), "this key is not known"));
    }

    let heads = top.needed("num_attention_heads")?;
    let model = ModelConfig {
        hidden_size: top.needed("hidden_size")?,
        intermediate_size: top.needed("intermediate_size")?,
        num_hidden_layers: top.needed("num_hidden_layers")?,
        num_attention_heads: heads,
        num_key_value_heads: top.integer("num_key_value_heads")?.unwrap_or(heads),
        head_dim: top.integer("head_dim")?,
        vocab_size: top.needed("vocab_size")?,
        max_position_embeddings: top.needed("max_position_embeddings")?,
        // Absent keys mean what transformers' defaults say.
        rms_norm_eps: top.float("rms_norm_eps")?.unwrap_or(if is_bitnet { 1e-5 } else { 1e-6 }),
        rope_theta: rope_theta(&top, &json)?.unwrap_or(if is_bitnet { 5e5 } else { 1e4 }),
        hidden_act: top.one_of("hidden_act", &ACTIVATIONS)?.unwrap_or(if is_bitnet {
            Activation::Relu2
        } else {
            Activation::Silu
        }),
        tie_word_embeddings: top.bool("tie_word_embeddings")?.unwrap_or(false),
        sub_norms: own.bool("sub_norms")?.unwrap_or(is_bitnet),
        weight_quantizer: own.one_of("weight_quantizer", &QUANTIZERS)?.unwrap_or(quantizer),
        embedding_dtype: match own.one_of("embedding_dtype", &DTYPES)? {
            Some(dtype) => dtype,
            None => stored_dtype(&top)?,
        },
        recipe: recipe(&own)?,
    };
    model.validate().map_err(|source| HfError::Config { path: path.into(), source })?;
    let special =
        SpecialTokens { bos: top.token("bos_token_id")?, eos: top.token("eos_token_id")? };
    let states_embedding_dtype = own.get("embedding_dtype").is_some();
    Ok(HfConfig { model, special, packed, states_embedding_dtype })
}

const OWN_KEYS: [&str; 4] = ["sub_norms", "weight_quantizer", "embedding_dtype", "recipe"];
const ACTIVATIONS: [(&str, Activation); 3] =
    [("relu2", Activation::Relu2), ("silu", Activation::Silu), ("swish", Activation::Silu)];
const QUANTIZERS: [(&str, WeightQuantizer); 3] = [
    ("ternary", WeightQuantizer::Ternary),
    ("binary", WeightQuantizer::Binary),
    ("none", WeightQuantizer::None),
];
const DTYPES: [(&str, Dtype); 3] =
    [("f32", Dtype::F32), ("f16", Dtype::F16), ("bf16", Dtype::Bf16)];
const HF_DTYPES: [(&str, Dtype); 3] =
    [("float32", Dtype::F32), ("float16", Dtype::F16), ("bfloat16", Dtype::Bf16)];

fn architecture<'v>(top: &Keys<'v>) -> Result<Option<&'v str>, HfError> {
    let key = "architectures";
    match top.get(key) {
        None => Ok(None),
        Some(v) => match v.get(0).and_then(Value::as_str) {
            Some(name) => Ok(Some(name)),
            None => Err(top.expected(key, "an array of strings", Some(v))),
        },
    }
}

/// Parts of the LLaMA family that would change the model if they were ignored.
fn refuse_what_is_missing_here(top: &Keys<'_>) -> Result<(), HfError> {
    for key in ["attention_bias", "mlp_bias"] {
        if top.bool(key)? == Some(true) {
            return Err(top.unsupported(key, "true", "linear layers have no bias"));
        }
    }
    for (key, prefix) in
        [("rope_scaling", "rope_scaling."), ("rope_parameters", "rope_parameters.")]
    {
        let Some(value) = top.get(key) else { continue };
        let rope = Keys { map: object(value), path: top.path, prefix };
        let kind = rope.string("rope_type")?.or(rope.string("type")?).unwrap_or("default");
        if kind != "default" {
            return Err(top.unsupported(key, kind, "only the default rotary embedding is"));
        }
    }
    Ok(())
}

/// The quantiser a file announces and whether its weights are packed.
fn quantization(top: &Keys<'_>) -> Result<(WeightQuantizer, Option<PackedScale>), HfError> {
    let key = "quantization_config";
    let Some(value) = top.get(key) else { return Ok((WeightQuantizer::None, None)) };
    if !value.is_object() {
        return Err(top.expected(key, "an object", Some(value)));
    }
    let q = Keys { map: object(value), path: top.path, prefix: "quantization_config." };
    match q.string("quant_method")? {
        Some("bitnet") => {}
        other => {
            let value = other.unwrap_or("(absent)");
            return Err(q.unsupported("quant_method", value, "\"bitnet\" is"));
        }
    }
    if q.bool("use_rms_norm")? == Some(true) {
        return Err(q.unsupported("use_rms_norm", "true", "a norm inside linear layers is not"));
    }
    // transformers' defaults, where absent: bitlinear, offline.
    let auto = match q.string("linear_class")? {
        None | Some("bitlinear") => false,
        Some("autobitlinear") => true,
        Some(other) => {
            let reason = "bitlinear and autobitlinear are";
            return Err(q.unsupported("linear_class", other, reason));
        }
    };
    let packed = match q.string("quantization_mode")? {
        Some("online") if auto => None,
        None | Some("offline") if auto => Some(PackedScale::Multiplies),
        // `bitlinear` has no other mode.
        None | Some("offline") => Some(PackedScale::Divides),
        Some(other) => {
            let reason = "offline is, and online with autobitlinear";
            return Err(q.unsupported("quantization_mode", other, reason));
        }
    };
    Ok((WeightQuantizer::Ternary, packed))
}

/// The rest of the recipe, where it is not BitNet b1.58's.
fn recipe(own: &Keys<'_>) -> Result<Recipe, HfError> {
    let expected =
        "a recipe (weight_scale, granularity, activations, hadamard, o_proj_keep, down_proj_keep)";
    let read = |v: &Value| serde_json::from_value(v.clone()).ok();
    Ok(own.typed("recipe", expected, read)?.unwrap_or_default())
}

/// `rope_parameters.rope_theta` (transformers 5), else `rope_theta`.
fn rope_theta(top: &Keys<'_>, json: &Value) -> Result<Option<f32>, HfError> {
    let map = object(&json["rope_parameters"]);
    let nested = Keys { map, path: top.path, prefix: "rope_parameters." };
    Ok(nested.float("rope_theta")?.or(top.float("rope_theta")?))
}

/// The precision the tensors are stored in, for files that are not our own.
fn stored_dtype(top: &Keys<'_>) -> Result<Dtype, HfError> {
    let dtype = match top.one_of("dtype", &HF_DTYPES)? {
        Some(dtype) => Some(dtype),
        None => top.one_of("torch_dtype", &HF_DTYPES)?,
    };
    Ok(dtype.unwrap_or(Dtype::F32))
}

/// The object's entries; none where it is no object.
fn object(value: &Value) -> &Map<String, Value> {
    static EMPTY: std::sync::LazyLock<Map<String, Value>> = std::sync::LazyLock::new(Map::new);
    value.as_object().unwrap_or(&EMPTY)
}

/// One object of the file, with what errors need. A `null` counts as absent.
#[derive(Clone, Copy)]
struct Keys<'v> {
    map: &'v Map<String, Value>,
    path: &'v Path,
    prefix: &'static str,
}

impl<'v> Keys<'v> {
    fn get(&self, key: &str) -> Option<&'v Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    fn expected(&self, key: &str, expected: &'static str, found: Option<&Value>) -> HfError {
        let mut found = found.map_or("nothing".to_owned(), Value::to_string);
        if found.chars().count() > 80 {
            found = found.chars().take(80).chain(['…']).collect();
        }
        let key = format!("{}{key}", self.prefix);
        HfError::Key { path: self.path.into(), key, expected, found }
    }

    fn unsupported(&self, key: &str, value: &str, reason: &str) -> HfError {
        let (key, value) = (format!("{}{key}", self.prefix), value.to_owned());
        HfError::Unsupported { path: self.path.into(), key, value, reason: reason.to_owned() }
    }

    fn typed<T>(
        &self,
        key: &str,
        expected: &'static str,
        read: impl Fn(&'v Value) -> Option<T>,
    ) -> Result<Option<T>, HfError> {
        let Some(v) = self.get(key) else { return Ok(None) };
        read(v).map(Some).ok_or_else(|| self.expected(key, expected, Some(v)))
    }

    fn integer(&self, key: &str) -> Result<Option<usize>, HfError> {
        self.typed(key, "a non-negative integer", |v| usize::try_from(v.as_u64()?).ok())
    }

    fn needed(&self, key: &str) -> Result<usize, HfError> {
        let value = self.integer(key)?;
        value.ok_or_else(|| self.expected(key, "a non-negative integer", None))
    }

    fn float(&self, key: &str) -> Result<Option<f32>, HfError> {
        self.typed(key, "a number", |v| Some(v.as_f64()? as f32))
    }

    fn bool(&self, key: &str) -> Result<Option<bool>, HfError> {
        self.typed(key, "true or false", Value::as_bool)
    }

    fn string(&self, key: &str) -> Result<Option<&'v str>, HfError> {
        self.typed(key, "a string", Value::as_str)
    }

    fn token(&self, key: &str) -> Result<Option<u32>, HfError> {
        let first = |v: &'v Value| v.get(0).unwrap_or(v);
        self.typed(key, "a token id", |v| u32::try_from(first(v).as_u64()?).ok())
    }

    fn one_of<T: Copy>(&self, key: &str, all: &[(&str, T)]) -> Result<Option<T>, HfError> {
        let Some(name) = self.string(key)? else { return Ok(None) };
        match all.iter().find(|(n, _)| *n == name) {
            Some((_, value)) => Ok(Some(*value)),
            None => {
                let names: Vec<&str> = all.iter().map(|(n, _)| *n).collect();
                let reason = format!("one of {} is", names.join(", "));
                Err(self.unsupported(key, name, &reason))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use bitnet_core::quantizer::Granularity;
    use proptest::prelude::*;

    use super::*;
    use crate::hf::chain;

    fn read(json: &Value) -> Result<HfConfig, HfError> {
        from_json(&json.to_string(), Path::new("config.json"))
    }

    proptest! {
        #[test]
        fn nothing_is_lost_in_a_round_trip(
            (heads, kv, pairs) in (1usize..4, 1usize..4, 1usize..40),
            head_dim in proptest::option::of(Just(())),
            eps in 1e-12f32..0.9,
            theta in 1.5f32..1e9,
            (silu, tie, sub, none) in any::<(bool, bool, bool, bool)>(),
            dtype in 0usize..3,
            rows in any::<bool>(),
            (bos, eos) in any::<(Option<u32>, Option<u32>)>(),
        ) {
            let model = ModelConfig {
                hidden_size: heads * kv * pairs * 2,
                num_attention_heads: heads * kv,
                num_key_value_heads: kv,
                head_dim: head_dim.map(|()| 2 * pairs + 2),
                rms_norm_eps: eps,
                rope_theta: theta,
                hidden_act: if silu { Activation::Silu } else { Activation::Relu2 },
                tie_word_embeddings: tie,
                sub_norms: sub,
                weight_quantizer: if none { WeightQuantizer::None } else { WeightQuantizer::Ternary },
                embedding_dtype: DTYPES[dtype].1,
                recipe: Recipe {
                    granularity: if rows && !none { Granularity::Row } else { Granularity::Tensor },
                    ..Recipe::default()
                },
                ..ModelConfig::tiny()
            };
            let special = SpecialTokens { bos, eos };
            let back = read(&to_json(&model, special)).unwrap();
            let states_embedding_dtype = true;
            prop_assert_eq!(back, HfConfig { model, special, packed: None, states_embedding_dtype });
        }
    }

    #[test]
    fn floats_are_written_short() {
        let text = to_json(&ModelConfig::tiny(), SpecialTokens::default()).to_string();
        assert!(text.contains("\"rms_norm_eps\":0.00001") || text.contains("1e-5"), "{text}");
    }

    /// As transformers 5 writes it (reference models of the project).
    fn llama() -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
            "bos_token_id": 1, "eos_token_id": [2, 3], "head_dim": 64, "hidden_act": "silu",
            "hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 256,
            "mlp_bias": false, "attention_bias": false, "num_attention_heads": 4,
            "num_hidden_layers": 4, "num_key_value_heads": 2, "pad_token_id": null,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": false, "vocab_size": 512,
            "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
            "quantization_config": {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]},
        })
    }

    #[test]
    fn reads_a_packed_llama() {
        let c = read(&llama()).unwrap();
        assert_eq!((c.packed, c.states_embedding_dtype), (Some(PackedScale::Divides), false));
        assert_eq!((c.special.bos, c.special.eos), (Some(1), Some(2)));
        assert_eq!((c.model.sub_norms, c.model.rope_theta), (false, 500_000.0));
        assert_eq!(c.model.weight_quantizer, WeightQuantizer::Ternary);
        assert_eq!(c.model.embedding_dtype, Dtype::Bf16);
        assert_eq!(c.model.hidden_act, Activation::Silu);
    }

    #[test]
    fn reads_old_and_sparse_files() {
        let mut json = llama();
        let map = json.as_object_mut().unwrap();
        for key in ["rope_parameters", "head_dim", "num_key_value_heads", "quantization_config"] {
            map.remove(key);
        }
        map.insert("rope_theta".into(), 1234.5.into());
        let c = read(&json).unwrap();
        assert_eq!((c.model.rope_theta, c.model.head_dim), (1234.5, None));
        assert_eq!((c.model.head_dim(), c.model.num_key_value_heads), (64, 4));
        assert_eq!((c.model.weight_quantizer, c.packed), (WeightQuantizer::None, None));
    }

    #[test]
    fn errors_name_the_key_and_the_value() {
        let cases = [
            (
                "hidden_size",
                json!("256"),
                "key hidden_size: expected a non-negative integer, found \"256\"",
            ),
            (
                "hidden_size",
                json!(null),
                "key hidden_size: expected a non-negative integer, found nothing",
            ),
            ("hidden_size", json!(250), "model.hidden_size = 250"),
            ("vocab_size", json!(-1), "key vocab_size: expected a non-negative integer, found -1"),
            ("vocab_size", json!(0), "model.vocab_size = 0"),
            ("rms_norm_eps", json!("x"), "key rms_norm_eps: expected a number"),
            ("rms_norm_eps", json!(0), "model.rms_norm_eps = 0"),
            ("hidden_act", json!("gelu"), "key hidden_act = gelu is not supported"),
            ("attention_bias", json!(true), "key attention_bias = true"),
            ("architectures", json!(["GPT2LMHeadModel"]), "key architectures = GPT2LMHeadModel"),
            ("architectures", json!("x"), "key architectures: expected an array"),
            ("rope_parameters", json!({"rope_type": "yarn"}), "key rope_parameters = yarn"),
            (
                "rope_parameters",
                json!({"rope_theta": true}),
                "key rope_parameters.rope_theta: expected a number",
            ),
            (
                "quantization_config",
                json!({"quant_method": "awq"}),
                "key quantization_config.quant_method = awq",
            ),
            (
                "quantization_config",
                json!({"quant_method": "bitnet", "use_rms_norm": true}),
                "key quantization_config.use_rms_norm = true",
            ),
            (
                "quantization_config",
                json!({"quant_method": "bitnet", "linear_class": "x"}),
                "key quantization_config.linear_class = x",
            ),
            (
                "quantization_config",
                json!({"quant_method": "bitnet", "quantization_mode": "online"}),
                "key quantization_config.quantization_mode = online",
            ),
            ("quantization_config", json!(3), "key quantization_config: expected an object"),
            (
                "bitnet",
                json!({"sub_norms": 3}),
                "key bitnet.sub_norms: expected true or false, found 3",
            ),
            ("bitnet", json!({"subnorms": true}), "key bitnet.subnorms = true is not supported"),
            ("bitnet", json!({"weight_quantizer": "int2"}), "key bitnet.weight_quantizer = int2"),
            (
                "bitnet",
                json!({"recipe": {"granularity": "column"}}),
                "key bitnet.recipe: expected a recipe",
            ),
            ("eos_token_id", json!("x"), "key eos_token_id: expected a token id"),
            ("tie_word_embeddings", json!(1), "key tie_word_embeddings: expected true or false"),
        ];
        for (key, value, text) in cases {
            let mut json = llama();
            json[key] = value;
            if key == "hidden_size" {
                json["head_dim"] = Value::Null;
            }
            let found = chain(&read(&json).unwrap_err());
            assert!(found.starts_with("config.json: ") && found.contains(text), "{key}: {found}");
        }
        let e = chain(&from_json("{\"a\": ", Path::new("config.json")).unwrap_err());
        assert!(e.starts_with("config.json: not valid JSON: EOF"), "{e}");
        assert!(from_json("[]", Path::new("c")).unwrap_err().to_string().contains("an object"));
    }
}

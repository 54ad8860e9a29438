//! GGUF files of llama.cpp and bitnet.cpp: ternary ones, and the float models
//! that they are compared with.

use std::path::Path;

use bitnet_core::names::{Linear, Norm, Tensor};
use bitnet_core::{Activation, ModelConfig, Recipe, WeightQuantizer, WeightScheme};

use super::gguf_file::GgufFile;
use super::{
    Facts, Linears, ModelError, OpenOptions, Source, Text, given_tokenizer, keys, quantise_later,
    quantised, refuse_i2s, vocabulary,
};
use crate::gguf::blocks::{self, BlockError, I2sLayout, decode_ternary, trits_of_floats};
use crate::gguf::{Directory, GgmlType};
use crate::hf::Trits;
use crate::tokenizer::{CHAT_TEMPLATE_KEY, HUGGINGFACE_KEY, special_tokens};

/// The architectures that are read, the activation that each means, and whether
/// rows of q and k are permuted for rotary pairs of neighbours.
const ARCHITECTURES: [(&str, Activation, bool); 4] = [
    ("bitnet", Activation::Silu, false),
    ("bitnet-25", Activation::Relu2, false),
    ("bitnet-b1.58", Activation::Relu2, false),
    ("llama", Activation::Silu, true),
];

/// Types that are known by number only, for errors.
const UNREADABLE: [(u32, &str); 27] = [
    (3, "Q4_1"),
    (6, "Q5_0"),
    (7, "Q5_1"),
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (13, "Q5_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (37, "I8_S of bitnet.cpp"),
    (38, "TL1 of bitnet.cpp, tiled for one shape and machine"),
    (39, "TL2 of bitnet.cpp, tiled for one shape and machine, or MXFP4 of llama.cpp"),
    (40, "NVFP4 of llama.cpp"),
    (134, "IQ1_BN of ik_llama.cpp"),
    (135, "IQ2_BN of ik_llama.cpp"),
];

/// `general.file_type` of a file whose matrices are I2_S.
const FILE_TYPE_I2_S: u32 = 40;

/// An open file.
pub(super) struct Foreign {
    file: GgufFile,
    facts: Facts,
    /// Whether rows of q and k are permuted.
    permuted: bool,
    /// How I2_S data is read.
    i2s: I2sLayout,
}

impl Foreign {
    pub(super) fn new(mut file: GgufFile, options: &OpenOptions) -> Result<Self, ModelError> {
        let dir = file.directory()?;
        let reading = Reading { file: &file, dir: &dir };
        let arch = file.architecture()?;
        let Some((_, act, permuted)) = ARCHITECTURES.into_iter().find(|a| a.0 == arch) else {
            let known = ARCHITECTURES.map(|a| a.0).join(", ");
            let what = format!("key general.architecture = {arch:?} is not supported: {known} are");
            return Err(reading.unsupported(what));
        };
        let mut config = reading.config(&arch, act, options)?;
        reading.check_tensors(&config)?;
        reading.check_types(&arch)?;
        let text = reading.text(&config, options)?;
        let name = dir.find("general.name")?.unwrap_or_else(|| {
            file.path.file_stem().map_or("model".into(), |s| s.to_string_lossy().into_owned())
        });
        let stored = reading.linears(&config)?;
        config.weight_quantizer = match stored {
            Linears::Floats => WeightQuantizer::None,
            Linears::Trits | Linears::Masters => WeightQuantizer::Ternary,
        };
        let linears = quantise_later(&file.path, options, &mut config, stored)?;
        let mut kind = format!("GGUF, architecture {arch}");
        let i2s = options.i2s.unwrap_or_default();
        if dir.tensors().iter().any(|t| t.ty == GgmlType::I2_S) {
            kind += &format!(", I2_S in the layout of {} builds", i2s.name());
        } else {
            refuse_i2s(&file.path, options)?;
        }
        drop(dir);
        file.forget_head();
        let linear_dtype = file.dtype(&Tensor::Linear(0, Linear::Q).gguf());
        let facts = Facts {
            kind,
            config,
            linears,
            linear_dtype,
            linear_rows: None,
            name,
            text,
            golden: None,
        };
        Ok(Self { file, facts, permuted, i2s })
    }

    /// The row of the file in which row `row` of a tensor lies.
    ///
    /// Converters for `llama` put the two halves of a head's rotary pairs side by
    /// side: row `p·C/2 + i` of a head of C becomes row `2i + p`.
    fn row(&self, tensor: Tensor, row: usize) -> usize {
        let Tensor::Linear(_, Linear::Q | Linear::K) = tensor else { return row };
        if !self.permuted {
            return row;
        }
        let head_dim = self.facts.config.head_dim();
        let (head, r) = (row / head_dim, row % head_dim);
        let (p, i) = (r / (head_dim / 2), r % (head_dim / 2));
        head * head_dim + 2 * i + p
    }

    fn block(&self, tensor: &str, source: BlockError) -> ModelError {
        ModelError::Block { path: self.file.path.clone(), tensor: tensor.into(), source }
    }
}

impl Source for Foreign {
    fn path(&self) -> &Path {
        &self.file.path
    }

    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn floats(&self, tensor: Tensor, first: usize, out: &mut [f32]) -> Result<(), ModelError> {
        let name = tensor.gguf();
        let info = self.file.tensor(&name)?;
        let cols = tensor.shape(&self.facts.config)[1];
        let width = info.ty.tensor_bytes(&[cols as u64]).unwrap_or(0);
        let rows = out.len() / cols;
        let read = |row: usize, out: &mut [f32]| {
            let mut bytes = vec![0; out.len() / cols * width as usize];
            self.file.read(&name, row as u64 * width, &mut bytes)?;
            blocks::decode(info.ty, &bytes, out).map_err(|e| self.block(&name, e))
        };
        if (first..first + rows).all(|r| self.row(tensor, r) == r) {
            return read(first, out);
        }
        for (i, out) in out.chunks_exact_mut(cols).enumerate() {
            read(self.row(tensor, first + i), out)?;
        }
        Ok(())
    }

    fn ternary(&self, tensor: Tensor) -> Result<Trits, ModelError> {
        if self.facts.linears != Linears::Trits {
            return quantised(self, tensor, WeightScheme::B158);
        }
        let name = tensor.gguf();
        let [rows, cols] = tensor.shape(&self.facts.config);
        let ty = self.file.tensor(&name)?.ty;
        let bytes = self.file.read_all(&name)?;
        let stored = if is_ternary(ty) {
            decode_ternary(ty, &bytes, rows * cols, self.i2s)
        } else {
            let mut values = vec![0.0; rows * cols];
            blocks::decode(ty, &bytes, &mut values).and_then(|()| trits_of_floats(&values))
        };
        let (stored, mut scale) = stored.map_err(|e| self.block(&name, e))?;
        drop(bytes);
        if let Some(factor) = self.scale(&name)? {
            scale *= factor;
        }
        if !(scale.is_finite() && scale > 0.0) {
            return Err(self.block(&name, BlockError::Scale(scale)));
        }
        let values = if (0..rows).all(|r| self.row(tensor, r) == r) {
            stored
        } else {
            let at = |r| &stored[self.row(tensor, r) * cols..][..cols];
            (0..rows).flat_map(|r| at(r).iter().copied()).collect()
        };
        Ok(Trits { values, scale })
    }
}

impl Foreign {
    /// The value of the optional tensor that multiplies a weight.
    fn scale(&self, weight: &str) -> Result<Option<f32>, ModelError> {
        let name = scale_name(weight);
        let Some(info) = self.file.find(&name) else { return Ok(None) };
        let mut out = [0.0];
        blocks::decode(info.ty, &self.file.read_all(&name)?, &mut out)
            .map_err(|e| self.block(&name, e))?;
        Ok(Some(out[0]))
    }
}

fn scale_name(weight: &str) -> String {
    format!("{}.scale", weight.strip_suffix(".weight").unwrap_or(weight))
}

fn is_ternary(ty: GgmlType) -> bool {
    matches!(ty, GgmlType::I2_S | GgmlType::TQ1_0 | GgmlType::TQ2_0)
}

/// A file that is being opened.
struct Reading<'f> {
    file: &'f GgufFile,
    dir: &'f Directory<'f>,
}

impl Reading<'_> {
    fn unsupported(&self, what: String) -> ModelError {
        ModelError::Unsupported { path: self.file.path.clone(), what }
    }

    fn wrong(&self, tensor: &str, what: &str) -> ModelError {
        ModelError::Invalid {
            path: self.file.path.clone(),
            what: format!("tensor {tensor}: {what}"),
        }
    }

    fn config(
        &self,
        arch: &str,
        act: Activation,
        options: &OpenOptions,
    ) -> Result<ModelConfig, ModelError> {
        let dir = self.dir;
        let key = |key: &str| format!("{arch}.{key}");
        let hidden_size: usize = dir.get(&key("embedding_length"))?;
        let heads: usize = dir.get(&key("attention.head_count"))?;
        if heads == 0 {
            return Err(self.unsupported(format!("key {} = 0", key("attention.head_count"))));
        }
        let head_dim = dir.find(&key("attention.key_length"))?.unwrap_or(hidden_size / heads);
        for (name, why) in [
            ("rope.dimension_count", "only whole heads are rotated"),
            ("attention.value_length", "keys and values have one size"),
        ] {
            if let Some(found) = dir.find::<usize>(&key(name))?
                && found != head_dim
            {
                let what = format!("key {} = {found}, a head has {head_dim}: {why}", key(name));
                return Err(self.unsupported(what));
            }
        }
        self.refuse_extensions(arch)?;
        // Our own exports say which it is.
        let stated = match dir.find::<String>(&key("hidden_act"))? {
            None => None,
            Some(name) => Some(keys::activation(&name).ok_or_else(|| {
                self.unsupported(format!("key {} = {name:?}", key("hidden_act")))
            })?),
        };
        let embedding = self.file.tensor("token_embd.weight")?;
        let config = ModelConfig {
            hidden_size,
            intermediate_size: dir.get(&key("feed_forward_length"))?,
            num_hidden_layers: dir.get(&key("block_count"))?,
            num_attention_heads: heads,
            num_key_value_heads: dir.find(&key("attention.head_count_kv"))?.unwrap_or(heads),
            head_dim: (head_dim.checked_mul(heads) != Some(hidden_size)).then_some(head_dim),
            vocab_size: embedding.dims.get(1).map_or(0, |v| *v as usize),
            max_position_embeddings: dir.get(&key("context_length"))?,
            rms_norm_eps: dir.get(&key("attention.layer_norm_rms_epsilon"))?,
            rope_theta: dir.find(&key("rope.freq_base"))?.unwrap_or(10_000.0),
            hidden_act: options.hidden_act.or(stated).unwrap_or(act),
            tie_word_embeddings: self.file.find("output.weight").is_none(),
            sub_norms: self.file.find(&Norm::AttentionSub.gguf(0)).is_some(),
            weight_quantizer: WeightQuantizer::Ternary,
            embedding_dtype: self.file.dtype(&embedding.name),
            recipe: Recipe::default(),
        };
        config
            .validate()
            .map_err(|source| ModelError::Config { path: self.file.path.clone(), source })?;
        Ok(config)
    }

    /// Parts of the LLaMA family that would change the model if ignored.
    fn refuse_extensions(&self, arch: &str) -> Result<(), ModelError> {
        if let Some(kind) = self.dir.find::<String>(&format!("{arch}.rope.scaling.type"))?
            && kind != "none"
        {
            let what = format!("key {arch}.rope.scaling.type = {kind:?}: only \"none\" is run");
            return Err(self.unsupported(what));
        }
        if let Some(experts) = self.dir.find::<u64>(&format!("{arch}.expert_count"))?
            && experts > 0
        {
            let what = format!("key {arch}.expert_count = {experts}: there are no experts here");
            return Err(self.unsupported(what));
        }
        if self.file.find("rope_freqs.weight").is_some() {
            let what = "tensor rope_freqs.weight: scaled rotary frequencies are not run".into();
            return Err(self.unsupported(what));
        }
        Ok(())
    }

    /// Every tensor of the model is there in its shape, and no other.
    fn check_tensors(&self, config: &ModelConfig) -> Result<(), ModelError> {
        // What the directory must hold bounds the work on a block count that lies.
        if config.num_hidden_layers > self.dir.tensors().len() {
            let layers = config.num_hidden_layers;
            let tensors = self.dir.tensors().len();
            let what = format!("{layers} blocks in a file of {tensors} tensors");
            return Err(ModelError::Invalid { path: self.file.path.clone(), what });
        }
        let mut known = std::collections::HashSet::new();
        for tensor in Tensor::all(config) {
            let info = self.file.tensor(&tensor.gguf())?;
            let dims: Vec<u64> = tensor.dims(config).iter().rev().map(|d| *d as u64).collect();
            if info.dims != dims {
                let what = format!("expected {dims:?}, found {:?}", info.dims);
                return Err(self.wrong(&info.name, &what));
            }
            if let Tensor::Linear(..) = tensor {
                let scale = scale_name(&info.name);
                if let Some(found) = self.file.find(&scale) {
                    if found.elements() != 1 || found.ty != GgmlType::F32 {
                        return Err(self.wrong(&scale, "expected one F32"));
                    }
                    known.insert(scale);
                }
            }
            known.insert(info.name.clone());
        }
        match self.dir.tensors().iter().find(|t| !known.contains(&t.name)) {
            Some(t) => Err(self.wrong(&t.name, "does not belong to a model of these keys")),
            None => Ok(()),
        }
    }

    /// Every type can be read, and 36 means I2_S.
    fn check_types(&self, arch: &str) -> Result<(), ModelError> {
        let file_type = self.dir.find::<u32>("general.file_type")?;
        for t in self.dir.tensors() {
            match t.ty {
                GgmlType::Unknown(id) => {
                    let name = UNREADABLE.iter().find(|u| u.0 == id).map_or("not known", |u| u.1);
                    return Err(self.unsupported(format!(
                        "tensor {}: type {id} ({name}) cannot be read",
                        t.name
                    )));
                }
                // bitnet.cpp's number. Its own architectures use it; in a file of
                // another the file's type must say so.
                GgmlType::I2_S => match (arch, file_type) {
                    (_, Some(FILE_TYPE_I2_S)) | ("bitnet" | "bitnet-25" | "bitnet-b1.58", None) => {
                    }
                    (arch, found) => {
                        let found = found.map_or("absent".to_owned(), |f| f.to_string());
                        return Err(self.unsupported(format!(
                            "tensor {}: type 36 is I2_S in files of bitnet.cpp \
                             (general.file_type {FILE_TYPE_I2_S}) and may be another in others: \
                             architecture {arch}, general.file_type {found}",
                            t.name
                        )));
                    }
                },
                GgmlType::I8 => {
                    return Err(self.unsupported(format!("tensor {}: type I8", t.name)));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Ternary where the types are, where a scale stands beside the weights, or
    /// where the first matrix holds nothing but -s, 0 and s.
    fn linears(&self, config: &ModelConfig) -> Result<Linears, ModelError> {
        let all = (0..config.num_hidden_layers)
            .flat_map(|layer| Linear::ALL.map(|l| Tensor::Linear(layer, l).gguf()));
        let mut ternary = 0;
        let mut floats = None;
        for name in all {
            match self.file.tensor(&name)?.ty {
                ty if is_ternary(ty) => ternary += 1,
                _ => floats = floats.or(Some(name)),
            }
        }
        let Some(first) = floats else { return Ok(Linears::Trits) };
        if ternary > 0 {
            let ty = self.file.tensor(&first)?.ty;
            let what = format!("tensor {first} is {ty}, other linear layers are ternary");
            return Err(self.unsupported(what));
        }
        let q = Tensor::Linear(0, Linear::Q).gguf();
        if self.file.find(&scale_name(&q)).is_some() {
            return Ok(Linears::Trits);
        }
        let ty = self.file.tensor(&q)?.ty;
        if !matches!(ty, GgmlType::F32 | GgmlType::F16 | GgmlType::BF16) {
            return Ok(Linears::Floats);
        }
        let [rows, cols] = Linear::Q.shape(config);
        let mut values = vec![0.0; rows * cols];
        let decoded = blocks::decode(ty, &self.file.read_all(&q)?, &mut values);
        Ok(match decoded.and_then(|()| trits_of_floats(&values)) {
            Ok(_) => Linears::Trits,
            Err(_) => Linears::Floats,
        })
    }

    fn text(&self, config: &ModelConfig, options: &OpenOptions) -> Result<Text, ModelError> {
        if options.without_text {
            return Ok(Text::default());
        }
        let holds_one = [HUGGINGFACE_KEY, "tokenizer.ggml.model"]
            .iter()
            .any(|key| self.dir.value(key).is_some());
        let (tokenizer, tokenizer_file) = match given_tokenizer(options)? {
            Some(given) => given,
            None if !holds_one => return Err(ModelError::NoTokenizer(self.file.path.clone())),
            None => (
                vocabulary::tokenizer_json(self.dir)?,
                format!("{}: its tokenizer", self.file.name),
            ),
        };
        let special = special_tokens(self.dir)?;
        let eot = self.dir.find::<u32>("tokenizer.ggml.eot_token_id")?;
        for (key, id) in [("bos", special.bos), ("eos", special.eos), ("eot", eot)] {
            if let Some(id) = id.filter(|id| *id as usize >= config.vocab_size) {
                let vocab = config.vocab_size;
                let what = format!("key tokenizer.ggml.{key}_token_id = {id} of {vocab} tokens");
                return Err(ModelError::Invalid { path: self.file.path.clone(), what });
            }
        }
        let chat_template = self.dir.find(CHAT_TEMPLATE_KEY)?;
        Ok(Text { tokenizer, tokenizer_file, special, eot, chat_template })
    }
}

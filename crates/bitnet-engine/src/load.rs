//! From the bytes of a file to checked tensors: every key and tensor that the
//! configuration asks for is there in the right type and shape, and no other.

use std::collections::HashSet;
use std::ops::Range;

use bitnet_core::names::{Linear, Norm};
use bitnet_core::{Activation, Dtype, Layout, ModelConfig, Recipe, WeightQuantizer};
use bitnet_format::gguf::blocks::RowType;
use bitnet_format::gguf::{FromValue, GgmlType, Reader};
use bitnet_kernels::{DenseRows, ROW_BLOCK};
use half::f16;

use crate::error::EngineError;
use crate::model::{
    ARCHITECTURE, DenseTensor, Golden, Inner, Layer, LinearRef, LinearTensor, Parts, Stored,
    TokenizerSource, Weights,
};

/// The version of the keys and layouts that this engine reads.
const FORMAT_VERSION: u32 = 1;

/// The types of float matrices.
const FLOATS: [GgmlType; 3] = [GgmlType::F32, GgmlType::F16, GgmlType::BF16];

/// Tensors begin at multiples of this, so that any vector load is aligned.
pub(crate) const ALIGNMENT: usize = 64;

/// Checks a whole packed file; none where it is of another architecture. `file` is
/// what errors call it.
pub(crate) fn load(bytes: &[u8], file: &str) -> Result<Option<Weights>, EngineError> {
    let reader = Reader::parse(bytes, file)?;
    let mut source = Source { reader: &reader, bytes, file, seen: HashSet::new() };
    if reader.str("general.architecture")? != ARCHITECTURE {
        return Ok(None);
    }
    let version: u32 = source.get("format_version")?;
    if version != FORMAT_VERSION {
        let why = format!("{version} is not supported (this engine reads {FORMAT_VERSION})");
        return Err(source.key("format_version", why));
    }
    let layout_name: String = source.get("layout")?;
    let layout = Layout::from_name(&layout_name).ok_or_else(|| {
        let known = Layout::ALL.map(Layout::name).join(", ");
        source.key("layout", format!("unknown layout `{layout_name}`; known: {known}"))
    })?;
    let config = config(&source)?;

    let mut parts = Parts::default();
    let (vocab, hidden) = (config.vocab_size, config.hidden_size);
    let embedding = source.dense("token_embd.weight", vocab, hidden)?;
    parts.embedding = embedding.range.len() as u64;
    let head = if config.tie_word_embeddings {
        None
    } else {
        Some(source.dense("output.weight", vocab, hidden)?)
    };
    parts.head = head.as_ref().map_or(0, |t| t.range.len() as u64);
    let final_norm = source.norm("output_norm.weight", hidden)?;
    parts.norms = final_norm.len() as u64 * 4;
    let mut layers = Vec::new();
    for layer in 0..config.num_hidden_layers {
        layers.push(self::layer(&mut source, &config, layout, layer, &mut parts)?);
    }
    source.refuse_foreign()?;
    let embedding_dtype = match embedding.stored {
        Stored::Float(dtype) => dtype,
        Stored::Rows(_) => config.embedding_dtype,
    };
    let config = ModelConfig { embedding_dtype, ..config };
    let golden = golden(&source, &config)?;
    let tokenizer = tokenizer(&source, &config)?;
    parts.metadata = bytes.len() as u64 - parts.total();
    let name = reader.find::<String>("general.name")?.unwrap_or_default();
    tracing::debug!(file, name, layers = layers.len(), "opened a packed model");
    Ok(Some(Weights {
        name,
        config,
        layout,
        tokenizer,
        golden,
        embedding,
        head,
        final_norm,
        layers,
        parts,
    }))
}

/// The configuration that the keys describe, validated. The embedding's type is
/// its tensor's and is filled in later.
fn config(source: &Source<'_>) -> Result<ModelConfig, EngineError> {
    let hidden_size: usize = source.get("embedding_length")?;
    let num_attention_heads: usize = source.get("attention.head_count")?;
    let head_dim: usize = source.get("attention.key_length")?;
    let default_head_dim =
        head_dim.checked_mul(num_attention_heads).is_some_and(|size| size == hidden_size);
    let hidden_act = match source.get::<String>("hidden_act")?.as_str() {
        "relu2" => Activation::Relu2,
        "silu" => Activation::Silu,
        other => {
            let why = format!("unknown activation `{other}`; known: relu2, silu");
            return Err(source.key("hidden_act", why));
        }
    };
    let weight_quantizer = match source.get::<String>("weight_quantizer")?.as_str() {
        "ternary" => WeightQuantizer::Ternary,
        "none" => WeightQuantizer::None,
        other => {
            let why = format!("unknown quantiser `{other}`; known: ternary, none");
            return Err(source.key("weight_quantizer", why));
        }
    };
    let config = ModelConfig {
        hidden_size,
        intermediate_size: source.get("feed_forward_length")?,
        num_hidden_layers: source.get("block_count")?,
        num_attention_heads,
        num_key_value_heads: source.get("attention.head_count_kv")?,
        head_dim: if default_head_dim { None } else { Some(head_dim) },
        vocab_size: source.get("vocab_size")?,
        max_position_embeddings: source.get("context_length")?,
        rms_norm_eps: source.get("attention.layer_norm_rms_epsilon")?,
        rope_theta: source.get("rope.freq_base")?,
        hidden_act,
        tie_word_embeddings: source.get("tie_word_embeddings")?,
        sub_norms: source.get("sub_norms")?,
        weight_quantizer,
        embedding_dtype: Dtype::F32,
        recipe: Recipe::default(),
    };
    config.validate().map_err(|e| EngineError::Config { file: source.file.into(), source: e })?;
    Ok(config)
}

fn layer(
    source: &mut Source<'_>,
    config: &ModelConfig,
    layout: Layout,
    layer: usize,
    parts: &mut Parts,
) -> Result<Layer, EngineError> {
    let mut norm = |source: &mut Source<'_>, norm: Norm| {
        let weight = source.norm(&norm.gguf(layer), norm.size(config))?;
        parts.norms += weight.len() as u64 * 4;
        Ok::<_, EngineError>(weight)
    };
    let attention_norm = norm(source, Norm::Attention)?;
    let ffn_norm = norm(source, Norm::FeedForward)?;
    let (mut attention_sub_norm, mut ffn_sub_norm) = (None, None);
    if config.sub_norms {
        attention_sub_norm = Some(norm(source, Norm::AttentionSub)?);
        ffn_sub_norm = Some(norm(source, Norm::FeedForwardSub)?);
    }
    let mut linear = |linear: Linear| {
        let ([rows, cols], name) = (linear.shape(config), linear.gguf(layer));
        match config.weight_quantizer {
            WeightQuantizer::Ternary | WeightQuantizer::Binary => {
                let (tensor, bytes) = source.ternary(&name, rows, cols, layout)?;
                parts.ternary += bytes;
                Ok::<_, EngineError>(tensor)
            }
            WeightQuantizer::None => {
                let tensor = source.dense_linear(&format!("{name}.weight"), rows, cols)?;
                parts.dense += tensor.range.len() as u64;
                Ok(LinearTensor::Dense(tensor))
            }
        }
    };
    let linears = [
        linear(Linear::Q)?,
        linear(Linear::K)?,
        linear(Linear::V)?,
        linear(Linear::O)?,
        linear(Linear::Gate)?,
        linear(Linear::Up)?,
        linear(Linear::Down)?,
    ];
    Ok(Layer { attention_norm, attention_sub_norm, ffn_norm, ffn_sub_norm, linears })
}

fn golden(source: &Source<'_>, config: &ModelConfig) -> Result<Option<Golden>, EngineError> {
    let tokens: Option<Vec<u32>> = source.find("golden.tokens")?;
    let logits: Option<Vec<f32>> = source.find("golden.logits")?;
    let (tokens, logits) = match (tokens, logits) {
        (None, None) => return Ok(None),
        (Some(tokens), Some(logits)) => (tokens, logits),
        (Some(_), None) => return Err(source.key("golden.logits", "is missing".into())),
        (None, Some(_)) => return Err(source.key("golden.tokens", "is missing".into())),
    };
    if tokens.is_empty() || tokens.len() > config.max_position_embeddings {
        let why = format!("{} tokens, of 1..={}", tokens.len(), config.max_position_embeddings);
        return Err(source.key("golden.tokens", why));
    }
    if let Some(token) = tokens.iter().find(|&&t| t as usize >= config.vocab_size) {
        let why = format!("token {token} is outside the vocabulary of {}", config.vocab_size);
        return Err(source.key("golden.tokens", why));
    }
    if logits.len() != config.vocab_size {
        let why = format!("{} logits for a vocabulary of {}", logits.len(), config.vocab_size);
        return Err(source.key("golden.logits", why));
    }
    Ok(Some(Golden { tokens, logits }))
}

fn tokenizer(source: &Source<'_>, config: &ModelConfig) -> Result<TokenizerSource, EngineError> {
    let reader = source.reader;
    let id = |key: &str| -> Result<Option<u32>, EngineError> {
        let id = reader.find::<u32>(key)?;
        match id {
            Some(id) if id as usize >= config.vocab_size => Err(EngineError::Key {
                file: source.file.into(),
                key: key.into(),
                why: format!("{id} is outside the vocabulary of {}", config.vocab_size),
            }),
            id => Ok(id),
        }
    };
    // A chat model ends a turn with a token of its own.
    let eos = ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"];
    let eos = eos.into_iter().map(id).collect::<Result<Vec<_>, _>>()?;
    Ok(TokenizerSource {
        json: reader.str("tokenizer.huggingface.json")?.to_owned(),
        bos: id("tokenizer.ggml.bos_token_id")?,
        eos: eos.into_iter().flatten().collect(),
        chat_template: reader.find("tokenizer.chat_template")?,
    })
}

/// A parsed file, and which of its tensors were asked for.
struct Source<'r> {
    reader: &'r Reader<'r>,
    bytes: &'r [u8],
    file: &'r str,
    seen: HashSet<String>,
}

impl Source<'_> {
    fn get<T: FromValue>(&self, key: &str) -> Result<T, EngineError> {
        Ok(self.reader.get(&format!("{ARCHITECTURE}.{key}"))?)
    }

    fn find<T: FromValue>(&self, key: &str) -> Result<Option<T>, EngineError> {
        Ok(self.reader.find(&format!("{ARCHITECTURE}.{key}"))?)
    }

    fn key(&self, key: &str, why: String) -> EngineError {
        EngineError::Key { file: self.file.into(), key: format!("{ARCHITECTURE}.{key}"), why }
    }

    fn wrong(&self, tensor: &str, why: String) -> EngineError {
        EngineError::Tensor { file: self.file.into(), tensor: tensor.into(), why }
    }

    /// The range of a tensor of one of `types` and exactly `dims`.
    fn tensor(
        &mut self,
        name: &str,
        types: &[GgmlType],
        dims: &[u64],
    ) -> Result<(GgmlType, Range<usize>), EngineError> {
        let info = self.reader.tensor(name)?;
        if info.dims != dims || !types.contains(&info.ty) {
            let types = types.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or ");
            let why = format!("expected {types} {dims:?}, found {} {:?}", info.ty, info.dims);
            return Err(self.wrong(name, why));
        }
        let range = self.reader.tensor_range(name)?;
        // The reader checked that the range lies in `bytes`, so it fits usize.
        let range = range.start as usize..range.end as usize;
        if !(self.bytes.as_ptr() as usize + range.start).is_multiple_of(ALIGNMENT) {
            let why = format!("begins at byte {}, which is not {ALIGNMENT}-aligned", range.start);
            return Err(self.wrong(name, why));
        }
        self.seen.insert(name.to_owned());
        Ok((info.ty, range))
    }

    /// A float vector, copied.
    fn norm(&mut self, name: &str, size: usize) -> Result<Vec<f32>, EngineError> {
        let (_, range) = self.tensor(name, &[GgmlType::F32], &[size as u64])?;
        let weight: Vec<f32> =
            self.bytes[range].as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        if let Some(at) = weight.iter().position(|x| !x.is_finite()) {
            return Err(self.wrong(name, format!("element {at} is {}", weight[at])));
        }
        Ok(weight)
    }

    /// A float matrix `[rows, cols]`.
    fn dense(&mut self, name: &str, rows: usize, cols: usize) -> Result<DenseTensor, EngineError> {
        self.matrix(name, rows, cols, &FLOATS)
    }

    /// The matrix of a dense linear layer: floats, or blocks of integers.
    fn dense_linear(
        &mut self,
        name: &str,
        rows: usize,
        cols: usize,
    ) -> Result<DenseTensor, EngineError> {
        let blocks = RowType::ALL.map(RowType::ggml);
        self.matrix(name, rows, cols, &[&FLOATS[..], &blocks].concat())
    }

    fn matrix(
        &mut self,
        name: &str,
        rows: usize,
        cols: usize,
        types: &[GgmlType],
    ) -> Result<DenseTensor, EngineError> {
        let (ty, range) = self.tensor(name, types, &[cols as u64, rows as u64])?;
        let stored = match (ty, RowType::of(ty)) {
            (_, Some(rows)) => Stored::Rows(rows),
            (GgmlType::F16, _) => Stored::Float(Dtype::F16),
            (GgmlType::BF16, _) => Stored::Float(Dtype::Bf16),
            _ => Stored::Float(Dtype::F32),
        };
        Ok(DenseTensor { range, cols, stored })
    }

    /// A packed matrix `[rows, cols]` with its scale, and the bytes of both.
    fn ternary(
        &mut self,
        name: &str,
        rows: usize,
        cols: usize,
        layout: Layout,
    ) -> Result<(LinearTensor, u64), EngineError> {
        let dims = [layout.row_bytes(cols) as u64, rows as u64];
        let (_, range) = self.tensor(&format!("{name}.weight"), &[GgmlType::I8], &dims)?;
        let scale_name = format!("{name}.scale");
        let weight_scale = self.norm(&scale_name, 1)?[0];
        if weight_scale <= 0.0 {
            return Err(self.wrong(&scale_name, format!("a scale of {weight_scale}")));
        }
        let bytes = range.len() as u64 + 4;
        Ok((LinearTensor::Ternary { range, cols, weight_scale }, bytes))
    }

    /// No tensor may be left: one that is ignored would change the model.
    fn refuse_foreign(&self) -> Result<(), EngineError> {
        match self.reader.tensors().iter().find(|t| !self.seen.contains(&t.name)) {
            Some(t) => {
                let why = "does not belong to a model of this configuration".to_owned();
                Err(self.wrong(&t.name, why))
            }
            None => Ok(()),
        }
    }
}

/// Reads every weight; see [`crate::Model::verify`].
pub(crate) fn verify(model: &Inner) -> Result<(), EngineError> {
    let wrong =
        |tensor: String, why: String| EngineError::Tensor { file: model.file.clone(), tensor, why };
    let dense = |tensor: &str, rows: DenseRows<'_>, cols: usize| match first_not_finite(rows) {
        Some(at) => {
            let (row, col) = (at / cols, at % cols);
            Err(wrong(tensor.into(), format!("row {row}, column {col} is not finite")))
        }
        None => Ok(()),
    };
    let weights = &model.weights;
    dense("token_embd.weight", model.dense(&weights.embedding), weights.embedding.cols)?;
    if let Some(head) = &weights.head {
        dense("output.weight", model.dense(head), head.cols)?;
    }
    let mut trits = Vec::new();
    for layer in 0..weights.layers.len() {
        for linear in Linear::ALL {
            let name = || format!("{}.weight", linear.gguf(layer));
            match model.linear(layer, linear) {
                LinearRef::Dense { rows, cols } => dense(&name(), rows, cols)?,
                LinearRef::Ternary(w) => {
                    trits.resize(w.cols, 0i8);
                    let rows = w.bytes.chunks_exact(w.layout.row_bytes(w.cols));
                    for (row, bytes) in rows.enumerate() {
                        w.layout
                            .unpack_row(bytes, &mut trits)
                            .map_err(|e| wrong(name(), format!("row {row}: {e}")))?;
                    }
                }
            }
        }
    }
    Ok(())
}

fn first_not_finite(rows: DenseRows<'_>) -> Option<usize> {
    match rows {
        DenseRows::F32(x) => x.iter().position(|x| !x.is_finite()),
        DenseRows::F16(x) => x.iter().position(|x| !x.is_finite()),
        DenseRows::Bf16(x) => x.iter().position(|x| !x.is_finite()),
        DenseRows::Int8(x) => first_scale(x.iter().map(|b| [b[0], b[1]])),
        DenseRows::Int4(x) => first_scale(x.iter().map(|b| [b[0], b[1]])),
    }
}

/// The first element of the first block whose scale is not finite.
fn first_scale(mut scales: impl Iterator<Item = [u8; 2]>) -> Option<usize> {
    scales.position(|s| !f16::from_le_bytes(s).is_finite()).map(|block| block * ROW_BLOCK)
}

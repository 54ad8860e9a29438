//! Writing: the keys, then each tensor quantised, packed and streamed.

use std::io::Write;

use bitnet_core::{Dtype, ModelConfig, TernaryMatrix};
use bitnet_format::gguf::{GgmlType, GgufError, Header, Writer};
use bitnet_format::hf::SpecialTokens;
use bitnet_format::tokenizer::GgufTokenizer;

use crate::plan::{Form, Item, Plan};
use crate::source::{Golden, Source};
use crate::{ExportError, Step};

/// `general.architecture`, and the prefix of our own keys.
pub(crate) const ARCHITECTURE: &str = "bitnet-packed";
/// The version of the keys and layouts.
const FORMAT_VERSION: u32 = 1;
/// Alignment of every tensor: a block of packed weights, a cache line.
const ALIGNMENT: u64 = 64;
/// Elements of a float tensor that are converted at a time.
pub(crate) const CHUNK: usize = 1 << 20;

/// What the keys of a file say besides its tensors.
pub(crate) struct Keys<'k> {
    pub(crate) config: &'k ModelConfig,
    pub(crate) name: &'k str,
    pub(crate) golden: Option<&'k Golden>,
    pub(crate) tokenizer: &'k GgufTokenizer,
    pub(crate) special: SpecialTokens,
    pub(crate) chat_template: Option<&'k str>,
}

/// The keys and the tensor directory.
pub(crate) fn header(keys: &Keys<'_>, plan: &Plan) -> Result<Header, ExportError> {
    let mut h = Header::new("the packed file", ALIGNMENT)?;
    h.put("general.architecture", ARCHITECTURE)?;
    h.put("general.name", keys.name)?;
    h.put("general.parameter_count", plan.parameters())?;
    put_config(&mut h, keys.config, plan)?;
    if let Some(golden) = keys.golden {
        h.put(&own("golden.tokens"), &golden.tokens[..])?;
        h.put(&own("golden.logits"), &golden.logits[..])?;
    }
    keys.tokenizer.put(&mut h, keys.special, keys.chat_template)?;
    for item in &plan.items {
        let (dims, ty) = item.directory(plan.layout);
        h.tensor(&item.weight(), &dims, ty)?;
        if item.form == Form::Ternary {
            h.tensor(&item.scale(), &[1], GgmlType::F32)?;
        }
    }
    Ok(h)
}

fn own(key: &str) -> String {
    format!("{ARCHITECTURE}.{key}")
}

fn put_config(h: &mut Header, c: &ModelConfig, plan: &Plan) -> Result<(), GgufError> {
    // Validated: every size is at most 2^28.
    for (key, value) in [
        ("format_version", FORMAT_VERSION as usize),
        ("vocab_size", c.vocab_size),
        ("context_length", c.max_position_embeddings),
        ("embedding_length", c.hidden_size),
        ("block_count", c.num_hidden_layers),
        ("feed_forward_length", c.intermediate_size),
        ("attention.head_count", c.num_attention_heads),
        ("attention.head_count_kv", c.num_key_value_heads),
        ("attention.key_length", c.head_dim()),
    ] {
        h.put(&own(key), value as u32)?;
    }
    h.put(&own("attention.layer_norm_rms_epsilon"), c.rms_norm_eps)?;
    h.put(&own("rope.freq_base"), c.rope_theta)?;
    h.put(&own("hidden_act"), c.hidden_act.name())?;
    h.put(&own("sub_norms"), c.sub_norms)?;
    h.put(&own("tie_word_embeddings"), c.tie_word_embeddings)?;
    h.put(&own("weight_quantizer"), c.weight_quantizer.name())?;
    h.put(&own("layout"), plan.layout.name())
}

/// The data of every tensor.
pub(crate) fn write<W: Write>(
    source: &Source,
    plan: &Plan,
    out: &mut Writer<W>,
    step: &mut Step<'_>,
) -> Result<(), ExportError> {
    for item in &plan.items {
        match item.form {
            Form::Ternary => {
                let weights = source.checkpoint.read(&item.hf)?;
                check_finite(source, item, 0, &weights, Dtype::F32)?;
                let packed =
                    TernaryMatrix::quantize(plan.layout, item.rows, item.cols, &weights)
                        .map_err(|e| ExportError::Matrix { tensor: item.hf.clone(), source: e })?;
                out.write(&item.weight(), &packed.bytes)?;
                out.write(&item.scale(), &packed.weight_scale.to_le_bytes())?;
                step.add(item.elements())?;
            }
            Form::Float(dtype) => {
                let name = item.weight();
                for_chunks(source, item, |first, values| {
                    check_finite(source, item, first, values, dtype)?;
                    out.write(&name, &encode(values, dtype))?;
                    step.add(values.len())
                })?;
            }
        }
    }
    Ok(())
}

/// Goes through a tensor of the checkpoint in pieces of [`CHUNK`] elements;
/// `each` gets the first element's index and the values.
pub(crate) fn for_chunks(
    source: &Source,
    item: &Item,
    mut each: impl FnMut(usize, &[f32]) -> Result<(), ExportError>,
) -> Result<(), ExportError> {
    let total = item.elements();
    let mut values = vec![0.0; CHUNK.min(total)];
    for first in (0..total).step_by(CHUNK) {
        let values = &mut values[..CHUNK.min(total - first)];
        source.checkpoint.read_at(&item.hf, first, values)?;
        each(first, values)?;
    }
    Ok(())
}

/// The bytes of values in the type they are stored in, ties to even.
pub(crate) fn encode(values: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect(),
        Dtype::Bf16 => values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect(),
    }
}

/// Refuses NaN and infinity, before or after rounding to `dtype`.
fn check_finite(
    source: &Source,
    item: &Item,
    first: usize,
    values: &[f32],
    dtype: Dtype,
) -> Result<(), ExportError> {
    let fits = |x: f32| match dtype {
        Dtype::F32 => x.is_finite(),
        Dtype::F16 => half::f16::from_f32(x).is_finite(),
        Dtype::Bf16 => half::bf16::from_f32(x).is_finite(),
    };
    match values.iter().position(|&x| !fits(x)) {
        None => Ok(()),
        Some(at) => Err(ExportError::NotFinite {
            path: source.folder().into(),
            tensor: item.hf.clone(),
            at: item.position(first + at),
            value: values[at],
            dtype: dtype.name(),
        }),
    }
}

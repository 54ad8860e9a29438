//! Hugging Face folders: what transformers loads.

use std::path::{Path, PathBuf};

use bitnet_core::{Dtype, WeightQuantizer};
use bitnet_format::atomic::{AtomicDir, write_atomic};
use bitnet_format::hf::{Stored, TensorFileWriter, Trits, to_json};
use bitnet_format::pack::{self, Form, Item, Keys, Plan, encode, rounded};
use half::bf16;
use serde_json::{Value, json};

use super::{Sink, Unnamed, no_rows};
use crate::ExportError;
use crate::error::Named;
use crate::format::Format;

/// A folder that is being filled.
pub(super) struct Folder {
    folder: AtomicDir,
    out: TensorFileWriter,
    format: Format,
    tensors: u64,
}

impl Folder {
    pub(super) fn create(
        format: Format,
        dst: &Path,
        keys: &Keys<'_>,
        plan: &Plan,
    ) -> Result<Self, ExportError> {
        let folder = AtomicDir::create(dst).named(dst)?;
        let put = |name: &str, text: &str| {
            let path = folder.path().join(name);
            write_atomic(&path, |w| std::io::Write::write_all(w, text.as_bytes())).named(&path)
        };
        put("config.json", &pretty(&config(format, keys)))?;
        put("tokenizer.json", &keys.tokenizer.json)?;
        put("tokenizer_config.json", &pretty(&tokenizer_config(keys)))?;
        put(
            "generation_config.json",
            &pretty(&json!({
                "bos_token_id": keys.special.bos,
                "eos_token_id": eos(keys),
            })),
        )?;
        if let Some(template) = keys.chat_template {
            put("chat_template.jinja", template)?;
        }
        if let Some(golden) = keys.golden {
            let golden = json!({ "tokens": golden.tokens, "logits": golden.logits });
            put("golden.json", &golden.to_string())?;
        }
        let mut all = Vec::new();
        for item in &plan.items {
            let dims = if item.is_vector { vec![item.cols] } else { vec![item.rows, item.cols] };
            match (item.form, format) {
                (Form::Float(dtype), _) => {
                    all.push((item.hf.clone(), dims, Stored::Float(stored(format, dtype))));
                }
                (Form::Rows(_), _) => return Err(no_rows(format, item)),
                (Form::Ternary, Format::HfPacked) => {
                    let rows = item.rows.div_ceil(4);
                    all.push((item.hf.clone(), vec![rows, item.cols], Stored::U8));
                    all.push((scale(item), vec![1], Stored::Float(Dtype::F32)));
                }
                (Form::Ternary, _) => {
                    all.push((item.hf.clone(), dims, Stored::Float(Dtype::Bf16)));
                }
            }
        }
        let tensors = all.len() as u64;
        let path: PathBuf = folder.path().join("model.safetensors");
        let out = TensorFileWriter::with_types(path, &[], all)?;
        Ok(Self { folder, out, format, tensors })
    }
}

impl pack::Sink for Folder {
    type Error = ExportError;

    fn ternary(&mut self, item: &Item, trits: &Trits) -> Result<(), ExportError> {
        if self.format == Format::HfPacked {
            self.out.write_bytes(&item.hf, &quarters(item, &trits.values))?;
            return Ok(self.out.write_bytes(&scale(item), &trits.scale.to_le_bytes())?);
        }
        Ok(self.out.write_bytes(&item.hf, &masters(trits))?)
    }

    fn floats(&mut self, item: &Item, dtype: Dtype, values: &[f32]) -> Result<(), ExportError> {
        let rounded: Vec<f32> = values.iter().map(|x| rounded(*x, dtype)).collect();
        Ok(self.out.write_bytes(&item.hf, &encode(&rounded, stored(self.format, dtype)))?)
    }

    fn blocks(&mut self, item: &Item, _: &[u8]) -> Result<(), ExportError> {
        Err(no_rows(self.format, item))
    }
}

impl Sink for Folder {
    fn finish(self: Box<Self>) -> Result<Unnamed, ExportError> {
        self.out.commit()?;
        Ok(Unnamed::Folder(self.folder))
    }

    fn ternary_bytes(&self, item: &Item) -> u64 {
        match self.format {
            Format::HfPacked => (item.rows.div_ceil(4) * item.cols) as u64 + 4,
            _ => 2 * item.elements() as u64,
        }
    }

    fn tensors(&self) -> u64 {
        self.tensors
    }
}

/// The type in which floats that were rounded to `dtype` are stored. Beside
/// packed weights transformers casts nothing and wants all floats, scales too, in
/// one type: the one that loses no bit of any.
fn stored(format: Format, dtype: Dtype) -> Dtype {
    if format == Format::HfPacked { Dtype::F32 } else { dtype }
}

fn scale(item: &Item) -> String {
    format!("{}_scale", item.hf)
}

/// Row `r + i · ⌈rows / 4⌉` in bits `2i` of the bytes of row `r`, as codes.
fn quarters(item: &Item, values: &[i8]) -> Vec<u8> {
    let quarter = item.rows.div_ceil(4);
    let mut out = vec![0u8; quarter * item.cols];
    for (row, trits) in values.chunks_exact(item.cols).enumerate() {
        let (i, r) = (row / quarter, row % quarter);
        for (byte, t) in out[r * item.cols..].iter_mut().zip(trits) {
            *byte |= ((t + 1) as u8) << (2 * i);
        }
    }
    out
}

/// Master weights in bf16 that quantise to these ternary values and, up to the
/// rounding of a mean, this scale: the weights that are not zero have the
/// magnitude `scale / share of them`, so that the mean of all is the scale. It is
/// met by the right share of the next bf16 below and above.
fn masters(trits: &Trits) -> Vec<u8> {
    let nonzero = trits.values.iter().filter(|t| **t != 0).count().max(1);
    let wanted = f64::from(trits.scale) * trits.values.len() as f64 / nonzero as f64;
    // Cut, not rounded: positive, so the next pattern is the next value.
    let low = bf16::from_bits(((wanted as f32).to_bits() >> 16) as u16);
    let high = bf16::from_bits(low.to_bits() + 1);
    let step = high.to_f64() - low.to_f64();
    let share = ((wanted - low.to_f64()) / step).clamp(0.0, 1.0);
    let mut due = 0.0;
    let value = |&t: &i8| {
        if t == 0 {
            return bf16::ZERO;
        }
        due += share;
        let mut magnitude = low;
        if due >= 0.5 {
            due -= 1.0;
            magnitude = high;
        }
        if t < 0 { -magnitude } else { magnitude }
    };
    trits.values.iter().map(value).flat_map(bf16::to_le_bytes).collect()
}

fn pretty(json: &Value) -> String {
    format!("{json:#}\n")
}

fn eos(keys: &Keys<'_>) -> Value {
    match (keys.special.eos, keys.eot) {
        (Some(eos), Some(eot)) => json!([eos, eot]),
        (eos, _) => eos.into(),
    }
}

fn config(format: Format, keys: &Keys<'_>) -> Value {
    let mut json = to_json(keys.config, keys.special);
    json["eos_token_id"] = eos(keys);
    if format == Format::HfPacked {
        json["quantization_config"]["quantization_mode"] = "offline".into();
    } else if keys.config.weight_quantizer == WeightQuantizer::None {
        json["dtype"] = "bfloat16".into();
        json["torch_dtype"] = "bfloat16".into();
    }
    json
}

fn tokenizer_config(keys: &Keys<'_>) -> Value {
    let text = |id: Option<u32>| id.and_then(|id| keys.tokenizer.tokens.get(id as usize));
    let mut json = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": text(keys.special.bos),
        "eos_token": text(keys.special.eos),
        "model_max_length": keys.config.max_position_embeddings,
        "clean_up_tokenization_spaces": false,
    });
    if let Some(template) = keys.chat_template {
        json["chat_template"] = template.into();
    }
    json
}

#[cfg(test)]
mod tests {
    use bitnet_core::ternary;

    use super::*;

    #[test]
    fn bf16_masters_quantise_to_what_they_were_made_of() {
        let mut state = 7u32;
        let values: Vec<i8> = (0..4096)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as i8 % 2
            })
            .collect();
        assert!([-1, 0, 1].iter().all(|t| values.contains(t)));
        for scale in [0.02317f32, 1.0, 3.3e-4] {
            let bytes = masters(&Trits { values: values.clone(), scale });
            let floats: Vec<f32> =
                bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect();
            let (back, found) = ternary::quantize_weights(&floats, 64);
            assert_eq!(back, values);
            assert!((found / scale - 1.0).abs() < 1e-5, "{found} {scale}");
        }
    }
}

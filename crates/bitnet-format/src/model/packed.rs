//! A packed file of our own.

use std::path::Path;

use bitnet_core::names::{Linear, Tensor};
use bitnet_core::{Layout, WeightQuantizer, WeightScheme};

use super::gguf_file::GgufFile;
use super::{
    Facts, Linears, ModelError, OpenOptions, Source, Text, check_golden, given_tokenizer, keys,
    quantise_later, quantised, refuse_for_gguf,
};
use crate::gguf::blocks::RowType;
use crate::gguf::{Directory, GgmlType, GgufError, blocks};
use crate::hf::Trits;
use crate::tokenizer::{CHAT_TEMPLATE_KEY, HUGGINGFACE_KEY, special_tokens};

/// An open packed file.
pub(super) struct Packed {
    file: GgufFile,
    layout: Layout,
    facts: Facts,
}

impl Packed {
    pub(super) fn new(file: GgufFile, options: &OpenOptions) -> Result<Self, ModelError> {
        refuse_for_gguf(&file.path, options)?;
        let dir = file.directory()?;
        let (mut config, layout) = keys::own_config(&dir)?;
        config.embedding_dtype = file.dtype("token_embd.weight");
        config
            .validate()
            .map_err(|source| ModelError::Config { path: file.path.clone(), source })?;
        let golden = keys::own_golden(&dir)?;
        if let Some(golden) = &golden {
            check_golden(golden, &config).map_err(|e| GgufError::Invalid {
                file: file.name.clone(),
                what: format!("golden logits: {e}"),
            })?;
        }
        let text = text(&file, &dir, options)?;
        let name = dir.find("general.name")?.unwrap_or_else(|| "model".to_owned());
        check_tensors(&file, &config, layout)?;
        let first = Tensor::Linear(0, Linear::Q).gguf();
        let linear_dtype = file.dtype(&first);
        let types = Linear::ALL.iter().filter_map(|l| file.find(&Tensor::Linear(0, *l).gguf()));
        let linear_rows = types.filter_map(|t| RowType::of(t.ty)).next();
        let stored = match config.weight_quantizer {
            WeightQuantizer::Ternary | WeightQuantizer::Binary => Linears::Trits,
            WeightQuantizer::None => Linears::Floats,
        };
        drop(dir);
        let linears = quantise_later(&file.path, options, &mut config, stored)?;
        let golden = golden.filter(|_| !options.ptq);
        let kind = "packed model".to_owned();
        let facts = Facts { kind, config, linears, linear_dtype, linear_rows, name, text, golden };
        let mut file = file;
        file.forget_head();
        Ok(Self { file, layout, facts })
    }
}

/// Tokenizer and chat template.
fn text(file: &GgufFile, dir: &Directory<'_>, options: &OpenOptions) -> Result<Text, ModelError> {
    if options.without_text {
        return Ok(Text::default());
    }
    let (tokenizer, tokenizer_file) = match given_tokenizer(options)? {
        Some(given) => given,
        None => (dir.get(HUGGINGFACE_KEY)?, format!("{}: key {HUGGINGFACE_KEY}", file.name)),
    };
    Ok(Text {
        tokenizer,
        tokenizer_file,
        special: special_tokens(dir)?,
        eot: dir.find("tokenizer.ggml.eot_token_id")?,
        chat_template: dir.find(CHAT_TEMPLATE_KEY)?,
    })
}

/// Every tensor is there, in its shape and a type that is read.
fn check_tensors(
    file: &GgufFile,
    config: &bitnet_core::ModelConfig,
    layout: Layout,
) -> Result<(), ModelError> {
    let floats = [GgmlType::F32, GgmlType::F16, GgmlType::BF16];
    let dense = [&floats[..], &RowType::ALL.map(RowType::ggml)].concat();
    for tensor in Tensor::all(config) {
        let info = file.tensor(&tensor.gguf())?;
        let mut dims: Vec<u64> = tensor.dims(config).iter().rev().map(|d| *d as u64).collect();
        let mut types = match tensor {
            Tensor::Linear(..) => &dense[..],
            _ => &floats[..],
        };
        if let (Tensor::Linear(layer, linear), WeightQuantizer::Ternary) =
            (tensor, config.weight_quantizer)
        {
            dims[0] = layout.row_bytes(linear.shape(config)[1]) as u64;
            types = &[GgmlType::I8];
            let scale = file.tensor(&scale_name(layer, linear))?;
            if (scale.ty, &scale.dims[..]) != (GgmlType::F32, &[1]) {
                return Err(wrong(file, &scale.name, "expected F32 [1]".into()));
            }
        }
        if info.dims != dims || !types.contains(&info.ty) {
            let what = format!("expected {dims:?}, found {} {:?}", info.ty, info.dims);
            return Err(wrong(file, &info.name, what));
        }
    }
    Ok(())
}

fn wrong(file: &GgufFile, tensor: &str, what: String) -> ModelError {
    ModelError::Invalid { path: file.path.clone(), what: format!("tensor {tensor}: {what}") }
}

fn scale_name(layer: usize, linear: Linear) -> String {
    format!("{}.scale", linear.gguf(layer))
}

impl Source for Packed {
    fn path(&self) -> &Path {
        &self.file.path
    }

    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn floats(&self, tensor: Tensor, first: usize, out: &mut [f32]) -> Result<(), ModelError> {
        let name = tensor.gguf();
        let ty = self.file.tensor(&name)?.ty;
        let cols = tensor.shape(&self.facts.config)[1];
        let width = ty.tensor_bytes(&[cols as u64]).unwrap_or(0);
        let mut bytes = vec![0; out.len() / cols * width as usize];
        self.file.read(&name, first as u64 * width, &mut bytes)?;
        blocks::decode(ty, &bytes, out).map_err(|source| ModelError::Block {
            path: self.file.path.clone(),
            tensor: name,
            source,
        })
    }

    fn ternary(&self, tensor: Tensor) -> Result<Trits, ModelError> {
        let (Tensor::Linear(layer, linear), Linears::Trits) = (tensor, self.facts.linears) else {
            return quantised(self, tensor, WeightScheme::B158);
        };
        let [rows, cols] = linear.shape(&self.facts.config);
        let mut scale = [0; 4];
        let scale_name = scale_name(layer, linear);
        self.file.read(&scale_name, 0, &mut scale)?;
        let scale = f32::from_le_bytes(scale);
        if !(scale > 0.0 && scale.is_finite()) {
            return Err(wrong(&self.file, &scale_name, format!("a scale of {scale}")));
        }
        let name = tensor.gguf();
        let bytes = self.file.read_all(&name)?;
        let mut values = vec![0i8; rows * cols];
        let packed = bytes.chunks_exact(self.layout.row_bytes(cols));
        for (row, out) in packed.zip(values.chunks_exact_mut(cols)) {
            self.layout.unpack_row(row, out).map_err(|source| ModelError::Matrix {
                path: self.file.path.clone(),
                tensor: name.clone(),
                source,
            })?;
        }
        Ok(Trits { values, scale })
    }
}

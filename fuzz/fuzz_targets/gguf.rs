//! A GGUF file: its directory, the data of every tensor, the vocabulary in it, and
//! the model that it says it is.
#![no_main]

use std::sync::LazyLock;

use bitnet_format::gguf::blocks::{self, I2sLayout};
use bitnet_format::gguf::{GgmlType, Reader};
use bitnet_format::model::tokenizer_json;
use bitnet_format::tokenizer::{GgufTokenizer, special_tokens};
use bitnet_fuzz::{bounded, read_model, scratch};
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

static FOLDER: LazyLock<TempDir> = LazyLock::new(scratch);

fuzz_target!(|bytes: &[u8]| {
    let path = FOLDER.path().join("model.gguf");
    std::fs::write(&path, bytes).expect("room for the input");
    bounded(bytes.len(), || {
        if let Ok(reader) = Reader::parse(bytes, "input") {
            look_at(&reader);
        }
        let _ = read_model(&path);
    });
});

fn look_at(reader: &Reader<'_>) {
    for (_, value) in reader.metadata() {
        let _ = (value.describe(), value.to_string());
    }
    for tensor in reader.tensors() {
        let Ok(data) = reader.tensor_data(&tensor.name) else { continue };
        let elements = tensor.elements() as usize;
        if matches!(tensor.ty, GgmlType::I2_S | GgmlType::TQ1_0 | GgmlType::TQ2_0) {
            for layout in I2sLayout::ALL {
                let _ = blocks::decode_ternary(tensor.ty, data, elements, layout);
            }
        }
        // A tensor without bytes can state any number of elements.
        if elements <= 8 * data.len() {
            let _ = blocks::decode(tensor.ty, data, &mut vec![0.0; elements]);
        }
    }
    let _ = special_tokens(reader);
    if let Ok(json) = tokenizer_json(reader) {
        let tokens = reader.get::<Vec<String>>("tokenizer.ggml.tokens").unwrap_or_default();
        let _ = GgufTokenizer::parse(&json, tokens.len(), "input");
    }
    let _ = GgufTokenizer::from_gguf(reader);
}

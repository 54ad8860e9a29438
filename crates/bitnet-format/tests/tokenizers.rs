//! Vocabularies that GGUF files embed, made into tokenizers, give a thousand
//! lines of mixed text (code, CJK, emoji, control characters) the ids that
//! Hugging Face's tokenizers, Google's sentencepiece and (`default`) llama.cpp give
//! them. (`fixtures/tokenizers/make*.py` write files and ids.)

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use bitnet_format::gguf::Reader;
use bitnet_format::model::tokenizer_json;
use bitnet_format::tokenizer::GgufTokenizer;

/// FNV-1a of ids as little-endian u32.
fn hash(ids: &[u32]) -> String {
    let bytes = ids.iter().flat_map(|id| id.to_le_bytes());
    let hash = bytes
        .fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    format!("{hash:016x}")
}

#[test]
fn ids_are_those_of_other_tools() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizers");
    let text = fs::read_to_string(folder.join("lines.json")).unwrap();
    let lines: Vec<String> = serde_json::from_str(&text).unwrap();
    assert_eq!(lines.len(), 1000);
    for kind in ["llama-bpe", "gpt-2", "default", "sentencepiece"] {
        let bytes = fs::read(folder.join(format!("{kind}.gguf"))).unwrap();
        let reader = Reader::parse(&bytes, kind).unwrap();
        let json = tokenizer_json(&reader).unwrap();
        let vocab = reader.get::<Vec<String>>("tokenizer.ggml.tokens").unwrap().len();
        // What is written to a GGUF file again is what was read.
        let again = GgufTokenizer::parse(&json, vocab, kind).unwrap();
        assert_eq!(again.tokens, reader.get::<Vec<String>>("tokenizer.ggml.tokens").unwrap());
        let types = reader.get::<Vec<i32>>("tokenizer.ggml.token_type").unwrap();
        assert_eq!(again.token_types, types, "{kind}");
        assert_eq!(again.scores.is_some(), kind == "sentencepiece");
        assert_eq!(again.add_bos, ["llama-bpe", "sentencepiece"].contains(&kind));
        let mut tokenizer = tokenizers::Tokenizer::from_bytes(&json).unwrap();
        // Names of special tokens in a text are text.
        tokenizer.set_encode_special_tokens(kind == "sentencepiece");
        let want = fs::read_to_string(folder.join(format!("{kind}.ids"))).unwrap();
        let mut wrong = Vec::new();
        for (line, want) in lines.iter().zip(want.lines()) {
            let encoding = tokenizer.encode(line.as_str(), true).unwrap();
            if hash(encoding.get_ids()) != want {
                wrong.push((line, encoding.get_tokens().to_vec()));
            }
        }
        let shown = &wrong[..wrong.len().min(5)];
        assert!(wrong.is_empty(), "{kind}: {} lines differ: {shown:?}", wrong.len());
    }
}

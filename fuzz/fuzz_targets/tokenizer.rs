//! A `tokenizer.json` on its way into a GGUF file and back. The first two bytes
//! are the size of the vocabulary.
#![no_main]

use bitnet_format::gguf::{Header, Reader, Writer};
use bitnet_format::hf::SpecialTokens;
use bitnet_format::tokenizer::GgufTokenizer;
use bitnet_fuzz::bounded;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Some((&size, text)) = bytes.split_first_chunk() else { return };
    let Ok(json) = std::str::from_utf8(text) else { return };
    let vocab_size = usize::from(u16::from_le_bytes(size));
    bounded(json.len() + vocab_size, || {
        let Ok(tokenizer) = GgufTokenizer::parse(json, vocab_size, "input") else { return };
        assert_eq!(tokenizer.tokens.len(), vocab_size);
        let mut header = Header::new("output", 64).expect("an alignment");
        let special = SpecialTokens { bos: Some(0), eos: None };
        tokenizer.put(&mut header, special, None).expect("new keys");
        let bytes = Writer::start(Vec::new(), header).and_then(Writer::finish).expect("a file");
        let reader = Reader::parse(&bytes, "output").expect("what was written");
        let back = GgufTokenizer::from_gguf(&reader).expect("what was written");
        assert_eq!(back, tokenizer);
    });
});

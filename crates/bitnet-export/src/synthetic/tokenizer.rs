//! The tokenizer of a synthetic model: one token for each byte and one that
//! ends a text, as `bitnet-data` trains them before the first merge. The other
//! tokens of the vocabulary have no text.

use bitnet_format::byte_level;
use bitnet_format::hf::SpecialTokens;
use bitnet_format::tokenizer::{GgufTokenizer, TokenizerError};
use serde_json::{Map, Value, json};

/// The smallest vocabulary: the bytes and the end of a text.
pub(crate) const MIN_VOCAB: usize = 257;

/// The one special token, id 0.
const END_OF_TEXT: &str = "<|endoftext|>";

pub(crate) const SPECIAL: SpecialTokens = SpecialTokens { bos: None, eos: Some(0) };

/// The tokenizer for a vocabulary of at least [`MIN_VOCAB`] tokens.
pub(crate) fn bytes_only(vocab_size: usize) -> Result<GgufTokenizer, TokenizerError> {
    // The alphabet's characters, all below U+0144, in the order of their bytes.
    let mut alphabet: Vec<(u8, char)> =
        ('\0'..='\u{143}').filter_map(|c| byte_level::byte_of(c).map(|byte| (byte, c))).collect();
    alphabet.sort_unstable();
    let mut vocab: Map<String, Value> = alphabet
        .into_iter()
        .map(|(byte, c)| (c.to_string(), (u32::from(byte) + 1).into()))
        .collect();
    vocab.insert(END_OF_TEXT.into(), 0.into());
    let json = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [{
            "id": 0, "content": END_OF_TEXT, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true,
        }],
        "normalizer": null,
        "pre_tokenizer": {
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": true,
        },
        "post_processor": null,
        "decoder": {
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": true,
        },
        "model": { "type": "BPE", "vocab": vocab, "merges": [] },
    });
    GgufTokenizer::parse(&json.to_string(), vocab_size, "the synthetic tokenizer")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_a_token() {
        let t = bytes_only(300).unwrap();
        assert_eq!((t.tokens.len(), t.merges.len()), (300, 0));
        assert_eq!(t.tokens[0], END_OF_TEXT);
        for byte in 0..=255u8 {
            let token = &t.tokens[usize::from(byte) + 1];
            assert_eq!(byte_level::bytes_of(token), Some(vec![byte]));
        }
        assert!(bytes_only(MIN_VOCAB).is_ok() && bytes_only(MIN_VOCAB - 1).is_err());
    }
}

//! The tokenizer that a model file carries: text to ids, ids to bytes.

use std::collections::HashSet;
use std::fmt;

use bitnet_format::byte_level;
use tokenizers::decoders::DecoderWrapper;

use crate::error::EngineError;

/// A tokenizer, ready to use.
#[derive(Clone)]
pub struct Tokenizer {
    /// Reads the names of special tokens as plain text.
    plain: tokenizers::Tokenizer,
    /// Reads them as the special tokens.
    special: tokenizers::Tokenizer,
    /// The bytes of every id; empty for ids that no token has.
    bytes: Vec<Box<[u8]>>,
    special_ids: HashSet<u32>,
    bos: Option<u32>,
    eos: Vec<u32>,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("tokens", &self.bytes.len())
            .field("bos", &self.bos)
            .field("eos", &self.eos)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Reads a `tokenizer.json` for a model of `vocab_size` tokens.
    ///
    /// # Errors
    /// Why it cannot be used, as text.
    pub(crate) fn from_json(
        json: &str,
        bos: Option<u32>,
        eos: &[u32],
        vocab_size: usize,
    ) -> Result<Self, String> {
        let mut special = parse(json).map_err(|e| format!("cannot be read: {e}"))?;
        special.with_truncation(None).map_err(|e| e.to_string())?;
        special.with_padding(None);
        let byte_level = match special.get_decoder() {
            Some(DecoderWrapper::ByteLevel(_)) => true,
            // A decoder that joins pieces is SentencePiece's.
            Some(DecoderWrapper::Sequence(_) | DecoderWrapper::Metaspace(_)) => false,
            other => {
                let kind = serde_name(other);
                return Err(format!("decoder {kind} is not supported: byte-level ones are"));
            }
        };
        let added = special.get_added_tokens_decoder();
        let mut bytes = vec![Box::default(); vocab_size];
        for (token, id) in special.get_vocab(true) {
            let slot = bytes.get_mut(id as usize).ok_or_else(|| {
                format!("token {token:?} has id {id}, the model has {vocab_size} tokens")
            })?;
            let as_is = added.contains_key(&id);
            *slot = token_bytes(&token, as_is, byte_level).into_boxed_slice();
        }
        let special_ids = added.iter().filter(|(_, t)| t.special).map(|(id, _)| *id).collect();
        let mut plain = special.clone();
        plain.set_encode_special_tokens(true);
        Ok(Self { plain, special, bytes, special_ids, bos, eos: eos.to_vec() })
    }

    /// The ids of a text that nobody vouches for: names of special tokens in it
    /// are text like any other. Nothing is added at its ends.
    ///
    /// # Errors
    /// A text that defeats the tokenizer's patterns.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, EngineError> {
        encode(&self.plain, text, false)
    }

    /// The ids of a text in which names of special tokens stand for them, as in
    /// a chat template's output. Nothing is added at its ends.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_with_special(&self, text: &str) -> Result<Vec<u32>, EngineError> {
        encode(&self.special, text, false)
    }

    /// The ids of a prompt: as [`Tokenizer::encode`], with what the tokenizer
    /// puts around a text (usually a first token, or nothing).
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, EngineError> {
        encode(&self.plain, text, true)
    }

    /// The text of tokens, special ones left out. Bytes that are not UTF-8
    /// become U+FFFD.
    #[must_use]
    pub fn decode(&self, ids: &[u32]) -> String {
        let shown = ids.iter().filter(|id| !self.is_special(**id));
        let bytes: Vec<u8> = shown.flat_map(|&id| self.token_bytes(id)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The bytes of a token, perhaps only a part of a character; a special
    /// token's are its name, and an id that no token has has none.
    #[must_use]
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.bytes.get(id as usize).map_or(&[], |b| b)
    }

    /// The id of the token of that name.
    #[must_use]
    pub fn token_id(&self, name: &str) -> Option<u32> {
        self.special.token_to_id(name)
    }

    /// Whether a token is a mark for the model, not text.
    #[must_use]
    pub fn is_special(&self, id: u32) -> bool {
        self.special_ids.contains(&id)
    }

    /// The token that begins a text, where the file names one.
    #[must_use]
    pub fn bos_id(&self) -> Option<u32> {
        self.bos
    }

    /// The tokens that end a text (or a turn of a chat); may be none.
    #[must_use]
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos
    }

    /// Ids there can be: the model's vocabulary.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.bytes.len()
    }
}

fn parse(json: &str) -> Result<tokenizers::Tokenizer, String> {
    // The tokenizers crate panics on some faults that it meets half-way (its
    // decoders and normalizers `expect`): most are faults of the JSON.
    serde_json::from_str::<serde_json::Value>(json).map_err(|e| e.to_string())?;
    std::panic::catch_unwind(|| tokenizers::Tokenizer::from_bytes(json))
        .map_err(|_| "a part of it is malformed".to_owned())?
        .map_err(|e| e.to_string())
}

fn encode(inner: &tokenizers::Tokenizer, text: &str, add: bool) -> Result<Vec<u32>, EngineError> {
    let encoding =
        inner.encode_fast(text, add).map_err(|e| EngineError::Encode { why: e.to_string() })?;
    Ok(encoding.get_ids().to_vec())
}

/// The kind of a decoder, for an error.
fn serde_name(decoder: Option<&DecoderWrapper>) -> String {
    let Some(decoder) = decoder else { return "none".to_owned() };
    let text = format!("{decoder:?}");
    text.split(['(', ' ', '{']).next().unwrap_or_default().to_owned()
}

fn token_bytes(token: &str, as_is: bool, byte_level: bool) -> Vec<u8> {
    if as_is {
        return token.as_bytes().to_vec();
    }
    if byte_level {
        return byte_level::bytes_of(token).unwrap_or_else(|| token.as_bytes().to_vec());
    }
    // SentencePiece: `<0xNN>` is a byte, U+2581 a space.
    let hex = token.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
    if let Some(byte) = hex.and_then(|h| u8::from_str_radix(h, 16).ok()) {
        return vec![byte];
    }
    token.replace('\u{2581}', " ").into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All bytes, ` t`, ` the`, and a special token as the last id, 258.
    pub(crate) fn json() -> String {
        let mut vocab: Vec<(String, u32)> =
            (0..=255u32).map(|b| (char_of(b as u8).to_string(), b)).collect();
        vocab.push(("Ġt".to_owned(), 256));
        vocab.push(("Ġth".to_owned(), 257));
        let vocab: serde_json::Map<String, serde_json::Value> =
            vocab.into_iter().map(|(t, id)| (t, id.into())).collect();
        serde_json::json!({
            "version": "1.0",
            "added_tokens": [{
                "id": 258, "content": "<|end|>", "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true,
            }],
            "pre_tokenizer":
                {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "decoder":
                {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "vocab": vocab, "merges": ["Ġ t", "Ġt h"]},
        })
        .to_string()
    }

    fn char_of(byte: u8) -> char {
        (0..=0x400)
            .filter_map(char::from_u32)
            .find(|&c| byte_level::byte_of(c) == Some(byte))
            .unwrap()
    }

    #[test]
    fn text_comes_back_byte_for_byte() {
        let t = Tokenizer::from_json(&json(), None, &[258], 300).unwrap();
        for text in ["", "in the €uro zone\n\tthat \u{1F600}", "<|end|>", " the"] {
            let ids = t.encode(text).unwrap();
            assert_eq!(t.decode(&ids), text);
            let bytes: Vec<u8> = ids.iter().flat_map(|&id| t.token_bytes(id).to_vec()).collect();
            assert_eq!(bytes, text.as_bytes());
        }
        assert_eq!(t.encode(" the").unwrap(), [257, u32::from(b'e')]);
        assert_eq!(t.token_bytes(299), b"");
        assert_eq!(t.token_bytes(u32::MAX), b"");
    }

    #[test]
    fn special_tokens_are_told_from_their_names() {
        let t = Tokenizer::from_json(&json(), None, &[258], 300).unwrap();
        assert_eq!(t.encode_with_special("a<|end|>").unwrap(), [u32::from(b'a'), 258]);
        assert_eq!(t.encode("a<|end|>").unwrap().len(), 8);
        assert!(t.is_special(258) && !t.is_special(0));
        assert_eq!(t.decode(&[u32::from(b'a'), 258]), "a");
        assert_eq!(t.token_bytes(258), b"<|end|>");
        assert_eq!((t.token_id("<|end|>"), t.eos_ids()), (Some(258), &[258][..]));
    }

    #[test]
    fn errors_say_why() {
        let e = Tokenizer::from_json(&json(), None, &[], 258).unwrap_err();
        assert!(e.contains("\"<|end|>\" has id 258, the model has 258 tokens"), "{e}");
        assert!(Tokenizer::from_json("{", None, &[], 9).unwrap_err().contains("cannot be read"));
        // Both make the tokenizers crate panic.
        let cut = json().replacen("\"decoder\":{", "\"decoder\":{?", 1);
        assert!(Tokenizer::from_json(&cut, None, &[], 300).unwrap_err().contains("cannot be read"));
        let mut map: serde_json::Value = serde_json::from_str(&json()).unwrap();
        map["normalizer"] = serde_json::json!({"type": "Precompiled", "precompiled_charsmap": "?"});
        let e = Tokenizer::from_json(&map.to_string(), None, &[], 300).unwrap_err();
        assert!(e.contains("cannot be read"), "{e}");
        let mut none: serde_json::Value = serde_json::from_str(&json()).unwrap();
        none["decoder"] = serde_json::Value::Null;
        let e = Tokenizer::from_json(&none.to_string(), None, &[], 300).unwrap_err();
        assert!(e.contains("decoder none is not supported"), "{e}");
    }
}

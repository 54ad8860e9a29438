//! A byte-level BPE `tokenizer.json` to the tokenizer keys of a GGUF file and
//! back. The whole file is kept in one key, which is what this project reads;
//! the other keys are for tools that know GGUF only.

use std::collections::HashMap;

use serde_json::Value;

use crate::gguf::{Array, Directory, GgufError, Header};
use crate::hf::SpecialTokens;

/// The key that holds the whole `tokenizer.json`.
pub const HUGGINGFACE_KEY: &str = "tokenizer.huggingface.json";
/// The key that holds the chat template, where a model has one.
pub const CHAT_TEMPLATE_KEY: &str = "tokenizer.chat_template";

/// Token types of llama.cpp.
pub(crate) mod token_type {
    pub(crate) const NORMAL: i32 = 1;
    pub(crate) const UNKNOWN: i32 = 2;
    pub(crate) const CONTROL: i32 = 3;
    pub(crate) const USER_DEFINED: i32 = 4;
    pub(crate) const UNUSED: i32 = 5;
    pub(crate) const BYTE: i32 = 6;
}
use token_type::{BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED};

/// How LLaMA 3's tokenizer splits a text: llama.cpp's `llama-bpe`.
pub(crate) const LLAMA3_SPLIT: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// A tokenizer that has no GGUF form.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenizerError {
    /// Not JSON, or a key of another type than expected.
    #[error("{file}: {what}")]
    Invalid {
        /// What errors call the file.
        file: String,
        /// What is wrong with it.
        what: String,
    },
}

/// A tokenizer in the form of a GGUF file.
#[derive(Debug, Clone, PartialEq)]
pub struct GgufTokenizer {
    /// The whole `tokenizer.json`.
    pub json: String,
    /// The text of each token; `vocab_size` of them.
    pub tokens: Vec<String>,
    /// The type of each token, in llama.cpp's numbers.
    pub token_types: Vec<i32>,
    /// The merges, best first, as `left right`.
    pub merges: Vec<String>,
    /// llama.cpp's name of the way text is split before the merges.
    pub pre: &'static str,
    /// SentencePiece's scores, which stand for the merges; none of byte-level BPE.
    pub scores: Option<Vec<f32>>,
    /// Whether the tokenizer puts a first token before a text.
    pub add_bos: bool,
    /// Whether it puts a space before a text (SentencePiece's).
    pub add_space_prefix: bool,
}

impl GgufTokenizer {
    /// Reads a `tokenizer.json` for a model of `vocab_size` tokens; ids that it
    /// leaves free become unused tokens. `file` is what errors call it.
    ///
    /// # Errors
    /// Anything but a BPE model whose ids lie below `vocab_size`.
    pub fn parse(json: &str, vocab_size: usize, file: &str) -> Result<Self, TokenizerError> {
        let bad = |what: String| TokenizerError::Invalid { file: file.into(), what };
        let root: Value =
            serde_json::from_str(json).map_err(|e| bad(format!("not valid JSON: {e}")))?;
        let model = &root["model"];
        match model["type"].as_str() {
            Some("BPE") => {}
            // Older files leave the type out.
            None if model["merges"].is_array() => {}
            other => {
                let found = other.unwrap_or("none");
                return Err(bad(format!("key model.type: expected BPE, found {found}")));
            }
        }
        let mut ids: HashMap<usize, (String, i32)> = HashMap::new();
        let vocab = model["vocab"].as_object();
        for (text, id) in vocab.ok_or_else(|| bad("key model.vocab is missing".into()))? {
            let id = token_id(id).ok_or_else(|| bad(format!("token {text:?}: its id is {id}")))?;
            if let Some((other, _)) = ids.insert(id, (text.clone(), NORMAL)) {
                return Err(bad(format!("tokens {other:?} and {text:?} have the same id {id}")));
            }
        }
        for added in root["added_tokens"].as_array().into_iter().flatten() {
            let entry = token_id(&added["id"]).zip(added["content"].as_str());
            let (id, text) =
                entry.ok_or_else(|| bad(format!("added token {added} has no id or content")))?;
            let ty = if added["special"] == true { CONTROL } else { USER_DEFINED };
            ids.insert(id, (text.to_owned(), ty));
        }
        if let Some((id, (text, _))) = ids.iter().find(|(id, _)| **id >= vocab_size) {
            let what = format!("token {text:?} has id {id}, the model has {vocab_size} tokens");
            return Err(bad(what));
        }
        let (tokens, token_types) = (0..vocab_size)
            .map(|id| ids.remove(&id).unwrap_or_else(|| (format!("[PAD{id}]"), UNUSED)))
            .unzip();
        let (tokens, mut token_types): (Vec<String>, Vec<i32>) = (tokens, token_types);
        let merges = merges(&model["merges"]).map_err(bad)?;
        let scores = (model["byte_fallback"] == true).then(|| {
            let unknown = model["unk_token"].as_str();
            for (ty, text) in token_types.iter_mut().zip(&tokens) {
                match text.as_str() {
                    t if Some(t) == unknown => *ty = UNKNOWN,
                    t if *ty == NORMAL && is_byte_token(t) => *ty = BYTE,
                    _ => {}
                }
            }
            scores(&tokens, &merges)
        });
        let pre = pre_name(&root["pre_tokenizer"]);
        let add_bos = puts_a_token_first(&root["post_processor"]);
        let normalizer = &root["normalizer"];
        let steps = normalizer["normalizers"].as_array().map_or(&[][..], Vec::as_slice);
        let add_space_prefix =
            [normalizer].into_iter().chain(steps).any(|n| n["type"] == "Prepend");
        let json = json.into();
        Ok(Self { json, tokens, token_types, merges, pre, scores, add_bos, add_space_prefix })
    }

    /// Writes the tokenizer's keys.
    ///
    /// # Errors
    /// A key that was written before.
    pub fn put(
        &self,
        header: &mut Header,
        special: SpecialTokens,
        chat_template: Option<&str>,
    ) -> Result<(), GgufError> {
        match &self.scores {
            None => {
                header.put("tokenizer.ggml.model", "gpt2")?;
                header.put("tokenizer.ggml.merges", Array::strings(&self.merges))?;
            }
            Some(scores) => {
                header.put("tokenizer.ggml.model", "llama")?;
                header.put("tokenizer.ggml.scores", &scores[..])?;
                header.put("tokenizer.ggml.add_space_prefix", self.add_space_prefix)?;
            }
        }
        header.put("tokenizer.ggml.add_bos_token", self.add_bos)?;
        header.put("tokenizer.ggml.pre", self.pre)?;
        header.put("tokenizer.ggml.tokens", Array::strings(&self.tokens))?;
        header.put("tokenizer.ggml.token_type", &self.token_types[..])?;
        if let Some(id) = special.bos {
            header.put("tokenizer.ggml.bos_token_id", id)?;
        }
        if let Some(id) = special.eos {
            header.put("tokenizer.ggml.eos_token_id", id)?;
        }
        if let Some(template) = chat_template {
            header.put(CHAT_TEMPLATE_KEY, template)?;
        }
        header.put(HUGGINGFACE_KEY, &self.json[..])
    }

    /// Reads the tokenizer of a file that this project wrote.
    ///
    /// # Errors
    /// The key is missing or its value is no tokenizer for the tokens that the
    /// file lists.
    pub fn from_gguf(dir: &Directory<'_>) -> Result<Self, GgufError> {
        let tokens = dir.get::<Vec<String>>("tokenizer.ggml.tokens")?;
        let json = dir.str(HUGGINGFACE_KEY)?;
        let invalid = |what: String| GgufError::Invalid { file: dir.file().into(), what };
        let read = Self::parse(json, tokens.len(), &format!("key {HUGGINGFACE_KEY}"))
            .map_err(|e| invalid(e.to_string()))?;
        if let Some(id) = (0..tokens.len()).find(|&i| tokens[i] != read.tokens[i]) {
            let (a, b) = (&tokens[id], &read.tokens[id]);
            return Err(invalid(format!(
                "token {id} is {a:?} in tokenizer.ggml.tokens and {b:?} in {HUGGINGFACE_KEY}"
            )));
        }
        Ok(read)
    }
}

/// The special tokens that a file states.
///
/// # Errors
/// A key of another type.
pub fn special_tokens(dir: &Directory<'_>) -> Result<SpecialTokens, GgufError> {
    Ok(SpecialTokens {
        bos: dir.find("tokenizer.ggml.bos_token_id")?,
        eos: dir.find("tokenizer.ggml.eos_token_id")?,
    })
}

fn token_id(v: &Value) -> Option<usize> {
    v.as_u64().and_then(|v| u32::try_from(v).ok()).map(|v| v as usize)
}

/// Merges are pairs (newer files) or `left right` (older ones).
fn merges(list: &Value) -> Result<Vec<String>, String> {
    let list = list.as_array().ok_or("key model.merges is missing")?;
    list.iter()
        .map(|m| match (m.as_str(), m.as_array().map(Vec::as_slice)) {
            (Some(text), _) if text.split(' ').count() == 2 => Ok(text.to_owned()),
            (_, Some([Value::String(a), Value::String(b)]))
                if !(a.contains(' ') || b.contains(' ')) =>
            {
                Ok(format!("{a} {b}"))
            }
            _ => Err(format!("merge {m} is not two tokens without spaces")),
        })
        .collect()
}

/// Whether a post-processor (or one of a sequence of them) begins a text with a
/// special token.
fn puts_a_token_first(post: &Value) -> bool {
    let parts = post["processors"].as_array().map_or(&[][..], Vec::as_slice);
    [post].into_iter().chain(parts).any(|p| !p["single"][0]["SpecialToken"].is_null())
}

/// llama.cpp's name of a pre-tokenizer.
fn pre_name(pre: &Value) -> &'static str {
    let first = &pre["pretokenizers"][0];
    if pre["type"] == "ByteLevel" && pre["use_regex"] != false {
        "gpt-2"
    } else if first["type"] == "Split" && first["pattern"]["Regex"] == LLAMA3_SPLIT {
        "llama-bpe"
    } else {
        "default"
    }
}

/// Whether a token of SentencePiece stands for a byte: `<0x0A>`.
fn is_byte_token(text: &str) -> bool {
    let hex = text.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
    hex.is_some_and(|h| h.len() == 2 && u8::from_str_radix(h, 16).is_ok())
}

/// SentencePiece's scores from merges: minus the rank of the best merge that
/// makes a token; those that none makes come last.
fn scores(tokens: &[String], merges: &[String]) -> Vec<f32> {
    let mut rank: HashMap<String, usize> = HashMap::new();
    for (i, merge) in merges.iter().enumerate() {
        rank.entry(merge.replacen(' ', "", 1)).or_insert(i);
    }
    let last = merges.len();
    tokens.iter().map(|t| -(rank.get(t).copied().unwrap_or(last) as f32)).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::gguf::{Reader, Writer};

    fn sample() -> Value {
        json!({
            "added_tokens": [
                {"id": 4, "content": "<|end|>", "special": true},
                {"id": 5, "content": "<x>", "special": false},
            ],
            "pre_tokenizer": {"type": "ByteLevel", "use_regex": true},
            "model": {
                "type": "BPE",
                "vocab": {"a": 0, "b": 1, "ab": 2, "Ġ": 3, "<|end|>": 4},
                "merges": [["a", "b"]],
            },
        })
    }

    #[test]
    fn goes_into_a_file_and_back() {
        let text = sample().to_string();
        let t = GgufTokenizer::parse(&text, 8, "tokenizer.json").unwrap();
        assert_eq!(t.tokens, ["a", "b", "ab", "Ġ", "<|end|>", "<x>", "[PAD6]", "[PAD7]"]);
        assert_eq!(t.token_types, [1, 1, 1, 1, 3, 4, 5, 5]);
        assert_eq!((t.merges.as_slice(), t.pre), (&["a b".to_owned()][..], "gpt-2"));
        let mut header = Header::new("t.gguf", 64).unwrap();
        let special = SpecialTokens { bos: None, eos: Some(4) };
        t.put(&mut header, special, Some("{{ m }}")).unwrap();
        let bytes = Writer::start(Vec::new(), header).unwrap().finish().unwrap();
        let r = Reader::parse(&bytes, "t.gguf").unwrap();
        assert_eq!(GgufTokenizer::from_gguf(&r).unwrap(), t);
        assert_eq!(special_tokens(&r).unwrap(), special);
        assert_eq!(r.str(CHAT_TEMPLATE_KEY).unwrap(), "{{ m }}");
        assert_eq!(r.get::<Vec<i32>>("tokenizer.ggml.token_type").unwrap(), t.token_types);
        assert_eq!(r.get::<Vec<String>>("tokenizer.ggml.merges").unwrap(), ["a b"]);
    }

    #[test]
    fn old_merges_are_read() {
        let mut json = sample();
        json["model"]["merges"] = json!(["a b", "ab Ġ"]);
        json["model"]["type"] = Value::Null;
        json["pre_tokenizer"]["use_regex"] = false.into();
        let t = GgufTokenizer::parse(&json.to_string(), 6, "t").unwrap();
        assert_eq!((t.merges.len(), t.pre), (2, "default"));
    }

    #[test]
    fn errors_name_file_and_key() {
        type Edit = fn(&mut Value);
        let cases: [(Edit, &str); 7] = [
            (|j| j["model"]["type"] = "Unigram".into(), "model.type: expected BPE, found Unigram"),
            (|j| j["model"]["vocab"] = Value::Null, "key model.vocab is missing"),
            (|j| j["model"]["merges"] = Value::Null, "key model.merges is missing"),
            (|j| j["model"]["merges"][0] = json!(["a"]), "merge [\"a\"] is not two tokens"),
            (|j| j["model"]["vocab"]["z"] = json!(-1), "token \"z\": its id is -1"),
            (|j| j["model"]["vocab"]["z"] = json!(2), "have the same id 2"),
            (|j| j["added_tokens"][1]["id"] = json!(9), "id 9, the model has 8 tokens"),
        ];
        for (edit, text) in cases {
            let mut json = sample();
            edit(&mut json);
            let e = GgufTokenizer::parse(&json.to_string(), 8, "tokenizer.json").unwrap_err();
            let e = e.to_string();
            assert!(e.starts_with("tokenizer.json: ") && e.contains(text), "{e}");
        }
        assert!(GgufTokenizer::parse("{", 8, "t").unwrap_err().to_string().contains("JSON"));
    }

    #[test]
    fn a_file_that_contradicts_itself_is_refused() {
        let mut header = Header::new("t.gguf", 64).unwrap();
        header
            .put("tokenizer.ggml.tokens", Array::strings(["a", "b", "ab", "x", "y", "z"]))
            .unwrap();
        header.put(HUGGINGFACE_KEY, sample().to_string()).unwrap();
        let bytes = Writer::start(Vec::new(), header).unwrap().finish().unwrap();
        let r = Reader::parse(&bytes, "t.gguf").unwrap();
        let e = GgufTokenizer::from_gguf(&r).unwrap_err().to_string();
        assert!(e.contains("token 3 is \"x\" in tokenizer.ggml.tokens and \"Ġ\""), "{e}");
    }
}

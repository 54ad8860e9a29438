//! The vocabulary that a GGUF file embeds, as a `tokenizer.json`: byte-level BPE
//! (`gpt2`, with the pre-tokenizers `llama-bpe`, `gpt-2` and `default`) and
//! SentencePiece BPE (`llama`, with scores and byte tokens).
//!
//! Sources: llama.cpp's `llama-vocab.cpp` for what the keys mean, and the
//! converter of transformers' LLaMA tokenizers for what the JSON says.

use std::collections::{HashMap, HashSet};

use serde_json::{Map, Value, json};

use crate::gguf::{Directory, GgufError};
use crate::tokenizer::{HUGGINGFACE_KEY, LLAMA3_SPLIT, token_type};

/// llama.cpp's expressions for `default`, applied one after the other.
const DEFAULT_SPLITS: [&str; 4] = [
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
];

/// Longest token, in bytes, that is looked at for merges. SentencePiece's own
/// limit is 16 characters unless its user asks for more; a longer one would cost
/// time by the square of its length.
const MAX_MERGED: usize = 1024;

/// The space of SentencePiece.
const SPACE: &str = "\u{2581}";

/// The `tokenizer.json` of a file: the one it holds whole, or one made of its
/// vocabulary.
///
/// # Errors
/// A missing key, a kind of tokenizer or pre-tokenizer that is not known, lists
/// of different lengths.
pub fn tokenizer_json(dir: &Directory<'_>) -> Result<String, GgufError> {
    if dir.value(HUGGINGFACE_KEY).is_some() {
        return dir.get(HUGGINGFACE_KEY);
    }
    let vocabulary = Vocabulary::read(dir)?;
    let json = match dir.str("tokenizer.ggml.model")? {
        "gpt2" => vocabulary.byte_level()?,
        "llama" => vocabulary.sentence_piece()?,
        other => {
            let what = format!(
                "key tokenizer.ggml.model = {other:?} is not supported: gpt2 and llama are"
            );
            return Err(GgufError::Invalid { file: dir.file().into(), what });
        }
    };
    Ok(json.to_string())
}

/// The keys.
struct Vocabulary<'d> {
    dir: &'d Directory<'d>,
    tokens: Vec<String>,
    types: Vec<i32>,
}

impl<'d> Vocabulary<'d> {
    fn read(dir: &'d Directory<'d>) -> Result<Self, GgufError> {
        let tokens: Vec<String> = dir.get("tokenizer.ggml.tokens")?;
        let types = dir
            .find::<Vec<i32>>("tokenizer.ggml.token_type")?
            .unwrap_or_else(|| vec![token_type::NORMAL; tokens.len()]);
        let all = Self { dir, tokens, types };
        all.same_length("token_type", all.types.len())?;
        Ok(all)
    }

    fn invalid(&self, what: String) -> GgufError {
        GgufError::Invalid { file: self.dir.file().into(), what }
    }

    fn same_length(&self, key: &str, found: usize) -> Result<(), GgufError> {
        let tokens = self.tokens.len();
        if found == tokens {
            return Ok(());
        }
        Err(self.invalid(format!("key tokenizer.ggml.{key}: {found} entries for {tokens} tokens")))
    }

    /// Text to id, unused tokens left out; of equal texts the first counts.
    fn vocab(&self) -> Map<String, Value> {
        let mut vocab = Map::new();
        for (id, (text, ty)) in self.tokens.iter().zip(&self.types).enumerate() {
            if *ty != token_type::UNUSED && !vocab.contains_key(text) {
                vocab.insert(text.clone(), id.into());
            }
        }
        vocab
    }

    /// The tokens that are found in a text before it is split.
    fn added(&self) -> Vec<Value> {
        let kinds = [token_type::UNKNOWN, token_type::CONTROL, token_type::USER_DEFINED];
        let all = self.tokens.iter().zip(&self.types).enumerate();
        let mut seen = HashSet::new();
        all.filter(|(_, (text, ty))| {
            kinds.contains(ty) && !text.is_empty() && seen.insert(text.as_str())
        })
        .map(|(id, (text, ty))| {
            json!({
                "id": id, "content": text, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": *ty != token_type::USER_DEFINED,
            })
        })
        .collect()
    }

    /// What puts the first token before a text, and the last after it.
    fn post_processor(&self, bos_by_default: bool) -> Result<Value, GgufError> {
        let flag = |key: &str, default| -> Result<bool, GgufError> {
            Ok(self.dir.find(&format!("tokenizer.ggml.{key}"))?.unwrap_or(default))
        };
        let id = |key: &str| -> Result<Option<(u32, &String)>, GgufError> {
            let key = format!("tokenizer.ggml.{key}");
            let Some(id) = self.dir.find::<u32>(&key)? else { return Ok(None) };
            match self.tokens.get(id as usize) {
                Some(text) => Ok(Some((id, text))),
                None => {
                    Err(self.invalid(format!("key {key} = {id} of {} tokens", self.tokens.len())))
                }
            }
        };
        let bos = if flag("add_bos_token", bos_by_default)? { id("bos_token_id")? } else { None };
        let eos = if flag("add_eos_token", false)? { id("eos_token_id")? } else { None };
        if bos.is_none() && eos.is_none() {
            return Ok(Value::Null);
        }
        let special = |t: Option<(u32, &String)>, ty: u32| {
            t.map(|(_, text)| json!({"SpecialToken": {"id": text, "type_id": ty}}))
        };
        let part = |name: &str, ty: u32| {
            let text = json!({"Sequence": {"id": name, "type_id": ty}});
            special(bos, ty).into_iter().chain([text]).chain(special(eos, ty)).collect::<Vec<_>>()
        };
        let tokens: Map<String, Value> = bos
            .into_iter()
            .chain(eos)
            .map(|(id, text)| (text.clone(), json!({"id": text, "ids": [id], "tokens": [text]})))
            .collect();
        let pair = [part("A", 0), part("B", 1)].concat();
        Ok(json!({
            "type": "TemplateProcessing",
            "single": part("A", 0),
            "pair": pair,
            "special_tokens": tokens,
        }))
    }

    fn byte_level(&self) -> Result<Value, GgufError> {
        let merges: Vec<String> = self.dir.get("tokenizer.ggml.merges")?;
        if let Some(bad) = merges.iter().find(|m| m.split(' ').count() != 2) {
            return Err(
                self.invalid(format!("key tokenizer.ggml.merges: {bad:?} is not two tokens"))
            );
        }
        let pre = self.dir.find::<String>("tokenizer.ggml.pre")?.unwrap_or("default".into());
        let split = |pattern: &str| {
            json!({
                "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
                "invert": false,
            })
        };
        let bytes = |use_regex: bool| {
            json!({
                "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                "use_regex": use_regex,
            })
        };
        let sequence = |patterns: &[&str]| {
            let steps: Vec<Value> =
                patterns.iter().map(|p| split(p)).chain([bytes(false)]).collect();
            json!({"type": "Sequence", "pretokenizers": steps})
        };
        let llama3 = matches!(pre.as_str(), "llama-bpe" | "llama3" | "llama-v3" | "falcon3");
        let pre_tokenizer = match pre.as_str() {
            _ if llama3 => sequence(&[LLAMA3_SPLIT]),
            "gpt-2" | "gpt2" => bytes(true),
            "default" => sequence(&DEFAULT_SPLITS),
            other => {
                let what = format!(
                    "key tokenizer.ggml.pre = {other:?} is not supported: llama-bpe, gpt-2 and \
                     default are (or give a tokenizer.json)"
                );
                return Err(self.invalid(what));
            }
        };
        Ok(json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": self.added(),
            "normalizer": null,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": self.post_processor(llama3)?,
            "decoder": bytes(true),
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null,
                "continuing_subword_prefix": null, "end_of_word_suffix": null,
                "fuse_unk": false, "byte_fallback": false,
                // As tokenizers of LLaMA 3: a piece that is a token is not split.
                "ignore_merges": llama3,
                "vocab": self.vocab(), "merges": merges,
            },
        }))
    }

    fn sentence_piece(&self) -> Result<Value, GgufError> {
        let scores: Vec<f32> = self.dir.get("tokenizer.ggml.scores")?;
        self.same_length("scores", scores.len())?;
        let unknown = match self.dir.find::<u32>("tokenizer.ggml.unknown_token_id")? {
            Some(id) => self.tokens.get(id as usize),
            None => None,
        };
        let prefix = self.dir.find::<bool>("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
        let mut normalizers = vec![json!({
            "type": "Replace", "pattern": {"String": " "}, "content": SPACE,
        })];
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if prefix {
            normalizers.insert(0, json!({"type": "Prepend", "prepend": SPACE}));
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        let vocab = self.vocab();
        let merges = self.merges(&vocab, &scores);
        Ok(json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": self.added(),
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": null,
            "post_processor": self.post_processor(true)?,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {
                "type": "BPE", "dropout": null, "unk_token": unknown,
                "continuing_subword_prefix": null, "end_of_word_suffix": null,
                "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
                "vocab": vocab, "merges": merges,
            },
        }))
    }

    /// The merges that scores stand for: every split of a token in two tokens, the
    /// best score first, then the longer left and right part.
    fn merges(&self, vocab: &Map<String, Value>, scores: &[f32]) -> Vec<Value> {
        let ids: HashMap<&str, u64> =
            vocab.iter().map(|(t, id)| (t.as_str(), id.as_u64().unwrap_or(0))).collect();
        let mut merges = Vec::new();
        for ((id, token), ty) in self.tokens.iter().enumerate().zip(&self.types) {
            if *ty != token_type::NORMAL
                || token.len() > MAX_MERGED
                || ids.get(token.as_str()) != Some(&(id as u64))
            {
                continue;
            }
            let mut splits: Vec<_> = (token.char_indices().skip(1))
                .map(|(at, _)| token.split_at(at))
                .filter_map(|(l, r)| Some((*ids.get(l)?, *ids.get(r)?, l, r)))
                .collect();
            splits.sort_unstable();
            merges.extend(
                splits
                    .into_iter()
                    .map(|(_, _, l, r)| (scores[id], (l.chars().count(), r.chars().count()), l, r)),
            );
        }
        // Stable: equals stay in the order of the vocabulary.
        merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)));
        merges.into_iter().map(|(_, _, l, r)| json!([l, r])).collect()
    }
}

//! Text to token ids and back: a thin layer over the `tokenizers` crate that
//! never lets a text smuggle in a special token, knows the bytes of every id,
//! and is identified by the SHA-256 of its `tokenizer.json`.

use std::collections::HashSet;
use std::fmt;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use tokenizers::models::ModelWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, DecoderWrapper, Tokenizer as Inner, Trainer};

use crate::error::DataError;
use crate::hash::{hex, sha256};
use crate::words::{self, WordCache};

/// The one special token of the tokenizers trained here: it begins a prompt,
/// ends a document and lies between documents. Its id is 0.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// The smallest vocabulary a byte-level tokenizer can have: one token for each
/// byte and [`END_OF_TEXT`].
pub const MIN_VOCAB: u32 = 257;

/// Names under which published tokenizers know the end of a text, most telling
/// first. A `tokenizer.json` does not say which of its tokens it is.
const EOS_NAMES: [&str; 6] =
    [END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>"];

/// The same for the beginning.
const BOS_NAMES: [&str; 6] =
    ["<|begin_of_text|>", "<s>", "<bos>", "<|bos|>", "<|startoftext|>", END_OF_TEXT];

/// Texts longer than this are encoded in pieces of about this many bytes where
/// a cut cannot change the result: the memory of the `tokenizers` crate grows
/// with the length of one text, to some 50 times its bytes.
const PIECE_BYTES: usize = 64 << 10;

/// A tokenizer and everything this project asks of one.
#[derive(Clone)]
pub struct Tokenizer {
    /// Reads the names of special tokens as plain text.
    plain: Inner,
    /// Reads them as the special tokens.
    special: Inner,
    json: String,
    hash: [u8; 32],
    /// The bytes of every id; empty for ids that no token has.
    bytes: Vec<Vec<u8>>,
    byte_level: bool,
    /// The short way to encode, where the tokenizer allows it.
    words: Option<Arc<WordCache>>,
    eos: Option<u32>,
    bos: Option<u32>,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("sha256", &hex(&self.hash))
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Loads a `tokenizer.json`.
    ///
    /// # Errors
    /// [`DataError::Read`] and [`DataError::File`], naming the file.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self, DataError> {
        let path = path.as_ref();
        let json = fs::read_to_string(path).map_err(DataError::read(path))?;
        Self::parse(json).map_err(|what| DataError::file(path, what))
    }

    /// Takes the content of a `tokenizer.json`.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] where it is none.
    pub fn from_json(json: impl Into<String>) -> Result<Self, DataError> {
        Self::parse(json.into()).map_err(DataError::Tokenizer)
    }

    fn parse(json: String) -> Result<Self, String> {
        // The library panics on some texts that are not JSON: look first.
        serde_json::from_str::<serde::de::IgnoredAny>(&json)
            .map_err(|e| format!("is not a tokenizer.json: {e}"))?;
        let mut special =
            Inner::from_bytes(&json).map_err(|e| format!("is not a tokenizer.json: {e}"))?;
        // A training corpus is neither cut nor padded behind our back.
        special.with_truncation(None).map_err(|e| e.to_string())?;
        special.with_padding(None);
        let vocab = special.get_vocab(true);
        let Some(last) = vocab.values().max() else {
            return Err("holds no token".into());
        };
        let size = usize::try_from(*last).map_err(|e| e.to_string())? + 1;
        if size > MAX_VOCAB {
            return Err(format!("token id {last}: ids must be below {MAX_VOCAB}"));
        }
        let byte_level = is_byte_level(&special);
        let added = special.get_added_tokens_decoder();
        let mut bytes = vec![Vec::new(); size];
        for (token, id) in &vocab {
            let as_is = added.contains_key(id);
            bytes[*id as usize] = token_bytes(token, as_is, byte_level);
        }
        let named = |names: &[&str]| names.iter().find_map(|n| special.token_to_id(n));
        let (eos, bos) = (named(&EOS_NAMES), named(&BOS_NAMES));
        let words = is_gpt2_like(&special).then(Arc::default);
        let mut plain = special.clone();
        plain.set_encode_special_tokens(true);
        Ok(Self {
            hash: sha256(json.as_bytes()),
            plain,
            special,
            json,
            bytes,
            byte_level,
            words,
            eos,
            bos,
        })
    }

    /// Trains a byte-level BPE on `texts`: the GPT-2 split, no prefix space, all
    /// 256 bytes in the alphabet, [`END_OF_TEXT`] as id 0. The same texts, in
    /// whatever order, give the same `tokenizer.json` byte for byte.
    ///
    /// The vocabulary is smaller than `vocab_size` where the texts hold too few
    /// different pairs.
    ///
    /// # Errors
    /// [`DataError::Option`] for a vocabulary below [`MIN_VOCAB`] or beyond 2²⁴,
    /// [`DataError::Tokenizer`] where training fails.
    pub fn train(texts: &[String], vocab_size: u32) -> Result<Self, DataError> {
        check_vocab_size(vocab_size)?;
        let failed = |e: tokenizers::Error| DataError::Tokenizer(format!("training failed: {e}"));
        let mut trainer = BpeTrainer::builder()
            .show_progress(false)
            .vocab_size(vocab_size as usize)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect::<HashSet<_>>())
            .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
            .build();
        // What `Inner::train` does, with the words split the short way.
        trainer
            .feed(texts.iter(), |text| Ok(words::split(text).map(words::spell).collect()))
            .map_err(failed)?;
        let mut model = BPE::default();
        let special_tokens = trainer.train(&mut model).map_err(failed)?;
        let byte_level = ByteLevel::new(false, true, true);
        let mut inner = Inner::new(model);
        inner.with_pre_tokenizer(Some(byte_level));
        inner.with_decoder(Some(byte_level));
        inner.with_post_processor(Some(byte_level));
        inner.add_special_tokens(special_tokens).map_err(failed)?;
        let json = inner.to_string(false).map_err(failed)?;
        Self::from_json(json)
    }

    /// Token ids of a text that nobody vouches for: names of special tokens in
    /// it are spelled out like any other text. Nothing is added at its ends.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] where the text defeats the tokenizer's patterns
    /// (their backtracking is bounded).
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        let Some(cache) = &self.words else {
            return self.encode_with(&self.plain, text);
        };
        let model = self.plain.get_model();
        let mut ids = Vec::with_capacity(text.len() / 3);
        for word in words::split(text) {
            cache.encode(word, model, &mut ids).map_err(|e| {
                DataError::Tokenizer(format!("cannot encode a word of {} bytes: {e}", word.len()))
            })?;
        }
        Ok(ids)
    }

    /// Token ids of a text in which the names of special tokens stand for them,
    /// such as a chat template's output. Nothing is added at its ends.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_with_special(&self, text: &str) -> Result<Vec<u32>, DataError> {
        self.encode_with(&self.special, text)
    }

    fn encode_with(&self, inner: &Inner, text: &str) -> Result<Vec<u32>, DataError> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        let mut rest = text;
        while !rest.is_empty() {
            let end = match self.byte_level {
                true => safe_cut(rest, PIECE_BYTES),
                false => rest.len(),
            };
            let (piece, behind) = rest.split_at(end);
            let encoding = inner.encode_fast(piece, false).map_err(|e| {
                DataError::Tokenizer(format!("cannot encode {} bytes: {e}", piece.len()))
            })?;
            ids.extend_from_slice(encoding.get_ids());
            rest = behind;
        }
        Ok(ids)
    }

    /// The text of `ids`, special tokens by their names. Bytes that are no
    /// UTF-8, and ids that no token has, become U+FFFD.
    #[must_use]
    pub fn decode(&self, ids: &[u32]) -> String {
        if !self.byte_level {
            return self
                .special
                .decode(ids, false)
                .unwrap_or_else(|_| char::REPLACEMENT_CHARACTER.to_string());
        }
        let mut bytes = Vec::with_capacity(4 * ids.len());
        for &id in ids {
            match self.bytes.get(id as usize) {
                Some(b) => bytes.extend_from_slice(b),
                None => bytes.extend_from_slice("\u{fffd}".as_bytes()),
            }
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The bytes that a token stands for, which may be part of a character
    /// only; a special token's are its name. Empty for an id no token has.
    ///
    /// Tokens of tokenizers that are not byte-level are read by SentencePiece's
    /// rules: `<0xNN>` is a byte and `▁` a space.
    #[must_use]
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        self.bytes.get(id as usize).cloned().unwrap_or_default()
    }

    /// One more than the largest id.
    #[must_use]
    pub fn vocab_size(&self) -> u32 {
        // `parse` bounds it by MAX_VOCAB.
        u32::try_from(self.bytes.len()).unwrap_or(u32::MAX)
    }

    /// The token that ends a document, by the names published tokenizers use.
    #[must_use]
    pub fn eos_id(&self) -> Option<u32> {
        self.eos
    }

    /// The token that begins a text, by the names published tokenizers use.
    #[must_use]
    pub fn bos_id(&self) -> Option<u32> {
        self.bos
    }

    /// The id of the token called `name`.
    #[must_use]
    pub fn token_id(&self, name: &str) -> Option<u32> {
        self.special.token_to_id(name)
    }

    /// The special tokens, by id and name.
    #[must_use]
    pub fn special_tokens(&self) -> Vec<(u32, String)> {
        let added = self.special.get_added_tokens_decoder();
        let special = added.into_iter().filter(|(_, token)| token.special);
        let mut tokens: Vec<(u32, String)> =
            special.map(|(id, token)| (id, token.content)).collect();
        tokens.sort_unstable();
        tokens
    }

    /// Whether tokens are strings of bytes and a text begins a word like any other
    /// place does: then the parts of a text can be encoded one by one.
    #[must_use]
    pub fn is_byte_level(&self) -> bool {
        self.byte_level
    }

    /// SHA-256 of the `tokenizer.json`.
    #[must_use]
    pub fn hash(&self) -> [u8; 32] {
        self.hash
    }

    /// [`hash`](Self::hash) in hexadecimal.
    #[must_use]
    pub fn hash_hex(&self) -> String {
        hex(&self.hash)
    }

    /// The `tokenizer.json`, byte for byte as it was loaded or trained.
    #[must_use]
    pub fn to_json(&self) -> &str {
        &self.json
    }
}

/// Above any published vocabulary (Gemma's 262 144), and below what would make
/// a damaged file allocate gigabytes.
const MAX_VOCAB: usize = 1 << 24;

/// Refuses a vocabulary size that no byte-level tokenizer can have.
pub(crate) fn check_vocab_size(vocab_size: u32) -> Result<(), DataError> {
    if vocab_size < MIN_VOCAB || vocab_size as usize > MAX_VOCAB {
        return Err(DataError::option(
            "--vocab-size",
            format!(
                "{vocab_size} is outside {MIN_VOCAB} (256 bytes and {END_OF_TEXT}) to {MAX_VOCAB}"
            ),
        ));
    }
    Ok(())
}

/// Whether tokens are strings of bytes and a text begins a word like any other
/// place does: then a text may be cut between words.
fn is_byte_level(inner: &Inner) -> bool {
    let decodes = matches!(inner.get_decoder(), Some(DecoderWrapper::ByteLevel(_)));
    let plain_bpe = matches!(inner.get_model(), ModelWrapper::BPE(_));
    let splits = match inner.get_pre_tokenizer() {
        Some(PreTokenizerWrapper::ByteLevel(b)) => !b.add_prefix_space,
        // Llama 3's: its own pattern, then the bytes.
        Some(PreTokenizerWrapper::Sequence(s)) => s.as_ref().iter().all(|p| match p {
            PreTokenizerWrapper::ByteLevel(b) => !b.add_prefix_space,
            PreTokenizerWrapper::Split(_) | PreTokenizerWrapper::Digits(_) => true,
            _ => false,
        }),
        _ => false,
    };
    decodes && plain_bpe && splits && inner.get_normalizer().is_none()
}

/// Whether the tokenizer is byte-level BPE with GPT-2's split and nothing else
/// that could change the ids of a text without special tokens.
fn is_gpt2_like(inner: &Inner) -> bool {
    let deterministic =
        matches!(inner.get_model(), ModelWrapper::BPE(bpe) if bpe.dropout.is_none());
    let splits = matches!(
        inner.get_pre_tokenizer(),
        Some(PreTokenizerWrapper::ByteLevel(b)) if !b.add_prefix_space && b.use_regex
    );
    let only_special = inner.get_added_tokens_decoder().values().all(|t| t.special);
    deterministic && splits && only_special && inner.get_normalizer().is_none()
}

/// Where to cut `text` after at least `at_least` bytes: behind a line feed that
/// has white space neither before nor behind it. There every split pattern in
/// use (GPT-2's, GPT-4's, Llama 3's) ends one word and begins another, whatever
/// follows. The whole text where there is no such place.
fn safe_cut(text: &str, at_least: usize) -> usize {
    let bytes = text.as_bytes();
    (at_least..bytes.len().saturating_sub(1))
        .find(|&i| {
            // ASCII alphanumerics on both sides: characters of their own in UTF-8.
            bytes[i] == b'\n'
                && i > 0
                && bytes[i - 1].is_ascii_graphic()
                && bytes[i + 1].is_ascii_alphanumeric()
        })
        .map_or(text.len(), |i| i + 1)
}

/// The bytes of a token as the vocabulary spells it.
fn token_bytes(token: &str, as_is: bool, byte_level: bool) -> Vec<u8> {
    if as_is {
        return token.as_bytes().to_vec();
    }
    if byte_level {
        // A character that stands for no byte is not from this alphabet.
        let bytes: Option<Vec<u8>> = token.chars().map(byte_of).collect();
        return bytes.unwrap_or_else(|| token.as_bytes().to_vec());
    }
    let hex_byte = token
        .strip_prefix("<0x")
        .and_then(|t| t.strip_suffix('>'))
        .filter(|t| t.len() == 2)
        .and_then(|t| u8::from_str_radix(t, 16).ok());
    match hex_byte {
        Some(byte) => vec![byte],
        None => token.replace('▁', " ").into_bytes(),
    }
}

/// The byte that a character of GPT-2's alphabet stands for: printable Latin-1
/// characters for themselves, the 68 other bytes, in order, U+0100 and on.
/// Source: `bytes_to_unicode` in GPT-2's `encoder.py`.
fn byte_of(c: char) -> Option<u8> {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if let Ok(byte) = u8::try_from(u32::from(c)) {
        return printable(byte).then_some(byte);
    }
    let nth = usize::try_from(u32::from(c).checked_sub(0x100)?).ok()?;
    (0..=255u8).filter(|&b| !printable(b)).nth(nth)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::LazyLock;

    fn corpus() -> Vec<String> {
        (0..400u32)
            .map(|i| {
                format!(
                    "fn item_{i}(x: &str) -> usize {{\n    x.len() + {}\n}}\n\nLet it be, it's {i} café.\n",
                    i * 7
                )
            })
            .collect()
    }

    static TRAINED: LazyLock<Tokenizer> =
        LazyLock::new(|| Tokenizer::train(&corpus(), 400).unwrap());

    #[test]
    fn the_alphabet_maps_back() {
        let mut seen = [false; 256];
        for c in ByteLevel::alphabet() {
            let b = byte_of(c).unwrap();
            assert!(!std::mem::replace(&mut seen[b as usize], true));
        }
        assert!(seen.iter().all(|&s| s));
        for b in 0..=255 {
            assert_eq!(byte_of(words::letter(b)), Some(b));
        }
        assert_eq!(byte_of('Ġ'), Some(b' '));
        assert_eq!(byte_of('Ċ'), Some(b'\n'));
        assert_eq!(byte_of('\u{144}'), None);
        assert_eq!(byte_of('漢'), None);
    }

    #[test]
    fn layout_of_a_trained_vocabulary() {
        let t = &*TRAINED;
        assert_eq!(t.vocab_size(), 400);
        assert_eq!((t.eos_id(), t.bos_id()), (Some(0), Some(0)));
        assert_eq!(t.token_bytes(0), END_OF_TEXT.as_bytes());
        assert_eq!(t.token_bytes(400), b"");
        let singles: HashSet<Vec<u8>> = (1..257).map(|id| t.token_bytes(id)).collect();
        assert_eq!(singles.len(), 256);
        assert!(singles.iter().all(|b| b.len() == 1));
        assert!((257..400).all(|id| t.token_bytes(id).len() > 1));
    }

    #[test]
    fn training_is_deterministic_with_ties_and_in_any_order() {
        // Every word occurs once, so that almost all pairs are tied.
        let words: Vec<String> =
            (0..3000u32).map(|i| format!("{:x} {}", i.wrapping_mul(2_654_435_761), i)).collect();
        let first = Tokenizer::train(&words, 700).unwrap();
        let mut reversed = words.clone();
        reversed.reverse();
        for texts in [&words, &reversed, &words, &reversed] {
            let again = Tokenizer::train(texts, 700).unwrap();
            assert_eq!(first.to_json(), again.to_json());
        }
    }

    #[test]
    fn special_tokens_come_only_where_asked_for() {
        let t = &*TRAINED;
        let text = "a<|endoftext|>b";
        let plain = t.encode(text).unwrap();
        assert!(!plain.contains(&0));
        assert_eq!(t.decode(&plain), text);
        let special = t.encode_with_special(text).unwrap();
        assert_eq!(special.iter().filter(|&&id| id == 0).count(), 1);
        assert_eq!(t.decode(&special), text);
    }

    #[test]
    fn a_reloaded_tokenizer_is_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        fs::write(&path, TRAINED.to_json()).unwrap();
        let again = Tokenizer::from_file(&path).unwrap();
        assert_eq!(again.hash(), TRAINED.hash());
        assert_eq!(again.to_json(), TRAINED.to_json());
        let text = corpus().concat();
        assert_eq!(again.encode(&text).unwrap(), TRAINED.encode(&text).unwrap());
    }

    #[test]
    fn neither_pieces_nor_the_short_way_change_the_result() {
        let text = corpus().concat().repeat(8);
        assert!(text.len() > 2 * PIECE_BYTES);
        let whole = TRAINED.plain.encode_fast(text.as_str(), false).unwrap();
        assert!(TRAINED.words.is_some());
        assert_eq!(TRAINED.encode(&text).unwrap(), whole.get_ids());
        assert_eq!(TRAINED.encode_with_special(&text).unwrap(), whole.get_ids());
    }

    #[test]
    fn training_is_the_librarys() {
        let byte_level = ByteLevel::new(false, true, true);
        let mut inner = Inner::new(BPE::default());
        inner.with_pre_tokenizer(Some(byte_level));
        inner.with_decoder(Some(byte_level));
        inner.with_post_processor(Some(byte_level));
        let trainer = BpeTrainer::builder()
            .show_progress(false)
            .vocab_size(400)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect::<HashSet<_>>())
            .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
            .build();
        let mut trainer = tokenizers::models::TrainerWrapper::BpeTrainer(trainer);
        inner.train(&mut trainer, corpus().iter()).unwrap();
        assert_eq!(inner.to_string(false).unwrap(), TRAINED.to_json());
    }

    #[test]
    fn long_runs_of_one_character_encode() {
        for c in [' ', '\n', 'a', '=', '漢'] {
            let text = c.to_string().repeat(300_000);
            assert_eq!(TRAINED.decode(&TRAINED.encode(&text).unwrap()), text);
        }
    }

    #[test]
    fn sentencepiece_spelling() {
        assert_eq!(token_bytes("<0x0A>", false, false), b"\n");
        assert_eq!(token_bytes("▁the", false, false), b" the");
        assert_eq!(token_bytes("<0xZZ>", false, false), b"<0xZZ>");
        assert_eq!(token_bytes("▁", true, false), "▁".as_bytes());
    }

    #[test]
    fn what_is_no_tokenizer_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        let cut = &TRAINED.to_json()[..TRAINED.to_json().len() / 2];
        for content in ["", "{}", "[1]", cut, "\u{1}", "{\"decoder\":\"x"] {
            fs::write(&path, content).unwrap();
            let e = Tokenizer::from_file(&path).unwrap_err().to_string();
            assert!(e.contains("tokenizer.json: is not a tokenizer.json"), "{e}");
        }
        for size in [0, 256, u32::MAX] {
            let e = Tokenizer::train(&corpus(), size).unwrap_err().to_string();
            assert!(e.starts_with(&format!("--vocab-size: {size} is outside")), "{e}");
        }
    }

    proptest! {
        #[test]
        fn any_text_comes_back(text in "\\PC{0,200}|[ \\n\\ta-z0-9'é漢🦀]{0,200}") {
            let ids = TRAINED.encode(&text).unwrap();
            let library = TRAINED.plain.encode_fast(text.as_str(), false).unwrap();
            prop_assert_eq!(&ids[..], library.get_ids());
            prop_assert!(ids.iter().all(|&id| id != 0 && id < TRAINED.vocab_size()));
            prop_assert_eq!(TRAINED.decode(&ids), &text[..]);
            let bytes: Vec<u8> = ids.iter().flat_map(|&id| TRAINED.token_bytes(id)).collect();
            prop_assert_eq!(bytes, text.as_bytes());
        }

        #[test]
        fn any_safe_cut_is_safe(text in "([a-z.,;: '!0-9é\\n\\t]|\\n[a-z]){0,120}", at in 0usize..100) {
            let cut = safe_cut(&text, at);
            let (a, b) = text.split_at(cut);
            let encode = |t: &str| TRAINED.plain.encode_fast(t, false).unwrap().get_ids().to_vec();
            prop_assert_eq!([encode(a), encode(b)].concat(), encode(&text));
        }
    }
}

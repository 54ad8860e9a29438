//! The short way from a text to token ids for byte-level BPE with GPT-2's
//! split: a regular expression without look-ahead, and a memory of the words
//! seen. The same ids as the `tokenizers` crate's general way, which keeps the
//! offset of every byte, several times faster.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::{LazyLock, RwLock};

use regex::Regex;
use tokenizers::Model;

/// GPT-2's pattern is
/// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`:
/// of white space before a word, the last character is left to the word. That
/// is done by hand in [`Words::next`].
static PATTERN: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+")
        .expect("a constant pattern")
});

/// GPT-2's alphabet: the character that stands for each byte.
static ALPHABET: LazyLock<[char; 256]> = LazyLock::new(|| {
    let mut next = 0x100;
    std::array::from_fn(|byte| match byte as u8 {
        b @ (b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff) => char::from(b),
        _ => {
            let c = char::from_u32(next).unwrap_or(char::REPLACEMENT_CHARACTER);
            next += 1;
            c
        }
    })
});

/// The words of a text, as GPT-2 splits it; together they are the text.
pub(crate) fn split(text: &str) -> Words<'_> {
    Words { text, at: 0 }
}

pub(crate) struct Words<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Iterator for Words<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        // Every character begins a match, so that none is skipped.
        let found = PATTERN.find_at(self.text, self.at)?;
        let word = found.as_str();
        let mut end = found.end();
        let mut last = word.char_indices();
        if let Some((at, c)) = last.next_back()
            && c.is_whitespace()
            && at > 0
            && end < self.text.len()
        {
            end = found.start() + at;
        }
        self.at = end;
        Some(&self.text[found.start()..end])
    }
}

/// A word in the alphabet that the vocabulary is written in.
pub(crate) fn spell(word: &str) -> String {
    word.bytes().map(|b| ALPHABET[b as usize]).collect()
}

/// The character that stands for `byte`.
#[cfg(test)]
pub(crate) fn letter(byte: u8) -> char {
    ALPHABET[byte as usize]
}

/// Locks that threads share the memory through.
const SHARDS: usize = 64;
/// Words in one of them: 2¹⁸ in all, some 30 MB.
const SHARD_WORDS: usize = 4096;
/// Longer words hardly come twice.
const MAX_WORD: usize = 48;

type Shard = RwLock<HashMap<Box<str>, Box<[u32]>>>;

/// The token ids of words seen.
pub(crate) struct WordCache {
    shards: [Shard; SHARDS],
    hasher: RandomState,
}

impl Default for WordCache {
    fn default() -> Self {
        Self { shards: std::array::from_fn(|_| Shard::default()), hasher: RandomState::new() }
    }
}

impl WordCache {
    /// Appends the ids of `word`, asking `model` where it is new.
    pub(crate) fn encode(
        &self,
        word: &str,
        model: &impl Model,
        into: &mut Vec<u32>,
    ) -> tokenizers::Result<()> {
        let shard = &self.shards[self.hasher.hash_one(word) as usize % SHARDS];
        // A thread that panicked with the lock left a usable map behind.
        let known = shard.read().unwrap_or_else(|e| e.into_inner());
        if let Some(ids) = known.get(word) {
            into.extend_from_slice(ids);
            return Ok(());
        }
        drop(known);
        let first = into.len();
        into.extend(model.tokenize(&spell(word))?.iter().map(|t| t.id));
        if word.len() <= MAX_WORD {
            let mut known = shard.write().unwrap_or_else(|e| e.into_inner());
            if known.len() < SHARD_WORDS {
                known.insert(word.into(), into[first..].into());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    fn library_split(text: &str) -> Vec<String> {
        let mut pre = PreTokenizedString::from(text);
        ByteLevel::new(false, true, true).pre_tokenize(&mut pre).unwrap();
        pre.get_splits(OffsetReferential::Original, OffsetType::Byte)
            .into_iter()
            .map(|(word, _, _)| word.to_owned())
            .collect()
    }

    fn check(text: &str) {
        let ours: Vec<String> = split(text).map(spell).collect();
        assert_eq!(ours, library_split(text), "{text:?}");
        assert_eq!(split(text).collect::<String>(), text);
    }

    #[test]
    fn words_are_gpt2s() {
        for text in [
            "",
            " ",
            "  ",
            "\n",
            "a  b",
            " \n\n  fn main() {\n        let x = 1;\t\t// it's\n    }\n\n",
            "we'll they've I'd it's 'tis 's'",
            "x\u{a0}\u{a0}y\u{3000}z \u{2028}w",
            "½ ² Ⅷ ٣ 12e5",
            "e\u{301} क्षि ไทย 漢字 🦀🦀 _a_b",
            "\u{85}a\u{1c}b\u{200b}c\0d",
            "tail  ",
        ] {
            check(text);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn words_of_any_text_are_gpt2s(text in "\\PC{0,40}|[ \\n\\t\\r\u{a0}a-c0-9'.sédvel漢]{0,60}|.{0,40}") {
            check(&text);
        }
    }
}

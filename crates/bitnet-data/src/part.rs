//! Parts of a corpus, prepared on different machines and merged afterwards.
//!
//! A document belongs to the part that its text decides: the lower half of its
//! 128-bit key modulo the number of parts. All copies of a text so meet in one
//! part, and leaving out duplicates within each leaves them out of the whole.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The file of a part that lists the keys of its documents: 16 bytes each,
/// big-endian, sorted. A merge needs it; it is not there where duplicates are kept.
pub const KEYS_FILE: &str = "keys.bin";

/// The `index`-th of `count` parts, counted from 1; as text `1/4`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Part {
    index: u32,
    count: u32,
}

impl Part {
    /// Part `index` of `count`; `None` unless `1 <= index <= count`.
    #[must_use]
    pub fn new(index: u32, count: u32) -> Option<Self> {
        (1..=count).contains(&index).then_some(Self { index, count })
    }

    /// Which part, counted from 1.
    #[must_use]
    pub fn index(self) -> u32 {
        self.index
    }

    /// How many parts there are.
    #[must_use]
    pub fn count(self) -> u32 {
        self.count
    }

    /// Whether the document with this key belongs to it.
    pub(crate) fn holds(self, key: u128) -> bool {
        // The upper half orders the documents of a capped corpus.
        (key as u64) % u64::from(self.count) == u64::from(self.index - 1)
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.count)
    }
}

impl From<Part> for String {
    fn from(part: Part) -> Self {
        part.to_string()
    }
}

impl TryFrom<String> for Part {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl FromStr for Part {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.split_once('/')
            .and_then(|(index, count)| Self::new(index.parse().ok()?, count.parse().ok()?))
            .ok_or_else(|| format!("`{text}` is no part: i/n with i from 1 to n, such as 1/4"))
    }
}

/// What the manifest of a part says beside its own content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartInfo {
    /// Which part.
    pub part: Part,
    /// Documents of this part, those left out for what they say included.
    pub own_documents: u64,
    /// Documents with a text in the whole input, duplicates included.
    pub input_documents: u64,
    /// The hash of all of them (as the corpus hash where duplicates are kept):
    /// parts can only be merged when each machine has read the same.
    pub input_hash: String,
    /// The sum of the SHA-256 of this part's documents modulo 2²⁵⁶, where
    /// duplicates are kept; sums of parts add up to that of the whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub own_sum: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_belongs_to_one_part() {
        for count in [1, 2, 3, 7] {
            let parts: Vec<Part> = (1..=count).map(|i| Part::new(i, count).unwrap()).collect();
            for key in 0..100u128 {
                let key = key * 0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c834;
                assert_eq!(parts.iter().filter(|p| p.holds(key)).count(), 1);
            }
        }
    }

    #[test]
    fn parts_read_back_as_written() {
        assert_eq!("2/3".parse::<Part>().unwrap().to_string(), "2/3");
        for bad in ["", "1", "0/2", "3/2", "a/b", "1/0", "1/2/3", "-1/2"] {
            assert!(bad.parse::<Part>().is_err(), "{bad}");
        }
    }
}

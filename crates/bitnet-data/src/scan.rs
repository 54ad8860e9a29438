//! The first pass over a source: which documents belong to the corpus, which of
//! them are held out, and which the tokenizer is trained on. All three depend on
//! the texts alone, not on their order, their names or the machine.

use std::collections::{BinaryHeap, HashSet};

use sha2::{Digest, Sha256};

use crate::error::DataError;
use crate::hash::{document_key, hex, split_position};
use crate::prepare::Progress;
use crate::source::Inputs;

/// What the second pass needs to know. Memory: 16 bytes a document (about 36
/// with the table's free slots) and the tokenizer's sample.
pub(crate) struct Plan {
    /// Keys of the documents of the corpus.
    pub(crate) keys: HashSet<u128>,
    /// Bytes of their text.
    pub(crate) bytes: u64,
    pub(crate) duplicates: u64,
    pub(crate) empty: u64,
    pub(crate) beyond_cap: u64,
    /// Training documents to train a tokenizer on.
    pub(crate) sample: Vec<String>,
    seed: u64,
    /// Documents at positions below it are held out.
    threshold: f64,
}

/// What [`scan`] is asked for.
pub(crate) struct Limits {
    pub(crate) max_bytes: Option<u64>,
    /// 0 where no tokenizer is trained.
    pub(crate) sample_bytes: u64,
    pub(crate) validation_share: f64,
    pub(crate) seed: u64,
}

impl Plan {
    pub(crate) fn is_validation(&self, key: u128) -> bool {
        split_position(key, self.seed) < self.threshold
    }

    /// SHA-256 over the sorted keys, 16 bytes each, big-endian.
    pub(crate) fn corpus_hash(&self) -> String {
        let mut keys: Vec<u128> = self.keys.iter().copied().collect();
        keys.sort_unstable();
        let mut hash = Sha256::new();
        for key in keys {
            hash.update(key.to_be_bytes());
        }
        hex(&hash.finalize())
    }
}

/// The documents with the smallest keys whose sizes add up to at most `limit`
/// bytes, and at least one: a uniform sample that does not depend on the order
/// in which documents come.
struct Smallest<T> {
    heap: BinaryHeap<Entry<T>>,
    bytes: u64,
    limit: u64,
    removed: u64,
    /// The smallest key that did not fit; no larger one is taken after it, or
    /// the order of arrival would matter.
    barrier: u128,
}

struct Entry<T> {
    key: u128,
    bytes: u64,
    value: T,
}

impl<T> PartialEq for Entry<T> {
    fn eq(&self, other: &Self) -> bool {
        self.key == other.key
    }
}
impl<T> Eq for Entry<T> {}
impl<T> PartialOrd for Entry<T> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl<T> Ord for Entry<T> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key.cmp(&other.key)
    }
}

impl<T> Smallest<T> {
    fn new(limit: u64) -> Self {
        Self { heap: BinaryHeap::new(), bytes: 0, limit, removed: 0, barrier: u128::MAX }
    }

    fn push(&mut self, key: u128, bytes: u64, value: T) {
        if key >= self.barrier {
            self.removed += 1;
            return;
        }
        self.bytes += bytes;
        self.heap.push(Entry { key, bytes, value });
        while self.bytes > self.limit && self.heap.len() > 1 {
            if let Some(largest) = self.heap.pop() {
                self.bytes -= largest.bytes;
                self.barrier = largest.key;
                self.removed += 1;
            }
        }
    }
}

/// Reads every document once.
pub(crate) fn scan(
    inputs: &Inputs,
    limits: &Limits,
    progress: &mut dyn Progress,
) -> Result<Plan, DataError> {
    progress.stage("reading", Some(inputs.bytes()));
    let mut seen = HashSet::new();
    let mut capped = limits.max_bytes.map(Smallest::new);
    let mut sample = Smallest::new(limits.sample_bytes);
    let (mut bytes, mut duplicates, mut empty) = (0u64, 0, 0);
    let read = std::cell::Cell::new(0u64);
    for document in inputs.documents(|file_bytes| read.set(read.get() + file_bytes)) {
        let text = document?.text;
        progress.advance(read.take());
        if progress.interrupted() {
            return Err(DataError::Interrupted);
        }
        if text.trim().is_empty() {
            empty += 1;
            continue;
        }
        let key = document_key(&text);
        if !seen.insert(key) {
            duplicates += 1;
            continue;
        }
        let size = text.len() as u64;
        bytes += size;
        if let Some(capped) = &mut capped {
            capped.push(key, size, ());
        }
        if limits.sample_bytes > 0 {
            sample.push(key, size, text);
        }
    }
    let mut beyond_cap = 0;
    if let Some(capped) = capped {
        (bytes, beyond_cap) = (capped.bytes, capped.removed);
        seen = capped.heap.into_iter().map(|e| e.key).collect();
    }
    let mut plan = Plan {
        threshold: threshold(&seen, limits)?,
        keys: seen,
        bytes,
        duplicates,
        empty,
        beyond_cap,
        sample: Vec::new(),
        seed: limits.seed,
    };
    plan.sample = sample
        .heap
        .into_sorted_vec()
        .into_iter()
        .filter(|e| plan.keys.contains(&e.key) && !plan.is_validation(e.key))
        .map(|e| e.value)
        .collect();
    Ok(plan)
}

/// The position below which documents are held out: the share asked for, moved
/// as far as needed for both splits to have a document.
fn threshold(keys: &HashSet<u128>, limits: &Limits) -> Result<f64, DataError> {
    let share = limits.validation_share;
    if share == 0.0 || keys.is_empty() {
        return Ok(0.0);
    }
    if keys.len() == 1 {
        return Err(DataError::Empty {
            what: "the source holds a single document, and validation needs one of its own; take \
                   the text apart (--split bytes:65536, --split blank-line …) or hold nothing out \
                   (--validation-share 0)"
                .into(),
        });
    }
    let (mut first, mut last) = (f64::INFINITY, f64::NEG_INFINITY);
    for &key in keys {
        let position = split_position(key, limits.seed);
        first = first.min(position);
        last = last.max(position);
    }
    Ok(share.max(first.next_up()).min(last))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn smallest_is_a_prefix_in_any_order(
            sizes in proptest::collection::vec(1u64..50, 1..40),
            limit in 1u64..400,
            rotate in 0usize..40,
        ) {
            let entries: Vec<(u128, u64)> = sizes.iter().enumerate().map(|(k, &s)| (k as u128, s)).collect();
            let mut total = 0;
            let fits = entries.iter().take_while(|(_, s)| { total += s; total <= limit }).count();
            let expected: Vec<u128> = (0..fits.max(1) as u128).collect();
            let mut turned = entries.clone();
            turned.rotate_left(rotate % entries.len());
            for order in [entries.clone(), entries.into_iter().rev().collect(), turned] {
                let mut smallest = Smallest::new(limit);
                for (key, size) in order {
                    smallest.push(key, size, ());
                }
                let mut keys: Vec<u128> = smallest.heap.iter().map(|e| e.key).collect();
                keys.sort_unstable();
                prop_assert_eq!(&keys, &expected);
            }
        }

        #[test]
        fn both_splits_have_a_document(n in 2usize..60, share in 0.0001f64..0.5, seed: u64) {
            let keys: HashSet<u128> = (0..n as u128).map(|i| i * 7919).collect();
            let limits = Limits { max_bytes: None, sample_bytes: 0, validation_share: share, seed };
            let threshold = threshold(&keys, &limits).unwrap();
            let held = keys.iter().filter(|&&k| split_position(k, seed) < threshold).count();
            prop_assert!(held > 0 && held < n, "{held} of {n}");
        }
    }
}

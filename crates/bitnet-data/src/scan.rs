//! The first pass over a source: which documents belong to the corpus, which of
//! them are held out, and which the tokenizer is trained on. All three depend on
//! the texts alone, not on their order, their names or the machine.

use std::collections::{BinaryHeap, HashSet};

use sha2::{Digest, Sha256};

use crate::error::DataError;
use crate::hash::{Multiset, hex, key_of, sha256, split_position};
use crate::part::Part;
use crate::prepare::Progress;
use crate::source::{Document, Inputs};

/// What the second pass needs to know. Memory: the tokenizer's sample, and 16
/// bytes a document (about 36 with the table's free slots) where duplicates are
/// left out.
pub(crate) struct Plan {
    /// Keys of the documents of the corpus (of this part of it); none are kept
    /// where duplicates are.
    keys: Option<HashSet<u128>>,
    /// Documents of the corpus (of this part of it).
    pub(crate) documents: u64,
    /// Bytes of their text.
    pub(crate) bytes: u64,
    pub(crate) duplicates: u64,
    pub(crate) empty: u64,
    pub(crate) beyond_cap: u64,
    /// Training documents to train a tokenizer on.
    pub(crate) sample: Vec<String>,
    /// All documents that have a text, duplicates and other parts' included.
    pub(crate) input: Multiset,
    /// Those of this part, where duplicates are kept.
    pub(crate) own: Multiset,
    seed: u64,
    /// Documents at positions below it are held out.
    threshold: f64,
    part: Option<Part>,
}

/// A document and what the threads have found out about it.
pub(crate) struct Seen {
    pub(crate) document: Document,
    pub(crate) digest: [u8; 32],
    pub(crate) key: u128,
    /// See [`split_position`].
    pub(crate) position: f64,
    pub(crate) empty: bool,
}

impl Seen {
    pub(crate) fn new(document: Document, seed: u64) -> Self {
        let digest = sha256(document.text.as_bytes());
        let key = key_of(&digest);
        let empty = document.text.trim().is_empty();
        Self { digest, key, position: split_position(key, seed), empty, document }
    }
}

/// What [`scan`] is asked for.
pub(crate) struct Limits {
    pub(crate) max_bytes: Option<u64>,
    /// 0 where no tokenizer is trained.
    pub(crate) sample_bytes: u64,
    pub(crate) validation_share: f64,
    pub(crate) seed: u64,
    pub(crate) keep_duplicates: bool,
    pub(crate) part: Option<Part>,
}

impl Plan {
    /// Whether the documents at `position` are held out.
    pub(crate) fn is_validation(&self, position: f64) -> bool {
        position < self.threshold
    }

    /// What decides which documents are held out.
    pub(crate) fn seed(&self) -> u64 {
        self.seed
    }

    /// Whether the second pass writes this document. It is asked once for each,
    /// in order: of several copies the first is taken.
    pub(crate) fn take(&mut self, seen: &Seen) -> bool {
        !seen.empty
            && self.part.is_none_or(|part| part.holds(seen.key))
            && self.keys.as_mut().is_none_or(|keys| keys.remove(&seen.key))
    }

    /// Whether the keys of documents are known: where duplicates are left out.
    pub(crate) fn keeps_keys(&self) -> bool {
        self.keys.is_some()
    }

    /// Keys whose documents [`take`](Self::take) has not seen yet.
    pub(crate) fn not_taken(&self) -> u64 {
        self.keys.as_ref().map_or(0, |keys| keys.len() as u64)
    }

    /// The sorted keys; empty where duplicates are kept.
    pub(crate) fn sorted_keys(&self) -> Vec<u128> {
        let mut keys: Vec<u128> = self.keys.iter().flatten().copied().collect();
        keys.sort_unstable();
        keys
    }

    /// The hash over `sorted_keys`; where duplicates are kept that of the multiset.
    pub(crate) fn corpus_hash(&self, sorted_keys: &[u128]) -> String {
        match self.keys {
            Some(_) => hash_of_keys(sorted_keys.iter().copied()),
            None => self.own.hash(),
        }
    }
}

/// SHA-256 over sorted keys, 16 bytes each, big-endian.
pub(crate) fn hash_of_keys(sorted: impl Iterator<Item = u128>) -> String {
    let mut hash = Sha256::new();
    sorted.for_each(|key| hash.update(key.to_be_bytes()));
    hex(&hash.finalize())
}

/// The documents with the smallest keys whose sizes add up to at most `limit`
/// bytes, and at least one: a uniform sample that does not depend on the order
/// in which documents come.
struct Smallest<T> {
    heap: BinaryHeap<Entry<T>>,
    bytes: u64,
    limit: u64,
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
        Self { heap: BinaryHeap::new(), bytes: 0, limit, barrier: u128::MAX }
    }

    fn push(&mut self, key: u128, bytes: u64, value: T) {
        if key >= self.barrier {
            return;
        }
        self.bytes += bytes;
        self.heap.push(Entry { key, bytes, value });
        while self.bytes > self.limit && self.heap.len() > 1 {
            if let Some(largest) = self.heap.pop() {
                self.bytes -= largest.bytes;
                self.barrier = largest.key;
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
    let mut counts = Counts::new(limits);
    inputs.batches(
        |document| Seen::new(document, limits.seed),
        |batch, read| {
            progress.advance(read);
            for seen in batch {
                if progress.interrupted() {
                    return Err(DataError::Interrupted);
                }
                counts.add(seen?);
            }
            Ok(())
        },
    )?;
    counts.finish()
}

/// The first pass so far.
struct Counts<'a> {
    limits: &'a Limits,
    /// Keys met: of this part, or of all where a cap needs them.
    keys: HashSet<u128>,
    capped: Option<Smallest<()>>,
    sample: Smallest<String>,
    input: Multiset,
    own: Multiset,
    documents: u64,
    bytes: u64,
    duplicates: u64,
    empty: u64,
    /// Smallest and largest position.
    positions: (f64, f64),
}

impl<'a> Counts<'a> {
    fn new(limits: &'a Limits) -> Self {
        Self {
            limits,
            keys: HashSet::new(),
            capped: limits.max_bytes.map(Smallest::new),
            sample: Smallest::new(limits.sample_bytes),
            input: Multiset::default(),
            own: Multiset::default(),
            documents: 0,
            bytes: 0,
            duplicates: 0,
            empty: 0,
            positions: (f64::INFINITY, f64::NEG_INFINITY),
        }
    }

    fn is_own(&self, key: u128) -> bool {
        self.limits.part.is_none_or(|part| part.holds(key))
    }

    fn add(&mut self, seen: Seen) {
        let own = self.is_own(seen.key);
        if seen.empty {
            self.empty += u64::from(own);
            return;
        }
        self.input.add(&seen.digest);
        self.positions = (self.positions.0.min(seen.position), self.positions.1.max(seen.position));
        let size = seen.document.text.len() as u64;
        if self.limits.keep_duplicates {
            if own {
                self.own.add(&seen.digest);
            }
        } else if own || self.capped.is_some() {
            if !self.keys.insert(seen.key) {
                self.duplicates += u64::from(own);
                return;
            }
            if let Some(capped) = &mut self.capped {
                capped.push(seen.key, size, ());
            }
        }
        if own {
            self.documents += 1;
            self.bytes += size;
            if self.limits.sample_bytes > 0 {
                self.sample.push(seen.key, size, seen.document.text);
            }
        }
    }

    fn finish(mut self) -> Result<Plan, DataError> {
        let limits = self.limits;
        let (mut documents, mut bytes, mut beyond_cap) = (self.documents, self.bytes, 0);
        if let Some(capped) = self.capped.take() {
            self.positions = (f64::INFINITY, f64::NEG_INFINITY);
            self.keys = HashSet::new();
            (documents, bytes) = (0, 0);
            for entry in capped.heap {
                let position = split_position(entry.key, limits.seed);
                self.positions = (self.positions.0.min(position), self.positions.1.max(position));
                if self.is_own(entry.key) {
                    self.keys.insert(entry.key);
                    documents += 1;
                    bytes += entry.bytes;
                }
            }
            beyond_cap = self.documents - documents;
        }
        let threshold = threshold(self.positions, limits.validation_share)?;
        let sample = std::mem::replace(&mut self.sample, Smallest::new(0)).heap;
        let sample = sample
            .into_sorted_vec()
            .into_iter()
            .filter(|e| limits.keep_duplicates || self.keys.contains(&e.key))
            .filter(|e| split_position(e.key, limits.seed) >= threshold)
            .map(|e| e.value)
            .collect();
        Ok(Plan {
            keys: (!limits.keep_duplicates).then_some(self.keys),
            documents,
            bytes,
            duplicates: self.duplicates,
            empty: self.empty,
            beyond_cap,
            sample,
            input: self.input,
            own: self.own,
            seed: limits.seed,
            threshold,
            part: limits.part,
        })
    }
}

/// The position below which documents are held out: the share asked for, moved
/// as far as needed for both splits to have a document. `positions` are the
/// smallest and the largest; all copies of a text have the same.
fn threshold(positions: (f64, f64), share: f64) -> Result<f64, DataError> {
    let (first, last) = positions;
    if share == 0.0 || first > last {
        return Ok(0.0);
    }
    if first == last {
        return Err(DataError::Empty {
            what: "the source holds a single document, and validation needs one of its own; take \
                   the text apart (--split bytes:65536, --split blank-line …) or hold nothing out \
                   (--validation-share 0)"
                .into(),
        });
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
            let positions: Vec<f64> = (0..n as u128).map(|i| split_position(i * 7919, seed)).collect();
            let first = positions.iter().copied().fold(f64::INFINITY, f64::min);
            let last = positions.iter().copied().fold(0.0, f64::max);
            let threshold = threshold((first, last), share).unwrap();
            let held = positions.iter().filter(|&&p| p < threshold).count();
            prop_assert!(held > 0 && held < n, "{held} of {n}");
        }
    }
}

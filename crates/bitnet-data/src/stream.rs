//! Batches, the last station of the path: windows of a split in a seeded order
//! that can be left and taken up again, and the same windows in file order.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::batch::{Batch, Buffers};
use crate::dataset::Dataset;
use crate::error::DataError;

/// Where a [`BatchStream`] stands: part of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BatchState {
    /// Whole passes over the split so far.
    pub epoch: u64,
    /// Windows of this pass given so far.
    pub position: u64,
    /// Decides the order of each pass.
    pub seed: u64,
    /// Windows in the split: a different number means different data or another
    /// context, in which the position means nothing.
    pub windows: u64,
}

/// An endless, seeded, resumable stream of training batches: every window of
/// the split once an epoch, in an order of its own for each epoch.
#[derive(Debug, Clone)]
pub struct BatchStream {
    dataset: Arc<Dataset>,
    context: usize,
    state: BatchState,
    order: Permutation,
}

impl BatchStream {
    /// A stream from the beginning.
    ///
    /// # Errors
    /// [`DataError::Option`] for a context of 0, [`DataError::File`] where the
    /// split is shorter than one window of `context + 1` tokens.
    pub fn new(
        dataset: impl Into<Arc<Dataset>>,
        context: usize,
        seed: u64,
    ) -> Result<Self, DataError> {
        let dataset = dataset.into();
        let windows = windows_or_error(&dataset, context)?;
        Ok(Self {
            context,
            state: BatchState { epoch: 0, position: 0, seed, windows },
            order: Permutation::new(windows, seed, 0),
            dataset,
        })
    }

    /// A stream that goes on where `state` was taken.
    ///
    /// # Errors
    /// As [`new`](Self::new), and [`DataError::File`] where the state belongs to
    /// other data or another context.
    pub fn from_state(
        dataset: impl Into<Arc<Dataset>>,
        context: usize,
        state: BatchState,
    ) -> Result<Self, DataError> {
        let mut stream = Self::new(dataset, context, state.seed)?;
        let windows = stream.state.windows;
        if state.windows != windows || state.position >= windows {
            let what = format!(
                "the checkpoint stands at window {} of {}, and the {} split has {windows} windows of {context} tokens",
                state.position,
                state.windows,
                stream.dataset.split().name(),
            );
            return Err(DataError::file(stream.dataset.folder(), what));
        }
        stream.state = state;
        stream.order = Permutation::new(windows, state.seed, state.epoch);
        Ok(stream)
    }

    /// Where the stream stands.
    #[must_use]
    pub fn state(&self) -> BatchState {
        self.state
    }

    /// The split behind it.
    #[must_use]
    pub fn dataset(&self) -> &Dataset {
        &self.dataset
    }

    /// The next `batch_size` windows; a batch may end one epoch and begin the
    /// next.
    ///
    /// # Errors
    /// [`DataError::File`] where a shard holds a token outside the vocabulary.
    pub fn next_batch(&mut self, batch_size: usize) -> Result<Batch, DataError> {
        let mut batch = Batch::with_capacity(batch_size, self.context);
        let mut buffers = Buffers::default();
        for _ in 0..batch_size {
            self.push_next(&mut batch, &mut buffers)?;
        }
        Ok(batch)
    }

    /// Appends the next window to a batch.
    pub(crate) fn push_next(
        &mut self,
        batch: &mut Batch,
        buffers: &mut Buffers,
    ) -> Result<(), DataError> {
        let index = self.order.at(self.state.position);
        batch.push(&self.dataset, index, buffers)?;
        self.skip(1);
        Ok(())
    }

    /// Passes over `windows` windows, as if they had been read; takes no time,
    /// however many.
    pub fn skip(&mut self, windows: u64) {
        let BatchState { epoch, position, seed, windows: per_epoch } = self.state;
        let left = per_epoch - position;
        if windows < left {
            self.state.position += windows;
            return;
        }
        let beyond = windows - left;
        self.state.epoch = epoch + 1 + beyond / per_epoch;
        self.state.position = beyond % per_epoch;
        self.order = Permutation::new(per_epoch, seed, self.state.epoch);
    }
}

/// The windows of a split in order, once; see [`Dataset::windows`].
#[derive(Debug, Clone)]
pub struct Windows<'a> {
    dataset: &'a Dataset,
    context: usize,
    next: u64,
    count: u64,
}

impl<'a> Windows<'a> {
    pub(crate) fn new(dataset: &'a Dataset, context: usize) -> Result<Self, DataError> {
        Ok(Self { count: windows_or_error(dataset, context)?, dataset, context, next: 0 })
    }

    /// Windows that are left.
    #[must_use]
    pub fn remaining(&self) -> u64 {
        self.count - self.next
    }

    /// The next `batch_size` windows, fewer at the end, `None` behind it.
    ///
    /// # Errors
    /// [`DataError::File`] where a shard holds a token outside the vocabulary.
    pub fn next_batch(&mut self, batch_size: usize) -> Result<Option<Batch>, DataError> {
        let rows = batch_size.min(usize::try_from(self.remaining()).unwrap_or(usize::MAX));
        if rows == 0 {
            return Ok(None);
        }
        let mut batch = Batch::with_capacity(rows, self.context);
        let mut buffers = Buffers::default();
        for _ in 0..rows {
            batch.push(self.dataset, self.next, &mut buffers)?;
            self.next += 1;
        }
        Ok(Some(batch))
    }
}

/// One window at a time: batches of one row.
impl Iterator for Windows<'_> {
    type Item = Result<Batch, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_batch(1).transpose()
    }
}

fn windows_or_error(dataset: &Dataset, context: usize) -> Result<u64, DataError> {
    if context == 0 {
        return Err(DataError::option("context", "0 tokens; needs at least 1"));
    }
    if let Some(row) = dataset.row_tokens()
        && row != context + 1
    {
        let what = format!(
            "its conversations were packed for a context of {}, not {context}; prepare it again \
             with --context {context}",
            row - 1
        );
        return Err(DataError::file(dataset.folder(), what));
    }
    match dataset.window_count(context) {
        0 => Err(DataError::file(
            dataset.folder(),
            format!(
                "the {} split has {} tokens; one window of context {context} needs {}",
                dataset.split().name(),
                dataset.tokens(),
                context + 1
            ),
        )),
        windows => Ok(windows),
    }
}

/// A pseudo-random order of `0..n` that needs no memory: a Feistel network over
/// the smallest square of a power of two that holds `n`, walked until it lands
/// below `n` (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
/// That domain is below `4n`, so a walk takes fewer than four steps on average.
#[derive(Debug, Clone)]
struct Permutation {
    n: u64,
    half_bits: u32,
    keys: [u64; Self::ROUNDS],
}

impl Permutation {
    const ROUNDS: usize = 6;

    fn new(n: u64, seed: u64, epoch: u64) -> Self {
        let bits = u64::BITS - n.saturating_sub(1).leading_zeros();
        let mut keys = [0; Self::ROUNDS];
        let mut key = mix(mix(seed) ^ epoch.wrapping_mul(0xd1b5_4a32_d192_ed03));
        for k in &mut keys {
            key = mix(key);
            *k = key;
        }
        Self { n, half_bits: bits.div_ceil(2).max(1), keys }
    }

    /// The number at `position`, both below `n`.
    fn at(&self, position: u64) -> u64 {
        let mut x = self.encrypt(position);
        while x >= self.n {
            x = self.encrypt(x);
        }
        x
    }

    fn encrypt(&self, x: u64) -> u64 {
        // At most 32 bits each, as n is below 2⁶⁴.
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (x >> self.half_bits, x & mask);
        for key in self.keys {
            (left, right) = (right, left ^ (mix(right ^ key) & mask));
        }
        (left << self.half_bits) | right
    }
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(n: u64, seed: u64, epoch: u64) -> Vec<u64> {
        let p = Permutation::new(n, seed, epoch);
        (0..n).map(|i| p.at(i)).collect()
    }

    #[test]
    fn every_number_comes_once() {
        for n in (1..70).chain([255, 256, 257, 1000, 4095, 4097, 100_000]) {
            let mut seen = order(n, 42, 3);
            seen.sort_unstable();
            assert!(seen.iter().copied().eq(0..n), "{n}");
        }
    }

    #[test]
    fn orders_differ_between_seeds_and_epochs() {
        let orders = [order(500, 1, 0), order(500, 2, 0), order(500, 1, 1)];
        assert_ne!(orders[0], orders[1]);
        assert_ne!(orders[0], orders[2]);
        assert_ne!(orders[1], orders[2]);
        assert_eq!(orders[0], order(500, 1, 0));
    }

    #[test]
    fn an_order_is_spread_evenly() {
        // The mean place of the first tenth of 10 000 positions: uniform has
        // mean 5000 and a standard deviation of 2887/√1000 = 91.
        for epoch in 0..20 {
            let o = order(10_000, 9, epoch);
            let mean = o[..1000].iter().sum::<u64>() as f64 / 1000.0;
            assert!((mean - 5000.0).abs() < 4.5 * 91.0, "epoch {epoch}: {mean}");
            // Neighbours stay neighbours about as often as chance has it: twice.
            let kept = o.windows(2).filter(|w| w[0].abs_diff(w[1]) == 1).count();
            assert!(kept < 12, "epoch {epoch}: {kept}");
        }
    }
}

//! Several prepared corpora as one stream of batches, each with a weight; weights
//! may change at given steps, as in two-stage data.
//!
//! Which source a window comes from is decided by the largest deficit: each
//! window adds every source's weight to its credit, and the source with the most
//! credit gives the window and pays 1. A source is then never more than one window
//! ahead of its share and never more than `sources - 1` behind it, at every
//! moment, without any chance in it. Where the weights change, the account begins
//! anew. The windows of each source come in that source's own seeded order.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::batch::{Batch, Buffers};
use crate::dataset::Dataset;
use crate::error::DataError;
use crate::hash::sha256;
use crate::stream::{BatchState, BatchStream};

/// Weights are counted in units of 2⁻³², so that the account is exact.
const ONE: i64 = 1 << 32;

/// One corpus of a mixture.
#[derive(Debug, Clone)]
pub struct MixtureSource {
    /// Names it in a checkpoint and in messages.
    pub name: String,
    /// What it holds.
    pub dataset: Arc<Dataset>,
    /// Its weight from given steps on: `(step, weight)`, steps ascending, the first
    /// of them 0. Weights of one step need not add up to 1.
    pub weights: Vec<(u64, f64)>,
}

impl MixtureSource {
    /// The weight at a step.
    fn weight(&self, step: u64) -> f64 {
        let begun = self.weights.iter().take_while(|(from, _)| *from <= step);
        begun.last().map_or(0.0, |(_, weight)| *weight)
    }
}

/// Where one source of a mixture stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceState {
    /// The source's name.
    pub name: String,
    /// [`Manifest::corpus_hash`](crate::Manifest::corpus_hash) of its corpus.
    pub corpus_hash: String,
    /// Windows that it has given, over all epochs.
    pub given: u64,
    /// Its place in its own order.
    pub batches: BatchState,
    /// Its weight at the last window, in units of 2⁻³².
    pub weight: i64,
    /// What it is owed, in units of 2⁻³² windows.
    pub credit: i64,
}

/// Where a [`MixtureStream`] stands: part of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MixtureState {
    /// Decides the order within each source.
    pub seed: u64,
    /// The sources.
    pub sources: Vec<SourceState>,
}

/// An endless, deterministic, resumable stream of batches from several corpora.
#[derive(Debug, Clone)]
pub struct MixtureStream {
    sources: Vec<Source>,
    context: usize,
    seed: u64,
}

#[derive(Debug, Clone)]
struct Source {
    source: MixtureSource,
    stream: BatchStream,
    given: u64,
    weight: i64,
    credit: i64,
}

impl MixtureStream {
    /// A stream from the beginning.
    ///
    /// # Errors
    /// [`DataError::Option`] for weights that cannot be used and for sources that
    /// share a name; [`DataError::File`] where the corpora have different
    /// tokenizers or one is shorter than a window.
    pub fn new(sources: Vec<MixtureSource>, context: usize, seed: u64) -> Result<Self, DataError> {
        check(&sources)?;
        let sources = sources
            .into_iter()
            .map(|source| {
                let seed = source_seed(seed, &source.name);
                let stream = BatchStream::new(Arc::clone(&source.dataset), context, seed)?;
                Ok(Source { source, stream, given: 0, weight: 0, credit: 0 })
            })
            .collect::<Result<_, DataError>>()?;
        Ok(Self { sources, context, seed })
    }

    /// A stream that goes on where `state` was taken. Weights may differ from those
    /// of the run before, and there may be new sources, which begin at their first
    /// window; from there on the stream is that of the new weights.
    ///
    /// # Errors
    /// As [`new`](Self::new); [`DataError::File`] where a source has other data than
    /// the state, and [`DataError::Option`] where one of the state's is missing.
    pub fn from_state(
        sources: Vec<MixtureSource>,
        context: usize,
        state: &MixtureState,
    ) -> Result<Self, DataError> {
        let mut stream = Self::new(sources, context, state.seed)?;
        for saved in &state.sources {
            let Some(s) = stream.sources.iter_mut().find(|s| s.source.name == saved.name) else {
                let what = format!(
                    "the checkpoint has read `{}`, which is missing; to read no more of it, give \
                     it the weight 0",
                    saved.name
                );
                return Err(DataError::option("mixture", what));
            };
            let hash = &s.source.dataset.manifest().corpus_hash;
            if *hash != saved.corpus_hash {
                let what = format!(
                    "source `{}`: the checkpoint has read the corpus {}, this is {hash}",
                    saved.name, saved.corpus_hash
                );
                return Err(DataError::file(s.source.dataset.folder(), what));
            }
            let dataset = Arc::clone(&s.source.dataset);
            s.stream = BatchStream::from_state(dataset, context, saved.batches)?;
            (s.given, s.weight, s.credit) = (saved.given, saved.weight, saved.credit);
        }
        Ok(stream)
    }

    /// Where the stream stands.
    #[must_use]
    pub fn state(&self) -> MixtureState {
        let state = |s: &Source| SourceState {
            name: s.source.name.clone(),
            corpus_hash: s.source.dataset.manifest().corpus_hash.clone(),
            given: s.given,
            batches: s.stream.state(),
            weight: s.weight,
            credit: s.credit,
        };
        MixtureState { seed: self.seed, sources: self.sources.iter().map(state).collect() }
    }

    /// The sources, in the order given.
    pub fn sources(&self) -> impl Iterator<Item = &MixtureSource> {
        self.sources.iter().map(|s| &s.source)
    }

    /// The next `batch_size` windows, with the weights of `step`.
    ///
    /// # Errors
    /// [`DataError::File`] where a shard holds a token outside the vocabulary.
    pub fn next_batch(&mut self, step: u64, batch_size: usize) -> Result<Batch, DataError> {
        self.set_weights(step);
        let mut batch = Batch::with_capacity(batch_size, self.context);
        let mut buffers = Buffers::default();
        for _ in 0..batch_size {
            let i = self.choose();
            self.sources[i].stream.push_next(&mut batch, &mut buffers)?;
        }
        Ok(batch)
    }

    /// Passes over `windows` windows with the weights of `step`, as if they had
    /// been read. Some nanoseconds each.
    pub fn skip(&mut self, step: u64, windows: u64) {
        self.set_weights(step);
        for _ in 0..windows {
            let i = self.choose();
            self.sources[i].stream.skip(1);
        }
    }

    /// Takes the weights of a step; where they are others than before, the account
    /// begins anew.
    fn set_weights(&mut self, step: u64) {
        let weights: Vec<f64> = self.sources.iter().map(|s| s.source.weight(step)).collect();
        let weights = shares(&weights);
        if self.sources.iter().map(|s| s.weight).ne(weights.iter().copied()) {
            for (s, weight) in self.sources.iter_mut().zip(weights) {
                (s.weight, s.credit) = (weight, 0);
            }
        }
    }

    /// The source of the next window: the one with the most credit, the first of
    /// several.
    fn choose(&mut self) -> usize {
        let mut best: Option<usize> = None;
        for i in 0..self.sources.len() {
            self.sources[i].credit += self.sources[i].weight;
            let credit = self.sources[i].credit;
            if self.sources[i].weight > 0 && best.is_none_or(|b| credit > self.sources[b].credit) {
                best = Some(i);
            }
        }
        // `check` sees to it that one weight is above 0 at every step.
        let i = best.unwrap_or(0);
        self.sources[i].credit -= ONE;
        self.sources[i].given += 1;
        i
    }
}

/// A source's seed: independent of which other sources there are.
fn source_seed(seed: u64, name: &str) -> u64 {
    let digest = sha256(name.as_bytes());
    let mut first = [0; 8];
    first.copy_from_slice(&digest[..8]);
    seed ^ u64::from_le_bytes(first)
}

/// Weights as whole units that add up to [`ONE`], by the largest remainder. A
/// weight above 0 gets at least one unit.
fn shares(weights: &[f64]) -> Vec<i64> {
    let sum: f64 = weights.iter().sum();
    let exact: Vec<f64> = weights.iter().map(|w| w / sum * ONE as f64).collect();
    let mut units: Vec<i64> =
        exact.iter().map(|&e| if e > 0.0 { (e.floor() as i64).max(1) } else { 0 }).collect();
    let mut order: Vec<usize> = (0..weights.len()).filter(|&i| weights[i] > 0.0).collect();
    order.sort_by(|&a, &b| exact[b].fract().total_cmp(&exact[a].fract()).then(a.cmp(&b)));
    let mut missing = ONE - units.iter().sum::<i64>();
    for &i in order.iter().cycle().take(if missing > 0 { missing as usize } else { 0 }) {
        units[i] += 1;
        missing -= 1;
    }
    // Only the minimum of one unit can have given too many: the largest pays.
    if let Some(largest) = (0..units.len()).max_by_key(|&i| units[i]) {
        units[largest] += missing;
    }
    units
}

fn check(sources: &[MixtureSource]) -> Result<(), DataError> {
    let bad = |what: String| Err(DataError::option("mixture", what));
    let Some(first) = sources.first() else {
        return bad("no source is named".into());
    };
    let mut steps = Vec::new();
    for (i, source) in sources.iter().enumerate() {
        let name = &source.name;
        if sources[..i].iter().any(|s| s.name == *name) {
            return bad(format!("two sources are called `{name}`"));
        }
        let (a, b) = (&first.dataset.manifest().tokenizer, &source.dataset.manifest().tokenizer);
        if a.sha256 != b.sha256 || a.eos_id != b.eos_id {
            let what = format!(
                "has the tokenizer {} (end token {}), {} has {} ({})",
                b.sha256,
                b.eos_id,
                first.dataset.folder().display(),
                a.sha256,
                a.eos_id
            );
            return Err(DataError::file(source.dataset.folder(), what));
        }
        if source.weights.first().is_none_or(|(step, _)| *step != 0) {
            return bad(format!("source `{name}`: no weight at step 0"));
        }
        if !source.weights.windows(2).all(|w| w[0].0 < w[1].0) {
            return bad(format!("source `{name}`: the steps of its weights do not ascend"));
        }
        for (step, weight) in &source.weights {
            if !weight.is_finite() || *weight < 0.0 {
                return bad(format!("source `{name}`: weight {weight} at step {step}"));
            }
            steps.push(*step);
        }
    }
    for step in steps {
        let sum: f64 = sources.iter().map(|s| s.weight(step)).sum();
        if !(sum > 0.0 && sum.is_finite()) {
            return bad(format!("from step {step} on the weights add up to {sum}"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn shares_are_whole_and_add_up(weights in proptest::collection::vec(0.0f64..10.0, 1..6), tiny: bool) {
            let mut weights = weights;
            if tiny {
                weights.push(1e-15);
            }
            prop_assume!(weights.iter().sum::<f64>() > 0.0);
            let sum: f64 = weights.iter().sum();
            let units = shares(&weights);
            prop_assert_eq!(units.iter().sum::<i64>(), ONE);
            for (unit, weight) in units.iter().zip(&weights) {
                prop_assert_eq!(*unit > 0, *weight > 0.0);
                prop_assert!((*unit as f64 - weight / sum * ONE as f64).abs() < 10.0);
            }
        }
    }
}

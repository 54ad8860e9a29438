//! One corpus or a mixture, behind one face: what a training loop reads from, and
//! how the ranks of a data-parallel run share it.

use serde::{Deserialize, Serialize};

use crate::batch::Batch;
use crate::error::DataError;
use crate::mixture::{MixtureState, MixtureStream};
use crate::stream::{BatchState, BatchStream};

/// An endless stream of training batches.
#[derive(Debug, Clone)]
pub enum TokenStream {
    /// Of one corpus.
    Single(BatchStream),
    /// Of several.
    Mixture(MixtureStream),
}

/// Where a [`TokenStream`] stands. One corpus's state is written as before there
/// were mixtures, so that older checkpoints are read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum StreamState {
    /// Of one corpus.
    Single(BatchState),
    /// Of several.
    Mixture(MixtureState),
}

impl TokenStream {
    /// The next `batch_size` windows; `step` decides a mixture's weights.
    ///
    /// # Errors
    /// [`DataError::File`] where a shard holds a token outside the vocabulary.
    pub fn next_batch(&mut self, step: u64, batch_size: usize) -> Result<Batch, DataError> {
        match self {
            Self::Single(stream) => stream.next_batch(batch_size),
            Self::Mixture(stream) => stream.next_batch(step, batch_size),
        }
    }

    /// Passes over `windows` windows, as if they had been read.
    pub fn skip(&mut self, step: u64, windows: u64) {
        match self {
            Self::Single(stream) => stream.skip(windows),
            Self::Mixture(stream) => stream.skip(step, windows),
        }
    }

    /// Rank `rank`'s share of the next `ranks · batch_size` windows: those from
    /// `rank · batch_size` on. The shares of all ranks, in order, are the batch of
    /// one process, and every rank's stream stands behind all of them afterwards.
    ///
    /// # Errors
    /// [`DataError::Option`] for a rank that is not below `ranks`; as
    /// [`next_batch`](Self::next_batch).
    pub fn next_share(
        &mut self,
        step: u64,
        batch_size: usize,
        rank: usize,
        ranks: usize,
    ) -> Result<Batch, DataError> {
        if rank >= ranks {
            let what = format!("{rank} is not below the number of ranks, {ranks}");
            return Err(DataError::option("rank", what));
        }
        self.skip(step, (rank * batch_size) as u64);
        let batch = self.next_batch(step, batch_size)?;
        self.skip(step, ((ranks - 1 - rank) * batch_size) as u64);
        Ok(batch)
    }

    /// Where the stream stands.
    #[must_use]
    pub fn state(&self) -> StreamState {
        match self {
            Self::Single(stream) => StreamState::Single(stream.state()),
            Self::Mixture(stream) => StreamState::Mixture(stream.state()),
        }
    }
}

impl From<BatchStream> for TokenStream {
    fn from(stream: BatchStream) -> Self {
        Self::Single(stream)
    }
}

impl From<MixtureStream> for TokenStream {
    fn from(stream: MixtureStream) -> Self {
        Self::Mixture(stream)
    }
}

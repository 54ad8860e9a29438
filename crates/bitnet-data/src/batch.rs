//! A batch: rows of tokens, what is to be predicted of them, and where in a row
//! documents begin.

use crate::dataset::Dataset;
use crate::error::DataError;
use crate::shard::{FLAG_BEGINS, FLAG_LOSS};

/// Inputs and, for each, the token that follows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Token ids, `[batch, context]`, row by row.
    pub inputs: Vec<u32>,
    /// The token behind each input, `[batch, context]`.
    pub targets: Vec<u32>,
    /// 1 for the targets that the loss is taken over, 0 for the others,
    /// `[batch, context]`. `None`: over all of them.
    pub loss_mask: Option<Vec<u8>>,
    /// 1 for the inputs that begin a document, `[batch, context]`, where the
    /// shards say so; `None` where an end token alone tells documents apart.
    pub begins: Option<Vec<u8>>,
    /// Rows.
    pub batch: usize,
    /// Tokens in a row.
    pub context: usize,
}

impl Batch {
    /// No rows yet.
    pub(crate) fn with_capacity(batch: usize, context: usize) -> Self {
        Self {
            inputs: Vec::with_capacity(batch * context),
            targets: Vec::with_capacity(batch * context),
            loss_mask: None,
            begins: None,
            batch: 0,
            context,
        }
    }

    /// Appends window `index` of a split (see [`Dataset::window_count`]).
    pub(crate) fn push(
        &mut self,
        dataset: &Dataset,
        index: u64,
        buffers: &mut Buffers,
    ) -> Result<(), DataError> {
        let (context, before) = (self.context, self.inputs.len());
        buffers.tokens.resize(context + 1, 0);
        dataset.read(dataset.window_start(index, context), &mut buffers.tokens)?;
        self.inputs.extend_from_slice(&buffers.tokens[..context]);
        self.targets.extend_from_slice(&buffers.tokens[1..]);
        self.batch += 1;
        let is_packed = dataset.row_tokens().is_some();
        if is_packed {
            buffers.flags.resize(context + 1, 0);
            dataset.read_flags(dataset.window_start(index, context), &mut buffers.flags)?;
        }
        if !is_packed && self.loss_mask.is_none() {
            return Ok(());
        }
        // A batch can mix rows of both kinds: those without flags are learned
        // from everywhere, and their end tokens tell where documents begin.
        if self.loss_mask.is_none() {
            self.begins = Some(self.begins_by_end_token(dataset.eos_id(), 0..before));
        }
        let mask = self.loss_mask.get_or_insert_with(|| vec![1; before]);
        if is_packed {
            mask.extend(buffers.flags[1..].iter().map(|f| u8::from(f & FLAG_LOSS != 0)));
        } else {
            mask.resize(before + context, 1);
        }
        let begins: Vec<u8> = if is_packed {
            buffers.flags[..context].iter().map(|f| u8::from(f & FLAG_BEGINS != 0)).collect()
        } else {
            self.begins_by_end_token(dataset.eos_id(), before..before + context)
        };
        self.begins.get_or_insert_default().extend(begins);
        Ok(())
    }

    /// For each input the position in its row at which its document begins,
    /// `[batch, context]`: token `t` of a row belongs to the document of the
    /// tokens `starts[t] ..= t` before it. Attention that must not cross documents
    /// masks the keys before `starts[t]`. An end token belongs to the document
    /// that it ends; a row's first document begins at 0, wherever it began before.
    ///
    /// `eos_id` is [`Dataset::eos_id`]; it counts only where the shards do not say
    /// themselves where documents begin.
    #[must_use]
    pub fn document_starts(&self, eos_id: u32) -> Vec<u32> {
        let by_token;
        let begins = match &self.begins {
            Some(begins) => begins,
            None => {
                by_token = self.begins_by_end_token(eos_id, 0..self.inputs.len());
                &by_token
            }
        };
        let mut starts = Vec::with_capacity(self.inputs.len());
        for row in begins.chunks_exact(self.context.max(1)) {
            let mut start = 0;
            for (t, &begins) in (0u32..).zip(row) {
                if begins != 0 {
                    start = t;
                }
                starts.push(start);
            }
        }
        starts
    }

    /// 1 behind each end token and at the begin of each row, for whole rows.
    fn begins_by_end_token(&self, eos_id: u32, range: std::ops::Range<usize>) -> Vec<u8> {
        let begins = |t: usize| t.is_multiple_of(self.context) || self.inputs[t - 1] == eos_id;
        range.map(|t| u8::from(begins(t))).collect()
    }
}

/// What a window is read into.
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    tokens: Vec<u32>,
    flags: Vec<u8>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_begin_behind_end_tokens() {
        let batch = Batch {
            inputs: vec![5, 6, 0, 7, 0, 0, 8, 9, /**/ 0, 1, 2, 3, 4, 0, 5, 6],
            targets: vec![0; 16],
            loss_mask: None,
            begins: None,
            batch: 2,
            context: 8,
        };
        let expected = [0, 0, 0, 3, 3, 5, 6, 6, /**/ 0, 1, 1, 1, 1, 1, 6, 6];
        assert_eq!(batch.document_starts(0), expected);
        assert_eq!(batch.document_starts(99), [0; 16]);
        let marked = Batch { begins: Some([1, 0, 0, 0, 1, 0, 0, 0].repeat(2)), ..batch };
        assert_eq!(marked.document_starts(0), [0, 0, 0, 0, 4, 4, 4, 4].repeat(2));
    }
}

//! Conversations packed whole into rows of one length.
//!
//! Best fit over a bounded number of open rows: a conversation goes into the open
//! row that it fills best, or into a new one; the fullest row is closed where there
//! are too many. The result depends on the order of the conversations alone.

use crate::chat::Conversation;
use crate::shard::FLAG_BEGINS;

/// Rows that wait for what fits into them: some 64 · 2048 · 5 bytes.
const OPEN_ROWS: usize = 64;

/// A row and the conversations in it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Row {
    pub(super) tokens: Vec<u32>,
    pub(super) flags: Vec<u8>,
    pub(super) documents: u64,
    pub(super) padding: u64,
}

pub(super) struct Packer {
    row_tokens: usize,
    eos_id: u32,
    open: Vec<Row>,
}

impl Packer {
    pub(super) fn new(row_tokens: usize, eos_id: u32) -> Self {
        Self { row_tokens, eos_id, open: Vec::new() }
    }

    /// Rows that are open.
    pub(super) fn open_rows(&self) -> usize {
        self.open.len()
    }

    /// Whether a conversation of so many tokens needs a new row.
    pub(super) fn needs_row(&self, tokens: usize) -> bool {
        self.best(tokens).is_none()
    }

    /// The open row with the least room that is enough.
    fn best(&self, tokens: usize) -> Option<usize> {
        let room = |row: &Row| self.row_tokens - row.tokens.len();
        let fits = (0..self.open.len()).filter(|&i| room(&self.open[i]) >= tokens);
        fits.min_by_key(|&i| room(&self.open[i]))
    }

    /// Places a conversation of at most a row; a row that is closed by it.
    pub(super) fn place(&mut self, conversation: &Conversation) -> Option<Row> {
        let (i, closed) = match self.best(conversation.tokens.len()) {
            Some(i) => (i, None),
            None => {
                let closed = (self.open.len() == OPEN_ROWS).then(|| self.close_fullest());
                self.open.push(Row::default());
                (self.open.len() - 1, closed.flatten())
            }
        };
        let row = &mut self.open[i];
        row.tokens.extend_from_slice(&conversation.tokens);
        row.flags.extend_from_slice(&conversation.flags);
        row.documents += 1;
        closed
    }

    fn close_fullest(&mut self) -> Option<Row> {
        // The first of several.
        let i = (0..self.open.len()).rev().max_by_key(|&i| self.open[i].tokens.len())?;
        let row = self.open.remove(i);
        Some(self.fill(row))
    }

    /// Closes all rows, oldest first.
    pub(super) fn close_all(&mut self) -> Vec<Row> {
        let open = std::mem::take(&mut self.open);
        open.into_iter().map(|row| self.fill(row)).collect()
    }

    /// Fills a row up with end tokens that nothing is learned from.
    fn fill(&self, mut row: Row) -> Row {
        let used = row.tokens.len();
        row.padding = (self.row_tokens - used) as u64;
        row.tokens.resize(self.row_tokens, self.eos_id);
        row.flags.resize(self.row_tokens, 0);
        if used < self.row_tokens {
            row.flags[used] = FLAG_BEGINS;
        }
        row
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::FLAG_LOSS;
    use proptest::prelude::*;

    fn conversation(number: u32, tokens: usize) -> Conversation {
        let mut flags = vec![FLAG_LOSS; tokens];
        flags[0] = FLAG_BEGINS;
        Conversation { tokens: vec![number; tokens], flags, truncated: false }
    }

    #[test]
    fn a_row_is_filled_as_well_as_it_can_be() {
        let mut packer = Packer::new(10, 0);
        for (number, tokens) in [(1, 6), (2, 7), (3, 3), (4, 4), (5, 9)] {
            assert_eq!(packer.place(&conversation(number, tokens)), None);
        }
        let rows = packer.close_all();
        let tokens: Vec<&[u32]> = rows.iter().map(|r| &r.tokens[..]).collect();
        assert_eq!(tokens[0], [1, 1, 1, 1, 1, 1, 4, 4, 4, 4]);
        assert_eq!(tokens[1], [2, 2, 2, 2, 2, 2, 2, 3, 3, 3]);
        assert_eq!(tokens[2], [5, 5, 5, 5, 5, 5, 5, 5, 5, 0]);
        assert_eq!(rows[2].flags, [2, 1, 1, 1, 1, 1, 1, 1, 1, 2]);
        assert_eq!(
            rows.iter().map(|r| (r.documents, r.padding)).collect::<Vec<_>>(),
            [(2, 0), (2, 0), (1, 1)]
        );
    }

    proptest! {
        #[test]
        fn every_conversation_is_in_one_row_whole(sizes in proptest::collection::vec(2usize..30, 1..400)) {
            let mut packer = Packer::new(30, 0);
            let mut rows = Vec::new();
            for (number, &tokens) in (1..).zip(&sizes) {
                rows.extend(packer.place(&conversation(number, tokens)));
                prop_assert!(packer.open_rows() <= OPEN_ROWS);
            }
            rows.extend(packer.close_all());
            let mut found = vec![0; sizes.len()];
            for row in &rows {
                prop_assert_eq!((row.tokens.len(), row.flags.len()), (30, 30));
                let runs: Vec<&[u32]> = row.tokens.chunk_by(|a, b| a == b).collect();
                for run in runs.iter().filter(|run| run[0] != 0) {
                    prop_assert_eq!(std::mem::replace(&mut found[run[0] as usize - 1], run.len()), 0);
                }
            }
            prop_assert_eq!(found, sizes);
        }
    }
}

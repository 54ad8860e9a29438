//! The second pass: every planned document, tokenised in parallel, written in
//! the order of the source.

use rayon::prelude::*;

use super::journal::{Entry, Journal, SplitState, shard_name};
use super::pack::{Packer, Row};
use super::{PrepareOptions, Progress};
use crate::chat::{self, Conversation};
use crate::dataset::Split;
use crate::error::DataError;
use crate::hash::{Multiset, hex};
use crate::manifest::{ChatCounts, ChatInfo, ShardInfo, SplitInfo};
use crate::scan::{Plan, Seen};
use crate::shard::{FLAG_LOSS, ShardWriter};
use crate::source::{Document, Inputs};
use crate::tokenizer::Tokenizer;

/// What has been written.
pub(super) struct Written {
    pub(super) train: SplitInfo,
    pub(super) validation: SplitInfo,
    pub(super) chat: Option<ChatInfo>,
}

/// How documents become tokens.
pub(super) struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    eos_id: u32,
    /// The context and the encoder of conversations.
    chat: Option<(usize, chat::Encoder<'a>)>,
}

enum Encoded {
    Text(Vec<u32>),
    Chat(chat::Encoded),
}

impl<'a> Encoder<'a> {
    pub(super) fn new(
        options: &PrepareOptions,
        template: Option<&str>,
        tokenizer: &'a Tokenizer,
        eos_id: u32,
    ) -> Result<Self, DataError> {
        let chat = match options.chat.as_ref().zip(template) {
            Some((chat, template)) => {
                let encoder = chat::Encoder::new(template, chat.context, tokenizer, eos_id)?;
                Some((chat.context, encoder))
            }
            None => None,
        };
        Ok(Self { tokenizer, eos_id, chat })
    }

    fn encode(&self, document: &Document) -> Result<Encoded, DataError> {
        match &self.chat {
            Some((_, chat)) => chat.encode(&document.name, &document.text).map(Encoded::Chat),
            None => self
                .tokenizer
                .encode(&document.text)
                .map(Encoded::Text)
                .map_err(|e| DataError::Tokenizer(format!("{}: {e}", document.name))),
        }
    }
}

pub(super) fn shards(
    inputs: &Inputs,
    mut plan: Plan,
    encoder: &Encoder<'_>,
    options: &PrepareOptions,
    journal: &mut Journal,
    progress: &mut dyn Progress,
) -> Result<Written, DataError> {
    progress.stage("tokenising", Some(plan.bytes));
    let mut splits = [Split::Train, Split::Validation]
        .map(|split| SplitWriter::new(split, encoder, options, journal));
    let mut own = Multiset::default();
    let seed = plan.seed();
    inputs.batches(
        |document| Seen::new(document, seed),
        |batch, _| {
            let mut chosen = Vec::with_capacity(batch.len());
            let mut bytes = 0;
            for seen in batch {
                if progress.interrupted() {
                    return Err(DataError::Interrupted);
                }
                let seen = seen?;
                if !plan.take(&seen) {
                    continue;
                }
                bytes += seen.document.text.len() as u64;
                if !plan.keeps_keys() {
                    own.add(&seen.digest);
                }
                let split = usize::from(plan.is_validation(seen.position));
                // What an interrupted run has written is not written again.
                if !splits[split].skip() {
                    chosen.push((seen.document, split));
                }
            }
            let encoded: Vec<Result<Encoded, DataError>> =
                chosen.par_iter().map(|(document, _)| encoder.encode(document)).collect();
            for ((document, split), encoded) in chosen.iter().zip(encoded) {
                splits[*split].push(document.text.len() as u64, encoded?, journal)?;
            }
            progress.advance(bytes);
            Ok(())
        },
    )?;
    check_unchanged(&plan, &own)?;
    let [train, validation] = splits;
    let (train, mut counts) = train.finish(journal)?;
    let (validation, more) = validation.finish(journal)?;
    counts.add(&more);
    let chat = encoder.chat.as_ref().map(|(context, _)| ChatInfo { context: *context, counts });
    if chat.is_some() && options.part.is_none() && train.documents + validation.documents == 0 {
        let what = format!(
            "no conversation can be learned from: {} without an answer in {} tokens, {} with the \
             name of a special token in a message",
            counts.without_answer,
            chat.map_or(0, |c| c.context + 1),
            counts.special_in_text
        );
        return Err(DataError::Empty { what });
    }
    Ok(Written { train, validation, chat })
}

/// The second pass must have met the documents of the first.
fn check_unchanged(plan: &Plan, own: &Multiset) -> Result<(), DataError> {
    let what = match plan.keeps_keys() {
        true if plan.not_taken() > 0 => format!("{} documents", plan.not_taken()),
        false if *own != plan.own => {
            format!("some of {} documents ({} at the second reading)", plan.own.count, own.count)
        }
        _ => return Ok(()),
    };
    let what = format!("{what} changed or vanished while they were read; run it again");
    Err(DataError::Empty { what })
}

/// Writes the shards of one split, one after the other.
struct SplitWriter<'a> {
    split: Split,
    encoder: &'a Encoder<'a>,
    options: &'a PrepareOptions,
    /// Where conversations wait for a row, with its tokens.
    packer: Option<(u64, Packer)>,
    shard: Option<ShardWriter>,
    shards: Vec<ShardInfo>,
    state: SplitState,
    /// Documents that an interrupted run has written and this one has not met.
    to_skip: u64,
}

impl<'a> SplitWriter<'a> {
    fn new(
        split: Split,
        encoder: &'a Encoder<'a>,
        options: &'a PrepareOptions,
        journal: &Journal,
    ) -> Self {
        let shards: Vec<ShardInfo> = journal.of(split).map(|e| e.shard.clone()).collect();
        let state = journal.of(split).last().map(|e| e.state).unwrap_or_default();
        let row = encoder.chat.as_ref().map(|(context, _)| context + 1);
        let packer = row.map(|row| (row as u64, Packer::new(row, encoder.eos_id)));
        let (shard, to_skip) = (None, state.seen);
        Self { split, encoder, options, packer, shard, shards, to_skip, state }
    }

    /// Whether the next document is one that an interrupted run has written.
    fn skip(&mut self) -> bool {
        let skip = self.to_skip > 0;
        self.to_skip -= u64::from(skip);
        skip
    }

    fn push(
        &mut self,
        bytes: u64,
        encoded: Encoded,
        journal: &mut Journal,
    ) -> Result<(), DataError> {
        match encoded {
            Encoded::Text(tokens) => self.push_text(&tokens, journal)?,
            Encoded::Chat(chat::Encoded::Conversation(conversation)) => {
                self.push_conversation(&conversation, journal)?;
            }
            Encoded::Chat(left_out) => {
                self.state.seen += 1;
                let counts = &mut self.state.chat;
                match left_out {
                    chat::Encoded::SpecialInText => counts.special_in_text += 1,
                    _ => counts.without_answer += 1,
                }
                return Ok(());
            }
        }
        self.state.seen += 1;
        self.state.documents += 1;
        self.state.bytes += bytes;
        Ok(())
    }

    fn push_text(&mut self, tokens: &[u32], journal: &mut Journal) -> Result<(), DataError> {
        let after = |shard: &ShardWriter| shard.tokens() + tokens.len() as u64 + 1;
        if self.shard.as_ref().is_some_and(|s| after(s) > self.options.shard_tokens) {
            self.finish_shard(journal)?;
        }
        self.open_shard()?.push_document(tokens)?;
        self.state.tokens += tokens.len() as u64 + 1;
        Ok(())
    }

    /// A shard ends with all of its rows closed, so that it holds the
    /// conversations up to some place and no later ones.
    fn push_conversation(
        &mut self,
        conversation: &Conversation,
        journal: &mut Journal,
    ) -> Result<(), DataError> {
        if let (Some(shard), Some((row, packer))) = (&self.shard, &self.packer)
            && packer.needs_row(conversation.tokens.len())
            && shard.tokens() + (packer.open_rows() as u64 + 1) * row > self.options.shard_tokens
        {
            self.finish_shard(journal)?;
        }
        self.open_shard()?;
        let learned = conversation.flags.iter().filter(|&f| f & FLAG_LOSS != 0).count();
        self.state.chat.loss_tokens += learned as u64;
        self.state.chat.truncated += u64::from(conversation.truncated);
        let closed = self.packer.as_mut().and_then(|(_, packer)| packer.place(conversation));
        closed.map_or(Ok(()), |row| self.push_row(&row))
    }

    fn push_row(&mut self, row: &Row) -> Result<(), DataError> {
        self.open_shard()?.push_row(&row.tokens, &row.flags, row.documents)?;
        self.state.tokens += row.tokens.len() as u64;
        self.state.chat.padding_tokens += row.padding;
        Ok(())
    }

    /// The shard being written; a new one where none is.
    fn open_shard(&mut self) -> Result<&mut ShardWriter, DataError> {
        let (tokenizer, row) = (self.encoder.tokenizer, self.packer.as_ref().map(|(row, _)| *row));
        Ok(match &mut self.shard {
            Some(shard) => shard,
            none => none.insert(ShardWriter::create_rows(
                &self.options.output.join(shard_name(self.split, self.shards.len())),
                tokenizer.vocab_size(),
                self.encoder.eos_id,
                tokenizer.hash(),
                // `validate` bounds the context by 2²⁴.
                row.map(|row| row as u32),
            )?),
        })
    }

    fn finish_shard(&mut self, journal: &mut Journal) -> Result<(), DataError> {
        let rows = self.packer.as_mut().map_or_else(Vec::new, |(_, packer)| packer.close_all());
        rows.iter().try_for_each(|row| self.push_row(row))?;
        if let Some(shard) = self.shard.take() {
            let header = shard.finish()?;
            let info = ShardInfo {
                file: shard_name(self.split, self.shards.len()),
                documents: header.documents,
                tokens: header.tokens,
                sha256: hex(&header.payload_sha256),
            };
            self.shards.push(info.clone());
            let split = self.split.name().into();
            journal.push(Entry { split, shard: info, state: self.state })?;
        }
        Ok(())
    }

    fn finish(mut self, journal: &mut Journal) -> Result<(SplitInfo, ChatCounts), DataError> {
        self.finish_shard(journal)?;
        let info = SplitInfo {
            documents: self.state.documents,
            bytes: self.state.bytes,
            tokens: self.state.tokens,
            shards: self.shards,
        };
        Ok((info, self.state.chat))
    }
}

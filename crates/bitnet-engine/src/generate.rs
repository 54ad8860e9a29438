//! From a prompt to pieces of text: sample, decode, hold back, stop.

use std::time::{Duration, Instant};

use crate::error::EngineError;
use crate::head::HeadMode;
use crate::sampler::Sampler;
use crate::session::Session;
use crate::stream::{StopFilter, Utf8Stream};
use crate::tokenizer::Tokenizer;

/// When a generation ends.
#[derive(Debug, Clone)]
pub struct GenerateOptions {
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// Strings that end the text; they are not part of it.
    pub stop: Vec<String>,
    /// Goes on after an end-of-text token.
    pub ignore_eos: bool,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self { max_tokens: 128, stop: Vec::new(), ignore_eos: false }
    }
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// The model ended the text.
    Eos,
    /// A stop string appeared.
    Stop,
    /// `max_tokens` were generated.
    Length,
    /// The session has no room for another token.
    Context,
}

impl FinishReason {
    /// The name in results.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Eos => "eos",
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Context => "context",
        }
    }
}

/// What a generation took.
#[derive(Debug, Clone, Copy, Default)]
pub struct Stats {
    /// Tokens of the prompt that were run: those in the session already are not.
    pub prefill_tokens: usize,
    /// Time for them.
    pub prefill: Duration,
    /// Tokens that were run after the prompt, one by one.
    pub decode_tokens: usize,
    /// Time for them, sampling included.
    pub decode: Duration,
}

impl Stats {
    /// Prompt tokens a second; 0 where there were none.
    #[must_use]
    pub fn prefill_tokens_per_second(&self) -> f64 {
        rate(self.prefill_tokens, self.prefill)
    }

    /// Generated tokens a second; 0 where there were none.
    #[must_use]
    pub fn decode_tokens_per_second(&self) -> f64 {
        rate(self.decode_tokens, self.decode)
    }
}

fn rate(tokens: usize, time: Duration) -> f64 {
    if tokens == 0 || time.is_zero() { 0.0 } else { tokens as f64 / time.as_secs_f64() }
}

/// An iterator over the pieces of a generated text.
///
/// A piece is whole characters that belong to the text for certain: part of a
/// character, or of a possible stop string, waits for the next token. An error
/// ends the iteration.
#[derive(Debug)]
pub struct Generator<'a> {
    session: &'a mut Session,
    tokenizer: &'a Tokenizer,
    sampler: Sampler,
    options: GenerateOptions,
    characters: Utf8Stream,
    stops: StopFilter,
    /// The prompt and what was generated.
    history: Vec<u32>,
    prompt_len: usize,
    /// A token that was chosen and is text, but has not been run.
    pending: Option<u32>,
    finish: Option<FinishReason>,
    failed: bool,
    stats: Stats,
}

impl<'a> Generator<'a> {
    /// Runs the prompt; what the session holds of it already is not run again.
    ///
    /// # Errors
    /// As [`Session::prompt`].
    pub fn new(
        session: &'a mut Session,
        tokenizer: &'a Tokenizer,
        sampler: Sampler,
        prompt: &[u32],
        options: &GenerateOptions,
    ) -> Result<Self, EngineError> {
        let begin = Instant::now();
        let prefill_tokens = session.prompt(prompt)?;
        let stats = Stats { prefill_tokens, prefill: begin.elapsed(), ..Stats::default() };
        Ok(Self {
            session,
            tokenizer,
            sampler,
            characters: Utf8Stream::default(),
            stops: StopFilter::new(&options.stop),
            options: options.clone(),
            history: prompt.to_vec(),
            prompt_len: prompt.len(),
            pending: None,
            finish: None,
            failed: false,
            stats,
        })
    }

    /// The tokens generated so far; an end-of-text token is not one of them.
    #[must_use]
    pub fn tokens(&self) -> &[u32] {
        &self.history[self.prompt_len..]
    }

    /// Why it ended; none while it goes on.
    #[must_use]
    pub fn finish_reason(&self) -> Option<FinishReason> {
        self.finish
    }

    /// What it took so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// Appends the text that the next token completes to `piece`.
    fn step(&mut self, piece: &mut String) -> Result<(), EngineError> {
        if self.tokens().len() >= self.options.max_tokens {
            return self.end(FinishReason::Length, piece);
        }
        let begin = Instant::now();
        let full = self.pending.is_some() && self.session.position() == self.session.context();
        if full {
            return self.end(FinishReason::Context, piece);
        }
        let token = self.choose()?;
        self.stats.decode += begin.elapsed();
        if !self.options.ignore_eos && self.tokenizer.eos_ids().contains(&token) {
            return self.end(FinishReason::Eos, piece);
        }
        self.history.push(token);
        self.pending = Some(token);
        if !self.tokenizer.is_special(token) {
            let mut text = String::new();
            self.characters.push(self.tokenizer.token_bytes(token), &mut text);
            if self.stops.push(&text, piece) {
                self.finish = Some(FinishReason::Stop);
            }
        }
        Ok(())
    }

    /// Runs the token that waits, if any, and chooses the next. Where the best few
    /// decide, the session need not make all logits.
    fn choose(&mut self) -> Result<u32, EngineError> {
        if let Some(token) = self.pending {
            self.pending = None;
            self.stats.decode_tokens += 1;
            if self.session.head() != HeadMode::Stored
                && let Some(k) = self.sampler.needs_top()
            {
                let top = self.session.decode_top(token, k)?;
                return Ok(self.sampler.sample_top(top));
            }
            self.session.decode(token)?;
        }
        self.sampler.sample(self.session.logits(), &self.history)
    }

    /// Lets out what was held back.
    fn end(&mut self, reason: FinishReason, piece: &mut String) -> Result<(), EngineError> {
        let mut text = String::new();
        self.characters.finish(&mut text);
        let stopped = self.stops.push(&text, piece);
        self.stops.finish(piece);
        self.finish = Some(if stopped { FinishReason::Stop } else { reason });
        Ok(())
    }
}

impl Iterator for Generator<'_> {
    type Item = Result<String, EngineError>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut piece = String::new();
        while self.finish.is_none() && !self.failed {
            if let Err(e) = self.step(&mut piece) {
                self.failed = true;
                return Some(Err(e));
            }
            if !piece.is_empty() {
                return Some(Ok(piece));
            }
        }
        None
    }
}

//! `bitnet chat`: a conversation, line by line.

use std::io::{self, BufRead, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use bitnet_core::ExitError;
use bitnet_engine::{FinishReason, GenerateOptions, Generator, Model, Session, Tokenizer};
use bitnet_format::chat_template::{Message, Role, Template};

use crate::generate::{prompt_ids, show};
use crate::interrupt;
use crate::options::{RunArgs, SamplingArgs, SourceArgs};

/// Talk to a model, line by line
///
/// A model with a chat template gets the conversation in its form. A base model
/// has none: it goes on from what was written so far, yours and its own.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  bitnet chat model.gguf
  bitnet chat model.gguf --system \"Answer in one sentence.\" --temperature 0.3
  printf 'fn add(a: i32\\n' | bitnet chat model.gguf -n 32

In the chat: /help, /reset forgets the conversation, /exit or Ctrl-D ends,
Ctrl-C stops an answer.")]
pub(crate) struct Args {
    /// Packed model; or a Hugging Face, checkpoint or run folder, or a GGUF file of
    /// another tool, which is packed each time it is opened
    model: PathBuf,
    /// What the model is told before the conversation (chat models)
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Most tokens of an answer
    #[arg(short = 'n', long = "tokens", value_name = "N", default_value_t = 256)]
    tokens: usize,
    /// End an answer before this string; can be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    source: SourceArgs,
}

/// Room for the conversation where none is asked for: the cache of a long
/// context can be larger than the model.
const DEFAULT_CONTEXT: usize = 4096;

const HELP: &str = "/reset  forget the conversation
/exit   end (Ctrl-D too)
/help   this
Ctrl-C stops an answer. Every other line is said to the model.";

static ANSWERING: AtomicBool = AtomicBool::new(false);

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let model = args.source.open(&args.model)?;
    let mut chat = Chat::new(args, &model)?;
    interrupt::install(|| {
        if !ANSWERING.load(Ordering::SeqCst) {
            eprintln!("\n(/exit or Ctrl-D ends)");
        }
    })?;
    let terminal = io::stdin().is_terminal();
    let mut lines = io::stdin().lock();
    loop {
        if terminal {
            eprint!("> ");
            io::stderr().flush()?;
        }
        let mut line = String::new();
        let read = lines.read_line(&mut line);
        if read.map_err(ExitError::bad_input).context("stdin")? == 0 {
            return Ok(());
        }
        match line.trim() {
            "" => {}
            "/exit" | "/quit" => return Ok(()),
            "/help" => eprintln!("{HELP}"),
            "/reset" => {
                chat.reset();
                eprintln!("(forgotten)");
            }
            command if command.starts_with('/') && is_command(command) => {
                eprintln!("no such command: {command} (/help lists them)");
            }
            _ => chat.say(line.trim_end_matches(['\n', '\r']))?,
        }
    }
}

/// A slash and letters alone: `/help`, and not the beginning of `/// Returns`.
fn is_command(line: &str) -> bool {
    line.len() > 1 && line[1..].chars().all(|c| c.is_ascii_lowercase())
}

/// A conversation and the session that holds it.
struct Chat<'a> {
    args: &'a Args,
    tokenizer: Tokenizer,
    session: Session,
    template: Option<Template>,
    /// The conversation of a chat model.
    messages: Vec<Message>,
    /// The conversation of a base model.
    text: String,
    answers: u64,
}

impl<'a> Chat<'a> {
    fn new(args: &'a Args, model: &Model) -> anyhow::Result<Self> {
        // Bad values are told before the conversation begins.
        args.sampling.sampler(0)?;
        let tokenizer = model.tokenizer().map_err(ExitError::from)?;
        let limit = model.config().max_position_embeddings;
        let context = args.run.context.unwrap_or(limit.min(DEFAULT_CONTEXT));
        let session = args.run.session(model, context).map_err(ExitError::from)?;
        let name = |id: Option<u32>| {
            let bytes = id.map(|id| tokenizer.token_bytes(id)).unwrap_or_default();
            String::from_utf8_lossy(bytes).into_owned()
        };
        let template = model
            .chat_template()
            .map(|source| {
                let (bos, eos) = (tokenizer.bos_id(), tokenizer.eos_ids().first().copied());
                Template::new(source, name(bos), name(eos)).map_err(ExitError::bad_input)
            })
            .transpose()
            .with_context(|| format!("{}: tokenizer.chat_template", args.model.display()))?;
        if template.is_none() {
            eprintln!("this is a base model without a chat template: it goes on from your text");
            if args.system.is_some() {
                let message = "--system needs a model with a chat template";
                return Err(ExitError::usage(message).into());
            }
        }
        let mut chat = Self {
            args,
            tokenizer,
            session,
            template,
            messages: Vec::new(),
            text: String::new(),
            answers: 0,
        };
        chat.reset();
        Ok(chat)
    }

    fn reset(&mut self) {
        self.text.clear();
        self.messages.clear();
        let system = self.args.system.iter();
        self.messages.extend(system.map(|s| Message { role: Role::System, content: s.clone() }));
    }

    /// Says a line and prints the answer. Where the conversation is full, says so
    /// and takes the line back.
    fn say(&mut self, line: &str) -> anyhow::Result<()> {
        let ids = match &self.template {
            Some(template) => {
                self.messages.push(Message { role: Role::User, content: line.to_owned() });
                let prompt = template.render(&self.messages, true).map_err(ExitError::bad_input)?;
                self.tokenizer.encode_with_special(&prompt).map_err(ExitError::from)?
            }
            None => prompt_ids(&self.tokenizer, &(self.text.clone() + line))?,
        };
        if ids.len() >= self.session.context() {
            if self.template.is_some() {
                self.messages.pop();
            }
            eprintln!(
                "the conversation is {} tokens, and there is room for {}: /reset forgets it",
                ids.len(),
                self.session.context()
            );
            return Ok(());
        }
        let answer = self.answer(&ids)?;
        if self.template.is_some() {
            self.messages.push(Message { role: Role::Assistant, content: answer });
        } else {
            self.text = format!("{}{line}{answer}\n", self.text);
        }
        Ok(())
    }

    fn answer(&mut self, ids: &[u32]) -> anyhow::Result<String> {
        // Another seed for each answer, the same in every run.
        let sampler = self.args.sampling.sampler(self.args.sampling.seed + self.answers)?;
        self.answers += 1;
        let options = GenerateOptions {
            max_tokens: self.args.tokens,
            stop: self.args.stop.clone(),
            ..GenerateOptions::default()
        };
        interrupt::clear();
        ANSWERING.store(true, Ordering::SeqCst);
        let mut text = String::new();
        let mut generator =
            Generator::new(&mut self.session, &self.tokenizer, sampler, ids, &options)
                .map_err(ExitError::from)?;
        while !interrupt::pressed() {
            let Some(piece) = generator.next() else { break };
            let piece = piece.map_err(ExitError::from)?;
            show(&piece)?;
            text += &piece;
        }
        ANSWERING.store(false, Ordering::SeqCst);
        show("\n")?;
        match generator.finish_reason() {
            None => eprintln!("(stopped)"),
            Some(FinishReason::Context) => eprintln!("(no room left: /reset)"),
            Some(FinishReason::Length) => eprintln!("(cut at {} tokens: -n)", self.args.tokens),
            Some(FinishReason::Eos | FinishReason::Stop) => {}
        }
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_a_slash_and_letters() {
        for (line, command) in [("/help", true), ("/", false), ("/// x", false), ("/a b", false)] {
            assert_eq!(is_command(line), command, "{line}");
        }
    }
}

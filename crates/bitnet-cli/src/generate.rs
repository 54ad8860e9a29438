//! `bitnet generate`: a prompt goes on, streamed to stdout.

use std::io::{self, IsTerminal, Read, Write};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, anyhow};
use bitnet_core::ExitError;
use bitnet_engine::{GenerateOptions, Generator, Tokenizer};
use bitnet_format::json::write_json;
use serde::Serialize;

use crate::interrupt;
use crate::options::{RunArgs, SamplingArgs, SourceArgs};

/// Let a model go on from a prompt
///
/// The text goes to stdout as it is made, without the prompt; speed goes to
/// stderr. Without PROMPT and --prompt-file the prompt is read from stdin.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  bitnet generate model.gguf \"pub fn main() {\" -n 64
  bitnet generate model.gguf \"Once upon a time\" --temperature 0
  bitnet generate model.gguf \"/// Returns\" --stop '}' --seed 7 --json result.json
  cat notes.txt | bitnet generate model.gguf -n 200
  bitnet generate hugging-face-folder \"Once upon a time\"
  bitnet generate ggml-model-i2_s.gguf \"Once upon a time\" --hidden-act relu2

JSON keys: model, prompt, text, finish_reason (eos, stop, length, context, interrupted),
prompt_tokens, generated_tokens, tokens (ids of the text), prefill_tokens_per_second,
decode_tokens_per_second, seconds, seed, kv, head (stored, int8, int4), threads, isa.")]
pub(crate) struct Args {
    /// Packed model; or a Hugging Face, checkpoint or run folder, or a GGUF file of
    /// another tool, which is packed each time it is opened
    model: PathBuf,
    /// The text to go on from
    #[arg(conflicts_with = "prompt_file")]
    prompt: Option<String>,
    /// Read the prompt from a file
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// Most tokens to generate
    #[arg(short = 'n', long = "tokens", value_name = "N", default_value_t = 128)]
    tokens: usize,
    /// End the text before this string; can be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    source: SourceArgs,
    /// Write text and speed as JSON to FILE, or to stdout (instead of the text) with -
    #[arg(long, value_name = "FILE|-")]
    json: Option<String>,
}

/// What `--json` gets; the keys are stable.
#[derive(Debug, Serialize)]
struct Report {
    model: PathBuf,
    prompt: String,
    text: String,
    finish_reason: &'static str,
    prompt_tokens: usize,
    generated_tokens: usize,
    tokens: Vec<u32>,
    prefill_tokens_per_second: f64,
    decode_tokens_per_second: f64,
    seconds: f64,
    seed: u64,
    kv: &'static str,
    head: &'static str,
    threads: usize,
    isa: &'static str,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let sampler = args.sampling.sampler(args.sampling.seed)?;
    let model = args.source.open(&args.model)?;
    let tokenizer = model.tokenizer().map_err(ExitError::from)?;
    let prompt = args.prompt()?;
    let ids = prompt_ids(&tokenizer, &prompt)?;
    // Room for what can be asked for, not for the longest context there is.
    let limit = model.config().max_position_embeddings;
    let room = ids.len().saturating_add(args.tokens).clamp(1, limit);
    let context = args.run.context.unwrap_or(room);
    let mut session = args.run.session(&model, context).map_err(ExitError::from)?;
    let (kv, head) = (session.kv().name(), session.head().name());
    let (threads, isa) = (session.workers().threads(), session.kernels().name());
    interrupt::install(|| ())?;

    let started = Instant::now();
    let options = GenerateOptions {
        max_tokens: args.tokens,
        stop: args.stop.clone(),
        ..GenerateOptions::default()
    };
    let mut generator = Generator::new(&mut session, &tokenizer, sampler, &ids, &options)
        .map_err(ExitError::from)?;
    let quiet = args.json.as_deref() == Some("-");
    let mut text = String::new();
    while !interrupt::pressed() {
        let Some(piece) = generator.next() else { break };
        let piece = piece.map_err(ExitError::from)?;
        if !quiet {
            show(&piece)?;
        }
        text += &piece;
    }
    if !quiet && !text.ends_with('\n') {
        show("\n")?;
    }
    let stats = generator.stats();
    let report = Report {
        model: args.model.clone(),
        prompt,
        text,
        finish_reason: generator.finish_reason().map_or("interrupted", |r| r.name()),
        prompt_tokens: ids.len(),
        generated_tokens: generator.tokens().len(),
        tokens: generator.tokens().to_vec(),
        prefill_tokens_per_second: stats.prefill_tokens_per_second(),
        decode_tokens_per_second: stats.decode_tokens_per_second(),
        seconds: started.elapsed().as_secs_f64(),
        seed: args.sampling.seed,
        kv,
        head,
        threads,
        isa,
    };
    eprintln!("{}", report.speed());
    if let Some(dest) = &args.json {
        write_json(dest, &report).context("cannot write the result")?;
    }
    if interrupt::pressed() {
        return Err(ExitError::interrupted("interrupted").into());
    }
    Ok(())
}

/// Prints a piece at once.
pub(crate) fn show(piece: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(piece.as_bytes())?;
    out.flush()
}

/// The ids of a prompt. A model begins a text with its BOS where it has one: an
/// empty prompt becomes that.
pub(crate) fn prompt_ids(tokenizer: &Tokenizer, prompt: &str) -> Result<Vec<u32>, ExitError> {
    let mut ids = tokenizer.encode_prompt(prompt)?;
    if ids.is_empty() {
        ids.extend(tokenizer.bos_id());
    }
    if ids.is_empty() {
        return Err(ExitError::usage(
            "the prompt is empty, and the model has no BOS to begin with",
        ));
    }
    Ok(ids)
}

impl Args {
    fn prompt(&self) -> anyhow::Result<String> {
        if let Some(prompt) = &self.prompt {
            return Ok(prompt.clone());
        }
        if let Some(path) = &self.prompt_file {
            let text = std::fs::read_to_string(path);
            return text.map_err(|e| {
                ExitError::bad_input(anyhow!("{}: cannot be read: {e}", path.display())).into()
            });
        }
        if io::stdin().is_terminal() {
            let message = "no prompt: give PROMPT or --prompt-file, or pipe one in";
            return Err(ExitError::usage(message).into());
        }
        let mut text = String::new();
        io::stdin()
            .read_to_string(&mut text)
            .map_err(|e| ExitError::bad_input(anyhow!("the prompt on stdin: {e}")))?;
        Ok(text)
    }
}

impl Report {
    fn speed(&self) -> String {
        format!(
            "prompt {} tokens, {:.0} tokens/s; text {} tokens, {:.1} tokens/s; \
             ended by {} ({}, {} threads, kv {}, head {})",
            self.prompt_tokens,
            self.prefill_tokens_per_second,
            self.generated_tokens,
            self.decode_tokens_per_second,
            self.finish_reason,
            self.isa,
            self.threads,
            self.kv,
            self.head,
        )
    }
}

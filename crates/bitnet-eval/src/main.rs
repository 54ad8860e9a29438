//! The `bitnet-eval` command: `perplexity` scores a packed model on token shards
//! or a text, `bench` measures its speed, `growth` shows benches of many sizes, `plan`
//! predicts what a model needs and how fast it will be, `compare` shows several models
//! side by side.
//!
//! Exit codes: 0 done, 1 failed, 2 bad usage, 3 bad input file, 130 interrupted.

#![forbid(unsafe_code)]

mod bench_command;
mod compare_command;
mod plan_command;

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use bitnet_core::Activation;
use bitnet_core::exit::{self, Exit, ExitError};
use bitnet_data::Split;
use bitnet_engine::{KvType, LoadOptions, Model, OpenOptions, Session, SessionOptions, Tokenizer};
use bitnet_eval::{
    EngineModel, EvalError, Mode, Perplexity, PerplexityOptions, TokenSource, growth, open_shards,
    perplexity, read_text,
};
use bitnet_format::json::write_json;
use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::Serialize;

use bench_command::BenchArgs;
use compare_command::CompareArgs;
use plan_command::PlanArgs;

/// Score and measure packed ternary language models.
#[derive(Debug, Parser)]
#[command(
    name = "bitnet-eval",
    version,
    arg_required_else_help = true,
    after_help = "\
Exit codes: 0 done, 1 failed, 2 bad usage or config, 3 bad input file, 130 interrupted.
BITNET_ISA forces an instruction set (portable, avx2, avx512vnni, ...)."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Perplexity(PerplexityArgs),
    Bench(BenchArgs),
    Growth(GrowthArgs),
    Plan(PlanArgs),
    Compare(CompareArgs),
}

/// How speed changes with size: benches of several models as one table and plot
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  bitnet-eval growth 125m.json 700m.json 3b.json --plot growth.png

Every JSON file is what `bitnet-eval bench --json FILE` wrote. The table (Markdown) goes
to stdout; rows are a model in one setting, decode is its tg test, prefill its pp test.")]
struct GrowthArgs {
    /// Results of bitnet-eval bench
    #[arg(required = true)]
    bench: Vec<PathBuf>,
    /// Draw tokens/s against ternary weights into FILE.png or FILE.svg
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

/// How likely a text is under a model: perplexity, nats per token, bits per byte
///
/// On token shards the text is scored in the windows of training's evaluation, so
/// that the loss can be compared with training's validation loss.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  bitnet-eval perplexity model.gguf --data data/corpus
  bitnet-eval perplexity model.gguf --data data/corpus --context 256 --windows 64
  bitnet-eval perplexity model.gguf --text book.txt --mode llama-cpp --context 512
  bitnet-eval perplexity model.gguf --text book.txt --mode sliding --stride 128 --json -
  bitnet-eval perplexity hugging-face-folder --text book.txt --ptq ternary

Modes:
  windows    non-overlapping windows, every prediction scored (training's evaluation);
             a text is scored to its end, shards in whole windows
  llama-cpp  chunks of --context tokens, the second half of each scored
  sliding    windows --stride apart, each token scored once

JSON keys: model, source, split, data_hash, mode, context, stride, kv, threads, isa,
tokens, windows, nats, perplexity, bits_per_byte, bytes, tokens_per_second, seconds.")]
struct PerplexityArgs {
    /// Packed model; or a Hugging Face, checkpoint or run folder, or a GGUF file of
    /// another tool, which is packed each time it is opened
    model: PathBuf,
    /// Folder of token shards that bitnet-data wrote
    #[arg(long, value_name = "DIR", required_unless_present = "text", conflicts_with = "text")]
    data: Option<PathBuf>,
    /// Which split of --data
    #[arg(long, value_enum, default_value_t = SplitArg::Val, conflicts_with = "text")]
    split: SplitArg,
    /// A UTF-8 text file
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// How the text is cut to fit the context
    #[arg(long, value_enum, default_value_t = ModeArg::Windows)]
    mode: ModeArg,
    /// Length of a window in tokens [default: the model's context; llama-cpp: at most 512]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Distance of sliding windows in tokens [default: half of the context]
    #[arg(long, value_name = "N")]
    stride: Option<usize>,
    /// Stop after the window that reaches N scored tokens
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    max_tokens: Option<u64>,
    /// Stop after N windows (training's eval.windows)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    windows: Option<u64>,
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    source: SourceArgs,
}

/// What a model of another tool leaves open; of several models, for each of them. (The
/// engine, which `bitnet` shares with this program, has no clap to declare them once.)
#[derive(Debug, Args)]
#[command(next_help_heading = "Models of other tools")]
struct SourceArgs {
    /// A tokenizer.json in place of the model's
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// The activation of a GGUF file whose architecture means another one
    #[arg(long, value_enum)]
    hidden_act: Option<ActArg>,
    /// Quantise a float model that was never trained for it: its quality collapses,
    /// and this measures by how much
    #[arg(long, value_enum)]
    ptq: Option<PtqArg>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ActArg {
    Relu2,
    Silu,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum PtqArg {
    Ternary,
}

impl SourceArgs {
    fn options(&self) -> OpenOptions {
        OpenOptions {
            hidden_act: self.hidden_act.map(|act| match act {
                ActArg::Relu2 => Activation::Relu2,
                ActArg::Silu => Activation::Silu,
            }),
            tokenizer: self.tokenizer.clone(),
            ptq: self.ptq.is_some(),
            without_text: false,
        }
    }
}

#[derive(Debug, Args)]
struct RunArgs {
    /// Precision of the key and value cache
    #[arg(long, value_enum, default_value_t = KvArg::F32)]
    kv: KvArg,
    /// Threads [default: the physical cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Write the result as JSON to FILE, or to stdout with -
    #[arg(long, value_name = "FILE|-")]
    json: Option<String>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum SplitArg {
    Val,
    Train,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ModeArg {
    Windows,
    LlamaCpp,
    Sliding,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum KvArg {
    F32,
    F16,
    Int8,
}

impl RunArgs {
    fn session(&self, context: Option<usize>) -> SessionOptions {
        let kv = match self.kv {
            KvArg::F32 => KvType::F32,
            KvArg::F16 => KvType::F16,
            KvArg::Int8 => KvType::Int8,
        };
        let threads = self.threads.map(usize::from);
        SessionOptions { kv, context, threads, ..SessionOptions::default() }
    }

    /// The table on stdout and JSON where it was asked for; JSON on stdout
    /// replaces the table.
    fn print(&self, table: &str, result: &impl Serialize) -> anyhow::Result<()> {
        if self.json.as_deref() != Some("-") {
            // Not `print!`: it panics where the reader has gone away.
            let mut out = std::io::stdout().lock();
            out.write_all(table.as_bytes()).and_then(|()| out.flush()).context("stdout")?;
        }
        match &self.json {
            Some(dest) => write_json(dest, result).context("cannot write the result"),
            None => Ok(()),
        }
    }
}

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let cli = Cli::parse();
    // Nothing here is worth saving: leave at once, with the documented code.
    if let Err(error) = ctrlc::set_handler(|| std::process::exit(Exit::Interrupted.code().into())) {
        tracing::warn!("no Ctrl-C handler: {error}");
    }
    let result = match &cli.command {
        Command::Perplexity(args) => run_perplexity(args),
        Command::Bench(args) => args.run(),
        Command::Growth(args) => run_growth(args),
        Command::Plan(args) => args.run(),
        Command::Compare(args) => args.run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", exit::chain(error.as_ref()));
            ExitCode::from(exit::code_of(error.as_ref()).code())
        }
    }
}

/// The error with its exit code.
fn coded(error: impl Into<EvalError>) -> ExitError {
    let error = error.into();
    ExitError::new(error.exit(), error)
}

/// What `perplexity` reports; the keys are stable.
#[derive(Debug, Serialize)]
struct PerplexityReport<'a> {
    model: &'a Path,
    source: &'a Path,
    split: Option<&'static str>,
    /// The corpus's hash in the shards' manifest, or the text file's sha256.
    data_hash: String,
    mode: Mode,
    context: usize,
    stride: Option<usize>,
    kv: &'static str,
    threads: usize,
    isa: &'static str,
    #[serde(flatten)]
    result: Perplexity,
}

fn run_growth(args: &GrowthArgs) -> anyhow::Result<()> {
    let points = growth::read(&args.bench).map_err(coded)?;
    if let Some(plot) = &args.plot {
        growth::draw(&points, plot).map_err(coded)?;
    }
    let mut out = std::io::stdout().lock();
    out.write_all(growth::table(&points).as_bytes()).and_then(|()| out.flush()).context("stdout")
}

fn run_perplexity(args: &PerplexityArgs) -> anyhow::Result<()> {
    let options = LoadOptions { source: args.source.options(), ..LoadOptions::default() };
    let model = Model::open(&args.model, &options).map_err(coded)?;
    let tokenizer = model.tokenizer().map_err(coded)?;
    let limit = model.config().max_position_embeddings;
    let mode = match args.mode {
        ModeArg::Windows => Mode::Windows,
        ModeArg::LlamaCpp => Mode::LlamaCpp,
        ModeArg::Sliding => Mode::Sliding,
    };
    let default = if mode == Mode::LlamaCpp { limit.min(512) } else { limit };
    let context = args.context.unwrap_or(default);
    if context > limit {
        return Err(coded(EvalError::LongContext { context, limit }).into());
    }
    if args.stride.is_some() && mode != Mode::Sliding {
        let message = format!("--stride is for --mode sliding, not {}", mode.name());
        return Err(coded(EvalError::Usage(message)).into());
    }
    let stride = args.stride.unwrap_or((context / 2).max(1));
    let input = Input::open(args, &model, &tokenizer)?;
    let session = Session::new(&model, &args.run.session(None)).map_err(coded)?;
    let (threads, isa, kv) =
        (session.workers().threads(), session.kernels().name(), session.kv().name());
    let options = PerplexityOptions {
        mode,
        context,
        stride,
        max_tokens: args.max_tokens,
        max_windows: args.windows,
        bos: tokenizer.bos_id(),
    };
    let mut progress = Progress::new();
    let result = perplexity(
        &mut EngineModel::new(session),
        &input.tokens,
        &options,
        &|token| text_bytes(&tokenizer, token),
        &mut |done, total, nats| progress.show(done, total, nats),
    )
    .map_err(coded)?;
    progress.finish();
    let report = PerplexityReport {
        model: &args.model,
        source: input.path,
        split: input.split,
        data_hash: input.hash,
        mode,
        context,
        stride: (mode == Mode::Sliding).then_some(stride),
        kv,
        threads,
        isa,
        result,
    };
    args.run.print(&report.table(), &report)
}

/// Bytes of text a token stands for: none for a special one.
fn text_bytes(tokenizer: &Tokenizer, token: u32) -> usize {
    if tokenizer.is_special(token) { 0 } else { tokenizer.token_bytes(token).len() }
}

/// What is scored.
struct Input<'a> {
    path: &'a Path,
    split: Option<&'static str>,
    hash: String,
    tokens: TokenSource,
}

impl<'a> Input<'a> {
    fn open(
        args: &'a PerplexityArgs,
        model: &Model,
        tokenizer: &Tokenizer,
    ) -> Result<Self, ExitError> {
        if let Some(path) = &args.text {
            let (text, hash) = read_text(path).map_err(coded)?;
            // A BOS in front, where there is one, lets the first token be scored.
            let mut tokens: Vec<u32> = tokenizer.bos_id().into_iter().collect();
            tokens.extend(tokenizer.encode(&text).map_err(coded)?);
            let tokens = TokenSource::Tokens { tokens, text: true };
            return Ok(Self { path, split: None, hash, tokens });
        }
        let Some(path) = &args.data else {
            return Err(ExitError::usage("--data or --text is needed"));
        };
        let split = match args.split {
            SplitArg::Val => Split::Validation,
            SplitArg::Train => Split::Train,
        };
        let tokens = open_shards(path, split, model.tokenizer_json()).map_err(coded)?;
        let hash = match &tokens {
            TokenSource::Shards(shards) => shards.manifest().corpus_hash.clone(),
            TokenSource::Tokens { .. } => String::new(),
        };
        Ok(Self { path, split: Some(split.name()), hash, tokens })
    }
}

impl PerplexityReport<'_> {
    fn table(&self) -> String {
        let r = &self.result;
        let split = self.split.map_or(String::new(), |s| format!(" ({s})"));
        let bits = r.bits_per_byte.map_or("-".into(), |b| format!("{b:.4}"));
        format!(
            "model          {}\n\
             text           {}{split}\n\
             mode           {}, context {}, kv {}, {} threads, {}\n\
             scored         {} tokens ({} bytes) in {} windows\n\
             loss           {:.6} nats/token\n\
             perplexity     {:.4}\n\
             bits per byte  {bits}\n\
             speed          {:.0} tokens/s ({:.2} s)\n",
            self.model.display(),
            self.source.display(),
            self.mode.name(),
            self.context,
            self.kv,
            self.threads,
            self.isa,
            r.tokens,
            r.bytes,
            r.windows,
            r.nats,
            r.perplexity,
            r.tokens_per_second,
            r.seconds,
        )
    }
}

/// A bar where stderr is a terminal, else a line every few seconds.
struct Progress {
    bar: Option<indicatif::ProgressBar>,
    last: Instant,
}

impl Progress {
    /// Between two lines.
    const PAUSE: Duration = Duration::from_secs(5);

    fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = "{bar:30} {pos}/{len} tokens, {per_sec}, {eta} left, {msg}";
            let bar = indicatif::ProgressBar::new(0);
            if let Ok(style) = indicatif::ProgressStyle::with_template(style) {
                bar.set_style(style);
            }
            bar
        });
        Self { bar, last: Instant::now() }
    }

    fn show(&mut self, done: u64, total: u64, nats: f64) {
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
            bar.set_message(format!("{nats:.4} nats"));
        } else if self.last.elapsed() > Self::PAUSE {
            self.last = Instant::now();
            eprintln!("{done}/{total} tokens, {nats:.4} nats");
        }
    }

    fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

//! The `bitnet-eval` command: `perplexity` scores a packed model on token shards
//! or texts, `tasks` on questions with several answers, `bench` measures its speed,
//! `growth` shows benches of many sizes, `plan` predicts what a model needs and how
//! fast it will be, `compare` shows several models side by side.
//!
//! Exit codes: 0 done, 1 failed, 2 bad usage, 3 bad input file, 130 interrupted.

#![forbid(unsafe_code)]

mod bench_command;
mod compare_command;
mod perplexity_command;
mod perplexity_report;
mod plan_command;
mod progress;
mod tasks_command;

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use bitnet_core::Activation;
use bitnet_core::exit::{self, Exit, ExitError};
use bitnet_engine::{KvType, LoadOptions, OpenOptions, SessionOptions};
use bitnet_eval::{EvalError, growth};
use bitnet_format::gguf::blocks::I2sLayout;
use bitnet_format::json::write_json;
use bitnet_format::pack::DenseType;
use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::Serialize;

use bench_command::BenchArgs;
use compare_command::CompareArgs;
use perplexity_command::PerplexityArgs;
use plan_command::PlanArgs;
use tasks_command::TasksArgs;

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
    Tasks(TasksArgs),
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
    /// The builds of bitnet.cpp that wrote a GGUF file of I2_S: x86 or arm. Nothing in the
    /// file tells, and read as the other it speaks garbage [default: x86]
    #[arg(long, value_name = "BUILDS")]
    i2s: Option<I2sLayout>,
    /// Quantise a float model that was never trained for it: its quality collapses,
    /// and this measures by how much
    #[arg(long, value_enum)]
    ptq: Option<PtqArg>,
    /// Type of a float model's linear weights: f32, f16, int8 or int4 (blocks of 32
    /// with a scale, 8.5 and 4.5 bits a weight), or auto: as they are stored
    #[arg(long, value_name = "TYPE", default_value = "auto", conflicts_with = "ptq")]
    dense: DenseType,
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
    /// The first of these options that was given.
    fn given(&self) -> Option<&'static str> {
        let given = [
            ("--tokenizer", self.tokenizer.is_some()),
            ("--hidden-act", self.hidden_act.is_some()),
            ("--ptq", self.ptq.is_some()),
            ("--i2s", self.i2s.is_some()),
            ("--dense", self.dense != DenseType::Auto),
        ];
        given.into_iter().find(|(_, given)| *given).map(|(option, _)| option)
    }

    fn options(&self) -> LoadOptions {
        let source = OpenOptions {
            hidden_act: self.hidden_act.map(|act| match act {
                ActArg::Relu2 => Activation::Relu2,
                ActArg::Silu => Activation::Silu,
            }),
            i2s: self.i2s,
            tokenizer: self.tokenizer.clone(),
            ptq: self.ptq.is_some(),
            without_text: false,
        };
        LoadOptions { source, dense: self.dense, ..LoadOptions::default() }
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

    /// Text on stdout.
    fn show(&self, text: &str) -> anyhow::Result<()> {
        // Not `print!`: it panics where the reader has gone away.
        let mut out = std::io::stdout().lock();
        out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("stdout")
    }

    /// The table on stdout and JSON where it was asked for; JSON on stdout
    /// replaces the table.
    fn print(&self, table: &str, result: &impl Serialize) -> anyhow::Result<()> {
        if self.json.as_deref() != Some("-") {
            self.show(table)?;
        }
        match &self.json {
            Some(dest) => write_json(dest, result).context("cannot write the result"),
            None => Ok(()),
        }
    }
}

/// Buffers begin with a cache line, as the kernels like it.
#[global_allocator]
static ALLOCATOR: bitnet_engine::LineAllocator = bitnet_engine::LineAllocator;

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
        Command::Perplexity(args) => args.run(),
        Command::Tasks(args) => args.run(),
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

fn run_growth(args: &GrowthArgs) -> anyhow::Result<()> {
    let points = growth::read(&args.bench).map_err(coded)?;
    if let Some(plot) = &args.plot {
        growth::draw(&points, plot).map_err(coded)?;
    }
    let mut out = std::io::stdout().lock();
    out.write_all(growth::table(&points).as_bytes()).and_then(|()| out.flush()).context("stdout")
}

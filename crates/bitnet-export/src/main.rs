//! `bitnet-export SRC -o model.gguf`, `bitnet-export import` and `bitnet-export
//! synthetic`: the commands around the library.

#![forbid(unsafe_code)]

use std::fmt::Display;
use std::io::{IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use bitnet_core::{Activation, ExitError, Layout, exit};
use bitnet_export::{
    DenseType, ExportError, ExportOptions, Format, LayoutChoice, OpenOptions, Phase, Progress,
    Report, SyntheticOptions, SyntheticReport, export_with, model_config, synthesize,
};
use bitnet_format::gguf::blocks::I2sLayout;
use bitnet_format::json::write_json;
use clap::{Parser, Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

/// Write a checkpoint, or any model that is read here, in one of several forms.
///
/// Every weight is read back and compared, and the engine must reproduce
/// training's logits, before the output gets its name; an existing file is
/// replaced only then. (A folder called `synthetic` is `./synthetic`.)
///
/// Exit codes: 0 done, 1 failed, 2 bad usage, 3 bad source, 130 interrupted.
#[derive(Debug, Parser)]
#[command(name = "bitnet-export", version)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    pack: Pack,
}

#[derive(Debug, Subcommand)]
enum Command {
    Import(Import),
    Synthetic(Synthetic),
}

/// Pack a model of another tool for this engine: `--format packed`.
///
/// SRC is a Hugging Face folder (packed ternary weights of either meaning of
/// their scale, master weights, or floats; shards too) or a GGUF file of
/// llama.cpp or bitnet.cpp (I2_S, TQ1_0, TQ2_0, F32, F16, BF16,
/// Q8_0, Q6_K, Q4_K, Q4_0).
#[derive(Debug, clap::Args)]
struct Import {
    #[command(flatten)]
    source: Src,
    #[command(flatten)]
    common: Common,
}

/// What is read and written.
#[derive(Debug, clap::Args)]
struct Src {
    /// A checkpoint folder, a run folder or its `checkpoints` (the newest is
    /// taken), a Hugging Face folder, or a GGUF file.
    #[arg(required = true, value_name = "SRC")]
    checkpoint: Option<PathBuf>,
    /// The file or folder to write.
    #[arg(short, long, value_name = "PATH", required = true)]
    output: Option<PathBuf>,
    /// Type of the linear weights of a float model in a packed file: f32, f16, int8
    /// or int4 (blocks of 32 with a scale, 8.5 and 4.5 bits a weight; f16 where rows
    /// are not whole blocks), or auto: as
    /// they are stored. Where weights are rounded, training's logits are not
    /// compared.
    #[arg(long, value_name = "TYPE", default_value = "auto")]
    dense: DenseType,
    /// A tokenizer.json in place of the source's.
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// The activation of a GGUF file whose architecture means another one.
    #[arg(long, value_enum)]
    hidden_act: Option<Act>,
    /// The builds of bitnet.cpp that wrote a GGUF file of I2_S: x86 or arm. Nothing in
    /// the file tells, and read as the other it speaks garbage [default: x86].
    #[arg(long, value_name = "BUILDS")]
    i2s: Option<I2sLayout>,
    /// Quantise a float model that was never trained for it. Its quality
    /// collapses: for measuring how much.
    #[arg(long, value_enum)]
    ptq: Option<Ptq>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Act {
    Relu2,
    Silu,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Ptq {
    Ternary,
}

#[derive(Debug, clap::Args)]
struct Pack {
    #[command(flatten)]
    source: Src,
    /// The form of the output: packed (the file of this engine), gguf-tq1_0,
    /// gguf-tq2_0, gguf-i2_s (128/32, x86), gguf-f16, hf-packed or hf-bf16 (the
    /// last two are folders).
    #[arg(long, default_value = "packed", value_parser = format)]
    format: Format,
    #[command(flatten)]
    common: Common,
}

/// Write a model of random weights in the shape of a training config.
///
/// The file is valid and runs; what it says is noise. It is written as a stream,
/// in constant memory. A seed gives the same weights on every machine and in
/// every layout.
#[derive(Debug, clap::Args)]
struct Synthetic {
    /// A training config (only its table `model` is read): a path, or the name
    /// of a file in a folder `configs` of the working directory, or of the
    /// program's folder or one above it.
    #[arg(long, value_name = "FILE|NAME")]
    config: String,
    /// Change a key of the table: model.num_hidden_layers=4. May be repeated.
    #[arg(long, value_name = "model.KEY=VALUE")]
    set: Vec<String>,
    /// Seed of the weights.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The file to write.
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, clap::Args)]
struct Common {
    /// Byte layout of the ternary weights: p2 (2 bits), p5 (1.6 bits), or auto:
    /// p2 up to 64 MiB of them, p5 above. The file is for every machine; one
    /// without AVX-512 VBMI or NEON's table look-up is slow with p5.
    #[arg(long, default_value = "auto", value_parser = layout)]
    layout: LayoutChoice,
    /// The model's name in the file [default: the run's or config's name].
    #[arg(long)]
    name: Option<String>,
    /// Write the report as JSON to a file, or to standard output (-).
    #[arg(long, value_name = "FILE|-")]
    json: Option<String>,
}

fn format(name: &str) -> Result<Format, String> {
    Format::from_name(name).ok_or_else(|| {
        let known = Format::ALL.map(Format::name).join(", ");
        format!("unknown format; known: {known}")
    })
}

fn layout(name: &str) -> Result<LayoutChoice, String> {
    LayoutChoice::from_name(name).ok_or_else(|| {
        let known = Layout::ALL.map(Layout::name).join(", ");
        format!("unknown layout; known: auto, {known}")
    })
}

/// Buffers begin with a cache line, as the kernels like it.
#[global_allocator]
static ALLOCATOR: bitnet_engine::LineAllocator = bitnet_engine::LineAllocator;

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(exit::code_of(error.as_ref()).code())
        }
    }
}

fn run(args: &Args) -> anyhow::Result<()> {
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&interrupted);
    ctrlc::set_handler(move || flag.store(true, Ordering::Relaxed))
        .context("no handler for Ctrl-C")?;
    let mut bar = Bar::default();
    let mut progress = |p| {
        bar.show(p);
        match interrupted.load(Ordering::Relaxed) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    };
    match &args.command {
        Some(Command::Synthetic(args)) => {
            let report = synthetic(args, &mut progress);
            bar.end();
            print(&args.common, &report.map_err(ExitError::from)?)
        }
        Some(Command::Import(args)) => {
            let report = pack(&args.source, Format::Packed, &args.common, &mut progress);
            bar.end();
            print(&args.common, &report.map_err(ExitError::from)?)
        }
        None => {
            let Pack { source, format, common } = &args.pack;
            let report = pack(source, *format, common, &mut progress);
            bar.end();
            print(common, &report.map_err(ExitError::from)?)
        }
    }
}

type OnProgress<'p> = &'p mut dyn FnMut(Progress) -> ControlFlow<()>;

fn pack(
    args: &Src,
    format: Format,
    common: &Common,
    progress: OnProgress<'_>,
) -> Result<Report, ExportError> {
    let options = ExportOptions {
        format,
        layout: common.layout,
        name: common.name.clone(),
        dense: args.dense,
        open: OpenOptions {
            hidden_act: args.hidden_act.map(|act| match act {
                Act::Relu2 => Activation::Relu2,
                Act::Silu => Activation::Silu,
            }),
            i2s: args.i2s,
            tokenizer: args.tokenizer.clone(),
            ptq: args.ptq.is_some(),
            without_text: false,
        },
    };
    // Clap asks for both where there is no subcommand.
    let (source, output) = (args.checkpoint.as_deref(), args.output.as_deref());
    export_with(source.unwrap_or("".as_ref()), output.unwrap_or("".as_ref()), &options, progress)
}

fn synthetic(args: &Synthetic, progress: OnProgress<'_>) -> Result<SyntheticReport, ExportError> {
    let config = model_config(&args.config, &args.set)?;
    let stem = Path::new(&args.config).file_name().map(|n| n.to_string_lossy());
    let stem = stem.as_deref().map(|n| n.strip_suffix(".toml").unwrap_or(n));
    let default_name = format!("{}-synthetic", stem.unwrap_or_default());
    let options = SyntheticOptions {
        layout: args.common.layout,
        seed: args.seed,
        name: args.common.name.clone().unwrap_or(default_name),
    };
    synthesize(&config, &args.output, &options, progress)
}

/// The table goes to standard output, or to standard error where the JSON
/// takes that place.
fn print(args: &Common, report: &(impl Serialize + Display)) -> anyhow::Result<()> {
    if args.json.as_deref() == Some("-") {
        eprintln!("{report}");
    } else {
        writeln!(std::io::stdout(), "{report}").context("standard output")?;
    }
    if let Some(dest) = &args.json {
        write_json(dest, report).with_context(|| format!("the report for {dest}"))?;
    }
    Ok(())
}

/// Without a terminal, a line of progress at most this often.
const LINES_EVERY: Duration = Duration::from_secs(5);

/// A bar on a terminal; elsewhere a line for each phase, and more in a long one.
#[derive(Default)]
struct Bar {
    shown: Option<Shown>,
}

/// The phase that is shown.
struct Shown {
    phase: Phase,
    text: &'static str,
    bar: Option<ProgressBar>,
    start: Instant,
    last_line: Instant,
}

impl Shown {
    fn new(p: Progress) -> Self {
        let (text, style) = match p.phase {
            Phase::Pack => ("packing", PARAMETERS),
            Phase::Compare => ("comparing", PARAMETERS),
            Phase::Golden => ("running the engine", PARAMETERS),
            Phase::Generate => ("writing", BYTES),
            Phase::Flush => ("flushing to the disk", BYTES),
        };
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(p.total), ProgressDrawTarget::stderr());
            if let Ok(style) = ProgressStyle::with_template(style) {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(200));
            bar.set_message(text);
            bar
        });
        if bar.is_none() {
            let unit = if style == BYTES { "bytes" } else { "parameters" };
            eprintln!("{text} ({} {unit})", p.total);
        }
        let now = Instant::now();
        Self { phase: p.phase, text, bar, start: now, last_line: now }
    }

    fn update(&mut self, p: Progress) {
        if let Some(bar) = &self.bar {
            bar.set_position(p.done);
        } else if self.last_line.elapsed() >= LINES_EVERY {
            self.last_line = Instant::now();
            let share = p.done as f64 / p.total.max(1) as f64;
            let per_second = p.done as f64 / self.start.elapsed().as_secs_f64();
            let left = (p.total.saturating_sub(p.done)) as f64 / per_second.max(1.0);
            let (text, percent, millions) = (self.text, 100.0 * share, per_second / 1e6);
            let unit = if self.phase == Phase::Generate { "MB" } else { "M parameters" };
            eprintln!("{text}: {percent:.0} %, {millions:.0} {unit}/s, {left:.0} s left");
        }
    }
}

const PARAMETERS: &str = "{msg:20} {bar:30} {percent:>3} % {per_sec} {eta} left";
const BYTES: &str = "{msg:20} {bar:30} {percent:>3} % {decimal_bytes_per_sec} {eta} left";

impl Bar {
    fn show(&mut self, p: Progress) {
        if self.shown.as_ref().is_none_or(|shown| shown.phase != p.phase) {
            self.end();
        }
        self.shown.get_or_insert_with(|| Shown::new(p)).update(p);
    }

    fn end(&mut self) {
        if let Some(bar) = self.shown.take().and_then(|shown| shown.bar) {
            bar.finish_and_clear();
        }
    }
}

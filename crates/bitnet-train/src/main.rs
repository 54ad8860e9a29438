//! `bitnet-train`: trains a model from a config and a folder of token shards.

#![forbid(unsafe_code)]

mod commands;

use std::error::Error;
use std::fmt::Display;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use bitnet_core::{Exit, ExitError, exit};
use bitnet_format::json::write_json;
use bitnet_kernels::Kernels;
use bitnet_train::devices::DeviceList;
use bitnet_train::progress::{Notices, View, notice, restore_terminal};
use bitnet_train::{Ranks, RunOptions, Stop, TrainConfig, TrainError, config_file};
use clap::{Parser, Subcommand};
use serde::Serialize;

/// Train a ternary language model.
///
/// Ctrl-C saves a checkpoint and stops; a second Ctrl-C stops at once.
/// Exit codes: 0 done, 1 failed, 2 bad usage or config, 3 bad input file,
/// 130 interrupted.
#[derive(Debug, Parser)]
#[command(version, args_override_self = true, args_conflicts_with_subcommands = true)]
struct Args {
    #[command(subcommand)]
    command: Option<Command>,

    /// The config: a path, or the name of a file in a `configs` folder. With
    /// --resume and --run it may be left out: the run's own config is taken.
    #[arg(long, value_name = "FILE|NAME")]
    config: Option<String>,

    /// Change a key of the config, as table.key=value (TOML); can be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,

    /// Steps of the whole run (schedule.steps).
    #[arg(long, value_name = "N")]
    steps: Option<u64>,

    /// Stop after this step and save a checkpoint, the schedule unchanged.
    #[arg(long, value_name = "N")]
    until: Option<u64>,

    /// The folder of token shards (data.dir).
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,

    /// The run folder (run_dir).
    #[arg(long, value_name = "DIR")]
    run: Option<PathBuf>,

    /// Go on from the newest checkpoint in the run folder; a run that has none
    /// begins at the beginning.
    #[arg(long)]
    resume: bool,

    /// cpu, ndarray, wgpu[:n] or cuda[:n]; `rank` for n: the number that a launcher
    /// gave this process on its machine. Several GPUs of one machine as a list:
    /// cuda:0,cuda:1.
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: DeviceList,

    /// Threads of the CPU [default: all].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,

    /// Print parameters and the memory that the run will take, and write nothing.
    #[arg(long)]
    dry_run: bool,

    /// Write the results as JSON to a file; `-`: to standard output.
    #[arg(long, value_name = "FILE")]
    json: Option<String>,

    /// Show lines of text, also on a terminal.
    #[arg(long)]
    plain: bool,
}

/// What else can be done with runs.
#[derive(Debug, Subcommand)]
enum Command {
    Bench(commands::Bench),
    Report(commands::Report),
    Scaling(commands::Scaling),
    Sweep(commands::Sweep),
    Reproduce(commands::Reproduce),
}

impl Args {
    /// `--threads`, wherever it was given.
    fn threads(&self) -> Option<u16> {
        match &self.command {
            Some(Command::Bench(bench)) => bench.threads,
            Some(Command::Sweep(sweep)) => sweep.on.threads,
            Some(Command::Reproduce(reproduce)) => reproduce.on.threads,
            Some(Command::Report(_) | Command::Scaling(_)) | None => self.threads,
        }
    }
}

/// Buffers begin with a cache line, as the kernels like it.
#[global_allocator]
static ALLOCATOR: bitnet_kernels::LineAllocator = bitnet_kernels::LineAllocator;

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(Notices::default).init();
    match run(&Args::parse()) {
        Ok(()) => ExitCode::from(Exit::Done.code()),
        Err(error) => {
            let error: &(dyn Error + 'static) = &error;
            eprintln!("error: {}", exit::chain(error));
            ExitCode::from(exit::code_of(error).code())
        }
    }
}

fn run(args: &Args) -> Result<(), ExitError> {
    // The fused operations take the instruction set from the environment.
    Kernels::from_env().map_err(ExitError::usage)?;
    set_threads(args.threads())?;
    // On a thread of the pool: a parallel loop then begins without waking a thread and
    // ends without handing back to another.
    rayon::scope(|_| command(args))
}

fn command(args: &Args) -> Result<(), ExitError> {
    match &args.command {
        Some(Command::Bench(bench)) => bench.run(),
        Some(Command::Report(report)) => report.run(),
        Some(Command::Scaling(scaling)) => scaling.run(),
        Some(Command::Sweep(sweep)) => sweep.run(),
        Some(Command::Reproduce(reproduce)) => reproduce.run(),
        None => train(args),
    }
}

fn train(args: &Args) -> Result<(), ExitError> {
    let config = config(args).map_err(coded)?;
    let options =
        RunOptions { config, device: args.device.clone(), resume: args.resume, until: args.until };
    let failed = |e| ExitError::new(Exit::Failed, e);
    if args.dry_run {
        let plan = bitnet_train::plan::dry_run(&options).map_err(coded)?;
        return report(&plan, args.json.as_deref()).map_err(failed);
    }
    let view = if args.plain { View::Plain } else { View::Auto };
    let stop = on_interrupt()?;
    let ranks = Ranks::open().map_err(coded)?;
    let summary = match bitnet_train::run_on(&ranks, &options, &stop, view) {
        Ok(summary) => summary,
        // The others wait for this one.
        Err(error) if ranks.size() > 1 => {
            eprintln!("error on rank {}: {}", ranks.rank(), exit::chain(&error));
            ranks.abort(error.exit().code());
        }
        Err(error) => return Err(coded(error)),
    };
    if !ranks.is_first() {
        return Ok(());
    }
    report(&summary, args.json.as_deref()).map_err(failed)
}

fn coded(error: TrainError) -> ExitError {
    ExitError::new(error.exit(), error)
}

/// The config file, then `--set`, then the flags that stand for a key.
fn config(args: &Args) -> Result<TrainConfig, TrainError> {
    let path = match (&args.config, &args.run) {
        (Some(name), _) => config_file::find(name)?,
        (None, Some(run)) if args.resume => run_config(run)?,
        _ => {
            return Err(TrainError::Override {
                text: "--config".into(),
                what: "which config? (with --resume, --run DIR is enough)".into(),
            });
        }
    };
    let mut config = config_file::load(&path, &args.set)?;
    if let Some(steps) = args.steps {
        config.schedule.steps = steps;
    }
    if let Some(dir) = &args.data {
        config.data.dir.clone_from(dir);
    }
    if let Some(dir) = &args.run {
        config.run_dir.clone_from(dir);
    }
    config.validate()?;
    Ok(config)
}

fn run_config(run: &Path) -> Result<PathBuf, TrainError> {
    let path = run.join("config.toml");
    if path.is_file() {
        return Ok(path);
    }
    Err(TrainError::NoConfig { name: path.display().to_string() })
}

fn set_threads(threads: Option<u16>) -> Result<(), ExitError> {
    let Some(threads) = threads else { return Ok(()) };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.into());
    pool.build_global().map_err(|e| ExitError::new(Exit::Failed, e))
}

/// What Ctrl-C asks of the run.
fn on_interrupt() -> Result<Stop, ExitError> {
    let stop = Stop::default();
    let asked = stop.clone();
    let handler = move || {
        if asked.request() {
            restore_terminal();
            std::process::exit(Exit::Interrupted.code().into());
        }
        notice("interrupted: saving a checkpoint (again to stop at once)");
    };
    ctrlc::set_handler(handler).map_err(|e| ExitError::new(Exit::Failed, e))?;
    Ok(stop)
}

/// The table goes to standard output, unless the JSON does.
fn report(summary: &(impl Display + Serialize), json: Option<&str>) -> std::io::Result<()> {
    if json == Some("-") {
        eprintln!("{summary}");
    } else {
        writeln!(std::io::stdout().lock(), "{summary}")?;
    }
    json.map_or(Ok(()), |dest| write_json(dest, summary))
}

//! `bitnet-train`: trains a model from a config and a folder of token shards.

#![forbid(unsafe_code)]

use std::error::Error;
use std::fmt::Display;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use bitnet_core::{Exit, ExitError, exit};
use bitnet_format::json::write_json;
use bitnet_kernels::Kernels;
use bitnet_train::device::DeviceChoice;
use bitnet_train::{RunOptions, Stop, TrainConfig, TrainError, config_file};
use clap::Parser;
use serde::Serialize;

/// Train a ternary language model.
///
/// Ctrl-C saves a checkpoint and stops; a second Ctrl-C stops at once.
/// Exit codes: 0 done, 1 failed, 2 bad usage or config, 3 bad input file,
/// 130 interrupted.
#[derive(Debug, Parser)]
#[command(version, args_override_self = true)]
struct Args {
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

    /// cpu, ndarray, wgpu[:n] or cuda[:n].
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: DeviceChoice,

    /// Threads of the CPU [default: all].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,

    /// Print parameters and the memory that the run will take, and write nothing.
    #[arg(long)]
    dry_run: bool,

    /// Write the results as JSON to a file; `-`: to standard output.
    #[arg(long, value_name = "FILE")]
    json: Option<String>,
}

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
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
    let config = config(args).map_err(coded)?;
    if let Some(threads) = args.threads {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.into());
        pool.build_global().map_err(|e| ExitError::new(Exit::Failed, e))?;
    }
    let options =
        RunOptions { config, device: args.device, resume: args.resume, until: args.until };
    let failed = |e| ExitError::new(Exit::Failed, e);
    if args.dry_run {
        let plan = bitnet_train::plan::dry_run(&options).map_err(coded)?;
        return report(&plan, args.json.as_deref()).map_err(failed);
    }
    let stop = Stop::default();
    on_interrupt(stop.clone())?;
    let summary = bitnet_train::run(&options, &stop).map_err(coded)?;
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

fn on_interrupt(stop: Stop) -> Result<(), ExitError> {
    let handler = move || {
        if stop.request() {
            std::process::exit(Exit::Interrupted.code().into());
        }
        eprintln!("interrupted: saving a checkpoint (again to stop at once)");
    };
    ctrlc::set_handler(handler).map_err(|e| ExitError::new(Exit::Failed, e))
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

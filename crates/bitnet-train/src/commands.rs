//! The subcommands of `bitnet-train`: their options, and what each of them calls.

use std::io::Write;
use std::path::PathBuf;

use bitnet_core::{Exit, ExitError};
use bitnet_format::json::write_json;
use bitnet_train::bench::{self, BenchOptions};
use bitnet_train::device::DeviceChoice;
use bitnet_train::devices::DeviceList;
use bitnet_train::progress::View;
use bitnet_train::{TrainError, config_file, report, reproduce, scaling, sweep};
use clap::Args;

use crate::{coded, on_interrupt};

/// Measure how fast a config trains here, beside the limits of the machine, and where
/// the time of a step goes.
///
/// Tokens a second (median and best step), operations by the usual count of 6 for each
/// multiplied parameter and token, their share of the f32 peak that is measured between
/// the steps, the forward products' share of the int8 peak, memory, and the time of a
/// step by what it is spent on. Nothing is saved.
#[derive(Debug, Args)]
pub(crate) struct Bench {
    /// The config: a path, or the name of a file in a `configs` folder.
    #[arg(long, value_name = "FILE|NAME")]
    config: String,

    /// Change a key of the config; can be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,

    /// Train on this folder of token shards instead of made-up tokens.
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,

    /// Steps that are measured.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,

    /// Steps before them.
    #[arg(long, value_name = "N", default_value_t = 3)]
    warmup: u32,

    /// Write the initial weights and the batches to start.safetensors in this folder,
    /// for another program to train on.
    #[arg(long, value_name = "DIR")]
    dump: Option<PathBuf>,

    /// Threads of the CPU [default: all].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) threads: Option<u16>,

    /// Write the results as JSON to a file; `-`: to standard output.
    #[arg(long, value_name = "FILE")]
    json: Option<String>,

    /// cpu, ndarray, wgpu[:n] or cuda[:n].
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: DeviceChoice,
}

impl Bench {
    pub(crate) fn run(&self) -> Result<(), ExitError> {
        let config = config_file::find(&self.config)
            .and_then(|path| config_file::load(&path, &self.set))
            .map_err(coded)?;
        let mut config = config;
        if let Some(dir) = &self.data {
            config.data.dir.clone_from(dir);
        }
        let options = BenchOptions {
            config,
            device: self.device,
            steps: self.steps as usize,
            warmup: self.warmup as usize,
            corpus: self.data.is_some(),
            dump: self.dump.clone(),
        };
        let report = bench::bench(&options).map_err(coded)?;
        show(report.to_string().trim_end(), self.json.as_deref(), &report)
    }
}

/// Compare runs on one self-contained HTML page.
///
/// Losses by step, tokens and time, flip rate, zero share, memory, final figures,
/// differences of the configs and samples; finished runs, unfinished and resumed ones.
#[derive(Debug, Args)]
pub(crate) struct Report {
    /// Run folders.
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,

    /// The page.
    #[arg(short, long, value_name = "FILE", default_value = "report.html")]
    output: PathBuf,
}

impl Report {
    pub(crate) fn run(&self) -> Result<(), ExitError> {
        report::write(&self.runs, &self.output).map_err(coded)?;
        eprintln!("wrote {}", self.output.display());
        Ok(())
    }
}

/// Show how loss falls with size, and what separates two kinds of model at each size.
///
/// Takes finished runs of several sizes, such as those of a sweep, that differ in size,
/// seed, learning rate and one more key; of each kind and size the best learning rate
/// counts. Fits L(N) = E + A·N^-α to each kind, with intervals of 95 % from the spread of
/// the seeds, and prints Markdown tables; with two kinds also their difference, beside
/// what Spectra's fits (arXiv:2407.12327) give for ternary models and float twins.
#[derive(Debug, Args)]
pub(crate) struct Scaling {
    /// Run folders.
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,

    /// The key of the config that tells the kinds apart.
    #[arg(long, value_name = "KEY", default_value = "model.weight_quantizer")]
    by: String,

    /// The kind whose loss is subtracted.
    #[arg(long, value_name = "VALUE", default_value = "none")]
    baseline: String,

    /// Draw losses and gap to a file (.png or .svg).
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,

    /// Write the results as JSON to a file; `-`: to standard output.
    #[arg(long, value_name = "FILE")]
    json: Option<String>,
}

impl Scaling {
    pub(crate) fn run(&self) -> Result<(), ExitError> {
        let found = scaling::scaling(&self.runs, &self.by, &self.baseline).map_err(coded)?;
        if let Some(path) = &self.plot {
            scaling::draw(&found, path).map_err(coded)?;
        }
        show(found.to_string().trim_end(), self.json.as_deref(), &found)
    }
}

/// Train one run after the other, for every combination of settings or every line of
/// a list.
///
/// A sweep that is given again goes on: finished runs are left as they are, an
/// unfinished one is resumed, a failed one tried again. The folder gets a run folder
/// for each run, and sweep.json and sweep.md with the table that is printed, the best
/// validation loss first. Ctrl-C saves a checkpoint and stops. Exit code 1 where a run
/// failed; the others are run all the same.
#[derive(Debug, Args)]
pub(crate) struct Sweep {
    /// The config: a path, or the name of a file in a `configs` folder.
    #[arg(long, value_name = "FILE|NAME")]
    config: String,

    /// A key and the values it takes; with several, every combination.
    #[arg(long, value_name = "KEY=V1,V2", required_unless_present = "list")]
    grid: Vec<String>,

    /// A file with a run a line, as KEY=VALUE KEY=VALUE; # begins a comment.
    #[arg(long, value_name = "FILE", conflicts_with = "grid")]
    list: Option<PathBuf>,

    /// The folder of the run folders [default: the config's run_dir with -sweep].
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,

    /// Change a key of the config for all runs; can be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,

    /// The folder of token shards (data.dir).
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,

    /// Also compare the runs on an HTML page.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) on: On,
}

/// Where and how runs are run.
#[derive(Debug, Args)]
pub(crate) struct On {
    /// Threads of the CPU [default: all].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) threads: Option<u16>,

    /// Write the results as JSON to a file; `-`: to standard output.
    #[arg(long, value_name = "FILE")]
    json: Option<String>,

    /// Show lines of text, also on a terminal.
    #[arg(long)]
    plain: bool,

    /// cpu, ndarray, wgpu[:n] or cuda[:n], or several GPUs as cuda:0,cuda:1 [default:
    /// cpu; of a run that is reproduced: its own].
    #[arg(long, value_name = "DEVICE")]
    device: Option<DeviceList>,
}

impl On {
    fn view(&self) -> View {
        if self.plain { View::Plain } else { View::Auto }
    }

    fn show(&self, text: &str, value: &impl serde::Serialize) -> Result<(), ExitError> {
        show(text, self.json.as_deref(), value)
    }
}

/// The text goes to standard output, unless the JSON does.
fn show(text: &str, json: Option<&str>, value: &impl serde::Serialize) -> Result<(), ExitError> {
    let shown = if json == Some("-") {
        eprintln!("{text}");
        Ok(())
    } else {
        writeln!(std::io::stdout().lock(), "{text}")
    };
    let written = |dest: &str| write_json(dest, value);
    shown.and_then(|()| json.map_or(Ok(()), written)).map_err(|e| ExitError::new(Exit::Failed, e))
}

impl Sweep {
    pub(crate) fn run(&self) -> Result<(), ExitError> {
        let variants = match &self.list {
            Some(path) => sweep::list(path),
            None => sweep::grid(&self.grid),
        };
        let variants = variants.map_err(coded)?;
        let config = config_file::find(&self.config)
            .and_then(|path| config_file::load(&path, &self.set))
            .map_err(coded)?;
        let config = match &self.data {
            Some(dir) => {
                let mut config = config;
                config.data.dir.clone_from(dir);
                config
            }
            None => config,
        };
        let dir = self.dir.clone().unwrap_or_else(|| {
            let mut name = config.run_dir.clone().into_os_string();
            name.push("-sweep");
            name.into()
        });
        let device = self.on.device.clone().unwrap_or(DeviceChoice::Cpu.into());
        let stop = on_interrupt()?;
        let table = sweep::sweep(&config, &variants, &dir, &device, &stop, self.on.view());
        let table = table.map_err(|error| interrupted(error, &dir))?;
        if let Some(page) = &self.report {
            let folders = table.folders(&dir);
            if !folders.is_empty() {
                report::write(&folders, page).map_err(coded)?;
            }
        }
        self.on.show(table.to_string().trim_end(), &table)?;
        match table.failed() {
            0 => Ok(()),
            n => {
                let text = format!("{n} of {} runs failed; see {}", variants.len(), dir.display());
                Err(ExitError::new(Exit::Failed, text))
            }
        }
    }
}

fn interrupted(error: TrainError, dir: &std::path::Path) -> ExitError {
    match error {
        TrainError::Interrupted { step, run_dir, .. } => ExitError::interrupted(format!(
            "interrupted after step {step} of {}; the same sweep with --dir {} goes on",
            run_dir.display(),
            dir.display()
        )),
        other => coded(other),
    }
}

/// Make a run again from its folder and compare the losses, bit for bit.
///
/// The run's own config.toml is taken, without samples and checkpoints on the way.
/// Warns where data, program, device or instruction set are not those of run.json.
/// Exit code 1 where a loss differs.
#[derive(Debug, Args)]
pub(crate) struct Reproduce {
    /// The run folder.
    #[arg(value_name = "RUN")]
    run: PathBuf,

    /// Make this many steps of the schedule [default: as many as the run has].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    steps: Option<u64>,

    /// Keep the new run in this folder [default: a temporary one].
    #[arg(long, value_name = "DIR")]
    into: Option<PathBuf>,

    /// The folder of token shards, if not where it was.
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) on: On,
}

impl Reproduce {
    pub(crate) fn run(&self) -> Result<(), ExitError> {
        let temporary = tempfile::tempdir().map_err(|e| ExitError::new(Exit::Failed, e))?;
        let request = reproduce::Request {
            run: self.run.clone(),
            into: self.into.clone().unwrap_or_else(|| temporary.path().join("run")),
            steps: self.steps,
            data: self.data.clone(),
            device: self.on.device.clone(),
        };
        let found = reproduce::reproduce(&request, &on_interrupt()?, self.on.view());
        let comparison = found.map_err(|error| match error {
            TrainError::Interrupted { step, .. } => {
                ExitError::interrupted(format!("interrupted after step {step}; nothing compared"))
            }
            other => coded(other),
        })?;
        self.on.show(&comparison.to_string(), &comparison)?;
        if comparison.identical {
            return Ok(());
        }
        let text = format!("{}: the losses are not those of the run", self.run.display());
        Err(ExitError::new(Exit::Failed, text))
    }
}

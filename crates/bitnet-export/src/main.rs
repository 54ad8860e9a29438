//! `bitnet-export CHECKPOINT -o model.gguf`: the command around the library.

#![forbid(unsafe_code)]

use std::io::{IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use bitnet_core::{ExitError, Layout, exit};
use bitnet_export::{DenseType, ExportOptions, Phase, Progress, Report, export_with};
use bitnet_format::json::write_json;
use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Pack a checkpoint into one self-describing file.
///
/// Every weight is read back and compared, and the engine must reproduce
/// training's logits, before the file gets its name; an existing file is
/// replaced only then.
///
/// Exit codes: 0 done, 1 failed, 2 bad usage, 3 bad checkpoint, 130 interrupted.
#[derive(Debug, Parser)]
#[command(name = "bitnet-export", version)]
struct Args {
    /// A checkpoint folder, a run folder or its `checkpoints` (the newest is
    /// taken), or a Hugging Face folder with ternary master weights.
    checkpoint: PathBuf,
    /// The file to write.
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Byte layout of the ternary weights: p2.
    #[arg(long, default_value = "p2", value_parser = layout)]
    layout: Layout,
    /// The model's name in the file [default: the run's name].
    #[arg(long)]
    name: Option<String>,
    /// Type of the linear weights of a float twin; f16 rounds them, so that
    /// training's logits are not compared.
    #[arg(long, value_enum, default_value_t = Dense::F32)]
    dense: Dense,
    /// Write the report as JSON to a file, or to standard output (-).
    #[arg(long, value_name = "FILE|-")]
    json: Option<String>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Dense {
    F32,
    F16,
}

fn layout(name: &str) -> Result<Layout, String> {
    Layout::from_name(name).ok_or_else(|| {
        let known = Layout::ALL.map(Layout::name).join(", ");
        format!("unknown layout; known: {known}")
    })
}

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
    let options = ExportOptions {
        layout: args.layout,
        name: args.name.clone(),
        dense: match args.dense {
            Dense::F32 => DenseType::F32,
            Dense::F16 => DenseType::F16,
        },
    };
    let mut bar = Bar::default();
    let report = export_with(&args.checkpoint, &args.output, &options, &mut |p| {
        bar.show(p);
        match interrupted.load(Ordering::Relaxed) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    });
    bar.end();
    print(args, &report.map_err(ExitError::from)?)
}

/// The table goes to standard output, or to standard error where the JSON
/// takes that place.
fn print(args: &Args, report: &Report) -> anyhow::Result<()> {
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

/// A bar on a terminal, one line a phase elsewhere.
#[derive(Default)]
struct Bar {
    shown: Option<(Phase, ProgressBar)>,
}

impl Bar {
    fn show(&mut self, p: Progress) {
        if self.shown.as_ref().is_none_or(|(phase, _)| *phase != p.phase) {
            self.end();
            let text = match p.phase {
                Phase::Pack => "packing",
                Phase::Compare => "comparing",
                Phase::Golden => "running the engine",
            };
            let bar = if std::io::stderr().is_terminal() {
                let style = "{msg:20} {bar:30} {percent:>3} % {per_sec} {eta} left";
                let bar =
                    ProgressBar::with_draw_target(Some(p.total), ProgressDrawTarget::stderr());
                if let Ok(style) = ProgressStyle::with_template(style) {
                    bar.set_style(style);
                }
                bar.enable_steady_tick(Duration::from_millis(200));
                bar
            } else {
                eprintln!("{text} ({} parameters)", p.total);
                ProgressBar::hidden()
            };
            bar.set_message(text);
            self.shown = Some((p.phase, bar));
        }
        if let Some((_, bar)) = &self.shown {
            bar.set_position(p.done);
        }
    }

    fn end(&mut self) {
        if let Some((_, bar)) = self.shown.take() {
            bar.finish_and_clear();
        }
    }
}

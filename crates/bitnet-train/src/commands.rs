//! The subcommands of `bitnet-train`: their options, and what each of them calls.

use std::path::PathBuf;

use bitnet_core::ExitError;
use bitnet_train::report;
use clap::Args;

use crate::coded;

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

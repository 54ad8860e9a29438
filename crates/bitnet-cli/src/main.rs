//! The `bitnet` command: `quickstart` runs the whole path from text to a packed
//! model; `generate`, `chat` and `inspect` use what it wrote.
//!
//! Exit codes: 0 done, 1 failed, 2 bad usage, 3 bad input file, 130 interrupted.

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod chat;
mod generate;
mod inspect;
mod interrupt;
mod options;
mod quickstart;
mod table;

use std::io::IsTerminal;
use std::process::ExitCode;

use bitnet_core::exit;
use clap::{Parser, Subcommand};

/// Ternary language models on the CPU: run them, look into them, make one.
#[derive(Debug, Parser)]
#[command(name = "bitnet", version, arg_required_else_help = true, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "\
Exit codes: 0 done, 1 failed, 2 bad usage or config, 3 bad input file, 130 interrupted.
BITNET_ISA forces an instruction set (portable, avx2, avx512vnni, ...).";

#[derive(Debug, Subcommand)]
enum Command {
    Quickstart(quickstart::Args),
    Generate(generate::Args),
    Chat(chat::Args),
    Inspect(inspect::Args),
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
    let result = match Cli::parse().command {
        Command::Quickstart(args) => quickstart::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Generate(args) => generate::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Chat(args) => chat::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Inspect(args) => inspect::run(&args),
    };
    match result {
        Ok(code) => code,
        // A reader that went away (`| head`) is no failure of ours.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", exit::chain(error.as_ref()));
            ExitCode::from(exit::code_of(error.as_ref()).code())
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|e| {
        e.downcast_ref::<std::io::Error>()
            .is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}

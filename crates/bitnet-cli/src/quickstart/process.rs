//! Sibling programs: where they are, and running one to its end.
//!
//! A child gets a process group of its own, so that a Ctrl-C at the terminal
//! reaches it once, through us, and not twice: a second one makes training quit
//! without a checkpoint.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, anyhow};
use bitnet_core::{Exit, ExitError};

use crate::interrupt;

static RUNNING: Mutex<Option<Child>> = Mutex::new(None);

/// How often a running child is looked at.
const POLL: Duration = Duration::from_millis(20);

/// The program `name` beside this one.
///
/// # Errors
/// It is not there; the message says how to build it.
pub(crate) fn sibling(name: &str) -> anyhow::Result<PathBuf> {
    let this = std::env::current_exe().context("where is this program?")?;
    let folder = this.parent().unwrap_or(Path::new("."));
    let path = folder.join(format!("{name}{}", std::env::consts::EXE_SUFFIX));
    if path.is_file() {
        return Ok(path);
    }
    Err(anyhow!(
        "{name} is missing in {}: build all programs first (cargo build --release)",
        folder.display()
    ))
}

/// Passes a Ctrl-C on to the child that is running. Called by the handler.
pub(crate) fn forward_interrupt() {
    let running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(child) = running.as_ref() {
        send_interrupt(child);
    }
}

#[cfg(unix)]
fn send_interrupt(child: &Child) {
    use nix::sys::signal::{Signal, kill};
    // The child is not reaped while the lock is held: the id is still its own.
    if let Ok(id) = i32::try_from(child.id()) {
        let _ = kill(nix::unistd::Pid::from_raw(id), Signal::SIGINT);
    }
}

/// Other systems send a Ctrl-C to every process of the console themselves.
#[cfg(not(unix))]
fn send_interrupt(_child: &Child) {}

/// Runs a program to its end. Its results go to our stderr: our stdout carries
/// the summary alone.
///
/// # Errors
/// It cannot be started; it fails (with its exit code); Ctrl-C.
pub(crate) fn run(program: &Path, args: &[OsString]) -> anyhow::Result<()> {
    let name = program.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null()).stdout(Stdio::from(std::io::stderr()));
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    {
        let mut running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
        if interrupt::pressed() {
            return Err(ExitError::interrupted("interrupted").into());
        }
        let child = command.spawn();
        *running = Some(child.with_context(|| format!("cannot start {}", program.display()))?);
    }
    let status = wait().with_context(|| format!("cannot wait for {name}"))?;
    check(&name, status)
}

fn wait() -> std::io::Result<ExitStatus> {
    loop {
        {
            let mut running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(child) = running.as_mut()
                && let Some(status) = child.try_wait()?
            {
                *running = None;
                return Ok(status);
            }
        }
        std::thread::sleep(POLL);
    }
}

fn check(name: &str, status: ExitStatus) -> anyhow::Result<()> {
    if status.success() {
        return Ok(());
    }
    // `status` reads "exit status: 3" or "signal: 9 (SIGKILL)".
    let message = format!("{name} failed ({status}); its message is above");
    let exit = match status.code() {
        _ if interrupt::pressed() => Exit::Interrupted,
        Some(2) => Exit::Usage,
        Some(3) => Exit::BadInput,
        Some(130) => Exit::Interrupted,
        _ => Exit::Failed,
    };
    if exit == Exit::Interrupted {
        return Err(ExitError::interrupted(format!("{name} was interrupted")).into());
    }
    Err(ExitError::new(exit, message).into())
}

/// A command line as one would type it.
pub(crate) fn command_line(program: &str, args: &[OsString]) -> String {
    let mut text = program.to_owned();
    for arg in args {
        text.push(' ');
        text.push_str(&quoted(&arg.to_string_lossy()));
    }
    text
}

fn quoted(arg: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_./=:,+@".contains(c);
    if !arg.is_empty() && arg.chars().all(plain) {
        return arg.to_owned();
    }
    format!("'{}'", arg.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_lines_can_be_typed_again() {
        let args = ["-o", "a b", "", "it's", "x=1"].map(OsString::from);
        assert_eq!(command_line("p", &args), r"p -o 'a b' '' 'it'\''s' x=1");
    }

    #[test]
    fn a_missing_sibling_says_how_to_build_it() {
        let error = sibling("bitnet-nothing").unwrap_err().to_string();
        assert!(error.contains("bitnet-nothing is missing in "), "{error}");
        assert!(error.contains("cargo build --release"), "{error}");
    }
}

//! Exit codes shared by every binary, and the error wrapper that carries them.

use std::error::Error;
use std::fmt;

/// How a command ended. The number is the process's exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// The command did what was asked.
    Done = 0,
    /// It failed for a reason outside the input: no disk space, a lost device.
    Failed = 1,
    /// The flags or the configuration cannot be used.
    Usage = 2,
    /// An input file is missing, truncated, foreign or corrupt.
    BadInput = 3,
    /// The user interrupted it (128 + SIGINT).
    Interrupted = 130,
}

impl Exit {
    /// The process exit code.
    #[must_use]
    pub fn code(self) -> u8 {
        self as u8
    }
}

/// An error together with the exit code it stands for.
///
/// It displays as the error it wraps, so that a chain of causes reads the same
/// with and without it.
#[derive(Debug)]
pub struct ExitError {
    exit: Exit,
    source: Box<dyn Error + Send + Sync + 'static>,
}

impl ExitError {
    /// Wraps `source` with an exit code.
    pub fn new(exit: Exit, source: impl Into<Box<dyn Error + Send + Sync + 'static>>) -> Self {
        Self { exit, source: source.into() }
    }

    /// The flags or the configuration cannot be used (exit code 2).
    pub fn usage(source: impl Into<Box<dyn Error + Send + Sync + 'static>>) -> Self {
        Self::new(Exit::Usage, source)
    }

    /// An input file cannot be used (exit code 3).
    pub fn bad_input(source: impl Into<Box<dyn Error + Send + Sync + 'static>>) -> Self {
        Self::new(Exit::BadInput, source)
    }

    /// The user interrupted the command (exit code 130).
    pub fn interrupted(source: impl Into<Box<dyn Error + Send + Sync + 'static>>) -> Self {
        Self::new(Exit::Interrupted, source)
    }

    /// The exit code this error stands for.
    #[must_use]
    pub fn exit(&self) -> Exit {
        self.exit
    }
}

impl fmt::Display for ExitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.source.fmt(f)
    }
}

impl Error for ExitError {
    // The wrapped error is displayed by this one, so the chain goes on behind it.
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.source()
    }
}

/// The exit code of an error: that of the first [`ExitError`] in its chain of
/// causes, [`Exit::Failed`] where there is none.
#[must_use]
pub fn code_of(error: &(dyn Error + 'static)) -> Exit {
    let mut next = Some(error);
    while let Some(e) = next {
        if let Some(wrapped) = e.downcast_ref::<ExitError>() {
            return wrapped.exit;
        }
        next = e.source();
    }
    Exit::Failed
}

/// An error and its causes in one line, `error: cause: cause`; a cause that the
/// text before it already tells is left out.
#[must_use]
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let part = cause.to_string();
        if !text.ends_with(&part) {
            text.push_str(": ");
            text.push_str(&part);
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] ExitError);

    #[test]
    fn a_chain_says_each_thing_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("a.gguf: {source}")]
        struct Inline {
            source: std::io::Error,
        }
        let inline = Inline { source: std::io::Error::other("no such file") };
        assert_eq!(chain(&inline), "a.gguf: no such file");
        assert_eq!(chain(&Outer(ExitError::usage("inner"))), "outer: inner");
        assert_eq!(chain(&Outer(ExitError::bad_input(inline))), "outer: a.gguf: no such file");
    }

    #[test]
    fn finds_the_code_behind_other_errors() {
        let outer = Outer(ExitError::bad_input("inner"));
        assert_eq!(code_of(&outer), Exit::BadInput);
        assert_eq!(code_of(&outer).code(), 3);
        assert_eq!(outer.source().unwrap().to_string(), "inner");
        assert_eq!(code_of(&std::fmt::Error), Exit::Failed);
    }
}

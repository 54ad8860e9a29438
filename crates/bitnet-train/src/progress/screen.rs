//! The terminal under the dashboard: taken over when a run begins, given back
//! however it ends.

use std::io::{self, IsTerminal, Stderr, Write, stderr};
use std::panic;
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::time::{Duration, Instant};

use console::Term;
use nix::sys::termios::{self, FlushArg, LocalFlags, SetArg, Termios};
use nix::unistd::{getpgrp, tcgetpgrp};
use ratatui::backend::TermionBackend;
use ratatui::layout::Rect;
use ratatui::{Terminal, TerminalOptions, Viewport};

use super::dashboard::Dashboard;

/// The alternate screen without a cursor, and back.
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";
const CLEAR: &str = "\x1b[2J";

/// Time between two pictures.
const INTERVAL: Duration = Duration::from_millis(250);
/// Time after which all is drawn anew, in case something else wrote on the screen.
const REFRESH: Duration = Duration::from_secs(10);

/// How the terminal was before, while a dashboard has it.
static TAKEN: Mutex<Option<Termios>> = Mutex::new(None);
/// Lines that others have for the user meanwhile.
static NOTICES: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn lock<T>(mutex: &'static Mutex<T>) -> MutexGuard<'static, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A line for the user: into the dashboard where one is shown, else to standard error.
pub(super) fn notice(text: &str) {
    if lock(&TAKEN).is_some() {
        lock(&NOTICES).push(text.to_owned());
    } else {
        eprintln!("{text}");
    }
}

/// Gives the terminal back, if a dashboard has it.
pub(super) fn restore() {
    if let Some(before) = lock(&TAKEN).take() {
        let mut out = stderr();
        let _ = out.write_all(LEAVE.as_bytes()).and_then(|()| out.flush());
        // What was typed meanwhile is not for the shell.
        let _ = termios::tcflush(stderr(), FlushArg::TCIFLUSH);
        let _ = termios::tcsetattr(stderr(), SetArg::TCSANOW, &before);
    }
}

/// A dashboard on standard error.
#[derive(Debug)]
pub(super) struct Screen {
    terminal: Terminal<TermionBackend<Stderr>>,
    dashboard: Dashboard,
    size: Rect,
    drawn: Option<Instant>,
    refreshed: Instant,
}

/// The terminal's size; none where it has none.
fn size() -> Option<Rect> {
    let (rows, columns) = Term::stderr().size_checked()?;
    (rows > 0 && columns > 0).then(|| Rect::new(0, 0, columns, rows))
}

/// A terminal of this size of which nothing is known yet. The library's own `clear`
/// and `resize` ask the terminal where its cursor is and wait for an answer.
fn blank(size: Rect) -> io::Result<Terminal<TermionBackend<Stderr>>> {
    let options = TerminalOptions { viewport: Viewport::Fixed(size) };
    Terminal::with_options(TermionBackend::new(stderr()), options)
}

impl Screen {
    /// Takes the terminal over; none where there is none, or another program has it.
    pub(super) fn open(dashboard: Dashboard) -> Option<Self> {
        let dumb = std::env::var("TERM").is_ok_and(|term| term == "dumb");
        let foreground = || tcgetpgrp(stderr()).is_ok_and(|group| group == getpgrp());
        if dumb || !stderr().is_terminal() || !foreground() {
            return None;
        }
        let size = size()?;
        let before = termios::tcgetattr(stderr()).ok()?;
        let terminal = blank(size).ok()?;
        // Keys are not shown; Ctrl-C still is a signal.
        let mut quiet = before.clone();
        quiet.local_flags.remove(LocalFlags::ECHO | LocalFlags::ICANON);
        *lock(&TAKEN) = Some(before);
        restore_on_panic();
        let _ = termios::tcsetattr(stderr(), SetArg::TCSANOW, &quiet);
        let _ = stderr().write_all(ENTER.as_bytes());
        let refreshed = Instant::now();
        Some(Self { terminal, dashboard, size, drawn: None, refreshed })
    }

    /// Changes what is shown, and shows it where that is due.
    ///
    /// # Errors
    /// A terminal that is gone.
    pub(super) fn update(
        &mut self,
        at_once: bool,
        change: impl FnOnce(&mut Dashboard),
    ) -> io::Result<()> {
        change(&mut self.dashboard);
        self.take_notices();
        if !at_once && self.drawn.is_some_and(|t| t.elapsed() < INTERVAL) {
            return Ok(());
        }
        let now = size().unwrap_or(self.size);
        if now != self.size || self.refreshed.elapsed() > REFRESH {
            (self.size, self.refreshed) = (now, Instant::now());
            stderr().write_all(CLEAR.as_bytes())?;
            self.terminal = blank(now)?;
        }
        self.terminal.draw(|frame| self.dashboard.draw(frame))?;
        self.drawn = Some(Instant::now());
        Ok(())
    }

    fn take_notices(&mut self) {
        for text in lock(&NOTICES).drain(..) {
            self.dashboard.line(&text);
        }
    }

    /// Gives the terminal back and leaves the lines on it.
    pub(super) fn close(mut self) {
        restore();
        self.take_notices();
        for line in self.dashboard.into_lines() {
            eprintln!("{line}");
        }
    }
}

/// A panic's message is to be read on the terminal as it was.
fn restore_on_panic() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            restore();
            before(info);
        }));
    });
}

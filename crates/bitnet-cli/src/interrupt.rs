//! Ctrl-C: the first asks the running command to stop at a good place.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use anyhow::Context;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);
type Action = Box<dyn FnMut() + Send>;
static ACTION: OnceLock<Mutex<Action>> = OnceLock::new();

/// Installs the handler; `action` runs on every Ctrl-C, on a thread of its own,
/// after the flag is set. Called once.
///
/// # Errors
/// The handler cannot be installed.
pub(crate) fn install(action: impl FnMut() + Send + 'static) -> anyhow::Result<()> {
    let _ = ACTION.set(Mutex::new(Box::new(action)));
    ctrlc::set_handler(|| {
        INTERRUPTED.store(true, Ordering::SeqCst);
        if let Some(action) = ACTION.get() {
            (action.lock().unwrap_or_else(PoisonError::into_inner))();
        }
    })
    .context("cannot install the Ctrl-C handler")
}

/// Whether Ctrl-C was pressed since the last [`clear`].
pub(crate) fn pressed() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// Forgets earlier Ctrl-Cs.
pub(crate) fn clear() {
    INTERRUPTED.store(false, Ordering::SeqCst);
}

//! Progress on stderr: a bar on a terminal, a line a stage elsewhere. Ctrl-C
//! asks the work to stop at the next document.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bitnet_data::Progress;
use indicatif::{ProgressBar, ProgressStyle};

pub(crate) struct Bar {
    bar: Option<ProgressBar>,
    terminal: bool,
    stage: Option<(String, Instant)>,
    interrupted: Arc<AtomicBool>,
}

impl Bar {
    pub(crate) fn new() -> Result<Self> {
        let interrupted = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&interrupted);
        ctrlc::set_handler(move || flag.store(true, Ordering::Relaxed))
            .context("cannot listen for Ctrl-C")?;
        Ok(Self { bar: None, terminal: std::io::stderr().is_terminal(), stage: None, interrupted })
    }

    /// Ends the current stage.
    pub(crate) fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        if let Some((name, began)) = self.stage.take() {
            eprintln!("{name}: {:.1} s", began.elapsed().as_secs_f64());
        }
    }

    fn style(total: Option<u64>) -> ProgressStyle {
        let template = match total {
            Some(_) => "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}, {eta} left",
            None => "{msg} {spinner} {elapsed}",
        };
        ProgressStyle::with_template(template)
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .progress_chars("=> ")
    }
}

impl Progress for Bar {
    fn stage(&mut self, name: &str, total: Option<u64>) {
        self.finish();
        self.stage = Some((name.to_owned(), Instant::now()));
        if self.terminal {
            let bar = match total {
                Some(n) => ProgressBar::new(n),
                None => ProgressBar::new_spinner(),
            };
            bar.set_style(Self::style(total));
            bar.set_message(name.to_owned());
            bar.enable_steady_tick(Duration::from_millis(200));
            self.bar = Some(bar);
        }
    }

    fn advance(&mut self, bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.inc(bytes);
        }
    }

    fn note(&mut self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(format!("note: {text}")),
            None => eprintln!("note: {text}"),
        }
    }

    fn interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }
}

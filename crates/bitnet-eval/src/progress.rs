//! How far a command is: a bar on a terminal, a line every few seconds elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Between two lines.
const PAUSE: Duration = Duration::from_secs(5);

/// Shows how far a command is, on stderr.
pub(crate) struct Progress {
    bar: Option<indicatif::ProgressBar>,
    last: Instant,
    unit: &'static str,
}

impl Progress {
    /// `unit`: what is counted, in the plural.
    pub(crate) fn new(unit: &'static str) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style =
                format!("{{bar:30}} {{pos}}/{{len}} {unit}, {{per_sec}}, {{eta}} left, {{msg}}");
            let bar = indicatif::ProgressBar::new(0);
            if let Ok(style) = indicatif::ProgressStyle::with_template(&style) {
                bar.set_style(style);
            }
            bar
        });
        Self { bar, last: Instant::now(), unit }
    }

    pub(crate) fn show(&mut self, done: u64, total: u64, message: &str) {
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
            bar.set_message(message.to_owned());
        } else if self.last.elapsed() > PAUSE {
            self.last = Instant::now();
            eprintln!("{done}/{total} {}, {message}", self.unit);
        }
    }

    pub(crate) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

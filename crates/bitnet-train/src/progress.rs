//! Progress on standard error: a bar on a terminal, plain lines elsewhere.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::TrainConfig;
use crate::metrics::TrainMetric;

/// Time between plain lines.
const INTERVAL: Duration = Duration::from_secs(10);

/// How a run is shown on standard error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum View {
    /// Lines, now and then.
    Plain,
    /// A dashboard where standard error is a terminal, lines elsewhere.
    Auto,
}

/// Shows how far a run is.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
    steps: u64,
    started: Instant,
    first: u64,
    last_line: Option<Instant>,
}

impl Progress {
    /// Progress of a run of `steps` steps that stands at `first`.
    #[must_use]
    pub fn new(view: View, config: &TrainConfig, steps: u64, first: u64) -> Self {
        let _ = config;
        let bar = (view == View::Auto && stderr().is_terminal()).then(|| {
            let bar = ProgressBar::new(steps).with_position(first);
            let style = "{bar:24} {pos}/{len}  {msg}  left {eta}";
            bar.set_style(
                ProgressStyle::with_template(style)
                    .unwrap_or_else(|_| ProgressStyle::default_bar()),
            );
            bar.reset_eta();
            bar
        });
        Self { bar, steps, started: Instant::now(), first, last_line: None }
    }

    /// Shows a step.
    pub fn step(&mut self, m: &TrainMetric) {
        let text =
            format!("loss {:.4}  lr {:.2e}  {:.0} tokens/s", m.loss, m.lr, m.tokens_per_second);
        if let Some(bar) = &self.bar {
            bar.set_message(text);
            bar.set_position(m.step);
            return;
        }
        let due = self.last_line.is_none_or(|t| t.elapsed() >= INTERVAL);
        if due || m.step == self.steps {
            self.last_line = Some(Instant::now());
            eprintln!("step {}/{}  {text}  left {}", m.step, self.steps, self.left(m.step));
        }
    }

    /// Shows a line of text that stays.
    pub fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => eprintln!("{text}"),
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    /// At the mean pace so far, evaluations and checkpoints included.
    fn left(&self, step: u64) -> String {
        let done = step.saturating_sub(self.first).max(1);
        let pace = self.started.elapsed().as_secs_f64() / done as f64;
        duration(pace * self.steps.saturating_sub(step) as f64)
    }
}

/// Seconds as `3 s`, `2 m 05 s` or `1 h 02 m`.
#[must_use]
pub fn duration(seconds: f64) -> String {
    let s = seconds.round().max(0.0) as u64;
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} m {:02} s", s / 60, s % 60),
        _ => format!("{} h {:02} m", s / 3600, s % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::duration;

    #[test]
    fn durations() {
        for (seconds, text) in
            [(0.4, "0 s"), (59.6, "1 m 00 s"), (125.0, "2 m 05 s"), (3725.0, "1 h 02 m")]
        {
            assert_eq!(duration(seconds), text);
        }
    }
}

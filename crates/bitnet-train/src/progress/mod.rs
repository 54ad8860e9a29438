//! Progress on standard error: a dashboard on a terminal, plain lines elsewhere.

#[cfg(unix)]
mod dashboard;
#[cfg(unix)]
mod screen;

use std::io::{self, Write};
use std::time::{Duration, Instant};

#[cfg(unix)]
use self::{dashboard::Dashboard, screen::Screen};
use crate::TrainConfig;
use crate::metrics::{Metric, Sample, TrainMetric};

/// Time between plain lines.
const INTERVAL: Duration = Duration::from_secs(10);

/// How a run is shown on standard error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum View {
    /// Lines, now and then.
    Plain,
    /// A dashboard where standard error is a terminal that has one, lines elsewhere.
    Auto,
}

/// Shows how far a run is.
#[derive(Debug)]
pub struct Progress {
    #[cfg(unix)]
    screen: Option<Screen>,
    steps: u64,
    started: Instant,
    first: u64,
    last_line: Option<Instant>,
}

impl Progress {
    /// Progress of a run of `steps` steps that stands at `first`; `before` are its
    /// earlier metrics, which only a dashboard reads.
    #[must_use]
    pub fn new(
        view: View,
        config: &TrainConfig,
        steps: u64,
        first: u64,
        before: impl FnOnce() -> Vec<Metric>,
    ) -> Self {
        #[cfg(unix)]
        let screen = (view == View::Auto)
            .then(|| Screen::open(Dashboard::new(config, steps, first)))
            .flatten()
            .map(|mut screen| {
                let before = before();
                let _ = screen.update(true, |d| before.iter().for_each(|m| d.metric(m)));
                screen
            });
        #[cfg(not(unix))]
        let _ = (view, config, before);
        Self {
            #[cfg(unix)]
            screen,
            steps,
            started: Instant::now(),
            first,
            last_line: None,
        }
    }

    /// Shows what was measured.
    pub fn metric(&mut self, metric: &Metric) {
        #[cfg(unix)]
        if self.screen.is_some() {
            let last = metric.step() == self.steps;
            return self.update(last, |d| d.metric(metric));
        }
        if let Metric::Train(m) = metric {
            self.step(m);
        }
    }

    fn step(&mut self, m: &TrainMetric) {
        let due = self.last_line.is_none_or(|t| t.elapsed() >= INTERVAL);
        if due || m.step == self.steps {
            self.last_line = Some(Instant::now());
            // At the mean pace so far, evaluations and checkpoints included.
            let done = m.step.saturating_sub(self.first).max(1);
            let left = left(self.started, done, self.steps.saturating_sub(m.step));
            eprintln!(
                "step {}/{}  loss {:.4}  lr {:.2e}  {:.0} tokens/s  left {left}",
                m.step, self.steps, m.loss, m.lr, m.tokens_per_second
            );
        }
    }

    /// Shows a sample.
    pub fn sample(&mut self, sample: &Sample) {
        #[cfg(unix)]
        if self.screen.is_some() {
            self.update(true, |d| d.sample(sample));
        }
        self.line(&format!("step {}: {:?} → {:?}", sample.step, sample.prompt, sample.text));
    }

    /// Shows what is new while a step takes its time.
    pub fn tick(&mut self) {
        #[cfg(unix)]
        self.update(false, |_| ());
    }

    /// Shows a line of text that stays.
    pub fn line(&mut self, text: &str) {
        #[cfg(unix)]
        if self.screen.is_some() {
            return self.update(true, |d| d.line(text));
        }
        eprintln!("{text}");
    }

    /// Takes the dashboard away; its lines stay.
    pub fn finish(&mut self) {
        #[cfg(unix)]
        if let Some(screen) = self.screen.take() {
            screen.close();
        }
    }

    /// Where the terminal is gone, lines go on.
    #[cfg(unix)]
    fn update(&mut self, at_once: bool, change: impl FnOnce(&mut Dashboard)) {
        if let Some(screen) = &mut self.screen
            && screen.update(at_once, change).is_err()
        {
            self.finish();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}

/// A line for the user from outside a run: into its dashboard, if there is one.
pub fn notice(text: &str) {
    #[cfg(unix)]
    screen::notice(text);
    #[cfg(not(unix))]
    eprintln!("{text}");
}

/// Gives the terminal back at once, before the process exits without unwinding.
pub fn restore_terminal() {
    #[cfg(unix)]
    screen::restore();
}

/// A writer of whole lines, such as a log's, that [`notice`]s each.
#[derive(Debug, Default)]
pub struct Notices(Vec<u8>);

impl Write for Notices {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Notices {
    fn drop(&mut self) {
        let text = String::from_utf8_lossy(&self.0);
        if !text.is_empty() {
            notice(text.trim_end_matches('\n'));
        }
    }
}

/// The time that `todo` steps take, where `done` took the time since `started`.
fn left(started: Instant, done: u64, todo: u64) -> String {
    let pace = started.elapsed().as_secs_f64() / done.max(1) as f64;
    duration(pace * todo as f64)
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

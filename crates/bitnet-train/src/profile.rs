//! Where the time of a training step goes: spans by name, summed over the process.
//!
//! Off, a span costs one load. Names nest: a span's time counts for all around it.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

static ENABLED: AtomicBool = AtomicBool::new(false);
static TOTALS: Mutex<BTreeMap<&str, Total>> = Mutex::new(BTreeMap::new());

/// What is known of the spans of one name.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Total {
    /// Their time.
    pub time: Duration,
    /// How many there were.
    pub count: u64,
}

/// Begins to measure, from nothing, or stops.
pub fn enable(on: bool) {
    if let Ok(mut totals) = TOTALS.lock() {
        totals.clear();
    }
    ENABLED.store(on, Ordering::Relaxed);
}

/// The totals by name.
#[must_use]
pub fn totals() -> BTreeMap<&'static str, Total> {
    TOTALS.lock().map(|totals| totals.clone()).unwrap_or_default()
}

/// A span, which ends where the value is dropped.
#[must_use]
pub fn span(name: &'static str) -> Span {
    Span { started: ENABLED.load(Ordering::Relaxed).then(|| (name, Instant::now())) }
}

/// See [`span`].
#[derive(Debug)]
pub struct Span {
    started: Option<(&'static str, Instant)>,
}

impl Drop for Span {
    fn drop(&mut self) {
        let Some((name, started)) = self.started else { return };
        if let Ok(mut totals) = TOTALS.lock() {
            let total = totals.entry(name).or_default();
            total.time += started.elapsed();
            total.count += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_count_only_while_enabled() {
        drop(span("profile test"));
        assert_eq!(totals().get("profile test"), None);
        enable(true);
        for _ in 0..3 {
            let _span = span("profile test");
        }
        let total = totals()["profile test"];
        assert_eq!(total.count, 3);
        enable(false);
        assert_eq!(totals().get("profile test"), None);
    }
}

//! What a run writes down as it goes: `metrics.jsonl`, `samples.jsonl` and the same
//! for TensorBoard.

use std::io;
use std::path::Path;

use crate::metrics::{Log, Metric, Sample};
use crate::tensorboard::Events;

/// The records of one run folder.
#[derive(Debug)]
pub struct Recorder {
    metrics: Log,
    samples: Log,
    events: Option<Events>,
}

impl Recorder {
    /// Opens the records of a run that goes on after step `after`; of one that
    /// begins, where there is none. What was written beyond that step is removed.
    /// `tensorboard`: whether event files are written too.
    ///
    /// # Errors
    /// I/O errors, with the path.
    pub fn open(run_dir: &Path, after: Option<u64>, tensorboard: bool) -> io::Result<Self> {
        let events = run_dir.join("tensorboard");
        let events = tensorboard.then(|| Events::open(&events, after)).transpose()?;
        Ok(Self {
            events,
            metrics: Log::open(&run_dir.join("metrics.jsonl"), after)?,
            samples: Log::open(&run_dir.join("samples.jsonl"), after)?,
        })
    }

    /// Records a metric.
    ///
    /// # Errors
    /// I/O errors, with the path.
    pub fn metric(&mut self, metric: &Metric) -> io::Result<()> {
        self.metrics.write(metric)?;
        self.events.as_mut().map_or(Ok(()), |events| events.metric(metric))
    }

    /// Records a sample.
    ///
    /// # Errors
    /// I/O errors, with the path.
    pub fn sample(&mut self, sample: &Sample) -> io::Result<()> {
        self.samples.write(sample)?;
        self.events.as_mut().map_or(Ok(()), |events| events.sample(sample))
    }
}

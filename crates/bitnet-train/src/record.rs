//! What a run writes down as it goes: `metrics.jsonl` and `samples.jsonl`.

use std::io;
use std::path::Path;

use crate::metrics::{Log, Metric, Sample};

/// The records of one run folder.
#[derive(Debug)]
pub struct Recorder {
    metrics: Log,
    samples: Log,
}

impl Recorder {
    /// Opens the records of a run that goes on after step `after`; of one that
    /// begins, where there is none. What was written beyond that step is removed.
    ///
    /// # Errors
    /// I/O errors, with the path.
    pub fn open(run_dir: &Path, after: Option<u64>) -> io::Result<Self> {
        Ok(Self {
            metrics: Log::open(&run_dir.join("metrics.jsonl"), after)?,
            samples: Log::open(&run_dir.join("samples.jsonl"), after)?,
        })
    }

    /// Records a metric.
    ///
    /// # Errors
    /// I/O errors, with the path.
    pub fn metric(&mut self, metric: &Metric) -> io::Result<()> {
        self.metrics.write(metric)
    }

    /// Records a sample.
    ///
    /// # Errors
    /// I/O errors, with the path.
    pub fn sample(&mut self, sample: &Sample) -> io::Result<()> {
        self.samples.write(sample)
    }
}

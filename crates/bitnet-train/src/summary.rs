//! What a run came to.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::progress::duration;

/// What a run came to; the keys of `--json`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// Validation loss at the last evaluation, nats per token.
    pub val_loss: Option<f64>,
    /// Mean training loss of the last 100 steps, nats per token.
    pub train_loss: Option<f64>,
    /// Training tokens per second of the steps alone.
    pub tokens_per_second: Option<f64>,
    /// Complete steps.
    pub steps: u64,
    /// Tokens seen.
    pub tokens: u64,
    /// Parameters of the model.
    pub parameters: u64,
    /// The run folder.
    pub run_dir: PathBuf,
    /// The newest checkpoint.
    pub checkpoint: Option<PathBuf>,
    /// Seconds of training, interruptions left out.
    pub seconds: f64,
    /// The most memory used at any time; none where the system does not say.
    pub peak_rss_bytes: Option<u64>,
    /// What `--device` said.
    pub device: String,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let loss = |x: Option<f64>| x.map_or("-".into(), |x| format!("{x:.4} nats per token"));
        writeln!(f, "steps            {} ({} tokens)", self.steps, self.tokens)?;
        writeln!(f, "parameters       {}", self.parameters)?;
        writeln!(f, "training loss    {}", loss(self.train_loss))?;
        writeln!(f, "validation loss  {}", loss(self.val_loss))?;
        if let Some(rate) = self.tokens_per_second {
            writeln!(f, "speed            {rate:.0} tokens/s on {}", self.device)?;
        }
        writeln!(f, "time             {}", duration(self.seconds))?;
        if let Some(bytes) = self.peak_rss_bytes {
            writeln!(f, "peak memory      {:.2} GiB", bytes as f64 / f64::from(1 << 30))?;
        }
        writeln!(f, "run              {}", self.run_dir.display())?;
        let checkpoint = self.checkpoint.as_deref().unwrap_or(Path::new("-"));
        write!(f, "checkpoint       {}", checkpoint.display())
    }
}

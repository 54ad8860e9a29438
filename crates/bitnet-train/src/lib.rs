//! Train ternary language models from scratch with burn.

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod checkpoint;
pub mod config;
pub mod config_file;
pub mod device;
mod error;
pub mod estimate;
pub mod evaluate;
pub mod memory;
pub mod metrics;
pub mod model;
pub mod ops;
pub mod optim;
pub mod plan;
pub mod plot;
pub mod progress;
pub mod recompute;
pub mod run;
pub mod schedule;

pub use config::TrainConfig;
pub use error::TrainError;
pub use run::{RunOptions, Stop, Summary, run};

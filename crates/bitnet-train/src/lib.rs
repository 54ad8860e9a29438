//! Train ternary language models from scratch with burn.

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod bench;
pub mod checkpoint;
pub mod config;
pub mod config_file;
pub mod corpus;
pub mod device;
pub mod devices;
pub mod distill;
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
pub mod precision;
pub mod profile;
pub mod progress;
pub mod ranks;
pub mod recompute;
pub mod record;
mod replicas;
pub mod report;
pub mod reproduce;
pub mod run;
pub mod run_info;
pub mod scaling;
pub mod schedule;
pub mod stage;
pub mod start;
mod summary;
pub mod sweep;
pub mod tensorboard;
pub mod weights;

pub use config::TrainConfig;
pub use error::TrainError;
pub use ranks::Ranks;
pub use run::{RunOptions, Stop, run, run_on};
pub use summary::Summary;

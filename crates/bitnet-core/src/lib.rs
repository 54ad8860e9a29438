//! What a ternary language model *is*: its configuration, the scalar definition
//! of its arithmetic, packed weight matrices and the names of its tensors.
//!
//! Everything here is plain data and pure functions. No threads, no I/O, no
//! `unsafe`; every other crate of the workspace builds on this one.

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod config;
pub mod exit;
pub mod matrix;
pub mod names;
pub mod quantizer;
pub mod rope;
pub mod ternary;
pub mod top_k;
pub mod training_memory;

pub use config::{Activation, ConfigError, Dtype, ModelConfig, ParameterCount, WeightQuantizer};
pub use exit::{Exit, ExitError};
pub use matrix::{Layout, MatrixError, TernaryMatrix};
pub use quantizer::{ActivationQuantizer, Recipe, WeightScheme};

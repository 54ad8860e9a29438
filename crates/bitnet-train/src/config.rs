//! The configuration of a run: complete plain data, checked by one pure function
//! and saved with the run before anything else happens.

use std::fmt;
use std::path::PathBuf;

use bitnet_core::ModelConfig;
use serde::de::{self, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use crate::TrainError;
pub use crate::corpus::{DataConfig, MixtureConfig, Reduction};
use crate::distill::DistillConfig;
use crate::optim::OptimizerConfig;
use crate::precision::Precision;
use crate::schedule::ScheduleConfig;
use crate::stage::StageConfig;
use crate::start::StartConfig;

/// All of a training run. Every key is in the file; there are no includes, so
/// that the difference of two files is the difference of two runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// The run's name, also the model's.
    pub name: String,
    /// The run folder, relative to the working directory (`--run`).
    pub run_dir: PathBuf,
    /// Seed of the initial weights and of sampling.
    pub seed: u64,
    /// In what floats are multiplied.
    #[serde(default, skip_serializing_if = "Precision::is_f32")]
    pub precision: Precision,
    /// The model.
    pub model: ModelConfig,
    /// Weights to begin with; none: random ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<StartConfig>,
    /// When the model becomes what `[model]` says.
    #[serde(default)]
    pub quantization: StageConfig,
    /// A teacher to follow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distill: Option<DistillConfig>,
    /// The tokens.
    pub data: DataConfig,
    /// How many tokens make a step.
    pub batch: BatchConfig,
    /// Learning rate and weight decay.
    pub schedule: ScheduleConfig,
    /// AdamW or Muon.
    pub optimizer: OptimizerConfig,
    /// Validation.
    pub eval: EvalConfig,
    /// Text written while training.
    pub sample: SampleConfig,
    /// What is kept.
    pub checkpoint: CheckpointConfig,
    /// What is recorded.
    #[serde(default)]
    pub metrics: MetricsConfig,
}

/// The `[batch]` table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BatchConfig {
    /// Tokens of a step: a multiple of `sequence · micro_batch`.
    pub tokens: usize,
    /// Tokens of a sequence, T.
    pub sequence: usize,
    /// Sequences that go through the model at once, B; 0 or "auto": as many as fit
    /// the memory that is free, see [`crate::plan`].
    #[serde(deserialize_with = "number_or_auto")]
    pub micro_batch: usize,
    /// Keep the inputs of the blocks alone and run each block again in the backward
    /// pass: about a third more work, far less memory, the same gradients.
    #[serde(default)]
    pub recompute: bool,
}

/// A number, or "auto", which is 0.
fn number_or_auto<'de, D: Deserializer<'de>>(from: D) -> Result<usize, D::Error> {
    struct Auto;

    impl Visitor<'_> for Auto {
        type Value = usize;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "a number of sequences or \"auto\"")
        }

        fn visit_i64<E: de::Error>(self, v: i64) -> Result<usize, E> {
            usize::try_from(v).map_err(|_| E::invalid_value(Unexpected::Signed(v), &self))
        }

        fn visit_u64<E: de::Error>(self, v: u64) -> Result<usize, E> {
            usize::try_from(v).map_err(|_| E::invalid_value(Unexpected::Unsigned(v), &self))
        }

        fn visit_str<E: de::Error>(self, v: &str) -> Result<usize, E> {
            if v == "auto" { Ok(0) } else { Err(E::invalid_value(Unexpected::Str(v), &self)) }
        }
    }

    from.deserialize_any(Auto)
}

impl BatchConfig {
    /// How many micro-steps' gradients are averaged in a step.
    #[must_use]
    pub fn micro_steps(&self) -> usize {
        self.tokens / (self.sequence * self.micro_batch).max(1)
    }
}

/// The `[eval]` table. The validation loss is the mean over the first `windows`
/// windows of `batch.sequence` tokens of the validation split, in order; the same
/// number given to `bitnet-eval perplexity` scores the same tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvalConfig {
    /// Steps between evaluations; 0: at the end alone.
    pub every: u64,
    /// Windows scored; 0: all of the split.
    pub windows: u64,
}

/// The `[sample]` table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SampleConfig {
    /// Steps between samples; 0: at the end alone.
    pub every: u64,
    /// What the samples begin with; none: no samples.
    pub prompts: Vec<String>,
    /// Tokens written after each prompt.
    pub tokens: usize,
    /// 0 is greedy.
    pub temperature: f64,
}

/// The `[checkpoint]` table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointConfig {
    /// Steps between checkpoints; 0: at the end alone.
    pub every: u64,
    /// How many of the newest are kept.
    pub keep: usize,
}

/// The `[metrics]` table: what a run records beside loss and learning rate. None of
/// it changes what is computed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MetricsConfig {
    /// Steps between statistics of the quantised weights; 0: none.
    pub weights_every: u64,
    /// Write TensorBoard event files into `<run>/tensorboard`.
    pub tensorboard: bool,
}

impl Default for MetricsConfig {
    fn default() -> Self {
        Self { weights_every: 50, tensorboard: true }
    }
}

impl TrainConfig {
    /// Checks that the values go together. What depends on the data (its
    /// vocabulary, its length) is checked when the data is opened.
    ///
    /// # Errors
    /// The first key whose value cannot be used, with the reason.
    pub fn validate(&self) -> Result<(), TrainError> {
        let safe = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if self.name.is_empty() || !self.name.chars().all(safe) {
            let reason = "must be letters, digits, `.`, `_` and `-`";
            return Err(TrainError::value("name", format!("{:?}", self.name), reason));
        }
        self.model.validate()?;
        self.validate_batch()?;
        self.data.validate()?;
        self.schedule.validate()?;
        self.quantization.validate(&self.model)?;
        if let Some(distill) = &self.distill {
            distill.validate(&self.model)?;
            if self.batch.recompute && distill.relations > 0.0 {
                let reason = "the relations of a teacher need all activations at once";
                return Err(TrainError::value("batch.recompute", true, reason));
            }
        }
        self.optimizer.validate()?;
        TrainError::check_range("sample.temperature", self.sample.temperature, 0.0, 100.0)?;
        let room = self.model.max_position_embeddings;
        if !self.sample.prompts.is_empty() && self.sample.tokens >= room {
            let reason = format!("must be less than model.max_position_embeddings = {room}");
            return Err(TrainError::value("sample.tokens", self.sample.tokens, reason));
        }
        if self.checkpoint.keep == 0 {
            return Err(TrainError::value("checkpoint.keep", 0, "must be at least 1"));
        }
        Ok(())
    }

    fn validate_batch(&self) -> Result<(), TrainError> {
        let b = &self.batch;
        for (key, v) in [("batch.tokens", b.tokens), ("batch.sequence", b.sequence)] {
            if v == 0 {
                return Err(TrainError::value(key, 0, "must be at least 1"));
            }
        }
        let context = self.model.max_position_embeddings;
        if b.sequence > context {
            let reason = format!("is longer than model.max_position_embeddings = {context}");
            return Err(TrainError::value("batch.sequence", b.sequence, reason));
        }
        // An automatic one is a divisor, which 1 always is.
        let micro = b.sequence.checked_mul(b.micro_batch.max(1));
        if micro.is_none_or(|micro| !b.tokens.is_multiple_of(micro)) {
            let reason = format!(
                "is not a multiple of batch.sequence · batch.micro_batch = {} · {}",
                b.sequence,
                b.micro_batch.max(1)
            );
            return Err(TrainError::value("batch.tokens", b.tokens, reason));
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::schedule::ScheduleKind;

    /// A run of the tiny model that takes a moment.
    pub(crate) fn small(dir: &std::path::Path) -> TrainConfig {
        TrainConfig {
            name: "small".into(),
            run_dir: dir.join("run"),
            seed: 1,
            precision: Precision::F32,
            model: ModelConfig::tiny(),
            start: None,
            quantization: StageConfig::default(),
            distill: None,
            data: DataConfig {
                dir: dir.join("data"),
                seed: 2,
                mask_documents: false,
                loss: Reduction::Mean,
                mixture: Vec::new(),
            },
            batch: BatchConfig { tokens: 128, sequence: 32, micro_batch: 2, recompute: false },
            schedule: ScheduleConfig {
                kind: ScheduleKind::TwoStage,
                steps: 20,
                warmup_steps: 4,
                lr: 4e-3,
                lr_stage2: Some(2e-3),
                lr_min: Some(0.0),
                stage2_at: Some(0.5),
                decay_at: None,
                decay: None,
                weight_decay: 0.1,
                weight_decay_stage2: Some(0.0),
            },
            optimizer: crate::optim::config_for_tests(1.0),
            eval: EvalConfig { every: 5, windows: 4 },
            sample: SampleConfig {
                every: 10,
                prompts: vec!["the ".into()],
                tokens: 4,
                temperature: 0.0,
            },
            checkpoint: CheckpointConfig { every: 5, keep: 2 },
            metrics: MetricsConfig { weights_every: 4, tensorboard: true },
        }
    }

    #[test]
    fn errors_name_key_and_value() {
        type Case = (fn(&mut TrainConfig), &'static str);
        let cases: &[Case] = &[
            (|c| c.name = "a/b".into(), "name = \"a/b\": must be letters"),
            (|c| c.model.hidden_size = 66, "model.hidden_size = 66: "),
            (|c| c.batch.tokens = 0, "batch.tokens = 0: "),
            (
                |c| c.batch.sequence = 256,
                "batch.sequence = 256: is longer than model.max_position_embeddings = 128",
            ),
            (
                |c| c.batch.tokens = 100,
                "batch.tokens = 100: is not a multiple of batch.sequence · batch.micro_batch = 32 · 2",
            ),
            (|c| c.batch.micro_batch = usize::MAX, "batch.tokens = 128: is not a multiple"),
            (|c| c.schedule.lr = f64::INFINITY, "schedule.lr = inf: must be between 0 and 10"),
            (
                |c| c.optimizer.beta1 = 1.0,
                "optimizer.beta1 = 1: must be at least 0 and less than 1",
            ),
            (|c| c.optimizer.beta2 = -0.1, "optimizer.beta2 = -0.1: "),
            (|c| c.optimizer.eps = 0.0, "optimizer.eps = 0: must be greater than 0"),
            (|c| c.optimizer.clip_norm = f64::NAN, "optimizer.clip_norm = NaN: "),
            (|c| c.sample.temperature = -1.0, "sample.temperature = -1: "),
            (|c| c.sample.tokens = 128, "sample.tokens = 128: "),
            (|c| c.checkpoint.keep = 0, "checkpoint.keep = 0: "),
        ];
        let good = small(std::path::Path::new("x"));
        good.validate().unwrap();
        assert_eq!(good.batch.micro_steps(), 2);
        let mut auto = good.clone();
        auto.batch.micro_batch = 0;
        auto.validate().unwrap();
        auto.batch.tokens = 33;
        assert!(auto.validate().is_err());
        for (spoil, message) in cases {
            let mut config = good.clone();
            spoil(&mut config);
            let error = config.validate().unwrap_err();
            assert!(error.to_string().starts_with(message), "{error}");
            assert_eq!(error.exit(), bitnet_core::Exit::Usage);
        }
    }
}

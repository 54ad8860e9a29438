//! Options that `generate`, `chat` and `inspect` share.

use std::path::{Path, PathBuf};

use bitnet_core::{Activation, ExitError};
use bitnet_engine::{
    EngineError, HeadMode, KvType, LoadOptions, Model, OpenOptions, Sampler, SamplerOptions,
    Session, SessionOptions,
};
use bitnet_format::gguf::blocks::I2sLayout;
use bitnet_format::pack::DenseType;
use clap::{Args, ValueEnum};

/// How tokens are chosen. The engine checks the values.
#[derive(Debug, Args)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct SamplingArgs {
    /// Divides the logits; 0 always takes the most probable token
    #[arg(long, value_name = "T", default_value_t = 0.7)]
    temperature: f32,
    /// Keep the K most probable tokens; 0 keeps all
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,
    /// Keep the fewest tokens whose probabilities reach this sum
    #[arg(long, value_name = "P", default_value_t = 0.95)]
    top_p: f32,
    /// Keep tokens at least P times as probable as the most probable one
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    min_p: f32,
    /// Make recent tokens less probable; 1 is off
    #[arg(long, value_name = "R", default_value_t = 1.0)]
    repetition_penalty: f32,
    /// How many recent tokens the penalty looks at
    #[arg(long, value_name = "N", default_value_t = 64)]
    repetition_window: usize,
    /// Seed of the random numbers: the same seed gives the same text
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
}

impl SamplingArgs {
    /// A sampler whose random numbers begin with `seed`.
    ///
    /// # Errors
    /// A value that cannot be used (exit code 2).
    pub(crate) fn sampler(&self, seed: u64) -> Result<Sampler, ExitError> {
        Ok(Sampler::new(SamplerOptions {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            repetition_window: self.repetition_window,
            seed,
        })?)
    }
}

/// How the model runs.
#[derive(Debug, Args)]
#[command(next_help_heading = "Running")]
pub(crate) struct RunArgs {
    /// Precision of the key and value cache
    #[arg(long, value_enum, default_value_t = KvArg::F32)]
    kv: KvArg,
    /// How the best tokens are found where they alone decide (--temperature 0 or
    /// --top-k, and no repetition penalty): from all logits, or by a scan of a copy
    /// of the head in 8 or 4 bits; the text is the same
    #[arg(long, value_enum, default_value_t = HeadArg::Stored)]
    head: HeadArg,
    /// Threads [default: the physical cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Most tokens of prompt and answer together, at most the model's context
    #[arg(long, value_name = "N")]
    pub(crate) context: Option<usize>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum KvArg {
    F32,
    F16,
    Int8,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum HeadArg {
    Stored,
    Int8,
    Int4,
}

impl RunArgs {
    /// # Errors
    /// See [`Session::new`].
    pub(crate) fn session(&self, model: &Model, context: usize) -> Result<Session, EngineError> {
        let kv = match self.kv {
            KvArg::F32 => KvType::F32,
            KvArg::F16 => KvType::F16,
            KvArg::Int8 => KvType::Int8,
        };
        let head = match self.head {
            HeadArg::Stored => HeadMode::Stored,
            HeadArg::Int8 => HeadMode::Int8Exact,
            HeadArg::Int4 => HeadMode::Int4Exact,
        };
        let (context, threads) = (Some(context), self.threads.map(usize::from));
        let options = SessionOptions { kv, head, context, threads, ..SessionOptions::default() };
        Session::new(model, &options)
    }
}

/// What a model of another tool leaves open.
#[derive(Debug, Args)]
#[command(next_help_heading = "Models of other tools")]
pub(crate) struct SourceArgs {
    /// A tokenizer.json in place of the model's
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Type of a float model's linear weights: f32, f16, int8 or int4 (blocks of 32
    /// with a scale, 8.5 and 4.5 bits a weight), or auto: as they are stored
    #[arg(long, value_name = "TYPE", default_value = "auto", conflicts_with = "ptq")]
    dense: DenseType,
    #[command(flatten)]
    weights: WeightArgs,
}

/// Those of them that concern its weights.
#[derive(Debug, Args)]
#[command(next_help_heading = "Models of other tools")]
pub(crate) struct WeightArgs {
    /// The activation of a GGUF file whose architecture means another one
    #[arg(long, value_enum)]
    hidden_act: Option<ActArg>,
    /// The builds of bitnet.cpp that wrote a GGUF file of I2_S: x86 or arm. Nothing in the
    /// file tells, and read as the other it speaks garbage [default: x86]
    #[arg(long, value_name = "BUILDS")]
    i2s: Option<I2sLayout>,
    /// Quantise a float model that was never trained for it: its quality collapses
    #[arg(long, value_enum)]
    ptq: Option<PtqArg>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ActArg {
    Relu2,
    Silu,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum PtqArg {
    Ternary,
}

impl WeightArgs {
    pub(crate) fn options(&self) -> OpenOptions {
        OpenOptions {
            hidden_act: self.hidden_act.map(|act| match act {
                ActArg::Relu2 => Activation::Relu2,
                ActArg::Silu => Activation::Silu,
            }),
            i2s: self.i2s,
            ptq: self.ptq.is_some(),
            ..OpenOptions::default()
        }
    }
}

impl SourceArgs {
    /// Opens a model for running.
    ///
    /// # Errors
    /// See [`Model::open`].
    pub(crate) fn open(&self, path: &Path) -> Result<Model, ExitError> {
        let source = OpenOptions { tokenizer: self.tokenizer.clone(), ..self.weights.options() };
        let options = LoadOptions { verify: false, prefetch: true, source, dense: self.dense };
        Ok(Model::open(path, &options)?)
    }
}

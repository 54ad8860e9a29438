//! `bitnet-eval plan`: what a model needs and how fast it will be on this machine,
//! before it is trained: from its shape and from rates that are measured in seconds.

mod config;
mod float_probes;
mod form;
mod memory;
mod probes;
mod rates;
mod report;
mod search;
mod speed;
mod training_speed;

use bitnet_core::training_memory::{self, Parts, TrainingShape};
use bitnet_core::{ModelConfig, ParameterCount};
use bitnet_engine::{KvType, Model};
use bitnet_kernels::Kernels;
use serde::Serialize;

pub use config::{Training, load};
pub use form::Form;
pub use memory::{FileBytes, RunBytes, available_bytes, checkpoint_bytes};
pub use rates::{ProductRate, Rates, ReadRate};
pub use search::{Bound, Largest, largest};
pub use speed::{Shape, TokenTime, training_flop};
pub use training_speed::TrainingTime;

use crate::EvalError;

/// What is planned.
#[derive(Debug, Clone, PartialEq)]
pub struct Subject {
    /// Its name.
    pub name: String,
    /// The model.
    pub config: ModelConfig,
    /// The file it is, where it is one: form and bytes.
    pub file: Option<(Form, FileBytes)>,
    /// How it is trained, where a training config says so.
    pub training: Option<Training>,
}

impl Subject {
    /// An opened model: its form and its bytes are known.
    #[must_use]
    pub fn of_model(model: &Model) -> Self {
        let parts = model.parts();
        let file = FileBytes {
            linear: parts.ternary + parts.dense,
            embedding: parts.embedding,
            head: parts.head,
            norms: parts.norms,
            metadata: parts.metadata,
        };
        let name = if model.name().is_empty() { model.file() } else { model.name() };
        Self {
            name: name.to_owned(),
            config: model.config().clone(),
            file: Some((Form::of_model(model), file)),
            training: None,
        }
    }
}

/// What is asked.
#[derive(Debug, Clone)]
pub struct PlanOptions {
    /// Form of the linear layers; the file's, or that of an export without options.
    pub form: Option<Form>,
    /// Element type of the key and value cache.
    pub kv: KvType,
    /// Tokens of a sequence in memory; the model's context.
    pub context: Option<usize>,
    /// Sequences in memory.
    pub sequences: usize,
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Tokens decoded behind an empty context.
    pub generate: usize,
    /// Tokens to train on; those of the config's schedule.
    pub train_tokens: Option<u64>,
    /// Float operations a second of training; what the machine's products come to.
    pub flops: Option<f64>,
    /// Bandwidth of the memory, 10^9 bytes a second, instead of the measured one.
    pub bandwidth: Option<f64>,
    /// The int8 peak, 10^9 operations a second, instead of the measured one.
    pub int8_peak: Option<f64>,
    /// Tokens a second that the largest model should decode.
    pub target_decode: Option<f64>,
}

/// A speed that is predicted.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Predicted {
    /// Tokens of the prompt, or decoded.
    pub tokens: usize,
    /// Tokens a second.
    pub tokens_per_second: f64,
    /// Seconds of a token, by part.
    pub seconds: TokenTime,
}

/// The plan; the keys are stable.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// The model's name.
    pub name: String,
    /// Parameters by part.
    pub parameters: ParameterCount,
    /// All parameters.
    pub total_parameters: u64,
    /// The form of the linear layers that the rest is about.
    pub form: Form,
    /// A packed file in every form.
    pub files: Vec<FilePlan>,
    /// Memory of a sequence or more.
    pub run: RunPlan,
    /// Speed of a prompt.
    pub prefill: Predicted,
    /// Speed of tokens one by one from an empty context.
    pub decode: Predicted,
    /// Speed of the last token of a full context.
    pub decode_full: Predicted,
    /// Training, where a config says how.
    pub training: Option<TrainingPlan>,
    /// The largest model of these proportions that is as fast as was asked for.
    pub largest: Option<Largest>,
    /// Memory that can be had now; none where the system does not tell.
    pub available_bytes: Option<u64>,
    /// What the machine was measured to do, or stated.
    pub machine: Rates,
}

/// A packed file in one form.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct FilePlan {
    /// The form of its linear layers.
    pub form: Form,
    /// Its size.
    pub bytes: u64,
    /// That, by part.
    #[serde(flatten)]
    pub parts: FileBytes,
}

/// Memory while a model runs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct RunPlan {
    /// Tokens of a sequence.
    pub context: usize,
    /// Sequences.
    pub sequences: usize,
    /// All of it.
    pub bytes: u64,
    /// That, by part.
    #[serde(flatten)]
    pub parts: RunBytes,
}

/// What training takes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TrainingPlan {
    /// Sequences that go through the model at once.
    pub micro_batch: usize,
    /// Tensors that are live at the peak, in bytes; without the program and the pages of
    /// the token shards.
    pub memory: Parts,
    /// Their sum.
    pub memory_bytes: u64,
    /// The phase of the run that needs most.
    pub peak_in: &'static str,
    /// Whether the run has a teacher, which is not counted.
    pub distills: bool,
    /// Master weights of a checkpoint on disk.
    pub checkpoint_weights_bytes: u64,
    /// The optimizer's state of a checkpoint on disk.
    pub checkpoint_optimizer_bytes: u64,
    /// Tokens that are trained on.
    pub tokens: u64,
    /// Float operations of a token.
    pub flop_per_token: f64,
    /// Float operations a second.
    pub flop_per_second: f64,
    /// Whether that was stated; else it follows from the machine's rates.
    pub stated: bool,
    /// Seconds of a token, by part; none where the operations a second were stated.
    pub token_seconds: Option<TrainingTime>,
    /// Tokens a second.
    pub tokens_per_second: f64,
    /// Seconds of the whole run.
    pub seconds: f64,
}

/// Measures the machine and plans.
///
/// # Errors
/// A context longer than the model's, a form that the model cannot have, and numbers
/// that are none.
pub fn plan(
    subject: &Subject,
    kernels: Kernels,
    threads: usize,
    options: &PlanOptions,
) -> Result<Plan, EvalError> {
    let form = check(subject, options)?;
    let mut rates = Rates::measure(&subject.config, form, kernels, threads);
    if let Some(bandwidth) = options.bandwidth {
        rates = rates.with_bandwidth(bandwidth);
    }
    if let Some(peak) = options.int8_peak {
        rates = rates.with_int8_peak(peak);
    }
    Ok(with_rates(subject, form, kernels, rates, options))
}

/// The form, where all options make sense.
fn check(subject: &Subject, options: &PlanOptions) -> Result<Form, EvalError> {
    let config = &subject.config;
    let limit = config.max_position_embeddings;
    for (option, tokens) in [
        ("--context", options.context.unwrap_or(limit)),
        ("--prompt", options.prompt),
        ("--generate", options.generate),
    ] {
        if tokens == 0 || tokens > limit {
            let message = format!("{option} {tokens}: 1 to the context of {limit} tokens");
            return Err(EvalError::Usage(message));
        }
    }
    if options.sequences == 0 {
        return Err(EvalError::Usage("--batch 0: at least 1 sequence".into()));
    }
    for (option, value) in [
        ("--bandwidth", options.bandwidth),
        ("--int8-peak", options.int8_peak),
        ("--flops", options.flops),
        ("--target-decode", options.target_decode),
    ] {
        if let Some(value) = value.filter(|v| !v.is_finite() || *v <= 0.0) {
            return Err(EvalError::Usage(format!("{option} {value}: must be above 0")));
        }
    }
    let own = subject.file.map(|(form, _)| form);
    let form = options.form.or(own).unwrap_or_else(|| Form::usual(config));
    let forms = Form::of(config);
    if own != Some(form) && !forms.contains(&form) {
        let known = forms.iter().map(|f| f.name()).collect::<Vec<_>>().join(", ");
        let message = format!("--form {form}: linear layers of this model can be {known}");
        return Err(EvalError::Usage(message));
    }
    Ok(form)
}

/// The plan on a machine of these rates.
fn with_rates(
    subject: &Subject,
    form: Form,
    kernels: Kernels,
    rates: Rates,
    options: &PlanOptions,
) -> Plan {
    let config = &subject.config;
    let parameters = config.parameter_count();
    let own = subject.file;
    let bytes_of = |form| match own {
        Some((own, bytes)) if own == form => bytes,
        _ => FileBytes::of(config, form),
    };
    let mut forms = Form::of(config);
    if !forms.contains(&form) {
        forms.push(form);
    }
    let files = forms.into_iter().map(|form| {
        let parts = bytes_of(form);
        FilePlan { form, bytes: parts.total(), parts }
    });
    let context = options.context.unwrap_or(config.max_position_embeddings);
    let run = run_bytes(config, form, bytes_of(form), kernels, rates.threads, options, context);
    let kv_bytes = options.kv.bytes(config, 1024) as f64
        / (1024 * 2 * config.num_hidden_layers * config.key_value_size()) as f64;
    let shape = Shape { config, linear: form, kv_bytes };
    let predicted = |tokens, seconds: TokenTime| Predicted {
        tokens,
        tokens_per_second: seconds.per_second(),
        seconds,
    };
    let mean = (options.generate as f64 + 1.0) / 2.0;
    let available = available_bytes();
    Plan {
        name: subject.name.clone(),
        parameters,
        total_parameters: parameters.total(),
        form,
        files: files.collect(),
        run: RunPlan { context, sequences: options.sequences, bytes: run.total(), parts: run },
        prefill: predicted(options.prompt, shape.prefill(&rates, options.prompt)),
        decode: predicted(options.generate, shape.decode(&rates, mean)),
        decode_full: predicted(context, shape.decode(&rates, context as f64)),
        training: subject
            .training
            .as_ref()
            .map(|training| training_plan(&shape, training, &rates, available, options)),
        largest: options.target_decode.map(|target| {
            let bytes = |config: &ModelConfig| {
                let file = FileBytes::of(config, form);
                let context = context.min(config.max_position_embeddings);
                run_bytes(config, form, file, kernels, rates.threads, options, context).total()
            };
            let speed = |config: &ModelConfig| {
                Shape { config, linear: form, kv_bytes }.decode(&rates, mean).per_second()
            };
            largest(config, target, available, &bytes, &speed)
        }),
        available_bytes: available,
        machine: rates,
    }
}

fn run_bytes(
    config: &ModelConfig,
    form: Form,
    file: FileBytes,
    kernels: Kernels,
    threads: usize,
    options: &PlanOptions,
    context: usize,
) -> RunBytes {
    let run = RunBytes::of(config, file.total(), options.kv, context, options.sequences, threads);
    let repacked = match form {
        Form::Ternary(layout) if !kernels.reads_well(layout) => {
            FileBytes::of(config, Form::Ternary(bitnet_core::Layout::P2)).linear
        }
        _ => 0,
    };
    RunBytes { repacked, ..run }
}

/// What an estimate may be short of the peak by, as `bitnet-train` leaves it when it
/// chooses a micro-batch.
const MARGIN: f64 = 0.15;

fn training_plan(
    shape: &Shape<'_>,
    training: &Training,
    rates: &Rates,
    available: Option<u64>,
    options: &PlanOptions,
) -> TrainingPlan {
    let config = shape.config;
    let in_step = (training.batch_tokens / training.sequence.max(1)).max(1);
    let memory_of = |micro_batch: usize| TrainingShape {
        model: config.clone(),
        micro_batch,
        sequence: training.sequence,
        micro_steps: in_step / micro_batch,
        recompute: training.recompute,
        muon: training.muon,
        byte_moments: training.byte_moments,
        blends: training.blends,
        teacher: None,
    };
    // An automatic micro-batch is the greatest that fits, or 1.
    let fits = |micro_batch: &usize| {
        let needed = training_memory::tensors(&memory_of(*micro_batch)).0.total() as f64;
        available.is_none_or(|available| needed * (1.0 + MARGIN) <= available as f64)
    };
    let micro_batch = match training.micro_batch {
        Some(n) => n,
        None => {
            let divisors = (1..=in_step).rev().filter(|n| in_step.is_multiple_of(*n));
            divisors.into_iter().find(fits).unwrap_or(1)
        }
    };
    let (memory, peak_in) = training_memory::tensors(&memory_of(micro_batch));
    let (weights, optimizer) = checkpoint_bytes(config, training);
    let flop_per_token = training_flop(config, training.sequence, training.recompute);
    let token_seconds = match options.flops {
        Some(_) => None,
        None => Some(TrainingTime::of(shape, training, micro_batch, rates)),
    };
    let tokens_per_second = match (options.flops, &token_seconds) {
        (_, Some(time)) => 1.0 / time.total(),
        (flops, None) => flops.unwrap_or(0.0) / flop_per_token,
    };
    let tokens = options.train_tokens.unwrap_or(training.tokens);
    TrainingPlan {
        micro_batch,
        memory,
        memory_bytes: memory.total(),
        peak_in,
        distills: training.distills,
        checkpoint_weights_bytes: weights,
        checkpoint_optimizer_bytes: optimizer,
        tokens,
        flop_per_token,
        flop_per_second: tokens_per_second * flop_per_token,
        stated: options.flops.is_some(),
        token_seconds,
        tokens_per_second,
        seconds: tokens as f64 / tokens_per_second,
    }
}

#[cfg(test)]
mod tests;

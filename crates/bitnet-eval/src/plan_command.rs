//! `bitnet-eval plan`: its options.

use std::path::Path;

use bitnet_engine::{EngineError, Model, physical_cores};
use bitnet_eval::EvalError;
use bitnet_eval::plan::{Form, PlanOptions, Subject, load, plan};
use bitnet_kernels::Kernels;
use clap::Args;

use crate::{RunArgs, SourceArgs, coded};

/// What a model needs and how fast it will be here, before it is trained
///
/// From its shape, and from what this machine is measured to do in a few seconds:
/// reading memory, and each kind of operation with the engine's kernels. Nothing is
/// built and no weight is read.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  bitnet-eval plan 2b4t
  bitnet-eval plan configs/125m.toml --context 2048 --batch 4 --kv f16
  bitnet-eval plan 7b --target-decode 10
  bitnet-eval plan 3b --bandwidth 100 --int8-peak 8000 --flops 5e13 --tokens 100e9
  bitnet-eval plan model.gguf --json -

Predictions add up the operations of a forward pass; experiments/0009-plan compares them
with measurements. Medians of short rounds count: a busy machine is a slow one.

Training's time is the sum of its products on this CPU, each at a rate that is measured with
training's own kernel, and of constants that are printed with it; of another machine it is
the operations of a token at --flops. Where a run has begun, its own tokens/s is the truth.

JSON keys: name, parameters, total_parameters, form, files (form, bytes and its parts),
run (context, sequences, bytes and its parts), prefill, decode and decode_full (tokens,
tokens_per_second, seconds by part), training, largest, available_bytes, machine.")]
pub(crate) struct PlanArgs {
    /// A training config: a file, or the name of one in a folder `configs`; or a packed
    /// model, or a model of another tool
    #[arg(value_name = "CONFIG|MODEL")]
    subject: String,
    /// How the linear layers are stored: p2 or p5; of a float twin f32, f16, int8 or
    /// int4 [default: the file's, or what an export without options takes]
    #[arg(long, value_name = "FORM", value_parser = form)]
    form: Option<Form>,
    /// Tokens of a sequence in memory [default: the model's context]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Sequences in memory
    #[arg(long, value_name = "B", default_value_t = 1)]
    batch: usize,
    /// Tokens of the prompt [default: 512, at most the context]
    #[arg(long, value_name = "N")]
    prompt: Option<usize>,
    /// Tokens decoded behind an empty context [default: 128, at most the context]
    #[arg(long, value_name = "N")]
    generate: Option<usize>,
    /// Tokens to train on [default: those of the config's schedule]
    #[arg(long, value_name = "N", value_parser = tokens)]
    tokens: Option<u64>,
    /// Float operations a second that training reaches, by six for each weight and token
    /// [default: what follows from the rates of this machine]
    #[arg(long, value_name = "FLOP/s")]
    flops: Option<f64>,
    /// Bandwidth of the memory in GB/s [default: measured at the size of the model]
    #[arg(long, value_name = "GB/s")]
    bandwidth: Option<f64>,
    /// Peak of the int8 product in GOP/s; all arithmetic changes in proportion
    /// [default: measured]
    #[arg(long, value_name = "GOP/s")]
    int8_peak: Option<f64>,
    /// Also find the largest model of these proportions that decodes so many tokens/s
    /// here and fits the memory
    #[arg(long, value_name = "TOKENS/s")]
    target_decode: Option<f64>,
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    source: SourceArgs,
}

fn form(name: &str) -> Result<Form, String> {
    Form::from_name(name).ok_or_else(|| {
        let known = Form::ALL.map(Form::name).join(", ");
        format!("unknown form; known: {known}")
    })
}

/// A number of tokens, also as `1e9`.
fn tokens(text: &str) -> Result<u64, String> {
    if let Ok(n) = text.parse::<u64>() {
        return if n > 0 { Ok(n) } else { Err("at least 1".to_owned()) };
    }
    match text.parse::<f64>() {
        Ok(x) if (1.0..1e18).contains(&x) && x.fract() == 0.0 => Ok(x as u64),
        _ => Err("a whole number, at least 1".to_owned()),
    }
}

impl PlanArgs {
    /// Measures, plans and prints.
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        let subject = self.subject()?;
        self.check(&subject).map_err(coded)?;
        let kernels = Kernels::from_env().map_err(|e| coded(EngineError::from(e)))?;
        let session = self.run.session(None);
        let limit = subject.config.max_position_embeddings;
        let options = PlanOptions {
            form: self.form,
            kv: session.kv,
            context: self.context,
            sequences: self.batch,
            prompt: self.prompt.unwrap_or(limit.min(512)),
            generate: self.generate.unwrap_or(limit.min(128)),
            train_tokens: self.tokens,
            flops: self.flops,
            bandwidth: self.bandwidth,
            int8_peak: self.int8_peak,
            target_decode: self.target_decode,
        };
        let threads = session.threads.unwrap_or_else(physical_cores);
        let plan = plan(&subject, kernels, threads, &options).map_err(coded)?;
        self.run.print(&plan.table(), &plan)
    }

    /// Refuses options that would change nothing.
    fn check(&self, subject: &Subject) -> Result<(), EvalError> {
        let given = [("--tokens", self.tokens.is_some()), ("--flops", self.flops.is_some())];
        match given.into_iter().find(|(_, given)| *given) {
            Some((option, _)) if subject.training.is_none() => {
                let name = &self.subject;
                let message = format!("{option}: {name} says nothing about training");
                Err(EvalError::Usage(message))
            }
            _ => Ok(()),
        }
    }

    /// A training config by its name's ending or where there is no such file; else a
    /// model.
    fn subject(&self) -> anyhow::Result<Subject> {
        let path = Path::new(&self.subject);
        let toml = path.extension().is_some_and(|e| e == "toml");
        if toml || !path.exists() {
            if let Some(option) = self.source.given() {
                let message = format!("{option}: {} is a training config", self.subject);
                return Err(coded(EvalError::Usage(message)).into());
            }
            return Ok(load(&self.subject).map_err(coded)?);
        }
        let model = Model::open(path, &self.source.options()).map_err(coded)?;
        Ok(Subject::of_model(&model))
    }
}

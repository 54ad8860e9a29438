//! `bitnet-eval compare`: measures several models under the same conditions. What needs a
//! process of its own (memory, perplexity) runs this program again, with the same options
//! for every model.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::Context;
use bitnet_core::Exit;
use bitnet_core::exit::ExitError;
use bitnet_engine::{EngineError, LoadOptions, physical_cores};
use bitnet_eval::EvalError;
use bitnet_eval::bench::{BenchOptions, Loaded, Report, Row, Setting, Spread, bench};
use bitnet_eval::compare::{
    Comparison, Conditions, Figures, Quality, Rate, Spec, page, read_tasks,
};
use bitnet_eval::energy;
use bitnet_eval::plan::Form;
use bitnet_format::atomic::write_atomic;
use bitnet_kernels::Kernels;
use clap::Args;
use serde_json::Value;

use crate::{RunArgs, coded};

/// Several models side by side, each against the first: size, memory, speed, energy,
/// perplexity, tasks
///
/// All run with the same threads, prompt and text, in turns, in one go.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  bitnet-eval compare twin.gguf model.gguf --data data/corpus --html compare.html
  bitnet-eval compare twin.gguf twin.gguf@int8 twin.gguf@int4 twin.gguf@ternary model.gguf \\
      --text book.txt --html compare.html
  bitnet-eval compare a.gguf b.gguf --tasks a-tasks.json --tasks b-tasks.json --json -

MODEL@VARIANT is a dense model whose linear layers are made f32, f16, int8, int4 or, though
it was not trained for it, ternary; in a temporary file, as bitnet-export makes it.

The table is Markdown. Memory is the peak of a process that runs one model alone; load is
the median of five, from the system's cache; energy is measured where the processor counts
it (RAPL). --tasks takes results in the schema of lm-evaluation-harness, as bitnet-eval
tasks writes them: one file for each model, in their order, or - for none.

JSON keys: conditions, energy, models: label, model, form, parameters, file_bytes,
bits_per_weight, bytes_per_token, memory_bytes, load_seconds, prefill and decode (median,
min, max), joules_per_prefill_token, joules_per_decode_token, quality (nats, perplexity,
bits_per_byte), tasks (task, metric, value, stderr).")]
pub(crate) struct CompareArgs {
    /// Models, the first being what the others are compared with
    #[arg(value_name = "MODEL[@VARIANT]", required = true, num_args = 2..)]
    models: Vec<String>,
    /// Folder of token shards, whose validation split is scored
    #[arg(long, value_name = "DIR", conflicts_with = "text")]
    data: Option<PathBuf>,
    /// A UTF-8 text file that is scored
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// How the text is cut, see bitnet-eval perplexity [default: windows]
    #[arg(long, value_name = "MODE")]
    mode: Option<String>,
    /// Tokens of a window of the text [default: that of the mode, at most the smallest
    /// context of the models]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Stop scoring after the window that reaches N tokens
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    max_tokens: Option<u64>,
    /// Tokens of the prompt [default: 512, at most the smallest context]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    prompt: Option<u32>,
    /// Tokens to decode [default: 128, at most the smallest context]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    generate: Option<u32>,
    /// Measured rounds
    #[arg(long, value_name = "N", default_value_t = 5)]
    repeats: usize,
    /// Results of tasks, one file for each model in their order, or - for none
    #[arg(long, value_name = "FILE|-")]
    tasks: Vec<String>,
    /// Write the page to FILE
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Where the processor's counters of energy are
    #[arg(long, value_name = "DIR", default_value = energy::POWERCAP)]
    powercap: PathBuf,
    #[command(flatten)]
    run: RunArgs,
}

/// How often a model is opened to time it.
const LOADS: usize = 5;

impl CompareArgs {
    /// Measures and prints.
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        self.check().map_err(coded)?;
        let specs: Vec<Spec> =
            self.models.iter().map(|m| Spec::parse(m)).collect::<Result<_, _>>().map_err(coded)?;
        let tasks = self.read_tasks().map_err(coded)?;
        let folder = tempfile::tempdir().context("no temporary folder")?;
        let mut files = Vec::new();
        for (i, spec) in specs.iter().enumerate() {
            files.push(spec.prepare(folder.path(), i).map_err(coded)?);
        }
        let loaded: Vec<Loaded> = files
            .iter()
            .map(|file| Loaded::open(file, &LoadOptions::default()))
            .collect::<Result<_, _>>()
            .map_err(coded)?;
        let setting = Setting {
            kernels: Kernels::from_env().map_err(|e| coded(EngineError::from(e)))?,
            threads: self.run.threads.map_or_else(physical_cores, usize::from),
        };
        let contexts = loaded.iter().map(|l| l.model.config().max_position_embeddings);
        let limit = contexts.min().unwrap_or(1);
        let tokens = |wanted: Option<u32>, usual| wanted.map_or(limit.min(usual), |n| n as usize);
        let (prompt, generate) = (tokens(self.prompt, 512), tokens(self.generate, 128));
        let session = self.run.session(None);
        let options = BenchOptions {
            prompts: vec![prompt],
            generates: vec![generate],
            batches: Vec::new(),
            repeats: self.repeats,
            session: session.clone(),
            heads: Vec::new(),
            energy: Some(self.powercap.clone()),
        };
        // First what is measured alone, while nothing else holds memory.
        let mut alone = Vec::new();
        for (spec, file) in specs.iter().zip(&files) {
            eprintln!("{}: memory and text", spec.label());
            let memory = self.memory(file, prompt, generate, setting)?;
            alone.push((memory, self.quality(file, limit, setting)?));
        }
        eprintln!("all: speed");
        let report = bench(&loaded, &[setting], &options, &mut |_, _, _| {}).map_err(coded)?;
        let mut models = Vec::new();
        for (i, spec) in specs.iter().enumerate() {
            let (memory, quality) = &alone[i];
            let times: Result<Vec<f64>, _> = (0..LOADS)
                .map(|_| Loaded::open(&files[i], &LoadOptions::default()).map(|l| l.load_seconds))
                .collect();
            let times = times.map_err(coded)?;
            let mut figures = figures(spec, &self.models[i], &loaded[i], &report)?;
            figures.memory_bytes = *memory;
            figures.load_seconds = Spread::of(&times).median;
            figures.quality = quality.as_ref().map(|(quality, _)| *quality);
            figures.tasks = tasks.get(i).cloned().unwrap_or_default();
            models.push(figures);
        }
        distinct(&mut models);
        let tokenizer = |l: &Loaded| l.model.tokenizer_json().to_owned();
        let scored = alone[0].1.as_ref().map(|(_, json)| json);
        let text = |key: &str| Some(scored?[key].as_str()?.to_owned());
        let conditions = Conditions {
            isa: setting.kernels.name().to_owned(),
            threads: setting.threads,
            kv: session.kv.name().to_owned(),
            prompt,
            generate,
            repeats: self.repeats,
            text: text("source"),
            text_hash: text("data_hash"),
            mode: text("mode"),
            context: scored.and_then(|json| json["context"].as_u64()),
            tokens: scored.and_then(|json| json["tokens"].as_u64()),
            one_tokenizer: loaded.iter().all(|l| tokenizer(l) == tokenizer(&loaded[0])),
        };
        let comparison = Comparison { conditions, models, energy: report.energy };
        if let Some(path) = &self.html {
            let page = page(&comparison).map_err(coded)?;
            write_atomic(path, |w| w.write_all(page.as_bytes()))
                .map_err(|source| coded(EvalError::Write { path: path.clone(), source }))?;
        }
        self.run.print(&comparison.table(), &comparison)
    }

    /// Refuses options that would change nothing.
    fn check(&self) -> Result<(), EvalError> {
        if self.data.is_some() || self.text.is_some() {
            return Ok(());
        }
        let given = [
            ("--mode", self.mode.is_some()),
            ("--context", self.context.is_some()),
            ("--max-tokens", self.max_tokens.is_some()),
        ];
        match given.into_iter().find(|(_, given)| *given) {
            Some((option, _)) => {
                let message = format!("{option}: nothing is scored without --data or --text");
                Err(EvalError::Usage(message))
            }
            None => Ok(()),
        }
    }

    fn read_tasks(&self) -> Result<Vec<Vec<bitnet_eval::compare::TaskScore>>, EvalError> {
        if !self.tasks.is_empty() && self.tasks.len() != self.models.len() {
            let (files, models) = (self.tasks.len(), self.models.len());
            let message = format!("--tasks: {files} files for {models} models; one for each, or -");
            return Err(EvalError::Usage(message));
        }
        let read = |file: &String| match file.as_str() {
            "-" => Ok(Vec::new()),
            file => read_tasks(Path::new(file)),
        };
        self.tasks.iter().map(read).collect()
    }

    /// The peak of a process that does what the bench does with this model alone.
    fn memory(
        &self,
        file: &Path,
        prompt: usize,
        generate: usize,
        setting: Setting,
    ) -> anyhow::Result<Option<u64>> {
        let (prompt, generate) = (prompt.to_string(), generate.to_string());
        let args = ["--prompt", &prompt, "--generate", &generate, "--batch", "0", "--repeats", "1"];
        let json = self.again("bench", file, &args, setting)?;
        let rows = json["results"].as_array().map(Vec::as_slice).unwrap_or_default();
        Ok(rows.iter().filter_map(|row| row["peak_rss_bytes"].as_u64()).max())
    }

    /// The text under a model, and all that was printed of it; none without a text.
    fn quality(
        &self,
        file: &Path,
        limit: usize,
        setting: Setting,
    ) -> anyhow::Result<Option<(Quality, Value)>> {
        let (option, source) = match (&self.data, &self.text) {
            (Some(data), _) => ("--data", data),
            (None, Some(text)) => ("--text", text),
            (None, None) => return Ok(None),
        };
        let source = source.to_str().context("a path that is not UTF-8")?;
        let mode = self.mode.as_deref().unwrap_or("windows");
        let usual = match mode {
            "llama-cpp" => limit.min(512),
            "blocks" => limit.min(2048),
            _ => limit,
        };
        let context = self.context.unwrap_or(usual).to_string();
        let mut args = vec![option, source, "--mode", mode, "--context", &context];
        let most = self.max_tokens.map(|n| n.to_string());
        if let Some(most) = &most {
            args.extend(["--max-tokens", most]);
        }
        let json = self.again("perplexity", file, &args, setting)?;
        let number = |key: &str| json[key].as_f64();
        let missing = || anyhow::anyhow!("{}: the scores have no numbers", file.display());
        let quality = Quality {
            nats: number("nats").with_context(missing)?,
            perplexity: number("perplexity").with_context(missing)?,
            bits_per_byte: number("bits_per_byte"),
        };
        Ok(Some((quality, json)))
    }

    /// What another process of this program prints as JSON. Its messages are this one's,
    /// and so is its exit code where it fails.
    fn again(
        &self,
        command: &str,
        file: &Path,
        args: &[&str],
        setting: Setting,
    ) -> anyhow::Result<Value> {
        let program = std::env::current_exe().context("this program's own file")?;
        let output = Command::new(program)
            .env("BITNET_ISA", setting.kernels.name())
            .arg(command)
            .arg(file)
            .args(args)
            .args(["--threads", &setting.threads.to_string()])
            .args(["--kv", self.run.session(None).kv.name(), "--json", "-"])
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("bitnet-eval {command} could not be started"))?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr);
            let why = text.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or("no message");
            let why = why.trim().trim_start_matches("error: ").to_owned();
            let exit = match output.status.code() {
                Some(2) => Exit::Usage,
                Some(3) => Exit::BadInput,
                Some(130) => Exit::Interrupted,
                _ => Exit::Failed,
            };
            return Err(ExitError::new(exit, format!("bitnet-eval {command}: {why}")).into());
        }
        serde_json::from_slice(&output.stdout)
            .with_context(|| format!("what bitnet-eval {command} printed"))
    }
}

/// What the bench found out about a model.
fn figures(spec: &Spec, model: &str, loaded: &Loaded, report: &Report) -> anyhow::Result<Figures> {
    let own = |row: &&Row| row.model == loaded.model.file();
    let row = |kind: &str| {
        let found = report.results.iter().filter(own).find(|row| row.test.starts_with(kind));
        found.with_context(|| format!("{model}: no test {kind}"))
    };
    let rate = |row: &Row| Rate {
        median: row.tokens_per_second,
        min: row.tokens_per_second_min,
        max: row.tokens_per_second_max,
    };
    let (prefill, decode) = (row("pp")?, row("tg")?);
    let (config, parts) = (loaded.model.config(), loaded.model.parts());
    let count = config.parameter_count();
    Ok(Figures {
        label: spec.label(),
        model: model.to_owned(),
        form: Form::of_model(&loaded.model).name().to_owned(),
        parameters: count.total(),
        file_bytes: loaded.model.bytes(),
        bits_per_weight: 8.0 * (parts.ternary + parts.dense) as f64 / count.linear.max(1) as f64,
        bytes_per_token: decode.bytes_per_token,
        memory_bytes: None,
        load_seconds: 0.0,
        prefill: rate(prefill),
        decode: rate(decode),
        joules_per_prefill_token: prefill.joules_per_token,
        joules_per_decode_token: decode.joules_per_token,
        quality: None,
        tasks: Vec::new(),
    })
}

/// Models whose files have one name are told apart by what was given for them, and those
/// that are given twice by a number.
fn distinct(models: &mut [Figures]) {
    let labels: Vec<String> = models.iter().map(|m| m.label.clone()).collect();
    for model in models.iter_mut() {
        if labels.iter().filter(|l| **l == model.label).count() > 1 {
            model.label = model.model.clone();
        }
    }
    for i in 1..models.len() {
        let label = models[i].label.clone();
        let before = models[..i].iter().filter(|m| m.model == models[i].model).count();
        if before > 0 {
            models[i].label = format!("{label} ({})", before + 1);
        }
    }
}

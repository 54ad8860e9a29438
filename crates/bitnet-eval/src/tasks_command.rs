//! `bitnet-eval tasks`: its options, and the files it writes.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Instant, SystemTime};

use anyhow::Context;
use bitnet_core::exit::ExitError;
use bitnet_engine::{EngineError, Model, Session, physical_cores};
use bitnet_eval::tasks::{
    Builtin, CustomTask, Journal, JournalIdentity, Kind, RunFacts, Sampler, Task, TaskResult, ask,
    results, samples, table,
};
use bitnet_eval::{BatchedModel, EngineModel, EvalError, LanguageModel, sha256_hex};
use bitnet_format::atomic::write_atomic;
use bitnet_kernels::Kernels;
use clap::Args;

use crate::progress::Progress;
use crate::{RunArgs, SourceArgs, coded};

/// The form of the journal.
const JOURNAL_VERSION: u32 = 1;

/// How many questions a model answers: ARC, HellaSwag, WinoGrande, PIQA, OpenBookQA,
/// BoolQ, and tasks of your own
///
/// A model chooses the answer that it finds most probable after the question. Prompts,
/// tokens and scores are those of lm-evaluation-harness 0.4.13, so that numbers compare.
/// Everything is read from files here; nothing is downloaded.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  bitnet-eval tasks model.gguf --task arc_easy=ARC-Easy-Test.jsonl --task piqa=valid.jsonl
  bitnet-eval tasks model.gguf --task hellaswag=validation.parquet --output results
  bitnet-eval tasks model.gguf --task mine.toml=questions.jsonl --limit 100 --json -
  bitnet-eval tasks model.gguf --task boolq=val.jsonl --num-fewshot 5 --fewshot boolq=train.jsonl

Tasks: arc_easy, arc_challenge, hellaswag, winogrande, piqa, openbookqa, boolq; files are
those of the original data (.jsonl) or of the Hugging Face hub (.parquet, .jsonl). PIQA's
answers are looked for beside valid.jsonl, in valid-labels.lst. A name that ends with .toml
is a file that describes a task of your own:

  task = \"mine\"
  doc_to_text = \"Question: {{question}}\\nAnswer:\"   # a field's name or a Jinja template
  doc_to_choice = \"{{choices.text}}\"                # a list, a field's name, an expression
  doc_to_target = \"{{choices.label.index(answerKey)}}\" # the right answer's number, or itself
  # version, description, target_delimiter (\" \"), fewshot_delimiter (\"\\n\\n\"),
  # metrics = [\"acc\", \"acc_norm\", \"acc_bytes\"], multiple_input = true (choices are contexts),
  # fewshot_split, test_split (equal: an example that is the question itself is left out)

Metrics: acc, the largest log-probability; acc_norm, the largest for each character of the
choice; acc_bytes, for each byte. A standard error takes questions as independent.

--output writes results.json and samples_TASK.jsonl into DIR, and journal.jsonl: every
question's scores as they are made. The same command goes on where it was stopped; more
tasks or a higher --limit use what is there.

JSON keys are lm-evaluation-harness': results (for each task sample_len, acc,none,
acc_stderr,none, ...), configs, versions, n-shot, higher_is_better, n-samples (also
truncated: contexts cut from the left; resumed: scores from the journal), config,
follows_lm_eval_version, max_length, date, total_evaluation_time_seconds.")]
pub(crate) struct TasksArgs {
    /// Packed model; or a Hugging Face, checkpoint or run folder, or a GGUF file of
    /// another tool, which is packed each time it is opened
    model: PathBuf,
    /// A task and the file of its questions
    #[arg(long = "task", value_name = "NAME=FILE", required = true)]
    tasks: Vec<Pair>,
    /// The answers of a task's questions, a number a line
    #[arg(long, value_name = "NAME=FILE")]
    labels: Vec<Pair>,
    /// Solved examples before each question, from --fewshot's file
    #[arg(long, value_name = "N", default_value_t = 0, requires = "fewshot")]
    num_fewshot: usize,
    /// Where the examples of a task are from
    #[arg(long, value_name = "NAME=FILE", requires = "num_fewshot")]
    fewshot: Vec<Pair>,
    /// Draw the examples by lot, anew for each question: those that lm-evaluation-harness
    /// draws with this seed, by default 1234 there [default: the first ones of the file]
    #[arg(long, value_name = "SEED", requires = "num_fewshot")]
    fewshot_seed: Option<u64>,
    /// Ask the first N questions of each task
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
    /// Write results, samples and a journal to go on from into this folder
    #[arg(long, short, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Score up to N choices together, those of several questions; fewer where their keys
    /// and values would take more than 1 GiB. The scores are the same for every N
    #[arg(long, value_name = "N", default_value_t = 16,
          value_parser = clap::value_parser!(u16).range(1..=1024))]
    batch: u16,
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    source: SourceArgs,
}

/// `NAME=FILE`.
#[derive(Debug, Clone)]
struct Pair {
    name: String,
    file: PathBuf,
}

impl FromStr for Pair {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((name, file)) if !name.is_empty() && !file.is_empty() => {
                Ok(Self { name: name.into(), file: file.into() })
            }
            _ => Err("expected NAME=FILE".into()),
        }
    }
}

impl TasksArgs {
    /// Asks and prints.
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        let start = (Instant::now(), SystemTime::now());
        let tasks = self.open_tasks()?;
        let model = Model::open(&self.model, &self.source.options()).map_err(coded)?;
        let tokenizer = model.tokenizer().map_err(coded)?;
        let settings = self.run.session(None);
        let kernels = Kernels::from_env().map_err(|e| coded(EngineError::from(e)))?;
        let (isa, kv) = (kernels.name(), settings.kv.name());
        let threads = settings.threads.unwrap_or_else(physical_cores);
        let mut scorer: Box<dyn LanguageModel> = match usize::from(self.batch) {
            1 => Box::new(EngineModel::new(Session::new(&model, &settings).map_err(coded)?)),
            most => Box::new(BatchedModel::new(&model, &settings, most).map_err(coded)?),
        };
        let model_sha256 = sha256_hex(model.as_bytes());
        let mut journal = self.journal(&model_sha256, kv)?;
        let mut done: Vec<(Task, TaskResult)> = Vec::new();
        let limit = self.limit.map(|n| usize::try_from(n).unwrap_or(usize::MAX));
        for task in tasks {
            let mut progress = Progress::new("questions");
            let name = task.kind.name().to_owned();
            let result =
                ask(&mut *scorer, &tokenizer, &task, limit, &mut journal, &mut |done, all| {
                    progress.show(done as u64, all as u64, &name);
                })
                .map_err(coded)?;
            progress.finish();
            if result.truncated > 0 {
                tracing::warn!(
                    "{name}: {} of {} questions do not fit the model's context of {} tokens; \
                     their beginnings were left out",
                    result.truncated,
                    result.outcomes.len(),
                    model.config().max_position_embeddings,
                );
            }
            if result.resumed > 0 {
                let all = result.outcomes.len();
                eprintln!("{name}: {} of {all} questions were in the journal", result.resumed);
            }
            done.push((task, result));
        }
        let date = start.1.duration_since(SystemTime::UNIX_EPOCH);
        let facts = RunFacts {
            model: self.model.display().to_string(),
            model_sha256,
            max_length: model.config().max_position_embeddings,
            kv,
            threads,
            isa,
            num_fewshot: self.num_fewshot,
            sampler: (self.num_fewshot > 0).then(|| self.sampler()),
            limit,
            seconds: start.0.elapsed().as_secs_f64(),
            date: date.map_or(0.0, |d| d.as_secs_f64()),
        };
        let report = results(&done, &facts);
        if let Some(folder) = &self.output {
            for (task, result) in &done {
                let path = folder.join(format!("samples_{}.jsonl", task.kind.name()));
                write_atomic(&path, |w| {
                    samples(task, result).try_for_each(|sample| writeln!(w, "{sample}"))
                })
                .context("cannot write the samples")?;
            }
            write_atomic(folder.join("results.json"), |w| {
                serde_json::to_writer_pretty(&mut *w, &report)?;
                writeln!(w)
            })
            .context("cannot write the results")?;
        }
        self.run.print(&table(&done, self.num_fewshot), &report)
    }

    fn sampler(&self) -> Sampler {
        self.fewshot_seed.map_or(Sampler::FirstN, |seed| Sampler::Default { seed })
    }

    /// Reads every question before the model is opened: a mistake shows at once.
    fn open_tasks(&self) -> Result<Vec<Task>, ExitError> {
        let usage = |message: String| coded(EvalError::Usage(message));
        if self.num_fewshot == 0 && !self.fewshot.is_empty() {
            let message = "--num-fewshot 0: --fewshot would not be read; leave it out";
            return Err(usage(message.into()));
        }
        for (option, pairs) in [("--labels", &self.labels), ("--fewshot", &self.fewshot)] {
            for (i, pair) in pairs.iter().enumerate() {
                let name = &pair.name;
                if !self.tasks.iter().any(|task| task.name == *name) {
                    return Err(usage(format!("{option} {name}: no --task has that name")));
                }
                if pairs[..i].iter().any(|p| p.name == *name) {
                    return Err(usage(format!("{option} {name}: named twice")));
                }
            }
        }
        let file = |pairs: &'_ [Pair], name: &str| {
            pairs.iter().find(|p| p.name == name).map(|p| p.file.clone())
        };
        let mut tasks: Vec<Task> = Vec::new();
        for Pair { name, file: path } in &self.tasks {
            let labels = file(&self.labels, name);
            let mut task = Task::open(kind(name)?, path, labels.as_deref()).map_err(coded)?;
            if tasks.iter().any(|t| t.kind.name() == task.kind.name()) {
                let name = task.kind.name();
                return Err(usage(format!("--task {name}: two tasks have that name")));
            }
            match file(&self.fewshot, name) {
                Some(examples) => {
                    let (count, sampler) = (self.num_fewshot, self.sampler());
                    task = task.with_examples(&examples, count, sampler).map_err(coded)?;
                }
                None if self.num_fewshot > 0 => {
                    let message =
                        format!("--num-fewshot {}: no --fewshot {name}=FILE", self.num_fewshot);
                    return Err(usage(message));
                }
                None => {}
            }
            tasks.push(task);
        }
        Ok(tasks)
    }

    fn journal(&self, model_sha256: &str, kv: &str) -> anyhow::Result<Journal> {
        let Some(folder) = &self.output else { return Ok(Journal::default()) };
        std::fs::create_dir_all(folder)
            .with_context(|| format!("{}: cannot be made", folder.display()))?;
        let identity = JournalIdentity {
            journal: JOURNAL_VERSION,
            model_sha256: model_sha256.to_owned(),
            kv: kv.to_owned(),
        };
        Ok(Journal::open(&folder.join("journal.jsonl"), &identity).map_err(coded)?)
    }
}

/// The task of a name or of the file that describes it.
fn kind(name: &str) -> Result<Kind, ExitError> {
    if let Some(builtin) = Builtin::from_name(name) {
        return Ok(Kind::Builtin(builtin));
    }
    if name.ends_with(".toml") {
        let custom = CustomTask::open(Path::new(name)).map_err(coded)?;
        return Ok(Kind::Custom(Box::new(custom)));
    }
    let known = Builtin::ALL.map(Builtin::name).join(", ");
    let message = format!("--task {name}: none of {known}, and no .toml file");
    Err(coded(EvalError::Usage(message)))
}

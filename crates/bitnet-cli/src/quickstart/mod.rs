//! `bitnet quickstart`: the whole path on real text by the other programs, each
//! command line shown, so that it can be typed again with other values.
//!
//! Restartable: a stage whose command, inputs and outputs are as they were is
//! skipped, and a training that was interrupted goes on from its checkpoint.

mod process;
mod stage;
mod summary;

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, anyhow};
use bitnet_core::ExitError;

use self::stage::{Stage, Stamp, State};
use self::summary::{Results, Summary};
use crate::interrupt;

/// Train a small ternary model on real text, pack it, score it and let it write
///
/// Runs bitnet-data, bitnet-train, bitnet-export, bitnet-eval and bitnet generate
/// one after the other and shows each command line. Run it again after an
/// interruption: what is complete is skipped, training goes on where it was.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  bitnet quickstart
  bitnet quickstart --steps 50 --dir runs/short
  bitnet quickstart --json summary.json

Writes DIR/data (token shards), DIR/run (checkpoints, metrics, plots),
DIR/model.gguf (the packed model) and one JSON file per stage.

JSON keys: parameters, fp32_bytes, fp16_bytes, packed_bytes, train_val_loss,
packed_val_loss (nats per token), train_tokens_per_second, decode_tokens_per_second,
seconds, stage_seconds, sample, dir, config, data_dir, run_dir, checkpoint, model.")]
pub(crate) struct Args {
    /// Folder that everything is written to
    #[arg(long, value_name = "DIR", default_value = "runs/quickstart")]
    dir: PathBuf,
    /// Training config: a path, or a name in a configs folder
    #[arg(long, value_name = "FILE", default_value = "quickstart.toml")]
    config: PathBuf,
    /// Train for N steps instead of the config's
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    steps: Option<u64>,
    /// Text that the sample goes on from
    #[arg(long, value_name = "TEXT", default_value = "/// Returns the")]
    prompt: String,
    /// Run every stage again, from the beginning
    #[arg(long)]
    force: bool,
    /// Write the summary as JSON to FILE, or to stdout with -
    #[arg(long, value_name = "FILE|-")]
    json: Option<String>,
}

/// Text taken from the default corpus: enough for a model of this size, and
/// tokenised in seconds.
const MAX_TEXT: &str = "24MiB";
/// Length of the sample, in tokens.
const SAMPLE_TOKENS: &str = "96";
const STAGES: usize = 5;
const PROGRAMS: [&str; 5] =
    ["bitnet-data", "bitnet-train", "bitnet-export", "bitnet-eval", "bitnet"];

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    for program in PROGRAMS {
        process::sibling(program)?;
    }
    let config = find_config(&args.config)?;
    let shape = Shape::read(&config)?;
    let workspace = find_workspace()?;
    claim(&args.dir)?;
    interrupt::install(process::forward_interrupt)?;
    let paths = Paths::new(&args.dir, config);
    let mut runner = Runner::new(&args.dir, args.force);

    runner.stage(&prepare(&paths, &shape, &workspace))?;
    runner.train(&train(&paths, args.steps), &paths.run)?;
    let results = Results::new(&args.dir);
    let checkpoint = results.checkpoint()?;
    runner.stage(&export(&paths, &checkpoint))?;
    runner.stage(&evaluate(&paths, &shape))?;
    runner.stage(&generate(&paths, &args.prompt))?;

    let summary = Summary::collect(&results, &paths, runner.seconds)?;
    summary.print(args.json.as_deref())
}

/// What the quickstart reads from the training config.
#[derive(Debug, PartialEq)]
struct Shape {
    vocab_size: i64,
    sequence: i64,
    /// Windows of an evaluation; 0: all.
    windows: i64,
}

impl Shape {
    fn read(config: &Path) -> anyhow::Result<Self> {
        let name = config.display();
        let text = fs::read_to_string(config)
            .map_err(|e| ExitError::bad_input(anyhow!("{name}: cannot be read: {e}")))?;
        let table: toml::Table =
            text.parse().map_err(|e| ExitError::usage(anyhow!("{name}: {e}")))?;
        let number = |section: &str, key: &str, least: i64| {
            let value = table.get(section).and_then(|s| s.get(key)).and_then(|v| v.as_integer());
            value.filter(|v| *v >= least).ok_or_else(|| {
                let what = format!("a number of at least {least} is needed");
                ExitError::usage(anyhow!("{name}: {section}.{key}: {what}"))
            })
        };
        Ok(Self {
            vocab_size: number("model", "vocab_size", 1)?,
            sequence: number("batch", "sequence", 1)?,
            windows: number("eval", "windows", 0)?,
        })
    }
}

/// Where everything is.
#[derive(Debug)]
struct Paths {
    dir: PathBuf,
    config: PathBuf,
    data: PathBuf,
    run: PathBuf,
    model: PathBuf,
}

impl Paths {
    fn new(dir: &Path, config: PathBuf) -> Self {
        Self {
            dir: dir.into(),
            config,
            data: dir.join("data"),
            run: dir.join("run"),
            model: dir.join("model.gguf"),
        }
    }
}

/// The config itself, or the one of that name in a `configs` folder: of the
/// working directory, then of the folders above this program.
fn find_config(config: &Path) -> anyhow::Result<PathBuf> {
    if config.is_file() {
        return Ok(config.into());
    }
    let mut tried = vec![config.to_path_buf()];
    if config.file_name() == Some(config.as_os_str()) {
        tried.push(Path::new("configs").join(config));
        let this = std::env::current_exe().unwrap_or_default();
        tried.extend(this.ancestors().skip(1).map(|a| a.join("configs").join(config)));
    }
    if let Some(found) = tried.iter().find(|p| p.is_file()) {
        return Ok(found.clone());
    }
    let places: Vec<String> = tried.iter().map(|p| p.display().to_string()).collect();
    let places = places.join(", ");
    Err(ExitError::usage(anyhow!("no config {}: looked at {places}", config.display())).into())
}

/// The workspace whose dependencies are the text: the working directory, or the
/// nearest folder above this program that has a Cargo.lock.
fn find_workspace() -> anyhow::Result<PathBuf> {
    let this = std::env::current_exe().unwrap_or_default();
    let above = this.ancestors().skip(1).map(Path::to_path_buf);
    std::iter::once(PathBuf::from("."))
        .chain(above)
        .find(|d| d.join("Cargo.lock").is_file())
        .ok_or_else(|| {
            ExitError::bad_input(anyhow!(
                "no Cargo.lock in the working directory or above {}: the default corpus is \
                 the text of the packages it names",
                this.display()
            ))
            .into()
        })
}

/// Makes the folder ours. One that holds a run of someone else's is left alone:
/// stale stages are deleted in ours.
fn claim(dir: &Path) -> anyhow::Result<()> {
    let stages = dir.join("stages");
    if !stages.is_dir() && ["run", "data"].iter().any(|n| dir.join(n).exists()) {
        return Err(ExitError::usage(anyhow!(
            "{}: holds a run or data folder that bitnet quickstart did not make; \
             choose another --dir",
            dir.display()
        ))
        .into());
    }
    fs::create_dir_all(&stages).with_context(|| format!("{}: cannot be made", stages.display()))
}

fn os<const N: usize>(args: [&dyn AsRef<std::ffi::OsStr>; N]) -> Vec<OsString> {
    args.iter().map(|a| a.as_ref().to_owned()).collect()
}

fn prepare(paths: &Paths, shape: &Shape, workspace: &Path) -> Stage {
    let vocab = shape.vocab_size.to_string();
    let mut args = os([
        &"prepare",
        &"cargo",
        &"-o",
        &paths.data,
        &"--vocab-size",
        &vocab,
        &"--max-bytes",
        &MAX_TEXT,
    ]);
    if workspace != Path::new(".") {
        args.extend(os([&"--workspace", &workspace]));
    }
    Stage {
        name: "prepare",
        title: "text, tokenizer and token shards",
        program: "bitnet-data",
        args,
        inputs: vec![workspace.join("Cargo.lock")],
        outputs: vec![paths.data.join("manifest.json")],
    }
}

fn train(paths: &Paths, steps: Option<u64>) -> Stage {
    let mut args = os([&"--config", &paths.config, &"--data", &paths.data, &"--run", &paths.run]);
    if let Some(steps) = steps {
        args.extend(os([&"--steps", &steps.to_string()]));
    }
    let mut outputs = vec![paths.run.join("checkpoints")];
    outputs.extend(Results::new(&paths.dir).checkpoint().ok());
    Stage {
        name: "train",
        title: "a ternary transformer",
        program: "bitnet-train",
        args,
        inputs: vec![paths.config.clone()],
        outputs,
    }
}

fn export(paths: &Paths, checkpoint: &Path) -> Stage {
    Stage {
        name: "export",
        title: "quantise, pack and verify",
        program: "bitnet-export",
        args: os([&checkpoint, &"-o", &paths.model, &"--name", &"quickstart"]),
        inputs: vec![],
        outputs: vec![paths.model.clone()],
    }
}

/// The same windows as training's last evaluation.
fn evaluate(paths: &Paths, shape: &Shape) -> Stage {
    let context = shape.sequence.to_string();
    let mut args = os([
        &"perplexity",
        &paths.model,
        &"--data",
        &paths.data,
        &"--split",
        &"val",
        &"--context",
        &context,
    ]);
    if shape.windows > 0 {
        args.extend(os([&"--windows", &shape.windows.to_string()]));
    }
    Stage {
        name: "perplexity",
        title: "validation loss of the packed model",
        program: "bitnet-eval",
        args,
        inputs: vec![],
        outputs: vec![],
    }
}

fn generate(paths: &Paths, prompt: &str) -> Stage {
    Stage {
        name: "generate",
        title: "a sample of what it writes",
        program: "bitnet",
        args: os([
            &"generate",
            &paths.model,
            &prompt,
            &"-n",
            &SAMPLE_TOKENS,
            &"--temperature",
            &"0.7",
            &"--top-p",
            &"0.9",
            &"--seed",
            &"1",
        ]),
        inputs: vec![],
        outputs: vec![],
    }
}

/// Runs stages in order.
#[derive(Debug)]
struct Runner {
    dir: PathBuf,
    force: bool,
    /// Key of the stage before.
    key: String,
    /// Whether a stage has run: all that follow run too.
    ran: bool,
    index: usize,
    seconds: Vec<(&'static str, f64)>,
}

impl Runner {
    fn new(dir: &Path, force: bool) -> Self {
        let key = String::new();
        Self { dir: dir.into(), force, key, ran: false, index: 0, seconds: Vec::new() }
    }

    fn stage(&mut self, stage: &Stage) -> anyhow::Result<()> {
        if self.skips(stage)? {
            return Ok(());
        }
        let mut extra = Vec::new();
        if self.force && stage.program == "bitnet-data" {
            extra.push("--force".into());
        }
        self.execute(stage, extra)
    }

    /// Training goes on from its checkpoint where it was interrupted with the
    /// same config and data; otherwise a stale run folder is deleted first.
    fn train(&mut self, stage: &Stage, run: &Path) -> anyhow::Result<()> {
        if self.skips(stage)? {
            return Ok(());
        }
        let started = Stamp::read(&self.dir, stage.name).is_some_and(|s| s.key == self.key);
        let extra = if started && !self.ran && !self.force && has_checkpoint(run) {
            vec!["--resume".into()]
        } else {
            if run.exists() {
                eprintln!("      deleting the stale {}", run.display());
                fs::remove_dir_all(run).with_context(|| format!("{}", run.display()))?;
            }
            Vec::new()
        };
        self.execute(stage, extra)
    }

    /// Says what comes next; true where it is up to date already.
    fn skips(&mut self, stage: &Stage) -> anyhow::Result<bool> {
        self.key = stage.key(&self.key)?;
        self.index += 1;
        let head = format!("[{}/{STAGES}] {}: {}", self.index, stage.name, stage.title);
        let stamp = Stamp::read(&self.dir, stage.name)
            .filter(|s| s.state == State::Done && s.key == self.key)
            .filter(|_| stage.complete() && self.json(stage).is_file());
        match stamp {
            Some(stamp) if !self.ran && !self.force => {
                eprintln!("{head}: up to date, skipped");
                self.seconds.push((stage.name, stamp.seconds));
                Ok(true)
            }
            _ => {
                eprintln!("{head}");
                Ok(false)
            }
        }
    }

    fn json(&self, stage: &Stage) -> PathBuf {
        self.dir.join(format!("{}.json", stage.name))
    }

    fn execute(&mut self, stage: &Stage, extra: Vec<OsString>) -> anyhow::Result<()> {
        let mut args = stage.args.clone();
        let resumed = !extra.is_empty() && stage.name == "train";
        args.extend(extra);
        args.extend(os([&"--json", &self.json(stage)]));
        eprintln!("      $ {}", process::command_line(stage.program, &args));
        let before = Stamp::read(&self.dir, stage.name)
            .filter(|s| resumed && s.state == State::Started)
            .map_or(0.0, |s| s.seconds);
        let mut stamp = Stamp { key: self.key.clone(), state: State::Started, seconds: before };
        stamp.write(&self.dir, stage.name)?;
        let started = Instant::now();
        let result = process::run(&process::sibling(stage.program)?, &args);
        stamp.seconds = before + started.elapsed().as_secs_f64();
        if result.is_ok() {
            stamp.state = State::Done;
        }
        stamp.write(&self.dir, stage.name)?;
        if let Err(error) = result {
            return Err(error.context(format!(
                "quickstart stopped at stage {} ({}); run it again to go on from there",
                self.index, stage.name
            )));
        }
        eprintln!("      done in {:.1} s", stamp.seconds);
        self.ran = true;
        self.seconds.push((stage.name, stamp.seconds));
        Ok(())
    }
}

/// Whether a run folder has a complete checkpoint: those have plain numbers as
/// names, unfinished ones begin with a dot.
fn has_checkpoint(run: &Path) -> bool {
    let Ok(entries) = fs::read_dir(run.join("checkpoints")) else { return false };
    entries.flatten().any(|e| {
        e.file_name()
            .to_str()
            .is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_a_config_by_path_and_says_where_it_looked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        fs::write(&path, "x = 1").unwrap();
        assert_eq!(find_config(&path).unwrap(), path);
        let error = find_config(Path::new("no-such.toml")).unwrap_err().to_string();
        assert!(error.starts_with("no config no-such.toml: looked at no-such.toml, "), "{error}");
        assert!(error.contains(&format!("{}", Path::new("configs/no-such.toml").display())));
    }

    #[test]
    fn reads_the_shape_or_names_the_key() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        fs::write(
            &path,
            "[model]\nvocab_size = 4096\n[batch]\nsequence = 256\n[eval]\nwindows = 9\n",
        )
        .unwrap();
        assert_eq!(
            Shape::read(&path).unwrap(),
            Shape { vocab_size: 4096, sequence: 256, windows: 9 }
        );
        for (text, part) in [
            ("[model]\nvocab_size = 4096\n", "batch.sequence"),
            ("[batch]\nsequence = 1\n", "model.vocab_size"),
            ("[model]\nvocab_size = \"x\"\n", "model.vocab_size"),
            ("[model]\nvocab_size = 9\n[batch]\nsequence = 9\n", "eval.windows"),
            ("[model\n", "line 1"),
        ] {
            fs::write(&path, text).unwrap();
            let error = Shape::read(&path).unwrap_err();
            assert_eq!(bitnet_core::exit::code_of(error.as_ref()).code(), 2);
            assert!(error.to_string().contains(part), "{error}");
        }
    }

    #[test]
    fn leaves_folders_of_others_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("run")).unwrap();
        assert!(claim(dir.path()).unwrap_err().to_string().contains("did not make"));
        fs::create_dir(dir.path().join("stages")).unwrap();
        claim(dir.path()).unwrap();
    }

    #[test]
    fn knows_complete_checkpoints() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!has_checkpoint(dir.path()));
        fs::create_dir_all(dir.path().join("checkpoints/.00000010.tmp-1")).unwrap();
        assert!(!has_checkpoint(dir.path()));
        fs::create_dir_all(dir.path().join("checkpoints/00000010")).unwrap();
        assert!(has_checkpoint(dir.path()));
    }
}

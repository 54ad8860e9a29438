//! A training run, from the config to the last checkpoint.
//!
//! The loop is [`run`]: evaluate → sample → count weights → save → step → write, for each step.
//! What one of these does is a method of `Trainer`.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bitnet_data::{Dataset, Split, TokenStream, Tokenizer};
use bitnet_format::atomic::write_atomic;
use burn::module::Module;
use burn::tensor::Device;

use crate::checkpoint::{self, Snapshot, State};
use crate::config::TrainConfig;
use crate::corpus::{self, Reduction};
use crate::devices::DeviceList;
use crate::error::with_path;
use crate::metrics::{self, EvalMetric, Metric, Sample, TrainMetric, WeightMetric};
use crate::model::Transformer;
use crate::optim::Optimizer;
use crate::progress::{Progress, View};
use crate::ranks::Ranks;
use crate::record::Recorder;
use crate::replicas::{Objective, Replicas};
use crate::run_info::{Data, RunInfo, Start};
use crate::stage::Stage;
use crate::summary::Summary;
use crate::weights::Trits;
use crate::{TrainError, config_file, evaluate, memory, ops, plan, plot, start};

/// Steps over which a run's final training loss is averaged.
pub(crate) const LAST_STEPS: usize = 100;

/// What to run, and how.
#[derive(Debug, Clone)]
pub struct RunOptions {
    /// The run's configuration.
    pub config: TrainConfig,
    /// Where it runs.
    pub device: DeviceList,
    /// Go on from the newest checkpoint in the run folder, if there is one.
    pub resume: bool,
    /// Stop after this step of the schedule, as if interrupted there.
    pub until: Option<u64>,
}

/// A request to stop at the next good moment; clones share it.
#[derive(Debug, Clone, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Asks the run to save a checkpoint and return. Whether it was asked before.
    #[must_use]
    pub fn request(&self) -> bool {
        self.0.swap(true, Ordering::SeqCst)
    }

    /// Whether it was asked.
    #[must_use]
    pub fn requested(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// Trains. Everything the run leaves is in its folder: the resolved config, the
/// metrics, samples, plots and checkpoints.
///
/// # Errors
/// See [`TrainError`]; [`TrainError::Interrupted`] when `stop` was requested, with
/// a checkpoint saved.
pub fn run(options: &RunOptions, stop: &Stop) -> Result<Summary, TrainError> {
    run_on(&Ranks::open()?, options, stop, View::Plain)
}

/// Trains as one of several processes, shown on the terminal as `view` says. Rank 0
/// writes the run folder and returns what the run came to; the others return the
/// same steps without losses.
///
/// # Errors
/// As [`run`]; where one rank fails, the others wait until they are ended with
/// [`Ranks::abort`].
pub fn run_on(
    ranks: &Ranks,
    options: &RunOptions,
    stop: &Stop,
    view: View,
) -> Result<Summary, TrainError> {
    let (mut trainer, mut model) = Trainer::open(options, ranks, view)?;
    let config = options.config.clone();
    while trainer.state.step < trainer.end {
        if trainer.due(config.eval.every, trainer.state.evaluated_at) {
            trainer.evaluate(&model)?;
        }
        if trainer.due(config.sample.every, trainer.state.sampled_at) {
            trainer.sample(&model)?;
        }
        trainer.count_weights(&model)?;
        if trainer.due(config.checkpoint.every, trainer.saved_at) {
            trainer.save(&model)?;
        }
        let metric;
        (model, metric) = trainer.step(model, stop)?;
        match metric {
            Some(metric) => trainer.write(&Metric::Train(metric))?,
            None => return Err(trainer.interrupted(&model)?),
        }
    }
    trainer.finish(&model)
}

/// A run between two steps, all but the model, which a step consumes.
struct Trainer<'r> {
    ranks: &'r Ranks,
    config: TrainConfig,
    choice: DeviceList,
    device: Device,
    replicas: Replicas,
    optimizer: Optimizer,
    stream: TokenStream,
    /// The token that ends a document.
    eos: u32,
    validation: Dataset,
    tokenizer: Tokenizer,
    chat_template: Option<String>,
    state: State,
    saved_at: Option<u64>,
    trits: Option<Trits>,
    checkpoint: Option<PathBuf>,
    end: u64,
    /// Seconds of the run before this process, and when this process began.
    clock: (f64, Instant),
    /// On the rank that writes.
    record: Option<Recorder>,
    progress: Progress,
    /// Held as long as the run folder is in use.
    _lock: Option<File>,
}

impl<'r> Trainer<'r> {
    /// Checks everything, then makes or resumes the run.
    fn open(
        options: &RunOptions,
        ranks: &'r Ranks,
        view: View,
    ) -> Result<(Self, Transformer), TrainError> {
        let mut config = options.config.clone();
        config.validate()?;
        config.quantization.check_device(options.device.first())?;
        config.optimizer.check_device(options.device.first())?;
        let train = Arc::new(Dataset::open(&config.data.dir, Split::Train)?);
        let validation = Dataset::open(&config.data.dir, Split::Validation)?;
        let tokenizer = train.tokenizer()?;
        corpus::check(&config, &train, &validation, &tokenizer)?;
        let devices: Vec<Device> =
            options.device.open()?.into_iter().map(Device::autodiff).collect();
        config.precision.check(&options.device, &devices)?;
        let device = devices[0].clone();
        if ranks.size() > 1 && config.batch.micro_batch == 0 {
            let what = "batch.micro_batch = \"auto\" knows one process; give a number";
            return Err(TrainError::Ranks(what.into()));
        }
        let planned = plan::resolve(&mut config, options, &train, &validation)?;
        let run_dir = &config.run_dir;
        ranks.check(config.batch.micro_steps())?;
        ranks.check_devices(&options.device)?;
        options.device.check(config.batch.micro_steps())?;
        let _lock = ranks.is_first().then(|| lock(run_dir)).transpose()?;
        if ranks.is_first() {
            checkpoint::sweep(run_dir)?;
        }
        // Behind it no rank sees what an earlier process left half done.
        ranks.barrier();
        let found = find_checkpoint(run_dir, options.resume)?;
        let text = config_file::to_toml(&config)?;
        let saved_config = fs::read_to_string(run_dir.join("config.toml")).ok();
        ranks.barrier();
        let corpus_hash = train.manifest().corpus_hash.clone();
        let data = Data::of(&config.data.dir, train.manifest());
        let eos = train.eos_id();
        let mut stream = corpus::stream(&config, Arc::clone(&train))?;
        let mut model = Transformer::new(&config.model, config.seed, &device);
        let host = options.device.first().is_host();
        let mut optimizer = Optimizer::new(&config.optimizer, &model, &device, host);
        let mut state = State::new(stream.state(), corpus_hash, tokenizer.hash_hex());
        let mut notes = Vec::new();
        if let (Some(from), None) = (&config.start, &found) {
            let start;
            (model, start) = start::load(&from.from, &config.model, model, tokenizer.to_json())?;
            notes = start.notes;
        }
        let replicas = Replicas::open(devices, config.distill.as_ref(), &config.model)?;
        let mut trits = None;
        if let Some(path) = &found {
            let saved = checkpoint::load_state(path)?;
            check_resumed(path, &saved, &state, &config)?;
            model = checkpoint::load(path, &config.model, model, &mut optimizer)?;
            stream = corpus::resume(&config, train, &saved.batches, path)?;
            state = saved;
            let now = Trits::of(&model, state.step);
            trits = now.map_or(Ok(None), |now| Trits::load(path, &now))?;
        }
        let after = found.as_ref().map(|_| state.step);
        // What is continued with other values is no longer bit for bit one run.
        let changed = match (&saved_config, after) {
            (Some(saved), Some(_)) => config_file::changes(saved, &config),
            _ => Vec::new(),
        };
        let start = Start { changed, ..Start::now(state.step, &options.device, data) };
        let changed = start.changed.clone();
        // Only now: a run that cannot be gone on with like this keeps its own.
        if ranks.is_first() {
            write_atomic(run_dir.join("config.toml"), |w| {
                std::io::Write::write_all(w, text.as_bytes())
            })?;
            RunInfo::append(run_dir, start, options.resume)?;
        }
        let steps = config.schedule.steps;
        let end = options.until.map_or(steps, |until| until.min(steps));
        stage_at(&config, state.step).apply(&config.model, &mut model);
        let tensorboard = config.metrics.tensorboard;
        let record = match ranks.is_first() {
            true => Some(Recorder::open(run_dir, after, tensorboard)?),
            false => None,
        };
        let view = if ranks.is_first() { view } else { View::Plain };
        let earlier = || metrics::read(&run_dir.join("metrics.jsonl")).unwrap_or_default();
        let mut trainer = Self {
            ranks,
            replicas,
            record,
            progress: Progress::new(view, &config, end, state.step, earlier),
            saved_at: after,
            trits,
            checkpoint: found,
            clock: (state.seconds, Instant::now()),
            choice: options.device.clone(),
            device,
            optimizer,
            stream,
            eos,
            validation,
            tokenizer,
            chat_template: checkpoint::chat_template(&config.data.dir)?,
            state,
            end,
            config,
            _lock,
        };
        trainer.introduce();
        if let Some(plan) = planned {
            trainer.say(&format!(
                "batch.micro_batch = {}: the greatest that fits, {} of {}",
                plan.micro_batch,
                plan::readable(plan.predicted_peak_bytes),
                plan::readable(plan.available_bytes.unwrap_or_default()),
            ));
        }
        notes.iter().for_each(|note| trainer.say(note));
        for change in changed {
            trainer.say(&format!("changed since the run began: {change}"));
        }
        Ok((trainer, model))
    }

    fn introduce(&mut self) {
        let c = &self.config;
        let from = match &self.checkpoint {
            Some(path) => format!(", going on from {}", path.display()),
            None => String::new(),
        };
        let among = match self.ranks.size() {
            1 => String::new(),
            n => format!(", {n} ranks"),
        };
        let line = format!(
            "{}: {:.2}M parameters, steps {}..{} of {} tokens on {}{among}{from}",
            c.name,
            c.model.parameter_count().total() as f64 / 1e6,
            self.state.step,
            self.end,
            c.batch.tokens,
            self.choice,
        );
        self.say(&line);
        if let Some(teacher) = self.replicas.teacher() {
            let line = format!("following the teacher {}", teacher.path().display());
            self.say(&line);
        }
    }

    /// Shows a line that stays, once for all ranks.
    fn say(&mut self, line: &str) {
        if self.ranks.is_first() {
            self.progress.line(line);
        }
    }

    /// Whether something that happens every `every` steps, and happened last at
    /// step `last`, is to happen now.
    fn due(&self, every: u64, last: Option<u64>) -> bool {
        let step = self.state.step;
        every > 0 && step > 0 && step.is_multiple_of(every) && last != Some(step)
    }

    fn evaluate(&mut self, model: &Transformer) -> Result<(), TrainError> {
        self.state.evaluated_at = Some(self.state.step);
        if !self.ranks.is_first() {
            return Ok(());
        }
        let (b, windows) = (&self.config.batch, self.config.eval.windows);
        let (val_loss, tokens) = evaluate::validation_loss(
            &model.valid(),
            &self.validation,
            b.sequence,
            windows,
            b.micro_batch,
            &self.device.clone().without_autodiff(),
        )?;
        if !val_loss.is_finite() {
            return Err(self.non_finite("the validation loss", val_loss));
        }
        let step = self.state.step;
        let seconds = self.seconds();
        self.write(&Metric::Eval(EvalMetric { step, val_loss, tokens, seconds }))?;
        self.state.val_loss = Some(val_loss);
        self.say(&format!("step {step}: validation loss {val_loss:.4} nats per token"));
        Ok(())
    }

    fn sample(&mut self, model: &Transformer) -> Result<(), TrainError> {
        self.state.sampled_at = Some(self.state.step);
        if !self.ranks.is_first() {
            return Ok(());
        }
        let (step, context) = (self.state.step, self.config.model.max_position_embeddings);
        let (model, device) = (model.valid(), self.device.clone().without_autodiff());
        let config = self.config.sample.clone();
        for (index, prompt) in config.prompts.iter().enumerate() {
            // A seed of its own for each step and prompt; the generator mixes it.
            let seed = self.config.seed ^ (step << 16) ^ index as u64;
            let tokenizer = &self.tokenizer;
            let text =
                evaluate::sample(&model, tokenizer, &config, prompt, context, seed, &device)?;
            let sample = Sample { step, prompt: prompt.clone(), text };
            self.progress.sample(&sample);
            if let Some(record) = &mut self.record {
                record.sample(&sample)?;
            }
        }
        Ok(())
    }

    /// Counts the quantised weights, where a statistic is due at this step.
    fn count_weights(&mut self, model: &Transformer) -> Result<(), TrainError> {
        let (step, every) = (self.state.step, self.config.metrics.weights_every);
        let last = self.trits.as_ref().map(Trits::step);
        let end = step == self.config.schedule.steps;
        if !self.ranks.is_first()
            || every == 0
            || last == Some(step)
            || !(end || step.is_multiple_of(every))
        {
            return Ok(());
        }
        let Some(trits) = Trits::of(model, step) else {
            return Ok(());
        };
        let layers = trits.shares(self.trits.as_ref());
        let at = (step, self.state.tokens, self.seconds());
        let metric = WeightMetric::new(at, last, layers);
        self.write(&Metric::Weights(metric))?;
        self.trits = Some(trits);
        Ok(())
    }

    fn save(&mut self, model: &Transformer) -> Result<(), TrainError> {
        self.saved_at = Some(self.state.step);
        if !self.ranks.is_first() {
            return Ok(());
        }
        self.state.seconds = self.seconds();
        self.state.batches = self.stream.state();
        let plain = self.device.clone().without_autodiff();
        let context = self.config.model.max_position_embeddings;
        // What is exported is the finished model, whatever stage this one is in.
        let mut finished = model.valid();
        Stage::FINAL.apply(&self.config.model, &mut finished);
        let golden = evaluate::golden(&finished, &self.validation, context, &plain)?;
        let snapshot = Snapshot {
            state: &self.state,
            config: &self.config.model,
            model,
            optimizer: &self.optimizer,
            tokenizer: &self.tokenizer,
            chat_template: self.chat_template.as_deref(),
            golden: &golden,
            trits: self.trits.as_ref(),
        };
        let path = checkpoint::save(&self.config.run_dir, self.config.checkpoint.keep, &snapshot)?;
        self.checkpoint = Some(path);
        self.plot()
    }

    /// One step: the gradients of the micro-steps, their norm, the update. Without
    /// a metric where `stop` was requested: then nothing has changed. Every rank
    /// takes its share of the micro-steps.
    fn step(
        &mut self,
        mut model: Transformer,
        stop: &Stop,
    ) -> Result<(Transformer, Option<TrainMetric>), TrainError> {
        let started = Instant::now();
        let before = self.stream.clone();
        let micro_steps = self.config.batch.micro_steps();
        let mut shares = self.replicas.begin(&model);
        // Of all tokens that count, in nats.
        let (mut nats, mut counted) = (0.0, 0.0);
        let mut waited = Duration::ZERO;
        let (step, rows) = (self.state.step, self.config.batch.micro_batch);
        let (data, all) = (&self.config.data, (rows * self.config.batch.sequence) as f64);
        let (end, reduction) = (data.mask_documents.then_some(self.eos), data.loss);
        let recompute = self.config.batch.recompute;
        let mut stopped = false;
        let at_once = self.replicas.count();
        for first in (0..micro_steps).step_by(at_once) {
            let mut batches = Vec::with_capacity(at_once);
            for micro in first..micro_steps.min(first + at_once) {
                self.progress.tick();
                let waiting = Instant::now();
                if micro % self.ranks.size() != self.ranks.rank() {
                    self.stream.skip(step, rows as u64);
                    continue;
                }
                batches.push(self.stream.next_batch(step, rows)?);
                waited += waiting.elapsed();
                stopped |= stop.requested();
            }
            if stopped {
                break;
            }
            let values = shares.add(&batches, Objective { end, reduction, recompute })?;
            for ((value, tokens), batch) in values.into_iter().zip(&batches) {
                let masked_sum = reduction == Reduction::Sum && batch.loss_mask.is_some();
                nats += f64::from(value) * if masked_sum { all } else { tokens as f64 };
                counted += tokens as f64;
            }
        }
        let mut sum = shares.finish();
        if self.ranks.any(stopped) {
            self.stream = before;
            return Ok((model, None));
        }
        let counted = self.ranks.sum_f64(counted).max(1.0);
        let loss = self.ranks.sum_f64(nats) / counted;
        if !loss.is_finite() {
            return Err(self.non_finite("the loss", loss));
        }
        sum.add_ranks(self.ranks);
        let norm = sum.norm(self.choice.first().is_host());
        if !norm.is_finite() {
            return Err(self.non_finite("the gradient's norm", norm));
        }
        let rates = self.config.schedule.rates(self.state.step);
        model = self.optimizer.step(model, sum, norm, micro_steps, rates);
        let tokens = self.config.batch.tokens as u64;
        self.state.step += 1;
        let stage = stage_at(&self.config, self.state.step);
        if stage != stage_at(&self.config, self.state.step - 1) {
            // Buffers of other sizes will be wanted.
            ops::release();
        }
        stage.apply(&self.config.model, &mut model);
        self.state.tokens += tokens;
        let metric = TrainMetric {
            step: self.state.step,
            loss,
            lr: rates.lr,
            grad_norm: norm / micro_steps as f64,
            tokens: self.state.tokens,
            tokens_per_second: tokens as f64 / started.elapsed().as_secs_f64().max(1e-9),
            seconds: self.seconds(),
            data_seconds: waited.as_secs_f64(),
            rss_bytes: memory::rss_bytes(),
        };
        Ok((model, Some(metric)))
    }

    /// Shows and records what was measured, on the rank that writes.
    fn write(&mut self, metric: &Metric) -> Result<(), TrainError> {
        let Some(record) = &mut self.record else { return Ok(()) };
        self.progress.metric(metric);
        Ok(record.metric(metric)?)
    }

    fn interrupted(&mut self, model: &Transformer) -> Result<TrainError, TrainError> {
        let step = self.state.step;
        if self.saved_at != Some(step) {
            self.save(model)?;
        }
        self.progress.finish();
        Ok(TrainError::Interrupted {
            step,
            checkpoint: self.checkpoint.clone().unwrap_or_default(),
            run_dir: self.config.run_dir.clone(),
        })
    }

    /// At the schedule's end the last evaluation, samples and checkpoint; before
    /// it (`--until`) a checkpoint alone, so that the run goes on as if it had
    /// never stopped.
    fn finish(&mut self, model: &Transformer) -> Result<Summary, TrainError> {
        let step = self.state.step;
        if step == self.config.schedule.steps {
            if self.state.evaluated_at != Some(step) {
                self.evaluate(model)?;
            }
            if self.state.sampled_at != Some(step) {
                self.sample(model)?;
            }
            self.count_weights(model)?;
        }
        if self.saved_at == Some(step) {
            self.plot()?;
        } else {
            self.save(model)?;
        }
        self.progress.finish();
        self.summary()
    }

    fn plot(&self) -> Result<(), TrainError> {
        if !self.ranks.is_first() {
            return Ok(());
        }
        let metrics = metrics::read(&self.config.run_dir.join("metrics.jsonl"))?;
        plot::draw(&self.config.run_dir, &self.config.name, &metrics)
    }

    fn summary(&self) -> Result<Summary, TrainError> {
        let metrics = metrics::read(&self.config.run_dir.join("metrics.jsonl"))?;
        let steps = metrics.iter().filter_map(|m| match m {
            Metric::Train(m) => Some(m),
            Metric::Eval(_) | Metric::Weights(_) => None,
        });
        let steps: Vec<&TrainMetric> = steps.collect();
        let last = &steps[steps.len().saturating_sub(LAST_STEPS)..];
        let mean = |sum: f64, n: usize| (n > 0).then(|| sum / n as f64);
        let times = steps.iter().map(|m| 1.0 / m.tokens_per_second).sum();
        Ok(Summary {
            val_loss: self.state.val_loss,
            train_loss: mean(last.iter().map(|m| m.loss).sum(), last.len()),
            // Every step has the same number of tokens: the harmonic mean.
            tokens_per_second: mean(times, steps.len()).map(|t: f64| 1.0 / t),
            steps: self.state.step,
            tokens: self.state.tokens,
            parameters: self.config.model.parameter_count().total(),
            run_dir: self.config.run_dir.clone(),
            checkpoint: self.checkpoint.clone(),
            seconds: self.seconds(),
            peak_rss_bytes: memory::peak_rss_bytes(),
            device: self.choice.to_string(),
        })
    }

    fn seconds(&self) -> f64 {
        self.clock.0 + self.clock.1.elapsed().as_secs_f64()
    }

    fn non_finite(&mut self, what: &'static str, value: f64) -> TrainError {
        self.progress.finish();
        let step = self.state.step + 1;
        TrainError::NonFinite { what, value, step, checkpoint: self.checkpoint.clone() }
    }
}

/// What holds in the step that follows `step` complete ones.
fn stage_at(config: &TrainConfig, step: u64) -> Stage {
    let steps = config.schedule.steps;
    let bf16 = step < steps && !config.precision.is_f32();
    Stage { bf16, ..config.quantization.at(step, steps) }
}

/// Makes the run folder and claims it, so that two runs never write into one.
fn lock(run_dir: &Path) -> Result<File, TrainError> {
    fs::create_dir_all(run_dir).map_err(with_path(run_dir))?;
    let path = run_dir.join(".lock");
    let file = File::create(&path).map_err(with_path(&path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(TrainError::RunFolder {
            path: run_dir.to_path_buf(),
            what: "another bitnet-train is at work in it".into(),
        }),
        Err(TryLockError::Error(e)) => Err(with_path(&path)(e).into()),
    }
}

/// The checkpoint to go on from.
fn find_checkpoint(run_dir: &Path, resume: bool) -> Result<Option<PathBuf>, TrainError> {
    match checkpoint::list(run_dir)?.pop() {
        Some((step, _)) if !resume => Err(TrainError::RunFolder {
            path: run_dir.to_path_buf(),
            what: format!(
                "has checkpoints up to step {step}; go on with --resume, or choose another folder with --run"
            ),
        }),
        newest => Ok(newest.map(|(_, path)| path)),
    }
}

/// A checkpoint of other data, or beyond the schedule, cannot be gone on from.
fn check_resumed(
    path: &Path,
    saved: &State,
    fresh: &State,
    config: &TrainConfig,
) -> Result<(), TrainError> {
    for (what, saved, found) in [
        ("corpus", &saved.corpus_hash, &fresh.corpus_hash),
        ("tokenizer", &saved.tokenizer_sha256, &fresh.tokenizer_sha256),
    ] {
        if saved != found {
            let dir = config.data.dir.display();
            let text = format!("was trained on the {what} with hash {saved}, {dir} has {found}");
            return Err(TrainError::checkpoint(path, text));
        }
    }
    if saved.step > config.schedule.steps {
        let reason = format!("the checkpoint {} is already beyond it", path.display());
        return Err(TrainError::value("schedule.steps", config.schedule.steps, reason));
    }
    Ok(())
}

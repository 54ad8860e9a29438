//! `bitnet-train bench`: how fast a config trains here, beside the limits of the
//! machine, and where the time of a step goes.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use bitnet_core::{ModelConfig, WeightQuantizer};
use bitnet_data::{Batch, Dataset, Split};
use bitnet_format::atomic::write_atomic;
use burn::tensor::Device;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::tensor::{Dtype, TensorView};
use serde::Serialize;

use crate::config::TrainConfig;
use crate::corpus::{self, Reduction};
use crate::device::DeviceChoice;
use crate::error::with_path;
use crate::model::Transformer;
use crate::ops::cpu::kernels;
use crate::optim::{GradientSum, Optimizer, OptimizerConfig};
use crate::stage::StageConfig;
use crate::{TrainError, memory, profile, recompute};

/// What to measure.
#[derive(Debug, Clone)]
pub struct BenchOptions {
    /// The config: model, batch, optimizer and schedule count.
    pub config: TrainConfig,
    /// Where it runs.
    pub device: DeviceChoice,
    /// Steps that are measured.
    pub steps: usize,
    /// Steps before them.
    pub warmup: usize,
    /// Train on the corpus of `config.data` instead of made-up tokens.
    pub corpus: bool,
    /// Write the initial weights and the batches here, for another program to train
    /// on.
    pub dump: Option<PathBuf>,
}

/// What was measured.
#[derive(Debug, Serialize)]
pub struct BenchReport {
    /// The config's name.
    pub name: String,
    /// The model.
    pub model: ModelConfig,
    /// Parameters of all kinds.
    pub parameters: u64,
    /// Parameters that a token is multiplied with: linear layers and head.
    pub multiplied_parameters: u64,
    /// The device.
    pub device: String,
    /// The instruction set of the kernels.
    pub isa: &'static str,
    /// Threads of the CPU.
    pub threads: usize,
    /// Tokens of a step.
    pub tokens: usize,
    /// Sequences of a micro-step.
    pub micro_batch: usize,
    /// Steps measured.
    pub steps: usize,
    /// Steps before them.
    pub warmup: usize,
    /// Tokens a second, the median step.
    pub tokens_per_second: f64,
    /// Tokens a second, the fastest step.
    pub best_tokens_per_second: f64,
    /// Milliseconds of every measured step.
    pub step_milliseconds: Vec<f64>,
    /// `6 · multiplied parameters · tokens a second`, in 10^9: the usual count of
    /// operations of a training step, without attention.
    pub gflops: f64,
    /// The machine's fused multiply-adds of floats with these threads, 10^9
    /// operations a second. None on other devices.
    pub float_peak_gflops: Option<f64>,
    /// `gflops` over it.
    pub share_of_float_peak: Option<f64>,
    /// The machine's int8 products with these threads, 10^9 operations a second.
    pub int8_peak_gops: Option<f64>,
    /// The operations of the linear layers' forward products over it, in the time of
    /// these layers with their norms, activations and quantisers.
    pub forward_share_of_int8_peak: Option<f64>,
    /// The largest resident memory of the process so far.
    pub peak_rss_bytes: Option<u64>,
    /// Loss of every step, warm-up included, in nats.
    pub losses: Vec<f64>,
    /// The stages of quantisation, and what gradients are computed with.
    pub quantization: StageConfig,
    /// The optimizer.
    pub optimizer: OptimizerConfig,
    /// Learning rate and weight decay of every step.
    pub rates: Vec<[f64; 2]>,
    /// Time of a step by what it was spent on. Names that begin with a space lie
    /// inside the others.
    pub profile: Vec<ProfileRow>,
}

/// A row of the profile.
#[derive(Debug, Serialize)]
pub struct ProfileRow {
    /// What was measured.
    pub name: &'static str,
    /// Milliseconds of the mean step.
    pub milliseconds: f64,
    /// Share of the mean step.
    pub share: f64,
    /// How often in a step.
    pub count: f64,
}

/// The parts of a step; other spans lie inside them.
const PHASES: [&str; 4] = ["forward", "backward", "gradient norm", "optimizer"];

/// The spans of the linear layers' forward pass, with norms, activations and
/// quantisation.
const FORWARD: [&str; 3] = ["projections", "output projection", "feed-forward"];

/// Trains for some steps and says how fast that was.
///
/// # Errors
/// A config or a corpus that cannot be used, a device that is not there, a folder
/// that cannot be written, a loss that is not finite.
pub fn bench(options: &BenchOptions) -> Result<BenchReport, TrainError> {
    let config = &options.config;
    config.validate()?;
    config.quantization.check_device(options.device)?;
    config.optimizer.check_device(options.device)?;
    let device = options.device.open()?.autodiff();
    let batches = match options.corpus {
        true => corpus_batches(options)?,
        false => made_up_batches(options),
    };
    let mut model = Transformer::new(&config.model, config.seed, &device);
    if let Some(dir) = &options.dump {
        dump(dir, config, &model, &batches)?;
    }
    // The recipe's full form, as of the last steps of a run.
    let stages = StageConfig { float_until: 0.0, blend: 0.0, ..config.quantization };
    stages.at(0, 1).apply(&config.model, &mut model);
    let mut peaks = Peaks::default();
    let host = options.device.is_host();
    let mut optimizer = Optimizer::new(&config.optimizer, &model, &device, host);
    let (mut losses, mut rates, mut times) = (Vec::new(), Vec::new(), Vec::new());
    for step in 0..options.warmup + options.steps {
        if step == options.warmup {
            profile::enable(true);
        }
        if options.device == DeviceChoice::Cpu && step >= options.warmup {
            peaks.measure();
        }
        let started = Instant::now();
        let loss;
        let micro_steps = config.batch.micro_steps();
        let batches = &batches[step * micro_steps..][..micro_steps];
        (model, loss) = train_step(config, model, &mut optimizer, batches, step as u64, &device)?;
        let seconds = started.elapsed().as_secs_f64();
        losses.push(loss);
        let r = config.schedule.rates(step as u64);
        rates.push([r.lr, r.weight_decay]);
        if step >= options.warmup {
            times.push(seconds);
        }
    }
    let totals = profile::totals();
    profile::enable(false);
    let seconds: f64 = times.iter().sum();
    let per_step = |name| totals.get(name).map(|t| t.time.as_secs_f64() / times.len() as f64);
    let mut sorted = times.clone();
    sorted.sort_by(f64::total_cmp);
    let tokens = config.batch.tokens as f64;
    let (median, best) = (tokens / sorted[sorted.len() / 2], tokens / sorted[0]);
    let counts = config.model.parameter_count();
    let head = (config.model.vocab_size * config.model.hidden_size) as u64;
    let multiplied = counts.linear + head;
    let gflops = 6.0 * multiplied as f64 * median / 1e9;
    let quantized = config.model.weight_quantizer != WeightQuantizer::None;
    let int8 = peaks.int8().filter(|_| quantized);
    let forward = FORWARD.map(|name| per_step(name).unwrap_or_default()).iter().sum::<f64>();
    let forward = Some(forward).filter(|&time| time > 0.0).zip(int8);
    let forward_gops = 2.0 * counts.linear as f64 * tokens / 1e9;
    let row = |(&name, total): (&&'static str, &profile::Total)| ProfileRow {
        name,
        milliseconds: total.time.as_secs_f64() * 1e3 / times.len() as f64,
        share: total.time.as_secs_f64() / seconds,
        count: total.count as f64 / times.len() as f64,
    };
    let (mut profile, mut inner): (Vec<_>, Vec<_>) =
        totals.iter().map(row).partition(|row| PHASES.contains(&row.name));
    profile.sort_by_key(|row| PHASES.iter().position(|p| *p == row.name));
    inner.sort_by(|a, b| b.milliseconds.total_cmp(&a.milliseconds));
    profile.append(&mut inner);
    Ok(BenchReport {
        name: config.name.clone(),
        model: config.model.clone(),
        parameters: counts.total(),
        multiplied_parameters: multiplied,
        device: options.device.to_string(),
        isa: kernels().name(),
        threads: rayon::current_num_threads(),
        tokens: config.batch.tokens,
        micro_batch: config.batch.micro_batch,
        steps: options.steps,
        warmup: options.warmup,
        tokens_per_second: median,
        best_tokens_per_second: best,
        step_milliseconds: times.iter().map(|t| t * 1e3).collect(),
        gflops,
        float_peak_gflops: peaks.float(),
        share_of_float_peak: peaks.float().map(|peak| gflops / peak),
        int8_peak_gops: int8,
        forward_share_of_int8_peak: forward.map(|(time, peak)| forward_gops / time / peak),
        peak_rss_bytes: memory::peak_rss_bytes(),
        losses,
        quantization: stages,
        optimizer: config.optimizer.clone(),
        rates,
        profile,
    })
}

/// One step as a run takes it; its loss.
fn train_step(
    config: &TrainConfig,
    model: Transformer,
    optimizer: &mut Optimizer,
    batches: &[Batch],
    step: u64,
    device: &Device,
) -> Result<(Transformer, f64), TrainError> {
    let mut sum = GradientSum::default();
    let mut total = 0.0;
    for batch in batches {
        let (examples, _) = corpus::examples(batch, None, Reduction::Mean, device);
        let recompute = config.batch.recompute;
        let loss = f64::from(recompute::gradients(&model, &examples, None, recompute, &mut sum));
        if !loss.is_finite() {
            let (what, checkpoint) = ("the loss", None);
            return Err(TrainError::NonFinite { what, value: loss, step: step + 1, checkpoint });
        }
        total += loss / batches.len() as f64;
    }
    let host = device.clone().without_autodiff() == Device::flex();
    let norm = sum.norm(host);
    let rates = config.schedule.rates(step);
    Ok((optimizer.step(model, sum, norm, batches.len(), rates), total))
}

/// The machine's peaks with all threads, measured between the steps.
#[derive(Debug, Default)]
struct Peaks {
    float: Vec<f64>,
    int8: Vec<f64>,
}

impl Peaks {
    fn measure(&mut self) {
        const STEPS: usize = 200_000;
        self.float.push(rate(|| kernels().float_peak_probe(STEPS)));
        self.int8.push(rate(|| kernels().int8_peak_probe(STEPS)));
    }

    fn float(&self) -> Option<f64> {
        median(&self.float)
    }

    fn int8(&self) -> Option<f64> {
        median(&self.int8)
    }
}

/// 10^9 operations a second of all threads.
fn rate(probe: impl Fn() -> u64 + Sync) -> f64 {
    let started = Instant::now();
    let operations: u64 = rayon::broadcast(|_| probe()).into_iter().sum();
    operations as f64 / started.elapsed().as_secs_f64() / 1e9
}

fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied()
}

/// The micro-batches of all steps, from the corpus.
fn corpus_batches(options: &BenchOptions) -> Result<Vec<Batch>, TrainError> {
    let config = &options.config;
    let train = Arc::new(Dataset::open(&config.data.dir, Split::Train)?);
    let validation = Dataset::open(&config.data.dir, Split::Validation)?;
    corpus::check(config, &train, &validation, &train.tokenizer()?)?;
    let mut stream = corpus::stream(config, train)?;
    let count = (options.warmup + options.steps) * config.batch.micro_steps();
    let micro_steps = config.batch.micro_steps();
    (0..count)
        .map(|i| Ok(stream.next_batch((i / micro_steps) as u64, config.batch.micro_batch)?))
        .collect()
}

/// The same of made-up tokens: each is followed by one of four, so that there is
/// something to learn.
fn made_up_batches(options: &BenchOptions) -> Vec<Batch> {
    let config = &options.config;
    let (rows, context) = (config.batch.micro_batch, config.batch.sequence);
    let vocab = config.model.vocab_size as u32;
    let mut rng = ChaCha8Rng::seed_from_u64(config.data.seed);
    let mut batch = || {
        let (mut inputs, mut targets) = (Vec::new(), Vec::new());
        for _ in 0..rows {
            let mut token = rng.random_range(0..vocab);
            for _ in 0..context {
                inputs.push(token);
                let next = u64::from(token) * 5 + rng.random_range(0..4u64) * 911 + 17;
                token = (next % u64::from(vocab)) as u32;
                targets.push(token);
            }
        }
        Batch { inputs, targets, loss_mask: None, begins: None, batch: rows, context }
    };
    let count = (options.warmup + options.steps) * config.batch.micro_steps();
    (0..count).map(|_| batch()).collect()
}

/// Writes `start.safetensors`: the initial weights by their Hugging Face names, and
/// `inputs` and `targets` `[micro-steps of all steps, micro_batch, sequence]`.
fn dump(
    dir: &Path,
    config: &TrainConfig,
    model: &Transformer,
    batches: &[Batch],
) -> Result<(), TrainError> {
    std::fs::create_dir_all(dir).map_err(with_path(dir))?;
    let tensors = model.named_tensors();
    let bytes = |values: &[f32]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let mut data: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> =
        tensors.into_iter().map(|t| (t.name, Dtype::F32, t.shape, bytes(&t.data))).collect();
    let shape = vec![batches.len(), config.batch.micro_batch, config.batch.sequence];
    let ids = |pick: fn(&Batch) -> &Vec<u32>| -> Vec<u8> {
        let all = batches.iter().flat_map(|b| pick(b).iter());
        all.flat_map(|&t| i64::from(t).to_le_bytes()).collect()
    };
    data.push(("inputs".into(), Dtype::I64, shape.clone(), ids(|b| &b.inputs)));
    data.push(("targets".into(), Dtype::I64, shape, ids(|b| &b.targets)));
    let path = dir.join("start.safetensors");
    let failed = |e: safetensors::SafeTensorError| std::io::Error::other(e.to_string());
    let views = data.iter().map(|(name, dtype, shape, data)| {
        Ok((name.as_str(), TensorView::new(*dtype, shape.clone(), data).map_err(failed)?))
    });
    let views = views.collect::<Result<Vec<_>, std::io::Error>>().map_err(with_path(&path))?;
    let all = safetensors::serialize(views, None).map_err(failed).map_err(with_path(&path))?;
    Ok(write_atomic(&path, |w| std::io::Write::write_all(w, &all))?)
}

impl fmt::Display for BenchReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millions = |n: u64| n as f64 / 1e6;
        writeln!(
            f,
            "{}: {:.2}M parameters ({:.2}M multiplied), steps of {} tokens ({} sequences at once), {} {} x{}",
            self.name,
            millions(self.parameters),
            millions(self.multiplied_parameters),
            self.tokens,
            self.micro_batch,
            self.device,
            self.isa,
            self.threads,
        )?;
        writeln!(
            f,
            "speed        {:.0} tokens/s (median of {}; best {:.0})",
            self.tokens_per_second, self.steps, self.best_tokens_per_second
        )?;
        write!(f, "operations   {:.1} GFLOP/s by 6N", self.gflops)?;
        if let (Some(peak), Some(share)) = (self.float_peak_gflops, self.share_of_float_peak) {
            write!(f, ", {:.0} % of the f32 peak of {peak:.0}", 100.0 * share)?;
        }
        writeln!(f)?;
        if let (Some(peak), Some(share)) = (self.int8_peak_gops, self.forward_share_of_int8_peak) {
            let share = 100.0 * share;
            writeln!(f, "forward      {share:.0} % of the int8 peak of {peak:.0} GOP/s")?;
        }
        if let Some(bytes) = self.peak_rss_bytes {
            writeln!(f, "peak memory  {}", crate::plan::readable(bytes))?;
        }
        if let (Some(first), Some(last)) = (self.losses.first(), self.losses.last()) {
            writeln!(f, "loss         {first:.4} to {last:.4} nats")?;
        }
        writeln!(f, "\n{:>10} {:>7} {:>7}  of a step", "ms", "share", "calls")?;
        for row in &self.profile {
            let indent = if PHASES.contains(&row.name) { "" } else { "  " };
            writeln!(
                f,
                "{:>10.2} {:>5.1} % {:>7.1}  {indent}{}",
                row.milliseconds,
                100.0 * row.share,
                row.count,
                row.name
            )?;
        }
        Ok(())
    }
}

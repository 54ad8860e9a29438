//! Speed of packed models beside the limits of the machine, measured in one run.
//!
//! The tests are llama-bench's: `pp512` runs 512 tokens as one prompt, `tg128`
//! runs 128 tokens one by one from an empty context, `tg32x8` 32 tokens of each of
//! eight sequences in turn; sampling is not measured.
//! With them run the limits (reading the mapped file, the peak of the int8
//! instruction) and the products of a decoded token alone. All take turns,
//! round after round, so that a busy minute of the machine meets all of them.

mod cost;
mod heads;
mod limits;
mod products;
mod report;
pub(crate) mod share;
mod stats;

use std::path::{Path, PathBuf};
use std::time::Instant;

use bitnet_engine::{
    BatchSession, EngineError, HeadCounts, HeadMode, LoadOptions, Model, Session, SessionOptions,
};
use bitnet_kernels::Kernels;

pub use cost::{TokenBytes, int8_operations};
pub use heads::{COSINE, Hidden};
pub use report::{Limit, Limits, ModelInfo, Report, Row};
pub use stats::Spread;

use crate::EvalError;
use crate::energy::{EnergyReport, IDLE, Recorder};
use heads::Heads;
use products::Products;

/// What is measured, and how often.
#[derive(Debug, Clone)]
pub struct BenchOptions {
    /// Tokens of the prompts; zeros are left out.
    pub prompts: Vec<usize>,
    /// Tokens decoded; zeros are left out.
    pub generates: Vec<usize>,
    /// Sequences decoded together; zeros are left out.
    pub batches: Vec<usize>,
    /// Measured rounds, after one that is not.
    pub repeats: usize,
    /// How sessions run; threads, kernels and context are set by the bench.
    pub session: SessionOptions,
    /// Heads that are measured alone, beside the stored one.
    pub heads: Vec<HeadMode>,
    /// Where the counters of energy are ([`crate::energy::POWERCAP`]); none: energy
    /// is not measured.
    pub energy: Option<PathBuf>,
}

/// A test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Test {
    /// `pp<N>`: one prompt of N tokens.
    Prompt(usize),
    /// `tg<N>`: N tokens, one by one.
    Generate(usize),
    /// `tg<N>x<B>`: N tokens of each of B sequences, one of each at a time.
    Batch {
        /// N.
        tokens: usize,
        /// B.
        sequences: usize,
    },
    /// `ternary_only`: the ternary products of one decoded token and nothing else.
    Ternary,
    /// `head_only`: the stored head of one decoded token and nothing else.
    Head,
    /// `head_int8`, `head_int4_near`, ...: the best token of one hidden state by a
    /// scan, and nothing else.
    Scan(HeadMode, Hidden),
}

impl Test {
    /// Its name in the results.
    #[must_use]
    pub fn name(self) -> String {
        match self {
            Self::Prompt(tokens) => format!("pp{tokens}"),
            Self::Generate(tokens) => format!("tg{tokens}"),
            Self::Batch { tokens, sequences } => format!("tg{tokens}x{sequences}"),
            Self::Ternary => "ternary_only".into(),
            Self::Head => "head_only".into(),
            Self::Scan(mode, hidden) => format!("head_{}{}", mode.name(), hidden.suffix()),
        }
    }
}

/// A model that was opened, and how long that took.
#[derive(Debug)]
pub struct Loaded {
    /// The model.
    pub model: Model,
    /// Seconds to open and check it.
    pub load_seconds: f64,
}

impl Loaded {
    /// Opens a model, asking the system to read it ahead.
    ///
    /// # Errors
    /// See [`Model::open`].
    pub fn open(path: &Path, options: &LoadOptions) -> Result<Self, EvalError> {
        let start = Instant::now();
        let options = LoadOptions { prefetch: true, ..options.clone() };
        let model = Model::open(path, &options)?;
        Ok(Self { model, load_seconds: start.elapsed().as_secs_f64() })
    }
}

/// The instruction set and threads of a measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setting {
    /// Instruction set.
    pub kernels: Kernels,
    /// Threads.
    pub threads: usize,
}

/// Every instruction set with every number of threads, the most threads first.
#[must_use]
pub fn matrix(isas: &[Kernels], threads: &[usize]) -> Vec<Setting> {
    let mut threads = threads.to_vec();
    threads.sort_unstable_by(|a, b| b.cmp(a));
    threads.dedup();
    let of = |&kernels: &Kernels| {
        threads.iter().map(move |&threads| Setting { kernels, threads }).collect::<Vec<_>>()
    };
    isas.iter().flat_map(of).collect()
}

/// Runs the tests of every model in every setting; `progress` gets how many
/// measurements are done, how many there are, and the name of the next.
///
/// # Errors
/// Tests longer than a model's context, nothing to measure, and what a session
/// returns.
pub fn bench(
    models: &[Loaded],
    settings: &[Setting],
    options: &BenchOptions,
    progress: &mut dyn FnMut(usize, usize, &str),
) -> Result<Report, EvalError> {
    let tests = tests(models, options)?;
    // The idle machine is measured before anything else runs.
    let recorder = options.energy.as_deref().map(|root| Recorder::new(root, IDLE));
    let energy = recorder.as_ref().map(|recorder| match recorder {
        Ok(recorder) => recorder.report(),
        Err(why) => EnergyReport::unavailable(why),
    });
    let recorder = recorder.and_then(Result::ok);
    let mut infos = Vec::new();
    let mut runs = Vec::new();
    for loaded in models {
        let first = runs.len();
        for &setting in settings {
            runs.push(Run::new(loaded, setting, &tests, options, recorder.as_ref())?);
        }
        if let Some(run) = runs.get_mut(first) {
            let seconds = run.first_logits()?;
            infos.push(ModelInfo::new(loaded, seconds, run.kv_bytes()));
        }
    }
    let mut probes = limits::probes(models, settings);
    let each: usize = probes.len() + runs.iter().map(|r| r.speeds.len()).sum::<usize>();
    let total = each * (options.repeats + 1);
    let mut done = 0;
    // The first round pages the weights in, grows buffers and is not counted.
    for round in 0..=options.repeats {
        for probe in &mut probes {
            progress(done, total, &probe.name());
            probe.measure(models, round > 0);
            done += 1;
        }
        for run in &mut runs {
            for i in 0..run.speeds.len() {
                progress(done, total, &run.name(i));
                run.measure(i, round > 0)?;
                done += 1;
            }
        }
    }
    Ok(Report::new(infos, &probes, &runs, options, energy))
}

/// The most tokens of each sequence of a batch: a step is what is measured.
const BATCH_TOKENS: usize = 32;

/// The most sequences of a batch; each has a cache of its own.
const MOST_SEQUENCES: usize = 1024;

/// The tests asked for, checked against the contexts of all models.
fn tests(models: &[Loaded], options: &BenchOptions) -> Result<Vec<Test>, EvalError> {
    let limit = models.iter().map(|m| m.model.config().max_position_embeddings).min().unwrap_or(0);
    let limit = options.session.context.map_or(limit, |context| context.min(limit));
    let wanted = [("--prompt", &options.prompts), ("--generate", &options.generates)];
    for (option, tokens) in wanted {
        if let Some(tokens) = tokens.iter().find(|&&t| t > limit) {
            return Err(EvalError::Usage(format!(
                "{option} {tokens} is longer than the context of {limit} tokens"
            )));
        }
    }
    let some = |list: &[usize]| list.iter().copied().filter(|&n| n > 0).collect::<Vec<_>>();
    let (prompts, generates) = (some(&options.prompts), some(&options.generates));
    let most = generates.iter().copied().max().unwrap_or(0).min(BATCH_TOKENS);
    let mut tests: Vec<Test> = prompts.into_iter().map(Test::Prompt).collect();
    tests.extend(generates.into_iter().map(Test::Generate));
    if most > 0 {
        let batch = |sequences| Test::Batch { tokens: most, sequences };
        tests.extend(some(&options.batches).into_iter().map(batch));
    }
    if let Some(sequences) = options.batches.iter().find(|&&n| n > MOST_SEQUENCES) {
        let message = format!("--batch {sequences}: at most {MOST_SEQUENCES} sequences");
        return Err(EvalError::Usage(message));
    }
    if options.repeats == 0 || tests.is_empty() {
        return Err(EvalError::Usage("nothing to measure: no repeats or no tokens".into()));
    }
    Ok(tests)
}

/// The longest sequence of some tests.
fn context(tests: &[Test]) -> usize {
    let tokens = tests.iter().map(|test| match *test {
        Test::Prompt(n) | Test::Generate(n) => n,
        Test::Batch { tokens, .. } => tokens,
        Test::Ternary | Test::Head | Test::Scan(..) => 1,
    });
    tokens.max().unwrap_or(1)
}

/// The tests of one model in one setting.
pub(crate) struct Run<'a> {
    loaded: &'a Loaded,
    setting: Setting,
    options: SessionOptions,
    session: Session,
    batch: Option<BatchSession>,
    products: Products<'a>,
    heads: Heads,
    /// Each test and its tokens per second, round by round.
    speeds: Vec<(Test, Vec<f64>)>,
    recorder: Option<&'a Recorder>,
    /// Of each test, joules per token above the idle machine, round by round; empty
    /// where they were not measured.
    joules: Vec<Vec<f64>>,
}

impl<'a> Run<'a> {
    fn new(
        loaded: &'a Loaded,
        setting: Setting,
        tests: &[Test],
        options: &BenchOptions,
        recorder: Option<&'a Recorder>,
    ) -> Result<Self, EvalError> {
        let session_options = SessionOptions {
            threads: Some(setting.threads),
            kernels: Some(setting.kernels),
            context: Some(context(tests)),
            ..options.session.clone()
        };
        let session = Session::new(&loaded.model, &session_options)?;
        let products = Products::new(&loaded.model, setting);
        let batch = batch(&session, tests, &session_options)?;
        let mut tests = tests.to_vec();
        if tests.iter().any(|test| matches!(test, Test::Generate(_))) {
            tests.extend(products.has_ternary().then_some(Test::Ternary));
            tests.push(Test::Head);
        }
        let scans = options.heads.iter().filter(|&&mode| mode != HeadMode::Stored);
        let scans: Vec<_> = scans.flat_map(|&mode| Hidden::ALL.map(|h| (mode, h))).collect();
        let heads = Heads::new(&session, &session_options, &scans)?;
        tests.extend(scans.into_iter().map(|(mode, hidden)| Test::Scan(mode, hidden)));
        let speeds: Vec<_> = tests.into_iter().map(|test| (test, Vec::new())).collect();
        let options = session_options;
        let joules = vec![Vec::new(); speeds.len()];
        Ok(Self {
            loaded,
            setting,
            options,
            session,
            batch,
            products,
            heads,
            speeds,
            recorder,
            joules,
        })
    }

    fn name(&self, test: usize) -> String {
        let Setting { kernels, threads } = self.setting;
        format!("{} {} x{threads}", self.speeds[test].0.name(), kernels.name())
    }

    /// What searches of a test read, where it makes any.
    fn counts(&self, test: Test) -> Option<HeadCounts> {
        let counts = match test {
            Test::Generate(_) => self.session.head_counts(),
            Test::Batch { .. } => self.batch.as_ref()?.head_counts(),
            Test::Scan(mode, hidden) => self.heads.counts(mode, hidden)?,
            Test::Prompt(_) | Test::Ternary | Test::Head => return None,
        };
        (counts.searches > 0).then_some(counts)
    }

    /// Bytes of the keys and values of its sessions.
    fn kv_bytes(&self) -> u64 {
        let of = |context| self.options.kv.bytes(self.loaded.model.config(), context);
        let batch = self.batch.as_ref().map_or(0, |b| b.sequences() as u64 * of(b.context()));
        of(self.session.context()) + batch
    }

    /// Seconds that the first token takes.
    fn first_logits(&mut self) -> Result<f64, EvalError> {
        let start = Instant::now();
        self.session.reset();
        self.session.decode(0)?;
        Ok(start.elapsed().as_secs_f64())
    }

    /// Runs a test once, from an empty context.
    fn measure(&mut self, test: usize, counts: bool) -> Result<(), EvalError> {
        let vocab = self.loaded.model.config().vocab_size;
        // A token untimed: a system that drops idle pages may have dropped the model's
        // while another was measured.
        self.first_logits()?;
        let (speed, joules) = match self.speeds[test].0 {
            Test::Prompt(n) => {
                let tokens = pseudo_text(n, vocab);
                self.timed(n, |session| session.prefill(&tokens).map(|_| ()))?
            }
            Test::Generate(n) => {
                let tokens = pseudo_text(n, vocab);
                self.timed(n, |session| match session.head() {
                    HeadMode::Stored => {
                        tokens.iter().try_for_each(|&token| session.decode(token).map(|_| ()))
                    }
                    _ => tokens.iter().try_for_each(|&t| session.decode_top(t, 1).map(|_| ())),
                })?
            }
            Test::Batch { tokens, sequences } => self.batched(tokens, sequences)?,
            Test::Ternary => (self.products.ternary(), None),
            Test::Head => (self.products.head(), None),
            Test::Scan(mode, hidden) => (self.heads.measure(mode, hidden)?, None),
        };
        if counts {
            self.speeds[test].1.push(speed);
            self.joules[test].extend(joules);
        }
        Ok(())
    }

    /// Tokens per second of `work` on `tokens` tokens, and joules per token.
    fn timed(
        &mut self,
        tokens: usize,
        work: impl FnOnce(&mut Session) -> Result<(), EngineError>,
    ) -> Result<Rate, EvalError> {
        self.session.reset();
        let session = &mut self.session;
        rate(self.recorder, tokens, || work(session))
    }

    /// The same of all sequences together, from empty contexts.
    fn batched(&mut self, tokens: usize, sequences: usize) -> Result<Rate, EvalError> {
        let text = pseudo_text(tokens * sequences, self.loaded.model.config().vocab_size);
        let Some(batch) = &mut self.batch else { return Ok((0.0, None)) };
        (0..sequences).try_for_each(|i| batch.truncate(i, 0))?;
        rate(self.recorder, text.len(), || {
            text.chunks_exact(sequences).try_for_each(|step| {
                let step: Vec<(usize, u32)> = step.iter().copied().enumerate().collect();
                match batch.head() {
                    HeadMode::Stored => batch.decode(&step).map(|_| ()),
                    _ => batch.decode_top(&step, 1).map(|_| ()),
                }
            })
        })
    }
}

/// Tokens per second, and joules per token where they are measured.
type Rate = (f64, Option<f64>);

/// That of `work` on `tokens` tokens.
fn rate(
    recorder: Option<&Recorder>,
    tokens: usize,
    work: impl FnOnce() -> Result<(), EngineError>,
) -> Result<Rate, EvalError> {
    let timed = || {
        let start = Instant::now();
        work().map(|()| start.elapsed().as_secs_f64().max(1e-9))
    };
    let (seconds, joules) = match recorder {
        Some(recorder) => recorder.measure(timed),
        None => (timed(), None),
    };
    let tokens = tokens as f64;
    Ok((tokens / seconds?, joules.map(|j| j / tokens)))
}

/// Room for the largest batch of the tests, on the threads of `session`.
fn batch(
    session: &Session,
    tests: &[Test],
    options: &SessionOptions,
) -> Result<Option<BatchSession>, EvalError> {
    let batches = tests.iter().filter_map(|test| match *test {
        Test::Batch { tokens, sequences } => Some((sequences, tokens)),
        _ => None,
    });
    let Some((sequences, tokens)) = batches.max() else { return Ok(None) };
    let options = SessionOptions { context: Some(tokens), ..options.clone() };
    let workers = session.workers().clone();
    Ok(Some(BatchSession::with_workers(session.model(), &options, sequences, workers)?))
}

/// How often a measurement that takes `seconds` is repeated within one, so that
/// it takes at least 30 ms.
pub(crate) fn rounds(seconds: f64) -> usize {
    (0.03 / seconds.max(1e-9)).ceil().clamp(1.0, 1e5) as usize
}

/// Tokens without a pattern, the same in every run (Knuth's MMIX generator).
fn pseudo_text(tokens: usize, vocab_size: usize) -> Vec<u32> {
    let mut state = 1u64;
    (0..tokens)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) % vocab_size as u64) as u32
        })
        .collect()
}

/// The most memory this process has used, in bytes, where Linux tells.
#[must_use]
pub fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pseudo_text_stays_in_the_vocabulary() {
        let text = pseudo_text(1000, 320);
        assert!(text.iter().all(|&t| t < 320));
        assert!(text.iter().collect::<std::collections::HashSet<_>>().len() > 250);
        assert_eq!(text[..10], pseudo_text(10, 320));
    }

    #[test]
    fn the_matrix_has_every_pair_once() {
        let isas = Kernels::all();
        let settings = matrix(&isas, &[1, 2, 2, 3]);
        assert_eq!(settings.len(), 3 * isas.len());
        assert_eq!(settings[0], Setting { kernels: isas[0], threads: 3 });
        assert_eq!(settings[2], Setting { kernels: isas[0], threads: 1 });
        for (i, a) in settings.iter().enumerate() {
            assert!(!settings[i + 1..].contains(a));
        }
    }

    #[test]
    fn short_measurements_are_repeated() {
        assert_eq!((rounds(1.0), rounds(0.01), rounds(0.0)), (1, 3, 100_000));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn linux_tells_the_peak() {
        assert!(peak_rss_bytes().is_some_and(|b| b > 1 << 20));
    }
}

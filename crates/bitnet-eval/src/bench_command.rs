//! `bitnet-eval bench`: its options and its progress.

use std::io::IsTerminal;
use std::path::PathBuf;

use bitnet_core::exit::ExitError;
use bitnet_engine::{EngineError, HeadMode, SessionOptions, physical_cores};
use bitnet_eval::bench::{BenchOptions, Loaded, Setting, bench, matrix};
use bitnet_eval::{EvalError, energy};
use bitnet_kernels::{IsaError, Kernels};
use clap::{Args, ValueEnum};

use crate::{RunArgs, SourceArgs, coded};

/// Tokens per second of prefill and decoding, beside the machine's limits
///
/// Every test runs once to warm up, then --repeats times in turn with the others;
/// the median counts. In the same rounds run the limits: reading the model's file
/// and the peak of the int8 product.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  bitnet-eval bench model.gguf
  bitnet-eval bench model.gguf --prompt 128,512 --generate 64 --threads 1 --json bench.json
  bitnet-eval bench model.gguf --head stored,int8,int4
  bitnet-eval bench hugging-face-folder --ptq ternary
  bitnet-eval bench p2.gguf p5.gguf --matrix --isa avx512vbmi,avx2

Tests: pp<N> runs N tokens as one prompt, tg<N> runs N tokens one by one from an empty
context, tg<N>x<B> decodes N tokens of each of B sequences together; ternary_only and
head_only are those products of one decoded token alone. head_int8 and head_int4 are
searches for the best token by a scan after the model's own hidden states; the same
with _near after hidden states of cosine 0.25 with a row, because trained heads have
winners that stand out and random ones do not.

JSON: `results`, a list of rows with model, layout, isa, threads, test, tokens_per_second
(the median) with _min and _max, repeats, gb_per_second, share_of_bandwidth,
share_of_int8_peak, bytes_per_token and its parts linear_bytes_per_token,
head_bytes_per_token and kv_bytes_per_token (at the mean context), share_outside_products,
head_speedup (over head_only), share_refined and share_scored (rows whose lower four
bits a search read, and that it scored exactly),
joules_per_token (with --energy), peak_rss_bytes (of the process: all sessions of a
matrix together).
`kv` and `head`: the options. `models`: model, layout, file_bytes, kv_cache_bytes, load_seconds, first_logits_seconds.
`energy` (with --energy): available, reason, counters, idle_watts.
`limits`: lists `read` (model, bytes, isa, threads, gb_per_second and _best) and `int8`
(isa, threads, gop_per_second and _best).")]
pub(crate) struct BenchArgs {
    /// Packed models, or models of other tools, which are packed each time they are
    /// opened
    #[arg(value_name = "MODEL", required = true)]
    models: Vec<PathBuf>,
    /// Tokens of the prompts; 0 leaves the test out [default: 512, at most the context]
    #[arg(long, value_name = "N,...", value_delimiter = ',')]
    prompt: Vec<usize>,
    /// Tokens to decode; 0 leaves the test out [default: 128, at most the context]
    #[arg(long, value_name = "N,...", value_delimiter = ',')]
    generate: Vec<usize>,
    /// Sequences to decode together, --generate or 32 tokens of each, whichever is less;
    /// 0 leaves the test out [default: 2,4,8,16]
    #[arg(long, value_name = "B,...", value_delimiter = ',')]
    batch: Vec<usize>,
    /// How the best token is found in tg<N> and tg<N>x<B>: from all logits, or exactly
    /// by a scan of a copy of the head in 8 or 4 bits. Of several the first is used
    /// there, and each is measured alone
    #[arg(long, value_enum, value_name = "HEAD,...", value_delimiter = ',',
          default_values_t = [HeadArg::Stored])]
    head: Vec<HeadArg>,
    /// Measured runs of each test
    #[arg(long, value_name = "N", default_value_t = 5)]
    repeats: usize,
    /// Instruction sets [default: BITNET_ISA, else the fastest; with --matrix all]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    isa: Vec<String>,
    /// Measure every instruction set with 1 to --threads threads
    #[arg(long)]
    matrix: bool,
    /// Joules per token of prompts and decoding, from the processor's counters (RAPL)
    /// in DIR; two seconds of the idle machine are measured first and subtracted.
    /// Where there are no counters, it says why
    #[arg(long, value_name = "DIR", num_args = 0..=1, require_equals = true,
          default_missing_value = energy::POWERCAP)]
    energy: Option<PathBuf>,
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    source: SourceArgs,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum HeadArg {
    Stored,
    Int8,
    Int4,
}

impl HeadArg {
    fn mode(self) -> HeadMode {
        match self {
            Self::Stored => HeadMode::Stored,
            Self::Int8 => HeadMode::Int8Exact,
            Self::Int4 => HeadMode::Int4Exact,
        }
    }
}

/// Sequences that are decoded together by default.
const BATCHES: [usize; 4] = [2, 4, 8, 16];

impl BenchArgs {
    /// Measures and prints.
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        self.check().map_err(coded)?;
        let settings = self.settings().map_err(|e| coded(EngineError::from(e)))?;
        let source = self.source.options();
        let models: Result<Vec<_>, ExitError> =
            self.models.iter().map(|path| Loaded::open(path, &source).map_err(coded)).collect();
        let models = models?;
        let contexts = models.iter().map(|m| m.model.config().max_position_embeddings);
        let context = contexts.min().unwrap_or(0);
        let or = |wanted: &[usize], default: usize| {
            if wanted.is_empty() { vec![context.min(default)] } else { wanted.to_vec() }
        };
        let mut heads: Vec<HeadMode> = Vec::new();
        for head in self.head.iter().map(|head| head.mode()) {
            if !heads.contains(&head) {
                heads.push(head);
            }
        }
        let options = BenchOptions {
            prompts: or(&self.prompt, 512),
            generates: or(&self.generate, 128),
            batches: if self.batch.is_empty() { BATCHES.to_vec() } else { self.batch.clone() },
            repeats: self.repeats,
            session: SessionOptions {
                head: heads.first().copied().unwrap_or_default(),
                ..self.run.session(None)
            },
            heads,
            energy: self.energy.clone(),
        };
        let progress = Progress::new();
        let report = bench(&models, &settings, &options, &mut |done, total, name| {
            progress.show(done, total, name);
        })
        .map_err(coded)?;
        progress.finish();
        self.run.print(&report.table(), &report)
    }

    /// Refuses options that would change nothing.
    fn check(&self) -> Result<(), EvalError> {
        let none = |list: &[usize]| !list.is_empty() && list.iter().all(|&n| n == 0);
        if none(&self.generate) && !self.batch.is_empty() && !none(&self.batch) {
            let message = "--batch: --generate 0 leaves nothing to decode";
            return Err(EvalError::Usage(message.into()));
        }
        Ok(())
    }

    /// The instruction sets and threads to measure.
    fn settings(&self) -> Result<Vec<Setting>, IsaError> {
        let forced = std::env::var_os("BITNET_ISA").is_some_and(|name| !name.is_empty());
        let isas = match &self.isa[..] {
            [] if self.matrix && !forced => Kernels::all(),
            [] => vec![Kernels::from_env()?],
            names => names.iter().map(|n| Kernels::by_name(n)).collect::<Result<_, _>>()?,
        };
        let most = self.run.threads.map_or_else(physical_cores, usize::from);
        let threads: Vec<usize> = if self.matrix { (1..=most).collect() } else { vec![most] };
        Ok(matrix(&isas, &threads))
    }
}

/// A bar on a terminal, a line a measurement elsewhere.
struct Progress(Option<indicatif::ProgressBar>);

impl Progress {
    fn new() -> Self {
        Self(std::io::stderr().is_terminal().then(|| {
            let bar = indicatif::ProgressBar::new(0);
            let style = "{bar:30} {pos}/{len} measurements, {eta} left, {msg}";
            if let Ok(style) = indicatif::ProgressStyle::with_template(style) {
                bar.set_style(style);
            }
            bar
        }))
    }

    fn show(&self, done: usize, total: usize, name: &str) {
        match &self.0 {
            Some(bar) => {
                bar.set_length(total as u64);
                bar.set_position(done as u64);
                bar.set_message(name.to_owned());
            }
            None => eprintln!("{}/{total} {name}", done + 1),
        }
    }

    fn finish(&self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

//! What a bench reports: rows and limits for programs, a table for people.

use bitnet_core::names::Linear;
use bitnet_engine::{HeadCounts, HeadMode, Model};
use serde::Serialize;

use super::limits::{Kind, Probe};
use super::{
    BenchOptions, Hidden, Loaded, Run, Spread, Test, TokenBytes, int8_operations, peak_rss_bytes,
};
use crate::energy::EnergyReport;

/// All results; the keys are stable.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The models, as opened.
    pub models: Vec<ModelInfo>,
    /// Element type of the key and value caches.
    pub kv: &'static str,
    /// How tokens decoded use the head: `stored`, `int8` or `int4`.
    pub head: &'static str,
    /// A row for each model, setting and test.
    pub results: Vec<Row>,
    /// What the machine can do.
    pub limits: Limits,
    /// The counters of energy, where they were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub energy: Option<EnergyReport>,
}

/// A model, and what opening it took.
#[derive(Debug, Clone, Serialize)]
pub struct ModelInfo {
    /// File of the model.
    pub model: String,
    /// Layout of the weights; `dense` for a float twin.
    pub layout: &'static str,
    /// Size of the file.
    pub file_bytes: u64,
    /// Bytes of the keys and values of one setting's sessions, a batch's included.
    pub kv_cache_bytes: u64,
    /// Seconds to map and check the file.
    pub load_seconds: f64,
    /// Seconds that the first token takes after that.
    pub first_logits_seconds: f64,
}

/// One test's result; the keys are stable.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// File of the model.
    pub model: String,
    /// Layout of the weights; `dense` for a float twin.
    pub layout: &'static str,
    /// Instruction set.
    pub isa: &'static str,
    /// Threads.
    pub threads: usize,
    /// `pp<N>`, `tg<N>`, `tg<N>x<B>`, `ternary_only`, `head_only`, or `head_int8`,
    /// `head_int8_near`, `head_int4` and `head_int4_near`.
    pub test: String,
    /// The median of the rounds.
    pub tokens_per_second: f64,
    /// The slowest round.
    pub tokens_per_second_min: f64,
    /// The fastest round.
    pub tokens_per_second_max: f64,
    /// How many rounds.
    pub repeats: usize,
    /// Bytes read a second, in 10^9.
    pub gb_per_second: f64,
    /// That, as a share of the median speed of reading the file with as many
    /// threads.
    pub share_of_bandwidth: f64,
    /// Operations of the ternary products a second, as a share of the median peak
    /// of the instruction set with as many threads; none where there are none.
    pub share_of_int8_peak: Option<f64>,
    /// Bytes that a token reads, those shared by several tokens once.
    pub bytes_per_token: u64,
    /// The part of the linear layers.
    pub linear_bytes_per_token: u64,
    /// The part of the head.
    pub head_bytes_per_token: u64,
    /// The part of keys and values, at the test's mean context.
    pub kv_bytes_per_token: u64,
    /// Of a `tg<N>` test on a ternary model, the share of its time that neither
    /// the ternary products nor the head take when they run alone.
    pub share_outside_products: Option<f64>,
    /// Of a scan of the head alone, how many times as fast as `head_only` it is.
    pub head_speedup: Option<f64>,
    /// Of the vocabulary, the mean share of rows whose lower four bits a search read
    /// after the upper four; all of them where it scanned both at once. None where
    /// there was no search by a scan.
    pub share_refined: Option<f64>,
    /// The mean share of rows that a search scored exactly.
    pub share_scored: Option<f64>,
    /// Energy above that of the idle machine, in joules per token of a `pp` or `tg`
    /// test; none where it was not measured.
    pub joules_per_token: Option<f64>,
    /// The most memory the process has used; none where the system does not tell.
    pub peak_rss_bytes: Option<u64>,
}

/// The machine's limits, measured in the same rounds as the tests.
#[derive(Debug, Clone, Serialize)]
pub struct Limits {
    /// Reading a model's file: `gb_per_second`.
    pub read: Vec<Limit>,
    /// The int8 product: `gop_per_second`, two operations a multiply-add.
    pub int8: Vec<Limit>,
}

/// One limit.
#[derive(Debug, Clone, Serialize)]
pub struct Limit {
    /// The file that was read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Bytes of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// Instruction set.
    pub isa: &'static str,
    /// Threads.
    pub threads: usize,
    /// Median speed of reading.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gb_per_second: Option<f64>,
    /// The fastest round.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gb_per_second_best: Option<f64>,
    /// Median of the int8 product.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gop_per_second: Option<f64>,
    /// The fastest round.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gop_per_second_best: Option<f64>,
}

impl ModelInfo {
    pub(super) fn new(loaded: &Loaded, first_logits_seconds: f64, kv_cache_bytes: u64) -> Self {
        Self {
            model: loaded.model.file().to_owned(),
            layout: layout(&loaded.model),
            file_bytes: loaded.model.bytes(),
            kv_cache_bytes,
            load_seconds: loaded.load_seconds,
            first_logits_seconds,
        }
    }
}

impl Limit {
    fn new(probe: &Probe, models: &[ModelInfo]) -> Self {
        let spread = Spread::of(&probe.rates);
        let setting = probe.setting;
        let limit = Self {
            model: None,
            bytes: None,
            isa: setting.kernels.name(),
            threads: setting.threads,
            gb_per_second: None,
            gb_per_second_best: None,
            gop_per_second: None,
            gop_per_second_best: None,
        };
        let (median, best) = (Some(spread.median), Some(spread.max));
        match probe.kind {
            Kind::Read(i) => Self {
                model: Some(models[i].model.clone()),
                bytes: Some(models[i].file_bytes),
                gb_per_second: median,
                gb_per_second_best: best,
                ..limit
            },
            Kind::Int8 => Self { gop_per_second: median, gop_per_second_best: best, ..limit },
        }
    }
}

impl Report {
    pub(super) fn new(
        models: Vec<ModelInfo>,
        probes: &[Probe],
        runs: &[Run<'_>],
        options: &BenchOptions,
        energy: Option<EnergyReport>,
    ) -> Self {
        let limits = |int8: bool| {
            let of_kind = probes.iter().filter(|p| (p.kind == Kind::Int8) == int8);
            of_kind.map(|p| Limit::new(p, &models)).collect::<Vec<_>>()
        };
        let limits = Limits { read: limits(false), int8: limits(true) };
        let (kv, head) = (options.session.kv.name(), options.session.head.name());
        let results = runs.iter().flat_map(|run| rows(run, &limits)).collect();
        Self { kv, head, results, limits, models, energy }
    }
}

/// The byte layout of ternary weights, the type of dense ones.
fn layout(model: &Model) -> &'static str {
    model.linear(0, Linear::Q).type_name()
}

/// The rows of a run.
fn rows(run: &Run<'_>, limits: &Limits) -> Vec<Row> {
    let median = |wanted: Test| {
        let found = run.speeds.iter().find(|(test, _)| *test == wanted);
        found.map(|(_, speeds)| Spread::of(speeds).median)
    };
    let head = median(head_test(run.session.head()));
    let (products, stored) = (median(Test::Ternary).zip(head), median(Test::Head));
    let row = |((test, speeds), joules): (&(Test, Vec<f64>), &Vec<f64>)| {
        let products = products.filter(|_| matches!(test, Test::Generate(_)));
        let outside = |speed: f64| products.map(|(a, b)| 1.0 - speed * (1.0 / a + 1.0 / b));
        let row = row(run, *test, Spread::of(speeds), limits, outside);
        let speedup = |stored| row.tokens_per_second / stored;
        let scan = matches!(test, Test::Scan(..));
        let joules_per_token = (!joules.is_empty()).then(|| Spread::of(joules).median);
        Row { head_speedup: stored.filter(|_| scan).map(speedup), joules_per_token, ..row }
    };
    run.speeds.iter().zip(&run.joules).map(row).collect()
}

/// The test that measures a head alone.
fn head_test(mode: HeadMode) -> Test {
    if mode == HeadMode::Stored { Test::Head } else { Test::Scan(mode, Hidden::Own) }
}

fn row(
    run: &Run<'_>,
    test: Test,
    speed: Spread,
    limits: &Limits,
    outside: impl Fn(f64) -> Option<f64>,
) -> Row {
    let model = &run.loaded.model;
    let (isa, threads) = (run.setting.kernels.name(), run.setting.threads);
    let counts = run.counts(test);
    let bytes = TokenBytes::of(test, model, &run.options, counts);
    let gb_per_second = speed.median * bytes.total() / 1e9;
    let read = limits
        .read
        .iter()
        .find(|limit| limit.threads == threads && limit.model.as_deref() == Some(model.file()));
    let int8 = limits.int8.iter().find(|limit| limit.threads == threads && limit.isa == isa);
    let operations =
        int8_operations(model.config()).filter(|_| !matches!(test, Test::Head | Test::Scan(..)));
    Row {
        model: model.file().to_owned(),
        layout: layout(model),
        isa,
        threads,
        test: test.name(),
        tokens_per_second: speed.median,
        tokens_per_second_min: speed.min,
        tokens_per_second_max: speed.max,
        repeats: speed.count,
        gb_per_second,
        share_of_bandwidth: share(gb_per_second, read.and_then(|l| l.gb_per_second)),
        share_of_int8_peak: operations
            .map(|n| share(speed.median * n / 1e9, int8.and_then(|l| l.gop_per_second))),
        bytes_per_token: bytes.total().round() as u64,
        linear_bytes_per_token: bytes.linear.round() as u64,
        head_bytes_per_token: bytes.head.round() as u64,
        kv_bytes_per_token: bytes.kv.round() as u64,
        share_outside_products: outside(speed.median),
        head_speedup: None,
        share_refined: counts.map(|c| {
            let full = c.full_scans as f64 / c.searches as f64;
            full + share_of_rows(c.refined, c, model)
        }),
        share_scored: counts.map(|c| share_of_rows(c.scored, c, model)),
        joules_per_token: None,
        peak_rss_bytes: peak_rss_bytes(),
    }
}

/// Rows of a search on average, as a share of all.
fn share_of_rows(rows: u64, counts: HeadCounts, model: &Model) -> f64 {
    rows as f64 / counts.searches as f64 / model.config().vocab_size as f64
}

/// Every run has its limits measured.
fn share(rate: f64, limit: Option<f64>) -> f64 {
    rate / limit.unwrap_or(f64::NAN)
}

impl Report {
    /// The table, at most 100 columns wide but for the names of files.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = String::new();
        for model in &self.models {
            text += &self.model_part(model);
        }
        text + &self.energy() + &self.memory()
    }

    /// Joules of the tokens, or why there are none; nothing where they were not asked
    /// for.
    fn energy(&self) -> String {
        let Some(energy) = &self.energy else { return String::new() };
        let mut text = format!("{energy}\n");
        let measured = self.results.iter().filter_map(|row| Some((row, row.joules_per_token?)));
        for (i, (row, joules)) in measured.enumerate() {
            if i == 0 {
                text += "  energy          isa         threads   J a token  W above idle\n";
            }
            let (test, isa, threads) = (&row.test, row.isa, row.threads);
            let watts = joules * row.tokens_per_second;
            text += &format!(
                "  {test:14}  {isa:10}  {threads:7}  {joules:10.4}  {watts:12.1}  {}\n",
                row.model
            );
        }
        text
    }

    fn model_part(&self, model: &ModelInfo) -> String {
        let mut text = format!(
            "{}\n  {}, layout {}; opened in {}, first logits {} later; kv {}, head {}\n\n",
            model.model,
            bytes(model.file_bytes as f64),
            model.layout,
            time(model.load_seconds),
            time(model.first_logits_seconds),
            self.kv,
            self.head,
        );
        text += "  limit         isa         threads            rate        (best)\n";
        let reads =
            self.limits.read.iter().filter(|limit| limit.model.as_deref() == Some(&model.model));
        for limit in reads.chain(&self.limits.int8) {
            text += &limit.line();
        }
        text += "\n  test            isa         threads  tokens/s  (slowest, fastest)    GB/s  \
                 of read  of int8\n";
        let rows = || self.results.iter().filter(|row| row.model == model.model);
        rows().for_each(|row| text += &row.line());
        text.push('\n');
        let mut seen = Vec::new();
        for row in rows() {
            if !seen.contains(&&row.test) {
                text += &row.bytes_line();
                seen.push(&row.test);
            }
        }
        if rows().any(|row| row.share_outside_products.is_some()) {
            text += "\n  token         isa         threads        time     ternary        head    \
                     the rest  (share)\n";
        }
        rows().for_each(|row| text += &self.time_line(row));
        if rows().any(|row| row.head_speedup.is_some()) {
            text += "\n  head            isa         threads        time  of stored  refined  \
                     scored\n";
        }
        rows().for_each(|row| text += &row.head_line());
        text.push('\n');
        text
    }

    /// Where the time of a decoded token goes.
    fn time_line(&self, row: &Row) -> String {
        let alone = |test: &str| {
            let same = |r: &&Row| {
                (&r.model, r.isa, r.threads) == (&row.model, row.isa, row.threads) && r.test == test
            };
            self.results.iter().find(same).map_or(0.0, |r| 1.0 / r.tokens_per_second)
        };
        let Some(outside) = row.share_outside_products else { return String::new() };
        let head = match self.head {
            "stored" => "head_only".to_owned(),
            scan => format!("head_{scan}"),
        };
        let token = 1.0 / row.tokens_per_second;
        let (ternary, head) = (alone("ternary_only"), alone(&head));
        format!(
            "  {:12}  {:10}  {:7}  {:>10}  {:>10}  {:>10}  {:>10}  ({:.1}%)\n",
            row.test,
            row.isa,
            row.threads,
            time(token),
            time(ternary),
            time(head),
            time(token - ternary - head),
            100.0 * outside,
        )
    }

    fn memory(&self) -> String {
        let Some(peak) = self.results.iter().filter_map(|r| r.peak_rss_bytes).max() else {
            return String::new();
        };
        let Some(model) = self.models.first().filter(|_| self.models.len() == 1) else {
            return format!("peak memory {}\n", bytes(peak as f64));
        };
        format!(
            "peak memory {}; the file has {}, keys and values {}\n",
            bytes(peak as f64),
            bytes(model.file_bytes as f64),
            bytes(model.kv_cache_bytes as f64)
        )
    }
}

impl Limit {
    fn line(&self) -> String {
        let (what, rate, best, unit) = match (self.gb_per_second, self.gop_per_second) {
            (Some(rate), _) => ("read file", rate, self.gb_per_second_best, "GB/s "),
            (None, rate) => {
                ("int8 peak", rate.unwrap_or(f64::NAN), self.gop_per_second_best, "GOP/s")
            }
        };
        let best = format!("({:.1})", best.unwrap_or(f64::NAN));
        let (isa, threads) = (self.isa, self.threads);
        format!("  {what:12}  {isa:10}  {threads:7}  {rate:8.1} {unit}  {best:>12}\n")
    }
}

impl Row {
    fn line(&self) -> String {
        let range = format!(
            "({}, {})",
            speed(self.tokens_per_second_min),
            speed(self.tokens_per_second_max)
        );
        let int8 = self.share_of_int8_peak.map_or("-".into(), |s| format!("{:.1}%", 100.0 * s));
        format!(
            "  {:14}  {:10}  {:7}  {:>8}  {range:18}  {:6.2}  {:6.1}%  {int8:>7}\n",
            self.test,
            self.isa,
            self.threads,
            speed(self.tokens_per_second),
            self.gb_per_second,
            100.0 * self.share_of_bandwidth,
        )
    }

    /// The time of a scan of the head and what it read; `near` is after hidden states
    /// that point towards a row.
    fn head_line(&self) -> String {
        let (Some(speedup), Some(refined), Some(scored)) =
            (self.head_speedup, self.share_refined, self.share_scored)
        else {
            return String::new();
        };
        format!(
            "  {:14}  {:10}  {:7}  {:>10}  {speedup:8.2}x  {:6.1}%  {:5.2}%\n",
            self.test,
            self.isa,
            self.threads,
            time(1.0 / self.tokens_per_second),
            100.0 * refined,
            100.0 * scored,
        )
    }

    /// The bytes of a token: the same in all settings.
    fn bytes_line(&self) -> String {
        format!(
            "  {}: {} a token: linear {}, head {}, kv {}\n",
            self.test,
            bytes(self.bytes_per_token as f64),
            bytes(self.linear_bytes_per_token as f64),
            bytes(self.head_bytes_per_token as f64),
            bytes(self.kv_bytes_per_token as f64)
        )
    }
}

/// Tokens per second with about four digits.
fn speed(value: f64) -> String {
    match value {
        100_000.0.. => format!("{:.0}k", value / 1e3),
        1000.0.. => format!("{value:.0}"),
        100.0.. => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn bytes(value: f64) -> String {
    match value {
        1e9.. => format!("{:.2} GB", value / 1e9),
        1e6.. => format!("{:.1} MB", value / 1e6),
        1e3.. => format!("{:.1} kB", value / 1e3),
        _ => format!("{value:.0} B"),
    }
}

fn time(seconds: f64) -> String {
    match seconds.abs() {
        1.0.. => format!("{seconds:.2} s"),
        1e-3.. => format!("{:.2} ms", seconds * 1e3),
        _ => format!("{:.1} us", seconds * 1e6),
    }
}

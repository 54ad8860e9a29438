//! Speed of a packed model: prefill of a prompt and decoding token by token.
//!
//! The tests are llama-bench's: `pp512` runs 512 tokens as one prompt, `tg128`
//! runs 128 tokens one by one from an empty context. Sampling is not measured.

use std::time::Instant;

use bitnet_core::WeightQuantizer;
use bitnet_engine::{Model, Session, SessionOptions};
use serde::Serialize;

use crate::EvalError;

/// What is measured, and how often.
#[derive(Debug, Clone)]
pub struct BenchOptions {
    /// Tokens of the prompt; 0 leaves the test out.
    pub prompt: usize,
    /// Tokens decoded; 0 leaves the test out.
    pub generate: usize,
    /// Measured runs of each test, after one that is not.
    pub repeats: usize,
    /// How the session runs.
    pub session: SessionOptions,
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
    /// `pp<N>` or `tg<N>`.
    pub test: String,
    /// The median of the runs.
    pub tokens_per_second: f64,
    /// The slowest run.
    pub tokens_per_second_min: f64,
    /// The fastest run.
    pub tokens_per_second_max: f64,
    /// How many runs.
    pub repeats: usize,
    /// Bytes of weights that a decoded token reads, times tokens per second, in
    /// 10^9 bytes; none for a prompt, which reads weights once for many tokens.
    pub gb_per_second: Option<f64>,
    /// The most memory the process has used so far; none where the system does
    /// not tell.
    pub peak_rss_bytes: Option<u64>,
}

/// Runs the tests; `progress` gets the name of each before it starts.
///
/// # Errors
/// Tests longer than the context, and what the session returns.
pub fn bench(
    model: &Model,
    options: &BenchOptions,
    progress: &mut dyn FnMut(&str),
) -> Result<Vec<Row>, EvalError> {
    let limit = options.session.context.unwrap_or(model.config().max_position_embeddings);
    for (option, tokens) in [("--prompt", options.prompt), ("--generate", options.generate)] {
        if tokens > limit {
            return Err(EvalError::Usage(format!(
                "{option} {tokens} is longer than the context of {limit} tokens"
            )));
        }
    }
    if options.repeats == 0 || options.prompt + options.generate == 0 {
        return Err(EvalError::Usage("nothing to measure: no repeats or no tokens".into()));
    }
    let mut session = Session::new(model, &options.session)?;
    let mut rows = Vec::new();
    for (kind, tokens) in [("pp", options.prompt), ("tg", options.generate)] {
        if tokens == 0 {
            continue;
        }
        let test = format!("{kind}{tokens}");
        progress(&test);
        let tokens = pseudo_text(tokens, model.config().vocab_size);
        let mut speeds = Vec::with_capacity(options.repeats);
        for run in 0..=options.repeats {
            let speed = measure(&mut session, &tokens, kind == "pp")?;
            // The first run pages the weights in and grows the buffers.
            if run > 0 {
                speeds.push(speed);
            }
        }
        rows.push(row(model, &session, test, &mut speeds));
    }
    Ok(rows)
}

/// Tokens per second of one run from an empty context.
fn measure(session: &mut Session, tokens: &[u32], batched: bool) -> Result<f64, EvalError> {
    session.reset();
    let started = Instant::now();
    if batched {
        session.prefill(tokens)?;
    } else {
        for &token in tokens {
            session.decode(token)?;
        }
    }
    Ok(tokens.len() as f64 / started.elapsed().as_secs_f64().max(1e-9))
}

fn row(model: &Model, session: &Session, test: String, speeds: &mut [f64]) -> Row {
    let (low, median, high) = spread(speeds);
    let per_token = model.bytes_per_token() as f64;
    let ternary = model.config().weight_quantizer == WeightQuantizer::Ternary;
    Row {
        model: model.file().to_owned(),
        layout: if ternary { model.layout().name() } else { "dense" },
        isa: session.kernels().name(),
        threads: session.workers().threads(),
        gb_per_second: test.starts_with("tg").then_some(median * per_token / 1e9),
        test,
        tokens_per_second: median,
        tokens_per_second_min: low,
        tokens_per_second_max: high,
        repeats: speeds.len(),
        peak_rss_bytes: peak_rss_bytes(),
    }
}

/// (smallest, median, largest); of an even number the mean of the middle two.
fn spread(values: &mut [f64]) -> (f64, f64, f64) {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    let median = (values[(n - 1) / 2] + values[n / 2]) / 2.0;
    (values[0], median, values[n - 1])
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
    fn medians_and_spreads() {
        assert_eq!(spread(&mut [3.0, 1.0, 2.0]), (1.0, 2.0, 3.0));
        assert_eq!(spread(&mut [4.0, 1.0, 2.0, 3.0]), (1.0, 2.5, 4.0));
        assert_eq!(spread(&mut [7.0]), (7.0, 7.0, 7.0));
    }

    #[test]
    fn pseudo_text_stays_in_the_vocabulary() {
        let text = pseudo_text(1000, 320);
        assert!(text.iter().all(|&t| t < 320));
        assert!(text.iter().collect::<std::collections::HashSet<_>>().len() > 250);
        assert_eq!(text[..10], pseudo_text(10, 320));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn linux_tells_the_peak() {
        assert!(peak_rss_bytes().is_some_and(|b| b > 1 << 20));
    }
}

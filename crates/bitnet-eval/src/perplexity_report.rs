//! What `bitnet-eval perplexity` reports, as a table and as JSON.

use std::path::Path;

use bitnet_eval::{Mode, Perplexity};
use serde::Serialize;

/// What is reported of one source; the keys are stable.
#[derive(Debug, Serialize)]
pub(crate) struct SourceReport<'a> {
    pub(crate) model: &'a Path,
    pub(crate) source: &'a Path,
    pub(crate) split: Option<&'static str>,
    /// The corpus's hash in the shards' manifest, or the text file's sha256.
    pub(crate) data_hash: String,
    pub(crate) mode: Mode,
    pub(crate) context: usize,
    pub(crate) stride: Option<usize>,
    pub(crate) kv: &'static str,
    pub(crate) threads: usize,
    pub(crate) isa: &'static str,
    #[serde(flatten)]
    pub(crate) result: Perplexity,
}

/// Several sources, each counted alike.
#[derive(Debug, Serialize)]
pub(crate) struct Several<'a> {
    pub(crate) sources: &'a [SourceReport<'a>],
    pub(crate) mean: Mean,
}

/// Arithmetic means over the sources; a standard error takes them as independent.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Mean {
    pub(crate) nats: f64,
    pub(crate) nats_stderr: Option<f64>,
    pub(crate) perplexity: f64,
    pub(crate) perplexity_stderr: Option<f64>,
    pub(crate) word_perplexity: Option<f64>,
    pub(crate) word_perplexity_stderr: Option<f64>,
    pub(crate) bits_per_byte: Option<f64>,
    pub(crate) bits_per_byte_stderr: Option<f64>,
}

impl Mean {
    pub(crate) fn of(results: &[Perplexity]) -> Self {
        let n = results.len() as f64;
        let mean = |value: &dyn Fn(&Perplexity) -> Option<f64>| {
            results.iter().map(value).sum::<Option<f64>>().map(|sum| sum / n)
        };
        // Of independent values the variances add.
        let error = |value: &dyn Fn(&Perplexity) -> Option<f64>| {
            let squares: Option<f64> = results.iter().map(|p| value(p).map(|e| e * e)).sum();
            squares.map(|squares| squares.sqrt() / n)
        };
        Self {
            nats: mean(&|p| Some(p.nats)).unwrap_or(f64::NAN),
            nats_stderr: error(&|p| p.nats_stderr),
            perplexity: mean(&|p| Some(p.perplexity)).unwrap_or(f64::NAN),
            perplexity_stderr: error(&|p| p.perplexity_stderr),
            word_perplexity: mean(&|p| p.word_perplexity),
            word_perplexity_stderr: error(&|p| p.word_perplexity_stderr),
            bits_per_byte: mean(&|p| p.bits_per_byte),
            bits_per_byte_stderr: error(&|p| p.bits_per_byte_stderr),
        }
    }
}

/// `value ± error`, as far as there are.
fn with_error(value: Option<f64>, error: Option<f64>) -> String {
    match (value, error) {
        (None, _) => "-".to_owned(),
        (Some(value), None) => format!("{value:.4}"),
        (Some(value), Some(error)) => format!("{value:.4} ± {error:.4}"),
    }
}

impl SourceReport<'_> {
    pub(crate) fn table(&self) -> String {
        let r = &self.result;
        let split = self.split.map_or(String::new(), |s| format!(" ({s})"));
        let documents = r.documents.map_or(String::new(), |n| format!(" of {n} documents"));
        let llama_cpp = match (self.mode, r.nats_stderr_tokens) {
            (Mode::LlamaCpp, Some(error)) => {
                format!(" (llama.cpp prints ± {:.4})", error * r.perplexity)
            }
            _ => String::new(),
        };
        let error = r.nats_stderr.map_or(String::new(), |e| format!(" ± {e:.6}"));
        format!(
            "model            {}\n\
             text             {}{split}\n\
             mode             {}, context {}, kv {}, {} threads, {}\n\
             scored           {} tokens ({} words, {} bytes) in {} windows{documents}\n\
             loss             {:.6}{error} nats/token\n\
             perplexity       {}{llama_cpp}\n\
             word perplexity  {}\n\
             bits per byte    {}\n\
             speed            {:.0} tokens/s ({:.2} s)\n",
            self.model.display(),
            self.source.display(),
            self.mode.name(),
            self.context,
            self.kv,
            self.threads,
            self.isa,
            r.tokens,
            r.words,
            r.bytes,
            r.windows,
            r.nats,
            with_error(Some(r.perplexity), r.perplexity_stderr),
            with_error(r.word_perplexity, r.word_perplexity_stderr),
            with_error(r.bits_per_byte, r.bits_per_byte_stderr),
            r.tokens_per_second,
            r.seconds,
        )
    }
}

impl Mean {
    pub(crate) fn table(&self, sources: usize) -> String {
        format!(
            "mean of {sources} sources\n\
             perplexity       {}\n\
             word perplexity  {}\n\
             bits per byte    {}\n",
            with_error(Some(self.perplexity), self.perplexity_stderr),
            with_error(self.word_perplexity, self.word_perplexity_stderr),
            with_error(self.bits_per_byte, self.bits_per_byte_stderr),
        )
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_is_arithmetic_and_knows_what_is_missing() {
        let result = |nats: f64, error: Option<f64>, bits: Option<f64>| Perplexity {
            tokens: 1,
            windows: 1,
            documents: None,
            nats,
            nats_stderr: error,
            nats_stderr_tokens: None,
            perplexity: nats.exp(),
            perplexity_stderr: error.map(|e| e * nats.exp()),
            word_perplexity: None,
            word_perplexity_stderr: None,
            words: 0,
            bits_per_byte: bits,
            bits_per_byte_stderr: None,
            bytes: 0,
            tokens_per_second: 1.0,
            seconds: 1.0,
        };
        let two =
            [result(2f64.ln(), Some(0.3), Some(1.0)), result(8f64.ln(), Some(0.4), Some(2.0))];
        let mean = Mean::of(&two);
        assert!((mean.perplexity - 5.0).abs() < 1e-12, "not the geometric mean, 4");
        assert!((mean.nats_stderr.unwrap() - 0.25).abs() < 1e-12);
        assert_eq!((mean.bits_per_byte, mean.word_perplexity), (Some(1.5), None));
        let mean = Mean::of(&[two[0], result(1.0, None, None)]);
        assert_eq!((mean.nats_stderr, mean.bits_per_byte), (None, None));
    }
}

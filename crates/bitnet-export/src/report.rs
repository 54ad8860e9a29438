//! What an export did, for people and for programs.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use bitnet_format::model::Source;
use bitnet_format::pack::Plan;
use serde::Serialize;

use crate::compare::Counts;
use crate::format::Format;

/// What an export did; the keys of `--json` are these fields.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// The file or folder that was written.
    pub path: String,
    /// Its form.
    pub format: &'static str,
    /// The checkpoint, folder or file it was made from.
    pub checkpoint: String,
    /// What kind of model that is.
    pub source: String,
    /// `general.name` in the file.
    pub name: String,
    /// `ternary` or `none`.
    pub weight_quantizer: &'static str,
    /// Byte layout of the ternary matrices of a packed file.
    pub layout: &'static str,
    /// Why it is that one.
    pub layout_reason: String,
    /// Tensors in the file; a scale is one.
    pub tensors: u64,
    /// Parameters of the model.
    pub parameters: u64,
    /// Those of them in linear layers.
    pub linear_parameters: u64,
    /// Those of them in embedding and head.
    pub embedding_parameters: u64,
    /// Size of the file.
    pub packed_bytes: u64,
    /// Bytes of the linear layers' weights and scales in it.
    pub linear_bytes: u64,
    /// Bytes of all parameters in half precision.
    pub fp16_bytes: u64,
    /// Bytes of all parameters in single precision.
    pub fp32_bytes: u64,
    /// `linear_bytes` in bits per linear parameter.
    pub bits_per_weight: f64,
    /// Share of zeros among the ternary weights; none for a float twin.
    pub zero_share: Option<f64>,
    /// Ternary weights that were read back and found equal.
    pub weights_compared: u64,
    /// Tokens of the prompt that the engine ran; none where it ran none.
    pub golden_tokens: Option<usize>,
    /// Largest difference between its logits and training's.
    pub golden_max_abs_error: Option<f32>,
    /// What was not checked, and why.
    pub warnings: Vec<String>,
    /// Wall time.
    pub seconds: f64,
}

/// What a report gets from the end of an export.
pub(crate) struct Facts {
    pub(crate) name: String,
    pub(crate) format: Format,
    pub(crate) layout_reason: String,
    pub(crate) numbers: Numbers,
    pub(crate) warnings: Vec<String>,
}

/// The numbers among it.
pub(crate) struct Numbers {
    pub(crate) packed_bytes: u64,
    pub(crate) tensors: u64,
    pub(crate) linear_bytes: u64,
    pub(crate) golden_error: Option<f32>,
}

impl Report {
    pub(crate) fn new(
        source: &dyn Source,
        plan: &Plan,
        path: &Path,
        counts: &Counts,
        facts: Facts,
        took: Duration,
    ) -> Self {
        let config = &source.facts().config;
        let count = config.parameter_count();
        let numbers = facts.numbers;
        let golden = numbers.golden_error.and(source.facts().golden.as_ref());
        let (layout, layout_reason) = match facts.format {
            Format::Packed => (plan.layout.name(), facts.layout_reason),
            other => (other.name(), "the format's".to_owned()),
        };
        Self {
            path: path.display().to_string(),
            format: facts.format.name(),
            checkpoint: source.path().display().to_string(),
            source: source.facts().kind.clone(),
            name: facts.name,
            weight_quantizer: config.weight_quantizer.name(),
            layout,
            layout_reason,
            tensors: numbers.tensors,
            parameters: count.total(),
            linear_parameters: count.linear,
            embedding_parameters: count.embedding + count.head,
            packed_bytes: numbers.packed_bytes,
            linear_bytes: numbers.linear_bytes,
            fp16_bytes: 2 * count.total(),
            fp32_bytes: 4 * count.total(),
            bits_per_weight: 8.0 * numbers.linear_bytes as f64 / count.linear as f64,
            zero_share: (counts.ternary > 0).then(|| counts.zeros as f64 / counts.ternary as f64),
            weights_compared: counts.ternary,
            golden_tokens: golden.map(|g| g.tokens.len()),
            golden_max_abs_error: numbers.golden_error,
            warnings: facts.warnings,
            seconds: took.as_secs_f64(),
        }
    }
}

/// A short table.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let share = |bytes: u64| 100.0 * self.packed_bytes as f64 / bytes as f64;
        writeln!(f, "{:11} {}", self.format, self.path)?;
        writeln!(f, "from        {} ({})", self.checkpoint, self.source)?;
        writeln!(
            f,
            "parameters  {} ({} in linear layers, {} in embedding and head)",
            grouped(self.parameters),
            grouped(self.linear_parameters),
            grouped(self.embedding_parameters)
        )?;
        writeln!(
            f,
            "bytes       {} ({:.1} % of fp16's {}, {:.1} % of fp32's {})",
            grouped(self.packed_bytes),
            share(self.fp16_bytes),
            grouped(self.fp16_bytes),
            share(self.fp32_bytes),
            grouped(self.fp32_bytes)
        )?;
        match self.zero_share {
            Some(zeros) => writeln!(
                f,
                "weights     {:.3} bits each, {:.1} % zeros; all {} read back equal\n\
                 layout      {} ({})",
                self.bits_per_weight,
                100.0 * zeros,
                grouped(self.weights_compared),
                self.layout,
                self.layout_reason
            )?,
            None => writeln!(
                f,
                "weights     {:.1} bits each, floats; all read back equal",
                self.bits_per_weight
            )?,
        }
        if let (Some(error), Some(tokens)) = (self.golden_max_abs_error, self.golden_tokens) {
            writeln!(
                f,
                "logits      training's reproduced by the engine after {tokens} tokens, largest \
                 difference {error:e}"
            )?;
        }
        for warning in &self.warnings {
            writeln!(f, "warning     {warning}")?;
        }
        write!(f, "seconds     {:.1}", self.seconds)
    }
}

/// A number with a space between thousands.
pub(crate) fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(' ');
        }
        out.push(c);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::grouped;

    #[test]
    fn thousands_are_set_apart() {
        for (n, text) in [(0, "0"), (999, "999"), (1000, "1 000"), (1_234_567, "1 234 567")] {
            assert_eq!(grouped(n), text);
        }
    }
}

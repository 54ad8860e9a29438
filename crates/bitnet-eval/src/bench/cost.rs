//! What a test reads and computes: the bytes and integer operations of a token,
//! counted from the model's shape.

use bitnet_core::names::Linear;
use bitnet_core::{ModelConfig, WeightQuantizer};
use bitnet_engine::{HeadCounts, KvType, Model, SessionOptions};
use bitnet_kernels::{Int4Rows, Kernels};

use super::Test;

/// Bytes that a token reads, by part. Weights that several tokens share count
/// once for all of them.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct TokenBytes {
    /// Packed ternary rows, or the float rows of a twin.
    pub linear: f64,
    /// The head.
    pub head: f64,
    /// Keys and values, at the mean context of the test.
    pub kv: f64,
    /// Norms.
    pub norms: f64,
}

impl TokenBytes {
    /// All of them.
    #[must_use]
    pub fn total(&self) -> f64 {
        self.linear + self.head + self.kv + self.norms
    }

    /// Of a test on a model in sessions of these options, whose searches by a scan of
    /// the head, if it makes any, read what `counts` says.
    #[must_use]
    pub fn of(
        test: Test,
        model: &Model,
        session: &SessionOptions,
        counts: Option<HeadCounts>,
    ) -> Self {
        let chunk = session.chunk;
        let parts = model.parts();
        let kernels = session.kernels.unwrap_or_else(Kernels::detect);
        let linear = model.linear_bytes(kernels) as f64;
        let norms = parts.norms as f64;
        let head = (model.bytes_per_token() - parts.ternary - parts.dense) as f64 - norms;
        let position = kv_position_bytes(session.kv, model.config());
        // Of one of some tokens that use it together.
        let head_of = |together: f64| match counts {
            Some(counts) => scan_bytes(counts, model.config(), head, together),
            None => head / together,
        };
        match test {
            Test::Prompt(tokens) => {
                let n = tokens as f64;
                let passes = tokens.div_ceil(chunk) as f64;
                // A pass reads the keys and values of all tokens up to its end.
                let ends: usize = (1..=tokens.div_ceil(chunk)).map(|i| tokens.min(i * chunk)).sum();
                Self {
                    linear: linear * passes / n,
                    norms: norms * passes / n,
                    head: head / n,
                    kv: position * ends as f64 / n,
                }
            }
            Test::Generate(tokens) => {
                let kv = position * (tokens as f64 + 1.0) / 2.0;
                Self { linear, head: head_of(1.0), norms, kv }
            }
            Test::Batch { tokens, sequences } => {
                let n = sequences as f64;
                let kv = position * (tokens as f64 + 1.0) / 2.0;
                Self { linear: linear / n, head: head_of(n), norms: norms / n, kv }
            }
            Test::Ternary => Self { linear, ..Self::default() },
            Test::Head | Test::Scan(..) => Self { head: head_of(1.0), ..Self::default() },
        }
    }
}

/// Bytes of the keys and values of one position in all layers.
fn kv_position_bytes(kv: KvType, config: &ModelConfig) -> f64 {
    // Of many positions, because keys lie in blocks of some.
    kv.bytes(config, 1024) as f64 / 1024.0
}

/// Bytes that a search by a scan reads on average: planes of 4 bits of all rows, which
/// `together` searches share, and four numbers for each row; then the lower bits and
/// the stored rows of those that could still win.
fn scan_bytes(counts: HeadCounts, config: &ModelConfig, stored: f64, together: f64) -> f64 {
    let mean = |count: u64| count as f64 / (counts.searches as f64).max(1.0);
    let (rows, row) = (config.vocab_size as f64, Int4Rows::stride(config.hidden_size) as f64);
    let planes = rows * (row * (1.0 + mean(counts.full_scans)) + 4.0 * 4.0);
    planes / together + mean(counts.refined) * row + mean(counts.scored) * stored / rows
}

/// Integer operations of one token in the ternary products, a multiply-add being
/// two; none in a float twin.
#[must_use]
pub fn int8_operations(config: &ModelConfig) -> Option<f64> {
    let ternary = config.weight_quantizer == WeightQuantizer::Ternary;
    let weights: f64 = Linear::ALL
        .iter()
        .map(|l| l.shape(config).iter().map(|&n| n as f64).product::<f64>())
        .sum();
    ternary.then_some(2.0 * weights * config.num_hidden_layers as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_the_operations_of_the_2b4t_shape() {
        let config = ModelConfig {
            hidden_size: 2560,
            intermediate_size: 6912,
            num_hidden_layers: 30,
            num_attention_heads: 20,
            num_key_value_heads: 5,
            head_dim: Some(128),
            vocab_size: 128_256,
            ..ModelConfig::tiny()
        };
        // q, o: 2560²; k, v: 640 · 2560; gate, up, down: 6912 · 2560.
        let weights = 30.0 * (2.0 * 2560.0 * 2560.0 + 2.0 * 640.0 * 2560.0 + 3.0 * 6912.0 * 2560.0);
        assert_eq!(int8_operations(&config), Some(2.0 * weights));
        let twin = ModelConfig { weight_quantizer: WeightQuantizer::None, ..config.clone() };
        assert_eq!(int8_operations(&twin), None);
        // Keys and values of 5 heads of 128 halves in 30 layers.
        assert_eq!(kv_position_bytes(KvType::F16, &config), 30.0 * 5.0 * 128.0 * 2.0 * 2.0);
    }
}

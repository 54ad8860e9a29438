//! Which byte layout a model gets: the one that was asked for, or the one that
//! is faster to decode at its size.

use bitnet_core::names::Linear;
use bitnet_core::{Layout, ModelConfig, WeightQuantizer};

/// Up to this many bytes of ternary weights (in layout p2) `auto` takes p2,
/// above it p5: weights in cache are decoded faster in p2, weights from memory
/// in p5.
///
/// Fastest runs of `cargo bench -p bitnet-kernels -- gemv --best` on a busy
/// 2-core machine with AVX-512 VBMI, one thread, in Gweights/s: 4M weights (1 MB)
/// p2 169, p5 121; 96M (24 MB) 109 both; 480M (120 MB) p2 15, p5 20. The limit
/// lies between the last two. Without VBMI p5 is slow at every size (480M, AVX2:
/// 3 against p2's 14), but the rule knows the model only: the file is for every
/// machine.
pub const AUTO_P2_BYTES: u64 = 64 << 20;

/// The layout that is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LayoutChoice {
    /// By the size of the model: see [`AUTO_P2_BYTES`].
    #[default]
    Auto,
    /// This one.
    Fixed(Layout),
}

impl LayoutChoice {
    /// The choice of that name: `auto` or a layout's.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "auto" => Some(Self::Auto),
            other => Layout::from_name(other).map(Self::Fixed),
        }
    }

    /// The layout of a model of this configuration, and why it is that one.
    #[must_use]
    pub fn resolve(self, config: &ModelConfig) -> (Layout, String) {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        match (self, config.weight_quantizer) {
            (Self::Fixed(layout), _) => (layout, "asked for".to_owned()),
            (Self::Auto, WeightQuantizer::None) => {
                (Layout::P2, "auto: the model has no ternary weights".to_owned())
            }
            (Self::Auto, WeightQuantizer::Ternary | WeightQuantizer::Binary) => {
                let bytes = ternary_bytes(config, Layout::P2);
                let layout = if bytes <= AUTO_P2_BYTES { Layout::P2 } else { Layout::P5 };
                let why = format!(
                    "auto: {:.1} MiB of ternary weights at 2 bits; p2 up to {:.0} MiB, p5 above",
                    mib(bytes),
                    mib(AUTO_P2_BYTES)
                );
                (layout, why)
            }
        }
    }
}

impl From<Layout> for LayoutChoice {
    fn from(layout: Layout) -> Self {
        Self::Fixed(layout)
    }
}

/// Bytes of all ternary weights in a layout, padding of rows included.
fn ternary_bytes(config: &ModelConfig, layout: Layout) -> u64 {
    let block = Linear::ALL.iter().map(|l| l.shape(config));
    let bytes: u64 = block.map(|[n, k]| n as u64 * layout.row_bytes(k) as u64).sum();
    bytes * config.num_hidden_layers as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_goes_by_the_size() {
        let with = |num_hidden_layers| ModelConfig {
            hidden_size: 1024,
            intermediate_size: 4096,
            num_attention_heads: 16,
            num_key_value_heads: 16,
            num_hidden_layers,
            ..ModelConfig::tiny()
        };
        // A block has 2^24 weights: 4 MiB at 2 bits.
        for (layers, layout) in [(1, Layout::P2), (16, Layout::P2), (17, Layout::P5)] {
            let config = with(layers);
            assert_eq!(ternary_bytes(&config, Layout::P2), layers as u64 * (4 << 20));
            let (found, why) = LayoutChoice::Auto.resolve(&config);
            assert_eq!(found, layout, "{why}");
            assert!(why.contains(&format!("{}.0 MiB", 4 * layers)), "{why}");
            for asked in Layout::ALL {
                assert_eq!(LayoutChoice::from(asked).resolve(&config).0, asked);
            }
        }
        let twin = ModelConfig { weight_quantizer: WeightQuantizer::None, ..with(100) };
        assert_eq!(LayoutChoice::Auto.resolve(&twin).0, Layout::P2);
    }

    #[test]
    fn names_are_read() {
        assert_eq!(LayoutChoice::from_name("auto"), Some(LayoutChoice::Auto));
        assert_eq!(LayoutChoice::from_name("p5"), Some(LayoutChoice::Fixed(Layout::P5)));
        assert_eq!(LayoutChoice::from_name("p9"), None);
    }
}

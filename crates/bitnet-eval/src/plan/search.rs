//! The largest model of given proportions that is fast enough and fits the memory.

use bitnet_core::ModelConfig;
use bitnet_core::ternary::MAX_EXACT_COLS;
use serde::Serialize;

/// What a larger model would break.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Bound {
    /// It would decode too slowly.
    Speed,
    /// It would not fit the memory.
    Memory,
    /// No larger one can be made.
    Shape,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Largest {
    /// What was asked for, tokens a second.
    pub target_tokens_per_second: f64,
    /// The model; none where even the smallest is too much.
    pub model: Option<ModelConfig>,
    /// Its parameters.
    pub parameters: u64,
    /// What it would decode, tokens a second.
    pub tokens_per_second: f64,
    /// Memory while it runs, in bytes.
    pub bytes: u64,
    /// What stops a larger one.
    pub bound: Bound,
}

/// Models of the proportions of `base`: its head size, its queries for each key and value
/// head, its ratios of widths, as deep as they are wide, its vocabulary; a key and value
/// head more from one to the next.
fn family(base: &ModelConfig) -> impl Iterator<Item = ModelConfig> {
    let (heads, dim) = (base.num_attention_heads, base.head_dim());
    let group = heads / base.num_key_value_heads;
    let base = base.clone();
    (1..).map_while(move |key_values: usize| {
        let queries = key_values.checked_mul(group)?;
        let scale = queries as f64 / heads as f64;
        let to = |n: usize, multiple: usize| {
            let scaled = (n as f64 * scale / multiple as f64).round() as usize * multiple;
            scaled.max(multiple)
        };
        // Where the queries are as wide as the model, they stay so.
        let hidden_size = match base.query_size() == base.hidden_size {
            true => queries * dim,
            false => to(base.hidden_size, 64),
        };
        let config = ModelConfig {
            hidden_size,
            intermediate_size: to(base.intermediate_size, 64),
            num_hidden_layers: to(base.num_hidden_layers, 1),
            num_attention_heads: queries,
            num_key_value_heads: key_values,
            head_dim: Some(dim),
            ..base.clone()
        };
        let widest = config.hidden_size.max(config.intermediate_size).max(queries * dim);
        (widest <= MAX_EXACT_COLS).then_some(config)
    })
}

/// The largest model of the proportions of `base` that decodes `target` tokens a second
/// by `speed` and needs no more than `available` bytes by `bytes`.
#[must_use]
pub fn largest(
    base: &ModelConfig,
    target: f64,
    available: Option<u64>,
    bytes: &dyn Fn(&ModelConfig) -> u64,
    speed: &dyn Fn(&ModelConfig) -> f64,
) -> Largest {
    let mut best = Largest {
        target_tokens_per_second: target,
        model: None,
        parameters: 0,
        tokens_per_second: 0.0,
        bytes: 0,
        bound: Bound::Shape,
    };
    for config in family(base) {
        let (needed, tokens_per_second) = (bytes(&config), speed(&config));
        let bound = match () {
            () if tokens_per_second < target => Bound::Speed,
            () if available.is_some_and(|available| needed > available) => Bound::Memory,
            () => {
                best = Largest {
                    parameters: config.parameter_count().total(),
                    model: Some(config),
                    tokens_per_second,
                    bytes: needed,
                    ..best
                };
                continue;
            }
        };
        return Largest { bound, ..best };
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters(config: &ModelConfig) -> f64 {
        config.parameter_count().total() as f64
    }

    #[test]
    fn a_family_grows_and_keeps_its_proportions() {
        let base = ModelConfig {
            hidden_size: 2560,
            intermediate_size: 6912,
            num_hidden_layers: 30,
            num_attention_heads: 20,
            num_key_value_heads: 5,
            vocab_size: 128_256,
            ..ModelConfig::tiny()
        };
        let models: Vec<_> = family(&base).take(20).collect();
        for pair in models.windows(2) {
            assert!(parameters(&pair[0]) < parameters(&pair[1]));
        }
        for model in &models {
            model.validate().unwrap();
            assert_eq!(model.num_attention_heads, 4 * model.num_key_value_heads);
            assert_eq!(model.hidden_size, model.query_size());
        }
        // The fifth has the base's own size.
        assert_eq!(ModelConfig { head_dim: None, ..models[4].clone() }, base);
    }

    #[test]
    fn the_bound_is_what_a_larger_one_breaks() {
        let base = ModelConfig::tiny();
        let speed = |config: &ModelConfig| 1e9 / parameters(config);
        let bytes = |config: &ModelConfig| parameters(config) as u64;
        let found = largest(&base, 10.0, None, &bytes, &speed);
        assert_eq!(found.bound, Bound::Speed);
        assert!(found.tokens_per_second >= 10.0 && found.parameters < 100_000_000);
        let model = found.model.unwrap();
        let next = family(&base).find(|c| parameters(c) > parameters(&model)).unwrap();
        assert!(speed(&next) < 10.0);
        let found = largest(&base, 10.0, Some(1_000_000), &bytes, &speed);
        assert_eq!(found.bound, Bound::Memory);
        assert!(found.bytes <= 1_000_000 && found.model.is_some());
        let none = largest(&base, 1e12, None, &bytes, &speed);
        assert_eq!((none.model, none.bound), (None, Bound::Speed));
        let all = largest(&base, 1e-30, None, &bytes, &speed);
        assert_eq!(all.bound, Bound::Shape);
    }
}

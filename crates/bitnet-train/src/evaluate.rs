//! What the model can do so far: validation loss, samples, golden logits. All of
//! it is a function of the weights, the config and the step.

use bitnet_data::{Dataset, Tokenizer};
use burn::tensor::Device;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::TrainError;
use crate::checkpoint::Golden;
use crate::config::SampleConfig;
use crate::corpus::{self, Reduction, ids};
use crate::distill;
use crate::model::Transformer;

/// Tokens of the golden prompt: enough for every attention head to have a past.
const GOLDEN_TOKENS: u64 = 32;

/// The mean loss, in nats per token that counts, over the first `windows` windows (0: all)
/// of `context` tokens of a split, in order, and the number of tokens predicted.
/// `rows` windows go through the model at once.
///
/// # Errors
/// A split shorter than a window, a token outside the vocabulary.
pub fn validation_loss(
    model: &Transformer,
    dataset: &Dataset,
    context: usize,
    windows: u64,
    rows: usize,
    device: &Device,
) -> Result<(f64, u64), TrainError> {
    let mut all = dataset.windows(context)?;
    let mut left = if windows == 0 { all.remaining() } else { windows.min(all.remaining()) };
    let (mut sum, mut count) = (0.0, 0u64);
    while left > 0 {
        let rows = rows.min(usize::try_from(left).unwrap_or(usize::MAX));
        let Some(batch) = all.next_batch(rows)? else { break };
        let (examples, tokens) = corpus::examples(&batch, None, Reduction::Mean, device);
        let mean: f32 = distill::loss(model, &examples, None).into_scalar();
        sum += f64::from(mean) * tokens as f64;
        count += tokens;
        left -= batch.batch as u64;
    }
    Ok((sum / count.max(1) as f64, count))
}

/// The golden prompt, the first tokens of the validation split, and the logits
/// at its last position.
///
/// # Errors
/// A token outside the vocabulary.
pub fn golden(
    model: &Transformer,
    dataset: &Dataset,
    context: usize,
    device: &Device,
) -> Result<Golden, TrainError> {
    let length = GOLDEN_TOKENS.min(dataset.tokens()).min(context as u64);
    let mut tokens = vec![0; length as usize];
    dataset.read(0, &mut tokens)?;
    let logits = last_logits(model, &tokens, device);
    Ok(Golden { tokens, logits })
}

/// The logits that follow a sequence, `[V]`.
fn last_logits(model: &Transformer, tokens: &[u32], device: &Device) -> Vec<f32> {
    let data = model.forward_last(ids(tokens, 1, device)).into_data();
    data.as_slice().expect("logits are f32").to_vec()
}

/// Continues a prompt. No cache: the whole sequence runs anew for each token,
/// which for the short samples of a training run is cheap enough.
///
/// # Errors
/// A prompt that the tokenizer cannot encode.
pub fn sample(
    model: &Transformer,
    tokenizer: &Tokenizer,
    config: &SampleConfig,
    prompt: &str,
    context: usize,
    seed: u64,
    device: &Device,
) -> Result<String, TrainError> {
    let eos = tokenizer.eos_id();
    let mut tokens = tokenizer.encode(prompt)?;
    if tokens.is_empty() {
        // An empty prompt begins where a document does.
        tokens.push(tokenizer.bos_id().or(eos).unwrap_or(0));
    }
    let start = tokens.len();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for _ in 0..config.tokens {
        let window = &tokens[tokens.len().saturating_sub(context)..];
        let mut logits = last_logits(model, window, device);
        // A model may have room for more tokens than its tokenizer has.
        logits.truncate(tokenizer.vocab_size() as usize);
        let next = choose(&logits, config.temperature, rng.random());
        if Some(next) == eos {
            break;
        }
        tokens.push(next);
    }
    Ok(tokenizer.decode(&tokens[start..]))
}

/// The token at the point `u` in 0..1 of the distribution of the logits; the
/// likeliest at temperature 0, the first of several.
fn choose(logits: &[f32], temperature: f64, u: f64) -> u32 {
    let best = logits.iter().enumerate().fold(0, |b, (i, x)| if *x > logits[b] { i } else { b });
    if temperature == 0.0 {
        return best as u32;
    }
    let top = f64::from(logits[best]);
    let weight = |x: &f32| ((f64::from(*x) - top) / temperature).exp();
    let mut left = u * logits.iter().map(weight).sum::<f64>();
    for (i, x) in logits.iter().enumerate() {
        left -= weight(x);
        if left < 0.0 {
            return i as u32;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chooses_by_weight() {
        let logits = [0.0, 3f32.ln(), f32::NEG_INFINITY, 0.0];
        assert_eq!(choose(&logits, 0.0, 0.9), 1);
        // Weights 1, 3, 0, 1 of 5.
        for (u, token) in [(0.0, 0), (0.19, 0), (0.21, 1), (0.79, 1), (0.81, 3), (0.999, 3)] {
            assert_eq!(choose(&logits, 1.0, u), token, "at {u}");
        }
        // Twice as cold: 1, 9, 0, 1 of 11.
        assert_eq!(choose(&logits, 0.5, 0.9), 1);
        assert_eq!(choose(&logits, 0.5, 0.92), 3);
        assert_eq!(choose(&[1.0, 1.0], 0.0, 0.5), 0);
    }
}

//! Rotary position embedding (RoFormer, arXiv:2104.09864), halves rotated as in
//! Hugging Face's LLaMA: element `i` pairs with element `i + C/2`.
//!
//! The tables are made here, once, for training and inference alike. Sine and
//! cosine are taken in f64 of the f32 angle and rounded, so that the last bit
//! does not depend on the platform's f32 functions.

/// The frequencies `theta^(-2i/C)` for a head of `head_dim` = C elements: `C/2`
/// values, radians per position.
#[must_use]
pub fn frequencies(head_dim: usize, theta: f32) -> Vec<f32> {
    (0..head_dim / 2)
        .map(|i| {
            let exponent = (2 * i) as f64 / head_dim as f64;
            (1.0 / f64::from(theta).powf(exponent)) as f32
        })
        .collect()
}

/// Writes the cosines and sines of one position, `C/2` values each.
///
/// # Panics
/// If the three slices differ in length.
pub fn cos_sin(position: usize, frequencies: &[f32], cos: &mut [f32], sin: &mut [f32]) {
    assert_eq!(frequencies.len(), cos.len());
    assert_eq!(frequencies.len(), sin.len());
    for (i, &frequency) in frequencies.iter().enumerate() {
        let angle = f64::from(position as f32 * frequency);
        cos[i] = angle.cos() as f32;
        sin[i] = angle.sin() as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_pair_turns_one_radian_a_position() {
        let freqs = frequencies(64, 10_000.0);
        assert_eq!(freqs.len(), 32);
        assert_eq!(freqs[0], 1.0);
        let (mut cos, mut sin) = (vec![0.0; 32], vec![0.0; 32]);
        cos_sin(3, &freqs, &mut cos, &mut sin);
        assert_eq!(cos[0], 3.0f64.cos() as f32);
        assert_eq!(sin[0], 3.0f64.sin() as f32);
        cos_sin(0, &freqs, &mut cos, &mut sin);
        assert!(cos.iter().all(|&c| c == 1.0) && sin.iter().all(|&s| s == 0.0));
    }
}

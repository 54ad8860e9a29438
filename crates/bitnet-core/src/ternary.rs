//! The one definition of the arithmetic of BitNet b1.58, in plain scalar code.
//!
//! Training, export and every SIMD kernel are tested against these functions
//! for equality. Source: "The Era of 1-bit LLMs: Training Tips, Code and FAQ",
//! figures 3 and 4; rounding is to nearest, ties to even, then clamped.
//!
//! A value called `*_scale` multiplies the integer to give the real number; a
//! reciprocal is called `inv_*_scale`.

/// The smallest mean or maximum that is divided by: a floor, not an addend.
pub const EPSILON: f32 = 1e-5;

/// The largest magnitude of a quantised activation.
pub const ACTIVATION_MAX: f32 = 127.0;

/// The longest row whose sums are exact in f32: `128 · K <= 2^24`.
pub const MAX_EXACT_COLS: usize = (1 << 24) / 128;

/// How many partial sums a reduction keeps, on every instruction set.
///
/// Element `i` goes to lane `i % 16`; the lanes are then added in a tree, so the
/// order of additions, and with it every bit of the result, is fixed.
pub const LANES: usize = 16;

/// Adds sixteen lanes in a fixed tree: i + 8, then + 4, + 2, + 1.
#[must_use]
#[inline(always)]
pub fn lane_sum_f64(mut lanes: [f64; LANES]) -> f64 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Adds sixteen lanes in a fixed tree: i + 8, then + 4, + 2, + 1.
#[must_use]
#[inline(always)]
pub fn lane_sum(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// The sum of magnitudes of one row, in f64, in the fixed order of [`LANES`].
#[must_use]
#[inline(always)]
pub fn row_abs_sum(row: &[f32]) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(x.abs());
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane += f64::from(x.abs());
    }
    lane_sum_f64(lanes)
}

/// The absmean weight scale from the sums of the rows, added in their order.
#[must_use]
pub fn absmean_from_row_sums(row_sums: &[f64], elements: usize) -> f32 {
    let total: f64 = row_sums.iter().sum();
    let mean = if elements == 0 { 0.0 } else { (total / elements as f64) as f32 };
    mean.max(EPSILON)
}

/// The absmean weight scale of a matrix: `max(mean |W|, 1e-5)`.
///
/// # Shapes
/// `weights` is `[rows, cols]`, row-major, `cols` > 0.
#[must_use]
pub fn absmean_scale(weights: &[f32], cols: usize) -> f32 {
    let sums: Vec<f64> = weights.chunks(cols.max(1)).map(row_abs_sum).collect();
    absmean_from_row_sums(&sums, weights.len())
}

/// The ternary value of one weight: `clamp(round(w · inv_weight_scale), -1, 1)`.
#[must_use]
#[inline(always)]
pub fn quantize_weight(w: f32, inv_weight_scale: f32) -> i8 {
    // `as` takes NaN to 0; a caller that must refuse NaN looks for it first.
    (w * inv_weight_scale).round_ties_even().clamp(-1.0, 1.0) as i8
}

/// The reciprocal that weights are multiplied by before rounding.
#[must_use]
#[inline(always)]
pub fn inv_weight_scale(weight_scale: f32) -> f32 {
    1.0 / weight_scale
}

/// Quantises a matrix to ternary values and its scale.
///
/// # Shapes
/// `weights` and the result are `[rows, cols]`, row-major.
#[must_use]
pub fn quantize_weights(weights: &[f32], cols: usize) -> (Vec<i8>, f32) {
    let scale = absmean_scale(weights, cols);
    let inv = inv_weight_scale(scale);
    (weights.iter().map(|&w| quantize_weight(w, inv)).collect(), scale)
}

/// The largest magnitude in a token's activations, floored at [`EPSILON`].
#[must_use]
#[inline(always)]
pub fn absmax(x: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane = lane.max(v.abs());
        }
    }
    for (lane, &v) in lanes.iter_mut().zip(rest) {
        *lane = lane.max(v.abs());
    }
    lanes.iter().fold(EPSILON, |m, &v| m.max(v))
}

/// The integer of one activation: `clamp(round(x · 127 / absmax), -128, 127)`.
#[must_use]
#[inline(always)]
pub fn quantize_activation(x: f32, inv_act_scale: f32) -> i8 {
    (x * inv_act_scale).round_ties_even().clamp(-128.0, 127.0) as i8
}

/// The pair (`act_scale`, `inv_act_scale`) of a token whose largest magnitude is
/// `absmax`: `absmax / 127` and `127 / absmax`.
#[must_use]
#[inline(always)]
pub fn act_scales(absmax: f32) -> (f32, f32) {
    (absmax / ACTIVATION_MAX, ACTIVATION_MAX / absmax)
}

/// Quantises one token's activations to int8; returns `act_scale`.
///
/// # Panics
/// If `q` is shorter than `x`.
#[inline(always)]
pub fn quantize_activations(x: &[f32], q: &mut [i8]) -> f32 {
    let (act_scale, inv_act_scale) = act_scales(absmax(x));
    for (q, &x) in q[..x.len()].iter_mut().zip(x) {
        *q = quantize_activation(x, inv_act_scale);
    }
    act_scale
}

/// The real value of an integer sum.
///
/// The two scales are multiplied first, in this order, wherever a BitLinear's
/// output is made: in training, in the reference and in every kernel.
#[must_use]
#[inline(always)]
pub fn dequantize(sum: i32, act_scale: f32, weight_scale: f32) -> f32 {
    sum as f32 * (act_scale * weight_scale)
}

/// The integer sums of a ternary matrix and one quantised token, the reference
/// that every kernel equals.
///
/// # Shapes
/// `trits` is `[rows, q.len()]`; the result has `rows` sums.
#[must_use]
pub fn ternary_sums(trits: &[i8], q: &[i8]) -> Vec<i32> {
    trits
        .chunks(q.len().max(1))
        .map(|row| row.iter().zip(q).map(|(&t, &q)| i32::from(t) * i32::from(q)).sum())
        .collect()
}

/// A whole BitLinear on one token: quantise, multiply, apply the scales.
///
/// # Shapes
/// `weights` is `[rows, x.len()]` master weights; the result has `rows` values.
#[must_use]
pub fn bit_linear(weights: &[f32], x: &[f32]) -> Vec<f32> {
    let (trits, weight_scale) = quantize_weights(weights, x.len());
    let mut q = vec![0i8; x.len()];
    let act_scale = quantize_activations(x, &mut q);
    ternary_sums(&trits, &q)
        .into_iter()
        .map(|sum| dequantize(sum, act_scale, weight_scale))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_follow_the_published_formula() {
        let w = [0.3f32, -0.9, 0.0, 0.1, -0.2, 0.6];
        let (t, scale) = quantize_weights(&w, 3);
        assert!((scale - 0.35).abs() < 1e-7);
        assert_eq!(t, [1, -1, 0, 0, -1, 1]);
    }

    #[test]
    fn half_way_rounds_to_even() {
        assert_eq!(quantize_weight(0.5, 1.0), 0);
        assert_eq!(quantize_weight(1.5, 1.0), 1);
        assert_eq!(quantize_weight(-0.5, 1.0), 0);
        assert_eq!(quantize_activation(2.5, 1.0), 2);
        assert_eq!(quantize_activation(3.5, 1.0), 4);
        assert_eq!(quantize_activation(-128.6, 1.0), -128);
        assert_eq!(quantize_activation(300.0, 1.0), 127);
    }

    #[test]
    fn the_largest_activation_becomes_127() {
        let x: Vec<f32> = (0..100).map(|i| (i as f32 - 70.0) * 0.013).collect();
        let mut q = vec![0i8; 100];
        let scale = quantize_activations(&x, &mut q);
        assert_eq!(q[0], -127);
        assert!((f32::from(q[99]) * scale - x[99]).abs() <= scale * 0.5);
    }

    #[test]
    fn zeros_stay_zero() {
        let (t, scale) = quantize_weights(&[0.0; 8], 4);
        assert_eq!((t, scale), (vec![0; 8], EPSILON));
        let mut q = [1i8; 4];
        let act_scale = quantize_activations(&[0.0; 4], &mut q);
        assert_eq!(q, [0; 4]);
        assert!(act_scale > 0.0 && act_scale.is_finite());
    }

    #[test]
    fn a_long_row_of_extremes_is_exact_in_f32() {
        let sum = -128i32 * MAX_EXACT_COLS as i32;
        assert_eq!(sum as f32 as i32, sum);
    }
}

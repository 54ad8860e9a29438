//! The float definitions: exponential, RMSNorm, the gated activations, rotary
//! embedding. Written over sixteen lanes; an instruction set compiles the same
//! bodies with its own vectors and gets the same bits.

use bitnet_core::ternary::LANES;

use crate::quantize::{ABSMAX_OF_NOTHING, activations_of, larger_magnitude};
use crate::simd::{Element, Simd};

/// 1.5 · 2^23: added to a float below 2^22 it leaves the integer nearest to that,
/// ties to even, in the low bits of the sum.
const ROUND: f32 = 12_582_912.0;

/// The nearest integer, ties to even, for |x| < 2^22: one addition, in vectors of
/// any instruction set.
#[inline(always)]
pub(crate) fn round_to_int(x: f32) -> i32 {
    ((x + ROUND).to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32)
}

/// `e^x`, within 2 ULP for -87 <= x <= 88; below -87 it is 0, above 88 it is
/// `e^88`.
///
/// Range reduction by Cody and Waite (ln 2 in two parts), then a polynomial of
/// degree 6 on ±ln(2)/2 with the coefficients of Cephes' `expf`.
#[inline(always)]
#[must_use]
pub(crate) fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 355.0 / 512.0;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = x.clamp(-87.0, 88.0);
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * LN2_HIGH;
    let r = r - n * LN2_LOW;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_6e-1;
    p = p * r + 5e-1;
    let y = p * (r * r) + r + 1.0;
    // n is in -126..=127, so the exponent field stays in 1..=254.
    let int = shifted.to_bits().wrapping_sub(ROUND.to_bits());
    let power = f32::from_bits(int.wrapping_add(127) << 23);
    if x < -87.0 { 0.0 } else { y * power }
}

/// The dot product of two slices of one length, in the fixed order of lanes.
#[inline(always)]
pub(crate) fn dot<S: Simd>(isa: S, a: &[f32], b: &[f32]) -> f32 {
    let mut sum = isa.splat(0.0);
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        sum = isa.mul_add(sum, isa.load_f32(a), isa.load_f32(b));
    }
    if !a_rest.is_empty() {
        sum = isa.mul_add(sum, f32::load_rest(isa, a_rest), f32::load_rest(isa, b_rest));
    }
    isa.lane_sum(sum)
}

/// See [`crate::Kernels::sum_of_squares`].
#[inline(always)]
pub(crate) fn sum_of_squares(x: &[f32]) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(x) * f64::from(x);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane += f64::from(x) * f64::from(x);
    }
    lanes.iter().sum()
}

/// `1 / sqrt(mean(x²) + eps)`.
#[inline(always)]
pub(crate) fn inv_rms<S: Simd>(isa: S, x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(isa, x, x) / x.len() as f32 + eps).sqrt()
}

/// RMSNorm (arXiv:1910.07467): `out = (x · inv_rms) · weight`; returns `inv_rms`.
#[inline(always)]
pub(crate) fn rms_norm<S: Simd>(
    isa: S,
    x: &[f32],
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
) -> f32 {
    let inv = inv_rms(isa, x, eps);
    for ((o, &x), &w) in out.iter_mut().zip(x).zip(weight) {
        *o = (x * inv) * w;
    }
    inv
}

/// [`rms_norm`], then the integers of its output: the pass that writes it also
/// finds the largest magnitude.
#[inline(always)]
pub(crate) fn rms_norm_quantize<S: Simd>(
    isa: S,
    x: &[f32],
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
    q: &mut [i8],
) -> (f32, i32) {
    let inv = inv_rms(isa, x, eps);
    let mut max = ABSMAX_OF_NOTHING;
    for ((o, &x), &w) in out.iter_mut().zip(x).zip(weight) {
        *o = (x * inv) * w;
        max = larger_magnitude(max, *o);
    }
    activations_of(out, f32::from_bits(max), q)
}

/// Elements of a piece that is read again at once; whole vectors of lanes.
const PIECE: usize = 32 * LANES;

/// The gated activation `act(gate) · up`, its [`rms_norm`] and the integers of
/// that: the pass that activates also sums the squares.
#[inline(always)]
pub(crate) fn gated_norm_quantize<S: Simd>(
    isa: S,
    act: impl Fn(f32, f32) -> f32,
    [gate, up, weight]: [&[f32]; 3],
    eps: f32,
    out: &mut [f32],
    q: &mut [i8],
) -> (f32, i32) {
    let mut squares = isa.splat(0.0);
    // In pieces of the first-level cache; two loops, so that both become vectors.
    let inputs = gate.chunks(PIECE).zip(up.chunks(PIECE));
    for (out, (gate, up)) in out.chunks_mut(PIECE).zip(inputs) {
        for ((o, &g), &u) in out.iter_mut().zip(gate).zip(up) {
            *o = act(g, u);
        }
        let (chunks, rest) = out.as_chunks::<LANES>();
        for x in chunks {
            let x = isa.load_f32(x);
            squares = isa.mul_add(squares, x, x);
        }
        if !rest.is_empty() {
            let x = f32::load_rest(isa, rest);
            squares = isa.mul_add(squares, x, x);
        }
    }
    let inv = 1.0 / (isa.lane_sum(squares) / out.len() as f32 + eps).sqrt();
    let mut max = ABSMAX_OF_NOTHING;
    for (o, &w) in out.iter_mut().zip(weight) {
        *o = (*o * inv) * w;
        max = larger_magnitude(max, *o);
    }
    activations_of(out, f32::from_bits(max), q)
}

/// `silu(x) = x / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// `out = silu(gate) · up`.
#[inline(always)]
pub(crate) fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((o, &g), &u) in out.iter_mut().zip(gate).zip(up) {
        *o = gated_silu(g, u);
    }
}

/// `silu(gate) · up`.
#[inline(always)]
pub(crate) fn gated_silu(gate: f32, up: f32) -> f32 {
    silu(gate) * up
}

/// `out = relu(gate)² · up`.
#[inline(always)]
pub(crate) fn relu2_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((o, &g), &u) in out.iter_mut().zip(gate).zip(up) {
        *o = gated_relu2(g, u);
    }
}

/// `relu(gate)² · up`.
#[inline(always)]
pub(crate) fn gated_relu2(gate: f32, up: f32) -> f32 {
    let r = gate.max(0.0);
    (r * r) * up
}

/// Rotates a head in place: element `i` with element `i + C/2`.
#[inline(always)]
pub(crate) fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (low, high) = head.split_at_mut(cos.len());
    for ((low, high), (cos, sin)) in low.iter_mut().zip(high).zip(cos.iter().zip(sin)) {
        let (a, b) = (*low, *high);
        *low = a * cos - b * sin;
        *high = b * cos + a * sin;
    }
}

/// `x += y`.
#[inline(always)]
pub(crate) fn add_assign(x: &mut [f32], y: &[f32]) {
    for (x, &y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

/// Replaces logits by `e^(x - max)`; returns (max, sum of them in lane order).
#[inline(always)]
pub(crate) fn exp_sum<S: Simd>(isa: S, x: &mut [f32]) -> (f32, f32) {
    let max = max(isa, x);
    for v in &mut *x {
        *v = exp(*v - max);
    }
    let (chunks, rest) = x.as_chunks::<LANES>();
    let (mut sum, one) = (isa.splat(0.0), isa.splat(1.0));
    for chunk in chunks {
        sum = isa.mul_add(sum, isa.load_f32(chunk), one);
    }
    // An exponential is not negative, so the zeros behind the rest change no bit.
    sum = isa.mul_add(sum, f32::load_rest(isa, rest), one);
    (max, isa.lane_sum(sum))
}

/// The largest number.
#[inline(always)]
fn max<S: Simd>(isa: S, x: &[f32]) -> f32 {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut lanes = isa.splat(f32::NEG_INFINITY);
    for chunk in chunks {
        lanes = isa.larger(lanes, isa.load_f32(chunk));
    }
    let mut max = f32::NEG_INFINITY;
    for &v in isa.floats(lanes).iter().chain(rest) {
        // Not `f32::max`, which may choose either of two zeros.
        max = if v > max { v } else { max };
    }
    max
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::portable::Portable;

    #[test]
    fn exp_is_within_two_ulp() {
        let mut worst = 0u32;
        for i in -86_999..=87_999 {
            let x = i as f32 * 0.001;
            let want = f64::from(x).exp() as f32;
            worst = worst.max(exp(x).to_bits().abs_diff(want.to_bits()));
        }
        assert!(worst <= 2, "{worst} ULP");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-1e4), 0.0);
        assert!(exp(1e4).is_finite());
    }

    #[test]
    fn norm_has_unit_mean_square() {
        let x: Vec<f32> = (0..37).map(|i| i as f32 - 11.0).collect();
        let mut out = vec![0.0; 37];
        rms_norm(Portable, &x, &[1.0; 37], 1e-5, &mut out);
        assert!((dot(Portable, &out, &out) / 37.0 - 1.0).abs() < 1e-5);
    }
}

//! Float to integer: activations to int8, master weights to ternary values and
//! packed codes. Written so that every instruction set's compiler makes vectors
//! of them; equal to the definitions in [`bitnet_core::ternary`].

use bitnet_core::ternary::{self, LANES};

use crate::float::round_to_int;
use crate::simd::Simd;

/// See [`crate::Kernels::quantize`]; `q` is as long as `x`.
#[inline(always)]
pub(crate) fn activations<S: Simd>(_isa: S, x: &[f32], q: &mut [i8]) -> (f32, i32) {
    let (act_scale, inv_act_scale) = ternary::act_scales(absmax(x));
    let mut sums = [0i32; LANES];
    let ((x, x_rest), (q, q_rest)) = (x.as_chunks::<LANES>(), q.as_chunks_mut::<LANES>());
    for (x, q) in x.iter().zip(q) {
        let ints = x.map(|x| quantize_activation(x, inv_act_scale));
        for i in 0..LANES {
            sums[i] += ints[i];
        }
        *q = ints.map(|v| v as i8);
    }
    for (i, (&x, q)) in x_rest.iter().zip(q_rest).enumerate() {
        let int = quantize_activation(x, inv_act_scale);
        sums[i] += int;
        *q = int as i8;
    }
    (act_scale, sums.iter().sum())
}

/// [`ternary::absmax`] with a comparison that is one instruction.
#[inline(always)]
fn absmax(x: &[f32]) -> f32 {
    let larger = |m: f32, v: f32| if v.abs() > m { v.abs() } else { m };
    let mut lanes = [0.0f32; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = larger(lanes[i], chunk[i]);
        }
    }
    rest.iter().chain(&lanes).fold(ternary::EPSILON, |m, &v| larger(m, v))
}

/// [`ternary::quantize_activation`] for |x| <= absmax, infinite or not a number.
#[inline(always)]
fn quantize_activation(x: f32, inv_act_scale: f32) -> i32 {
    // |x · 127 / absmax| is at most 127 · (1 + 2^-22); an infinite absmax makes
    // the reciprocal 0 and the product 0 or NaN, and NaN becomes 0.
    let scaled = x * inv_act_scale;
    if scaled.is_nan() { 0 } else { round_to_int(scaled) }
}

/// [`ternary::quantize_weight`] as a code: rounding half to even and clamping to
/// -1..=1 is asking whether the value lies strictly beyond ±0.5; NaN does not.
#[inline(always)]
fn weight_code(w: f32, inv_weight_scale: f32) -> u8 {
    let scaled = w * inv_weight_scale;
    1 + u8::from(scaled > 0.5) - u8::from(scaled < -0.5)
}

/// See [`crate::Kernels::quantize_weight_row`].
#[inline(always)]
pub(crate) fn weights(row: &[f32], inv_weight_scale: f32, trits: &mut [i8]) {
    for (t, &w) in trits.iter_mut().zip(row) {
        *t = weight_code(w, inv_weight_scale) as i8 - 1;
    }
}

/// See [`crate::Kernels::pack_weight_row`].
#[inline(always)]
pub(crate) fn pack_p2(row: &[f32], inv_weight_scale: f32, bytes: &mut [u8]) {
    let (blocks, rest) = row.as_chunks::<256>();
    let (out, out_rest) = bytes.as_chunks_mut::<64>();
    for (block, out) in blocks.iter().zip(&mut *out) {
        pack_p2_block(block, inv_weight_scale, out);
    }
    if !rest.is_empty() {
        // Padding is the zero weight.
        let mut block = [0.0f32; 256];
        block[..rest.len()].copy_from_slice(rest);
        pack_p2_block(&block, inv_weight_scale, &mut out[blocks.len()]);
    }
    debug_assert!(out_rest.is_empty(), "rows are whole blocks");
}

#[inline(always)]
fn pack_p2_block(block: &[f32; 256], inv_weight_scale: f32, out: &mut [u8; 64]) {
    let planes = block.as_chunks::<64>().0;
    for j in 0..64 {
        out[j] = weight_code(planes[0][j], inv_weight_scale)
            | weight_code(planes[1][j], inv_weight_scale) << 2
            | weight_code(planes[2][j], inv_weight_scale) << 4
            | weight_code(planes[3][j], inv_weight_scale) << 6;
    }
}

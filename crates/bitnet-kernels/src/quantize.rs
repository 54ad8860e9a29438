//! Float to integer: activations to int8, master weights to ternary values and
//! packed codes, which can also be packed anew. Written so that every instruction set's compiler makes vectors
//! of them; equal to the definitions in [`bitnet_core::ternary`].

use bitnet_core::ternary;

use crate::float::round_to_int;
use crate::simd::P5_CODES;

/// Packs a row of layout P5 in layout P2: what
/// [`bitnet_core::Layout::pack_row`] gives for its weights.
///
/// # Shapes
/// Whole blocks of one row in each layout, with the same number of columns.
pub fn repack_row(p5: &[u8], p2: &mut [u8]) {
    // Both layouts hold planes of 64 codes one after another, so the codes of byte
    // j form one stream: four bytes of five codes make five bytes of four.
    for (group, out) in p2.chunks_mut(5 * 64).enumerate() {
        for j in 0..64 {
            let mut codes = 0u64;
            for b in 0..4 {
                // Behind the last block there is padding, the zero weight.
                let five = p5.get((4 * group + b) * 64 + j).map_or(0b01_01_01_01_01, |&byte| {
                    let [four, last] = P5_CODES[usize::from(byte)];
                    u64::from(four) | u64::from(last) << 8
                });
                codes |= five << (10 * b);
            }
            for (i, block) in out.chunks_exact_mut(64).enumerate() {
                block[j] = (codes >> (8 * i)) as u8;
            }
        }
    }
}

/// See [`crate::Kernels::quantize`]; `q` is as long as `x`.
#[inline(always)]
pub(crate) fn activations(x: &[f32], q: &mut [i8]) -> (f32, i32) {
    activations_of(x, absmax(x), q)
}

/// The same where the largest magnitude is known.
#[inline(always)]
pub(crate) fn activations_of(x: &[f32], absmax: f32, q: &mut [i8]) -> (f32, i32) {
    let (act_scale, inv_act_scale) = ternary::act_scales(absmax);
    let mut sum = 0i32;
    for (q, &x) in q.iter_mut().zip(x) {
        let int = quantize_activation(x, inv_act_scale);
        sum += int;
        *q = int as i8;
    }
    (act_scale, sum)
}

/// See [`crate::Kernels::quantize_gradient`]; `q` is as long as `x`.
#[inline(always)]
pub(crate) fn gradients(x: &[f32], q: &mut [i8]) -> (f32, i32) {
    let mut max = 0;
    for &v in x {
        max = larger_magnitude(max, v);
    }
    let max = f32::from_bits(max);
    let inv = ternary::ACTIVATION_MAX / max;
    if !(inv.is_finite() && max.is_finite()) {
        q.fill(0);
        return (0.0, 0);
    }
    let mut sum = 0i32;
    for (q, &x) in q.iter_mut().zip(x) {
        let int = quantize_activation(x, inv);
        sum += int;
        *q = int as i8;
    }
    (max / ternary::ACTIVATION_MAX, sum)
}

/// [`ternary::absmax`], over bit patterns: magnitudes are ordered as integers,
/// and an integer maximum may be taken in any order.
#[inline(always)]
fn absmax(x: &[f32]) -> f32 {
    let mut max = ABSMAX_OF_NOTHING;
    for &v in x {
        max = larger_magnitude(max, v);
    }
    f32::from_bits(max)
}

/// The bits that [`larger_magnitude`] begins with: no absmax is smaller.
pub(crate) const ABSMAX_OF_NOTHING: u32 = ternary::EPSILON.to_bits();

/// The larger of a magnitude's bits and those of `|v|`.
#[inline(always)]
pub(crate) fn larger_magnitude(max: u32, v: f32) -> u32 {
    let bits = v.abs().to_bits();
    // Above infinity lie the patterns that are not numbers; they do not count.
    max.max(if bits > f32::INFINITY.to_bits() { 0 } else { bits })
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

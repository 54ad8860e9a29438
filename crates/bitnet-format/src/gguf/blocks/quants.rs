//! The block-quantised types that embeddings, heads and float models come in.

use super::half_at;

/// 32 in 18 bytes: `d`, then nibbles of `value + 8`, elements `j` and `j + 16`
/// in byte `j`.
pub(super) fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (j, &q) in block[2..].iter().enumerate() {
        out[j] = (f32::from(q & 15) - 8.0) * d;
        out[j + 16] = (f32::from(q >> 4) - 8.0) * d;
    }
}

/// 32 in 34 bytes: `d`, then int8.
pub(super) fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (x, &q) in out.iter_mut().zip(&block[2..]) {
        *x = f32::from(q as i8) * d;
    }
}

/// 256 in 144 bytes: `d`, `dmin`, eight scales and minima of 6 bits, nibbles.
pub(super) fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let (scales, qs) = (&block[4..16], &block[16..]);
    for (j, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, min) = scale_min(scales, j);
        let (d, min) = (d * f32::from(scale), dmin * f32::from(min));
        // Two groups share 32 bytes: the low nibbles, then the high ones.
        let (bytes, shift) = (&qs[j / 2 * 32..], j % 2 * 4);
        for (x, &q) in out.iter_mut().zip(bytes) {
            *x = d * f32::from(q >> shift & 15) - min;
        }
    }
}

/// The scale and minimum of group `j`, packed 6 bits each.
fn scale_min(s: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        return (s[j] & 63, s[j + 4] & 63);
    }
    ((s[j + 4] & 15) | (s[j - 4] >> 6) << 4, (s[j + 4] >> 4) | (s[j] >> 6) << 4)
}

/// 256 in 210 bytes: 4 low bits, 2 high bits, sixteen int8 scales, `d`.
pub(super) fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let d = half_at(block, 208);
    for (half, out) in out.as_chunks_mut::<128>().0.iter_mut().enumerate() {
        let low = &block[64 * half..];
        let high = &block[128 + 32 * half..];
        let scales = &block[192 + 8 * half..];
        for (i, x) in out.iter_mut().enumerate() {
            // Group `g` of 32 takes nibble g / 2 of bytes 32 · (g % 2) on.
            let (g, l) = (i / 32, i % 32);
            let q = (low[l + 32 * (g % 2)] >> (4 * (g / 2)) & 15) | (high[l] >> (2 * g) & 3) << 4;
            *x = d * f32::from(scales[i / 16] as i8) * (f32::from(q) - 32.0);
        }
    }
}

//! Causal attention of one query over cached keys and values.
//!
//! Keys are stored in blocks of [`KEY_BLOCK`] positions, transposed: block `b`
//! holds `[C, KEY_BLOCK]`, so that one vector is the same element of sixteen
//! keys. A score is then the sum over `c` in its natural order, whatever the
//! width of the machine's vectors. Values are `[T, C]`, summed over `t` in order.

use half::f16;

use crate::float::exp_sum;

/// Positions in a block of transposed keys.
pub const KEY_BLOCK: usize = 16;

/// An element of a key or value cache; its value as f32 is exact.
pub trait KvElement: Copy + Send + Sync + 'static {
    /// The value.
    fn to_f32(self) -> f32;
    /// The nearest element, ties to even.
    fn from_f32(x: f32) -> Self;
}

impl KvElement for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }
}

impl KvElement for f16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        f16::from_f32(x)
    }
}

/// Elements that the keys of `positions` positions occupy for one head of C.
#[must_use]
pub const fn key_blocks_len(positions: usize, head_dim: usize) -> usize {
    positions.div_ceil(KEY_BLOCK) * KEY_BLOCK * head_dim
}

/// Stores the key of one position.
///
/// # Shapes
/// `key` is `[C]`; `blocks` has [`key_blocks_len`] elements.
pub fn store_key<E: KvElement>(blocks: &mut [E], position: usize, key: &[f32]) {
    let (block, slot) = (position / KEY_BLOCK, position % KEY_BLOCK);
    let block = &mut blocks[block * KEY_BLOCK * key.len()..][..KEY_BLOCK * key.len()];
    for (c, &x) in key.iter().enumerate() {
        block[c * KEY_BLOCK + slot] = E::from_f32(x);
    }
}

/// `scores[t] = (Σ_c q[c] · key[t][c]) · scale` for whole blocks.
#[inline(always)]
pub(crate) fn scores<E: KvElement>(q: &[f32], blocks: &[E], scale: f32, scores: &mut [f32]) {
    let blocks = blocks.chunks_exact(KEY_BLOCK * q.len());
    for (out, block) in scores.as_chunks_mut::<KEY_BLOCK>().0.iter_mut().zip(blocks) {
        let mut lanes = [0.0f32; KEY_BLOCK];
        for (&q, keys) in q.iter().zip(block.as_chunks::<KEY_BLOCK>().0) {
            for i in 0..KEY_BLOCK {
                lanes[i] += q * keys[i].to_f32();
            }
        }
        for i in 0..KEY_BLOCK {
            out[i] = lanes[i] * scale;
        }
    }
}

/// `out[c] = (Σ_t weights[t] · values[t][c]) · inv_sum`.
#[inline(always)]
pub(crate) fn weighted_values<E: KvElement>(
    weights: &[f32],
    values: &[E],
    inv_sum: f32,
    out: &mut [f32],
) {
    out.fill(0.0);
    for (&w, value) in weights.iter().zip(values.chunks_exact(out.len())) {
        for (o, &v) in out.iter_mut().zip(value) {
            *o += w * v.to_f32();
        }
    }
    for o in out {
        *o *= inv_sum;
    }
}

/// One query over `len` positions; see [`crate::Kernels::attend`].
#[inline(always)]
pub(crate) fn attend<E: KvElement>(
    q: &[f32],
    key_blocks: &[E],
    values: &[E],
    len: usize,
    scale: f32,
    score: &mut [f32],
    out: &mut [f32],
) {
    let padded = len.div_ceil(KEY_BLOCK) * KEY_BLOCK;
    scores(q, &key_blocks[..padded * q.len()], scale, &mut score[..padded]);
    let (_, sum) = exp_sum(&mut score[..len]);
    weighted_values(&score[..len], &values[..len * out.len()], 1.0 / sum, out);
}

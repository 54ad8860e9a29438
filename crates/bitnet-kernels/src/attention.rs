//! Causal attention of one query over cached keys and values.
//!
//! Keys are stored in blocks of [`KEY_BLOCK`] positions, transposed: block `b`
//! holds `[C, KEY_BLOCK]`, so that one vector is the same element of sixteen
//! keys. A score is then the sum over `c` in its natural order, whatever the
//! width of the machine's vectors. Values are `[T, C]`, summed over `t` in order.

use half::f16;

use crate::float::exp_sum;
use crate::simd::{Element, Simd, array};

/// Positions in a block of transposed keys.
pub const KEY_BLOCK: usize = 16;

/// An element of a key or value cache; its value as f32 is exact.
pub trait KvElement: Copy + Send + Sync + 'static {
    /// The value.
    fn to_f32(self) -> f32;
    /// The nearest element, ties to even.
    fn from_f32(x: f32) -> Self;
    /// A slice of elements, its type as a value.
    #[doc(hidden)]
    fn slice(x: &[Self]) -> KvSlice<'_>;
}

/// A slice of a cache.
#[doc(hidden)]
#[derive(Debug, Clone, Copy)]
pub enum KvSlice<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// Half precision.
    F16(&'a [f16]),
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
    #[inline(always)]
    fn slice(x: &[Self]) -> KvSlice<'_> {
        KvSlice::F32(x)
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
    #[inline(always)]
    fn slice(x: &[Self]) -> KvSlice<'_> {
        KvSlice::F16(x)
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

/// One query `[C]` and the positions it sees.
#[derive(Clone, Copy)]
pub(crate) struct Query<'a> {
    pub(crate) q: &'a [f32],
    pub(crate) len: usize,
    pub(crate) scale: f32,
}

/// Keys and values of one element type; see [`crate::Kernels::attend`].
#[inline(always)]
pub(crate) fn attend<S: Simd, E: Element>(
    isa: S,
    query: Query<'_>,
    key_blocks: &[E],
    values: &[E],
    score: &mut [f32],
    out: &mut [f32],
) {
    let Query { q, len, scale } = query;
    let padded = len.div_ceil(KEY_BLOCK) * KEY_BLOCK;
    scores(isa, q, &key_blocks[..padded * q.len()], scale, &mut score[..padded]);
    let (_, sum) = exp_sum(isa, &mut score[..len]);
    weighted_values(isa, &score[..len], &values[..len * out.len()], 1.0 / sum, out);
}

/// `scores[t] = (Σ_c q[c] · key[t][c]) · scale` for whole blocks.
#[inline(always)]
fn scores<S: Simd, E: Element>(isa: S, q: &[f32], keys: &[E], scale: f32, scores: &mut [f32]) {
    let keys = keys.as_chunks::<KEY_BLOCK>().0;
    let (outs, _) = scores.as_chunks_mut::<KEY_BLOCK>();
    // Several blocks at a time, so that one addition need not wait for another.
    let whole = outs.len() / 4 * 4;
    let (fours, rest) = outs.split_at_mut(whole);
    for (outs, keys) in fours.as_chunks_mut::<4>().0.iter_mut().zip(keys.chunks(4 * q.len())) {
        score_blocks(isa, q, keys, scale, outs);
    }
    for (out, keys) in rest.iter_mut().zip(keys[whole * q.len()..].chunks(q.len())) {
        score_blocks(isa, q, keys, scale, std::array::from_mut(out));
    }
}

/// The scores of `B` neighbouring blocks of keys.
#[inline(always)]
fn score_blocks<S: Simd, E: Element, const B: usize>(
    isa: S,
    q: &[f32],
    keys: &[[E; KEY_BLOCK]],
    scale: f32,
    out: &mut [[f32; KEY_BLOCK]; B],
) {
    let blocks = array!(B, b => &keys[b * q.len()..(b + 1) * q.len()]);
    let mut sums = [isa.splat(0.0); B];
    for (c, &q) in q.iter().enumerate() {
        let q = isa.splat(q);
        for b in 0..B {
            sums[b] = isa.mul_add(sums[b], q, E::load(isa, &blocks[b][c]));
        }
    }
    for b in 0..B {
        out[b] = isa.floats(isa.mul(sums[b], isa.splat(scale)));
    }
}

/// `out[c] = (Σ_t weights[t] · values[t][c]) · inv_sum`.
#[inline(always)]
fn weighted_values<S: Simd, E: Element>(
    isa: S,
    weights: &[f32],
    values: &[E],
    inv_sum: f32,
    out: &mut [f32],
) {
    let stride = out.len();
    let mut c = 0;
    while c + 64 <= stride {
        value_columns::<S, E, 4>(isa, weights, values, inv_sum, c, out);
        c += 64;
    }
    while c + 16 <= stride {
        value_columns::<S, E, 1>(isa, weights, values, inv_sum, c, out);
        c += 16;
    }
    for (c, out) in out.iter_mut().enumerate().skip(c) {
        let column = values.iter().skip(c).step_by(stride);
        let mut sum = 0.0;
        for (&w, &v) in weights.iter().zip(column) {
            sum += w * v.widen();
        }
        *out = sum * inv_sum;
    }
}

/// Columns `c..c + 16 · V` of the weighted sum of values.
#[inline(always)]
fn value_columns<S: Simd, E: Element, const V: usize>(
    isa: S,
    weights: &[f32],
    values: &[E],
    inv_sum: f32,
    c: usize,
    out: &mut [f32],
) {
    let stride = out.len();
    let mut sums = [isa.splat(0.0); V];
    for (&w, value) in weights.iter().zip(values.chunks_exact(stride)) {
        let value = value[c..c + 16 * V].as_chunks::<16>().0;
        let w = isa.splat(w);
        for v in 0..V {
            sums[v] = isa.mul_add(sums[v], w, E::load(isa, &value[v]));
        }
    }
    let out = out[c..c + 16 * V].as_chunks_mut::<16>().0;
    for v in 0..V {
        out[v] = isa.floats(isa.mul(sums[v], isa.splat(inv_sum)));
    }
}

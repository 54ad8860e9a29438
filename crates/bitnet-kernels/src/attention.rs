//! Causal attention of some queries over the cached keys and values of one head.
//!
//! Keys are stored in blocks of [`KEY_BLOCK`] positions, transposed: block `b`
//! holds `[C, KEY_BLOCK]`, so that one vector is the same element of sixteen
//! keys. A score is then a chain of fused multiply-adds over `c` in its natural order,
//! whatever the width of the machine's vectors. Values are `[T, C]`, added in the same
//! way over `t`.
//!
//! Up to [`ATTEND_TILE`] queries share each load of keys and values: the heads of
//! a token that read one key and value head, and neighbouring tokens. Every query
//! gets the bits that it would get alone.

use half::f16;

use crate::float::exp_sum;
use crate::quantize::activations;
use crate::simd::{Element, Simd, array};

/// Positions in a block of transposed keys.
pub const KEY_BLOCK: usize = 16;

/// Queries that share loads of keys and values at most.
pub const ATTEND_TILE: usize = 8;

/// An element of a key or value cache; its value as f32 is exact.
pub trait KvElement: Copy + Send + Sync + 'static {
    /// The value.
    fn to_f32(self) -> f32;
    /// The nearest element, ties to even.
    fn from_f32(x: f32) -> Self;
    /// The keys and values of one head.
    fn head<'a>(keys: &'a [Self], values: &'a [Self]) -> KvHead<'a>;
}

/// Keys and values of one head, as they are cached.
///
/// # Shapes
/// Keys are blocks as [`store_key`] writes them; values are `[T, C]`; scales are
/// `[T]`, those of keys for whole blocks.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs, reason = "the shapes are the enum's")]
pub enum KvHead<'a> {
    /// Single precision.
    F32 { keys: &'a [f32], values: &'a [f32] },
    /// Half precision.
    F16 { keys: &'a [f16], values: &'a [f16] },
    /// Integers, and for each position the scales that multiply its key and its
    /// value.
    Int8 { keys: &'a [i8], key_scales: &'a [f32], values: &'a [i8], value_scales: &'a [f32] },
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
    fn head<'a>(keys: &'a [Self], values: &'a [Self]) -> KvHead<'a> {
        KvHead::F32 { keys, values }
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
    fn head<'a>(keys: &'a [Self], values: &'a [Self]) -> KvHead<'a> {
        KvHead::F16 { keys, values }
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
    transpose_key(blocks, position, key, E::from_f32);
}

/// Stores the key and the value of one position as integers: each `[C]` is
/// quantised like the activations of a token ([`bitnet_core::ternary`]), so an
/// element is off by at most half its scale, which is 1/127 of the largest
/// magnitude (at least 1e-5) of its vector.
#[inline(always)]
pub(crate) fn store_int8(head: KvHeadInt8Mut<'_>, position: usize, key: &[f32], value: &[f32]) {
    // The value's place holds the integers of the key for a moment.
    let row = &mut head.values[position * value.len()..][..value.len()];
    (head.key_scales[position], _) = activations(key, row);
    transpose_key(head.keys, position, row, |q| q);
    (head.value_scales[position], _) = activations(value, row);
}

#[inline(always)]
fn transpose_key<T: Copy, E>(
    blocks: &mut [E],
    position: usize,
    key: &[T],
    element: impl Fn(T) -> E,
) {
    let (block, slot) = (position / KEY_BLOCK, position % KEY_BLOCK);
    let block = &mut blocks[block * KEY_BLOCK * key.len()..][..KEY_BLOCK * key.len()];
    for (c, &x) in key.iter().enumerate() {
        block[c * KEY_BLOCK + slot] = element(x);
    }
}

/// [`KvHead::Int8`], to be written.
#[derive(Debug)]
#[allow(missing_docs, reason = "see KvHead")]
pub struct KvHeadInt8Mut<'a> {
    pub keys: &'a mut [i8],
    pub key_scales: &'a mut [f32],
    pub values: &'a mut [i8],
    pub value_scales: &'a mut [f32],
}

/// One of several queries.
#[derive(Debug, Clone, Copy, Default)]
pub struct AttendQuery {
    /// Where its `[C]` elements begin in the queries and in the outputs.
    pub at: usize,
    /// It sees positions `0..len`; at least 1.
    pub len: usize,
}

/// Scratch for the scores of `queries` queries of at most `longest` positions.
#[must_use]
pub const fn attend_scores_len(queries: usize, longest: usize) -> usize {
    let rows = if queries < ATTEND_TILE { queries } else { ATTEND_TILE };
    rows * longest.div_ceil(KEY_BLOCK) * KEY_BLOCK
}

/// What the queries of a call share.
#[derive(Clone, Copy)]
pub(crate) struct Head<'a, E> {
    /// Whole blocks of keys.
    pub(crate) keys: &'a [E],
    /// `[T, C]`.
    pub(crate) values: &'a [E],
    /// `[T]` in whole blocks, and `[T]`; empty unless elements are scaled.
    pub(crate) key_scales: &'a [f32],
    pub(crate) value_scales: &'a [f32],
    /// C.
    pub(crate) dim: usize,
    /// Multiplies the sums of products.
    pub(crate) scale: f32,
}

/// See [`crate::Kernels::attend_tile`].
#[inline(always)]
pub(crate) fn attend<S: Simd, E: Element>(
    isa: S,
    head: Head<'_, E>,
    mut queries: &[AttendQuery],
    q: &[f32],
    scores: &mut [f32],
    out: &mut [f32],
) {
    while !queries.is_empty() {
        let most = if S::WIDE { ATTEND_TILE } else { 4 };
        let (now, later) = queries.split_at(queries.len().min(most));
        match now.len() {
            1 => tile::<S, E, 1>(isa, head, now, q, scores, out),
            2..=4 => tile::<S, E, 4>(isa, head, now, q, scores, out),
            _ => tile::<S, E, ATTEND_TILE>(isa, head, now, q, scores, out),
        }
        queries = later;
    }
}

/// At most `Q` queries; where there are fewer, the last is computed repeatedly.
#[inline(always)]
fn tile<S: Simd, E: Element, const Q: usize>(
    isa: S,
    head: Head<'_, E>,
    queries: &[AttendQuery],
    q: &[f32],
    scores: &mut [f32],
    out: &mut [f32],
) {
    let dim = head.dim;
    let (mut shortest, mut longest) = (usize::MAX, 0);
    for query in queries {
        (shortest, longest) = (shortest.min(query.len), longest.max(query.len));
    }
    let stride = longest.div_ceil(KEY_BLOCK) * KEY_BLOCK;
    let scores = &mut scores[..queries.len() * stride];
    let rows: [usize; Q] = array!(Q, i => i.min(queries.len() - 1));
    let qs = array!(Q, i => &q[queries[rows[i]].at..][..dim]);
    all_scores(isa, head, qs, rows, stride, scores);
    let mut inv_sums = [0.0; Q];
    for (i, query) in queries.iter().enumerate() {
        let (_, sum) = exp_sum(isa, &mut scores[i * stride..][..query.len]);
        inv_sums[i] = 1.0 / sum;
        if E::SCALED {
            let weights = &mut scores[i * stride..][..query.len];
            for (weight, &scale) in weights.iter_mut().zip(head.value_scales) {
                *weight *= scale;
            }
        }
    }
    // What all see together, then what one query sees further, and its sum.
    let weights = array!(Q, i => &scores[rows[i] * stride..][..shortest]);
    let places = array!(Q, i => queries[rows[i]].at);
    weighted_values(isa, head, weights, places, out);
    for (i, query) in queries.iter().enumerate() {
        let weights = &scores[i * stride..][..query.len];
        finish(isa, head, weights, shortest, inv_sums[i], &mut out[query.at..][..dim]);
    }
}

/// `scores[rows[i]][t] = (Σ_c qs[i][c] · key[t][c]) · scale` for whole blocks,
/// times the key's own scale where it has one.
#[inline(always)]
fn all_scores<S: Simd, E: Element, const Q: usize>(
    isa: S,
    head: Head<'_, E>,
    qs: [&[f32]; Q],
    rows: [usize; Q],
    stride: usize,
    scores: &mut [f32],
) {
    let blocks = stride / KEY_BLOCK;
    let scores = scores.as_chunks_mut::<KEY_BLOCK>().0;
    let mut block = 0;
    // Several blocks at a time, so that one sum need not wait for another (a
    // multiply-add takes four cycles, and two begin in each).
    while Q == 1 && block + 4 <= blocks {
        score_blocks::<S, E, Q, 4>(isa, head, qs, block, rows, blocks, scores);
        block += 4;
    }
    while Q > 1 && S::WIDE && block + 2 <= blocks {
        score_blocks::<S, E, Q, 2>(isa, head, qs, block, rows, blocks, scores);
        block += 2;
    }
    while block < blocks {
        score_blocks::<S, E, Q, 1>(isa, head, qs, block, rows, blocks, scores);
        block += 1;
    }
}

/// The scores of `B` neighbouring blocks of keys.
#[inline(always)]
fn score_blocks<S: Simd, E: Element, const Q: usize, const B: usize>(
    isa: S,
    head: Head<'_, E>,
    qs: [&[f32]; Q],
    first: usize,
    rows: [usize; Q],
    blocks: usize,
    scores: &mut [[f32; KEY_BLOCK]],
) {
    let dim = head.dim;
    let keys = head.keys.as_chunks::<KEY_BLOCK>().0;
    let keys = array!(B, b => &keys[(first + b) * dim..][..dim]);
    let qs = array!(Q, i => &qs[i][..dim]);
    let mut sums = [[isa.splat(0.0); B]; Q];
    for c in 0..dim {
        let key = array!(B, b => E::load(isa, &keys[b][c]));
        for i in 0..Q {
            let q = isa.splat(qs[i][c]);
            for b in 0..B {
                sums[i][b] = isa.fma(sums[i][b], q, key[b]);
            }
        }
    }
    let scale = isa.splat(head.scale);
    for i in 0..Q {
        for b in 0..B {
            let mut score = isa.mul(sums[i][b], scale);
            if E::SCALED {
                let key_scales = &head.key_scales.as_chunks::<KEY_BLOCK>().0[first + b];
                score = isa.mul(score, isa.load_f32(key_scales));
            }
            scores[rows[i] * blocks + first + b] = isa.floats(score);
        }
    }
}

/// `out[places[i] + c] = Σ_t weights[i][t] · values[t][c]` over the positions
/// that all queries see, for all columns but those behind the last sixteen.
#[inline(always)]
fn weighted_values<S: Simd, E: Element, const Q: usize>(
    isa: S,
    head: Head<'_, E>,
    weights: [&[f32]; Q],
    places: [usize; Q],
    out: &mut [f32],
) {
    let mut c = 0;
    while (Q == 1 || (Q <= 4 && S::WIDE)) && c + 64 <= head.dim {
        value_columns::<S, E, Q, 4>(isa, head, weights, places, c, out);
        c += 64;
    }
    while Q > 4 && c + 32 <= head.dim {
        value_columns::<S, E, Q, 2>(isa, head, weights, places, c, out);
        c += 32;
    }
    while c + 16 <= head.dim {
        value_columns::<S, E, Q, 1>(isa, head, weights, places, c, out);
        c += 16;
    }
}

/// Columns `c..c + 16 · V` of the weighted sums of values.
#[inline(always)]
fn value_columns<S: Simd, E: Element, const Q: usize, const V: usize>(
    isa: S,
    head: Head<'_, E>,
    weights: [&[f32]; Q],
    places: [usize; Q],
    c: usize,
    out: &mut [f32],
) {
    let len = weights[0].len();
    let weights = array!(Q, i => &weights[i][..len]);
    let mut sums = [[isa.splat(0.0); V]; Q];
    for (t, value) in head.values.chunks_exact(head.dim).take(len).enumerate() {
        let value = value[c..c + 16 * V].as_chunks::<16>().0;
        let value = array!(V, v => E::load(isa, &value[v]));
        for i in 0..Q {
            let w = isa.splat(weights[i][t]);
            for v in 0..V {
                sums[i][v] = isa.fma(sums[i][v], w, value[v]);
            }
        }
    }
    for i in 0..Q {
        let out = out[places[i] + c..][..16 * V].as_chunks_mut::<16>().0;
        for v in 0..V {
            out[v] = isa.floats(sums[i][v]);
        }
    }
}

/// Adds to a query's sums what it sees from position `from` on, which others of
/// its tile may not see, and divides them by the sum of its weights. The columns
/// behind the last sixteen are computed here as a whole.
#[inline(always)]
fn finish<S: Simd, E: Element>(
    isa: S,
    head: Head<'_, E>,
    weights: &[f32],
    from: usize,
    inv_sum: f32,
    out: &mut [f32],
) {
    let values = head.values.chunks_exact(head.dim);
    let (chunks, rest) = out.as_chunks_mut::<16>();
    for (i, out) in chunks.iter_mut().enumerate() {
        let mut sum = isa.load_f32(out);
        for (&w, value) in weights.iter().zip(values.clone()).skip(from) {
            let value = &value.as_chunks::<16>().0[i];
            sum = isa.fma(sum, isa.splat(w), E::load(isa, value));
        }
        *out = isa.floats(isa.mul(sum, isa.splat(inv_sum)));
    }
    for (c, out) in (16 * chunks.len()..).zip(rest) {
        let mut sum = 0.0;
        for (&w, value) in weights.iter().zip(values.clone()) {
            sum = w.mul_add(value[c].widen(), sum);
        }
        *out = sum * inv_sum;
    }
}

//! The key and value caches of sequences: what attention reads.

use std::ops::Range;

use bitnet_core::ModelConfig;
use bitnet_kernels::{
    ATTEND_TILE, AttendQuery, KEY_BLOCK, Kernels, KvElement, KvHead, KvHeadInt8Mut,
    attend_scores_len, key_blocks_len, store_key,
};
use bytemuck::Zeroable;
use half::f16;

use crate::error::EngineError;
use crate::parallel::{Rows, RowsMut, Scratch, Split};

/// The element type of a session's key and value cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvType {
    /// Single precision: the bits of the training forward.
    #[default]
    F32,
    /// Half precision: half the memory; keys and values are rounded.
    F16,
    /// Eight-bit integers, with a scale for the key and one for the value of each
    /// position and head: a little more than a quarter of the memory. An element
    /// is off by at most 1/254 of the largest magnitude in its vector.
    Int8,
}

impl KvType {
    /// All there are.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Int8];

    /// The name in options.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Int8 => "int8",
        }
    }

    /// The type of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.name() == name)
    }

    /// Bytes of the cache of a session of `context` tokens.
    #[must_use]
    pub fn bytes(self, config: &ModelConfig, context: usize) -> u64 {
        let heads = Heads::new(config, context);
        let layers = (config.num_hidden_layers * config.num_key_value_heads) as u64;
        layers * heads.head_bytes(self, context) as u64
    }
}

/// The sizes that attention needs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heads {
    pub(crate) queries: usize,
    pub(crate) key_values: usize,
    pub(crate) dim: usize,
    pub(crate) context: usize,
}

impl Heads {
    pub(crate) fn new(config: &ModelConfig, context: usize) -> Self {
        Self {
            queries: config.num_attention_heads,
            key_values: config.num_key_value_heads,
            dim: config.head_dim(),
            context,
        }
    }

    fn keys_len(self) -> usize {
        key_blocks_len(self.context, self.dim)
    }

    fn values_len(self) -> usize {
        self.context * self.dim
    }

    fn key_scales_len(self) -> usize {
        key_blocks_len(self.context, 1)
    }

    /// Bytes of the first `positions` keys and values of one head.
    fn head_bytes(self, kv: KvType, positions: usize) -> usize {
        let (keys, values) = (key_blocks_len(positions, self.dim), positions * self.dim);
        match kv {
            KvType::F32 => 4 * (keys + values),
            KvType::F16 => 2 * (keys + values),
            KvType::Int8 => keys + values + 4 * (key_blocks_len(positions, 1) + positions),
        }
    }

    /// Room for the scores of a tile of queries.
    pub(crate) fn scores_len(self) -> usize {
        attend_scores_len(ATTEND_TILE.min(self.queries * self.context), self.context)
    }
}

/// Keys and values of every layer.
#[derive(Debug)]
pub(crate) enum KvCache {
    F32(Layers<f32>),
    F16(Layers<f16>),
    Int8(Layers<i8>),
}

#[derive(Debug)]
pub(crate) struct Layers<E>(Vec<LayerCache<E>>);

/// Keys and values of one layer, for each of its K heads.
#[derive(Debug)]
struct LayerCache<E> {
    /// `[K, keys_len]`.
    keys: Vec<E>,
    /// `[K, context, C]`.
    values: Vec<E>,
    /// `[K, context]` in whole blocks of keys; empty unless elements are scaled.
    key_scales: Vec<f32>,
    /// `[K, context]`; empty unless elements are scaled.
    value_scales: Vec<f32>,
}

/// Where a token of a pass stands: in which cache, and at which position.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    pub(crate) cache: usize,
    pub(crate) position: usize,
}

/// One attention: each token's queries against a layer of its own cache.
pub(crate) struct Attention<'a> {
    pub(crate) kernels: Kernels,
    pub(crate) split: Split,
    pub(crate) heads: Heads,
    pub(crate) layer: usize,
    /// `[T]`; the tokens of one cache are neighbours.
    pub(crate) places: &'a [Place],
    /// `[T, H·C]`, rotated.
    pub(crate) q: &'a [f32],
    /// `[T, K·C]`, rotated.
    pub(crate) k: &'a [f32],
    /// `[T, K·C]`.
    pub(crate) v: &'a [f32],
}

impl Attention<'_> {
    /// Stores the keys and values of the new tokens, then attends to all: one
    /// region for the queries of all caches.
    ///
    /// `scores` are buffers of [`Heads::scores_len`], one a part, `out` is
    /// `[T, H·C]`.
    pub(crate) fn run(&self, caches: &mut [KvCache], scores: &mut [f32], out: &mut [f32]) {
        let mut first = 0;
        for places in self.places.chunk_by(|a, b| a.cache == b.cache) {
            caches[places[0].cache].store(self, first, places);
            first += places.len();
        }
        let (places, dim, caches) = (self.places, self.heads.dim, &*caches);
        let attend =
            |first: usize,
             (q, scores, out): (Rows<'_, f32>, Scratch<'_, f32>, RowsMut<'_, f32>)| {
                let mut rows = first..first + q.0.len() / dim;
                let mut io = Io { q: q.0, scores: scores.0, out: out.0 };
                while !rows.is_empty() {
                    // The tokens of one cache.
                    let token = rows.start / self.heads.queries;
                    let cache = places[token].cache;
                    let others = places[token..].iter().position(|p| p.cache != cache);
                    let end = others.map_or(rows.end, |n| (token + n) * self.heads.queries);
                    let now = rows.start..end.min(rows.end);
                    rows.start = now.end;
                    caches[cache].attend(self, first, now, &mut io);
                }
            };
        // At worst every query reads a key and a value of all positions so far.
        let cached = |p: &Place| self.heads.head_bytes(caches[p.cache].kv_type(), p.position + 1);
        let bytes = self.heads.queries * places.iter().map(cached).sum::<usize>();
        let width = self.heads.scores_len();
        let (rows, buffers) = (places.len() * self.heads.queries, scores.len() / width);
        let item = (Rows(self.q, dim), Scratch(scores, width), RowsMut(out, dim));
        self.split.rows_with(bytes, rows, buffers, item, &attend);
    }
}

/// A part's rows of queries and outputs, and its scratch.
struct Io<'a> {
    /// `[rows, C]`.
    q: &'a [f32],
    scores: &'a mut [f32],
    /// `[rows, C]`.
    out: &'a mut [f32],
}

impl KvCache {
    /// An empty cache.
    ///
    /// # Errors
    /// A size that no machine has.
    pub(crate) fn new(kv: KvType, config: &ModelConfig, heads: Heads) -> Result<Self, EngineError> {
        let layers = config.num_hidden_layers;
        match kv {
            KvType::F32 => Layers::new(layers, heads).map(Self::F32),
            KvType::F16 => Layers::new(layers, heads).map(Self::F16),
            KvType::Int8 => Layers::new(layers, heads).map(Self::Int8),
        }
    }

    pub(crate) fn kv_type(&self) -> KvType {
        match self {
            Self::F32(_) => KvType::F32,
            Self::F16(_) => KvType::F16,
            Self::Int8(_) => KvType::Int8,
        }
    }

    /// Stores the keys and values of the tokens from `first` on at their places.
    fn store(&mut self, attention: &Attention<'_>, first: usize, places: &[Place]) {
        match self {
            Self::F32(layers) => layers.0[attention.layer].store(attention, first, places),
            Self::F16(layers) => layers.0[attention.layer].store(attention, first, places),
            Self::Int8(layers) => layers.0[attention.layer].store(attention, first, places),
        }
    }

    /// Copies the keys and values at `positions` from another cache of the same
    /// type and shape. What stands before them must be the same in both.
    pub(crate) fn copy_from(&mut self, from: &Self, heads: Heads, positions: Range<usize>) {
        match (self, from) {
            (Self::F32(to), Self::F32(from)) => to.copy_from(from, heads, positions),
            (Self::F16(to), Self::F16(from)) => to.copy_from(from, heads, positions),
            (Self::Int8(to), Self::Int8(from)) => to.copy_from(from, heads, positions),
            _ => unreachable!("the caches of a batch have one type"),
        }
    }

    /// Attends with the queries `rows` (token · H + head), tokens of this cache, in
    /// a part that begins at row `first`.
    fn attend(&self, a: &Attention<'_>, first: usize, rows: Range<usize>, io: &mut Io<'_>) {
        let Heads { queries, key_values, dim, .. } = a.heads;
        let group = queries / key_values;
        let scale = 1.0 / (dim as f32).sqrt();
        // Queries that share a key and value head share its loads: those of a
        // token's heads, and of neighbouring tokens.
        for head in 0..key_values {
            let kv = match self {
                Self::F32(layers) => layers.0[a.layer].head(a.heads, head),
                Self::F16(layers) => layers.0[a.layer].head(a.heads, head),
                Self::Int8(layers) => layers.0[a.layer].head(a.heads, head),
            };
            let mut tile = [AttendQuery::default(); ATTEND_TILE];
            let mut count = 0;
            let mut flush = |tile: &[AttendQuery]| {
                a.kernels.attend_tile(tile, io.q, kv, dim, scale, io.scores, io.out);
            };
            for token in rows.start / queries..rows.end.div_ceil(queries) {
                let row = token * queries + head * group;
                for row in row.max(rows.start)..(row + group).min(rows.end) {
                    let len = a.places[token].position + 1;
                    tile[count] = AttendQuery { at: (row - first) * dim, len };
                    count += 1;
                    if count == ATTEND_TILE {
                        flush(&tile);
                        count = 0;
                    }
                }
            }
            if count > 0 {
                flush(&tile[..count]);
            }
        }
    }
}

/// How the elements of a cache are stored.
pub(crate) trait Stored: Zeroable + Copy + Send + Sync {
    /// Whether a scale belongs to each vector.
    const SCALED: bool;

    /// Keys and values of one head.
    fn head<'a>(
        keys: &'a [Self],
        values: &'a [Self],
        key_scales: &'a [f32],
        value_scales: &'a [f32],
    ) -> KvHead<'a>;

    /// Stores the key and value of one position of one head.
    fn store(
        kernels: Kernels,
        head: (&mut [Self], &mut [Self]),
        scales: (&mut [f32], &mut [f32]),
        position: usize,
        key: &[f32],
        value: &[f32],
    );
}

macro_rules! stored_floats {
    ($($float:ty)*) => {$(
        impl Stored for $float {
            const SCALED: bool = false;

            fn head<'a>(
                keys: &'a [Self],
                values: &'a [Self],
                _: &'a [f32],
                _: &'a [f32],
            ) -> KvHead<'a> {
                KvElement::head(keys, values)
            }

            fn store(
                _: Kernels,
                (keys, values): (&mut [Self], &mut [Self]),
                _: (&mut [f32], &mut [f32]),
                position: usize,
                key: &[f32],
                value: &[f32],
            ) {
                store_key(keys, position, key);
                let stored = &mut values[position * value.len()..][..value.len()];
                for (stored, &v) in stored.iter_mut().zip(value) {
                    *stored = Self::from_f32(v);
                }
            }
        }
    )*};
}
stored_floats!(f32 f16);

impl Stored for i8 {
    const SCALED: bool = true;

    fn head<'a>(
        keys: &'a [i8],
        values: &'a [i8],
        key_scales: &'a [f32],
        value_scales: &'a [f32],
    ) -> KvHead<'a> {
        KvHead::Int8 { keys, key_scales, values, value_scales }
    }

    fn store(
        kernels: Kernels,
        (keys, values): (&mut [i8], &mut [i8]),
        (key_scales, value_scales): (&mut [f32], &mut [f32]),
        position: usize,
        key: &[f32],
        value: &[f32],
    ) {
        let head = KvHeadInt8Mut { keys, key_scales, values, value_scales };
        kernels.store_int8(head, position, key, value);
    }
}

impl<E: Stored> Layers<E> {
    fn new(layers: usize, heads: Heads) -> Result<Self, EngineError> {
        let layer = |_| LayerCache::new(heads);
        (0..layers).map(layer).collect::<Result<_, _>>().map(Self)
    }

    /// See [`KvCache::copy_from`].
    fn copy_from(&mut self, from: &Self, heads: Heads, positions: Range<usize>) {
        for (to, from) in self.0.iter_mut().zip(&from.0) {
            to.copy_from(from, heads, positions.clone());
        }
    }
}

impl<E: Stored> LayerCache<E> {
    /// Zeros that the system provides page by page as they are written.
    fn new(heads: Heads) -> Result<Self, EngineError> {
        let too_large = || EngineError::Option {
            option: "context",
            value: heads.context.to_string(),
            why: "the cache does not fit the address space".to_owned(),
        };
        let len = |each: usize| {
            let len = each.checked_mul(heads.key_values);
            len.filter(|n| *n <= isize::MAX as usize / 4).ok_or_else(too_large)
        };
        let (keys, values) = (len(heads.keys_len())?, len(heads.values_len())?);
        let scales = |each| len(if E::SCALED { each } else { 0 });
        let (key_scales, value_scales) = (scales(heads.key_scales_len())?, scales(heads.context)?);
        Ok(Self {
            keys: bytemuck::zeroed_vec(keys),
            values: bytemuck::zeroed_vec(values),
            key_scales: vec![0.0; key_scales],
            value_scales: vec![0.0; value_scales],
        })
    }

    fn head(&self, heads: Heads, head: usize) -> KvHead<'_> {
        let (keys_len, values_len) = (heads.keys_len(), heads.values_len());
        let (mut key_scales, mut value_scales) = (&[][..], &[][..]);
        if E::SCALED {
            let len = heads.key_scales_len();
            key_scales = &self.key_scales[head * len..][..len];
            value_scales = &self.value_scales[head * heads.context..][..heads.context];
        }
        let keys = &self.keys[head * keys_len..][..keys_len];
        let values = &self.values[head * values_len..][..values_len];
        E::head(keys, values, key_scales, value_scales)
    }

    /// See [`KvCache::copy_from`].
    fn copy_from(&mut self, from: &Self, heads: Heads, Range { start, end }: Range<usize>) {
        fn copy<E: Copy>(to: &mut [E], from: &[E], range: Range<usize>) {
            to[range.clone()].copy_from_slice(&from[range]);
        }
        let Heads { key_values, dim, context, .. } = heads;
        // Keys are copied in whole blocks: those before `start` are the same, those
        // from `end` on are written before they are read.
        let (first, last) = (start / KEY_BLOCK * KEY_BLOCK * dim, key_blocks_len(end, dim));
        for head in 0..key_values {
            let at = head * heads.keys_len();
            copy(&mut self.keys, &from.keys, at + first..at + last);
            let at = head * heads.values_len();
            copy(&mut self.values, &from.values, at + start * dim..at + end * dim);
            if E::SCALED {
                let at = head * heads.key_scales_len();
                copy(&mut self.key_scales, &from.key_scales, at + start..at + end);
                let at = head * context;
                copy(&mut self.value_scales, &from.value_scales, at + start..at + end);
            }
        }
    }

    fn store(&mut self, a: &Attention<'_>, first: usize, places: &[Place]) {
        let Heads { key_values, dim, context, .. } = a.heads;
        let (keys_len, values_len) = (a.heads.keys_len(), a.heads.values_len());
        let scales_len = a.heads.key_scales_len();
        let width = key_values * dim;
        let tokens = first * width..(first + places.len()) * width;
        let (k, v) = (&a.k[tokens.clone()], &a.v[tokens]);
        type Scales<'a> = Option<(RowsMut<'a, f32>, RowsMut<'a, f32>)>;
        let store =
            |first: usize, (keys, values, scales): (RowsMut<'_, E>, RowsMut<'_, E>, Scales<'_>)| {
                let mut scales = scales.map(|(keys, values)| (keys.iter(), values.iter()));
                for (i, (keys, values)) in keys.iter().zip(values.iter()).enumerate() {
                    let at = (first + i) * dim;
                    let (key_scales, value_scales) = match &mut scales {
                        Some((keys, values)) => (keys.next(), values.next()),
                        None => (None, None),
                    };
                    let key_scales = key_scales.unwrap_or_default();
                    let value_scales = value_scales.unwrap_or_default();
                    let tokens = k.chunks_exact(width).zip(v.chunks_exact(width)).zip(places);
                    for ((k, v), place) in tokens {
                        let head = (&mut *keys, &mut *values);
                        let scales = (&mut *key_scales, &mut *value_scales);
                        let (k, v) = (&k[at..at + dim], &v[at..at + dim]);
                        E::store(a.kernels, head, scales, place.position, k, v);
                    }
                }
            };
        let bytes = (k.len() + v.len()) * 4;
        let scales = E::SCALED.then_some((
            RowsMut(&mut self.key_scales[..], scales_len),
            RowsMut(&mut self.value_scales[..], context),
        ));
        let item = (
            RowsMut(&mut self.keys[..], keys_len),
            RowsMut(&mut self.values[..], values_len),
            scales,
        );
        a.split.rows(bytes, key_values, item, &store);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_to_their_type() {
        for kv in KvType::ALL {
            assert_eq!(KvType::from_name(kv.name()), Some(kv));
        }
        assert_eq!(KvType::from_name("int4"), None);
    }

    #[test]
    fn a_cache_has_the_bytes_that_are_reported() {
        let config = ModelConfig::tiny();
        // One more than whole blocks of keys.
        let heads = Heads::new(&config, 33);
        for kv in KvType::ALL {
            fn bytes<E>(layers: &Layers<E>) -> usize {
                let layer = |l: &LayerCache<E>| {
                    (l.keys.len() + l.values.len()) * size_of::<E>()
                        + (l.key_scales.len() + l.value_scales.len()) * 4
                };
                layers.0.iter().map(layer).sum()
            }
            let bytes = match KvCache::new(kv, &config, heads).unwrap() {
                KvCache::F32(layers) => bytes(&layers),
                KvCache::F16(layers) => bytes(&layers),
                KvCache::Int8(layers) => bytes(&layers),
            };
            assert_eq!(bytes as u64, kv.bytes(&config, 33), "{kv:?}");
        }
    }
}

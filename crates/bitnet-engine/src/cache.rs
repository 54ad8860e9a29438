//! The key and value caches of sequences: what attention reads.

use bitnet_core::ModelConfig;
use bitnet_kernels::{Kernels, KvElement, key_blocks_len, store_key};
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
}

impl KvType {
    /// The name in options.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
        }
    }

    /// The type of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::F32, Self::F16].into_iter().find(|t| t.name() == name)
    }

    /// Bytes of the cache of a session of `context` tokens.
    #[must_use]
    pub fn bytes(self, config: &ModelConfig, context: usize) -> u64 {
        let element = match self {
            Self::F32 => 4,
            Self::F16 => 2,
        };
        let keys = key_blocks_len(context, config.head_dim()) as u64;
        let values = (context * config.head_dim()) as u64;
        let heads = (config.num_hidden_layers * config.num_key_value_heads) as u64;
        element * heads * (keys + values)
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

    /// Room for the scores of one query.
    pub(crate) fn scores_len(self) -> usize {
        key_blocks_len(self.context, 1)
    }
}

/// Keys and values of every layer.
#[derive(Debug)]
pub(crate) enum KvCache {
    F32(Layers<f32>),
    F16(Layers<f16>),
}

#[derive(Debug)]
pub(crate) struct Layers<E>(Vec<LayerCache<E>>);

/// Keys and values of one layer: `[K, keys_len]` and `[K, context, C]`.
#[derive(Debug)]
struct LayerCache<E> {
    keys: Vec<E>,
    values: Vec<E>,
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
    /// A buffer of [`Heads::scores_len`] for each part.
    pub(crate) scores: &'a mut [f32],
    /// `[T, H·C]`.
    pub(crate) out: &'a mut [f32],
}

impl Attention<'_> {
    /// Stores the keys and values of the new tokens, then attends to all: one
    /// region for the queries of all caches.
    pub(crate) fn run(self, caches: &mut [KvCache]) {
        let mut first = 0;
        for places in self.places.chunk_by(|a, b| a.cache == b.cache) {
            caches[places[0].cache].store(&self, first, places);
            first += places.len();
        }
        let Heads { queries, key_values, dim, .. } = self.heads;
        let (kernels, heads, layer, places) = (self.kernels, self.heads, self.layer, self.places);
        let (caches, group) = (&*caches, queries / key_values);
        let attend =
            |first: usize,
             (q, scores, out): (Rows<'_, f32>, Scratch<'_, f32>, RowsMut<'_, f32>)| {
                let scores = scores.0;
                for (i, (q, out)) in q.iter().zip(out.iter()).enumerate() {
                    let (place, head) =
                        (places[(first + i) / queries], (first + i) % queries / group);
                    let query = Query { kernels, heads, head, len: place.position + 1, q };
                    match &caches[place.cache] {
                        KvCache::F32(layers) => layers.0[layer].attend(query, scores, out),
                        KvCache::F16(layers) => layers.0[layer].attend(query, scores, out),
                    }
                }
            };
        // Every query reads a key and a value of all positions so far.
        let positions: usize = places.iter().map(|p| p.position + 1).sum();
        let bytes = positions * queries * dim * 2 * caches[0].element_bytes();
        let item = (
            Rows(self.q, dim),
            Scratch(self.scores, self.heads.scores_len()),
            RowsMut(self.out, dim),
        );
        self.split.rows(bytes, places.len() * queries, item, &attend);
    }
}

/// One head's query `[C]` over the first `len` positions of its cache.
struct Query<'a> {
    kernels: Kernels,
    heads: Heads,
    /// The key and value head.
    head: usize,
    len: usize,
    q: &'a [f32],
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
        }
    }

    pub(crate) fn kv_type(&self) -> KvType {
        match self {
            Self::F32(_) => KvType::F32,
            Self::F16(_) => KvType::F16,
        }
    }

    fn element_bytes(&self) -> usize {
        match self {
            Self::F32(_) => 4,
            Self::F16(_) => 2,
        }
    }

    /// Stores the keys and values of the tokens from `first` on at their places.
    fn store(&mut self, attention: &Attention<'_>, first: usize, places: &[Place]) {
        match self {
            Self::F32(layers) => layers.0[attention.layer].store(attention, first, places),
            Self::F16(layers) => layers.0[attention.layer].store(attention, first, places),
        }
    }
}

impl<E: KvElement> Layers<E> {
    fn new(layers: usize, heads: Heads) -> Result<Self, EngineError> {
        let zeros = |each: usize| {
            let len = each.checked_mul(heads.key_values).filter(|n| *n <= isize::MAX as usize / 4);
            len.map(|len| vec![E::from_f32(0.0); len]).ok_or_else(|| EngineError::Option {
                option: "context",
                value: heads.context.to_string(),
                why: "the cache does not fit the address space".to_owned(),
            })
        };
        let layer = |_| {
            Ok(LayerCache { keys: zeros(heads.keys_len())?, values: zeros(heads.values_len())? })
        };
        (0..layers).map(layer).collect::<Result<_, _>>().map(Self)
    }
}

impl<E: KvElement> LayerCache<E> {
    fn attend(&self, query: Query<'_>, scores: &mut [f32], out: &mut [f32]) {
        let Query { kernels, heads, head, len, q } = query;
        let (keys_len, values_len) = (heads.keys_len(), heads.values_len());
        let keys = &self.keys[head * keys_len..][..keys_len];
        let values = &self.values[head * values_len..][..values_len];
        kernels.attend(q, keys, values, len, 1.0 / (heads.dim as f32).sqrt(), scores, out);
    }

    fn store(&mut self, a: &Attention<'_>, first: usize, places: &[Place]) {
        let Heads { key_values, dim, .. } = a.heads;
        let (keys_len, values_len) = (a.heads.keys_len(), a.heads.values_len());
        let width = key_values * dim;
        let tokens = first * width..(first + places.len()) * width;
        let (k, v) = (&a.k[tokens.clone()], &a.v[tokens]);
        let store = |first: usize, (keys, values): (RowsMut<'_, E>, RowsMut<'_, E>)| {
            for (i, (keys, values)) in keys.iter().zip(values.iter()).enumerate() {
                let at = (first + i) * dim;
                let tokens = k.chunks_exact(width).zip(v.chunks_exact(width)).zip(places);
                for ((k, v), place) in tokens {
                    store_key(keys, place.position, &k[at..at + dim]);
                    let value = &mut values[place.position * dim..][..dim];
                    for (stored, &v) in value.iter_mut().zip(&v[at..at + dim]) {
                        *stored = E::from_f32(v);
                    }
                }
            }
        };
        let bytes = (k.len() + v.len()) * 4;
        let item =
            (RowsMut(&mut self.keys[..], keys_len), RowsMut(&mut self.values[..], values_len));
        a.split.rows(bytes, key_values, item, &store);
    }
}

//! The key and value cache of a session: what attention reads.

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

/// One attention: queries `[T, H·C]` against a layer of the cache.
pub(crate) struct Attention<'a> {
    pub(crate) kernels: Kernels,
    pub(crate) split: Split,
    pub(crate) heads: Heads,
    pub(crate) layer: usize,
    /// Position of the first token.
    pub(crate) start: usize,
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

    /// Stores the keys and values of the new tokens, then attends to all.
    pub(crate) fn attend(&mut self, attention: Attention<'_>) {
        match self {
            Self::F32(layers) => layers.0[attention.layer].attend(attention),
            Self::F16(layers) => layers.0[attention.layer].attend(attention),
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
    fn attend(&mut self, a: Attention<'_>) {
        self.store(&a);
        let Heads { queries, key_values, dim, .. } = a.heads;
        let tokens = a.q.len() / (queries * dim);
        let group = queries / key_values;
        let scale = 1.0 / (dim as f32).sqrt();
        let (keys_len, values_len) = (a.heads.keys_len(), a.heads.values_len());
        let (kernels, start, this) = (a.kernels, a.start, &*self);
        let attend =
            |first: usize,
             (q, scores, out): (Rows<'_, f32>, Scratch<'_, f32>, RowsMut<'_, f32>)| {
                let scores = scores.0;
                for (i, (q, out)) in q.iter().zip(out.iter()).enumerate() {
                    let (token, head) = ((first + i) / queries, (first + i) % queries / group);
                    let keys = &this.keys[head * keys_len..][..keys_len];
                    let values = &this.values[head * values_len..][..values_len];
                    kernels.attend(q, keys, values, start + token + 1, scale, scores, out);
                }
            };
        // Every query reads a key and a value of all positions so far.
        let bytes = tokens * queries * (start + tokens) * dim * 2 * size_of::<E>();
        let item = (Rows(a.q, dim), Scratch(a.scores, a.heads.scores_len()), RowsMut(a.out, dim));
        a.split.rows(bytes, tokens * queries, item, &attend);
    }

    fn store(&mut self, a: &Attention<'_>) {
        let Heads { key_values, dim, .. } = a.heads;
        let (keys_len, values_len) = (a.heads.keys_len(), a.heads.values_len());
        let store = |first: usize, (keys, values): (RowsMut<'_, E>, RowsMut<'_, E>)| {
            for (i, (keys, values)) in keys.iter().zip(values.iter()).enumerate() {
                let at = (first + i) * dim;
                let tokens =
                    a.k.chunks_exact(key_values * dim).zip(a.v.chunks_exact(key_values * dim));
                for (t, (k, v)) in tokens.enumerate() {
                    store_key(keys, a.start + t, &k[at..at + dim]);
                    let value = &mut values[(a.start + t) * dim..][..dim];
                    for (stored, &v) in value.iter_mut().zip(&v[at..at + dim]) {
                        *stored = E::from_f32(v);
                    }
                }
            }
        };
        let bytes = (a.k.len() + a.v.len()) * 4;
        let item =
            (RowsMut(&mut self.keys[..], keys_len), RowsMut(&mut self.values[..], values_len));
        a.split.rows(bytes, key_values, item, &store);
    }
}

//! The whole model, its initialisation and its tensors by name.

use std::sync::Arc;

use bitnet_core::names::{self, Linear, Norm};
use bitnet_core::{Dtype, ModelConfig};
use burn::module::{Module, Param};
use burn::tensor::{Device, Int, Tensor, TensorData};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::block::{Block, RmsNorm, Rows};
use crate::ops::{self, LinearRecipe};

/// Receives (layer, input `[tokens, in]`, output `[tokens, out]`) of every linear
/// layer of a block, in the order they run.
pub type LayerTrace<'a> = &'a mut dyn FnMut(Linear, Tensor<2>, Tensor<2>);

/// A parameter by its Hugging Face name.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedTensor {
    /// Hugging Face's name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Row-major elements.
    pub data: Vec<f32>,
}

/// A decoder-only transformer.
#[derive(Module, Debug)]
pub struct Transformer {
    /// Token embedding `[V, D]`.
    pub embedding: Param<Tensor<2>>,
    /// The blocks.
    pub blocks: Vec<Block>,
    /// The norm before the head.
    pub norm: RmsNorm,
    /// The head `[V, D]`, when it is not the embedding.
    pub head: Option<Param<Tensor<2>>>,
    #[module(skip)]
    embedding_dtype: Stored,
}

/// [`Dtype`] as a field of a module.
#[derive(Debug, Clone, Copy)]
struct Stored(Dtype);

/// Makes initial weights: normal with deviation 0.02, from a generator of its own
/// for every tensor (seeded by the run's seed and the tensor's name), so that
/// devices, thread counts and the order of creation do not matter.
pub(super) struct Init<'a> {
    pub(super) config: &'a ModelConfig,
    pub(super) device: &'a Device,
    seed: u64,
}

impl Init<'_> {
    /// An initial matrix.
    pub(super) fn matrix(&mut self, name: &str, [rows, cols]: [usize; 2]) -> Tensor<2> {
        const DEVIATION: f64 = 0.02;
        let mut key = [0u8; 32];
        key[..8].copy_from_slice(&self.seed.to_le_bytes());
        // FNV-1a of the name, in the second word of the key.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
            (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
        });
        key[8..16].copy_from_slice(&hash.to_le_bytes());
        let mut rng = ChaCha8Rng::from_seed(key);
        let mut data = Vec::with_capacity(rows * cols + 1);
        while data.len() < rows * cols {
            // Box and Muller's transform; 1 - u is never 0.
            let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt() * DEVIATION;
            let angle = std::f64::consts::TAU * rng.random::<f64>();
            data.push((radius * angle.cos()) as f32);
            data.push((radius * angle.sin()) as f32);
        }
        data.truncate(rows * cols);
        Tensor::from_data(TensorData::new(data, [rows, cols]), self.device)
    }
}

impl Transformer {
    /// A freshly initialised model; the same on every device for one seed.
    pub fn new(config: &ModelConfig, seed: u64, device: &Device) -> Self {
        let mut init = Init { config, device, seed };
        let table = [config.vocab_size, config.hidden_size];
        Self {
            embedding: Param::from_tensor(init.matrix(names::EMBEDDING, table)),
            blocks: (0..config.num_hidden_layers).map(|l| Block::new(l, &mut init)).collect(),
            norm: RmsNorm::new(config.hidden_size, config.rms_norm_eps, device),
            head: (!config.tie_word_embeddings)
                .then(|| Param::from_tensor(init.matrix(names::LM_HEAD, table))),
            embedding_dtype: Stored(config.embedding_dtype),
        }
    }

    /// The logits of every position.
    ///
    /// # Shapes
    /// `tokens` is `[B, T]`, the result `[B, T, V]`.
    pub fn forward(&self, tokens: Tensor<2, Int>) -> Tensor<3> {
        let [batch, time] = tokens.dims();
        let (hidden, head) = self.hidden(tokens, None);
        let logits = ops::logits(hidden, head);
        let [_, vocab] = logits.dims();
        logits.reshape([batch, time, vocab])
    }

    /// The logits of the last position of every sequence, `[B, V]`.
    pub fn forward_last(&self, tokens: Tensor<2, Int>) -> Tensor<2> {
        let [batch, time] = tokens.dims();
        let (hidden, head) = self.hidden(tokens, None);
        let [_, size] = hidden.dims();
        let last = hidden.reshape([batch, time, size]).narrow(1, time - 1, 1);
        ops::logits(last.reshape([batch, size]), head)
    }

    /// The mean cross-entropy, in nats, of predicting `targets`.
    ///
    /// # Shapes
    /// `tokens` and `targets` are `[B, T]`, the result is `[1]`.
    pub fn loss(&self, tokens: Tensor<2, Int>, targets: Tensor<2, Int>) -> Tensor<1> {
        let [batch, time] = tokens.dims();
        let (hidden, head) = self.hidden(tokens, None);
        ops::cross_entropy(hidden, head, targets.reshape([batch * time]))
    }

    /// Runs the model and hands every linear layer's block number, name, input and
    /// output to `trace`; returns the logits `[B · T, V]`.
    pub fn forward_traced(
        &self,
        tokens: Tensor<2, Int>,
        trace: &mut dyn FnMut(usize, Linear, Tensor<2>, Tensor<2>),
    ) -> Tensor<2> {
        let (hidden, head) = self.hidden_traced(tokens, None, |_| true, trace);
        ops::logits(hidden, head)
    }

    /// The normed hidden state `[B · T, D]` and the head's weights as stored.
    /// `documents`: see [`ops::AttentionShape::documents`].
    pub fn hidden(
        &self,
        tokens: Tensor<2, Int>,
        documents: Option<Arc<[usize]>>,
    ) -> (Tensor<2>, Tensor<2>) {
        self.hidden_traced(tokens, documents, |_| false, &mut |_, _, _, _| ())
    }

    /// The same, handing the linear layers of the `watched` blocks to `trace`; see
    /// [`Transformer::forward_traced`].
    pub fn hidden_traced(
        &self,
        tokens: Tensor<2, Int>,
        documents: Option<Arc<[usize]>>,
        watched: impl Fn(usize) -> bool,
        trace: &mut dyn FnMut(usize, Linear, Tensor<2>, Tensor<2>),
    ) -> (Tensor<2>, Tensor<2>) {
        let [batch, _] = tokens.dims();
        let (embedding, head) = self.stored();
        let rows = Rows { batch, documents };
        let mut x = ops::embed(embedding, tokens);
        for (layer, block) in self.blocks.iter().enumerate() {
            x = if watched(layer) {
                let mut trace = |which, input, output| trace(layer, which, input, output);
                block.forward_traced(x, &rows, &mut trace)
            } else {
                block.forward(x, &rows)
            };
        }
        (self.norm.forward(x), head)
    }

    /// Embedding and head in the precision in which they are stored.
    fn stored(&self) -> (Tensor<2>, Tensor<2>) {
        let embedding = self.stored_embedding();
        let head = self.stored_head().unwrap_or_else(|| embedding.clone());
        (embedding, head)
    }

    /// Sets what happens to the weights and inputs of every linear layer.
    pub fn set_recipes(&mut self, recipe: impl Fn(Linear) -> LinearRecipe) {
        for block in &mut self.blocks {
            for which in Linear::ALL {
                block.linear_mut(which).set_recipe(recipe(which));
            }
        }
    }

    /// The recipe of a linear layer, which has what is the same for all; none without layers.
    pub(crate) fn recipe(&self) -> Option<LinearRecipe> {
        self.blocks.first().map(|block| block.attention.q.recipe())
    }

    /// The embedding in the precision in which it is stored, `[V, D]`.
    pub(crate) fn stored_embedding(&self) -> Tensor<2> {
        ops::round_to(self.embedding.val(), self.embedding_dtype.0)
    }

    /// The same of the head; none where it is the embedding.
    pub(crate) fn stored_head(&self) -> Option<Tensor<2>> {
        self.head.as_ref().map(|head| ops::round_to(head.val(), self.embedding_dtype.0))
    }

    /// Every parameter, in the order of [`names::tensors`].
    pub fn named_tensors(&self) -> Vec<NamedTensor> {
        let mut all = vec![named(names::EMBEDDING.to_owned(), self.embedding.val())];
        for (layer, block) in self.blocks.iter().enumerate() {
            for which in
                [Norm::Attention, Norm::AttentionSub, Norm::FeedForward, Norm::FeedForwardSub]
            {
                if let Some(norm) = block.norm(which) {
                    all.push(named(which.hf(layer), norm.weight.val()));
                }
            }
            for which in Linear::ALL {
                all.push(named(which.hf(layer), block.linear(which).weight.val()));
            }
        }
        all.push(named(names::FINAL_NORM.to_owned(), self.norm.weight.val()));
        if let Some(head) = &self.head {
            all.push(named(names::LM_HEAD.to_owned(), head.val()));
        }
        all
    }

    /// Replaces every parameter by what `get(name, shape)` returns.
    ///
    /// # Errors
    /// The first error of `get`.
    pub fn load_tensors<E>(
        mut self,
        mut get: impl FnMut(&str, &[usize]) -> Result<Vec<f32>, E>,
    ) -> Result<Self, E> {
        let get = &mut get;
        self.embedding = load(self.embedding, names::EMBEDDING, get)?;
        for (layer, block) in self.blocks.iter_mut().enumerate() {
            for which in
                [Norm::Attention, Norm::AttentionSub, Norm::FeedForward, Norm::FeedForwardSub]
            {
                if let Some(norm) = block.norm_mut(which) {
                    norm.weight = load(norm.weight.clone(), &which.hf(layer), get)?;
                }
            }
            for which in Linear::ALL {
                let linear = block.linear_mut(which);
                linear.weight = load(linear.weight.clone(), &which.hf(layer), get)?;
            }
        }
        self.norm.weight = load(self.norm.weight.clone(), names::FINAL_NORM, get)?;
        if let Some(head) = self.head.take() {
            self.head = Some(load(head, names::LM_HEAD, get)?);
        }
        Ok(self)
    }
}

fn named<const D: usize>(name: String, tensor: Tensor<D>) -> NamedTensor {
    let shape = tensor.dims().to_vec();
    let data = match tensor.into_data().try_into_vec::<f32>() {
        Ok(data) => data,
        Err(e) => unreachable!("parameters are f32: {e:?}"),
    };
    NamedTensor { name, shape, data }
}

fn load<const D: usize, E>(
    param: Param<Tensor<D>>,
    name: &str,
    get: &mut impl FnMut(&str, &[usize]) -> Result<Vec<f32>, E>,
) -> Result<Param<Tensor<D>>, E> {
    let (shape, device) = (param.val().dims(), param.val().device());
    let data = get(name, &shape)?;
    let tensor = Tensor::from_data(TensorData::new(data, shape), &device);
    // Only a device with autodiff knows of gradients.
    Ok(param.map(|_| if device.is_autodiff() { tensor.require_grad() } else { tensor }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(device: &Device) -> Tensor<2, Int> {
        let ids: Vec<i64> = (0..40).map(|i| i * 37 % 320).collect();
        Tensor::from_data(TensorData::new(ids, [2, 20]), device)
    }

    #[test]
    fn names_and_shapes_are_those_of_the_checkpoint() {
        for (tie, sub_norms) in [(true, true), (false, false)] {
            let config = ModelConfig { tie_word_embeddings: tie, sub_norms, ..ModelConfig::tiny() };
            let model = Transformer::new(&config, 1, &Device::flex());
            let have: Vec<_> =
                model.named_tensors().into_iter().map(|t| (t.name, t.shape)).collect();
            assert_eq!(have, names::tensors(&config));
        }
    }

    #[test]
    fn loading_restores_every_bit() {
        let config = ModelConfig::tiny();
        let device = Device::flex().autodiff();
        let saved = Transformer::new(&config, 1, &device).named_tensors();
        for device in [device.clone(), Device::flex()] {
            let other = Transformer::new(&config, 2, &device);
            assert_ne!(other.named_tensors(), saved);
            let loaded = other
                .load_tensors(|name, _| {
                    let found = saved.iter().find(|t| t.name == name);
                    found.map(|t| t.data.clone()).ok_or(())
                })
                .unwrap();
            assert_eq!(loaded.named_tensors(), saved);
        }
    }

    #[test]
    fn a_fresh_model_predicts_about_uniformly() {
        let config = ModelConfig::tiny();
        let device = Device::flex().autodiff();
        let model = Transformer::new(&config, 1, &device);
        let loss = model.loss(tokens(&device), tokens(&device)).into_scalar::<f32>();
        assert!((loss - (config.vocab_size as f32).ln()).abs() < 0.5, "{loss}");
    }

    #[test]
    fn logits_do_not_depend_on_later_tokens() {
        let config = ModelConfig::tiny();
        let device = Device::flex();
        let model = Transformer::new(&config, 1, &device);
        let all = model.forward(tokens(&device)).narrow(1, 0, 7);
        let some = model.forward(tokens(&device).narrow(1, 0, 7));
        all.into_data().assert_eq(&some.into_data(), true);
    }

    #[test]
    fn the_last_logits_are_the_last_of_all() {
        let device = Device::flex();
        let model = Transformer::new(&ModelConfig::tiny(), 1, &device);
        let all = model.forward(tokens(&device)).narrow(1, 19, 1).reshape([2, 320]);
        all.into_data().assert_eq(&model.forward_last(tokens(&device)).into_data(), true);
    }
}

//! What the quantised weights of a run do: how many are -1, 0 and 1 in each linear
//! layer, and how many changed their value since they were last looked at.
//!
//! The values last seen are kept packed, 2 bits each, and stored with a checkpoint,
//! so that a run that is gone on from finds the same flips as one never stopped.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use bitnet_core::matrix::Layout;
use bitnet_core::names::Linear;
use bitnet_core::{WeightQuantizer, WeightScheme};
use burn::tensor::Tensor;
use rayon::prelude::*;
use safetensors::SafeTensorError;
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};

use crate::TrainError;
use crate::error::with_path;
use crate::metrics::LayerWeights;
use crate::model::Transformer;

/// The file in a checkpoint that holds the values last seen.
const FILE: &str = "trits.safetensors";
/// The key of its metadata that names the step they were seen at.
const STEP: &str = "step";

/// The quantised values of every linear layer at one step.
#[derive(Debug, Clone, PartialEq)]
pub struct Trits {
    step: u64,
    layers: Vec<Layer>,
}

/// One matrix.
#[derive(Debug, Clone, PartialEq)]
struct Layer {
    name: String,
    weights: usize,
    /// [`Layout::P2`], the matrix as one row.
    packed: Vec<u8>,
}

impl Trits {
    /// Quantises every linear layer of a model; none where it has float weights.
    #[must_use]
    pub fn of(model: &Transformer, step: u64) -> Option<Self> {
        let mut matrices: Vec<(String, Tensor<2>, WeightScheme)> = Vec::new();
        for (index, block) in model.blocks.iter().enumerate() {
            for which in Linear::ALL {
                let name = which.hf(index);
                let name = name.strip_suffix(".weight").unwrap_or(&name).to_owned();
                let linear = block.linear(which);
                matrices.push((name, linear.weight.val(), linear.recipe().weights));
            }
        }
        let layers: Option<Vec<Layer>> =
            matrices.into_par_iter().map(|(name, w, scheme)| layer(name, w, scheme)).collect();
        layers.map(|layers| Self { step, layers })
    }

    /// The step at which they were seen.
    #[must_use]
    pub fn step(&self) -> u64 {
        self.step
    }

    /// The shares in every layer, and of the flips since `before`.
    #[must_use]
    pub fn shares(&self, before: Option<&Self>) -> Vec<LayerWeights> {
        let share = |(i, layer): (usize, &Layer)| {
            let [minus, zero, plus] = layer.counts();
            let old = before.and_then(|b| b.layers.get(i)).filter(|old| old.fits(layer));
            LayerWeights {
                layer: layer.name.clone(),
                weights: layer.weights as u64,
                minus,
                zero,
                plus,
                flips: old.map(|old| layer.flips(old)),
            }
        };
        self.layers.iter().enumerate().map(share).collect()
    }

    /// Writes them into the folder of a checkpoint that is being made.
    ///
    /// # Errors
    /// I/O errors with the path.
    pub fn save(&self, folder: &Path) -> Result<(), TrainError> {
        let path = folder.join(FILE);
        let metadata = HashMap::from([
            (STEP.to_owned(), self.step.to_string()),
            ("layout".to_owned(), Layout::P2.name().to_owned()),
        ]);
        let bad = |e: SafeTensorError| TrainError::checkpoint(&path, e.to_string());
        let mut views = Vec::with_capacity(self.layers.len());
        for Layer { name, packed, .. } in &self.layers {
            let view = TensorView::new(Dtype::U8, vec![packed.len()], packed).map_err(bad)?;
            views.push((name, view));
        }
        let bytes = serialize(views, Some(metadata)).map_err(bad)?;
        Ok(fs::write(&path, bytes).map_err(with_path(&path))?)
    }

    /// Reads what [`Trits::save`] wrote beside a model of the same shapes as `like`;
    /// none in a checkpoint without it.
    ///
    /// # Errors
    /// A file that is cut off or belongs to another model.
    pub fn load(folder: &Path, like: &Self) -> Result<Option<Self>, TrainError> {
        let path = folder.join(FILE);
        if !path.exists() {
            return Ok(None);
        }
        let bad = |what: String| TrainError::checkpoint(&path, what);
        let bytes = fs::read(&path).map_err(with_path(&path))?;
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| bad(e.to_string()))?;
        let metadata = header.metadata().as_ref();
        let step = metadata.and_then(|m| m.get(STEP)).and_then(|s| s.parse().ok());
        let step = step.ok_or_else(|| bad("names no step".to_owned()))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| bad(e.to_string()))?;
        let mut layers = Vec::with_capacity(like.layers.len());
        for expected in &like.layers {
            let name = &expected.name;
            let found = file.tensor(name).map_err(|e| bad(format!("tensor {name}: {e}")))?;
            let (want, have) = (expected.packed.len(), found.data().len());
            if want != have {
                let what = format!("tensor {name}: expected [{want}], found [{have}]");
                return Err(bad(what));
            }
            layers.push(Layer { packed: found.data().to_vec(), ..expected.clone() });
        }
        Ok(Some(Self { step, layers }))
    }
}

fn layer(name: String, weights: Tensor<2>, scheme: WeightScheme) -> Option<Layer> {
    if scheme.quantizer == WeightQuantizer::None {
        return None;
    }
    let [_, cols] = weights.dims();
    let data = weights.into_data();
    let values = data.as_slice::<f32>().expect("parameters are f32");
    let trits = scheme.quantize(values, cols).values;
    let mut packed = vec![0; Layout::P2.row_bytes(trits.len())];
    Layout::P2.pack_row(&trits, &mut packed);
    Some(Layer { name, weights: trits.len(), packed })
}

impl Layer {
    /// Of the values -1, 0 and 1.
    fn counts(&self) -> [u64; 3] {
        let mut counts = [0u64; 3];
        for byte in &self.packed {
            // Codes 0, 1, 2: a pair of bits is 0, has its low bit, or its high bit.
            let (low, high) = (byte & 0x55, byte >> 1 & 0x55);
            counts[1] += u64::from(low.count_ones());
            counts[2] += u64::from(high.count_ones());
            counts[0] += u64::from(4 - (low | high).count_ones());
        }
        // The padding holds zeros.
        counts[1] -= (4 * self.packed.len() - self.weights) as u64;
        counts
    }

    /// Weights whose value is another one in `old`.
    fn flips(&self, old: &Self) -> u64 {
        let differ = |(a, b): (&u8, &u8)| {
            let x = a ^ b;
            u64::from(((x | x >> 1) & 0x55).count_ones())
        };
        self.packed.iter().zip(&old.packed).map(differ).sum()
    }

    fn fits(&self, other: &Self) -> bool {
        self.name == other.name && self.weights == other.weights
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bitnet_core::ModelConfig;
    use burn::tensor::Device;

    fn matrix(values: &[i8]) -> Layer {
        let mut packed = vec![0; Layout::P2.row_bytes(values.len())];
        Layout::P2.pack_row(values, &mut packed);
        Layer { name: "m".into(), weights: values.len(), packed }
    }

    #[test]
    fn counts_and_flips_are_those_of_the_values() {
        for length in [1, 63, 256, 257, 1000] {
            let a: Vec<i8> = (0..length).map(|i| (i * 7 % 5 % 3) as i8 - 1).collect();
            let b: Vec<i8> = (0..length).map(|i| (i * 11 % 7 % 3) as i8 - 1).collect();
            let count = |t: i8| a.iter().filter(|x| **x == t).count() as u64;
            assert_eq!(matrix(&a).counts(), [count(-1), count(0), count(1)]);
            let flips = a.iter().zip(&b).filter(|(x, y)| x != y).count() as u64;
            assert_eq!(matrix(&a).flips(&matrix(&b)), flips);
            assert_eq!(matrix(&a).flips(&matrix(&a)), 0);
        }
    }

    #[test]
    fn a_models_values_are_those_of_the_one_definition() {
        let config = ModelConfig::tiny();
        let model = Transformer::new(&config, 1, &Device::flex());
        let trits = Trits::of(&model, 7).unwrap();
        assert_eq!(trits.layers.len(), config.num_hidden_layers * 7);
        let name = Linear::Down.hf(1);
        let whole = model.named_tensors().into_iter().find(|t| t.name == name).unwrap();
        let (values, _) = bitnet_core::ternary::quantize_weights(&whole.data, whole.shape[1]);
        let shares = trits.shares(None);
        let down = shares.iter().find(|l| name.starts_with(&l.layer)).unwrap();
        assert_eq!(down.layer, "model.layers.1.mlp.down_proj");
        assert_eq!(down.zero, values.iter().filter(|t| **t == 0).count() as u64);
        assert_eq!(down.minus + down.zero + down.plus, down.weights);
        assert_eq!(down.flips, None);
        let twin = ModelConfig { weight_quantizer: WeightQuantizer::None, ..config };
        assert!(Trits::of(&Transformer::new(&twin, 1, &Device::flex()), 7).is_none());
    }

    #[test]
    fn what_is_saved_is_read_back_and_checked() {
        let dir = tempfile::tempdir().unwrap();
        let model = |seed| Transformer::new(&ModelConfig::tiny(), seed, &Device::flex());
        let of = |seed, step| Trits::of(&model(seed), step).unwrap();
        let (old, new) = (of(1, 50), of(2, 60));
        assert_eq!(Trits::load(dir.path(), &new).unwrap(), None);
        old.save(dir.path()).unwrap();
        let read = Trits::load(dir.path(), &new).unwrap().unwrap();
        assert_eq!((read.step(), &read), (50, &old));
        assert!(new.shares(Some(&read)).iter().all(|l| l.flips.unwrap() > l.weights / 4));
        let mut other = new.clone();
        other.layers[0].packed.pop();
        let error = Trits::load(dir.path(), &other).unwrap_err().to_string();
        assert!(error.contains("trits.safetensors: tensor model.layers.0"), "{error}");
        let path = dir.path().join(FILE);
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() / 2]).unwrap();
        let error = Trits::load(dir.path(), &new).unwrap_err();
        assert_eq!(error.exit(), bitnet_core::Exit::BadInput);
    }
}

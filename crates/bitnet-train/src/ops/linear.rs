//! The linear layers of every recipe: which operation runs for which quantisers.

use bitnet_core::quantizer::{Granularity, hadamard_block};
use bitnet_core::{ActivationQuantizer, ModelConfig, WeightQuantizer, WeightScheme, names};
use bitnet_kernels::Digits;
use burn::tensor::{Device, Tensor, TensorData};

use super::bf16;
use super::bit_linear::bit_linear;
use super::cpu::is_cpu;
use super::{mixed_linear, rotation, top_k};

/// What happens to a linear layer's weights and inputs before they are multiplied.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LinearRecipe {
    /// The quantiser of the weights.
    pub weights: WeightScheme,
    /// The quantiser of the inputs.
    pub activations: ActivationQuantizer,
    /// Whether the inputs are rotated first, in blocks (arXiv:2504.18415).
    pub rotate: bool,
    /// The share of every token's inputs that is kept, by magnitude (arXiv:2411.04965);
    /// 1: all. What is left out fades with [`Self::blend`].
    pub keep: f64,
    /// The share of the quantised in what is multiplied: `w + blend · (Q(w) - w)`,
    /// and the same for the inputs. 1 is the recipe, 0 its float form; between
    /// them lies the way from a float model to a ternary one (arXiv:2502.11895).
    pub blend: f32,
    /// What the gradients of an integer product are computed with, on the CPU.
    pub gradients: Gradients,
    /// Whether products of floats, gradients among them, are in bf16. On GPUs.
    pub bf16: bool,
}

/// What the products of the backward pass are computed with, where those of the forward
/// pass are integer ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gradients {
    /// Integers with so many digits; none: floats, chains of fused multiply-adds.
    pub digits: Option<Digits>,
    /// Whether the gradients of the inputs are products with int8 (SwitchBack,
    /// arXiv:2304.13013) instead.
    pub int8_inputs: bool,
}

impl Gradients {
    /// Floats.
    pub const FLOAT: Self = Self { digits: None, int8_inputs: false };
}

impl LinearRecipe {
    /// Nothing is quantised.
    const FLOAT: Self = Self {
        weights: WeightScheme { quantizer: WeightQuantizer::None, ..WeightScheme::B158 },
        activations: ActivationQuantizer::None,
        rotate: false,
        keep: 1.0,
        blend: 1.0,
        gradients: Gradients::FLOAT,
        bf16: false,
    };

    /// That of a layer of a model.
    #[must_use]
    pub fn new(config: &ModelConfig, linear: names::Linear) -> Self {
        Self {
            weights: config.weight_scheme(),
            activations: config.activations(linear),
            rotate: config.rotates(linear),
            keep: config.keeps(linear),
            blend: 1.0,
            gradients: Gradients::FLOAT,
            bf16: false,
        }
    }

    /// Nothing is quantised.
    pub(crate) fn is_float(&self) -> bool {
        let none = self.weights.quantizer == WeightQuantizer::None;
        self.blend == 0.0 || none && self.activations == ActivationQuantizer::None
    }

    /// Whether some inputs are left out.
    pub(crate) fn sparsifies(&self) -> bool {
        self.keep < 1.0 && self.blend > 0.0
    }

    /// Integers are multiplied and one scale applied: what the engine computes.
    pub(crate) fn is_integer(&self) -> bool {
        self.blend == 1.0
            && self.weights.quantizer != WeightQuantizer::None
            && self.weights.granularity == Granularity::Tensor
            && self.activations == ActivationQuantizer::Int8
    }
}

/// A linear layer of any recipe, without bias.
///
/// # Shapes
/// `x` is `[tokens, K]`, `weight` the master weights `[N, K]`, the result
/// `[tokens, N]`.
///
/// # Gradients
/// Straight-through (arXiv:1308.3432): those of the product of what was multiplied,
/// handed to `x` (rotated back, and also where it was left out) and `weight` unchanged.
pub fn quantized_linear(x: Tensor<2>, weight: Tensor<2>, recipe: LinearRecipe) -> Tensor<2> {
    let x = prepared(x, recipe);
    if recipe.is_float() {
        // Nothing of the recipe is left, on the CPU in the order of its products.
        let float = LinearRecipe { bf16: recipe.bf16, ..LinearRecipe::FLOAT };
        return mixed_linear::mixed_linear(x, weight, float);
    }
    if recipe.is_integer() {
        return bit_linear(x, weight, recipe);
    }
    mixed_linear::mixed_linear(x, weight, recipe)
}

/// The inputs, rotated and without those that are left out.
fn prepared(x: Tensor<2>, recipe: LinearRecipe) -> Tensor<2> {
    let x = if recipe.rotate { rotation::rotate(x) } else { x };
    if recipe.sparsifies() { top_k::sparsify(x, recipe.keep, recipe.blend) } else { x }
}

/// Several linear layers of one recipe that read one input, as [`quantized_linear`].
pub(super) fn quantized_linears<const N: usize>(
    x: Tensor<2>,
    weights: [Tensor<2>; N],
    recipe: LinearRecipe,
) -> [Tensor<2>; N] {
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    if super::gpu::is_gpu(&x.device()) && super::gpu::computes(recipe) {
        return super::gpu::bit_linears(&prepared(x, recipe), weights, recipe);
    }
    weights.map(|weight| quantized_linear(x.clone(), weight, recipe))
}

/// The same with tensor operations.
pub fn plain(x: Tensor<2>, weight: Tensor<2>, recipe: LinearRecipe) -> Tensor<2> {
    let x = if recipe.rotate { rotation::plain(x) } else { x };
    let x = if recipe.sparsifies() { top_k::plain(x, recipe.keep, recipe.blend) } else { x };
    if recipe.is_float() {
        return bf16::matmul(x, weight.transpose(), recipe.bf16);
    }
    if recipe.is_integer() {
        return super::bit_linear::plain(x, weight, recipe);
    }
    mixed_linear::plain(x, weight, recipe)
}

/// The linear layer of the float twin: `x · weightᵀ`, nothing quantised.
///
/// # Shapes
/// As [`quantized_linear`].
pub fn linear(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    x.matmul(weight.transpose())
}

/// The Hadamard matrix of a row's blocks, `[block, block]`.
pub(super) fn hadamard_matrix(cols: usize, device: &Device) -> Tensor<2> {
    let block = hadamard_block(cols);
    let factor = 1.0 / (block as f32).sqrt();
    let odd = |i: usize| !((i / block) & (i % block)).count_ones().is_multiple_of(2);
    let sign = |i: usize| if odd(i) { -1.0 } else { 1.0 };
    let values: Vec<f32> = (0..block * block).map(|i| sign(i) * factor).collect();
    Tensor::from_data(TensorData::new(values, [block, block]), device)
}

/// Whether a device's memory is the host's.
pub(super) fn on_host(device: &Device) -> bool {
    #[cfg(feature = "ndarray")]
    {
        use super::cpu::InnerMost;
        if device.clone().inner_most() == Device::ndarray() {
            return true;
        }
    }
    is_cpu(device)
}

//! The operations that GPUs run as kernels of their own, through burn's CubeCL backend
//! (wgpu and CUDA alike), each with its backward pass.
//!
//! What matters there is how often a tensor goes through memory and how many kernels a
//! step launches: the plain versions take about ten kernels to quantise a matrix of
//! activations and keep as many results for autodiff. Here a row is read once, and kept
//! is what the backward pass reads. Matrix products are burn's, autotuned; integers are
//! multiplied as floats, whose sums are exact below 2^24.
//!
//! The plain versions remain the fallback (other recipes, soft targets) and the
//! reference that tests compare with.

mod adamw;
mod attention;
mod gated;
mod head;
mod linear;
mod norm;
mod reduce;
#[cfg(all(test, feature = "wgpu"))]
mod tests;

use std::fmt;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::ops::FloatTensorOps;
use burn::backend::{
    Autodiff, BackendTensor, Cube, DispatchKindConversion, DispatchTensor, TensorMetadata,
};
use burn::tensor::{DType, Device, FloatDType, Shape, Tensor};
use burn_cubecl::cubecl::prelude::{CubeCount, CubeDim};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;

pub(crate) use adamw::step as adamw_step;
pub(super) use attention::attention;
pub(super) use gated::gated;
pub(super) use head::language_loss;
pub(super) use linear::{bit_linears, computes};
pub(super) use norm::rms_norm;

/// Whether a tensor lives where these operations run.
pub(crate) fn is_gpu(device: &Device) -> bool {
    !super::linear::on_host(device)
}

/// An operation over f32 tensors with `N` inputs and one output. Inputs and gradients
/// are contiguous.
pub(super) trait GpuOp<const N: usize>: fmt::Debug + Clone + Send + Sync + 'static {
    /// What the backward pass needs of the forward pass.
    type Saved: fmt::Debug + Clone + Send + 'static;

    /// The output, and what to save where `track` says a gradient will be asked for.
    fn forward(&self, inputs: [CubeTensor; N], track: bool) -> (CubeTensor, Option<Self::Saved>);

    /// The gradients of the inputs that are `wanted`, from that of the output.
    fn backward(
        &self,
        saved: Self::Saved,
        grad: CubeTensor,
        wanted: [bool; N],
    ) -> [Option<CubeTensor>; N];
}

/// The step that burn's graph calls in the backward pass.
#[derive(Debug, Clone)]
struct Step<O>(O);

impl<const N: usize, O: GpuOp<N>> Backward<Cube, N> for Step<O> {
    type State = (O::Saved, [Shape; N]);

    fn backward(
        self,
        ops: Ops<Self::State, N>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let grad = into_contiguous(grads.consume::<Cube>(&ops.node));
        let wanted = ops.parents.each_ref().map(Option::is_some);
        let (saved, shapes) = ops.state;
        let inputs = self.0.backward(saved, grad, wanted);
        for ((parent, grad), shape) in ops.parents.into_iter().zip(inputs).zip(shapes) {
            if let (Some(parent), Some(grad)) = (parent, grad) {
                grads.register::<Cube>(parent.id, Cube::float_reshape(grad, shape));
            }
        }
    }
}

/// Runs an operation on tensors of a GPU.
///
/// # Panics
/// If the tensors are not on a GPU, or some are on its autodiff device and some are not.
pub(super) fn apply<const N: usize, const D: usize, O: GpuOp<N>>(
    op: O,
    inputs: [DispatchTensor; N],
    autodiff: bool,
) -> Tensor<D> {
    if !autodiff {
        let inputs = inputs.map(|t| contiguous(primitive(t)));
        let output: BackendTensor<Cube> = BackendTensor::Float(op.forward(inputs, false).0);
        return Tensor::from_dispatch(DispatchTensor::from_backend(output));
    }
    let tensors = inputs.map(|t| {
        <DispatchTensor as DispatchKindConversion<Autodiff<Cube>>>::try_into_backend(t)
            .unwrap_or_else(|e| panic!("operation of a GPU: {e}"))
            .float()
    });
    let shapes = tensors.each_ref().map(|t| t.primitive().shape());
    let nodes = tensors.each_ref().map(|t| t.node());
    let primitives = tensors.map(|t| contiguous(t.into_primitive()));
    let prepared = Step(op.clone()).prepare::<NoCheckpointing>(nodes).compute_bound().stateful();
    let output = match prepared {
        OpsKind::Tracked(prep) => {
            let (output, saved) = op.forward(primitives, true);
            let Some(saved) = saved else { unreachable!("a tracked operation saves its state") };
            prep.finish((saved, shapes), output)
        }
        OpsKind::UnTracked(prep) => prep.finish(op.forward(primitives, false).0),
    };
    let output: BackendTensor<Autodiff<Cube>> = BackendTensor::Float(output);
    Tensor::from_dispatch(DispatchTensor::from_backend(output))
}

/// A float tensor of a GPU without autodiff.
fn primitive(tensor: DispatchTensor) -> CubeTensor {
    <DispatchTensor as DispatchKindConversion<Cube>>::try_into_backend(tensor)
        .unwrap_or_else(|e| panic!("operation of a GPU: {e}"))
        .float()
}

fn contiguous(tensor: CubeTensor) -> CubeTensor {
    assert_eq!(tensor.dtype, DType::F32, "operations of a GPU take f32");
    into_contiguous(tensor)
}

/// Room for f32 values on the device of `like`.
fn empty<const D: usize>(like: &CubeTensor, shape: [usize; D]) -> CubeTensor {
    let (client, device) = (like.client.clone(), like.device.clone());
    empty_device_contiguous_dtype(client, device, Shape::from(shape), DType::F32)
}

/// Rows and columns of a matrix.
fn dims(tensor: &CubeTensor) -> [usize; 2] {
    tensor.shape().dims()
}

/// A count as kernels take it.
fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or_else(|_| panic!("{n} is too much for one launch on a GPU"))
}

/// What every device takes along one axis.
const CUBES: usize = 32_768;

/// How a kernel is launched whose cubes take row after row of `cols` columns: so many
/// cubes, and a power of two of units that have a few columns each.
fn by_row(like: &CubeTensor, rows: usize, cols: usize) -> (CubeCount, CubeDim, u32) {
    // Kernels number elements in 32 bits: more would be read from a wrong place.
    assert!(u32::try_from(rows * cols).is_ok(), "[{rows}, {cols}] is too much for one launch");
    let wanted = count(cols.div_ceil(4)).next_power_of_two().clamp(32, 256);
    let units = wanted.min(most_units(like));
    (CubeCount::Static(count(rows.clamp(1, CUBES)), 1, 1), CubeDim::new_1d(units), units)
}

/// The same where every unit takes one element after another.
fn by_element(like: &CubeTensor, elements: usize) -> (CubeCount, CubeDim) {
    let units = most_units(like).min(256);
    let cubes = elements.div_ceil(units as usize).clamp(1, CUBES);
    (CubeCount::Static(count(cubes), 1, 1), CubeDim::new_1d(units))
}

/// The most units of a cube, a power of two.
fn most_units(like: &CubeTensor) -> u32 {
    1 << like.client.properties().hardware.max_units_per_cube.max(1).ilog2()
}

/// `a · b`, in bf16 where `bf16` says so, the result in f32.
fn matmul(a: CubeTensor, b: CubeTensor, bf16: bool) -> CubeTensor {
    if !bf16 {
        return Cube::float_matmul(a, b);
    }
    let product = Cube::float_matmul(low(a), low(b));
    Cube::float_cast(product, FloatDType::F32)
}

/// In bf16.
fn low(t: CubeTensor) -> CubeTensor {
    if t.dtype == DType::BF16 { t } else { Cube::float_cast(t, FloatDType::BF16) }
}

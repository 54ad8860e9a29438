//! How a fused operation joins burn's graph: slices in, slices out, on the CPU
//! device (burn-flex), with autodiff or without.

use std::fmt;
use std::sync::{Arc, OnceLock};

use bitnet_kernels::Kernels;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::{FlexTensor, Layout};
use burn::backend::{
    Autodiff, BackendTensor, DispatchKindConversion, DispatchTensor, Flex, TensorMetadata,
};
use burn::tensor::{Bytes, DType, Device, Shape, Tensor};

use super::scratch;

/// The kernels of this machine, chosen once (`BITNET_ISA` forces a path; an
/// unusable name was refused when the program started).
pub(crate) fn kernels() -> Kernels {
    static KERNELS: OnceLock<Kernels> = OnceLock::new();
    *KERNELS.get_or_init(|| Kernels::from_env().unwrap_or_else(|_| Kernels::detect()))
}

/// Whether a tensor lives where the fused operations run.
pub(crate) fn is_cpu(device: &Device) -> bool {
    device.clone().inner_most() == Device::flex()
}

/// A device without autodiff.
pub(crate) trait InnerMost {
    /// The device that computes.
    fn inner_most(self) -> Device;
}

impl InnerMost for Device {
    fn inner_most(self) -> Device {
        if self.is_autodiff() { self.inner() } else { self }
    }
}

/// A contiguous f32 tensor that shares its storage with burn's.
#[derive(Debug, Clone)]
pub(crate) struct Buffer(FlexTensor);

impl Buffer {
    fn contiguous(tensor: FlexTensor) -> Self {
        assert_eq!(tensor.dtype(), DType::F32, "fused operations take f32");
        let as_is = tensor.is_contiguous() && tensor.layout().start_offset() == 0;
        Self(if as_is { tensor } else { tensor.to_contiguous() })
    }

    /// That of a tensor on the CPU device without autodiff.
    ///
    /// # Panics
    /// If it is on another device.
    pub(crate) fn of<const D: usize>(tensor: Tensor<D>) -> Self {
        Self::contiguous(plain_primitive(tensor.into_dispatch()))
    }

    /// The elements.
    pub(crate) fn data(&self) -> &[f32] {
        &self.0.storage::<f32>()[..self.0.layout().num_elements()]
    }
}

/// The memory of the last of its owners waits to be used again.
impl Drop for Buffer {
    fn drop(&mut self) {
        let all = self.0.bytes().len() == self.0.layout().num_elements() * size_of::<f32>();
        if !(all && self.0.is_unique()) {
            return;
        }
        let tensor = std::mem::replace(&mut self.0, FlexTensor::empty([0].into(), DType::F32));
        let (bytes, _, _) = tensor.into_data().into_parts();
        if let Ok(values) = bytes.try_into_vec::<f32>() {
            scratch::give(values);
        }
    }
}

fn flex(data: Vec<f32>, shape: Shape) -> FlexTensor {
    FlexTensor::new(Bytes::from_elems(data), Layout::contiguous(shape), DType::F32)
}

/// An operation over f32 slices with `N` inputs and one output.
pub(crate) trait CpuOp<const N: usize>: fmt::Debug + Clone + Send + Sync + 'static {
    /// What the backward pass needs of the forward pass.
    type Saved: Send + Sync + 'static;

    /// Whether the gradient of the only input is that of the output.
    const PASSES: bool = false;

    /// The output, and what to save where `track` says a gradient will be asked for.
    fn forward(&self, inputs: [Buffer; N], track: bool) -> (Vec<f32>, Option<Self::Saved>);

    /// The gradients of the inputs that are `wanted`, from that of the output.
    fn backward(
        &self,
        saved: &Self::Saved,
        grad: &[f32],
        wanted: [bool; N],
    ) -> [Option<Vec<f32>>; N];

    /// The same where nothing else needs what was saved.
    fn last_backward(
        &self,
        saved: Self::Saved,
        grad: &[f32],
        wanted: [bool; N],
    ) -> [Option<Vec<f32>>; N] {
        self.backward(&saved, grad, wanted)
    }
}

/// The saved state in burn's graph, which wants it cloneable and printable.
struct State<S, const N: usize> {
    saved: Arc<S>,
    shapes: [Shape; N],
}

impl<S, const N: usize> Clone for State<S, N> {
    fn clone(&self) -> Self {
        Self { saved: Arc::clone(&self.saved), shapes: self.shapes.clone() }
    }
}

impl<S, const N: usize> fmt::Debug for State<S, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State").field("shapes", &self.shapes).finish_non_exhaustive()
    }
}

/// The step that burn's graph calls in the backward pass.
#[derive(Debug, Clone)]
struct Step<O>(O);

impl<const N: usize, O: CpuOp<N>> Backward<Flex, N> for Step<O> {
    type State = State<O::Saved, N>;

    fn backward(
        self,
        ops: Ops<Self::State, N>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let grad = grads.consume::<Flex>(&ops.node);
        if O::PASSES {
            if let Some(Some(parent)) = ops.parents.into_iter().next() {
                grads.register::<Flex>(parent.id, grad);
            }
            return;
        }
        let grad = Buffer::contiguous(grad);
        let wanted = ops.parents.each_ref().map(Option::is_some);
        let State { saved, shapes } = ops.state;
        let inputs = match Arc::try_unwrap(saved) {
            Ok(saved) => self.0.last_backward(saved, grad.data(), wanted),
            Err(saved) => self.0.backward(&saved, grad.data(), wanted),
        };
        let parents = ops.parents.into_iter().zip(inputs).zip(shapes);
        for ((parent, grad), shape) in parents {
            if let (Some(parent), Some(grad)) = (parent, grad) {
                grads.register::<Flex>(parent.id, flex(grad, shape));
            }
        }
    }
}

/// Runs a fused operation on tensors of the CPU device.
///
/// # Panics
/// If the tensors are not on the CPU device, or some are on its autodiff device
/// and some are not.
pub(crate) fn apply<const N: usize, const D: usize, O: CpuOp<N>>(
    op: O,
    inputs: [DispatchTensor; N],
    autodiff: bool,
    shape: [usize; D],
) -> Tensor<D> {
    let shape = Shape::from(shape);
    if !autodiff {
        let inputs = inputs.map(|t| Buffer::contiguous(plain_primitive(t)));
        let (output, _) = op.forward(inputs, false);
        let output: BackendTensor<Flex> = BackendTensor::Float(flex(output, shape));
        return Tensor::from_dispatch(DispatchTensor::from_backend(output));
    }
    let tensors = inputs.map(|t| {
        let tensor =
            <DispatchTensor as DispatchKindConversion<Autodiff<Flex>>>::try_into_backend(t)
                .unwrap_or_else(|e| panic!("fused operation: {e}"));
        tensor.float()
    });
    let shapes = tensors.each_ref().map(|t| t.primitive().shape());
    let nodes = tensors.each_ref().map(|t| t.node());
    let buffers = tensors.map(|t| Buffer::contiguous(t.into_primitive()));
    let prepared = Step(op.clone()).prepare::<NoCheckpointing>(nodes).compute_bound().stateful();
    let output = match prepared {
        OpsKind::Tracked(prep) => {
            let (output, saved) = op.forward(buffers, true);
            let Some(saved) = saved else { unreachable!("a tracked operation saves its state") };
            let state = State { saved: Arc::new(saved), shapes };
            prep.finish(state, flex(output, shape))
        }
        OpsKind::UnTracked(prep) => prep.finish(flex(op.forward(buffers, false).0, shape)),
    };
    let output: BackendTensor<Autodiff<Flex>> = BackendTensor::Float(output);
    Tensor::from_dispatch(DispatchTensor::from_backend(output))
}

fn plain_primitive(tensor: DispatchTensor) -> FlexTensor {
    <DispatchTensor as DispatchKindConversion<Flex>>::try_into_backend(tensor)
        .unwrap_or_else(|e| panic!("fused operation: {e}"))
        .float()
}

/// Adds equally long partial sums in their order.
pub(crate) fn sum_in_order(partials: Vec<Vec<f32>>) -> Vec<f32> {
    let mut partials = partials.into_iter();
    let mut total = partials.next().unwrap_or_default();
    for part in partials {
        kernels().add_assign(&mut total, &part);
    }
    total
}

#[cfg(test)]
pub(crate) mod testing {
    //! Comparison of a fused operation with its plain version.

    use burn::tensor::{Device, Tensor, TensorData};
    use rand::{RngExt, SeedableRng};

    /// Uniform values in `-scale..scale`.
    pub(crate) fn random(shape: [usize; 2], scale: f32, seed: u64) -> TensorData {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        let n = shape[0] * shape[1];
        let data: Vec<f32> = (0..n).map(|_| rng.random_range(-scale..scale)).collect();
        TensorData::new(data, shape)
    }

    fn run<const N: usize>(
        device: &Device,
        inputs: &[TensorData; N],
        f: impl Fn([Tensor<2>; N]) -> Tensor<2>,
    ) -> Vec<Vec<f32>> {
        let device = device.clone().autodiff();
        let leaves =
            inputs.clone().map(|data| Tensor::<2>::from_data(data, &device).require_grad());
        let out = f(leaves.clone());
        // A gradient that differs in every element.
        let shape = out.dims();
        let weights = Tensor::<2>::from_data(random(shape, 1.0, 99), &device);
        let grads = (out.clone() * weights).sum().backward();
        let mut all = vec![to_vec(out.inner())];
        all.extend(leaves.iter().map(|leaf| leaf.grad(&grads).map(to_vec).unwrap()));
        all
    }

    pub(crate) fn to_vec<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
        tensor.into_data().try_into_vec::<f32>().unwrap()
    }

    /// Value and all gradients agree within `bound`, relative to the largest
    /// magnitude of each.
    pub(crate) fn check_gradients<const N: usize>(
        inputs: [TensorData; N],
        fused: impl Fn([Tensor<2>; N]) -> Tensor<2>,
        plain: impl Fn([Tensor<2>; N]) -> Tensor<2>,
        bound: f32,
    ) {
        check_gradients_on(&Device::flex(), inputs, fused, plain, bound);
    }

    /// The same with the fused operation on another device.
    pub(crate) fn check_gradients_on<const N: usize>(
        device: &Device,
        inputs: [TensorData; N],
        fused: impl Fn([Tensor<2>; N]) -> Tensor<2>,
        plain: impl Fn([Tensor<2>; N]) -> Tensor<2>,
        bound: f32,
    ) {
        let (fused, plain) = (run(device, &inputs, fused), run(&Device::flex(), &inputs, plain));
        for (i, (a, b)) in fused.iter().zip(&plain).enumerate() {
            let size = b.iter().fold(1e-3f32, |m, v| m.max(v.abs()));
            for (at, (a, b)) in a.iter().zip(b).enumerate() {
                let error = (a - b).abs() / size;
                assert!(error <= bound, "output or gradient {i}, element {at}: {a} and {b}");
            }
        }
    }
}

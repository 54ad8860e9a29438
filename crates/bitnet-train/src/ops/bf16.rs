//! Matrix products in bf16, on the devices that compute in it (`precision = "bf16"`).
//!
//! A float product rounds its operands to bf16, and so does its backward pass, because
//! autodiff takes the gradients of the casts too. A product of quantised operands does
//! not: its sums are integers up to 127 · K, which 8 bits do not hold, and bf16 matrices
//! have bf16 results. It stays in f32 forward; its gradients, which are float products,
//! are computed in bf16.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{
    Autodiff, Backend, BackendTensor, DispatchKindConversion, DispatchTensor, Flex,
};
use burn::tensor::{FloatDType, Tensor};

use super::cpu::is_cpu;

/// `a · b` of floats: in bf16 where `bf16` says so, the result as f32.
pub(super) fn matmul<const D: usize>(a: Tensor<D>, b: Tensor<D>, bf16: bool) -> Tensor<D> {
    if !bf16 {
        return a.matmul(b);
    }
    a.cast(FloatDType::BF16).matmul(b.cast(FloatDType::BF16)).cast(FloatDType::F32)
}

/// `a · b` of quantised operands: always in f32, its gradients as `bf16` says.
///
/// # Shapes
/// `a` is `[M, K]`, `b` `[K, N]`, the result `[M, N]`.
pub(super) fn exact_matmul(a: Tensor<2>, b: Tensor<2>, bf16: bool) -> Tensor<2> {
    let device = a.device();
    if !bf16 || !device.is_autodiff() {
        return a.matmul(b);
    }
    if is_cpu(&device) {
        return tracked::<Flex>(a, b);
    }
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    return tracked::<burn::backend::Cube>(a, b);
    #[cfg(not(any(feature = "wgpu", feature = "cuda")))]
    a.matmul(b)
}

/// A product that is exact forward and bf16 backward.
#[derive(Debug, Clone)]
struct Product;

impl<B: Backend> Backward<B, 2> for Product {
    /// Both operands in bf16.
    type State = (FloatTensor<B>, FloatTensor<B>);

    fn backward(
        self,
        ops: Ops<Self::State, 2>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let grad = B::float_cast(grads.consume::<B>(&ops.node), FloatDType::BF16);
        let ([a, b], (left, right)) = (ops.parents, ops.state);
        if let Some(a) = a {
            let product = B::float_matmul(grad.clone(), B::float_transpose(right));
            grads.register::<B>(a.id, B::float_cast(product, FloatDType::F32));
        }
        if let Some(b) = b {
            let product = B::float_matmul(B::float_transpose(left), grad);
            grads.register::<B>(b.id, B::float_cast(product, FloatDType::F32));
        }
    }
}

/// [`Product`] on the backend `B` with autodiff.
fn tracked<B: Backend>(a: Tensor<2>, b: Tensor<2>) -> Tensor<2>
where
    DispatchTensor: DispatchKindConversion<Autodiff<B>>,
{
    let [a, b] = [a, b].map(|t| {
        <DispatchTensor as DispatchKindConversion<Autodiff<B>>>::try_into_backend(t.into_dispatch())
            .unwrap_or_else(|e| panic!("product in bf16: {e}"))
            .float()
    });
    let nodes = [a.node(), b.node()];
    let (a, b) = (a.into_primitive(), b.into_primitive());
    let prepared = Product.prepare::<NoCheckpointing>(nodes).compute_bound().stateful();
    let output = match prepared {
        OpsKind::Tracked(prep) => {
            let low = |t: &FloatTensor<B>| B::float_cast(t.clone(), FloatDType::BF16);
            let state = (low(&a), low(&b));
            prep.finish(state, B::float_matmul(a, b))
        }
        OpsKind::UnTracked(prep) => prep.finish(B::float_matmul(a, b)),
    };
    let output: BackendTensor<Autodiff<B>> = BackendTensor::Float(output);
    Tensor::from_dispatch(DispatchTensor::from_backend(output))
}

#[cfg(test)]
mod tests {
    use bitnet_core::WeightScheme;
    use burn::tensor::{Device, TensorData};
    use half::bf16;

    use super::*;
    use crate::ops::cpu::testing::{random, to_vec};
    use crate::ops::products::testing::recipes;
    use crate::ops::{LinearRecipe, plain};

    fn rounded(data: &TensorData) -> Vec<f32> {
        let values = data.try_to_vec::<f32>().unwrap();
        values.into_iter().map(|x| bf16::from_f32(x).to_f32()).collect()
    }

    /// Output and both gradients of a product.
    fn run(
        a: &TensorData,
        b: &TensorData,
        f: impl Fn(Tensor<2>, Tensor<2>) -> Tensor<2>,
    ) -> [Vec<f32>; 3] {
        let device = Device::flex().autodiff();
        let [a, b] = [a, b].map(|d| Tensor::<2>::from_data(d.clone(), &device).require_grad());
        let out = f(a.clone(), b.clone());
        let upstream = Tensor::<2>::from_data(random(out.dims(), 1.0, 9), &device);
        let gradients = (out.clone() * upstream).sum().backward();
        [out.inner(), a.grad(&gradients).unwrap(), b.grad(&gradients).unwrap()].map(to_vec)
    }

    /// Relative to the largest: a bf16 has 8 bits.
    fn near(got: &[f32], want: &[f32]) -> bool {
        let size = want.iter().fold(1e-6f32, |m, v| m.max(v.abs()));
        got.iter().zip(want).all(|(a, b)| (a - b).abs() <= size / 128.0)
    }

    #[test]
    fn a_float_product_is_that_of_rounded_operands() {
        let (m, k, n) = (5, 40, 7);
        let (a, b) = (random([m, k], 2.0, 1), random([k, n], 1.0, 2));
        let (x, y) = (rounded(&a), rounded(&b));
        let low = run(&a, &b, |a, b| matmul(a, b, true));
        for (i, got) in low[0].iter().enumerate() {
            let products =
                (0..k).map(|j| f64::from(x[i / n * k + j]) * f64::from(y[j * n + i % n]));
            let want: f64 = products.sum();
            // The sum of rounded operands, rounded once more.
            assert!((f64::from(*got) - want).abs() <= 4e-3 * want.abs() + 1e-3, "{got}, {want}");
            assert_eq!(*got, bf16::from_f32(*got).to_f32());
        }
        let full = run(&a, &b, |a, b| matmul(a, b, false));
        for (low, full) in low.iter().zip(&full) {
            assert!(low != full && near(low, full));
        }
    }

    /// What a packed model computes is what training computed: the ternary product is the
    /// same bits in both precisions, and only its gradients are rounded.
    #[test]
    fn the_ternary_product_stays_exact() {
        let (tokens, rows, cols) = (6, 5, 300);
        let (x, w) = (random([tokens, cols], 3.0, 7), random([rows, cols], 0.05, 8));
        for weights in [WeightScheme::B158, recipes()[1].weights] {
            let of = |bf16| LinearRecipe { weights, bf16, ..recipes()[0] };
            let low = run(&x, &w, |x, w| plain::quantized_linear(x, w, of(true)));
            let full = run(&x, &w, |x, w| plain::quantized_linear(x, w, of(false)));
            let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&low[0]), bits(&full[0]));
            // Sums that bf16 could not hold.
            assert!(full[0].iter().any(|x| *x != bf16::from_f32(*x).to_f32()));
            for (low, full) in low.iter().zip(&full).skip(1) {
                assert!(low != full && near(low, full));
            }
        }
        // So it is without a graph, and for operands whose product is one of floats.
        let device = Device::flex();
        let recipe = LinearRecipe { blend: 0.5, ..recipes()[0] };
        for recipe in [recipe, recipes()[0]] {
            let out = |bf16| {
                let [x, w] = [&x, &w].map(|d| Tensor::<2>::from_data(d.clone(), &device));
                to_vec(plain::quantized_linear(x, w, LinearRecipe { bf16, ..recipe }))
            };
            assert_eq!(out(true), out(false));
        }
    }
}

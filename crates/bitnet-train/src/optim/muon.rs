//! Muon (Jordan et al., "Muon: An optimizer for hidden layers in neural networks",
//! 2024): the momentum of a matrix, brought near the nearest orthogonal matrix by
//! five Newton-Schulz steps, so that the update is equally long in every direction.
//!
//! With the momentum M and the gradient G of a matrix `[N, K]`:
//!
//! ```text
//! M ← momentum · M + G              U = G + momentum · M     (Nesterov)
//! O = newton_schulz(U)
//! W ← W · (1 - lr · weight_decay) - lr · 0.2 · √max(N, K) · O
//! ```
//!
//! The factor gives an update the root mean square of AdamW's, about 0.2, so that
//! both take the same rates (Moonshot AI, arXiv:2502.16982, section 2.2).
//!
//! On the host the products are the fixed-size blocks of [`matmul`] in f32: the
//! same bits with any number of threads. Elsewhere they are tensor operations.

use bitnet_kernels::MatRef;
use burn::tensor::Tensor;
use rayon::prelude::*;

use super::{CHUNK, OptimizerConfig, slice, slice_mut, sum_of_squares, take};
use crate::ops::products::matmul;
use crate::schedule::Rates;

/// Newton-Schulz steps.
const STEPS: usize = 5;

/// Jordan's polynomial, `a·x + b·x³ + c·x⁵` of every singular value: it takes
/// those above a hundredth or so into 0.7..1.2, fast rather than exactly.
const A: f32 = 3.4445;
const B: f32 = -4.7750;
const C: f32 = 2.0315;

/// Added to the norm that a matrix is divided by.
const EPSILON: f32 = 1e-7;

/// What is kept of a matrix.
#[derive(Debug)]
pub(super) struct Momentum {
    /// M, flat.
    pub(super) buffer: Tensor<1>,
    /// `[N, K]`.
    pub(super) shape: [usize; 2],
}

/// The constants of one step of a matrix.
#[derive(Debug, Clone, Copy)]
pub(super) struct Update {
    shape: [usize; 2],
    momentum: f32,
    /// Takes the sum of gradients to their clipped mean.
    scale: f32,
    /// `1 - lr · weight_decay`.
    keep: f32,
    /// `lr · 0.2 · √max(N, K)`.
    rate: f32,
}

impl Update {
    /// The constants for a matrix `[N, K]` whose gradients are to be multiplied by
    /// `scale`.
    pub(super) fn new(
        config: &OptimizerConfig,
        rates: Rates,
        shape: [usize; 2],
        scale: f64,
    ) -> Self {
        let longest = shape[0].max(shape[1]) as f64;
        Self {
            shape,
            momentum: config.momentum.unwrap_or(0.0) as f32,
            scale: scale as f32,
            keep: (1.0 - rates.lr * rates.weight_decay) as f32,
            rate: (rates.lr * 0.2 * longest.sqrt()) as f32,
        }
    }

    /// `host`: the tensors lie in host memory. All are the flat matrix.
    pub(super) fn apply(
        &self,
        host: bool,
        p: Tensor<1>,
        g: Tensor<1>,
        momentum: &mut Tensor<1>,
    ) -> Tensor<1> {
        if host { self.apply_host(p, g, momentum) } else { self.apply_tensors(p, g, momentum) }
    }

    fn apply_host(&self, p: Tensor<1>, g: Tensor<1>, momentum: &mut Tensor<1>) -> Tensor<1> {
        let device = momentum.device();
        let mut u = g.into_data();
        let mut m = take(momentum, &device);
        slice_mut(&mut u)
            .par_chunks_mut(CHUNK)
            .zip(slice_mut(&mut m).par_chunks_mut(CHUNK))
            .for_each(|(u, m)| {
                for (u, m) in u.iter_mut().zip(m) {
                    let g = *u * self.scale;
                    *m = *m * self.momentum + g;
                    *u = g + *m * self.momentum;
                }
            });
        *momentum = Tensor::from_data(m, &device);
        newton_schulz(slice_mut(&mut u), self.shape);
        let mut p = p.into_data();
        slice_mut(&mut p).par_chunks_mut(CHUNK).zip(slice(&u).par_chunks(CHUNK)).for_each(
            |(p, o)| {
                for (p, o) in p.iter_mut().zip(o) {
                    *p = *p * self.keep - self.rate * *o;
                }
            },
        );
        Tensor::from_data(p, &device)
    }

    /// The same in tensor operations, on the device.
    fn apply_tensors(&self, p: Tensor<1>, g: Tensor<1>, momentum: &mut Tensor<1>) -> Tensor<1> {
        let g = g.mul_scalar(self.scale);
        let m = momentum.clone().mul_scalar(self.momentum).add(g.clone());
        let u = g.add(m.clone().mul_scalar(self.momentum));
        *momentum = m;
        let o = newton_schulz_tensors(u.reshape(self.shape)).reshape([-1]);
        p.mul_scalar(self.keep).sub(o.mul_scalar(self.rate))
    }
}

/// Replaces a matrix `[N, K]` by one with the same singular vectors and singular
/// values near 1.
fn newton_schulz(x: &mut [f32], [rows, cols]: [usize; 2]) {
    let inv_norm = 1.0 / (sum_of_squares(x).sqrt() as f32 + EPSILON);
    x.par_chunks_mut(CHUNK).for_each(|x| x.iter_mut().for_each(|x| *x *= inv_norm));
    for _ in 0..STEPS {
        let view = MatRef::new(x, rows, cols, cols);
        // The smaller of X·Xᵀ and Xᵀ·X, [S, S].
        let wide = rows <= cols;
        let size = rows.min(cols);
        let gram = if wide { matmul(view, view.t()) } else { matmul(view.t(), view) };
        let g = MatRef::new(&gram, size, size, size);
        let mut poly = matmul(g, g);
        poly.par_chunks_mut(CHUNK).zip(gram.par_chunks(CHUNK)).for_each(|(poly, gram)| {
            for (p, g) in poly.iter_mut().zip(gram) {
                *p = B * g + C * *p;
            }
        });
        let p = MatRef::new(&poly, size, size, size);
        let product = if wide { matmul(p, view) } else { matmul(view, p) };
        x.par_chunks_mut(CHUNK).zip(product.par_chunks(CHUNK)).for_each(|(x, product)| {
            for (x, p) in x.iter_mut().zip(product) {
                *x = A * *x + p;
            }
        });
    }
}

/// The same in tensor operations.
fn newton_schulz_tensors(x: Tensor<2>) -> Tensor<2> {
    let [rows, cols] = x.dims();
    let norm = x.clone().square().sum().sqrt().add_scalar(EPSILON);
    let x = x.div(norm.reshape([1, 1]));
    let wide = rows <= cols;
    let mut x = if wide { x } else { x.transpose() };
    for _ in 0..STEPS {
        let gram = x.clone().matmul(x.clone().transpose());
        let square = gram.clone().matmul(gram.clone());
        let poly = gram.mul_scalar(B).add(square.mul_scalar(C));
        x = x.clone().mul_scalar(A).add(poly.matmul(x));
    }
    if wide { x } else { x.transpose() }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::super::config::tests::muon;
    use super::*;
    use crate::ops::cpu::testing::{random, to_vec};

    /// Row-major `[n, k]` times `[k, m]`.
    fn product(a: &[f64], b: &[f64], [n, k, m]: [usize; 3]) -> Vec<f64> {
        let at = |i: usize| (0..k).map(|c| a[i / m * k + c] * b[c * m + i % m]).sum();
        (0..n * m).map(at).collect()
    }

    fn transposed(x: &[f64], [rows, cols]: [usize; 2]) -> Vec<f64> {
        (0..rows * cols).map(|i| x[i % rows * cols + i / rows]).collect()
    }

    /// Jordan's text in f64, product by product.
    fn reference(x: &[f64], [rows, cols]: [usize; 2]) -> Vec<f64> {
        if rows > cols {
            let x = reference(&transposed(x, [rows, cols]), [cols, rows]);
            return transposed(&x, [cols, rows]);
        }
        let norm = x.iter().map(|v| v * v).sum::<f64>().sqrt() + 1e-7;
        let mut x: Vec<f64> = x.iter().map(|v| v / norm).collect();
        for _ in 0..5 {
            let a = product(&x, &transposed(&x, [rows, cols]), [rows, cols, rows]);
            let aa = product(&a, &a, [rows, rows, rows]);
            let b: Vec<f64> = a.iter().zip(&aa).map(|(a, aa)| -4.775 * a + 2.0315 * aa).collect();
            let bx = product(&b, &x, [rows, rows, cols]);
            x = x.iter().zip(&bx).map(|(x, bx)| 3.4445 * x + bx).collect();
        }
        x
    }

    const SHAPES: [[usize; 2]; 6] = [[24, 40], [40, 24], [33, 33], [1, 7], [150, 20], [20, 150]];

    fn matrix(shape: [usize; 2], seed: u64) -> Vec<f32> {
        random(shape, 3.0, seed).try_into_vec().unwrap()
    }

    /// Elements are at most of order one; five steps amplify a rounding of the
    /// smallest singular value by at most 3.4445⁵ ≈ 485: 485 · 2⁻²⁴ ≈ 3e-5.
    const BOUND: f64 = 5e-5;

    #[test]
    fn host_and_tensors_follow_the_reference() {
        for shape in SHAPES {
            let x = matrix(shape, 3);
            let want = reference(&x.iter().map(|&v| f64::from(v)).collect::<Vec<_>>(), shape);
            let mut host = x.clone();
            newton_schulz(&mut host, shape);
            let tensor = Tensor::from_data(TensorData::new(x, shape), &Device::flex());
            let tensors = to_vec(newton_schulz_tensors(tensor));
            for ((want, a), b) in want.iter().zip(&host).zip(&tensors) {
                assert!((want - f64::from(*a)).abs() < BOUND, "{shape:?}: {want} and {a}");
                assert!((want - f64::from(*b)).abs() < BOUND, "{shape:?}: {want} and {b}");
            }
        }
    }

    /// Wide random matrices are well conditioned: all singular values land near 1,
    /// `O·Oᵀ` near the identity, and a step's root mean square near 0.2.
    #[test]
    fn the_update_is_orthogonal_and_as_long_as_adamws() {
        let shape = [16, 160];
        let mut x = matrix(shape, 4);
        newton_schulz(&mut x, shape);
        let o: Vec<f64> = x.iter().map(|&v| f64::from(v)).collect();
        let gram = product(&o, &transposed(&o, shape), [16, 160, 16]);
        let trace: f64 = (0..16).map(|i| gram[i * 17]).sum();
        // Singular values in 0.68..1.14.
        assert!((0.46..1.3).contains(&(trace / 16.0)), "{trace}");
        for (i, v) in gram.iter().enumerate().filter(|(i, _)| i % 17 != 0) {
            assert!(v.abs() < 0.42, "{i}: {v}");
        }
        let rates = Rates { lr: 1.0, weight_decay: 0.0 };
        let update = Update::new(&muon(), rates, shape, 1.0);
        let squares: f64 = o.iter().map(|v| (v * f64::from(update.rate)).powi(2)).sum();
        let rms = (squares / 2560.0).sqrt();
        assert!((0.2 * 0.68..0.2 * 1.14).contains(&rms), "{rms}");
    }

    /// Three whole steps against the text in f64, on both paths.
    #[test]
    fn momentum_decay_and_rate_follow_the_reference() {
        let shape = [12, 30];
        let start = matrix(shape, 5);
        for host in [true, false] {
            let device = Device::flex();
            let tensor = |data: &[f32]| {
                Tensor::<1>::from_data(TensorData::new(data.to_vec(), [data.len()]), &device)
            };
            let mut p = tensor(&start);
            let mut m = Tensor::<1>::zeros([360], &device);
            let mut want: Vec<f64> = start.iter().map(|&v| f64::from(v)).collect();
            let mut momentum = vec![0.0f64; 360];
            for step in 0..3 {
                let gradient = matrix(shape, 10 + step);
                let rates = Rates { lr: 0.02, weight_decay: 0.5 };
                let update = Update::new(&muon(), rates, shape, 0.25);
                p = update.apply(host, p, tensor(&gradient), &mut m);
                let g: Vec<f64> = gradient.iter().map(|&v| f64::from(v) * 0.25).collect();
                momentum.iter_mut().zip(&g).for_each(|(m, g)| *m = 0.95 * *m + g);
                let u: Vec<f64> = g.iter().zip(&momentum).map(|(g, m)| g + 0.95 * m).collect();
                let o = reference(&u, shape);
                for (w, o) in want.iter_mut().zip(o) {
                    *w = *w * (1.0 - 0.02 * 0.5) - 0.02 * 0.2 * 30f64.sqrt() * o;
                }
            }
            for (a, b) in to_vec(p).iter().zip(&want) {
                assert!((f64::from(*a) - b).abs() < 2e-6 + 0.02 * BOUND, "{a} and {b}");
            }
        }
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let shape = [300, 200];
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut x = matrix(shape, 6);
            pool.install(|| newton_schulz(&mut x, shape));
            x
        };
        let one = run(1);
        assert!(one.iter().zip(run(3)).all(|(a, b)| a.to_bits() == b.to_bits()));
    }

    #[test]
    fn no_gradient_is_no_update() {
        let mut x = vec![0.0f32; 12];
        newton_schulz(&mut x, [3, 4]);
        assert_eq!(x, [0.0; 12]);
    }
}

//! The head: logits, and the cross-entropy that never holds the logits of a
//! whole batch.

use bitnet_kernels::{DenseRows, MatMut, MatRef, gemm};
use burn::tensor::{Int, Tensor, activation};
use rayon::prelude::*;

use super::cpu::{Buffer, CpuOp, apply, is_cpu, kernels, matmul, sum_in_order};
use super::embedding::host_tokens;

/// Tokens whose logits exist at one time, in one task.
const TOKENS: usize = 64;

/// `logits = hidden · weightᵀ`.
///
/// On the CPU device without autodiff each logit is the dot product that the
/// engine computes, bit for bit.
///
/// # Shapes
/// `hidden` is `[tokens, D]`, `weight` is `[V, D]`, the result `[tokens, V]`.
pub fn logits(hidden: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    let device = hidden.device();
    if !is_cpu(&device) || device.is_autodiff() {
        return plain_logits(hidden, weight);
    }
    let ([tokens, cols], [vocab, _]) = (hidden.dims(), weight.dims());
    let op = Logits { vocab, cols };
    apply(op, [hidden.into_dispatch(), weight.into_dispatch()], false, [tokens, vocab])
}

/// The same with tensor operations.
pub fn plain_logits(hidden: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    hidden.matmul(weight.transpose())
}

#[derive(Debug, Clone)]
struct Logits {
    vocab: usize,
    cols: usize,
}

impl CpuOp<2> for Logits {
    type Saved = ();

    fn forward(&self, [hidden, weight]: [Buffer; 2], _track: bool) -> (Vec<f32>, Option<()>) {
        /// Rows of the head that one task multiplies.
        const ROWS: usize = 512;
        let mut out = vec![0.0f32; hidden.data().len() / self.cols * self.vocab];
        let tokens = out.chunks_exact_mut(self.vocab).zip(hidden.data().chunks_exact(self.cols));
        for (out, x) in tokens {
            out.par_chunks_mut(ROWS)
                .zip(weight.data().par_chunks(ROWS * self.cols))
                .for_each(|(out, rows)| kernels().dense_matvec(DenseRows::F32(rows), x, out));
        }
        (out, None)
    }

    fn backward(&self, (): &(), _grad: &[f32], _wanted: [bool; 2]) -> [Option<Vec<f32>>; 2] {
        [None, None]
    }
}

/// The mean cross-entropy in nats of predicting `targets`.
///
/// # Shapes
/// `hidden` is `[tokens, D]`, `weight` is `[V, D]`, `targets` has `tokens` ids;
/// the result is `[1]`.
pub fn cross_entropy(hidden: Tensor<2>, weight: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    let device = hidden.device();
    if !is_cpu(&device) {
        return plain_cross_entropy(hidden, weight, targets);
    }
    let ([_, cols], [vocab, _]) = (hidden.dims(), weight.dims());
    let op = CrossEntropy { targets: host_tokens(targets), vocab, cols };
    let inputs = [hidden.into_dispatch(), weight.into_dispatch()];
    apply(op, inputs, device.is_autodiff(), [1])
}

/// The same with tensor operations.
pub fn plain_cross_entropy(
    hidden: Tensor<2>,
    weight: Tensor<2>,
    targets: Tensor<1, Int>,
) -> Tensor<1> {
    let [tokens] = targets.dims();
    let log_probabilities = activation::log_softmax(plain_logits(hidden, weight), 1);
    log_probabilities.gather(1, targets.reshape([tokens, 1])).mean().neg()
}

#[derive(Debug, Clone)]
struct CrossEntropy {
    targets: Vec<usize>,
    vocab: usize,
    cols: usize,
}

/// The gradients of the mean loss, computed with it.
struct Gradients {
    hidden: Vec<f32>,
    weight: Vec<f32>,
}

impl CrossEntropy {
    /// Losses of some tokens; `logits` becomes the gradient of the *mean* loss
    /// with respect to them.
    fn losses(&self, logits: &mut [f32], targets: &[usize]) -> f64 {
        let scale = 1.0 / self.targets.len() as f32;
        let mut total = 0.0f64;
        for (row, &target) in logits.chunks_exact_mut(self.vocab).zip(targets) {
            let target_logit = row[target];
            let (max, sum) = kernels().exp_sum(row);
            total += f64::from(max) + f64::from(sum).ln() - f64::from(target_logit);
            let factor = scale / sum;
            row.iter_mut().for_each(|p| *p *= factor);
            row[target] -= scale;
        }
        total
    }
}

impl CpuOp<2> for CrossEntropy {
    type Saved = Gradients;

    fn forward(&self, [hidden, weight]: [Buffer; 2], track: bool) -> (Vec<f32>, Option<Gradients>) {
        /// Tokens of a round: bounds the logits that exist at once.
        const ROUND: usize = 8 * TOKENS;
        let (vocab, cols) = (self.vocab, self.cols);
        let w = MatRef::new(weight.data(), vocab, cols, cols);
        let mut total = 0.0f64;
        let mut dhidden = vec![0.0f32; if track { hidden.data().len() } else { 0 }];
        let mut dweight = vec![0.0f32; if track { weight.data().len() } else { 0 }];
        let rounds = hidden.data().chunks(ROUND * cols).zip(self.targets.chunks(ROUND));
        for (round, (hidden, targets)) in rounds.enumerate() {
            let tokens = targets.len();
            let mut dlogits = vec![0.0f32; tokens * vocab];
            let losses: Vec<f64> = dlogits
                .par_chunks_mut(TOKENS * vocab)
                .zip(hidden.par_chunks(TOKENS * cols).zip(targets.par_chunks(TOKENS)))
                .map(|(logits, (hidden, targets))| {
                    let n = targets.len();
                    let x = MatRef::new(hidden, n, cols, cols);
                    gemm(&mut MatMut::new(logits, n, vocab), x, w.t(), 1.0, false);
                    self.losses(logits, targets)
                })
                .collect();
            total += losses.iter().sum::<f64>();
            if track {
                let d = MatRef::new(&dlogits, tokens, vocab, vocab);
                let dh = matmul(d, w);
                dhidden[round * ROUND * cols..][..dh.len()].copy_from_slice(&dh);
                let dw = matmul(d.t(), MatRef::new(hidden, tokens, cols, cols));
                dweight = sum_in_order(vec![dweight, dw]);
            }
        }
        let mean = (total / self.targets.len() as f64) as f32;
        (vec![mean], track.then_some(Gradients { hidden: dhidden, weight: dweight }))
    }

    fn backward(
        &self,
        saved: &Gradients,
        grad: &[f32],
        wanted: [bool; 2],
    ) -> [Option<Vec<f32>>; 2] {
        let scaled = |values: &[f32]| values.par_iter().map(|v| v * grad[0]).collect();
        [wanted[0].then(|| scaled(&saved.hidden)), wanted[1].then(|| scaled(&saved.weight))]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cpu::testing::{check_gradients, random};

    #[test]
    fn equals_the_plain_version_in_value_and_gradient() {
        let (tokens, vocab, cols) = (600, 41, 24);
        let targets: Vec<i64> = (0..tokens as i64).map(|i| i * 7 % vocab as i64).collect();
        let run = |f: fn(Tensor<2>, Tensor<2>, Tensor<1, Int>) -> Tensor<1>| {
            let targets = targets.clone();
            move |[h, w]: [Tensor<2>; 2]| {
                let targets = Tensor::<1, Int>::from_data(targets.as_slice(), &h.device());
                f(h, w, targets).reshape([1, 1])
            }
        };
        // Sums of 600 tokens in f64 here, in f32 there.
        check_gradients(
            [random([tokens, cols], 2.0, 1), random([vocab, cols], 1.0, 2)],
            run(cross_entropy),
            run(plain_cross_entropy),
            5e-6,
        );
    }

    #[test]
    fn logits_equal_the_plain_version() {
        check_gradients(
            [random([9, 24], 2.0, 1), random([41, 24], 1.0, 2)],
            |[h, w]| logits(h, w),
            |[h, w]| plain_logits(h, w),
            1e-6,
        );
    }
}

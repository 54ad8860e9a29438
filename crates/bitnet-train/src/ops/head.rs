//! The head: logits, and the cross-entropy that never holds the logits of a
//! whole batch.

use bitnet_kernels::{DenseRows, Digits, MatMut, MatRef};
use burn::tensor::{Int, Tensor, TensorData, activation};
use rayon::prelude::*;

use super::bf16;
use super::cpu::{Buffer, CpuOp, apply, is_cpu, kernels};
use super::embedding::host_tokens;
use super::products::{self, Input, Packed, ROWS, Right};
use super::scratch::{self, Scratch};
use crate::profile;

/// Elements that one task of a loop over gradients takes.
const CHUNK: usize = 1 << 16;

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
    head_product(hidden, weight, false)
}

fn head_product(hidden: Tensor<2>, weight: Tensor<2>, bf16: bool) -> Tensor<2> {
    bf16::matmul(hidden, weight.transpose(), bf16)
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
    language_loss(hidden, weight, targets, &Objective::default())
}

/// What a model is trained towards, token by token: the sum over tokens of
/// `w · (cross_entropy · CE + factor · KL(teacher ‖ student))`, in nats, both
/// distributions of the divergence at the teacher's temperature.
#[derive(Debug, Clone)]
pub struct Objective {
    /// The weight w of every token; none: the mean of all. 0 masks a token.
    pub weights: Option<Vec<f32>>,
    /// The weight of the cross-entropy.
    pub cross_entropy: f32,
    /// Soft targets, for distillation.
    pub teacher: Option<SoftTargets>,
    /// Whether the logits, and their gradients, are products in bf16. On GPUs.
    pub bf16: bool,
    /// Whether the gradient of the hidden states is a product with the head's rows as
    /// int8, each element off by at most 1/254 of its row's largest magnitude, and with
    /// that of the logits in 16 bits. On the CPU; the gradient of the head stays one of floats.
    pub int8_inputs: bool,
}

impl Default for Objective {
    fn default() -> Self {
        Self { weights: None, cross_entropy: 1.0, teacher: None, bf16: false, int8_inputs: false }
    }
}

/// A teacher's predictions, as what its head multiplies.
#[derive(Debug, Clone)]
pub struct SoftTargets {
    /// Its normed hidden states `[tokens, D]`, without autodiff.
    pub hidden: Tensor<2>,
    /// Its head `[V, D]`, without autodiff.
    pub weight: Tensor<2>,
    /// The temperature of both distributions.
    pub temperature: f32,
    /// The weight of the divergence; its gradient is not scaled by the square of
    /// the temperature (arXiv:2510.13998).
    pub factor: f32,
}

/// The loss of an [`Objective`].
///
/// # Shapes
/// As [`cross_entropy`]; weights and soft targets have as many tokens.
pub fn language_loss(
    hidden: Tensor<2>,
    weight: Tensor<2>,
    targets: Tensor<1, Int>,
    objective: &Objective,
) -> Tensor<1> {
    let device = hidden.device();
    if !is_cpu(&device) {
        #[cfg(any(feature = "wgpu", feature = "cuda"))]
        if super::gpu::is_gpu(&device) && objective.teacher.is_none() {
            return super::gpu::language_loss(hidden, weight, targets, objective);
        }
        return plain_language_loss(hidden, weight, targets, objective);
    }
    let ([_, cols], [vocab, _]) = (hidden.dims(), weight.dims());
    let op = LanguageLoss {
        targets: host_tokens(targets),
        vocab,
        cols,
        weights: objective.weights.clone(),
        cross_entropy: objective.cross_entropy,
        teacher: objective.teacher.as_ref().map(Teacher::new),
        int8_inputs: objective.int8_inputs,
    };
    let inputs = [hidden.into_dispatch(), weight.into_dispatch()];
    apply(op, inputs, device.is_autodiff(), [1])
}

/// The same with tensor operations.
pub fn plain_cross_entropy(
    hidden: Tensor<2>,
    weight: Tensor<2>,
    targets: Tensor<1, Int>,
) -> Tensor<1> {
    plain_language_loss(hidden, weight, targets, &Objective::default())
}

/// The same with tensor operations.
pub fn plain_language_loss(
    hidden: Tensor<2>,
    weight: Tensor<2>,
    targets: Tensor<1, Int>,
    objective: &Objective,
) -> Tensor<1> {
    let [tokens] = targets.dims();
    let device = hidden.device();
    let logits = head_product(hidden, weight, objective.bf16);
    let log_probabilities = activation::log_softmax(logits.clone(), 1);
    let ce = log_probabilities.gather(1, targets.reshape([tokens, 1])).neg();
    let mut loss = ce.mul_scalar(objective.cross_entropy);
    if let Some(teacher) = &objective.teacher {
        let soft =
            |logits: Tensor<2>| activation::log_softmax(logits.div_scalar(teacher.temperature), 1);
        let given = head_product(teacher.hidden.clone(), teacher.weight.clone(), objective.bf16);
        let given = if device.is_autodiff() { Tensor::from_inner(given) } else { given };
        let given = soft(given);
        let divergence = (given.clone().exp() * (given - soft(logits))).sum_dim(1);
        loss = loss + divergence.mul_scalar(teacher.factor);
    }
    match &objective.weights {
        None => loss.mean(),
        Some(weights) => {
            let weights = TensorData::new(weights.clone(), [tokens, 1]);
            (loss * Tensor::from_data(weights, &device)).sum()
        }
    }
}

#[derive(Debug, Clone)]
struct LanguageLoss {
    targets: Vec<usize>,
    vocab: usize,
    cols: usize,
    weights: Option<Vec<f32>>,
    cross_entropy: f32,
    teacher: Option<Teacher>,
    int8_inputs: bool,
}

/// [`SoftTargets`] on the host, sharing their storage.
#[derive(Debug, Clone)]
struct Teacher {
    hidden: Buffer,
    weight: Buffer,
    cols: usize,
    temperature: f32,
    factor: f32,
}

impl Teacher {
    fn new(targets: &SoftTargets) -> Self {
        let values = |t: &Tensor<2>| Buffer::of(t.clone());
        let [_, cols] = targets.hidden.dims();
        let (temperature, factor) = (targets.temperature, targets.factor);
        let (hidden, weight) = (values(&targets.hidden), values(&targets.weight));
        Self { hidden, weight, cols, temperature, factor }
    }

    /// Its head as a right operand, `[cols, vocab]`.
    fn packed(&self, vocab: usize) -> Packed {
        Packed::floats(MatRef::new(self.weight.data(), vocab, self.cols, self.cols).t())
    }

    /// The logits of tokens `first..first + n`, `[n, vocab]`.
    fn logits(&self, packed: &Packed, first: usize, n: usize, vocab: usize) -> Vec<f32> {
        let cols = self.cols;
        let mut out = vec![0.0f32; n * vocab];
        let x = MatRef::new(&self.hidden.data()[first * cols..], n, cols, cols);
        kernels().float_product(x, packed.view(), MatMut::new(&mut out, n, vocab), false);
        out
    }

    /// The divergence of one token. `student` are its logits, `given` becomes the
    /// gradient of `factor` times the divergence with respect to them.
    fn divergence(&self, student: &[f32], given: &mut [f32]) -> f64 {
        let inv = 1.0 / self.temperature;
        let soften = |logits: &mut [f32]| {
            logits.iter_mut().for_each(|x| *x *= inv);
            let raw = logits.to_vec();
            let (max, sum) = kernels().exp_sum(logits);
            (raw, f64::from(max) + f64::from(sum).ln(), 1.0 / sum)
        };
        let mut own = student.to_vec();
        let (own_raw, own_log, own_inv) = soften(&mut own);
        let (given_raw, given_log, given_inv) = soften(given);
        let mut total = 0.0f64;
        for (i, (p, q)) in given.iter_mut().zip(&own).enumerate() {
            let probability = *p * given_inv;
            let difference =
                (f64::from(given_raw[i]) - given_log) - (f64::from(own_raw[i]) - own_log);
            total += f64::from(probability) * difference;
            *p = (q * own_inv - probability) * (self.factor * inv);
        }
        total * f64::from(self.factor)
    }
}

/// The gradients of the loss, computed with it.
struct Gradients {
    hidden: Scratch<f32>,
    weight: Scratch<f32>,
}

impl LanguageLoss {
    /// Weighted losses of the tokens from `first` on, one each; `logits` becomes the
    /// gradient of the loss with respect to them.
    fn losses(
        &self,
        logits: &mut [f32],
        first: usize,
        teacher: Option<&Packed>,
        losses: &mut [f64],
    ) {
        let mean = 1.0 / self.targets.len() as f32;
        let tokens = logits.len() / self.vocab;
        let mut soft = (self.teacher.as_ref().zip(teacher))
            .map(|(t, packed)| t.logits(packed, first, tokens, self.vocab));
        let rows = logits.chunks_exact_mut(self.vocab).zip(losses);
        for (i, (row, own)) in rows.enumerate() {
            let token = first + i;
            let weight = self.weights.as_ref().map_or(mean, |w| w[token]);
            let scale = weight * self.cross_entropy;
            let target = self.targets[token];
            let target_logit = row[target];
            let mut loss = 0.0f64;
            let mut soft = soft.as_mut().map(|s| &mut s[i * self.vocab..(i + 1) * self.vocab]);
            if let (Some(teacher), Some(soft)) = (&self.teacher, &mut soft) {
                loss += teacher.divergence(row, soft);
            }
            let (max, sum) = kernels().exp_sum(row);
            let ce = f64::from(max) + f64::from(sum).ln() - f64::from(target_logit);
            loss += ce * f64::from(self.cross_entropy);
            let factor = scale / sum;
            kernels().scale(row, factor);
            row[target] -= scale;
            if let Some(soft) = soft {
                row.iter_mut().zip(soft).for_each(|(p, s)| *p += *s * weight);
            }
            *own = match &self.weights {
                None => loss,
                Some(_) => loss * f64::from(weight),
            };
        }
    }
}

/// The head's rows as int8, of any scale.
fn quantized(weight: &[f32], cols: usize) -> Input {
    let vocab = weight.len() / cols;
    let mut out = Input::any(vocab, cols, true);
    out.chunks_mut(cols, ROWS).into_par_iter().zip(weight.par_chunks(ROWS * cols)).for_each(
        |(mut out, rows)| {
            out.fill(cols, |i, q, floats| {
                let row = &rows[i * cols..][..cols];
                match q {
                    Some(q) => kernels().quantize_gradient(row, q),
                    None => {
                        floats.copy_from_slice(row);
                        (0.0, 0)
                    }
                }
            });
        },
    );
    out
}

impl CpuOp<2> for LanguageLoss {
    type Saved = Gradients;

    fn forward(&self, [hidden, weight]: [Buffer; 2], track: bool) -> (Vec<f32>, Option<Gradients>) {
        /// Most tokens of a round: bounds the logits that exist at once.
        const ROUND: usize = 576;
        let (vocab, cols) = (self.vocab, self.cols);
        let tokens = self.targets.len();
        // Rounds of one size.
        let at_once = tokens.div_ceil(tokens.div_ceil(ROUND).max(1));
        let part = products::task_rows(at_once, 8);
        let _span = profile::span("head");
        let w = MatRef::new(weight.data(), vocab, cols, cols);
        let turned = Packed::floats(w.t());
        let int8 = (track && self.int8_inputs).then(|| quantized(weight.data(), cols));
        let back = match &int8 {
            Some(rows) => {
                Right::all([(rows.tokens(cols, 0..vocab), cols, Some(Digits::Two))]).pop()
            }
            None => track.then(|| Right::Float(Packed::floats(w))),
        };
        let teacher = self.teacher.as_ref().map(|t| t.packed(vocab));
        let mut losses = vec![0.0f64; tokens];
        let mut dhidden = Scratch::any(if track { hidden.data().len() } else { 0 });
        let mut dweight = Scratch::any(if track { weight.data().len() } else { 0 });
        // Of one length but for few tokens, so that it is used again.
        let mut logits = Scratch::any(ROUND.min(tokens) * vocab);
        for (round, hidden) in hidden.data().chunks((at_once * cols).max(1)).enumerate() {
            let tokens = hidden.len() / cols;
            let dlogits = &mut logits[..tokens * vocab];
            let losses = &mut losses[round * at_once..][..tokens];
            dlogits
                .par_chunks_mut(part * vocab)
                .zip(hidden.par_chunks(part * cols))
                .zip(losses.par_chunks_mut(part))
                .enumerate()
                .with_max_len(1)
                .for_each(|(i, ((logits, hidden), losses))| {
                    let n = hidden.len() / cols;
                    let x = MatRef::new(hidden, n, cols, cols);
                    let out = MatMut::new(&mut *logits, n, vocab);
                    kernels().float_product(x, turned.view(), out, false);
                    self.losses(logits, round * at_once + i * part, teacher.as_ref(), losses);
                });
            if let Some(back) = &back {
                let d = MatRef::new(dlogits, tokens, vocab, vocab);
                let dh = &mut dhidden[round * at_once * cols..][..tokens * cols];
                products::product(d, back, cols, dh, false);
                let x = Right::Float(Packed::floats(MatRef::new(hidden, tokens, cols, cols)));
                products::product(d.t(), &x, cols, &mut dweight, round > 0);
            }
        }
        let total = losses.iter().sum::<f64>();
        let loss = match &self.weights {
            None => (total / self.targets.len() as f64) as f32,
            Some(_) => total as f32,
        };
        (vec![loss], track.then_some(Gradients { hidden: dhidden, weight: dweight }))
    }

    fn backward(
        &self,
        saved: &Gradients,
        grad: &[f32],
        wanted: [bool; 2],
    ) -> [Option<Vec<f32>>; 2] {
        let copy = |values: &[f32]| Scratch::from(scratch::copy(values));
        let copies = Gradients { hidden: copy(&saved.hidden), weight: copy(&saved.weight) };
        self.last_backward(copies, grad, wanted)
    }

    fn last_backward(
        &self,
        saved: Gradients,
        grad: &[f32],
        wanted: [bool; 2],
    ) -> [Option<Vec<f32>>; 2] {
        let scaled = |mut values: Scratch<f32>| {
            if grad[0] != 1.0 {
                values.par_chunks_mut(CHUNK).for_each(|part| kernels().scale(part, grad[0]));
            }
            values.into_vec()
        };
        let Gradients { hidden, weight } = saved;
        [wanted[0].then(|| scaled(hidden)), wanted[1].then(|| scaled(weight))]
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

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

    /// The product with the head as it is rounded, but for the rounding of the logits'
    /// gradient; the other gradient and the loss as they are without.
    #[test]
    fn int8_gradients_of_hidden_states_meet_the_rounded_head() {
        let (tokens, vocab, cols) = (600, 700, 40);
        let ids: Vec<i64> = (0..tokens as i64).map(|i| i * 7 % vocab as i64).collect();
        let masks: Vec<f32> = (0..tokens).map(|t| (t % 3) as f32 * 0.5).collect();
        let hidden = random([tokens, cols], 2.0, 1).try_to_vec::<f32>().unwrap();
        let mut head = random([vocab, cols], 0.3, 2).try_to_vec::<f32>().unwrap();
        for (v, row) in head.chunks_exact_mut(cols).enumerate() {
            row.iter_mut().for_each(|w| *w *= 1.0 + (v % 5) as f32);
        }
        let run = |int8_inputs| {
            let device = Device::flex().autodiff();
            let leaf = |data: &[f32], rows| {
                let data = TensorData::new(data.to_vec(), [rows, cols]);
                Tensor::<2>::from_data(data, &device).require_grad()
            };
            let (hidden, head) = (leaf(&hidden, tokens), leaf(&head, vocab));
            let targets = Tensor::<1, Int>::from_data(ids.as_slice(), &device);
            let objective =
                Objective { int8_inputs, weights: Some(masks.clone()), ..Objective::default() };
            let loss = language_loss(hidden.clone(), head.clone(), targets, &objective);
            let grads = loss.clone().backward();
            let values = |t: &Tensor<2>| {
                let Some(grad) = t.grad(&grads) else { unreachable!("a gradient") };
                grad.into_data().try_to_vec::<f32>().unwrap()
            };
            (loss.into_scalar::<f32>(), values(&hidden), values(&head))
        };
        let (exact, int8) = (run(false), run(true));
        assert_eq!((exact.0, &exact.2), (int8.0, &int8.2));
        let rounded: Vec<(f64, Vec<f64>)> = head
            .chunks_exact(cols)
            .map(|row| {
                let scale = row.iter().fold(0.0f32, |m, w| m.max(w.abs())) / 127.0;
                let round = |w: &f32| f64::from((w / scale).round_ties_even());
                (f64::from(scale), row.iter().map(round).collect())
            })
            .collect();
        for (t, (x, got)) in hidden.chunks_exact(cols).zip(int8.1.chunks_exact(cols)).enumerate() {
            let logits: Vec<f64> = head
                .chunks_exact(cols)
                .map(|w| w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum())
                .collect();
            let sum: f64 = logits.iter().map(|l| l.exp()).sum();
            // The gradient of the logits, times the scales of the rows that it meets.
            let terms: Vec<f64> = (0..vocab)
                .map(|v| logits[v].exp() / sum - f64::from(u8::from(v as i64 == ids[t])))
                .zip(&rounded)
                .map(|(d, (scale, _))| d * f64::from(masks[t]) * scale)
                .collect();
            let steps = terms
                .chunks(512)
                .map(|block| block.iter().fold(0.0f64, |m, d| m.max(d.abs())) / (127.0 * 256.0));
            let steps: Vec<f64> = steps.collect();
            for (c, got) in got.iter().enumerate() {
                let (mut want, mut bound) = (0.0, 1e-30);
                for (v, (d, (_, q))) in terms.iter().zip(&rounded).enumerate() {
                    want += d * q[c];
                    // Half a step, and what f32 makes of the softmax.
                    bound += (0.5 * steps[v / 512] + 1e-5 * d.abs()) * q[c].abs();
                }
                assert!((f64::from(*got) - want).abs() <= bound, "{t}, {c}: {got} and {want}");
            }
        }
    }

    #[test]
    fn masks_sums_and_soft_targets_equal_the_plain_version() {
        let (tokens, vocab, cols) = (150, 41, 24);
        let targets: Vec<i64> = (0..tokens as i64).map(|i| i * 7 % vocab as i64).collect();
        let mask: Vec<f32> = (0..tokens).map(|i| (i % 3) as f32 * 0.5).collect();
        let plain_device = Device::flex();
        let teacher = |factor| SoftTargets {
            hidden: Tensor::from_data(random([tokens, 16], 2.0, 3), &plain_device),
            weight: Tensor::from_data(random([vocab, 16], 1.0, 4), &plain_device),
            temperature: 5.0,
            factor,
        };
        for objective in [
            Objective { weights: Some(mask.clone()), ..Objective::default() },
            Objective { teacher: Some(teacher(3.0)), ..Objective::default() },
            Objective {
                weights: Some(mask),
                cross_entropy: 0.0,
                teacher: Some(teacher(1.0)),
                ..Objective::default()
            },
        ] {
            type Loss = fn(Tensor<2>, Tensor<2>, Tensor<1, Int>, &Objective) -> Tensor<1>;
            let run = |f: Loss| {
                let (targets, objective) = (targets.clone(), objective.clone());
                move |[h, w]: [Tensor<2>; 2]| {
                    let targets = Tensor::<1, Int>::from_data(targets.as_slice(), &h.device());
                    f(h, w, targets, &objective).reshape([1, 1])
                }
            };
            check_gradients(
                [random([tokens, cols], 2.0, 1), random([vocab, cols], 1.0, 2)],
                run(language_loss),
                run(plain_language_loss),
                1e-5,
            );
        }
    }

    #[test]
    fn a_student_equal_to_its_teacher_has_no_divergence() {
        let device = Device::flex();
        let hidden = Tensor::<2>::from_data(random([70, 24], 2.0, 1), &device);
        let weight = Tensor::<2>::from_data(random([41, 24], 1.0, 2), &device);
        let targets = Tensor::<1, Int>::zeros([70], &device);
        let teacher = SoftTargets {
            hidden: hidden.clone(),
            weight: weight.clone(),
            temperature: 2.0,
            factor: 1.0,
        };
        let objective =
            Objective { cross_entropy: 0.0, teacher: Some(teacher), ..Objective::default() };
        let loss = language_loss(hidden, weight, targets, &objective).into_scalar::<f32>();
        assert!(loss.abs() < 1e-7, "{loss}");
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

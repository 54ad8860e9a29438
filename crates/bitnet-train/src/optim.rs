//! AdamW with decoupled weight decay (arXiv:1711.05101), gradient accumulation
//! and clipping by the norm of the whole gradient.
//!
//! burn's optimizer clips tensor by tensor, fixes weight decay at its making and
//! walks each tensor a dozen times; this one has one fused pass on the CPU, and
//! the same arithmetic in tensor operations elsewhere. Its state is two tensors
//! a parameter and a step count, saved and loaded exactly.
//!
//! Weight decay applies to what has two dimensions or more: the linear layers,
//! the embedding and the head; not to norms.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Gradients, Tensor, TensorData};
use rayon::prelude::*;

use crate::config::OptimizerConfig;
use crate::ranks::Ranks;
use crate::schedule::Rates;

/// Elements that one task of a parallel loop takes. Fixed, so that sums come in
/// the same order whatever the number of threads.
const CHUNK: usize = 1 << 16;

/// The sum of the gradients of micro-steps, one flat tensor a parameter, in the
/// order in which the module visits them.
#[derive(Debug, Default)]
pub struct GradientSum {
    tensors: Vec<Option<Tensor<1>>>,
}

impl GradientSum {
    /// Adds the gradients of one backward pass of `model`.
    pub fn add<M: Module>(&mut self, model: &M, gradients: Gradients) {
        let params = GradientsParams::from_grads(gradients, model);
        let mut visitor = Adder { sum: &mut self.tensors, next: 0, params };
        model.visit(&mut visitor);
    }

    /// Adds up the sums of all ranks, so that each has the whole.
    pub fn add_ranks(&mut self, ranks: &Ranks) {
        if ranks.size() == 1 {
            return;
        }
        for tensor in self.tensors.iter_mut().flatten() {
            let device = tensor.device();
            let mut data = take(tensor, &device);
            ranks.sum(slice_mut(&mut data));
            *tensor = Tensor::from_data(data, &device);
        }
    }

    /// The Euclidean norm of all of it. `host`: the tensors lie in host memory.
    #[must_use]
    pub fn norm(&mut self, host: bool) -> f64 {
        let squares = self.tensors.iter_mut().flatten().map(|tensor| {
            if !host {
                return f64::from(tensor.clone().square().sum().into_scalar::<f32>());
            }
            let device = tensor.device();
            let data = take(tensor, &device);
            let sum = sum_of_squares(slice(&data));
            *tensor = Tensor::from_data(data, &device);
            sum
        });
        squares.sum::<f64>().sqrt()
    }
}

struct Adder<'s> {
    sum: &'s mut Vec<Option<Tensor<1>>>,
    next: usize,
    params: GradientsParams,
}

impl ModuleVisitor for Adder<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.sum.len() <= self.next {
            self.sum.push(None);
        }
        if let Some(new) = self.params.remove::<D>(param.id) {
            let new = new.reshape([-1]);
            let slot = &mut self.sum[self.next];
            *slot = Some(match slot.take() {
                Some(sum) => sum.add(new),
                None => new,
            });
        }
        self.next += 1;
    }
}

/// The optimizer: its constants and, a parameter, both moments.
#[derive(Debug)]
pub struct AdamW {
    config: OptimizerConfig,
    host: bool,
    steps: u64,
    moments: Vec<Moments>,
}

/// The running means of a parameter's gradient and of its square.
#[derive(Debug)]
struct Moments {
    name: String,
    first: Tensor<1>,
    second: Tensor<1>,
}

/// A tensor of the optimizer's state: name, length, values.
pub type StateTensor = (String, Vec<f32>);

impl AdamW {
    /// An optimizer of `model`, its moments zero. `host`: the parameters lie in
    /// host memory.
    #[must_use]
    pub fn new<M: Module>(
        config: &OptimizerConfig,
        model: &M,
        device: &Device,
        host: bool,
    ) -> Self {
        let device = device.clone().without_autodiff();
        let mut visitor = Zeros { path: Vec::new(), device, moments: Vec::new() };
        model.visit(&mut visitor);
        Self { config: config.clone(), host, steps: 0, moments: visitor.moments }
    }

    /// Steps taken.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// One step. `sum` is over `micro_steps` and of norm `norm` (as
    /// [`GradientSum::norm`] says); the step is taken along its mean, clipped.
    #[must_use]
    pub fn step<M: Module>(
        &mut self,
        model: M,
        sum: GradientSum,
        norm: f64,
        micro_steps: usize,
        rates: Rates,
    ) -> M {
        self.steps += 1;
        let update = Update::new(&self.config, rates, self.steps, norm, micro_steps);
        let gradients = sum.tensors.into_iter();
        model.map(&mut Stepper { optimizer: self, next: 0, gradients, update })
    }

    /// Names and lengths of the state's tensors, in the order of
    /// [`AdamW::state`].
    #[must_use]
    pub fn state_shapes(&self) -> Vec<(String, Vec<usize>)> {
        let moments = self.moments.iter().flat_map(|m| {
            let length = m.first.dims().to_vec();
            [(m.first_name(), length.clone()), (m.second_name(), length)]
        });
        moments.collect()
    }

    /// The state, tensor by tensor.
    pub fn state(&self) -> impl Iterator<Item = StateTensor> + '_ {
        self.moments.iter().flat_map(|m| {
            let values = |t: &Tensor<1>| slice(&t.to_data()).to_vec();
            [(m.first_name(), values(&m.first)), (m.second_name(), values(&m.second))]
        })
    }

    /// Replaces the state by a saved one.
    ///
    /// # Errors
    /// What `read` returns for a tensor that is not there or of another length.
    pub fn load<E>(
        &mut self,
        steps: u64,
        mut read: impl FnMut(&str, usize) -> Result<Vec<f32>, E>,
    ) -> Result<(), E> {
        for m in &mut self.moments {
            let (first, second) = (m.first_name(), m.second_name());
            let device = m.first.device();
            let [length] = m.first.dims();
            m.first = Tensor::from_data(TensorData::new(read(&first, length)?, [length]), &device);
            m.second =
                Tensor::from_data(TensorData::new(read(&second, length)?, [length]), &device);
        }
        self.steps = steps;
        Ok(())
    }
}

impl Moments {
    fn first_name(&self) -> String {
        format!("{}.exp_avg", self.name)
    }

    fn second_name(&self) -> String {
        format!("{}.exp_avg_sq", self.name)
    }
}

struct Zeros {
    path: Vec<String>,
    device: Device,
    moments: Vec<Moments>,
}

impl ModuleVisitor for Zeros {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let zeros = || Tensor::zeros([param.lazy_shape().num_elements()], &self.device);
        let moments = Moments { name: self.path.join("."), first: zeros(), second: zeros() };
        self.moments.push(moments);
    }
}

struct Stepper<'o> {
    optimizer: &'o mut AdamW,
    next: usize,
    gradients: std::vec::IntoIter<Option<Tensor<1>>>,
    update: Update,
}

impl ModuleMapper for Stepper<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let moments = &mut self.optimizer.moments[self.next];
        self.next += 1;
        let Some(gradient) = self.gradients.next().flatten() else {
            return param;
        };
        let mut update = self.update;
        if D < 2 {
            update.keep = 1.0;
        }
        let (id, tensor, mapper) = param.consume();
        let (strategy, tracked) = (tensor.device(), tensor.is_require_grad());
        let shape = tensor.shape();
        let flat = tensor.inner().reshape([-1]);
        let flat = if self.optimizer.host {
            update.apply_host(flat, gradient, moments)
        } else {
            update.apply_tensors(flat, gradient, moments)
        };
        let mut tensor: Tensor<D> = flat.reshape(shape);
        if strategy.is_autodiff() {
            tensor = Tensor::from_inner(tensor).set_require_grad(tracked);
        }
        Param::from_mapped_value(id, tensor, mapper)
    }
}

/// The constants of one step: p ← keep · p - rate · m / (√v · root + eps).
#[derive(Debug, Clone, Copy)]
struct Update {
    beta1: f32,
    beta2: f32,
    eps: f32,
    /// Takes the sum of gradients to their clipped mean.
    scale: f32,
    /// `1 - lr · weight_decay`.
    keep: f32,
    /// `lr` over the first moment's bias.
    rate: f32,
    /// One over the root of the second moment's bias.
    root: f32,
}

impl Update {
    fn new(
        config: &OptimizerConfig,
        rates: Rates,
        step: u64,
        norm: f64,
        micro_steps: usize,
    ) -> Self {
        let mean = norm / micro_steps as f64;
        let clip = config.clip_norm > 0.0 && mean > config.clip_norm;
        let scale = if clip { config.clip_norm / norm } else { 1.0 / micro_steps as f64 };
        // A power of 2^31 steps is 0 for any beta below 1.
        let power = i32::try_from(step).unwrap_or(i32::MAX);
        Self {
            beta1: config.beta1 as f32,
            beta2: config.beta2 as f32,
            eps: config.eps as f32,
            scale: scale as f32,
            keep: (1.0 - rates.lr * rates.weight_decay) as f32,
            rate: (rates.lr / (1.0 - config.beta1.powi(power))) as f32,
            root: (1.0 / (1.0 - config.beta2.powi(power)).sqrt()) as f32,
        }
    }

    /// The definition: one element.
    #[inline]
    fn element(&self, p: &mut f32, g: f32, m: &mut f32, v: &mut f32) {
        let g = g * self.scale;
        *m = *m * self.beta1 + g * (1.0 - self.beta1);
        *v = *v * self.beta2 + g * g * (1.0 - self.beta2);
        *p = *p * self.keep - self.rate * *m / (v.sqrt() * self.root + self.eps);
    }

    /// In place, where the tensors own their memory.
    fn apply_host(&self, p: Tensor<1>, g: Tensor<1>, moments: &mut Moments) -> Tensor<1> {
        let device = moments.first.device();
        let mut p = p.into_data();
        let g = g.into_data();
        let mut m = take(&mut moments.first, &device);
        let mut v = take(&mut moments.second, &device);
        let parts = slice_mut(&mut p).par_chunks_mut(CHUNK).zip(slice(&g).par_chunks(CHUNK));
        let state = slice_mut(&mut m).par_chunks_mut(CHUNK);
        let state = state.zip(slice_mut(&mut v).par_chunks_mut(CHUNK));
        parts.zip(state).for_each(|((p, g), (m, v))| {
            for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
                self.element(p, *g, m, v);
            }
        });
        moments.first = Tensor::from_data(m, &device);
        moments.second = Tensor::from_data(v, &device);
        Tensor::from_data(p, &device)
    }

    /// The same in tensor operations, on the device.
    fn apply_tensors(&self, p: Tensor<1>, g: Tensor<1>, moments: &mut Moments) -> Tensor<1> {
        let g = g.mul_scalar(self.scale);
        let m = moments.first.clone().mul_scalar(self.beta1);
        let m = m.add(g.clone().mul_scalar(1.0 - self.beta1));
        let v = moments.second.clone().mul_scalar(self.beta2);
        let v = v.add(g.square().mul_scalar(1.0 - self.beta2));
        let root = v.clone().sqrt().mul_scalar(self.root).add_scalar(self.eps);
        let delta = m.clone().mul_scalar(self.rate).div(root);
        (moments.first, moments.second) = (m, v);
        p.mul_scalar(self.keep).sub(delta)
    }
}

/// The data of a tensor that its owner is about to replace: moved, not copied,
/// where nothing else shares it.
fn take(tensor: &mut Tensor<1>, device: &Device) -> TensorData {
    std::mem::replace(tensor, Tensor::zeros([1], device)).into_data()
}

fn slice(data: &TensorData) -> &[f32] {
    data.as_slice().expect("parameters, gradients and moments are f32")
}

fn slice_mut(data: &mut TensorData) -> &mut [f32] {
    data.as_mut_slice().expect("parameters, gradients and moments are f32")
}

/// In double precision, chunk by chunk in order.
fn sum_of_squares(values: &[f32]) -> f64 {
    let chunk = |c: &[f32]| c.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>();
    let sums: Vec<f64> = values.par_chunks(CHUNK).map(chunk).collect();
    sums.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Module, Debug)]
    struct Toy {
        matrix: Param<Tensor<2>>,
        norm: Param<Tensor<1>>,
    }

    fn device() -> Device {
        Device::flex().autodiff()
    }

    /// More than two chunks, so that several tasks share the work.
    const ROWS: usize = 2 * CHUNK / 4 + 3;

    fn wave(n: usize, phase: f32) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * 0.37 + phase).sin()).collect()
    }

    fn toy() -> Toy {
        let matrix = Tensor::from_data(TensorData::new(wave(4 * ROWS, 0.0), [ROWS, 4]), &device());
        let norm = Tensor::from_data(TensorData::new(wave(5, 1.0), [5]), &device());
        Toy { matrix: Param::from_tensor(matrix), norm: Param::from_tensor(norm) }
    }

    /// A loss whose gradient is `factor · wave` of each parameter's length.
    fn gradients(model: &Toy, factor: f32) -> Gradients {
        let w = |n: usize| wave(n, 2.0).iter().map(|x| x * factor).collect::<Vec<_>>();
        let a = Tensor::<2>::from_data(TensorData::new(w(4 * ROWS), [ROWS, 4]), &device());
        let b = Tensor::<1>::from_data(TensorData::new(w(5), [5]), &device());
        let loss = model.matrix.val().mul(a).sum() + model.norm.val().mul(b).sum();
        loss.backward()
    }

    fn config(clip_norm: f64) -> OptimizerConfig {
        OptimizerConfig { beta1: 0.9, beta2: 0.95, eps: 1e-8, clip_norm }
    }

    fn values(model: &Toy) -> (Vec<f32>, Vec<f32>) {
        let v = |d: TensorData| slice(&d).to_vec();
        (v(model.matrix.val().into_data()), v(model.norm.val().into_data()))
    }

    /// The textbook, in f64.
    struct Reference {
        p: Vec<f64>,
        m: Vec<f64>,
        v: Vec<f64>,
    }

    impl Reference {
        fn new(p: Vec<f32>) -> Self {
            let zeros = vec![0.0; p.len()];
            Self { p: p.into_iter().map(f64::from).collect(), m: zeros.clone(), v: zeros }
        }

        fn step(&mut self, g: impl Fn(usize) -> f64, t: i32, lr: f64, decay: f64) {
            for i in 0..self.p.len() {
                let g = g(i);
                self.m[i] = 0.9 * self.m[i] + 0.1 * g;
                self.v[i] = 0.95 * self.v[i] + 0.05 * g * g;
                let m = self.m[i] / (1.0 - 0.9f64.powi(t));
                let v = self.v[i] / (1.0 - 0.95f64.powi(t));
                self.p[i] -= lr * decay * self.p[i];
                self.p[i] -= lr * m / (v.sqrt() + 1e-8);
            }
        }

        fn assert_close(&self, found: &[f32]) {
            for (i, (a, b)) in self.p.iter().zip(found).enumerate() {
                assert!((a - f64::from(*b)).abs() < 2e-6, "element {i}: {a} and {b}");
            }
        }
    }

    #[test]
    fn follows_the_scalar_reference_and_decays_matrices_alone() {
        for host in [true, false] {
            let mut model = toy();
            let (matrix, norm) = values(&model);
            let (mut matrix, mut norm) = (Reference::new(matrix), Reference::new(norm));
            let mut optimizer = AdamW::new(&config(0.0), &model, &device(), host);
            let wave = wave(4 * ROWS, 2.0);
            for t in 1..=4 {
                let mut sum = GradientSum::default();
                sum.add(&model, gradients(&model, t as f32));
                sum.add(&model, gradients(&model, 2.0));
                let norm_of_sum = sum.norm(host);
                let rates = Rates { lr: 0.01 * f64::from(t), weight_decay: 0.1 };
                model = optimizer.step(model, sum, norm_of_sum, 2, rates);
                let g = |i: usize| f64::from(wave[i]) * (f64::from(t) + 2.0) / 2.0;
                matrix.step(g, t, rates.lr, rates.weight_decay);
                norm.step(g, t, rates.lr, 0.0);
            }
            let found = values(&model);
            matrix.assert_close(&found.0);
            norm.assert_close(&found.1);
            assert!(model.matrix.val().is_require_grad());
        }
    }

    #[test]
    fn the_norm_is_of_all_gradients_and_clipping_keeps_direction() {
        let model = toy();
        let all = 4 * ROWS + 5;
        let expected: f64 = [4 * ROWS, 5]
            .iter()
            .flat_map(|&n| wave(n, 2.0))
            .map(|x| f64::from(x) * f64::from(x))
            .sum::<f64>()
            .sqrt();
        for host in [true, false] {
            let mut sum = GradientSum::default();
            sum.add(&model, gradients(&model, 1.0));
            let norm = sum.norm(host);
            assert!((norm / expected - 1.0).abs() < 1e-5, "{norm} and {expected} of {all}");
            // The norm of the mean of three equal micro-steps is a third of their sum's.
            let rates = Rates { lr: 1.0, weight_decay: 0.0 };
            let clipped = Update::new(&config(0.5), rates, 1, 3.0 * norm, 3);
            assert!((f64::from(clipped.scale) * 3.0 * norm - 0.5).abs() < 1e-6);
            let free = Update::new(&config(norm * 1.01), rates, 1, 3.0 * norm, 3);
            assert_eq!(free.scale, 1.0 / 3.0);
            let off = Update::new(&config(0.0), rates, 1, 3.0 * norm, 3);
            assert_eq!(off.scale, 1.0 / 3.0);
        }
    }

    #[test]
    fn the_state_goes_on_bit_for_bit() {
        let step = |model: Toy, optimizer: &mut AdamW| {
            let mut sum = GradientSum::default();
            sum.add(&model, gradients(&model, 1.0));
            let norm = sum.norm(true);
            optimizer.step(model, sum, norm, 1, Rates { lr: 0.01, weight_decay: 0.1 })
        };
        let mut model = toy();
        let mut optimizer = AdamW::new(&config(1.0), &model, &device(), true);
        for _ in 0..3 {
            model = step(model, &mut optimizer);
        }
        let names: Vec<String> = optimizer.state_shapes().into_iter().map(|(n, _)| n).collect();
        assert_eq!(
            names,
            ["matrix.exp_avg", "matrix.exp_avg_sq", "norm.exp_avg", "norm.exp_avg_sq"]
        );
        let saved: std::collections::HashMap<_, _> = optimizer.state().collect();
        let mut second = AdamW::new(&config(1.0), &model, &device(), true);
        second
            .load(optimizer.steps(), |name, n| match saved.get(name) {
                Some(v) if v.len() == n => Ok(v.clone()),
                _ => Err(name.to_owned()),
            })
            .unwrap();
        let a = step(model.clone(), &mut optimizer);
        let b = step(model.clone(), &mut second);
        assert_eq!(values(&a), values(&b));
        assert_ne!(values(&a), values(&model));
        assert!(second.load(0, |name, _| Err(name.to_owned())).is_err());
    }
}

//! The optimizers, AdamW and Muon, gradient accumulation and clipping by the norm
//! of the whole gradient.
//!
//! burn's optimizers clip tensor by tensor, fix weight decay at their making and
//! walk each tensor a dozen times; these have fused passes on the CPU, and the
//! same arithmetic in tensor operations elsewhere. Their state is one or two
//! tensors a parameter and a step count, saved and loaded exactly.
//!
//! Parameters come in three groups, norms, embeddings and matrices, each with its
//! share of the learning rate and with weight decay or without.

mod adamw;
mod config;
mod muon;

#[cfg(test)]
pub(crate) use config::tests::adamw as config_for_tests;
pub use config::{Group, GroupConfig, GroupsConfig, OptimizerConfig, OptimizerKind};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Gradients, Tensor, TensorData};
use rayon::prelude::*;

use crate::ranks::Ranks;
use crate::schedule::Rates;
use adamw::Moments;
use muon::Momentum;

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

    /// The sums, in the order of the module's parameters.
    #[cfg(test)]
    pub(crate) fn values(&self) -> Vec<Option<Vec<f32>>> {
        let values = |t: &Tensor<1>| slice(&t.to_data()).to_vec();
        self.tensors.iter().map(|t| t.as_ref().map(values)).collect()
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

/// The optimizer: its constants and the state of every parameter.
#[derive(Debug)]
pub struct Optimizer {
    config: OptimizerConfig,
    host: bool,
    steps: u64,
    slots: Vec<Slot>,
}

/// What is kept of one parameter.
#[derive(Debug)]
struct Slot {
    name: String,
    group: Group,
    state: SlotState,
}

#[derive(Debug)]
enum SlotState {
    Adamw(Box<Moments>),
    Muon(Box<Momentum>),
}

/// A tensor of the optimizer's state: name, length, values.
pub type StateTensor = (String, Vec<f32>);

impl Optimizer {
    /// An optimizer of `model`, its state zero. `host`: the parameters lie in host
    /// memory.
    #[must_use]
    pub fn new<M: Module>(
        config: &OptimizerConfig,
        model: &M,
        device: &Device,
        host: bool,
    ) -> Self {
        let device = device.clone().without_autodiff();
        let mut visitor = Zeros { path: Vec::new(), kind: config.kind, device, slots: Vec::new() };
        model.visit(&mut visitor);
        Self { config: config.clone(), host, steps: 0, slots: visitor.slots }
    }

    /// What updates the matrices.
    #[must_use]
    pub fn kind(&self) -> OptimizerKind {
        self.config.kind
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
        let scale = clipped(self.config.clip_norm, norm, micro_steps);
        let gradients = sum.tensors.into_iter();
        model.map(&mut Stepper { optimizer: self, next: 0, gradients, rates, scale })
    }

    /// Names and lengths of the state's tensors, in the order of
    /// [`Optimizer::state`].
    #[must_use]
    pub fn state_shapes(&self) -> Vec<(String, Vec<usize>)> {
        self.tensors().map(|(name, tensor)| (name, tensor.dims().to_vec())).collect()
    }

    /// The state, tensor by tensor.
    pub fn state(&self) -> impl Iterator<Item = StateTensor> + '_ {
        self.tensors().map(|(name, tensor)| (name, slice(&tensor.to_data()).to_vec()))
    }

    fn tensors(&self) -> impl Iterator<Item = (String, &Tensor<1>)> {
        self.slots.iter().flat_map(|slot| {
            let tensors = match &slot.state {
                SlotState::Adamw(m) => {
                    [("exp_avg", Some(&m.first)), ("exp_avg_sq", Some(&m.second))]
                }
                SlotState::Muon(m) => [("momentum_buffer", Some(&m.buffer)), ("", None)],
            };
            tensors.into_iter().filter_map(|(part, t)| Some((format!("{}.{part}", slot.name), t?)))
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
        for slot in &mut self.slots {
            let mut replace = |part: &str, tensor: &mut Tensor<1>| {
                let ([length], device) = (tensor.dims(), tensor.device());
                let values = read(&format!("{}.{part}", slot.name), length)?;
                *tensor = Tensor::from_data(TensorData::new(values, [length]), &device);
                Ok(())
            };
            match &mut slot.state {
                SlotState::Adamw(m) => {
                    replace("exp_avg", &mut m.first)?;
                    replace("exp_avg_sq", &mut m.second)?;
                }
                SlotState::Muon(m) => replace("momentum_buffer", &mut m.buffer)?,
            }
        }
        self.steps = steps;
        Ok(())
    }
}

/// What takes the sum of the gradients of `micro_steps`, of norm `norm`, to their
/// mean, clipped to `clip_norm` (0: not at all).
fn clipped(clip_norm: f64, norm: f64, micro_steps: usize) -> f64 {
    let clip = clip_norm > 0.0 && norm / micro_steps as f64 > clip_norm;
    if clip { clip_norm / norm } else { 1.0 / micro_steps as f64 }
}

struct Zeros {
    path: Vec<String>,
    kind: OptimizerKind,
    device: Device,
    slots: Vec<Slot>,
}

impl ModuleVisitor for Zeros {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let shape = param.lazy_shape();
        let zeros = || Tensor::zeros([shape.num_elements()], &self.device);
        let name = self.path.join(".");
        let group = Group::of(&name, D);
        let state = match (self.kind, group, &shape[..]) {
            (OptimizerKind::Muon, Group::Matrices, &[rows, cols]) => {
                SlotState::Muon(Box::new(Momentum { buffer: zeros(), shape: [rows, cols] }))
            }
            _ => SlotState::Adamw(Box::new(Moments { first: zeros(), second: zeros() })),
        };
        self.slots.push(Slot { name, group, state });
    }
}

struct Stepper<'o> {
    optimizer: &'o mut Optimizer,
    next: usize,
    gradients: std::vec::IntoIter<Option<Tensor<1>>>,
    rates: Rates,
    scale: f64,
}

impl ModuleMapper for Stepper<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Optimizer { config, host, steps, slots } = &mut *self.optimizer;
        let slot = &mut slots[self.next];
        self.next += 1;
        let Some(gradient) = self.gradients.next().flatten() else {
            return param;
        };
        let group = config.groups.get(slot.group);
        let rates = Rates {
            lr: self.rates.lr * group.lr_scale,
            weight_decay: if group.weight_decay { self.rates.weight_decay } else { 0.0 },
        };
        let (id, tensor, mapper) = param.consume();
        let (strategy, tracked) = (tensor.device(), tensor.is_require_grad());
        let shape = tensor.shape();
        let flat = tensor.inner().reshape([-1]);
        let flat = match &mut slot.state {
            SlotState::Adamw(moments) => {
                let update = adamw::Update::new(config, rates, *steps, self.scale);
                update.apply(*host, flat, gradient, moments)
            }
            SlotState::Muon(momentum) => {
                let update = muon::Update::new(config, rates, momentum.shape, self.scale);
                update.apply(*host, flat, gradient, &mut momentum.buffer)
            }
        };
        let mut tensor: Tensor<D> = flat.reshape(shape);
        if strategy.is_autodiff() {
            tensor = Tensor::from_inner(tensor).set_require_grad(tracked);
        }
        Param::from_mapped_value(id, tensor, mapper)
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
    use bitnet_core::ModelConfig;

    use super::config::tests::{adamw as config, muon};
    use super::*;
    use crate::model::Transformer;

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
            let mut optimizer = Optimizer::new(&config(0.0), &model, &device(), host);
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
            assert!((clipped(0.5, 3.0 * norm, 3) * 3.0 * norm - 0.5).abs() < 1e-12);
            assert_eq!(clipped(norm * 1.01, 3.0 * norm, 3), 1.0 / 3.0);
            assert_eq!(clipped(0.0, 3.0 * norm, 3), 1.0 / 3.0);
        }
    }

    #[test]
    fn the_groups_of_a_model_are_its_parts() {
        for tie_word_embeddings in [true, false] {
            let config = ModelConfig { tie_word_embeddings, ..ModelConfig::tiny() };
            let model = Transformer::new(&config, 1, &device());
            let optimizer = Optimizer::new(&muon(), &model, &device(), true);
            let length = |slot: &Slot| match &slot.state {
                SlotState::Adamw(m) => m.first.dims()[0] as u64,
                SlotState::Muon(m) => m.buffer.dims()[0] as u64,
            };
            let of = |group| {
                let slots = optimizer.slots.iter().filter(|s| s.group == group);
                slots.map(length).sum::<u64>()
            };
            let count = config.parameter_count();
            assert_eq!(of(Group::Embeddings), count.embedding + count.head);
            assert_eq!(of(Group::Norms), count.norms);
            assert_eq!(of(Group::Matrices), count.linear);
            for slot in &optimizer.slots {
                let is_muon = matches!(slot.state, SlotState::Muon(_));
                assert_eq!(is_muon, slot.group == Group::Matrices, "{}", slot.name);
            }
        }
    }

    #[test]
    fn a_group_has_its_own_rate_and_decay() {
        for host in [true, false] {
            let mut model = toy();
            let (matrix, norm) = values(&model);
            let (mut matrix, mut norm) = (Reference::new(matrix), Reference::new(norm));
            let mut config = config(0.0);
            config.groups.norms = GroupConfig { lr_scale: 0.25, weight_decay: true };
            config.groups.matrices = GroupConfig { lr_scale: 2.0, weight_decay: false };
            let mut optimizer = Optimizer::new(&config, &model, &device(), host);
            let wave = wave(4 * ROWS, 2.0);
            for t in 1..=3 {
                let mut sum = GradientSum::default();
                sum.add(&model, gradients(&model, t as f32));
                let of_sum = sum.norm(host);
                let rates = Rates { lr: 0.01, weight_decay: 0.1 };
                model = optimizer.step(model, sum, of_sum, 1, rates);
                let g = |i: usize| f64::from(wave[i]) * f64::from(t);
                matrix.step(g, t, 0.02, 0.0);
                norm.step(g, t, 0.0025, 0.1);
            }
            let found = values(&model);
            matrix.assert_close(&found.0);
            norm.assert_close(&found.1);
        }
    }

    #[test]
    fn the_state_goes_on_bit_for_bit() {
        goes_on(
            &config(1.0),
            &["matrix.exp_avg", "matrix.exp_avg_sq", "norm.exp_avg", "norm.exp_avg_sq"],
        );
        goes_on(&muon(), &["matrix.momentum_buffer", "norm.exp_avg", "norm.exp_avg_sq"]);
    }

    fn goes_on(config: &OptimizerConfig, expected: &[&str]) {
        let step = |model: Toy, optimizer: &mut Optimizer| {
            let mut sum = GradientSum::default();
            sum.add(&model, gradients(&model, 1.0));
            let norm = sum.norm(true);
            optimizer.step(model, sum, norm, 1, Rates { lr: 0.01, weight_decay: 0.1 })
        };
        let mut model = toy();
        let mut optimizer = Optimizer::new(config, &model, &device(), true);
        for _ in 0..3 {
            model = step(model, &mut optimizer);
        }
        let names: Vec<String> = optimizer.state_shapes().into_iter().map(|(n, _)| n).collect();
        assert_eq!(names, expected);
        let saved: std::collections::HashMap<_, _> = optimizer.state().collect();
        let mut second = Optimizer::new(config, &model, &device(), true);
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

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
pub use config::{Group, GroupConfig, GroupsConfig, MomentType, OptimizerConfig, OptimizerKind};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Gradients, Tensor, TensorData};
use rayon::prelude::*;

use crate::ops::cpu::kernels;
use crate::profile;
use crate::ranks::Ranks;
use crate::schedule::Rates;
use adamw::{ByteMoments, Moments};
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

    /// Adds the sum of another device. `device`: where this one lies, without autodiff.
    pub(crate) fn add_device(&mut self, other: Self, device: &Device) {
        for (at, new) in other.tensors.into_iter().enumerate() {
            if self.tensors.len() <= at {
                self.tensors.push(None);
            }
            let Some(new) = new.map(|new| new.to_device(device)) else { continue };
            let slot = &mut self.tensors[at];
            *slot = Some(match slot.take() {
                Some(sum) => sum.add(new),
                None => new,
            });
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
        let _span = profile::span("gradient norm");
        if !host {
            // One reading, which the device is waited for, not one a parameter.
            let squares = self.tensors.iter().flatten().map(|t| t.clone().square().sum());
            let squares: Vec<Tensor<1>> = squares.collect();
            if squares.is_empty() {
                return 0.0;
            }
            let squares = Tensor::cat(squares, 0).into_data();
            return slice(&squares).iter().copied().map(f64::from).sum::<f64>().sqrt();
        }
        let devices: Vec<Device> = self.tensors.iter().flatten().map(Tensor::device).collect();
        let data: Vec<TensorData> =
            self.tensors.iter_mut().flatten().zip(&devices).map(|(t, d)| take(t, d)).collect();
        let squares = sums_of_squares(&data);
        for ((tensor, data), device) in self.tensors.iter_mut().flatten().zip(data).zip(&devices) {
            *tensor = Tensor::from_data(data, device);
        }
        squares.into_iter().sum::<f64>().sqrt()
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
    AdamwBytes(Box<ByteMoments>),
    Muon(Box<Momentum>),
}

/// A tensor of the optimizer's state: its name and values.
pub type StateTensor<'o> = (String, StateValues<'o>);

/// The values of a tensor of the optimizer's state.
#[derive(Debug, Clone)]
pub enum StateValues<'o> {
    /// f32.
    Tensor(&'o Tensor<1>),
    /// Scales of moments.
    Floats(&'o [f32]),
    /// Moments as bytes.
    Bytes(&'o [u8]),
}

impl StateValues<'_> {
    /// Their number.
    #[must_use]
    pub fn count(&self) -> usize {
        match self {
            Self::Tensor(tensor) => tensor.dims()[0],
            Self::Floats(values) => values.len(),
            Self::Bytes(values) => values.len(),
        }
    }
}

/// Reads saved state back, tensor by tensor.
pub trait ReadState {
    /// What can go wrong.
    type Error;
    /// The f32 tensor `name` of `len` values.
    ///
    /// # Errors
    /// A tensor that is not there, of another type or another length.
    fn floats(&mut self, name: &str, len: usize) -> Result<Vec<f32>, Self::Error>;
    /// The tensor `name` of `len` bytes.
    ///
    /// # Errors
    /// As there.
    fn bytes(&mut self, name: &str, len: usize) -> Result<Vec<u8>, Self::Error>;
}

impl Optimizer {
    /// An optimizer of `model`, its state zero. `host`: the parameters lie in host
    /// memory; only there moments can be bytes.
    #[must_use]
    pub fn new<M: Module>(
        config: &OptimizerConfig,
        model: &M,
        device: &Device,
        host: bool,
    ) -> Self {
        let device = device.clone().without_autodiff();
        let moments = if host { config.moments } else { MomentType::F32 };
        let bytes = moments == MomentType::Int8;
        let mut visitor =
            Zeros { path: Vec::new(), kind: config.kind, bytes, device, slots: Vec::new() };
        model.visit(&mut visitor);
        let config = OptimizerConfig { moments, ..config.clone() };
        Self { config, host, steps: 0, slots: visitor.slots }
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
        let _span = profile::span("optimizer");
        self.steps += 1;
        let scale = clipped(self.config.clip_norm, norm, micro_steps);
        let gradients = sum.tensors.into_iter();
        let mut stepper =
            Stepper { optimizer: self, next: 0, gradients, rates, scale, taken: Vec::new() };
        let model = model.map(&mut stepper);
        let mut taken = stepper.taken;
        if taken.iter().all(Option::is_none) {
            return model;
        }
        // All parameters in one loop.
        adamw::step_all(taken.iter_mut().flatten());
        model.map(&mut Finisher { optimizer: self, next: 0, taken })
    }

    /// What AdamW's moments are kept as.
    #[must_use]
    pub fn moments(&self) -> MomentType {
        self.config.moments
    }

    /// The state, tensor by tensor, in the order of the module's parameters.
    pub fn state(&self) -> impl Iterator<Item = StateTensor<'_>> {
        self.slots.iter().flat_map(|slot| {
            let tensors = match &slot.state {
                SlotState::Adamw(m) => {
                    let [first, second] = [&m.first, &m.second].map(StateValues::Tensor);
                    vec![("exp_avg", first), ("exp_avg_sq", second)]
                }
                SlotState::AdamwBytes(m) => {
                    let [first, second] = [&m.first[..], &m.second].map(StateValues::Bytes);
                    let scales = StateValues::Floats(m.scales.as_flattened());
                    vec![(FIRST, first), (SECOND, second), (SCALES, scales)]
                }
                SlotState::Muon(m) => vec![("momentum_buffer", StateValues::Tensor(&m.buffer))],
            };
            tensors.into_iter().map(|(part, values)| (format!("{}.{part}", slot.name), values))
        })
    }

    /// Replaces the state by a saved one.
    ///
    /// # Errors
    /// What `read` returns for a tensor that is not there or of another length.
    pub fn load<R: ReadState>(&mut self, steps: u64, read: &mut R) -> Result<(), R::Error> {
        for slot in &mut self.slots {
            let name = |part: &str| format!("{}.{part}", slot.name);
            let replace = |part: &str, tensor: &mut Tensor<1>, read: &mut R| {
                let ([length], device) = (tensor.dims(), tensor.device());
                let values = read.floats(&name(part), length)?;
                *tensor = Tensor::from_data(TensorData::new(values, [length]), &device);
                Ok(())
            };
            match &mut slot.state {
                SlotState::Adamw(m) => {
                    replace("exp_avg", &mut m.first, read)?;
                    replace("exp_avg_sq", &mut m.second, read)?;
                }
                SlotState::AdamwBytes(m) => {
                    m.first = read.bytes(&name(FIRST), m.first.len())?;
                    m.second = read.bytes(&name(SECOND), m.second.len())?;
                    let scales = read.floats(&name(SCALES), 2 * m.scales.len())?;
                    m.scales.as_flattened_mut().copy_from_slice(&scales);
                }
                SlotState::Muon(m) => replace("momentum_buffer", &mut m.buffer, read)?,
            }
        }
        self.steps = steps;
        Ok(())
    }
}

/// The parts of moments that are kept as bytes, see [`bitnet_kernels::MomentsMut`].
const FIRST: &str = "exp_avg.uint8";
const SECOND: &str = "exp_avg_sq.root.uint8";
const SCALES: &str = "moments.scales";

/// What takes the sum of the gradients of `micro_steps`, of norm `norm`, to their
/// mean, clipped to `clip_norm` (0: not at all).
fn clipped(clip_norm: f64, norm: f64, micro_steps: usize) -> f64 {
    let clip = clip_norm > 0.0 && norm / micro_steps as f64 > clip_norm;
    if clip { clip_norm / norm } else { 1.0 / micro_steps as f64 }
}

struct Zeros {
    path: Vec<String>,
    kind: OptimizerKind,
    /// Whether moments are kept as bytes.
    bytes: bool,
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
            _ if self.bytes && group != Group::Norms => {
                SlotState::AdamwBytes(Box::new(ByteMoments::zeros(shape.num_elements())))
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
    /// What waits for the loop over all parameters; a parameter of one element stands
    /// in its place.
    taken: Vec<Option<adamw::Taken>>,
}

impl ModuleMapper for Stepper<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Optimizer { config, host, steps, slots } = &mut *self.optimizer;
        let at = self.next;
        let slot = &mut slots[at];
        self.next += 1;
        let Some(gradient) = self.gradients.next().flatten() else {
            self.taken.push(None);
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
        let inner = tensor.inner();
        let device = inner.device();
        let flat = inner.reshape([-1]);
        let (taken, flat) = match &mut slot.state {
            SlotState::Adamw(moments) => {
                let update = adamw::Update::new(config, rates, *steps, self.scale);
                if *host {
                    let taken = update.take(flat, gradient, moments, shape.clone());
                    (Some(taken), Tensor::zeros([1], &device))
                } else {
                    (None, update.apply_tensors(flat, gradient, moments))
                }
            }
            SlotState::AdamwBytes(moments) => {
                let update = adamw::Update::new(config, rates, *steps, self.scale);
                let of = (*steps, at);
                let taken = update.take_bytes(flat, gradient, moments, shape.clone(), of);
                (Some(taken), Tensor::zeros([1], &device))
            }
            SlotState::Muon(momentum) => {
                let update = muon::Update::new(config, rates, momentum.shape, self.scale);
                (None, update.apply(*host, flat, gradient, &mut momentum.buffer))
            }
        };
        let mut tensor: Tensor<D> = match taken {
            Some(_) => flat.reshape([1; D]),
            None => flat.reshape(shape),
        };
        self.taken.push(taken);
        if strategy.is_autodiff() {
            tensor = Tensor::from_inner(tensor).set_require_grad(tracked);
        }
        Param::from_mapped_value(id, tensor, mapper)
    }
}

/// Puts parameters back into their places.
struct Finisher<'o> {
    optimizer: &'o mut Optimizer,
    next: usize,
    taken: Vec<Option<adamw::Taken>>,
}

impl ModuleMapper for Finisher<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let at = self.next;
        self.next += 1;
        let Some(taken) = self.taken[at].take() else { return param };
        let state = &mut self.optimizer.slots[at].state;
        let (id, tensor, mapper) = param.consume();
        let (strategy, tracked) = (tensor.device(), tensor.is_require_grad());
        let device = tensor.inner().device();
        let mut tensor: Tensor<D> = taken.finish(state, &device);
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

/// Of every tensor in double precision, chunk by chunk in order, in one loop.
fn sums_of_squares(tensors: &[TensorData]) -> Vec<f64> {
    let chunks = tensors.iter().enumerate();
    let chunks: Vec<(usize, &[f32])> =
        chunks.flat_map(|(i, t)| slice(t).chunks(CHUNK).map(move |c| (i, c))).collect();
    let sums: Vec<(usize, f64)> =
        chunks.into_par_iter().map(|(i, c)| (i, kernels().sum_of_squares(c))).collect();
    let mut out = vec![0.0; tensors.len()];
    sums.into_iter().for_each(|(i, sum)| out[i] += sum);
    out
}

/// The same of one.
fn sum_of_squares(values: &[f32]) -> f64 {
    let sums: Vec<f64> = values.par_chunks(CHUNK).map(|c| kernels().sum_of_squares(c)).collect();
    sums.iter().sum()
}

#[cfg(test)]
mod tests;

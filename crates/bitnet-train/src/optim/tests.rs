use std::collections::HashMap;

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
            SlotState::AdamwBytes(m) => m.first.len() as u64,
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
    let bytes = OptimizerConfig { moments: MomentType::Int8, ..config(1.0) };
    goes_on(
        &bytes,
        &[
            "matrix.exp_avg.uint8",
            "matrix.exp_avg_sq.root.uint8",
            "matrix.moments.scales",
            "norm.exp_avg",
            "norm.exp_avg_sq",
        ],
    );
    let kept = ["matrix.momentum_buffer", "norm.exp_avg", "norm.exp_avg_sq"];
    goes_on(&muon(), &kept);
    // Neither Muon's nor the norms' moments are bytes.
    goes_on(&OptimizerConfig { moments: MomentType::Int8, ..muon() }, &kept);
}

/// A state in memory.
#[derive(Debug, Default)]
struct Saved {
    names: Vec<String>,
    floats: HashMap<String, Vec<f32>>,
    bytes: HashMap<String, Vec<u8>>,
}

impl Saved {
    fn of(optimizer: &Optimizer) -> Self {
        let mut saved = Self::default();
        for (name, values) in optimizer.state() {
            saved.names.push(name.clone());
            match values {
                StateValues::Tensor(t) => {
                    saved.floats.insert(name, slice(&t.to_data()).to_vec());
                }
                StateValues::Floats(v) => {
                    saved.floats.insert(name, v.to_vec());
                }
                StateValues::Bytes(v) => {
                    saved.bytes.insert(name, v.to_vec());
                }
            }
        }
        saved
    }
}

impl ReadState for Saved {
    type Error = String;

    fn floats(&mut self, name: &str, len: usize) -> Result<Vec<f32>, String> {
        self.floats.get(name).filter(|v| v.len() == len).cloned().ok_or_else(|| name.to_owned())
    }

    fn bytes(&mut self, name: &str, len: usize) -> Result<Vec<u8>, String> {
        self.bytes.get(name).filter(|v| v.len() == len).cloned().ok_or_else(|| name.to_owned())
    }
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
    let mut saved = Saved::of(&optimizer);
    assert_eq!(saved.names, expected);
    let mut second = Optimizer::new(config, &model, &device(), true);
    second.load(optimizer.steps(), &mut saved).unwrap();
    let a = step(model.clone(), &mut optimizer);
    let b = step(model.clone(), &mut second);
    assert_eq!(values(&a), values(&b));
    assert_ne!(values(&a), values(&model));
    assert_eq!(second.load(0, &mut Saved::default()).unwrap_err(), expected[0]);
}

/// Moments as bytes: the same bits with any number of threads, and steps that are those of
/// f32 but for what the roundings of moments add.
#[test]
fn moments_as_bytes_take_nearly_the_same_steps() {
    let run = |moments: MomentType, threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let config = OptimizerConfig { moments, ..config(0.0) };
        let mut model = toy();
        let mut optimizer = Optimizer::new(&config, &model, &device(), true);
        for t in 1..=6 {
            let mut sum = GradientSum::default();
            sum.add(&model, gradients(&model, 1.0 + (t % 3) as f32));
            let rates = Rates { lr: 0.01, weight_decay: 0.1 };
            model = pool.install(|| optimizer.step(model.clone(), sum, 1.0, 1, rates));
        }
        values(&model)
    };
    let (matrix, norm) = run(MomentType::Int8, 1);
    assert_eq!(run(MomentType::Int8, 3), (matrix.clone(), norm.clone()));
    let (exact, exact_norm) = run(MomentType::F32, 1);
    assert_eq!(norm, exact_norm);
    assert_ne!(matrix, exact);
    let (start, _) = values(&toy());
    let rms = |a: &[f32], b: &[f32]| {
        let squares = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2));
        (squares.sum::<f64>() / a.len() as f64).sqrt()
    };
    let (moved, off) = (rms(&exact, &start), rms(&matrix, &exact));
    // Neighbours are apart by at most 1/64 and 1/128 of the largest of a block.
    assert!(off < 0.02 * moved, "{off} of {moved}");
}

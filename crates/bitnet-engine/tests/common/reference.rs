//! A forward pass written from the formulas: f64, whole sequence at once, no
//! cache, exact integers where the model has them. Shares no code with the
//! engine.

use bitnet_core::names::{Linear, Norm};
use bitnet_core::{Activation, ModelConfig};

use super::{Block, Dense, RandomModel, Weight, max_difference, norm_name};

/// How far from a half an activation may lie, in steps of its int8 grid, for f32 to
/// round it the other way: it reaches 127 and carries relative errors of a few 1e-7.
const NEAR: f64 = 2e-5;

/// Logits are computed alike where they differ by less; one activation that rounds the
/// other way moves them by thousand times that.
const ALIKE: f32 = 1e-5;

/// The vectors of a block that are quantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// Of q, k and v.
    Attention,
    /// Of o.
    Output,
    /// Of gate and up.
    FeedForward,
    /// Of down.
    Down,
}

/// The rounding of one activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rounding {
    pub position: usize,
    pub layer: usize,
    pub input: Input,
    pub index: usize,
}

/// The result at one position.
pub struct Position {
    pub logits: Vec<f32>,
    /// The activations of this token that lie near a half, with their distance to it,
    /// the nearest first.
    pub near: Vec<(Rounding, f64)>,
}

impl Position {
    /// The distance of the nearest.
    pub fn margin(&self) -> f64 {
        self.near.first().map_or(NEAR, |(_, distance)| *distance)
    }
}

/// A vector as a linear layer reads it.
struct Quantized<'a> {
    x: &'a [f64],
    q: Vec<i64>,
    scale: f64,
}

/// What a pass is told and what it notes.
struct Roundings<'a> {
    /// Activations that go the other way.
    other_way: &'a [Rounding],
    /// Of each position, those near a half.
    near: Vec<Vec<(Rounding, f64)>>,
}

impl Roundings<'_> {
    fn quantize<'x>(
        &mut self,
        x: &'x [f64],
        position: usize,
        layer: usize,
        input: Input,
    ) -> Quantized<'x> {
        let absmax = x.iter().fold(1e-5f64, |m, x| m.max(x.abs()));
        let mut q = Vec::with_capacity(x.len());
        for (index, x) in x.iter().enumerate() {
            let value = x * 127.0 / absmax;
            let mut int = value.round_ties_even().clamp(-128.0, 127.0);
            let distance = (value.rem_euclid(1.0) - 0.5).abs();
            let this = Rounding { position, layer, input, index };
            if self.other_way.contains(&this) {
                int = value.floor() + value.ceil() - int;
            } else if distance < NEAR {
                self.near[position].push((this, distance));
            }
            q.push(int as i64);
        }
        Quantized { x, q, scale: absmax / 127.0 }
    }
}

fn rms_norm(x: &[f64], weight: &[f32], eps: f32) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let inv = 1.0 / (mean + f64::from(eps)).sqrt();
    x.iter().zip(weight).map(|(x, w)| x * inv * f64::from(*w)).collect()
}

fn matvec(w: &Dense, x: &[f64]) -> Vec<f64> {
    w.values
        .chunks(x.len())
        .map(|row| row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum())
        .collect()
}

fn linear(weight: &Weight, input: &Quantized<'_>) -> Vec<f64> {
    match weight {
        Weight::Dense(w) => matvec(w, input.x),
        Weight::Ternary { trits, scale } => trits
            .chunks(input.q.len())
            .map(|row| {
                let sum: i64 = row.iter().zip(&input.q).map(|(t, q)| i64::from(*t) * q).sum();
                sum as f64 * input.scale * f64::from(*scale)
            })
            .collect(),
    }
}

fn rotate(head: &mut [f64], position: usize, theta: f32) {
    let half = head.len() / 2;
    for i in 0..half {
        let frequency = f64::from(theta).powf(-2.0 * i as f64 / head.len() as f64);
        let (sin, cos) = (position as f64 * frequency).sin_cos();
        let (a, b) = (head[i], head[i + half]);
        head[i] = a * cos - b * sin;
        head[i + half] = b * cos + a * sin;
    }
}

fn attention(
    config: &ModelConfig,
    q: &[Vec<f64>],
    k: &[Vec<f64>],
    v: &[Vec<f64>],
) -> Vec<Vec<f64>> {
    let c = config.head_dim();
    let group = config.num_attention_heads / config.num_key_value_heads;
    (0..q.len())
        .map(|t| {
            let mut out = Vec::new();
            for h in 0..config.num_attention_heads {
                let kv = h / group * c;
                let q = &q[t][h * c..(h + 1) * c];
                let scores: Vec<f64> = (0..=t)
                    .map(|s| {
                        let k = &k[s][kv..kv + c];
                        q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() / (c as f64).sqrt()
                    })
                    .collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let exp: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
                let sum: f64 = exp.iter().sum();
                for i in 0..c {
                    out.push((0..=t).map(|s| exp[s] / sum * v[s][kv + i]).sum());
                }
            }
            out
        })
        .collect()
}

fn block(
    config: &ModelConfig,
    layer: usize,
    b: &Block,
    x: &mut [Vec<f64>],
    roundings: &mut Roundings<'_>,
) {
    let eps = config.rms_norm_eps;
    let weight = |l: Linear| &b.linears[Linear::ALL.iter().position(|x| *x == l).unwrap()];
    let norm = |n: Norm, x: &[f64]| match b.norms.get(norm_name(n)) {
        Some(w) => rms_norm(x, w, eps),
        None => x.to_vec(),
    };
    let (mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new());
    for (t, x) in x.iter().enumerate() {
        let h = norm(Norm::Attention, x);
        let h = roundings.quantize(&h, t, layer, Input::Attention);
        let rotated = |l| {
            let mut y = linear(weight(l), &h);
            for head in y.chunks_mut(config.head_dim()) {
                rotate(head, t, config.rope_theta);
            }
            y
        };
        q.push(rotated(Linear::Q));
        k.push(rotated(Linear::K));
        v.push(linear(weight(Linear::V), &h));
    }
    for (t, (x, a)) in x.iter_mut().zip(attention(config, &q, &k, &v)).enumerate() {
        let a = norm(Norm::AttentionSub, &a);
        let o = linear(weight(Linear::O), &roundings.quantize(&a, t, layer, Input::Output));
        x.iter_mut().zip(o).for_each(|(x, o)| *x += o);
        let h = norm(Norm::FeedForward, x);
        let h = roundings.quantize(&h, t, layer, Input::FeedForward);
        let (gate, up) = (linear(weight(Linear::Gate), &h), linear(weight(Linear::Up), &h));
        let gated: Vec<f64> = gate
            .iter()
            .zip(up)
            .map(|(g, u)| match config.hidden_act {
                Activation::Relu2 => g.max(0.0).powi(2) * u,
                Activation::Silu => g / (1.0 + (-g).exp()) * u,
            })
            .collect();
        let gated = norm(Norm::FeedForwardSub, &gated);
        let down = linear(weight(Linear::Down), &roundings.quantize(&gated, t, layer, Input::Down));
        x.iter_mut().zip(down).for_each(|(x, d)| *x += d);
    }
}

/// Logits of every position, with these activations rounded the other way.
pub fn run(model: &RandomModel, tokens: &[u32], other_way: &[Rounding]) -> Vec<Position> {
    let config = &model.config;
    let mut roundings = Roundings { other_way, near: vec![Vec::new(); tokens.len()] };
    let mut x: Vec<Vec<f64>> = tokens
        .iter()
        .map(|&t| {
            let row = &model.embedding.values[t as usize * config.hidden_size..];
            row[..config.hidden_size].iter().map(|x| f64::from(*x)).collect()
        })
        .collect();
    for (layer, b) in model.blocks.iter().enumerate() {
        block(config, layer, b, &mut x, &mut roundings);
    }
    let head = model.head.as_ref().unwrap_or(&model.embedding);
    x.iter()
        .zip(roundings.near)
        .map(|(x, mut near)| {
            let h = rms_norm(x, &model.final_norm, config.rms_norm_eps);
            let logits = matvec(head, &h).into_iter().map(|x| x as f32).collect();
            near.sort_by(|a, b| a.1.total_cmp(&b.1));
            Position { logits, near }
        })
        .collect()
}

/// The pass that computed `found`, the logits of the first positions of `tokens`: with
/// the activations, in order of position, that it rounded the other way, and the
/// distance of each to a half. All logits of `found` are then alike.
///
/// # Panics
/// A difference that no activation near a half explains: at its position, alone or
/// together with one that comes near because of it.
pub fn explain(
    model: &RandomModel,
    tokens: &[u32],
    found: &[Vec<f32>],
) -> (Vec<(Rounding, f64)>, Vec<Position>) {
    let mut flips: Vec<(Rounding, f64)> = Vec::new();
    loop {
        let exact = run(model, tokens, &roundings(&flips));
        let differs = |(f, e): (&Vec<f32>, &Position)| max_difference(f, &e.logits) >= ALIKE;
        let Some(t) = found.iter().zip(&exact).position(differs) else { return (flips, exact) };
        let difference = max_difference(&found[t], &exact[t].logits);
        flips = search(model, &tokens[..=t], &found[t], &flips, &exact[t].near, 2).unwrap_or_else(
            || panic!("position {t}: {difference}, no flip explains it: {:?}", exact[t].near),
        );
    }
}

fn roundings(flips: &[(Rounding, f64)]) -> Vec<Rounding> {
    flips.iter().map(|(rounding, _)| *rounding).collect()
}

/// `flips` and up to `depth` more at the last of `tokens`, which make its logits `found`.
fn search(
    model: &RandomModel,
    tokens: &[u32],
    found: &[f32],
    flips: &[(Rounding, f64)],
    near: &[(Rounding, f64)],
    depth: usize,
) -> Option<Vec<(Rounding, f64)>> {
    let mut next = Vec::new();
    for candidate in near {
        let flips = [flips, &[*candidate]].concat();
        let last = run(model, tokens, &roundings(&flips)).pop()?;
        if max_difference(found, &last.logits) < ALIKE {
            return Some(flips);
        }
        next.push((flips, last.near));
    }
    if depth == 1 {
        return None;
    }
    next.iter().find_map(|(flips, near)| search(model, tokens, found, flips, near, depth - 1))
}

//! A forward pass written from the formulas: f64, whole sequence at once, no
//! cache, exact integers where the model has them. Shares no code with the
//! engine.

use std::cell::Cell;

use bitnet_core::names::{Linear, Norm};
use bitnet_core::{Activation, ModelConfig};

use super::{Block, Dense, RandomModel, Weight, norm_name};

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

/// A linear layer; `margin` becomes the smallest distance of an activation to a
/// value half-way between two integers, where f32 may round the other way.
fn linear(weight: &Weight, x: &[f64], margin: &Cell<f64>) -> Vec<f64> {
    match weight {
        Weight::Dense(w) => matvec(w, x),
        Weight::Ternary { trits, scale } => {
            let absmax = x.iter().fold(1e-5f64, |m, x| m.max(x.abs()));
            for x in x {
                let distance = ((x * 127.0 / absmax).rem_euclid(1.0) - 0.5).abs();
                margin.set(margin.get().min(distance));
            }
            let q: Vec<i64> = x
                .iter()
                .map(|x| (x * 127.0 / absmax).round_ties_even().clamp(-128.0, 127.0) as i64)
                .collect();
            trits
                .chunks(x.len())
                .map(|row| {
                    let sum: i64 = row.iter().zip(&q).map(|(t, q)| i64::from(*t) * q).sum();
                    sum as f64 * (absmax / 127.0) * f64::from(*scale)
                })
                .collect()
        }
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

fn block(config: &ModelConfig, b: &Block, x: &mut [Vec<f64>], margins: &[Cell<f64>]) {
    let eps = config.rms_norm_eps;
    let weight = |l: Linear| &b.linears[Linear::ALL.iter().position(|x| *x == l).unwrap()];
    let norm = |n: Norm, x: &[f64]| match b.norms.get(norm_name(n)) {
        Some(w) => rms_norm(x, w, eps),
        None => x.to_vec(),
    };
    let (mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new());
    for (t, x) in x.iter().enumerate() {
        let h = norm(Norm::Attention, x);
        let rotated = |l| {
            let mut y = linear(weight(l), &h, &margins[t]);
            for head in y.chunks_mut(config.head_dim()) {
                rotate(head, t, config.rope_theta);
            }
            y
        };
        q.push(rotated(Linear::Q));
        k.push(rotated(Linear::K));
        v.push(linear(weight(Linear::V), &h, &margins[t]));
    }
    for ((x, a), margin) in x.iter_mut().zip(attention(config, &q, &k, &v)).zip(margins) {
        let o = linear(weight(Linear::O), &norm(Norm::AttentionSub, &a), margin);
        x.iter_mut().zip(o).for_each(|(x, o)| *x += o);
        let h = norm(Norm::FeedForward, x);
        let (gate, up) =
            (linear(weight(Linear::Gate), &h, margin), linear(weight(Linear::Up), &h, margin));
        let gated: Vec<f64> = gate
            .iter()
            .zip(up)
            .map(|(g, u)| match config.hidden_act {
                Activation::Relu2 => g.max(0.0).powi(2) * u,
                Activation::Silu => g / (1.0 + (-g).exp()) * u,
            })
            .collect();
        let down = linear(weight(Linear::Down), &norm(Norm::FeedForwardSub, &gated), margin);
        x.iter_mut().zip(down).for_each(|(x, d)| *x += d);
    }
}

/// The result at one position.
pub struct Position {
    pub logits: Vec<f32>,
    /// How near an activation of this token came to rounding the other way.
    pub margin: f64,
}

/// Logits and margins of every position.
pub fn run(model: &RandomModel, tokens: &[u32]) -> Vec<Position> {
    let margins = vec![Cell::new(0.5); tokens.len()];
    let config = &model.config;
    let mut x: Vec<Vec<f64>> = tokens
        .iter()
        .map(|&t| {
            let row = &model.embedding.values[t as usize * config.hidden_size..];
            row[..config.hidden_size].iter().map(|x| f64::from(*x)).collect()
        })
        .collect();
    for b in &model.blocks {
        block(config, b, &mut x, &margins);
    }
    let head = model.head.as_ref().unwrap_or(&model.embedding);
    x.iter()
        .zip(&margins)
        .map(|(x, margin)| {
            let h = rms_norm(x, &model.final_norm, config.rms_norm_eps);
            let logits = matvec(head, &h).into_iter().map(|x| x as f32).collect();
            Position { logits, margin: margin.get() }
        })
        .collect()
}

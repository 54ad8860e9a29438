//! One step of AdamW for some elements, with moments as floats or as bytes.
//!
//! As bytes the moments of [`MOMENT_BLOCK`] neighbours share two scales (block by block as in
//! arXiv:2110.02861): the first moment is a multiple `± c²` of its scale with c up to 127, the
//! second's root one with c up to 255, so that small neighbours of a large one keep some
//! digits. The step itself takes moments of f32; what is kept of them is rounded up or down by
//! chance, so that the mean of what is kept is what was to be kept (but for roots below one
//! multiple, which become one): rounded to the nearest, a mean that moves by less than half
//! the way to its neighbour in a step would stand still. The chances are a hash of a seed and
//! the element's index, so that a step is the same whenever and wherever it is taken.

use crate::isa::{Kernels, dispatch};

/// Elements whose moments share their scales.
pub const MOMENT_BLOCK: usize = 64;

/// The constants of one step of AdamW with decoupled weight decay
/// (arXiv:1711.05101), the same for all elements of a parameter:
/// `g = scale · gradient`, `m = beta1 · m + (1 - beta1) · g`,
/// `v = beta2 · v + (1 - beta2) · g²`, `p = keep · p - rate · m / (√v · root + eps)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Decay of the mean of gradients.
    pub beta1: f32,
    /// Decay of the mean of their squares.
    pub beta2: f32,
    /// Keeps the quotient finite.
    pub eps: f32,
    /// Takes the sum of gradients to their clipped mean.
    pub scale: f32,
    /// `1 - lr · weight_decay`.
    pub keep: f32,
    /// `lr` over the first moment's bias.
    pub rate: f32,
    /// One over the root of the second moment's bias.
    pub root: f32,
}

impl AdamW {
    /// The definition: one element. Nothing is fused.
    #[inline(always)]
    fn element(&self, p: &mut f32, g: f32, m: &mut f32, v: &mut f32) {
        let g = g * self.scale;
        *m = *m * self.beta1 + g * (1.0 - self.beta1);
        *v = *v * self.beta2 + g * g * (1.0 - self.beta2);
        *p = *p * self.keep - self.rate * *m / (v.sqrt() * self.root + self.eps);
    }
}

/// Moments of neighbouring parameters as bytes.
#[derive(Debug)]
pub struct MomentsMut<'a> {
    /// First moments: the signed root of multiples of their scale, plus 128.
    pub first: &'a mut [u8],
    /// The roots of the second moments: the root of multiples of their scale.
    pub second: &'a mut [u8],
    /// The two scales of every block.
    pub scales: &'a mut [[f32; 2]],
}

/// What the chances of an element's two roundings are made of (the constants of Wellons'
/// "Prospecting for hash functions", 2018).
#[inline(always)]
fn hash(seed: u32, index: u32) -> u32 {
    let mut x = index.wrapping_mul(0x9e37_79b9).wrapping_add(seed);
    x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

/// The scale of values up to `largest` as multiples up to `most²`, and what they are
/// multiplied by. Values that are all below 2^-100 are kept as zeros.
#[inline(always)]
fn scale_of(largest: f32, most: f32) -> (f32, f32) {
    const SMALLEST: f32 = f32::from_bits((127 - 100) << 23);
    let most = most * most;
    if largest < SMALLEST { (0.0, 0.0) } else { (largest / most, most / largest) }
}

/// The root of the square of an integer below or above `x`, which has the mean `x` over all
/// chances in 0..1.
#[inline(always)]
fn root_of(x: f32, chance: f32) -> f32 {
    let root = x.sqrt().floor();
    // From its square to the next one it is twice the root and one.
    let above = x - root * root > chance * (root + root + 1.0);
    root + if above { 1.0 } else { 0.0 }
}

/// A float whose magnitude is an integer below 2^22 as the low byte of that integer.
#[inline(always)]
fn byte(x: f32) -> u8 {
    // Between 2^23 and 2^24 the floats are the integers.
    (x + 12_582_912.0).to_bits() as u8
}

/// A block of parameters with its gradients and moments.
struct Block {
    p: [f32; MOMENT_BLOCK],
    g: [f32; MOMENT_BLOCK],
    first: [u8; MOMENT_BLOCK],
    second: [u8; MOMENT_BLOCK],
    scales: [f32; 2],
}

impl AdamW {
    /// The definition: one block, whose first element has index `index`.
    #[inline(always)]
    fn block(&self, seed: u32, index: u32, b: Block) -> Block {
        let Block { mut p, g, mut first, mut second, scales: [of_first, of_root] } = b;
        let (mut m, mut v) = ([0.0f32; MOMENT_BLOCK], [0.0f32; MOMENT_BLOCK]);
        for i in 0..MOMENT_BLOCK {
            let (root, of_second) = (f32::from(i16::from(first[i]) - 128), f32::from(second[i]));
            m[i] = root * root.abs() * of_first;
            let root = of_second * of_second * of_root;
            v[i] = root * root;
        }
        for i in 0..MOMENT_BLOCK {
            self.element(&mut p[i], g[i], &mut m[i], &mut v[i]);
            v[i] = v[i].sqrt();
        }
        // As bits, in which what is not a number is larger than all that is.
        let (mut largest, mut root) = (0u32, 0u32);
        for i in 0..MOMENT_BLOCK {
            largest = largest.max(m[i].abs().to_bits());
            root = root.max(v[i].to_bits());
        }
        let (of_first, inv_first) = scale_of(f32::from_bits(largest), 127.0);
        let (of_root, inv_root) = scale_of(f32::from_bits(root), 255.0);
        for i in 0..MOMENT_BLOCK {
            let chance = hash(seed, index.wrapping_add(i as u32));
            let chances = [chance & 0xffff, chance >> 16].map(|c| c as f32 * 2f32.powi(-16));
            let kept = root_of(m[i].abs() * inv_first, chances[0]).min(127.0);
            first[i] = byte(kept.copysign(m[i]) + 128.0);
            // A root that is not 0 does not become 0: it divides.
            let least = if v[i] > 0.0 { 1.0 } else { 0.0 };
            second[i] = byte(root_of(v[i] * inv_root, chances[1]).clamp(least, 255.0));
        }
        Block { p, g, first, second, scales: [of_first, of_root] }
    }

    /// Takes the step for a block that may be shorter.
    #[inline(always)]
    fn part(&self, seed: u32, index: u32, p: &mut [f32], g: &[f32], m: MomentsMut<'_>) {
        let n = p.len();
        let mut block = Block {
            p: [0.0; MOMENT_BLOCK],
            g: [0.0; MOMENT_BLOCK],
            first: [128; MOMENT_BLOCK],
            second: [0; MOMENT_BLOCK],
            scales: m.scales[0],
        };
        block.p[..n].copy_from_slice(p);
        block.g[..n].copy_from_slice(g);
        block.first[..n].copy_from_slice(m.first);
        block.second[..n].copy_from_slice(m.second);
        let block = self.block(seed, index, block);
        p.copy_from_slice(&block.p[..n]);
        m.first.copy_from_slice(&block.first[..n]);
        m.second.copy_from_slice(&block.second[..n]);
        m.scales[0] = block.scales;
    }
}

impl Kernels {
    /// Takes a step as [`Kernels::adamw`], with moments that are kept as bytes. `index` is
    /// that of the first element in its parameter, a multiple of [`MOMENT_BLOCK`]; `seed`
    /// is another one for every parameter and step. The same bits on every instruction set
    /// and however a parameter is split.
    ///
    /// # Panics
    /// If the slices are not of one length, or there are not two scales for every block.
    pub fn adamw_bytes(
        self,
        step: &AdamW,
        (seed, index): (u32, usize),
        p: &mut [f32],
        g: &[f32],
        m: MomentsMut<'_>,
    ) {
        let MomentsMut { first, second, scales } = m;
        assert!([g.len(), first.len(), second.len()].iter().all(|&n| n == p.len()), "one length");
        assert_eq!(scales.len(), p.len().div_ceil(MOMENT_BLOCK), "blocks of {}", p.len());
        assert!(index.is_multiple_of(MOMENT_BLOCK), "a block begins at {index}");
        dispatch!(self, _isa => {
            let blocks = p.chunks_mut(MOMENT_BLOCK).zip(g.chunks(MOMENT_BLOCK));
            let moments = first.chunks_mut(MOMENT_BLOCK).zip(second.chunks_mut(MOMENT_BLOCK));
            let all = blocks.zip(moments).zip(scales.chunks_mut(1)).enumerate();
            for (i, (((p, g), (first, second)), scales)) in all {
                let at = (index + i * MOMENT_BLOCK) as u32;
                let own = (p.as_mut_array(), g.as_array(), first.as_mut_array(), second.as_mut_array());
                if let (Some(p), Some(g), Some(first), Some(second)) = own {
                    let block = Block { p: *p, g: *g, first: *first, second: *second, scales: scales[0] };
                    let block = step.block(seed, at, block);
                    (*p, *first, *second, scales[0]) = (block.p, block.first, block.second, block.scales);
                } else {
                    step.part(seed, at, p, g, MomentsMut { first, second, scales });
                }
            }
        });
    }

    /// Takes a step: parameters `p` along gradients `g`, with the moments `m` and
    /// `v`. The same bits on every instruction set.
    ///
    /// # Panics
    /// If the slices are not of one length.
    pub fn adamw(self, step: &AdamW, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
        assert!([g.len(), m.len(), v.len()].iter().all(|&n| n == p.len()), "one length");
        dispatch!(self, _isa => {
            for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
                step.element(p, g, m, v);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_set_takes_the_defined_step() {
        let step = AdamW { root: 3.1, ..constants() };
        let values = |seed: u32| {
            let value = |i: u32| ((i * 2_654_435_761).wrapping_add(seed) >> 8) as f32 / 1e7 - 0.8;
            (0..77).map(value).collect::<Vec<f32>>()
        };
        let (p, g, m) = (values(1), values(2), values(3));
        let v: Vec<f32> = values(4).iter().map(|x| x * x).collect();
        let (mut p0, mut m0, mut v0) = (p.clone(), m.clone(), v.clone());
        for i in 0..p.len() {
            step.element(&mut p0[i], g[i], &mut m0[i], &mut v0[i]);
        }
        assert!(p0.iter().all(|x| x.is_finite()) && p0 != p);
        for kernels in Kernels::all() {
            let (mut p, mut m, mut v) = (p.clone(), m.clone(), v.clone());
            kernels.adamw(&step, &mut p, &g, &mut m, &mut v);
            assert_eq!((&p, &m, &v), (&p0, &m0, &v0), "{}", kernels.name());
        }
    }

    fn constants() -> AdamW {
        AdamW {
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            scale: 0.25,
            keep: 0.9997,
            rate: 4e-3,
            root: 1.2,
        }
    }

    /// Bytes as they are after some steps: parameters, moments and scales.
    #[derive(Debug, Clone, PartialEq)]
    struct State {
        p: Vec<f32>,
        first: Vec<u8>,
        second: Vec<u8>,
        scales: Vec<[f32; 2]>,
    }

    impl State {
        fn new(n: usize) -> Self {
            let p = (0..n).map(|i| (i as f32 * 0.37).sin()).collect();
            let scales = vec![[0.0; 2]; n.div_ceil(MOMENT_BLOCK)];
            Self { p, first: vec![128; n], second: vec![0; n], scales }
        }

        /// In two parts, the first of `split` elements.
        fn step(&mut self, kernels: Kernels, seed: u32, split: usize, g: &[f32]) {
            let (p0, p1) = self.p.split_at_mut(split);
            let (f0, f1) = self.first.split_at_mut(split);
            let (s0, s1) = self.second.split_at_mut(split);
            let (c0, c1) = self.scales.split_at_mut(split / MOMENT_BLOCK);
            let low = MomentsMut { first: f0, second: s0, scales: c0 };
            let high = MomentsMut { first: f1, second: s1, scales: c1 };
            kernels.adamw_bytes(&constants(), (seed, 0), p0, &g[..split], low);
            kernels.adamw_bytes(&constants(), (seed, split), p1, &g[split..], high);
        }

        fn moments(&self, i: usize) -> (f32, f32) {
            let [first, root] = self.scales[i / MOMENT_BLOCK];
            let c = f32::from(i16::from(self.first[i]) - 128);
            let root = f32::from(self.second[i]).powi(2) * root;
            (c * c.abs() * first, root * root)
        }
    }

    /// Gradients whose sizes differ by powers of ten, some of which are 0.
    fn gradients(n: usize, step: u32) -> Vec<f32> {
        let value = |i: usize| {
            let size = 10f32.powi(i as i32 % 5 - 4);
            (hash(step, i as u32) as f32 * 2f32.powi(-31) - 1.0)
                * if i.is_multiple_of(7) { 0.0 } else { size }
        };
        (0..n).map(value).collect()
    }

    #[test]
    fn bytes_are_the_same_on_every_set_and_in_any_parts() {
        let n = 3 * MOMENT_BLOCK + 13;
        let after = |kernels: Kernels, split: usize| {
            let mut state = State::new(n);
            (1..5).for_each(|step| state.step(kernels, step, split, &gradients(n, step)));
            state
        };
        let expected = after(Kernels::by_name("portable").unwrap(), 0);
        assert!(expected.p.iter().all(|p| p.is_finite()));
        for kernels in Kernels::all() {
            for split in [0, MOMENT_BLOCK, 3 * MOMENT_BLOCK] {
                assert_eq!(after(kernels, split), expected, "{} {split}", kernels.name());
            }
        }
    }

    /// What is kept is one of the two neighbours, and its mean over many seeds within five
    /// times its standard error of what was to be kept.
    #[test]
    fn the_mean_of_what_is_kept_is_what_was_to_be_kept() {
        const SEEDS: u32 = 4000;
        let n = MOMENT_BLOCK;
        let mut state = State::new(n);
        (1..4).for_each(|step| state.step(Kernels::detect(), step, 0, &gradients(n, step)));
        let g = gradients(n, 9);
        let (mut m, mut v): (Vec<f32>, Vec<f32>) = (0..n).map(|i| state.moments(i)).unzip();
        let mut p = state.p.clone();
        Kernels::detect().adamw(&constants(), &mut p, &g, &mut m, &mut v);
        let mut means = vec![[0.0f64; 2]; n];
        // The distance of an element's two neighbours.
        let apart = |x: f32, scale: f32| (2.0 * (x / scale).sqrt() + 1.0) * scale * 1.0001;
        let mut scales = [0.0f32; 2];
        for seed in 0..SEEDS {
            let mut next = state.clone();
            next.step(Kernels::detect(), seed.wrapping_mul(0x517c_c1b7), 0, &g);
            // The step itself is taken with moments of f32.
            assert_eq!(next.p, p);
            scales = next.scales[0];
            for (i, mean) in means.iter_mut().enumerate() {
                let (first, second) = next.moments(i);
                let (to, root) = (v[i].sqrt(), second.sqrt());
                assert!((first - m[i]).abs() <= apart(m[i].abs(), scales[0]), "{i}: {first}");
                assert!((root - to).abs() <= apart(to, scales[1]), "{i}: {root} and {to}");
                assert!(to == 0.0 || root > 0.0, "{i}: a root of {to} became 0");
                mean[0] += f64::from(first) / f64::from(SEEDS);
                mean[1] += f64::from(root) / f64::from(SEEDS);
            }
        }
        // Of a chance between two neighbours: half their distance at most.
        let error = |apart: f32| 5.0 * 0.5 * f64::from(apart) / f64::from(SEEDS).sqrt();
        for (i, mean) in means.iter().enumerate() {
            let (first, to) = (f64::from(m[i]), f64::from(v[i].sqrt()));
            let of_first = error(apart(m[i].abs(), scales[0]));
            assert!((mean[0] - first).abs() <= of_first, "{i}: {mean:?}, {first}");
            // Small roots are kept as one multiple.
            let small = to < f64::from(scales[1]);
            let of_root = error(apart(v[i].sqrt(), scales[1]));
            assert!(small || (mean[1] - to).abs() <= of_root, "{i}: {mean:?}, {to}");
        }
    }
}

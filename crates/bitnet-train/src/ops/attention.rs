//! Causal grouped-query attention with rotary positions folded in.
//!
//! The forward pass runs one query at a time through the kernel of the inference
//! engine, so that both give the same bits. The backward pass computes the
//! probabilities again, in blocks of queries, from the saved inputs: T × T is
//! never held.

use std::sync::Arc;

use bitnet_core::rope;
use bitnet_kernels::{KEY_BLOCK, MatMut, MatRef, gemm, key_blocks_len, store_key};
use burn::tensor::{Device, Tensor, TensorData, activation};
use rayon::prelude::*;

use super::cpu::{Buffer, CpuOp, apply, is_cpu, kernels};

/// Queries whose probabilities exist at one time in a backward task.
const BLOCK: usize = 64;

/// The shape of an attention layer and its batch.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionShape {
    /// Sequences B.
    pub batch: usize,
    /// Tokens T of a sequence.
    pub time: usize,
    /// Query heads H.
    pub heads: usize,
    /// Key and value heads K, a divisor of H.
    pub kv_heads: usize,
    /// Size C of a head.
    pub head_dim: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// The lengths of the parts of documents that the sequences consist of, in
    /// order; none is in two sequences. A token then sees those before it in its
    /// own part alone, whose positions begin at 0. None: every sequence is one.
    pub documents: Option<Arc<[usize]>>,
}

/// Consecutive rows that see each other.
#[derive(Debug, Clone, Copy)]
struct Segment {
    start: usize,
    len: usize,
}

impl AttentionShape {
    /// Scores are multiplied by `1 / sqrt(C)`.
    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// The rows that see each other, in order.
    fn segments(&self) -> Vec<Segment> {
        let whole = || vec![self.time; self.batch];
        let lengths = self.documents.as_ref().map_or_else(whole, |d| d.to_vec());
        let mut start = 0;
        let segment = |len: usize| {
            let segment = Segment { start, len };
            start += len;
            segment
        };
        let segments: Vec<Segment> = lengths.into_iter().map(segment).collect();
        assert_eq!(start, self.batch * self.time, "documents fill the sequences");
        segments
    }

    /// Cosines and sines, each `[T, C/2]`.
    fn tables(&self) -> Tables {
        let half = self.head_dim / 2;
        let frequencies = rope::frequencies(self.head_dim, self.rope_theta);
        let mut cos = vec![0.0; self.time * half];
        let mut sin = vec![0.0; self.time * half];
        let rows = cos.chunks_exact_mut(half).zip(sin.chunks_exact_mut(half));
        for (t, (cos, sin)) in rows.enumerate() {
            rope::cos_sin(t, &frequencies, cos, sin);
        }
        Tables { cos, sin, half }
    }
}

/// Attention over every earlier position and its own.
///
/// # Shapes
/// `q` is `[B·T, H·C]`, `k` and `v` are `[B·T, K·C]`, the result is `[B·T, H·C]`.
pub fn attention(q: Tensor<2>, k: Tensor<2>, v: Tensor<2>, shape: AttentionShape) -> Tensor<2> {
    let device = q.device();
    if !is_cpu(&device) {
        return plain(q, k, v, shape);
    }
    let dims = q.dims();
    let inputs = [q.into_dispatch(), k.into_dispatch(), v.into_dispatch()];
    let segments = shape.segments();
    apply(Attention { shape, segments }, inputs, device.is_autodiff(), dims)
}

/// The same with tensor operations.
pub fn plain(q: Tensor<2>, k: Tensor<2>, v: Tensor<2>, shape: AttentionShape) -> Tensor<2> {
    let AttentionShape { batch: b, time: t, heads: h, kv_heads, head_dim: c, .. } = shape;
    // For every row, where its segment begins in its sequence.
    let starts: Vec<usize> =
        shape.segments().iter().flat_map(|s| std::iter::repeat_n(s.start % t, s.len)).collect();
    let device = q.device();
    let group = h / kv_heads;
    let tables = shape.tables();
    let table = |data: &[f32], device: &Device| {
        let row = |i: usize| &data[(i % t - starts[i]) * (c / 2)..][..c / 2];
        let rows: Vec<f32> = (0..b * t).flat_map(row).copied().collect();
        Tensor::<4>::from_data(TensorData::new(rows, [b, 1, t, c / 2]), device)
    };
    let (cos, sin) = (table(&tables.cos, &device), table(&tables.sin, &device));
    let rotate = |x: Tensor<4>| {
        let low = x.clone().narrow(3, 0, c / 2);
        let high = x.narrow(3, c / 2, c / 2);
        let new_low = low.clone() * cos.clone() - high.clone() * sin.clone();
        let new_high = high * cos.clone() + low * sin.clone();
        Tensor::cat(vec![new_low, new_high], 3)
    };
    let heads = |x: Tensor<2>, n: usize| x.reshape([b, t, n, c]).swap_dims(1, 2);
    let repeat = |x: Tensor<4>| {
        let x = x.reshape([b, kv_heads, 1, t, c]).repeat_dim(2, group);
        x.reshape([b, h, t, c])
    };
    let q = rotate(heads(q, h));
    let k = repeat(rotate(heads(k, kv_heads)));
    let v = repeat(heads(v, kv_heads));
    let scores = q.matmul(k.swap_dims(2, 3)) * shape.scale();
    // A large finite number instead of -inf, which some drivers turn into NaN.
    let unseen = |row: usize, key: usize| key > row % t || key < starts[row];
    let hide = |i: usize| if unseen(i / t, i % t) { -1e30 } else { 0.0 };
    let hidden: Vec<f32> = (0..b * t * t).map(hide).collect();
    let mask = Tensor::<4>::from_data(TensorData::new(hidden, [b, 1, t, t]), &device);
    let out = activation::softmax(scores + mask, 3).matmul(v);
    out.swap_dims(1, 2).reshape([b * t, h * c])
}

#[derive(Debug, Clone)]
struct Attention {
    shape: AttentionShape,
    segments: Vec<Segment>,
}

struct Tables {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl Tables {
    fn at(&self, t: usize) -> (&[f32], &[f32]) {
        let range = t * self.half..(t + 1) * self.half;
        (&self.cos[range.clone()], &self.sin[range])
    }

    /// Rotates the rows of a head `[T, C]` forward.
    fn rotate(&self, head: &mut [f32]) {
        for (t, row) in head.chunks_exact_mut(2 * self.half).enumerate() {
            let (cos, sin) = self.at(t);
            kernels().rotate(row, cos, sin);
        }
    }

    /// Rotates the rows of a gradient `[T, C]` back: the transposed rotation.
    fn rotate_back(&self, head: &mut [f32]) {
        let mut back = vec![0.0; self.half];
        for (t, row) in head.chunks_exact_mut(2 * self.half).enumerate() {
            let (cos, sin) = self.at(t);
            back.iter_mut().zip(sin).for_each(|(b, s)| *b = -s);
            kernels().rotate(row, cos, &back);
        }
    }
}

/// Copies head `head` of a segment out of `[B·T, n·C]` into `[len, C]`.
fn gather(x: &[f32], segment: Segment, c: usize, heads: usize, head: usize) -> Vec<f32> {
    let Segment { start, len } = segment;
    let mut out = Vec::with_capacity(len * c);
    for row in x[start * heads * c..(start + len) * heads * c].chunks_exact(heads * c) {
        out.extend_from_slice(&row[head * c..(head + 1) * c]);
    }
    out
}

/// Puts heads `[len, C]`, ordered by segment and head, together to `[B·T, n·C]`.
fn scatter(parts: &[Vec<f32>], segments: &[Segment], c: usize, heads: usize) -> Vec<f32> {
    let rows: usize = segments.iter().map(|s| s.len).sum();
    let mut out = vec![0.0f32; rows * heads * c];
    let mut rest = &mut out[..];
    let mut tasks = Vec::with_capacity(segments.len());
    for (segment, parts) in segments.iter().zip(parts.chunks_exact(heads)) {
        let (rows, behind) = rest.split_at_mut(segment.len * heads * c);
        tasks.push((rows, parts));
        rest = behind;
    }
    tasks.into_par_iter().for_each(|(rows, parts)| {
        for (t, row) in rows.chunks_exact_mut(heads * c).enumerate() {
            for (part, out) in parts.iter().zip(row.chunks_exact_mut(c)) {
                out.copy_from_slice(&part[t * c..(t + 1) * c]);
            }
        }
    });
    out
}

impl Attention {
    /// One key and value head of one segment: outputs of its query heads, each
    /// `[len, C]`.
    fn forward_group(&self, inputs: &[Buffer; 3], tables: &Tables, task: usize) -> Vec<Vec<f32>> {
        let s = &self.shape;
        let (segment, kv) = (self.segments[task / s.kv_heads], task % s.kv_heads);
        let (group, c) = (s.heads / s.kv_heads, s.head_dim);
        let mut keys = gather(inputs[1].data(), segment, c, s.kv_heads, kv);
        tables.rotate(&mut keys);
        let mut blocks = vec![0.0f32; key_blocks_len(segment.len, s.head_dim)];
        for (t, key) in keys.chunks_exact(s.head_dim).enumerate() {
            store_key(&mut blocks, t, key);
        }
        let values = gather(inputs[2].data(), segment, c, s.kv_heads, kv);
        let mut scores = vec![0.0f32; segment.len.div_ceil(KEY_BLOCK) * KEY_BLOCK];
        (0..group)
            .map(|g| {
                let mut q = gather(inputs[0].data(), segment, c, s.heads, kv * group + g);
                tables.rotate(&mut q);
                let mut out = vec![0.0f32; segment.len * s.head_dim];
                let rows = q.chunks_exact(s.head_dim).zip(out.chunks_exact_mut(s.head_dim));
                for (t, (q, out)) in rows.enumerate() {
                    kernels().attend(q, &blocks, &values, t + 1, s.scale(), &mut scores, out);
                }
                out
            })
            .collect()
    }

    /// One key and value head of one segment: gradients of its query heads, its
    /// keys and its values, each `[len, C]`.
    fn backward_group(
        &self,
        inputs: &[Buffer; 3],
        grad: &[f32],
        tables: &Tables,
        task: usize,
    ) -> GroupGradients {
        let s = &self.shape;
        let (segment, kv) = (self.segments[task / s.kv_heads], task % s.kv_heads);
        let (time, c) = (segment.len, s.head_dim);
        let group = s.heads / s.kv_heads;
        let mut keys = gather(inputs[1].data(), segment, c, s.kv_heads, kv);
        tables.rotate(&mut keys);
        let values = gather(inputs[2].data(), segment, c, s.kv_heads, kv);
        let (mut dk, mut dv) = (vec![0.0f32; time * c], vec![0.0f32; time * c]);
        let mut dqs = Vec::with_capacity(group);
        for g in 0..group {
            let mut q = gather(inputs[0].data(), segment, c, s.heads, kv * group + g);
            tables.rotate(&mut q);
            let dout = gather(grad, segment, c, s.heads, kv * group + g);
            let mut dq = vec![0.0f32; time * c];
            for start in (0..time).step_by(BLOCK) {
                let end = (start + BLOCK).min(time);
                let rows = start * c..end * c;
                let block = QueryBlock { start, q: &q[rows.clone()], dout: &dout[rows.clone()] };
                block.backward(s, &keys, &values, &mut dq[rows], &mut dk, &mut dv);
            }
            tables.rotate_back(&mut dq);
            dqs.push(dq);
        }
        tables.rotate_back(&mut dk);
        GroupGradients { dqs, dk, dv }
    }
}

struct GroupGradients {
    dqs: Vec<Vec<f32>>,
    dk: Vec<f32>,
    dv: Vec<f32>,
}

/// Some consecutive queries of one head, rotated, with the gradient of their
/// outputs.
struct QueryBlock<'a> {
    start: usize,
    q: &'a [f32],
    dout: &'a [f32],
}

impl QueryBlock<'_> {
    /// Adds the block's share to `dk` and `dv`, writes `dq`.
    fn backward(
        &self,
        s: &AttentionShape,
        keys: &[f32],
        values: &[f32],
        dq: &mut [f32],
        dk: &mut [f32],
        dv: &mut [f32],
    ) {
        let c = s.head_dim;
        let n = self.q.len() / c;
        let end = self.start + n;
        let (seen_keys, seen_values) =
            (MatRef::new(keys, end, c, c), MatRef::new(values, end, c, c));
        let (q, dout) = (MatRef::new(self.q, n, c, c), MatRef::new(self.dout, n, c, c));
        let mut p = vec![0.0f32; n * end];
        gemm(&mut MatMut::new(&mut p, n, end), q, seen_keys.t(), s.scale(), false);
        for (i, row) in p.chunks_exact_mut(end).enumerate() {
            let (seen, unseen) = row.split_at_mut(self.start + i + 1);
            let (_, sum) = kernels().exp_sum(seen);
            let inv = 1.0 / sum;
            seen.iter_mut().for_each(|p| *p *= inv);
            unseen.fill(0.0);
        }
        let probabilities = MatRef::new(&p, n, end, end);
        gemm(&mut MatMut::new(&mut dv[..end * c], end, c), probabilities.t(), dout, 1.0, true);
        let mut ds = vec![0.0f32; n * end];
        gemm(&mut MatMut::new(&mut ds, n, end), dout, seen_values.t(), 1.0, false);
        for (ds, p) in ds.chunks_exact_mut(end).zip(p.chunks_exact(end)) {
            let mean = kernels().dot(ds, p);
            for (d, &p) in ds.iter_mut().zip(p) {
                *d = p * (*d - mean);
            }
        }
        let ds = MatRef::new(&ds, n, end, end);
        gemm(&mut MatMut::new(dq, n, c), ds, seen_keys, s.scale(), false);
        gemm(&mut MatMut::new(&mut dk[..end * c], end, c), ds.t(), q, s.scale(), true);
    }
}

impl CpuOp<3> for Attention {
    type Saved = [Buffer; 3];

    fn forward(&self, inputs: [Buffer; 3], track: bool) -> (Vec<f32>, Option<[Buffer; 3]>) {
        let s = &self.shape;
        let tables = s.tables();
        let groups: Vec<Vec<Vec<f32>>> = (0..self.segments.len() * s.kv_heads)
            .into_par_iter()
            .map(|task| self.forward_group(&inputs, &tables, task))
            .collect();
        let heads: Vec<Vec<f32>> = groups.into_iter().flatten().collect();
        (scatter(&heads, &self.segments, s.head_dim, s.heads), track.then_some(inputs))
    }

    fn backward(
        &self,
        inputs: &[Buffer; 3],
        grad: &[f32],
        wanted: [bool; 3],
    ) -> [Option<Vec<f32>>; 3] {
        let s = &self.shape;
        let tables = s.tables();
        let groups: Vec<GroupGradients> = (0..self.segments.len() * s.kv_heads)
            .into_par_iter()
            .map(|task| self.backward_group(inputs, grad, &tables, task))
            .collect();
        let (mut dq, mut dk, mut dv) = (Vec::new(), Vec::new(), Vec::new());
        for group in groups {
            dq.extend(group.dqs);
            dk.push(group.dk);
            dv.push(group.dv);
        }
        [
            wanted[0].then(|| scatter(&dq, &self.segments, s.head_dim, s.heads)),
            wanted[1].then(|| scatter(&dk, &self.segments, s.head_dim, s.kv_heads)),
            wanted[2].then(|| scatter(&dv, &self.segments, s.head_dim, s.kv_heads)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cpu::testing::{check_gradients, random};

    #[test]
    fn equals_the_plain_version_in_value_and_gradient() {
        for (batch, time, heads, kv_heads, documents) in [
            (2, 19, 4, 2, None),
            (1, 100, 2, 2, None),
            (3, 1, 6, 2, None),
            (2, 80, 4, 2, Some(&[1, 70, 9, 33, 47][..])),
        ] {
            let (head_dim, rope_theta) = (8, 10_000.0);
            let documents = documents.map(Arc::from);
            let shape =
                AttentionShape { batch, time, heads, kv_heads, head_dim, rope_theta, documents };
            let rows = batch * time;
            check_gradients(
                [
                    random([rows, heads * head_dim], 2.0, 1),
                    random([rows, kv_heads * head_dim], 2.0, 2),
                    random([rows, kv_heads * head_dim], 2.0, 3),
                ],
                |[q, k, v]| attention(q, k, v, shape.clone()),
                |[q, k, v]| plain(q, k, v, shape.clone()),
                // Softmax over at most 100 positions in another order.
                1e-5,
            );
        }
    }
}

//! Causal grouped-query attention with rotary positions folded in.
//!
//! The forward pass runs through the kernel of the inference engine, so that both
//! give the same bits. The backward pass computes the probabilities again, in blocks
//! of queries, from the saved inputs: T × T is never held.

use std::sync::{Arc, Mutex, PoisonError};

use bitnet_core::rope;
use bitnet_kernels::{
    ATTEND_TILE, AttendQuery, KEY_BLOCK, KvHead, MatMut, MatRef, attend_scores_len, key_blocks_len,
    packed_len, store_key,
};
use burn::tensor::{Device, Tensor, TensorData, activation};
use rayon::prelude::*;

use super::bf16;
use super::cpu::{Buffer, CpuOp, apply, is_cpu, kernels};
use super::products::Packed;
use super::scratch::Scratch;
use crate::profile;

/// Queries whose probabilities exist at one time in a backward task: whole tiles of
/// the float product.
const BLOCK: usize = 48;

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
    /// Whether its products are in bf16. On GPUs.
    pub bf16: bool,
}

/// Consecutive rows that see each other.
#[derive(Debug, Clone, Copy)]
struct Segment {
    start: usize,
    len: usize,
}

impl AttentionShape {
    /// Scores are multiplied by `1 / sqrt(C)`.
    pub(super) fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// A buffer for a head of the longest segment: documents of many lengths share buffers.
    fn head(&self) -> Scratch<f32> {
        Scratch::any(self.time * self.head_dim)
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

    /// Where in its sequence the segment of every row begins.
    pub(super) fn starts(&self) -> Vec<i64> {
        let start = |s: &Segment| std::iter::repeat_n((s.start % self.time) as i64, s.len);
        self.segments().iter().flat_map(start).collect()
    }

    /// Cosines and sines, each `[T, C/2]`; the layers of a model share them.
    pub(super) fn tables(&self) -> Arc<Tables> {
        /// The shapes of a student and its teacher, and of their evaluation.
        const KEPT: usize = 4;
        type Known = Vec<((usize, usize, u32), Arc<Tables>)>;
        static KNOWN: Mutex<Known> = Mutex::new(Vec::new());
        let shape = (self.time, self.head_dim, self.rope_theta.to_bits());
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, tables)) = known.iter().find(|(of, _)| *of == shape) {
            return tables.clone();
        }
        let tables = Arc::new(self.new_tables());
        known.truncate(KEPT - 1);
        known.insert(0, (shape, tables.clone()));
        tables
    }

    fn new_tables(&self) -> Tables {
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
        #[cfg(any(feature = "wgpu", feature = "cuda"))]
        if super::gpu::is_gpu(&device) {
            return super::gpu::attention(q, k, v, shape);
        }
        return plain(q, k, v, shape);
    }
    let dims = q.dims();
    let inputs = [q.into_dispatch(), k.into_dispatch(), v.into_dispatch()];
    apply(Attention { shape }, inputs, device.is_autodiff(), dims)
}

/// The same with tensor operations.
pub fn plain(q: Tensor<2>, k: Tensor<2>, v: Tensor<2>, shape: AttentionShape) -> Tensor<2> {
    let AttentionShape { batch: b, time: t, heads: h, kv_heads, head_dim: c, .. } = shape;
    let starts = shape.starts();
    let device = q.device();
    let group = h / kv_heads;
    let tables = shape.tables();
    let table = |data: &[f32], device: &Device| {
        let row = |i: usize| &data[(i % t - starts[i] as usize) * (c / 2)..][..c / 2];
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
        // burn 0.22.1's gradient of a single repetition is wrong on wgpu where it arrives
        // transposed, as that of keys does.
        if group == 1 {
            return x;
        }
        let x = x.reshape([b, kv_heads, 1, t, c]).repeat_dim(2, group);
        x.reshape([b, h, t, c])
    };
    let q = rotate(heads(q, h));
    let k = repeat(rotate(heads(k, kv_heads)));
    let v = repeat(heads(v, kv_heads));
    let scores = bf16::matmul(q, k.swap_dims(2, 3), shape.bf16) * shape.scale();
    // A large finite number instead of -inf, which some drivers turn into NaN.
    let unseen = |row: usize, key: usize| key > row % t || (key as i64) < starts[row];
    let hide = |i: usize| if unseen(i / t, i % t) { -1e30 } else { 0.0 };
    let hidden: Vec<f32> = (0..b * t * t).map(hide).collect();
    let mask = Tensor::<4>::from_data(TensorData::new(hidden, [b, 1, t, t]), &device);
    let out = bf16::matmul(activation::softmax(scores + mask, 3), v, shape.bf16);
    out.swap_dims(1, 2).reshape([b * t, h * c])
}

#[derive(Debug, Clone)]
struct Attention {
    shape: AttentionShape,
}

pub(super) struct Tables {
    pub(super) cos: Vec<f32>,
    pub(super) sin: Vec<f32>,
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

/// Heads in a matrix of tokens: `[B·T, stride]`, those of one head `C` columns of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Heads<'a> {
    /// The elements.
    pub(super) data: &'a [f32],
    /// From one token to the next.
    pub(super) stride: usize,
    /// The first head's first column.
    pub(super) first: usize,
}

impl Heads<'_> {
    /// Head `head` of a segment, `[len, C]`, at the beginning of a buffer for any.
    fn gather(&self, s: &AttentionShape, segment: Segment, head: usize) -> Scratch<f32> {
        let c = s.head_dim;
        let mut out = s.head();
        let at = segment.start * self.stride + self.first + head * c;
        let rows = MatRef::new(&self.data[at..], segment.len, c, self.stride);
        kernels().gather(rows, &mut out[..segment.len * c]);
        out
    }
}

/// The matrix of all heads, cut into what belongs to one segment and one of `n`
/// groups of neighbouring heads: views `[len, columns of the group]`, in the order of
/// tasks.
fn cut<'m>(all: MatMut<'m, f32>, segments: &[Segment], n: usize) -> Vec<MatMut<'m, f32>> {
    let width = all.cols() / n;
    let mut out = Vec::with_capacity(segments.len() * n);
    let mut below = all;
    for segment in segments {
        let (mut rows, rest) = below.split_rows(segment.len);
        below = rest;
        for _ in 0..n {
            let (own, right) = rows.split_cols(width);
            out.push(own);
            rows = right;
        }
    }
    out
}

/// Queries, keys and values.
#[derive(Debug, Clone, Copy)]
pub(super) struct Qkv<'a> {
    pub(super) q: Heads<'a>,
    pub(super) k: Heads<'a>,
    pub(super) v: Heads<'a>,
}

/// The parts of a gradient, each a matrix of all tokens.
pub(super) struct QkvMut<'a> {
    pub(super) q: MatMut<'a, f32>,
    pub(super) k: MatMut<'a, f32>,
    pub(super) v: MatMut<'a, f32>,
}

/// Writes the outputs of all heads, `[B·T, H·C]`.
pub(super) fn forward(shape: &AttentionShape, qkv: Qkv<'_>, out: &mut [f32]) {
    let _span = profile::span("attention forward");
    let (segments, tables) = (shape.segments(), shape.tables());
    let tokens = shape.batch * shape.time;
    let out = MatMut::new(out, tokens, shape.heads * shape.head_dim);
    let tasks = cut(out, &segments, shape.kv_heads);
    tasks.into_par_iter().enumerate().with_max_len(1).for_each(|(task, out)| {
        forward_group(shape, &segments, qkv, &tables, task, out);
    });
}

/// One key and value head of one segment: the outputs of its query heads.
fn forward_group(
    s: &AttentionShape,
    segments: &[Segment],
    qkv: Qkv<'_>,
    tables: &Tables,
    task: usize,
    mut out: MatMut<'_, f32>,
) {
    let (segment, kv) = (segments[task / s.kv_heads], task % s.kv_heads);
    let (group, c, len) = (s.heads / s.kv_heads, s.head_dim, segment.len);
    let mut keys = qkv.k.gather(s, segment, kv);
    tables.rotate(&mut keys[..len * c]);
    // Keys behind the last are zeros.
    let mut blocks = Scratch::any(key_blocks_len(s.time, c));
    let blocks = &mut blocks[..key_blocks_len(len, c)];
    blocks[len / KEY_BLOCK * KEY_BLOCK * c..].fill(0.0);
    for (t, key) in keys[..len * c].chunks_exact(c).enumerate() {
        store_key(blocks, t, key);
    }
    let values = qkv.v.gather(s, segment, kv);
    let cached = KvHead::F32 { keys: blocks, values: &values[..len * c] };
    let mut scores = Scratch::any(attend_scores_len(ATTEND_TILE, s.time));
    let mut mixed = s.head();
    for g in 0..group {
        let mut q = qkv.q.gather(s, segment, kv * group + g);
        tables.rotate(&mut q[..len * c]);
        // Neighbouring queries share the loads of keys and values.
        for first in (0..len).step_by(ATTEND_TILE) {
            let queries: Vec<AttendQuery> = (first..len.min(first + ATTEND_TILE))
                .map(|t| AttendQuery { at: t * c, len: t + 1 })
                .collect();
            kernels().attend_tile(&queries, &q, cached, c, s.scale(), &mut scores, &mut mixed);
        }
        for (t, mixed) in mixed[..len * c].chunks_exact(c).enumerate() {
            out.row(t)[g * c..(g + 1) * c].copy_from_slice(mixed);
        }
    }
}

/// Writes the gradients of queries, keys and values from that of the outputs,
/// `[B·T, H·C]`.
pub(super) fn backward(shape: &AttentionShape, qkv: Qkv<'_>, grad: &[f32], to: QkvMut<'_>) {
    let _span = profile::span("attention backward");
    let (segments, tables) = (shape.segments(), shape.tables());
    let n = shape.kv_heads;
    let tasks = cut(to.q, &segments, n)
        .into_iter()
        .zip(cut(to.k, &segments, n))
        .zip(cut(to.v, &segments, n))
        .map(|((q, k), v)| QkvMut { q, k, v });
    let tasks: Vec<_> = tasks.collect();
    let grad = Heads { data: grad, stride: shape.heads * shape.head_dim, first: 0 };
    tasks.into_par_iter().enumerate().with_max_len(1).for_each(|(task, to)| {
        let segment = segments[task / n];
        backward_group(shape, segment, task % n, qkv, grad, &tables, to);
    });
}

/// One key and value head of one segment: the gradients of its query heads, its
/// keys and its values.
fn backward_group(
    s: &AttentionShape,
    segment: Segment,
    kv: usize,
    qkv: Qkv<'_>,
    grad: Heads<'_>,
    tables: &Tables,
    mut to: QkvMut<'_>,
) {
    let (len, c) = (segment.len, s.head_dim);
    let group = s.heads / s.kv_heads;
    let mut keys = qkv.k.gather(s, segment, kv);
    tables.rotate(&mut keys[..len * c]);
    let values = qkv.v.gather(s, segment, kv);
    let matrix = |x| MatRef::new(x, len, c, c);
    let cached = Cached {
        keys: Packed::floats_within(matrix(&keys), packed_len(s.time, c)),
        keys_t: Packed::floats_within(matrix(&keys).t(), packed_len(c, s.time)),
        values_t: Packed::floats_within(matrix(&values).t(), packed_len(c, s.time)),
    };
    let (mut dk, mut dv, mut dq) = (s.head(), s.head(), s.head());
    let (dk, dv, dq) = (&mut dk[..len * c], &mut dv[..len * c], &mut dq[..len * c]);
    dk.fill(0.0);
    dv.fill(0.0);
    for g in 0..group {
        let mut q = qkv.q.gather(s, segment, kv * group + g);
        tables.rotate(&mut q[..len * c]);
        let dout = grad.gather(s, segment, kv * group + g);
        for start in (0..len).step_by(BLOCK) {
            let rows = start * c..(start + BLOCK).min(len) * c;
            let block = QueryBlock { start, q: &q[rows.clone()], dout: &dout[rows.clone()] };
            block.backward(s, &cached, &mut dq[rows], dk, dv);
        }
        tables.rotate_back(dq);
        for (t, dq) in dq.chunks_exact(c).enumerate() {
            to.q.row(t)[g * c..(g + 1) * c].copy_from_slice(dq);
        }
    }
    tables.rotate_back(dk);
    for (t, (dk, dv)) in dk.chunks_exact(c).zip(dv.chunks_exact(c)).enumerate() {
        to.k.row(t).copy_from_slice(dk);
        to.v.row(t).copy_from_slice(dv);
    }
}

/// Keys and values of a head as right operands: `[T, C]` and, turned, `[C, T]`.
struct Cached {
    keys: Packed,
    keys_t: Packed,
    values_t: Packed,
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
        cached: &Cached,
        dq: &mut [f32],
        dk: &mut [f32],
        dv: &mut [f32],
    ) {
        let (kernel, c) = (kernels(), s.head_dim);
        let n = self.q.len() / c;
        let end = self.start + n;
        let (q, dout) = (MatRef::new(self.q, n, c, c), MatRef::new(self.dout, n, c, c));
        let most = BLOCK * s.time;
        let (mut p, mut ds) = (Scratch::any(most), Scratch::any(most));
        let (p, ds) = (&mut p[..n * end], &mut ds[..n * end]);
        kernel.float_product(q, cached.keys_t.view(), MatMut::new(p, n, end), false);
        for (i, row) in p.chunks_exact_mut(end).enumerate() {
            let (seen, unseen) = row.split_at_mut(self.start + i + 1);
            kernel.scale(seen, s.scale());
            let (_, sum) = kernel.exp_sum(seen);
            kernel.scale(seen, 1.0 / sum);
            unseen.fill(0.0);
        }
        let seen = |x| MatRef::new(x, n, end, end);
        let own = Packed::floats(dout);
        let to = MatMut::new(&mut dv[..end * c], end, c);
        kernel.float_product(seen(p).t(), own.view(), to, true);
        kernel.float_product(dout, cached.values_t.view(), MatMut::new(ds, n, end), false);
        for (ds, p) in ds.chunks_exact_mut(end).zip(p.chunks_exact(end)) {
            kernel.softmax_backward(p, ds, s.scale());
        }
        kernel.float_product(seen(ds), cached.keys.view(), MatMut::new(dq, n, c), false);
        let own = Packed::floats(q);
        let to = MatMut::new(&mut dk[..end * c], end, c);
        kernel.float_product(seen(ds).t(), own.view(), to, true);
    }
}

impl Attention {
    fn qkv<'a>(&self, [q, k, v]: &'a [Buffer; 3]) -> Qkv<'a> {
        let s = &self.shape;
        let heads =
            |x: &'a Buffer, n: usize| Heads { data: x.data(), stride: n * s.head_dim, first: 0 };
        Qkv { q: heads(q, s.heads), k: heads(k, s.kv_heads), v: heads(v, s.kv_heads) }
    }
}

impl CpuOp<3> for Attention {
    type Saved = [Buffer; 3];

    fn forward(&self, inputs: [Buffer; 3], track: bool) -> (Vec<f32>, Option<[Buffer; 3]>) {
        let mut out = vec![0.0f32; inputs[0].data().len()];
        forward(&self.shape, self.qkv(&inputs), &mut out);
        (out, track.then_some(inputs))
    }

    fn backward(
        &self,
        inputs: &[Buffer; 3],
        grad: &[f32],
        wanted: [bool; 3],
    ) -> [Option<Vec<f32>>; 3] {
        let s = &self.shape;
        let mut grads = inputs.each_ref().map(|x| vec![0.0f32; x.data().len()]);
        let [q, k, v] = &mut grads;
        let tokens = s.batch * s.time;
        let to = QkvMut {
            q: MatMut::new(q, tokens, s.heads * s.head_dim),
            k: MatMut::new(k, tokens, s.kv_heads * s.head_dim),
            v: MatMut::new(v, tokens, s.kv_heads * s.head_dim),
        };
        backward(s, self.qkv(inputs), grad, to);
        let mut grads = grads.into_iter().zip(wanted).map(|(g, wanted)| wanted.then_some(g));
        std::array::from_fn(|_| grads.next().flatten())
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
            let shape = AttentionShape {
                batch,
                time,
                heads,
                kv_heads,
                head_dim,
                rope_theta,
                documents,
                bf16: false,
            };
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

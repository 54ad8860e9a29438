//! The float operations: every instruction set of this machine gives the bits of
//! a plain scalar loop in the documented order of additions. (A NaN is only a
//! NaN: its payload is not part of any definition.)

#![allow(clippy::unwrap_used)]

use bitnet_core::Activation;
use bitnet_core::ternary::{LANES, lane_sum};
use bitnet_kernels::{
    AttendQuery, DenseRows, INT4_BYTES, INT8_BYTES, KEY_BLOCK, Kernels, KvElement, KvHead,
    KvHeadInt8Mut, MatMut, ROW_BLOCK, attend_scores_len, key_blocks_len, store_key,
};
use half::{bf16, f16};
use proptest::collection::vec;
use proptest::prelude::*;

/// Bits, with one pattern for every NaN.
fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|v| if v.is_nan() { f32::NAN.to_bits() } else { v.to_bits() }).collect()
}

/// Asserts that every instruction set gives `want`.
fn all_give(want: &[f32], run: impl Fn(Kernels) -> Vec<f32>) {
    for kernels in Kernels::all() {
        assert_eq!(bits(&run(kernels)), bits(want), "{}", kernels.name());
    }
}

/// The dot product as it is defined.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        lanes[i % LANES] += a * b;
    }
    lane_sum(lanes)
}

/// The product of a dense row as it is defined: the same lanes, fused.
fn dense_dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        lanes[i % LANES] = a.mul_add(*b, lanes[i % LANES]);
    }
    lane_sum(lanes)
}

/// `e^x` as the kernels compute it, one element at a time (the largest of a pair
/// is its own maximum, so the other becomes `e^(x - max)`).
fn exp(x: f32) -> f32 {
    let mut pair = [x, 0.0];
    Kernels::by_name("portable").unwrap().exp_sum(&mut pair);
    pair[0]
}

fn usual() -> impl Strategy<Value = f32> {
    prop_oneof![
        8 => -3.0f32..3.0,
        2 => -100.0f32..100.0,
        1 => Just(0.0),
        1 => Just(-0.0),
        1 => -1e-40f32..1e-40,
    ]
}

/// Also what should never come, but must give the same nonsense everywhere.
fn hostile() -> impl Strategy<Value = f32> {
    prop_oneof![
        10 => usual(),
        1 => any::<f32>(),
        1 => Just(f32::INFINITY),
        1 => Just(f32::NEG_INFINITY),
        1 => Just(f32::NAN),
    ]
}

/// `count` vectors of one length in `len`.
fn together(
    count: usize,
    len: std::ops::Range<usize>,
    element: fn() -> BoxedStrategy<f32>,
) -> impl Strategy<Value = Vec<Vec<f32>>> {
    len.prop_flat_map(move |len| vec(vec(element(), len), count))
}

fn check_elementwise(x: &[f32], y: &[f32], z: &[f32]) {
    let n = x.len();
    all_give(&[dot(x, y)], |k| vec![k.dot(x, y)]);
    let sum: Vec<f32> = x.iter().zip(y).map(|(x, y)| x + y).collect();
    all_give(&sum, |k| {
        let mut out = x.to_vec();
        k.add_assign(&mut out, y);
        out
    });
    let inv = 1.0 / (dot(x, x) / n as f32 + 1e-5).sqrt();
    let mut norm: Vec<f32> = x.iter().zip(y).map(|(x, w)| (x * inv) * w).collect();
    norm.push(inv);
    all_give(&norm, |k| {
        let mut out = vec![0.0; n];
        out.push(0.0);
        out[n] = k.rms_norm(x, y, 1e-5, &mut out[..n]);
        out
    });
    let relu2 = |g: f32, u: f32| if g > 0.0 { (g * g) * u } else { 0.0 * u };
    let want: Vec<f32> = x.iter().zip(y).map(|(&g, &u)| relu2(g, u)).collect();
    all_give(&want, |k| {
        let mut out = vec![0.0; n];
        k.relu2_mul(x, y, &mut out);
        out
    });
    let half = n / 2;
    let (cos, sin) = (&y[..half], &z[..half]);
    let mut want = x[..2 * half].to_vec();
    for i in 0..half {
        want[i] = x[i] * cos[i] - x[i + half] * sin[i];
        want[i + half] = x[i + half] * cos[i] + x[i] * sin[i];
    }
    all_give(&want, |k| {
        let mut out = x[..2 * half].to_vec();
        k.rotate(&mut out, cos, sin);
        out
    });
}

/// Operations whose definition is the portable path itself.
fn check_against_portable(x: &[f32], y: &[f32], z: &[f32]) {
    let n = x.len();
    let silu = |k: Kernels| {
        let mut out = vec![0.0; n];
        k.silu_mul(x, y, &mut out);
        out
    };
    let softmax = |k: Kernels| {
        let mut out = x.to_vec();
        let (max, sum) = k.exp_sum(&mut out);
        out.extend([max, sum]);
        out
    };
    let backward = |k: Kernels| {
        let (mut a, mut b) = (vec![0.0; n], vec![0.5; n]);
        k.rms_norm_backward(x, y, 0.7, z, &mut a, &mut b);
        let (mut c, mut d) = (x.to_vec(), y.to_vec());
        k.silu_mul_backward(&mut c, &mut d, z);
        let (mut e, mut f) = (x.to_vec(), y.to_vec());
        k.relu2_mul_backward(&mut e, &mut f, z);
        [a, b, c, d, e, f].concat()
    };
    // The fused operations give the bits of the calls that they replace.
    for k in Kernels::all() {
        let (mut normed, mut q) = (vec![0.0; n], vec![99; n + 3]);
        let (mut fused, mut fused_q) = (vec![0.0; n], vec![98; n + 3]);
        k.rms_norm(x, y, 1e-5, &mut normed);
        let want = k.quantize(&normed, &mut q);
        let found = k.rms_norm_quantize(x, y, 1e-5, &mut fused, &mut fused_q);
        assert_eq!((bits(&fused), &fused_q), (bits(&normed), &q), "{}", k.name());
        assert_eq!((found.0.to_bits(), found.1), (want.0.to_bits(), want.1), "{}", k.name());
        for act in [Activation::Relu2, Activation::Silu] {
            let mut gated = vec![0.0; n];
            match act {
                Activation::Relu2 => k.relu2_mul(x, y, &mut gated),
                Activation::Silu => k.silu_mul(x, y, &mut gated),
            }
            k.rms_norm(&gated, z, 1e-5, &mut normed);
            let want = k.quantize(&normed, &mut q);
            let found = k.gated_norm_quantize(act, x, y, z, 1e-5, &mut fused, &mut fused_q);
            assert_eq!((bits(&fused), &fused_q), (bits(&normed), &q), "{}", k.name());
            assert_eq!((found.0.to_bits(), found.1), (want.0.to_bits(), want.1), "{}", k.name());
        }
    }
    let portable = Kernels::by_name("portable").unwrap();
    all_give(&silu(portable), silu);
    all_give(&softmax(portable), softmax);
    all_give(&backward(portable), backward);
}

/// A float whose conversion to `f16` and back changes nothing.
fn as_f16(x: &[f32]) -> Vec<f16> {
    x.iter().map(|&x| f16::from_f32(x)).collect()
}

fn check_dense(w: &[f32], xs: &[f32], cols: usize) {
    let (half, brain) = (as_f16(w), w.iter().map(|&w| bf16::from_f32(w)).collect::<Vec<_>>());
    let widened = [
        w.to_vec(),
        half.iter().map(|w| w.to_f32()).collect(),
        brain.iter().map(|w| w.to_f32()).collect(),
    ];
    let stored = [DenseRows::F32(w), DenseRows::F16(&half), DenseRows::Bf16(&brain)];
    for (w, stored) in widened.iter().zip(stored) {
        check_rows(stored, w, xs, cols);
    }
}

/// Rows of any form give the products of their values, on every instruction set.
fn check_rows(stored: DenseRows<'_>, w: &[f32], xs: &[f32], cols: usize) {
    let (rows, tokens) = (w.len() / cols, xs.len() / cols);
    let want: Vec<f32> = xs
        .chunks_exact(cols)
        .flat_map(|x| w.chunks_exact(cols).map(move |w| dense_dot(w, x)))
        .collect();
    all_give(&want, |k| {
        let mut out = vec![0.0; tokens * rows];
        k.dense_matmul(stored, xs, cols, MatMut::new(&mut out, tokens, rows));
        out
    });
    all_give(&want, |k| {
        let mut out = vec![0.0; tokens * rows];
        for (x, out) in xs.chunks_exact(cols).zip(out.chunks_exact_mut(rows)) {
            k.dense_matvec(stored, x, out);
        }
        out
    });
    let mut row = vec![0.0; cols];
    stored.read_row(rows - 1, &mut row);
    assert_eq!(bits(&row), bits(&w[(rows - 1) * cols..]));
    assert_eq!(stored.rows(cols, rows - 1, rows).len(), cols);
}

/// Blocks of any bytes (and finite scales) against their values, written out.
fn check_blocks(bytes: &[u8], xs: &[f32], cols: usize) {
    let scale = |block: &[u8]| f16::from_le_bytes([block[0], block[1]]).to_f32();
    let finite = |block: &mut [u8]| block[1] &= 0b1011_1111;
    let blocks = bytes.len() / INT8_BYTES / (cols / ROW_BLOCK) * (cols / ROW_BLOCK);
    let mut int8 = bytes.as_chunks::<INT8_BYTES>().0[..blocks].to_vec();
    int8.iter_mut().for_each(|b| finite(b));
    let value = |b: &[u8], j: usize| f32::from(b[2 + j] as i8) * scale(b);
    let w: Vec<f32> = int8.iter().flat_map(|b| (0..32).map(|j| value(b, j))).collect();
    check_rows(DenseRows::Int8(&int8), &w, xs, cols);
    let mut int4 = bytes.as_chunks::<INT4_BYTES>().0[..blocks].to_vec();
    int4.iter_mut().for_each(|b| finite(b));
    let value = |b: &[u8], j: usize| {
        let q = if j < 16 { b[2 + j] & 15 } else { b[2 + j - 16] >> 4 };
        (f32::from(q) - 8.0) * scale(b)
    };
    let w: Vec<f32> = int4.iter().flat_map(|b| (0..32).map(|j| value(b, j))).collect();
    check_rows(DenseRows::Int4(&int4), &w, xs, cols);
}

/// Attention as it is defined: scores over c in order, values over t in order, each a
/// chain of fused multiply-adds.
fn attend_plain(q: &[f32], keys: &[f32], values: &[f32], len: usize, scale: f32) -> Vec<f32> {
    let c = q.len();
    let score = |t: usize| (0..c).fold(0.0f32, |sum, i| q[i].mul_add(keys[t * c + i], sum)) * scale;
    let mut scores: Vec<f32> = (0..len).map(score).collect();
    let max = scores.iter().fold(f32::NEG_INFINITY, |m, &s| if s > m { s } else { m });
    scores.iter_mut().for_each(|s| *s = exp(*s - max));
    let mut lanes = [0.0f32; LANES];
    scores.iter().enumerate().for_each(|(t, s)| lanes[t % LANES] += s);
    let inv_sum = 1.0 / lane_sum(lanes);
    let column =
        |i: usize| (0..len).fold(0.0f32, |sum, t| scores[t].mul_add(values[t * c + i], sum));
    (0..c).map(|i| column(i) * inv_sum).collect()
}

fn check_attention<E: KvElement>(q: &[f32], kv: &[f32], len: usize) {
    let c = q.len();
    let elements: Vec<E> = kv.iter().map(|&x| E::from_f32(x)).collect();
    let widened: Vec<f32> = elements.iter().map(|x| x.to_f32()).collect();
    let (keys, values) = widened.split_at(len * c);
    // What lies behind the last position must not matter.
    let mut blocks = vec![E::from_f32(f32::NAN); key_blocks_len(len, c)];
    for t in 0..len {
        store_key(&mut blocks, t, &kv[t * c..(t + 1) * c]);
    }
    let want = attend_plain(q, keys, values, len, 0.3);
    all_give(&want, |k| {
        let mut scores = vec![0.0; len.next_multiple_of(KEY_BLOCK)];
        let mut out = vec![0.0; c];
        k.attend(q, &blocks, &elements[len * c..], len, 0.3, &mut scores, &mut out);
        out
    });
    // Queries that see different lengths and lie in no order: each is as if alone,
    // though later values, which only some see, are not numbers.
    let queries: Vec<AttendQuery> = (0..19)
        .map(|i| AttendQuery { at: (i * 7 % 19) * c, len: [len - i * len / 40, len][i % 2] })
        .collect();
    let q: Vec<f32> = (0..19 * c).map(|i| q[i % c] + (i / c) as f32 * 0.1).collect();
    let mut hostile = elements[len * c..].to_vec();
    hostile[(len - 1) * c..].fill(E::from_f32(f32::NAN));
    for (values, skip) in [(&elements[len * c..], 1), (&hostile[..], 2)] {
        let queries: Vec<_> = queries.iter().copied().step_by(skip).collect();
        let widened: Vec<f32> = values.iter().map(|x| x.to_f32()).collect();
        let wants: Vec<Vec<f32>> = queries
            .iter()
            .map(|a| attend_plain(&q[a.at..][..c], keys, &widened, a.len, 0.3))
            .collect();
        for count in [1, 2, 3, 4, 5, 8, 9, queries.len()] {
            let mut want = vec![0.0; q.len()];
            for (a, one) in queries.iter().zip(&wants).take(count) {
                want[a.at..][..c].copy_from_slice(one);
            }
            all_give(&want, |k| {
                let mut scores = vec![f32::NAN; attend_scores_len(count, len)];
                let mut out = vec![0.0; q.len()];
                let kv = E::head(&blocks, values);
                k.attend_tile(&queries[..count], &q, kv, c, 0.3, &mut scores, &mut out);
                out
            });
        }
    }
}

/// An int8 cache of keys and values `[T, C]`, with what lies behind them hostile.
struct Int8Cache {
    keys: Vec<i8>,
    key_scales: Vec<f32>,
    values: Vec<i8>,
    value_scales: Vec<f32>,
}

impl Int8Cache {
    fn new(kernels: Kernels, keys: &[f32], values: &[f32], c: usize) -> Self {
        let len = keys.len() / c;
        let mut cache = Self {
            keys: vec![77; key_blocks_len(len, c)],
            key_scales: vec![f32::NAN; key_blocks_len(len, 1)],
            values: vec![0; len * c],
            value_scales: vec![0.0; len],
        };
        for (t, (key, value)) in keys.chunks_exact(c).zip(values.chunks_exact(c)).enumerate() {
            let head = KvHeadInt8Mut {
                keys: &mut cache.keys,
                key_scales: &mut cache.key_scales,
                values: &mut cache.values,
                value_scales: &mut cache.value_scales,
            };
            kernels.store_int8(head, t, key, value);
        }
        cache
    }

    fn head(&self) -> KvHead<'_> {
        let Self { keys, key_scales, values, value_scales } = self;
        KvHead::Int8 { keys, key_scales, values, value_scales }
    }
}

/// Attention over integers as it is defined: a score is the integers' sum times
/// the two scales, a weight is multiplied by its value's scale.
fn attend_int8_plain(q: &[f32], cache: &Int8Cache, len: usize, scale: f32) -> Vec<f32> {
    let c = q.len();
    let key = |t: usize, i: usize| {
        f32::from(cache.keys[(t / KEY_BLOCK * c + i) * KEY_BLOCK + t % KEY_BLOCK])
    };
    let score = |t: usize| {
        (0..c).fold(0.0f32, |sum, i| q[i].mul_add(key(t, i), sum)) * scale * cache.key_scales[t]
    };
    let mut scores: Vec<f32> = (0..len).map(score).collect();
    let max = scores.iter().fold(f32::NEG_INFINITY, |m, &s| if s > m { s } else { m });
    scores.iter_mut().for_each(|s| *s = exp(*s - max));
    let mut lanes = [0.0f32; LANES];
    scores.iter().enumerate().for_each(|(t, s)| lanes[t % LANES] += s);
    let inv_sum = 1.0 / lane_sum(lanes);
    scores.iter_mut().zip(&cache.value_scales).for_each(|(s, scale)| *s *= scale);
    let value = |t: usize, i: usize| f32::from(cache.values[t * c + i]);
    let column = |i: usize| (0..len).fold(0.0f32, |sum, t| scores[t].mul_add(value(t, i), sum));
    (0..c).map(|i| column(i) * inv_sum).collect()
}

fn check_int8_attention(q: &[f32], kv: &[f32], len: usize) {
    let (c, scale) = (q.len(), 0.3);
    let (keys, values) = kv.split_at(len * c);
    let cache = Int8Cache::new(Kernels::by_name("portable").unwrap(), keys, values, c);
    for k in Kernels::all() {
        let other = Int8Cache::new(k, keys, values, c);
        assert!(other.keys == cache.keys && other.values == cache.values, "{}", k.name());
        assert_eq!(bits(&other.key_scales), bits(&cache.key_scales), "{}", k.name());
        assert_eq!(other.value_scales, cache.value_scales, "{}", k.name());
    }
    let queries: Vec<AttendQuery> =
        (0..6).map(|i| AttendQuery { at: i * c, len: [len - i * len / 40, len][i % 2] }).collect();
    let q: Vec<f32> = (0..6 * c).map(|i| q[i % c] * (1.0 - (i / c) as f32 * 0.2)).collect();
    for count in [1, 3, 6] {
        let one = |a: &AttendQuery| attend_int8_plain(&q[a.at..][..c], &cache, a.len, scale);
        let want: Vec<f32> = queries[..count].iter().flat_map(one).collect();
        all_give(&want, |k| {
            let mut scores = vec![f32::NAN; attend_scores_len(count, len)];
            let mut out = vec![0.0; count * c];
            let queries = &queries[..count];
            k.attend_tile(queries, &q, cache.head(), c, scale, &mut scores, &mut out);
            out
        });
        // An element is off by half its scale, so a score by half the largest scale
        // times the query's magnitudes. Scores within e change no weight by more
        // than a factor of e^2e, and an output by as much of the largest value.
        for (a, found) in queries.iter().zip(want.chunks_exact(c)) {
            let q = &q[a.at..][..c];
            let largest = |x: &[f32]| x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
            let half = |scales: &[f32]| largest(&scales[..a.len]) * 0.5001;
            let e = half(&cache.key_scales) * scale * q.iter().map(|x| x.abs()).sum::<f32>();
            let bound =
                half(&cache.value_scales) + ((2.0 * e).exp() - 1.0) * largest(values) + 1e-4;
            let exact = attend_plain(q, keys, values, a.len, scale);
            for (found, exact) in found.iter().zip(exact) {
                assert!((found - exact).abs() <= bound, "{found} {exact} {bound}");
            }
        }
    }
}

#[test]
fn lengths_around_a_vector() {
    for n in [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 576, 1000] {
        let of = |f: f32| (0..n).map(|i| (i as f32 * f).sin() * 3.0).collect::<Vec<_>>();
        let (x, y, z) = (of(0.7), of(1.3), of(2.1));
        check_elementwise(&x, &y, &z);
        check_against_portable(&x, &y, &z);
    }
}

#[test]
fn attention_of_many_lengths() {
    for c in [1, 8, 16, 24, 32, 64, 80, 96, 128] {
        for len in [1, 2, 15, 16, 17, 63, 64, 65, 100, 130] {
            let of = |n: usize, f: f32| (0..n).map(|i| (i as f32 * f).sin()).collect::<Vec<_>>();
            check_attention::<f32>(&of(c, 0.9), &of(2 * len * c, 0.37), len);
            check_attention::<f16>(&of(c, 0.9), &of(2 * len * c, 0.37), len);
            check_int8_attention(&of(c, 0.9), &of(2 * len * c, 0.37), len);
        }
    }
}

#[test]
fn dense_shapes_around_a_tile() {
    for cols in [1, 7, 16, 40, 100] {
        for rows in 1..10 {
            for tokens in [1, 2, 3, 4, 5, 33] {
                let of =
                    |n: usize, f: f32| (0..n).map(|i| (i as f32 * f).sin()).collect::<Vec<_>>();
                check_dense(&of(rows * cols, 0.9), &of(tokens * cols, 1.7), cols);
            }
        }
    }
}

#[test]
fn rows_of_blocks() {
    for cols in [32, 64, 96, 288] {
        for rows in [1, 2, 3, 4, 5, 9] {
            let bytes: Vec<u8> = (0..rows * cols / ROW_BLOCK * INT8_BYTES)
                .map(|i| (i as u32).wrapping_mul(2_654_435_761).to_le_bytes()[3])
                .collect();
            for tokens in [1, 2, 3, 4, 5, 33] {
                let xs: Vec<f32> = (0..tokens * cols).map(|i| (i as f32 * 1.7).sin()).collect();
                check_blocks(&bytes, &xs, cols);
            }
        }
    }
}

#[test]
#[should_panic(expected = "whole blocks")]
fn rows_that_are_not_whole_blocks() {
    let blocks = [[0; INT8_BYTES]; 5];
    let mut out = [0.0; 4];
    Kernels::all()[0].dense_matvec(DenseRows::Int8(&blocks), &[0.0; 40], &mut out);
}

proptest! {
    #[test]
    fn blocks_of_any_bytes(
        bytes in proptest::collection::vec(any::<u8>(), 6 * INT8_BYTES..7 * INT8_BYTES),
        xs in proptest::collection::vec(-2.0f32..2.0, 128),
    ) {
        check_blocks(&bytes, &xs, 64);
    }

    #[test]
    fn elementwise(v in together(3, 1..200, || usual().boxed())) {
        check_elementwise(&v[0], &v[1], &v[2]);
        check_against_portable(&v[0], &v[1], &v[2]);
    }

    #[test]
    fn elementwise_hostile(v in together(3, 1..100, || hostile().boxed())) {
        check_against_portable(&v[0], &v[1], &v[2]);
        all_give(&[dot(&v[0], &v[1])], |k| vec![k.dot(&v[0], &v[1])]);
    }

    #[test]
    fn dense(v in together(14, 1..90, || hostile().boxed())) {
        check_dense(&v[..9].concat(), &v[9..].concat(), v[0].len());
    }

    #[test]
    fn attention(v in together(61, 1..70, || usual().boxed())) {
        check_attention::<f32>(&v[60], &v[..60].concat(), 30);
        check_attention::<f16>(&v[60], &v[..60].concat(), 30);
    }
}

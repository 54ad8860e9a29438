use super::*;
use crate::ternary::QuantizedTokens;

fn values(n: usize, seed: u32) -> Vec<f32> {
    let value = |i: u32| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 8) as f32;
    (0..n as u32).map(|i| value(i) / 1e7 - 0.8).collect()
}

fn packed(kernels: Kernels, source: &[PackSource<'_>], rows: usize, cols: usize) -> Vec<Unit> {
    let mut out = vec![Unit([f32::NAN; UNIT]); packed_len(rows, cols)];
    for (source, out) in source.iter().zip(out.chunks_mut(packed_len(PACK_DEPTH, cols))) {
        kernels.pack_block(*source, out);
    }
    out
}

/// Blocks of a row-major matrix.
fn blocks(b: &[f32], rows: usize, cols: usize) -> Vec<PackSource<'_>> {
    let m = MatRef::new(b, rows, cols, cols);
    let block = |k| m.slice_rows(k, rows.min(k + PACK_DEPTH));
    (0..rows).step_by(PACK_DEPTH).map(|k| PackSource::Floats(block(k))).collect()
}

/// The definition.
fn chain(a: impl Fn(usize) -> f32, b: impl Fn(usize) -> f32, depth: usize, start: f32) -> f32 {
    (0..depth).fold(start, |acc, k| a(k).mul_add(b(k), acc))
}

#[test]
fn every_set_computes_the_chain_bit_for_bit() {
    let shapes = [
        [1, 1, 1],
        [6, 64, 256],
        [7, 65, 257],
        [50, 130, 300],
        [13, 48, 20],
        [5, 200, 1],
        [3, 5, 0],
    ];
    for [m, n, k] in shapes {
        let (a, b) = (values(m * (k + 3), 1), values(k * n, 2));
        let at: Vec<f32> = (0..k * m).map(|i| a[i % m * (k + 3) + i / m]).collect();
        let start = values(m * n, 3);
        for kernels in Kernels::all() {
            let b_packed = packed(kernels, &blocks(&b, k, n), k, n);
            let right = PackedRef::new(&b_packed, k, n);
            for accumulate in [false, true] {
                let lefts = [MatRef::new(&a, m, k, k + 3), MatRef::new(&at, k, m, m).t()];
                for left in lefts {
                    let mut out = start.clone();
                    let view = MatMut::new(&mut out, m, n);
                    kernels.float_product(left, right, view, accumulate);
                    for i in 0..m {
                        for j in 0..n {
                            let first = if accumulate { start[i * n + j] } else { 0.0 };
                            let row = |k_: usize| a[i * (k + 3) + k_];
                            let want = chain(row, |k_| b[k_ * n + j], k, first);
                            let got = out[i * n + j];
                            let name = kernels.name();
                            assert_eq!(got.to_bits(), want.to_bits(), "{name} {m} {n} {k}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_part_of_the_right_operand_can_be_used() {
    let (rows, cols, m, n, k) = (300, 150, 9, 70, 270);
    let (a, b) = (values(m * k, 5), values(rows * cols, 6));
    for kernels in Kernels::all() {
        let data = packed(kernels, &blocks(&b, rows, cols), rows, cols);
        let mut out = vec![0.0; m * n];
        let right = PackedRef::new(&data, rows, cols);
        let left = MatRef::new(&a, m, k, k);
        kernels.float_product(left, right, MatMut::new(&mut out, m, n), false);
        let want = chain(|i| a[3 * k + i], |i| b[i * cols + 69], k, 0.0);
        assert_eq!(out[3 * n + 69].to_bits(), want.to_bits(), "{}", kernels.name());
    }
}

#[test]
fn every_source_packs_to_the_same_values() {
    for [rows, cols] in [[5, 7], [40, 64], [17, 300], [32, 48]] {
        let trits: Vec<i8> = (0..rows * cols).map(|i| (i * i % 7 % 3) as i8 - 1).collect();
        let row_bytes = Layout::P2.row_bytes(cols);
        let mut bytes = vec![0u8; rows * row_bytes];
        let mut tokens = QuantizedTokens::default();
        tokens.resize(rows, cols);
        let (mut as_weights, mut as_tokens) = (Vec::new(), Vec::new());
        for r in 0..rows {
            let row = &trits[r * cols..][..cols];
            Layout::P2.pack_row(row, &mut bytes[r * row_bytes..][..row_bytes]);
            tokens.q[r * tokens.stride..][..cols].copy_from_slice(row);
            tokens.scales[r] = 0.3 + r as f32;
            as_weights.extend(row.iter().map(|&t| f32::from(t) * 0.7));
            as_tokens.extend(row.iter().map(|&t| f32::from(t) * tokens.scales[r]));
        }
        let transpose = |x: &[f32]| -> Vec<f32> {
            (0..rows * cols).map(|i| x[i % rows * cols + i / rows]).collect()
        };
        let (weights_t, tokens_t) = (transpose(&as_weights), transpose(&as_tokens));
        for kernels in Kernels::all() {
            let pack = |source| packed(kernels, &[source], rows, cols);
            let plain = |x| pack(PackSource::Floats(MatRef::new(x, rows, cols, cols)));
            let turned = |x| pack(PackSource::Floats(MatRef::new(x, cols, rows, rows).t()));
            let ternary = pack(PackSource::Ternary { bytes: &bytes, cols, scale: 0.7 });
            assert_eq!(ternary, plain(&as_weights), "{}", kernels.name());
            assert_eq!(turned(&weights_t), ternary, "{}", kernels.name());
            let int8 = pack(PackSource::Int8 { tokens: tokens.view(), cols });
            assert_eq!(int8, plain(&as_tokens), "{}", kernels.name());
            assert_eq!(turned(&tokens_t), int8, "{}", kernels.name());
        }
    }
}

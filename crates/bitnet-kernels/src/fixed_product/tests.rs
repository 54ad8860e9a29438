use super::*;
use crate::ternary::QuantizedTokens;

/// Values of either sign whose magnitudes differ by eight powers of ten.
fn gradients(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32
    };
    (0..n).map(|_| (next() - 0.5) * 10f32.powf(-8.0 * next())).collect()
}

fn activations(tokens: usize, cols: usize) -> QuantizedTokens {
    let mut x = QuantizedTokens::default();
    x.resize(tokens, cols);
    for t in 0..tokens {
        let row = &mut x.q[t * x.stride..][..cols];
        for (k, q) in row.iter_mut().enumerate() {
            *q = ((t * 31 + k * 17 + t * k) % 255) as i8;
            *q = (*q).max(-127);
        }
        x.sums[t] = row.iter().map(|&q| i32::from(q)).sum();
        x.scales[t] = 0.01 + t as f32 * 1e-4;
    }
    x
}

/// A case with two digits and with three.
fn of_both<T: Copy>(case: T) -> [(T, Digits); 2] {
    [Digits::Two, Digits::Three].map(|digits| (case, digits))
}

/// The integers and the step of some terms, as the module says.
fn definition(digits: Digits, terms: &[f32]) -> (Vec<i64>, f32) {
    let absmax = terms.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let largest = 127.0 * 256f32.powi(digits.count() as i32 - 1);
    let inv = largest / absmax;
    let ints = terms.iter().map(|x| (x * inv).round_ties_even() as i64).collect();
    (ints, absmax / largest)
}

/// The sum of some products, rounded to f32.
fn sum(products: impl Iterator<Item = (i64, i64)>) -> f32 {
    products.map(|(v, x)| v * x).sum::<i64>() as f32
}

fn packed(k: Kernels, x: &QuantizedTokens, cols: usize) -> Vec<Line> {
    let tokens = x.scales.len();
    let mut out = vec![Line([7; 64]); k.packed_acts_len(tokens, cols)];
    for (i, out) in out.chunks_mut(k.packed_acts_len(FIXED_DEPTH, cols)).enumerate() {
        let end = tokens.min((i + 1) * FIXED_DEPTH);
        let block = x.view().tokens(i * FIXED_DEPTH, end);
        let groups = block.len().div_ceil(k.group());
        // In two parts where there are two panels.
        let first = out.len().min(groups * PANEL);
        let (a, b) = out.split_at_mut(first);
        k.pack_acts(block, 0, a);
        if !b.is_empty() {
            k.pack_acts(block, PANEL * UNIT, b);
        }
    }
    out
}

#[test]
fn gradients_of_weights_are_the_definition_bit_for_bit() {
    let shapes = [[1, 1, 1], [4, 32, 4], [5, 33, 7], [97, 50, 130], [100, 70, 1030], [3, 16, 513]];
    for ([rows, cols, tokens], digits) in shapes.into_iter().flat_map(of_both) {
        let stride = rows + 3;
        let g = gradients(tokens * stride, 5);
        let turned: Vec<f32> = (0..rows * (tokens + 5))
            .map(|i| (i / (tokens + 5), i % (tokens + 5)))
            .map(|(n, t)| if t < tokens { g[t * stride + n] } else { f32::NAN })
            .collect();
        let x = activations(tokens, cols);
        let start = gradients(rows * cols, 6);
        let mut want = [vec![0.0f32; rows * cols], start.clone()];
        for n in 0..rows {
            for first in (0..tokens).step_by(FIXED_DEPTH) {
                let block = first..tokens.min(first + FIXED_DEPTH);
                let terms: Vec<f32> =
                    block.clone().map(|t| g[t * stride + n] * x.scales[t]).collect();
                let (ints, step) = definition(digits, &terms);
                for k in 0..cols {
                    let q = block.clone().map(|t| i64::from(x.q[t * x.stride + k]));
                    let value = sum(ints.iter().copied().zip(q)) * step;
                    let [fresh, added] = &mut want;
                    let at = n * cols + k;
                    fresh[at] = if first == 0 { value } else { fresh[at] + value };
                    added[at] += value;
                }
            }
        }
        for kernels in Kernels::all() {
            let lines = packed(kernels, &x, cols);
            let acts = PackedActs::new(&lines, &x.scales, cols);
            let left = MatRef::new(&g, tokens, rows, stride).t();
            let by_rows = MatRef::new(&turned, rows, tokens, tokens + 5);
            for (accumulate, want) in [(false, &want[0]), (true, &want[1])] {
                for left in [left, by_rows] {
                    let mut out = start.clone();
                    let view = MatMut::new(&mut out, rows, cols);
                    kernels.fixed_product(digits, left, acts, view, accumulate);
                    let same = out.iter().zip(want).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(same, "{} [{rows}, {cols}] {tokens} tokens", kernels.name());
                }
            }
        }
    }
}

#[test]
fn gradients_of_inputs_are_the_definition_bit_for_bit() {
    let shapes = [[1, 1, 1], [16, 256, 8], [33, 300, 3], [70, 513, 90], [50, 64, 200]];
    for ([rows, cols, tokens], digits) in shapes.into_iter().flat_map(of_both) {
        let count = digits.count();
        let trits: Vec<i8> = (0..rows * cols).map(|i| (i * i % 7 % 3) as i8 - 1).collect();
        let row_bytes = Layout::P2.row_bytes(cols);
        let mut bytes = vec![0u8; rows * row_bytes];
        for (trits, bytes) in trits.chunks_exact(cols).zip(bytes.chunks_exact_mut(row_bytes)) {
            Layout::P2.pack_row(trits, bytes);
        }
        let w = TernaryRows { layout: Layout::P2, cols, weight_scale: 0.07, bytes: &bytes };
        let g = gradients(tokens * cols, 9);
        let mut want = Vec::new();
        for row in g.chunks_exact(cols) {
            let (ints, step) = definition(digits, row);
            for trits in trits.chunks_exact(cols) {
                let products = ints.iter().copied().zip(trits.iter().map(|&t| i64::from(t)));
                want.push(sum(products) * (step * 0.07));
            }
        }
        for kernels in Kernels::all() {
            let mut x = QuantizedTokens::default();
            x.resize(count * tokens, cols);
            x.q.fill(99);
            for (t, row) in g.chunks_exact(cols).enumerate() {
                let all = t * count..(t + 1) * count;
                let q = &mut x.q[all.start * x.stride..all.end * x.stride];
                let step = kernels.digits(digits, row, q, &mut x.sums[all.clone()]);
                x.scales[all].fill(step);
            }
            let mut out = vec![f32::NAN; tokens * rows];
            let view = MatMut::new(&mut out, tokens, rows);
            kernels.ternary_matmul_fixed(digits, w, x.view(), view);
            let same = out.iter().zip(&want).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{} [{rows}, {cols}] {tokens} tokens", kernels.name());
        }
    }
}

/// Half a step, and the rounding of the quotient, times the magnitudes met.
#[test]
fn what_is_lost_is_half_a_step() {
    let terms = gradients(4000, 3);
    for (kernels, digits) in Kernels::all().into_iter().flat_map(of_both) {
        let (_, want) = definition(digits, &terms);
        let count = digits.count();
        let (mut q, mut sums) = (vec![0i8; count * 4032], vec![0; count]);
        let step = kernels.digits(digits, &terms, &mut q, &mut sums);
        assert_eq!(step, want);
        for (q, sum) in q.chunks_exact(4032).zip(sums) {
            assert_eq!(sum, q.iter().map(|&q| i32::from(q)).sum::<i32>());
        }
        let step = f64::from(step);
        for (i, x) in terms.iter().enumerate() {
            let v: i32 = (0..count).map(|d| i32::from(q[d * 4032 + i]) << (8 * d)).sum();
            let lost = (f64::from(v) * step - f64::from(*x)).abs();
            let bound = 0.5 * step + f64::from(x.abs()) * 2f64.powi(-23);
            assert!(lost <= bound, "{}: {lost} of {x}, bound {bound}", kernels.name());
        }
    }
}

#[test]
fn what_is_not_finite_shows_and_what_is_tiny_is_zero() {
    let x = activations(6, 20);
    for kernels in Kernels::all() {
        let lines = packed(kernels, &x, 20);
        let acts = PackedActs::new(&lines, &x.scales, 20);
        for (bad, value) in [(f32::NAN, None), (f32::INFINITY, None), (1e-38, Some(0.0))] {
            let (mut by_tokens, mut by_rows) = ([0.0f32; 12], [0.0f32; 12]);
            (by_tokens[4], by_rows[2]) = (bad, bad);
            for left in [MatRef::new(&by_tokens, 6, 2, 2).t(), MatRef::new(&by_rows, 2, 6, 6)] {
                let mut out = vec![1.0f32; 40];
                let to = MatMut::new(&mut out, 2, 20);
                kernels.fixed_product(Digits::Three, left, acts, to, false);
                let (own, other) = out.split_at(20);
                match value {
                    None => assert!(own.iter().all(|x| x.is_nan()), "{bad}: {own:?}"),
                    Some(value) => assert!(own.iter().all(|&x| x == value)),
                }
                assert!(other.iter().all(|&x| x == 0.0), "{other:?}");
            }
            let (mut q, mut sums) = (vec![0i8; 3 * 64], [0; 3]);
            let step = kernels.digits(Digits::Three, &[bad, 1e-39], &mut q, &mut sums);
            assert_eq!(step.is_nan(), value.is_none());
        }
    }
}

/// All bytes at their largest, in the longest sums: nothing overflows.
#[test]
fn the_largest_sums_are_exact() {
    let (tokens, cols, rows) = (FIXED_DEPTH, 17, 5);
    let mut x = activations(tokens, cols);
    x.scales.fill(1.0);
    // The digits 127, 127 and 126.
    let second = ((127 << 16) - 0x8081) as f32;
    for sign in [-1i8, 1] {
        x.q.fill(0);
        (0..tokens).for_each(|t| x.q[t * x.stride..][..cols].fill(127 * sign));
        let mut g = vec![second; tokens * rows];
        g[..rows].fill(largest(3));
        let want = {
            let ints = std::iter::once(largest(3)).chain(std::iter::repeat_n(second, tokens - 1));
            sum(ints.map(|v| (v as i64, 127 * i64::from(sign))))
        };
        for kernels in Kernels::all() {
            let lines = packed(kernels, &x, cols);
            let acts = PackedActs::new(&lines, &x.scales, cols);
            let mut by_rows = vec![second; rows * tokens];
            by_rows.iter_mut().step_by(tokens).for_each(|first| *first = largest(3));
            let by_rows = MatRef::new(&by_rows, rows, tokens, tokens);
            for left in [MatRef::new(&g, tokens, rows, rows).t(), by_rows] {
                let mut out = vec![0.0f32; rows * cols];
                let to = MatMut::new(&mut out, rows, cols);
                kernels.fixed_product(Digits::Three, left, acts, to, false);
                let name = kernels.name();
                assert!(out.iter().all(|&x| x == want), "{name}: {} and {want}", out[0]);
            }
        }
    }
}

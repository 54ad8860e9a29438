//! Int8 rows on every instruction set against sums written out.

#![allow(clippy::unwrap_used)]

use bitnet_kernels::{INT8_MAX_COLS, Int8Rows, Kernels, MatMut, QuantizedTokens};
use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Every instruction set gives the sums of `w` `[rows, cols]` and `q` `[tokens, cols]`.
fn check(cols: usize, w: &[i8], q: &[i8]) {
    let (rows, tokens) = (w.len() / cols, q.len() / cols);
    let stride = Int8Rows::stride(cols);
    // Padding of rows does not count, whatever it is.
    let mut bytes = vec![0xa5u8; rows * stride];
    for (row, w) in bytes.chunks_exact_mut(stride).zip(w.chunks_exact(cols)) {
        row.iter_mut().zip(w).for_each(|(b, &w)| *b = (i16::from(w) + 128) as u8);
    }
    let mut x = QuantizedTokens::default();
    x.resize(tokens, cols);
    for (t, q) in q.chunks_exact(cols).enumerate() {
        x.q[t * x.stride..][..cols].copy_from_slice(q);
        x.sums[t] = q.iter().map(|&q| i32::from(q)).sum();
    }
    let want: Vec<i32> = q
        .chunks_exact(cols)
        .flat_map(|q| {
            w.chunks_exact(cols)
                .map(move |w| w.iter().zip(q).map(|(&w, &q)| i32::from(w) * i32::from(q)).sum())
        })
        .collect();
    for kernels in Kernels::all() {
        let mut out = vec![0; rows * tokens];
        let w = Int8Rows { cols, bytes: &bytes };
        kernels.int8_sums(w, x.view(), MatMut::new(&mut out, tokens, rows));
        assert!(out == want, "{}: {rows} rows, {cols} columns, {tokens}", kernels.name());
        // Any rows by themselves.
        let mut out = vec![0; tokens];
        let last = w.rows(rows - 1, rows);
        kernels.int8_sums(last, x.view(), MatMut::new(&mut out, tokens, 1));
        assert!(out.iter().enumerate().all(|(t, &sum)| sum == want[t * rows + rows - 1]));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn sums_are_those_of_the_definition(
        rows in 1usize..10,
        cols in prop_oneof![1usize..5, 60usize..70, 125usize..132, 1usize..900],
        tokens in 1usize..6,
        seed: u64,
    ) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let w: Vec<i8> = (0..rows * cols).map(|_| rng.next_u32() as i8).collect();
        let q: Vec<i8> = (0..tokens * cols).map(|_| rng.next_u32() as i8).collect();
        check(cols, &w, &q);
    }
}

#[test]
fn the_extremes_do_not_overflow() {
    for cols in [64, 2560, INT8_MAX_COLS] {
        for w in [-128, -127, 127] {
            for q in [-128, 127] {
                check(cols, &vec![w; 2 * cols], &vec![q; 2 * cols]);
            }
        }
    }
}

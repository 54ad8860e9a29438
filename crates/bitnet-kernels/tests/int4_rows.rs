//! 4-bit rows on every instruction set against sums written out.

#![allow(clippy::unwrap_used)]

use bitnet_kernels::{INT4_MAX_COLS, Int4Rows, Kernels, MatMut, QuantizedTokens};
use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Every instruction set gives the sums of `w` `[rows, cols]` and `q` `[tokens, cols]`,
/// for all rows and for those in `picked`.
fn check(cols: usize, w: &[u8], q: &[i8], picked: &[u32]) {
    let (rows, tokens) = (w.len() / cols, q.len() / cols);
    let stride = Int4Rows::stride(cols);
    // Padding of rows does not count, whatever it is.
    let mut bytes = vec![0xa5u8; rows * stride];
    for (row, w) in bytes.chunks_exact_mut(stride).zip(w.chunks_exact(cols)) {
        for (k, &w) in w.iter().enumerate() {
            let (at, shift) = (k / 128 * 64 + k % 64, k / 64 % 2 * 4);
            row[at] = row[at] & !(15 << shift) | w << shift;
        }
    }
    let mut x = QuantizedTokens::default();
    x.resize(tokens, cols);
    for (t, q) in q.chunks_exact(cols).enumerate() {
        x.q[t * x.stride..][..cols].copy_from_slice(q);
    }
    let sum = |t: usize, n: usize| -> i32 {
        let (w, q) = (&w[n * cols..][..cols], &q[t * cols..][..cols]);
        w.iter().zip(q).map(|(&w, &q)| i32::from(w) * i32::from(q)).sum()
    };
    let of = |picked: &[u32]| -> Vec<i32> {
        (0..tokens).flat_map(|t| picked.iter().map(move |&n| sum(t, n as usize))).collect()
    };
    let all = of(&(0..rows as u32).collect::<Vec<_>>());
    let (some, last) = (of(picked), of(&[rows as u32 - 1]));
    for kernels in Kernels::all() {
        let w = Int4Rows { cols, bytes: &bytes };
        let mut out = vec![0; rows * tokens];
        kernels.int4_sums(w, w.rows(0, rows.min(3)), x.view(), MatMut::new(&mut out, tokens, rows));
        assert!(out == all, "{}: {rows} rows, {cols} columns, {tokens}", kernels.name());
        let mut out = vec![0; picked.len() * tokens];
        kernels.int4_sums_of(w, picked, x.view(), MatMut::new(&mut out, tokens, picked.len()));
        assert!(out == some, "{}: rows {picked:?}, {cols} columns, {tokens}", kernels.name());
        let mut out = vec![0; tokens];
        let w = w.rows(rows - 1, rows);
        kernels.int4_sums(w, w.rows(0, 0), x.view(), MatMut::new(&mut out, tokens, 1));
        assert!(out == last, "{}: last row", kernels.name());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn sums_are_those_of_the_definition(
        rows in 1usize..10,
        cols in prop_oneof![1usize..5, 60usize..70, 125usize..132, 250usize..260, 1usize..900],
        tokens in 1usize..10,
        picked in proptest::collection::vec(any::<u32>(), 0..9),
        seed: u64,
    ) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let w: Vec<u8> = (0..rows * cols).map(|_| rng.next_u32() as u8 & 15).collect();
        let q: Vec<i8> = (0..tokens * cols).map(|_| rng.next_u32() as i8).collect();
        let picked: Vec<u32> = picked.into_iter().map(|n| n % rows as u32).collect();
        check(cols, &w, &q, &picked);
    }
}

#[test]
fn the_extremes_do_not_overflow() {
    for cols in [64, 2560, INT4_MAX_COLS] {
        for w in [0, 15] {
            for q in [-128, 127] {
                check(cols, &vec![w; 2 * cols], &vec![q; 2 * cols], &[1, 0, 1]);
            }
        }
    }
}

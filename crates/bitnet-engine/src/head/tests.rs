//! The scans' answers against all logits.

use half::f16;
use proptest::prelude::*;

use super::*;
use crate::parallel::Workers;

/// The answer from all logits, written out.
fn full(rows: DenseRows<'_>, h: &[f32], k: usize) -> Option<Vec<TokenLogit>> {
    let mut logits = vec![0.0; rows.len() / h.len()];
    Kernels::detect().dense_matvec(rows, h, &mut logits);
    if logits.iter().any(|x| x.is_nan() || *x == f32::INFINITY) {
        return None;
    }
    let mut all: Vec<TokenLogit> =
        (0u32..).zip(&logits).map(|(token, &logit)| TokenLogit { token, logit }).collect();
    all.sort_by(|a, b| b.logit.partial_cmp(&a.logit).unwrap().then(a.token.cmp(&b.token)));
    all.truncate(k);
    all.first().is_some_and(|t| t.logit.is_finite()).then_some(all)
}

fn bits(found: Option<Vec<TokenLogit>>) -> Option<Vec<(u32, u32)>> {
    found.map(|t| t.iter().map(|t| (t.token, t.logit.to_bits())).collect())
}

/// Every logit lies between the bounds that a scan gave.
fn check_bounds(top: &Top, head: &NestedHead, full: bool, t: usize, logits: &[f32]) {
    let (tokens, factors) = (top.activations.len(), top.activations.factors(t));
    for (row, &x) in logits.iter().enumerate() {
        let (block, i) = (row / BLOCK, row % BLOCK);
        let middle = top.middles[(block * tokens + t) * BLOCK + i];
        let numbers = &head.numbers[block];
        let error = factors.error(numbers, numbers.of(full), i);
        let inside = middle - error <= x && x <= middle + error;
        assert!(
            inside || x.is_nan() || upper(middle, error) == f32::INFINITY,
            "row {row}: {x} is not within {error} of {middle}"
        );
        assert!(x.is_nan() || x <= top.reaches[block * tokens + t].upper, "row {row}");
    }
}

/// Checks every mode, instruction set and some k; returns the rows that the modes
/// [int8, int4] scored exactly for k = 1, and those that int4 refined.
fn check(rows: DenseRows<'_>, h: &[f32]) -> [u64; 3] {
    let vocab = rows.len() / h.len();
    let mut logits = vec![0.0; vocab];
    Kernels::detect().dense_matvec(rows, h, &mut logits);
    let mut read = [0; 3];
    for threads in [1, 3] {
        let workers = Workers::new(threads).unwrap();
        let head = workers.run(usize::MAX, |split| NestedHead::new(rows, h.len(), split));
        for kernels in Kernels::all() {
            for k in [0, 1, 2, 7, vocab, vocab + 1] {
                let want = bits(full(rows, h, k));
                for (i, mode) in [HeadMode::Int8Exact, HeadMode::Int4Exact].iter().enumerate() {
                    let mut top = Top::new(*mode);
                    workers.run(usize::MAX, |split| top.search(kernels, split, rows, &head, h, k));
                    check_bounds(&top, &head, i == 0, 0, &logits);
                    let found = bits(top.result().ok().map(<[TokenLogit]>::to_vec));
                    if k > 0 {
                        assert_eq!(found, want, "{mode:?}, {}, k {k}", kernels.name());
                    }
                    let counts = top.counts();
                    assert_eq!((counts.searches, counts.full_scans), (1, 1 - i as u64));
                    if k == 1 {
                        read[i] = counts.scored;
                        read[2] = counts.refined;
                    }
                }
                let mut stored = Top::new(HeadMode::Stored);
                stored.of_logits(&logits, vocab, k);
                let found = bits(stored.result().ok().map(<[TokenLogit]>::to_vec));
                if k > 0 {
                    assert_eq!(found, want, "all logits, k {k}");
                }
            }
        }
    }
    read
}

/// A head with everything that is hard: nearly equal rows, equal rows, zero,
/// tiny and huge rows, and activations with outliers.
fn head(vocab: usize, cols: usize, seed: u64, kind: u8) -> (Vec<f16>, Vec<f32>) {
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{Rng, SeedableRng};
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut float = move || (rng.next_u32() >> 8) as f32 / (1 << 23) as f32 - 1.0;
    let mut w: Vec<f16> = (0..vocab * cols).map(|_| f16::from_f32(float() * 0.1)).collect();
    let mut h: Vec<f32> = (0..cols).map(|_| float() * 3.0).collect();
    if kind & 1 != 0 {
        h[seed as usize % cols] = 900.0;
    }
    for row in 1..vocab {
        let at = row * cols;
        match (kind >> 1, row % 5) {
            // A copy of the first row, exact or one bit off.
            (1, 0..4) => w.copy_within(0..cols, at),
            (2, 0..4) => {
                w.copy_within(0..cols, at);
                let i = at + row % cols;
                w[i] = f16::from_bits(w[i].to_bits() ^ 1);
            }
            (3, 0) => w[at..at + cols].fill(f16::ZERO),
            (3, 1) => {
                w[at..at + cols].iter_mut().for_each(|x| *x = f16::from_f32(x.to_f32() * 6e5))
            }
            (3, 2) => w[at..at + cols].fill(f16::from_bits(1 + row as u16 % 3)),
            _ => {}
        }
    }
    (w, h)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn the_answer_is_that_of_all_logits(
        vocab in 1usize..300,
        cols in 1usize..200,
        seed: u64,
        kind in 0u8..8,
        near in prop_oneof![Just(None), (0.0f32..1.0).prop_map(Some)],
    ) {
        let (w, mut h) = head(vocab, cols, seed, kind);
        if let Some(cosine) = near {
            let row = seed as usize / 7 % vocab;
            towards(&w[row * cols..][..cols], cosine, &mut h);
        }
        check(DenseRows::F16(&w), &h);
    }

    #[test]
    fn searches_together_are_those_alone(
        vocab in 1usize..200,
        cols in 1usize..150,
        tokens in 1usize..20,
        k in 1usize..5,
        seed: u64,
    ) {
        let (w, _) = head(vocab, cols, seed, (seed % 8) as u8);
        let hs: Vec<f32> = (0..tokens as u64)
            .flat_map(|t| head(1, cols, seed ^ t, (t % 2) as u8).1)
            .collect();
        let rows = DenseRows::F16(&w);
        let workers = Workers::new(2).unwrap();
        let head = workers.run(usize::MAX, |split| NestedHead::new(rows, cols, split));
        for mode in [HeadMode::Int8Exact, HeadMode::Int4Exact] {
            let mut top = Top::new(mode);
            let kernels = Kernels::detect();
            // Again and again, so that every way of scanning is met.
            for _ in 0..3 {
                workers
                    .run(usize::MAX, |split| top.search(kernels, split, rows, &head, &hs, k));
                let found = top.result().ok().map(<[TokenLogit]>::to_vec);
                let alone: Option<Vec<Vec<TokenLogit>>> =
                    hs.chunks_exact(cols).map(|h| full(rows, h, k)).collect();
                prop_assert_eq!(bits(found), bits(alone.map(|t| t.concat())), "{:?}", mode);
            }
            prop_assert_eq!(top.counts().searches, 3 * tokens as u64);
        }
    }
}

/// Turns `h` so that its cosine with a row is as given; nothing for a row of zeros.
fn towards(row: &[f16], cosine: f32, h: &mut [f32]) {
    let row: Vec<f32> = row.iter().map(|x| x.to_f32()).collect();
    let square: f32 = row.iter().map(|x| x * x).sum();
    let along: f32 = row.iter().zip(&*h).map(|(a, b)| a * b).sum();
    if square == 0.0 || row.len() < 2 {
        return;
    }
    h.iter_mut().zip(&row).for_each(|(h, w)| *h -= along / square * w);
    let norm: f32 = h.iter().map(|x| x * x).sum::<f32>().sqrt();
    let sine = (1.0 - cosine * cosine).sqrt() * 10.0 / norm;
    h.iter_mut().zip(&row).for_each(|(h, w)| *h = *h * sine + w / square.sqrt() * cosine * 10.0);
}

#[test]
fn few_rows_are_scored() {
    // Without and with an outlier, of a winner that does not stand out.
    for kind in [0, 1] {
        let (w, h) = head(4000, 640, 5, kind);
        let [int8, int4, refined] = check(DenseRows::F16(&w), &h);
        assert!((2..100).contains(&int8), "int8: {int8} of 4000 rows");
        assert!((2..100).contains(&int4), "int4: {int4} of 4000 rows");
        assert!((20..2000).contains(&refined), "{refined} of 4000 rows");
    }
    // And of one that does.
    let (w, mut h) = head(4000, 640, 5, 0);
    towards(&w[123 * 640..][..640], 0.5, &mut h);
    let read = check(DenseRows::F16(&w), &h);
    // The winner, to find the threshold and as the only row above it.
    assert_eq!(read, [2, 2, 1]);
}

#[test]
fn where_four_bits_are_too_few_eight_are_read_for_a_while() {
    // Four of five rows are the same.
    let (w, _) = head(1000, 64, 5, 2);
    let row = |row: usize| -> Vec<f32> { w[row * 64..][..64].iter().map(|x| x.to_f32()).collect() };
    let (rows, workers) = (DenseRows::F16(&w), Workers::new(1).unwrap());
    let head = workers.run(usize::MAX, |split| NestedHead::new(rows, 64, split));
    let mut top = Top::new(HeadMode::Int4Exact);
    let mut full_scans = |h: &[f32], searches: u64| {
        let before = top.counts();
        for _ in 0..searches {
            let kernels = Kernels::detect();
            workers.run(usize::MAX, |split| top.search(kernels, split, rows, &head, h, 1));
            assert_eq!(bits(top.result().ok().map(<[_]>::to_vec)), bits(full(rows, h, 1)));
        }
        top.counts().full_scans - before.full_scans
    };
    let (alone, alike) = (row(4), row(1));
    assert_eq!(full_scans(&alone, 5), 0);
    assert_eq!(full_scans(&alike, 64), 62);
    assert_eq!(full_scans(&alone, 5), 0);
}

#[test]
fn what_is_not_finite_is_found_as_by_all_logits() {
    let good = vec![0.5f32; 3 * 70];
    let mut h = vec![1.0f32; 70];
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3e38, f32::MIN_POSITIVE / 64.0] {
        let mut w = good.clone();
        w[75] = bad;
        w[76] = bad;
        check(DenseRows::F32(&w), &h);
        h[3] = bad;
        check(DenseRows::F32(&good), &h);
        h[3] = 1.0;
    }
    check(DenseRows::F32(&good), &[0.0; 70]);
    check(DenseRows::F32(&[f32::NEG_INFINITY; 140]), &h);
    check(DenseRows::F32(&[1e-45; 140]), &[1e-3; 70]);
    check(DenseRows::F32(&[1e30; 140]), &[1e9; 70]);
}

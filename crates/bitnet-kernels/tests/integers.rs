//! Every instruction set of this machine against the scalar definitions of
//! `bitnet_core`: integers are compared with `==`, floats by their bits.

#![allow(clippy::unwrap_used)]

use bitnet_core::ternary::{self, dequantize};
use bitnet_core::{Layout, TernaryMatrix};
use bitnet_kernels::{
    Kernels, MatMut, QuantizedTokens, TernaryRows, TokensRef, repack_row, required_isas_missing,
};
use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// What a machine of the test farm must have is named in `BITNET_REQUIRE_ISA`; a
/// path that is missing there fails instead of being skipped.
#[test]
fn required_instruction_sets_are_present() {
    let list = std::env::var("BITNET_REQUIRE_ISA").unwrap_or_default();
    let missing = required_isas_missing(&list);
    assert!(missing.is_empty(), "BITNET_REQUIRE_ISA={list}: missing {missing:?}");
}

/// The test above, run by itself with the variable set, fails as it should.
#[test]
fn a_missing_required_set_fails_the_run() {
    let run = |list: &str| {
        std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "required_instruction_sets_are_present"])
            .env("BITNET_REQUIRE_ISA", list)
            .output()
            .unwrap()
    };
    assert!(run("portable").status.success());
    let failed = run("portable,mmx");
    assert!(!failed.status.success());
    assert!(String::from_utf8_lossy(&failed.stdout).contains("missing [\"mmx\"]"));
}

#[test]
fn a_repacked_row_is_the_packed_row() {
    for cols in [1, 63, 64, 65, 255, 256, 257, 319, 320, 321, 640, 1000, 1280, 2560, 2561, 6912] {
        let trits: Vec<i8> = (0..cols).map(|i| (i * i / 3 + i) as i8 % 3 - 1).collect();
        let trits: Vec<i8> = trits.into_iter().map(|t| t.clamp(-1, 1)).collect();
        let pack = |layout| TernaryMatrix::pack(layout, 1, cols, &trits, 1.0).unwrap().bytes;
        // What was there before does not shine through.
        let mut found = vec![0xff; Layout::P2.row_bytes(cols)];
        repack_row(&pack(Layout::P5), &mut found);
        assert_eq!(found, pack(Layout::P2), "{cols}");
    }
    for kernels in Kernels::all() {
        assert!(kernels.reads_well(Layout::P2));
        let looks_up = ["avx512vbmi", "neon", "neondotprod", "neoni8mm"].contains(&kernels.name());
        assert_eq!(kernels.reads_well(Layout::P5), looks_up, "{}", kernels.name());
    }
}

/// Rows and quantised tokens of a product.
struct Case {
    w: TernaryMatrix,
    trits: Vec<i8>,
    x: QuantizedTokens,
}

impl Case {
    /// A case of given trits `[rows, cols]` and activations `[tokens, cols]`.
    fn new(layout: Layout, cols: usize, trits: Vec<i8>, q: &[i8]) -> Self {
        let w = TernaryMatrix::pack(layout, trits.len() / cols, cols, &trits, 0.37).unwrap();
        let mut x = QuantizedTokens::default();
        x.resize(q.len() / cols, cols);
        for (t, q) in q.chunks_exact(cols).enumerate() {
            x.q[t * x.stride..][..cols].copy_from_slice(q);
            x.sums[t] = q.iter().map(|&q| i32::from(q)).sum();
            x.scales[t] = 0.013 * (t + 1) as f32;
        }
        Self { w, trits, x }
    }

    fn random(layout: Layout, rows: usize, cols: usize, tokens: usize, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let trits = (0..rows * cols).map(|_| (rng.next_u32() % 3) as i8 - 1).collect();
        let q: Vec<i8> = (0..tokens * cols).map(|_| rng.next_u32() as i8).collect();
        Self::new(layout, cols, trits, &q)
    }

    fn rows(&self) -> TernaryRows<'_> {
        let TernaryMatrix { layout, cols, weight_scale, ref bytes, .. } = self.w;
        TernaryRows { layout, cols, weight_scale, bytes }
    }

    /// Every instruction set gives the sums of the definition.
    fn check(&self) {
        let (rows, tokens) = (self.w.rows, self.x.scales.len());
        let view: TokensRef<'_> = self.x.view();
        let want: Vec<i32> = (0..tokens)
            .flat_map(|t| ternary::ternary_sums(&self.trits, &view.token(t)[..self.w.cols]))
            .collect();
        let scaled: Vec<u32> = want
            .iter()
            .enumerate()
            .map(|(i, &sum)| dequantize(sum, view.scales[i / rows], self.w.weight_scale).to_bits())
            .collect();
        for kernels in Kernels::all() {
            let at =
                format!("{} {:?} {rows}x{}x{tokens}", kernels.name(), self.w.layout, self.w.cols);
            let mut sums = vec![i32::MIN; rows * tokens];
            kernels.ternary_sums(self.rows(), view, MatMut::new(&mut sums, tokens, rows));
            assert!(sums == want, "{at}: sums");
            let mut out = vec![f32::NAN; rows * tokens];
            kernels.ternary_matmul(self.rows(), view, MatMut::new(&mut out, tokens, rows));
            assert!(out.iter().map(|v| v.to_bits()).eq(scaled.iter().copied()), "{at}: scaled");
        }
    }
}

#[test]
fn products_of_awkward_shapes_are_exact() {
    let mut seed = 0;
    for layout in Layout::ALL {
        for cols in [1, 63, 64, 255, 256, 257, 319, 320, 321, 640, 2560] {
            for (rows, tokens) in [(1, 1), (3, 2), (5, 3), (4, 5), (7, 7), (17, 8), (49, 9)] {
                Case::random(layout, rows, cols, tokens, seed).check();
                seed += 1;
            }
        }
    }
}

#[test]
fn every_number_of_tokens_is_exact() {
    for layout in Layout::ALL {
        for tokens in 1..=40 {
            Case::random(layout, 67, 576, tokens, tokens as u64).check();
        }
        // Several chunks of rows, several parts of the columns.
        for tokens in [5, 7, 8, 13, 24] {
            Case::random(layout, 230, 7000, tokens, tokens as u64).check();
        }
        // More tokens than a panel keeps sums for, more columns than it holds.
        Case::random(layout, 50, 300, 300, 1).check();
        Case::random(layout, 70, 9000, 17, 2).check();
    }
}

/// All weights and all activations at the ends of their ranges: the largest sums
/// of either sign, where narrower accumulators would wrap.
#[test]
fn extremes_are_exact() {
    for layout in Layout::ALL {
        for cols in [256, 320, 2560, 8192 + 64] {
            for (trit, q) in [(1, 127), (1, -128), (-1, 127), (-1, -128), (0, 127), (0, -128)] {
                for tokens in [1, 2, 5, 9] {
                    let q = vec![q; tokens * cols];
                    Case::new(layout, cols, vec![trit; 6 * cols], &q).check();
                }
            }
        }
    }
}

#[test]
fn the_longest_exact_row_is_exact() {
    let cols = ternary::MAX_EXACT_COLS;
    for layout in Layout::ALL {
        for (trit, q) in [(1, -128), (-1, -128), (1, 127)] {
            for tokens in [1, 3, 8] {
                Case::new(layout, cols, vec![trit; 5 * cols], &vec![q; tokens * cols]).check();
            }
        }
        Case::random(layout, 5, cols, 2, 7).check();
    }
}

#[test]
fn a_product_can_be_split_by_rows_and_tokens() {
    let case = Case::random(Layout::P2, 100, 520, 21, 3);
    let (w, x) = (case.rows(), case.x.view());
    for kernels in Kernels::all() {
        let mut whole = vec![0; 2100];
        kernels.ternary_sums(w, x, MatMut::new(&mut whole, 21, 100));
        let mut parts = vec![0; 2100];
        let (left, right) = MatMut::new(&mut parts, 21, 100).split_cols(37);
        kernels.ternary_sums(w.rows(0, 37), x, left);
        let (top, rest) = right.split_rows(5);
        kernels.ternary_sums(w.rows(37, 100), x.tokens(0, 5), top);
        kernels.ternary_sums(w.rows(37, 100), x.tokens(5, 21), rest);
        assert!(whole == parts, "{}", kernels.name());
    }
}

#[test]
fn a_product_of_nothing_is_nothing() {
    let case = Case::random(Layout::P2, 4, 64, 2, 3);
    for kernels in Kernels::all() {
        let none = case.x.view().tokens(0, 0);
        kernels.ternary_sums(case.rows(), none, MatMut::new(&mut [], 0, 4));
        kernels.ternary_sums(case.rows().rows(1, 1), case.x.view(), MatMut::new(&mut [], 2, 0));
    }
}

/// A float that is often at a border: half-way, huge, tiny, not finite.
fn awkward() -> impl Strategy<Value = f32> {
    prop_oneof![
        8 => -4.0f32..4.0,
        2 => (-300i32..300).prop_map(|v| v as f32 * 0.5),
        1 => any::<f32>(),
        1 => Just(f32::NAN),
        1 => Just(f32::INFINITY),
        1 => Just(f32::NEG_INFINITY),
        1 => Just(-0.0),
    ]
}

fn check_quantize(x: &[f32]) {
    let mut want = vec![0i8; x.len()];
    let scale = ternary::quantize_activations(x, &mut want);
    let sum: i32 = want.iter().map(|&q| i32::from(q)).sum();
    for kernels in Kernels::all() {
        let mut q = vec![55i8; x.len() + 9];
        let (got_scale, got_sum) = kernels.quantize(x, &mut q);
        assert_eq!(got_scale.to_bits(), scale.to_bits(), "{}", kernels.name());
        assert_eq!(got_sum, sum, "{}", kernels.name());
        assert_eq!(&q[..x.len()], want, "{}", kernels.name());
        assert_eq!(&q[x.len()..], [0; 9]);
    }
}

fn check_weights(row: &[f32], inv_weight_scale: f32) {
    let want: Vec<i8> =
        row.iter().map(|&w| ternary::quantize_weight(w, inv_weight_scale)).collect();
    let packed = TernaryMatrix::pack(Layout::P2, 1, row.len(), &want, 1.0).unwrap().bytes;
    let sum = ternary::row_abs_sum(row);
    for kernels in Kernels::all() {
        let mut trits = vec![9i8; row.len()];
        kernels.quantize_weight_row(row, inv_weight_scale, &mut trits);
        assert_eq!(trits, want, "{}", kernels.name());
        let mut bytes = vec![0xffu8; packed.len()];
        kernels.pack_weight_row(row, inv_weight_scale, &mut bytes);
        assert_eq!(bytes, packed, "{}", kernels.name());
        let got = kernels.row_abs_sum(row);
        assert!(got.to_bits() == sum.to_bits() || (got.is_nan() && sum.is_nan()));
    }
}

#[test]
fn weights_at_the_borders_of_rounding() {
    let steps = |v: f32| [v.next_down(), v, v.next_up()];
    let row: Vec<f32> = [-1.5, -0.5, 0.0, 0.5, 1.5].into_iter().flat_map(steps).collect();
    check_weights(&row, 1.0);
    check_weights(&row, 0.1);
    check_weights(&[f32::MAX, f32::MIN, f32::MIN_POSITIVE, f32::NAN, f32::INFINITY], 1e5);
}

#[test]
fn activations_of_one_kind() {
    for value in [0.0, -0.0, 1e-30, 1e-5, 3.0, f32::MAX, f32::INFINITY, f32::NAN] {
        for len in [1, 15, 16, 17, 64, 100] {
            check_quantize(&vec![value; len]);
            check_quantize(&vec![-value; len]);
        }
    }
}

proptest! {
    #[test]
    fn products_equal_the_definition(
        rows in 1usize..70,
        cols in 1usize..1500,
        tokens in 1usize..40,
        seed in any::<u64>(),
    ) {
        for layout in Layout::ALL {
            Case::random(layout, rows, cols, tokens, seed).check();
        }
    }

    #[test]
    fn quantised_activations_equal_the_definition(
        x in proptest::collection::vec(awkward(), 1..700),
    ) {
        check_quantize(&x);
        let finite: Vec<f32> = x.iter().map(|v| if v.is_finite() { *v } else { 0.5 }).collect();
        check_quantize(&finite);
    }

    #[test]
    fn quantised_weights_equal_the_definition(
        row in proptest::collection::vec(awkward(), 1..700),
        inv in prop_oneof![Just(1.0f32), 1e-3f32..1e5, Just(f32::INFINITY)],
    ) {
        check_weights(&row, inv);
    }
}

//! The best tokens without all logits: a scan of int8 rows bounds every logit,
//! and the few rows that can still win are scored exactly.
//!
//! # The bound
//!
//! A row of the head is `w = s·q + e` with int8 `q`, an activation is
//! `h = a·p + d` with 16-bit integers `p` (two int8 planes, so that outliers
//! among activations cost nothing). The scan computes `A = s·a·Σ q·p`, whose sum
//! is exact. Then `Σ w·h − A = Σ e·h + Σ s·q·d`, so by Cauchy and Schwarz
//!
//! `|Σ w·h − A| ≤ ‖e‖·‖h‖ + ‖s·q‖·‖d‖`, and `‖s·q‖ ≤ ‖w‖ + ‖e‖`.
//!
//! A few large activations would make `‖h‖` large for little: no `|e|` is above
//! `s/2`, so any set O of elements may be taken out of the first product and
//! bounded by `s/2·Σ_O |h|`. That pays for `|h|` above `√12` times the root mean
//! square of the rest (where `‖e‖ ≈ s·√(n/12)`).
//!
//! The exact logit is an f32 sum in sixteen lanes: each term passes at most
//! `m = n/16 + 8` roundings, so it is within `γ·‖w‖·‖h‖` of the real sum, where
//! `γ = 2·m·2⁻²⁴` (Higham, Accuracy and Stability, 3.1, with room to spare).
//! Every norm is rounded up, and `2⁻²⁰` of the largest possible magnitude covers
//! the roundings of the bounds themselves. A logit that could overflow, or whose
//! row or activation is not finite, gets the bounds ±∞: it is always scored.
//!
//! # The answer
//!
//! Let L be the k-th largest lower bound. At least k logits reach L, so each of
//! the k best does, and so does its upper bound: scoring every row whose upper
//! bound reaches L finds them all, with every row that ties with the last.

use std::cmp::Ordering;

use bitnet_kernels::{DenseRows, Int8Rows, Kernels, MatMut, QuantizedTokens};

use crate::error::EngineError;
use crate::model::Inner;
use crate::parallel::{Rows, RowsMut, Split};

/// How the best tokens are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HeadMode {
    /// From all logits.
    #[default]
    Stored,
    /// By a scan of an int8 copy of the head (made when the first session of a
    /// model asks for it), then exact scores of the rows that can still win: the
    /// same answer for about half the bytes.
    Int8Exact,
}

impl HeadMode {
    /// The name in options.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Stored => "stored",
            Self::Int8Exact => "int8",
        }
    }

    /// The mode of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Stored, Self::Int8Exact].into_iter().find(|m| m.name() == name)
    }
}

/// A token and its logit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenLogit {
    /// The token.
    pub token: u32,
    /// Its logit.
    pub logit: f32,
}

/// Rows that are scanned and bounded together.
const BLOCK: usize = 64;

/// A larger magnitude than this may overflow on the way to a logit.
const SAFE: f32 = 1e37;

/// Covers the roundings of bounds, relative to what they are computed from.
const SLACK: f64 = 1.0 / (1 << 20) as f64;

/// An int8 copy of a head.
#[derive(Debug)]
pub(crate) struct Int8Head {
    cols: usize,
    /// `[V, stride]`, see [`Int8Rows`].
    bytes: Vec<u8>,
    /// The s of each row.
    scales: Vec<f32>,
    /// `‖e‖` of each row, rounded up.
    errors: Vec<f32>,
    /// `‖w‖ + ‖e‖` of each row, rounded up.
    norms: Vec<f32>,
}

impl Int8Head {
    pub(crate) fn new(rows: DenseRows<'_>, cols: usize, split: Split) -> Self {
        let (vocab, stride) = (rows.len() / cols, Int8Rows::stride(cols));
        let mut head = Self {
            cols,
            bytes: vec![128; vocab * stride],
            scales: vec![0.0; vocab],
            errors: vec![0.0; vocab],
            norms: vec![0.0; vocab],
        };
        let item = (
            RowsMut(&mut head.bytes[..], stride),
            RowsMut(&mut head.scales[..], 1),
            RowsMut(&mut head.errors[..], 1),
            RowsMut(&mut head.norms[..], 1),
        );
        split.rows(rows.len() * 4, vocab, item, &|first, (bytes, scales, errors, norms)| {
            let mut row = vec![0.0; cols];
            let numbers = scales.0.iter_mut().zip(errors.0.iter_mut()).zip(norms.0.iter_mut());
            for (i, (bytes, ((scale, error), norm))) in bytes.iter().zip(numbers).enumerate() {
                rows.read_row(first + i, &mut row);
                (*scale, *error, *norm) = quantize_row(&row, bytes);
            }
        });
        head
    }

    fn len(&self) -> usize {
        self.scales.len()
    }
}

/// Fills a row of int8 values; returns its scale, `‖e‖` and `‖w‖ + ‖e‖`.
fn quantize_row(row: &[f32], bytes: &mut [u8]) -> (f32, f32, f32) {
    let absmax = row.iter().fold(0.0f32, |m, x| if x.abs() > m { x.abs() } else { m });
    if absmax == 0.0 && !row.iter().any(|x| x.is_nan()) {
        return (0.0, 0.0, 0.0);
    }
    let scale = (f64::from(absmax) / 127.0) as f32;
    if !row.iter().all(|x| x.is_finite()) || scale < f32::MIN_POSITIVE {
        // No bound; and none below the normal numbers, where s may be far off.
        return (0.0, f32::INFINITY, f32::INFINITY);
    }
    let inv = 127.0 / f64::from(absmax);
    let (mut error, mut square) = (0.0f64, 0.0f64);
    for (b, &w) in bytes.iter_mut().zip(row) {
        let w = f64::from(w);
        let q = round(w * inv);
        *b = (q as i32 + 128) as u8;
        let e = w - q * f64::from(scale);
        error += e * e;
        square += w * w;
    }
    let (error, norm) = (error.sqrt(), square.sqrt());
    (scale, round_up(error), round_up(norm + error))
}

/// The nearest integer of a value below 2^51: one addition, no call.
fn round(x: f64) -> f64 {
    const MAGIC: f64 = 1.5 * (1u64 << 52) as f64;
    (x + MAGIC) - MAGIC
}

/// An f32 that is no smaller than a magnitude computed in f64, whose own
/// roundings (2^-53 for each of at most 2^16 terms) it covers too; ∞ for NaN.
fn round_up(x: f64) -> f32 {
    if x.is_nan() {
        f32::INFINITY
    } else if x == 0.0 {
        0.0
    } else {
        ((x * (1.0 + SLACK)) as f32).max(f32::MIN_POSITIVE)
    }
}

/// One activation in 16-bit integers, and the factors of its bounds.
#[derive(Debug, Default)]
struct Activation {
    /// The planes of p: `p = 256·planes[0] + planes[1]`.
    planes: QuantizedTokens,
    /// The a of `h = a·p + d`.
    scale: f64,
    /// `‖h‖`.
    norm: f32,
    /// What a row's `‖e‖` is multiplied by in its bound: `‖h‖` without O.
    of_error: f32,
    /// What its s is multiplied by: `Σ_O |h| / 2`.
    of_scale: f32,
    /// What a row's `‖w‖ + ‖e‖` is multiplied by.
    of_norm: f32,
}

impl Activation {
    fn set(&mut self, h: &[f32]) {
        let absmax = h.iter().fold(0.0f32, |m, x| if x.abs() > m { x.abs() } else { m });
        self.scale = if absmax == 0.0 { 1.0 } else { f64::from(absmax) / 32_512.0 };
        self.planes.resize(2, h.len());
        let (high, low) = self.planes.q.split_at_mut(self.planes.stride);
        let (mut square, mut error, mut sums) = (0.0f64, 0.0f64, [0i32; 2]);
        for ((high, low), &x) in high.iter_mut().zip(low).zip(h) {
            let x = f64::from(x);
            let p = round(x / self.scale);
            // Of 32512 the planes are 127 and 0, of -32512 they are -127 and 0.
            let upper = (p as i32 + 128) >> 8;
            (*high, *low) = (upper as i8, (p as i32).wrapping_sub(upper << 8) as i8);
            sums = [sums[0] + i32::from(*high), sums[1] + i32::from(*low)];
            let d = x - p * self.scale;
            error += d * d;
            square += x * x;
        }
        self.planes.sums.copy_from_slice(&sums);
        let (norm, error) = (square.sqrt(), error.sqrt());
        let gamma = 2.0 * (h.len() / 16 + 8) as f64 / f64::from(1u32 << 24);
        self.norm = round_up(norm);
        let (rest, outliers) = without_outliers(h);
        self.of_error = round_up(rest * (1.0 + SLACK));
        // The rounding of s moves q·s, and so |e|, by up to 127·2^-24·s beyond s/2.
        self.of_scale = round_up(outliers * (0.5 + 128.0 * SLACK));
        let of_norm = error + gamma * norm + SLACK * (norm + error);
        self.of_norm = round_up(of_norm * (1.0 + SLACK));
    }
}

/// The norm of `h` without its outliers, and the sum of their magnitudes.
fn without_outliers(h: &[f32]) -> (f64, f64) {
    let mut limit = f64::INFINITY;
    // What was an outlier hid others. Any limit gives a bound; this is a good one.
    for _ in 0..4 {
        let rest = h.iter().map(|&x| f64::from(x)).filter(|x| x.abs() <= limit);
        let (count, square) = rest.fold((0, 0.0), |(n, sum), x| (n + 1, sum + x * x));
        limit = (12.0 * square / f64::from(count.max(1))).sqrt();
    }
    let (mut square, mut outliers) = (0.0, 0.0);
    for x in h.iter().map(|&x| f64::from(x)) {
        if x.abs() <= limit { square += x * x } else { outliers += x.abs() }
    }
    (square.sqrt(), outliers)
}

/// Finds the best tokens; its buffers stay.
#[derive(Debug)]
pub(crate) struct Top {
    mode: HeadMode,
    activation: Activation,
    /// Bounds of every logit, `[V]`.
    lower: Vec<f32>,
    upper: Vec<f32>,
    /// Lower bounds being ranked.
    ranked: Vec<f32>,
    /// The rows that can still win, and their logits.
    rows: Vec<u32>,
    logits: Vec<f32>,
    best: Vec<TokenLogit>,
    /// A logit that cannot be ranked.
    bad: Option<TokenLogit>,
}

impl Top {
    pub(crate) fn new(mode: HeadMode) -> Self {
        Self {
            mode,
            activation: Activation::default(),
            lower: Vec::new(),
            upper: Vec::new(),
            ranked: Vec::new(),
            rows: Vec::new(),
            logits: Vec::new(),
            best: Vec::new(),
            bad: None,
        }
    }

    pub(crate) fn mode(&self) -> HeadMode {
        self.mode
    }

    /// What the last search found.
    pub(crate) fn result(&self) -> Result<&[TokenLogit], EngineError> {
        match self.bad {
            Some(TokenLogit { token, logit }) => {
                Err(EngineError::Logit { token: token as usize, value: logit })
            }
            None => Ok(&self.best),
        }
    }

    /// The best `k` of all logits `[V]`.
    pub(crate) fn of_logits(&mut self, logits: &[f32], k: usize) {
        if k == 1 {
            // One pass instead of a ranking; NaN and +∞ win and are refused.
            let best = (0u32..).zip(logits).map(|(token, &logit)| TokenLogit { token, logit });
            let best = best.reduce(|a, b| if beats(b.logit, a.logit) { b } else { a });
            self.best.clear();
            self.best.extend(best);
            self.refuse();
        } else {
            let all = (0u32..).zip(logits).map(|(token, &logit)| TokenLogit { token, logit });
            self.best.clear();
            self.best.extend(all);
            self.rank(k);
        }
    }

    /// The best `k` tokens after the final hidden state `h` `[D]`.
    ///
    /// # Panics
    /// If the model's int8 head has not been made.
    pub(crate) fn find(
        &mut self,
        kernels: Kernels,
        split: Split,
        model: &Inner,
        h: &[f32],
        k: usize,
    ) {
        let head = model.int8.get().expect("a session of this mode has made the copy");
        self.search(kernels, split, model.head(), head, h, k);
    }

    fn search(
        &mut self,
        kernels: Kernels,
        split: Split,
        exact: DenseRows<'_>,
        head: &Int8Head,
        h: &[f32],
        k: usize,
    ) {
        self.activation.set(h);
        self.bound(kernels, split, head);
        self.select(k);
        self.logits.resize(self.rows.len(), 0.0);
        let cols = head.cols;
        let item = (Rows(&self.rows[..], 1), RowsMut(&mut self.logits[..], 1));
        split.rows(self.rows.len() * cols * 2, self.rows.len(), item, &|_, (rows, logits)| {
            let mut logits = logits.0;
            for rows in rows.0.chunk_by(|a, b| a + 1 == *b) {
                let (out, rest) = std::mem::take(&mut logits).split_at_mut(rows.len());
                let first = rows[0] as usize;
                kernels.dense_matvec(exact.rows(cols, first, first + rows.len()), h, out);
                logits = rest;
            }
        });
        self.best.clear();
        let scored = self.rows.iter().zip(&self.logits);
        self.best.extend(scored.map(|(&token, &logit)| TokenLogit { token, logit }));
        self.rank(k);
    }

    /// Lower and upper bounds of every logit.
    fn bound(&mut self, kernels: Kernels, split: Split, head: &Int8Head) {
        let vocab = head.len();
        self.lower.resize(vocab, 0.0);
        self.upper.resize(vocab, 0.0);
        let activation = &self.activation;
        let blocks = vocab.div_ceil(BLOCK);
        let item = Bounds { lower: &mut self.lower, upper: &mut self.upper };
        split.rows(head.bytes.len(), blocks, item, &|first, bounds: Bounds<'_>| {
            let first = first * BLOCK;
            let outs = bounds.lower.chunks_mut(BLOCK).zip(bounds.upper.chunks_mut(BLOCK));
            for (i, (lower, upper)) in outs.enumerate() {
                let start = first + i * BLOCK;
                bound_block(kernels, head, activation, start, lower, upper);
            }
        });
    }

    /// Every row that can be one of the best `k`.
    fn select(&mut self, k: usize) {
        let vocab = self.lower.len();
        let threshold = match k {
            0 => f32::INFINITY,
            1 => largest(&self.lower),
            k if k >= vocab => f32::NEG_INFINITY,
            k => {
                self.ranked.clear();
                self.ranked.extend_from_slice(&self.lower);
                *self.ranked.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
            }
        };
        self.rows.clear();
        for (block, upper) in self.upper.chunks(BLOCK).enumerate() {
            let reach = upper.iter().fold(false, |any, &u| any | (u >= threshold));
            if reach {
                let rows = ((block * BLOCK) as u32..).zip(upper);
                self.rows.extend(rows.filter(|(_, u)| **u >= threshold).map(|(row, _)| row));
            }
        }
    }

    /// Leaves the best `k` of the candidates, in order.
    fn rank(&mut self, k: usize) {
        let order = |a: &TokenLogit, b: &TokenLogit| {
            let by_logit = b.logit.partial_cmp(&a.logit).unwrap_or(Ordering::Equal);
            by_logit.then(a.token.cmp(&b.token))
        };
        self.bad = self.best.iter().find(|t| beats(t.logit, f32::MAX)).copied();
        if self.bad.is_some() {
            return;
        }
        if k > 0 && k < self.best.len() {
            self.best.select_nth_unstable_by(k - 1, order);
        }
        self.best.truncate(k);
        self.best.sort_unstable_by(order);
        self.refuse();
    }

    /// A best logit that is no number to choose by.
    fn refuse(&mut self) {
        self.bad = self.best.first().filter(|t| !t.logit.is_finite()).copied();
    }
}

/// Whether a logit is larger, or cannot be compared.
fn beats(a: f32, b: f32) -> bool {
    a > b || (a.is_nan() && !b.is_nan())
}

/// Bounds of whole blocks of rows.
struct Bounds<'a> {
    lower: &'a mut [f32],
    upper: &'a mut [f32],
}

impl crate::parallel::Divide for Bounds<'_> {
    fn divide(self, blocks: usize, _: usize) -> (Self, Self) {
        let (lower, lower_rest) = self.lower.split_at_mut(blocks * BLOCK);
        let (upper, upper_rest) = self.upper.split_at_mut(blocks * BLOCK);
        (Self { lower, upper }, Self { lower: lower_rest, upper: upper_rest })
    }
}

/// The bounds of the rows from `start` on.
fn bound_block(
    kernels: Kernels,
    head: &Int8Head,
    x: &Activation,
    start: usize,
    lower: &mut [f32],
    upper: &mut [f32],
) {
    let rows = lower.len();
    let mut sums = [0i32; 2 * BLOCK];
    let sums = &mut sums[..2 * rows];
    let w = Int8Rows { cols: head.cols, bytes: &head.bytes };
    let w = w.rows(start, start + rows);
    kernels.int8_sums(w, x.planes.view(), MatMut::new(sums, 2, rows));
    let (high, low) = sums.split_at(rows);
    let scales = &head.scales[start..start + rows];
    let errors = &head.errors[start..start + rows];
    let norms = &head.norms[start..start + rows];
    for i in 0..rows {
        // 256 · 2^31 + 2^31 is exact in f64.
        let sum = f64::from(high[i]) * 256.0 + f64::from(low[i]);
        let approximate = (sum * (f64::from(scales[i]) * x.scale)) as f32;
        // The smallest normal number covers all that may be lost below it.
        let rest = errors[i] * x.of_error + scales[i] * x.of_scale;
        let error = rest + norms[i] * x.of_norm + f32::MIN_POSITIVE;
        let safe = error <= SAFE && norms[i] * x.norm <= SAFE;
        lower[i] = if safe { approximate - error } else { f32::NEG_INFINITY };
        upper[i] = if safe { approximate + error } else { f32::INFINITY };
    }
}

/// The largest of numbers, sixteen at a time.
fn largest(x: &[f32]) -> f32 {
    let (chunks, rest) = x.as_chunks::<16>();
    let mut lanes = [f32::NEG_INFINITY; 16];
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = if x > *lane { x } else { *lane };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m })
}

#[cfg(test)]
mod tests {
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

    fn check(rows: DenseRows<'_>, h: &[f32]) -> usize {
        let vocab = rows.len() / h.len();
        let mut logits = vec![0.0; vocab];
        Kernels::detect().dense_matvec(rows, h, &mut logits);
        let mut candidates = 0;
        for threads in [1, 3] {
            let workers = Workers::new(threads).unwrap();
            let head = workers.run(usize::MAX, |split| Int8Head::new(rows, h.len(), split));
            for kernels in Kernels::all() {
                for k in [1, 2, 7, vocab, vocab + 1] {
                    let mut top = Top::new(HeadMode::Int8Exact);
                    workers.run(usize::MAX, |split| top.search(kernels, split, rows, &head, h, k));
                    for (i, &x) in logits.iter().enumerate() {
                        let inside = top.lower[i] <= x && x <= top.upper[i];
                        assert!(
                            inside || x.is_nan(),
                            "{x} not in {}..{}",
                            top.lower[i],
                            top.upper[i]
                        );
                    }
                    let found = top.result().ok().map(<[TokenLogit]>::to_vec);
                    let bits = |t: Option<Vec<TokenLogit>>| {
                        t.map(|t| {
                            t.iter().map(|t| (t.token, t.logit.to_bits())).collect::<Vec<_>>()
                        })
                    };
                    let want = bits(full(rows, h, k));
                    assert_eq!(bits(found), want, "{}, k {k}", kernels.name());
                    candidates = if k == 1 { top.rows.len() } else { candidates };
                    let mut stored = Top::new(HeadMode::Stored);
                    stored.of_logits(&logits, k);
                    let found = stored.result().ok().map(<[TokenLogit]>::to_vec);
                    assert_eq!(bits(found), want, "all logits, k {k}");
                }
            }
        }
        candidates
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
        ) {
            let (w, h) = head(vocab, cols, seed, kind);
            check(DenseRows::F16(&w), &h);
        }
    }

    #[test]
    fn few_rows_are_scored() {
        // Without and with an outlier.
        for kind in [0, 1] {
            let (w, h) = head(4000, 640, 5, kind);
            let candidates = check(DenseRows::F16(&w), &h);
            assert!((1..40).contains(&candidates), "{candidates} of 4000 rows");
        }
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
}

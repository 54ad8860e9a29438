//! The best tokens without all logits: a scan of a copy of the head in few bits
//! bounds every logit, and the few rows that can still win are scored exactly.
//!
//! # The copies
//!
//! A row `w` of the head is stored as bytes `v`, `w ≈ s·(v − 127.5)`, whose upper
//! four bits are a coarser copy, `w ≈ s·(16·(v >> 4) − 120)`. The two halves lie in
//! planes of their own. [`HeadMode::Int8Exact`] scans both, half the bytes of f16.
//! [`HeadMode::Int4Exact`] scans the upper plane of all rows, a quarter of the
//! bytes, and reads of the lower one only the rows that can still win.
//!
//! # The bound
//!
//! Let e be the error of a copy, `w = s·u + e`. An activation is `h = a·p + d` with
//! 16-bit integers `p` (two int8 planes, so that outliers among activations cost
//! nothing). A scan computes the middle `A = s·a·Σ u·p`, whose sum is exact. Then
//! `Σ w·h − A = Σ e·h + Σ s·u·d`, so by Cauchy and Schwarz
//!
//! `|Σ w·h − A| ≤ ‖e‖·‖h‖ + ‖s·u‖·‖d‖`, and `‖s·u‖ ≤ ‖w‖ + ‖e‖`.
//!
//! A few large activations would make `‖h‖` large for little: any set O of elements
//! may be taken out of the first product and bounded by `max |e|·Σ_O |h|`. That pays
//! for `|h|` above `√12` times the root mean square of the rest (where errors are
//! spread evenly); the smaller of both bounds counts.
//!
//! The norm of e is measured, not derived from s. So s is free to be smaller than
//! the largest weight asks for: cutting that weight off costs less than coarse
//! steps for all others.
//!
//! The exact logit is an f32 sum in sixteen lanes: each term passes at most
//! `m = n/16 + 8` roundings, so it is within `γ·‖w‖·‖h‖` of the real sum, where
//! `γ = 2·m·2⁻²⁴` (Higham, Accuracy and Stability, 3.1, with room to spare).
//! Every norm is rounded up, and `2⁻¹⁸` of the largest possible magnitude covers
//! the roundings of middles and bounds themselves. A logit that could overflow, or
//! whose row or activation is not finite, has no bound: it is always scored.
//!
//! # The answer
//!
//! Score the k rows with the largest middles, and let L be the least of their
//! logits. Each of the k best logits is at least L, and so is its upper bound:
//! scoring every row whose upper bound reaches L finds them all, with every row
//! that ties with the last.
//!
//! # When four bits are too few
//!
//! `‖e‖` of the coarse copy is about 0.11·`‖w‖`. Of random rows of D columns, logits
//! spread by `‖w‖·‖h‖/√D`: the bound is then 5.7 of those for D = 2560, and nothing
//! drops out unless the winner stands out by more. Trained heads have winners that
//! do; where they do not, and more than half of the rows need their lower bits, the
//! next [`RETRY`] scans read both planes at once, which costs what
//! [`HeadMode::Int8Exact`] does, before the coarse copy is tried again.

mod activation;
mod nested;

use std::cmp::Ordering;

use bitnet_kernels::{DenseRows, Int4Rows, Kernels, MatMut};

use self::activation::{Activations, Factors};
pub(crate) use self::nested::NestedHead;
use self::nested::Numbers;
use crate::error::EngineError;
use crate::model::Inner;
use crate::parallel::{Rows, RowsMut, Split};

/// How the best tokens are found. Every mode gives the same answer, bit for bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HeadMode {
    /// From all logits.
    #[default]
    Stored,
    /// By a scan of an 8-bit copy of the head (made when the first session of a
    /// model asks for it), then exact scores of the rows that can still win: about
    /// half the bytes.
    Int8Exact,
    /// By a scan of the upper four bits of that copy, then of the lower four of the
    /// rows that can still win, then exact scores: about a quarter of the bytes
    /// where the best tokens stand out, and never more than [`Self::Int8Exact`]
    /// but for one scan in 32.
    Int4Exact,
}

impl HeadMode {
    /// All modes.
    pub const ALL: [Self; 3] = [Self::Stored, Self::Int8Exact, Self::Int4Exact];

    /// The name in options.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Stored => "stored",
            Self::Int8Exact => "int8",
            Self::Int4Exact => "int4",
        }
    }

    /// The mode of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|m| m.name() == name)
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

/// What searches by a scan read, summed over searches of one hidden state each.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HeadCounts {
    /// Searches.
    pub searches: u64,
    /// Those that scanned all eight bits of every row.
    pub full_scans: u64,
    /// Rows whose lower four bits were read after a scan of the upper four.
    pub refined: u64,
    /// Rows that were scored exactly.
    pub scored: u64,
}

/// Rows that are scanned and bounded together.
const BLOCK: usize = 64;

/// Activations that are scanned together: their planes stay in the cache.
const TOGETHER: usize = 8;

/// Scans of both planes before the coarse copy is tried again.
const RETRY: u32 = 31;

/// Covers the roundings of bounds, relative to what they are computed from.
const SLACK: f64 = 1.0 / (1 << 20) as f64;

/// Finds the best tokens; its buffers stay.
#[derive(Debug)]
pub(crate) struct Top {
    mode: HeadMode,
    /// Scans of both planes to come, in mode [`HeadMode::Int4Exact`].
    full_scans: u32,
    counts: HeadCounts,
    activations: Activations,
    /// What the scan says of every logit, `[blocks, T, BLOCK]`; -∞ without a bound.
    middles: Vec<f32>,
    /// `[blocks, T]`.
    reaches: Vec<Reach>,
    /// Middles being ranked, and their rows.
    ranked: Vec<TokenLogit>,
    /// The rows that can still win, and their logits (or bounds of those).
    rows: Vec<u32>,
    logits: Vec<f32>,
    /// The candidates of one search, then the best of them.
    best: Vec<TokenLogit>,
    /// The best of all searches, one after the other.
    found: Vec<TokenLogit>,
    /// The first logit that cannot be ranked.
    bad: Option<TokenLogit>,
}

/// How large logits of a block can be.
#[derive(Debug, Clone, Copy)]
struct Reach {
    /// The largest middle of a row with a bound; -∞ if there is none.
    middle: f32,
    /// The largest upper bound.
    upper: f32,
}

impl Top {
    pub(crate) fn new(mode: HeadMode) -> Self {
        Self {
            mode,
            full_scans: 0,
            counts: HeadCounts::default(),
            activations: Activations::default(),
            middles: Vec::new(),
            reaches: Vec::new(),
            ranked: Vec::new(),
            rows: Vec::new(),
            logits: Vec::new(),
            best: Vec::new(),
            found: Vec::new(),
            bad: None,
        }
    }

    pub(crate) fn mode(&self) -> HeadMode {
        self.mode
    }

    pub(crate) fn counts(&self) -> HeadCounts {
        self.counts
    }

    /// What the last searches found, `[T, k]` (or `[T, V]` if k is larger).
    pub(crate) fn result(&self) -> Result<&[TokenLogit], EngineError> {
        match self.bad {
            Some(TokenLogit { token, logit }) => {
                Err(EngineError::Logit { token: token as usize, value: logit })
            }
            None => Ok(&self.found),
        }
    }

    /// The best `k` of all logits of each token, `[T, V]`.
    pub(crate) fn of_logits(&mut self, logits: &[f32], vocab: usize, k: usize) {
        self.begin();
        for logits in logits.chunks_exact(vocab) {
            let all = (0u32..).zip(logits).map(|(token, &logit)| TokenLogit { token, logit });
            self.best.clear();
            if k == 1 {
                // One pass instead of a ranking; NaN and +∞ win and are refused.
                self.best.extend(all.reduce(|a, b| if beats(b.logit, a.logit) { b } else { a }));
            } else {
                self.best.extend(all);
            }
            self.rank(k);
        }
    }

    /// The best `k` tokens after each final hidden state `hs` `[T, D]`.
    ///
    /// # Panics
    /// If the model's copy of the head has not been made.
    pub(crate) fn find(
        &mut self,
        kernels: Kernels,
        split: Split,
        model: &Inner,
        hs: &[f32],
        k: usize,
    ) {
        let head = model.nested.get().expect("a session of this mode has made the copy");
        self.search(kernels, split, model.head(), head, hs, k);
    }

    fn search(
        &mut self,
        kernels: Kernels,
        split: Split,
        exact: DenseRows<'_>,
        head: &NestedHead,
        hs: &[f32],
        k: usize,
    ) {
        let full = self.mode != HeadMode::Int4Exact || self.full_scans > 0;
        self.full_scans = self.full_scans.saturating_sub(1);
        self.begin();
        self.reserve(head.vocab);
        self.activations.set(hs, head.cols);
        self.scan(kernels, split, head, full);
        let mut refined = 0;
        for (t, h) in hs.chunks_exact(head.cols).enumerate() {
            self.largest_middles(head, t, k);
            self.score(kernels, split, exact, h);
            let threshold = if self.rows.len() < k {
                f32::NEG_INFINITY
            } else {
                self.logits.iter().copied().fold(f32::INFINITY, f32::min)
            };
            self.select(head, t, full, threshold);
            if !full {
                refined += self.rows.len();
                self.refine(kernels, split, head, t, threshold);
            }
            self.score(kernels, split, exact, h);
            self.best.clear();
            let scored = self.rows.iter().zip(&self.logits);
            self.best.extend(scored.map(|(&token, &logit)| TokenLogit { token, logit }));
            self.rank(k);
        }
        let searches = self.activations.len() as u64;
        self.counts.searches += searches;
        self.counts.refined += refined as u64;
        if full {
            self.counts.full_scans += searches;
        } else if refined > head.vocab / 2 {
            self.full_scans = RETRY;
        }
    }

    /// Room for every row, so that no later search allocates.
    fn reserve(&mut self, vocab: usize) {
        self.ranked.clear();
        self.ranked.reserve(vocab);
        self.rows.clear();
        self.rows.reserve(vocab);
        self.logits.clear();
        self.logits.reserve(vocab);
        self.best.clear();
        self.best.reserve(vocab);
    }

    /// The middle of every logit, and how far the logits of blocks reach.
    fn scan(&mut self, kernels: Kernels, split: Split, head: &NestedHead, full: bool) {
        let (blocks, tokens) = (head.numbers.len(), self.activations.len());
        self.middles.resize(blocks * tokens * BLOCK, 0.0);
        self.reaches.resize(blocks * tokens, Reach { middle: 0.0, upper: 0.0 });
        let activations = &self.activations;
        let item = (
            RowsMut(&mut self.middles[..], tokens * BLOCK),
            RowsMut(&mut self.reaches[..], tokens),
        );
        let planes = if full { 2 } else { 1 };
        let bytes = head.high().bytes.len() * planes;
        split.rows(bytes, blocks, item, &|first, (middles, reaches)| {
            for (b, (middles, reaches)) in (first..).zip(middles.iter().zip(reaches.iter())) {
                scan_block(kernels, head, activations, full, b, middles, reaches);
            }
        });
    }

    /// Leaves in `rows` those with the `k` largest middles, or nearly: where k is
    /// small beside the number of blocks, the best row of each of the best k blocks.
    /// Fewer if so few have a bound, and none if all rows will be scored anyway.
    fn largest_middles(&mut self, head: &NestedHead, t: usize, k: usize) {
        self.rows.clear();
        self.ranked.clear();
        if k == 0 || k >= head.vocab {
            return;
        }
        let (blocks, tokens) = (head.numbers.len(), self.activations.len());
        let middles = &self.middles;
        let middles = |block: usize| block_middles(middles, head, (block, t, tokens));
        let entry = |at: usize, middle: f32| TokenLogit { token: at as u32, logit: middle };
        let by_block = k <= (blocks / 4).max(1);
        if by_block {
            let reaches = self.reaches[t..].iter().step_by(tokens).enumerate();
            self.ranked.extend(reaches.map(|(block, reach)| entry(block, reach.middle)));
        } else {
            let all = (0..blocks).flat_map(|b| (b * BLOCK..).zip(middles(b)));
            self.ranked.extend(all.map(|(row, &middle)| entry(row, middle)));
        }
        if k < self.ranked.len() {
            self.ranked.select_nth_unstable_by(k - 1, |a, b| b.logit.total_cmp(&a.logit));
            self.ranked.truncate(k);
        }
        let bounded = self.ranked.iter().filter(|r| r.logit > f32::NEG_INFINITY);
        self.rows.extend(bounded.map(|r| {
            let best = |block| middles(block).iter().position(|&middle| middle == r.logit);
            match r.token {
                row if !by_block => row,
                block => block * BLOCK as u32 + best(block as usize).unwrap_or(0) as u32,
            }
        }));
    }

    /// Every row whose upper bound reaches the threshold.
    fn select(&mut self, head: &NestedHead, t: usize, full: bool, threshold: f32) {
        let tokens = self.activations.len();
        let factors = self.activations.factors(t);
        self.rows.clear();
        let reaches = self.reaches[t..].iter().step_by(tokens);
        for (block, reach) in reaches.enumerate().filter(|(_, reach)| reach.upper >= threshold) {
            debug_assert!(!reach.upper.is_nan());
            let numbers = &head.numbers[block];
            let errors = factors.errors(numbers, numbers.of(full));
            let middles = block_middles(&self.middles, head, (block, t, tokens));
            for ((row, &middle), error) in ((block * BLOCK) as u32..).zip(middles).zip(errors) {
                if upper(middle, error) >= threshold {
                    self.rows.push(row);
                }
            }
        }
    }

    /// Drops rows that their lower bits show to be out.
    fn refine(
        &mut self,
        kernels: Kernels,
        split: Split,
        head: &NestedHead,
        t: usize,
        threshold: f32,
    ) {
        let (tokens, factors) = (self.activations.len(), self.activations.factors(t));
        let planes = self.activations.planes(t, t + 1);
        let middles = &self.middles;
        self.logits.resize(self.rows.len(), 0.0);
        let item = (Rows(&self.rows[..], 1), RowsMut(&mut self.logits[..], 1));
        let bytes = self.rows.len() * head.cols / 2;
        split.rows(bytes, self.rows.len(), item, &|_, (rows, uppers)| {
            for (rows, uppers) in rows.0.chunks(BLOCK).zip(uppers.0.chunks_mut(BLOCK)) {
                let mut sums = [0i32; 2 * BLOCK];
                let sums = &mut sums[..2 * rows.len()];
                let out = MatMut::new(sums, 2, rows.len());
                kernels.int4_sums_of(head.low(), rows, planes, out);
                for (i, (&row, out)) in rows.iter().zip(uppers).enumerate() {
                    let (block, at) = (row as usize / BLOCK, row as usize % BLOCK);
                    let coarse = middles[(block * tokens + t) * BLOCK + at];
                    let numbers = &head.numbers[block];
                    let sums = [sums[i], sums[rows.len() + i]];
                    let low = weigh([0, 1].map(|p| half_steps(sums[p], factors.sums[p])));
                    let middle = coarse + low * factors.fine_scale * numbers.scale[at];
                    *out = upper(middle, factors.error(numbers, &numbers.fine, at));
                }
            }
        });
        let mut uppers = self.logits.iter();
        self.rows.retain(|_| uppers.next().is_some_and(|&upper| upper >= threshold));
    }

    /// The exact logits of `rows`.
    fn score(&mut self, kernels: Kernels, split: Split, exact: DenseRows<'_>, h: &[f32]) {
        self.counts.scored += self.rows.len() as u64;
        self.logits.resize(self.rows.len(), 0.0);
        let cols = h.len();
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
    }

    /// Before the searches of a step.
    fn begin(&mut self) {
        self.found.clear();
        self.bad = None;
    }

    /// Adds the best `k` of the candidates to what was found, in order.
    fn rank(&mut self, k: usize) {
        let order = |a: &TokenLogit, b: &TokenLogit| {
            let by_logit = b.logit.partial_cmp(&a.logit).unwrap_or(Ordering::Equal);
            by_logit.then(a.token.cmp(&b.token))
        };
        let mut bad = self.best.iter().find(|t| beats(t.logit, f32::MAX)).copied();
        if bad.is_none() {
            if k > 0 && k < self.best.len() {
                self.best.select_nth_unstable_by(k - 1, order);
            }
            self.best.truncate(k);
            self.best.sort_unstable_by(order);
            // A best logit that is no number to choose by.
            bad = self.best.first().filter(|t| !t.logit.is_finite()).copied();
        }
        self.bad = self.bad.or(bad);
        self.found.extend_from_slice(&self.best);
    }
}

/// Whether a logit is larger, or cannot be compared.
fn beats(a: f32, b: f32) -> bool {
    a > b || (a.is_nan() && !b.is_nan())
}

/// The upper bound; ∞ where nothing is known.
fn upper(middle: f32, error: f32) -> f32 {
    let upper = middle + error;
    // Without a bound the middle is -∞, or the error ∞.
    let known = (middle > f32::NEG_INFINITY) & (upper < f32::INFINITY);
    if known { upper } else { f32::INFINITY }
}

/// The middles of a block's rows; `at` is (block, t, T).
fn block_middles<'a>(
    middles: &'a [f32],
    head: &NestedHead,
    (block, t, tokens): (usize, usize, usize),
) -> &'a [f32] {
    let rows = BLOCK.min(head.vocab - block * BLOCK);
    &middles[(block * tokens + t) * BLOCK..][..rows]
}

/// The middles `[T, BLOCK]` and reaches `[T]` of a block.
fn scan_block(
    kernels: Kernels,
    head: &NestedHead,
    activations: &Activations,
    full: bool,
    block: usize,
    middles: &mut [f32],
    reaches: &mut [Reach],
) {
    let (start, valid) = (block * BLOCK, BLOCK.min(head.vocab - block * BLOCK));
    let mut high = [0i32; 2 * TOGETHER * BLOCK];
    let mut low = [0i32; 2 * TOGETHER * BLOCK];
    let outs = middles.chunks_mut(TOGETHER * BLOCK).zip(reaches.chunks_mut(TOGETHER));
    for (i, (middles, reaches)) in outs.enumerate() {
        let (first, tokens) = (i * TOGETHER, reaches.len());
        let planes = activations.planes(first, first + tokens);
        let scan = |w: Int4Rows<'_>, then: Int4Rows<'_>, sums: &mut [i32]| {
            let out = MatMut::new(&mut sums[..2 * tokens * BLOCK], 2 * tokens, BLOCK);
            kernels.int4_sums(w.rows(start, start + BLOCK), then, planes, out);
        };
        let (behind, all) = (start + BLOCK, head.high().len());
        let next = head.high().rows(behind, all.min(behind + BLOCK));
        if full {
            scan(head.high(), head.low().rows(start, behind), &mut high);
            scan(head.low(), next, &mut low);
        } else {
            scan(head.high(), next, &mut high);
        }
        let high = high.as_chunks::<BLOCK>().0.as_chunks::<2>().0;
        let low = low.as_chunks::<BLOCK>().0.as_chunks::<2>().0;
        let outs = middles.as_chunks_mut::<BLOCK>().0.iter_mut().zip(reaches);
        for (t, (middles, reach)) in outs.enumerate() {
            let factors = activations.factors(first + t);
            let low = full.then_some(&low[t]);
            *reach = bound_block(&head.numbers[block], factors, &high[t], low, middles, valid);
        }
    }
}

/// The middles of a block and how far they reach, from the sums of both planes of
/// an activation with the upper bits, and with the lower ones where they were read.
fn bound_block(
    numbers: &Numbers,
    factors: &Factors,
    high: &[[i32; BLOCK]; 2],
    low: Option<&[[i32; BLOCK]; 2]>,
    middles: &mut [f32; BLOCK],
    valid: usize,
) -> Reach {
    let errors = factors.errors(numbers, numbers.of(low.is_some()));
    let mut found = [0.0f32; BLOCK];
    match low {
        None => {
            for i in 0..BLOCK {
                let sums = [0, 1].map(|p| half_steps(high[p][i], factors.sums[p]));
                found[i] = weigh(sums) * factors.coarse_scale * numbers.scale[i];
            }
        }
        Some(low) => {
            for i in 0..BLOCK {
                // 2·(16·high + low - 127.5·Σ p): at most 255·128·2^16, below 2^31.
                let sums = [0, 1].map(|p| {
                    let high = half_steps(high[p][i], factors.sums[p]).wrapping_mul(16);
                    high.wrapping_add(half_steps(low[p][i], factors.sums[p]))
                });
                found[i] = weigh(sums) * factors.fine_scale * numbers.scale[i];
            }
        }
    }
    let mut uppers = [0.0f32; BLOCK];
    for i in 0..BLOCK {
        middles[i] = if errors[i] < f32::INFINITY { found[i] } else { f32::NEG_INFINITY };
        uppers[i] = upper(middles[i], errors[i]);
    }
    middles[valid..].fill(f32::NEG_INFINITY);
    uppers[valid..].fill(f32::NEG_INFINITY);
    Reach { middle: largest(middles), upper: largest(&uppers) }
}

/// `2·Σ u·p - 15·Σ p` of 4-bit u: twice the sum of u - 7.5, at most 15·128·2^16.
fn half_steps(sum: i32, of_p: i32) -> i32 {
    2 * sum - 15 * of_p
}

/// The sums of both planes of p together.
fn weigh([high, low]: [i32; 2]) -> f32 {
    256.0 * high as f32 + low as f32
}

/// The largest of numbers.
fn largest(x: &[f32; BLOCK]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    for chunk in x.as_chunks::<16>().0 {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = if x > *lane { x } else { *lane };
        }
    }
    lanes.iter().fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m })
}

#[cfg(test)]
mod tests;

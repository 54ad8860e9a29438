//! Final hidden states as integers, and the factors of their bounds.

use bitnet_kernels::{QuantizedTokens, TokensRef};

use super::nested::{Errors, Numbers, round_up};
use super::{BLOCK, SLACK};

/// A larger magnitude than this may overflow on the way to a logit.
const SAFE: f32 = 1e37;

/// Some activations in 16-bit integers.
#[derive(Debug, Default)]
pub(super) struct Activations {
    /// Two planes of each p, `p = 256·planes[2t] + planes[2t + 1]`.
    planes: QuantizedTokens,
    factors: Vec<Factors>,
}

/// The factors of one activation's bounds.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Factors {
    /// The sum of each plane of p.
    pub(super) sums: [i32; 2],
    /// Eight times the a of `h = a·p + d`: half a step of the upper bits.
    pub(super) coarse_scale: f32,
    /// a / 2: half a step of all eight.
    pub(super) fine_scale: f32,
    /// `‖h‖`.
    norm: f32,
    /// What a row's `‖e‖` is multiplied by where O is taken out: `‖h‖` without O.
    of_error: f32,
    /// And its largest `|e|`: `Σ_O |h|`.
    of_peak: f32,
    /// What a row's `‖w‖ + ‖e‖` is multiplied by.
    of_norm: f32,
}

impl Activations {
    /// Of `hs`, `[T, D]`.
    pub(super) fn set(&mut self, hs: &[f32], cols: usize) {
        self.planes.resize(2 * hs.len() / cols, cols);
        self.factors.clear();
        let stride = self.planes.stride;
        let planes = self.planes.q.chunks_exact_mut(2 * stride);
        let sums = self.planes.sums.chunks_exact_mut(2);
        for ((h, planes), sums) in hs.chunks_exact(cols).zip(planes).zip(sums) {
            let (high, low) = planes.split_at_mut(stride);
            // Another number of columns may have been here before.
            high[cols..].fill(0);
            low[cols..].fill(0);
            self.factors.push(quantize(h, high, low, sums));
        }
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.factors.len()
    }

    /// The planes of activations `start..end`.
    pub(super) fn planes(&self, start: usize, end: usize) -> TokensRef<'_> {
        self.planes.view().tokens(2 * start, 2 * end)
    }

    pub(super) fn factors(&self, t: usize) -> &Factors {
        &self.factors[t]
    }
}

fn quantize(h: &[f32], high: &mut [i8], low: &mut [i8], sums: &mut [i32]) -> Factors {
    let absmax = h.iter().fold(0.0f32, |m, x| if x.abs() > m { x.abs() } else { m });
    let scale = if absmax == 0.0 { 1.0 } else { f64::from(absmax) / 32_512.0 };
    let (mut square, mut error, mut totals) = (0.0f64, 0.0f64, [0i32; 2]);
    for ((high, low), &x) in high.iter_mut().zip(low).zip(h) {
        let x = f64::from(x);
        let p = round(x / scale);
        // Of 32512 the planes are 127 and 0, of -32512 they are -127 and 0.
        let upper = (p as i32 + 128) >> 8;
        (*high, *low) = (upper as i8, (p as i32).wrapping_sub(upper << 8) as i8);
        totals = [totals[0] + i32::from(*high), totals[1] + i32::from(*low)];
        let d = x - p * scale;
        error += d * d;
        square += x * x;
    }
    sums.copy_from_slice(&totals);
    let (norm, error) = (square.sqrt(), error.sqrt());
    let gamma = 2.0 * (h.len() / 16 + 8) as f64 / f64::from(1u32 << 24);
    let (rest, outliers) = without_outliers(h);
    // A middle passes at most 16 roundings, of at most 3·‖h‖ and ‖w‖ + ‖e‖: the planes
    // of h may be as large as h and still cancel.
    let of_norm = error + gamma * norm + 4.0 * SLACK * (norm + error);
    let up = |x: f64| round_up(x * (1.0 + SLACK));
    let fine_scale = (scale / 2.0) as f32;
    // Below the normal numbers a scale may be far off: no bound.
    let known = fine_scale >= f32::MIN_POSITIVE;
    Factors {
        sums: totals,
        coarse_scale: (scale * 8.0) as f32,
        fine_scale,
        norm: if known { up(norm) } else { f32::INFINITY },
        of_error: up(rest),
        of_peak: up(outliers),
        of_norm: up(of_norm),
    }
}

impl Factors {
    /// How far the logit of row `i` of a block can be from the middle that its
    /// copy gives; ∞ where nothing is known.
    #[inline(always)]
    pub(super) fn error(&self, numbers: &Numbers, errors: &Errors, i: usize) -> f32 {
        let whole = errors.norm[i] * self.norm;
        let parts = errors.norm[i] * self.of_error + errors.peak[i] * self.of_peak;
        let least = if parts < whole { parts } else { whole };
        // The smallest normal number covers all that may be lost below it.
        let error = least + numbers.norm[i] * self.of_norm + f32::MIN_POSITIVE;
        let safe = (error <= SAFE) & (numbers.norm[i] * self.norm <= SAFE);
        if safe { error } else { f32::INFINITY }
    }

    /// [`Factors::error`] of all rows of a block.
    pub(super) fn errors(&self, numbers: &Numbers, errors: &Errors) -> [f32; BLOCK] {
        let mut out = [0.0; BLOCK];
        for (i, out) in out.iter_mut().enumerate() {
            *out = self.error(numbers, errors, i);
        }
        out
    }
}

/// The nearest integer of a value below 2^51: one addition, no call.
fn round(x: f64) -> f64 {
    const MAGIC: f64 = 1.5 * (1u64 << 52) as f64;
    (x + MAGIC) - MAGIC
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

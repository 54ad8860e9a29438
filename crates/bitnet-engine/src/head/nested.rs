//! A copy of a head in two planes of 4 bits, and what bounds its errors.

use bitnet_kernels::{DenseRows, Int4Rows};

use super::{BLOCK, SLACK};
use crate::parallel::{RowsMut, Split};

/// Rows as bytes `v`, `w ≈ s·(v − 127.5)`, whose upper and lower four bits lie
/// apart: the upper ones alone say `w ≈ s·(16·(v >> 4) − 120)`.
#[derive(Debug)]
pub(crate) struct NestedHead {
    pub(super) vocab: usize,
    pub(super) cols: usize,
    /// Upper and lower bits, `[V rounded up to blocks, stride]`, see [`Int4Rows`].
    high: Vec<u8>,
    low: Vec<u8>,
    pub(super) numbers: Vec<Numbers>,
}

/// Of each row of a block, all rounded up but the scale.
#[derive(Debug, Clone)]
pub(super) struct Numbers {
    /// s.
    pub(super) scale: [f32; BLOCK],
    /// `‖w‖ + ‖e‖`, for the larger of the two e.
    pub(super) norm: [f32; BLOCK],
    /// Of the upper bits alone.
    pub(super) coarse: Errors,
    /// Of all eight.
    pub(super) fine: Errors,
}

/// Of each row of a block the error e of its copy.
#[derive(Debug, Clone)]
pub(super) struct Errors {
    /// `‖e‖`.
    pub(super) norm: [f32; BLOCK],
    /// The largest `|e|`.
    pub(super) peak: [f32; BLOCK],
}

impl Numbers {
    /// The errors of all eight bits, or of the upper four alone.
    pub(super) fn of(&self, full: bool) -> &Errors {
        if full { &self.fine } else { &self.coarse }
    }
}

impl NestedHead {
    pub(crate) fn new(rows: DenseRows<'_>, cols: usize, split: Split) -> Self {
        let vocab = rows.len() / cols;
        let (blocks, bytes) = (vocab.div_ceil(BLOCK), BLOCK * Int4Rows::stride(cols));
        let zeros = || Errors { norm: [0.0; BLOCK], peak: [0.0; BLOCK] };
        let zeros =
            Numbers { scale: [0.0; BLOCK], norm: [0.0; BLOCK], coarse: zeros(), fine: zeros() };
        let mut head = Self {
            vocab,
            cols,
            high: vec![0; blocks * bytes],
            low: vec![0; blocks * bytes],
            numbers: vec![zeros; blocks],
        };
        let item = (
            RowsMut(&mut head.high[..], bytes),
            RowsMut(&mut head.low[..], bytes),
            RowsMut(&mut head.numbers[..], 1),
        );
        split.rows(rows.len() * 4, blocks, item, &|first, (high, low, numbers)| {
            let mut row = vec![0.0; cols];
            let mut values = vec![0; 2 * Int4Rows::stride(cols)];
            let blocks = high.iter().zip(low.iter()).zip(numbers.0);
            for (b, ((high, low), numbers)) in (first..).zip(blocks) {
                let stride = Int4Rows::stride(cols);
                let planes = high.chunks_exact_mut(stride).zip(low.chunks_exact_mut(stride));
                for (i, (high, low)) in planes.enumerate().take(vocab - b * BLOCK) {
                    rows.read_row(b * BLOCK + i, &mut row);
                    let of_row = quantize_row(&row, &mut values);
                    of_row.write(numbers, i);
                    pack(&values, high, low);
                }
            }
        });
        head
    }

    /// The upper bits of all rows, of whole blocks.
    pub(super) fn high(&self) -> Int4Rows<'_> {
        Int4Rows { cols: self.cols, bytes: &self.high }
    }

    /// The lower bits.
    pub(super) fn low(&self) -> Int4Rows<'_> {
        Int4Rows { cols: self.cols, bytes: &self.low }
    }
}

/// Divides bytes of 128 columns at a time into planes of 64.
fn pack(values: &[u8], high: &mut [u8], low: &mut [u8]) {
    let planes = high.chunks_exact_mut(64).zip(low.chunks_exact_mut(64));
    for (values, (high, low)) in values.chunks_exact(128).zip(planes) {
        let (a, b) = values.split_at(64);
        for ((high, low), (a, b)) in high.iter_mut().zip(low).zip(a.iter().zip(b)) {
            *high = a >> 4 | b & 0xf0;
            *low = a & 15 | b << 4;
        }
    }
}

/// What [`Numbers`] holds of one row.
struct RowNumbers {
    scale: f32,
    norm: f32,
    /// `‖e‖` and largest `|e|`.
    coarse: [f32; 2],
    fine: [f32; 2],
}

impl RowNumbers {
    fn write(&self, to: &mut Numbers, i: usize) {
        (to.scale[i], to.norm[i]) = (self.scale, self.norm);
        [to.coarse.norm[i], to.coarse.peak[i]] = self.coarse;
        [to.fine.norm[i], to.fine.peak[i]] = self.fine;
    }
}

/// Fills a row of bytes.
fn quantize_row(row: &[f32], values: &mut [u8]) -> RowNumbers {
    let finite = row.iter().fold(true, |all, x| all & x.is_finite());
    let absmax = absmax(row);
    if absmax == 0.0 && finite {
        return RowNumbers { scale: 0.0, norm: 0.0, coarse: [0.0; 2], fine: [0.0; 2] };
    }
    let scale = clip(row, absmax) / 127.5;
    let inv = 1.0 / scale;
    if !finite || scale < f32::MIN_POSITIVE || inv < f32::MIN_POSITIVE {
        // No bound; and none at the ends of the numbers, where s may be far off.
        let (norm, errors) = (f32::INFINITY, [f32::INFINITY; 2]);
        return RowNumbers { scale: 0.0, norm, coarse: errors, fine: errors };
    }
    // In units of s, so that nothing is too small to be squared.
    let mut lanes = Lanes::default();
    let (chunks, rest) = row.as_chunks::<LANES>();
    let (values, last) = values.split_at_mut(chunks.len() * LANES);
    for (values, chunk) in values.as_chunks_mut::<LANES>().0.iter_mut().zip(chunks) {
        for (i, (value, w)) in values.iter_mut().zip(chunk).enumerate() {
            *value = lanes.add(i, w * inv);
        }
    }
    for (i, (value, w)) in last.iter_mut().zip(rest).enumerate() {
        *value = lanes.add(i, w * inv);
    }
    let s = f64::from(scale);
    // A lane's sum passes so many roundings, and twice as many for room to spare.
    let gamma = (row.len() / LANES + 8) as f64 / f64::from(1u32 << 23);
    let norm = |squares: [f32; LANES]| {
        (squares.iter().map(|&x| f64::from(x)).sum::<f64>() * (1.0 + gamma)).sqrt()
    };
    let size = norm(lanes.square);
    // `w / s` passes two roundings, and its difference from the copy one more.
    let off = size * SLACK;
    let [coarse, fine] = [&lanes.coarse, &lanes.fine].map(|e| {
        let peak = e.peak.iter().fold(0.0f32, |m, &x| if x > m { x } else { m });
        (norm(e.square) + off, f64::from(peak) + 255.0 * SLACK)
    });
    let rounded = |(norm, peak)| [round_up(norm * s), round_up(peak * s)];
    let norm = round_up((size + off + coarse.0.max(fine.0)) * s);
    RowNumbers { scale, norm, coarse: rounded(coarse), fine: rounded(fine) }
}

/// The largest magnitude; a NaN does not count.
fn absmax(row: &[f32]) -> f32 {
    let larger = |m: f32, x: f32| if x.abs() > m { x.abs() } else { m };
    let mut lanes = [0.0f32; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, x);
        }
    }
    lanes.iter().chain(rest).fold(0.0, |m, &x| larger(m, x))
}

/// Sums side by side, for the compiler to make vectors of.
const LANES: usize = 16;

/// What is summed of a row in units of s.
#[derive(Default)]
struct Lanes {
    square: [f32; LANES],
    coarse: ErrorLanes,
    fine: ErrorLanes,
}

#[derive(Default)]
struct ErrorLanes {
    square: [f32; LANES],
    peak: [f32; LANES],
}

impl Lanes {
    /// Adds an element; returns its byte.
    #[inline(always)]
    fn add(&mut self, lane: usize, x: f32) -> u8 {
        // At 2^23 the last bit counts ones: the addition rounds to the nearest.
        const ONES: f32 = (1 << 23) as f32;
        let at_ones = x.clamp(-127.5, 127.5) + 127.5 + ONES;
        let value = at_ones.to_bits() & 0xff;
        self.square[lane] += x * x;
        self.fine.add(lane, x - (at_ones - ONES - 127.5));
        self.coarse.add(lane, x - ((value & 0xf0) as i32 - 120) as f32);
        value as u8
    }
}

impl ErrorLanes {
    #[inline(always)]
    fn add(&mut self, lane: usize, e: f32) {
        self.square[lane] += e * e;
        let (size, peak) = (e.abs(), self.peak[lane]);
        self.peak[lane] = if size > peak { size } else { peak };
    }
}

/// The largest magnitude that a row's bytes reach. Less than its absmax makes
/// steps smaller and cuts off what lies beyond: of some, the one that makes
/// `‖e‖²` of the coarse copy smallest, and four times that of the fine one.
fn clip(row: &[f32], absmax: f32) -> f32 {
    const SHARES: [f32; 6] = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5];
    const LANES: usize = 8;
    let clips = SHARES.map(|share| share * absmax);
    let mut beyond = [[0.0f32; LANES]; SHARES.len()];
    let (chunks, rest) = row.as_chunks::<LANES>();
    let mut last = [0.0; LANES];
    last[..rest.len()].copy_from_slice(rest);
    for chunk in chunks.iter().chain([&last]) {
        for (beyond, clip) in beyond.iter_mut().zip(clips) {
            for (sum, x) in beyond.iter_mut().zip(chunk) {
                let over = x.abs() - clip;
                let over = if over > 0.0 { over } else { 0.0 };
                *sum += over * over;
            }
        }
    }
    let mut best = (f32::INFINITY, absmax);
    for (beyond, clip) in beyond.iter().zip(clips) {
        // Steps of 16·s, whose errors are as if spread evenly.
        let step = clip * (16.0 / 127.5);
        let cost = row.len() as f32 * step * step / 12.0 + 5.0 * beyond.iter().sum::<f32>();
        if cost < best.0 {
            best = (cost, clip);
        }
    }
    best.1
}

/// An f32 that is no smaller than a magnitude computed in f64, whose own
/// roundings (2^-53 for each of at most 2^16 terms) it covers too; ∞ for NaN.
pub(super) fn round_up(x: f64) -> f32 {
    if x.is_nan() {
        f32::INFINITY
    } else if x == 0.0 {
        0.0
    } else {
        ((x * (1.0 + SLACK)) as f32).max(f32::MIN_POSITIVE)
    }
}

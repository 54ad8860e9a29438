//! The left operand of a weights' gradient: a block of gradients, rounded to integers and
//! written in the lanes that a set multiplies.

use std::mem::MaybeUninit;

use super::{BLOCK_ROWS, FIXED_DEPTH, STRIP, UNIT, digits_of, round, steps, unsigned};
use crate::float_product::MatRef;
use crate::simd::{Simd, array};

/// Tokens ahead for which gradients are asked.
const AHEAD: usize = 8;

/// Lanes of a row of the left operand, at most: three bytes of every fourth token or two
/// words of every second.
pub(super) const MOST: usize = FIXED_DEPTH;

/// A lane of every row of a strip.
pub(super) type Lanes = [u32; STRIP];

/// The left operand of a block, on the stack.
#[repr(align(64))]
pub(super) struct Block {
    /// In strips of [`STRIP`] rows, `[groups, parts]` each.
    pub(super) lanes: [MaybeUninit<Lanes>; BLOCK_ROWS / STRIP * MOST],
    /// Of every row the step, and the sums of its two low digits and of the third.
    pub(super) steps: [f32; BLOCK_ROWS],
    pub(super) sums: [[i32; 2]; BLOCK_ROWS],
}

/// Rounds the gradients of a block, times the scales of the tokens from `first` on.
#[inline(always)]
pub(super) fn split<S: Simd, const D: usize, const G: usize>(
    isa: S,
    g: MatRef<'_>,
    first: usize,
    scales: &[f32],
    block: &mut Block,
) {
    let rows = g.rows();
    let mut absmax = [0u32; BLOCK_ROWS];
    for (t, &scale) in scales.iter().enumerate() {
        // Tokens lie pages apart, which no prefetcher of the machine follows.
        g.prefetch(isa, first + t + AHEAD, rows);
        for (max, x) in absmax.iter_mut().zip(g.stored(first + t, 0, rows)) {
            *max = (*max).max((x * scale).abs().to_bits());
        }
    }
    let length = scales.len().div_ceil(G) * D;
    for col in (0..rows).step_by(UNIT) {
        let own = UNIT.min(rows - col);
        let mut inv = [0.0f32; UNIT];
        for i in 0..own {
            (inv[i], block.steps[col + i]) = steps(digits_of(D, G), absmax[col + i]);
        }
        let mut sums = Sums { all: [0; UNIT], high: [0; UNIT] };
        for (group, scales) in scales.chunks(G).enumerate() {
            // A group's last tokens and a unit's last columns may not be there.
            let mut x = [[0.0f32; UNIT]; G];
            for (j, (x, &scale)) in x.iter_mut().zip(scales).enumerate() {
                let from = g.stored(first + G * group + j, col, own);
                match from.as_array::<UNIT>() {
                    Some(from) => *x = array!(UNIT, i => from[i] * scale),
                    None => x.iter_mut().zip(from).for_each(|(x, from)| *x = from * scale),
                }
            }
            let parts: [[u32; UNIT]; D] =
                if G == 4 { bytes::<D, G>(&x, &inv, &mut sums) } else { words::<D, G>(&x, &inv) };
            for (d, part) in parts.iter().enumerate() {
                for (s, lanes) in part.as_chunks::<STRIP>().0.iter().enumerate() {
                    // Of rows behind the last, only those of its own strip.
                    if s * STRIP < own {
                        let strip = (col / STRIP + s) * length;
                        block.lanes[strip + group * D + d].write(*lanes);
                    }
                }
            }
        }
        let count = (scales.len().div_ceil(G) * G) as i32;
        for i in 0..own {
            block.sums[col + i] = sums.of::<D>(i, count);
        }
    }
}

/// The same for gradients that lie row by row: their digits are lanes as they stand.
#[inline(always)]
pub(super) fn split_rows<const D: usize, const G: usize>(
    g: MatRef<'_>,
    first: usize,
    scales: &[f32],
    block: &mut Block,
) {
    let depth = scales.len();
    let groups = depth.div_ceil(G);
    let strips = block.lanes.chunks_exact_mut(groups * D);
    for (strip, top) in strips.zip((0..g.rows()).step_by(STRIP)) {
        let rows = STRIP.min(g.rows() - top);
        let own = array!(STRIP, r => g.stored(top + r.min(rows - 1), first, depth));
        let mut inv = [0.0f32; STRIP];
        for (r, inv) in inv.iter_mut().enumerate().take(rows) {
            let mut absmax = 0u32;
            for (x, scale) in own[r].iter().zip(scales) {
                absmax = absmax.max((x * scale).abs().to_bits());
            }
            (*inv, block.steps[top + r]) = steps(digits_of(D, G), absmax);
        }
        let mut sums = [const { Sums { all: [0; UNIT], high: [0; UNIT] } }; STRIP];
        // Lanes of a vector, of which the last may not all be there.
        for at in (0..groups).step_by(UNIT) {
            let terms = at * G..depth.min((at + UNIT) * G);
            let scales = &scales[terms.clone()];
            let mut parts = [[[0u32; UNIT]; D]; STRIP];
            for (r, parts) in parts.iter_mut().enumerate() {
                let mut x = [0.0f32; UNIT * MOST_GROUP];
                for (x, (from, scale)) in x.iter_mut().zip(own[r][terms.clone()].iter().zip(scales))
                {
                    *x = from * scale;
                }
                *parts = row_lanes::<D, G>(&x, inv[r], &mut sums[r]);
            }
            let to = strip[at * D..groups.min(at + UNIT) * D].chunks_exact_mut(D);
            for (i, to) in to.enumerate() {
                for (d, to) in to.iter_mut().enumerate() {
                    to.write(array!(STRIP, r => parts[r][d][i]));
                }
            }
        }
        let count = (groups.div_ceil(UNIT) * G) as i32;
        for (to, sums) in block.sums[top..top + rows].iter_mut().zip(&sums) {
            let lanes = array!(UNIT, i => sums.of::<D>(i, count));
            let total = |part: usize| lanes.iter().fold(0i32, |sum, s| sum.wrapping_add(s[part]));
            *to = [total(0), total(1)];
        }
    }
}

/// The most tokens of a lane.
const MOST_GROUP: usize = 4;

/// The parts of sixteen lanes of one row, `G` neighbours each.
#[inline(always)]
fn row_lanes<const D: usize, const G: usize>(
    x: &[f32; UNIT * MOST_GROUP],
    inv: f32,
    sums: &mut Sums,
) -> [[u32; UNIT]; D] {
    let mut v = [0i32; UNIT * MOST_GROUP];
    for (v, x) in v.iter_mut().zip(x) {
        *v = round(*x, inv);
    }
    let mut lanes = [[0u32; UNIT]; D];
    if G == 4 {
        // Any four of them in one lane.
        for i in 0..UNIT {
            let v = array!(4, j => v[UNIT * j + i] + unsigned(D));
            sums.all[i] = sums.all[i].wrapping_add(v[0] + v[1] + v[2] + v[3]);
            if D == 3 {
                sums.high[i] += (v[0] >> 16) + (v[1] >> 16) + (v[2] >> 16) + (v[3] >> 16);
            }
        }
        for (d, lanes) in lanes.iter_mut().enumerate() {
            let mut bytes = [0u8; UNIT * MOST_GROUP];
            for (byte, v) in bytes.iter_mut().zip(v) {
                *byte = ((v + unsigned(D)) >> (8 * d)) as u8 ^ 0x80;
            }
            for (lane, bytes) in lanes.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *lane = u32::from_le_bytes(*bytes);
            }
        }
        return lanes;
    }
    for i in 0..UNIT {
        lanes = word_lanes(lanes, i, [v[2 * i], v[2 * i + 1]]);
    }
    lanes
}

/// Sums of some rows' integers, their digits made unsigned, and of their third digits.
struct Sums {
    all: [i32; UNIT],
    high: [i32; UNIT],
}

impl Sums {
    /// Those of the two low digits and of the third of `count` integers of row `i`.
    #[inline(always)]
    fn of<const D: usize>(&self, i: usize, count: i32) -> [i32; 2] {
        let all = self.all[i].wrapping_sub(unsigned(D).wrapping_mul(count));
        if D < 3 {
            return [all, 0];
        }
        let third = self.high[i] - 128 * count;
        [all.wrapping_sub(third << 16), third]
    }
}

/// The digits of four tokens side by side, for sixteen rows.
#[inline(always)]
fn bytes<const D: usize, const G: usize>(
    x: &[[f32; UNIT]; G],
    inv: &[f32; UNIT],
    sums: &mut Sums,
) -> [[u32; UNIT]; D] {
    let mut lanes = [[0u32; UNIT]; D];
    for i in 0..UNIT {
        let v = array!(4, j => round(x[j][i], inv[i]) + unsigned(D));
        sums.all[i] = sums.all[i].wrapping_add(v[0] + v[1] + v[2] + v[3]);
        if D == 3 {
            sums.high[i] += (v[0] >> 16) + (v[1] >> 16) + (v[2] >> 16) + (v[3] >> 16);
        }
        for (d, lanes) in lanes.iter_mut().enumerate() {
            let byte = array!(4, j => (v[j] >> (8 * d) & 0xff) << (8 * j));
            lanes[i] = (byte[0] | byte[1] | byte[2] | byte[3]) as u32 ^ 0x8080_8080;
        }
    }
    lanes
}

/// The integers of two tokens side by side, for sixteen rows: as one word of 16 bits, or
/// the low 12 bits, signed, and the rest.
#[inline(always)]
fn words<const D: usize, const G: usize>(
    x: &[[f32; UNIT]; G],
    inv: &[f32; UNIT],
) -> [[u32; UNIT]; D] {
    let mut lanes = [[0u32; UNIT]; D];
    for i in 0..UNIT {
        lanes = word_lanes(lanes, i, array!(2, j => round(x[j][i], inv[i])));
    }
    lanes
}

/// Lane `i` of some: the parts of two integers.
#[inline(always)]
fn word_lanes<const D: usize>(
    mut lanes: [[u32; UNIT]; D],
    i: usize,
    v: [i32; 2],
) -> [[u32; UNIT]; D] {
    if D == 1 {
        lanes[0][i] = (v[0] & 0xffff | v[1] << 16) as u32;
    } else {
        let high = array!(2, j => (v[j] + (1 << 11)) >> 12);
        let low = array!(2, j => v[j] - (high[j] << 12));
        lanes[0][i] = (low[0] & 0xffff | low[1] << 16) as u32;
        lanes[D - 1][i] = (high[0] & 0xffff | high[1] << 16) as u32;
    }
    lanes
}

//! The integer product for few tokens: rows stay packed and are read once, four
//! at a time, so that four sums share each activation vector and one reduction.

use crate::mat::MatMut;
use crate::product::Codec;
use crate::simd::{Simd, array};
use crate::ternary::{TernaryRows, TokensRef};

/// Rows that are read side by side.
const ROWS: usize = 4;

/// How far ahead of the block in use memory is asked for.
const PREFETCH_BYTES: usize = 4096;

/// See [`crate::product::product`].
#[inline(always)]
pub(crate) fn product<S: Simd, C: Codec, O: Copy>(
    isa: S,
    w: TernaryRows<'_>,
    x: TokensRef<'_>,
    mut out: MatMut<'_, O>,
    finish: impl Fn(usize, i32) -> O + Copy,
) {
    let blocks = w.layout.row_bytes(w.cols) / 64;
    let bytes = w.bytes.as_chunks::<64>().0;
    let mut n = 0;
    while n < w.len() {
        // Behind the last row its neighbour is repeated and its sum dropped.
        let rows: [&[[u8; 64]]; ROWS] = array!(ROWS, r => {
            let row = (n + r).min(w.len() - 1);
            &bytes[row * blocks..(row + 1) * blocks]
        });
        let valid = ROWS.min(w.len() - n);
        let mut t = 0;
        while t < x.len() {
            // Up to four tokens at a time; where registers are few, three at most.
            let mut sums = [[0; ROWS]; 4];
            let count = match x.len() - t {
                1 => {
                    sums[0] = dot_one::<S, C>(isa, rows, token::<C>(&x, t, blocks));
                    1
                }
                4.. if S::WIDE => {
                    let acts = array!(4, i => token::<C>(&x, t + i, blocks));
                    sums = dot_block::<S, C, 4>(isa, rows, acts);
                    4
                }
                2 | 4 => {
                    let acts = array!(2, i => token::<C>(&x, t + i, blocks));
                    [sums[0], sums[1]] = dot_block::<S, C, 2>(isa, rows, acts);
                    2
                }
                _ => {
                    let acts = array!(3, i => token::<C>(&x, t + i, blocks));
                    [sums[0], sums[1], sums[2]] = dot_block::<S, C, 3>(isa, rows, acts);
                    3
                }
            };
            for (t, sums) in (t..).zip(&sums[..count]) {
                for (out, &sum) in out.row(t)[n..n + valid].iter_mut().zip(sums) {
                    *out = finish(t, sum);
                }
            }
            t += count;
        }
        n += ROWS;
    }
}

/// The activations of one token that meet `blocks` blocks.
#[inline(always)]
fn token<'a, C: Codec>(x: &TokensRef<'a>, t: usize, blocks: usize) -> &'a [[i8; 64]] {
    &x.token(t).as_chunks::<64>().0[..blocks * C::PLANES]
}

/// Totals of four rows and one token; codes are not unpacked where the instruction
/// set can do without.
#[inline(always)]
fn dot_one<S: Simd, C: Codec>(isa: S, rows: [&[[u8; 64]]; ROWS], acts: &[[i8; 64]]) -> [i32; ROWS] {
    let blocks = rows[0].len();
    let rows = array!(ROWS, r => &rows[r][..blocks]);
    let acts = &acts[..blocks * C::PLANES];
    let mut sums = [isa.sums_zero(); ROWS];
    let mut start = 0;
    while start < blocks {
        let end = blocks.min(start.saturating_add(S::PART_DOTS / C::PLANES));
        let mut quads = [isa.quad_zero(); ROWS];
        for b in start..end {
            let acts = &acts[b * C::PLANES..(b + 1) * C::PLANES];
            for r in 0..ROWS {
                isa.prefetch(rows[r][b].as_ptr().wrapping_add(PREFETCH_BYTES));
                quads[r] = C::add_block(isa, quads[r], isa.load(&rows[r][b]), acts);
            }
        }
        for r in 0..ROWS {
            sums[r] = isa.add_sums(sums[r], isa.quad_sums(quads[r]));
        }
        start = end;
    }
    isa.totals(sums)
}

/// Totals of four rows and `T` tokens; a plane is unpacked once for all tokens.
#[inline(always)]
fn dot_block<S: Simd, C: Codec, const T: usize>(
    isa: S,
    rows: [&[[u8; 64]]; ROWS],
    acts: [&[[i8; 64]]; T],
) -> [[i32; ROWS]; T] {
    let blocks = rows[0].len();
    let rows = array!(ROWS, r => &rows[r][..blocks]);
    let acts = array!(T, t => &acts[t][..blocks * C::PLANES]);
    let mut sums = [[isa.sums_zero(); ROWS]; T];
    let mut start = 0;
    while start < blocks {
        let end = blocks.min(start.saturating_add(S::PART_DOTS / C::PLANES));
        let mut parts = [[isa.part_zero(); ROWS]; T];
        for b in start..end {
            let prepared = array!(ROWS, r => {
                isa.prefetch(rows[r][b].as_ptr().wrapping_add(PREFETCH_BYTES));
                C::prepare(isa, isa.load(&rows[r][b]))
            });
            for p in 0..C::PLANES {
                let q = array!(T, t => isa.load_acts(&acts[t][b * C::PLANES + p]));
                for r in 0..ROWS {
                    let codes = C::plane(isa, prepared[r], p);
                    for t in 0..T {
                        parts[t][r] = isa.dot(parts[t][r], codes, q[t]);
                    }
                }
            }
        }
        for t in 0..T {
            for r in 0..ROWS {
                sums[t][r] = isa.add_sums(sums[t][r], isa.part_sums(parts[t][r]));
            }
        }
        start = end;
    }
    array!(T, t => isa.totals(sums[t]))
}

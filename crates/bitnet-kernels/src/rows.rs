//! The integer product for few tokens: rows stay packed and are read from memory
//! once, four at a time, so that sums share activation vectors and reductions.

use std::mem::MaybeUninit;

use crate::mat::{MatMut, init};
use crate::product::{Codec, PANEL_TOKENS};
use crate::simd::{Simd, array};
use crate::ternary::{TernaryRows, TokensRef};

/// How far ahead of the block in use memory is asked for, in each stream.
const PREFETCH_BYTES: usize = 2048;

/// See [`crate::product::product`].
#[inline(always)]
pub(crate) fn product<S: Simd, C: Codec, O: Copy>(
    isa: S,
    w: TernaryRows<'_>,
    x: TokensRef<'_>,
    out: MatMut<'_, O>,
    finish: impl Fn(usize, i32) -> O + Copy,
) {
    if S::WIDE && x.len() > 4 {
        groups::<S, C, O>(isa, w, x, out, finish);
    } else {
        streams::<S, C, O, 4>(isa, w, x, out, finish, if S::WIDE { 4 } else { 3 });
    }
}

/// Rows whose sums are kept until they are finished together, in vectors.
const CHUNK: usize = 32;

/// `R` rows side by side. They lie an `R`-th of the matrix apart, so that each is
/// a stream of its own that runs through memory without a gap: that is what the
/// prefetchers of processors follow best. At most `most` tokens at a time.
#[inline(always)]
fn streams<S: Simd, C: Codec, O: Copy, const R: usize>(
    isa: S,
    w: TernaryRows<'_>,
    x: TokensRef<'_>,
    mut out: MatMut<'_, O>,
    finish: impl Fn(usize, i32) -> O + Copy,
    most: usize,
) {
    if x.is_empty() {
        return;
    }
    let blocks = w.layout.row_bytes(w.cols) / 64;
    let bytes = w.bytes.as_chunks::<64>().0;
    let apart = w.len().div_ceil(R);
    let acts = array!(PANEL_TOKENS, t => token::<C>(&x, t.min(x.len() - 1), blocks));
    let mut sums = [[[0i32; CHUNK]; R]; PANEL_TOKENS];
    for first in (0..apart).step_by(CHUNK) {
        let count = CHUNK.min(apart - first);
        for i in 0..count {
            // Behind the last row it is repeated and its sum dropped.
            let rows: [&[[u8; 64]]; R] = array!(R, r => {
                let row = (first + i + r * apart).min(w.len() - 1);
                &bytes[row * blocks..(row + 1) * blocks]
            });
            let mut t = 0;
            while t < x.len() {
                macro_rules! tile {
                    ($count:literal) => {{
                        let acts = array!($count, j => acts[t + j]);
                        let tile: [[i32; R]; $count] =
                            dot_block::<S, C, R, $count>(isa, rows, acts);
                        for (sums, tile) in sums[t..t + $count].iter_mut().zip(tile) {
                            for r in 0..R {
                                sums[r][i] = tile[r];
                            }
                        }
                    }};
                }
                // Tiles of nearly one size: 5 and 4 tokens, not 8 and 1.
                let left = x.len() - t;
                let count = left.div_ceil(left.div_ceil(most));
                match count {
                    1 => {
                        let one = dot_one::<S, C, R>(isa, rows, acts[t]);
                        for r in 0..R {
                            sums[t][r][i] = one[r];
                        }
                    }
                    2 => tile!(2),
                    3 => tile!(3),
                    4 if S::WIDE => tile!(4),
                    _ => unreachable!("a tile has at most `most` tokens"),
                }
                t += count;
            }
        }
        for (t, sums) in sums[..x.len()].iter().enumerate() {
            write(out.row(t), sums, first, count, apart, |sum| finish(t, sum));
        }
    }
}

/// Five tokens or more, in groups of nearly one size: at most 24 sums in registers.
#[inline(always)]
fn groups<S: Simd, C: Codec, O: Copy>(
    isa: S,
    w: TernaryRows<'_>,
    x: TokensRef<'_>,
    mut out: MatMut<'_, O>,
    finish: impl Fn(usize, i32) -> O + Copy,
) {
    let mut t = 0;
    while t < x.len() {
        let left = x.len() - t;
        let count = left.div_ceil(left.div_ceil(8));
        macro_rules! group {
            ($tokens:literal, $rows:literal) => {
                group::<S, C, O, $rows, $tokens>(isa, w, x, t, out.reborrow(), finish)
            };
        }
        match count {
            4 => group!(4, 4),
            5 => group!(5, 4),
            6 => group!(6, 4),
            7 => group!(7, 3),
            8 => group!(8, 3),
            _ => unreachable!("five tokens or more make groups of four to eight"),
        }
        t += count;
    }
}

/// Vectors of activations that are copied together: 26 KiB, which the first-level cache
/// holds.
const ACTS: usize = 416;

/// `T` tokens from `t` on and `R` rows side by side, each a stream as in [`streams`].
///
/// So many tokens of thousands of columns do not fit the first-level cache: a part of
/// the columns is taken at a time. What a block of codes meets is copied to one place,
/// in the order in which it is read.
#[inline(always)]
fn group<S: Simd, C: Codec, O: Copy, const R: usize, const T: usize>(
    isa: S,
    w: TernaryRows<'_>,
    x: TokensRef<'_>,
    t: usize,
    mut out: MatMut<'_, O>,
    finish: impl Fn(usize, i32) -> O + Copy,
) {
    let blocks = w.layout.row_bytes(w.cols) / 64;
    let bytes = w.bytes.as_chunks::<64>().0;
    let apart = w.len().div_ceil(R);
    let tokens = array!(T, j => token::<C>(&x, t + j, blocks));
    // Parts of nearly one size.
    let most = (ACTS / (T * C::PLANES)).min(S::PART_DOTS / C::PLANES);
    let part = blocks.div_ceil(blocks.div_ceil(most).max(1));
    // Whole rows, two at least, behind the one in use.
    let ahead = (PREFETCH_BYTES / (64 * blocks.max(1))).max(2) * blocks;
    let mut acts = [const { MaybeUninit::<[i8; 64]>::uninit() }; ACTS];
    let mut sums = [[[0i32; CHUNK]; R]; T];
    for first in (0..apart).step_by(CHUNK) {
        let count = CHUNK.min(apart - first);
        for start in (0..blocks).step_by(part.max(1)) {
            let end = blocks.min(start + part);
            let planes = start * C::PLANES..end * C::PLANES;
            let acts = &mut acts[..planes.len() * T];
            if first == 0 || part < blocks {
                for (acts, plane) in acts.chunks_exact_mut(T).zip(planes) {
                    for (act, token) in acts.iter_mut().zip(tokens) {
                        act.write(token[plane]);
                    }
                }
            }
            // SAFETY: they have been written here, or, where there is one part, for the
            // first chunk.
            let acts = unsafe { init(acts) };
            for i in 0..count {
                // Behind the last row it is repeated and its sum dropped.
                let rows: [&[[u8; 64]]; R] = array!(R, r => {
                    let row = (first + i + r * apart).min(w.len() - 1);
                    std::hint::black_box(&bytes[row * blocks + start..row * blocks + end])
                });
                let tile = dot_part::<S, C, R, T>(isa, rows, acts, ahead);
                for (sums, tile) in sums.iter_mut().zip(tile) {
                    for r in 0..R {
                        let sum = &mut sums[r][i];
                        *sum = if start == 0 { tile[r] } else { *sum + tile[r] };
                    }
                }
            }
        }
        for (t, sums) in (t..).zip(&sums) {
            write(out.row(t), sums, first, count, apart, |sum| finish(t, sum));
        }
    }
}

/// Writes results of `count` rows of each stream from `first` on.
#[inline(always)]
fn write<O: Copy, const R: usize>(
    out: &mut [O],
    sums: &[[i32; CHUNK]; R],
    first: usize,
    count: usize,
    apart: usize,
    finish: impl Fn(i32) -> O,
) {
    for (r, sums) in sums.iter().enumerate() {
        let start = (first + r * apart).min(out.len());
        let end = (start + count).min(out.len());
        for (out, &sum) in out[start..end].iter_mut().zip(sums) {
            *out = finish(sum);
        }
    }
}

/// Totals of a part of `R` rows and the activations it meets, `[blocks, planes, T]`; a
/// plane is unpacked once for all tokens. Asks for the blocks `ahead` of those in use.
#[inline(always)]
fn dot_part<S: Simd, C: Codec, const R: usize, const T: usize>(
    isa: S,
    rows: [&[[u8; 64]]; R],
    acts: &[[i8; 64]],
    ahead: usize,
) -> [[i32; R]; T] {
    let blocks = rows[0].len();
    let rows = array!(R, r => &rows[r][..blocks]);
    let mut parts = [[isa.part_zero(); R]; T];
    for (b, acts) in acts.chunks_exact(C::PLANES * T).enumerate().take(blocks) {
        let prepared = array!(R, r => {
            isa.prefetch(rows[r].as_ptr().wrapping_add(b + ahead).cast());
            C::prepare(isa, isa.load(&rows[r][b]))
        });
        for p in 0..C::PLANES {
            let codes = array!(R, r => C::plane(isa, prepared[r], p));
            for t in 0..T {
                let q = isa.load_acts(&acts[p * T + t]);
                for r in 0..R {
                    parts[t][r] = isa.dot(parts[t][r], codes[r], q);
                }
            }
        }
    }
    totals(isa, array!(T, t => array!(R, r => isa.part_sums(parts[t][r]))))
}

/// The activations of one token that meet `blocks` blocks.
#[inline(always)]
fn token<'a, C: Codec>(x: &TokensRef<'a>, t: usize, blocks: usize) -> &'a [[i8; 64]] {
    &x.token(t).as_chunks::<64>().0[..blocks * C::PLANES]
}

/// Totals of `R` rows and one token; codes are not unpacked where the instruction
/// set can do without.
#[inline(always)]
fn dot_one<S: Simd, C: Codec, const R: usize>(
    isa: S,
    rows: [&[[u8; 64]]; R],
    acts: &[[i8; 64]],
) -> [i32; R] {
    let blocks = rows[0].len();
    let rows = array!(R, r => &rows[r][..blocks]);
    let acts = &acts[..blocks * C::PLANES];
    let mut sums = [isa.sums_zero(); R];
    let mut start = 0;
    while start < blocks {
        let end = blocks.min(start.saturating_add(S::PART_DOTS / C::PLANES));
        let mut quads = [isa.quad_zero(); R];
        for b in start..end {
            let acts = &acts[b * C::PLANES..(b + 1) * C::PLANES];
            for r in 0..R {
                isa.prefetch(rows[r][b].as_ptr().wrapping_add(PREFETCH_BYTES));
                quads[r] = C::add_block(isa, quads[r], isa.load(&rows[r][b]), acts);
            }
        }
        for r in 0..R {
            sums[r] = isa.add_sums(sums[r], isa.quad_sums(quads[r]));
        }
        start = end;
    }
    totals(isa, [sums])[0]
}

/// Totals of `R` rows and `T` tokens; a plane is unpacked once for all tokens.
#[inline(always)]
fn dot_block<S: Simd, C: Codec, const R: usize, const T: usize>(
    isa: S,
    rows: [&[[u8; 64]]; R],
    acts: [&[[i8; 64]]; T],
) -> [[i32; R]; T] {
    let blocks = rows[0].len();
    let rows = array!(R, r => &rows[r][..blocks]);
    let acts = array!(T, t => &acts[t][..blocks * C::PLANES]);
    let mut sums = [[isa.sums_zero(); R]; T];
    let mut start = 0;
    while start < blocks {
        let end = blocks.min(start.saturating_add(S::PART_DOTS / C::PLANES));
        let mut parts = [[isa.part_zero(); R]; T];
        for b in start..end {
            let prepared = array!(R, r => {
                isa.prefetch(rows[r][b].as_ptr().wrapping_add(PREFETCH_BYTES));
                C::prepare(isa, isa.load(&rows[r][b]))
            });
            for p in 0..C::PLANES {
                let codes = array!(R, r => C::plane(isa, prepared[r], p));
                for t in 0..T {
                    let q = isa.load_acts(&acts[t][b * C::PLANES + p]);
                    for r in 0..R {
                        parts[t][r] = isa.dot(parts[t][r], codes[r], q);
                    }
                }
            }
        }
        for t in 0..T {
            for r in 0..R {
                sums[t][r] = isa.add_sums(sums[t][r], isa.part_sums(parts[t][r]));
            }
        }
        start = end;
    }
    totals(isa, sums)
}

/// The total of each vector, four at a time.
#[inline(always)]
fn totals<S: Simd, const R: usize, const T: usize>(
    isa: S,
    sums: [[S::Sums; R]; T],
) -> [[i32; R]; T] {
    let mut out = [[0; R]; T];
    for i in (0..R * T).step_by(4) {
        // Behind the last vector it is repeated and its total dropped.
        let four = array!(4, j => {
            let at = (i + j).min(R * T - 1);
            sums[at / R][at % R]
        });
        for (j, total) in isa.totals(four).into_iter().enumerate().take(R * T - i) {
            out[(i + j) / R][(i + j) % R] = total;
        }
    }
    out
}

//! The integer product for many tokens: a panel of rows is unpacked once into a
//! buffer of bytes that the cache holds, then multiplied in tiles whose sums stay
//! in registers.
//!
//! A lane is a row: a vector of the panel holds four neighbouring codes of each
//! of sixteen rows, a vector of activations four of one token sixteen times over.
//! So no sum is ever reduced across lanes, and a result is sixteen neighbours of
//! an output row. Where one instruction multiplies two rows by two tokens, two vectors of
//! the panel are interleaved: eight neighbouring codes of a row side by side.

use std::mem::MaybeUninit;

use crate::mat::{MatMut, init};
use crate::product::Codec;
use crate::simd::{Simd, array};
use crate::ternary::{TernaryRows, TokensRef};

/// Rows in a vector of the panel.
const UNIT: usize = 16;

/// Vectors of the panel: 30 KiB, which a first-level cache holds beside the
/// activations of a tile. Two blocks of a tile's rows in either layout.
const PANEL_VECTORS: usize = 480;

/// Most tokens for which a panel is unpacked once.
const TOKENS: usize = 256;

/// Units in the largest tile.
const MAX_UNITS: usize = 3;

/// The scratch of a product, on the stack.
#[repr(align(64))]
struct Scratch {
    panel: [MaybeUninit<[u8; 64]>; PANEL_VECTORS],
    sums: [MaybeUninit<[i32; 16]>; TOKENS * MAX_UNITS],
}

/// See [`crate::product::product`]; a row of the output is made from the sums of `D`
/// neighbouring tokens.
#[inline(always)]
pub(crate) fn product<S: Simd, C: Codec, O: Copy, const D: usize, F: Fn([i32; D]) -> O>(
    isa: S,
    w: TernaryRows<'_>,
    x: TokensRef<'_>,
    mut out: MatMut<'_, O>,
    finish: impl Fn(usize) -> F,
) {
    let mut scratch = Scratch {
        panel: [const { MaybeUninit::uninit() }; PANEL_VECTORS],
        sums: [const { MaybeUninit::uninit() }; TOKENS * MAX_UNITS],
    };
    // Blocks of nearly one size, whole tiles of tokens each, and whole rows of the output.
    let most = TOKENS / (8 * D) * (8 * D);
    let at_once = x.len().div_ceil(x.len().div_ceil(most)).next_multiple_of(8 * D);
    for first_token in (0..x.len()).step_by(at_once) {
        let tokens = first_token..x.len().min(first_token + at_once);
        let mut n = 0;
        while n < w.len() {
            // Two and two units, not three and one.
            let left = w.len() - n;
            let units = match left {
                _ if !S::WIDE => 1,
                64..80 => 2,
                48.. => 3,
                32.. => 2,
                _ => 1,
            };
            let rows = left.min(UNIT * units);
            let part = w.rows(n, n + rows);
            let part_x = x.tokens(tokens.start, tokens.end);
            // What will be written lies apart, a row of the output for each token.
            let mut ahead = |t: usize| {
                if t.is_multiple_of(D) {
                    for line in out.row((tokens.start + t) / D)[n..n + rows].chunks(16) {
                        isa.prefetch(line.as_ptr().cast());
                    }
                }
            };
            match units {
                1 => panel_sums::<S, C, 1>(isa, part, part_x, &mut scratch, &mut ahead),
                2 if S::WIDE => panel_sums::<S, C, 2>(isa, part, part_x, &mut scratch, &mut ahead),
                3 if S::WIDE => panel_sums::<S, C, 3>(isa, part, part_x, &mut scratch, &mut ahead),
                _ => unreachable!("at most {MAX_UNITS} units"),
            }
            for t in tokens.clone().step_by(D) {
                let sums: [&[i32]; D] = array!(D, d => {
                    let at = (t + d - tokens.start) * units;
                    // SAFETY: `panel_sums` has written the sums of every token.
                    &unsafe { init(&scratch.sums[at..at + units]) }.as_flattened()[..rows]
                });
                let finish = finish(t / D);
                // Whole vectors: a loop of any length is one of scalars for its last ones.
                let (vectors, rest) = out.row(t / D)[n..n + rows].as_chunks_mut::<UNIT>();
                let done = vectors.len() * UNIT;
                for (v, out) in vectors.iter_mut().enumerate() {
                    let lanes = array!(D, d => sums[d].as_chunks::<UNIT>().0[v]);
                    *out = array!(UNIT, i => finish(array!(D, d => lanes[d][i])));
                }
                for (i, out) in rest.iter_mut().enumerate() {
                    *out = finish(array!(D, d => sums[d][done + i]));
                }
            }
            n += rows;
        }
    }
}

/// Sums of at most `16 · U` rows and some tokens, `[tokens, U]` vectors; `ahead` is told
/// of each token before its sums are complete.
#[inline(always)]
fn panel_sums<S: Simd, C: Codec, const U: usize>(
    isa: S,
    w: TernaryRows<'_>,
    x: TokensRef<'_>,
    scratch: &mut Scratch,
    ahead: &mut impl FnMut(usize),
) {
    let blocks = w.layout.row_bytes(w.cols) / 64;
    // A block of a unit becomes 16 vectors a plane.
    let chunk = PANEL_VECTORS / (UNIT * C::PLANES * U);
    // Groups of four columns; what only fills the last block is left out.
    let groups = w.cols.div_ceil(4).next_multiple_of(2);
    for start in (0..blocks).step_by(chunk) {
        let range = start..blocks.min(start + chunk);
        let mut later = Later::new(w, if range.end == blocks { 0 } else { range.end }, chunk);
        if range.end == blocks {
            // Behind these rows lie those of the next call.
            later.first = later.first.wrapping_add(w.len() * blocks);
        }
        let steps = range.len() * C::PLANES * UNIT;
        let panel = &mut scratch.panel[..steps * U];
        unpack::<S, C, U>(isa, w, range.clone(), panel);
        // SAFETY: `unpack` has written every vector of the slice.
        let panel = unsafe { init(panel) };
        let first = start * C::PLANES * UNIT;
        let panel = &panel[..steps.min(groups - first) * U];
        let mut t = 0;
        while t < x.len() {
            let left = (x.len() - t).min(S::TILE_TOKENS);
            let sums = &mut scratch.sums[t * U..(t + left) * U];
            let acts = Acts { x, t, step: first };
            if range.end == blocks {
                (t..t + left).for_each(&mut *ahead);
            }
            later.ask(isa, left, x.len());
            match left {
                8.. => tile_of::<S, U, 8, 4>(isa, panel, acts, start == 0, sums),
                6 | 7 if S::TILE_TOKENS >= 6 => {
                    tile_of::<S, U, 6, 3>(isa, panel, acts, start == 0, sums);
                }
                4.. => tile_of::<S, U, 4, 2>(isa, panel, acts, start == 0, sums),
                2 | 3 => tile_of::<S, U, 2, 1>(isa, panel, acts, start == 0, sums),
                _ => tile_of::<S, U, 1, 1>(isa, panel, acts, start == 0, sums),
            }
            t += match left {
                8.. => 8,
                6 | 7 if S::TILE_TOKENS >= 6 => 6,
                4.. => 4,
                2 | 3 => 2,
                _ => 1,
            };
        }
    }
}

/// The packed blocks that will be unpacked next. Memory is asked for them little by
/// little while the tokens pass: rows lie apart, which no prefetcher foresees.
struct Later {
    /// The first row's.
    first: *const [u8; 64],
    /// Blocks from one row to the next.
    row_blocks: usize,
    /// Blocks of a row, and how many rows there are.
    blocks: usize,
    rows: usize,
    /// Tokens that have passed.
    passed: usize,
}

impl Later {
    /// Blocks from `start` on, at most `most` of each row.
    #[inline(always)]
    fn new(w: TernaryRows<'_>, start: usize, most: usize) -> Self {
        let row_blocks = w.layout.row_bytes(w.cols) / 64;
        let first = w.bytes.as_ptr().cast::<[u8; 64]>().wrapping_add(start);
        Self { first, row_blocks, blocks: most.min(row_blocks - start), rows: w.len(), passed: 0 }
    }

    /// Asks for the share of `tokens` tokens of `all`.
    #[inline(always)]
    fn ask<S: Simd>(&mut self, isa: S, tokens: usize, all: usize) {
        let rows = |passed: usize| (self.rows * passed).div_ceil(all);
        for row in rows(self.passed)..rows(self.passed + tokens) {
            let row = self.first.wrapping_add(row * self.row_blocks);
            for block in 0..self.blocks {
                isa.prefetch(row.wrapping_add(block).cast());
            }
        }
        self.passed += tokens;
    }
}

/// Unpacks blocks `range` of every row into `panel`, `[blocks, planes, 16, U]`.
#[inline(always)]
fn unpack<S: Simd, C: Codec, const U: usize>(
    isa: S,
    w: TernaryRows<'_>,
    range: std::ops::Range<usize>,
    panel: &mut [MaybeUninit<[u8; 64]>],
) {
    let row_blocks = w.layout.row_bytes(w.cols) / 64;
    let bytes = w.bytes.as_chunks::<64>().0;
    for (block, panel) in range.zip(panel.chunks_exact_mut(C::PLANES * UNIT * U)) {
        for u in 0..U {
            // Behind the last row its neighbour is repeated and its sums dropped.
            let rows: [&[u8; 64]; UNIT] = array!(UNIT, r => {
                &bytes[(u * UNIT + r).min(w.len() - 1) * row_blocks + block]
            });
            let words = isa.transpose_words(rows);
            for (i, pair) in words.as_chunks::<2>().0.iter().enumerate() {
                let prepared = array!(2, j => C::prepare(isa, isa.load(&pair[j])));
                for p in 0..C::PLANES {
                    let codes = array!(2, j => C::plane(isa, prepared[j], p));
                    let codes = if S::PAIRS { isa.interleave_words(codes) } else { codes };
                    for j in 0..2 {
                        panel[(p * UNIT + 2 * i + j) * U + u].write(isa.bytes(codes[j]));
                    }
                }
            }
        }
    }
}

/// The activations of a tile: some tokens from `t` on, from group `step` of four.
#[derive(Clone, Copy)]
struct Acts<'a> {
    x: TokensRef<'a>,
    t: usize,
    step: usize,
}

/// Adds the products of a panel and `T` tokens, in `P` pairs, to their sums, or writes
/// them.
#[inline(always)]
fn tile_of<S: Simd, const U: usize, const T: usize, const P: usize>(
    isa: S,
    panel: &[[u8; 64]],
    acts: Acts<'_>,
    write: bool,
    sums: &mut [MaybeUninit<[i32; 16]>],
) {
    if S::PAIRS {
        tile_of_pairs::<S, U, T, P>(isa, panel, acts, write, sums);
    } else {
        tile::<S, U, T>(isa, panel, acts, write, sums);
    }
}

/// See [`tile_of`].
#[inline(always)]
fn tile_of_pairs<S: Simd, const U: usize, const T: usize, const P: usize>(
    isa: S,
    panel: &[[u8; 64]],
    acts: Acts<'_>,
    write: bool,
    sums: &mut [MaybeUninit<[i32; 16]>],
) {
    let steps = panel.as_chunks::<U>().0.as_chunks::<2>().0;
    // A last token without another is its own, and one of its sums is dropped.
    let q: [[&[[i8; 8]]; 2]; P] = array!(P, p => array!(2, i => {
        let token = acts.x.token(acts.t + (2 * p + i).min(T - 1));
        &token.as_chunks::<8>().0[acts.step / 2..acts.step / 2 + steps.len()]
    }));
    let mut both = [[[isa.sums_zero(); 2]; U]; P];
    for (k, step) in steps.iter().enumerate() {
        for u in 0..U {
            let codes = array!(2, j => isa.load(&step[j][u]));
            for p in 0..P {
                both[p][u] = isa.dot_pairs(both[p][u], codes, [q[p][0][k], q[p][1][k]]);
            }
        }
    }
    for (t, sums) in sums.chunks_exact_mut(U).take(T).enumerate() {
        for (u, slot) in sums.iter_mut().enumerate() {
            add(isa, slot, isa.pair_sums(both[t / 2][u])[t % 2], write);
        }
    }
}

/// Adds to sums that were written before, or writes them.
#[inline(always)]
fn add<S: Simd>(isa: S, slot: &mut MaybeUninit<[i32; 16]>, mut sum: S::Sums, write: bool) {
    if !write {
        // SAFETY: an earlier part of these rows has written the slot.
        sum = isa.add_sums(sum, isa.load_sums(unsafe { slot.assume_init_ref() }));
    }
    slot.write(isa.sum_lanes(sum));
}

/// See [`tile_of`].
#[inline(always)]
fn tile<S: Simd, const U: usize, const T: usize>(
    isa: S,
    panel: &[[u8; 64]],
    acts: Acts<'_>,
    write: bool,
    sums: &mut [MaybeUninit<[i32; 16]>],
) {
    let steps = panel.len() / U;
    let q: [&[[i8; 4]]; T] = array!(T, t => {
        &acts.x.token(acts.t + t).as_chunks::<4>().0[acts.step..acts.step + steps]
    });
    // Where the tile behind this one will read: a pointer that is only prefetched.
    let ahead = T * acts.x.stride;
    let sums = &mut sums[..T * U];
    let mut write = write;
    let mut start = 0;
    while start < steps {
        let end = steps.min(start.saturating_add(S::PART_DOTS));
        let mut parts = [[isa.part_zero(); U]; T];
        for (k, step) in (start..end).zip(panel[start * U..end * U].as_chunks::<U>().0) {
            let codes: [S::Bytes; U] = array!(U, u => isa.load(&step[u]));
            if k % 16 == 0 {
                for q in q {
                    isa.prefetch(q.as_ptr().wrapping_add(k).cast::<u8>().wrapping_add(ahead));
                }
            }
            for t in 0..T {
                // SAFETY: k < steps, the length of every slice in q.
                let acts = isa.splat_acts(unsafe { *q[t].get_unchecked(k) });
                for u in 0..U {
                    parts[t][u] = isa.dot(parts[t][u], codes[u], acts);
                }
            }
        }
        for t in 0..T {
            for u in 0..U {
                add(isa, &mut sums[t * U + u], isa.part_sums(parts[t][u]), write);
            }
        }
        write = false;
        start = end;
    }
}

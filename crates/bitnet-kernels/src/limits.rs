//! The limits of the machine that products are measured against: how fast bytes
//! are read, and how fast an instruction set multiplies small integers.

use std::hint::black_box;

use crate::isa::{Kernels, dispatch};
use crate::simd::{Simd, array};

/// How far ahead of the vector in use memory is asked for, as the products do.
const PREFETCH_BYTES: usize = 2048;

/// Places that are read side by side, as the products do.
const STREAMS: usize = 4;

/// The most steps of one [`Kernels::int8_peak_probe`]: a step adds at most 8 to a
/// sum of 32 bits.
const MOST_STEPS: usize = 1 << 24;

impl Kernels {
    /// Reads every byte once with the widest loads and does next to nothing with
    /// it. The result depends on every byte and on nothing but the bytes and
    /// their alignment: it is the same for every instruction set.
    #[must_use]
    pub fn read_probe(self, bytes: &[u8]) -> u32 {
        dispatch!(self, isa => read(isa, bytes))
    }

    /// Multiplies and adds small integers in registers, with the instructions of
    /// the products of this set and as many independent sums as its registers
    /// hold, for `steps` rounds (16 million at most). Returns the operations
    /// done, a multiply-add being two.
    #[must_use]
    pub fn int8_peak_probe(self, steps: usize) -> u64 {
        dispatch!(self, isa => int8_peak(isa, steps.min(MOST_STEPS)))
    }
}

impl Kernels {
    /// Multiplies and adds floats in registers, fused, with as many independent
    /// sums as the float product keeps, for `steps` rounds. Returns the operations
    /// done, a multiply-add being two.
    #[must_use]
    pub fn float_peak_probe(self, steps: usize) -> u64 {
        dispatch!(self, isa => float_peak(isa, steps))
    }
}

#[inline(always)]
fn float_peak<S: Simd>(isa: S, steps: usize) -> u64 {
    let sums = if S::WIDE {
        float_rounds::<S, WIDE_SUMS>(isa, steps);
        WIDE_SUMS
    } else {
        float_rounds::<S, NARROW_SUMS>(isa, steps);
        NARROW_SUMS
    };
    (steps * sums * 16 * 2) as u64
}

#[inline(always)]
fn float_rounds<S: Simd, const N: usize>(isa: S, steps: usize) {
    let [a, b] = black_box([0.999f32, 0.001]).map(|x| isa.splat(x));
    let mut sums = array!(N, i => isa.splat(i as f32));
    for _ in 0..steps {
        for sum in &mut sums {
            *sum = isa.fma(b, *sum, a);
        }
    }
    let total = array!(N, i => isa.lane_sum(sums[i]));
    black_box(total);
}

#[inline(always)]
fn read<S: Simd>(isa: S, bytes: &[u8]) -> u32 {
    // SAFETY: any bytes are valid integers.
    let (head, vectors, tail) = unsafe { bytes.align_to::<[i32; 16]>() };
    let mut sums = array!(STREAMS, _i => [isa.sums_zero(); 2]);
    let apart = vectors.len() / STREAMS / 2 * 2;
    let streams = array!(STREAMS, i => vectors[i * apart..(i + 1) * apart].as_chunks::<2>().0);
    for at in 0..apart / 2 {
        for (stream, sums) in streams.iter().zip(&mut sums) {
            for (vector, sum) in stream[at].iter().zip(sums) {
                isa.prefetch(vector.as_ptr().cast::<u8>().wrapping_add(PREFETCH_BYTES));
                *sum = isa.add_sums(*sum, isa.load_sums(vector));
            }
        }
    }
    for vector in &vectors[STREAMS * apart..] {
        sums[0][0] = isa.add_sums(sums[0][0], isa.load_sums(vector));
    }
    let mut total = 0u32;
    for sum in sums.into_iter().flatten() {
        for lane in isa.sum_lanes(sum) {
            total = total.wrapping_add(lane as u32);
        }
    }
    let ends = head.iter().chain(tail);
    ends.fold(total, |total, &byte| total.wrapping_mul(257).wrapping_add(u32::from(byte)))
}

/// Independent sums: what hides the latency of the instruction.
const WIDE_SUMS: usize = 24;
const NARROW_SUMS: usize = 6;

#[inline(always)]
fn int8_peak<S: Simd>(isa: S, steps: usize) -> u64 {
    if S::PAIRS {
        pair_rounds(isa, steps);
        return (steps * PAIRED_SUMS * 4 * 64 * 2) as u64;
    }
    let sums = if S::WIDE {
        rounds::<S, WIDE_SUMS, 3>(isa, steps);
        WIDE_SUMS
    } else {
        rounds::<S, NARROW_SUMS, NARROW_SUMS>(isa, steps);
        NARROW_SUMS
    };
    (steps * sums * 64 * 2) as u64
}

/// `A` different activations, so that a set whose product and addition are two
/// instructions does not compute one product for several sums.
#[inline(always)]
fn rounds<S: Simd, const N: usize, const A: usize>(isa: S, steps: usize) {
    let table: [[u8; 64]; 2] = black_box([[1; 64], [2; 64]]);
    let q: [[i8; 64]; A] = black_box(array!(A, i => [i as i8 % 2; 64]));
    let acts = array!(A, i => isa.load_acts(&q[i]));
    let mut parts = array!(N, _i => isa.part_zero());
    for step in 0..steps {
        // A new vector in each step: no product can be moved out of the loop.
        let codes = isa.load(&table[step % 2]);
        for (i, part) in parts.iter_mut().enumerate() {
            *part = isa.dot(*part, codes, acts[i % A]);
        }
    }
    let mut sums = isa.sums_zero();
    for part in parts {
        sums = isa.add_sums(sums, isa.part_sums(part));
    }
    black_box(isa.sum_lanes(sums));
}

/// Pairs of tokens in [`pair_rounds`].
const PAIRED_SUMS: usize = 3;

/// The same where two rows are multiplied by two tokens at once.
#[inline(always)]
fn pair_rounds<S: Simd>(isa: S, steps: usize) {
    let table: [[[u8; 64]; 2]; 2] = black_box([[[1; 64]; 2], [[2; 64]; 2]]);
    let q: [[[i8; 8]; 2]; PAIRED_SUMS] = black_box([[[1; 8]; 2]; PAIRED_SUMS]);
    let mut both = [[isa.sums_zero(); 2]; PAIRED_SUMS];
    for step in 0..steps {
        let codes = array!(2, i => isa.load(&table[step % 2][i]));
        for (both, q) in both.iter_mut().zip(q) {
            *both = isa.dot_pairs(*both, codes, q);
        }
    }
    let mut sums = isa.sums_zero();
    for both in both {
        for sum in isa.pair_sums(both) {
            sums = isa.add_sums(sums, sum);
        }
    }
    black_box(isa.sum_lanes(sums));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_set_reads_the_same_and_every_byte_counts() {
        let mut bytes: Vec<u8> = (0..2000usize).map(|i| (i * i % 251) as u8).collect();
        for (from, to) in [(0, 0), (0, 1), (3, 70), (1, 700), (0, 2000), (7, 1999)] {
            let expected = Kernels::detect().read_probe(&bytes[from..to]);
            for kernels in Kernels::all() {
                assert_eq!(kernels.read_probe(&bytes[from..to]), expected, "{}", kernels.name());
                for at in (from..to).step_by(13) {
                    bytes[at] ^= 0x80;
                    let changed = kernels.read_probe(&bytes[from..to]);
                    assert_ne!(changed, expected, "{}: byte {at}", kernels.name());
                    bytes[at] ^= 0x80;
                }
            }
        }
    }

    #[test]
    fn the_peak_takes_time_in_proportion_to_its_steps() {
        for kernels in Kernels::all() {
            let sums = if ["avx512vbmi", "avx512vnni"].contains(&kernels.name()) { 24 } else { 6 };
            if !kernels.name().starts_with("neon") {
                assert_eq!(kernels.int8_peak_probe(10), 10 * sums * 128, "{}", kernels.name());
            }
            let seconds = |steps| {
                let once = || {
                    let start = std::time::Instant::now();
                    black_box(kernels.int8_peak_probe(steps));
                    start.elapsed().as_secs_f64()
                };
                (0..5).map(|_| once()).fold(f64::INFINITY, f64::min)
            };
            // Were the loop folded away, both would take as long as a clock's tick.
            let (short, long) = (seconds(500), seconds(50_000));
            assert!(long > 10.0 * short, "{}: {short} and {long}", kernels.name());
        }
    }
}

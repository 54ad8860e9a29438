//! The operations in plain Rust, for every machine (and for Miri).

use bitnet_core::ternary::lane_sum;
use half::{bf16, f16};

use crate::simd::{Simd, array, widen_bf16, widen_f16};

/// Plain Rust.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Portable;

impl Portable {
    /// The name in `BITNET_ISA`.
    pub(crate) const NAME: &'static str = "portable";

    /// Present on every machine.
    pub(crate) fn new() -> Option<Self> {
        Some(Self)
    }
}

impl Simd for Portable {
    type Bytes = [u8; 64];
    type Part = [i32; 16];
    type Sums = [i32; 16];
    type Quad = [i32; 16];
    type Floats = [f32; 16];

    const PART_DOTS: usize = usize::MAX;
    const WIDE: bool = false;
    const TILE_TOKENS: usize = 2;

    #[inline(always)]
    fn vectorize<R>(self, f: impl FnOnce() -> R) -> R {
        f()
    }

    #[inline(always)]
    fn prefetch(self, _at: *const u8) {}

    #[inline(always)]
    fn load(self, bytes: &[u8; 64]) -> [u8; 64] {
        *bytes
    }

    #[inline(always)]
    fn load_acts(self, q: &[i8; 64]) -> [u8; 64] {
        array!(64, i => q[i] as u8)
    }

    #[inline(always)]
    fn splat_acts(self, q: [i8; 4]) -> [u8; 64] {
        array!(64, i => q[i % 4] as u8)
    }

    #[inline(always)]
    fn bytes(self, v: [u8; 64]) -> [u8; 64] {
        v
    }

    #[inline(always)]
    fn plane(self, v: [u8; 64], p: usize) -> [u8; 64] {
        array!(64, i => (v[i] >> (2 * p)) & 3)
    }

    #[inline(always)]
    fn nibbles(self, v: [u8; 64]) -> [[u8; 64]; 2] {
        [array!(64, i => v[i] & 15), array!(64, i => v[i] >> 4)]
    }

    #[inline(always)]
    fn part_zero(self) -> [i32; 16] {
        [0; 16]
    }

    #[inline(always)]
    fn dot(self, mut part: [i32; 16], codes: [u8; 64], acts: [u8; 64]) -> [i32; 16] {
        for (i, sum) in part.iter_mut().enumerate() {
            for j in 4 * i..4 * i + 4 {
                // A code is at most 2, so a product of i16 does not overflow.
                *sum += i32::from(i16::from(codes[j]) * i16::from(acts[j] as i8));
            }
        }
        part
    }

    #[inline(always)]
    fn part_sums(self, part: [i32; 16]) -> [i32; 16] {
        part
    }

    #[inline(always)]
    fn quad_zero(self) -> [i32; 16] {
        [0; 16]
    }

    #[inline(always)]
    fn quad_dot(self, quad: [i32; 16], codes: [u8; 64], acts: [[u8; 64]; 4]) -> [i32; 16] {
        let mut quad = quad;
        for (p, acts) in acts.into_iter().enumerate() {
            quad = self.dot(quad, self.plane(codes, p), acts);
        }
        quad
    }

    #[inline(always)]
    fn quad_dot_one(self, quad: [i32; 16], codes: [u8; 64], acts: [u8; 64]) -> [i32; 16] {
        self.dot(quad, codes, acts)
    }

    #[inline(always)]
    fn quad_sums(self, quad: [i32; 16]) -> [i32; 16] {
        quad
    }

    #[inline(always)]
    fn sums_zero(self) -> [i32; 16] {
        [0; 16]
    }

    #[inline(always)]
    fn add_sums(self, a: [i32; 16], b: [i32; 16]) -> [i32; 16] {
        array!(16, i => i32::wrapping_add(a[i], b[i]))
    }

    #[inline(always)]
    fn load_sums(self, lanes: &[i32; 16]) -> [i32; 16] {
        *lanes
    }

    #[inline(always)]
    fn sum_lanes(self, sums: [i32; 16]) -> [i32; 16] {
        sums
    }

    #[inline(always)]
    fn totals(self, sums: [[i32; 16]; 4]) -> [i32; 4] {
        array!(4, i => sums[i].iter().sum())
    }

    #[inline(always)]
    fn load_f32(self, x: &[f32; 16]) -> [f32; 16] {
        *x
    }

    #[inline(always)]
    fn load_f16(self, x: &[f16; 16]) -> [f32; 16] {
        array!(16, i => widen_f16(x[i]))
    }

    #[inline(always)]
    fn load_bf16(self, x: &[bf16; 16]) -> [f32; 16] {
        array!(16, i => widen_bf16(x[i]))
    }

    #[inline(always)]
    fn load_i8(self, x: &[i8; 16]) -> [f32; 16] {
        array!(16, i => f32::from(x[i]))
    }

    #[inline(always)]
    fn splat(self, x: f32) -> [f32; 16] {
        [x; 16]
    }

    #[inline(always)]
    fn mul_add(self, acc: [f32; 16], a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        array!(16, i => acc[i] + a[i] * b[i])
    }

    #[inline(always)]
    fn fma(self, acc: [f32; 16], a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        array!(16, i => f32::mul_add(a[i], b[i], acc[i]))
    }

    #[inline(always)]
    fn mul(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        array!(16, i => a[i] * b[i])
    }

    #[inline(always)]
    fn larger(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        array!(16, i => if b[i] > a[i] { b[i] } else { a[i] })
    }

    #[inline(always)]
    fn floats(self, v: [f32; 16]) -> [f32; 16] {
        v
    }

    #[inline(always)]
    fn lane_sum(self, v: [f32; 16]) -> f32 {
        lane_sum(v)
    }
}

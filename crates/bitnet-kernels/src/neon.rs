//! NEON, the baseline of AArch64, and its extensions for dot products and for products of
//! 2 × 8 and 8 × 2 bytes: four 128-bit registers a vector.

use std::arch::aarch64::*;

use half::{bf16, f16};

use crate::isa::isa_token;
use crate::simd::{P5_FOUR, P5_PAIR_FOUR, P5_PAIR_LAST, Simd, array, widen_f16};

isa_token! {
    /// NEON: every AArch64 machine.
    Neon = "neon": ["neon"]
}

isa_token! {
    /// NEON with `sdot` (Armv8.2 and later: Neoverse, Apple M1, Cortex-A75).
    NeonDotprod = "neondotprod": ["neon", "dotprod"]
}

isa_token! {
    /// NEON with `smmla` (Armv8.6 and later: Neoverse V1 and N2, Apple M2, Cortex-X2).
    NeonI8mm = "neoni8mm": ["neon", "dotprod", "i8mm"]
}

/// An intrinsic that this file's tokens prove to be present.
macro_rules! op {
    ($isa:ident, $call:expr) => {{
        let _proof: Self = $isa;
        // SAFETY: a value of `Self` exists only where its features, those of this
        // intrinsic among them, were detected; it touches no memory.
        unsafe { $call }
    }};
}

/// What both share: everything but the product.
macro_rules! implement {
    ($token:ident { $($product:tt)* }) => {
        impl Simd for $token {
            type Bytes = [uint8x16_t; 4];
            type Part = [int32x4_t; 4];
            type Sums = [int32x4_t; 4];
            type Quad = [int32x4_t; 4];
            type Floats = [float32x4_t; 4];

            const PART_DOTS: usize = usize::MAX;
            const WIDE: bool = false;
            const BYTE_LOOKUP: bool = true;
            // 16 accumulators, 4 registers of codes and a broadcast: 21 of 32.
            const TILE_TOKENS: usize = 4;

            $($product)*

            #[inline(always)]
            fn vectorize<R>(self, f: impl FnOnce() -> R) -> R {
                self.enter(f)
            }

            #[inline(always)]
            fn prefetch(self, _at: *const u8) {}

            #[inline(always)]
            fn load(self, bytes: &[u8; 64]) -> Self::Bytes {
                let (parts, _) = bytes.as_chunks::<16>();
                // SAFETY: the features are proven by `self`; a part is 16 bytes.
                array!(4, i => unsafe { vld1q_u8(parts[i].as_ptr()) })
            }

            #[inline(always)]
            fn load_acts(self, q: &[i8; 64]) -> Self::Bytes {
                let (parts, _) = q.as_chunks::<16>();
                // SAFETY: the features are proven by `self`; a part is 16 bytes.
                array!(4, i => unsafe { vld1q_u8(parts[i].as_ptr().cast()) })
            }

            #[inline(always)]
            fn splat_acts(self, q: [i8; 4]) -> Self::Bytes {
                let word = u32::from_le_bytes([q[0] as u8, q[1] as u8, q[2] as u8, q[3] as u8]);
                [op!(self, vreinterpretq_u8_u32(vdupq_n_u32(word))); 4]
            }

            #[inline(always)]
            fn bytes(self, v: Self::Bytes) -> [u8; 64] {
                // SAFETY: both are 64 bytes, and any bytes are valid.
                unsafe { std::mem::transmute::<[uint8x16_t; 4], [u8; 64]>(v) }
            }

            #[inline(always)]
            fn plane(self, v: Self::Bytes, p: usize) -> Self::Bytes {
                array!(4, i => {
                    let three = op!(self, vdupq_n_u8(3));
                    match p {
                        0 => op!(self, vandq_u8(v[i], three)),
                        1 => op!(self, vandq_u8(vshrq_n_u8::<2>(v[i]), three)),
                        2 => op!(self, vandq_u8(vshrq_n_u8::<4>(v[i]), three)),
                        _ => op!(self, vshrq_n_u8::<6>(v[i])),
                    }
                })
            }

            #[inline(always)]
            fn nibbles(self, v: Self::Bytes) -> [Self::Bytes; 2] {
                let low = array!(4, i => op!(self, vandq_u8(v[i], vdupq_n_u8(15))));
                [low, array!(4, i => op!(self, vshrq_n_u8::<4>(v[i])))]
            }

            // As signed bytes they are the same, and their products stay below
            // 15 · 128 = 1920, a pair of which fits i16.
            #[inline(always)]
            fn dot_nibbles(
                self,
                sums: Self::Sums,
                w: Self::Bytes,
                acts: Self::Bytes,
            ) -> Self::Sums {
                self.dot(sums, w, acts)
            }

            #[inline(always)]
            fn part_zero(self) -> Self::Part {
                self.sums_zero()
            }

            #[inline(always)]
            fn part_sums(self, part: Self::Part) -> Self::Sums {
                part
            }

            #[inline(always)]
            fn quad_zero(self) -> Self::Quad {
                self.sums_zero()
            }

            #[inline(always)]
            fn quad_dot(
                self,
                quad: Self::Quad,
                codes: Self::Bytes,
                acts: [Self::Bytes; 4],
            ) -> Self::Quad {
                let quad = self.dot(quad, self.plane(codes, 0), acts[0]);
                let quad = self.dot(quad, self.plane(codes, 1), acts[1]);
                let quad = self.dot(quad, self.plane(codes, 2), acts[2]);
                self.dot(quad, self.plane(codes, 3), acts[3])
            }

            #[inline(always)]
            fn quad_dot_one(
                self,
                quad: Self::Quad,
                codes: Self::Bytes,
                acts: Self::Bytes,
            ) -> Self::Quad {
                self.dot(quad, codes, acts)
            }

            #[inline(always)]
            fn quad_sums(self, quad: Self::Quad) -> Self::Sums {
                quad
            }

            #[inline(always)]
            fn sums_zero(self) -> Self::Sums {
                [op!(self, vdupq_n_s32(0)); 4]
            }

            #[inline(always)]
            fn add_sums(self, a: Self::Sums, b: Self::Sums) -> Self::Sums {
                array!(4, i => op!(self, vaddq_s32(a[i], b[i])))
            }

            #[inline(always)]
            fn load_sums(self, lanes: &[i32; 16]) -> Self::Sums {
                let (parts, _) = lanes.as_chunks::<4>();
                // SAFETY: the features are proven by `self`; a part is 16 bytes.
                array!(4, i => unsafe { vld1q_s32(parts[i].as_ptr()) })
            }

            #[inline(always)]
            fn sum_lanes(self, sums: Self::Sums) -> [i32; 16] {
                // SAFETY: both are 64 bytes, and any bytes are valid.
                unsafe { std::mem::transmute::<[int32x4_t; 4], [i32; 16]>(sums) }
            }

            #[inline(always)]
            fn totals(self, sums: [Self::Sums; 4]) -> [i32; 4] {
                array!(4, i => {
                    let [a, b, c, d] = sums[i];
                    op!(self, vaddvq_s32(vaddq_s32(vaddq_s32(a, b), vaddq_s32(c, d))))
                })
            }

            // `tbl` over four registers is a table of 64 entries, and gives 0 for
            // larger indices.
            #[inline(always)]
            fn p5_codes(self, block: Self::Bytes) -> (Self::Bytes, Self::Bytes) {
                let table = |table: &[u8; 64]| {
                    let [a, b, c, d] = self.load(table);
                    uint8x16x4_t(a, b, c, d)
                };
                let tables = [&P5_FOUR, &P5_PAIR_FOUR, &P5_PAIR_LAST];
                let tables = array!(3, i => table(tables[i]));
                let both = array!(4, i => {
                    let low = op!(self, vandq_u8(block[i], vdupq_n_u8(63)));
                    let pairs = op!(self, vcgeq_u8(block[i], vdupq_n_u8(0xc0)));
                    let four = op!(self, vqtbl4q_u8(tables[0], low));
                    let pair_four = op!(self, vqtbl4q_u8(tables[1], low));
                    let pair_last = op!(self, vqtbl4q_u8(tables[2], low));
                    let last = op!(self, vshrq_n_u8::<6>(block[i]));
                    [
                        op!(self, vbslq_u8(pairs, pair_four, four)),
                        op!(self, vbslq_u8(pairs, pair_last, last)),
                    ]
                });
                (array!(4, i => both[i][0]), array!(4, i => both[i][1]))
            }

            #[inline(always)]
            fn load_f32(self, x: &[f32; 16]) -> Self::Floats {
                let (parts, _) = x.as_chunks::<4>();
                // SAFETY: the features are proven by `self`; a part is 16 bytes.
                array!(4, i => unsafe { vld1q_f32(parts[i].as_ptr()) })
            }

            #[inline(always)]
            fn load_f16(self, x: &[f16; 16]) -> Self::Floats {
                self.load_f32(&array!(16, i => widen_f16(x[i])))
            }

            #[inline(always)]
            fn load_bf16(self, x: &[bf16; 16]) -> Self::Floats {
                let (parts, _) = x.as_chunks::<4>();
                array!(4, i => {
                    // SAFETY: the features are proven by `self`; a part is 8 bytes,
                    // and a bf16 is its sixteen bits.
                    let bits = unsafe { vld1_u16(parts[i].as_ptr().cast()) };
                    op!(self, vreinterpretq_f32_u32(vshll_n_u16::<16>(bits)))
                })
            }

            #[inline(always)]
            fn load_i8(self, x: &[i8; 16]) -> Self::Floats {
                // SAFETY: the features are proven by `self`; the array is 16 bytes.
                let ints = unsafe { vld1q_s8(x.as_ptr()) };
                let low = op!(self, vmovl_s8(vget_low_s8(ints)));
                let high = op!(self, vmovl_high_s8(ints));
                [
                    op!(self, vcvtq_f32_s32(vmovl_s16(vget_low_s16(low)))),
                    op!(self, vcvtq_f32_s32(vmovl_high_s16(low))),
                    op!(self, vcvtq_f32_s32(vmovl_s16(vget_low_s16(high)))),
                    op!(self, vcvtq_f32_s32(vmovl_high_s16(high))),
                ]
            }

            #[inline(always)]
            fn splat(self, x: f32) -> Self::Floats {
                [op!(self, vdupq_n_f32(x)); 4]
            }

            #[inline(always)]
            fn mul_add(self, acc: Self::Floats, a: Self::Floats, b: Self::Floats) -> Self::Floats {
                // Not `vmlaq`, which may be fused.
                array!(4, i => op!(self, vaddq_f32(acc[i], vmulq_f32(a[i], b[i]))))
            }

            #[inline(always)]
            fn fma(self, acc: Self::Floats, a: Self::Floats, b: Self::Floats) -> Self::Floats {
                array!(4, i => op!(self, vfmaq_f32(acc[i], a[i], b[i])))
            }

            #[inline(always)]
            fn mul(self, a: Self::Floats, b: Self::Floats) -> Self::Floats {
                array!(4, i => op!(self, vmulq_f32(a[i], b[i])))
            }

            #[inline(always)]
            fn larger(self, a: Self::Floats, b: Self::Floats) -> Self::Floats {
                array!(4, i => op!(self, vbslq_f32(vcgtq_f32(b[i], a[i]), b[i], a[i])))
            }

            #[inline(always)]
            fn floats(self, v: Self::Floats) -> [f32; 16] {
                // SAFETY: both are 64 bytes, and any bytes are valid.
                unsafe { std::mem::transmute::<[float32x4_t; 4], [f32; 16]>(v) }
            }

            #[inline(always)]
            fn lane_sum(self, [a, b, c, d]: Self::Floats) -> f32 {
                let quarter = op!(self, vaddq_f32(vaddq_f32(a, c), vaddq_f32(b, d)));
                let eighth = op!(self, vadd_f32(vget_low_f32(quarter), vget_high_f32(quarter)));
                op!(self, vget_lane_f32::<0>(eighth) + vget_lane_f32::<1>(eighth))
            }
        }
    };
}

implement!(Neon {
    #[inline(always)]
    fn dot(self, part: Self::Part, codes: Self::Bytes, acts: Self::Bytes) -> Self::Part {
        array!(4, i => {
            let codes = op!(self, vreinterpretq_s8_u8(codes[i]));
            let acts = op!(self, vreinterpretq_s8_u8(acts[i]));
            // A product is at most 256, so a pair of them fits i16.
            let low = op!(self, vmull_s8(vget_low_s8(codes), vget_low_s8(acts)));
            let high = op!(self, vmull_high_s8(codes, acts));
            op!(self, vpadalq_s16(part[i], vpaddq_s16(low, high)))
        })
    }

    #[inline(always)]
    fn dot_lanes(self, sums: Self::Sums, a: Self::Bytes, b: Self::Bytes) -> Self::Sums {
        array!(4, i => {
            let a = op!(self, vreinterpretq_s16_u8(a[i]));
            let b = op!(self, vreinterpretq_s16_u8(b[i]));
            let low = op!(self, vmull_s16(vget_low_s16(a), vget_low_s16(b)));
            let high = op!(self, vmull_high_s16(a, b));
            op!(self, vaddq_s32(sums[i], vpaddq_s32(low, high)))
        })
    }
});

/// The product of the sets that have `sdot`.
macro_rules! sdot {
    () => {
        #[inline(always)]
        fn dot(self, mut part: Self::Part, codes: Self::Bytes, acts: Self::Bytes) -> Self::Part {
            for i in 0..4 {
                // SAFETY: `dotprod` is proven by `self`; the instruction touches only
                // these registers. (The intrinsic is not in stable Rust.)
                unsafe {
                    std::arch::asm!(
                        "sdot {sum:v}.4s, {codes:v}.16b, {acts:v}.16b",
                        sum = inout(vreg) part[i],
                        codes = in(vreg) codes[i],
                        acts = in(vreg) acts[i],
                        options(pure, nomem, nostack, preserves_flags),
                    );
                }
            }
            part
        }

        const GROUP: usize = 4;

        // Products of signed bytes, whatever they are.
        #[inline(always)]
        fn dot_lanes(self, sums: Self::Sums, a: Self::Bytes, b: Self::Bytes) -> Self::Sums {
            self.dot(sums, a, b)
        }
    };
}

implement!(NeonDotprod {
    sdot!();
});

implement!(NeonI8mm {
    // A register of the panel's product holds two rows, eight codes each, one of
    // activations two tokens, and one of sums two rows times two tokens.
    const PAIRS: bool = true;

    sdot!();

    #[inline(always)]
    fn interleave_words(self, [a, b]: [Self::Bytes; 2]) -> [Self::Bytes; 2] {
        let words = |v| op!(self, vreinterpretq_u32_u8(v));
        let pairs = array!(4, i => {
            let (a, b) = (words(a[i]), words(b[i]));
            [
                op!(self, vreinterpretq_u8_u32(vzip1q_u32(a, b))),
                op!(self, vreinterpretq_u8_u32(vzip2q_u32(a, b))),
            ]
        });
        array!(2, half => array!(4, i => pairs[2 * half + i / 2][i % 2]))
    }

    #[inline(always)]
    fn dot_pairs(
        self,
        mut sums: [Self::Sums; 2],
        codes: [Self::Bytes; 2],
        acts: [[i8; 8]; 2],
    ) -> [Self::Sums; 2] {
        // SAFETY: the features are proven by `self`; each array is 8 bytes.
        let acts = unsafe { vcombine_s8(vld1_s8(acts[0].as_ptr()), vld1_s8(acts[1].as_ptr())) };
        for i in 0..8 {
            // SAFETY: `i8mm` is proven by `self`; the instruction touches only these
            // registers. (The intrinsic is not in stable Rust.)
            unsafe {
                std::arch::asm!(
                    "smmla {sum:v}.4s, {acts:v}.16b, {codes:v}.16b",
                    sum = inout(vreg) sums[i / 4][i % 4],
                    codes = in(vreg) codes[i / 4][i % 4],
                    acts = in(vreg) acts,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
        }
        sums
    }

    #[inline(always)]
    fn pair_sums(self, sums: [Self::Sums; 2]) -> [Self::Sums; 2] {
        let halves = |v| op!(self, vreinterpretq_s64_s32(v));
        let tokens = array!(4, i => {
            let (a, b) = (sums[i / 2][2 * i % 4], sums[i / 2][2 * i % 4 + 1]);
            let (a, b) = (halves(a), halves(b));
            [
                op!(self, vreinterpretq_s32_s64(vzip1q_s64(a, b))),
                op!(self, vreinterpretq_s32_s64(vzip2q_s64(a, b))),
            ]
        });
        array!(2, t => array!(4, i => tokens[i][t]))
    }
});

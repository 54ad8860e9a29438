//! AVX-512: one register a vector, `vpdpbusd` for the products.

use std::arch::x86_64::*;

use half::{bf16, f16};

use crate::isa::isa_token;
use crate::simd::{P5_FOUR, P5_PAIR_FOUR, P5_PAIR_LAST, P5_PAIR_LAST_HIGH, Simd, array};

isa_token! {
    /// AVX-512 with VNNI (Cascade Lake, Zen 4 and later).
    Avx512Vnni = "avx512vnni": ["avx512f", "avx512bw", "avx512vl", "avx512vnni"]
}

isa_token! {
    /// AVX-512 with VNNI and byte permutes (Ice Lake, Zen 4 and later).
    Avx512Vbmi = "avx512vbmi":
        ["avx512f", "avx512bw", "avx512vl", "avx512vnni", "avx512vbmi"]
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

macro_rules! implement {
    ($token:ident { $($own:tt)* }) => {
        impl Simd for $token {
            type Bytes = __m512i;
            type Part = __m512i;
            type Sums = __m512i;
            // One accumulator a plane: plane p holds 4^p times its sum.
            type Quad = [__m512i; 4];
            type Floats = __m512;

            const PART_DOTS: usize = usize::MAX;
            // 24 accumulators, 3 vectors of codes and a broadcast: 28 of 32.
            const WIDE: bool = true;
            const TILE_TOKENS: usize = 8;
            const GROUP: usize = 4;
            const UNSIGNED_BYTES: bool = true;

            $($own)*

            #[inline(always)]
            fn vectorize<R>(self, f: impl FnOnce() -> R) -> R {
                self.enter(f)
            }

            #[inline(always)]
            fn prefetch(self, at: *const u8) {
                op!(self, _mm_prefetch::<_MM_HINT_T0>(at.cast()));
            }

            #[inline(always)]
            fn load(self, bytes: &[u8; 64]) -> __m512i {
                // SAFETY: the features are proven by `self`; the array is 64 bytes.
                unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
            }

            #[inline(always)]
            fn load_acts(self, q: &[i8; 64]) -> __m512i {
                // SAFETY: the features are proven by `self`; the array is 64 bytes.
                unsafe { _mm512_loadu_si512(q.as_ptr().cast()) }
            }

            #[inline(always)]
            fn splat_acts(self, q: [i8; 4]) -> __m512i {
                let word = i32::from_le_bytes(q.map(|q| q as u8));
                op!(self, _mm512_set1_epi32(word))
            }

            #[inline(always)]
            fn bytes(self, v: __m512i) -> [u8; 64] {
                // SAFETY: both are 64 bytes, and any bytes are valid.
                unsafe { std::mem::transmute::<__m512i, [u8; 64]>(v) }
            }

            #[inline(always)]
            fn plane(self, v: __m512i, p: usize) -> __m512i {
                let shifted = match p {
                    0 => v,
                    1 => op!(self, _mm512_srli_epi16::<2>(v)),
                    2 => op!(self, _mm512_srli_epi16::<4>(v)),
                    _ => op!(self, _mm512_srli_epi16::<6>(v)),
                };
                op!(self, _mm512_and_si512(shifted, _mm512_set1_epi8(3)))
            }

            #[inline(always)]
            fn nibbles(self, v: __m512i) -> [__m512i; 2] {
                let mask = op!(self, _mm512_set1_epi8(15));
                let high = op!(self, _mm512_srli_epi16::<4>(v));
                [op!(self, _mm512_and_si512(v, mask)), op!(self, _mm512_and_si512(high, mask))]
            }

            #[inline(always)]
            fn part_zero(self) -> __m512i {
                op!(self, _mm512_setzero_si512())
            }

            #[inline(always)]
            fn dot(self, part: __m512i, codes: __m512i, acts: __m512i) -> __m512i {
                op!(self, _mm512_dpbusd_epi32(part, codes, acts))
            }

            #[inline(always)]
            fn dot_nibbles(self, sums: __m512i, w: __m512i, acts: __m512i) -> __m512i {
                op!(self, _mm512_dpbusd_epi32(sums, w, acts))
            }

            #[inline(always)]
            fn dot_lanes(self, sums: __m512i, a: __m512i, b: __m512i) -> __m512i {
                op!(self, _mm512_dpbusd_epi32(sums, a, b))
            }

            #[inline(always)]
            fn part_sums(self, part: __m512i) -> __m512i {
                part
            }

            #[inline(always)]
            fn quad_zero(self) -> [__m512i; 4] {
                [self.part_zero(); 4]
            }

            // Masking without shifting leaves plane p multiplied by 4^p: at most
            // 2 · 64 = 128, which a u8 holds. A lane grows by at most
            // 4 · 128 · 128 = 2^16 a block, so it holds 2^15 blocks, 8M columns.
            #[inline(always)]
            fn quad_dot(
                self,
                quad: [__m512i; 4],
                codes: __m512i,
                acts: [__m512i; 4],
            ) -> [__m512i; 4] {
                array!(4, p => {
                    let mask = op!(self, _mm512_set1_epi8((3u8 << (2 * p)) as i8));
                    let codes = op!(self, _mm512_and_si512(codes, mask));
                    self.dot(quad[p], codes, acts[p])
                })
            }

            #[inline(always)]
            fn quad_dot_one(
                self,
                mut quad: [__m512i; 4],
                codes: __m512i,
                acts: __m512i,
            ) -> [__m512i; 4] {
                quad[0] = self.dot(quad[0], codes, acts);
                quad
            }

            #[inline(always)]
            fn quad_sums(self, [a, b, c, d]: [__m512i; 4]) -> __m512i {
                // Exact: every lane of plane p is a multiple of 4^p.
                let b = op!(self, _mm512_srai_epi32::<2>(b));
                let c = op!(self, _mm512_srai_epi32::<4>(c));
                let d = op!(self, _mm512_srai_epi32::<6>(d));
                self.add_sums(self.add_sums(a, b), self.add_sums(c, d))
            }

            #[inline(always)]
            fn sums_zero(self) -> __m512i {
                op!(self, _mm512_setzero_si512())
            }

            #[inline(always)]
            fn add_sums(self, a: __m512i, b: __m512i) -> __m512i {
                op!(self, _mm512_add_epi32(a, b))
            }

            #[inline(always)]
            fn load_sums(self, lanes: &[i32; 16]) -> __m512i {
                // SAFETY: the features are proven by `self`; the array is 64 bytes.
                unsafe { _mm512_loadu_si512(lanes.as_ptr().cast()) }
            }

            #[inline(always)]
            fn sum_lanes(self, sums: __m512i) -> [i32; 16] {
                // SAFETY: both are 64 bytes, and any bytes are valid.
                unsafe { std::mem::transmute::<__m512i, [i32; 16]>(sums) }
            }

            #[inline(always)]
            fn totals(self, [a, b, c, d]: [__m512i; 4]) -> [i32; 4] {
                // Two rounds of interleave and add leave the four totals, each in
                // four parts, side by side in every 128-bit group.
                let ab = op!(
                    self,
                    _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b))
                );
                let cd = op!(
                    self,
                    _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d))
                );
                let abcd = op!(
                    self,
                    _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd))
                );
                let half = op!(
                    self,
                    _mm256_add_epi32(
                        _mm512_castsi512_si256(abcd),
                        _mm512_extracti64x4_epi64::<1>(abcd)
                    )
                );
                let quarter = op!(
                    self,
                    _mm_add_epi32(
                        _mm256_castsi256_si128(half),
                        _mm256_extracti128_si256::<1>(half)
                    )
                );
                // SAFETY: both are 16 bytes, and any bytes are valid.
                unsafe { std::mem::transmute::<__m128i, [i32; 4]>(quarter) }
            }

            #[inline(always)]
            fn load_f32(self, x: &[f32; 16]) -> __m512 {
                // SAFETY: the features are proven by `self`; the array is 64 bytes.
                unsafe { _mm512_loadu_ps(x.as_ptr()) }
            }

            #[inline(always)]
            fn load_f16(self, x: &[f16; 16]) -> __m512 {
                // SAFETY: the features are proven by `self`; the array is 32 bytes.
                unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) }
            }

            #[inline(always)]
            fn load_bf16(self, x: &[bf16; 16]) -> __m512 {
                // SAFETY: the features are proven by `self`; the array is 32 bytes.
                let bits = unsafe { _mm256_loadu_si256(x.as_ptr().cast()) };
                op!(self, _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits))))
            }

            #[inline(always)]
            fn load_i8(self, x: &[i8; 16]) -> __m512 {
                // SAFETY: the features are proven by `self`; the array is 16 bytes.
                let ints = unsafe { _mm_loadu_si128(x.as_ptr().cast()) };
                op!(self, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(ints)))
            }

            #[inline(always)]
            fn splat(self, x: f32) -> __m512 {
                op!(self, _mm512_set1_ps(x))
            }

            #[inline(always)]
            fn mul_add(self, acc: __m512, a: __m512, b: __m512) -> __m512 {
                op!(self, _mm512_add_ps(acc, _mm512_mul_ps(a, b)))
            }

            #[inline(always)]
            fn fma(self, acc: __m512, a: __m512, b: __m512) -> __m512 {
                op!(self, _mm512_fmadd_ps(a, b, acc))
            }

            #[inline(always)]
            fn mul(self, a: __m512, b: __m512) -> __m512 {
                op!(self, _mm512_mul_ps(a, b))
            }

            #[inline(always)]
            fn larger(self, a: __m512, b: __m512) -> __m512 {
                // `vmaxps` gives its second operand unless the first is larger.
                op!(self, _mm512_max_ps(b, a))
            }

            #[inline(always)]
            fn lane_sum(self, v: __m512) -> f32 {
                let half = op!(
                    self,
                    _mm256_add_ps(
                        _mm512_castps512_ps256(v),
                        _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(v)))
                    )
                );
                let quarter = op!(
                    self,
                    _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half))
                );
                let eighth = op!(self, _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter)));
                op!(
                    self,
                    _mm_cvtss_f32(_mm_add_ss(eighth, _mm_shuffle_ps::<1>(eighth, eighth)))
                )
            }

            #[inline(always)]
            fn transpose_words(self, rows: [&[u8; 64]; 16]) -> [[u8; 64]; 16] {
                // Words of neighbours, then pairs of words, then groups of four.
                let rows = array!(16, i => self.load(rows[i]));
                let pairs = array!(16, i => {
                    let (a, b) = (rows[i & !1], rows[i | 1]);
                    if i % 2 == 0 {
                        op!(self, _mm512_unpacklo_epi32(a, b))
                    } else {
                        op!(self, _mm512_unpackhi_epi32(a, b))
                    }
                });
                // Entry 4g + j holds word 4q + j of rows 4g..4g + 4 in group q.
                let quads = array!(16, i => {
                    let (a, b) = (pairs[(i & !3) + i % 4 / 2], pairs[(i & !3) + i % 4 / 2 + 2]);
                    if i % 2 == 0 {
                        op!(self, _mm512_unpacklo_epi64(a, b))
                    } else {
                        op!(self, _mm512_unpackhi_epi64(a, b))
                    }
                });
                // Groups 0 and 1, or 2 and 3, of two entries side by side.
                let halves = array!(16, i => {
                    let (a, b) = (quads[(i & 3) + (i & 8)], quads[(i & 3) + (i & 8) + 4]);
                    if i & 4 == 0 {
                        op!(self, _mm512_shuffle_i32x4::<0x44>(a, b))
                    } else {
                        op!(self, _mm512_shuffle_i32x4::<0xee>(a, b))
                    }
                });
                // Word 4q + j: group q of the four entries 4g + j.
                array!(16, i => {
                    let at = (i & 3) + (i & 8) / 2;
                    let (a, b) = (halves[at], halves[at + 8]);
                    self.bytes(if i & 4 == 0 {
                        op!(self, _mm512_shuffle_i32x4::<0x88>(a, b))
                    } else {
                        op!(self, _mm512_shuffle_i32x4::<0xdd>(a, b))
                    })
                })
            }

            #[inline(always)]
            fn floats(self, v: __m512) -> [f32; 16] {
                // SAFETY: both are 64 bytes, and any bytes are valid.
                unsafe { std::mem::transmute::<__m512, [f32; 16]>(v) }
            }
        }
    };
}

implement!(Avx512Vnni {});
implement!(Avx512Vbmi {
    const BYTE_LOOKUP: bool = true;

    // As `p5_codes`, but the last code stays in the high two bits, multiplied by
    // 64, and joins the sums of plane 3, which are multiplied by 64 too: these
    // grow by at most 2^17 a block and hold 2^14 blocks, 5M columns.
    #[inline(always)]
    fn quad_dot_p5(
        self,
        quad: [__m512i; 4],
        block: __m512i,
        [a, b, c, d, e]: [__m512i; 5],
    ) -> [__m512i; 4] {
        let high = op!(self, _mm512_set1_epi8(0xc0u8 as i8));
        let pairs = op!(self, _mm512_cmpge_epu8_mask(block, high));
        let four = op!(self, _mm512_permutexvar_epi8(block, self.load(&P5_FOUR)));
        let four = op!(
            self,
            _mm512_mask_permutexvar_epi8(four, pairs, block, self.load(&P5_PAIR_FOUR))
        );
        let last = op!(self, _mm512_and_si512(block, high));
        let last = op!(
            self,
            _mm512_mask_permutexvar_epi8(last, pairs, block, self.load(&P5_PAIR_LAST_HIGH))
        );
        let mut quad = self.quad_dot(quad, four, [a, b, c, d]);
        quad[3] = self.dot(quad[3], last, e);
        quad
    }

    #[inline(always)]
    fn p5_codes(self, block: __m512i) -> (__m512i, __m512i) {
        // `vpermb` looks at the low six bits of an index. Where the high two are
        // 3, the low six count (first four, last) pairs, not first fours.
        let pairs = op!(self, _mm512_cmpge_epu8_mask(block, _mm512_set1_epi8(0xc0u8 as i8)));
        let four = op!(self, _mm512_permutexvar_epi8(block, self.load(&P5_FOUR)));
        let four = op!(
            self,
            _mm512_mask_permutexvar_epi8(four, pairs, block, self.load(&P5_PAIR_FOUR))
        );
        let last = self.plane(block, 3);
        let last = op!(
            self,
            _mm512_mask_permutexvar_epi8(last, pairs, block, self.load(&P5_PAIR_LAST))
        );
        (four, last)
    }
});

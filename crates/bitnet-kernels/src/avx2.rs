//! AVX2 and AVX-VNNI: two 256-bit registers a vector.

use std::arch::x86_64::*;

use half::{bf16, f16};

use crate::isa::isa_token;
use crate::simd::{Simd, array};

isa_token! {
    /// AVX2 with F16C and FMA (Haswell, Zen and later).
    Avx2 = "avx2": ["avx2", "f16c", "fma"]
}

isa_token! {
    /// AVX2 with 256-bit VNNI (Alder Lake, Sierra Forest and later).
    AvxVnni = "avxvnni": ["avx2", "f16c", "fma", "avxvnni"]
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

/// A value for each half of a vector.
macro_rules! both {
    ($i:ident => $value:expr) => {
        [
            {
                let $i = 0;
                $value
            },
            {
                let $i = 1;
                $value
            },
        ]
    };
}

/// What both share: everything but the products.
macro_rules! implement {
    ($token:ident { $($products:tt)* }) => {
        impl Simd for $token {
            type Bytes = [__m256i; 2];
            type Sums = [__m256i; 2];
            type Floats = [__m256; 2];
            const WIDE: bool = false;

            $($products)*

            #[inline(always)]
            fn vectorize<R>(self, f: impl FnOnce() -> R) -> R {
                self.enter(f)
            }

            #[inline(always)]
            fn prefetch(self, at: *const u8) {
                op!(self, _mm_prefetch::<_MM_HINT_T0>(at.cast()));
            }

            #[inline(always)]
            fn load(self, bytes: &[u8; 64]) -> Self::Bytes {
                let (halves, _) = bytes.as_chunks::<32>();
                // SAFETY: the features are proven by `self`; a half is 32 bytes.
                both!(i => unsafe { _mm256_loadu_si256(halves[i].as_ptr().cast()) })
            }

            #[inline(always)]
            fn load_acts(self, q: &[i8; 64]) -> Self::Bytes {
                let (halves, _) = q.as_chunks::<32>();
                // SAFETY: the features are proven by `self`; a half is 32 bytes.
                both!(i => unsafe { _mm256_loadu_si256(halves[i].as_ptr().cast()) })
            }

            #[inline(always)]
            fn splat_acts(self, q: [i8; 4]) -> Self::Bytes {
                let word = i32::from_le_bytes(q.map(|q| q as u8));
                [op!(self, _mm256_set1_epi32(word)); 2]
            }

            #[inline(always)]
            fn bytes(self, v: Self::Bytes) -> [u8; 64] {
                // SAFETY: both are 64 bytes, and any bytes are valid.
                unsafe { std::mem::transmute::<[__m256i; 2], [u8; 64]>(v) }
            }

            #[inline(always)]
            fn plane(self, v: Self::Bytes, p: usize) -> Self::Bytes {
                both!(i => {
                    let v = v[i];
                    let shifted = match p {
                        0 => v,
                        1 => op!(self, _mm256_srli_epi16::<2>(v)),
                        2 => op!(self, _mm256_srli_epi16::<4>(v)),
                        _ => op!(self, _mm256_srli_epi16::<6>(v)),
                    };
                    op!(self, _mm256_and_si256(shifted, _mm256_set1_epi8(3)))
                })
            }

            #[inline(always)]
            fn nibbles(self, v: Self::Bytes) -> [Self::Bytes; 2] {
                let mask = op!(self, _mm256_set1_epi8(15));
                let low = both!(i => op!(self, _mm256_and_si256(v[i], mask)));
                let high = both!(i => {
                    op!(self, _mm256_and_si256(_mm256_srli_epi16::<4>(v[i]), mask))
                });
                [low, high]
            }

            #[inline(always)]
            fn sums_zero(self) -> Self::Sums {
                [op!(self, _mm256_setzero_si256()); 2]
            }

            #[inline(always)]
            fn add_sums(self, a: Self::Sums, b: Self::Sums) -> Self::Sums {
                both!(i => op!(self, _mm256_add_epi32(a[i], b[i])))
            }

            #[inline(always)]
            fn load_sums(self, lanes: &[i32; 16]) -> Self::Sums {
                let (halves, _) = lanes.as_chunks::<8>();
                // SAFETY: the features are proven by `self`; a half is 32 bytes.
                both!(i => unsafe { _mm256_loadu_si256(halves[i].as_ptr().cast()) })
            }

            #[inline(always)]
            fn sum_lanes(self, sums: Self::Sums) -> [i32; 16] {
                // SAFETY: both are 64 bytes, and any bytes are valid.
                unsafe { std::mem::transmute::<[__m256i; 2], [i32; 16]>(sums) }
            }

            #[inline(always)]
            fn totals(self, sums: [Self::Sums; 4]) -> [i32; 4] {
                let [a, b, c, d] = array!(4, i => op!(self, _mm256_add_epi32(sums[i][0], sums[i][1])));
                let ab = op!(self, _mm256_hadd_epi32(a, b));
                let cd = op!(self, _mm256_hadd_epi32(c, d));
                let abcd = op!(self, _mm256_hadd_epi32(ab, cd));
                let quarter = op!(
                    self,
                    _mm_add_epi32(_mm256_castsi256_si128(abcd), _mm256_extracti128_si256::<1>(abcd))
                );
                // SAFETY: both are 16 bytes, and any bytes are valid.
                unsafe { std::mem::transmute::<__m128i, [i32; 4]>(quarter) }
            }

            #[inline(always)]
            fn load_f32(self, x: &[f32; 16]) -> Self::Floats {
                let (halves, _) = x.as_chunks::<8>();
                // SAFETY: the features are proven by `self`; a half is 32 bytes.
                both!(i => unsafe { _mm256_loadu_ps(halves[i].as_ptr()) })
            }

            #[inline(always)]
            fn load_f16(self, x: &[f16; 16]) -> Self::Floats {
                let (halves, _) = x.as_chunks::<8>();
                // SAFETY: the features are proven by `self`; a half is 16 bytes.
                both!(i => unsafe { _mm256_cvtph_ps(_mm_loadu_si128(halves[i].as_ptr().cast())) })
            }

            #[inline(always)]
            fn load_bf16(self, x: &[bf16; 16]) -> Self::Floats {
                let (halves, _) = x.as_chunks::<8>();
                both!(i => {
                    // SAFETY: the features are proven by `self`; a half is 16 bytes.
                    let bits = unsafe { _mm_loadu_si128(halves[i].as_ptr().cast()) };
                    op!(
                        self,
                        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits)))
                    )
                })
            }

            #[inline(always)]
            fn load_i8(self, x: &[i8; 16]) -> Self::Floats {
                let (halves, _) = x.as_chunks::<8>();
                both!(i => {
                    // SAFETY: the features are proven by `self`; a half is 8 bytes.
                    let ints = unsafe { _mm_loadl_epi64(halves[i].as_ptr().cast()) };
                    op!(self, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(ints)))
                })
            }

            #[inline(always)]
            fn splat(self, x: f32) -> Self::Floats {
                [op!(self, _mm256_set1_ps(x)); 2]
            }

            #[inline(always)]
            fn mul_add(self, acc: Self::Floats, a: Self::Floats, b: Self::Floats) -> Self::Floats {
                both!(i => op!(self, _mm256_add_ps(acc[i], _mm256_mul_ps(a[i], b[i]))))
            }

            #[inline(always)]
            fn fma(self, acc: Self::Floats, a: Self::Floats, b: Self::Floats) -> Self::Floats {
                both!(i => op!(self, _mm256_fmadd_ps(a[i], b[i], acc[i])))
            }

            #[inline(always)]
            fn mul(self, a: Self::Floats, b: Self::Floats) -> Self::Floats {
                both!(i => op!(self, _mm256_mul_ps(a[i], b[i])))
            }

            #[inline(always)]
            fn larger(self, a: Self::Floats, b: Self::Floats) -> Self::Floats {
                // `vmaxps` gives its second operand unless the first is larger.
                both!(i => op!(self, _mm256_max_ps(b[i], a[i])))
            }

            #[inline(always)]
            fn lane_sum(self, [low, high]: Self::Floats) -> f32 {
                let half = op!(self, _mm256_add_ps(low, high));
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
            fn floats(self, v: Self::Floats) -> [f32; 16] {
                // SAFETY: both are 64 bytes, and any bytes are valid.
                unsafe { std::mem::transmute::<[__m256; 2], [f32; 16]>(v) }
            }
        }
    };
}

implement!(Avx2 {
    // i16 lanes: `vpmaddubsw` adds two products, in -512..=508, and 64 of those
    // lie in -32768..=32512, so neither it nor the i16 sum ever saturates.
    type Part = [__m256i; 2];
    type Quad = [__m256i; 2];
    const PART_DOTS: usize = 64;
    const TILE_TOKENS: usize = 6;

    #[inline(always)]
    fn part_zero(self) -> Self::Part {
        self.sums_zero()
    }

    #[inline(always)]
    fn dot(self, part: Self::Part, codes: Self::Bytes, acts: Self::Bytes) -> Self::Part {
        both!(i => {
            let pairs = op!(self, _mm256_maddubs_epi16(codes[i], acts[i]));
            op!(self, _mm256_add_epi16(part[i], pairs))
        })
    }

    #[inline(always)]
    fn dot_lanes(self, sums: Self::Sums, a: Self::Bytes, b: Self::Bytes) -> Self::Sums {
        both!(i => op!(self, _mm256_add_epi32(sums[i], _mm256_madd_epi16(a[i], b[i]))))
    }

    // A pair is at most 15 · 128 · 2 = 3840, which an i16 holds.
    #[inline(always)]
    fn dot_nibbles(self, sums: Self::Sums, w: Self::Bytes, acts: Self::Bytes) -> Self::Sums {
        both!(i => {
            let pairs = op!(self, _mm256_maddubs_epi16(w[i], acts[i]));
            let fours = op!(self, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
            op!(self, _mm256_add_epi32(sums[i], fours))
        })
    }

    #[inline(always)]
    fn part_sums(self, part: Self::Part) -> Self::Sums {
        both!(i => op!(self, _mm256_madd_epi16(part[i], _mm256_set1_epi16(1))))
    }

    #[inline(always)]
    fn quad_zero(self) -> Self::Quad {
        self.part_zero()
    }

    #[inline(always)]
    fn quad_dot(self, quad: Self::Quad, codes: Self::Bytes, acts: [Self::Bytes; 4]) -> Self::Quad {
        let quad = self.dot(quad, self.plane(codes, 0), acts[0]);
        let quad = self.dot(quad, self.plane(codes, 1), acts[1]);
        let quad = self.dot(quad, self.plane(codes, 2), acts[2]);
        self.dot(quad, self.plane(codes, 3), acts[3])
    }

    #[inline(always)]
    fn quad_dot_one(self, quad: Self::Quad, codes: Self::Bytes, acts: Self::Bytes) -> Self::Quad {
        self.dot(quad, codes, acts)
    }

    #[inline(always)]
    fn quad_sums(self, quad: Self::Quad) -> Self::Sums {
        self.part_sums(quad)
    }
});

implement!(AvxVnni {
    type Part = [__m256i; 2];
    type Quad = [__m256i; 2];
    const PART_DOTS: usize = usize::MAX;
    const TILE_TOKENS: usize = 6;

    #[inline(always)]
    fn part_zero(self) -> Self::Part {
        self.sums_zero()
    }

    #[inline(always)]
    fn dot(self, part: Self::Part, codes: Self::Bytes, acts: Self::Bytes) -> Self::Part {
        both!(i => op!(self, _mm256_dpbusd_avx_epi32(part[i], codes[i], acts[i])))
    }

    #[inline(always)]
    fn dot_nibbles(self, sums: Self::Sums, w: Self::Bytes, acts: Self::Bytes) -> Self::Sums {
        both!(i => op!(self, _mm256_dpbusd_avx_epi32(sums[i], w[i], acts[i])))
    }

    const GROUP: usize = 4;
    const UNSIGNED_BYTES: bool = true;

    #[inline(always)]
    fn dot_lanes(self, sums: Self::Sums, a: Self::Bytes, b: Self::Bytes) -> Self::Sums {
        both!(i => op!(self, _mm256_dpbusd_avx_epi32(sums[i], a[i], b[i])))
    }

    #[inline(always)]
    fn part_sums(self, part: Self::Part) -> Self::Sums {
        part
    }

    #[inline(always)]
    fn quad_zero(self) -> Self::Quad {
        self.part_zero()
    }

    #[inline(always)]
    fn quad_dot(self, quad: Self::Quad, codes: Self::Bytes, acts: [Self::Bytes; 4]) -> Self::Quad {
        let quad = self.dot(quad, self.plane(codes, 0), acts[0]);
        let quad = self.dot(quad, self.plane(codes, 1), acts[1]);
        let quad = self.dot(quad, self.plane(codes, 2), acts[2]);
        self.dot(quad, self.plane(codes, 3), acts[3])
    }

    #[inline(always)]
    fn quad_dot_one(self, quad: Self::Quad, codes: Self::Bytes, acts: Self::Bytes) -> Self::Quad {
        self.dot(quad, codes, acts)
    }

    #[inline(always)]
    fn quad_sums(self, quad: Self::Quad) -> Self::Sums {
        quad
    }
});

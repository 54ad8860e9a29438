//! What an instruction set offers: a handful of exact operations on 64-byte
//! vectors, over which every kernel is written once.
//!
//! A vector is 64 bytes on every machine (one register of AVX-512, two of AVX2,
//! four of NEON): a block of a packed row, 64 codes or activations, sixteen i32
//! sums or sixteen f32 lanes.

use bitnet_core::matrix::p5_codes;
use half::{bf16, f16};

/// An array of `$n` elements, element `$i` being `$value`. A loop instead of
/// `from_fn` or `map`, whose closures are not sure to be inlined: code that is
/// not inlined into [`Simd::vectorize`] is not compiled for the instruction set.
macro_rules! array {
    ($n:expr, $i:ident => $value:expr) => {{
        let $i = 0;
        let mut out = [$value; $n];
        #[allow(clippy::needless_range_loop, reason = "the index is what varies")]
        for $i in 1..$n {
            out[$i] = $value;
        }
        out
    }};
}
pub(crate) use array;

/// A value is the proof that its instruction set is present on this machine.
pub(crate) trait Simd: Copy {
    /// 64 bytes: packed codes, u8 codes or i8 activations.
    type Bytes: Copy;
    /// Sixteen sums of products of four neighbouring bytes; may be narrower than
    /// i32 and then holds at most [`Simd::PART_DOTS`] products.
    type Part: Copy;
    /// Sixteen i32 sums.
    type Sums: Copy;
    /// Sums of whole packed vectors of 2-bit codes, see [`Simd::quad_dot`].
    type Quad: Copy;
    /// Sixteen f32 lanes.
    type Floats: Copy;

    /// How many [`Simd::dot`] a [`Simd::Part`] holds, and how many planes of
    /// products a [`Simd::Quad`].
    const PART_DOTS: usize;
    /// Whether 32 vectors fit the registers; otherwise 8 do.
    const WIDE: bool;
    /// Whether [`Simd::p5_codes`] looks bytes up with its own instructions; the
    /// table of the others makes layout P5 about ten times slower than P2.
    const BYTE_LOOKUP: bool = false;
    /// Tokens in a tile of the panel product.
    const TILE_TOKENS: usize;
    /// Whether the panel product multiplies two rows by two tokens at once, with
    /// [`Simd::dot_pairs`].
    const PAIRS: bool = false;

    /// Runs `f` compiled for this instruction set. Everything `f` calls must be
    /// inlined into it to profit.
    fn vectorize<R>(self, f: impl FnOnce() -> R) -> R;

    /// Asks for a cache line that will be read soon; any address is allowed.
    fn prefetch(self, at: *const u8);

    /// Reads a vector.
    fn load(self, bytes: &[u8; 64]) -> Self::Bytes;
    /// Reads 64 activations.
    fn load_acts(self, q: &[i8; 64]) -> Self::Bytes;
    /// Four activations, sixteen times over.
    fn splat_acts(self, q: [i8; 4]) -> Self::Bytes;
    /// The bytes of a vector.
    fn bytes(self, v: Self::Bytes) -> [u8; 64];
    /// Bits `2p..2p+2` of every byte, p < 4.
    fn plane(self, v: Self::Bytes, p: usize) -> Self::Bytes;

    /// No product yet.
    fn part_zero(self) -> Self::Part;
    /// `part[i] += Σ codes[4i + j] · acts[4i + j]`, j < 4; codes are at most 2.
    fn dot(self, part: Self::Part, codes: Self::Bytes, acts: Self::Bytes) -> Self::Part;
    /// The sums of a part.
    fn part_sums(self, part: Self::Part) -> Self::Sums;

    /// No product yet.
    fn quad_zero(self) -> Self::Quad;
    /// Adds the products of the four planes of `codes` with `acts[0..4]`.
    fn quad_dot(self, quad: Self::Quad, codes: Self::Bytes, acts: [Self::Bytes; 4]) -> Self::Quad;
    /// Adds the products of one plane of codes.
    fn quad_dot_one(self, quad: Self::Quad, codes: Self::Bytes, acts: Self::Bytes) -> Self::Quad;
    /// Adds the products of the five planes of a block of layout P5.
    #[inline(always)]
    fn quad_dot_p5(
        self,
        quad: Self::Quad,
        block: Self::Bytes,
        [a, b, c, d, e]: [Self::Bytes; 5],
    ) -> Self::Quad {
        let (four, last) = self.p5_codes(block);
        let quad = self.quad_dot(quad, four, [a, b, c, d]);
        self.quad_dot_one(quad, last, e)
    }
    /// The sums of a quad, spread over sixteen lanes in any way.
    fn quad_sums(self, quad: Self::Quad) -> Self::Sums;

    /// The low and the high half of every byte.
    fn nibbles(self, v: Self::Bytes) -> [Self::Bytes; 2];

    /// Adds the 64 products of bytes that are at most 15 and signed ones, spread
    /// over the lanes in any way.
    #[inline(always)]
    fn dot_nibbles(self, sums: Self::Sums, w: Self::Bytes, acts: Self::Bytes) -> Self::Sums {
        let (w, acts) = (self.bytes(w), self.bytes(acts));
        let mut lanes = [0i32; 16];
        for i in 0..64 {
            lanes[i % 16] += i32::from(i16::from(w[i]) * i16::from(acts[i] as i8));
        }
        self.add_sums(sums, self.load_sums(&lanes))
    }

    /// How many numbers [`Simd::dot_lanes`] multiplies in a lane: four bytes where an
    /// instruction multiplies four times as many bytes as floats, else two words of 16
    /// bits.
    const GROUP: usize = 2;
    /// Whether the first bytes of [`Simd::dot_lanes`] are unsigned; otherwise all are signed.
    const UNSIGNED_BYTES: bool = false;

    /// `sums[i] += Σ a · b` of the bytes, or the words, of lane i.
    #[inline(always)]
    fn dot_lanes(self, sums: Self::Sums, a: Self::Bytes, b: Self::Bytes) -> Self::Sums {
        let (a, b) = (self.bytes(a), self.bytes(b));
        let lanes = array!(16, i => {
            let word = |bytes: &[u8; 64], j: usize| {
                i32::from(i16::from_le_bytes([bytes[4 * i + j], bytes[4 * i + j + 1]]))
            };
            word(&a, 0) * word(&b, 0) + word(&a, 2) * word(&b, 2)
        });
        self.add_sums(sums, self.load_sums(&lanes))
    }

    /// Two vectors of sixteen words: each word of the first before that of the second, in
    /// the order in which [`Simd::dot_pairs`] takes them.
    fn interleave_words(self, _words: [Self::Bytes; 2]) -> [Self::Bytes; 2] {
        unreachable!("only where PAIRS")
    }
    /// Adds the products of sixteen rows and two tokens, eight neighbours of each: codes
    /// from [`Simd::interleave_words`], activations of one token and of the other. Where a
    /// sum stands is this set's affair, see [`Simd::pair_sums`].
    fn dot_pairs(
        self,
        _sums: [Self::Sums; 2],
        _codes: [Self::Bytes; 2],
        _acts: [[i8; 8]; 2],
    ) -> [Self::Sums; 2] {
        unreachable!("only where PAIRS")
    }
    /// The sums of sixteen rows for one token and for the other.
    fn pair_sums(self, _sums: [Self::Sums; 2]) -> [Self::Sums; 2] {
        unreachable!("only where PAIRS")
    }

    /// Sixteen zeros.
    fn sums_zero(self) -> Self::Sums;
    /// Lane by lane.
    fn add_sums(self, a: Self::Sums, b: Self::Sums) -> Self::Sums;
    /// Reads sixteen sums.
    fn load_sums(self, lanes: &[i32; 16]) -> Self::Sums;
    /// The lanes, in order.
    fn sum_lanes(self, sums: Self::Sums) -> [i32; 16];
    /// The total of each of four vectors.
    fn totals(self, sums: [Self::Sums; 4]) -> [i32; 4];

    /// Reads sixteen floats.
    fn load_f32(self, x: &[f32; 16]) -> Self::Floats;
    /// Sixteen halves, widened.
    fn load_f16(self, x: &[f16; 16]) -> Self::Floats;
    /// Sixteen bfloat16, widened.
    fn load_bf16(self, x: &[bf16; 16]) -> Self::Floats;
    /// Sixteen integers, as floats.
    fn load_i8(self, x: &[i8; 16]) -> Self::Floats;
    /// One value, sixteen times over.
    fn splat(self, x: f32) -> Self::Floats;
    /// `acc + a · b`, rounded twice: never fused.
    fn mul_add(self, acc: Self::Floats, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// `acc + a · b`, rounded once. Where the machine has no such instruction it is
    /// computed, slowly.
    fn fma(self, acc: Self::Floats, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// `a · b`.
    fn mul(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// `b` where it is larger than `a`, else `a`: a NaN in `b` does not count.
    fn larger(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// The lanes.
    fn floats(self, v: Self::Floats) -> [f32; 16];
    /// [`bitnet_core::ternary::lane_sum`].
    fn lane_sum(self, v: Self::Floats) -> f32;

    /// The codes of a block of layout P5: the first four of each byte as layout P2
    /// holds them, and the last. Here with a table of all bytes.
    #[inline(always)]
    fn p5_codes(self, block: Self::Bytes) -> (Self::Bytes, Self::Bytes) {
        let bytes = self.bytes(block);
        let (mut four, mut last) = ([0u8; 64], [0u8; 64]);
        for j in 0..64 {
            let entry = P5_CODES[usize::from(bytes[j])];
            [four[j], last[j]] = entry;
        }
        (self.load(&four), self.load(&last))
    }

    /// Transposes sixteen rows of sixteen 4-byte words.
    #[inline(always)]
    fn transpose_words(self, rows: [&[u8; 64]; 16]) -> [[u8; 64]; 16] {
        let mut out = [[0u8; 64]; 16];
        for (r, row) in rows.iter().enumerate() {
            for (word, out) in row.as_chunks::<4>().0.iter().zip(&mut out) {
                out[4 * r..4 * r + 4].copy_from_slice(word);
            }
        }
        out
    }
}

/// For each byte of layout P5 its first four codes, two bits each, and its last.
pub(crate) const P5_CODES: [[u8; 2]; 256] = {
    let mut table = [[0u8; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        // A byte that no packing gives never comes from a checked file; it must
        // only stay within the codes' range.
        if let Some([a, b, c, d, last]) = p5_codes(byte as u8) {
            table[byte] = [a | b << 2 | c << 4 | d << 6, last];
        }
        byte += 1;
    }
    table
};

/// Sixty-four neighbouring entries of [`P5_CODES`].
const fn p5_table(from: usize, part: usize) -> [u8; 64] {
    let mut table = [0u8; 64];
    let mut i = 0;
    while i < 64 {
        table[i] = P5_CODES[from + i][part];
        i += 1;
    }
    table
}

/// By the low six bits of a byte: its first four codes, where it is no pair.
pub(crate) static P5_FOUR: [u8; 64] = p5_table(0, 0);
/// The same where the high two bits are 3.
pub(crate) static P5_PAIR_FOUR: [u8; 64] = p5_table(192, 0);
/// The last code where the high two bits are 3.
pub(crate) static P5_PAIR_LAST: [u8; 64] = p5_table(192, 1);

/// The last code where the high two bits are 3, in the high two bits.
#[cfg(target_arch = "x86_64")]
pub(crate) static P5_PAIR_LAST_HIGH: [u8; 64] = {
    let mut table = p5_table(192, 1);
    let mut i = 0;
    while i < 64 {
        table[i] <<= 6;
        i += 1;
    }
    table
};

/// A stored float; its value as f32 is exact.
pub(crate) trait Element: Copy + Default {
    /// Whether a scale multiplies each vector of such elements.
    const SCALED: bool = false;
    /// The value.
    fn widen(self) -> f32;
    /// Sixteen values.
    fn load<S: Simd>(isa: S, x: &[Self; 16]) -> S::Floats;
    /// Fewer than sixteen values, then zeros. A product of two such zeros may be
    /// added to a lane that began at +0: it changes no bit, not even a sign.
    #[inline(always)]
    fn load_rest<S: Simd>(isa: S, x: &[Self]) -> S::Floats {
        let mut padded = [Self::default(); 16];
        padded[..x.len()].copy_from_slice(x);
        Self::load(isa, &padded)
    }
}

impl Element for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
    #[inline(always)]
    fn load<S: Simd>(isa: S, x: &[Self; 16]) -> S::Floats {
        isa.load_f32(x)
    }
}

impl Element for f16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        widen_f16(self)
    }
    #[inline(always)]
    fn load<S: Simd>(isa: S, x: &[Self; 16]) -> S::Floats {
        isa.load_f16(x)
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        widen_bf16(self)
    }
    #[inline(always)]
    fn load<S: Simd>(isa: S, x: &[Self; 16]) -> S::Floats {
        isa.load_bf16(x)
    }
}

impl Element for i8 {
    const SCALED: bool = true;

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from(self)
    }
    #[inline(always)]
    fn load<S: Simd>(isa: S, x: &[Self; 16]) -> S::Floats {
        isa.load_i8(x)
    }
}

/// The value of a half, without a branch, so that a loop of them becomes vectors.
///
/// The exponent and mantissa moved into an f32 make a value 2^112 too small;
/// multiplying is exact, for subnormal halves too.
#[inline(always)]
pub(crate) fn widen_f16(x: f16) -> f32 {
    let bits = u32::from(x.to_bits());
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((112 + 127) << 23);
    let special = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(magnitude.to_bits() | special | (bits & 0x8000) << 16)
}

/// The value of a bfloat16: the upper half of an f32.
#[inline(always)]
pub(crate) fn widen_bf16(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widening_equals_the_half_crate() {
        for bits in 0..=u16::MAX {
            let (h, b) = (f16::from_bits(bits), bf16::from_bits(bits));
            if h.is_nan() {
                assert!(widen_f16(h).is_nan());
            } else {
                assert_eq!(widen_f16(h).to_bits(), h.to_f32().to_bits());
            }
            if b.is_nan() {
                assert!(widen_bf16(b).is_nan());
            } else {
                assert_eq!(widen_bf16(b).to_bits(), b.to_f32().to_bits());
            }
        }
    }
}

//! The ternary types: TQ1_0, TQ2_0 and I2_S, each both ways.

use std::str::FromStr;

use half::f16;

use super::{BlockError, half_at};
use crate::gguf::GgmlType;

/// Elements of a block of TQ1_0 and TQ2_0.
const TQ: usize = 256;
/// Bytes of a block of TQ1_0: `qs[48] qh[4] d`.
const TQ1_BYTES: usize = 54;
/// Bytes of a block of TQ2_0: `qs[64] d`.
const TQ2_BYTES: usize = 66;
/// Elements of a block of I2_S, as it is written here.
const I2: usize = 128;
/// Bytes after the codes of an I2_S tensor: the scale, then padding.
const I2_TAIL: usize = 32;

/// The layout of I2_S codes: a block is four runs of values, the first in the top
/// two bits of its bytes, the last in the lowest. The builds of bitnet.cpp differ in
/// the length of a run and write the same type number, so a file does not tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum I2sLayout {
    /// Of x86 builds, and of the published files: 128 values in 32 bytes, runs of 32.
    #[default]
    X86,
    /// Of ARM builds: 64 values in 16 bytes, runs of 16.
    Arm,
}

impl I2sLayout {
    /// Both.
    pub const ALL: [Self; 2] = [Self::X86, Self::Arm];

    /// The name in options.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::X86 => "x86",
            Self::Arm => "arm",
        }
    }

    /// Values of a block; it takes a quarter of that in bytes.
    fn block(self) -> usize {
        match self {
            Self::X86 => I2,
            Self::Arm => I2 / 2,
        }
    }

    /// The ternary values of whole blocks.
    fn decode(self, codes: &[u8], trits: &mut [i8]) -> Result<(), BlockError> {
        let run = self.block() / 4;
        let blocks = codes.chunks_exact(run).zip(trits.chunks_exact_mut(4 * run));
        for (i, (block, out)) in blocks.enumerate() {
            for (n, out) in out.chunks_exact_mut(run).enumerate() {
                for (code, byte) in out.iter_mut().zip(block) {
                    *code = (byte >> (6 - 2 * n) & 3) as i8;
                }
            }
            subtract_one(GgmlType::I2_S, i * 4 * run, out)?;
        }
        Ok(())
    }
}

impl FromStr for I2sLayout {
    type Err = String;

    /// That of a name in options.
    fn from_str(name: &str) -> Result<Self, String> {
        let known = || Self::ALL.map(Self::name).join(", ");
        let found = Self::ALL.into_iter().find(|layout| layout.name() == name);
        found.ok_or_else(|| format!("unknown builds; known: {}", known()))
    }
}

/// The ternary values of a whole tensor of TQ1_0, TQ2_0 or I2_S (of which `i2s` is
/// the layout), and the scale that multiplies them. Blocks of zeros may have any scale; a tensor of zeros
/// has the scale of its first block, or 1 where that is 0.
///
/// # Errors
/// Another type, a length that does not fit `elements`, a code that is no
/// ternary value, blocks with different scales, a scale that is not finite or
/// is negative.
pub fn decode_ternary(
    ty: GgmlType,
    bytes: &[u8],
    elements: usize,
    i2s: I2sLayout,
) -> Result<(Vec<i8>, f32), BlockError> {
    check_length(ty, bytes, elements, i2s)?;
    let mut trits = vec![0i8; elements];
    let scale = match ty {
        GgmlType::TQ1_0 => tq(ty, bytes, &mut trits, tq1_0_codes, TQ1_BYTES - 2)?,
        GgmlType::TQ2_0 => tq(ty, bytes, &mut trits, tq2_0_codes, TQ2_BYTES - 2)?,
        _ => {
            let (codes, tail) = bytes.split_at(bytes.len() - I2_TAIL);
            i2s.decode(codes, &mut trits)?;
            f32::from_le_bytes([tail[0], tail[1], tail[2], tail[3]])
        }
    };
    if !(scale.is_finite() && scale >= 0.0) {
        return Err(BlockError::Scale(scale));
    }
    Ok((trits, if scale == 0.0 { 1.0 } else { scale }))
}

/// A whole tensor of TQ1_0 or TQ2_0 with scales of 1, or of I2_S with `scale`:
/// the types' own half-precision scales would lose bits of it, so for the former
/// it goes into a tensor of its own.
///
/// # Errors
/// Another type, or elements that are not whole blocks of it.
pub fn encode_ternary(ty: GgmlType, trits: &[i8], scale: f32) -> Result<Vec<u8>, BlockError> {
    let block = match ty {
        GgmlType::TQ1_0 | GgmlType::TQ2_0 => TQ,
        GgmlType::I2_S => I2,
        _ => return Err(BlockError::Type(ty)),
    };
    if !trits.len().is_multiple_of(block) {
        return Err(BlockError::Length { ty, elements: trits.len(), found: 0 });
    }
    let one = f16::ONE.to_le_bytes();
    let mut out = Vec::with_capacity(trits.len() / 3 + I2_TAIL);
    match ty {
        GgmlType::TQ1_0 => trits.as_chunks::<TQ>().0.iter().for_each(|t| {
            out.extend(tq1_0_bytes(t));
            out.extend(one);
        }),
        GgmlType::TQ2_0 => trits.as_chunks::<TQ>().0.iter().for_each(|t| {
            out.extend(tq2_0_bytes(t));
            out.extend(one);
        }),
        _ => {
            trits.as_chunks::<I2>().0.iter().for_each(|t| out.extend(i2_s_bytes(t)));
            out.extend(scale.to_le_bytes());
            out.resize(out.len() + I2_TAIL - 4, 0);
        }
    }
    Ok(out)
}

/// The ternary values and the scale `s` of floats that are all -s, 0 or s, as
/// converters write a ternary model in a float type. All zeros: a scale of 1.
///
/// # Errors
/// The first value that is another.
pub fn trits_of_floats(values: &[f32]) -> Result<(Vec<i8>, f32), BlockError> {
    let scale = values.iter().find(|x| **x != 0.0).map_or(1.0, |x| x.abs());
    let trit = |(at, &x): (usize, &f32)| match x {
        0.0 => Ok(0),
        x if x == scale => Ok(1),
        x if x == -scale => Ok(-1),
        found => Err(BlockError::Value { at, found, scale }),
    };
    let trits = values.iter().enumerate().map(trit).collect::<Result<_, _>>()?;
    Ok((trits, scale))
}

fn check_length(
    ty: GgmlType,
    bytes: &[u8],
    elements: usize,
    i2s: I2sLayout,
) -> Result<(), BlockError> {
    let (block, width, tail) = match ty {
        GgmlType::TQ1_0 => (TQ, TQ1_BYTES, 0),
        GgmlType::TQ2_0 => (TQ, TQ2_BYTES, 0),
        GgmlType::I2_S => (i2s.block(), i2s.block() / 4, I2_TAIL),
        _ => return Err(BlockError::Type(ty)),
    };
    let whole = elements.is_multiple_of(block) && elements / block * width + tail == bytes.len();
    if whole { Ok(()) } else { Err(BlockError::Length { ty, elements, found: bytes.len() }) }
}

/// All blocks of a TQ type, `d` at byte `at` of each; the scale they agree on.
fn tq<const B: usize>(
    ty: GgmlType,
    bytes: &[u8],
    trits: &mut [i8],
    codes: impl Fn(&[u8; B], &mut [i8; TQ]),
    at: usize,
) -> Result<f32, BlockError> {
    let mut scale: Option<f32> = None;
    let mut first = 0.0;
    for (i, (block, out)) in
        bytes.as_chunks::<B>().0.iter().zip(trits.as_chunks_mut::<TQ>().0).enumerate()
    {
        codes(block, out);
        subtract_one(ty, i * TQ, out)?;
        let d = half_at(block, at);
        if i == 0 {
            first = d;
        }
        if out.iter().all(|t| *t == 0) {
            continue;
        }
        match scale {
            None => scale = Some(d),
            Some(expected) if expected == d => {}
            Some(expected) => {
                return Err(BlockError::Scales { at: i * TQ, found: d, expected });
            }
        }
    }
    Ok(scale.unwrap_or(first))
}

/// Codes to ternary values.
fn subtract_one(ty: GgmlType, first: usize, codes: &mut [i8]) -> Result<(), BlockError> {
    if let Some(at) = codes.iter().position(|c| *c == 3) {
        return Err(BlockError::Code { ty, at: first + at });
    }
    codes.iter_mut().for_each(|c| *c -= 1);
    Ok(())
}

/// Powers of three, modulo 256: the digits of a byte are taken from the top.
const POWERS: [u8; 5] = [1, 3, 9, 27, 81];

/// Digit `n` of a byte that holds `⌈number · 256 / 243⌉`, the first digit first.
fn digit(byte: u8, n: usize) -> i8 {
    ((u16::from(byte.wrapping_mul(POWERS[n])) * 3) >> 8) as i8
}

/// The byte of five digits, the first the most significant.
fn five(digits: impl Iterator<Item = i8>) -> u8 {
    let number = digits.fold(0u16, |q, t| q * 3 + (t + 1) as u16);
    // At most 242 · 256 + 242, which fits.
    (number * 256).div_ceil(243) as u8
}

fn tq1_0_codes(block: &[u8; TQ1_BYTES], out: &mut [i8; TQ]) {
    for n in 0..5 {
        for m in 0..32 {
            out[m + 32 * n] = digit(block[m], n);
        }
        for m in 0..16 {
            out[160 + m + 16 * n] = digit(block[32 + m], n);
        }
    }
    for n in 0..4 {
        for j in 0..4 {
            out[240 + j + 4 * n] = digit(block[48 + j], n);
        }
    }
}

fn tq1_0_bytes(t: &[i8; TQ]) -> [u8; TQ1_BYTES - 2] {
    std::array::from_fn(|i| match i {
        0..32 => five((0..5).map(|n| t[i + 32 * n])),
        32..48 => five((0..5).map(|n| t[160 + i - 32 + 16 * n])),
        // Four, and a fifth digit of zero (code, not value) below them.
        _ => five((0..4).map(|n| t[240 + i - 48 + 4 * n]).chain([-1])),
    })
}

/// Half `h` of a block lies in 32 bytes: element `m + 32n` in bits `2n` of byte `m`.
fn tq2_0_codes(block: &[u8; TQ2_BYTES], out: &mut [i8; TQ]) {
    for (i, code) in out.iter_mut().enumerate() {
        let (half, n, m) = (i / 128, i % 128 / 32, i % 32);
        *code = (block[32 * half + m] >> (2 * n) & 3) as i8;
    }
}

fn tq2_0_bytes(t: &[i8; TQ]) -> [u8; TQ2_BYTES - 2] {
    std::array::from_fn(|i| {
        let first = i / 32 * 128 + i % 32;
        (0..4).fold(0, |byte, n| byte | ((t[first + 32 * n] + 1) as u8) << (2 * n))
    })
}

/// [`I2sLayout::X86`]: byte `p` holds elements p, p + 32, p + 64, p + 96, the first
/// at the top.
fn i2_s_bytes(t: &[i8; I2]) -> [u8; I2 / 4] {
    std::array::from_fn(|p| {
        (0..4).fold(0, |byte, n| byte | ((t[p + 32 * n] + 1) as u8) << (6 - 2 * n))
    })
}

pub(super) fn tq1_0_floats(block: &[u8; TQ1_BYTES], out: &mut [f32; TQ]) {
    let mut codes = [0; TQ];
    tq1_0_codes(block, &mut codes);
    floats(&codes, half_at(block, TQ1_BYTES - 2), out);
}

pub(super) fn tq2_0_floats(block: &[u8; TQ2_BYTES], out: &mut [f32; TQ]) {
    let mut codes = [0; TQ];
    tq2_0_codes(block, &mut codes);
    floats(&codes, half_at(block, TQ2_BYTES - 2), out);
}

/// As llama.cpp: a code of 3 is the value 2.
fn floats(codes: &[i8; TQ], d: f32, out: &mut [f32; TQ]) {
    for (x, c) in out.iter_mut().zip(codes) {
        *x = f32::from(c - 1) * d;
    }
}

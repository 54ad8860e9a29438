//! The data of GGUF tensors: blocks of every type that models here are made of,
//! to floats or ternary values, and ternary values to blocks.
//!
//! Layouts: `ggml-quants.c` of llama.cpp, and `ggml-bitnet` of bitnet.cpp for
//! I2_S, which is written in the layout of the x86 builds and read in that or the
//! ARM builds' ([`I2sLayout`]): they stand under one number, and nothing in a file
//! tells them apart.

mod quants;
mod rows;
mod ternary;

use half::{bf16, f16};

use super::GgmlType;

pub use rows::RowType;
pub use ternary::{I2sLayout, decode_ternary, encode_ternary, trits_of_floats};

/// Data that cannot be decoded or encoded.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum BlockError {
    /// A type without a codec.
    #[error("type {0} cannot be read here")]
    Type(GgmlType),
    /// Bytes that are not whole blocks of the elements.
    #[error("{found} bytes for {elements} elements of {ty}")]
    Length { ty: GgmlType, elements: usize, found: usize },
    /// A code that stands for no ternary value.
    #[error("element {at}: a code of 3, which is no ternary value (in this layout of {ty})")]
    Code { ty: GgmlType, at: usize },
    /// Blocks with scales of their own.
    #[error(
        "the block of element {at} has the scale {found}, earlier ones {expected}: a ternary \
         matrix has one scale"
    )]
    Scales { at: usize, found: f32, expected: f32 },
    /// A scale that no quantiser writes.
    #[error("a scale of {0}")]
    Scale(f32),
    /// A value that is not one of -s, 0 and s.
    #[error("element {at} is {found}: the values are not -{scale}, 0 and {scale}")]
    Value { at: usize, found: f32, scale: f32 },
}

/// Decodes whole blocks to floats, `out.len()` of them.
///
/// # Errors
/// A type other than F32, F16, BF16, Q8_0, Q6_K, Q4_K, Q4_0, TQ1_0 and TQ2_0, or
/// bytes that are not whole blocks of that many elements.
pub fn decode(ty: GgmlType, bytes: &[u8], out: &mut [f32]) -> Result<(), BlockError> {
    let wrong = || BlockError::Length { ty, elements: out.len(), found: bytes.len() };
    let size = ty.size().filter(|s| s.tail == 0).ok_or(BlockError::Type(ty))?;
    let (elements, width) = (size.elements as usize, size.bytes as usize);
    if !out.len().is_multiple_of(elements) || out.len() / elements * width != bytes.len() {
        return Err(wrong());
    }
    match ty {
        GgmlType::F32 => each(bytes, out, f32::from_le_bytes),
        GgmlType::F16 => each(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
        GgmlType::BF16 => each(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
        GgmlType::Q4_0 => blocks(bytes, out, quants::q4_0),
        GgmlType::Q8_0 => blocks(bytes, out, quants::q8_0),
        GgmlType::Q4_K => blocks(bytes, out, quants::q4_k),
        GgmlType::Q6_K => blocks(bytes, out, quants::q6_k),
        GgmlType::TQ1_0 => blocks(bytes, out, ternary::tq1_0_floats),
        GgmlType::TQ2_0 => blocks(bytes, out, ternary::tq2_0_floats),
        GgmlType::I8 | GgmlType::I2_S | GgmlType::Unknown(_) => return Err(BlockError::Type(ty)),
    }
    Ok(())
}

/// Types of one element a block.
fn each<const B: usize>(bytes: &[u8], out: &mut [f32], value: impl Fn([u8; B]) -> f32) {
    for (x, b) in out.iter_mut().zip(bytes.as_chunks::<B>().0) {
        *x = value(*b);
    }
}

/// Types of `N` elements in `B` bytes.
fn blocks<const B: usize, const N: usize>(
    bytes: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; B], &mut [f32; N]),
) {
    for (block, out) in bytes.as_chunks::<B>().0.iter().zip(out.as_chunks_mut::<N>().0) {
        decode(block, out);
    }
}

/// The half-precision number at byte `at` of a block.
fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

#[cfg(test)]
mod tests;

//! Floats to the blocks in which the linear layers of a dense model take little room.
//!
//! A block is 32 weights of a row with one scale, a half. A scale of its own for each
//! block is the round-to-nearest quantisation of llama.cpp's Q8_0 and Q4_0; here the
//! integers are rounded by the scale as it is stored, ties to even.

use half::f16;

use super::{BlockError, GgmlType, decode};

/// Weights of a block.
const BLOCK: usize = 32;

/// Integers with a scale for each 32 weights of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowType {
    /// -127 to 127, the scale being the largest magnitude / 127: 8.5 bits a weight
    /// (Q8_0).
    Int8,
    /// -8 to 7, the scale being the weight of the largest magnitude / -8: 4.5 bits a
    /// weight (Q4_0).
    Int4,
}

impl RowType {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Int8, Self::Int4];

    /// The name in options.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Int8 => "int8",
            Self::Int4 => "int4",
        }
    }

    /// The type in GGUF files.
    #[must_use]
    pub fn ggml(self) -> GgmlType {
        match self {
            Self::Int8 => GgmlType::Q8_0,
            Self::Int4 => GgmlType::Q4_0,
        }
    }

    /// That of a type in GGUF files.
    #[must_use]
    pub fn of(ty: GgmlType) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.ggml() == ty)
    }

    /// Whether a row of `cols` weights is whole blocks.
    #[must_use]
    pub fn fits(self, cols: usize) -> bool {
        cols.is_multiple_of(BLOCK)
    }

    /// Bytes of a row of `cols` weights, whole blocks.
    #[must_use]
    pub fn row_bytes(self, cols: usize) -> usize {
        cols / BLOCK * self.ggml().size().map_or(0, |s| s.bytes as usize)
    }

    /// The blocks of whole rows. What was decoded from such blocks is encoded to the
    /// same values again.
    ///
    /// # Errors
    /// No whole blocks; weights that are not finite or too large for a scale.
    pub fn encode(self, values: &[f32]) -> Result<Vec<u8>, BlockError> {
        let (blocks, rest) = values.as_chunks::<BLOCK>();
        if !rest.is_empty() {
            let (ty, elements) = (self.ggml(), values.len());
            return Err(BlockError::Length { ty, elements, found: 0 });
        }
        let mut out = Vec::with_capacity(self.row_bytes(values.len()));
        for block in blocks {
            let largest = block.iter().fold(0.0f32, |m, &x| if x.abs() > m.abs() { x } else { m });
            let scale = match self {
                Self::Int8 => f16::from_f32(largest.abs() / 127.0),
                Self::Int4 => f16::from_f32(largest / -8.0),
            };
            if !scale.is_finite() || block.iter().any(|x| x.is_nan()) {
                return Err(BlockError::Scale(
                    largest / if self == Self::Int8 { 127.0 } else { 8.0 },
                ));
            }
            out.extend(scale.to_le_bytes());
            // Weights below the smallest half become zeros.
            let scale = scale.to_f32();
            let q = |x: f32, low: f32, high: f32| match scale {
                0.0 => 0.0,
                scale => (x / scale).round_ties_even().clamp(low, high),
            };
            match self {
                Self::Int8 => out.extend(block.iter().map(|&x| q(x, -127.0, 127.0) as i8 as u8)),
                Self::Int4 => {
                    let q = |x: f32| (q(x, -8.0, 7.0) + 8.0) as u8;
                    out.extend((0..BLOCK / 2).map(|j| q(block[j]) | q(block[j + BLOCK / 2]) << 4));
                }
            }
        }
        Ok(out)
    }

    /// The values that whole rows have once they are encoded.
    ///
    /// # Errors
    /// As [`RowType::encode`].
    pub fn rounded(self, values: &[f32]) -> Result<Vec<f32>, BlockError> {
        let mut out = vec![0.0; values.len()];
        decode(self.ggml(), &self.encode(values)?, &mut out)?;
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Largest error of a weight in scales: half a step, and for 4 bits, whose
    /// integers end at 7 on one side, a whole one.
    fn bound(ty: RowType) -> f32 {
        if ty == RowType::Int8 { 0.5 } else { 1.0 }
    }

    proptest! {
        #[test]
        fn values_are_near_and_stay(
            values in proptest::collection::vec(-4.0f32..4.0, 96),
            exponent in -8i32..12,
        ) {
            let values: Vec<f32> = values.iter().map(|x| x * 2.0f32.powi(exponent)).collect();
            for ty in RowType::ALL {
                let once = ty.rounded(&values).unwrap();
                for (block, once) in values.chunks(32).zip(once.chunks(32)) {
                    let largest = block.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                    // The scale itself is a half, off by 2^-11 at most, and seven of
                    // them are what a clamped weight becomes.
                    let step = largest / if ty == RowType::Int8 { 127.0 } else { 8.0 } * 1.005;
                    for (a, b) in block.iter().zip(once) {
                        let most = step * bound(ty) + 127.0 * 3e-8;
                        prop_assert!((a - b).abs() <= most, "{ty:?}: {a} {b}");
                    }
                }
                prop_assert_eq!(ty.rounded(&once).unwrap(), once);
            }
        }
    }

    #[test]
    fn blocks_are_those_of_the_definition() {
        let mut values = [0.0f32; 32];
        (values[0], values[1], values[16], values[31]) = (-127.0, 63.5, 2.5, 127.0);
        let bytes = RowType::Int8.encode(&values).unwrap();
        assert_eq!(bytes[..2], f16::ONE.to_le_bytes());
        let q: Vec<i8> = bytes[2..].iter().map(|b| *b as i8).collect();
        assert_eq!((q[0], q[1], q[16], q[31], q[2]), (-127, 64, 2, 127, 0));
        (values[0], values[1], values[16], values[31]) = (-8.0, 7.9, 2.5, 1.0);
        let bytes = RowType::Int4.encode(&values).unwrap();
        assert_eq!(bytes[..2], f16::ONE.to_le_bytes());
        // Elements j and j + 16 share a byte.
        assert_eq!((bytes[2], bytes[3], bytes[17]), (0xa0, 0x8f, 0x98));
        assert_eq!(RowType::Int4.rounded(&values).unwrap()[1], 7.0);
        assert_eq!(RowType::Int8.encode(&[0.0; 32]).unwrap(), [0; 34]);
        assert_eq!(RowType::of(GgmlType::Q4_0), Some(RowType::Int4));
        assert_eq!(RowType::of(GgmlType::F16), None);
    }

    #[test]
    fn what_has_no_blocks_is_refused() {
        for ty in RowType::ALL {
            assert!(matches!(ty.encode(&[0.0; 33]), Err(BlockError::Length { .. })));
            assert!(!ty.fits(48) && ty.fits(64));
            for bad in [f32::NAN, f32::INFINITY, 1e30] {
                let mut values = [1.0; 32];
                values[5] = bad;
                assert!(matches!(ty.encode(&values), Err(BlockError::Scale(_))), "{bad}");
            }
        }
    }
}

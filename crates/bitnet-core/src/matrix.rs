//! Packed ternary matrices: the byte layouts that a packed model stores.
//!
//! A row is padded to whole 64-byte blocks with code 1 (zero weight), so a row
//! starts at a multiple of 64 bytes and any instruction set reads whole vectors.

use serde::{Deserialize, Serialize};

/// How the codes (ternary value + 1) of a row are laid out in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// 2 bits a weight: 256 weights in a 64-byte block. Weight `64p + j` of a
    /// block sits in bits `2p..2p+2` of byte `j`.
    P2,
    /// 1.6 bits a weight: 320 weights in a 64-byte block. Weight `64p + j` of a
    /// block is code `p` of byte `j`; see [`p5_byte`].
    ///
    /// The codes `c0..c4` of a byte are looked up, not divided out: of the number
    /// `quad = c0 + 3·c1 + 9·c2 + 27·c3`, those below 64 stand in the low six bits
    /// with `c4` (never 3) above; the others are `0b11` above
    /// `(quad - 64)·3 + c4`, 51 states in six bits.
    P5,
}

/// Bytes of a block in every layout.
pub const BLOCK_BYTES: usize = 64;

impl Layout {
    /// Every layout.
    pub const ALL: [Self; 2] = [Self::P2, Self::P5];

    /// The name in files and options.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::P2 => "p2",
            Self::P5 => "p5",
        }
    }

    /// The layout of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|l| l.name() == name)
    }

    /// Weights in a block.
    #[must_use]
    pub const fn block_weights(self) -> usize {
        match self {
            Self::P2 => 256,
            Self::P5 => 320,
        }
    }

    /// `cols` rounded up to whole blocks: how many activations a kernel reads.
    #[must_use]
    pub const fn padded_cols(self, cols: usize) -> usize {
        cols.div_ceil(self.block_weights()) * self.block_weights()
    }

    /// Bytes of a packed row of `cols` weights.
    #[must_use]
    pub const fn row_bytes(self, cols: usize) -> usize {
        cols.div_ceil(self.block_weights()) * BLOCK_BYTES
    }

    /// Packs one row of ternary values; `out` has [`Layout::row_bytes`] bytes.
    pub fn pack_row(self, trits: &[i8], out: &mut [u8]) {
        let block = self.block_weights();
        for (b, bytes) in out.chunks_exact_mut(BLOCK_BYTES).enumerate() {
            // Padding holds the zero weight, code 1.
            let code = |i: usize| trits.get(b * block + i).map_or(1, |&t| (t + 1) as u8);
            for (j, byte) in bytes.iter_mut().enumerate() {
                let codes = std::array::from_fn(|p| code(64 * p + j));
                *byte = match self {
                    Self::P2 => (0..4).fold(0, |acc, p| acc | codes[p] << (2 * p)),
                    Self::P5 => p5_byte(codes),
                };
            }
        }
    }

    /// Unpacks one row into `trits.len()` = cols ternary values.
    ///
    /// # Errors
    /// The first byte that no packing produces, with its position in the row.
    pub fn unpack_row(self, bytes: &[u8], trits: &mut [i8]) -> Result<(), MatrixError> {
        let block = self.block_weights();
        for (b, bytes) in bytes.chunks_exact(BLOCK_BYTES).enumerate() {
            for (j, &byte) in bytes.iter().enumerate() {
                let codes = match self {
                    Self::P2 => p2_codes(byte),
                    Self::P5 => p5_codes(byte),
                };
                let refuse = MatrixError::Code { byte, at: b * BLOCK_BYTES + j };
                let Some(codes) = codes else { return Err(refuse) };
                for (p, &code) in codes[..block / 64].iter().enumerate() {
                    match trits.get_mut(b * block + 64 * p + j) {
                        Some(t) => *t = code as i8 - 1,
                        None if code == 1 => {}
                        None => return Err(refuse),
                    }
                }
            }
        }
        Ok(())
    }
}

/// The four codes of a byte of layout P2 (and a fifth place, unused).
const fn p2_codes(byte: u8) -> Option<[u8; 5]> {
    let codes = [byte & 3, byte >> 2 & 3, byte >> 4 & 3, byte >> 6, 1];
    let none_is_3 = codes[0] < 3 && codes[1] < 3 && codes[2] < 3 && codes[3] < 3;
    if none_is_3 { Some(codes) } else { None }
}

/// Five codes as one byte of layout P5.
#[must_use]
pub const fn p5_byte(codes: [u8; 5]) -> u8 {
    let quad = codes[0] + 3 * codes[1] + 9 * codes[2] + 27 * codes[3];
    if quad < 64 { codes[4] << 6 | quad } else { 0b11 << 6 | ((quad - 64) * 3 + codes[4]) }
}

/// The five codes of a byte of layout P5; `None` where no packing gives it.
#[must_use]
pub const fn p5_codes(byte: u8) -> Option<[u8; 5]> {
    let (top, low) = (byte >> 6, byte & 63);
    let (quad, last) = if top < 3 { (low, top) } else { (64 + low / 3, low % 3) };
    if quad > 80 {
        return None;
    }
    Some([quad % 3, quad / 3 % 3, quad / 9 % 3, quad / 27, last])
}

/// A packed matrix that cannot be made or read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MatrixError {
    /// The slice does not hold the shape.
    #[error("a [{rows}, {cols}] matrix needs {expected} elements or bytes, found {found}")]
    Size {
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        cols: usize,
        /// What the shape needs.
        expected: usize,
        /// What was given.
        found: usize,
    },
    /// A value outside {-1, 0, 1}.
    #[error("row {row}, column {col}: {value} is not a ternary value")]
    Value {
        /// Row of the value.
        row: usize,
        /// Column of the value.
        col: usize,
        /// The value.
        value: i8,
    },
    /// A byte that no packing produces.
    #[error("byte {at} of a row: {byte:#04x} is not a packed ternary code")]
    Code {
        /// The byte.
        byte: u8,
        /// Its position in the row.
        at: usize,
    },
}

/// A ternary matrix `[rows, cols]` in packed form, with its weight scale.
#[derive(Debug, Clone, PartialEq)]
pub struct TernaryMatrix {
    /// Rows: outputs of the layer.
    pub rows: usize,
    /// Columns: inputs of the layer.
    pub cols: usize,
    /// Byte layout of `bytes`.
    pub layout: Layout,
    /// Multiplies the ternary value to give the real weight.
    pub weight_scale: f32,
    /// `rows` rows of [`Layout::row_bytes`] bytes.
    pub bytes: Vec<u8>,
}

impl TernaryMatrix {
    /// Packs ternary values.
    ///
    /// # Shapes
    /// `trits` is `[rows, cols]`, row-major.
    ///
    /// # Errors
    /// A slice of another size, or a value outside {-1, 0, 1}.
    pub fn pack(
        layout: Layout,
        rows: usize,
        cols: usize,
        trits: &[i8],
        weight_scale: f32,
    ) -> Result<Self, MatrixError> {
        if trits.len() != rows * cols || cols == 0 {
            let (expected, found) = (rows * cols, trits.len());
            return Err(MatrixError::Size { rows, cols, expected, found });
        }
        if let Some(at) = trits.iter().position(|t| !(-1..=1).contains(t)) {
            let (row, col) = (at / cols, at % cols);
            return Err(MatrixError::Value { row, col, value: trits[at] });
        }
        let row_bytes = layout.row_bytes(cols);
        let mut bytes = vec![0u8; rows * row_bytes];
        for (row, out) in trits.chunks_exact(cols).zip(bytes.chunks_exact_mut(row_bytes)) {
            layout.pack_row(row, out);
        }
        Ok(Self { rows, cols, layout, weight_scale, bytes })
    }

    /// Quantises master weights with the one definition and packs them.
    ///
    /// # Errors
    /// See [`TernaryMatrix::pack`].
    pub fn quantize(
        layout: Layout,
        rows: usize,
        cols: usize,
        weights: &[f32],
    ) -> Result<Self, MatrixError> {
        let (trits, scale) = crate::ternary::quantize_weights(weights, cols);
        Self::pack(layout, rows, cols, &trits, scale)
    }

    /// The ternary values, `[rows, cols]`.
    ///
    /// # Errors
    /// A byte that no packing produces.
    pub fn unpack(&self) -> Result<Vec<i8>, MatrixError> {
        let mut trits = vec![0i8; self.rows * self.cols];
        let row_bytes = self.layout.row_bytes(self.cols);
        let rows = self.bytes.chunks_exact(row_bytes);
        for (bytes, row) in rows.zip(trits.chunks_exact_mut(self.cols)) {
            self.layout.unpack_row(bytes, row)?;
        }
        Ok(trits)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn unpack_undoes_pack(
            rows in 1usize..4,
            cols in prop_oneof![1usize..700, Just(255), Just(256), Just(257), Just(320)],
            seed in any::<u64>(),
        ) {
            let mut state = seed | 1;
            let trits: Vec<i8> = (0..rows * cols).map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 33) as i8 as i32 as u8 as i8 % 2
            }).collect();
            for layout in Layout::ALL {
                let m = TernaryMatrix::pack(layout, rows, cols, &trits, 0.5).unwrap();
                prop_assert_eq!(m.bytes.len(), rows * layout.row_bytes(cols));
                prop_assert_eq!(m.unpack().unwrap(), trits.clone());
            }
        }
    }

    #[test]
    fn p2_puts_weight_64p_j_in_bits_2p_of_byte_j() {
        let mut trits = vec![0i8; 256];
        trits[64 * 3 + 5] = 1;
        trits[64 + 7] = -1;
        let m = TernaryMatrix::pack(Layout::P2, 1, 256, &trits, 1.0).unwrap();
        assert_eq!(m.bytes[0], 0b01_01_01_01);
        assert_eq!(m.bytes[5], 0b10_01_01_01);
        assert_eq!(m.bytes[7], 0b01_01_00_01);
    }

    #[test]
    fn p5_gives_every_five_codes_a_byte_of_their_own() {
        let mut seen = [false; 256];
        for n in 0..243u8 {
            let codes = [n % 3, n / 3 % 3, n / 9 % 3, n / 27 % 3, n / 81];
            let byte = p5_byte(codes);
            assert_eq!(p5_codes(byte), Some(codes));
            assert!(!std::mem::replace(&mut seen[usize::from(byte)], true));
        }
        for byte in 0..=255u8 {
            assert_eq!(p5_codes(byte).is_some(), seen[usize::from(byte)]);
        }
    }

    #[test]
    fn p5_puts_weight_64p_j_in_code_p_of_byte_j() {
        let mut trits = vec![0i8; 320];
        trits[64 * 4 + 5] = 1;
        trits[64 * 3 + 7] = 1;
        let m = TernaryMatrix::pack(Layout::P5, 1, 320, &trits, 1.0).unwrap();
        assert_eq!(m.bytes[0], p5_byte([1; 5]));
        assert_eq!(m.bytes[5], p5_byte([1, 1, 1, 1, 2]));
        assert_eq!(m.bytes[7], p5_byte([1, 1, 1, 2, 1]));
        assert_eq!(m.bytes.len(), 64);
    }

    #[test]
    fn refuses_what_is_not_ternary() {
        let size = TernaryMatrix::pack(Layout::P2, 2, 3, &[0; 5], 1.0).unwrap_err();
        assert!(size.to_string().contains("[2, 3]"));
        let value = TernaryMatrix::pack(Layout::P2, 2, 2, &[0, 1, -2, 0], 1.0).unwrap_err();
        assert_eq!(value, MatrixError::Value { row: 1, col: 0, value: -2 });
        let mut m = TernaryMatrix::pack(Layout::P2, 1, 2, &[0, 1], 1.0).unwrap();
        m.bytes[9] = 0xff;
        assert_eq!(m.unpack().unwrap_err(), MatrixError::Code { byte: 0xff, at: 9 });
        for layout in Layout::ALL {
            let mut m = TernaryMatrix::pack(layout, 1, 2, &[0, 1], 1.0).unwrap();
            // A padding weight that is not zero.
            m.bytes[9] = TernaryMatrix::pack(layout, 1, 10, &[1; 10], 1.0).unwrap().bytes[9];
            assert!(matches!(m.unpack(), Err(MatrixError::Code { at: 9, .. })));
        }
    }
}

//! Tensor types by their number in a GGUF file, with the size of a block.

use std::fmt;

/// The type of a tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, reason = "the names that every GGUF tool prints")]
#[allow(missing_docs, reason = "the name is all there is to say")]
pub enum GgmlType {
    F32,
    F16,
    Q4_0,
    Q8_0,
    Q4_K,
    Q6_K,
    I8,
    BF16,
    TQ1_0,
    TQ2_0,
    /// Of bitnet.cpp; upstream llama.cpp gave the number up, so a newer file of
    /// another architecture may mean something else by it.
    I2_S,
    /// A number this table does not hold: listed, never read.
    Unknown(u32),
}

/// How the size of a tensor follows from its elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TypeSize {
    /// Elements in a block; a tensor's first dimension is a multiple of it.
    pub elements: u64,
    /// Bytes of a block.
    pub bytes: u64,
    /// Bytes that follow the last block.
    pub tail: u64,
}

/// Number, name, and elements and bytes of a block, plus the tail of the tensor.
const TABLE: [(GgmlType, u32, &str, TypeSize); 11] = [
    (GgmlType::F32, 0, "F32", size(1, 4)),
    (GgmlType::F16, 1, "F16", size(1, 2)),
    (GgmlType::Q4_0, 2, "Q4_0", size(32, 18)),
    (GgmlType::Q8_0, 8, "Q8_0", size(32, 34)),
    (GgmlType::Q4_K, 12, "Q4_K", size(256, 144)),
    (GgmlType::Q6_K, 14, "Q6_K", size(256, 210)),
    (GgmlType::I8, 24, "I8", size(1, 1)),
    (GgmlType::BF16, 30, "BF16", size(1, 2)),
    (GgmlType::TQ1_0, 34, "TQ1_0", size(256, 54)),
    (GgmlType::TQ2_0, 35, "TQ2_0", size(256, 66)),
    // Codes of the whole tensor, then an f32 scale and padding: 32 bytes.
    (GgmlType::I2_S, 36, "I2_S", TypeSize { elements: 4, bytes: 1, tail: 32 }),
];

const fn size(elements: u64, bytes: u64) -> TypeSize {
    TypeSize { elements, bytes, tail: 0 }
}

impl GgmlType {
    /// The type of that number.
    #[must_use]
    pub fn from_id(id: u32) -> Self {
        TABLE.iter().find(|row| row.1 == id).map_or(Self::Unknown(id), |row| row.0)
    }

    /// The number in files.
    #[must_use]
    pub fn id(self) -> u32 {
        match (self, self.row()) {
            (Self::Unknown(id), _) => id,
            (_, Some(row)) => row.1,
            (_, None) => u32::MAX,
        }
    }

    /// The block's size; none for an unknown type.
    #[must_use]
    pub fn size(self) -> Option<TypeSize> {
        self.row().map(|row| row.3)
    }

    /// Bytes of a tensor of these dimensions, the first running fastest.
    ///
    /// # Errors
    /// Why there is no such tensor, as text: an unknown type, a row that is not
    /// whole blocks, or a size beyond 64 bits.
    pub fn tensor_bytes(self, dims: &[u64]) -> Result<u64, String> {
        let size = self.size().ok_or_else(|| format!("type {self} is not known"))?;
        let row = dims.first().copied().unwrap_or(1);
        if !row.is_multiple_of(size.elements) {
            return Err(format!(
                "{row} elements in a row of {self}, in blocks of {}",
                size.elements
            ));
        }
        dims.iter()
            .try_fold(1u64, |n, &d| n.checked_mul(d))
            .and_then(|n| (n / size.elements).checked_mul(size.bytes))
            .and_then(|n| n.checked_add(size.tail))
            .ok_or_else(|| format!("the size of {dims:?} does not fit 64 bits"))
    }

    fn row(self) -> Option<&'static (Self, u32, &'static str, TypeSize)> {
        TABLE.iter().find(|row| row.0 == self)
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.row(), self) {
            (Some(row), _) => f.write_str(row.2),
            (None, Self::Unknown(id)) => write!(f, "unknown({id})"),
            (None, other) => write!(f, "{other:?}"),
        }
    }
}

//! Quantised tokens and packed ternary rows: the operands of the integer product.

use bitnet_core::Layout;

/// Packed ternary rows `[rows, cols]`, as they lie in a packed model.
#[derive(Debug, Clone, Copy)]
pub struct TernaryRows<'a> {
    /// Byte layout.
    pub layout: Layout,
    /// Columns, without padding.
    pub cols: usize,
    /// Multiplies the ternary value to give the real weight.
    pub weight_scale: f32,
    /// Whole rows of [`Layout::row_bytes`] bytes.
    pub bytes: &'a [u8],
}

impl<'a> TernaryRows<'a> {
    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len() / self.layout.row_bytes(self.cols).max(1)
    }

    /// Whether there is no row.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Rows `start..end`.
    ///
    /// # Panics
    /// If the range is outside the matrix.
    #[must_use]
    pub fn rows(&self, start: usize, end: usize) -> TernaryRows<'a> {
        let row = self.layout.row_bytes(self.cols);
        TernaryRows { bytes: &self.bytes[start * row..end * row], ..*self }
    }
}

/// Int8 activations of some tokens, borrowed.
#[derive(Debug, Clone, Copy)]
pub struct TokensRef<'a> {
    /// `[tokens, stride]`, zero behind the columns.
    pub q: &'a [i8],
    /// Elements from one token to the next; a multiple of 64 that covers every
    /// layout's padding ([`QuantizedTokens::stride`]).
    pub stride: usize,
    /// Sum of each token's integers.
    pub sums: &'a [i32],
    /// `act_scale` of each token.
    pub scales: &'a [f32],
}

impl<'a> TokensRef<'a> {
    /// Number of tokens.
    #[must_use]
    pub fn len(&self) -> usize {
        self.scales.len()
    }

    /// Whether there is no token.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.scales.is_empty()
    }

    /// The integers of one token, padding included.
    #[must_use]
    pub fn token(&self, t: usize) -> &'a [i8] {
        &self.q[t * self.stride..(t + 1) * self.stride]
    }

    /// Tokens `start..end`.
    #[must_use]
    pub fn tokens(&self, start: usize, end: usize) -> TokensRef<'a> {
        TokensRef {
            q: &self.q[start * self.stride..end * self.stride],
            stride: self.stride,
            sums: &self.sums[start..end],
            scales: &self.scales[start..end],
        }
    }
}

/// Owned int8 activations; the buffer is reused from product to product.
#[derive(Debug, Default)]
pub struct QuantizedTokens {
    /// `[tokens, stride]`.
    pub q: Vec<i8>,
    /// See [`TokensRef::stride`].
    pub stride: usize,
    /// Sum of each token's integers.
    pub sums: Vec<i32>,
    /// `act_scale` of each token.
    pub scales: Vec<f32>,
}

impl QuantizedTokens {
    /// The stride for `cols` columns: the largest padding of any layout.
    #[must_use]
    pub fn stride(cols: usize) -> usize {
        Layout::ALL.iter().map(|l| l.padded_cols(cols)).max().unwrap_or(cols)
    }

    /// Makes room for `tokens` tokens of `cols` columns. Allocates only when the
    /// buffer has never been as large.
    pub fn resize(&mut self, tokens: usize, cols: usize) {
        self.stride = Self::stride(cols);
        self.q.resize(tokens * self.stride, 0);
        self.sums.resize(tokens, 0);
        self.scales.resize(tokens, 0.0);
    }

    /// The tokens, borrowed.
    #[must_use]
    pub fn view(&self) -> TokensRef<'_> {
        TokensRef { q: &self.q, stride: self.stride, sums: &self.sums, scales: &self.scales }
    }
}

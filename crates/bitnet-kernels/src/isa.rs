//! The choice of instruction set, and the operations every one of them offers.

use bitnet_core::ternary::{self, dequantize};

use crate::attention::{self, KvElement};
use crate::dense::{self, DenseRows};
use crate::float;
use crate::mat::MatMut;
use crate::ternary::{TernaryRows, TokensRef, row_sum};

/// An instruction set with kernels of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// Plain Rust, on every machine.
    Portable,
}

/// An instruction set that cannot be used here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IsaError {
    /// No such name.
    #[error("unknown instruction set `{name}`; known: {known}")]
    Unknown {
        /// The name asked for.
        name: String,
        /// The names there are.
        known: String,
    },
    /// The machine lacks it.
    #[error("instruction set `{name}` is not available on this machine; available: {available}")]
    Missing {
        /// The name asked for.
        name: String,
        /// What this machine has.
        available: String,
    },
}

/// The kernels of one instruction set that this machine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kernels {
    isa: Isa,
}

impl Kernels {
    /// The fastest instruction set of this machine.
    #[must_use]
    pub fn detect() -> Self {
        Self { isa: Isa::Portable }
    }

    /// Every instruction set of this machine, the fastest first.
    #[must_use]
    pub fn all() -> Vec<Self> {
        vec![Self { isa: Isa::Portable }]
    }

    /// The instruction set of that name.
    ///
    /// # Errors
    /// An unknown name, or a set that this machine lacks.
    pub fn by_name(name: &str) -> Result<Self, IsaError> {
        if name == "portable" {
            return Ok(Self { isa: Isa::Portable });
        }
        Err(IsaError::Unknown { name: name.to_owned(), known: "portable".to_owned() })
    }

    /// The set named in the environment variable `BITNET_ISA`, else [`Kernels::detect`].
    ///
    /// # Errors
    /// See [`Kernels::by_name`].
    pub fn from_env() -> Result<Self, IsaError> {
        match std::env::var("BITNET_ISA") {
            Ok(name) if !name.is_empty() => Self::by_name(&name),
            _ => Ok(Self::detect()),
        }
    }

    /// The name, as in `BITNET_ISA` and in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self.isa {
            Isa::Portable => "portable",
        }
    }

    /// Quantises one token to int8, zeroes the padding behind it and returns
    /// (`act_scale`, sum of the integers). Equals
    /// [`ternary::quantize_activations`] bit for bit.
    ///
    /// # Panics
    /// If `q` is shorter than `x`.
    pub fn quantize(self, x: &[f32], q: &mut [i8]) -> (f32, i32) {
        let act_scale = ternary::quantize_activations(x, q);
        q[x.len()..].fill(0);
        (act_scale, q.iter().map(|&q| i32::from(q)).sum())
    }

    /// Integer sums of packed rows and tokens: `out[t, n] = Σ_k trit[n, k] · q[t, k]`.
    ///
    /// # Panics
    /// If the shapes do not fit: `out` is `[tokens, rows]`.
    pub fn ternary_sums(self, w: TernaryRows<'_>, x: TokensRef<'_>, mut out: MatMut<'_, i32>) {
        assert_eq!((out.rows(), out.cols()), (x.len(), w.len()), "[tokens, rows]");
        let row_bytes = w.layout.row_bytes(w.cols);
        for t in 0..x.len() {
            let q = x.token(t);
            for (o, row) in out.row(t).iter_mut().zip(w.bytes.chunks_exact(row_bytes)) {
                *o = row_sum(w.layout, row, q, x.sums[t]);
            }
        }
    }

    /// A BitLinear on quantised tokens:
    /// `out[t, n] = dequantize(sum[t, n], act_scale[t], weight_scale)`.
    ///
    /// # Panics
    /// If the shapes do not fit: `out` is `[tokens, rows]`.
    pub fn ternary_matmul(self, w: TernaryRows<'_>, x: TokensRef<'_>, mut out: MatMut<'_, f32>) {
        assert_eq!((out.rows(), out.cols()), (x.len(), w.len()), "[tokens, rows]");
        let row_bytes = w.layout.row_bytes(w.cols);
        for t in 0..x.len() {
            let q = x.token(t);
            for (o, row) in out.row(t).iter_mut().zip(w.bytes.chunks_exact(row_bytes)) {
                let sum = row_sum(w.layout, row, q, x.sums[t]);
                *o = dequantize(sum, x.scales[t], w.weight_scale);
            }
        }
    }

    /// RMSNorm of one token; returns `inv_rms`, which a backward pass needs.
    pub fn rms_norm(self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) -> f32 {
        float::rms_norm(x, weight, eps, out)
    }

    /// `out = silu(gate) · up`, elementwise.
    pub fn silu_mul(self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        float::silu_mul(gate, up, out);
    }

    /// `out = relu(gate)² · up`, elementwise.
    pub fn relu2_mul(self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        float::relu2_mul(gate, up, out);
    }

    /// Rotates one head `[C]` in place by `cos` and `sin` of `C/2` angles.
    pub fn rotate(self, head: &mut [f32], cos: &[f32], sin: &[f32]) {
        float::rotate(head, cos, sin);
    }

    /// `x += y`, elementwise.
    pub fn add_assign(self, x: &mut [f32], y: &[f32]) {
        float::add_assign(x, y);
    }

    /// Replaces logits by `e^(x - max)`; returns (max, their sum).
    pub fn exp_sum(self, x: &mut [f32]) -> (f32, f32) {
        float::exp_sum(x)
    }

    /// The dot product of two slices of one length, in the order of lanes.
    pub fn dot(self, a: &[f32], b: &[f32]) -> f32 {
        float::dot(a, b)
    }

    /// The sum of magnitudes of one row of master weights, in f64; equals
    /// [`ternary::row_abs_sum`] bit for bit.
    pub fn row_abs_sum(self, row: &[f32]) -> f64 {
        ternary::row_abs_sum(row)
    }

    /// Ternary values of one row of master weights; equals
    /// [`ternary::quantize_weight`] element for element.
    pub fn quantize_weight_row(self, row: &[f32], inv_weight_scale: f32, trits: &mut [i8]) {
        for (t, &w) in trits.iter_mut().zip(row) {
            *t = ternary::quantize_weight(w, inv_weight_scale);
        }
    }

    /// Attention of one query over the first `len` cached positions.
    ///
    /// # Shapes
    /// `q` and `out` are `[C]`; `key_blocks` as [`crate::store_key`] writes them;
    /// `values` is `[T, C]` with `T >= len`; `scores` is scratch of at least `len`
    /// rounded up to [`crate::KEY_BLOCK`].
    ///
    /// # Panics
    /// If a slice is too short or `len` is 0.
    #[expect(clippy::too_many_arguments, reason = "slices of one operation")]
    pub fn attend<E: KvElement>(
        self,
        q: &[f32],
        key_blocks: &[E],
        values: &[E],
        len: usize,
        scale: f32,
        scores: &mut [f32],
        out: &mut [f32],
    ) {
        assert!(len > 0, "attention over no position");
        attention::attend(q, key_blocks, values, len, scale, scores, out);
    }

    /// Dense rows times a float vector: `out[n] = rows[n] · x`.
    ///
    /// # Panics
    /// If `rows` does not hold `out.len()` rows of `x.len()` elements.
    pub fn dense_matvec(self, rows: DenseRows<'_>, x: &[f32], out: &mut [f32]) {
        assert_eq!(rows.len(), out.len() * x.len(), "dense rows");
        dense::matvec(rows, x, out);
    }
}

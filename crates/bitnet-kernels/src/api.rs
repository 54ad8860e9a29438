//! The operations that every instruction set offers, with their checks: each
//! method is decided once and runs compiled for its set.

use bitnet_core::Activation;
use bitnet_core::ternary::{self, dequantize};

use crate::attention::{
    self, AttendQuery, Head, KvElement, KvHead, KvHeadInt8Mut, attend_scores_len,
};
use crate::dense::{self, DenseRows};
use crate::float;
use crate::int4_rows::{self, Int4Rows};
use crate::isa::{Kernels, dispatch};
use crate::mat::MatMut;
use crate::product;
use crate::quantize;
use crate::ternary::{TernaryRows, TokensRef};

impl Kernels {
    /// Quantises one token to int8, zeroes the padding behind it and returns
    /// (`act_scale`, sum of the integers). Equals
    /// [`ternary::quantize_activations`] bit for bit.
    ///
    /// # Panics
    /// If `q` is shorter than `x`.
    pub fn quantize(self, x: &[f32], q: &mut [i8]) -> (f32, i32) {
        let (head, padding) = q.split_at_mut(x.len());
        padding.fill(0);
        dispatch!(self, _isa => quantize::activations(x, head))
    }

    /// Quantises the gradient of one token to int8, zeroes the padding behind it and
    /// returns (scale, sum of the integers). Unlike [`Kernels::quantize`] it knows no
    /// smallest scale: gradients are as small as they like. Where nothing but zeros,
    /// or an infinity, is found, all integers and the scale are zero.
    ///
    /// # Panics
    /// If `q` is shorter than `x`.
    pub fn quantize_gradient(self, x: &[f32], q: &mut [i8]) -> (f32, i32) {
        let (head, padding) = q.split_at_mut(x.len());
        padding.fill(0);
        dispatch!(self, _isa => quantize::gradients(x, head))
    }

    /// Integer sums of packed rows and tokens: `out[t, n] = Σ_k trit[n, k] · q[t, k]`.
    ///
    /// # Panics
    /// If the shapes do not fit: `out` is `[tokens, rows]`.
    pub fn ternary_sums(self, w: TernaryRows<'_>, x: TokensRef<'_>, out: MatMut<'_, i32>) {
        check_shapes(&w, &x, out.rows(), out.cols());
        dispatch!(self, isa => product::product(isa, w, x, out, #[inline(always)] |t, sum| {
            sum - x.sums[t]
        }));
    }

    /// A BitLinear on quantised tokens:
    /// `out[t, n] = dequantize(sum[t, n], act_scale[t], weight_scale)`.
    ///
    /// # Panics
    /// If the shapes do not fit: `out` is `[tokens, rows]`.
    pub fn ternary_matmul(self, w: TernaryRows<'_>, x: TokensRef<'_>, out: MatMut<'_, f32>) {
        check_shapes(&w, &x, out.rows(), out.cols());
        let scale = w.weight_scale;
        dispatch!(self, isa => product::product(isa, w, x, out, #[inline(always)] |t, sum| {
            dequantize(sum - x.sums[t], x.scales[t], scale)
        }));
    }

    /// RMSNorm of one token; returns `inv_rms`, which a backward pass needs.
    pub fn rms_norm(self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) -> f32 {
        dispatch!(self, isa => float::rms_norm(isa, x, weight, eps, out))
    }

    /// `1 / sqrt(mean(x²) + eps)`: what [`Kernels::rms_norm`] returns.
    pub fn inv_rms(self, x: &[f32], eps: f32) -> f32 {
        dispatch!(self, isa => float::inv_rms(isa, x, eps))
    }

    /// [`Kernels::rms_norm`] of one token, then [`Kernels::quantize`] of its output:
    /// the same bits in fewer passes. Returns (`act_scale`, sum of the integers)
    /// and zeroes the padding behind them.
    ///
    /// # Panics
    /// If `out` or `weight` is not as long as `x`, or `q` is shorter.
    pub fn rms_norm_quantize(
        self,
        x: &[f32],
        weight: &[f32],
        eps: f32,
        out: &mut [f32],
        q: &mut [i8],
    ) -> (f32, i32) {
        assert!(out.len() == x.len() && weight.len() == x.len(), "one width");
        let (head, padding) = q.split_at_mut(x.len());
        padding.fill(0);
        dispatch!(self, isa => float::rms_norm_quantize(isa, x, weight, eps, out, head))
    }

    /// The gated activation of one token, [`Kernels::rms_norm`] and
    /// [`Kernels::quantize`] of it: the same bits in fewer passes. `out` is the
    /// norm's output; returns as [`Kernels::rms_norm_quantize`].
    ///
    /// # Panics
    /// If `up`, `weight` or `out` is not as long as `gate`, or `q` is shorter.
    #[expect(clippy::too_many_arguments, reason = "slices of one operation")]
    pub fn gated_norm_quantize(
        self,
        act: Activation,
        gate: &[f32],
        up: &[f32],
        weight: &[f32],
        eps: f32,
        out: &mut [f32],
        q: &mut [i8],
    ) -> (f32, i32) {
        let inputs = [gate, up, weight];
        assert!(inputs.iter().all(|x| x.len() == out.len()), "one width");
        let (q, padding) = q.split_at_mut(out.len());
        padding.fill(0);
        match act {
            Activation::Relu2 => dispatch!(self, isa => {
                float::gated_norm_quantize(isa, float::gated_relu2, inputs, eps, out, q)
            }),
            Activation::Silu => dispatch!(self, isa => {
                float::gated_norm_quantize(isa, float::gated_silu, inputs, eps, out, q)
            }),
        }
    }

    /// `out = silu(gate) · up`, elementwise.
    pub fn silu_mul(self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        dispatch!(self, _isa => float::silu_mul(gate, up, out));
    }

    /// `out = relu(gate)² · up`, elementwise.
    pub fn relu2_mul(self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        dispatch!(self, _isa => float::relu2_mul(gate, up, out));
    }

    /// Rotates one head `[C]` in place by `cos` and `sin` of `C/2` angles.
    ///
    /// # Panics
    /// If the shapes do not fit.
    pub fn rotate(self, head: &mut [f32], cos: &[f32], sin: &[f32]) {
        assert_eq!((head.len(), sin.len()), (2 * cos.len(), cos.len()), "angles of a head");
        dispatch!(self, _isa => float::rotate(head, cos, sin));
    }

    /// `x += y`, elementwise.
    pub fn add_assign(self, x: &mut [f32], y: &[f32]) {
        dispatch!(self, _isa => float::add_assign(x, y));
    }

    /// Replaces logits by `e^(x - max)`; returns (max, their sum).
    pub fn exp_sum(self, x: &mut [f32]) -> (f32, f32) {
        dispatch!(self, isa => float::exp_sum(isa, x))
    }

    /// The dot product of two slices of one length, in the order of lanes.
    pub fn dot(self, a: &[f32], b: &[f32]) -> f32 {
        dispatch!(self, isa => float::dot(isa, a, b))
    }

    /// The sum of squares in double precision, in sixteen lanes that are added in
    /// their order.
    pub fn sum_of_squares(self, x: &[f32]) -> f64 {
        dispatch!(self, _isa => float::sum_of_squares(x))
    }

    /// The sum of magnitudes of one row of master weights, in f64; equals
    /// [`ternary::row_abs_sum`] bit for bit.
    pub fn row_abs_sum(self, row: &[f32]) -> f64 {
        dispatch!(self, _isa => ternary::row_abs_sum(row))
    }

    /// Ternary values of one row of master weights; equals
    /// [`ternary::quantize_weight`] element for element.
    pub fn quantize_weight_row(self, row: &[f32], inv_weight_scale: f32, trits: &mut [i8]) {
        dispatch!(self, _isa => quantize::weights(row, inv_weight_scale, trits));
    }

    /// Quantises one row of master weights and packs it in layout P2: what
    /// [`Kernels::quantize_weight_row`] gives, packed by
    /// [`bitnet_core::TernaryMatrix::pack`].
    ///
    /// # Panics
    /// If `bytes` is not [`bitnet_core::Layout::row_bytes`] of the row long.
    pub fn pack_weight_row(self, row: &[f32], inv_weight_scale: f32, bytes: &mut [u8]) {
        assert_eq!(bytes.len(), bitnet_core::Layout::P2.row_bytes(row.len()), "packed row");
        dispatch!(self, _isa => quantize::pack_p2(row, inv_weight_scale, bytes));
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
        let queries = [AttendQuery { at: 0, len }];
        self.attend_tile(&queries, q, E::head(key_blocks, values), q.len(), scale, scores, out);
    }

    /// Attention of some queries over the cached keys and values of one head,
    /// which they share: each gets the bits that [`Kernels::attend`] gives it.
    ///
    /// # Shapes
    /// `q` and `out` hold a `[C]`, C = `dim`, at each query's place; `kv` holds the
    /// positions that the longest query sees; `scores` is scratch of
    /// [`attend_scores_len`] for the number of queries and the longest.
    ///
    /// # Panics
    /// If a slice is too short, or a query sees no position.
    #[expect(clippy::too_many_arguments, reason = "slices of one operation")]
    pub fn attend_tile(
        self,
        queries: &[AttendQuery],
        q: &[f32],
        kv: KvHead<'_>,
        dim: usize,
        scale: f32,
        scores: &mut [f32],
        out: &mut [f32],
    ) {
        let longest = queries.iter().map(|q| q.len).max().unwrap_or(0);
        assert!(queries.iter().all(|q| q.len > 0), "attention over no position");
        assert!(scores.len() >= attend_scores_len(queries.len(), longest), "scratch for scores");
        let none = &[][..];
        match kv {
            KvHead::F32 { keys, values } => {
                let (key_scales, value_scales) = (none, none);
                let head = Head { keys, values, key_scales, value_scales, dim, scale };
                dispatch!(self, isa => attention::attend(isa, head, queries, q, scores, out));
            }
            KvHead::F16 { keys, values } => {
                let (key_scales, value_scales) = (none, none);
                let head = Head { keys, values, key_scales, value_scales, dim, scale };
                dispatch!(self, isa => attention::attend(isa, head, queries, q, scores, out));
            }
            KvHead::Int8 { keys, key_scales, values, value_scales } => {
                let head = Head { keys, values, key_scales, value_scales, dim, scale };
                dispatch!(self, isa => attention::attend(isa, head, queries, q, scores, out));
            }
        }
    }

    /// Stores the key and the value of one position as integers. Each vector is
    /// quantised as [`Kernels::quantize`] does: an element is off by at most half
    /// its scale, which is 1/127 of its vector's largest magnitude (at least 1e-5).
    ///
    /// # Shapes
    /// `key` and `value` are `[C]`; `head` as in [`KvHead::Int8`].
    ///
    /// # Panics
    /// If the head holds no such position.
    pub fn store_int8(self, head: KvHeadInt8Mut<'_>, position: usize, key: &[f32], value: &[f32]) {
        dispatch!(self, _isa => attention::store_int8(head, position, key, value));
    }

    /// Exact sums of 4-bit rows and int8 vectors:
    /// `out[t, n] = Σ_k w[n, k] · q[t, k]`, with w in 0..=15. Memory is asked for the rows
    /// `then`, which may be none: those of the next call.
    ///
    /// # Panics
    /// If the shapes do not fit: `out` is `[tokens, rows]`, the columns at most
    /// [`crate::INT4_MAX_COLS`], and the vectors are zero behind them.
    pub fn int4_sums(
        self,
        w: Int4Rows<'_>,
        then: Int4Rows<'_>,
        x: TokensRef<'_>,
        out: MatMut<'_, i32>,
    ) {
        assert_eq!((out.rows(), out.cols()), (x.len(), w.len()), "[tokens, rows]");
        w.check(&x);
        dispatch!(self, isa => int4_rows::all(isa, w, then, x, out));
    }

    /// [`Kernels::int4_sums`] of the rows `rows` alone, in their order.
    ///
    /// # Panics
    /// Likewise, or if there is no such row.
    pub fn int4_sums_of(
        self,
        w: Int4Rows<'_>,
        rows: &[u32],
        x: TokensRef<'_>,
        out: MatMut<'_, i32>,
    ) {
        assert_eq!((out.rows(), out.cols()), (x.len(), rows.len()), "[tokens, rows]");
        w.check(&x);
        dispatch!(self, isa => int4_rows::listed(isa, w, rows, x, out));
    }

    /// Dense rows times a float vector: `out[n] = rows[n] · x`.
    ///
    /// # Panics
    /// If `rows` does not hold `out.len()` rows of `x.len()` elements.
    pub fn dense_matvec(self, rows: DenseRows<'_>, x: &[f32], out: &mut [f32]) {
        assert_eq!(rows.len(), out.len() * x.len(), "dense rows");
        rows.check(x.len());
        let (cols, n) = (x.len(), out.len());
        dispatch!(self, isa => dense::matmul(isa, rows, x, cols, MatMut::new(out, 1, n)));
    }

    /// Dense rows times float vectors: `out[t, n] = rows[n] · xs[t]`, every
    /// element the same bits as [`Kernels::dense_matvec`] gives.
    ///
    /// # Shapes
    /// `xs` is `[T, cols]`; `out` is `[T, N]`; `rows` is `[N, cols]`.
    ///
    /// # Panics
    /// If the shapes do not fit.
    pub fn dense_matmul(self, rows: DenseRows<'_>, xs: &[f32], cols: usize, out: MatMut<'_, f32>) {
        assert_eq!(rows.len(), out.cols() * cols, "dense rows");
        rows.check(cols);
        assert_eq!(xs.len(), out.rows() * cols, "dense vectors");
        dispatch!(self, isa => dense::matmul(isa, rows, xs, cols, out));
    }
}

/// What the integer product relies on.
fn check_shapes(w: &TernaryRows<'_>, x: &TokensRef<'_>, rows: usize, cols: usize) {
    assert_eq!((rows, cols), (x.len(), w.len()), "[tokens, rows]");
    assert_eq!(w.bytes.len(), w.len() * w.layout.row_bytes(w.cols), "whole packed rows");
    assert!(x.stride >= w.layout.padded_cols(w.cols), "tokens are padded to whole blocks");
    assert!(x.q.len() >= x.len() * x.stride && x.sums.len() >= x.len(), "tokens");
}

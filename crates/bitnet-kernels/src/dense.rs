//! Dense rows times a float vector: the head, the embedding and the linear
//! layers of float twins.

use half::{bf16, f16};

use bitnet_core::ternary::{LANES, lane_sum};

/// The rows of a dense matrix, row-major, in one of the stored precisions.
#[derive(Debug, Clone, Copy)]
pub enum DenseRows<'a> {
    /// IEEE single precision.
    F32(&'a [f32]),
    /// IEEE half precision.
    F16(&'a [f16]),
    /// bfloat16.
    Bf16(&'a [bf16]),
}

impl<'a> DenseRows<'a> {
    /// Elements in all rows.
    #[must_use]
    pub fn len(self) -> usize {
        match self {
            Self::F32(x) => x.len(),
            Self::F16(x) => x.len(),
            Self::Bf16(x) => x.len(),
        }
    }

    /// Whether there is no row.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// Rows `start..end` of a matrix of `cols` columns.
    ///
    /// # Panics
    /// If the range is outside the matrix.
    #[must_use]
    pub fn rows(self, cols: usize, start: usize, end: usize) -> DenseRows<'a> {
        let range = start * cols..end * cols;
        match self {
            Self::F32(x) => DenseRows::F32(&x[range]),
            Self::F16(x) => DenseRows::F16(&x[range]),
            Self::Bf16(x) => DenseRows::Bf16(&x[range]),
        }
    }

    /// Writes row `row` as f32 (the look-up of an embedding).
    ///
    /// # Panics
    /// If there is no such row of `out.len()` columns.
    pub fn read_row(self, row: usize, out: &mut [f32]) {
        let range = row * out.len()..(row + 1) * out.len();
        match self {
            Self::F32(x) => out.copy_from_slice(&x[range]),
            Self::F16(x) => out.iter_mut().zip(&x[range]).for_each(|(o, x)| *o = x.to_f32()),
            Self::Bf16(x) => out.iter_mut().zip(&x[range]).for_each(|(o, x)| *o = x.to_f32()),
        }
    }
}

/// The dot product of a stored row and a float vector, in the order of lanes.
#[inline(always)]
pub(crate) fn dot_row<E: Copy>(row: &[E], x: &[f32], to_f32: impl Fn(E) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let ((a, a_rest), (b, b_rest)) = (row.as_chunks::<LANES>(), x.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            lanes[i] += to_f32(a[i]) * b[i];
        }
    }
    for (i, (&a, b)) in a_rest.iter().zip(b_rest).enumerate() {
        lanes[i] += to_f32(a) * b;
    }
    lane_sum(lanes)
}

/// `out[n] = rows[n] · x`; see [`crate::Kernels::dense_matvec`].
#[inline(always)]
pub(crate) fn matvec(rows: DenseRows<'_>, x: &[f32], out: &mut [f32]) {
    match rows {
        DenseRows::F32(w) => {
            for (o, row) in out.iter_mut().zip(w.chunks_exact(x.len())) {
                *o = dot_row(row, x, |v| v);
            }
        }
        DenseRows::F16(w) => {
            for (o, row) in out.iter_mut().zip(w.chunks_exact(x.len())) {
                *o = dot_row(row, x, f16::to_f32);
            }
        }
        DenseRows::Bf16(w) => {
            for (o, row) in out.iter_mut().zip(w.chunks_exact(x.len())) {
                *o = dot_row(row, x, bf16::to_f32);
            }
        }
    }
}

//! The float matrix product of training's backward pass: a safe face of the
//! `gemm` crate, which chooses AVX2 or AVX-512 at run time. One thread: callers
//! split the output into blocks of a fixed size, so that the result does not
//! depend on how many threads there are.

use crate::mat::MatMut;

/// A read-only view `[rows, cols]` of f32 with any strides.
#[derive(Debug, Clone, Copy)]
pub struct MatRef<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> MatRef<'a> {
    /// A row-major view whose rows are `stride` apart.
    ///
    /// # Panics
    /// If `data` does not reach the last element.
    #[must_use]
    pub fn new(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        let needed = if rows == 0 || cols == 0 { 0 } else { (rows - 1) * stride + cols };
        assert!(data.len() >= needed, "[{rows}, {cols}] view of {} elements", data.len());
        Self { data, rows, cols, row_stride: stride, col_stride: 1 }
    }

    /// The transposed view.
    #[must_use]
    pub fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// Rows `start..end` of the view.
    ///
    /// # Panics
    /// If the range is outside the view.
    #[must_use]
    pub fn slice_rows(self, start: usize, end: usize) -> Self {
        assert!(start <= end && end <= self.rows, "rows {start}..{end} of {}", self.rows);
        let offset = (start * self.row_stride).min(self.data.len());
        Self { data: &self.data[offset..], rows: end - start, ..self }
    }

    /// Number of rows.
    #[must_use]
    pub fn rows(self) -> usize {
        self.rows
    }

    /// Number of columns.
    #[must_use]
    pub fn cols(self) -> usize {
        self.cols
    }
}

/// `out = alpha · a · b`, or `out += alpha · a · b` with `accumulate`.
///
/// # Panics
/// If the shapes do not fit.
pub fn gemm(out: &mut MatMut<'_, f32>, a: MatRef<'_>, b: MatRef<'_>, alpha: f32, accumulate: bool) {
    let (m, n, k) = (out.rows(), out.cols(), a.cols);
    assert_eq!((a.rows, b.rows, b.cols), (m, k, n), "shapes of a matrix product");
    if m == 0 || n == 0 {
        return;
    }
    let (out, stride) = out.as_mut_ptr();
    // SAFETY: `MatRef::new` has checked that every element of `a` and `b` lies in
    // its slice, and transposing or slicing rows keeps that true; `out` is an
    // exclusive view of m rows of n elements, `stride` apart. The product is
    // written without overlap of input and output, and f32 is a supported type.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out,
            1,
            stride as isize,
            accumulate,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0,
            alpha,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn multiplies_views_of_any_stride() {
        let (m, k, n) = (5, 7, 6);
        let a: Vec<f32> = (0..m * (k + 1)).map(|i| i as f32 * 0.5 - 3.0).collect();
        let b: Vec<f32> = (0..n * k).map(|i| 2.0 - i as f32 * 0.25).collect();
        let mut out = vec![1.0; m * n];
        let a_view = MatRef::new(&a, m, k, k + 1);
        gemm(&mut MatMut::new(&mut out, m, n), a_view, MatRef::new(&b, n, k, k).t(), 2.0, true);
        for i in 0..m {
            for j in 0..n {
                let want: f32 = (0..k).map(|c| a[i * (k + 1) + c] * b[j * k + c]).sum();
                assert!((out[i * n + j] - (1.0 + 2.0 * want)).abs() < 1e-3);
            }
        }
    }
}

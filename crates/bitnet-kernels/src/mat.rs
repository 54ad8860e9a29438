//! A mutable matrix view that can be split by columns, so that threads write
//! disjoint columns of one output.

use std::marker::PhantomData;
use std::mem::MaybeUninit;

/// A slice whose elements have all been written.
///
/// # Safety
/// They have.
pub(crate) unsafe fn init<T>(slice: &[MaybeUninit<T>]) -> &[T] {
    // SAFETY: `MaybeUninit<T>` is laid out as `T`, and the caller vouches for the
    // values.
    unsafe { &*(std::ptr::from_ref(slice) as *const [T]) }
}

/// A mutable row-major view `[rows, cols]` whose rows are `stride` apart.
#[derive(Debug)]
pub struct MatMut<'a, T> {
    ptr: *mut T,
    rows: usize,
    cols: usize,
    stride: usize,
    owner: PhantomData<&'a mut [T]>,
}

// SAFETY: a view is an exclusive borrow of its elements and of nothing else
// (views split from one another share no element), so it moves between threads
// as `&mut [T]` does.
unsafe impl<T: Send> Send for MatMut<'_, T> {}

impl<'a, T> MatMut<'a, T> {
    /// A view of a contiguous matrix.
    ///
    /// # Panics
    /// If `data` does not hold exactly `rows · cols` elements.
    #[must_use]
    pub fn new(data: &'a mut [T], rows: usize, cols: usize) -> Self {
        assert_eq!(Some(data.len()), rows.checked_mul(cols), "matrix size");
        Self { ptr: data.as_mut_ptr(), rows, cols, stride: cols, owner: PhantomData }
    }

    /// Rows of the view.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns of the view.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Splits into the first `cols` columns and the rest.
    ///
    /// # Panics
    /// If the view has fewer columns.
    #[must_use]
    pub fn split_cols(self, cols: usize) -> (Self, Self) {
        assert!(cols <= self.cols, "split at {cols} of {} columns", self.cols);
        // `wrapping_add`: for an empty view the pointer may not be offset.
        let right = Self {
            ptr: self.ptr.wrapping_add(cols),
            cols: self.cols - cols,
            rows: self.rows,
            stride: self.stride,
            owner: PhantomData,
        };
        (Self { cols, ..self }, right)
    }

    /// Splits into the first `rows` rows and the rest.
    ///
    /// # Panics
    /// If the view has fewer rows.
    #[must_use]
    pub fn split_rows(self, rows: usize) -> (Self, Self) {
        assert!(rows <= self.rows, "split at {rows} of {} rows", self.rows);
        let below = Self {
            ptr: self.ptr.wrapping_add(rows * self.stride),
            rows: self.rows - rows,
            cols: self.cols,
            stride: self.stride,
            owner: PhantomData,
        };
        (Self { rows, ..self }, below)
    }

    /// A shorter borrow of the same view.
    pub fn reborrow(&mut self) -> MatMut<'_, T> {
        MatMut { owner: PhantomData, ..*self }
    }

    /// One row.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&mut self, row: usize) -> &mut [T] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: the view was made from a slice of rows · stride elements and
        // splits only narrow it, so `cols` elements from row · stride on are
        // inside that slice, and this view borrows them exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(row * self.stride), self.cols) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_share_no_element() {
        let mut data = vec![0u32; 12];
        let (mut left, mut right) = MatMut::new(&mut data, 3, 4).split_cols(1);
        for r in 0..3 {
            left.row(r).fill(1);
            right.row(r).fill(2);
        }
        let (mut top, mut rest) = right.split_rows(1);
        assert_eq!((top.rows(), top.cols(), rest.rows()), (1, 3, 2));
        top.row(0)[2] = 7;
        rest.row(1)[0] = 9;
        assert_eq!(data, [1, 2, 2, 7, 1, 2, 2, 2, 1, 9, 2, 2]);
    }

    #[test]
    fn an_empty_view_can_be_split() {
        let mut data: Vec<u8> = vec![];
        let (a, b) = MatMut::new(&mut data, 0, 4).split_cols(4);
        assert_eq!((a.cols(), b.cols()), (4, 0));
    }
}

//! An allocator whose larger blocks begin with a cache line.
//!
//! A vector of 64 bytes that does not begin with a line touches two, and costs twice
//! the loads. The system's allocator aligns to 16 bytes; its large blocks begin 16 bytes
//! behind a page, so that with it every such load is split.

use std::alloc::{GlobalAlloc, Layout, System};
use std::ptr;

/// Bytes of a cache line, and of the largest vector.
const LINE: usize = 64;

/// Smaller blocks are left as the system places them.
const SHORTEST: usize = 1024;

/// What the system's blocks are aligned to at least here: room for the number that
/// stands before a block of ours.
const SYSTEM: usize = 16;

/// The system's allocator, but blocks of 1 KiB and more begin with a cache line (64
/// bytes), at the cost of one line each. Pages that nobody has written stay untouched
/// where the system keeps them so, and growing moves a block only if the system does.
///
/// For binaries: every buffer of every crate is placed by it, the key and value cache
/// and the tensors of a trainer too.
///
/// ```
/// #[global_allocator]
/// static ALLOCATOR: bitnet_kernels::LineAllocator = bitnet_kernels::LineAllocator;
///
/// let x = vec![0.0f32; 1000];
/// assert_eq!(x.as_ptr() as usize % 64, 0);
/// ```
#[derive(Debug, Clone, Copy, Default)]
pub struct LineAllocator;

/// The system's block that holds a block of ours, if it is one: a line longer.
fn outer(layout: Layout) -> Option<Layout> {
    if layout.size() < SHORTEST || layout.align() > LINE {
        return None;
    }
    Layout::from_size_align(layout.size().checked_add(LINE)?, SYSTEM).ok()
}

/// The first line of a block of the system's that leaves room before it.
///
/// # Safety
/// `block` is null or begins `size + LINE` bytes aligned to [`SYSTEM`], for some `size`.
unsafe fn place(block: *mut u8) -> *mut u8 {
    if block.is_null() {
        return block;
    }
    let shift = LINE - block.addr() % LINE;
    // SAFETY: `shift` is SYSTEM to LINE, so this is inside of the block, `size` bytes
    // follow, and SYSTEM bytes stand before; it is aligned to LINE.
    unsafe {
        let line = block.add(shift);
        line.cast::<usize>().sub(1).write(shift);
        line
    }
}

/// The system's block of a block of ours.
///
/// # Safety
/// `line` came from [`place`].
unsafe fn block_of(line: *mut u8) -> *mut u8 {
    // SAFETY: `place` wrote the number before the line, and went so far.
    unsafe { line.sub(line.cast::<usize>().sub(1).read()) }
}

// SAFETY: a block is either the system's own or lies within one of the system's that is
// a line longer; which of both follows from its layout alone, here as there.
unsafe impl GlobalAlloc for LineAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match outer(layout) {
            // SAFETY: `outer` is not of size 0.
            Some(outer) => unsafe { place(System.alloc(outer)) },
            // SAFETY: the caller's promises.
            None => unsafe { System.alloc(layout) },
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        match outer(layout) {
            // SAFETY: `outer` is not of size 0. Only bytes before the line are written.
            Some(outer) => unsafe { place(System.alloc_zeroed(outer)) },
            // SAFETY: the caller's promises.
            None => unsafe { System.alloc_zeroed(layout) },
        }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        match outer(layout) {
            // SAFETY: a block of this layout came from `place`, in one of `outer`'s.
            Some(outer) => unsafe { System.dealloc(block_of(at), outer) },
            // SAFETY: the caller's promises; it is the system's own.
            None => unsafe { System.dealloc(at, layout) },
        }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: the caller promises that the new size is valid with this alignment.
        let new = unsafe { Layout::from_size_align_unchecked(new_size, layout.align()) };
        match (outer(layout), outer(new)) {
            // SAFETY: the caller's promises; it is the system's own and stays so.
            (None, None) => unsafe { System.realloc(at, layout, new_size) },
            // SAFETY: a block of this layout came from `place`, in one of the system's.
            // Its bytes begin `from` bytes behind the beginning of what it becomes, which
            // holds them there and behind the new line: both are LINE bytes at most.
            (Some(old), Some(new)) => unsafe {
                let block = block_of(at);
                let from = at.offset_from_unsigned(block);
                let block = System.realloc(block, old, new.size());
                let line = if block.is_null() {
                    return block;
                } else {
                    block.add(LINE - block.addr() % LINE)
                };
                ptr::copy(block.add(from), line, layout.size().min(new_size));
                place(block)
            },
            // SAFETY: two blocks that do not overlap, each as long as what is copied.
            _ => unsafe {
                let to = self.alloc(new);
                if !to.is_null() {
                    ptr::copy_nonoverlapping(at, to, layout.size().min(new_size));
                    self.dealloc(at, layout);
                }
                to
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a block holds at `i`.
    fn value(i: usize) -> u8 {
        (i * 31 + i / 251) as u8
    }

    /// Grows and shrinks a block through `sizes` and looks at what it holds.
    fn resize(align: usize, zeroed: bool, sizes: &[usize]) {
        let layout = |size| Layout::from_size_align(size, align).unwrap();
        let mut size = sizes[0];
        // SAFETY: sizes are not 0, each layout is the one of the block at that time, and
        // bytes are read after they were written (or zeroed).
        unsafe {
            let mut at = if zeroed {
                LineAllocator.alloc_zeroed(layout(size))
            } else {
                LineAllocator.alloc(layout(size))
            };
            assert!(!zeroed || (0..size).all(|i| at.add(i).read() == 0));
            for &next in &sizes[1..] {
                (0..size).for_each(|i| at.add(i).write(value(i)));
                at = LineAllocator.realloc(at, layout(size), next);
                let kept = size.min(next);
                assert!((0..kept).all(|i| at.add(i).read() == value(i)), "{size} to {next}");
                let wanted = if next >= SHORTEST { align.max(LINE) } else { align };
                assert!(at.addr().is_multiple_of(wanted), "{next} bytes of {align}");
                size = next;
            }
            LineAllocator.dealloc(at, layout(size));
        }
    }

    #[test]
    fn blocks_are_aligned_and_keep_what_they_hold() {
        for align in [1, 8, 16, 32, 64, 128, 4096] {
            for zeroed in [false, true] {
                resize(align, zeroed, &[10, 1023, 1024, 1025, 4000, 200, 70_000, 1100, 1024, 5]);
                resize(align, zeroed, &[5000, 300_000, 2_000_000, 90_000, 4096]);
            }
        }
    }

    #[test]
    fn neighbours_do_not_overlap() {
        let blocks: Vec<(usize, *mut u8)> = (0..64)
            .map(|i| {
                let size = 1024 + 97 * i;
                // SAFETY: the size is not 0 and the block holds it.
                unsafe {
                    let at = LineAllocator.alloc(Layout::from_size_align(size, 4).unwrap());
                    at.write_bytes(i as u8, size);
                    (size, at)
                }
            })
            .collect();
        for (i, (size, at)) in blocks.into_iter().enumerate() {
            // SAFETY: the bytes were written above, and the layout is that of above.
            unsafe {
                assert!((0..size).all(|j| at.add(j).read() == i as u8));
                LineAllocator.dealloc(at, Layout::from_size_align(size, 4).unwrap());
            }
        }
    }

    #[test]
    fn too_much_is_refused() {
        let layout = Layout::from_size_align(isize::MAX as usize - 64, 16).unwrap();
        // SAFETY: the size is not 0; nothing is read or written.
        let block = unsafe { LineAllocator.alloc(layout) };
        // Looked at, so that the compiler does not leave the allocation out.
        assert!(std::hint::black_box(block).is_null());
    }
}

//! Threads: one pool, and regions that divide rows between them.
//!
//! A pass enters the pool once (its queue allocates a block every 63 passes) and
//! a region in it is a tree of [`rayon::join`]s, which allocates nothing. It costs
//! 0.6 to 1.8 µs beyond its work with two threads and 8 parts (p10 of a busy
//! 2-core machine), and where a thread gets no time the others do its parts: a
//! barrier would wait for it. Which thread computes a row never changes the row,
//! so results do not depend on their number.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::EngineError;

/// Bytes of work below which a part is not worth handing to another thread:
/// a microsecond or two of reading, about the price of waking one.
const PART_BYTES: usize = 32 << 10;

/// Bytes of a whole forward pass below which one thread does everything: below
/// it, entering the pool costs a noticeable share.
const POOL_BYTES: usize = 1 << 20;

/// Parts per thread in a region, so that a thread that was held up is helped.
const PARTS_PER_THREAD: usize = 8;

/// Bytes of all scratch buffers of a region, above which there is one a thread.
const SCRATCH_BYTES: usize = 16 << 20;

/// Physical cores that this process may use.
#[must_use]
pub fn physical_cores() -> usize {
    let allowed = std::thread::available_parallelism().map_or(1, usize::from);
    num_cpus::get_physical().clamp(1, allowed)
}

/// The threads of an engine. Clones share them, so that sessions can.
#[derive(Debug, Clone)]
pub struct Workers(Option<Arc<rayon::ThreadPool>>);

impl Workers {
    /// Starts `threads` threads; with one, work runs on the caller's.
    ///
    /// # Errors
    /// No thread, more than 4096, or a system that starts no more of them.
    pub fn new(threads: usize) -> Result<Self, EngineError> {
        if threads == 0 || threads > 4096 {
            let why = "must be in 1..=4096".to_owned();
            return Err(EngineError::Option { option: "threads", value: threads.to_string(), why });
        }
        if threads == 1 {
            return Ok(Self(None));
        }
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("bitnet-{i}"))
            .build()
            .map_err(|e| EngineError::Threads { threads, why: e.to_string() })?;
        Ok(Self(Some(Arc::new(pool))))
    }

    /// How many there are.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.0.as_ref().map_or(1, |pool| pool.current_num_threads())
    }

    /// Runs a pass that reads about `bytes`, in the pool where that pays.
    pub(crate) fn run<R: Send>(&self, bytes: usize, f: impl FnOnce(Split) -> R + Send) -> R {
        match &self.0 {
            Some(pool) if bytes >= POOL_BYTES => {
                let threads = pool.current_num_threads();
                let max_parts = threads * PARTS_PER_THREAD;
                pool.install(|| {
                    let done = AtomicBool::new(false);
                    let first = rayon::current_thread_index();
                    let (mut f, mut result) = (Some(f), None);
                    in_company(threads - 1, first, &done, &mut || {
                        let _guard = SetOnDrop(&done);
                        result = f.take().map(|f| f(Split { max_parts }));
                    });
                    result.expect("the pass has run")
                })
            }
            _ => f(Split { max_parts: 1 }),
        }
    }

    /// Parts that a region with a scratch buffer of `elements` f32 for each has at most:
    /// fewer than others where the buffers are large, one a thread at least.
    pub(crate) fn scratch_parts(&self, elements: usize) -> usize {
        let fit = SCRATCH_BYTES / (4 * elements.max(1));
        fit.clamp(self.threads(), self.threads() * PARTS_PER_THREAD)
    }
}

/// Runs `f` while `others` threads of the pool stay awake: between two regions of a
/// pass lie microseconds, and waking a thread takes longer.
///
/// All who stand by are queued before `f` queues anything, and a thief takes the
/// oldest job of a queue. So once a part of a region is stolen, no standing by is
/// left to be taken by a thread that waits for a part: it would not come back.
fn in_company(
    others: usize,
    first: Option<usize>,
    done: &AtomicBool,
    f: &mut (dyn FnMut() + Send),
) {
    if others == 0 {
        return f();
    }
    rayon::join(|| in_company(others - 1, first, done, f), || stand_by(first, done));
}

/// How often an idle thread looks for work before it lets others have the core.
const SPINS: usize = 2000;

/// Takes part in regions until the pass is `done`. On the thread that runs the
/// pass itself there is nothing to wait for.
fn stand_by(first: Option<usize>, done: &AtomicBool) {
    let mut idle = 0;
    while !done.load(Ordering::Acquire) && rayon::current_thread_index() != first {
        match rayon::yield_now() {
            Some(rayon::Yield::Executed) => idle = 0,
            _ if idle < SPINS => {
                idle += 1;
                std::hint::spin_loop();
            }
            _ => std::thread::yield_now(),
        }
    }
}

/// Ends the standing by of the others, also where the pass panics.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// How finely regions of a pass are divided.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Split {
    max_parts: usize,
}

impl Split {
    /// Parts of a region that reads about `bytes`.
    pub(crate) fn parts(self, bytes: usize) -> usize {
        (bytes / PART_BYTES).clamp(1, self.max_parts)
    }

    /// Divides `item`'s `rows` rows; `leaf` gets the first row and the piece.
    pub(crate) fn rows<D: Divide>(
        self,
        bytes: usize,
        rows: usize,
        item: D,
        leaf: &(impl Fn(usize, D) + Sync),
    ) {
        divide(self.parts(bytes), 0, rows, item, leaf);
    }

    /// The same where `item` has scratch buffers for so many parts.
    pub(crate) fn rows_with<D: Divide>(
        self,
        bytes: usize,
        rows: usize,
        buffers: usize,
        item: D,
        leaf: &(impl Fn(usize, D) + Sync),
    ) {
        divide(self.parts(bytes).min(buffers), 0, rows, item, leaf);
    }
}

/// Divides `item`'s `rows` rows between `parts` parts, numbered from `first`.
pub(crate) fn divide<D: Divide>(
    parts: usize,
    first: usize,
    rows: usize,
    item: D,
    leaf: &(impl Fn(usize, D) + Sync),
) {
    if parts <= 1 || rows <= 1 {
        return leaf(first, item);
    }
    let (left_parts, right_parts) = (parts / 2, parts - parts / 2);
    let mid = (rows * left_parts / parts).max(1);
    let (left, right) = item.divide(mid, left_parts);
    rayon::join(
        || divide(left_parts, first, mid, left, leaf),
        || divide(right_parts, first + mid, rows - mid, right, leaf),
    );
}

/// Something that threads share by rows.
pub(crate) trait Divide: Sized + Send {
    /// The first `rows` rows (done in at most `parts` parts) and the rest.
    fn divide(self, rows: usize, parts: usize) -> (Self, Self);
}

/// Rows of `width` elements that are read.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a, T>(pub &'a [T], pub usize);

/// Rows of `width` elements that are written.
pub(crate) struct RowsMut<'a, T>(pub &'a mut [T], pub usize);

/// One buffer of `width` elements per part.
pub(crate) struct Scratch<'a, T>(pub &'a mut [T], pub usize);

impl<'a, T> Rows<'a, T> {
    pub(crate) fn iter(self) -> impl Iterator<Item = &'a [T]> {
        self.0.chunks_exact(self.1)
    }
}

impl<'a, T> RowsMut<'a, T> {
    pub(crate) fn iter(self) -> impl Iterator<Item = &'a mut [T]> {
        self.0.chunks_exact_mut(self.1)
    }
}

impl<T: Sync> Divide for Rows<'_, T> {
    fn divide(self, rows: usize, _: usize) -> (Self, Self) {
        let (a, b) = self.0.split_at(rows * self.1);
        (Self(a, self.1), Self(b, self.1))
    }
}

impl<T: Send> Divide for RowsMut<'_, T> {
    fn divide(self, rows: usize, _: usize) -> (Self, Self) {
        let (a, b) = self.0.split_at_mut(rows * self.1);
        (Self(a, self.1), Self(b, self.1))
    }
}

impl<T: Send> Divide for Scratch<'_, T> {
    fn divide(self, _: usize, parts: usize) -> (Self, Self) {
        let (a, b) = self.0.split_at_mut(parts * self.1);
        (Self(a, self.1), Self(b, self.1))
    }
}

impl<D: Divide> Divide for Option<D> {
    fn divide(self, rows: usize, parts: usize) -> (Self, Self) {
        self.map(|d| d.divide(rows, parts)).unzip()
    }
}

macro_rules! divide_tuple {
    ($($d:ident $i:tt),*) => {
        impl<$($d: Divide),*> Divide for ($($d,)*) {
            fn divide(self, rows: usize, parts: usize) -> (Self, Self) {
                let halves = ($(self.$i.divide(rows, parts),)*);
                (($(halves.$i.0,)*), ($(halves.$i.1,)*))
            }
        }
    };
}
divide_tuple!(A 0, B 1);
divide_tuple!(A 0, B 1, C 2);
divide_tuple!(A 0, B 1, C 2, D 3);
divide_tuple!(A 0, B 1, C 2, D 3, E 4);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_done_once_with_its_own_number() {
        for threads in [1, 2, 3, 5] {
            let workers = Workers::new(threads).unwrap();
            assert_eq!(workers.threads(), threads);
            for rows in [1, 2, 7, 64] {
                let mut data = vec![0usize; rows * 3];
                let buffers = workers.scratch_parts(2).min(3);
                let mut scratch = vec![0u8; buffers * 2];
                workers.run(usize::MAX, |split| {
                    let item = (RowsMut(&mut data, 3), Scratch(&mut scratch, 2));
                    split.rows_with(usize::MAX, rows, buffers, item, &|first, (piece, scratch)| {
                        assert!(scratch.0.len() >= 2);
                        for (i, row) in piece.iter().enumerate() {
                            row.iter_mut().for_each(|x| *x += first + i + 1);
                        }
                    });
                });
                let want: Vec<usize> = (0..rows * 3).map(|i| i / 3 + 1).collect();
                assert_eq!(data, want);
            }
        }
    }

    #[test]
    fn large_scratch_buffers_are_few() {
        let workers = Workers::new(3).unwrap();
        assert_eq!(workers.scratch_parts(1), 3 * PARTS_PER_THREAD);
        assert_eq!(workers.scratch_parts(SCRATCH_BYTES / 4 / 5), 5);
        assert_eq!(workers.scratch_parts(usize::MAX / 8), 3);
    }

    #[test]
    fn refuses_no_threads() {
        assert!(Workers::new(0).unwrap_err().to_string().contains("threads = 0"));
        assert!(physical_cores() >= 1);
    }
}

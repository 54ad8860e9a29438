//! Buffers that are used again: the large intermediate results of a step have the
//! same sizes in every step, and memory that the system hands out anew costs more
//! than filling it.

use std::collections::HashMap;
use std::mem;
use std::ops::{Deref, DerefMut};
use std::sync::Mutex;

use bitnet_kernels::{Line, Unit};
use rayon::prelude::*;

/// Shorter buffers are left to the allocator.
const SHORTEST: usize = 4096;

/// Most lengths of buffers that wait; a step asks for a few dozen.
const LENGTHS: usize = 256;

/// Elements that one task copies.
const CHUNK: usize = 1 << 16;

/// What a buffer can hold.
pub(crate) trait Element: Copy + Default + Send + 'static {
    /// What new buffers hold in tests: no value that a sum could hide.
    const UNWRITTEN: Option<Self>;

    /// The buffers that wait to be used again, by length.
    fn waiting() -> &'static Mutex<HashMap<usize, Shelf<Self>>>;
}

/// Buffers of one length.
#[derive(Debug)]
pub(crate) struct Shelf<T> {
    waiting: Vec<Vec<T>>,
    /// How many have been taken and not come back. No more than these are accepted: of
    /// what others have allocated there may be more in every step.
    out: usize,
}

impl<T> Default for Shelf<T> {
    fn default() -> Self {
        Self { waiting: Vec::new(), out: 0 }
    }
}

macro_rules! element {
    ($($type:ty: $unwritten:expr),*) => {$(
        impl Element for $type {
            const UNWRITTEN: Option<Self> = $unwritten;

            fn waiting() -> &'static Mutex<HashMap<usize, Shelf<Self>>> {
                static WAITING: std::sync::LazyLock<Mutex<HashMap<usize, Shelf<$type>>>> =
                    std::sync::LazyLock::new(Mutex::default);
                &WAITING
            }
        }
    )*};
}
element!(f32: Some(f32::NAN), u8: Some(0xa5), i8: Some(0x5a), Unit: None, Line: None);

/// A vector of fixed length, which waits to be used again when it is dropped.
#[derive(Debug)]
pub(crate) struct Scratch<T: Element>(Vec<T>);

impl<T: Element> Scratch<T> {
    /// A buffer with any contents, for those who write all of it.
    pub(crate) fn any(len: usize) -> Self {
        let new = T::UNWRITTEN.filter(|_| cfg!(test)).unwrap_or_default();
        Self(take(len).unwrap_or_else(|| vec![new; len]))
    }

    /// The vector, no longer to be used again.
    pub(crate) fn into_vec(mut self) -> Vec<T> {
        mem::take(&mut self.0)
    }
}

impl<T: Element> From<Vec<T>> for Scratch<T> {
    fn from(values: Vec<T>) -> Self {
        Self(values)
    }
}

impl<T: Element> Drop for Scratch<T> {
    fn drop(&mut self) {
        give(mem::take(&mut self.0));
    }
}

impl<T: Element> Deref for Scratch<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T: Element> DerefMut for Scratch<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.0
    }
}

/// A vector with these elements.
pub(crate) fn copy(from: &[f32]) -> Vec<f32> {
    let mut out = Scratch::any(from.len());
    out.par_chunks_mut(CHUNK)
        .zip(from.par_chunks(CHUNK))
        .for_each(|(out, from)| out.copy_from_slice(from));
    out.into_vec()
}

fn take<T: Element>(len: usize) -> Option<Vec<T>> {
    if len < SHORTEST {
        return None;
    }
    let mut all = T::waiting().lock().ok()?;
    if all.len() >= LENGTHS && !all.contains_key(&len) {
        // Whoever asks for ever other lengths gets none of them again.
        all.clear();
    }
    let shelf = all.entry(len).or_default();
    shelf.out += 1;
    shelf.waiting.pop()
}

/// Lets a vector be used again, if as long a one was taken.
pub(crate) fn give<T: Element>(buffer: Vec<T>) {
    if buffer.len() >= SHORTEST
        && let Ok(mut all) = T::waiting().lock()
        && let Some(shelf) = all.get_mut(&buffer.len())
        && shelf.out > 0
    {
        shelf.out -= 1;
        shelf.waiting.push(buffer);
    }
}

/// Frees all that waits: the next operations will want other sizes.
pub fn release() {
    fn clear<T: Element>() {
        if let Ok(mut waiting) = T::waiting().lock() {
            waiting.clear();
        }
    }
    clear::<f32>();
    clear::<u8>();
    clear::<i8>();
    clear::<Unit>();
    clear::<Line>();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_come_back_than_were_taken() {
        let len = 104_723;
        let taken: Vec<Vec<i8>> = (0..2).map(|_| Scratch::any(len).into_vec()).collect();
        (0..3).for_each(|_| give(vec![0i8; len]));
        taken.into_iter().for_each(give);
        let all = i8::waiting().lock().unwrap();
        assert_eq!((all[&len].waiting.len(), all[&len].out), (2, 0));
    }

    #[test]
    fn a_dropped_buffer_is_used_again() {
        // A length that nothing else in this process asks for.
        let len = 104_729;
        let mut first = Scratch::<u8>::any(len);
        first[7] = 9;
        let at = first.as_ptr();
        drop(first);
        let second = Scratch::<u8>::any(len);
        assert_eq!((second.as_ptr(), second[7]), (at, 9));
        assert_ne!(Scratch::<u8>::any(len).as_ptr(), at);
        assert_eq!(second.into_vec().len(), len);
        assert_eq!(u8::waiting().lock().unwrap()[&len].waiting.len(), 1);
    }
}

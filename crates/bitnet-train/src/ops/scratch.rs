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
    /// The buffers that wait to be used again, by length.
    fn waiting() -> &'static Mutex<HashMap<usize, Vec<Vec<Self>>>>;
}

macro_rules! element {
    ($($type:ty),*) => {$(
        impl Element for $type {
            fn waiting() -> &'static Mutex<HashMap<usize, Vec<Vec<Self>>>> {
                static WAITING: std::sync::LazyLock<Mutex<HashMap<usize, Vec<Vec<$type>>>>> =
                    std::sync::LazyLock::new(Mutex::default);
                &WAITING
            }
        }
    )*};
}
element!(f32, u8, i8, Unit, Line);

/// A vector of fixed length, which waits to be used again when it is dropped.
#[derive(Debug)]
pub(crate) struct Scratch<T: Element>(Vec<T>);

impl<T: Element> Scratch<T> {
    /// A buffer with any contents, for those who write all of it.
    pub(crate) fn any(len: usize) -> Self {
        Self(take(len).unwrap_or_else(|| vec![T::default(); len]))
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
    T::waiting().lock().ok()?.get_mut(&len)?.pop()
}

/// Lets a vector be used again.
pub(crate) fn give<T: Element>(buffer: Vec<T>) {
    if buffer.len() >= SHORTEST
        && let Ok(mut waiting) = T::waiting().lock()
    {
        if waiting.len() >= LENGTHS && !waiting.contains_key(&buffer.len()) {
            // Whoever asks for ever other sizes gets none of them again.
            waiting.clear();
        }
        waiting.entry(buffer.len()).or_default().push(buffer);
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
        assert!(u8::waiting().lock().unwrap()[&len].len() == 1);
    }
}

//! What the targets share: a place for files, reading all of a model, and a bound
//! on what a file may make the reader allocate.

use std::path::Path;

use bitnet_core::names::Tensor;
use bitnet_format::model::{Linears, ModelError, OpenOptions, Source, open};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use tempfile::TempDir;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<std::alloc::System> = &INSTRUMENTED_SYSTEM;

/// Allocated bytes that any input may cost: buffers of a fixed size.
const FREE_BYTES: usize = 8 << 20;
/// Allocated bytes for each byte of input, all allocations added up, freed or not.
/// A JSON value of two bytes (`1,`) takes a hundred in memory, and a text is parsed
/// a few times.
const BYTES_PER_BYTE: usize = 1024;

/// Runs `f` on an input of `len` bytes.
///
/// # Panics
/// If it allocated more than such an input is worth.
pub fn bounded(len: usize, f: impl FnOnce()) {
    let region = Region::new(ALLOCATOR);
    f();
    let found = region.change().bytes_allocated;
    let most = FREE_BYTES + BYTES_PER_BYTE * len;
    assert!(found <= most, "{found} bytes were allocated for an input of {len}");
}

/// An empty folder in memory, where the system has such a place.
///
/// # Panics
/// If there is no room.
pub fn scratch() -> TempDir {
    let memory = Path::new("/dev/shm");
    let folder = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    folder.expect("a temporary folder")
}

/// Opens a model and reads every tensor of it, in one piece and by rows. Where its
/// texts are at fault, once more without them.
///
/// # Errors
/// Those of the model.
pub fn read_model(path: &Path) -> Result<(), ModelError> {
    let source = open(path, &OpenOptions::default())
        .or_else(|_| open(path, &OpenOptions { without_text: true, ..OpenOptions::default() }))?;
    read_tensors(&*source)?;
    if source.facts().linears == Linears::Floats {
        let ptq = OpenOptions { ptq: true, without_text: true, ..OpenOptions::default() };
        read_tensors(&*open(path, &ptq)?)?;
    }
    Ok(())
}

/// Reads on after an error: what comes later must not panic either.
fn read_tensors(source: &dyn Source) -> Result<(), ModelError> {
    let facts = source.facts();
    for tensor in Tensor::all(&facts.config) {
        let [rows, cols] = tensor.shape(&facts.config);
        if matches!(tensor, Tensor::Linear(..)) && facts.linears != Linears::Floats {
            if let Ok(trits) = source.ternary(tensor) {
                assert_eq!(trits.values.len(), rows * cols);
                assert!(trits.values.iter().all(|t| (-1..=1).contains(t)));
                assert!(trits.scale.is_finite());
            }
            continue;
        }
        let mut all = vec![0.0; rows * cols];
        if source.floats(tensor, 0, &mut all).is_ok() {
            let mut last = vec![0.0; cols];
            source.floats(tensor, rows - 1, &mut last)?;
            let same = last.iter().zip(&all[(rows - 1) * cols..]);
            assert!(same.into_iter().all(|(a, b)| a.to_bits() == b.to_bits()));
        }
    }
    Ok(())
}

//! Reading back: every ternary value, scale and float of the finished file
//! against the checkpoint, by the scalar definition and not by the code that
//! wrote it.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use bitnet_core::ternary;
use bitnet_format::gguf::{Directory, GgufError, read_head};

use crate::pack::{encode, for_chunks};
use crate::plan::{Form, Item, Plan};
use crate::source::Source;
use crate::{ExportError, Step};

/// What was found on the way.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) tensors: u64,
    /// Weights that are ternary in the file.
    pub(crate) ternary: u64,
    /// Those of them that are zero.
    pub(crate) zeros: u64,
    /// Bytes of the linear layers' weights and scales, padding of rows included.
    pub(crate) linear_bytes: u64,
}

/// Compares the file at `path` with the checkpoint.
pub(crate) fn compare(
    source: &Source,
    plan: &Plan,
    path: &Path,
    step: &mut Step<'_>,
) -> Result<Counts, ExportError> {
    let file = "the packed file";
    let read = |source| GgufError::Read { file: file.into(), source };
    let mut open = File::open(path).map_err(read)?;
    let (head, total) = read_head(&mut open, file)?;
    let directory = Directory::parse(&head, total, file)?;
    let mut packed = Packed { file: open, directory };
    let mut counts =
        Counts { tensors: packed.directory.tensors().len() as u64, ..Counts::default() };
    for item in &plan.items {
        match item.form {
            Form::Ternary => {
                ternary_item(source, plan, &mut packed, item, &mut counts)?;
                step.add(item.elements())?;
            }
            Form::Float(dtype) => {
                let mut bytes = Vec::new();
                let start = packed.directory.tensor_range(&item.weight())?.start;
                for_chunks(source, item, |first, values| {
                    let expected = encode(values, dtype);
                    let at = start + (first * dtype.bytes()) as u64;
                    packed.read(at, expected.len(), &mut bytes)?;
                    if let Some(i) = (0..bytes.len()).find(|&i| bytes[i] != expected[i]) {
                        let i = i / dtype.bytes();
                        let element = i * dtype.bytes()..(i + 1) * dtype.bytes();
                        let show = |b: &[u8]| format!("bytes {:02x?}", &b[element.clone()]);
                        return Err(differs(item, first + i, show(&expected), show(&bytes)));
                    }
                    step.add(values.len())
                })?;
                if crate::report::is_linear(item) {
                    counts.linear_bytes += (item.elements() * dtype.bytes()) as u64;
                }
            }
        }
    }
    Ok(counts)
}

fn ternary_item(
    source: &Source,
    plan: &Plan,
    packed: &mut Packed<'_>,
    item: &Item,
    counts: &mut Counts,
) -> Result<(), ExportError> {
    let weights = source.checkpoint.read(&item.hf)?;
    let (expected, scale) = ternary::quantize_weights(&weights, item.cols);
    drop(weights);
    let mut bytes = Vec::new();
    let at = packed.directory.tensor_range(&item.scale())?.start;
    packed.read(at, 4, &mut bytes)?;
    if bytes != scale.to_le_bytes() {
        let found = bytes.as_chunks::<4>().0.first().map(|b| f32::from_le_bytes(*b));
        let show = |x: Option<f32>| format!("weight_scale {:e}", x.unwrap_or(f32::NAN));
        return Err(differs(item, 0, show(Some(scale)), show(found)));
    }
    let range = packed.directory.tensor_range(&item.weight())?;
    packed.read(range.start, (range.end - range.start) as usize, &mut bytes)?;
    let mut found = vec![0i8; item.cols];
    let rows = bytes.chunks_exact(plan.layout.row_bytes(item.cols));
    for (row, (bytes, expected)) in rows.zip(expected.chunks_exact(item.cols)).enumerate() {
        plan.layout
            .unpack_row(bytes, &mut found)
            .map_err(|e| ExportError::Matrix { tensor: item.weight(), source: e })?;
        if let Some(col) = (0..item.cols).find(|&i| found[i] != expected[i]) {
            let (e, f) = (expected[col].to_string(), found[col].to_string());
            return Err(differs(item, row * item.cols + col, e, f));
        }
        counts.zeros += found.iter().filter(|t| **t == 0).count() as u64;
    }
    counts.ternary += item.elements() as u64;
    counts.linear_bytes += bytes.len() as u64 + 4;
    Ok(())
}

fn differs(item: &Item, element: usize, expected: String, found: String) -> ExportError {
    let (tensor, at) = (item.weight(), item.position(element));
    ExportError::Differs { tensor, at, expected, found }
}

/// The written file, read by position: it may be larger than memory.
struct Packed<'h> {
    file: File,
    directory: Directory<'h>,
}

impl Packed<'_> {
    /// `len` bytes from position `at` of the file.
    fn read(&mut self, at: u64, len: usize, out: &mut Vec<u8>) -> Result<(), ExportError> {
        out.resize(len, 0);
        (self.file.seek(SeekFrom::Start(at)))
            .and_then(|_| self.file.read_exact(out))
            .map_err(|source| GgufError::Read { file: self.directory.file().into(), source }.into())
    }
}

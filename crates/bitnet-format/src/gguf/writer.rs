//! Writing: the directory is complete before the first tensor, then data is
//! streamed in the directory's order, so memory does not grow with the file.

use std::collections::HashSet;
use std::io::Write;

use super::value::{Value, encode_str};
use super::{ALIGNMENT_KEY, GgmlType, GgufError, MAGIC, TensorInfo, VERSION};

/// Metadata and tensor directory of a file that is to be written.
#[derive(Debug, Clone)]
pub struct Header {
    file: String,
    alignment: u64,
    keys: HashSet<String>,
    metadata: Vec<u8>,
    names: HashSet<String>,
    tensors: Vec<TensorInfo>,
    /// Where the next tensor goes in the data section.
    next: u64,
}

impl Header {
    /// A file without keys and tensors. `file` is what errors call it,
    /// `alignment` a power of two in bytes, recorded under
    /// `general.alignment`.
    ///
    /// # Errors
    /// An alignment that is no power of two, or more than a megabyte.
    pub fn new(file: &str, alignment: u64) -> Result<Self, GgufError> {
        let mut header = Self {
            file: file.into(),
            alignment,
            keys: HashSet::new(),
            metadata: Vec::new(),
            names: HashSet::new(),
            tensors: Vec::new(),
            next: 0,
        };
        let number = u32::try_from(alignment).ok().filter(|a| a.is_power_of_two() && *a <= 1 << 20);
        let number = number.ok_or_else(|| header.invalid(format!("alignment {alignment}")))?;
        header.put(ALIGNMENT_KEY, number)?;
        Ok(header)
    }

    /// Adds a key.
    ///
    /// # Errors
    /// The key was added before.
    pub fn put<'v>(&mut self, key: &str, value: impl Into<Value<'v>>) -> Result<(), GgufError> {
        if !self.keys.insert(key.to_owned()) {
            return Err(self.invalid(format!("key {key} is written twice")));
        }
        let value = value.into();
        encode_str(key, &mut self.metadata);
        self.metadata.extend((value.value_type() as u32).to_le_bytes());
        value.encode(&mut self.metadata);
        Ok(())
    }

    /// Adds a tensor. `dims` begins with the dimension that runs fastest:
    /// `[in, out]` for a weight `[out, in]`.
    ///
    /// # Errors
    /// A name that was added before, an unknown type, dimensions that are not
    /// whole blocks of it, more than four of them, or a size beyond 64 bits.
    pub fn tensor(&mut self, name: &str, dims: &[u64], ty: GgmlType) -> Result<(), GgufError> {
        let error = |why: &str| self.invalid(format!("tensor {name}: {why}"));
        if dims.len() > 4 {
            return Err(error(&format!("{} dimensions, of 4", dims.len())));
        }
        if self.names.contains(name) {
            return Err(error("is written twice"));
        }
        let bytes = ty.tensor_bytes(dims).map_err(|e| error(&e))?;
        let next = (self.next.checked_add(bytes))
            .and_then(|end| end.checked_next_multiple_of(self.alignment))
            .ok_or_else(|| error("the file's size does not fit 64 bits"))?;
        self.names.insert(name.to_owned());
        let (name, dims) = (name.to_owned(), dims.to_vec());
        self.tensors.push(TensorInfo { name, dims, ty, offset: self.next });
        self.next = next;
        Ok(())
    }

    /// The tensors so far, in the order their data is written.
    #[must_use]
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// Bytes of all the data, padding included.
    #[must_use]
    pub fn data_bytes(&self) -> u64 {
        self.next
    }

    fn invalid(&self, what: String) -> GgufError {
        GgufError::Invalid { file: self.file.clone(), what }
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.metadata.len() + 64 * self.tensors.len());
        out.extend(MAGIC);
        out.extend(VERSION.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        out.extend_from_slice(&self.metadata);
        for t in &self.tensors {
            encode_str(&t.name, &mut out);
            out.extend((t.dims.len() as u32).to_le_bytes());
            for d in &t.dims {
                out.extend(d.to_le_bytes());
            }
            out.extend(t.ty.id().to_le_bytes());
            out.extend(t.offset.to_le_bytes());
        }
        out.resize(out.len().next_multiple_of(self.alignment as usize), 0);
        out
    }
}

/// Streams the data of a file whose header is written.
#[derive(Debug)]
pub struct Writer<W: Write> {
    out: W,
    header: Header,
    /// Index of the tensor that is being written.
    current: usize,
    /// Bytes of it so far.
    written: u64,
}

impl<W: Write> Writer<W> {
    /// Writes the header.
    ///
    /// # Errors
    /// I/O errors of `out`.
    pub fn start(mut out: W, header: Header) -> Result<Self, GgufError> {
        let io = |source| GgufError::Write { file: header.file.clone(), source };
        out.write_all(&header.encode()).map_err(io)?;
        Ok(Self { out, header, current: 0, written: 0 })
    }

    /// Writes the next bytes of tensor `name`, which must be the next in the
    /// directory's order; in one piece or in several.
    ///
    /// # Errors
    /// Another tensor's turn, more bytes than the directory says, or an I/O
    /// error of the output.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<(), GgufError> {
        let turn = self.header.tensors.get(self.current);
        let Some(info) = turn.filter(|t| t.name == name) else {
            let turn = turn.map_or("no tensor", |t| &t.name);
            return Err(self
                .header
                .invalid(format!("tensor {name} is written, in turn is {turn}")));
        };
        let size = info.bytes().unwrap_or(0);
        let end = self.written + bytes.len() as u64;
        if end > size {
            let what = format!("tensor {name}: {end} bytes are written, the directory says {size}");
            return Err(self.header.invalid(what));
        }
        let io = |source| GgufError::Write { file: self.header.file.clone(), source };
        self.out.write_all(bytes).map_err(io)?;
        self.written = end;
        if end == size {
            let padding = size.next_multiple_of(self.header.alignment) - size;
            self.out.write_all(&vec![0; padding as usize]).map_err(io)?;
            (self.current, self.written) = (self.current + 1, 0);
        }
        Ok(())
    }

    /// Ends the file and hands the output back, flushed.
    ///
    /// # Errors
    /// A tensor of the directory that was not written whole, or an I/O error.
    pub fn finish(mut self) -> Result<W, GgufError> {
        if let Some(t) = self.header.tensors.get(self.current) {
            let what = format!("tensor {}: only {} bytes were written", t.name, self.written);
            return Err(self.header.invalid(what));
        }
        let file = self.header.file;
        self.out.flush().map_err(|source| GgufError::Write { file, source })?;
        Ok(self.out)
    }
}

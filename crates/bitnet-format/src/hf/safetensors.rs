//! One safetensors file: tensors are read by position and written in order, so
//! memory holds one piece of one tensor and never the file.
//!
//! Layout: a header length (u64, little endian), a JSON header that names each
//! tensor's type, shape and byte range, then the data. The header is parsed and
//! checked by the `safetensors` crate.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::{Map, json};

use super::HfError;
use crate::atomic::AtomicFile;

/// Bytes of the header length.
const PREFIX: u64 = 8;
/// Longest header that is believed; the reference implementation's limit.
const MAX_HEADER: u64 = 100_000_000;
/// Elements converted at a time.
const CHUNK: usize = 1 << 16;

/// A safetensors file that is open for reading.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    file: Mutex<File>,
    metadata: Metadata,
    data_start: u64,
}

impl TensorFile {
    /// Opens a file and checks its header against its length.
    ///
    /// # Errors
    /// I/O errors, and a file that is truncated, foreign or inconsistent.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, HfError> {
        let path = path.as_ref();
        let bad = |reason: String| HfError::safetensors(path, reason);
        let mut file = File::open(path).map_err(|e| HfError::read(path, e))?;
        let meta = file.metadata().map_err(|e| HfError::read(path, e))?;
        if meta.is_dir() {
            return Err(HfError::read(path, io::ErrorKind::IsADirectory.into()));
        }
        let total = meta.len();
        let mut prefix = [0u8; PREFIX as usize];
        if total < PREFIX {
            return Err(bad(format!("{total} bytes, shorter than its first field")));
        }
        file.read_exact(&mut prefix).map_err(|e| HfError::read(path, e))?;
        let header = u64::from_le_bytes(prefix);
        if header > MAX_HEADER || header > total - PREFIX {
            return Err(bad(format!("a header of {header} bytes in a file of {total}")));
        }
        let mut text = vec![0; header as usize];
        file.read_exact(&mut text).map_err(|e| HfError::read(path, e))?;
        let metadata: Metadata =
            serde_json::from_slice(&text).map_err(|e| bad(format!("header: {e}")))?;
        let (needs, found) = (metadata.data_len() as u64, total - PREFIX - header);
        if needs != found {
            return Err(bad(format!("its header needs {needs} bytes of data, found {found}")));
        }
        let data_start = PREFIX + header;
        Ok(Self { path: path.into(), file: Mutex::new(file), metadata, data_start })
    }

    /// Where the file lies.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of the tensors, in the order of the file.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    /// The shape of a tensor; none where there is none of that name.
    #[must_use]
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.metadata.info(name).map(|t| t.shape.as_slice())
    }

    /// The value of a key of the header's `__metadata__`.
    #[must_use]
    pub fn meta(&self, key: &str) -> Option<&str> {
        self.metadata.metadata().as_ref()?.get(key).map(String::as_str)
    }

    /// A whole tensor as f32.
    ///
    /// # Errors
    /// No tensor of that name, a type other than F32, F16 and BF16, I/O errors.
    pub fn read(&self, name: &str) -> Result<Vec<f32>, HfError> {
        // The shape was checked against the data's length, so this is at most
        // twice the file.
        let elements = self.info(name)?.shape.iter().product();
        let mut out = vec![0.0; elements];
        self.read_at(name, 0, &mut out)?;
        Ok(out)
    }

    /// Elements `first..first + out.len()` of a tensor as f32, in row-major
    /// order.
    ///
    /// # Errors
    /// As [`TensorFile::read`], and a range beyond the tensor.
    pub fn read_at(&self, name: &str, first: usize, out: &mut [f32]) -> Result<(), HfError> {
        let info = self.info(name)?;
        let width = match info.dtype {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::BF16 => 2,
            other => {
                return Err(self.wrong_type(name, other, "F32, F16 and BF16"));
            }
        };
        let elements: usize = info.shape.iter().product();
        if first.checked_add(out.len()).is_none_or(|end| end > elements) {
            let reason =
                format!("tensor {name}: elements {first}..{first}+{} of {elements}", out.len());
            return Err(HfError::safetensors(&self.path, reason));
        }
        let start = self.data_start + (info.data_offsets.0 + first * width) as u64;
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let io = |e| HfError::read(&self.path, e);
        file.seek(SeekFrom::Start(start)).map_err(io)?;
        let mut bytes = vec![0u8; CHUNK.min(out.len()) * width];
        for chunk in out.chunks_mut(CHUNK) {
            let bytes = &mut bytes[..chunk.len() * width];
            file.read_exact(bytes).map_err(io)?;
            convert(info.dtype, bytes, chunk);
        }
        Ok(())
    }

    /// The whole data of a tensor of bytes (U8).
    ///
    /// # Errors
    /// No tensor of that name, another type, I/O errors.
    pub fn read_bytes(&self, name: &str) -> Result<Vec<u8>, HfError> {
        let info = self.info(name)?;
        if info.dtype != Dtype::U8 {
            return Err(self.wrong_type(name, info.dtype, "U8"));
        }
        // Checked against the file's length when it was opened.
        let mut out = vec![0; info.data_offsets.1 - info.data_offsets.0];
        let start = self.data_start + info.data_offsets.0 as u64;
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        (file.seek(SeekFrom::Start(start)))
            .and_then(|_| file.read_exact(&mut out))
            .map_err(|e| HfError::read(&self.path, e))?;
        Ok(out)
    }

    /// The type of a tensor, where it is one of the three float types.
    #[must_use]
    pub fn float_type(&self, name: &str) -> Option<bitnet_core::Dtype> {
        match self.metadata.info(name)?.dtype {
            Dtype::F32 => Some(bitnet_core::Dtype::F32),
            Dtype::F16 => Some(bitnet_core::Dtype::F16),
            Dtype::BF16 => Some(bitnet_core::Dtype::Bf16),
            _ => None,
        }
    }

    fn wrong_type(&self, name: &str, found: Dtype, expected: &'static str) -> HfError {
        let (path, tensor) = (self.path.clone(), name.into());
        HfError::Dtype { path, tensor, dtype: format!("{found:?}"), expected }
    }

    fn info(&self, name: &str) -> Result<&TensorInfo, HfError> {
        self.metadata.info(name).ok_or_else(|| HfError::Missing {
            path: self.path.clone(),
            count: 1,
            names: name.into(),
        })
    }
}

/// Little-endian bytes of one of the three float types to f32.
fn convert(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    if dtype == Dtype::F32 {
        for (x, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *x = f32::from_le_bytes(*b);
        }
        return;
    }
    for (x, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
        *x = match dtype {
            Dtype::F16 => half::f16::from_le_bytes(*b).to_f32(),
            _ => half::bf16::from_le_bytes(*b).to_f32(),
        };
    }
}

/// A tensor that is to be written: its name and shape.
pub type TensorSpec = (String, Vec<usize>);

/// The type of a tensor that is to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// Floats.
    Float(bitnet_core::Dtype),
    /// Bytes.
    U8,
}

impl Stored {
    fn name(self) -> &'static str {
        match self {
            Self::Float(bitnet_core::Dtype::F32) => "F32",
            Self::Float(bitnet_core::Dtype::F16) => "F16",
            Self::Float(bitnet_core::Dtype::Bf16) => "BF16",
            Self::U8 => "U8",
        }
    }

    fn bytes(self) -> u64 {
        match self {
            Self::Float(dtype) => dtype.bytes() as u64,
            Self::U8 => 1,
        }
    }
}

/// Writes a file of tensors, one after the other and each in one piece or in
/// several; the file appears on [`TensorFileWriter::commit`].
#[derive(Debug)]
pub struct TensorFileWriter {
    out: AtomicFile,
    /// Name, shape and bytes of each.
    tensors: Vec<(String, Vec<usize>, u64)>,
    next: usize,
    /// Bytes of the next that are written.
    written: u64,
}

impl TensorFileWriter {
    /// Writes the header of a file of f32 tensors. `tensors` come in the order
    /// they will be written, `metadata` goes to the header's `__metadata__`
    /// (transformers wants `format: pt` there, which is added).
    ///
    /// # Errors
    /// I/O errors, a name that comes twice, and sizes beyond 64 bits.
    pub fn create(
        path: impl AsRef<Path>,
        metadata: &[(&str, &str)],
        tensors: Vec<TensorSpec>,
    ) -> Result<Self, HfError> {
        let f32 = Stored::Float(bitnet_core::Dtype::F32);
        let tensors = tensors.into_iter().map(|(name, shape)| (name, shape, f32)).collect();
        Self::with_types(path, metadata, tensors)
    }

    /// As [`TensorFileWriter::create`], with a type for each tensor.
    ///
    /// # Errors
    /// As there.
    pub fn with_types(
        path: impl AsRef<Path>,
        metadata: &[(&str, &str)],
        tensors: Vec<(String, Vec<usize>, Stored)>,
    ) -> Result<Self, HfError> {
        let path = path.as_ref();
        let bad = |reason: String| HfError::safetensors(path, reason);
        let mut header = Map::new();
        let mut meta = Map::new();
        meta.insert("format".into(), "pt".into());
        meta.extend(metadata.iter().map(|(k, v)| ((*k).to_owned(), json!(v))));
        header.insert("__metadata__".into(), meta.into());
        let mut start = 0u64;
        let mut sizes = Vec::with_capacity(tensors.len());
        for (name, shape, stored) in tensors {
            let end = (shape.iter().try_fold(stored.bytes(), |n, &d| n.checked_mul(d as u64)))
                .and_then(|n| n.checked_add(start))
                .ok_or_else(|| bad(format!("tensor {name}: {shape:?} is too large")))?;
            let info =
                json!({ "dtype": stored.name(), "shape": shape, "data_offsets": [start, end] });
            if header.insert(name.clone(), info).is_some() {
                return Err(bad(format!("tensor {name} is written twice")));
            }
            sizes.push((name, shape, end - start));
            start = end;
        }
        let mut text = serde_json::Value::from(header).to_string().into_bytes();
        // The data begins at a multiple of eight, as the format asks.
        text.resize(text.len().next_multiple_of(8), b' ');
        let mut out = AtomicFile::create(path).map_err(|e| HfError::write(path, e))?;
        (out.write_all(&(text.len() as u64).to_le_bytes()))
            .and_then(|()| out.write_all(&text))
            .map_err(|e| HfError::write(path, e))?;
        Ok(Self { out, tensors: sizes, next: 0, written: 0 })
    }

    /// Writes the f32 tensor `name` in one piece; it must be the next in order.
    ///
    /// # Errors
    /// Another tensor's turn, a length that its shape does not have, I/O errors.
    pub fn write(&mut self, name: &str, data: &[f32]) -> Result<(), HfError> {
        if let Some((turn, shape, size)) = self.tensors.get(self.next)
            && turn == name
            && *size != 4 * data.len() as u64
        {
            let (tensor, expected, found) = (name.into(), shape.clone(), vec![data.len()]);
            let path = self.out.dest().to_owned();
            return Err(HfError::Shape { path, tensor, expected, found });
        }
        let mut bytes = Vec::with_capacity(4 * CHUNK.min(data.len()));
        for chunk in data.chunks(CHUNK) {
            bytes.clear();
            bytes.extend(chunk.iter().flat_map(|x| x.to_le_bytes()));
            self.write_bytes(name, &bytes)?;
        }
        if data.is_empty() { self.write_bytes(name, &[]) } else { Ok(()) }
    }

    /// Writes the next bytes of tensor `name`, which must be the next in order.
    ///
    /// # Errors
    /// Another tensor's turn, more bytes than its shape and type have, I/O errors.
    pub fn write_bytes(&mut self, name: &str, bytes: &[u8]) -> Result<(), HfError> {
        let path = self.out.dest().to_owned();
        let Some((turn, _, size)) = self.tensors.get(self.next) else {
            return Err(HfError::safetensors(&path, format!("tensor {name}: no tensor is left")));
        };
        if turn != name {
            let reason = format!("tensor {name} is written, in turn is {turn}");
            return Err(HfError::safetensors(&path, reason));
        }
        let end = self.written + bytes.len() as u64;
        if end > *size {
            let reason = format!("tensor {name}: {end} bytes are written, it has {size}");
            return Err(HfError::safetensors(&path, reason));
        }
        let done = end == *size;
        self.out.write_all(bytes).map_err(|e| HfError::write(&path, e))?;
        (self.next, self.written) = if done { (self.next + 1, 0) } else { (self.next, end) };
        Ok(())
    }

    /// Makes the file durable and gives it its name.
    ///
    /// # Errors
    /// A tensor that was not written, or I/O errors.
    pub fn commit(self) -> Result<(), HfError> {
        let path = self.out.dest().to_owned();
        if let Some((name, ..)) = self.tensors.get(self.next) {
            return Err(HfError::safetensors(&path, format!("tensor {name} was not written")));
        }
        self.out.commit().map_err(|e| HfError::write(&path, e))
    }
}

/// Writes a file of f32 tensors that are all in memory.
///
/// # Errors
/// As [`TensorFileWriter`].
pub fn save<'t>(
    path: impl AsRef<Path>,
    metadata: &[(&str, &str)],
    tensors: impl IntoIterator<Item = (String, Vec<usize>, &'t [f32])>,
) -> Result<(), HfError> {
    let (specs, data): (Vec<TensorSpec>, Vec<&[f32]>) =
        tensors.into_iter().map(|(name, shape, data)| ((name, shape), data)).unzip();
    let names: Vec<String> = specs.iter().map(|(name, _)| name.clone()).collect();
    let mut w = TensorFileWriter::create(path, metadata, specs)?;
    for (name, data) in names.iter().zip(data) {
        w.write(name, data)?;
    }
    w.commit()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_back_what_was_written_and_so_does_the_crate() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.safetensors");
        let a: Vec<f32> = (0..CHUNK + 7).map(|i| i as f32 * 0.5).collect();
        let b = [1.0f32, -0.0, f32::MIN_POSITIVE, f32::MAX, 5.0, 6.0];
        let tensors = [
            ("z.weight".to_owned(), vec![CHUNK + 7], &a[..]),
            ("a.weight".to_owned(), vec![2, 3], &b[..]),
        ];
        save(&path, &[("step", "7")], tensors).unwrap();
        let f = TensorFile::open(&path).unwrap();
        assert_eq!(f.names(), ["z.weight", "a.weight"]);
        assert_eq!(f.shape("a.weight"), Some(&[2, 3][..]));
        assert_eq!(f.read("z.weight").unwrap(), a);
        assert_eq!(f.read("a.weight").unwrap(), b);
        assert_eq!((f.meta("step"), f.meta("format")), (Some("7"), Some("pt")));
        let mut row = [0.0; 3];
        f.read_at("a.weight", 3, &mut row).unwrap();
        assert_eq!(row, b[3..]);
        assert!(f.read_at("a.weight", 4, &mut row).is_err());
        let bytes = std::fs::read(&path).unwrap();
        let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(theirs.tensor("a.weight").unwrap().shape(), [2, 3]);
    }

    #[test]
    fn half_precision_is_widened() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.safetensors");
        let values = [0.5f32, -3.0, 65504.0];
        let f16: Vec<u8> =
            values.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect();
        let bf16: Vec<u8> =
            values[..2].iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect();
        use safetensors::tensor::TensorView;
        let views = [
            ("h", TensorView::new(Dtype::F16, vec![3], &f16).unwrap()),
            ("b", TensorView::new(Dtype::BF16, vec![2, 1], &bf16).unwrap()),
            ("i", TensorView::new(Dtype::U8, vec![6], &f16).unwrap()),
        ];
        std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
        let f = TensorFile::open(&path).unwrap();
        assert_eq!(f.read("h").unwrap(), values);
        assert_eq!(f.read("b").unwrap(), values[..2]);
        assert!(
            f.read("i")
                .unwrap_err()
                .to_string()
                .ends_with("type U8 cannot be read (F32, F16 and BF16 can)")
        );
        assert!(f.read("none").unwrap_err().to_string().ends_with("1 tensor(s) missing: none"));
    }

    #[test]
    fn broken_files_are_errors_with_the_path() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.safetensors");
        save(&path, &[], [("a".to_owned(), vec![4], &[0.0f32; 4][..])]).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for n in 0..whole.len() {
            std::fs::write(&path, &whole[..n]).unwrap();
            let e = TensorFile::open(&path).unwrap_err().to_string();
            assert!(e.starts_with(&path.display().to_string()), "{e}");
        }
        let header = |json: &str| {
            let mut b = (json.len() as u64).to_le_bytes().to_vec();
            b.extend_from_slice(json.as_bytes());
            b
        };
        let cases = [
            (vec![0xff; 64], "a header of 18446744073709551615 bytes in a file of 64"),
            (header("{\"a\": 3}"), "header: "),
            (
                header(
                    r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,0]}}"#,
                ),
                "header: ",
            ),
            (
                header(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#),
                "needs 8 bytes of data, found 0",
            ),
            (header(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#), "header: "),
        ];
        for (bytes, text) in cases {
            std::fs::write(&path, bytes).unwrap();
            let e = TensorFile::open(&path).unwrap_err().to_string();
            assert!(e.contains("not a readable safetensors file: ") && e.contains(text), "{e}");
        }
        assert!(TensorFile::open(dir.path()).is_err());
    }

    #[test]
    fn the_writer_checks_order_and_length() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.safetensors");
        let specs = || vec![("a".to_owned(), vec![2]), ("b".to_owned(), vec![1])];
        let mut w = TensorFileWriter::create(&path, &[], specs()).unwrap();
        assert!(w.write("b", &[0.0]).unwrap_err().to_string().contains("in turn is a"));
        assert!(w.write("a", &[0.0]).unwrap_err().to_string().contains("expected [2], found [1]"));
        w.write("a", &[0.0; 2]).unwrap();
        assert!(w.commit().unwrap_err().to_string().contains("tensor b was not written"));
        assert!(!path.exists());
        let twice = vec![("a".to_owned(), vec![2]); 2];
        assert!(TensorFileWriter::create(&path, &[], twice).is_err());
    }
}

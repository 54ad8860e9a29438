//! Reading: the whole directory is checked before anything is used.
//!
//! Every count and length is compared with the bytes that are left before a
//! loop over it starts, so a hostile file costs at most a small multiple of
//! its own size in memory and time.

use std::borrow::Cow;
use std::collections::HashMap;
use std::io::{Read, Seek, SeekFrom};
use std::ops::{Deref, Range};

use super::value::{Array, FromValue, Value, ValueType};
use super::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT, GgmlType, GgufError, MAGIC};

/// Most dimensions of a tensor (GGML_MAX_DIMS).
const MAX_DIMS: u32 = 4;
/// Deepest nesting of arrays in arrays that is followed.
const MAX_DEPTH: u32 = 4;
/// Largest alignment that is believed.
const MAX_ALIGNMENT: u64 = 1 << 20;

/// A tensor as the directory describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Its dimensions, the one that runs fastest first: `[in, out]` for what is
    /// `[out, in]` elsewhere in this project.
    pub dims: Vec<u64>,
    /// The type of its elements.
    pub ty: GgmlType,
    /// Where its data begins, in bytes from the beginning of the data section.
    pub offset: u64,
}

impl TensorInfo {
    /// How many elements there are.
    #[must_use]
    pub fn elements(&self) -> u64 {
        // The product was checked when the file was read.
        self.dims.iter().fold(1, |n, d| n.saturating_mul(*d))
    }

    /// Bytes of the data; none for an unknown type.
    #[must_use]
    pub fn bytes(&self) -> Option<u64> {
        self.ty.tensor_bytes(&self.dims).ok()
    }
}

/// Metadata and tensor directory of a file, without its data.
#[derive(Debug, Clone)]
pub struct Directory<'a> {
    file: String,
    version: u32,
    alignment: u64,
    metadata: Vec<(&'a str, Value<'a>)>,
    keys: HashMap<&'a str, usize>,
    tensors: Vec<TensorInfo>,
    names: HashMap<String, usize>,
    data_start: u64,
}

/// A whole file in memory (or mapped), with its directory checked.
///
/// It is a [`Directory`] too: all of that type's methods can be called on it.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    directory: Directory<'a>,
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Checks a file. `name` is what errors call it.
    ///
    /// # Errors
    /// Anything that is not a whole GGUF file of version 2 or 3 whose tensors
    /// lie inside it.
    pub fn parse(bytes: &'a [u8], name: &str) -> Result<Self, GgufError> {
        let directory = Directory::parse(bytes, bytes.len() as u64, name)?;
        Ok(Self { directory, bytes })
    }

    /// The data of a tensor.
    ///
    /// # Errors
    /// No tensor of that name, or one of an unknown type.
    pub fn tensor_data(&self, name: &str) -> Result<&'a [u8], GgufError> {
        let range = self.tensor_range(name)?;
        // In bounds: the directory was checked against the length of `bytes`.
        Ok(&self.bytes[range.start as usize..range.end as usize])
    }
}

impl<'a> Deref for Reader<'a> {
    type Target = Directory<'a>;

    fn deref(&self) -> &Directory<'a> {
        &self.directory
    }
}

impl<'a> Directory<'a> {
    /// Checks the directory of a file of `file_bytes` bytes that begins with
    /// `head`. `name` is what errors call it.
    ///
    /// # Errors
    /// As [`Reader::parse`]; [`GgufError::Truncated`] where `head` ends early.
    pub fn parse(head: &'a [u8], file_bytes: u64, name: &str) -> Result<Self, GgufError> {
        let mut c = Cursor { bytes: head, at: 0, file: name, what: "the header".into() };
        if !head.starts_with(&MAGIC) {
            let found = head[..head.len().min(4)].to_vec();
            return Err(GgufError::Magic { file: name.into(), found });
        }
        c.at = MAGIC.len();
        let version = c.u32()?;
        if !(2..=3).contains(&version) {
            return Err(GgufError::Version { file: name.into(), found: version });
        }
        let (tensor_count, key_count) = (c.u64()?, c.u64()?);
        // A key has at least a length, a type and a byte of value; a tensor a
        // length, a count of dimensions, a type and an offset.
        c.fits("the keys", key_count, 8 + 4 + 1)?;
        c.fits("the tensor directory", tensor_count, 8 + 4 + 4 + 8)?;

        let mut dir = Self {
            file: name.into(),
            version,
            alignment: DEFAULT_ALIGNMENT,
            metadata: Vec::new(),
            keys: HashMap::new(),
            tensors: Vec::new(),
            names: HashMap::new(),
            data_start: 0,
        };
        for i in 0..key_count {
            dir.read_key(&mut c, i)?;
        }
        if let Some(alignment) = dir.find::<u64>(ALIGNMENT_KEY)? {
            if !alignment.is_power_of_two() || alignment > MAX_ALIGNMENT {
                let what = format!("key {ALIGNMENT_KEY} = {alignment} is no usable power of two");
                return Err(c.invalid(what));
            }
            dir.alignment = alignment;
        }
        for i in 0..tensor_count {
            dir.read_tensor(&mut c, i)?;
        }
        dir.data_start = (c.at as u64).next_multiple_of(dir.alignment);
        dir.check_bounds(file_bytes)?;
        Ok(dir)
    }

    fn read_key(&mut self, c: &mut Cursor<'a, '_>, index: u64) -> Result<(), GgufError> {
        c.what = format!("the name of key {index}");
        let key = c.str()?;
        c.what = format!("key {key}");
        let ty = c.value_type()?;
        let value = c.value(ty, 0)?;
        if self.keys.insert(key, self.metadata.len()).is_some() {
            return Err(c.invalid(format!("key {key} appears twice")));
        }
        self.metadata.push((key, value));
        Ok(())
    }

    fn read_tensor(&mut self, c: &mut Cursor<'a, '_>, index: u64) -> Result<(), GgufError> {
        c.what = format!("the name of tensor {index}");
        let name = c.str()?.to_owned();
        c.what = format!("tensor {name}");
        let count = c.u32()?;
        if count > MAX_DIMS {
            return Err(c.invalid(format!("tensor {name} has {count} dimensions, of {MAX_DIMS}")));
        }
        let dims = (0..count).map(|_| c.u64()).collect::<Result<Vec<_>, _>>()?;
        let ty = GgmlType::from_id(c.u32()?);
        let offset = c.u64()?;
        if !offset.is_multiple_of(self.alignment) {
            let what = format!("tensor {name}: offset {offset} is not {}-aligned", self.alignment);
            return Err(c.invalid(what));
        }
        if self.names.insert(name.clone(), self.tensors.len()).is_some() {
            return Err(c.invalid(format!("tensor {name} appears twice")));
        }
        self.tensors.push(TensorInfo { name, dims, ty, offset });
        Ok(())
    }

    /// Every tensor lies inside the file, and no two overlap.
    fn check_bounds(&self, file_bytes: u64) -> Result<(), GgufError> {
        let mut order: Vec<&TensorInfo> = self.tensors.iter().collect();
        order.sort_by_key(|t| t.offset);
        let (mut last_end, mut last_name) = (0, "");
        for t in order {
            let need = match t.ty {
                GgmlType::Unknown(_) => 0,
                ty => ty.tensor_bytes(&t.dims).map_err(|e| self.invalid(&t.name, &e))?,
            };
            if t.offset < last_end {
                return Err(self.invalid(&t.name, &format!("overlaps tensor {last_name}")));
            }
            let overflow = || self.invalid(&t.name, "its end does not fit 64 bits");
            last_end = t.offset.checked_add(need).ok_or_else(overflow)?;
            last_name = &t.name;
            let end = last_end.checked_add(self.data_start).ok_or_else(overflow)?;
            if end > file_bytes {
                let at = end - need;
                return Err(GgufError::Truncated {
                    file: self.file.clone(),
                    what: format!("tensor {}", t.name),
                    at,
                    need,
                    left: file_bytes.saturating_sub(at),
                });
            }
        }
        Ok(())
    }

    fn invalid(&self, tensor: &str, why: &str) -> GgufError {
        GgufError::Invalid { file: self.file.clone(), what: format!("tensor {tensor}: {why}") }
    }

    /// What errors call the file.
    #[must_use]
    pub fn file(&self) -> &str {
        &self.file
    }

    /// The version of the container, 2 or 3.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The alignment of the tensors in bytes.
    #[must_use]
    pub fn alignment(&self) -> u64 {
        self.alignment
    }

    /// Where the data section begins in the file.
    #[must_use]
    pub fn data_start(&self) -> u64 {
        self.data_start
    }

    /// The metadata, in the order of the file.
    #[must_use]
    pub fn metadata(&self) -> &[(&'a str, Value<'a>)] {
        &self.metadata
    }

    /// The value of a key.
    #[must_use]
    pub fn value(&self, key: &str) -> Option<&Value<'a>> {
        self.keys.get(key).map(|&i| &self.metadata[i].1)
    }

    /// The value of a key that must be there.
    ///
    /// # Errors
    /// The key is missing, or its value has another type or does not fit.
    pub fn get<T: FromValue>(&self, key: &str) -> Result<T, GgufError> {
        self.find(key)?
            .ok_or_else(|| GgufError::MissingKey { file: self.file.clone(), key: key.into() })
    }

    /// The value of a key that may be absent.
    ///
    /// # Errors
    /// Its value has another type or does not fit.
    pub fn find<T: FromValue>(&self, key: &str) -> Result<Option<T>, GgufError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        T::from_value(value).map(Some).ok_or_else(|| self.key_type(key, T::EXPECTED, value))
    }

    /// A string that must be there, borrowed.
    ///
    /// # Errors
    /// As [`Directory::get`].
    pub fn str(&self, key: &str) -> Result<&str, GgufError> {
        match self.value(key) {
            Some(Value::String(v)) => Ok(v),
            Some(other) => Err(self.key_type(key, "string", other)),
            None => Err(GgufError::MissingKey { file: self.file.clone(), key: key.into() }),
        }
    }

    fn key_type(&self, key: &str, expected: &'static str, value: &Value<'_>) -> GgufError {
        let found = match value {
            Value::Array(_) | Value::String(_) => value.describe(),
            scalar => format!("{} {scalar}", value.describe()),
        };
        GgufError::KeyType { file: self.file.clone(), key: key.into(), expected, found }
    }

    /// The tensors, in the order of the file.
    #[must_use]
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor of that name.
    #[must_use]
    pub fn find_tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.names.get(name).map(|&i| &self.tensors[i])
    }

    /// The tensor of that name, which must be there.
    ///
    /// # Errors
    /// It is not.
    pub fn tensor(&self, name: &str) -> Result<&TensorInfo, GgufError> {
        self.find_tensor(name).ok_or_else(|| GgufError::MissingTensor {
            file: self.file.clone(),
            tensor: name.into(),
        })
    }

    /// Where a tensor's data lies, in bytes from the beginning of the file.
    ///
    /// # Errors
    /// No tensor of that name, or one of an unknown type.
    pub fn tensor_range(&self, name: &str) -> Result<Range<u64>, GgufError> {
        let info = self.tensor(name)?;
        let bytes = info.bytes().ok_or_else(|| GgufError::UnknownType {
            file: self.file.clone(),
            tensor: name.into(),
            ty: info.ty,
        })?;
        let start = self.data_start + info.offset;
        Ok(start..start + bytes)
    }
}

/// Reads as much of a file as holds its directory, for [`Directory::parse`]:
/// how a file that is larger than memory is looked into. Returns the bytes and
/// the length of the file.
///
/// # Errors
/// I/O errors, and a file whose directory [`Directory::parse`] refuses.
pub fn read_head<F: Read + Seek>(file: &mut F, name: &str) -> Result<(Vec<u8>, u64), GgufError> {
    /// Enough for most metadata; a large tokenizer takes a few more rounds.
    const FIRST: u64 = 1 << 20;
    let io = |source| GgufError::Read { file: name.into(), source };
    let total = file.seek(SeekFrom::End(0)).map_err(io)?;
    file.seek(SeekFrom::Start(0)).map_err(io)?;
    let (mut head, mut want) = (Vec::new(), FIRST);
    loop {
        let more = want.min(total) - head.len() as u64;
        let got = file.by_ref().take(more).read_to_end(&mut head).map_err(io)?;
        match Directory::parse(&head, total, name) {
            Ok(_) => return Ok((head, total)),
            Err(GgufError::Truncated { .. }) if got > 0 && (head.len() as u64) < total => want *= 2,
            Err(e) => return Err(e),
        }
    }
}

/// A position in the bytes, with what is being read there.
struct Cursor<'a, 'n> {
    bytes: &'a [u8],
    at: usize,
    file: &'n str,
    what: String,
}

impl<'a> Cursor<'a, '_> {
    fn invalid(&self, what: String) -> GgufError {
        GgufError::Invalid { file: self.file.into(), what }
    }

    fn left(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    fn truncated(&self, what: &str, need: u64) -> GgufError {
        GgufError::Truncated {
            file: self.file.into(),
            what: what.into(),
            at: self.at as u64,
            need,
            left: self.left(),
        }
    }

    /// Refuses a count whose smallest encoding is longer than what is left.
    fn fits(&self, what: &str, count: u64, each: u64) -> Result<u64, GgufError> {
        let need = count.saturating_mul(each);
        if need > self.left() {
            return Err(self.truncated(what, need));
        }
        Ok(need)
    }

    fn take(&mut self, n: u64) -> Result<&'a [u8], GgufError> {
        if n > self.left() {
            return Err(self.truncated(&self.what, n));
        }
        let start = self.at;
        self.at += n as usize;
        Ok(&self.bytes[start..self.at])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], GgufError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64)?);
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn str(&mut self) -> Result<&'a str, GgufError> {
        let n = self.u64()?;
        let bytes = self.take(n)?;
        std::str::from_utf8(bytes).map_err(|_| self.invalid(format!("{} is not UTF-8", self.what)))
    }

    fn bool(&mut self) -> Result<bool, GgufError> {
        match self.array()? {
            [0] => Ok(false),
            [1] => Ok(true),
            [n] => Err(self.invalid(format!("{}: {n} is not a bool", self.what))),
        }
    }

    fn value_type(&mut self) -> Result<ValueType, GgufError> {
        let id = self.u32()?;
        ValueType::from_id(id)
            .ok_or_else(|| self.invalid(format!("{}: value type {id} is not known", self.what)))
    }

    fn value(&mut self, ty: ValueType, depth: u32) -> Result<Value<'a>, GgufError> {
        Ok(match ty {
            ValueType::U8 => Value::U8(u8::from_le_bytes(self.array()?)),
            ValueType::I8 => Value::I8(i8::from_le_bytes(self.array()?)),
            ValueType::U16 => Value::U16(u16::from_le_bytes(self.array()?)),
            ValueType::I16 => Value::I16(i16::from_le_bytes(self.array()?)),
            ValueType::U32 => Value::U32(self.u32()?),
            ValueType::I32 => Value::I32(i32::from_le_bytes(self.array()?)),
            ValueType::F32 => Value::F32(f32::from_le_bytes(self.array()?)),
            ValueType::Bool => Value::Bool(self.bool()?),
            ValueType::String => Value::String(Cow::Borrowed(self.str()?)),
            ValueType::Array => Value::Array(self.array_value(depth)?),
            ValueType::U64 => Value::U64(self.u64()?),
            ValueType::I64 => Value::I64(i64::from_le_bytes(self.array()?)),
            ValueType::F64 => Value::F64(f64::from_le_bytes(self.array()?)),
        })
    }

    /// Checks every element and keeps the bytes.
    fn array_value(&mut self, depth: u32) -> Result<Array<'a>, GgufError> {
        if depth >= MAX_DEPTH {
            let what = format!("{}: arrays nested deeper than {MAX_DEPTH}", self.what);
            return Err(self.invalid(what));
        }
        let elem = self.value_type()?;
        let len = self.u64()?;
        let smallest = self.fits(&self.what, len, elem.min_bytes())?;
        let start = self.at;
        match elem {
            ValueType::String => {
                for _ in 0..len {
                    self.str()?;
                }
            }
            ValueType::Bool => {
                for _ in 0..len {
                    self.bool()?;
                }
            }
            ValueType::Array => {
                for _ in 0..len {
                    self.array_value(depth + 1)?;
                }
            }
            _ => {
                self.take(smallest)?;
            }
        }
        Ok(Array { elem, len, raw: Cow::Borrowed(&self.bytes[start..self.at]) })
    }
}

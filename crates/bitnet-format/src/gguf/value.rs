//! Metadata values. Strings and arrays borrow from the file that they were
//! checked in; values that are to be written own their bytes.

use std::borrow::Cow;
use std::fmt;

/// The type of a metadata value, by its number in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
#[allow(missing_docs, reason = "the name is all there is to say")]
pub enum ValueType {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    String = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

impl ValueType {
    /// Every type, in the order of their numbers.
    pub const ALL: [Self; 13] = [
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::Bool,
        Self::String,
        Self::Array,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    /// The type of that number.
    #[must_use]
    pub fn from_id(id: u32) -> Option<Self> {
        Self::ALL.get(id as usize).copied()
    }

    /// Bytes of a value, or of a string's or an array's smallest encoding.
    pub(super) const fn min_bytes(self) -> u64 {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 | Self::String => 8,
            Self::Array => 12,
        }
    }
}

impl fmt::Display for ValueType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&format!("{self:?}").to_lowercase())
    }
}

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "the name is all there is to say")]
pub enum Value<'a> {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(Cow<'a, str>),
    Array(Array<'a>),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// An array of values of one type, in the encoding of the file.
///
/// The bytes were checked when the array was made, so iterating cannot fail.
#[derive(Debug, Clone, PartialEq)]
pub struct Array<'a> {
    pub(super) elem: ValueType,
    pub(super) len: u64,
    pub(super) raw: Cow<'a, [u8]>,
}

impl Value<'_> {
    /// The type of the value.
    #[must_use]
    pub fn value_type(&self) -> ValueType {
        match self {
            Self::U8(_) => ValueType::U8,
            Self::I8(_) => ValueType::I8,
            Self::U16(_) => ValueType::U16,
            Self::I16(_) => ValueType::I16,
            Self::U32(_) => ValueType::U32,
            Self::I32(_) => ValueType::I32,
            Self::F32(_) => ValueType::F32,
            Self::Bool(_) => ValueType::Bool,
            Self::String(_) => ValueType::String,
            Self::Array(_) => ValueType::Array,
            Self::U64(_) => ValueType::U64,
            Self::I64(_) => ValueType::I64,
            Self::F64(_) => ValueType::F64,
        }
    }

    /// The type as errors name it: `u32`, `array of string`.
    #[must_use]
    pub fn describe(&self) -> String {
        match self {
            Self::Array(a) => format!("array of {}", a.elem),
            other => other.value_type().to_string(),
        }
    }

    /// The integer, whatever its width.
    fn integer(&self) -> Option<i128> {
        Some(match *self {
            Self::U8(v) => v.into(),
            Self::I8(v) => v.into(),
            Self::U16(v) => v.into(),
            Self::I16(v) => v.into(),
            Self::U32(v) => v.into(),
            Self::I32(v) => v.into(),
            Self::U64(v) => v.into(),
            Self::I64(v) => v.into(),
            _ => return None,
        })
    }

    /// Appends the value as a file holds it, without its type.
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::U8(v) => out.push(*v),
            Self::I8(v) => out.extend(v.to_le_bytes()),
            Self::U16(v) => out.extend(v.to_le_bytes()),
            Self::I16(v) => out.extend(v.to_le_bytes()),
            Self::U32(v) => out.extend(v.to_le_bytes()),
            Self::I32(v) => out.extend(v.to_le_bytes()),
            Self::F32(v) => out.extend(v.to_le_bytes()),
            Self::Bool(v) => out.push(u8::from(*v)),
            Self::String(v) => encode_str(v, out),
            Self::Array(a) => {
                out.extend((a.elem as u32).to_le_bytes());
                out.extend(a.len.to_le_bytes());
                out.extend_from_slice(&a.raw);
            }
            Self::U64(v) => out.extend(v.to_le_bytes()),
            Self::I64(v) => out.extend(v.to_le_bytes()),
            Self::F64(v) => out.extend(v.to_le_bytes()),
        }
    }
}

/// A value as a person reads it; of an array, the first elements.
impl fmt::Display for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// Elements of an array that are shown.
        const SHOWN: usize = 8;
        match self {
            Self::String(v) => write!(f, "{v:?}"),
            Self::Bool(v) => write!(f, "{v}"),
            Self::F32(v) => write!(f, "{v}"),
            Self::F64(v) => write!(f, "{v}"),
            Self::Array(a) => {
                f.write_str("[")?;
                for (i, v) in a.iter().take(SHOWN).enumerate() {
                    write!(f, "{}{v}", if i == 0 { "" } else { ", " })?;
                }
                let more = if a.len() > SHOWN { ", …" } else { "" };
                write!(f, "{more}] ({} × {})", a.len, a.elem)
            }
            other => write!(f, "{}", other.integer().unwrap_or_default()),
        }
    }
}

/// Appends a string as a file holds it: its length in bytes, then the bytes.
pub(super) fn encode_str(s: &str, out: &mut Vec<u8>) {
    out.extend((s.len() as u64).to_le_bytes());
    out.extend_from_slice(s.as_bytes());
}

impl<'a> Array<'a> {
    /// An array of owned bytes, made of values of one type.
    fn build<'v>(elem: ValueType, values: impl Iterator<Item = Value<'v>>) -> Self {
        let (mut raw, mut len) = (Vec::new(), 0);
        for v in values {
            v.encode(&mut raw);
            len += 1;
        }
        Self { elem, len, raw: Cow::Owned(raw) }
    }

    /// An array of strings.
    pub fn strings<S: AsRef<str>>(values: impl IntoIterator<Item = S>) -> Self {
        let (mut raw, mut len) = (Vec::new(), 0);
        for v in values {
            encode_str(v.as_ref(), &mut raw);
            len += 1;
        }
        Self { elem: ValueType::String, len, raw: Cow::Owned(raw) }
    }

    /// The type of the elements.
    #[must_use]
    pub fn elem(&self) -> ValueType {
        self.elem
    }

    /// How many elements there are.
    #[must_use]
    pub fn len(&self) -> usize {
        // An element has at least one byte and the bytes are in memory.
        self.len as usize
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements.
    pub fn iter(&self) -> impl Iterator<Item = Value<'_>> {
        let mut rest = &self.raw[..];
        (0..self.len).map_while(move |_| decode(self.elem, &mut rest))
    }
}

/// Takes one value from the front of bytes that were checked before; `None`
/// where they were not.
fn decode<'b>(ty: ValueType, rest: &mut &'b [u8]) -> Option<Value<'b>> {
    fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
        let (head, tail) = rest.split_first_chunk::<N>()?;
        *rest = tail;
        Some(*head)
    }
    Some(match ty {
        ValueType::U8 => Value::U8(u8::from_le_bytes(take(rest)?)),
        ValueType::I8 => Value::I8(i8::from_le_bytes(take(rest)?)),
        ValueType::U16 => Value::U16(u16::from_le_bytes(take(rest)?)),
        ValueType::I16 => Value::I16(i16::from_le_bytes(take(rest)?)),
        ValueType::U32 => Value::U32(u32::from_le_bytes(take(rest)?)),
        ValueType::I32 => Value::I32(i32::from_le_bytes(take(rest)?)),
        ValueType::F32 => Value::F32(f32::from_le_bytes(take(rest)?)),
        ValueType::Bool => Value::Bool(take::<1>(rest)? != [0]),
        ValueType::U64 => Value::U64(u64::from_le_bytes(take(rest)?)),
        ValueType::I64 => Value::I64(i64::from_le_bytes(take(rest)?)),
        ValueType::F64 => Value::F64(f64::from_le_bytes(take(rest)?)),
        ValueType::String => {
            let n = usize::try_from(u64::from_le_bytes(take(rest)?)).ok()?;
            let (head, tail) = rest.split_at_checked(n)?;
            *rest = tail;
            Value::String(Cow::Borrowed(std::str::from_utf8(head).ok()?))
        }
        ValueType::Array => {
            let elem = ValueType::from_id(u32::from_le_bytes(take(rest)?))?;
            let len = u64::from_le_bytes(take(rest)?);
            let start = *rest;
            for _ in 0..len {
                decode(elem, rest)?;
            }
            let raw = &start[..start.len() - rest.len()];
            Value::Array(Array { elem, len, raw: Cow::Borrowed(raw) })
        }
    })
}

macro_rules! from_scalar {
    ($($t:ty => $variant:ident),*) => {$(
        impl From<$t> for Value<'_> {
            fn from(v: $t) -> Self {
                Self::$variant(v)
            }
        }
        impl From<&[$t]> for Value<'_> {
            fn from(v: &[$t]) -> Self {
                let values = v.iter().map(|&x| Value::$variant(x));
                Self::Array(Array::build(ValueType::$variant, values))
            }
        }
    )*};
}
from_scalar!(u8 => U8, i8 => I8, u16 => U16, i16 => I16, u32 => U32, i32 => I32, f32 => F32,
    bool => Bool, u64 => U64, i64 => I64, f64 => F64);

impl<'a> From<&'a str> for Value<'a> {
    fn from(v: &'a str) -> Self {
        Self::String(Cow::Borrowed(v))
    }
}

impl From<String> for Value<'_> {
    fn from(v: String) -> Self {
        Self::String(Cow::Owned(v))
    }
}

impl From<&[String]> for Value<'_> {
    fn from(v: &[String]) -> Self {
        Self::Array(Array::strings(v))
    }
}

impl<'a> From<Array<'a>> for Value<'a> {
    fn from(v: Array<'a>) -> Self {
        Self::Array(v)
    }
}

/// What [`super::Directory::get`] can turn a value into.
pub trait FromValue: Sized {
    /// The type as an error names it.
    const EXPECTED: &'static str;

    /// The value, where it has a fitting type and range.
    fn from_value(value: &Value<'_>) -> Option<Self>;
}

macro_rules! from_integer {
    ($($t:ty: $name:literal),*) => {$(
        /// Any integer type, where the number fits.
        impl FromValue for $t {
            const EXPECTED: &'static str = $name;
            fn from_value(value: &Value<'_>) -> Option<Self> {
                value.integer()?.try_into().ok()
            }
        }
    )*};
}
from_integer!(u32: "u32", u64: "u64", usize: "a non-negative integer", i32: "i32");

/// An f32, or an f64 that is one exactly or is rounded to one.
impl FromValue for f32 {
    const EXPECTED: &'static str = "f32";
    fn from_value(value: &Value<'_>) -> Option<Self> {
        match *value {
            Value::F32(v) => Some(v),
            Value::F64(v) => Some(v as f32),
            _ => None,
        }
    }
}

impl FromValue for bool {
    const EXPECTED: &'static str = "bool";
    fn from_value(value: &Value<'_>) -> Option<Self> {
        match *value {
            Value::Bool(v) => Some(v),
            _ => None,
        }
    }
}

impl FromValue for String {
    const EXPECTED: &'static str = "string";
    fn from_value(value: &Value<'_>) -> Option<Self> {
        match value {
            Value::String(v) => Some(v.clone().into_owned()),
            _ => None,
        }
    }
}

macro_rules! from_array {
    ($($t:ty: $name:literal),*) => {$(
        impl FromValue for Vec<$t> {
            const EXPECTED: &'static str = $name;
            fn from_value(value: &Value<'_>) -> Option<Self> {
                let Value::Array(a) = value else { return None };
                a.iter().map(|v| <$t>::from_value(&v)).collect()
            }
        }
    )*};
}
from_array!(u32: "array of u32", i32: "array of i32", f32: "array of f32", String: "array of string");

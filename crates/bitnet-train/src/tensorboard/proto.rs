//! The messages of TensorBoard that are written here, field numbers and all as in
//! `event.proto`, `summary.proto` and `tensor.proto` of the tensorboard project, and
//! the frame that holds one in a file (TFRecord).

use prost::Message;

/// `DT_STRING` of `types.proto`.
const DT_STRING: i32 = 7;
/// `SessionLog.START`.
const START: i32 = 1;

#[derive(Clone, PartialEq, Message)]
pub(super) struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    pub(super) wall_time: f64,
    #[prost(int64, tag = "2")]
    pub(super) step: i64,
    #[prost(string, optional, tag = "3")]
    pub(super) file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    pub(super) summary: Option<Summary>,
    #[prost(message, optional, tag = "7")]
    pub(super) session_log: Option<SessionLog>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

impl SessionLog {
    /// TensorBoard forgets what it read of this step and of later ones.
    pub(super) fn start() -> Self {
        Self { status: START }
    }
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Summary {
    #[prost(message, repeated, tag = "1")]
    pub(super) values: Vec<Value>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Value {
    #[prost(string, tag = "1")]
    pub(super) tag: String,
    #[prost(float, optional, tag = "2")]
    pub(super) simple_value: Option<f32>,
    #[prost(message, optional, tag = "8")]
    tensor: Option<Tensor>,
    #[prost(message, optional, tag = "9")]
    metadata: Option<Metadata>,
}

impl Value {
    /// A number of a curve.
    pub(super) fn scalar(tag: impl Into<String>, value: f64) -> Self {
        let simple_value = Some(value as f32);
        Self { tag: tag.into(), simple_value, tensor: None, metadata: None }
    }

    /// A text for the text plugin, which reads it as Markdown.
    pub(super) fn text(tag: impl Into<String>, text: &str) -> Self {
        let shape = Shape { dim: vec![Dimension { size: 1 }] };
        let string_val = vec![text.as_bytes().to_vec()];
        let plugin_data = Some(PluginData { plugin_name: "text".to_owned() });
        Self {
            tag: tag.into(),
            simple_value: None,
            tensor: Some(Tensor { dtype: DT_STRING, shape: Some(shape), string_val }),
            metadata: Some(Metadata { plugin_data }),
        }
    }
}

#[derive(Clone, PartialEq, Message)]
struct Metadata {
    #[prost(message, optional, tag = "1")]
    plugin_data: Option<PluginData>,
}

#[derive(Clone, PartialEq, Message)]
struct PluginData {
    #[prost(string, tag = "1")]
    plugin_name: String,
}

#[derive(Clone, PartialEq, Message)]
struct Tensor {
    #[prost(int32, tag = "1")]
    dtype: i32,
    #[prost(message, optional, tag = "2")]
    shape: Option<Shape>,
    #[prost(bytes = "vec", repeated, tag = "8")]
    string_val: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
struct Shape {
    #[prost(message, repeated, tag = "2")]
    dim: Vec<Dimension>,
}

#[derive(Clone, PartialEq, Message)]
struct Dimension {
    #[prost(int64, tag = "1")]
    size: i64,
}

/// TFRecord's checksum: CRC-32C, rotated and shifted so that a checksum of data
/// that holds checksums is none by chance.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// An event in its frame: length, its checksum, the event, its checksum; all
/// numbers little-endian.
pub(super) fn frame(event: &Event) -> Vec<u8> {
    let data = event.encode_to_vec();
    let length = (data.len() as u64).to_le_bytes();
    let mut out = Vec::with_capacity(data.len() + 16);
    out.extend(length);
    out.extend(masked_crc(&length).to_le_bytes());
    out.extend(&data);
    out.extend(masked_crc(&data).to_le_bytes());
    out
}

/// The first event of `bytes` and the length of its frame; none where the frame is
/// cut off or does not match its checksums.
pub(super) fn unframe(bytes: &[u8]) -> Option<(Event, usize)> {
    let word = |at: usize| {
        let bytes = bytes.get(at..at.checked_add(4)?)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    };
    let length = bytes.get(..8)?;
    if word(8)? != masked_crc(length) {
        return None;
    }
    let length = usize::try_from(u64::from_le_bytes(length.try_into().ok()?)).ok()?;
    let end = length.checked_add(12)?;
    let data = bytes.get(12..end)?;
    (word(end)? == masked_crc(data)).then_some(())?;
    Some((Event::decode(data).ok()?, end + 4))
}

//! The container as a whole: identity, truncation, hostile and foreign files.

use std::io::Cursor;

use proptest::prelude::*;

use super::*;

/// A small file with every kind of value and the tensors `(name, dims, ty)`,
/// whose bytes count up.
fn file(tensors: &[(&str, &[u64], GgmlType)]) -> Vec<u8> {
    let mut header = Header::new("t.gguf", 64).unwrap();
    header.put("general.architecture", "test").unwrap();
    header.put("a.u8", 1u8).unwrap();
    header.put("a.i64", -5i64).unwrap();
    header.put("a.f32", 0.5f32).unwrap();
    header.put("a.bool", true).unwrap();
    header.put("a.u32s", &[1u32, 2, 3][..]).unwrap();
    header.put("a.f32s", &[1.5f32, -2.5][..]).unwrap();
    header.put("a.bools", &[true, false][..]).unwrap();
    header.put("a.strings", Array::strings(["x", "", "žluť"])).unwrap();
    for (name, dims, ty) in tensors {
        header.tensor(name, dims, *ty).unwrap();
    }
    let infos = header.tensors().to_vec();
    let mut w = Writer::start(Vec::new(), header).unwrap();
    for info in infos {
        let data: Vec<u8> = (0..info.bytes().unwrap()).map(|i| i as u8).collect();
        let (a, b) = data.split_at(data.len() / 3);
        w.write(&info.name, a).unwrap();
        w.write(&info.name, b).unwrap();
    }
    w.finish().unwrap()
}

const TENSORS: &[(&str, &[u64], GgmlType)] = &[
    ("norm", &[5], GgmlType::F32),
    ("emb", &[3, 7], GgmlType::F16),
    ("w", &[64, 2], GgmlType::I8),
];

fn error(bytes: &[u8]) -> String {
    Reader::parse(bytes, "t.gguf").unwrap_err().to_string()
}

#[test]
fn reads_back_what_was_written() {
    let bytes = file(TENSORS);
    let r = Reader::parse(&bytes, "t.gguf").unwrap();
    assert_eq!((r.version(), r.alignment(), r.file()), (3, 64, "t.gguf"));
    assert_eq!(r.get::<u32>("a.u8").unwrap(), 1);
    assert_eq!(r.get::<i32>("a.i64").unwrap(), -5);
    assert_eq!(r.get::<f32>("a.f32").unwrap(), 0.5);
    assert!(r.get::<bool>("a.bool").unwrap());
    assert_eq!(r.get::<Vec<u32>>("a.u32s").unwrap(), [1, 2, 3]);
    assert_eq!(r.get::<Vec<f32>>("a.f32s").unwrap(), [1.5, -2.5]);
    assert_eq!(r.get::<Vec<String>>("a.strings").unwrap(), ["x", "", "žluť"]);
    assert_eq!(r.str("general.architecture").unwrap(), "test");
    assert_eq!(r.find::<u32>("a.none").unwrap(), None);
    assert_eq!(r.tensors().len(), 3);
    let emb = r.tensor("emb").unwrap();
    assert_eq!((emb.dims.as_slice(), emb.ty, emb.elements()), (&[3u64, 7][..], GgmlType::F16, 21));
    for info in r.tensors() {
        let data = r.tensor_data(&info.name).unwrap();
        assert_eq!(data.len() as u64, info.bytes().unwrap());
        assert!(data.iter().enumerate().all(|(i, &b)| b == i as u8), "{}", info.name);
        assert_eq!(r.tensor_range(&info.name).unwrap().start % 64, 0);
    }
    assert_eq!(r.value("a.u32s").unwrap().to_string(), "[1, 2, 3] (3 × u32)");
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = file(TENSORS);
    let end = {
        let r = Reader::parse(&bytes, "t.gguf").unwrap();
        r.tensor_range("w").unwrap().end as usize
    };
    assert_eq!(end, bytes.len(), "the last tensor needs no padding");
    for n in 0..end {
        let e = error(&bytes[..n]);
        assert!(e.starts_with("t.gguf: "), "{n}: {e}");
        assert!(e.contains("truncated") || n < 4 && e.contains("not a GGUF"), "{n}: {e}");
    }
}

#[test]
fn every_flipped_byte_is_survived() {
    let bytes = file(TENSORS);
    for at in 0..bytes.len() {
        for value in [0x00, 0x01, 0x7f, 0x80, 0xff] {
            let mut b = bytes.clone();
            b[at] = value;
            if let Ok(r) = Reader::parse(&b, "t.gguf") {
                for info in r.tensors() {
                    let _ = r.tensor_data(&info.name);
                }
                for (_, v) in r.metadata() {
                    let _ = v.to_string();
                }
            }
        }
    }
}

/// A header by hand: tensor and key counts, then `rest`.
fn raw(tensors: u64, keys: u64, rest: &[&[u8]]) -> Vec<u8> {
    let mut b = b"GGUF\x03\0\0\0".to_vec();
    b.extend(tensors.to_le_bytes());
    b.extend(keys.to_le_bytes());
    rest.iter().for_each(|r| b.extend_from_slice(r));
    b
}

fn string(s: &str) -> Vec<u8> {
    let mut b = (s.len() as u64).to_le_bytes().to_vec();
    b.extend_from_slice(s.as_bytes());
    b
}

fn tensor(name: &str, dims: &[u64], ty: u32, offset: u64) -> Vec<u8> {
    let mut b = string(name);
    b.extend((dims.len() as u32).to_le_bytes());
    dims.iter().for_each(|d| b.extend(d.to_le_bytes()));
    b.extend(ty.to_le_bytes());
    b.extend(offset.to_le_bytes());
    b
}

fn key(name: &str, ty: u32, value: &[u8]) -> Vec<u8> {
    [&string(name)[..], &ty.to_le_bytes(), value].concat()
}

#[test]
fn hostile_files_are_refused() {
    let max = u64::MAX.to_le_bytes();
    let array = |elem: u32, len: u64| [&elem.to_le_bytes()[..], &len.to_le_bytes()].concat();
    let nested: Vec<u8> = (0..5).flat_map(|_| array(9, 1)).collect();
    let twice = [key("k", 0, &[1]), key("k", 0, &[1])].concat();
    let two_tensors = [tensor("t", &[8], 0, 0), tensor("t", &[8], 0, 0)].concat();
    let overlap = [tensor("t", &[16], 0, 0), tensor("u", &[16], 0, 32), vec![0; 256]].concat();
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("foreign", b"PK\x03\x04....".to_vec(), "not a GGUF file"),
        ("version 1", b"GGUF\x01\0\0\0".to_vec(), "version 1"),
        ("big endian", b"GGUF\0\0\0\x03".to_vec(), "version 50331648"),
        ("key count", raw(0, u64::MAX, &[]), "truncated: the keys"),
        ("tensor count", raw(u64::MAX, 0, &[]), "truncated: the tensor directory"),
        ("key length", raw(0, 1, &[&max, &[0; 64]]), "the name of key 0"),
        ("key not UTF-8", raw(0, 1, &[&1u64.to_le_bytes(), &[0xff], &[0; 9]]), "not UTF-8"),
        ("value type", raw(0, 1, &[&key("k", 13, &[0])]), "key k: value type 13"),
        ("bool", raw(0, 1, &[&key("k", 7, &[2])]), "key k: 2 is not a bool"),
        ("array length", raw(0, 1, &[&key("k", 9, &array(4, u64::MAX))]), "truncated: key k"),
        ("string array", raw(0, 1, &[&key("k", 9, &array(8, 1 << 60))]), "truncated: key k"),
        ("nesting", raw(0, 1, &[&key("k", 9, &nested), &[0; 64]]), "nested deeper"),
        ("two keys", raw(0, 2, &[&twice]), "key k appears twice"),
        ("alignment 0", raw(0, 1, &[&key(ALIGNMENT_KEY, 4, &[0; 4])]), "power of two"),
        ("alignment 48", raw(0, 1, &[&key(ALIGNMENT_KEY, 4, &[48, 0, 0, 0])]), "power of two"),
        (
            "alignment type",
            raw(0, 1, &[&key(ALIGNMENT_KEY, 6, &[0; 4])]),
            "expected u64, found f32",
        ),
        ("two tensors", raw(2, 0, &[&two_tensors, &[0; 256]]), "tensor t appears twice"),
        ("overlap", raw(2, 0, &[&overlap]), "tensor u: overlaps tensor t"),
        ("dimensions", raw(1, 0, &[&tensor("t", &[1; 5], 0, 0)]), "5 dimensions"),
        ("product", raw(1, 0, &[&tensor("t", &[1 << 40, 1 << 40], 0, 0)]), "64 bits"),
        ("offset end", raw(1, 0, &[&tensor("t", &[1 << 62], 24, 1 << 63)]), "truncated: tensor t"),
        ("offset far", raw(1, 0, &[&tensor("t", &[u64::MAX], 24, !31)]), "64 bits"),
        ("offset unaligned", raw(1, 0, &[&tensor("t", &[4], 0, 4)]), "not 32-aligned"),
        ("block", raw(1, 0, &[&tensor("t", &[100], 34, 0)]), "in blocks of 256"),
        ("data", raw(1, 0, &[&tensor("t", &[64], 0, 0), &[0; 100]]), "needs 256 bytes"),
    ];
    for (what, bytes, text) in cases {
        let e = error(&bytes);
        assert!(e.starts_with("t.gguf: ") && e.contains(text), "{what}: {e}");
    }
}

#[test]
fn an_unknown_type_is_listed_and_not_read() {
    let bytes = raw(1, 0, &[&tensor("t", &[7, 3], 99, 0), &[0; 64]]);
    let r = Reader::parse(&bytes, "t.gguf").unwrap();
    assert_eq!(r.tensor("t").unwrap().ty.to_string(), "unknown(99)");
    let e = r.tensor_data("t").unwrap_err().to_string();
    assert_eq!(e, "t.gguf: tensor t: type unknown(99) is not known, so its data cannot be read");
}

#[test]
fn errors_name_key_and_types() {
    let bytes = file(TENSORS);
    let r = Reader::parse(&bytes, "t.gguf").unwrap();
    let cases = [
        (r.get::<u32>("a.none").unwrap_err(), "t.gguf: key a.none is missing"),
        (r.get::<u32>("a.f32").unwrap_err(), "t.gguf: key a.f32: expected u32, found f32 0.5"),
        (r.get::<u32>("a.i64").unwrap_err(), "t.gguf: key a.i64: expected u32, found i64 -5"),
        (
            r.get::<Vec<u32>>("a.strings").unwrap_err(),
            "t.gguf: key a.strings: expected array of u32, found array of string",
        ),
        (r.str("a.bool").unwrap_err(), "t.gguf: key a.bool: expected string, found bool true"),
        (r.tensor("nope").unwrap_err(), "t.gguf: tensor nope is missing"),
        (r.tensor_data("nope").unwrap_err(), "t.gguf: tensor nope is missing"),
    ];
    for (e, text) in cases {
        assert_eq!(e.to_string(), text);
    }
}

#[test]
fn the_writer_refuses_what_the_reader_would() {
    assert!(Header::new("t", 48).is_err());
    let mut h = Header::new("t", 32).unwrap();
    h.put("k", 1u32).unwrap();
    assert!(h.put("k", 2u32).is_err());
    h.tensor("a", &[4], GgmlType::F32).unwrap();
    h.tensor("b", &[4], GgmlType::F32).unwrap();
    assert!(h.tensor("a", &[4], GgmlType::F32).is_err());
    assert!(h.tensor("q", &[33], GgmlType::Q8_0).is_err());
    assert!(h.tensor("q", &[1; 5], GgmlType::I8).is_err());
    assert!(h.tensor("q", &[1], GgmlType::Unknown(77)).is_err());
    assert!(h.tensor("q", &[1 << 40, 1 << 40], GgmlType::I8).is_err());
    let mut w = Writer::start(Vec::new(), h).unwrap();
    assert!(w.write("b", &[0; 16]).unwrap_err().to_string().contains("in turn is a"));
    assert!(w.write("a", &[0; 17]).unwrap_err().to_string().contains("17 bytes"));
    w.write("a", &[0; 16]).unwrap();
    w.write("b", &[0; 15]).unwrap();
    assert!(w.finish().unwrap_err().to_string().contains("tensor b: only 15 bytes"));
}

#[test]
fn a_head_is_read_from_a_long_file() {
    let mut header = Header::new("t.gguf", 64).unwrap();
    let tokens: Vec<String> = (0..200_000).map(|i| format!("token {i}")).collect();
    header.put("tokens", &tokens[..]).unwrap();
    header.tensor("w", &[3 << 20], GgmlType::I8).unwrap();
    let mut w = Writer::start(Vec::new(), header).unwrap();
    w.write("w", &vec![1; 3 << 20]).unwrap();
    let bytes = w.finish().unwrap();
    let (head, total) = read_head(&mut Cursor::new(&bytes), "t.gguf").unwrap();
    assert_eq!(total, bytes.len() as u64);
    let dir = Directory::parse(&head, total, "t.gguf").unwrap();
    assert!(dir.data_start() > 1 << 20 && head.len() < bytes.len());
    assert_eq!(dir.get::<Vec<String>>("tokens").unwrap(), tokens);
    let cut = &bytes[..bytes.len() - 1];
    assert!(read_head(&mut Cursor::new(cut), "t.gguf").is_err());
    assert!(read_head(&mut Cursor::new(&bytes[..100]), "t.gguf").is_err());
}

#[test]
fn files_of_other_tools_are_read() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    for (name, ty) in [
        ("tiny-i2_s.gguf", GgmlType::I2_S),
        ("tiny-tq1_0.gguf", GgmlType::TQ1_0),
        ("tiny-tq2_0.gguf", GgmlType::TQ2_0),
    ] {
        let bytes = std::fs::read(folder.join(name)).unwrap();
        let r = Reader::parse(&bytes, name).unwrap();
        let arch = r.str("general.architecture").unwrap();
        assert!(arch.starts_with("bitnet"), "{name}: {arch}");
        assert_eq!(r.get::<u32>(&format!("{arch}.embedding_length")).unwrap(), 256);
        assert_eq!(r.get::<Vec<String>>("tokenizer.ggml.tokens").unwrap().len(), 512);
        let ternary = r.tensors().iter().filter(|t| t.ty == ty).count();
        assert_eq!(ternary, 4 * 7, "{name}");
        assert_eq!(r.tensor("blk.3.ffn_down.weight").unwrap().dims, [512, 256]);
        assert_eq!(r.tensor("token_embd.weight").unwrap().ty, GgmlType::F16);
        // The directory accounts for the whole file: the types' sizes are right.
        let last = r.tensors().iter().map(|t| r.tensor_range(&t.name).unwrap().end).max().unwrap();
        assert_eq!(last.next_multiple_of(r.alignment()), bytes.len() as u64, "{name}");
    }
}

fn scalar() -> impl Strategy<Value = Value<'static>> {
    prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i8>().prop_map(Value::I8),
        any::<u16>().prop_map(Value::U16),
        any::<i16>().prop_map(Value::I16),
        any::<u32>().prop_map(Value::U32),
        any::<i32>().prop_map(Value::I32),
        // Without NaN, which equals nothing.
        proptest::num::f32::NORMAL.prop_map(Value::F32),
        any::<bool>().prop_map(Value::Bool),
        any::<String>().prop_map(Value::from),
        any::<u64>().prop_map(Value::U64),
        any::<i64>().prop_map(Value::I64),
        proptest::num::f64::NORMAL.prop_map(Value::F64),
    ]
}

fn value() -> impl Strategy<Value = Value<'static>> {
    prop_oneof![
        scalar(),
        proptest::collection::vec(any::<String>(), 0..5).prop_map(|v| Array::strings(v).into()),
        proptest::collection::vec(any::<u32>(), 0..50).prop_map(|v| Value::from(&v[..])),
        proptest::collection::vec(any::<bool>(), 0..50).prop_map(|v| Value::from(&v[..])),
        proptest::collection::vec(any::<i64>(), 0..50).prop_map(|v| Value::from(&v[..])),
    ]
}

proptest! {
    #[test]
    fn writing_then_reading_is_identity(
        values in proptest::collection::vec(value(), 0..8),
        sizes in proptest::collection::vec((0u64..40, 0u64..5), 0..6),
        align in 3u32..9,
    ) {
        let mut header = Header::new("p", 1 << align).unwrap();
        for (i, v) in values.iter().enumerate() {
            header.put(&format!("key.{i}"), v.clone()).unwrap();
        }
        for (i, (a, b)) in sizes.iter().enumerate() {
            header.tensor(&format!("t{i}"), &[*a, *b], GgmlType::F16).unwrap();
        }
        let data = |i: usize, n: u64| (0..n).map(|j| (i as u64 * 31 + j) as u8).collect::<Vec<_>>();
        let mut w = Writer::start(Vec::new(), header).unwrap();
        for (i, (a, b)) in sizes.iter().enumerate() {
            w.write(&format!("t{i}"), &data(i, a * b * 2)).unwrap();
        }
        let bytes = w.finish().unwrap();
        let r = Reader::parse(&bytes, "p").unwrap();
        prop_assert_eq!(r.metadata().len(), values.len() + 1);
        for (i, v) in values.iter().enumerate() {
            prop_assert_eq!(r.value(&format!("key.{i}")).unwrap(), v);
        }
        for (i, (a, b)) in sizes.iter().enumerate() {
            prop_assert_eq!(r.tensor_data(&format!("t{i}")).unwrap(), data(i, a * b * 2));
        }
    }

    #[test]
    fn noise_after_the_magic_is_never_a_panic(noise in proptest::collection::vec(any::<u8>(), 0..300)) {
        let bytes = [b"GGUF\x03\0\0\0", &noise[..]].concat();
        let _ = Reader::parse(&bytes, "n");
    }
}

use proptest::prelude::*;

use super::*;
use crate::gguf::{Reader, TensorInfo};

fn fixture(name: &str) -> Vec<u8> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    std::fs::read(folder.join(name)).unwrap()
}

/// Random blocks of every type against the values that gguf-py gives them.
#[test]
fn blocks_decode_to_the_same_bits_as_elsewhere() {
    let bytes = fixture("blocks.gguf");
    let r = Reader::parse(&bytes, "blocks.gguf").unwrap();
    let blocks: Vec<&TensorInfo> =
        r.tensors().iter().filter(|t| !t.name.ends_with(".f32")).collect();
    assert_eq!(blocks.len(), 8);
    for info in blocks {
        let mut want = vec![0.0; info.elements() as usize];
        let values = r.tensor_data(&format!("{}.f32", info.name)).unwrap();
        decode(GgmlType::F32, values, &mut want).unwrap();
        let mut found = vec![0.0; want.len()];
        decode(info.ty, r.tensor_data(&info.name).unwrap(), &mut found).unwrap();
        for (i, (f, w)) in found.iter().zip(&want).enumerate() {
            assert_eq!(f.to_bits(), w.to_bits(), "{} element {i}: {f} {w}", info.name);
        }
    }
}

/// The same weights as three tools packed them.
#[test]
fn ternary_files_of_other_tools_hold_the_same_weights() {
    let files = [
        ("tiny-i2_s.gguf", GgmlType::I2_S),
        ("tiny-tq1_0.gguf", GgmlType::TQ1_0),
        ("tiny-tq2_0.gguf", GgmlType::TQ2_0),
    ];
    let bytes = files.map(|(name, _)| fixture(name));
    let readers: Vec<_> =
        files.iter().zip(&bytes).map(|((name, _), b)| Reader::parse(b, name).unwrap()).collect();
    let mut compared = 0;
    for info in readers[0].tensors().iter().filter(|t| t.ty == GgmlType::I2_S) {
        let elements = info.elements() as usize;
        let mut all = Vec::new();
        for ((_, ty), r) in files.iter().zip(&readers) {
            let data = r.tensor_data(&info.name).unwrap();
            let (trits, scale) = decode_ternary(*ty, data, elements, I2sLayout::X86).unwrap();
            // Written again it is the same codes; the scales are in other places.
            let again = encode_ternary(*ty, &trits, scale).unwrap();
            match ty {
                GgmlType::I2_S => assert_eq!(again[..elements / 4 + 4], data[..elements / 4 + 4]),
                _ => {
                    let width = ty.size().unwrap().bytes as usize;
                    for (a, b) in again.chunks(width).zip(data.chunks(width)) {
                        assert_eq!(a[..width - 2], b[..width - 2], "{}", info.name);
                    }
                }
            }
            all.push((trits, scale));
        }
        for sign in [-1, 0, 1] {
            let share = all[0].0.iter().filter(|t| **t == sign).count() as f32 / elements as f32;
            assert!((0.2..0.5).contains(&share), "{}: {share} of {sign}", info.name);
        }
        assert!(all[0] == all[1] && all[1] == all[2], "{}", info.name);
        compared += elements;
    }
    assert_eq!(compared, 4 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256));
}

/// Codes laid out by hand, value by value: `[run][byte]` of a block.
#[test]
fn the_layouts_of_i2_s_differ_in_the_length_of_a_run() {
    // 0, 1, -1, 0, 0, 1, ...: no period of 16, 32 or 64.
    let trits: Vec<i8> = (0..256usize).map(|i| (i * i % 7 % 3) as i8 - 1).collect();
    for (layout, run) in [(I2sLayout::X86, 32), (I2sLayout::Arm, 16)] {
        let mut bytes = vec![0u8; 256 / 4];
        for (i, t) in trits.iter().enumerate() {
            let (block, at) = (i / (4 * run), i % (4 * run));
            bytes[block * run + at % run] |= ((t + 1) as u8) << (6 - 2 * (at / run));
        }
        bytes.extend(0.25f32.to_le_bytes());
        bytes.resize(256 / 4 + 32, 0);
        let read = |as_layout| decode_ternary(GgmlType::I2_S, &bytes, 256, as_layout).unwrap();
        assert_eq!(read(layout), (trits.clone(), 0.25));
        // The other one reads it without complaint, as other weights.
        for other in I2sLayout::ALL.into_iter().filter(|other| *other != layout) {
            assert_ne!(read(other).0, trits);
        }
        let written = encode_ternary(GgmlType::I2_S, &trits, 0.25).unwrap();
        assert_eq!(written == bytes, layout == I2sLayout::X86);
        bytes[run + 3] |= 0b0011_0000;
        let error = decode_ternary(GgmlType::I2_S, &bytes, 256, layout).unwrap_err();
        let at = 4 * run + run + 3;
        assert_eq!(error, BlockError::Code { ty: GgmlType::I2_S, at });
    }
    // Half a block of x86 is a whole one of ARM.
    let half = [0u8; 16 + 32];
    assert!(decode_ternary(GgmlType::I2_S, &half, 64, I2sLayout::X86).is_err());
    assert_eq!(decode_ternary(GgmlType::I2_S, &half, 64, I2sLayout::Arm).unwrap().0, [-1; 64]);
    assert_eq!(I2sLayout::ALL.map(|l| l.name().parse()), I2sLayout::ALL.map(Ok));
    assert_eq!("neon".parse::<I2sLayout>().unwrap_err(), "unknown builds; known: x86, arm");
}

#[test]
fn what_is_wrong_with_a_tensor_is_named() {
    let trits = [1i8; 512];
    let tq2 = encode_ternary(GgmlType::TQ2_0, &trits, 9.0).unwrap();
    let i2 = encode_ternary(GgmlType::I2_S, &trits, 0.5).unwrap();
    let edit = |bytes: &[u8], at: usize, with: &[u8]| {
        let mut b = bytes.to_vec();
        b[at..at + with.len()].copy_from_slice(with);
        b
    };
    let two = f16::from_f32(2.0).to_le_bytes();
    let cases = [
        (GgmlType::TQ2_0, edit(&tq2, 67, &[255]), "element 257: a code of 3"),
        (GgmlType::I2_S, edit(&i2, 33, &[255]), "element 129: a code of 3"),
        (
            GgmlType::TQ2_0,
            edit(&tq2, 130, &two),
            "the block of element 256 has the scale 2, earlier ones 1",
        ),
        (GgmlType::I2_S, edit(&i2, 128, &f32::NAN.to_le_bytes()), "a scale of NaN"),
        (GgmlType::I2_S, edit(&i2, 128, &(-1.0f32).to_le_bytes()), "a scale of -1"),
        (GgmlType::I2_S, i2[..159].to_vec(), "159 bytes for 512 elements of I2_S"),
        (GgmlType::Q8_0, vec![], "type Q8_0 cannot be read here"),
    ];
    for (ty, bytes, text) in cases {
        let e = decode_ternary(ty, &bytes, 512, I2sLayout::X86).unwrap_err().to_string();
        assert!(e.contains(text), "{e}");
    }
    assert!(decode_ternary(GgmlType::I2_S, &[0; 96], 64, I2sLayout::X86).is_err());
    assert!(encode_ternary(GgmlType::TQ1_0, &trits[..128], 1.0).is_err());
    assert!(decode(GgmlType::I2_S, &[], &mut []).is_err());
    assert!(decode(GgmlType::Q8_0, &[0; 33], &mut [0.0; 32]).is_err());
    let e = trits_of_floats(&[0.0, 0.5, -0.5, 0.25]).unwrap_err().to_string();
    assert!(e.contains("element 3 is 0.25: the values are not -0.5, 0 and 0.5"), "{e}");
    assert_eq!(trits_of_floats(&[0.0, -0.5, 0.5]).unwrap(), (vec![0, -1, 1], 0.5));
    // Blocks of zeros may have the scale 0.
    let zeros = encode_ternary(GgmlType::TQ2_0, &[0; 512], 1.0).unwrap();
    let mixed = [&edit(&zeros, 64, &[0, 0])[..66], &tq2[..66]].concat();
    assert_eq!(decode_ternary(GgmlType::TQ2_0, &mixed, 512, I2sLayout::X86).unwrap().1, 1.0);
    let none = edit(&zeros, 64, &[0, 0]);
    assert_eq!(
        decode_ternary(GgmlType::TQ2_0, &none[..66], 256, I2sLayout::X86).unwrap(),
        (vec![0; 256], 1.0)
    );
}

proptest! {
    #[test]
    fn ternary_values_come_back(
        trits in proptest::collection::vec(-1i8..=1, 768),
        scale in 1e-6f32..1e6,
    ) {
        for ty in [GgmlType::TQ1_0, GgmlType::TQ2_0, GgmlType::I2_S] {
            let bytes = encode_ternary(ty, &trits, scale).unwrap();
            prop_assert_eq!(bytes.len() as u64, ty.tensor_bytes(&[256, 3]).unwrap());
            let (back, s) = decode_ternary(ty, &bytes, 768, I2sLayout::X86).unwrap();
            prop_assert_eq!(&back, &trits);
            prop_assert_eq!(s, if ty == GgmlType::I2_S { scale } else { 1.0 });
        }
    }
}

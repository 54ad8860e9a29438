use std::fs;

use bitnet_core::names::Linear;
use serde_json::Value as Json;

use super::*;
use crate::gguf::{Array, GgmlType, Header, Reader, Value, Writer};

/// A GGUF file in pieces, to be changed and written again.
struct Pieces {
    keys: Vec<(String, Value<'static>)>,
    tensors: Vec<(String, Vec<u64>, GgmlType, Vec<u8>)>,
}

fn owned(value: &Value<'_>) -> Value<'static> {
    match value {
        Value::String(v) => Value::from(v.clone().into_owned()),
        Value::Array(a) => match a.iter().next() {
            Some(Value::String(_)) => {
                let all = a.iter().map(|v| match v {
                    Value::String(v) => v.into_owned(),
                    other => panic!("{other}"),
                });
                Value::Array(Array::strings(all))
            }
            Some(Value::F32(_)) => {
                let all: Vec<f32> = a.iter().map(|v| v.to_string().parse().unwrap()).collect();
                Value::from(&all[..])
            }
            _ => {
                let all: Vec<i32> = a.iter().map(|v| v.to_string().parse().unwrap()).collect();
                Value::from(&all[..])
            }
        },
        Value::U32(v) => Value::U32(*v),
        Value::F32(v) => Value::F32(*v),
        Value::Bool(v) => Value::Bool(*v),
        other => panic!("{other}"),
    }
}

impl Pieces {
    fn read(name: &str) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        let bytes = fs::read(folder.join(name)).unwrap();
        let r = Reader::parse(&bytes, name).unwrap();
        let keys = r.metadata().iter().map(|(k, v)| ((*k).to_owned(), owned(v))).collect();
        let tensors = r.tensors().iter().map(|t| {
            let data = r.tensor_data(&t.name).unwrap().to_vec();
            (t.name.clone(), t.dims.clone(), t.ty, data)
        });
        Self { keys, tensors: tensors.collect() }
    }

    fn set(&mut self, key: &str, value: impl Into<Value<'static>>) {
        self.keys.retain(|(k, _)| k != key);
        self.keys.push((key.to_owned(), value.into()));
    }

    fn tensor(&mut self, name: &str) -> &mut (String, Vec<u64>, GgmlType, Vec<u8>) {
        self.tensors.iter_mut().find(|t| t.0 == name).unwrap()
    }

    fn write(&self, path: &Path) {
        let mut header = Header::new("t", 32).unwrap();
        for (key, value) in self.keys.iter().filter(|(k, _)| k != "general.alignment") {
            header.put(key, value.clone()).unwrap();
        }
        for (name, dims, ty, _) in &self.tensors {
            header.tensor(name, dims, *ty).unwrap();
        }
        let mut writer = Writer::start(Vec::new(), header).unwrap();
        for (name, _, _, data) in &self.tensors {
            writer.write(name, data).unwrap();
        }
        fs::write(path, writer.finish().unwrap()).unwrap();
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |e| e.source());
    causes.fold(error.to_string(), |text, e| format!("{text}: {e}"))
}

/// Opens the file and reads every tensor.
fn read_all(path: &Path, options: &OpenOptions) -> Result<Box<dyn Source>, ModelError> {
    let source = open(path, options)?;
    let config = source.facts().config.clone();
    for tensor in Tensor::all(&config) {
        match tensor {
            Tensor::Linear(..) if source.facts().linears != Linears::Floats => {
                source.ternary(tensor)?;
            }
            _ => {
                let [rows, cols] = tensor.shape(&config);
                source.floats(tensor, 0, &mut vec![0.0; rows * cols])?;
            }
        }
    }
    Ok(source)
}

const Q: &str = "blk.0.attn_q.weight";

#[test]
fn what_a_gguf_file_cannot_be_is_named() {
    type Edit = fn(&mut Pieces);
    let cases: &[(Edit, &str)] = &[
        (|p| p.set("general.architecture", "mamba"), "architecture = \"mamba\" is not supported"),
        (|p| p.set("bitnet.rope.dimension_count", 32u32), "only whole heads are rotated"),
        (|p| p.set("bitnet.rope.scaling.type", "yarn"), "rope.scaling.type = \"yarn\""),
        (|p| p.set("bitnet.expert_count", 8u32), "there are no experts"),
        (|p| p.set("bitnet.block_count", 5u32), "tensor blk.4.attn_norm.weight is missing"),
        (|p| p.set("bitnet.block_count", 9999u32), "9999 blocks in a file of 46 tensors"),
        (|p| p.set("bitnet.block_count", 3u32), "tensor blk.3."),
        (|p| p.set("bitnet.attention.head_count", 0u32), "head_count = 0"),
        (|p| p.set("bitnet.embedding_length", 128u32), "a head has 32: only whole"),
        (|p| p.set("bitnet.context_length", "x"), "context_length: expected"),
        (|p| p.set("general.file_type", 7u32), "type 36 is I2_S in files of bitnet.cpp"),
        (|p| p.set("tokenizer.ggml.bos_token_id", 512u32), "bos_token_id = 512 of 512 tokens"),
        (|p| p.set("tokenizer.ggml.model", "bert"), "tokenizer.ggml.model = \"bert\""),
        (|p| p.keys.retain(|k| k.0 != "tokenizer.ggml.tokens"), "tokenizer.ggml.tokens is missing"),
        (|p| p.set("tokenizer.ggml.scores", &[1.0f32][..]), "1 entries for 512 tokens"),
        (|p| p.tensor("output_norm.weight").0 = "rope_freqs.weight".into(), "scaled rotary"),
        (
            |p| p.tensors.push(("blk.0.attn_q.bias".into(), vec![1], GgmlType::F32, vec![0; 4])),
            "tensor blk.0.attn_q.bias: does not belong",
        ),
        (
            |p| p.tensors.push(("blk.0.attn_q.scale".into(), vec![2], GgmlType::F32, vec![0; 8])),
            "tensor blk.0.attn_q.scale: expected one F32",
        ),
        (
            |p| p.tensors.push(("blk.0.attn_q.scale".into(), vec![1], GgmlType::F32, vec![0; 4])),
            "tensor blk.0.attn_q.weight: a scale of 0",
        ),
        (|p| p.tensor(Q).1 = vec![512, 128], "blk.0.attn_q.weight: expected [256, 256]"),
        (|p| p.tensor(Q).3[0] = 255, "blk.0.attn_q.weight: element 0: a code of 3"),
        (
            |p| {
                let t = p.tensor(Q);
                (t.2, t.3) = (GgmlType::F16, vec![0; 256 * 256 * 2]);
            },
            "tensor blk.0.attn_q.weight is F16, other linear layers are ternary",
        ),
    ];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.gguf");
    for (edit, text) in cases {
        let mut pieces = Pieces::read("tiny-i2_s.gguf");
        edit(&mut pieces);
        pieces.write(&path);
        let error = read_all(&path, &OpenOptions::default()).map(|_| ()).unwrap_err();
        let error = chain(&error);
        assert!(error.starts_with(&path.display().to_string()), "{error}");
        assert!(error.contains(text), "expected {text}: {error}");
    }
}

/// Types that cannot be written here either: their numbers are put in place.
#[test]
fn types_that_cannot_be_read_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.gguf");
    Pieces::read("tiny-i2_s.gguf").write(&path);
    let good = fs::read(&path).unwrap();
    let name = good.windows(Q.len()).position(|w| w == Q.as_bytes()).unwrap();
    // After the name: a count of dimensions, two of them, the type.
    let at = name + Q.len() + 4 + 16;
    assert_eq!(good[at], 36);
    for (id, text) in [
        (38u8, "type 38 (TL1 of bitnet.cpp"),
        (39, "type 39 (TL2 of bitnet.cpp"),
        (134, "type 134 (IQ1_BN of ik_llama.cpp)"),
        (135, "type 135 (IQ2_BN of ik_llama.cpp)"),
        (11, "type 11 (Q3_K)"),
        (200, "type 200 (not known)"),
    ] {
        let mut bytes = good.clone();
        bytes[at] = id;
        fs::write(&path, bytes).unwrap();
        let error = chain(&open(&path, &OpenOptions::default()).map(|_| ()).unwrap_err());
        assert!(error.contains(text) && error.contains(Q), "{error}");
    }
}

#[test]
fn a_scale_beside_the_weights_multiplies_and_q_of_llama_is_put_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.gguf");
    let mut pieces = Pieces::read("tiny-i2_s.gguf");
    pieces.write(&path);
    let before = read_all(&path, &OpenOptions::default()).unwrap();
    let scale = 3.0f32.to_le_bytes().to_vec();
    pieces.tensors.push(("blk.0.attn_q.scale".into(), vec![1], GgmlType::F32, scale));
    // As another architecture, without sub-norms.
    pieces.tensors.retain(|t| !t.0.contains("sub_norm"));
    for key in pieces.keys.iter_mut().filter(|k| k.0.starts_with("bitnet.")) {
        key.0 = key.0.replace("bitnet.", "llama.");
    }
    pieces.set("general.architecture", "llama");
    let path = dir.path().join("llama.gguf");
    pieces.write(&path);
    let after = read_all(&path, &OpenOptions::default()).unwrap();
    let kind = "GGUF, architecture llama, I2_S in the layout of x86 builds";
    assert_eq!(after.facts().kind, kind);
    let read = |s: &dyn Source, l| s.ternary(Tensor::Linear(0, l)).unwrap();
    let (b, a) = (read(&*before, Linear::Q), read(&*after, Linear::Q));
    assert_eq!(a.scale, 3.0 * b.scale);
    for row in 0..256 {
        // The file's rows 2i and 2i + 1 of a head of 64 are the model's i and 32 + i.
        let from = row / 64 * 64 + row % 32 * 2 + row % 64 / 32;
        assert_eq!(a.values[row * 256..][..256], b.values[from * 256..][..256], "row {row}");
    }
    let (b, a) = (read(&*before, Linear::V), read(&*after, Linear::V));
    assert_eq!(a, b);
}

/// The same weights as bitnet.cpp's ARM builds lay them out: value `i` of 64 in bits
/// `6 - 2 (i / 16)` of byte `i % 16`.
#[test]
fn i2_s_of_arm_builds_is_read_where_it_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let (x86, arm) = (dir.path().join("x86.gguf"), dir.path().join("arm.gguf"));
    let mut pieces = Pieces::read("tiny-i2_s.gguf");
    pieces.write(&x86);
    let mut moved = 0;
    for (_, dims, _, data) in pieces.tensors.iter_mut().filter(|t| t.2 == GgmlType::I2_S) {
        let n = dims.iter().product::<u64>() as usize;
        let code = |i: usize| data[i / 128 * 32 + i % 32] >> (6 - 2 * (i % 128 / 32)) & 3;
        let mut codes = vec![0u8; n / 4];
        for i in 0..n {
            codes[i / 64 * 16 + i % 16] |= code(i) << (6 - 2 * (i % 64 / 16));
        }
        data[..n / 4].copy_from_slice(&codes);
        moved += 1;
    }
    assert_eq!(moved, 4 * 7);
    pieces.write(&arm);
    let open_as =
        |path: &Path, i2s| read_all(path, &OpenOptions { i2s, ..OpenOptions::default() }).unwrap();
    let original = open_as(&x86, None);
    let read = open_as(&arm, Some(I2sLayout::Arm));
    let garbage = open_as(&arm, None);
    assert!(read.facts().kind.ends_with("I2_S in the layout of arm builds"));
    assert!(garbage.facts().kind.ends_with("I2_S in the layout of x86 builds"));
    for layer in 0..4 {
        for linear in Linear::ALL {
            let of = |s: &dyn Source| s.ternary(Tensor::Linear(layer, linear)).unwrap();
            assert!(of(&*read) == of(&*original), "{layer} {linear:?}");
            assert!(of(&*garbage) != of(&*original), "{layer} {linear:?}");
        }
    }
}

#[test]
fn options_that_do_not_fit_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.gguf");
    Pieces::read("tiny-tq1_0.gguf").write(&path);
    let options = OpenOptions { ptq: true, ..OpenOptions::default() };
    let error = chain(&open(&path, &options).map(|_| ()).unwrap_err());
    assert!(error.contains("is ternary already"), "{error}");
    let options = OpenOptions { i2s: Some(I2sLayout::Arm), ..OpenOptions::default() };
    let error = chain(&open(&path, &options).map(|_| ()).unwrap_err());
    assert!(error.contains("holds no I2_S tensors: --i2s arm has no meaning"), "{error}");
    let tokenizer = Some(dir.path().join("none.json"));
    let options = OpenOptions { tokenizer, ..OpenOptions::default() };
    let error = chain(&open(&path, &options).map(|_| ()).unwrap_err());
    assert!(error.contains("none.json: cannot be read"), "{error}");
    let options = OpenOptions { hidden_act: Some(Activation::Relu2), ..OpenOptions::default() };
    assert_eq!(open(&path, &options).unwrap().facts().config.hidden_act, Activation::Relu2);
}

/// A file of these keys alone.
fn tokenizer_of(keys: &[(&str, Value<'static>)]) -> Result<Json, String> {
    let mut header = Header::new("t.gguf", 32).unwrap();
    for (key, value) in keys {
        header.put(&format!("tokenizer.ggml.{key}"), value.clone()).unwrap();
    }
    let bytes = Writer::start(Vec::new(), header).unwrap().finish().unwrap();
    let reader = Reader::parse(&bytes, "t.gguf").unwrap();
    let text = tokenizer_json(&reader).map_err(|e| e.to_string())?;
    Ok(serde_json::from_str(&text).unwrap())
}

#[test]
fn scores_become_merges_in_their_order() {
    let tokens = ["<unk>", "<s>", "<0x41>", "a", "b", "ab", "aba", "c", "[X]"];
    let json = tokenizer_of(&[
        ("model", "llama".into()),
        ("tokens", Value::Array(Array::strings(tokens))),
        ("scores", Value::from(&[0.0f32, 0.0, 0.0, -9.0, -9.0, -2.0, -1.0, -9.0, 0.0][..])),
        ("token_type", Value::from(&[2i32, 3, 6, 1, 1, 1, 1, 1, 5][..])),
        ("bos_token_id", Value::U32(1)),
        ("unknown_token_id", Value::U32(0)),
    ])
    .unwrap();
    let merges = &json["model"]["merges"];
    assert_eq!(merges, &serde_json::json!([["ab", "a"], ["a", "b"]]));
    assert_eq!(json["model"]["vocab"].as_object().unwrap().len(), 8);
    assert_eq!(json["model"]["unk_token"], "<unk>");
    assert_eq!(json["post_processor"]["special_tokens"]["<s>"]["ids"][0], 1);
    assert_eq!(json["normalizer"]["normalizers"][0]["type"], "Prepend");
    let names: Vec<&str> = json["added_tokens"]
        .as_array()
        .unwrap()
        .iter()
        .map(|t| t["content"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["<unk>", "<s>"]);
}

#[test]
fn pre_tokenizers_are_known_or_refused() {
    let of = |pre: &'static str| {
        tokenizer_of(&[
            ("model", "gpt2".into()),
            ("pre", pre.into()),
            ("tokens", Value::Array(Array::strings(["a", "b", "ab"]))),
            ("merges", Value::Array(Array::strings(["a b"]))),
            ("bos_token_id", Value::U32(0)),
        ])
    };
    let llama3 = of("llama-bpe").unwrap();
    assert_eq!(llama3["model"]["ignore_merges"], true);
    assert_eq!(llama3["post_processor"]["single"][0]["SpecialToken"]["id"], "a");
    let gpt2 = of("gpt-2").unwrap();
    assert_eq!(
        (&gpt2["post_processor"], &gpt2["model"]["ignore_merges"]),
        (&Json::Null, &false.into())
    );
    assert_eq!(
        of("default").unwrap()["pre_tokenizer"]["pretokenizers"].as_array().unwrap().len(),
        5
    );
    assert!(of("qwen2").unwrap_err().contains("pre = \"qwen2\" is not supported"));
}

/// Keys, types, lengths, counts and offsets lie in turn.
#[test]
fn changed_bytes_are_errors_or_other_models_but_never_a_panic() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let good = fs::read(folder.join("tiny-tq2_0.gguf")).unwrap();
    let head = Reader::parse(&good, "t").unwrap().data_start() as usize;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.gguf");
    let mut state = 1u64;
    let mut random = |n: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) as usize % n
    };
    let (mut refused, mut read) = (0, 0);
    for case in 0..400 {
        let mut bytes = good.clone();
        for _ in 0..=random(3) {
            let at = random(head);
            bytes[at] = [0, 1, 255, random(256) as u8][random(4)];
        }
        if case % 8 == 0 {
            bytes.truncate(random(good.len()));
        }
        fs::write(&path, bytes).unwrap();
        match read_all(&path, &OpenOptions::default()) {
            Ok(_) => read += 1,
            Err(_) => refused += 1,
        }
    }
    assert!(refused > 50 && read > 50, "{refused} refused, {read} read");
}

//! Every form out and in again: ternary values and scales stay the same bits,
//! and what a form cannot hold is refused.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use bitnet_core::names::{self, Linear, Tensor};
use bitnet_core::{Activation, Dtype, Exit, ModelConfig, WeightQuantizer, ternary};
use bitnet_engine::{LoadOptions, Model, Session, SessionOptions};
use bitnet_export::{ExportError, ExportOptions, Format, OpenOptions, Report, export};
use bitnet_format::hf::{SpecialTokens, Stored, TensorFile, TensorFileWriter, save, to_json};
use bitnet_format::model::{self, Linears, Source};
use serde_json::{Value, json};

/// Wide enough for blocks of 256.
fn wide() -> ModelConfig {
    ModelConfig { hidden_size: 256, intermediate_size: 512, ..ModelConfig::tiny() }
}

/// As LLaMA: SiLU, no sub-norms, a head of its own.
fn llama() -> ModelConfig {
    ModelConfig {
        sub_norms: false,
        hidden_act: Activation::Silu,
        tie_word_embeddings: false,
        ..wide()
    }
}

/// Numbers that look random, the same each time.
fn noise(seed: usize, n: usize) -> Vec<f32> {
    let mut state = seed as u64 * 2 + 1;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..n).map(|_| next() * 0.2).collect()
}

/// A checkpoint of random master weights.
fn checkpoint(folder: &Path, config: &ModelConfig) {
    fs::create_dir_all(folder).unwrap();
    let special = SpecialTokens { bos: Some(1), eos: Some(0) };
    let mut json = to_json(config, special);
    json["eos_token_id"] = json!([0, 2]);
    fs::write(folder.join("config.json"), json.to_string()).unwrap();
    let vocab: serde_json::Map<String, Value> =
        (0..config.vocab_size).map(|i| (format!("t{i}"), i.into())).collect();
    let tokenizer = json!({
        "added_tokens": [{ "id": 0, "content": "t0", "special": true }],
        "decoder": { "type": "ByteLevel" },
        "model": { "type": "BPE", "vocab": vocab, "merges": [] },
    });
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    fs::write(folder.join("chat_template.jinja"), "{{ messages }}").unwrap();
    let all: Vec<_> = names::tensors(config)
        .into_iter()
        .enumerate()
        .map(|(i, (name, shape))| {
            let mut data = noise(i, shape.iter().product());
            if shape.len() == 1 {
                data.iter_mut().for_each(|x| *x += 1.0);
            }
            (name, shape, data)
        })
        .collect();
    let tensors = all.iter().map(|(n, s, d)| (n.clone(), s.clone(), &d[..]));
    save(folder.join("model.safetensors"), &[], tensors).unwrap();
}

fn write(src: &Path, dst: &Path, format: Format) -> Result<Report, ExportError> {
    export(src, dst, &ExportOptions { format, ..ExportOptions::default() })
}

fn open(path: &Path) -> Box<dyn Source> {
    model::open(path, &OpenOptions::default()).unwrap()
}

fn floats(source: &dyn Source, tensor: Tensor) -> Vec<f32> {
    let mut out = vec![0.0; tensor.shape(&source.facts().config).iter().product()];
    source.floats(tensor, 0, &mut out).unwrap();
    out
}

/// Two models are the same in every bit, and in what they say.
fn assert_same(a: &dyn Source, b: &dyn Source, what: &str) {
    let (f, g) = (a.facts(), b.facts());
    assert_eq!(
        (&f.config, &f.text.special, &f.text.eot),
        (&g.config, &g.text.special, &g.text.eot)
    );
    assert_eq!(f.text.tokenizer, g.text.tokenizer, "{what}");
    assert_eq!(f.text.chat_template, g.text.chat_template, "{what}");
    assert_eq!(f.name, g.name, "{what}");
    for tensor in Tensor::all(&f.config) {
        let same = match tensor {
            Tensor::Linear(..) if f.config.weight_quantizer == WeightQuantizer::Ternary => {
                a.ternary(tensor).unwrap() == b.ternary(tensor).unwrap()
            }
            _ => floats(a, tensor) == floats(b, tensor),
        };
        assert!(same, "{what} {tensor:?}");
    }
}

#[test]
fn trits_and_scales_survive_every_form() {
    let silu = ModelConfig { hidden_act: Activation::Silu, head_dim: Some(128), ..wide() };
    let bf16 = ModelConfig { embedding_dtype: Dtype::Bf16, ..llama() };
    for (i, config) in [wide(), silu, bf16].into_iter().enumerate() {
        let temp = tempfile::tempdir().unwrap();
        let run = temp.path().join("same");
        checkpoint(&run, &config);
        let packed = temp.path().join("packed.gguf");
        write(&run, &packed, Format::Packed).unwrap();
        let first = open(&packed);
        assert_eq!(first.facts().text.eot, Some(2));
        for format in
            [Format::HfPacked, Format::GgufI2s, Format::GgufTq1, Format::GgufTq2, Format::GgufF16]
        {
            let what = format!("model {i} {format}");
            let out = temp.path().join(if format.is_folder() { "out/same" } else { "out.gguf" });
            for source in [&packed, &run] {
                let report = write(source, &out, format).unwrap();
                assert_eq!(report.weights_compared, config.parameter_count().linear, "{what}");
                assert_eq!((report.format, report.layout), (format.name(), format.name()));
                let back = temp.path().join("back.gguf");
                write(&out, &back, Format::Packed).unwrap();
                let options = LoadOptions { verify: true, ..LoadOptions::default() };
                Model::open(&back, &options).unwrap();
                assert_same(&*first, &*open(&back), &what);
            }
        }
        // Made of ternary values, bf16 master weights keep them; the scale is a mean.
        let out = temp.path().join("masters/same");
        let report = write(&packed, &out, Format::HfBf16).unwrap();
        assert_eq!((report.bits_per_weight, report.warnings.len()), (16.0, 0));
        let masters = open(&out);
        assert_eq!(masters.facts().linears, Linears::Masters);
        for layer in 0..2 {
            for linear in Linear::ALL {
                let tensor = Tensor::Linear(layer, linear);
                let (a, b) = (first.ternary(tensor).unwrap(), masters.ternary(tensor).unwrap());
                assert!(a.values == b.values, "{tensor:?}");
                assert!((a.scale / b.scale - 1.0).abs() < 1e-5, "{} {}", a.scale, b.scale);
            }
        }
        // Of master weights they are the rounded master weights.
        let report = write(&run, &out, Format::HfBf16).unwrap();
        assert!(report.warnings[0].contains("rounded to bf16"), "{:?}", report.warnings);
    }
}

#[test]
fn golden_logits_travel_with_the_packed_forms() {
    let temp = tempfile::tempdir().unwrap();
    let run = temp.path().join("run");
    checkpoint(&run, &wide());
    let packed = temp.path().join("a.gguf");
    write(&run, &packed, Format::Packed).unwrap();
    let model = Model::open(&packed, &LoadOptions::default()).unwrap();
    let mut session = Session::new(&model, &SessionOptions::default()).unwrap();
    let tokens = [5u32, 1, 300, 42];
    let logits = session.prefill(&tokens).unwrap();
    let golden = json!({ "tokens": tokens, "logits": logits });
    fs::write(run.join("golden.json"), golden.to_string()).unwrap();
    let report = write(&run, &packed, Format::Packed).unwrap();
    assert_eq!(report.golden_max_abs_error, Some(0.0));
    let folder = temp.path().join("hf");
    write(&packed, &folder, Format::HfPacked).unwrap();
    let report = write(&folder, &temp.path().join("b.gguf"), Format::Packed).unwrap();
    assert_eq!((report.golden_max_abs_error, report.warnings.len()), (Some(0.0), 0));
}

#[test]
fn shards_and_both_meanings_of_a_scale_are_read() {
    let temp = tempfile::tempdir().unwrap();
    let (run, folder) = (temp.path().join("run"), temp.path().join("hf"));
    let config = ModelConfig { num_hidden_layers: 3, ..llama() };
    checkpoint(&run, &config);
    write(&run, &folder, Format::HfPacked).unwrap();
    let before = open(&folder);
    // In two files, with scales that divide, one of them without a dimension.
    let file = TensorFile::open(folder.join("model.safetensors")).unwrap();
    let tensors = file.names();
    let mut map = serde_json::Map::new();
    for (i, part) in tensors.chunks(tensors.len() / 2 + 1).enumerate() {
        let name = format!("model-{i}.safetensors");
        let specs = part.iter().map(|n| {
            let mut shape = file.shape(n).unwrap().to_vec();
            if n.ends_with("layers.2.mlp.up_proj.weight_scale") {
                shape = Vec::new();
            }
            let stored = file.float_type(n).map_or(Stored::U8, Stored::Float);
            (n.clone(), shape, stored)
        });
        let specs: Vec<_> = specs.collect();
        let mut out = TensorFileWriter::with_types(folder.join(&name), &[], specs.clone()).unwrap();
        for (n, _, stored) in specs {
            let bytes: Vec<u8> = match stored {
                Stored::U8 => file.read_bytes(&n).unwrap(),
                Stored::Float(dtype) => {
                    assert_eq!(dtype, Dtype::F32);
                    let divide = n.ends_with("weight_scale");
                    let x = file.read(&n).unwrap().into_iter();
                    x.flat_map(|x| if divide { 1.0 / x } else { x }.to_le_bytes()).collect()
                }
            };
            out.write_bytes(&n, &bytes).unwrap();
            map.insert(n, name.clone().into());
        }
        out.commit().unwrap();
    }
    drop(file);
    fs::remove_file(folder.join("model.safetensors")).unwrap();
    let index = json!({ "metadata": {}, "weight_map": map });
    fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    let path = folder.join("config.json");
    let text = fs::read_to_string(&path).unwrap().replace("autobitlinear", "bitlinear");
    fs::write(&path, text).unwrap();
    let dst = temp.path().join("m.gguf");
    let report = write(&folder, &dst, Format::Packed).unwrap();
    assert_eq!(report.source, "Hugging Face folder, packed (bitlinear)");
    let after = open(&dst);
    for tensor in Tensor::all(&config) {
        if let Tensor::Linear(..) = tensor {
            let (a, b) = (before.ternary(tensor).unwrap(), after.ternary(tensor).unwrap());
            assert!(a.values == b.values, "{tensor:?}");
            // A reciprocal of a reciprocal: the last bit.
            assert!((a.scale / b.scale - 1.0).abs() < 2e-7, "{} {}", a.scale, b.scale);
        }
    }
}

#[test]
fn a_float_model_is_packed_as_it_is_or_quantised_when_asked() {
    let temp = tempfile::tempdir().unwrap();
    let twin = ModelConfig { weight_quantizer: WeightQuantizer::None, ..llama() };
    let run = temp.path().join("twin");
    checkpoint(&run, &twin);
    let (f32, f16) = (temp.path().join("f32.gguf"), temp.path().join("f16.gguf"));
    assert_eq!(write(&run, &f32, Format::Packed).unwrap().bits_per_weight, 32.0);
    let (a, b) = (open(&run), open(&f32));
    for linear in Linear::ALL {
        let tensor = Tensor::Linear(0, linear);
        assert!(floats(&*a, tensor) == floats(&*b, tensor), "{tensor:?}");
    }
    // Through GGUF and bf16 folders, in the order of rows they ask for.
    let gguf = temp.path().join("gguf.gguf");
    write(&run, &gguf, Format::GgufF16).unwrap();
    let report = write(&gguf, &f16, Format::Packed).unwrap();
    assert_eq!((report.bits_per_weight, report.weight_quantizer), (16.0, "none"));
    assert_eq!(report.zero_share, None);
    let (a, b) = (open(&run), open(&f16));
    for linear in Linear::ALL {
        let tensor = Tensor::Linear(1, linear);
        let rounded = floats(&*a, tensor).into_iter().map(|x| half::f16::from_f32(x).to_f32());
        assert!(rounded.eq(floats(&*b, tensor)), "{tensor:?}");
    }
    Model::open(&f16, &LoadOptions { verify: true, ..LoadOptions::default() }).unwrap();
    let folder = temp.path().join("bf16");
    write(&run, &folder, Format::HfBf16).unwrap();
    let bf16 = temp.path().join("bf16.gguf");
    assert_eq!(write(&folder, &bf16, Format::Packed).unwrap().bits_per_weight, 16.0);
    assert_same(&*open(&folder), &*open(&bf16), "bf16");

    let open_options = OpenOptions { ptq: true, ..OpenOptions::default() };
    let options = ExportOptions { open: open_options, ..ExportOptions::default() };
    for source in [&run, &f32, &gguf] {
        let dst = temp.path().join("ptq.gguf");
        let report = export(source, &dst, &options).unwrap();
        assert!(report.warnings[0].contains("the quality collapses"), "{:?}", report.warnings);
        assert_eq!(report.weight_quantizer, "ternary");
        let (a, b) = (open(source), open(&dst));
        let tensor = Tensor::Linear(1, Linear::K);
        let (values, scale) = ternary::quantize_weights(&floats(&*a, tensor), 256);
        let found = b.ternary(tensor).unwrap();
        assert!(found.values == values && found.scale == scale);
    }
    let error = export(&temp.path().join("ptq.gguf"), &f16, &options).unwrap_err();
    assert!(error.to_string().contains("is ternary already"), "{error}");
}

#[test]
fn what_a_form_cannot_hold_is_refused_and_nothing_appears() {
    let temp = tempfile::tempdir().unwrap();
    let run = |name: &str, config: &ModelConfig| -> PathBuf {
        let folder = temp.path().join(name);
        checkpoint(&folder, config);
        folder
    };
    let tiny = run("tiny", &ModelConfig::tiny());
    let untied = run("untied", &ModelConfig { tie_word_embeddings: false, ..wide() });
    let twin = run("twin", &ModelConfig { weight_quantizer: WeightQuantizer::None, ..wide() });
    let dst = temp.path().join("dst");
    for (source, format, text) in [
        (&tiny, Format::GgufTq1, "--format gguf-tq1_0 cannot hold this model: tensor"),
        (&tiny, Format::GgufI2s, "rows of 64 weights are not whole blocks of 128"),
        (&untied, Format::GgufTq2, "a head of its own"),
        (&twin, Format::HfPacked, "the model is not ternary"),
    ] {
        let error = write(source, &dst, format).unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
        assert_eq!((error.exit(), dst.exists()), (Exit::Usage, false));
    }
    // A folder is not written over another kind of folder, a file or its source.
    let other = temp.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("thesis.tex"), "x").unwrap();
    for dst in [&other, &other.join("thesis.tex"), &tiny] {
        let error = write(&tiny, dst, Format::HfPacked).unwrap_err();
        assert!(error.to_string().contains("must not be replaced"), "{error}");
    }
    assert!(other.join("thesis.tex").exists() && tiny.join("config.json").exists());
    // Another model folder is replaced.
    write(&tiny, &dst, Format::HfPacked).unwrap();
    write(&tiny, &dst, Format::HfBf16).unwrap();
    assert_eq!(open(&dst).facts().linears, Linears::Masters);
}

#[test]
fn the_binary_imports_and_exports() {
    use std::process::Command;
    let temp = tempfile::tempdir().unwrap();
    let run = temp.path().join("run");
    checkpoint(&run, &wide());
    let path = |name: &str| temp.path().join(name).to_str().unwrap().to_owned();
    let call = |args: &[&str]| {
        let exe = env!("CARGO_BIN_EXE_bitnet-export");
        let out = Command::new(exe).args(args).env_remove("RUST_LOG").output().unwrap();
        (
            out.status.code(),
            String::from_utf8(out.stdout).unwrap(),
            String::from_utf8(out.stderr).unwrap(),
        )
    };
    let (tq2, packed) = (path("m.tq2.gguf"), path("m.gguf"));
    let (code, out, err) =
        call(&[&path("run"), "-o", &tq2, "--format", "gguf-tq2_0", "--name", "n"]);
    assert_eq!(code, Some(0), "{err}");
    assert!(out.starts_with("gguf-tq2_0  ") && out.contains("2.06"), "{out}");
    let (code, out, err) = call(&["import", &tq2, "-o", &packed, "--json", "-"]);
    assert_eq!(code, Some(0), "{err}");
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&report["name"], &report["format"]), (&json!("n"), &json!("packed")));
    assert_eq!(report["source"], "GGUF, architecture bitnet-b1.58");
    Model::open(Path::new(&packed), &LoadOptions::default()).unwrap();
    // A vocabulary of SentencePiece's kind: byte tokens begin at id 3.
    let tq1 =
        concat!(env!("CARGO_MANIFEST_DIR"), "/../bitnet-format/tests/fixtures/tiny-tq1_0.gguf");
    let (code, _, err) = call(&["import", tq1, "-o", &packed, "--hidden-act", "relu2"]);
    assert_eq!(code, Some(0), "{err}");
    let model = Model::open(Path::new(&packed), &LoadOptions::default()).unwrap();
    let tokenizer = model.tokenizer().unwrap();
    let bytes = "\u{2581}A\u{e9}".bytes().map(|b| u32::from(b) + 3);
    assert_eq!(tokenizer.encode("A\u{e9}").unwrap(), bytes.collect::<Vec<_>>());
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_ids()), (Some(1), &[2][..]));
    for (args, expected) in [
        (&["import", &tq2][..], 2),
        (&["import", &tq2, "-o", &packed, "--format", "packed"], 2),
        (&[&path("run"), "-o", &packed, "--format", "gguf"], 2),
        (&["import", &path("none"), "-o", &packed], 3),
        (&["import", &path("run/config.json"), "-o", &packed], 3),
        (&["import", &tq2, "-o", &packed, "--ptq", "ternary"], 3),
        (&["import", &path("run"), "-o", &packed, "--hidden-act", "silu"], 3),
    ] {
        let (code, _, err) = call(args);
        assert_eq!((code, err.starts_with("error: ")), (Some(expected), true), "{args:?} {err}");
    }
}

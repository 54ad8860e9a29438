//! Whole exports: what is in the file, which checkpoint is taken, and every way
//! in which a checkpoint or a destination can be wrong.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use bitnet_core::names::{self, Linear};
use bitnet_core::{Activation, Dtype, Exit, Layout, ModelConfig, WeightQuantizer, ternary};
use bitnet_engine::{LoadOptions, Model, Session, SessionOptions};
use bitnet_export::{
    DenseType, ExportError, ExportOptions, Format, Phase, Report, RowType, export, export_with,
    find_checkpoint,
};
use bitnet_format::gguf::{GgmlType, Reader};
use bitnet_format::hf::{SpecialTokens, TensorFile, save, to_json};
use serde_json::{Value, json};

const PROMPT: [u32; 9] = [5, 1, 300, 42, 42, 7, 0, 319, 12];

/// Numbers that look random, the same each time.
fn noise(seed: usize, n: usize) -> Vec<f32> {
    let mut state = seed as u64 * 2 + 1;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..n).map(|_| next() * 0.2).collect()
}

type Tensors = Vec<(String, Vec<usize>, Vec<f32>)>;

fn tensors(config: &ModelConfig) -> Tensors {
    let all = names::tensors(config).into_iter().enumerate();
    all.map(|(i, (name, shape))| {
        let mut data = noise(i, shape.iter().product());
        if shape.len() == 1 {
            data.iter_mut().for_each(|x| *x += 1.0);
        }
        (name, shape, data)
    })
    .collect()
}

fn write_tensors(folder: &Path, tensors: &Tensors) {
    let all = tensors.iter().map(|(n, s, d)| (n.clone(), s.clone(), &d[..]));
    save(folder.join("model.safetensors"), &[], all).unwrap();
}

/// A run folder with one checkpoint, golden logits included.
struct Run {
    _temp: tempfile::TempDir,
    run: PathBuf,
    checkpoint: PathBuf,
    dst: PathBuf,
}

impl Run {
    fn new(config: &ModelConfig) -> Self {
        let run = Self::without_golden(config);
        // The engine's own logits stand for training's: the tests of the whole
        // path compare the two.
        let report = run.export().unwrap();
        assert_eq!((report.golden_tokens, report.warnings.len()), (None, 1));
        let model = Model::open(&run.dst, &LoadOptions::default()).unwrap();
        assert_eq!(model.golden(), None);
        let mut session = Session::new(&model, &SessionOptions::default()).unwrap();
        let logits = session.prefill(&PROMPT).unwrap();
        let golden = json!({ "tokens": PROMPT, "logits": logits });
        fs::write(run.checkpoint.join("golden.json"), golden.to_string()).unwrap();
        fs::remove_file(&run.dst).unwrap();
        run
    }

    fn without_golden(config: &ModelConfig) -> Self {
        let temp = tempfile::tempdir().unwrap();
        let run = temp.path().join("first");
        let checkpoint = run.join("checkpoints/00000020");
        fs::create_dir_all(&checkpoint).unwrap();
        let special = SpecialTokens { bos: None, eos: Some(0) };
        fs::write(checkpoint.join("config.json"), to_json(config, special).to_string()).unwrap();
        let vocab: serde_json::Map<String, Value> =
            (0..config.vocab_size).map(|i| (format!("t{i}"), i.into())).collect();
        let tokenizer = json!({
            "added_tokens": [{ "id": 0, "content": "t0", "special": true }],
            "model": { "type": "BPE", "vocab": vocab, "merges": [] },
        });
        fs::write(checkpoint.join("tokenizer.json"), tokenizer.to_string()).unwrap();
        write_tensors(&checkpoint, &tensors(config));
        let dst = temp.path().join("out/model.gguf");
        Self { _temp: temp, run, checkpoint, dst }
    }

    fn export(&self) -> Result<Report, ExportError> {
        export(&self.run, &self.dst, &ExportOptions::default())
    }

    /// Files in the destination's folder, unfinished ones included.
    fn left_behind(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.dst.parent().unwrap()) else { return Vec::new() };
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    }
}

/// An error and its causes, as the binary prints them.
fn chain(error: &ExportError) -> String {
    let first: &dyn std::error::Error = error;
    let causes = std::iter::successors(first.source(), |e| e.source());
    causes.fold(first.to_string(), |text, e| format!("{text}: {e}"))
}

#[test]
fn a_ternary_model_is_packed_and_runs() {
    let config = ModelConfig::tiny();
    let run = Run::new(&config);
    let report = run.export().unwrap();
    assert_eq!(run.left_behind(), ["model.gguf"]);
    let count = config.parameter_count();
    assert_eq!((report.parameters, report.linear_parameters), (count.total(), count.linear));
    assert_eq!(report.weights_compared, count.linear);
    assert_eq!((report.fp16_bytes, report.fp32_bytes), (2 * count.total(), 4 * count.total()));
    assert_eq!(report.packed_bytes, fs::metadata(&run.dst).unwrap().len());
    assert_eq!((report.golden_max_abs_error, report.golden_tokens), (Some(0.0), Some(9)));
    assert!(report.warnings.is_empty(), "{:?}", report.warnings);
    assert_eq!(report.name, "first");
    let text = report.to_string();
    assert!(text.contains("reproduced by the engine after 9 tokens"), "{text}");

    let bytes = fs::read(&run.dst).unwrap();
    let r = Reader::parse(&bytes, "model.gguf").unwrap();
    assert_eq!(r.alignment(), 64);
    assert_eq!(r.str("general.architecture").unwrap(), "bitnet-packed");
    assert_eq!(r.get::<u64>("general.parameter_count").unwrap(), count.total());
    assert_eq!(r.get::<f32>("bitnet-packed.rope.freq_base").unwrap(), config.rope_theta);
    assert_eq!(r.get::<u32>("tokenizer.ggml.eos_token_id").unwrap(), 0);
    assert_eq!(r.get::<Vec<u32>>("bitnet-packed.golden.tokens").unwrap(), PROMPT);
    assert!(r.value("general.file_type").is_none());
    // Every trit once more, read with nothing but the container and the layout.
    let (mut zeros, mut linear_bytes) = (0, 0);
    for (name, shape, data) in tensors(&config) {
        let Some((layer, linear)) =
            (0..2).flat_map(|l| names::Linear::ALL.map(|x| (l, x))).find(|(l, x)| x.hf(*l) == name)
        else {
            continue;
        };
        let (expected, scale) = ternary::quantize_weights(&data, shape[1]);
        let weight = format!("{}.weight", linear.gguf(layer));
        let info = r.tensor(&weight).unwrap();
        let row_bytes = Layout::P2.row_bytes(shape[1]);
        assert_eq!(
            (info.ty, &info.dims[..]),
            (GgmlType::I8, &[row_bytes as u64, shape[0] as u64][..])
        );
        let packed = r.tensor_data(&weight).unwrap();
        for (row, bytes) in packed.chunks_exact(row_bytes).enumerate() {
            let mut found = vec![0i8; shape[1]];
            Layout::P2.unpack_row(bytes, &mut found).unwrap();
            assert_eq!(found, expected[row * shape[1]..][..shape[1]], "{weight} row {row}");
        }
        let stored = r.tensor_data(&format!("{}.scale", linear.gguf(layer))).unwrap();
        assert_eq!(stored, scale.to_le_bytes());
        zeros += expected.iter().filter(|t| **t == 0).count();
        linear_bytes += packed.len() as u64 + 4;
    }
    assert_eq!(report.zero_share, Some(zeros as f64 / count.linear as f64));
    assert_eq!(report.linear_bytes, linear_bytes);
    Model::open(&run.dst, &LoadOptions { verify: true, ..LoadOptions::default() }).unwrap();
}

#[test]
fn every_kind_of_model_is_packed() {
    let tiny = ModelConfig::tiny;
    let configs = [
        ModelConfig { tie_word_embeddings: false, embedding_dtype: Dtype::F32, ..tiny() },
        ModelConfig { sub_norms: false, hidden_act: Activation::Silu, ..tiny() },
        ModelConfig { embedding_dtype: Dtype::Bf16, head_dim: Some(24), ..tiny() },
        ModelConfig { weight_quantizer: WeightQuantizer::None, ..tiny() },
    ];
    for config in configs {
        let run = Run::new(&config);
        let report = run.export().unwrap();
        assert_eq!(report.golden_max_abs_error, Some(0.0));
        let model = Model::open(&run.dst, &LoadOptions::default()).unwrap();
        assert_eq!(model.config(), &config);
        assert!(model.golden().is_some());
    }
}

#[test]
fn a_float_twin_may_be_rounded() {
    let config = ModelConfig { weight_quantizer: WeightQuantizer::None, ..ModelConfig::tiny() };
    let run = Run::new(&config);
    let exact = run.export().unwrap();
    assert_eq!((exact.bits_per_weight, exact.zero_share), (32.0, None));
    let options = ExportOptions { dense: DenseType::F16, ..ExportOptions::default() };
    let report = export(&run.run, &run.dst, &options).unwrap();
    assert_eq!((report.bits_per_weight, report.golden_tokens), (16.0, None));
    assert!(report.warnings[0].contains("rounded to f16"));
    let model = Model::open(&run.dst, &LoadOptions::default()).unwrap();
    assert_eq!(model.golden(), None);
}

/// The float twin of `config`.
fn twin(config: ModelConfig) -> ModelConfig {
    ModelConfig { weight_quantizer: WeightQuantizer::None, ..config }
}

#[test]
fn a_float_twin_may_be_blocks_of_integers() {
    let config = twin(ModelConfig::tiny());
    let run = Run::new(&config);
    for (ty, bits) in [(RowType::Int8, 8.5), (RowType::Int4, 4.5)] {
        let options = ExportOptions { dense: DenseType::Rows(ty), ..ExportOptions::default() };
        let report = export(&run.run, &run.dst, &options).unwrap();
        assert_eq!((report.bits_per_weight, report.golden_tokens), (bits, None));
        assert!(report.warnings[0].contains(&format!("rounded to {}", ty.name())));
        let model = Model::open(&run.dst, &LoadOptions { verify: true, ..Default::default() });
        let model = model.unwrap();
        assert_eq!(model.parts().dense as f64 * 8.0, config.parameter_count().linear as f64 * bits);
        // A packed file of blocks stays one.
        let again = run.dst.with_extension("again");
        let report = export(&run.dst, &again, &ExportOptions::default()).unwrap();
        assert_eq!(report.bits_per_weight, bits);
        // As floats its values are the same, and so is all that the engine computes.
        let floats = run.dst.with_extension("f32");
        let options = ExportOptions { dense: DenseType::F32, ..ExportOptions::default() };
        assert_eq!(export(&run.dst, &floats, &options).unwrap().bits_per_weight, 32.0);
        let [blocks, again, floats] = [&run.dst, &again, &floats].map(|path| {
            let model = Model::open(path, &LoadOptions::default()).unwrap();
            let mut session = Session::new(&model, &SessionOptions::default()).unwrap();
            let prompt: Vec<u32> = (0..40).map(|t| t * 7 % 64).collect();
            let logits = session.prefill(&prompt).unwrap().to_vec();
            let next = session.decode(5).unwrap().to_vec();
            (logits, next)
        });
        assert_eq!(blocks, floats);
        assert_eq!(blocks, again);
    }
}

#[test]
fn rows_that_are_not_whole_blocks_are_halves() {
    let config = twin(ModelConfig { intermediate_size: 144, ..ModelConfig::tiny() });
    let run = Run::new(&config);
    let dense = DenseType::Rows(RowType::Int8);
    let report = export(&run.run, &run.dst, &ExportOptions { dense, ..Default::default() });
    let report = report.unwrap();
    let text = "layers.0.mlp.down_proj.weight: f16 instead of int8";
    assert!(report.warnings[0].contains(text), "{:?}", report.warnings);
    let model = Model::open(&run.dst, &LoadOptions::default()).unwrap();
    assert_eq!(model.linear(1, Linear::Down).type_name(), "f16");
    assert_eq!(model.linear(1, Linear::Gate).type_name(), "int8");
    // It is opened as a source too, and stays what it is.
    let again = run.dst.with_extension("again");
    let second = export(&run.dst, &again, &ExportOptions::default()).unwrap();
    assert_eq!(second.bits_per_weight, report.bits_per_weight);
}

#[test]
fn dense_types_are_for_packed_files_of_float_models() {
    let int8 = DenseType::Rows(RowType::Int8);
    for (config, dense, format, text) in [
        (ModelConfig::tiny(), int8, Format::Packed, "--dense int8: the model is not a float"),
        (ModelConfig::tiny(), DenseType::F16, Format::HfPacked, "--dense f16: the model is not"),
        (twin(ModelConfig::tiny()), int8, Format::HfBf16, "for --format packed, not hf-bf16"),
    ] {
        let run = Run::new(&config);
        let options = ExportOptions { dense, format, ..ExportOptions::default() };
        let error = export(&run.run, &run.dst, &options).unwrap_err();
        assert_eq!(error.exit(), Exit::Usage);
        assert!(error.to_string().contains(text), "{error}");
        assert!(!run.dst.exists());
    }
}

#[test]
fn layouts_are_for_packed_files_of_ternary_models() {
    for (config, format, text) in [
        (ModelConfig::tiny(), Format::HfPacked, "--layout p5: it is for --format packed, not hf-"),
        (twin(ModelConfig::tiny()), Format::Packed, "--layout p5: the model has no ternary"),
    ] {
        let run = Run::new(&config);
        let layout = Layout::P5.into();
        let options = ExportOptions { layout, format, ..ExportOptions::default() };
        let error = export(&run.run, &run.dst, &options).unwrap_err();
        assert_eq!(error.exit(), Exit::Usage);
        assert!(error.to_string().contains(text), "{error}");
        assert!(!run.dst.exists());
    }
}

#[test]
fn the_newest_checkpoint_is_taken() {
    let run = Run::new(&ModelConfig::tiny());
    let checkpoints = run.run.join("checkpoints");
    let newer = checkpoints.join("00000100");
    fs::create_dir(&newer).unwrap();
    assert_eq!(find_checkpoint(&run.run).unwrap(), run.checkpoint, "100 holds nothing yet");
    for file in fs::read_dir(&run.checkpoint).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), newer.join(file.file_name())).unwrap();
    }
    fs::create_dir(checkpoints.join(".00000200.tmp-1")).unwrap();
    assert_eq!(find_checkpoint(&run.run).unwrap(), newer);
    assert_eq!(find_checkpoint(&checkpoints).unwrap(), newer);
    assert_eq!(find_checkpoint(&run.checkpoint).unwrap(), run.checkpoint);
}

#[test]
fn an_existing_file_is_replaced_by_a_good_one_only() {
    let run = Run::new(&ModelConfig::tiny());
    fs::create_dir_all(run.dst.parent().unwrap()).unwrap();
    fs::write(&run.dst, "old").unwrap();
    let golden = run.checkpoint.join("golden.json");
    let good = fs::read(&golden).unwrap();
    fs::write(&golden, "{}").unwrap();
    run.export().unwrap_err();
    assert_eq!(fs::read(&run.dst).unwrap(), b"old");
    fs::write(&golden, good).unwrap();
    run.export().unwrap();
    assert!(fs::read(&run.dst).unwrap().starts_with(b"GGUF"));
    assert_eq!(run.left_behind(), ["model.gguf"]);
}

#[test]
fn an_export_that_is_broken_off_leaves_nothing() {
    let run = Run::new(&ModelConfig::tiny());
    for stop in [Phase::Pack, Phase::Compare, Phase::Golden] {
        let mut seen = Vec::new();
        let result = export_with(&run.run, &run.dst, &ExportOptions::default(), &mut |p| {
            seen.push(p.phase);
            if p.phase == stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        let error = result.unwrap_err();
        assert!(matches!(error, ExportError::Interrupted), "{error}");
        assert_eq!((error.exit(), seen.last()), (Exit::Interrupted, Some(&stop)));
        assert!(run.left_behind().is_empty());
    }
}

fn edit_json(path: &Path, edit: impl Fn(&mut Value)) {
    let mut json: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    edit(&mut json);
    fs::write(path, json.to_string()).unwrap();
}

fn edit_tensor(run: &Run, name: &str, edit: impl Fn(&mut Vec<usize>, &mut Vec<f32>)) {
    let path = run.checkpoint.join("model.safetensors");
    let file = TensorFile::open(&path).unwrap();
    let mut all: Tensors = Vec::new();
    for n in file.names() {
        let (shape, data) = (file.shape(&n).unwrap().to_vec(), file.read(&n).unwrap());
        all.push((n, shape, data));
    }
    let t = all.iter_mut().find(|t| t.0 == name).unwrap();
    edit(&mut t.1, &mut t.2);
    all.retain(|t| !t.2.is_empty());
    write_tensors(&run.checkpoint, &all);
}

const DOWN: &str = "model.layers.1.mlp.down_proj.weight";

#[test]
fn what_is_wrong_is_named_and_nothing_appears() {
    type Edit = fn(&mut Run);
    let cases: &[(&str, Edit, Exit, &str)] = &[
        (
            "no folder",
            |r| r.run = r.run.join("none"),
            Exit::BadInput,
            "none: cannot be read: No such file",
        ),
        ("a file", |r| r.run = r.checkpoint.join("config.json"), Exit::BadInput, "not a GGUF file"),
        (
            "an empty folder",
            |r| fs::remove_dir_all(&r.checkpoint).unwrap(),
            Exit::BadInput,
            "first: holds no checkpoint",
        ),
        (
            "no config.json",
            |r| fs::remove_file(r.checkpoint.join("config.json")).unwrap(),
            Exit::BadInput,
            "config.json: cannot be read: No such file",
        ),
        (
            "no weights",
            |r| {
                fs::remove_file(r.checkpoint.join("model.safetensors")).unwrap();
                r.run = r.checkpoint.clone();
            },
            Exit::BadInput,
            "model.safetensors: cannot be read: No such file",
        ),
        (
            "no tokenizer",
            |r| fs::remove_file(r.checkpoint.join("tokenizer.json")).unwrap(),
            Exit::BadInput,
            "holds no tokenizer; --tokenizer FILE gives one",
        ),
        (
            "a broken config.json",
            |r| fs::write(r.checkpoint.join("config.json"), "{\"hidden_size\": ").unwrap(),
            Exit::BadInput,
            "config.json: not valid JSON: EOF",
        ),
        (
            "a key of another type",
            |r| edit_json(&r.checkpoint.join("config.json"), |j| j["hidden_size"] = "64".into()),
            Exit::BadInput,
            "config.json: key hidden_size: expected a non-negative integer, found \"64\"",
        ),
        (
            "an impossible model",
            |r| edit_json(&r.checkpoint.join("config.json"), |j| j["vocab_size"] = 0.into()),
            Exit::BadInput,
            "config.json: the configuration is invalid: model.vocab_size = 0",
        ),
        (
            "a missing tensor",
            |r| edit_tensor(r, DOWN, |_, d| d.clear()),
            Exit::BadInput,
            "1 tensor(s) missing: model.layers.1.mlp.down_proj.weight",
        ),
        (
            "a wrong shape",
            |r| {
                edit_tensor(r, DOWN, |s, d| {
                    s[1] = 156;
                    d.truncate(64 * 156);
                })
            },
            Exit::BadInput,
            "tensor model.layers.1.mlp.down_proj.weight: expected [64, 160], found [64, 156]",
        ),
        (
            "a NaN",
            |r| edit_tensor(r, DOWN, |_, d| d[160 * 3 + 5] = f32::NAN),
            Exit::BadInput,
            "tensor model.layers.1.mlp.down_proj.weight, element [3, 5]: NaN is not a finite f32",
        ),
        (
            "an embedding beyond f16",
            |r| edit_tensor(r, names::EMBEDDING, |_, d| d[64] = 1e5),
            Exit::BadInput,
            "tensor model.embed_tokens.weight, element [1, 0]: 100000 is not a finite f16",
        ),
        (
            "an infinite norm",
            |r| edit_tensor(r, names::FINAL_NORM, |_, d| d[7] = f32::INFINITY),
            Exit::BadInput,
            "tensor model.norm.weight, element [7]: inf is not a finite f32",
        ),
        (
            "truncated weights",
            |r| {
                let path = r.checkpoint.join("model.safetensors");
                let bytes = fs::read(&path).unwrap();
                fs::write(&path, &bytes[..bytes.len() - 100]).unwrap();
            },
            Exit::BadInput,
            "model.safetensors: not a readable safetensors file: its header needs",
        ),
        (
            "foreign weights",
            |r| fs::write(r.checkpoint.join("model.safetensors"), "GGUF, not safetensors").unwrap(),
            Exit::BadInput,
            "model.safetensors: not a readable safetensors file: a header of",
        ),
        (
            "a tokenizer of another model",
            |r| {
                edit_json(&r.checkpoint.join("tokenizer.json"), |j| {
                    j["model"]["vocab"]["x"] = 320.into();
                })
            },
            Exit::BadInput,
            "tokenizer.json: token \"x\" has id 320, the model has 320 tokens",
        ),
        (
            "a broken golden.json",
            |r| fs::write(r.checkpoint.join("golden.json"), "{\"tokens\": [1]}").unwrap(),
            Exit::BadInput,
            "golden.json: not golden logits: missing field `logits`",
        ),
        (
            "too few golden logits",
            |r| edit_json(&r.checkpoint.join("golden.json"), |j| j["logits"] = json!([1.0])),
            Exit::BadInput,
            "golden.json: 1 logits, the model has 320 tokens",
        ),
        (
            "a golden token outside the vocabulary",
            |r| edit_json(&r.checkpoint.join("golden.json"), |j| j["tokens"][0] = 320.into()),
            Exit::BadInput,
            "golden.json: token 320, the model has 320",
        ),
        (
            "a tampered logit",
            |r| {
                edit_json(&r.checkpoint.join("golden.json"), |j| {
                    let x = j["logits"][17].as_f64().unwrap();
                    j["logits"][17] = (x + 0.001).into();
                })
            },
            Exit::Failed,
            "golden logits: at token 17 training has",
        ),
        (
            "a tampered prompt",
            |r| edit_json(&r.checkpoint.join("golden.json"), |j| j["tokens"][8] = 99.into()),
            Exit::Failed,
            "golden logits: at token 0 training has",
        ),
        (
            "a folder in the way",
            |r| r.dst = r.checkpoint.clone(),
            Exit::Usage,
            "00000020: is a folder, the name of a file is needed",
        ),
        (
            "a file in place of the folder",
            |r| r.dst = r.checkpoint.join("config.json/model.gguf"),
            Exit::Failed,
            "config.json/model.gguf: cannot be written: ",
        ),
    ];
    for (what, edit, exit, text) in cases {
        let mut run = Run::new(&ModelConfig::tiny());
        edit(&mut run);
        let before = run.left_behind();
        let error = run.export().unwrap_err();
        let found = chain(&error);
        assert!(found.contains(text), "{what}: {found}");
        assert_eq!(error.exit(), *exit, "{what}: {found}");
        assert_eq!(run.left_behind(), before, "{what}");
    }
}

/// Where nothing can be written the error is the destination's, not the
/// checkpoint's. (`/proc` refuses even root.)
#[cfg(target_os = "linux")]
#[test]
fn a_read_only_destination_is_named() {
    let mut run = Run::new(&ModelConfig::tiny());
    run.dst = "/proc/model.gguf".into();
    let error = run.export().unwrap_err();
    assert_eq!(error.exit(), Exit::Failed);
    assert!(
        chain(&error).starts_with("/proc/model.gguf: cannot be written: "),
        "{}",
        chain(&error)
    );
}

#[cfg(target_os = "linux")]
#[test]
fn the_binary_reports_and_exits_as_documented() {
    use std::process::Command;
    let run = Run::new(&ModelConfig::tiny());
    let exe = env!("CARGO_BIN_EXE_bitnet-export");
    let call = |args: &[&str]| {
        let out = Command::new(exe).args(args).env_remove("RUST_LOG").output().unwrap();
        let text = |b: Vec<u8>| String::from_utf8(b).unwrap();
        (out.status.code(), text(out.stdout), text(out.stderr))
    };
    let (src, dst) = (run.run.to_str().unwrap(), run.dst.to_str().unwrap());

    let (code, stdout, stderr) = call(&[src, "-o", dst, "--name", "n", "--json", "-"]);
    assert_eq!(code, Some(0), "{stderr}");
    let report: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((report["name"].as_str(), report["layout"].as_str()), (Some("n"), Some("p2")));
    assert_eq!(report["packed_bytes"], fs::metadata(&run.dst).unwrap().len());
    assert!(stderr.contains("packing") && stderr.contains("read back equal"), "{stderr}");

    let file = run.run.join("report.json");
    let (code, stdout, _) = call(&[src, "-o", dst, "--json", file.to_str().unwrap()]);
    assert_eq!((code, stdout.contains("parameters  ")), (Some(0), true));
    assert!(fs::read_to_string(file).unwrap().contains("\"golden_max_abs_error\": 0.0"));

    let (code, stdout, stderr) = call(&["/none", "-o", dst]);
    assert_eq!((code, stdout.as_str()), (Some(3), ""));
    assert!(stderr.starts_with("error: /none: cannot be read: "), "{stderr}");
    for args in [&[src][..], &[src, "-o", dst, "--layout", "p9"], &[src, "-o", dst, "--nope"]] {
        assert_eq!(call(args).0, Some(2), "{args:?}");
    }
    assert_eq!(call(&[src, "-o", "/proc/m.gguf"]).0, Some(1));
    assert_eq!(call(&[src, "-o", dst, "--json", "/proc/r.json"]).0, Some(1));
}

//! A model of another tool, opened directly, is the model that an import writes,
//! byte for byte.

#![allow(clippy::unwrap_used)]

#[path = "../../bitnet-engine/tests/common/mod.rs"]
mod common;

use std::path::{Path, PathBuf};

use bitnet_core::{Activation, ModelConfig, WeightQuantizer};
use bitnet_engine::{EngineError, LoadOptions, Model};
use bitnet_export::{DenseType, ExportOptions, Format, OpenOptions, RowType, export};
use serde_json::{Value, json};

fn crates() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// 512 tokens; the folders of the fixtures have no tokenizer.
fn tokenizer(folder: &Path) -> PathBuf {
    let vocab: serde_json::Map<String, Value> =
        (0..512).map(|i| (format!("t{i}"), i.into())).collect();
    let json = json!({ "model": { "type": "BPE", "vocab": vocab, "merges": [] } });
    let path = folder.join("tokenizer.json");
    std::fs::write(&path, json.to_string()).unwrap();
    path
}

fn check(src: &Path, open: &OpenOptions, command: &str) {
    let dir = tempfile::tempdir().unwrap();
    let dst = dir.path().join("model.gguf");
    let options = ExportOptions { open: open.clone(), ..ExportOptions::default() };
    export(src, &dst, &options).unwrap();
    let load = LoadOptions { verify: true, source: open.clone(), ..LoadOptions::default() };
    let model = Model::open(src, &load).unwrap();
    assert!(model.as_bytes() == std::fs::read(&dst).unwrap(), "{}", src.display());
    let packing = model.packing().unwrap();
    assert_eq!(packing.bytes, model.bytes());
    assert!(packing.command.ends_with(command), "{}", packing.command);
    assert!(packing.command.contains(&src.display().to_string()), "{}", packing.command);
}

#[test]
fn folders_and_files_are_packed_as_an_import_packs_them() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer(dir.path());
    let given = format!(" --tokenizer {}", tokenizer.display());
    let open = OpenOptions { tokenizer: Some(tokenizer), ..OpenOptions::default() };
    let multiplies = crates().join("bitnet-engine/tests/fixtures/bitnet_tiny_packed");
    check(&multiplies, &open, &given);
    check(
        &crates().join("bitnet-export/tests/fixtures/llama_bitlinear_tiny_packed"),
        &open,
        &given,
    );
    let relu2 = OpenOptions { hidden_act: Some(Activation::Relu2), ..open };
    for name in ["tiny-i2_s.gguf", "tiny-tq1_0.gguf", "tiny-tq2_0.gguf"] {
        let src = crates().join("bitnet-format/tests/fixtures").join(name);
        check(&src, &relu2, &format!(" --hidden-act relu2{given}"));
    }
}

/// A packed file is used in place, and packed anew where an option changes it.
#[test]
fn a_packed_file_is_used_in_place() {
    let dir = tempfile::tempdir().unwrap();
    let model = common::RandomModel::new(&ModelConfig::tiny(), 1);
    let src = model.file().write(&dir);
    let opened = Model::open(&src, &LoadOptions::default()).unwrap();
    assert!(opened.packing().is_none());
    let other = dir.path().join("tokenizer.json");
    let text = opened.tokenizer_json().replacen('{', "{ ", 1);
    assert_ne!(text, opened.tokenizer_json());
    std::fs::write(&other, &text).unwrap();
    let source = OpenOptions { tokenizer: Some(other), ..OpenOptions::default() };
    let changed = Model::open(&src, &LoadOptions { source, ..LoadOptions::default() }).unwrap();
    assert_eq!(changed.tokenizer_json(), text);
    assert_eq!(changed.packing().unwrap().kind, "packed model");
    // What is exported of it and opened once more is a folder like any other.
    let folder = dir.path().join("folder");
    let options = ExportOptions { format: Format::HfPacked, ..ExportOptions::default() };
    export(&src, &folder, &options).unwrap();
    check(&folder, &OpenOptions::default(), "folder -o model.gguf");
}

/// `dense` on opening is `--dense` of an export, and refused where it changes nothing.
#[test]
fn a_float_model_opens_as_rows_of_another_type() {
    let dir = tempfile::tempdir().unwrap();
    let config = ModelConfig { weight_quantizer: WeightQuantizer::None, ..ModelConfig::tiny() };
    let src = common::RandomModel::new(&config, 1).file().write(&dir);
    let weights = config.parameter_count().linear as f64;
    for (dense, bits) in [
        (DenseType::Rows(RowType::Int8), 8.5),
        (DenseType::Rows(RowType::Int4), 4.5),
        (DenseType::F16, 16.0),
        (DenseType::F32, 32.0),
    ] {
        let dst = dir.path().join("dense.gguf");
        export(&src, &dst, &ExportOptions { dense, ..ExportOptions::default() }).unwrap();
        let options = LoadOptions { verify: true, dense, ..LoadOptions::default() };
        let model = Model::open(&src, &options).unwrap();
        assert!(model.as_bytes() == std::fs::read(&dst).unwrap(), "{}", dense.name());
        assert_eq!(model.parts().dense as f64 * 8.0, weights * bits);
        let packing = model.packing().unwrap();
        let command = format!("-o model.gguf --dense {}", dense.name());
        assert!(packing.command.ends_with(&command), "{}", packing.command);
        assert_eq!(dense.name().parse(), Ok(dense));
    }
    let ternary = common::RandomModel::new(&ModelConfig::tiny(), 1).file().write(&dir);
    let options = LoadOptions { dense: DenseType::F16, ..LoadOptions::default() };
    let error = Model::open(&ternary, &options).unwrap_err();
    assert_eq!(error.exit(), bitnet_core::Exit::Usage);
    let text = error.to_string();
    assert!(text.contains("dense = f16") && text.contains("is not a float model"), "{text}");
}

#[test]
fn what_is_missing_is_named() {
    let open = |src: &Path, source: OpenOptions| {
        let error = Model::open(src, &LoadOptions { source, ..LoadOptions::default() });
        let error: EngineError = error.err().unwrap();
        assert_eq!(error.exit(), bitnet_core::Exit::BadInput);
        error.to_string()
    };
    let folder = crates().join("bitnet-engine/tests/fixtures/bitnet_tiny_packed");
    let error = open(&folder, OpenOptions::default());
    assert!(error.contains(&folder.display().to_string()), "{error}");
    assert!(error.contains("--tokenizer FILE") && error.contains("import"), "{error}");
    let dir = tempfile::tempdir().unwrap();
    let source = OpenOptions {
        tokenizer: Some(tokenizer(dir.path())),
        hidden_act: Some(Activation::Silu),
        ..OpenOptions::default()
    };
    let error = open(&folder, source.clone());
    assert!(error.contains("states its activation"), "{error}");
    let error = open(dir.path(), source);
    assert!(error.contains("holds no checkpoint"), "{error}");
}

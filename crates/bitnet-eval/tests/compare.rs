//! `bitnet-eval compare` and `plan` end to end on small random models.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

// The engine's makers of small random models.
#[path = "../../bitnet-engine/tests/common/mod.rs"]
mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use bitnet_core::{ModelConfig, WeightQuantizer};
use common::RandomModel;
use serde_json::Value;

fn eval(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bitnet-eval"));
    command.env_remove("BITNET_ISA").env_remove("RUST_LOG").args(args).output().unwrap()
}

fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn write(dir: &Path, name: &str, config: &ModelConfig) -> PathBuf {
    let folder = tempfile::tempdir().unwrap();
    let written = RandomModel::new(config, 1).file().write(&folder);
    let path = dir.join(name);
    std::fs::copy(written, &path).unwrap();
    path
}

/// A ternary model and a float twin of its shape, whose rows are whole blocks.
fn models(dir: &Path) -> (String, String) {
    let twin = ModelConfig { weight_quantizer: WeightQuantizer::None, ..ModelConfig::tiny() };
    let text = |path: PathBuf| path.to_str().unwrap().to_owned();
    (text(write(dir, "twin.gguf", &twin)), text(write(dir, "ternary.gguf", &ModelConfig::tiny())))
}

const QUICK: [&str; 8] = ["--threads", "1", "--prompt", "16", "--generate", "8", "--repeats", "2"];

#[test]
fn variants_of_a_twin_stand_beside_a_ternary_model() {
    let dir = tempfile::tempdir().unwrap();
    let (twin, ternary) = models(dir.path());
    let text = dir.path().join("text.txt");
    std::fs::write(&text, "the cat sat on the mat and so did the dog. ".repeat(20)).unwrap();
    let html = dir.path().join("page.html");
    let variants = ["int8", "int4", "ternary"].map(|v| format!("{twin}@{v}"));
    let mut args = vec!["compare", &twin, &variants[0], &variants[1], &variants[2], &ternary];
    let scores = dir.path().join("tasks.json");
    std::fs::write(&scores, r#"{"results":{"piqa":{"acc,none":0.5}}}"#).unwrap();
    for file in ["-", "-", "-", "-", scores.to_str().unwrap()] {
        args.extend(["--tasks", file]);
    }
    args.extend(["--text", text.to_str().unwrap(), "--html", html.to_str().unwrap()]);
    args.extend(QUICK);
    args.extend(["--json", "-"]);
    let report = json(&eval(&args));
    let models = report["models"].as_array().unwrap();
    let column =
        |key: &str| -> Vec<&str> { models.iter().map(|m| m[key].as_str().unwrap()).collect() };
    let labels = ["twin", "twin@int8", "twin@int4", "twin@ternary", "ternary"];
    assert_eq!(column("label"), labels);
    assert_eq!(column("form"), ["f32", "int8", "int4", "p2", "p2"]);
    let bytes = |i: usize| models[i]["file_bytes"].as_u64().unwrap();
    assert!(bytes(0) > bytes(1) && bytes(1) > bytes(2), "{report}");
    assert_eq!(bytes(0), std::fs::metadata(&twin).unwrap().len(), "it is used in place");
    for model in models {
        assert!(model["prefill"]["median"].as_f64().unwrap() > 0.0);
        assert!(model["memory_bytes"].as_u64().unwrap() > model["file_bytes"].as_u64().unwrap());
        assert!(model["load_seconds"].as_f64().unwrap() > 0.0);
    }
    // int8 is nearly the twin, ternary is another model.
    let nats = |i: usize| models[i]["quality"]["nats"].as_f64().unwrap();
    assert!((nats(1) - nats(0)).abs() < 0.05 && nats(0) != nats(3), "{report}");
    assert_eq!(models[4]["tasks"][0]["value"], 0.5);
    assert_eq!(
        (&report["conditions"]["one_tokenizer"], &report["conditions"]["threads"]),
        (&true.into(), &1.into())
    );
    let page = std::fs::read_to_string(&html).unwrap();
    assert!(page.contains("perplexity against decode speed") && page.contains("piqa, acc"));
    assert_eq!(page.matches("<circle").count(), 5);
    // Nothing is left of the variants.
    let left: Vec<_> =
        std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 5, "{left:?}");
}

#[test]
fn what_cannot_be_compared_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (twin, ternary) = models(dir.path());
    let missing = dir.path().join("none.txt");
    let int8 = format!("{ternary}@int8");
    let odd = format!("{twin}@int7");
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/tiny.toml");
    let config = config.to_str().unwrap();
    for (args, code, message) in [
        (&["compare", &twin][..], 2, "MODEL"),
        (&["compare", &twin, &odd], 2, "unknown variant `int7`"),
        (&["compare", &twin, &int8], 2, "the model is ternary, not dense"),
        (&["compare", &twin, &ternary, "--tasks", "a.json"], 2, "1 files for 2 models"),
        (&["compare", &twin, &ternary, "--text", missing.to_str().unwrap()], 3, "none.txt"),
        (&["compare", &twin, &ternary, "--prompt", "4096"], 2, "--prompt 4096"),
        (&["compare", &twin, &ternary, "--mode", "blocks"], 2, "--mode: nothing is scored"),
        (&["compare", &twin, &ternary, "--context", "64"], 2, "--context: nothing is scored"),
        (&["compare", &twin, &ternary, "--max-tokens", "9"], 2, "--max-tokens: nothing is"),
        (&["plan", "no-such-config"], 3, "no-such-config"),
        (&["plan", &twin, "--tokens", "9"], 2, "twin.gguf says nothing about training"),
        (&["plan", &twin, "--flops", "1e9"], 2, "--flops: "),
        (&["plan", config, "--ptq", "ternary"], 2, "--ptq: "),
        (&["plan", config, "--hidden-act", "silu"], 2, "tiny.toml is a training config"),
        (&["plan", config, "--tokenizer", "t.json"], 2, "--tokenizer: "),
        (&["bench", &twin, "--generate", "0", "--batch", "2"], 2, "--generate 0 leaves nothing"),
        (&["plan", &twin, "--form", "p5"], 2, "--form p5"),
        (&["plan", &twin, "--tokens", "0"], 2, "--tokens"),
    ] {
        let output = eval(args);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {text}");
        assert!(text.contains(message), "{args:?}: {text}");
    }
}

#[test]
fn a_plan_of_a_file_has_its_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (twin, ternary) = models(dir.path());
    for path in [&twin, &ternary] {
        let small = ["plan", path.as_str(), "--threads", "1", "--bandwidth", "20", "--json", "-"];
        let plan = json(&eval(&small));
        let form = plan["form"].as_str().unwrap();
        let files = plan["files"].as_array().unwrap();
        let own = files.iter().find(|f| f["form"] == form).unwrap();
        assert_eq!(own["bytes"], std::fs::metadata(path).unwrap().len(), "{plan}");
        assert_eq!(plan["run"]["file"], own["bytes"]);
        assert!(plan["decode"]["tokens_per_second"].as_f64().unwrap() > 0.0);
        assert!(plan["training"].is_null() && plan["largest"].is_null());
        assert_eq!(plan["machine"]["read"][0]["gb_per_second"], 20.0);
    }
}

#[test]
fn a_plan_of_a_config_has_training_and_the_largest_model() {
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/tiny.toml");
    let config = config.to_str().unwrap();
    let args = ["plan", config, "--threads", "1", "--target-decode", "100", "--flops", "1e9"];
    let output = eval(&args);
    let table = String::from_utf8(output.stdout).unwrap();
    for words in
        ["packed file", "training, 8 sequences at once", "0.001 TFLOP/s stated", "largest model"]
    {
        assert!(table.contains(words), "`{words}` is not in:\n{table}");
    }
    for line in table.lines() {
        assert!(line.chars().count() <= 100, "{line}");
    }
}

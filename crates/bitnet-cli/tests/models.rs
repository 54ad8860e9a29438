//! `generate`, `chat` and `inspect` on small random models, through the binary:
//! results, exit codes and messages.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

// The engine's makers of small random models.
#[path = "../../bitnet-engine/tests/common/mod.rs"]
mod common;

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use bitnet_core::{ModelConfig, WeightQuantizer, names};
use bitnet_format::hf;
use common::{RandomModel, tokenizer_json};
use serde_json::Value;

type Args<'a> = Vec<&'a dyn AsRef<OsStr>>;

fn command(args: &[&dyn AsRef<OsStr>]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bitnet"));
    command.env_remove("BITNET_ISA").env_remove("RUST_LOG").stdin(Stdio::null());
    args.iter().for_each(|a| {
        command.arg(a.as_ref());
    });
    command
}

fn bitnet(args: &[&dyn AsRef<OsStr>]) -> Output {
    command(args).output().unwrap()
}

/// Runs with `input` on stdin.
fn piped(args: &[&dyn AsRef<OsStr>], input: &str) -> Output {
    let mut command = command(args);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("output is UTF-8")
}

fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

struct Setup {
    dir: tempfile::TempDir,
    model: PathBuf,
}

impl Setup {
    fn new(config: &ModelConfig, chat_template: Option<&'static str>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut file = RandomModel::new(config, 1).file();
        if let Some(template) = chat_template {
            file.keys.push(("tokenizer.chat_template".into(), template.into()));
        }
        let model = file.write(&dir);
        Self { dir, model }
    }

    fn tiny() -> Self {
        Self::new(&ModelConfig::tiny(), None)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

#[test]
fn generates_the_same_text_for_the_same_seed_however_the_prompt_comes() {
    let s = Setup::tiny();
    let prompt_file = s.path("prompt.txt");
    fs::write(&prompt_file, "héllo").unwrap();
    fn with<'a>(first: &[&'a dyn AsRef<OsStr>]) -> Args<'a> {
        [first, &[&"-n", &"20", &"--seed", &"7", &"--json", &"-"]].concat()
    }
    let plain = json(&bitnet(&with(&[&"generate", &s.model, &"héllo"])));
    assert_eq!(plain["prompt"], "héllo");
    assert_eq!(plain["prompt_tokens"], 6, "bytes are tokens here");
    assert_eq!(plain["generated_tokens"], plain["tokens"].as_array().unwrap().len());
    assert!(plain["generated_tokens"].as_u64().unwrap() <= 20);
    assert!(["eos", "length"].contains(&plain["finish_reason"].as_str().unwrap()));
    for key in ["prefill_tokens_per_second", "decode_tokens_per_second", "seconds", "isa", "kv"] {
        assert!(!plain[key].is_null(), "{key}");
    }
    let file = json(&bitnet(&with(&[&"generate", &s.model, &"--prompt-file", &prompt_file])));
    let stdin = json(&piped(&with(&[&"generate", &s.model]), "héllo"));
    let threads = json(&bitnet(&with(&[&"generate", &s.model, &"héllo", &"--threads", &"3"])));
    for other in [&file, &stdin, &threads] {
        assert_eq!(other["tokens"], plain["tokens"]);
        assert_eq!(other["text"], plain["text"]);
    }
    // Where the best few decide, a scan of the head finds the same.
    let few = |head: &str| {
        let mut args = with(&[&"generate", &s.model, &"héllo", &"--top-k", &"5", &"--head", &head]);
        let sampled = json(&bitnet(&args));
        args.extend([&"--temperature" as &dyn AsRef<OsStr>, &"0"]);
        let greedy = json(&bitnet(&args));
        assert_eq!([&sampled["head"], &greedy["head"]], [head, head]);
        [sampled["tokens"].clone(), greedy["tokens"].clone()]
    };
    let stored = few("stored");
    assert_eq!([few("int8"), few("int4")], [stored.clone(), stored]);
    let seed = json(&bitnet(&[
        &"generate",
        &s.model,
        &"héllo",
        &"-n",
        &"20",
        &"--seed",
        &"8",
        &"--json",
        &"-",
    ]));
    assert_ne!(seed["tokens"], plain["tokens"]);
}

#[test]
fn text_streams_to_stdout_and_speed_to_stderr() {
    let s = Setup::tiny();
    let out = s.path("out.json");
    let args: Args<'_> =
        vec![&"generate", &s.model, &"abc", &"-n", &"24", &"--temperature", &"0", &"--json", &out];
    let output = bitnet(&args);
    let report: Value = serde_json::from_slice(&fs::read(&out).unwrap()).unwrap();
    let written = report["text"].as_str().unwrap();
    assert_eq!(text(&output.stdout).trim_end_matches('\n'), written.trim_end_matches('\n'));
    assert!(text(&output.stderr).contains("tokens/s"), "{}", text(&output.stderr));
    // A stop string that appears ends the text before it.
    let stop: String = written.chars().skip(written.chars().count() / 2).take(1).collect();
    let stopped = json(&bitnet(&[
        &"generate",
        &s.model,
        &"abc",
        &"-n",
        &"24",
        &"--temperature",
        &"0",
        &"--stop",
        &stop,
        &"--json",
        &"-",
    ]));
    assert_eq!(stopped["finish_reason"], "stop");
    assert_eq!(stopped["text"], written[..written.find(&stop).unwrap()]);
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_a_text_with_130_and_keeps_the_result() {
    use std::io::Read;
    let config = ModelConfig { max_position_embeddings: 1 << 20, ..ModelConfig::tiny() };
    let s = Setup::new(&config, None);
    let out = s.path("out.json");
    let args: Args<'_> = vec![&"generate", &s.model, &"abc", &"-n", &"500000", &"--json", &out];
    let mut command = command(&args);
    // No end-of-text token may end it first: greedy from a fixed model does not.
    command.args(["--temperature", "0"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 1]).unwrap();
    let drain = std::thread::spawn(move || std::io::copy(&mut stdout, &mut std::io::sink()));
    let id = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &id]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    drain.join().unwrap().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", text(&output.stderr));
    let report: Value = serde_json::from_slice(&fs::read(&out).unwrap()).unwrap();
    assert_eq!(report["finish_reason"], "interrupted");
    assert!(report["generated_tokens"].as_u64().unwrap() > 0);
}

#[test]
fn a_base_model_goes_on_from_the_conversation() {
    let s = Setup::tiny();
    let output = piped(
        &[&"chat", &s.model, &"-n", &"4", &"--seed", &"3"],
        "hello\n/help\n/reset\nhello\n/nonsense\n\n/exit\nnever said\n",
    );
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{err}");
    assert_eq!(err.matches("base model without a chat template").count(), 1, "{err}");
    assert!(err.contains("/reset  forget") && err.contains("(forgotten)"), "{err}");
    assert!(err.contains("no such command: /nonsense"), "{err}");
    assert!(!out.is_empty());
    // Where the context is full it says so and goes on.
    let long = format!("{}\n/reset\nhi\n", "x".repeat(200));
    let output = piped(&[&"chat", &s.model, &"-n", &"2"], &long);
    assert!(output.status.success());
    assert!(text(&output.stderr).contains("200 tokens, and there is room for 128"));
}

#[test]
fn a_chat_template_is_rendered() {
    let template = "{% for m in messages %}[{{ m.role }}]{{ m.content.strip() }}{% endfor %}\
        {% if add_generation_prompt %}[assistant]{% endif %}";
    let s = Setup::new(&ModelConfig::tiny(), Some(template));
    let output = piped(&[&"chat", &s.model, &"-n", &"3", &"--system", &"Be."], "hi\nagain\n");
    let err = text(&output.stderr);
    assert!(output.status.success(), "{err}");
    assert!(!err.contains("base model"), "{err}");
    // The answer is the one to the rendered conversation.
    let direct = json(&bitnet(&[
        &"generate",
        &s.model,
        &"[system]Be.[user]hi[assistant]",
        &"-n",
        &"3",
        &"--json",
        &"-",
    ]));
    let expected = direct["text"].as_str().unwrap();
    assert!(text(&output.stdout).starts_with(expected), "{expected:?}: {:?}", output.stdout);

    let raises = "{{ raise_exception('roles must alternate') }}";
    let s = Setup::new(&ModelConfig::tiny(), Some(raises));
    let output = piped(&[&"chat", &s.model], "hi\n");
    assert_eq!(output.status.code(), Some(3));
    assert!(text(&output.stderr).contains("roles must alternate"));
}

#[test]
fn inspects_packed_models() {
    let s = Setup::tiny();
    let report = json(&bitnet(&[&"inspect", &s.model, &"--verify", &"--json", &"-"]));
    assert_eq!((&report["kind"], &report["layout"]), (&"packed".into(), &"p2".into()));
    assert_eq!(report["verified"], true);
    let parts = report["parts"].as_object().unwrap();
    let sum: u64 = parts.values().map(|v| v.as_u64().unwrap()).sum();
    assert_eq!(sum, fs::metadata(&s.model).unwrap().len());
    assert_eq!(report["bytes"], sum);
    let config = ModelConfig::tiny();
    assert_eq!(report["parameters"]["total"], config.parameter_count().total());
    let bits = &report["bits_per_ternary_weight"];
    assert_eq!(bits["unpadded"], 2.0);
    let linear = config.parameter_count().linear as f64;
    let stored = 8.0 * parts["ternary"].as_u64().unwrap() as f64 / linear;
    assert!((bits["stored"].as_f64().unwrap() - stored).abs() < 1e-9 && stored > 2.0);
    // 11 tensors a block and seven scales, embedding, final norm.
    assert_eq!(report["tensors"].as_array().unwrap().len(), 2 * (11 + 7) + 2);

    let table = text(&bitnet(&[&"inspect", &s.model, &"--tensors"]).stdout);
    for words in ["packed model", "2 layers, hidden 64", "blk.1.ffn_down.weight", "I8 [64, 64]"] {
        assert!(table.contains(words), "`{words}` is not in\n{table}");
    }
    let twin = ModelConfig { weight_quantizer: WeightQuantizer::None, ..config };
    let s = Setup::new(&twin, None);
    let report = json(&bitnet(&[&"inspect", &s.model, &"--json", &"-"]));
    assert!(report["layout"].is_null() && report["bits_per_ternary_weight"].is_null());
    assert!(report["verified"].is_null());
}

#[test]
fn verify_finds_a_code_that_is_no_weight() {
    let dir = tempfile::tempdir().unwrap();
    let mut file = RandomModel::new(&ModelConfig::tiny(), 1).file();
    file.tensor("blk.1.ffn_up.weight").3[70] = 0xff;
    let path = file.write(&dir);
    assert!(bitnet(&[&"inspect", &path]).status.success());
    let output = bitnet(&[&"inspect", &path, &"--verify"]);
    assert_eq!(output.status.code(), Some(3));
    assert!(text(&output.stderr).contains("blk.1.ffn_up.weight: row 1"), "{output:?}");
}

#[test]
fn inspects_files_of_other_programs_and_checkpoints() {
    let foreign = fixture("bitnet-format", "tiny-tq2_0.gguf");
    let report = json(&bitnet(&[&"inspect", &foreign, &"--verify", &"--json", &"-"]));
    assert_eq!((&report["kind"], &report["refused"]), (&"gguf".into(), &Value::Null));
    assert_eq!(report["source"], "GGUF, architecture bitnet");
    assert_eq!(
        (&report["verified"], &report["config"]["hidden_size"]),
        (&true.into(), &256.into())
    );
    assert!(!report["tensors"].as_array().unwrap().is_empty());
    assert!(!report["keys"].as_array().unwrap().is_empty());

    let other = fixture("bitnet-format", "blocks.gguf");
    let report = json(&bitnet(&[&"inspect", &other, &"--json", &"-"]));
    assert!(report["refused"].as_str().unwrap().contains("blocks.gguf"), "{report}");
    assert_eq!(bitnet(&[&"inspect", &other, &"--verify"]).status.code(), Some(3));

    let folder = fixture("bitnet-engine", "bitnet_tiny_packed");
    let report = json(&bitnet(&[&"inspect", &folder, &"--verify", &"--json", &"-"]));
    assert_eq!((&report["kind"], &report["verified"]), (&"folder".into(), &true.into()));
    assert_eq!(report["source"], "Hugging Face folder, packed (autobitlinear)");
    let tensors = report["tensors"].as_array().unwrap();
    assert!(tensors.iter().any(|t| t["type"] == "u8"), "{report}");

    let dir = tempfile::tempdir().unwrap();
    let config = ModelConfig::tiny();
    let special = hf::SpecialTokens::default();
    let config_json = hf::to_json(&config, special).to_string();
    fs::write(dir.path().join("config.json"), config_json).unwrap();
    let specs = names::tensors(&config);
    let values: Vec<Vec<f32>> =
        specs.iter().map(|(_, shape)| vec![0.5; shape.iter().product()]).collect();
    let weights = dir.path().join("model.safetensors");
    let mut writer = hf::TensorFileWriter::create(&weights, &[], specs.clone()).unwrap();
    for ((name, _), values) in specs.iter().zip(&values) {
        writer.write(name, values).unwrap();
    }
    writer.commit().unwrap();
    let report = json(&bitnet(&[&"inspect", &dir.path(), &"--verify", &"--json", &"-"]));
    assert_eq!(report["kind"], "checkpoint");
    assert_eq!(report["bytes"], 4 * config.parameter_count().total());
    let table = text(&bitnet(&[&"inspect", &dir.path()]).stdout);
    assert!(table.contains("checkpoint of master weights"), "{table}");
}

fn fixture(of: &str, name: &str) -> PathBuf {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    crates.join(of).join("tests/fixtures").join(name)
}

#[test]
fn a_folder_is_packed_on_opening_with_one_line_on_stderr() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = dir.path().join("tokenizer.json");
    fs::write(&tokenizer, tokenizer_json()).unwrap();
    let folder = fixture("bitnet-engine", "bitnet_tiny_packed");
    let args: Args<'_> =
        vec![&"generate", &folder, &"ab", &"-n", &"8", &"--temperature", &"0", &"--json", &"-"];
    // It has no tokenizer, and the error says what to do.
    let output = bitnet(&args);
    assert_eq!(output.status.code(), Some(3));
    assert!(text(&output.stderr).contains("--tokenizer FILE"), "{output:?}");
    let with = [&args[..], &[&"--tokenizer", &tokenizer]].concat();
    let output = bitnet(&with);
    let message = text(&output.stderr);
    assert_eq!(json(&output)["generated_tokens"], 8, "{message}");
    let lines: Vec<_> = message.lines().filter(|l| l.contains("was packed in")).collect();
    assert_eq!(lines.len(), 1, "{message}");
    for words in ["Hugging Face folder", "MB", "bitnet-export import", "--tokenizer"] {
        assert!(lines[0].contains(words), "{message}");
    }
    // The two files hold the same model.
    let gguf = fixture("bitnet-format", "tiny-tq2_0.gguf");
    let act = [&with[..], &[&"--hidden-act", &"relu2"]].concat();
    assert_eq!(bitnet(&act).status.code(), Some(3), "the folder states its activation");
    let mut same = act;
    same[1] = &gguf;
    assert_eq!(json(&bitnet(&same))["tokens"], json(&output)["tokens"]);
}

#[test]
fn differences_are_found_tensor_by_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, change: &dyn Fn(&mut common::File)| {
        let mut file = RandomModel::new(&ModelConfig::tiny(), 1).file();
        change(&mut file);
        let path = dir.path().join(name);
        fs::rename(file.write(&dir), &path).unwrap();
        path
    };
    let a = write("a.gguf", &|_| ());
    let same = write("same.gguf", &|_| ());
    let b = write("b.gguf", &|file| {
        let bytes = &mut file.tensor("blk.1.ffn_up.weight").3;
        // The lowest two bits of byte 70 of row 1 hold weight 6: 0, 1 or 2.
        bytes[70] = (bytes[70] & !3) | (((bytes[70] + 1) & 3) % 3);
        file.tensor("blk.0.attn_v.scale").3 = 0.5f32.to_le_bytes().to_vec();
        file.tensor("output_norm.weight").3[8..12].copy_from_slice(&9.0f32.to_le_bytes());
        file.set("context_length", 64u32);
    });
    let output = bitnet(&[&"inspect", &"--diff", &a, &same]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(text(&output.stdout).contains("result   equal"), "{output:?}");

    let output = bitnet(&[&"inspect", &"--diff", &a, &b, &"--json", &"-"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["equal"], false);
    let config = &report["config"];
    assert_eq!(config.as_array().unwrap().len(), 1);
    assert_eq!(
        (&config[0]["key"], &config[0]["b"]),
        (&"max_position_embeddings".into(), &64.into())
    );
    let tensors = report["tensors"].as_array().unwrap();
    assert_eq!(tensors.len(), 2 * 11 + 2);
    let differ: Vec<_> = tensors.iter().filter(|t| t["equal"] == false).collect();
    let names: Vec<_> = differ.iter().map(|t| t["name"].as_str().unwrap()).collect();
    assert_eq!(
        names,
        [
            "model.layers.0.self_attn.v_proj.weight",
            "model.layers.1.mlp.up_proj.weight",
            "model.norm.weight"
        ]
    );
    assert_eq!(differ[0]["different"], 0);
    assert!(differ[0]["scale_relative_difference"].as_f64().unwrap() > 0.0);
    assert_eq!(
        (&differ[1]["different"], &differ[1]["first"]),
        (&1.into(), &serde_json::json!([1, 6]))
    );
    assert_eq!(
        (&differ[2]["different"], &differ[2]["first"]),
        (&1.into(), &serde_json::json!([2]))
    );
    assert!(differ[2]["largest_difference"].as_f64().unwrap() > 1.0);
    let table = text(&bitnet(&[&"inspect", &"--diff", &a, &b]).stdout);
    for words in ["1 of ", "trits differ, the first at [1, 6]", "scales", "config max_position"] {
        assert!(table.contains(words), "`{words}` is not in\n{table}");
    }

    // Another shape: tensors that one alone has, and one whose shapes differ.
    let config = ModelConfig { num_hidden_layers: 1, intermediate_size: 96, ..ModelConfig::tiny() };
    let small = Setup::new(&config, None);
    let output = bitnet(&[&"inspect", &"--diff", &a, &small.model, &"--json", &"-"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["missing"].as_array().unwrap().len(), 11);
    assert!(report["extra"].as_array().unwrap().is_empty());
    let tensors = report["tensors"].as_array().unwrap();
    let shapes = tensors.iter().filter(|t| !t["shapes"].is_null()).count();
    assert_eq!(shapes, 4, "gate, up, down and a sub-norm");

    // The same model in three files of other tools.
    let folder = fixture("bitnet-engine", "bitnet_tiny_packed");
    let gguf = |name| fixture("bitnet-format", name);
    let (tq1, tq2) = (gguf("tiny-tq1_0.gguf"), gguf("tiny-tq2_0.gguf"));
    assert_eq!(bitnet(&[&"inspect", &"--diff", &tq1, &tq2]).status.code(), Some(0));
    let output = bitnet(&[&"inspect", &"--diff", &folder, &tq2, &"--json", &"-"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let tensors = report["tensors"].as_array().unwrap();
    assert!(tensors.iter().all(|t| t["kind"] == "float" || t["different"] == 0), "{report}");
}

#[test]
fn bad_usage_and_bad_files_are_told_apart() {
    let s = Setup::tiny();
    let (missing, foreign, cut, empty) =
        (s.path("missing.gguf"), s.path("foreign.gguf"), s.path("cut.gguf"), s.path("empty.gguf"));
    fs::write(&foreign, "PK\x03\x04 not a model").unwrap();
    fs::write(&empty, "").unwrap();
    let whole = fs::read(&s.model).unwrap();
    fs::write(&cut, &whole[..whole.len() / 2]).unwrap();
    let hollow = s.path("hollow");
    fs::create_dir(&hollow).unwrap();
    let model = &s.model;
    let config = s.path("broken.toml");
    fs::write(&config, "[model\n").unwrap();
    assert!(tokenizer_json().contains("ByteLevel"));
    let cases: Vec<(Args<'_>, i32, &str)> = vec![
        (vec![&"generate", &missing, &"x"], 3, "missing.gguf: cannot be read"),
        (vec![&"generate", &foreign, &"x"], 3, "foreign.gguf: not a GGUF file"),
        (vec![&"generate", &empty, &"x"], 3, "empty.gguf"),
        (vec![&"generate", &cut, &"x"], 3, "cut.gguf"),
        (vec![&"generate", &hollow, &"x"], 3, "hollow"),
        (vec![&"generate"], 2, "<MODEL>"),
        (vec![&"generate", model, &""], 2, "the prompt is empty"),
        (vec![&"generate", model, &"--prompt-file", &missing], 3, "missing.gguf: cannot be read"),
        (vec![&"generate", model, &"x", &"--prompt-file", &config], 2, "--prompt-file"),
        (vec![&"generate", model, &"x", &"-n", &"-1"], 2, "-1"),
        (vec![&"generate", model, &"x", &"--temperature", &"hot"], 2, "hot"),
        (vec![&"generate", model, &"x", &"--temperature=-1"], 2, "temperature = -1"),
        (vec![&"generate", model, &"x", &"--top-p", &"1.5"], 2, "top_p = 1.5"),
        (vec![&"generate", model, &"x", &"--min-p", &"2"], 2, "min_p = 2"),
        (vec![&"generate", model, &"x", &"--repetition-penalty", &"0"], 2, "repetition_penalty"),
        (vec![&"generate", model, &"x", &"--kv", &"f8"], 2, "f8"),
        (vec![&"generate", model, &"x", &"--head", &"int5"], 2, "int5"),
        (vec![&"generate", model, &"x", &"--threads", &"0"], 2, "threads"),
        (vec![&"generate", model, &"x", &"--context", &"129"], 2, "context = 129"),
        (vec![&"generate", model, &"too long", &"--context", &"4"], 2, "8 tokens do not fit"),
        (vec![&"generate", model, &"x", &"--frobnicate"], 2, "--frobnicate"),
        (vec![&"chat", &missing], 3, "missing.gguf: cannot be read"),
        (vec![&"chat", model, &"--system", &"x"], 2, "--system needs a model with"),
        (vec![&"chat", model, &"--top-p", &"0"], 2, "top_p = 0"),
        (vec![&"inspect", &missing], 3, "missing.gguf"),
        (vec![&"inspect", &foreign], 3, "foreign.gguf: not a GGUF file"),
        (vec![&"inspect", &cut], 3, "cut.gguf"),
        (vec![&"inspect", &hollow], 3, "config.json"),
        (vec![&"inspect"], 2, "<MODEL>"),
        (vec![&"inspect", &"--diff", model], 2, "--diff"),
        (vec![&"inspect", &"--diff", model, &missing], 3, "missing.gguf: cannot be read"),
        (vec![&"inspect", model, &"--diff", model, model], 2, "--diff"),
        (vec![&"generate", model, &"x", &"--hidden-act", &"silu"], 3, "states its activation"),
        (vec![&"generate", model, &"x", &"--ptq", &"ternary"], 3, "ternary already"),
        (vec![&"generate", model, &"x", &"--dense", &"int8"], 2, "is not a float model"),
        (vec![&"chat", model, &"--dense", &"int3"], 2, "known: auto, f32, f16, int8, int4"),
        (
            vec![&"generate", model, &"x", &"--dense", &"int8", &"--ptq", &"ternary"],
            2,
            "cannot be used with",
        ),
        (vec![&"generate", model, &"x", &"--i2s", &"arm"], 3, "holds no I2_S tensors"),
        (vec![&"inspect", model, &"--i2s", &"risc"], 2, "known: x86, arm"),
        (vec![&"quickstart", &"--steps", &"0"], 2, "--steps"),
        (vec![&"frobnicate"], 2, "frobnicate"),
        (vec![], 2, "Usage"),
    ];
    for (args, code, words) in cases {
        let output = bitnet(&args);
        let message = text(&output.stderr);
        let shown: Vec<_> = args.iter().map(|a| a.as_ref()).collect();
        assert_eq!(output.status.code(), Some(code), "{shown:?}: {message}");
        assert!(message.contains(words), "`{words}` is not in: {message}");
        assert!(!message.contains("panicked"), "{message}");
    }
    let isa = command(&[&"generate", model, &"x"]).env("BITNET_ISA", "mmx").output().unwrap();
    assert_eq!(isa.status.code(), Some(2));
    assert!(text(&isa.stderr).contains("mmx"), "{isa:?}");
    // A result that cannot be written is a failure, not bad usage.
    let below_a_file = s.model.join("out.json");
    let output = bitnet(&[&"inspect", model, &"--json", &below_a_file]);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
}

#[cfg(unix)]
#[test]
fn a_reader_that_goes_away_is_no_error() {
    let s = Setup::tiny();
    let program = env!("CARGO_BIN_EXE_bitnet");
    for rest in ["inspect \"$1\" --tensors", "generate \"$1\" abc -n 100 --temperature 0"] {
        // The reader ends before anything is written.
        let line = format!("{{ sleep 0.2; \"$0\" {rest}; echo \"code $?\" >&2; }} | true");
        let output =
            Command::new("sh").args(["-c", &line, program]).arg(&s.model).output().unwrap();
        let message = text(&output.stderr);
        assert!(message.contains("code 0") && !message.contains("panicked"), "{message}");
    }
}

#[test]
fn help_shows_examples() {
    for command in ["quickstart", "generate", "chat", "inspect"] {
        let help = text(&bitnet(&[&command, &"--help"]).stdout);
        assert!(help.contains("Examples:") && help.contains("Usage:"), "{help}");
    }
}

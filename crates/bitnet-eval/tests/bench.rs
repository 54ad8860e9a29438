//! The bench end to end on small random models: the keys of its JSON, the sense
//! of its numbers, and a table that fits a terminal.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

// The engine's makers of small random models.
#[path = "../../bitnet-engine/tests/common/mod.rs"]
mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use bitnet_core::names::tensors;
use bitnet_core::{ModelConfig, WeightQuantizer};
use bitnet_format::hf::{save, to_json};
use bitnet_kernels::Kernels;
use common::RandomModel;
use serde_json::Value;

fn model(dir: &tempfile::TempDir, name: &str, config: &ModelConfig) -> PathBuf {
    let written = RandomModel::new(config, 1).file().write(dir);
    let path = dir.path().join(name);
    std::fs::rename(written, &path).unwrap();
    path
}

/// `bitnet-eval bench` with two repeats of short tests.
fn bench(models: &[&Path], args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bitnet-eval"));
    command.env_remove("BITNET_ISA").env_remove("RUST_LOG").arg("bench").args(models);
    command.args(["--prompt", "32", "--generate", "8", "--batch", "4", "--repeats", "2"]);
    command.args(args);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The text of a list of rows' key.
fn column<'a>(rows: &'a Value, key: &str) -> Vec<&'a str> {
    rows.as_array().unwrap().iter().map(|row| row[key].as_str().unwrap()).collect()
}

fn number(row: &Value, key: &str) -> f64 {
    row[key].as_f64().unwrap_or_else(|| panic!("{key} in {row}"))
}

#[test]
fn rows_have_every_key_and_numbers_that_agree() {
    let dir = tempfile::tempdir().unwrap();
    let path = model(&dir, "m.gguf", &ModelConfig::tiny());
    let report = json(&bench(&[&path], &["--threads", "1", "--json", "-"]));
    let rows = &report["results"];
    assert_eq!(column(rows, "test"), ["pp32", "tg8", "tg8x4", "ternary_only", "head_only"]);
    let rows = rows.as_array().unwrap();
    for row in rows {
        assert_eq!(row["model"], path.to_str().unwrap());
        assert_eq!((&row["layout"], &row["threads"]), (&"p2".into(), &1.into()));
        assert_eq!((&row["isa"], &row["repeats"]), (&Kernels::detect().name().into(), &2.into()));
        let speed = number(row, "tokens_per_second");
        assert!(number(row, "tokens_per_second_min") <= speed && speed > 0.0);
        assert!(number(row, "tokens_per_second_max") >= speed);
        let gb = speed * number(row, "bytes_per_token") / 1e9;
        assert!((number(row, "gb_per_second") / gb - 1.0).abs() < 0.01, "{row}");
        assert!(number(row, "share_of_bandwidth") > 0.0);
        assert_eq!(row["share_of_int8_peak"].is_null(), row["test"] == "head_only");
        assert_eq!(row["share_outside_products"].is_null(), row["test"] != "tg8");
        assert!(row.get("peak_rss_bytes").is_some());
    }
    // A token's parts: all weights while decoding, a share of them in a prompt.
    let [prompt, decode, batch, ternary, head] = &rows[..] else { panic!("five rows") };
    let linear = number(decode, "linear_bytes_per_token");
    assert_eq!(number(ternary, "bytes_per_token"), linear);
    assert_eq!(number(head, "bytes_per_token"), number(decode, "head_bytes_per_token"));
    assert_eq!(number(prompt, "linear_bytes_per_token"), (linear / 32.0).round());
    assert!(number(decode, "kv_bytes_per_token") > 0.0);
    assert_eq!(number(batch, "linear_bytes_per_token"), (linear / 4.0).round());
    assert_eq!(number(batch, "kv_bytes_per_token"), number(decode, "kv_bytes_per_token"));
    let [limit] = &report["limits"]["read"].as_array().unwrap()[..] else { panic!("one limit") };
    assert_eq!(limit["bytes"], std::fs::metadata(&path).unwrap().len());
    assert!(number(limit, "gb_per_second") <= number(limit, "gb_per_second_best"));
    let share = number(decode, "gb_per_second") / number(limit, "gb_per_second");
    assert!((number(decode, "share_of_bandwidth") / share - 1.0).abs() < 1e-9);
    assert!(number(&report["limits"]["int8"][0], "gop_per_second") > 0.0);
    let opened = &report["models"][0];
    assert!(number(opened, "load_seconds") > 0.0 && number(opened, "first_logits_seconds") > 0.0);
    assert_eq!(opened["file_bytes"], limit["bytes"]);
}

#[test]
fn scans_of_the_head_read_fewer_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let config = ModelConfig {
        hidden_size: 512,
        num_attention_heads: 8,
        vocab_size: 2000,
        ..ModelConfig::tiny()
    };
    let path = model(&dir, "m.gguf", &config);
    let of = |head| json(&bench(&[&path], &["--threads", "1", "--head", head, "--json", "-"]));
    let (stored, int8, all) = (of("stored"), of("int8"), of("int4,stored,int8"));
    let heads = [&stored["head"], &int8["head"], &all["head"]].map(|h| h.as_str().unwrap());
    assert_eq!(heads, ["stored", "int8", "int4"]);
    let common = ["pp32", "tg8", "tg8x4", "ternary_only", "head_only"];
    assert_eq!(column(&stored["results"], "test"), common);
    let scans = ["head_int4", "head_int4_near", "head_int8", "head_int8_near"];
    assert_eq!(column(&int8["results"], "test")[5..], scans[2..]);
    assert_eq!(column(&all["results"], "test")[5..], scans);
    let head = |report: &Value, row: usize| number(&report["results"][row], "head_bytes_per_token");
    for row in [1, 2] {
        assert!(head(&int8, row) < head(&stored, row) && head(&int8, row) > 0.0);
        assert!(number(&int8["results"][row], "share_scored") > 0.0);
        assert!(stored["results"][row]["share_scored"].is_null());
    }
    assert!(number(&int8["results"][1], "share_outside_products") < 1.0);
    let [int4, near, full, _] = &all["results"].as_array().unwrap()[5..] else { panic!("4 rows") };
    for row in [int4, near, full] {
        let of_stored = 1.0 / number(&all["results"][4], "tokens_per_second");
        let speedup = number(row, "tokens_per_second") * of_stored;
        assert!((number(row, "head_speedup") / speedup - 1.0).abs() < 1e-9);
        assert!(row["share_of_int8_peak"].is_null() && number(row, "share_scored") < 1.0);
    }
    assert_eq!(number(full, "share_refined"), 1.0);
    assert!(number(near, "share_refined") <= 1.0);
}

#[test]
fn a_matrix_measures_every_model_set_and_thread_count() {
    let dir = tempfile::tempdir().unwrap();
    let ternary = model(&dir, "ternary.gguf", &ModelConfig::tiny());
    let twin = ModelConfig { weight_quantizer: WeightQuantizer::None, ..ModelConfig::tiny() };
    let twin = model(&dir, "twin.gguf", &twin);
    let args = ["--matrix", "--isa", "portable", "--threads", "2", "--json", "-"];
    let report = json(&bench(&[&ternary, &twin], &args));
    let settings: Vec<_> = report["results"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|row| row["test"] == "tg8")
        .map(|row| (row["layout"].as_str().unwrap(), row["threads"].as_u64().unwrap()))
        .collect();
    assert_eq!(settings, [("p2", 2), ("p2", 1), ("f32", 2), ("f32", 1)]);
    let rows = report["results"].as_array().unwrap();
    assert!(rows.iter().all(|row| row["isa"] == "portable"));
    assert!(rows.iter().all(|row| row["layout"] == "p2" || row["share_of_int8_peak"].is_null()));
    assert_eq!(report["limits"]["read"].as_array().unwrap().len(), 4);
    assert_eq!(report["limits"]["int8"].as_array().unwrap().len(), 2);
    // Without a list, every instruction set of the machine.
    let report = json(&bench(&[&ternary], &["--matrix", "--threads", "1", "--json", "-"]));
    let mut isas = column(&report["results"], "isa");
    isas.dedup();
    assert_eq!(isas, Kernels::all().iter().map(|k| k.name()).collect::<Vec<_>>());
}

/// A float model in a folder, packed as it is and as ternary, with a tokenizer that
/// the folder does not have.
#[test]
fn models_of_other_tools_are_measured() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, tokenizer) = (dir.path().join("twin"), dir.path().join("t.json"));
    std::fs::create_dir(&folder).unwrap();
    let config = ModelConfig { weight_quantizer: WeightQuantizer::None, ..ModelConfig::tiny() };
    std::fs::write(folder.join("config.json"), to_json(&config, Default::default()).to_string())
        .unwrap();
    let tensors: Vec<_> = tensors(&config)
        .into_iter()
        .map(|(name, shape)| {
            let n = shape.iter().product::<usize>();
            (name, shape, (0..n).map(|i| (i as f32).sin() * 0.1).collect::<Vec<_>>())
        })
        .collect();
    let all = tensors.iter().map(|(name, shape, data)| (name.clone(), shape.clone(), &data[..]));
    save(folder.join("model.safetensors"), &[], all).unwrap();
    let vocab: serde_json::Map<String, Value> =
        (0..config.vocab_size).map(|i| (format!("t{i}"), i.into())).collect();
    let json = serde_json::json!({ "model": { "type": "BPE", "vocab": vocab, "merges": [] } });
    std::fs::write(&tokenizer, json.to_string()).unwrap();
    let args = ["--tokenizer", tokenizer.to_str().unwrap(), "--threads", "1", "--json", "-"];
    let float = self::json(&bench(&[&folder], &args));
    let ternary = self::json(&bench(&[&folder], &[&args[..], &["--ptq", "ternary"]].concat()));
    for (report, layout) in [(&float, "f32"), (&ternary, "p2")] {
        assert!(column(&report["results"], "layout").iter().all(|l| *l == layout));
    }
    let bytes = |r: &Value| number(&r["results"][1], "linear_bytes_per_token");
    assert_eq!(bytes(&float), config.parameter_count().linear as f64 * 4.0);
    assert!(bytes(&ternary) < bytes(&float) / 3.0);
}

/// Counters of a faked machine that stand still: the keys, and no energy at all.
#[test]
fn energy_is_measured_or_says_why_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = model(&dir, "m.gguf", &ModelConfig::tiny());
    let counters = dir.path().join("powercap");
    let option = format!("--energy={}", counters.display());
    let args = [option.as_str(), "--threads", "1", "--json", "-"];
    let report = json(&bench(&[&path], &args));
    assert_eq!(report["energy"]["available"], false);
    assert!(report["energy"]["reason"].as_str().unwrap().contains("powercap: no RAPL"));
    assert!(report["results"][0]["joules_per_token"].is_null());
    let table = String::from_utf8(bench(&[&path], &args[..3]).stdout).unwrap();
    assert!(table.contains("energy unavailable: "), "{table}");

    let zone = counters.join("intel-rapl:0");
    std::fs::create_dir_all(&zone).unwrap();
    for (file, text) in [("name", "package-0"), ("max_energy_range_uj", "1000"), ("energy_uj", "7")]
    {
        std::fs::write(zone.join(file), text).unwrap();
    }
    let report = json(&bench(&[&path], &args));
    assert_eq!(report["energy"]["available"], true);
    assert_eq!(report["energy"]["counters"][0], "package-0");
    assert_eq!(number(&report["energy"], "idle_watts"), 0.0);
    for row in report["results"].as_array().unwrap() {
        let tokens = ["pp32", "tg8", "tg8x4"].contains(&row["test"].as_str().unwrap());
        assert_eq!(row["joules_per_token"].as_f64(), tokens.then_some(0.0), "{row}");
    }
    let table = String::from_utf8(bench(&[&path], &args[..3]).stdout).unwrap();
    let lines: Vec<&str> =
        table.lines().skip_while(|l| !l.starts_with("energy of package-0")).collect();
    assert!(lines[1].ends_with("J a token  W above idle"), "{table}");
    assert!(
        lines[2].starts_with("  pp32 ") && lines[2].contains("0.0000           0.0"),
        "{table}"
    );
    assert!(json(&bench(&[&path], &args[1..])).get("energy").is_none());
}

#[test]
fn the_table_fits_a_terminal() {
    let dir = tempfile::tempdir().unwrap();
    let path = model(&dir, "m.gguf", &ModelConfig::tiny());
    let output = bench(&[&path], &["--matrix", "--threads", "2", "--head", "stored,int4"]);
    let table = String::from_utf8(output.stdout).unwrap();
    for words in
        ["pp32", "tg8", "read file", "int8 peak", "the rest", "of stored", "a token: linear"]
    {
        assert!(table.contains(words), "`{words}` is not in:\n{table}");
    }
    for line in table.lines().filter(|line| !line.contains("m.gguf")) {
        assert!(line.chars().count() <= 100, "{line}");
        assert!(!line.contains("NaN"), "{line}");
    }
}

//! Bad input, one row a case: the command, the exit code and what the message must
//! name. Nothing may panic, and nothing may appear under the output's name.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use bitnet_tests::{bin, train, trained, workspace};

/// A case: what it shows, the command, its exit code, words of its message, and a
/// path that must not exist afterwards.
struct Case {
    name: &'static str,
    command: Command,
    code: i32,
    words: Vec<String>,
    absent: Option<PathBuf>,
}

impl Case {
    fn check(mut self) {
        let output = self.command.output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        let context = format!("{}: {:?}\n{message}", self.name, self.command);
        assert_eq!(output.status.code(), Some(self.code), "{context}");
        assert!(!message.contains("panicked"), "{context}");
        for word in &self.words {
            assert!(message.contains(word.as_str()), "`{word}` is not in {context}");
        }
        if let Some(path) = self.absent {
            assert!(!path.exists(), "{} was left by {context}", path.display());
        }
    }
}

fn case(name: &'static str, command: Command, code: i32, words: &[&str]) -> Case {
    let words = words.iter().map(|w| (*w).to_owned()).collect();
    Case { name, command, code, words, absent: None }
}

fn command(program: &str, args: &[&dyn AsRef<std::ffi::OsStr>]) -> Command {
    let mut command = bin(program);
    command.current_dir(workspace());
    for arg in args {
        command.arg(arg.as_ref());
    }
    command
}

#[test]
fn models() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let whole = fs::read(&trained().model).unwrap();
    let (missing, foreign, cut, empty) =
        (path("missing.gguf"), path("foreign.gguf"), path("cut.gguf"), path("empty.gguf"));
    fs::write(&foreign, b"PK\x03\x04 not a model at all").unwrap();
    fs::write(&cut, &whole[..whole.len() / 2]).unwrap();
    fs::write(&empty, b"").unwrap();
    for (name, file, word) in [
        ("missing", &missing, "missing.gguf"),
        ("foreign", &foreign, "foreign.gguf"),
        ("truncated", &cut, "cut.gguf"),
        ("empty", &empty, "empty.gguf"),
    ] {
        case(name, command("bitnet", &[&"generate", file, &"x"]), 3, &[word]).check();
        case(name, command("bitnet", &[&"inspect", file]), 3, &[word]).check();
        let data = &trained().data;
        let perplexity = command("bitnet-eval", &[&"perplexity", file, &"--data", data]);
        case(name, perplexity, 3, &[word]).check();
    }
    let model = &trained().model;
    let long = command(
        "bitnet-eval",
        &[&"perplexity", model, &"--data", &trained().data, &"--context", &"4096"],
    );
    case("context longer than the model's", long, 2, &["4096", "320"]).check();
    let unknown = command("bitnet", &[&"generate", model, &"x", &"--kv", &"f8"]);
    case("an option's value", unknown, 2, &["f8"]).check();
    let mut isa = command("bitnet", &[&"generate", model, &"x"]);
    isa.env("BITNET_ISA", "mmx");
    case("an instruction set that is not there", isa, 2, &["mmx", "portable"]).check();
}

#[test]
fn export() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("model.gguf");
    let checkpoint = folder.path().join("checkpoint");
    let copy = |change: &dyn Fn(&Path)| {
        let _ = fs::remove_dir_all(&checkpoint);
        fs::create_dir(&checkpoint).unwrap();
        for entry in fs::read_dir(&trained().checkpoint).unwrap() {
            let from = entry.unwrap().path();
            fs::copy(&from, checkpoint.join(from.file_name().unwrap())).unwrap();
        }
        change(&checkpoint);
    };
    type Change = fn(&Path);
    let cases: [(&str, Change, &[&str]); 5] = [
        (
            "no weights",
            |c| fs::remove_file(c.join("model.safetensors")).unwrap(),
            &["model.safetensors"],
        ),
        (
            "truncated weights",
            |c| {
                let path = c.join("model.safetensors");
                let bytes = fs::read(&path).unwrap();
                fs::write(path, &bytes[..bytes.len() - 100]).unwrap();
            },
            &["model.safetensors"],
        ),
        (
            "a config that is not JSON",
            |c| fs::write(c.join("config.json"), "{").unwrap(),
            &["config.json"],
        ),
        (
            "another shape",
            |c| {
                let path = c.join("config.json");
                let text = fs::read_to_string(&path).unwrap();
                let changed =
                    text.replace("\"intermediate_size\": 344", "\"intermediate_size\": 352");
                assert_ne!(changed, text);
                fs::write(path, changed).unwrap();
            },
            &["mlp.", "352", "344"],
        ),
        (
            "golden logits of another model",
            |c| {
                let path = c.join("golden.json");
                let mut golden = bitnet_tests::json(&path);
                golden["logits"][0] = serde_json::json!(1e3);
                fs::write(path, golden.to_string()).unwrap();
            },
            &["golden"],
        ),
    ];
    for (name, change, words) in cases {
        copy(&change);
        let mut case = case(name, command("bitnet-export", &[&checkpoint, &"-o", &out]), 3, words);
        case.absent = Some(out.clone());
        // A model that does not reproduce is not bad input but a failed export.
        if name.starts_with("golden") {
            case.code = 1;
        }
        case.check();
    }
    let nothing = command("bitnet-export", &[&folder.path().join("nowhere"), &"-o", &out]);
    case("no checkpoint", nothing, 3, &["nowhere"]).check();
}

#[test]
fn data() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let out = path("out");
    fs::create_dir(path("hollow")).unwrap();
    fs::write(path("broken.jsonl"), "{\"text\": \"fine\"}\n{\"text\": \n").unwrap();
    fs::write(path("field.jsonl"), "{\"text\": \"fine\"}\n{\"body\": \"x\"}\n").unwrap();
    fs::write(path("not.parquet"), "PAR0").unwrap();
    for (name, source, words) in [
        ("missing", path("missing.txt"), &["missing.txt"][..]),
        ("empty corpus", path("hollow"), &["hollow"]),
        ("broken line", path("broken.jsonl"), &["broken.jsonl", "2"]),
        ("no such field", path("field.jsonl"), &["field.jsonl", "2", "text"]),
        ("foreign parquet", path("not.parquet"), &["not.parquet"]),
    ] {
        let mut case =
            case(name, command("bitnet-data", &[&"prepare", &source, &"-o", &out]), 3, words);
        case.absent = Some(out.join("manifest.json"));
        case.check();
    }
}

#[test]
fn training() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let data = &trained().data;
    let with = |settings: &[&str]| {
        let mut command = train(data, &run, 2);
        for setting in settings {
            command.args(["--set", setting]);
        }
        command
    };
    let usage: [(&str, &[&str], &[&str]); 7] = [
        ("unknown key", &["model.hiden_size=64"], &["hiden_size"]),
        ("wrong type", &["batch.tokens=\"many\""], &["tokens"]),
        ("value out of range", &["schedule.stage2_at=2.0"], &["stage2_at", "2"]),
        (
            "heads that do not divide",
            &["model.num_key_value_heads=3"],
            &["num_key_value_heads", "3"],
        ),
        (
            "sequence longer than the context",
            &["batch.sequence=512", "batch.micro_batch=2"],
            &["sequence", "512", "320"],
        ),
        ("batch that is no multiple", &["batch.tokens=1000"], &["batch.tokens", "1000"]),
        (
            "vocabulary smaller than the shards'",
            &["model.vocab_size=300"],
            &["vocab", "300", "512"],
        ),
    ];
    for (name, settings, words) in usage {
        case(name, with(settings), 2, words).check();
    }
    let mut unknown = bin("bitnet-train");
    unknown.current_dir(workspace()).args(["--config", "no-such.toml"]);
    case("unknown config", unknown, 2, &["no-such.toml"]).check();
    let config = folder.path().join("broken.toml");
    fs::write(&config, "name = \"x\"\n[model\n").unwrap();
    let mut broken = bin("bitnet-train");
    broken.arg("--config").arg(&config);
    case("a config that is not TOML", broken, 2, &["broken.toml", "2"]).check();
    let nowhere = folder.path().join("nowhere");
    case("no shards", train(&nowhere, &run, 2), 3, &["nowhere"]).check();
    let mut device = with(&[]);
    device.args(["--device", "cuda:0"]);
    // Compiled in or not, there is no such device where the tests run.
    let output = device.output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(matches!(output.status.code(), Some(1 | 2)), "{message}");
    assert!(message.contains("cuda") && !message.contains("panicked"), "{message}");
}

#[test]
fn shards() {
    let folder = tempfile::tempdir().unwrap();
    let (data, run) = (folder.path().join("data"), folder.path().join("run"));
    let copy = |change: &dyn Fn(&mut Vec<u8>)| {
        let _ = fs::remove_dir_all(&data);
        fs::create_dir(&data).unwrap();
        for entry in fs::read_dir(&trained().data).unwrap() {
            let from = entry.unwrap().path();
            let name = from.file_name().unwrap().to_string_lossy().into_owned();
            let mut bytes = fs::read(&from).unwrap();
            if name.starts_with("train-") {
                change(&mut bytes);
            }
            fs::write(data.join(name), bytes).unwrap();
        }
    };
    type Change = fn(&mut Vec<u8>);
    let cases: [(&str, Change); 3] = [
        ("truncated", |b| b.truncate(b.len() - 64)),
        ("foreign", |b| b[..4].copy_from_slice(b"RIFF")),
        ("empty", |b| b.clear()),
    ];
    for (name, change) in cases {
        copy(&change);
        case(name, train(&data, &run, 2), 3, &["train-"]).check();
    }
    // Tokens behind the vocabulary: found when they are read.
    copy(&|bytes| {
        let len = bytes.len();
        bytes[len / 2..].fill(0xff);
    });
    case("tokens outside the vocabulary", train(&data, &run, 60), 3, &["train-"]).check();
}

/// A file system of a few pages, where the test may mount one.
#[cfg(target_os = "linux")]
#[test]
fn no_space_left_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mount = folder.path().join("small");
    fs::create_dir(&mount).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"])
        .arg(&mount)
        .output()
        .is_ok_and(|o| o.status.success());
    if !mounted {
        // Without the right to mount, a limit on the size of files does the same.
        return limited_file_size(folder.path());
    }
    let out = mount.join("model.gguf");
    let mut export = case(
        "export on a full disk",
        command("bitnet-export", &[&trained().checkpoint, &"-o", &out]),
        1,
        &["model.gguf"],
    );
    export.absent = Some(out);
    let run = train(&trained().data, &mount.join("run"), 2);
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        export.check();
        case("a checkpoint on a full disk", run, 1, &["run"]).check();
    }));
    let left: Vec<_> = fs::read_dir(&mount).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(Command::new("umount").arg(&mount).status().unwrap().success());
    result.unwrap();
    assert!(left.iter().all(|n| n == "run"), "left on the full disk: {left:?}");
}

/// Export with `ulimit -f`: the write fails as it does on a full disk.
#[cfg(target_os = "linux")]
fn limited_file_size(folder: &Path) {
    let out = folder.join("model.gguf");
    let program = bin("bitnet-export");
    let mut shell = Command::new("sh");
    // SIGXFSZ is ignored, so that the write returns an error.
    shell.args(["-c", "trap '' XFSZ; ulimit -f 64; exec \"$0\" \"$1\" -o \"$2\""]);
    shell.arg(program.get_program()).arg(&trained().checkpoint).arg(&out);
    let mut export = case("export past the limit", shell, 1, &["model.gguf"]);
    export.absent = Some(out);
    export.check();
}

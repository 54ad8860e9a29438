//! Everything that can be wrong with an input or an option, through the binary:
//! the message names the thing, the exit code its kind, and nothing panics.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

fn command(arguments: &[&str], folder: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_bitnet-data"))
        .args(arguments)
        .current_dir(folder)
        .output()
        .unwrap()
}

/// A parquet file with a string column `text` and an integer column `id`.
fn write_parquet(path: &Path, texts: &[Option<&str>]) {
    let schema =
        parse_message_type("message doc { optional binary text (UTF8); required int64 id; }")
            .unwrap();
    let file = fs::File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, Arc::new(schema), Arc::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    let values: Vec<ByteArray> = texts.iter().flatten().map(|&t| t.into()).collect();
    let levels: Vec<i16> = texts.iter().map(|t| i16::from(t.is_some())).collect();
    column.typed::<ByteArrayType>().write_batch(&values, Some(&levels), None).unwrap();
    column.close().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    let ids: Vec<i64> = (0..texts.len() as i64).collect();
    column.typed::<Int64Type>().write_batch(&ids, None, None).unwrap();
    column.close().unwrap();
    group.close().unwrap();
    writer.close().unwrap();
}

/// A folder with every file the tables name.
fn workshop() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, content: &[u8]| fs::write(dir.path().join(name), content).unwrap();
    for folder in ["empty", "other", "full/deep"] {
        fs::create_dir_all(dir.path().join(folder)).unwrap();
    }
    write("other/picture.png", b"\x89PNG");
    write("full/a.txt", b"First text, with words.\n");
    write("full/deep/b.md", b"# Second text\n\nMore words here.\n");
    write("blank.txt", b" \n\n\t\n");
    write("latin.txt", b"good line\ncaf\xe9\n");
    write(
        "good.jsonl",
        b"{\"text\": \"one line\"}\n\n{\"text\": \"two lines\"}\n{\"text\": null}\n",
    );
    write("nofield.jsonl", b"{\"text\": \"a\"}\n{\"body\": \"b\", \"id\": 1}\n");
    write("number.jsonl", b"{\"text\": 7}\n");
    write("broken.jsonl", b"{\"text\": \"a\"}\n{\"text\": \"b\"}\n{\"text\": \"c\n");
    write("array.jsonl", b"[1, 2]\n");
    write("fake.parquet", b"this is no parquet file, whatever its name says");
    write("tiny.parquet", b"PAR1");
    write("empty.parquet", b"");
    write_parquet(
        &dir.path().join("good.parquet"),
        &[Some("Once upon a time."), None, Some("The end.")],
    );
    write("bad-tokenizer.json", b"{\"model\": {\"type\": \"BPE\"");
    write("no-tokenizer.json", b"{\"hello\": 1}");
    fs::create_dir(dir.path().join("badlock")).unwrap();
    write("badlock/Cargo.lock", b"this = [");
    fs::create_dir(dir.path().join("unfetched")).unwrap();
    write(
        "unfetched/Cargo.lock",
        b"version = 4\n[[package]]\nname = \"no-such-package\"\nversion = \"9.9.9\"\nsource = \"registry+x\"\n",
    );
    dir
}

#[test]
fn each_bad_input_has_its_message_and_code() {
    let dir = workshop();
    let prepare = |arguments: &str| {
        let all: Vec<&str> =
            ["prepare", "-o", "out"].into_iter().chain(arguments.split(' ')).collect();
        command(&all, dir.path())
    };
    for (arguments, code, message) in [
        ("missing.txt", 3, "missing.txt: cannot be read: No such file"),
        (
            "empty",
            3,
            "empty: no file that ends in .txt, .md, .jsonl, .jsonl.zst, .jsonl.gz, .parquet",
        ),
        (
            "other --ext rs",
            3,
            "other: no file that ends in .txt, .md, .jsonl, .jsonl.zst, .jsonl.gz, .parquet, .rs",
        ),
        ("blank.txt", 3, "no text in 1 files (1 documents, all empty)"),
        ("latin.txt", 3, "latin.txt:2: byte 3 of the line (0xe9) is not UTF-8"),
        ("nofield.jsonl", 3, "nofield.jsonl:2: no field `text` among body, id"),
        ("number.jsonl", 3, "number.jsonl:1: field `text`: expected a string, found a number"),
        ("broken.jsonl", 3, "broken.jsonl:3: is not JSON"),
        ("array.jsonl", 3, "array.jsonl:1: expected an object, found an array"),
        ("good.jsonl --field body", 3, "good.jsonl:1: no field `body` among text"),
        ("fake.parquet", 3, "fake.parquet: is not a parquet file"),
        ("tiny.parquet", 3, "tiny.parquet: is not a parquet file"),
        ("empty.parquet", 3, "empty.parquet: is not a parquet file"),
        ("good.parquet --column body", 3, "good.parquet: no column `body` among text, id"),
        ("good.parquet --column id", 3, "good.parquet: column `id` does not hold strings"),
        ("full --tokenizer bad-tokenizer.json", 3, "bad-tokenizer.json: is not a tokenizer.json"),
        ("full --tokenizer no-tokenizer.json", 3, "no-tokenizer.json: is not a tokenizer.json"),
        ("full --tokenizer missing.json", 3, "missing.json: cannot be read"),
        ("full --vocab-size 256", 2, "--vocab-size: 256 is outside 257"),
        ("full --validation-share 0.7", 2, "--validation-share: 0.7 is outside 0 to 0.5"),
        ("full --validation-share NaN", 2, "--validation-share: NaN is outside 0 to 0.5"),
        ("full --max-bytes 0", 2, "--max-bytes: 0; needs at least 1"),
        ("full --max-bytes 3parsec", 2, "`parsec` is no unit"),
        ("full --split pages", 2, "`pages` is none of file, blank-line"),
        ("cargo full", 2, "`cargo` is a source of its own"),
        ("cargo --workspace missing", 3, "missing: cannot be read"),
        ("cargo --workspace badlock", 3, "Cargo.lock: is not a lock file"),
        ("cargo --workspace unfetched", 3, "run `cargo fetch`"),
    ] {
        let output = prepare(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments}: {stderr}");
        assert!(stderr.contains(message), "{arguments}: {stderr}");
        assert!(stderr.contains("error: "), "{arguments}: {stderr}");
        assert!(!stderr.contains("panicked"), "{arguments}: {stderr}");
        assert!(!dir.path().join("out/manifest.json").exists(), "{arguments}");
    }
}

#[test]
fn good_input_of_every_kind_is_prepared_and_inspected() {
    let dir = workshop();
    for (input, documents) in [("full", 2), ("good.jsonl", 2), ("good.parquet", 2)] {
        let out = format!("out-{input}");
        let output = command(
            &["prepare", input, "-o", &out, "--vocab-size", "300", "--json", "result.json"],
            dir.path(),
        );
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{input}: {stderr}");
        let table = String::from_utf8_lossy(&output.stdout);
        assert!(table.contains("corpus hash"), "{table}");
        let text = fs::read_to_string(dir.path().join("result.json")).unwrap();
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(json["documents"], documents, "{input}");
        assert_eq!(json["reused"], false);
        assert!(json["bytes_per_token"].as_f64().unwrap() >= 0.5);

        let output = command(&["inspect", &out, "--verify", "--json", "-"], dir.path());
        let seen: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(seen["corpus_hash"], json["corpus_hash"]);
        assert_eq!(seen["verified"], true);
    }
}

#[test]
fn damaged_folders_are_refused() {
    let dir = workshop();
    let prepare = ["prepare", "full", "-o", "out", "--vocab-size", "300"];
    let inspect = ["inspect", "out", "--verify"];
    let edit = |file: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let path = dir.path().join("out").join(file);
        let mut bytes = fs::read(&path).unwrap();
        change(&mut bytes);
        fs::write(path, bytes).unwrap();
    };
    let replace = |from: &'static str, to: &'static str| {
        move |b: &mut Vec<u8>| {
            let text = String::from_utf8(b.clone()).unwrap();
            assert!(text.contains(from), "{text}");
            *b = text.replacen(from, to, 1).into_bytes();
        }
    };
    type Change<'a> = &'a dyn Fn(&mut Vec<u8>);
    let damages: [(&str, Change<'_>, &str); 9] = [
        ("train-00000.bin", &|b| b.truncate(b.len() - 2), "train-00000.bin: truncated or damaged"),
        ("val-00000.bin", &|b| b.truncate(50), "val-00000.bin: truncated: 50 bytes"),
        (
            "train-00000.bin",
            &|b| b[..4].copy_from_slice(b"GGUF"),
            "expected the magic `BNSH`, found `GGUF`",
        ),
        ("train-00000.bin", &|b| b[4] = 3, "shard version 3; this program reads versions 1 and 2"),
        ("train-00000.bin", &|b| b[20] ^= 1, "tokenizer: the manifest says"),
        ("train-00000.bin", &|b| b[12] ^= 1, "vocabulary: the manifest says 278, the shard 279"),
        ("train-00000.bin", &|b| b[128] ^= 1, "damaged: the header says sha256"),
        ("tokenizer.json", &|b| b.push(b' '), "tokenizer.json: sha256: the manifest says"),
        (
            "manifest.json",
            &replace("\"version\": 1", "\"version\": 7"),
            "manifest version 7; this program reads version 1",
        ),
    ];
    for (file, change, message) in damages {
        let forced: Vec<&str> = prepare.iter().copied().chain(["--force"]).collect();
        assert!(command(&forced, dir.path()).status.success());
        assert!(command(&inspect, dir.path()).status.success());
        edit(file, change);
        let output = command(&inspect, dir.path());
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(3), "{file} {message}: {stderr}");
        assert!(stderr.contains(message), "{file} {message}: {stderr}");
        // What a cheap look finds is not called up to date either.
        if !message.starts_with("damaged") {
            let output = command(&prepare, dir.path());
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{stderr}");
            assert!(stderr.contains("--force"), "{stderr}");
        }
    }
    for (folder, message) in
        [("nowhere", "nowhere: no such folder"), ("full", "full: no manifest.json")]
    {
        let output = command(&["inspect", folder], dir.path());
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(3), "{stderr}");
        assert!(stderr.contains(message), "{stderr}");
    }
}

#[test]
fn a_damaged_parquet_file_never_panics_out() {
    let dir = workshop();
    let good = fs::read(dir.path().join("good.parquet")).unwrap();
    let path = dir.path().join("damaged.parquet");
    let source = bitnet_data::Source::Files(bitnet_data::FileOptions {
        paths: vec![path.clone()],
        ..Default::default()
    });
    let (mut refused, mut read) = (0, 0);
    let mut attempt = |content: &[u8]| {
        fs::write(&path, content).unwrap();
        let inputs = source.open().unwrap();
        let all = inputs.collect();
        match all {
            Ok(_) => read += 1,
            Err(e) => {
                assert!(e.to_string().contains("damaged.parquet"), "{e}");
                refused += 1;
            }
        }
    };
    for end in (0..good.len()).step_by(3) {
        attempt(&good[..end]);
    }
    for at in 0..good.len() {
        let mut bytes = good.clone();
        bytes[at] ^= 0x55;
        attempt(&bytes);
    }
    assert!(refused > good.len() / 3, "{refused} refused, {read} read");
}

#[test]
fn a_folder_that_cannot_be_written_is_a_failure_with_its_name() {
    let dir = workshop();
    fs::write(dir.path().join("taken"), "a file").unwrap();
    let output =
        command(&["prepare", "full", "-o", "taken/out", "--vocab-size", "300"], dir.path());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("taken"), "{stderr}");
}

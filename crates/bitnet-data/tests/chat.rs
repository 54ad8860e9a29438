//! Conversations, from lines of JSON to batches with a loss mask.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use bitnet_data::{BatchStream, Dataset, MixtureSource, MixtureStream, Split, Tokenizer};

fn command(arguments: &str, folder: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_bitnet-data"))
        .args(arguments.split(' '))
        .current_dir(folder)
        .output()
        .unwrap()
}

/// A tokenizer and 200 conversations in two files, one without an answer, one
/// with the name of a special token, one too long, one twice.
fn workshop() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = Tokenizer::train(&["What is it? It is a fox.".repeat(9)], 280).unwrap();
    fs::write(dir.path().join("tokenizer.json"), tokenizer.to_json()).unwrap();
    let line = |question: &str, answer: &str| {
        serde_json::json!({ "messages": [
            { "role": "user", "content": question },
            { "role": "assistant", "content": answer },
        ]})
        .to_string()
    };
    let mut lines: Vec<String> = (0..197)
        .map(|i| line(&format!("What is {i}?"), &format!("It is {}.", "fox ".repeat(i % 9))))
        .collect();
    lines.push(line("Long?", &"word ".repeat(99)));
    lines.push(line("Say <|endoftext|>", "No."));
    lines.push(r#"{"conversations": [{"from": "human", "value": "Hello?"}]}"#.into());
    lines.push(lines[3].clone());
    fs::write(dir.path().join("a.jsonl"), lines[..100].join("\n")).unwrap();
    let rest = lines[100..].join("\n");
    fs::write(dir.path().join("b.jsonl.zst"), zstd::encode_all(rest.as_bytes(), 1).unwrap())
        .unwrap();
    fs::write(dir.path().join("plain.txt"), "Plain text of foxes.\n".repeat(200)).unwrap();
    dir
}

const PREPARE: &str =
    "prepare chat a.jsonl b.jsonl.zst -o out --tokenizer tokenizer.json --context 63";

#[test]
fn conversations_are_packed_whole_with_their_masks() {
    let dir = workshop();
    let output = command(&format!("{PREPARE} --shard-tokens 1000 --json out.json"), dir.path());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let json: serde_json::Value =
        serde_json::from_slice(&fs::read(dir.path().join("out.json")).unwrap()).unwrap();
    let counts = &json["chat"];
    let count = |key: &str| counts[key].as_u64().unwrap();
    assert_eq!((count("truncated"), count("special_in_text"), count("without_answer")), (1, 1, 1));
    assert_eq!((json["documents"].as_u64(), json["duplicates"].as_u64()), (Some(198), Some(1)));
    assert!(json["train"]["shards"].as_array().unwrap().len() > 3);
    assert!(dir.path().join("out/chat_template.jinja").is_file());
    assert!(command("inspect out --verify", dir.path()).status.success());

    let mut found = Vec::new();
    let (mut learned, mut rows) = (0, 0);
    for split in [Split::Train, Split::Validation] {
        let data = Arc::new(Dataset::open(dir.path().join("out"), split).unwrap());
        let (t, eos) = (data.tokenizer().unwrap(), data.eos_id());
        assert_eq!(data.row_tokens(), Some(64));
        for window in data.windows(63).unwrap() {
            let batch = window.unwrap();
            let mask = batch.loss_mask.as_ref().unwrap();
            learned += mask.iter().map(|&m| u64::from(m)).sum::<u64>();
            rows += 1;
            // Exactly the answers and their end tokens are targets.
            let row: Vec<u32> = [&batch.inputs[..1], &batch.targets].concat();
            let mut expected = Vec::new();
            for turn in t.decode(&row).split_inclusive("<|endoftext|>") {
                let answer = turn.strip_prefix("Assistant: ");
                let prompt = if answer.is_some() { "Assistant: " } else { turn };
                expected.extend(vec![0; t.encode_with_special(prompt).unwrap().len()]);
                if let Some(answer) = answer {
                    expected.extend(vec![1; t.encode_with_special(answer).unwrap().len()]);
                    found.push(answer.trim_end_matches("<|endoftext|>").to_owned());
                }
            }
            assert_eq!(mask[..], expected[1..]);
            // A user's turn, or the padding, begins a document; an end token does not.
            let starts = batch.document_starts(eos);
            let text = |t0: usize| t.decode(&row[t0..row.len().min(t0 + 5)]);
            for (i, &start) in starts.iter().enumerate() {
                assert!(start as usize <= i);
                assert!(text(start as usize).starts_with("User") || row[start as usize] == eos);
            }
            assert!(starts.iter().any(|&s| s > 0) || batch.inputs[62] != eos);
        }
        // The stream gives the same rows, each once an epoch.
        let windows = data.window_count(63) as usize;
        let mut stream = BatchStream::new(Arc::clone(&data), 63, 1).unwrap();
        let batch = stream.next_batch(windows).unwrap();
        let mut streamed: Vec<&[u32]> = batch.inputs.chunks(63).collect();
        let all: Vec<_> = data.windows(63).unwrap().map(|w| w.unwrap().inputs).collect();
        let mut in_order: Vec<&[u32]> = all.iter().map(Vec::as_slice).collect();
        streamed.sort_unstable();
        in_order.sort_unstable();
        assert_eq!(streamed, in_order);
        let e = BatchStream::new(data, 64, 1).unwrap_err().to_string();
        assert!(e.contains("packed for a context of 63, not 64"), "{e}");
    }
    assert_eq!(learned, count("loss_tokens"));
    assert_eq!(json["tokens"].as_u64(), Some(rows * 64));
    let mut expected: Vec<String> =
        (0..197).map(|i| format!("It is {}.", "fox ".repeat(i % 9))).collect();
    found.retain(|answer| !answer.starts_with("word"));
    found.sort();
    expected.sort();
    assert_eq!(found, expected);
}

#[test]
fn a_mixture_of_text_and_conversations_learns_all_of_the_text() {
    let dir = workshop();
    assert!(command(PREPARE, dir.path()).status.success());
    let plain = "prepare plain.txt -o plain --tokenizer tokenizer.json --split bytes:50 --keep-duplicates --validation-share 0";
    let output = command(plain, dir.path());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let source = |name: &str, folder: &str| MixtureSource {
        name: name.into(),
        dataset: Arc::new(Dataset::open(dir.path().join(folder), Split::Train).unwrap()),
        weights: vec![(0, 1.0)],
    };
    for order in [[("plain", "plain"), ("chat", "out")], [("chat", "out"), ("plain", "plain")]] {
        let sources = order.map(|(name, folder)| source(name, folder)).to_vec();
        let eos = sources[0].dataset.eos_id();
        let mut stream = MixtureStream::new(sources, 63, 0).unwrap();
        let batch = stream.next_batch(0, 6).unwrap();
        let mask = batch.loss_mask.as_ref().unwrap();
        assert_eq!(mask.len(), 6 * 63);
        let starts = batch.document_starts(eos);
        for (row, mask) in mask.chunks(63).enumerate() {
            let plain = order[row % 2].0 == "plain";
            assert_eq!(mask.iter().all(|&m| m == 1), plain, "row {row}");
            assert!(mask.contains(&1));
            if plain {
                // Behind every end token a document begins.
                for t in 1..63 {
                    let begins = batch.inputs[row * 63 + t - 1] == eos;
                    assert_eq!(starts[row * 63 + t] as usize == t, begins);
                }
            }
        }
    }
}

#[test]
fn the_parts_of_a_chat_corpus_add_up() {
    let dir = workshop();
    assert!(command(PREPARE, dir.path()).status.success());
    for part in ["1/2", "2/2"] {
        let arguments = PREPARE.replace("-o out", &format!("-o p{} --part {part}", &part[..1]));
        let output = command(&arguments, dir.path());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let output = command("merge both p1 p2", dir.path());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let manifest = |folder: &str| bitnet_data::Manifest::load(&dir.path().join(folder)).unwrap();
    let (both, out) = (manifest("both"), manifest("out"));
    assert_eq!(both.corpus_hash, out.corpus_hash);
    assert_eq!((both.documents, both.bytes), (out.documents, out.bytes));
    let (mut a, mut b) = (both.chat.unwrap(), out.chat.unwrap());
    // Two parts end with rows of their own.
    (a.counts.padding_tokens, b.counts.padding_tokens) = (0, 0);
    assert_eq!(a, b);
    assert!(command("inspect both --verify", dir.path()).status.success());
    let template = |f: &str| fs::read(dir.path().join(f).join("chat_template.jinja")).unwrap();
    assert_eq!(template("both"), template("out"));
}

#[test]
fn what_chat_cannot_use_is_refused_with_its_reason() {
    let dir = workshop();
    fs::write(dir.path().join("bad.jsonl"), "{\"messages\": [{\"role\": \"user\"}]}\n").unwrap();
    fs::write(dir.path().join("broken.jinja"), "{% for %}").unwrap();
    let silent = "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}\n";
    fs::write(dir.path().join("silent.jsonl"), silent).unwrap();
    for (arguments, code, message) in [
        ("chat a.jsonl --tokenizer tokenizer.json", 2, "`chat` needs --context"),
        ("chat a.jsonl --context 63", 2, "chat: needs --tokenizer"),
        ("chat --tokenizer tokenizer.json --context 63", 2, "needs a .jsonl file"),
        ("a.jsonl --context 63", 2, "belong to `prepare chat"),
        ("chat a.jsonl --tokenizer tokenizer.json --context 0", 2, "--context: 0 is outside"),
        ("chat a.jsonl --tokenizer tokenizer.json --context 9 --field x", 2, "do not belong"),
        (
            "chat plain.txt --tokenizer tokenizer.json --context 63",
            3,
            "plain.txt: conversations are",
        ),
        (
            "chat bad.jsonl --tokenizer tokenizer.json --context 63",
            3,
            "bad.jsonl:1: message 1, field",
        ),
        (
            "chat silent.jsonl --tokenizer tokenizer.json --context 63 --validation-share 0",
            3,
            "no conversation can be learned from: 1 without an answer",
        ),
        (
            "chat a.jsonl --tokenizer tokenizer.json --context 63 --template broken.jinja",
            2,
            "--template: not a template that can be read",
        ),
    ] {
        let output = command(&format!("prepare -o none {arguments}"), dir.path());
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments}: {stderr}");
        assert!(stderr.contains(message), "{arguments}: {stderr}");
        assert!(!dir.path().join("none/manifest.json").exists());
    }
}

//! What preparation promises beyond one undisturbed run on one machine: it goes
//! on where it was stopped, and parts of a corpus add up to the whole.
#![allow(clippy::unwrap_used)]

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use bitnet_data::{
    ChatOptions, DataError, Dataset, FileOptions, MergeOptions, Part, PrepareOptions, Progress,
    Source, Split, Tokenizer, merge, prepare,
};

/// 600 stories in three files of both kinds; every tenth is a copy, and two are
/// empty.
fn write_stories(folder: &Path) -> Vec<PathBuf> {
    let stories: Vec<String> = (0..600)
        .map(|i| match i {
            11 | 501 => " ".into(),
            _ if i % 10 == 9 => format!("Copy {} of the fox.", i % 70),
            _ => format!("Story {i}: the fox number {} met {} crows.\n", i * 31, i % 7),
        })
        .collect();
    ["a.jsonl", "b.jsonl.zst", "c.jsonl.gz"]
        .iter()
        .zip(stories.chunks(200))
        .map(|(name, stories)| {
            let text: String = stories
                .iter()
                .map(|s| serde_json::json!({ "text": s }).to_string() + "\n")
                .collect();
            let path = folder.join(name);
            let bytes = match *name {
                "b.jsonl.zst" => zstd::encode_all(text.as_bytes(), 1).unwrap(),
                "c.jsonl.gz" => {
                    use std::io::Write;
                    let mut gz = flate2::write::GzEncoder::new(Vec::new(), Default::default());
                    gz.write_all(text.as_bytes()).unwrap();
                    gz.finish().unwrap()
                }
                _ => text.into_bytes(),
            };
            fs::write(&path, bytes).unwrap();
            path
        })
        .collect()
}

fn options(input: &[PathBuf], output: &Path) -> PrepareOptions {
    let files = FileOptions { paths: input.to_vec(), ..FileOptions::default() };
    let mut options = PrepareOptions::new(Source::Files(files), output);
    options.vocab_size = 320;
    options.validation_share = 0.1;
    options.shard_tokens = 400;
    options
}

/// The folder's files by name.
fn content(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    entries
        .map(|p| (p.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(p).unwrap()))
        .collect()
}

/// Stops when so many shards are there, or at the n-th question.
struct Stop<'a> {
    folder: &'a Path,
    shards: usize,
    questions: Cell<u32>,
}

impl Progress for Stop<'_> {
    fn interrupted(&self) -> bool {
        self.questions.set(self.questions.get().saturating_sub(1));
        let is_shard = |name: &str| name.starts_with("train-") && name.ends_with(".bin");
        let shards = fs::read_dir(self.folder).map_or(0, |entries| {
            entries.filter(|e| is_shard(&e.as_ref().unwrap().file_name().to_string_lossy())).count()
        });
        shards >= self.shards || self.questions.get() == 0
    }
}

/// 23 MB in documents of a megabyte: more than is gathered at once, so that an
/// interruption falls between shards.
fn write_large(folder: &Path) -> Vec<PathBuf> {
    let input = folder.join("texts");
    fs::create_dir(&input).unwrap();
    for i in 0..20 {
        let text = format!("Text {i} of crows and foxes.\n").repeat(40_000);
        fs::write(input.join(format!("{i:02}.txt")), text).unwrap();
    }
    vec![input]
}

#[test]
fn an_interrupted_run_goes_on_and_ends_in_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let input = write_large(dir.path());
    let (whole, output) = (dir.path().join("whole"), dir.path().join("out"));
    let mut o = options(&input, &whole);
    o.shard_tokens = 200_000;
    o.tokenizer_bytes = 100_000;
    let undisturbed = prepare(&o, &mut ()).unwrap();
    assert!(undisturbed.manifest.train.shards.len() > 8);
    let expected = content(&whole);
    assert!(expected.keys().all(|name| name != "unfinished.json"));

    type Damage = fn(&Path);
    let damages: [(&str, Damage); 6] = [
        ("nothing", |_| {}),
        ("a shard cut short", |f| truncate(&f.join("train-00001.bin"))),
        ("a flipped byte", |f| flip(&f.join("train-00002.bin"))),
        ("a shard lost", |f| fs::remove_file(f.join("train-00000.bin")).unwrap()),
        ("half a journal", |f| truncate(&f.join("unfinished.json"))),
        ("another tokenizer", |f| flip(&f.join("tokenizer.json"))),
    ];
    let resumed: Vec<usize> = damages
        .iter()
        .map(|(name, damage)| {
            o.output = dir.path().join(name);
            let stop = Stop { folder: &o.output, shards: 3, questions: u32::MAX.into() };
            let e = prepare(&o, &mut { stop }).unwrap_err();
            assert!(matches!(e, DataError::Interrupted), "{name}: {e}");
            assert!(!o.output.join("manifest.json").exists());
            assert!(Dataset::open(&o.output, Split::Train).is_err());
            damage(&o.output);
            let again = prepare(&o, &mut ()).unwrap();
            assert_eq!(again.manifest, undisturbed.manifest, "{name}");
            assert_eq!(content(&o.output), expected, "{name}");
            again.resumed_shards
        })
        .collect();
    // The validation split's shards go on in any case.
    assert!(resumed[0] >= 3, "{resumed:?}");
    assert!(resumed[1] < resumed[0] && resumed[1] < resumed[2], "{resumed:?}");
    assert!(resumed[3] < resumed[1], "{resumed:?}");
    assert_eq!(&resumed[4..], [0, 0], "{resumed:?}");

    // Other options, or --force, do not go on from what is there.
    o.output = output.clone();
    let stop = Stop { folder: &output, shards: 3, questions: u32::MAX.into() };
    prepare(&o, &mut { stop }).unwrap_err();
    o.force = true;
    let forced = prepare(&o, &mut ()).unwrap();
    assert_eq!(forced.resumed_shards, 0);
    assert_eq!(content(&output), expected);
}

fn truncate(path: &Path) {
    let bytes = fs::read(path).unwrap();
    fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
}

fn flip(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let at = bytes.len() - 5;
    bytes[at] ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_killed_process_leaves_nothing_that_is_taken_for_whole() {
    let dir = tempfile::tempdir().unwrap();
    let input = write_large(dir.path());
    let whole = dir.path().join("whole");
    let run = |output: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bitnet-data"));
        command.arg("prepare").args(&input).arg("-o").arg(output);
        command.args(["--vocab-size", "320", "--shard-tokens", "200000", "--name", "x"]);
        command.args(["--validation-share", "0.1", "--tokenizer-bytes", "100kB"]);
        command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        command
    };
    assert!(run(&whole).status().unwrap().success());
    let expected = content(&whole);
    for moment in ["tokenizer.json", "train-00000.bin", "train-00004.bin"] {
        let output = dir.path().join(moment);
        let mut child = run(&output).spawn().unwrap();
        while !output.join(moment).exists() && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_micros(200));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        // Whatever stands under a final name is whole.
        for (name, bytes) in content(&output) {
            if !name.starts_with('.') && name != "unfinished.json" {
                assert_eq!(Some(&bytes), expected.get(&name), "{moment}: {name}");
            }
        }
        assert!(run(&output).status().unwrap().success());
        assert_eq!(content(&output), expected, "{moment}");
    }
}

/// Conversations: what was packed into windows before the interruption stays, masks
/// and counts included.
#[test]
fn an_interrupted_chat_corpus_goes_on_and_ends_in_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("chats.jsonl");
    // Of a megabyte each, of which a window keeps the beginning; see `write_large`.
    let lines: Vec<String> = (0..24)
        .map(|i| {
            let answer = format!("Of crow {i}. ").repeat(80_000);
            let turn =
                |role: &str, text: &str| serde_json::json!({ "role": role, "content": text });
            let messages = [turn("user", &format!("What of {i}?")), turn("assistant", &answer)];
            serde_json::json!({ "messages": messages }).to_string()
        })
        .collect();
    fs::write(&input, lines.join("\n")).unwrap();
    let tokenizer = Tokenizer::train(&["What of crow 1? Of crow 2. ".repeat(9)], 280).unwrap();
    let tokenizer_path = dir.path().join("tokenizer.json");
    fs::write(&tokenizer_path, tokenizer.to_json()).unwrap();
    let (whole, output) = (dir.path().join("whole"), dir.path().join("out"));
    let mut o = PrepareOptions::new(Source::Chat { paths: vec![input] }, &whole);
    o.tokenizer = Some(tokenizer_path);
    o.validation_share = 0.1;
    o.shard_tokens = 256;
    o.chat = Some(ChatOptions { context: 127, template: None });
    let undisturbed = prepare(&o, &mut ()).unwrap();
    assert!(undisturbed.manifest.train.shards.len() > 8);
    o.output = output.clone();
    let stop = Stop { folder: &output, shards: 3, questions: u32::MAX.into() };
    let error = prepare(&o, &mut { stop }).unwrap_err();
    assert!(matches!(error, DataError::Interrupted), "{error}");
    let again = prepare(&o, &mut ()).unwrap();
    assert!(again.resumed_shards >= 3, "{}", again.resumed_shards);
    assert_eq!(again.manifest, undisturbed.manifest);
    assert_eq!(content(&output), content(&whole));
}

/// The decoded documents of both splits, sorted.
fn texts(folder: &Path) -> [Vec<String>; 2] {
    [Split::Train, Split::Validation].map(|split| {
        let data = Dataset::open(folder, split).unwrap();
        data.verify().unwrap();
        let tokenizer = data.tokenizer().unwrap();
        let mut tokens = vec![0; data.tokens() as usize];
        data.read(0, &mut tokens).unwrap();
        let ended = tokens.split_inclusive(|&t| t == data.eos_id());
        let mut texts: Vec<String> = ended.map(|t| tokenizer.decode(&t[..t.len() - 1])).collect();
        texts.sort();
        texts
    })
}

/// Prepares `count` parts and the whole with the same tokenizer.
fn parts(dir: &Path, count: u32, change: impl Fn(&mut PrepareOptions)) -> (PathBuf, Vec<PathBuf>) {
    let input = write_stories(dir);
    let tokenizer = dir.join("given.json");
    let trained = Tokenizer::train(&["the fox met crows of the fox".repeat(9)], 270).unwrap();
    fs::write(&tokenizer, trained.to_json()).unwrap();
    let make = |output: PathBuf, part: Option<Part>| {
        let mut o = options(&input, &output);
        o.tokenizer = Some(tokenizer.clone());
        o.part = part;
        change(&mut o);
        prepare(&o, &mut ()).unwrap();
        output
    };
    let whole = make(dir.join("whole"), None);
    let folders = (1..=count).map(|i| make(dir.join(format!("part{i}")), Part::new(i, count)));
    (whole, folders.collect())
}

#[test]
fn parts_add_up_to_the_whole() {
    type Change = fn(&mut PrepareOptions);
    let changes: [(Change, u64); 3] =
        [(|_| {}, 53), (|o| o.keep_duplicates = true, 0), (|o| o.max_bytes = Some(9000), 53)];
    for (change, duplicates) in changes {
        let dir = tempfile::tempdir().unwrap();
        let (whole, mut parts) = parts(dir.path(), 3, change);
        parts.rotate_left(1);
        let output = dir.path().join("merged");
        let o = MergeOptions { parts, output: output.clone(), force: false };
        let merged = merge(&o, &mut ()).unwrap();
        let alone = Dataset::open(&whole, Split::Train).unwrap().manifest().clone();
        assert_eq!(texts(&output), texts(&whole));
        assert_eq!(merged.duplicates, duplicates);
        // All but the division into shards is the same.
        let plain = |m: &bitnet_data::Manifest| {
            let mut m = m.clone();
            (m.train.shards, m.validation.shards) = (Vec::new(), Vec::new());
            m
        };
        assert_eq!(plain(&merged), plain(&alone));
        let e = merge(&o, &mut ()).unwrap_err();
        assert!(matches!(e, DataError::Output { .. }), "{e}");
        let o = MergeOptions { force: true, ..o };
        assert_eq!(merge(&o, &mut ()).unwrap(), merged);
        let o = MergeOptions { output: o.parts[0].clone(), ..o };
        let e = merge(&o, &mut ()).unwrap_err().to_string();
        assert!(e.contains("is one of the parts"), "{e}");
    }
}

#[test]
fn copies_are_kept_where_asked_and_counted_in_the_hash() {
    let dir = tempfile::tempdir().unwrap();
    let mut input = write_stories(dir.path());
    let mut o = options(&input, &dir.path().join("a"));
    o.keep_duplicates = true;
    let kept = prepare(&o, &mut ()).unwrap().manifest;
    assert_eq!((kept.documents, kept.duplicates, kept.empty_documents), (598, 0, 2));
    assert_eq!(texts(&o.output).concat().len(), 598);
    // The order of files does not matter, one copy more does.
    input.reverse();
    let mut turned = options(&input, &dir.path().join("b"));
    turned.keep_duplicates = true;
    assert_eq!(prepare(&turned, &mut ()).unwrap().manifest.corpus_hash, kept.corpus_hash);
    let copy = dir.path().join("d.jsonl");
    fs::write(&copy, "{\"text\": \"Copy 9 of the fox.\"}\n").unwrap();
    input.push(copy);
    let mut more = options(&input, &dir.path().join("c"));
    more.keep_duplicates = true;
    assert_ne!(prepare(&more, &mut ()).unwrap().manifest.corpus_hash, kept.corpus_hash);
    o.max_bytes = Some(10);
    o.force = true;
    let e = prepare(&o, &mut ()).unwrap_err().to_string();
    assert!(e.contains("--keep-duplicates: cannot be combined with --max-bytes"), "{e}");
}

#[test]
fn parts_that_do_not_belong_together_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, parts) = parts(dir.path(), 2, |_| {});
    let refused = |folders: &[&PathBuf], message: &str| {
        let parts = folders.iter().map(|p| (*p).clone()).collect();
        let o = MergeOptions { parts, output: dir.path().join("merged"), force: false };
        let e = merge(&o, &mut ()).unwrap_err().to_string();
        assert!(e.contains(message), "expected {message}: {e}");
        assert!(!o.output.join("manifest.json").exists());
    };
    let (a, b) = (&parts[0], &parts[1]);
    refused(&[a], "part1: is part 1/2; not named: 2/2");
    refused(&[a, b, a], "part1: is part 1/2, as");
    refused(&[a, &whole], "whole: is a whole corpus, not a part of one");
    refused(&[a, &dir.path().join("none")], "no such folder");

    let edit = |from: &str, to: &str, message: &str| {
        let path = b.join("manifest.json");
        let good = fs::read_to_string(&path).unwrap();
        assert!(good.contains(from), "{good}");
        fs::write(&path, good.replace(from, to)).unwrap();
        refused(&[a, b], message);
        fs::write(&path, good).unwrap();
    };
    edit("\"2/2\"", "\"2/3\"", "not of the same division");
    edit("\"seed\": 0", "\"seed\": 1", "was prepared with other options than");
    edit("\"input_documents\": 598", "\"input_documents\": 597", "was prepared from other texts");
    edit("\"sha256\": \"", "\"sha256\": \"0", "has the tokenizer 0");

    // A part whose keys are another's: the documents overlap.
    let (mine, theirs) = (b.join("keys.bin"), a.join("keys.bin"));
    let good = fs::read(&mine).unwrap();
    let mut overlapping = good.clone();
    overlapping[..16].copy_from_slice(&fs::read(theirs).unwrap()[..16]);
    let mut keys: Vec<&[u8]> = overlapping.chunks(16).collect();
    keys.sort_unstable();
    fs::write(&mine, keys.concat()).unwrap();
    refused(&[a, b], "overlaps");
    fs::write(&mine, &good[..good.len() - 1]).unwrap();
    refused(&[a, b], "need 16 each");
    fs::write(&mine, good).unwrap();

    let o = options(&write_stories(dir.path()), &dir.path().join("x"));
    let o = PrepareOptions { part: Part::new(1, 2), ..o };
    let e = prepare(&o, &mut ()).unwrap_err().to_string();
    assert!(e.contains("--part: needs --tokenizer"), "{e}");
}

//! From files to batches and back: what holds for a prepared folder as a whole.
#![allow(clippy::unwrap_used)]

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use bitnet_data::{
    BatchStream, DataError, Dataset, FileOptions, PrepareOptions, Prepared, Progress, Source,
    Split, TextSplit, Tokenizer, prepare,
};

/// 200 small stories, three of them copies and two empty, in a jsonl file.
fn stories() -> Vec<String> {
    let mut stories: Vec<String> = (0..200)
        .map(|i| format!("Story {i}: the fox number {} met {} crows.\n", i * 31, i % 7))
        .collect();
    stories[50] = stories[3].clone();
    stories[51] = stories[3].clone();
    stories[199] = stories[120].clone();
    stories[60] = " \n".into();
    stories[61] = String::new();
    stories
}

fn write_jsonl(path: &Path, stories: &[String]) {
    let lines: Vec<String> =
        stories.iter().map(|s| serde_json::json!({ "story": s, "id": 1 }).to_string()).collect();
    fs::write(path, lines.join("\n")).unwrap();
}

fn options(input: &Path, output: &Path) -> PrepareOptions {
    let source = Source::Files(FileOptions {
        paths: vec![input.to_path_buf()],
        field: "story".into(),
        ..FileOptions::default()
    });
    let mut options = PrepareOptions::new(source, output);
    options.vocab_size = 320;
    options.validation_share = 0.1;
    options
}

fn run(options: &PrepareOptions) -> Prepared {
    prepare(options, &mut ()).unwrap()
}

/// The documents of a split, decoded.
fn texts(folder: &Path, split: Split) -> Vec<String> {
    let data = Dataset::open(folder, split).unwrap();
    let tokenizer = data.tokenizer().unwrap();
    let mut tokens = vec![0; data.tokens() as usize];
    data.read(0, &mut tokens).unwrap();
    assert_eq!(tokens.last(), Some(&data.eos_id()));
    tokens.pop();
    tokens.split(|&t| t == data.eos_id()).map(|t| tokenizer.decode(t)).collect()
}

#[test]
fn every_document_is_in_one_split_and_reads_back() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("s.jsonl"), dir.path().join("out"));
    write_jsonl(&input, &stories());
    let prepared = run(&options(&input, &output));
    let m = &prepared.manifest;
    assert!(!prepared.reused);
    assert_eq!((m.documents, m.duplicates, m.empty_documents), (195, 3, 2));
    let train = texts(&output, Split::Train);
    let validation = texts(&output, Split::Validation);
    assert_eq!(train.len() as u64, m.train.documents);
    assert_eq!(validation.len() as u64, m.validation.documents);
    assert!((5..40).contains(&validation.len()), "{}", validation.len());
    let all: HashSet<&String> = train.iter().chain(&validation).collect();
    let stories = stories();
    let expected: HashSet<&String> = stories.iter().filter(|s| !s.trim().is_empty()).collect();
    assert_eq!(all.len(), train.len() + validation.len());
    assert_eq!(all, expected);
    assert_eq!(m.bytes, expected.iter().map(|s| s.len() as u64).sum::<u64>());
    assert_eq!(m.tokens, m.train.tokens + m.validation.tokens);
    for split in [Split::Train, Split::Validation] {
        Dataset::open(&output, split).unwrap().verify().unwrap();
    }
}

#[test]
fn the_result_does_not_depend_on_the_run_or_the_order_of_documents() {
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("s.jsonl");
    let folders = [dir.path().join("a"), dir.path().join("b")];
    write_jsonl(&input, &stories());
    let first = run(&options(&input, &folders[0])).manifest;
    let second = run(&options(&input, &folders[1])).manifest;
    assert_eq!(first, second);
    for file in ["manifest.json", "tokenizer.json", "train-00000.bin", "val-00000.bin"] {
        let read = |f: &Path| fs::read(f.join(file)).unwrap();
        assert_eq!(read(&folders[0]), read(&folders[1]), "{file}");
    }
    let mut reversed = stories();
    reversed.reverse();
    write_jsonl(&input, &reversed);
    let turned = run(&options(&input, &dir.path().join("c"))).manifest;
    assert_eq!(turned.corpus_hash, first.corpus_hash);
    assert_eq!(turned.tokenizer, first.tokenizer);
    assert_eq!(turned.validation.tokens, first.validation.tokens);
    let mut other = stories();
    other[7].push('!');
    write_jsonl(&input, &other);
    let other = run(&options(&input, &dir.path().join("d"))).manifest;
    assert_ne!(other.corpus_hash, first.corpus_hash);
}

#[test]
fn a_cap_takes_a_sample_and_shards_split_between_documents() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("s.jsonl"), dir.path().join("out"));
    write_jsonl(&input, &stories());
    let mut o = options(&input, &output);
    o.max_bytes = Some(4000);
    o.shard_tokens = 300;
    let m = run(&o).manifest;
    assert!(m.bytes <= 4000 && m.bytes > 3900, "{}", m.bytes);
    assert_eq!(m.beyond_cap, 195 - m.documents);
    assert!(m.train.shards.len() > 3);
    assert!(m.train.shards.iter().all(|s| s.tokens <= 300));
    // The sample is spread over the file.
    let train = texts(&output, Split::Train);
    let number = |s: &String| s[6..].split(':').next().unwrap().parse::<u32>().unwrap();
    assert!(train.iter().map(number).any(|n| n < 60));
    assert!(train.iter().map(number).any(|n| n > 140));
    // One sequence across all shards.
    let data = Dataset::open(&output, Split::Train).unwrap();
    let mut whole = vec![0; data.tokens() as usize];
    data.read(0, &mut whole).unwrap();
    for start in 0..whole.len() - 7 {
        let mut part = [0; 7];
        data.read(start as u64, &mut part).unwrap();
        assert_eq!(part, whole[start..start + 7]);
    }
    assert!(data.read(data.tokens() - 3, &mut [0; 4]).is_err());
}

#[test]
fn the_stream_visits_every_window_once_an_epoch_and_resumes() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("s.jsonl"), dir.path().join("out"));
    write_jsonl(&input, &stories());
    run(&options(&input, &output));
    let data = Arc::new(Dataset::open(&output, Split::Train).unwrap());
    let context = 16;
    let windows = data.window_count(context) as usize;
    let mut in_order: Vec<Vec<u32>> = Vec::new();
    for window in data.windows(context).unwrap() {
        let window = window.unwrap();
        assert_eq!(window.inputs[1..], window.targets[..context - 1]);
        in_order.push(window.inputs);
    }
    assert_eq!(in_order.len(), windows);
    let mut epochs = Vec::new();
    let mut stream = BatchStream::new(Arc::clone(&data), context, 5).unwrap();
    for epoch in 0..2 {
        assert_eq!(stream.state().epoch, epoch);
        let batch = stream.next_batch(windows).unwrap();
        assert_eq!((batch.batch, batch.context), (windows, context));
        let rows: Vec<Vec<u32>> = batch.inputs.chunks(context).map(<[u32]>::to_vec).collect();
        assert_ne!(rows, in_order);
        let mut sorted = (rows.clone(), in_order.clone());
        sorted.0.sort();
        sorted.1.sort();
        assert_eq!(sorted.0, sorted.1);
        epochs.push(rows);
    }
    assert_ne!(epochs[0], epochs[1]);

    // 30 batches in one go, or with a stop behind each; 7 does not divide an epoch.
    let mut whole = BatchStream::new(Arc::clone(&data), context, 5).unwrap();
    let mut state = whole.state();
    for _ in 0..3 * windows / 7 {
        let mut resumed = BatchStream::from_state(Arc::clone(&data), context, state).unwrap();
        assert_eq!(resumed.next_batch(7).unwrap(), whole.next_batch(7).unwrap());
        let json = serde_json::to_string(&resumed.state()).unwrap();
        state = serde_json::from_str(&json).unwrap();
        assert_eq!(state, whole.state());
    }
    assert!(state.epoch >= 2);
    let e = BatchStream::from_state(Arc::clone(&data), context + 1, state).unwrap_err();
    assert!(e.to_string().contains("windows of 17 tokens"), "{e}");
    let e = BatchStream::new(data, 1 << 20, 5).unwrap_err();
    assert!(e.to_string().contains("one window of context 1048576 needs 1048577"), "{e}");
}

#[test]
fn a_finished_folder_is_kept_and_a_different_request_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("s.jsonl"), dir.path().join("out"));
    write_jsonl(&input, &stories());
    let mut o = options(&input, &output);
    let first = run(&o);
    let again = run(&o);
    assert!(again.reused);
    assert_eq!(again.manifest, first.manifest);

    o.vocab_size = 330;
    let e = prepare(&o, &mut ()).unwrap_err();
    assert!(matches!(e, DataError::Output { .. }));
    assert!(e.to_string().contains("vocab_size 320 there, 330 asked for"), "{e}");
    o.force = true;
    assert_eq!(run(&o).manifest.tokenizer.vocab_size, 330);
    o.force = false;
    assert!(run(&o).reused);

    write_jsonl(&input, &stories()[..100]);
    let e = prepare(&o, &mut ()).unwrap_err().to_string();
    assert!(e.contains("the input files have changed"), "{e}");

    // A kill before the manifest: the next run starts over.
    write_jsonl(&input, &stories());
    fs::remove_file(output.join("manifest.json")).unwrap();
    fs::write(output.join("train-00007.bin"), "left over").unwrap();
    fs::write(output.join(".train-00000.bin.tmp-x"), "left over").unwrap();
    fs::write(output.join("notes.txt"), "mine").unwrap();
    let e = Dataset::open(&output, Split::Train).unwrap_err().to_string();
    assert!(e.contains("no manifest.json"), "{e}");
    assert!(!run(&o).reused);
    let mut names: Vec<String> = fs::read_dir(&output)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(
        names,
        ["manifest.json", "notes.txt", "tokenizer.json", "train-00000.bin", "val-00000.bin"]
    );
}

/// Stops at the n-th question.
struct StopAfter(std::cell::Cell<u32>);

impl Progress for StopAfter {
    fn interrupted(&self) -> bool {
        self.0.set(self.0.get().saturating_sub(1));
        self.0.get() == 0
    }
}

#[test]
fn an_interruption_leaves_an_incomplete_folder_that_can_be_finished() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("s.jsonl"), dir.path().join("out"));
    write_jsonl(&input, &stories());
    let o = options(&input, &output);
    for questions in [1, 100, 250, 390] {
        let e = prepare(&o, &mut StopAfter(questions.into())).unwrap_err();
        assert!(matches!(e, DataError::Interrupted), "{questions}: {e}");
        assert!(!output.join("manifest.json").exists());
    }
    assert!(!run(&o).reused);
    assert!(run(&o).reused);
}

#[test]
fn a_given_tokenizer_is_used_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("s.jsonl"), dir.path().join("out"));
    write_jsonl(&input, &stories());
    let tokenizer = Tokenizer::train(&["abc abc abd".repeat(9)], 262).unwrap();
    let path = dir.path().join("given.json");
    fs::write(&path, tokenizer.to_json()).unwrap();
    let mut o = options(&input, &output);
    o.tokenizer = Some(path);
    let m = run(&o).manifest;
    assert_eq!(m.tokenizer.sha256, tokenizer.hash_hex());
    assert_eq!(fs::read_to_string(output.join("tokenizer.json")).unwrap(), tokenizer.to_json());
    o.force = true;
    o.eos = Some("<eos>".into());
    let e = prepare(&o, &mut ()).unwrap_err().to_string();
    assert!(e.contains("--eos: the tokenizer has no token `<eos>`"), "{e}");
}

#[test]
fn both_splits_exist_even_for_two_documents() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("book.txt"), dir.path().join("out"));
    fs::write(&input, "One paragraph of text.\n\nAnother one.\n").unwrap();
    let mut o = options(&input, &output);
    let e = prepare(&o, &mut ()).unwrap_err();
    assert!(e.to_string().contains("a single document"), "{e}");
    let Source::Files(files) = &mut o.source else { unreachable!("made of files above") };
    files.split = TextSplit::BlankLine;
    let m = run(&o).manifest;
    assert_eq!((m.train.documents, m.validation.documents), (1, 1));
    o.validation_share = 0.0;
    o.force = true;
    let m = run(&o).manifest;
    assert_eq!((m.train.documents, m.validation.documents), (2, 0));
    let e = Dataset::open(&output, Split::Validation).unwrap_err().to_string();
    assert!(e.contains("has no val split"), "{e}");
}

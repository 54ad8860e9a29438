//! What several tests of runs share: a corpus.

use std::fs;
use std::path::{Path, PathBuf};

use bitnet_data::{FileOptions, PrepareOptions, Source, prepare};

/// Text with something to learn: sentences from a small grammar, some hundred
/// documents of it.
fn corpus(folder: &Path) {
    fs::create_dir_all(folder).unwrap();
    let mut state = 12345u64;
    let mut pick = |words: &[&str]| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        words[(state >> 33) as usize % words.len()].to_owned()
    };
    for document in 0..300 {
        let mut text = String::new();
        for _ in 0..12 {
            let subject = pick(&["the cat", "a dog", "my bird", "one fish"]);
            let verb = pick(&["sees", "likes", "follows", "hears"]);
            let object = pick(&["the moon", "a river", "some bread", "the old house"]);
            text += &format!("{subject} {verb} {object}.\n");
        }
        fs::write(folder.join(format!("{document:03}.txt")), text).unwrap();
    }
}

/// The corpus as token shards with a vocabulary of 320, split by `seed`.
pub(crate) fn prepared(dir: &Path, name: &str, seed: u64) -> PathBuf {
    prepared_with(dir, name, seed, None)
}

/// The same, with the tokenizer of another prepared folder.
pub(crate) fn prepared_with(dir: &Path, name: &str, seed: u64, like: Option<&Path>) -> PathBuf {
    let text = dir.join("text");
    if !text.exists() {
        corpus(&text);
    }
    let out = dir.join(name);
    let source = Source::Files(FileOptions { paths: vec![text], ..FileOptions::default() });
    let options = PrepareOptions {
        vocab_size: 320,
        tokenizer: like.map(|folder| folder.join("tokenizer.json")),
        validation_share: 0.1,
        seed,
        ..PrepareOptions::new(source, &out)
    };
    prepare(&options, &mut ()).unwrap();
    out
}

//! A Hugging Face folder. The input is its files, one after the other with a zero
//! byte between: `config.json`, `model.safetensors.index.json`, `golden.json`,
//! `tokenizer_config.json`, `generation_config.json`, and the tensors, which may
//! hold zeros. An empty one is absent; with an index the tensors are its shard
//! `1.safetensors`.
#![no_main]

use std::fs;
use std::sync::LazyLock;

use bitnet_fuzz::{bounded, read_model, scratch};
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

const TEXTS: [&str; 5] = [
    "config.json",
    "model.safetensors.index.json",
    "golden.json",
    "tokenizer_config.json",
    "generation_config.json",
];

static FOLDER: LazyLock<TempDir> = LazyLock::new(|| {
    let folder = scratch();
    // The folder's tokenizer is text until someone uses it: the target `tokenizer`.
    fs::write(folder.path().join("tokenizer.json"), "{}").expect("room for a file");
    folder
});

fuzz_target!(|bytes: &[u8]| {
    let folder = FOLDER.path();
    let mut parts = bytes.splitn(TEXTS.len() + 1, |b| *b == 0);
    let mut put = |name: &str| {
        let content = parts.next().unwrap_or_default();
        let path = folder.join(name);
        if content.is_empty() {
            let _ = fs::remove_file(path);
        } else {
            fs::write(path, content).expect("room for the input");
        }
        !content.is_empty()
    };
    let [_, sharded, ..] = TEXTS.map(&mut put);
    let (now, other) = match sharded {
        true => ("1.safetensors", "model.safetensors"),
        false => ("model.safetensors", "1.safetensors"),
    };
    put(now);
    let _ = fs::remove_file(folder.join(other));
    bounded(bytes.len(), || {
        let _ = read_model(folder);
    });
});

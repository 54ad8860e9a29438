//! The architecture, as a test: which crate may use which (`docs/architecture.md`),
//! and where `unsafe` may stand.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use bitnet_tests::workspace;
use serde_json::Value;

/// Every crate of the workspace and the crates of the workspace it may use.
const EDGES: [(&str, &[&str]); 10] = [
    ("bitnet-core", &[]),
    ("bitnet-kernels", &["core"]),
    ("bitnet-format", &["core"]),
    ("bitnet-engine", &["core", "kernels", "format"]),
    ("bitnet-data", &["core", "format"]),
    ("bitnet-train", &["core", "kernels", "format", "data"]),
    ("bitnet-export", &["core", "format", "engine"]),
    ("bitnet-eval", &["core", "kernels", "format", "data", "engine"]),
    ("bitnet-cli", &["core", "format", "engine"]),
    ("bitnet-tests", &["core", "kernels", "format", "engine", "data", "train", "export"]),
];

/// Libraries that a crate must never use, by prefix of their name.
const FORBIDDEN: [(&str, &[&str]); 8] = [
    ("bitnet-core", &["burn", "rayon", "memmap2", "clap"]),
    ("bitnet-kernels", &["burn", "rayon", "memmap2", "clap"]),
    ("bitnet-format", &["burn", "rayon", "clap"]),
    ("bitnet-engine", &["burn", "clap", "tokio", "async", "futures"]),
    ("bitnet-data", &["burn"]),
    ("bitnet-export", &["burn"]),
    ("bitnet-eval", &["burn"]),
    ("bitnet-cli", &["burn"]),
];

/// Normal dependencies of every crate of the workspace, by name.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(workspace())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    packages
        .iter()
        .map(|package| {
            let all = package["dependencies"].as_array().unwrap().iter();
            let normal = all.filter(|d| d["kind"].is_null());
            let names = normal.map(|d| d["name"].as_str().unwrap().to_owned()).collect();
            (package["name"].as_str().unwrap().to_owned(), names)
        })
        .collect()
}

#[test]
fn the_crates_use_each_other_as_drawn() {
    let found = dependencies();
    let known: BTreeSet<&str> = EDGES.iter().map(|(name, _)| *name).collect();
    for name in found.keys() {
        assert!(known.contains(name.as_str()), "{name} is not in the architecture");
    }
    for (name, allowed) in EDGES {
        for used in found[name].iter().filter_map(|d| d.strip_prefix("bitnet-")) {
            assert!(allowed.contains(&used), "{name} must not use bitnet-{used}");
        }
    }
}

#[test]
fn the_crates_leave_out_what_they_must() {
    let found = dependencies();
    for (name, forbidden) in FORBIDDEN {
        for used in &found[name] {
            let bad = forbidden.iter().find(|f| used.starts_with(**f));
            assert!(bad.is_none(), "{name} must not use {used}");
        }
    }
}

/// Rust files below a folder.
fn sources(folder: &Path, into: &mut Vec<std::path::PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|e| e == "rs") {
            into.push(path);
        }
    }
}

#[test]
fn unsafe_stands_in_the_kernels_and_at_the_memory_map_only() {
    let crates = workspace().join("crates");
    let map = Path::new("bitnet-format/src/map.rs");
    for (name, _) in EDGES.iter().filter(|(n, _)| !["bitnet-kernels", "bitnet-tests"].contains(n)) {
        let mut files = Vec::new();
        sources(&crates.join(name).join("src"), &mut files);
        let guard = match *name {
            "bitnet-format" => "#![deny(unsafe_code)]",
            _ => "#![forbid(unsafe_code)]",
        };
        let roots = files.iter().filter(|f| {
            f.parent().is_some_and(|p| p.ends_with(Path::new(name).join("src")))
                && (f.ends_with("lib.rs") || f.ends_with("main.rs"))
        });
        for root in roots {
            let text = fs::read_to_string(root).unwrap();
            let is_binary = root.ends_with("main.rs");
            let guarded = text.contains(guard) || is_binary && text.contains("#![forbid(unsafe");
            assert!(guarded, "{} lacks {guard}", root.display());
        }
        for file in files.iter().filter(|f| !f.ends_with(map)) {
            for (i, line) in fs::read_to_string(file).unwrap().lines().enumerate() {
                let code = line.split("//").next().unwrap_or_default();
                let is_unsafe = ["unsafe {", "unsafe fn", "unsafe impl", "allow(unsafe_code)"]
                    .iter()
                    .any(|word| code.contains(word));
                assert!(!is_unsafe, "{}:{}: {line}", file.display(), i + 1);
            }
        }
    }
}

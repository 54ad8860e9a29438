//! Hands the program what it is built from, for `run.json`: the commit of the
//! source tree, the compiler, the target and the cargo features.

use std::env;
use std::path::Path;
use std::process::Command;

/// What decides the program beside this crate, from the root of the tree.
const SOURCES: [&str; 7] = [
    "Cargo.toml",
    "Cargo.lock",
    "crates/bitnet-core",
    "crates/bitnet-data",
    "crates/bitnet-format",
    "crates/bitnet-kernels",
    "crates/bitnet-train",
];

fn main() {
    let root = Path::new("../..");
    for source in SOURCES {
        println!("cargo::rerun-if-changed={}", root.join(source).display());
    }
    // A commit moves HEAD or the branch that it names; its log tells of both.
    for file in ["HEAD", "logs/HEAD"] {
        if let Some(path) = git(&["rev-parse", "--path-format=absolute", "--git-path", file]) {
            println!("cargo::rerun-if-changed={path}");
        }
    }
    let commit = git(&["rev-parse", "HEAD"]).unwrap_or_default();
    let mut status = vec!["status", "--porcelain", "--"];
    status.extend(SOURCES);
    let dirty = git(&status).map_or("", |lines| if lines.is_empty() { "false" } else { "true" });
    let rustc = env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
    let version = output(Command::new(rustc).arg("--version")).unwrap_or_default();
    let mut features: Vec<String> = env::vars()
        .filter_map(|(key, _)| key.strip_prefix("CARGO_FEATURE_").map(str::to_lowercase))
        .filter(|name| name != "default")
        .collect();
    features.sort();
    let target = env::var("TARGET").unwrap_or_default();
    for (key, value) in [
        ("COMMIT", commit.as_str()),
        ("DIRTY", dirty),
        ("RUSTC", &version),
        ("FEATURES", &features.join(",")),
        ("TARGET", &target),
    ] {
        println!("cargo::rustc-env=BITNET_BUILD_{key}={value}");
    }
}

/// What git says of the source tree; none where there is no git, or no repository.
fn git(arguments: &[&str]) -> Option<String> {
    output(Command::new("git").arg("-C").arg("../..").args(arguments))
}

fn output(command: &mut Command) -> Option<String> {
    let output = command.output().ok().filter(|o| o.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
}

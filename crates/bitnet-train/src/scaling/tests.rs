use std::fs;

use super::*;
use crate::config::tests::small;
use crate::metrics::{EvalMetric, Log, Metric, TrainMetric};

/// A finished run of 4 steps of a model of `hidden` columns whose last loss is `loss`.
fn run(dir: &Path, kind: &str, hidden: usize, (rate, seed): (f64, u64), loss: f64) -> PathBuf {
    let folder = dir.join(format!("{kind}-{hidden}-{rate}-{seed}"));
    fs::create_dir_all(&folder).unwrap();
    let mut config = small(dir);
    config.seed = seed;
    config.data.seed = seed;
    config.schedule.steps = 4;
    config.schedule.lr = rate;
    config.model.hidden_size = hidden;
    let set = format!("model.weight_quantizer=\"{kind}\"");
    let config = config_file::with_overrides(config, &[set]).unwrap();
    fs::write(folder.join("config.toml"), config_file::to_toml(&config).unwrap()).unwrap();
    let mut log = Log::open(&folder.join("metrics.jsonl"), None).unwrap();
    log.write(&Metric::Train(TrainMetric {
        step: 4,
        loss,
        lr: rate,
        grad_norm: 1.0,
        tokens: 512,
        tokens_per_second: 1280.0,
        seconds: 1.0,
        data_seconds: 0.0,
        rss_bytes: None,
    }))
    .unwrap();
    let (step, tokens, seconds) = (4, 64, 1.5);
    log.write(&Metric::Eval(EvalMetric { step, val_loss: loss, tokens, seconds })).unwrap();
    folder
}

/// Five sizes of both kinds: ternary is worse by 0.3, less 0.05 for each size; seed 2
/// is worse by 0.01 for float models and by 0.03 for ternary ones.
fn runs(dir: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for (i, hidden) in [32, 64, 128, 256, 512].into_iter().enumerate() {
        let twin = 3.0 + 2.0 * 0.5f64.powi(i as i32);
        let gap = 0.3 - 0.05 * i as f64;
        all.push(run(dir, "none", hidden, (1e-3, 1), twin));
        all.push(run(dir, "none", hidden, (1e-3, 2), twin + 0.01));
        all.push(run(dir, "ternary", hidden, (2e-3, 1), twin + gap));
        all.push(run(dir, "ternary", hidden, (2e-3, 2), twin + gap + 0.03));
        all.push(run(dir, "ternary", hidden, (1e-3, 1), twin + gap + 0.5));
        // With one lucky seed that the other rates were not tried with.
        all.push(run(dir, "ternary", hidden, (4e-3, 1), twin + gap + 0.4));
        all.push(run(dir, "ternary", hidden, (4e-3, 3), 0.1));
    }
    all
}

#[test]
fn the_best_rate_counts_and_the_gap_is_by_seed() {
    let dir = tempfile::tempdir().unwrap();
    let found = scaling(&runs(dir.path()), "model.weight_quantizer", "none").unwrap();
    assert_eq!((found.runs, found.tokens, found.kinds.len()), (35, 512, 2));
    let ternary = &found.kinds[1];
    assert_eq!(ternary.name, "ternary");
    for cell in &ternary.cells {
        assert_eq!((cell.best().rate, cell.tried.len(), cell.at_edge), (2e-3, 3, false));
    }
    assert!(found.kinds[0].cells.iter().all(|c| c.at_edge && c.tried.len() == 1));
    let gaps = found.gaps.as_ref().unwrap();
    assert_eq!((gaps.kind.as_str(), gaps.baseline.as_str()), ("ternary", "none"));
    for (i, gap) in gaps.sizes.iter().enumerate() {
        let expected = 0.3 - 0.05 * i as f64;
        assert!((gap.by_seed[0].1 - expected).abs() < 1e-12);
        assert!((gap.mean - expected - 0.01).abs() < 1e-12);
        let interval = gap.interval.unwrap();
        assert!(interval.low < gap.mean && interval.high > gap.mean);
    }
    // Differences of 0.02 at every size: a pooled deviation of 0.02/√2.
    let noise = gaps.noise.unwrap();
    assert_eq!(noise.freedom, 5);
    assert!((noise.sd - 0.02 / 2f64.sqrt()).abs() < 1e-12);
    let (trend, slope) = gaps.trend.unwrap();
    let slope = slope.unwrap();
    assert!(
        trend.per_decade < 0.0 && slope.low < trend.per_decade && slope.high > trend.per_decade
    );
    let text = found.to_string();
    for part in
        ["| ternary | ", "2e-3 | ", "35 runs of 512 tokens", "Spectra", "less none", "a decade"]
    {
        assert!(text.contains(part), "{part}\n{text}");
    }
}

#[test]
fn spectra_s_gap_is_that_of_its_paper() {
    let gap = |n: f64| SPECTRA[0].at(n) - SPECTRA[1].at(n);
    // 26/N^0.26 + 0.09.
    assert!((gap(99e6) - 0.307).abs() < 1e-3 && (gap(3.9e9) - 0.1734).abs() < 1e-3);
}

#[test]
fn draws_both_kinds_of_picture_and_leaves_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let found = scaling(&runs(dir.path()), "model.weight_quantizer", "none").unwrap();
    let pictures = tempfile::tempdir().unwrap();
    let (png, svg) = (pictures.path().join("a.png"), pictures.path().join("a.svg"));
    draw(&found, &png).unwrap();
    draw(&found, &svg).unwrap();
    assert!(fs::read(&png).unwrap().starts_with(b"\x89PNG"));
    let svg = fs::read_to_string(&svg).unwrap();
    for part in ["parameters", "Spectra", "model.weight_quantizer = ternary", "less that of none"] {
        assert!(svg.contains(part), "{part}");
    }
    let error = draw(&found, &pictures.path().join("a.gif")).unwrap_err();
    assert!(error.to_string().contains(".png or .svg"));
    assert_eq!(fs::read_dir(pictures.path()).unwrap().count(), 2);
}

/// The `run.json` of a run on the corpus with this hash.
fn started_on(hash: &str) -> String {
    let data = serde_json::json!({
        "folder": "data", "name": "x", "corpus_hash": hash, "tokenizer_sha256": "cc",
        "train_tokens": 9,
    });
    let program = serde_json::json!({
        "version": "0.1.0", "commit": null, "modified": false, "rustc": "x", "target": "x",
        "features": [],
    });
    let machine = serde_json::json!({
        "cpu": "x", "cpus": 2, "instruction_set": "portable", "memory_bytes": 1, "system": "x",
    });
    let start = serde_json::json!({
        "time": "2026-01-01T00:00:00Z", "step": 0, "command": [], "directory": "/",
        "changed": [], "device": "cpu", "threads": 1, "program": program, "machine": machine,
        "data": data,
    });
    serde_json::json!({ "version": 1, "starts": [start] }).to_string()
}

#[test]
fn refuses_what_cannot_be_compared() {
    let dir = tempfile::tempdir().unwrap();
    let by = "model.weight_quantizer";
    let error = |folders: &[PathBuf], by: &str, baseline: &str| {
        scaling(folders, by, baseline).unwrap_err().to_string()
    };
    let a = run(dir.path(), "none", 32, (1e-3, 1), 3.0);
    let b = run(dir.path(), "ternary", 32, (1e-3, 1), 3.1);
    let both = [a.clone(), b.clone()];
    assert!(error(&both, by, "binary").contains("there are none, ternary"));
    assert!(error(&both, "schedule.lr", "none").contains("model.weight_quantizer is not"));
    assert!(error(std::slice::from_ref(&a), "no.key", "none").contains("no key no.key"));

    let text = fs::read_to_string(b.join("config.toml")).unwrap();
    let other = text.replace("warmup_steps = ", "warmup_steps = 1");
    assert_ne!(text, other);
    fs::write(b.join("config.toml"), other).unwrap();
    let told = error(&both, by, "none");
    assert!(told.contains("schedule.warmup_steps") && told.contains("ternary-32"), "{told}");
    fs::write(b.join("config.toml"), text.replace("steps = 4\n", "steps = 9\n")).unwrap();
    assert!(error(std::slice::from_ref(&b), by, "none").contains("not finished"));
    fs::write(b.join("config.toml"), text).unwrap();

    for (folder, hash) in [(&a, "aa"), (&b, "bb")] {
        fs::write(folder.join("run.json"), started_on(hash)).unwrap();
    }
    let told = error(&both, by, "none");
    assert!(told.contains("corpus is not that of") && told.contains("ternary-32"), "{told}");
    fs::write(b.join("run.json"), started_on("aa")).unwrap();
    assert!(scaling(&both, by, "none").is_ok());
    fs::remove_file(a.join("run.json")).unwrap();
    fs::remove_file(b.join("run.json")).unwrap();

    let c = run(dir.path(), "ternary", 32, (2e-3, 2), 3.1);
    assert!(error(&[a.clone(), b, c], by, "none").contains("share no seed"));
    let again = dir.path().join("again");
    fs::create_dir(&again).unwrap();
    for name in ["config.toml", "metrics.jsonl"] {
        fs::copy(a.join(name), again.join(name)).unwrap();
    }
    assert!(error(&[a, again], by, "none").contains("a second run"));
    assert!(error(&[dir.path().join("nowhere")], by, "none").contains("nowhere"));
}

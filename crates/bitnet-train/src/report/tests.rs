use std::fs;

use super::*;
use crate::config::tests::small;
use crate::metrics::{EvalMetric, LayerWeights, Log, Metric, Sample, WeightMetric};

/// A run folder as a run of `steps` of 40 steps leaves it.
fn folder(dir: &Path, name: &str, steps: u64, lr: f64) -> PathBuf {
    let folder = dir.join(name);
    fs::create_dir_all(&folder).unwrap();
    let mut config = small(dir);
    config.schedule.steps = 40;
    config.schedule.lr = lr;
    fs::write(folder.join("config.toml"), crate::config_file::to_toml(&config).unwrap()).unwrap();
    let mut log = Log::open(&folder.join("metrics.jsonl"), None).unwrap();
    let mut samples = Log::open(&folder.join("samples.jsonl"), None).unwrap();
    for step in 1..=steps {
        let x = step as f64;
        log.write(&Metric::Train(TrainMetric {
            step,
            loss: 2.0 + 5.0 / x,
            lr,
            grad_norm: 1.0,
            tokens: step * 128,
            tokens_per_second: 1280.0,
            seconds: x * 0.1,
            data_seconds: 0.01,
            rss_bytes: Some((100 + step) << 20),
        }))
        .unwrap();
        if step % 10 == 0 {
            let (val_loss, tokens, seconds) = (2.125 + lr, 64, x * 0.1);
            log.write(&Metric::Eval(EvalMetric { step, val_loss, tokens, seconds })).unwrap();
            let (layer, flips) = ("model.layers.0.mlp.up_proj".to_owned(), Some(7));
            let l = LayerWeights { layer, weights: 100, minus: 30, zero: 41, plus: 29, flips };
            let m = WeightMetric::new((step, step * 128, seconds), Some(step - 10), vec![l]);
            log.write(&Metric::Weights(m)).unwrap();
            let text = format!("sat on <b>{step}</b> & {name}");
            samples.write(&Sample { step, prompt: "the \"cat\"".into(), text }).unwrap();
        }
    }
    folder
}

/// Nothing in the page makes a browser load something.
fn assert_self_contained(page: &str) {
    for bad in ["http:", "https:", "src=", "url(", "@import", "<script", "<iframe"] {
        assert!(!page.contains(bad), "{bad}");
    }
    let links: Vec<&str> = page.split("href=").skip(1).collect();
    assert!(links.iter().all(|l| l.starts_with("\"data:,\"")), "{links:?}");
}

#[test]
fn a_page_holds_every_chart_figure_and_difference() {
    let dir = tempfile::tempdir().unwrap();
    let whole = folder(dir.path(), "whole", 40, 0.5);
    let part = folder(dir.path(), "part<1>", 20, 0.25);
    let out = dir.path().join("report.html");
    write(&[whole, part], &out).unwrap();
    let page = fs::read_to_string(&out).unwrap();
    assert_self_contained(&page);
    assert_eq!(page.matches("<svg").count(), 12);
    for chart in all_charts(&[]) {
        assert!(page.contains(&format!("aria-label=\"{}\"", chart.title)), "{}", chart.title);
    }
    for text in [
        "part&lt;1&gt;",
        "2.6250",
        "2.3750",
        "20 of 40",
        "140 MiB",
        "10.00 %",
        "41.00 %",
        "7.00 %",
        "<th>schedule.lr</th><td>0.5</td><td>0.25</td>",
        "sat on &lt;b&gt;40&lt;&#x2f;b&gt; &amp; whole",
        "0.mlp.up_proj",
        "unfinished",
    ] {
        assert!(page.contains(text), "{text}");
    }
    assert!(page.contains("<td class=\"best\">2.3750</td>"));
    assert!(!page.contains("<th>schedule.steps</th>"));
    assert!(page.contains("stroke=\"#2E7DD1\""));
}

#[test]
fn a_run_without_a_step_and_runs_of_one_name() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let runs = [folder(&a, "run", 0, 0.5), folder(&b, "run", 3, 0.5)];
    let page = render(&RunData::load_all(&runs[..1]).unwrap()).unwrap();
    assert!(page.contains("No step has been logged yet."));
    assert!(!page.contains("Differences"));
    let page = render(&RunData::load_all(&runs).unwrap()).unwrap();
    for run in &runs {
        let path = run.display().to_string().replace('/', "&#x2f;");
        assert!(page.matches(&path).count() > 1, "{path}");
    }
}

#[test]
fn what_is_no_run_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let good = folder(dir.path(), "good", 3, 0.5);
    let out = dir.path().join("report.html");
    let error = |folder: &Path| write(&[good.clone(), folder.to_path_buf()], &out).unwrap_err();
    let bad = dir.path().join("bad");
    let text = error(&bad).to_string();
    assert!(text.ends_with("bad: no run folder: there is no such folder"), "{text}");
    fs::create_dir(&bad).unwrap();
    assert!(error(&bad).to_string().contains("bad: no run folder: config.toml: "));
    fs::write(bad.join("config.toml"), "name = ").unwrap();
    assert!(error(&bad).to_string().contains("bad: no run folder: config.toml: "));
    fs::copy(good.join("config.toml"), bad.join("config.toml")).unwrap();
    assert!(error(&bad).to_string().contains("metrics.jsonl"));
    fs::write(bad.join("metrics.jsonl"), "{}\n{}\n").unwrap();
    let last = error(&bad);
    assert!(last.to_string().contains("metrics.jsonl:1: "), "{last}");
    assert_eq!(last.exit(), bitnet_core::Exit::BadInput);
    assert!(!out.exists());
}

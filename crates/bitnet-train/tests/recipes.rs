//! Whole runs with the parts of a recipe that are not BitNet b1.58: other quantisers,
//! float starts, teachers, masked documents.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;

use bitnet_core::Exit;
use bitnet_format::model::{OpenOptions, open};
use bitnet_train::device::DeviceChoice;
use bitnet_train::metrics::{self, Metric};
use bitnet_train::{RunOptions, Stop, Summary, TrainConfig, TrainError, checkpoint, run};
use common::prepared;

fn config(dir: &Path, run: &str, set: &[&str]) -> TrainConfig {
    let data = dir.join("data");
    if !data.exists() {
        prepared(dir, "data", 0);
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/tiny.toml");
    let mut all = [
        "model.vocab_size=320",
        "batch.tokens=256",
        "batch.sequence=64",
        "batch.micro_batch=2",
        "schedule.steps=40",
        "schedule.warmup_steps=4",
        "eval.every=0",
        "eval.windows=8",
        "sample.prompts=[]",
        "checkpoint.every=0",
    ]
    .map(ToOwned::to_owned)
    .to_vec();
    all.extend(set.iter().map(|s| (*s).to_owned()));
    let mut config = bitnet_train::config_file::load(&path, &all).unwrap();
    config.data.dir = data;
    config.run_dir = dir.join(run);
    config.validate().unwrap();
    config
}

fn train(config: &TrainConfig) -> Result<Summary, TrainError> {
    let config = config.clone();
    let options =
        RunOptions { config, device: DeviceChoice::Cpu.into(), resume: true, until: None };
    run(&options, &Stop::default())
}

fn losses(config: &TrainConfig) -> Vec<f64> {
    let all = metrics::read(&config.run_dir.join("metrics.jsonl")).unwrap();
    let loss = |m: &Metric| match m {
        Metric::Train(m) => Some(m.loss),
        _ => None,
    };
    all.iter().filter_map(loss).collect()
}

/// Every recipe learns, and what the packed format cannot hold is refused by what
/// opens the checkpoint for export, with the key.
#[test]
fn every_recipe_learns_and_only_some_can_be_packed() {
    let dir = tempfile::tempdir().unwrap();
    let cases: [(&str, &[&str], Option<&str>); 11] = [
        ("ternary", &[], None),
        ("binary", &["model.weight_quantizer=binary"], None),
        ("absmedian", &["model.recipe.weight_scale=absmedian"], None),
        ("float", &["model.weight_quantizer=none"], None),
        ("row", &["model.recipe.granularity=row"], Some("model.recipe.granularity = row")),
        ("group", &["model.recipe.granularity=16"], Some("model.recipe.granularity = 16")),
        ("trilm", &["model.recipe.activations=none"], Some("model.recipe.activations = none")),
        (
            "a4.8",
            &[
                "model.recipe.activations=\"a4.8\"",
                "model.recipe.o_proj_keep=0.5",
                "quantization.int8_until=0.5",
            ],
            Some("model.recipe.o_proj_keep = 0.5"),
        ),
        (
            "top-k",
            &["model.recipe.o_proj_keep=0.5", "model.recipe.down_proj_keep=0.25"],
            Some("model.recipe.o_proj_keep = 0.5"),
        ),
        ("int4", &["model.recipe.activations=int4"], Some("model.recipe.activations = int4")),
        (
            "v2",
            &["model.recipe.activations=int4", "model.recipe.hadamard=true"],
            Some("model.recipe.hadamard = true"),
        ),
    ];
    for (name, set, refused) in cases {
        let config = config(dir.path(), name, set);
        let summary = train(&config).unwrap();
        let all = losses(&config);
        // A vocabulary of 320: ln 320 = 5.77.
        assert!(all[0] > 5.0 && summary.val_loss.unwrap() < 4.5, "{name}: {summary}");
        let opened = open(&summary.checkpoint.unwrap(), &OpenOptions::default());
        match (opened, refused) {
            (Ok(_), None) => {}
            (Ok(_), Some(key)) => panic!("{name}: {key} was not refused"),
            (Err(e), None) => panic!("{name}: {e}"),
            (Err(e), Some(key)) => {
                let text = bitnet_core::exit::chain(&e);
                assert!(text.contains(key) && text.contains("cannot be packed"), "{text}");
            }
        }
    }
}

#[test]
fn a_run_that_switches_is_float_until_then() {
    let dir = tempfile::tempdir().unwrap();
    let float = config(dir.path(), "float", &["model.weight_quantizer=none"]);
    let switch = config(dir.path(), "switch", &["quantization.float_until=0.5"]);
    let blend = ["quantization.float_until=0.25", "quantization.blend=0.5"];
    let blend = config(dir.path(), "blend", &blend);
    for config in [&float, &switch, &blend] {
        train(config).unwrap();
    }
    let (float, switch, blend) = (losses(&float), losses(&switch), losses(&blend));
    // The first 20 updates are float ones, so that step 21 begins with the same
    // weights and is the first to quantise them.
    assert_eq!(float[..20], switch[..20]);
    assert!(switch[20] > float[20] && switch[39] < switch[20]);
    assert_eq!(float[..10], blend[..10]);
    assert_ne!(float[10], blend[10]);
}

#[test]
fn weights_come_from_another_run() {
    let dir = tempfile::tempdir().unwrap();
    let float = ["model.weight_quantizer=none", "model.sub_norms=false"];
    let first = config(dir.path(), "first", &float);
    let before = train(&first).unwrap().val_loss.unwrap();
    // As it was: the first loss is that of a trained model.
    let mut same = config(dir.path(), "same", &float);
    same.start = Some(bitnet_train::start::StartConfig { from: first.run_dir.clone() });
    same.schedule.steps = 2;
    train(&same).unwrap();
    assert!((losses(&same)[0] - before).abs() < 0.5, "{} {before}", losses(&same)[0]);
    // As ternary, with sub-norms that begin at 1.
    let mut ternary = config(dir.path(), "ternary", &[]);
    ternary.start = same.start.clone();
    train(&ternary).unwrap();
    let text = fs::read_to_string(ternary.run_dir.join("config.toml")).unwrap();
    assert!(text.contains("[start]"), "{text}");
    // Another shape, packed weights, nothing there.
    let mut other = config(dir.path(), "other", &["model.num_hidden_layers=1"]);
    other.start = same.start.clone();
    let error = train(&other).unwrap_err();
    assert_eq!(error.exit(), Exit::BadInput);
    assert!(error.to_string().contains("model.num_hidden_layers = 2"), "{error}");
    other.start = Some(bitnet_train::start::StartConfig { from: dir.path().join("nothing") });
    let error = train(&other).unwrap_err();
    assert_eq!(error.exit(), Exit::BadInput);
    assert!(error.to_string().contains("nothing"), "{error}");
}

#[test]
fn a_teacher_is_followed_and_resumed() {
    let dir = tempfile::tempdir().unwrap();
    let teacher = config(dir.path(), "teacher", &["model.weight_quantizer=none"]);
    train(&teacher).unwrap();
    let set = [
        &format!("distill.teacher=\"{}\"", teacher.run_dir.display()) as &str,
        "distill.logits=2.0",
        "distill.relations=1.0",
        "distill.relation_heads=2",
    ];
    let whole = config(dir.path(), "whole", &set);
    train(&whole).unwrap();
    let parts = config(dir.path(), "parts", &set);
    for until in [Some(7), Some(20), None] {
        let config = parts.clone();
        let options = RunOptions { config, device: DeviceChoice::Cpu.into(), resume: true, until };
        run(&options, &Stop::default()).unwrap();
    }
    assert_eq!(losses(&parts), losses(&whole));
    let last = |c: &TrainConfig| checkpoint::list(&c.run_dir).unwrap().pop().unwrap().1;
    let weights = |c: &TrainConfig| fs::read(last(c).join("model.safetensors")).unwrap();
    assert!(weights(&parts) == weights(&whole));
    // The teacher's share is in the loss, not in the validation loss.
    let plain = config(dir.path(), "plain", &[]);
    train(&plain).unwrap();
    assert!(losses(&whole)[0] > losses(&plain)[0]);
}

#[test]
fn masked_documents_change_what_is_seen() {
    let dir = tempfile::tempdir().unwrap();
    // Documents of some hundred tokens: sequences of 128 hold the ends of some.
    let long = ["batch.sequence=128", "batch.micro_batch=1"];
    let seen = config(dir.path(), "seen", &long);
    let masked = config(dir.path(), "masked", &[&long[..], &["data.mask_documents=true"]].concat());
    train(&seen).unwrap();
    train(&masked).unwrap();
    let (seen, masked) = (losses(&seen), losses(&masked));
    assert_ne!(seen, masked);
    assert!(masked[39] < masked[0] - 1.0);
}

/// Two corpora whose weights change half-way, taken up again in both halves.
#[test]
fn a_mixture_changes_its_weights_and_is_resumed() {
    let dir = tempfile::tempdir().unwrap();
    let first = config(dir.path(), "whole", &[]);
    // The same texts split otherwise are another corpus with the same tokenizer.
    let other = common::prepared_with(dir.path(), "other", 7, Some(&first.data.dir));
    let set = [&format!(
        "data.mixture=[{{dir={:?}, name=\"a\", weight=3.0, later=[[0.5, 0.0]]}}, {{dir={:?}, name=\"b\", weight=1.0}}]",
        first.data.dir, other
    ) as &str];
    let whole = config(dir.path(), "whole", &set);
    train(&whole).unwrap();
    let parts = config(dir.path(), "parts", &set);
    for until in [Some(9), Some(20), Some(31), None] {
        let config = parts.clone();
        let options = RunOptions { config, device: DeviceChoice::Cpu.into(), resume: true, until };
        run(&options, &Stop::default()).unwrap();
    }
    assert_eq!(losses(&parts), losses(&whole));
    // Four sequences a step: 20 · 4 · 3/4 of the first, then none.
    let state = |config: &TrainConfig| {
        let last = checkpoint::list(&config.run_dir).unwrap().pop().unwrap().1;
        checkpoint::load_state(&last).unwrap().batches
    };
    let bitnet_data::StreamState::Mixture(state) = state(&whole) else { panic!("a mixture") };
    let given = |i: usize| state.sources[i].batches.position;
    let windows = |i: usize| state.sources[i].batches.windows;
    let read = |i: usize| state.sources[i].batches.epoch * windows(i) + given(i);
    assert_eq!((read(0), read(1)), (60, 100));
    let mut plain = parts.clone();
    plain.data.mixture.clear();
    let error = train(&plain).unwrap_err();
    assert_eq!(error.exit(), Exit::BadInput);
    assert!(error.to_string().contains("was trained with data.mixture"), "{error}");
}

/// A model learns the answers of a chat, and the questions not at all.
#[test]
fn a_chat_is_learned_where_the_assistant_speaks() {
    use bitnet_data::{ChatOptions, PrepareOptions, Source, prepare};

    let dir = tempfile::tempdir().unwrap();
    let base = config(dir.path(), "base", &[]);
    train(&base).unwrap();
    let chat = dir.path().join("chat.jsonl");
    let line = |i: usize| {
        let (question, answer) =
            [("the cat", "sees the moon"), ("a dog", "likes some bread")][i % 2];
        format!(
            "{{\"messages\":[{{\"role\":\"user\",\"content\":\"{question} {i}?\"}},{{\"role\":\"assistant\",\"content\":\"{answer}.\"}}]}}\n"
        )
    };
    fs::write(&chat, (0..200).map(line).collect::<String>()).unwrap();
    let data = dir.path().join("chat");
    let template = dir.path().join("template.jinja");
    fs::write(&template, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
        .unwrap();
    let source = Source::Chat { paths: vec![chat] };
    let options = PrepareOptions {
        tokenizer: Some(base.data.dir.join("tokenizer.json")),
        chat: Some(ChatOptions { context: 64, template: Some(template) }),
        validation_share: 0.1,
        ..PrepareOptions::new(source, &data)
    };
    prepare(&options, &mut ()).unwrap();
    for (name, loss) in [("mean", "data.loss=mean"), ("sum", "data.loss=sum")] {
        let set = [loss, "data.mask_documents=true", "schedule.steps=80"];
        let mut tuned = config(dir.path(), name, &set);
        tuned.data.dir.clone_from(&data);
        tuned.start = Some(bitnet_train::start::StartConfig { from: base.run_dir.clone() });
        let summary = train(&tuned).unwrap();
        // Two answers, each known from its question: only they are counted.
        assert!(summary.val_loss.unwrap() < 1.5, "{name}: {summary}");
        assert!(losses(&tuned)[0] > 4.0);
        // What turns a chat into text goes with the model.
        let checkpoint = summary.checkpoint.unwrap();
        let template = fs::read_to_string(checkpoint.join("chat_template.jinja")).unwrap();
        assert!(template.contains("m.role"));
    }
}

//! Whole runs of a tiny model on the CPU: resumed bit for bit, stopped, refused.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use bitnet_core::Exit;
use bitnet_train::device::DeviceChoice;
use bitnet_train::devices::DeviceList;
use bitnet_train::metrics::{self, LayerWeights, Metric};
use bitnet_train::{RunOptions, Stop, Summary, TrainConfig, TrainError, checkpoint, run};
use common::prepared;

fn config(dir: &Path, run: &str) -> TrainConfig {
    let data = dir.join("data");
    if !data.exists() {
        prepared(dir, "data", 0);
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/tiny.toml");
    let set = [
        "model.vocab_size=320",
        "batch.tokens=128",
        "batch.sequence=32",
        "batch.micro_batch=2",
        "schedule.steps=20",
        "schedule.warmup_steps=4",
        "eval.every=5",
        "eval.windows=4",
        "sample.every=10",
        "sample.prompts=[\"the cat \"]",
        "sample.tokens=4",
        "sample.temperature=0.5",
        "checkpoint.every=5",
        "checkpoint.keep=2",
        "metrics.weights_every=3",
    ];
    let mut config = bitnet_train::config_file::load(&path, &set.map(ToOwned::to_owned)).unwrap();
    config.data.dir = data;
    config.run_dir = dir.join(run);
    config
}

fn options(config: &TrainConfig) -> RunOptions {
    let config = config.clone();
    RunOptions { config, device: DeviceChoice::Cpu.into(), resume: false, until: None }
}

fn train(config: &TrainConfig, resume: bool, until: Option<u64>) -> Result<Summary, TrainError> {
    run(&RunOptions { resume, until, ..options(config) }, &Stop::default())
}

/// What must not differ between two runs: everything but times.
fn losses(config: &TrainConfig) -> Vec<(u64, Vec<u64>)> {
    let all = metrics::read(&config.run_dir.join("metrics.jsonl")).unwrap();
    let numbers = |m: &Metric| match m {
        Metric::Train(m) => vec![m.loss.to_bits(), m.lr.to_bits(), m.grad_norm.to_bits(), m.tokens],
        Metric::Eval(m) => vec![m.val_loss.to_bits(), m.tokens],
        Metric::Weights(m) => {
            let layer = |l: &LayerWeights| [l.minus, l.zero, l.plus, l.flips.unwrap_or(u64::MAX)];
            let since = m.since.unwrap_or(u64::MAX);
            [since].into_iter().chain(m.layers.iter().flat_map(layer)).collect()
        }
    };
    all.iter().map(|m| (m.step(), numbers(m))).collect()
}

fn last(config: &TrainConfig) -> PathBuf {
    checkpoint::list(&config.run_dir).unwrap().pop().unwrap().1
}

#[test]
fn a_resumed_run_is_the_uninterrupted_one_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let whole = config(dir.path(), "whole");
    let summary = train(&whole, false, None).unwrap();
    assert_eq!((summary.steps, summary.tokens), (20, 20 * 128));
    let all = metrics::read(&whole.run_dir.join("metrics.jsonl")).unwrap();
    let counted = all.iter().filter_map(|m| match m {
        Metric::Weights(m) => Some((m.step, m.since)),
        _ => None,
    });
    let counted: Vec<_> = counted.collect();
    assert_eq!(counted[..3], [(0, None), (3, Some(0)), (6, Some(3))]);
    assert_eq!(counted[6..], [(18, Some(15)), (20, Some(18))]);
    let first = losses(&whole)[1].1[0];
    assert!(summary.train_loss.unwrap() < f64::from_bits(first));
    // Ten and ten, and stops between checkpoints and evaluations; one of the
    // stops is a kill: lines and folders beyond the checkpoint, half written.
    for (name, stops) in [("ten", &[10][..]), ("odd", &[3, 4, 11, 19])] {
        let parts = config(dir.path(), name);
        for &until in stops {
            train(&parts, true, Some(until)).unwrap();
            let log = parts.run_dir.join("metrics.jsonl");
            let torn = fs::read_to_string(&log).unwrap()
                + "{\"kind\":\"eval\",\"step\":99,\"val_loss\":1,\"tokens\":1,\"seconds\":1}\n{\"ki";
            fs::write(log, torn).unwrap();
            let half = parts.run_dir.join("checkpoints/.00000099.tmp-1");
            fs::create_dir(&half).unwrap();
            fs::write(half.join("model.safetensors"), "half").unwrap();
        }
        let resumed = train(&parts, true, None).unwrap();
        assert_eq!(resumed.val_loss, summary.val_loss);
        assert_eq!(losses(&parts), losses(&whole), "{name}");
        for file in ["model.safetensors", "optimizer.safetensors", "golden.json", "config.json"] {
            let read = |c: &TrainConfig| fs::read(last(c).join(file)).unwrap();
            assert!(read(&parts) == read(&whole), "{name}: {file}");
        }
        let samples = |c: &TrainConfig| fs::read(c.run_dir.join("samples.jsonl")).unwrap();
        assert_eq!(samples(&parts), samples(&whole), "{name}");
    }
    let steps: Vec<u64> = checkpoint::list(&whole.run_dir).unwrap().iter().map(|c| c.0).collect();
    assert_eq!(steps, [15, 20]);
    for file in ["config.toml", "loss.png", "loss.svg"] {
        assert!(whole.run_dir.join(file).is_file(), "{file}");
    }
    // A finished run that is resumed has nothing to do and says the same.
    let again = train(&whole, true, None).unwrap();
    assert_eq!((again.steps, again.checkpoint), (20, summary.checkpoint));
}

/// Trains a run at once and in three parts, the last on one thread, and compares them.
fn goes_on_bit_for_bit(whole: &TrainConfig, parts: &TrainConfig) {
    let summary = train(whole, false, None).unwrap();
    // The first line counts the weights.
    let first = f64::from_bits(losses(whole)[1].1[0]);
    assert!(summary.train_loss.unwrap() < first);
    for until in [3, 10] {
        train(parts, true, Some(until)).unwrap();
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    pool.install(|| train(parts, true, None)).unwrap();
    assert_eq!(losses(parts), losses(whole));
    for file in ["model.safetensors", "optimizer.safetensors"] {
        let read = |c: &TrainConfig| fs::read(last(c).join(file)).unwrap();
        assert!(read(parts) == read(whole), "{file}");
    }
}

/// Muon's momentum is part of a checkpoint, and its products add in an order that
/// threads do not change.
#[test]
fn muon_goes_on_bit_for_bit_and_wants_its_own_state() {
    use bitnet_train::optim::OptimizerKind;

    let dir = tempfile::tempdir().unwrap();
    let muon = |run| {
        let mut config = config(dir.path(), run);
        config.optimizer.kind = OptimizerKind::Muon;
        config.optimizer.momentum = Some(0.95);
        config.optimizer.clip_norm = 0.0;
        config
    };
    let (whole, parts) = (muon("whole"), muon("parts"));
    goes_on_bit_for_bit(&whole, &parts);
    // A matrix has one tensor of state with Muon, two with AdamW.
    let size = |c: &TrainConfig| fs::metadata(last(c).join("optimizer.safetensors")).unwrap().len();
    let adamw = config(dir.path(), "adamw");
    train(&adamw, false, Some(1)).unwrap();
    assert!(size(&whole) < size(&adamw));
    assert_ne!(losses(&adamw)[0].1[0], 0);
    for (run, kind, message) in [
        (&parts, &adamw, "is a state with optimizer.kind = \"muon\", the config says \"adamw\""),
        (&adamw, &parts, "is a state with optimizer.kind = \"adamw\", the config says \"muon\""),
    ] {
        let mut config = kind.clone();
        config.run_dir.clone_from(&run.run_dir);
        let error = train(&config, true, None).unwrap_err();
        assert_eq!(error.exit(), Exit::BadInput);
        assert!(error.to_string().ends_with(message), "{error}");
    }
}

/// Moments as bytes are part of a checkpoint as they are, and rounded alike by any number
/// of threads.
#[test]
fn moments_as_bytes_go_on_bit_for_bit_and_want_their_own_state() {
    use bitnet_train::optim::MomentType;

    let dir = tempfile::tempdir().unwrap();
    let bytes = |run| {
        let mut config = config(dir.path(), run);
        config.optimizer.moments = MomentType::Int8;
        config
    };
    let (whole, parts) = (bytes("whole"), bytes("parts"));
    goes_on_bit_for_bit(&whole, &parts);
    let size = |c: &TrainConfig| fs::metadata(last(c).join("optimizer.safetensors")).unwrap().len();
    let floats = config(dir.path(), "floats");
    train(&floats, false, Some(1)).unwrap();
    assert!(size(&whole) * 3 < size(&floats), "{} and {}", size(&whole), size(&floats));
    for (run, other, message) in [
        (&parts, &floats, "is a state with optimizer.moments = \"int8\", the config says \"f32\""),
        (&floats, &parts, "is a state with optimizer.moments = \"f32\", the config says \"int8\""),
    ] {
        let mut config = other.clone();
        config.run_dir.clone_from(&run.run_dir);
        let saved = || fs::read(run.run_dir.join("config.toml")).unwrap();
        let before = saved();
        let error = train(&config, true, None).unwrap_err();
        assert_eq!(error.exit(), Exit::BadInput);
        assert!(error.to_string().ends_with(message), "{error}");
        assert_eq!(saved(), before, "a run that is refused keeps its config");
    }
    // Older checkpoints do not say what their moments are: f32.
    let path = last(&floats).join("optimizer.safetensors");
    let bytes = fs::read(&path).unwrap();
    let key = b"\"moments\"";
    let at = bytes.windows(key.len()).position(|w| w == key).unwrap();
    let older = [&bytes[..at], b"\"earlier\"", &bytes[at + key.len()..]].concat();
    fs::write(&path, older).unwrap();
    train(&floats, true, Some(2)).unwrap();
}

#[test]
fn a_run_that_recomputes_is_the_same_run() {
    let dir = tempfile::tempdir().unwrap();
    let keep = config(dir.path(), "keep");
    let mut again = config(dir.path(), "again");
    again.batch.recompute = true;
    train(&keep, false, Some(6)).unwrap();
    train(&again, false, Some(6)).unwrap();
    assert_eq!(losses(&keep), losses(&again));
}

#[test]
fn accumulated_gradients_are_those_of_the_whole_batch() {
    let dir = tempfile::tempdir().unwrap();
    let mut split = config(dir.path(), "split");
    split.schedule.steps = 2;
    let mut whole = split.clone();
    whole.run_dir = dir.path().join("whole");
    whole.batch.micro_batch = 4;
    assert_eq!((split.batch.micro_steps(), whole.batch.micro_steps()), (2, 1));
    train(&split, false, None).unwrap();
    train(&whole, false, None).unwrap();
    let (a, b) = (losses(&split), losses(&whole));
    for i in [1, 3] {
        let (x, y) = (f64::from_bits(a[0].1[i]), f64::from_bits(b[0].1[i]));
        assert!((x / y - 1.0).abs() < 1e-4, "{x} and {y}");
    }
}

#[test]
fn an_interrupted_run_saves_and_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), "run");
    train(&config, false, Some(6)).unwrap();
    let stop = Stop::default();
    assert!(!stop.request());
    assert!(stop.request());
    let error = run(&RunOptions { resume: true, ..options(&config) }, &stop).unwrap_err();
    assert_eq!(error.exit(), Exit::Interrupted);
    let text = error.to_string();
    assert!(text.starts_with("interrupted after step 6; saved "), "{text}");
    assert!(text.ends_with(&format!("--resume --run {}", config.run_dir.display())), "{text}");
    assert_eq!(last(&config), config.run_dir.join("checkpoints/00000006"));
}

#[test]
fn a_loss_that_is_no_number_stops_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), "run");
    train(&config, false, Some(5)).unwrap();
    // The last four bytes of the file are an element of the last norm.
    let path = last(&config).join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    let before = losses(&config);
    let error = train(&config, true, None).unwrap_err();
    assert_eq!(error.exit(), Exit::Failed);
    let text = error.to_string();
    assert!(text.contains("loss is NaN at step 6"), "{text}");
    assert!(text.ends_with(&last(&config).display().to_string()), "{text}");
    assert_eq!(last(&config), config.run_dir.join("checkpoints/00000005"));
    assert_eq!(losses(&config), before);
}

#[test]
fn what_cannot_be_trained_is_refused_with_a_reason() {
    let dir = tempfile::tempdir().unwrap();
    let good = config(dir.path(), "run");
    type Case = (fn(&mut TrainConfig), Exit, &'static str);
    let cases: &[Case] = &[
        (|c| c.model.vocab_size = 300, Exit::Usage, "model.vocab_size = 300: the shards in "),
        (
            |c| c.batch.sequence = 129,
            Exit::Usage,
            "batch.sequence = 129: is longer than model.max_position_embeddings = 128",
        ),
        (|c| c.data.dir = "no/such/folder".into(), Exit::BadInput, "no/such/folder"),
        (
            |c| {
                c.model.max_position_embeddings = 1 << 20;
                c.batch.sequence = 1 << 20;
                c.batch.micro_batch = 1;
                c.batch.tokens = 1 << 20;
            },
            Exit::BadInput,
            "one window of context 1048576 needs 1048577",
        ),
    ];
    for (spoil, exit, message) in cases {
        let mut config = good.clone();
        spoil(&mut config);
        let error = train(&config, false, None).unwrap_err();
        assert_eq!(error.exit(), *exit, "{error}");
        let text = bitnet_core::exit::chain(&error);
        assert!(text.contains(message), "{text}");
    }
    assert!(!good.run_dir.join("config.toml").exists());
}

#[test]
fn a_run_that_cannot_be_gone_on_from_is_refused_with_a_reason() {
    let dir = tempfile::tempdir().unwrap();
    let good = config(dir.path(), "run");
    train(&good, false, Some(5)).unwrap();
    let error = train(&good, false, None).unwrap_err();
    assert_eq!(error.exit(), Exit::Usage);
    assert!(error.to_string().contains("has checkpoints up to step 5; go on with --resume"));
    let other = prepared(dir.path(), "other", 7);
    let mut cases: Vec<(TrainConfig, Exit, &str)> = Vec::new();
    let mut with = |change: &dyn Fn(&mut TrainConfig), exit, message| {
        let mut config = good.clone();
        change(&mut config);
        cases.push((config, exit, message));
    };
    with(&|c| c.model.hidden_act = bitnet_core::Activation::Silu, Exit::BadInput, "hidden_act");
    with(&|c| c.data.seed += 1, Exit::Usage, "data.seed");
    with(&|c| c.schedule.steps = 4, Exit::Usage, "schedule.steps = 4");
    with(&|c| c.data.dir = other.clone(), Exit::BadInput, "");
    for (config, exit, message) in cases {
        let error = train(&config, true, None).unwrap_err();
        assert_eq!(error.exit(), exit, "{error}");
        assert!(error.to_string().contains(message), "{error}");
    }
    for file in ["model.safetensors", "optimizer.safetensors", "state.json", "config.json"] {
        let path = last(&good).join(file);
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() / 2]).unwrap();
        let error = train(&good, true, None).unwrap_err();
        assert_eq!(error.exit(), Exit::BadInput, "{error}");
        assert!(error.to_string().contains(file), "{error}");
        fs::write(&path, whole).unwrap();
    }
    train(&good, true, None).unwrap();
}

#[test]
fn a_folder_that_cannot_be_written_leaves_earlier_checkpoints() {
    let dir = tempfile::tempdir().unwrap();
    let good = config(dir.path(), "run");
    train(&good, false, Some(5)).unwrap();
    let state = fs::read(last(&good).join("state.json")).unwrap();
    // The plot's place is taken by a folder: the first write after the checkpoint.
    fs::remove_file(good.run_dir.join("loss.svg")).unwrap();
    fs::create_dir(good.run_dir.join("loss.svg")).unwrap();
    let error = train(&good, true, Some(7)).unwrap_err();
    assert_eq!(error.exit(), Exit::Failed, "{error}");
    assert!(error.to_string().contains("loss.svg"), "{error}");
    let first = &checkpoint::list(&good.run_dir).unwrap()[0].1;
    assert_eq!(fs::read(first.join("state.json")).unwrap(), state);
    // A file where the folder of checkpoints should be: nothing can be saved.
    let mut blocked = good.clone();
    blocked.run_dir = dir.path().join("blocked");
    fs::create_dir(&blocked.run_dir).unwrap();
    fs::write(blocked.run_dir.join("checkpoints"), "").unwrap();
    let error = train(&blocked, false, None).unwrap_err();
    assert_eq!(error.exit(), Exit::Failed, "{error}");
    assert!(error.to_string().contains("checkpoints"), "{error}");
}

/// Several devices are one: here the CPU, named twice.
#[test]
fn several_devices_train_as_one() {
    let dir = tempfile::tempdir().unwrap();
    let two = DeviceList::new(DeviceChoice::Cpu, vec![DeviceChoice::Cpu]);
    let on = |device: &DeviceList, config: &TrainConfig, until| {
        let options = RunOptions { device: device.clone(), resume: true, until, ..options(config) };
        run(&options, &Stop::default()).unwrap()
    };
    // A micro-step for each: bit for bit, also where the run goes on with one.
    let (one, both) = (config(dir.path(), "one"), config(dir.path(), "both"));
    train(&one, false, None).unwrap();
    assert_eq!(on(&two, &both, Some(10)).device, "cpu,cpu");
    on(&DeviceChoice::Cpu.into(), &both, Some(12));
    on(&two, &both, None);
    assert_eq!(losses(&both), losses(&one));
    let weights = |c: &TrainConfig| fs::read(last(c).join("model.safetensors")).unwrap();
    assert!(weights(&both) == weights(&one));
    // Two for each: the order of additions differs.
    let halves = |name| {
        let mut config = config(dir.path(), name);
        (config.batch.micro_batch, config.schedule.steps) = (1, 5);
        config
    };
    let (one, both) = (halves("one-half"), halves("both-half"));
    train(&one, false, None).unwrap();
    on(&two, &both, None);
    let loss = |config: &TrainConfig| -> Vec<f64> {
        let all = metrics::read(&config.run_dir.join("metrics.jsonl")).unwrap();
        let loss = |m: &Metric| if let Metric::Train(m) = m { Some(m.loss) } else { None };
        all.iter().filter_map(loss).collect()
    };
    let (a, b) = (loss(&one), loss(&both));
    assert!(a.len() == 5 && a[0] == b[0], "{a:?} {b:?}");
    assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-3), "{a:?} {b:?}");
    // Three for two micro-steps.
    let three = DeviceList::new(DeviceChoice::Cpu, vec![DeviceChoice::Cpu; 2]);
    let config = config(dir.path(), "three");
    let error = run(&RunOptions { device: three, ..options(&config) }, &Stop::default());
    let error = error.unwrap_err();
    assert_eq!(error.exit(), Exit::Usage);
    assert!(error.to_string().contains("these are 3 devices, a step has 2 micro"), "{error}");
    assert!(!config.run_dir.join("config.toml").exists());
}

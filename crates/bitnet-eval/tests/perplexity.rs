//! Perplexity end to end: random models, real shards and the binary, compared
//! with the mean of the formula, token by token.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

// The engine's makers of small random models.
#[path = "../../bitnet-engine/tests/common/mod.rs"]
mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use bitnet_core::{ModelConfig, WeightQuantizer};
use bitnet_data::{ChatOptions, FileOptions, PrepareOptions, Source, Split, prepare};
use bitnet_engine::{LoadOptions, Model, Session, SessionOptions};
use bitnet_eval::{
    EngineModel, LanguageModel, Mode, PerplexityOptions, TokenSource, TokenText, open_shards,
    perplexity,
};
use bitnet_format::gguf::blocks::RowType;
use bitnet_format::pack::DenseType;
use common::{EOS, Random, RandomModel, tokenizer_json, variants};

/// A model, and shards made with its tokenizer.
struct Setup {
    dir: tempfile::TempDir,
    model: PathBuf,
    data: PathBuf,
}

impl Setup {
    fn new() -> Self {
        let random = RandomModel::new(&ModelConfig::tiny(), 1);
        let dir = tempfile::tempdir().unwrap();
        let model = random.file().write(&dir);
        let data = shards(dir.path(), "data", &tokenizer_json());
        Self { dir, model, data }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

/// Prepares forty short documents.
fn shards(dir: &Path, name: &str, tokenizer: &str) -> PathBuf {
    let text = dir.join(format!("{name}-text"));
    fs::create_dir(&text).unwrap();
    for i in 0..40 {
        let line = format!("Document {i}: a naïve text of {} words.\n", i * i);
        fs::write(text.join(format!("{i}.txt")), line.repeat(3)).unwrap();
    }
    let json = dir.join(format!("{name}-tokenizer.json"));
    fs::write(&json, tokenizer).unwrap();
    let source = Source::Files(FileOptions { paths: vec![text], ..FileOptions::default() });
    let mut options = PrepareOptions::new(source, dir.join(name));
    options.tokenizer = Some(json);
    options.validation_share = 0.5;
    prepare(&options, &mut ()).unwrap();
    dir.join(name)
}

/// Prepares twenty conversations, packed into rows of `context` inputs.
fn chat_shards(dir: &Path, context: usize) -> PathBuf {
    let (lines, json) = (dir.join("chat.jsonl"), dir.join("chat-tokenizer.json"));
    let line = |i: usize| {
        let (question, answer) = (format!("What is {i}?"), "One more. ".repeat(i % 4 + 1));
        let message = |role: &str, text: &str| serde_json::json!({"role": role, "content": text});
        let messages = [message("user", &question), message("assistant", &answer)];
        format!("{}\n", serde_json::json!({ "messages": messages }))
    };
    fs::write(&lines, (0..20).map(line).collect::<String>()).unwrap();
    fs::write(&json, tokenizer_json()).unwrap();
    let mut options = PrepareOptions::new(Source::Chat { paths: vec![lines] }, dir.join("chat"));
    options.tokenizer = Some(json);
    options.validation_share = 0.5;
    options.chat = Some(ChatOptions { context, template: None });
    prepare(&options, &mut ()).unwrap();
    dir.join("chat")
}

/// Tokens that stand for no text.
struct NoText;

impl TokenText for NoText {
    fn bytes(&self, _: u32) -> &[u8] {
        &[]
    }
}

/// The mean over windows, token by token, with softmax as its definition reads.
fn naive_nats(model: &Model, windows: impl Iterator<Item = Vec<u32>>) -> f64 {
    let mut session = Session::new(model, &SessionOptions::default()).unwrap();
    let (mut sum, mut count) = (0.0, 0);
    for tokens in windows {
        session.reset();
        for pair in tokens.windows(2) {
            let logits = session.decode(pair[0]).unwrap();
            let total: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
            sum -= (f64::from(logits[pair[1] as usize]).exp() / total).ln();
            count += 1;
        }
    }
    sum / f64::from(count)
}

fn eval(args: &[&dyn AsRef<std::ffi::OsStr>]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bitnet-eval"));
    command.env_remove("BITNET_ISA").env_remove("RUST_LOG");
    args.iter().for_each(|a| {
        command.arg(a.as_ref());
    });
    command.output().unwrap()
}

fn json(output: &Output) -> serde_json::Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn scores_every_kind_of_model_as_the_formula_does() {
    for (name, config) in variants() {
        let random = RandomModel::new(&config, 3);
        let (model, _dir) = random.open();
        let tokens = Random(5).tokens(40, &config);
        let session = Session::new(&model, &SessionOptions::default()).unwrap();
        let source = TokenSource::Tokens { tokens: tokens.clone(), text: true };
        let options = PerplexityOptions {
            mode: Mode::Windows,
            context: 16,
            stride: 8,
            max_tokens: None,
            max_windows: None,
            bos: None,
        };
        let mut scorer = EngineModel::new(session);
        let found = perplexity(&mut scorer, &source, &options, &NoText, &mut |_, _, _| {}).unwrap();
        let windows = (0..39).step_by(16).map(|s| tokens[s..(s + 17).min(40)].to_vec());
        let expected = naive_nats(&model, windows);
        assert!((found.nats - expected).abs() < 1e-9, "{name}: {} and {expected}", found.nats);
        assert_eq!(found.tokens, 39);
    }
}

#[test]
fn a_target_outside_the_vocabulary_is_an_error() {
    let random = RandomModel::new(&ModelConfig::tiny(), 3);
    let (model, _dir) = random.open();
    let session = Session::new(&model, &SessionOptions::default()).unwrap();
    let error = EngineModel::new(session).score(&[1, 2, 320], 1).unwrap_err();
    assert_eq!(error.exit().code(), 3);
    assert!(error.to_string().contains("token 320 at position 2"), "{error}");
}

#[test]
fn a_shared_beginning_changes_no_bit() {
    let random = RandomModel::new(&ModelConfig::tiny(), 3);
    let (model, _dir) = random.open();
    let scorer = || EngineModel::new(Session::new(&model, &SessionOptions::default()).unwrap());
    let tokens = Random(5).tokens(40, &random.config);
    let mut shared = scorer();
    for (len, first) in [(30, 20), (40, 20), (40, 39), (25, 1), (40, 12), (40, 12)] {
        let found = shared.score(&tokens[..len], first).unwrap();
        assert_eq!(found, scorer().score(&tokens[..len], first).unwrap(), "{len}, {first}");
        assert_eq!(found.len(), len - first);
        assert_eq!(found[..], scorer().score(&tokens[..len], 1).unwrap()[first - 1..]);
    }
    let mut other = tokens.clone();
    other[15] += 1;
    let found = shared.score(&other, 20).unwrap();
    assert_eq!(found, scorer().score(&other, 20).unwrap());
    assert_eq!(shared.score(&tokens, 40).unwrap(), []);
}

#[test]
fn of_conversations_only_what_training_learns_is_scored() {
    let s = Setup::new();
    let data = chat_shards(s.dir.path(), 95);
    let source = open_shards(&data, Split::Validation, &tokenizer_json()).unwrap();
    let TokenSource::Shards(dataset) = &source else { panic!("shards expected") };
    let model = Model::open(&s.model, &LoadOptions::default()).unwrap();
    let mut session = Session::new(&model, &SessionOptions::default()).unwrap();
    let (mut sum, mut count, mut bytes) = (0.0, 0u64, 0u64);
    let mut rows = dataset.windows(95).unwrap();
    while let Some(batch) = rows.next_batch(1).unwrap() {
        session.reset();
        let mask = batch.loss_mask.unwrap();
        for ((input, target), counts) in batch.inputs.iter().zip(&batch.targets).zip(mask) {
            let logits = session.decode(*input).unwrap();
            if counts != 0 {
                let total: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
                sum -= (f64::from(logits[*target as usize]).exp() / total).ln();
                count += 1;
                bytes += u64::from(*target != EOS);
            }
        }
    }
    let args: [&dyn AsRef<std::ffi::OsStr>; 6] =
        [&"perplexity", &s.model, &"--data", &data, &"--json", &"-"];
    let result = json(&eval(&args));
    assert_eq!((&result["tokens"], &result["bytes"]), (&count.into(), &bytes.into()));
    assert_eq!(result["context"], 95, "the rows'");
    assert!(count < dataset.tokens() / 2, "answers alone: {count} of {}", dataset.tokens());
    let nats = result["nats"].as_f64().unwrap();
    assert!((nats - sum / count as f64).abs() < 1e-9, "{nats}");
    // "One more. " is two words, and the last space is trimmed away.
    assert_eq!(result["words"].as_u64().unwrap() % 2, 0);
    for more in [["--context", "64"], ["--mode", "rolling"], ["--mode", "sliding"]] {
        let output = eval(&[&args[..4], &[&more[0], &more[1]]].concat());
        assert_eq!(output.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&output.stderr).contains("rows of 95 inputs"));
    }
}

#[test]
fn documents_of_texts_and_of_shards_roll_alike() {
    let s = Setup::new();
    let documents = ["One document of some words.", "Zwei: ein längeres Dokument. ", "x"];
    let (jsonl, blank) = (s.path("d.jsonl"), s.path("d.txt"));
    let line = |d: &&str| format!("{}\n", serde_json::json!({"page": d}));
    fs::write(&jsonl, documents.iter().map(line).collect::<String>()).unwrap();
    fs::write(&blank, documents.join("\n\n")).unwrap();
    let model = Model::open(&s.model, &LoadOptions::default()).unwrap();
    let whole = documents
        .iter()
        .map(|d| std::iter::once(EOS).chain(d.bytes().map(u32::from)).collect::<Vec<_>>());
    let nats = naive_nats(&model, whole);
    let run = |more: &[&dyn AsRef<std::ffi::OsStr>]| {
        let args: [&dyn AsRef<std::ffi::OsStr>; 6] =
            [&"perplexity", &s.model, &"--mode", &"rolling", &"--json", &"-"];
        json(&eval(&[&args[..], more].concat()))
    };
    let bytes: usize = documents.iter().map(|d| d.len()).sum();
    let found = run(&[&"--text", &jsonl, &"--field", &"page"]);
    assert!((found["nats"].as_f64().unwrap() - nats).abs() < 1e-9, "{nats}");
    assert_eq!((&found["documents"], &found["tokens"]), (&3.into(), &bytes.into()));
    // re.split(r"\s+", ...) has 5, 5 (an empty one at the end) and 1 parts.
    assert_eq!((&found["words"], &found["bytes"]), (&11.into(), &bytes.into()));
    let total = nats * bytes as f64;
    let word = found["word_perplexity"].as_f64().unwrap();
    assert!((word.ln() - total / 11.0).abs() < 1e-9);
    let bits = found["bits_per_byte"].as_f64().unwrap();
    assert!((bits - total / bytes as f64 / std::f64::consts::LN_2).abs() < 1e-9);
    // The shards' documents, in their own order, and their end tokens not scored.
    let shards = run(&[&"--data", &s.data, &"--context", &"40"]);
    let source = open_shards(&s.data, Split::Validation, &tokenizer_json()).unwrap();
    let mut tokens = Vec::new();
    source.read(0, source.len() as usize, &mut tokens).unwrap();
    let ends = tokens.iter().filter(|t| **t == EOS).count();
    assert_eq!(shards["documents"], ends);
    assert_eq!(shards["tokens"], tokens.len() - ends);
    // Split at blank lines, a document loses the space at its end or not; two are equal.
    let split = run(&[&"--text", &blank, &"--documents", &"blank-line"]);
    assert_eq!(split["documents"], 3);
    // Clean-up changes what is scored and not what is counted.
    let wiki = s.path("w.txt");
    fs::write(&wiki, " = T = \n\n a , b @-@ c \n = U = \n d \n").unwrap();
    let plain = run(&[&"--text", &wiki, &"--documents", &"wikitext"]);
    let clean = run(&[&"--text", &wiki, &"--documents", &"wikitext", &"--detokenize", &"wikitext"]);
    assert_eq!(plain["documents"], 2);
    assert!(clean["tokens"].as_u64() < plain["tokens"].as_u64());
    assert_eq!((&clean["words"], &clean["bytes"]), (&plain["words"], &plain["bytes"]));
}

#[test]
fn several_sources_have_an_arithmetic_mean() {
    let s = Setup::new();
    let (a, b) = (s.path("a.txt"), s.path("b.txt"));
    fs::write(&a, "some text ".repeat(30)).unwrap();
    fs::write(&b, "ÄÖÜ".repeat(40)).unwrap();
    let run = |texts: &[&dyn AsRef<std::ffi::OsStr>]| {
        let args: [&dyn AsRef<std::ffi::OsStr>; 8] =
            [&"perplexity", &s.model, &"--mode", &"blocks", &"--context", &"32", &"--json", &"-"];
        json(&eval(&[&args[..], texts].concat()))
    };
    let (one, two, both) =
        (run(&[&"--text", &a]), run(&[&"--text", &b]), run(&[&"--text", &a, &"--text", &b]));
    let ppl = |v: &serde_json::Value| v["perplexity"].as_f64().unwrap();
    assert_eq!(one["tokens"], 300 / 32 * 31);
    assert_eq!(both["sources"][0]["nats"], one["nats"]);
    assert_eq!(both["sources"][1]["perplexity"], two["perplexity"]);
    assert!((ppl(&both["mean"]) - (ppl(&one) + ppl(&two)) / 2.0).abs() < 1e-9);
    assert!(one["perplexity_stderr"].as_f64().unwrap() > 0.0);
    // On the terminal each source and the mean.
    let output =
        eval(&[&"perplexity", &s.model, &"--text", &a, &"--text", &b, &"--context", &"32"]);
    let table = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(table.contains("mean of 2 sources") && table.matches("word perplexity").count() == 3);
}

#[test]
fn the_windows_over_shards_are_those_of_training() {
    let s = Setup::new();
    let source = open_shards(&s.data, Split::Validation, &tokenizer_json()).unwrap();
    let TokenSource::Shards(dataset) = &source else { panic!("shards expected") };
    let mut windows = Vec::new();
    let mut training = dataset.windows(24).unwrap();
    while let Some(batch) = training.next_batch(3).unwrap() {
        for (inputs, targets) in batch.inputs.chunks(24).zip(batch.targets.chunks(24)) {
            windows.push([inputs, &targets[23..]].concat());
        }
    }
    let output =
        eval(&[&"perplexity", &s.model, &"--data", &s.data, &"--context", &"24", &"--json", &"-"]);
    let result = json(&output);
    assert_eq!(result["windows"], windows.len());
    assert_eq!(result["tokens"], windows.len() * 24);
    let opened = Model::open(&s.model, &LoadOptions::default()).unwrap();
    let expected = naive_nats(&opened, windows.iter().cloned());
    let nats = result["nats"].as_f64().unwrap();
    assert!((nats - expected).abs() < 1e-9, "{nats} and {expected}");
    // Bytes are tokens here, and end tokens are no text.
    let scored = windows.iter().flat_map(|w| &w[1..]);
    let bytes = scored.filter(|t| **t != EOS).count();
    assert_eq!(result["bytes"], bytes);
    let bits = nats * (windows.len() * 24) as f64 / std::f64::consts::LN_2 / bytes as f64;
    assert!((result["bits_per_byte"].as_f64().unwrap() - bits).abs() < 1e-9);
    // The first windows alone, and a loss that threads do not change.
    let two = json(&eval(&[
        &"perplexity",
        &s.model,
        &"--data",
        &s.data,
        &"--context",
        &"24",
        &"--windows",
        &"2",
        &"--threads",
        &"3",
        &"--json",
        &"-",
    ]));
    let expected = naive_nats(&opened, windows.into_iter().take(2));
    assert!((two["nats"].as_f64().unwrap() - expected).abs() < 1e-9);
    assert_eq!(
        (&two["tokens"], &two["threads"], &two["kv"]),
        (&48.into(), &3.into(), &"f32".into())
    );
    assert_eq!((&two["split"], &two["mode"]), (&"val".into(), &"windows".into()));
}

#[test]
fn scores_a_text_in_every_mode_and_writes_the_json_file() {
    let s = Setup::new();
    let (text, out) = (s.path("t.txt"), s.path("out.json"));
    fs::write(&text, "ünïcode und mehr. ".repeat(30)).unwrap();
    let bytes = fs::metadata(&text).unwrap().len();
    for (mode, context, scored) in [
        ("windows", 64, bytes - 1),
        ("sliding", 64, bytes - 1),
        ("llama-cpp", 64, bytes / 64 * (64 - 32 - 1)),
    ] {
        let output = eval(&[
            &"perplexity",
            &s.model,
            &"--text",
            &text,
            &"--mode",
            &mode,
            &"--context",
            &context.to_string(),
            &"--json",
            &out,
        ]);
        let table = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(table.contains("bits per byte") && table.contains(mode), "{table}");
        let result: serde_json::Value = serde_json::from_slice(&fs::read(&out).unwrap()).unwrap();
        assert_eq!(result["tokens"], scored, "{mode}");
        let nats = result["nats"].as_f64().unwrap();
        let ppl = result["perplexity"].as_f64().unwrap();
        assert!((ppl.ln() - nats).abs() < 1e-9 && nats > 0.0);
        assert_eq!(result["data_hash"].as_str().unwrap().len(), 64);
    }
}

#[test]
fn bad_usage_and_bad_files_are_told_apart() {
    let s = Setup::new();
    let spaced = tokenizer_json().replace("\"version\"", " \"version\"");
    let other = shards(s.dir.path(), "other", &spaced);
    let (missing, foreign, cut) =
        (s.path("missing.gguf"), s.path("foreign.gguf"), s.path("cut.gguf"));
    fs::write(&foreign, "not a model").unwrap();
    let whole = fs::read(&s.model).unwrap();
    fs::write(&cut, &whole[..whole.len() - 100]).unwrap();
    let (short, binary, empty) = (s.path("short.txt"), s.path("binary.txt"), s.path("empty.txt"));
    fs::write(&short, "x").unwrap();
    fs::write(&binary, b"ab\xff\xfe").unwrap();
    fs::write(&empty, "").unwrap();
    let (model, data) = (s.model.as_path(), s.data.as_path());
    let text = s.path("text.txt");
    fs::write(&text, "text ".repeat(100)).unwrap();
    type Args<'a> = Vec<&'a dyn AsRef<std::ffi::OsStr>>;
    let cases: Vec<(Args<'_>, i32, &str)> = vec![
        (vec![&"perplexity", &missing, &"--data", &data], 3, "missing.gguf: cannot be read"),
        (vec![&"perplexity", &foreign, &"--data", &data], 3, "foreign.gguf: not a GGUF file"),
        (vec![&"perplexity", &cut, &"--data", &data], 3, "cut.gguf"),
        (vec![&"perplexity", &model], 2, "--data"),
        (vec![&"perplexity", &model, &"--data", &data, &"--text", &text], 2, "--text"),
        (vec![&"perplexity", &model, &"--data", &missing], 3, "missing.gguf"),
        (vec![&"perplexity", &model, &"--data", &other], 3, "another tokenizer"),
        (
            vec![&"perplexity", &model, &"--data", &data, &"--context", &"129"],
            2,
            "context 129 is longer than the model's context of 128",
        ),
        (vec![&"perplexity", &model, &"--data", &data, &"--context", &"0"], 2, "context 0"),
        (vec![&"perplexity", &model, &"--data", &data, &"--stride", &"4"], 2, "--stride is for"),
        (
            vec![
                &"perplexity",
                &model,
                &"--text",
                &text,
                &"--mode",
                &"sliding",
                &"--stride",
                &"128",
            ],
            2,
            "stride 128",
        ),
        (vec![&"perplexity", &model, &"--data", &data, &"--mode", &"median"], 2, "median"),
        (
            vec![&"perplexity", &model, &"--data", &data, &"--detokenize", &"wikitext"],
            2,
            "--detokenize is for",
        ),
        (
            vec![&"perplexity", &model, &"--text", &text, &"--field", &"page"],
            2,
            "--field page: no --text is .jsonl or .parquet",
        ),
        (
            vec![&"perplexity", &model, &"--text", &text, &"--documents", &"file"],
            2,
            "--documents is for --mode rolling, not windows",
        ),
        (
            vec![
                &"perplexity",
                &model,
                &"--text",
                &text,
                &"--mode",
                &"rolling",
                &"--documents",
                &"pages",
            ],
            2,
            "`pages` is none of file",
        ),
        (vec![&"perplexity", &model, &"--text", &short, &"--mode", &"blocks"], 3, "at least 128"),
        (vec![&"perplexity", &model, &"--data", &data, &"--kv", &"f8"], 2, "f8"),
        (vec![&"perplexity", &model, &"--data", &data, &"--threads", &"0"], 2, "threads"),
        (vec![&"perplexity", &model, &"--data", &data, &"--frobnicate"], 2, "--frobnicate"),
        (vec![&"perplexity", &model, &"--text", &short], 3, "1 tokens are too few"),
        (
            vec![&"perplexity", &model, &"--text", &short, &"--mode", &"llama-cpp"],
            3,
            "at least 256",
        ),
        (vec![&"perplexity", &model, &"--text", &binary], 3, "not UTF-8 text (byte 2)"),
        (vec![&"perplexity", &model, &"--text", &empty], 3, "empty.txt: empty"),
        (vec![&"perplexity", &model, &"--text", &missing], 3, "missing.gguf: cannot be read"),
        (vec![&"bench", &missing], 3, "missing.gguf"),
        (vec![&"bench", &model, &missing], 3, "missing.gguf"),
        (vec![&"bench"], 2, "MODEL"),
        (vec![&"bench", &model, &"--batch", &"5000"], 2, "--batch 5000: at most 1024"),
        (vec![&"bench", &model, &"--isa", &"mmx"], 2, "unknown instruction set `mmx`"),
        (vec![&"bench", &model, &"--repeats", &"0"], 2, "nothing to measure"),
        (vec![&"bench", &model, &"--prompt", &"129"], 2, "--prompt 129 is longer"),
        (vec![&"bench", &model, &"--prompt", &"0", &"--generate", &"0"], 2, "nothing to measure"),
        (vec![&"frobnicate"], 2, "frobnicate"),
    ];
    for (args, code, words) in cases {
        let output = eval(&args);
        let message = String::from_utf8_lossy(&output.stderr);
        let shown: Vec<_> = args.iter().map(|a| a.as_ref()).collect();
        assert_eq!(output.status.code(), Some(code), "{shown:?}: {message}");
        assert!(message.contains(words), "`{words}` is not in: {message}");
        assert!(!message.contains("panicked"), "{message}");
    }
}

#[test]
fn help_shows_examples() {
    for command in ["perplexity", "bench"] {
        let output = eval(&[&command, &"--help"]);
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(text.contains("Examples:") && text.contains("JSON"), "{text}");
    }
}

/// The fixtures of the importer: a folder, and the same model in a GGUF file.
#[test]
fn a_model_of_another_tool_scores_as_its_packed_file() {
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("book.txt");
    fs::write(&text, "Forty words, and forty more of them.\n".repeat(4)).unwrap();
    let tokenizer = dir.path().join("tokenizer.json");
    fs::write(&tokenizer, tokenizer_json()).unwrap();
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let folder = crates.join("bitnet-engine/tests/fixtures/bitnet_tiny_packed");
    let gguf = crates.join("bitnet-format/tests/fixtures/tiny-tq2_0.gguf");
    let mut found = Vec::new();
    for (src, act) in [(folder, None), (gguf, Some(bitnet_core::Activation::Relu2))] {
        let source = bitnet_engine::OpenOptions {
            hidden_act: act,
            tokenizer: Some(tokenizer.clone()),
            ..Default::default()
        };
        let opened = Model::open(&src, &LoadOptions { source, ..LoadOptions::default() }).unwrap();
        let packed = dir.path().join("packed.gguf");
        fs::write(&packed, opened.as_bytes()).unwrap();
        let nats = |model: &Path, more: &[&dyn AsRef<std::ffi::OsStr>]| {
            let args: [&dyn AsRef<std::ffi::OsStr>; 8] =
                [&"perplexity", &model, &"--text", &text, &"--context", &"32", &"--json", &"-"];
            json(&eval(&[&args[..], more].concat()))["nats"].as_f64().unwrap()
        };
        let direct = match act {
            None => nats(&src, &[&"--tokenizer", &tokenizer]),
            Some(_) => nats(&src, &[&"--tokenizer", &tokenizer, &"--hidden-act", &"relu2"]),
        };
        assert_eq!(direct, nats(&packed, &[]), "{}", src.display());
        found.push(direct);
    }
    assert!((found[0] - found[1]).abs() < 1e-3, "{found:?}");
    // A float twin as rows of integers, made on opening and kept in a file.
    let config = ModelConfig { weight_quantizer: WeightQuantizer::None, ..ModelConfig::tiny() };
    let twin = RandomModel::new(&config, 1).file().write(&dir);
    let dense = DenseType::Rows(RowType::Int4);
    let opened = Model::open(&twin, &LoadOptions { dense, ..LoadOptions::default() }).unwrap();
    let packed = dir.path().join("int4.gguf");
    fs::write(&packed, opened.as_bytes()).unwrap();
    let nats = |model: &Path, more: &[&dyn AsRef<std::ffi::OsStr>]| {
        let args: [&dyn AsRef<std::ffi::OsStr>; 6] =
            [&"perplexity", &model, &"--text", &text, &"--json", &"-"];
        json(&eval(&[&args[..], more].concat()))["nats"].as_f64().unwrap()
    };
    let direct = nats(&twin, &[&"--dense", &"int4"]);
    assert_eq!(direct, nats(&packed, &[]));
    assert_ne!(direct, nats(&twin, &[]));
    let refused = eval(&[
        &"perplexity",
        &packed,
        &"--text",
        &text,
        &"--ptq",
        &"ternary",
        &"--dense",
        &"int4",
    ]);
    assert_eq!(refused.status.code(), Some(2));
    assert_eq!(eval(&[&"bench", &dir.path(), &"--prompt", &"4"]).status.code(), Some(3));
}

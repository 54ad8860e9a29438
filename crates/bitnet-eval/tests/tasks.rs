//! Tasks: the prompts of every task against expectations written by hand from
//! lm-evaluation-harness' task files, and the binary on a random model against scores
//! computed token by token.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

// The engine's makers of small random models.
#[path = "../../bitnet-engine/tests/common/mod.rs"]
mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use bitnet_core::ModelConfig;
use bitnet_engine::{KvType, LoadOptions, Model, Session, SessionOptions};
use bitnet_eval::tasks::{Builtin, Fields, Kind, Question, Task};
use bitnet_eval::{BatchedModel, EngineModel, LanguageModel, Sequence};
use common::{EOS, Random, RandomModel};
use serde_json::{Value, json};

fn question(task: Builtin, row: &Value) -> Result<Question, String> {
    task.question(&Fields(row.as_object().unwrap()))
}

fn answers(prompt: &str, choices: &[&str], gold: usize) -> Question {
    let choices = choices.iter().map(|c| (*c).to_owned()).collect();
    Question::Answers { prompt: prompt.to_owned(), choices, gold }
}

#[test]
fn arc_and_openbookqa_read_both_schemas() {
    let choices = json!([{"text": "up ", "label": "A"}, {"text": "down", "label": "B"}]);
    let columns = json!({"text": ["up ", "down"], "label": ["A", "B"]});
    let original = json!({
        "id": "x", "question": {"stem": "Where to?", "choices": choices}, "answerKey": "B",
    });
    let hub = json!({"id": "x", "question": "Where to?", "choices": columns, "answerKey": "B"});
    let expected = answers("Question: Where to?\nAnswer:", &["up ", "down"], 1);
    for task in [Builtin::ArcEasy, Builtin::ArcChallenge] {
        for row in [&original, &hub] {
            assert_eq!(question(task, row).unwrap(), expected);
        }
    }
    let hub =
        json!({"id": "x", "question_stem": "Where to?", "choices": columns, "answerKey": " A"});
    assert_eq!(question(Builtin::OpenBookQa, &hub).unwrap().gold(), 0);
    let expected = answers("Where to?", &["up ", "down"], 1);
    assert_eq!(question(Builtin::OpenBookQa, &original).unwrap(), expected);
}

#[test]
fn hellaswag_is_cleaned_as_the_harness_cleans_it() {
    let row = |ctx_b: &str, label: Value| {
        json!({
            "ind": 4, "activity_label": " Baking", "ctx_a": "Mix [header] it [title] well  now",
            "ctx_b": ctx_b, "ctx": "unused", "label": label, "split": "val",
            "endings": ["[substeps] Go. ", "a [b\nc] d", "x    y", "[un] [title] [closed"],
        })
    };
    // Computed with preprocess() and str.capitalize() of the harness.
    let expected = answers(
        "Baking: Mix it. well now The man",
        &[" Go.", "a [b\nc] d", "x  y", ". [closed"],
        3,
    );
    assert_eq!(question(Builtin::HellaSwag, &row("the MAN", "3".into())).unwrap(), expected);
    assert_eq!(question(Builtin::HellaSwag, &row("the MAN", 3.into())).unwrap(), expected);
    for (ctx_b, end) in [("", "well now"), ("ßa", "now Ssa"), ("ΑΣ", "now Ας"), ("éÉ", "now Éé")]
    {
        let Question::Answers { prompt, .. } =
            question(Builtin::HellaSwag, &row(ctx_b, 0.into())).unwrap()
        else {
            panic!()
        };
        assert!(prompt.ends_with(end), "{prompt:?}");
    }
}

#[test]
fn winogrande_fills_the_blank() {
    let row = json!({
        "qID": "q", "sentence": "Ann saw Eve because _ was _ tall. ", "option1": "Ann",
        "option2": "Eve", "answer": "2",
    });
    let expected = Question::Contexts {
        contexts: vec!["Ann saw Eve because Ann".into(), "Ann saw Eve because Eve".into()],
        continuation: "was _ tall.".into(),
        gold: 1,
    };
    assert_eq!(question(Builtin::WinoGrande, &row).unwrap(), expected);
}

#[test]
fn piqa_and_boolq_read_both_schemas() {
    let row = json!({"goal": "Open it", "sol1": "Pull.", "sol2": "Push.", "label": 1});
    let expected = answers("Question: Open it\nAnswer:", &["Pull.", "Push."], 1);
    assert_eq!(question(Builtin::Piqa, &row).unwrap(), expected);
    let expected = answers("Sky -- It is blue.\nQuestion: is it?\nAnswer:", &["no", "yes"], 1);
    let original =
        json!({"question": "is it", "title": "Sky", "passage": "It is blue.", "answer": true});
    let glue = json!({"question": "is it", "passage": "Sky -- It is blue.", "idx": 7, "label": 1});
    for row in [original, glue] {
        assert_eq!(question(Builtin::BoolQ, &row).unwrap(), expected);
    }
}

#[test]
fn rows_of_another_task_say_what_is_missing() {
    let arc = json!({"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"});
    let with = |key: &str, value: Value| {
        let mut row = arc.clone();
        row[key] = value;
        row
    };
    for (task, row, message) in [
        (Builtin::Piqa, arc.clone(), "no field `goal` among answerKey, choices, question"),
        (Builtin::ArcEasy, with("answerKey", "E".into()), "`E` is none of the choices A, B"),
        (Builtin::ArcEasy, with("answerKey", Value::Null), "no field `answerKey`"),
        (Builtin::ArcEasy, with("choices", json!(["a"])), "field `choices`: expected an object"),
        (Builtin::ArcEasy, with("question", 7.into()), "field `question`: expected text, found 7"),
        (
            Builtin::ArcEasy,
            with("choices", json!({"text": ["a"], "label": ["A", "B"]})),
            "1 choices with 2 labels",
        ),
        (
            Builtin::HellaSwag,
            json!({"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": "d", "label": 0}),
            "field `endings`: expected a list, found \"d\"",
        ),
        (
            Builtin::HellaSwag,
            json!({"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": [], "label": ""}),
            "field `label`: expected an answer's number, found \"\"",
        ),
        (
            Builtin::WinoGrande,
            json!({"sentence": "none", "option1": "a", "option2": "b", "answer": "1"}),
            "it has no blank",
        ),
        (
            Builtin::WinoGrande,
            json!({"sentence": "a _ b", "option1": "a", "option2": "b", "answer": "3"}),
            "field `answer`: expected 1 or 2, found 3",
        ),
    ] {
        let error = question(task, &row).unwrap_err();
        assert!(error.contains(message), "{error}");
    }
}

#[test]
fn piqas_answers_are_found_beside_its_questions() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("valid.jsonl");
    let row =
        |label: &str| format!("{{\"goal\": \"g\", \"sol1\": \"a\", \"sol2\": \"b\"{label}}}\n");
    fs::write(&path, row("") + "\n" + &row("")).unwrap();
    let open = |labels| Task::open(Kind::Builtin(Builtin::Piqa), &path, labels);
    let gold = |task: &Task| task.items.iter().map(|i| i.question.gold()).collect::<Vec<_>>();
    assert!(open(None).unwrap_err().to_string().contains("valid.jsonl:1: no field `label`"));
    fs::write(dir.path().join("valid-labels.lst"), "1\n0\n").unwrap();
    assert_eq!(gold(&open(None).unwrap()), [1, 0]);
    let other = dir.path().join("other.lst");
    fs::write(&other, "0\n0\n").unwrap();
    assert_eq!(gold(&open(Some(&other)).unwrap()), [0, 0]);
    fs::write(&other, "0\n").unwrap();
    let error = open(Some(&other)).unwrap_err().to_string();
    assert!(error.contains("other.lst: 1 answers, and"), "{error}");
    fs::write(&other, "0\n7\n").unwrap();
    let error = open(Some(&other)).unwrap_err().to_string();
    assert!(error.contains("valid.jsonl:3: answer 7 (counted from 0) of 2 choices"), "{error}");
    // Rows that name their answers keep them.
    fs::write(&path, row(", \"label\": 0") + &row(", \"label\": 0")).unwrap();
    assert_eq!(gold(&open(None).unwrap()), [0, 0]);
}

/// A random model whose tokens are bytes, and files of questions.
struct Setup {
    dir: tempfile::TempDir,
    model: PathBuf,
}

impl Setup {
    fn new() -> Self {
        let random = RandomModel::new(&ModelConfig::tiny(), 1);
        let dir = tempfile::tempdir().unwrap();
        let model = random.file().write(&dir);
        let setup = Self { dir, model };
        let piqa: String = (0..8)
            .map(|i| {
                let row = json!({
                    "goal": "Do ".repeat(i * 7) + "it", "sol1": format!("thing {i}"),
                    "sol2": "é".repeat(i + 1), "label": i % 2,
                });
                format!("{row}\n")
            })
            .collect();
        fs::write(setup.path("piqa.jsonl"), piqa).unwrap();
        let winogrande = (0..4).map(|i| {
            let (sentence, answer) = (format!("{i} saw that _ was late."), (i % 2 + 1).to_string());
            format!(
                "{}\n",
                json!({"sentence": sentence, "option1": "Jo", "option2": "Max", "answer": answer})
            )
        });
        fs::write(setup.path("winogrande.jsonl"), winogrande.collect::<String>()).unwrap();
        setup
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn task(&self, name: &str) -> String {
        format!("{name}={}", self.path(&format!("{name}.jsonl")).display())
    }

    fn run(&self, args: &[&dyn AsRef<std::ffi::OsStr>]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bitnet-eval"));
        command.env_remove("BITNET_ISA").env_remove("RUST_LOG").arg("tasks").arg(&self.model);
        args.iter().for_each(|a| {
            command.arg(a.as_ref());
        });
        command.output().unwrap()
    }
}

fn ok(output: Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The sum of the continuation's log-probabilities, token by token from the formula, the
/// whole cut from the left to the model's context and one token.
fn naive(model: &Model, context: &str, continuation: &str) -> (f64, bool) {
    let whole = format!("{context}{continuation}");
    let most = model.config().max_position_embeddings + 1;
    let bytes = &whole.as_bytes()[whole.len().saturating_sub(most)..];
    let mut session = Session::new(model, &SessionOptions::default()).unwrap();
    let (mut sum, mut greedy) = (0.0, true);
    for i in 1..bytes.len() {
        let logits = session.decode(u32::from(bytes[i - 1])).unwrap();
        if i >= bytes.len() - continuation.len() {
            let total: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
            let mine = logits[usize::from(bytes[i])];
            sum += (f64::from(mine).exp() / total).ln();
            greedy &= logits.iter().all(|l| *l <= mine);
        }
    }
    (sum, greedy)
}

#[test]
fn every_score_is_that_of_the_formula() {
    let s = Setup::new();
    let out = s.path("out");
    let (piqa, winogrande) = (s.task("piqa"), s.task("winogrande"));
    let args: [&dyn AsRef<std::ffi::OsStr>; 8] =
        [&"--task", &piqa, &"--task", &winogrande, &"--output", &out, &"--json", &"-"];
    let results = ok(s.run(&args));
    let model = Model::open(&s.model, &LoadOptions::default()).unwrap();
    for (name, questions) in [("piqa", 8), ("winogrande", 4)] {
        let samples = lines(&out.join(format!("samples_{name}.jsonl")));
        assert_eq!(samples.len(), questions);
        let mut right = 0.0;
        for sample in &samples {
            let mut best = (0, f64::NEG_INFINITY);
            for (i, response) in sample["filtered_resps"].as_array().unwrap().iter().enumerate() {
                let args = &sample["arguments"][format!("gen_args_{i}")];
                let (context, continuation) =
                    (args["arg_0"].as_str().unwrap(), args["arg_1"].as_str().unwrap());
                let (expected, greedy) = naive(&model, context, continuation);
                let found: f64 = response[0].as_str().unwrap().parse().unwrap();
                assert!((found - expected).abs() < 1e-9, "{name}: {found} and {expected}");
                assert_eq!(response[1], if greedy { "True" } else { "False" });
                if found > best.1 {
                    best = (i, found);
                }
            }
            let gold = match name {
                "piqa" => sample["target"].as_str().unwrap().parse().unwrap(),
                _ => sample["doc"]["answer"].as_str().unwrap().parse::<usize>().unwrap() - 1,
            };
            let is_right = f64::from(u8::from(best.0 == gold));
            assert_eq!(sample["acc"], is_right);
            right += is_right;
        }
        let n = questions as f64;
        let acc = right / n;
        let found = &results["results"][name];
        assert!((found["acc,none"].as_f64().unwrap() - acc).abs() < 1e-12);
        // The sample deviation of zeros and ones over the root of their number.
        let error = (acc * (1.0 - acc) / (n - 1.0)).sqrt();
        assert!((found["acc_stderr,none"].as_f64().unwrap() - error).abs() < 1e-12);
        assert_eq!(found.get("acc_norm,none").is_some(), name == "piqa");
        assert_eq!(results["n-samples"][name]["original"], questions);
        assert_eq!(results["n-shot"][name], 0);
    }
    assert_eq!(results["versions"]["piqa"], 1.0);
    assert_eq!(results["configs"]["winogrande"]["output_type"], "multiple_choice");
    // The longest questions do not fit 128 tokens.
    assert!(results["n-samples"]["piqa"]["truncated"].as_u64().unwrap() >= 1);
    let first = &lines(&out.join("samples_piqa.jsonl"))[0];
    assert_eq!(first["arguments"]["gen_args_0"]["arg_0"], "Question: it\nAnswer:");
    assert_eq!(first["arguments"]["gen_args_1"]["arg_1"], " é");
    let hash = bitnet_eval::sha256_hex(b"Question: it\nAnswer:");
    assert_eq!(first["prompt_hash"], hash.as_str());
}

#[test]
fn a_run_goes_on_where_it_was_cut() {
    let s = Setup::new();
    let (whole, cut) = (s.path("whole"), s.path("cut"));
    let task = s.task("piqa");
    let run = |out: &Path, more: &[&dyn AsRef<std::ffi::OsStr>]| {
        let args: [&dyn AsRef<std::ffi::OsStr>; 6] =
            [&"--task", &task, &"--output", &out, &"--json", &"-"];
        s.run(&[&args[..], more].concat())
    };
    let expected = ok(run(&whole, &[]));
    ok(run(&cut, &[&"--limit", &"5"]));
    // Killed while it wrote the fifth question's line.
    let journal = cut.join("journal.jsonl");
    let text = fs::read(&journal).unwrap();
    fs::write(&journal, &text[..text.len() - 9]).unwrap();
    let results = ok(run(&cut, &[&"--threads", &"3"]));
    assert_eq!(results["n-samples"]["piqa"]["resumed"], 4);
    assert_eq!(results["results"], expected["results"]);
    let samples = |out: &Path| fs::read(out.join("samples_piqa.jsonl")).unwrap();
    assert!(samples(&cut) == samples(&whole), "the same bytes");
    assert_eq!(ok(run(&cut, &[]))["n-samples"]["piqa"]["resumed"], 8);
    // Another prompt is another question, where it is not cut away; another cache
    // another run.
    let examples = run(&cut, &[&"--num-fewshot", &"1", &"--fewshot", &task]);
    let truncated = &expected["n-samples"]["piqa"]["truncated"];
    assert_eq!(ok(examples)["n-samples"]["piqa"]["resumed"], *truncated);
    let first = &lines(&cut.join("samples_piqa.jsonl"))[0];
    let expected = "Question: it\nAnswer: thing 0\n\nQuestion: it\nAnswer:";
    assert_eq!(first["arguments"]["gen_args_0"]["arg_0"], expected);
    let other = run(&cut, &[&"--kv", &"int8"]);
    assert_eq!(other.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&other.stderr).contains("the scores of another run"));
}

/// A scorer of one sequence at a time and one of many give the same bits: of questions
/// with a common beginning, of one that is no longer than what it shares, of equal ones.
#[test]
fn sequences_together_score_as_alone() {
    let mut random = Random(12);
    let config = ModelConfig { max_position_embeddings: 600, ..ModelConfig::tiny() };
    let (model, _dir) = RandomModel::new(&config, 21).open();
    let mut text = |n: usize| random.tokens(n, &config);
    let shots = text(70);
    let mut sequences: Vec<(Vec<u32>, usize)> = Vec::new();
    for question in 0..9usize {
        let before = if question % 3 == 0 { vec![] } else { shots.clone() };
        let stem = [before, text(3 + 7 * question)].concat();
        for choice in 0..2 + question % 3 {
            let tokens = [stem.clone(), text(1 + choice)].concat();
            sequences.push((tokens, stem.len()));
        }
    }
    // Longer than the room there is at first, scored from early on, equal, and nothing.
    sequences.push((text(500), 320));
    sequences.push((shots.clone(), 1));
    sequences.push((shots.clone(), 0));
    sequences.push((shots[..9].to_vec(), 8));
    sequences.push((vec![5], 1));
    let asked: Vec<Sequence<'_>> =
        sequences.iter().map(|(tokens, first)| Sequence { tokens, first: *first }).collect();
    for (kv, threads, chunk) in [(KvType::F32, 1, 256), (KvType::F16, 3, 16), (KvType::Int8, 2, 64)]
    {
        let options =
            SessionOptions { kv, threads: Some(threads), chunk, ..SessionOptions::default() };
        let mut alone = EngineModel::new(Session::new(&model, &options).unwrap());
        let expected = alone.score_all(&asked).unwrap();
        assert_eq!(expected[sequences.len() - 1], []);
        for most in [1, 5, 32] {
            let mut together = BatchedModel::new(&model, &options, most).unwrap();
            assert_eq!((together.together(), together.context()), (most, 600));
            // The second time the caches hold what another group left there.
            for _ in 0..2 {
                assert!(together.score_all(&asked).unwrap() == expected, "{kv:?}, {most}");
            }
            let (tokens, first) = &sequences[4];
            assert_eq!(together.score(tokens, *first).unwrap(), expected[4]);
            let wrong = [1, 2, 320];
            let error = together.score(&wrong, 1).unwrap_err().to_string();
            assert!(error.starts_with("token 320 at position 2"), "{error}");
            let long = vec![1; 700];
            let error = together.score(&long, 1).unwrap_err().to_string();
            assert!(error.contains("do not fit"), "{error}");
        }
    }
    assert!(BatchedModel::new(&model, &SessionOptions::default(), 0).is_err());
}

#[test]
fn every_batch_writes_the_same_bytes() {
    let s = Setup::new();
    let tasks = ["piqa", "winogrande"].map(|name| s.task(name));
    let run = |out: &Path, more: &[&dyn AsRef<std::ffi::OsStr>]| {
        let args: [&dyn AsRef<std::ffi::OsStr>; 8] =
            [&"--task", &tasks[0], &"--task", &tasks[1], &"--output", &out, &"--json", &"-"];
        ok(s.run(&[&args[..], more].concat()))
    };
    let written = |out: &Path| {
        ["samples_piqa.jsonl", "samples_winogrande.jsonl", "journal.jsonl"]
            .map(|name| fs::read(out.join(name)).unwrap())
    };
    let alone = s.path("alone");
    let expected = run(&alone, &[&"--batch", &"1"]);
    for (batch, threads) in [("2", "1"), ("3", "3"), ("32", "2")] {
        let out = s.path(batch);
        let results = run(&out, &[&"--batch", &batch, &"--threads", &threads]);
        assert_eq!(results["results"], expected["results"], "{batch}");
        assert!(written(&out) == written(&alone), "{batch}");
    }
}

#[test]
fn examples_are_drawn_as_the_harness_draws_them() {
    let s = Setup::new();
    let task = s.task("piqa");
    let samples = |out: &str, more: &[&dyn AsRef<std::ffi::OsStr>]| {
        let out = s.path(out);
        let args: [&dyn AsRef<std::ffi::OsStr>; 10] = [
            &"--task",
            &task,
            &"--fewshot",
            &task,
            &"--num-fewshot",
            &"2",
            &"--output",
            &out,
            &"--json",
            &"-",
        ];
        let results = ok(s.run(&[&args[..], more].concat()));
        // A question is told by how often it says "Do ".
        let number = |question: &str| question.matches("Do ").count() / 7;
        let shown = |sample: &Value| {
            let text = sample["arguments"]["gen_args_0"]["arg_0"].as_str().unwrap();
            text.split("\n\n").map(number).collect()
        };
        let prompts: Vec<Vec<usize>> =
            lines(&out.join("samples_piqa.jsonl")).iter().map(shown).collect();
        (results, prompts)
    };
    let (results, prompts) = samples("lot", &[&"--fewshot-seed", &"1234"]);
    assert_eq!(results["config"]["fewshot_seed"], 1234);
    assert_eq!(results["configs"]["piqa"]["fewshot_config"]["sampler"], "default");
    // Recorded with lm_eval 0.4.13: ContextSampler of 8 rows, set_rnd(1234), sample(2, row).
    let drawn =
        [[7, 6, 0], [6, 4, 1], [0, 5, 2], [1, 0, 3], [3, 0, 4], [0, 2, 5], [7, 4, 6], [2, 0, 7]];
    assert_eq!(prompts, drawn);
    let (results, prompts) = samples("first", &[]);
    assert!(results["config"]["fewshot_seed"].is_null());
    assert_eq!(results["configs"]["piqa"]["fewshot_config"]["sampler"], "first_n");
    assert_eq!(prompts, [0, 1, 2, 3, 4, 5, 6, 7].map(|i| [0, 1, i]));
}

#[test]
fn a_task_of_ones_own_and_an_empty_prompt() {
    let s = Setup::new();
    let (toml, rows) = (s.path("own.toml"), s.path("own.jsonl"));
    fs::write(
        &toml,
        "task = \"own\"\ndoc_to_text = \"q\"\ndoc_to_choice = [\"no\", \"yes\"]\n\
         doc_to_target = \"{{a}}\"\ntarget_delimiter = \"\"\n",
    )
    .unwrap();
    fs::write(&rows, "{\"q\": \"\", \"a\": 1}\n{\"q\": \"is it? \", \"a\": \"no\"}\n").unwrap();
    let task = format!("{}={}", toml.display(), rows.display());
    let results = ok(s.run(&[&"--task", &task, &"--output", &s.path("out"), &"--json", &"-"]));
    assert_eq!(results["results"]["own"]["sample_len"], 2);
    let samples = lines(&s.path("out/samples_own.jsonl"));
    let model = Model::open(&s.model, &LoadOptions::default()).unwrap();
    // Without a prompt the end token stands before the answer.
    let mut session = Session::new(&model, &SessionOptions::default()).unwrap();
    let mut expected = 0.0;
    for (before, token) in [(EOS, b'n'), (u32::from(b'n'), b'o')] {
        let logits = session.decode(before).unwrap();
        let total: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
        expected += (f64::from(logits[usize::from(token)]).exp() / total).ln();
    }
    let found: f64 = samples[0]["filtered_resps"][0][0].as_str().unwrap().parse().unwrap();
    assert!((found - expected).abs() < 1e-9, "{found} and {expected}");
    // The prompt's last space is scored with the answer.
    let (expected, _) = naive(&model, "is it?", " no");
    let found: f64 = samples[1]["filtered_resps"][0][0].as_str().unwrap().parse().unwrap();
    assert!((found - expected).abs() < 1e-9, "{found} and {expected}");
    assert_eq!(samples[1]["target"], "0");
}

#[test]
fn mistakes_are_named_and_nothing_is_half_written() {
    let s = Setup::new();
    let write = |name: &str, text: &str| {
        let path = s.path(name);
        fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let piqa = s.task("piqa");
    let good = "{\"goal\": \"g\", \"sol1\": \"a\", \"sol2\": \"b\", \"label\": 0}\n";
    let broken = format!("piqa={}", write("broken.jsonl", &format!("{good}\n{{\"goal\": ")));
    let label =
        format!("piqa={}", write("label.jsonl", &format!("{good}{}", good.replace("0}", "-1}"))));
    let long = "x".repeat(200);
    let long =
        format!("piqa={}", write("long.jsonl", &good.replace("\"a\"", &format!("\"{long}\""))));
    let none = format!("piqa={}", write("none.jsonl", &good.replace("\"a\"", "\"\"")));
    let empty = format!("piqa={}", write("empty.jsonl", "\n"));
    let foreign = format!("piqa={}", write("foreign.parquet", "no parquet"));
    let missing = format!("piqa={}", s.path("missing.jsonl").display());
    let toml = write("bad.toml", "task = \"x\"\nprompt = \"y\"\n");
    let toml = format!("{toml}={}", s.path("piqa.jsonl").display());
    let unknown = piqa.replacen("piqa", "mmlu", 1);
    let arc = piqa.replacen("piqa", "arc_easy", 1);
    type Args<'a> = Vec<&'a dyn AsRef<std::ffi::OsStr>>;
    let cases: Vec<(Args<'_>, i32, &str)> = vec![
        (vec![], 2, "--task"),
        (vec![&"--task", &"piqa"], 2, "NAME=FILE"),
        (vec![&"--task", &unknown], 2, "--task mmlu: none of arc_easy"),
        (vec![&"--task", &piqa, &"--task", &piqa], 2, "two tasks have that name"),
        (vec![&"--task", &piqa, &"--limit", &"0"], 2, "--limit"),
        (vec![&"--task", &piqa, &"--num-fewshot", &"2"], 2, "--fewshot"),
        (
            vec![&"--task", &piqa, &"--num-fewshot", &"0", &"--fewshot", &piqa],
            2,
            "--num-fewshot 0: --fewshot would not be read",
        ),
        (vec![&"--task", &piqa, &"--fewshot-seed", &"1"], 2, "--num-fewshot"),
        (vec![&"--task", &piqa, &"--batch", &"0"], 2, "--batch"),
        (vec![&"--task", &piqa, &"--fewshot", &piqa], 2, "--num-fewshot"),
        (
            vec![&"--task", &piqa, &"--num-fewshot", &"9", &"--fewshot", &piqa],
            3,
            "8 questions, and 9 examples",
        ),
        (vec![&"--task", &piqa, &"--labels", &unknown], 2, "--labels mmlu: no --task"),
        (vec![&"--task", &arc], 3, "piqa.jsonl:1: no field"),
        (vec![&"--task", &missing], 3, "missing.jsonl: cannot be read"),
        (vec![&"--task", &empty], 3, "empty.jsonl: empty"),
        (vec![&"--task", &broken], 3, "broken.jsonl:3: is not JSON"),
        (vec![&"--task", &label], 3, "label.jsonl:2: field `label`"),
        (vec![&"--task", &none], 3, "none.jsonl:1: choice 0 (counted from 0) is empty"),
        (vec![&"--task", &long], 3, "long.jsonl:1: a continuation of 201 tokens"),
        (vec![&"--task", &foreign], 3, "foreign.parquet: is not a parquet file"),
        (vec![&"--task", &toml], 3, "bad.toml: TOML parse error"),
        (vec![&"--task", &piqa, &"--output", &s.model], 1, "cannot be made"),
    ];
    for (args, code, words) in cases {
        let out = s.path("never");
        let mut all = args.clone();
        if !args.iter().any(|a| a.as_ref() == "--output") {
            all.extend([&"--output" as &dyn AsRef<std::ffi::OsStr>, &out]);
        }
        let output = s.run(&all);
        let message = String::from_utf8_lossy(&output.stderr);
        let shown: Vec<_> = args.iter().map(|a| a.as_ref()).collect();
        assert_eq!(output.status.code(), Some(code), "{shown:?}: {message}");
        assert!(message.contains(words), "`{words}` is not in: {message}");
        assert!(!message.contains("panicked"), "{message}");
        assert!(!out.join("results.json").exists());
    }
}

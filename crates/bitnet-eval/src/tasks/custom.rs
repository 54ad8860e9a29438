//! Tasks that a TOML file describes, with the keys of lm-evaluation-harness' YAML files.
//!
//! ```toml
//! task = "colours"
//! version = 1.0
//! doc_to_text = "Question: {{question}}\nAnswer:"
//! doc_to_choice = "{{choices.text}}"
//! doc_to_target = "{{choices.label.index(answerKey)}}"
//! ```
//!
//! | key | value |
//! |---|---|
//! | `task` | the name in results |
//! | `version` | a number or text; 0 by default |
//! | `doc_to_text` | the prompt: a field's name, or a Jinja template of the row |
//! | `doc_to_choice` | a list of texts; or a field's name or one expression in `{{ }}` that is a list |
//! | `doc_to_target` | the right answer: a number from 0, or a field's name or a template that gives one, or the answer itself |
//! | `multiple_input` | `true`: choices are contexts, `doc_to_text` gives the number of the right one and `doc_to_target` what follows each |
//! | `target_delimiter` | between prompt and answer; a space by default |
//! | `fewshot_delimiter` | behind each example; an empty line by default |
//! | `description` | before everything; nothing by default |
//! | `fewshot_split`, `test_split` | names; examples drawn by lot leave out the question itself where both are the same or both are missing |
//! | `metrics` | of `acc`, `acc_norm`, `acc_bytes`; all by default, `acc` with `multiple_input` |

use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::ValueKind;
use minijinja::{Environment, Error, ErrorKind, State, UndefinedBehavior, Value};
use serde::Deserialize;

use super::question::{Delimiters, Question};
use super::row::Fields;
use super::scoring::Metric;
use crate::EvalError;

/// Steps a template may take for a row.
const FUEL: u64 = 1_000_000;

/// A description as it is written.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    task: String,
    #[serde(default)]
    version: Option<toml::Value>,
    doc_to_text: Text,
    doc_to_choice: Choices,
    doc_to_target: Text,
    #[serde(default)]
    multiple_input: bool,
    target_delimiter: Option<String>,
    fewshot_delimiter: Option<String>,
    #[serde(default)]
    description: String,
    fewshot_split: Option<String>,
    test_split: Option<String>,
    metrics: Option<Vec<Metric>>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(untagged, expecting = "expected text or a whole number")]
enum Text {
    Number(usize),
    Template(String),
}

#[derive(Debug, Clone, Deserialize)]
#[serde(untagged, expecting = "expected a list of texts, or text")]
enum Choices {
    List(Vec<String>),
    Expression(String),
}

/// A task of a file.
#[derive(Debug)]
pub struct CustomTask {
    path: PathBuf,
    description: Description,
    environment: Environment<'static>,
}

impl CustomTask {
    /// Reads a description.
    ///
    /// # Errors
    /// A file that cannot be read, is not TOML, has an unknown or wrong key, or a
    /// template that is not Jinja.
    pub fn open(path: &Path) -> Result<Self, EvalError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| EvalError::Read { path: path.into(), source })?;
        let wrong = |what: String| EvalError::TaskFile { path: path.into(), what };
        let description: Description =
            toml::from_str(&text).map_err(|e| wrong(e.to_string().trim_end().to_owned()))?;
        if description.task.is_empty()
            || !description.task.chars().all(|c| c.is_alphanumeric() || "_-.".contains(c))
        {
            let what = format!("task = {:?}: letters, digits, _ - .", description.task);
            return Err(wrong(what));
        }
        if let Some(version) = &description.version
            && !(version.is_str() || version.is_integer() || version.is_float())
        {
            return Err(wrong(format!("version = {version}: a number or text")));
        }
        if description.metrics.as_ref().is_some_and(Vec::is_empty) {
            return Err(wrong("metrics = []: at least one of acc, acc_norm, acc_bytes".into()));
        }
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().keep_trailing_newline(true).build();
        environment.set_syntax(syntax.map_err(|e| wrong(explain(&e)))?);
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(methods);
        let task = Self { path: path.into(), description, environment };
        let d = &task.description;
        for (key, text) in [("doc_to_text", &d.doc_to_text), ("doc_to_target", &d.doc_to_target)] {
            if let Text::Template(template) = text {
                let parsed = task.environment.template_from_str(template);
                parsed.map_err(|e| wrong(format!("{key}: {}", explain(&e))))?;
            }
        }
        if let Choices::Expression(text) = &d.doc_to_choice
            && let Some(expression) = inside(text)
        {
            let parsed = task.environment.compile_expression(expression);
            parsed.map_err(|e| wrong(format!("doc_to_choice: {}", explain(&e))))?;
        }
        Ok(task)
    }

    /// The name in results.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.description.task
    }

    /// The file it was read from.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The version it gives itself.
    #[must_use]
    pub fn version(&self) -> serde_json::Value {
        match &self.description.version {
            None => 0.into(),
            Some(toml::Value::Integer(n)) => (*n).into(),
            Some(toml::Value::Float(n)) => (*n).into(),
            Some(other) => other.as_str().unwrap_or_default().into(),
        }
    }

    /// What is reported.
    #[must_use]
    pub fn metrics(&self) -> Vec<Metric> {
        match &self.description.metrics {
            Some(metrics) => metrics.clone(),
            None if self.description.multiple_input => vec![Metric::Acc],
            None => Metric::ALL.to_vec(),
        }
    }

    /// See [`super::Kind`].
    pub(super) fn leaves_itself_out(&self) -> bool {
        self.description.fewshot_split == self.description.test_split
    }

    /// What stands between the parts of its prompts.
    #[must_use]
    pub fn delimiters(&self) -> Delimiters {
        let (d, usual) = (&self.description, Delimiters::default());
        Delimiters {
            description: d.description.clone(),
            target: d.target_delimiter.clone().unwrap_or(usual.target),
            fewshot: d.fewshot_delimiter.clone().unwrap_or(usual.fewshot),
        }
    }

    /// The question of a row.
    ///
    /// # Errors
    /// Which key of the description does not fit the row, and why.
    pub fn question(&self, row: &Fields<'_>) -> Result<Question, String> {
        let d = &self.description;
        let values = Value::from_pairs(row.0.iter().map(|(k, v)| (k.as_str(), value_of(v))));
        let choices = self
            .choices(row, &values)
            .map_err(|what| format!("doc_to_choice of {}: {what}", self.path.display()))?;
        let text = |key: &str, text: &Text| {
            self.text(row, &values, text)
                .map_err(|what| format!("{key} of {}: {what}", self.path.display()))
        };
        let prompt = text("doc_to_text", &d.doc_to_text)?;
        let target = text("doc_to_target", &d.doc_to_target)?;
        let (label, key) =
            if d.multiple_input { (&prompt, "doc_to_text") } else { (&target, "doc_to_target") };
        // A number, or the answer itself; in the harness too a number comes first.
        let gold = label.parse().ok().or_else(|| choices.iter().position(|c| c == label));
        let gold = gold.ok_or_else(|| {
            let path = self.path.display();
            format!("{key} of {path}: {label:?} is no answer's number and none of the choices")
        })?;
        Ok(if d.multiple_input {
            Question::Contexts { contexts: choices, continuation: target, gold }
        } else {
            Question::Answers { prompt, choices, gold }
        })
    }

    fn text(&self, row: &Fields<'_>, values: &Value, text: &Text) -> Result<String, String> {
        let template = match text {
            Text::Number(n) => return Ok(n.to_string()),
            Text::Template(template) => template,
        };
        match row.0.get(template) {
            Some(serde_json::Value::String(text)) => Ok(text.clone()),
            Some(serde_json::Value::Bool(yes)) => Ok(u8::from(*yes).to_string()),
            Some(serde_json::Value::Number(n)) => Ok(n.to_string()),
            Some(_) => Err(format!("field `{template}` is neither text nor a number")),
            None => self
                .environment
                .template_from_str(template)
                .and_then(|t| t.render(values))
                .map_err(|e| explain(&e)),
        }
    }

    fn choices(&self, row: &Fields<'_>, values: &Value) -> Result<Vec<String>, String> {
        let text = match &self.description.doc_to_choice {
            Choices::List(list) => return Ok(list.clone()),
            Choices::Expression(text) => text,
        };
        if row.0.contains_key(text) {
            return row.texts(text);
        }
        let Some(expression) = inside(text) else {
            return Err(format!("`{text}` is no field of the row and no expression in {{{{ }}}}"));
        };
        let list = self
            .environment
            .compile_expression(expression)
            .and_then(|e| e.eval(values))
            .map_err(|e| explain(&e))?;
        if list.kind() != ValueKind::Seq {
            return Err(format!("`{text}` is {}, not a list", list.kind()));
        }
        let items = list.try_iter().map_err(|e| explain(&e))?;
        items
            .map(|item| match item.as_str() {
                Some(text) => Ok(text.to_owned()),
                None => Err(format!("`{text}` holds {}, not text", item.kind())),
            })
            .collect()
    }
}

/// A field as templates see it.
fn value_of(json: &serde_json::Value) -> Value {
    match json {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(b) => (*b).into(),
        serde_json::Value::Number(n) => match (n.as_i64(), n.as_u64()) {
            (Some(n), _) => n.into(),
            (None, Some(n)) => n.into(),
            (None, None) => n.as_f64().unwrap_or(f64::NAN).into(),
        },
        serde_json::Value::String(text) => text.as_str().into(),
        serde_json::Value::Array(list) => list.iter().map(value_of).collect(),
        serde_json::Value::Object(object) => {
            Value::from_pairs(object.iter().map(|(k, v)| (k.as_str(), value_of(v))))
        }
    }
}

/// The expression of a text that is one in `{{ }}`.
fn inside(text: &str) -> Option<&str> {
    let expression = text.trim().strip_prefix("{{")?.strip_suffix("}}")?;
    Some(expression.trim())
}

/// An error of a template in one line.
fn explain(error: &Error) -> String {
    let name = error.kind();
    error.detail().map_or_else(|| name.to_string(), |detail| format!("{name}: {detail}"))
}

/// Python's methods, and `index` of lists.
fn methods(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    if value.kind() == ValueKind::Seq && method == "index" {
        let [wanted] = args else {
            return Err(Error::new(ErrorKind::MissingArgument, "index takes one value"));
        };
        let at = value.try_iter()?.position(|item| item == *wanted);
        return at.map(Value::from).ok_or_else(|| {
            Error::new(ErrorKind::InvalidOperation, format!("{wanted} is not in {value}"))
        });
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn open(text: &str) -> Result<CustomTask, EvalError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.toml");
        std::fs::write(&path, text).unwrap();
        CustomTask::open(&path)
    }

    fn question(task: &CustomTask, row: serde_json::Value) -> Result<Question, String> {
        task.question(&Fields(row.as_object().unwrap()))
    }

    const ARC: &str = r#"
        task = "mine"
        version = 2
        doc_to_text = "Question: {{question}}\nAnswer:"
        doc_to_choice = "{{choices.text}}"
        doc_to_target = "{{choices.label.index(answerKey.strip())}}"
    "#;

    #[test]
    fn a_description_in_the_harness_words() {
        let task = open(ARC).unwrap();
        let row = json!({
            "question": "Why?\n", "answerKey": " B",
            "choices": {"text": ["a", "b {{x}}"], "label": ["A", "B"]},
        });
        let expected = Question::Answers {
            prompt: "Question: Why?\n\nAnswer:".into(),
            choices: vec!["a".into(), "b {{x}}".into()],
            gold: 1,
        };
        assert_eq!(question(&task, row.clone()).unwrap(), expected);
        assert_eq!((task.name(), task.version(), task.metrics().len()), ("mine", 2.into(), 3));
        // Neither split is named, one is, both are the same.
        assert!(task.leaves_itself_out());
        let split = "version = 2\nfewshot_split = \"train\"";
        assert!(!open(&ARC.replace("version = 2", split)).unwrap().leaves_itself_out());
        let both = format!("{split}\ntest_split = \"train\"");
        assert!(open(&ARC.replace("version = 2", &both)).unwrap().leaves_itself_out());
        let mut other = row.clone();
        other["answerKey"] = "C".into();
        let error = question(&task, other).unwrap_err();
        assert!(error.starts_with("doc_to_target of ") && error.contains("C is not in"), "{error}");
        let mut other = row;
        other.as_object_mut().unwrap().remove("question");
        let error = question(&task, other).unwrap_err();
        assert!(error.starts_with("doc_to_text of ") && error.contains("undefined"), "{error}");
    }

    #[test]
    fn fields_lists_and_answers_by_name() {
        let task = open(
            "task = \"t\"\ndoc_to_text = \"q\"\ndoc_to_choice = [\"no\", \"yes\"]\n\
             doc_to_target = \"answer\"\ntarget_delimiter = \"\"\nmetrics = [\"acc\"]",
        )
        .unwrap();
        for (answer, gold) in [(json!("yes"), 1), (json!(0), 0), (json!(true), 1), (json!("1"), 1)]
        {
            let q = question(&task, json!({"q": "{{raw}} ", "answer": answer})).unwrap();
            assert_eq!(q.gold(), gold, "{answer}");
            assert_eq!(q.pairs("", &task.delimiters())[0], ("{{raw}} ".into(), "no".into()));
        }
        let error = question(&task, json!({"q": "", "answer": "maybe"})).unwrap_err();
        assert!(error.contains("\"maybe\" is no answer's number"), "{error}");
    }

    #[test]
    fn contexts_can_be_the_choices() {
        let task = open(
            "task = \"t\"\nmultiple_input = true\ndoc_to_text = \"{{answer - 1}}\"\n\
             doc_to_choice = \"{{[a + '!', b]}}\"\ndoc_to_target = \"rest\"",
        )
        .unwrap();
        let q = question(&task, json!({"answer": 2, "a": "x", "b": "y", "rest": "z"})).unwrap();
        let expected = Question::Contexts {
            contexts: vec!["x!".into(), "y".into()],
            continuation: "z".into(),
            gold: 1,
        };
        assert_eq!(q, expected);
        assert_eq!(task.metrics(), [Metric::Acc]);
    }

    #[test]
    fn wrong_descriptions_name_the_key() {
        let with = |from: &str, to: &str| ARC.replace(from, to);
        for (text, message) in [
            (with("version", "verzion"), "unknown field `verzion`"),
            (with("task = \"mine\"", ""), "missing field `task`"),
            (with("\"mine\"", "\"../mine\""), "task = \"../mine\""),
            (with("version = 2", "version = [2]"), "version = [2]"),
            (with("version = 2", "metrics = [\"f1\"]"), "unknown variant `f1`"),
            (with("version = 2", "metrics = []"), "metrics = []"),
            (with("{{question}}", "{{question"), "doc_to_text: syntax error"),
            (with("{{choices.text}}", "{{choices.}}"), "doc_to_choice: syntax error"),
            (with("\"{{choices.text}}\"", "7"), "expected a list of texts, or text"),
            ("task =".to_owned(), "t.toml: TOML parse error"),
        ] {
            let error = open(&text).unwrap_err();
            assert_eq!(error.exit().code(), 3);
            assert!(error.to_string().contains(message), "{message}: {error}");
        }
        let endless = with(
            "{{question}}",
            "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
        );
        let row = json!({"answerKey": "A", "choices": {"text": ["a"], "label": ["A"]}});
        assert!(question(&open(&endless).unwrap(), row).unwrap_err().contains("fuel"));
        let none = open(&with("{{choices.text}}", "options")).unwrap();
        let error = question(&none, json!({"question": "q"})).unwrap_err();
        assert!(error.contains("`options` is no field"), "{error}");
    }
}

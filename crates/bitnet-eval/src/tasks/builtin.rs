//! The tasks that everybody reports, from the original files and from the schemas of
//! the Hugging Face hub.
//!
//! | task | prompt | choices |
//! |---|---|---|
//! | `arc_easy`, `arc_challenge` | `Question: {question}\nAnswer:` | texts of the choices |
//! | `hellaswag` | `{activity_label}: {ctx_a} {Ctx_b}`, cleaned | endings, cleaned |
//! | `winogrande` | the sentence up to `_`, each option filled in | what follows `_` |
//! | `piqa` | `Question: {goal}\nAnswer:` | `sol1`, `sol2` |
//! | `openbookqa` | the question's stem | texts of the choices |
//! | `boolq` | `{passage}\nQuestion: {question}?\nAnswer:` | `no`, `yes` |

use std::path::{Path, PathBuf};

use bitnet_data::Row;
use serde_json::Value;

use super::question::Question;
use super::row::{self, Fields};
use super::scoring::Metric;
use crate::EvalError;
use crate::words::is_space;

/// A task that is built in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Builtin {
    /// AI2's ARC, easy set (Clark et al., 2018).
    ArcEasy,
    /// AI2's ARC, challenge set.
    ArcChallenge,
    /// HellaSwag (Zellers et al., 2019).
    HellaSwag,
    /// WinoGrande (Sakaguchi et al., 2019).
    WinoGrande,
    /// PIQA (Bisk et al., 2019).
    Piqa,
    /// OpenBookQA (Mihaylov et al., 2018).
    OpenBookQa,
    /// BoolQ (Clark et al., 2019), as SuperGLUE has it.
    BoolQ,
}

impl Builtin {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::ArcEasy,
        Self::ArcChallenge,
        Self::HellaSwag,
        Self::WinoGrande,
        Self::Piqa,
        Self::OpenBookQa,
        Self::BoolQ,
    ];

    /// The harness' name of it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::ArcEasy => "arc_easy",
            Self::ArcChallenge => "arc_challenge",
            Self::HellaSwag => "hellaswag",
            Self::WinoGrande => "winogrande",
            Self::Piqa => "piqa",
            Self::OpenBookQa => "openbookqa",
            Self::BoolQ => "boolq",
        }
    }

    /// The task of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|task| task.name() == name)
    }

    /// The harness' version of it.
    #[must_use]
    pub fn version(self) -> f64 {
        if self == Self::BoolQ { 2.0 } else { 1.0 }
    }

    /// What is reported: all metrics, but accuracy alone where the continuation is the
    /// same for every choice.
    #[must_use]
    pub fn metrics(self) -> &'static [Metric] {
        if self == Self::WinoGrande { &[Metric::Acc] } else { &Metric::ALL }
    }

    /// See [`super::Kind`]: ARC's and OpenBookQA's descriptions name a test split and
    /// none for examples, the others name neither.
    pub(super) fn leaves_itself_out(self) -> bool {
        !matches!(self, Self::ArcEasy | Self::ArcChallenge | Self::OpenBookQa)
    }

    /// The question of a row.
    ///
    /// # Errors
    /// What is missing or wrong, with the field's name.
    pub fn question(self, row: &Fields<'_>) -> Result<Question, String> {
        match self {
            Self::ArcEasy | Self::ArcChallenge => {
                let (question, choices, gold) = science(row, "question")?;
                let prompt = format!("Question: {question}\nAnswer:");
                Ok(Question::Answers { prompt, choices, gold })
            }
            Self::OpenBookQa => {
                let (prompt, choices, gold) = science(row, "question_stem")?;
                Ok(Question::Answers { prompt, choices, gold })
            }
            Self::HellaSwag => hellaswag(row),
            Self::WinoGrande => winogrande(row),
            Self::Piqa => Ok(Question::Answers {
                prompt: format!("Question: {}\nAnswer:", row.text("goal")?),
                choices: vec![row.text("sol1")?.into(), row.text("sol2")?.into()],
                gold: row.index("label")?,
            }),
            Self::BoolQ => boolq(row),
        }
    }

    /// Gives the rows their answers from a file, a number a line: PIQA's and
    /// WinoGrande's original data have one. Without `labels` it is looked for beside
    /// the rows, if they name no answer.
    pub(super) fn add_labels(
        self,
        rows: &mut [Row],
        path: &Path,
        labels: Option<&Path>,
    ) -> Result<(), EvalError> {
        let field = match self {
            Self::Piqa => "label",
            Self::WinoGrande => "answer",
            _ if labels.is_some() => {
                let name = self.name();
                let message = format!("--labels {name}: its rows name their answers");
                return Err(EvalError::Usage(message));
            }
            _ => return Ok(()),
        };
        let missing = rows.iter().all(|row| Fields(&row.fields).find(field).is_none());
        let beside = || beside(path).filter(|path| missing && path.is_file());
        let Some(labels) = labels.map(Path::to_path_buf).or_else(beside) else { return Ok(()) };
        let text = std::fs::read_to_string(&labels)
            .map_err(|source| EvalError::Read { path: labels.clone(), source })?;
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
        if lines.len() != rows.len() {
            let what = format!(
                "{} answers, and {} has {} questions",
                lines.len(),
                path.display(),
                rows.len()
            );
            return Err(EvalError::TaskFile { path: labels, what });
        }
        for (row, label) in rows.iter_mut().zip(lines) {
            row.fields.insert(field.into(), Value::String(label.into()));
        }
        Ok(())
    }
}

/// `valid-labels.lst` for `valid.jsonl`.
fn beside(path: &Path) -> Option<PathBuf> {
    let stem = path.file_stem()?.to_str()?;
    Some(path.with_file_name(format!("{stem}-labels.lst")))
}

/// ARC and OpenBookQA: the stem, the texts of the choices and the answer's index. The
/// original rows hold `question: {stem, choices: [{text, label}]}`, the hub's the stem
/// as `stem_field` and `choices: {text: [], label: []}`.
fn science(row: &Fields<'_>, stem_field: &str) -> Result<(String, Vec<String>, usize), String> {
    let (stem, choices, labels) = match row.find("question") {
        Some(question) if question.is_object() => {
            let question = row::group("question", question)?;
            let (mut texts, mut labels) = (Vec::new(), Vec::new());
            for choice in row::list("choices", question.get("choices")?)? {
                let choice = row::group("choices", choice)?;
                texts.push(choice.text("text")?.to_owned());
                labels.push(choice.text("label")?.to_owned());
            }
            (question.text("stem")?, texts, labels)
        }
        _ => {
            let choices = row.group("choices")?;
            (row.text(stem_field)?, choices.texts("text")?, choices.texts("label")?)
        }
    };
    if choices.len() != labels.len() {
        return Err(format!("{} choices with {} labels", choices.len(), labels.len()));
    }
    let key = row.text("answerKey")?.trim_start_matches(is_space);
    let gold = labels.iter().position(|label| label == key).ok_or_else(|| {
        format!("field `answerKey`: `{key}` is none of the choices {}", labels.join(", "))
    })?;
    Ok((stem.to_owned(), choices, gold))
}

fn hellaswag(row: &Fields<'_>) -> Result<Question, String> {
    let (label, ctx_a) = (row.text("activity_label")?, row.text("ctx_a")?);
    let ctx_b = capitalized(row.text("ctx_b")?);
    Ok(Question::Answers {
        prompt: without_wikihow(&format!("{label}: {ctx_a} {ctx_b}")),
        choices: row.texts("endings")?.iter().map(|e| without_wikihow(e)).collect(),
        gold: row.index("label")?,
    })
}

/// Python's `str.capitalize`: the first character in upper case (title case, where a
/// character has one of several letters), the others in lower case.
fn capitalized(text: &str) -> String {
    let Some(first) = text.chars().next() else { return String::new() };
    let mut upper = first.to_uppercase();
    let mut out: String = upper.next().into_iter().collect();
    out.extend(upper.flat_map(char::to_lowercase));
    // Lower case depends on the neighbours (a final sigma): that of the whole text.
    let lower = text.to_lowercase();
    let skip: usize = first.to_lowercase().map(char::len_utf8).sum();
    out.push_str(lower.get(skip..).unwrap_or_default());
    out
}

/// Takes away what is left of WikiHow's markup: ` [title]` ends a sentence, other
/// brackets vanish (the shortest, within a line), two spaces become one.
fn without_wikihow(text: &str) -> String {
    let text = text.trim_matches(is_space).replace(" [title]", ". ");
    let mut out = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some(open) = rest.find('[') {
        let inside = &rest[open..];
        // As Python's `\[.*?\]`: a bracket that the line does not close stays.
        let line = &inside[..inside.find('\n').unwrap_or(inside.len())];
        let end = match line.find(']') {
            Some(close) => {
                out.push_str(&rest[..open]);
                open + close + 1
            }
            None => {
                out.push_str(&rest[..=open]);
                open + 1
            }
        };
        rest = &rest[end..];
    }
    out.push_str(rest);
    out.replace("  ", " ")
}

fn winogrande(row: &Fields<'_>) -> Result<Question, String> {
    let sentence = row.text("sentence")?;
    let (before, after) = sentence
        .split_once('_')
        .ok_or_else(|| "field `sentence`: it has no blank, `_`".to_owned())?;
    let options = [row.text("option1")?, row.text("option2")?];
    let gold = match row.index("answer")? {
        answer @ (1 | 2) => answer - 1,
        other => return Err(format!("field `answer`: expected 1 or 2, found {other}")),
    };
    Ok(Question::Contexts {
        contexts: options.iter().map(|option| format!("{before}{option}")).collect(),
        continuation: after.trim_matches(is_space).to_owned(),
        gold,
    })
}

fn boolq(row: &Fields<'_>) -> Result<Question, String> {
    let passage = row.text("passage")?;
    // SuperGLUE, which the harness reads, has put the title before the passage.
    let passage = match row.find("title") {
        Some(title) => format!("{} -- {passage}", row::text("title", title)?),
        None => passage.to_owned(),
    };
    let answer = row.find("answer").or_else(|| row.find("label"));
    let gold = match answer {
        Some(Value::Bool(answer)) => usize::from(*answer),
        Some(_) if row.find("answer").is_some() => row.index("answer")?,
        _ => row.index("label")?,
    };
    Ok(Question::Answers {
        prompt: format!("{passage}\nQuestion: {}?\nAnswer:", row.text("question")?),
        choices: vec!["no".into(), "yes".into()],
        gold,
    })
}

//! What was scored already: lines of JSON that a run appends to and the next one reads,
//! so that a run that was cut short goes on where it stood.
//!
//! The first line says which model and settings the scores are of. Every other is one
//! question: the task's name, a hash of the exact tokens, the scores. A question whose
//! tokens change (another prompt, another example) is another question. A last line that
//! was cut short is dropped.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::scoring::{Request, Scored};
use crate::EvalError;

/// What all scores of a journal have in common.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JournalIdentity {
    /// Version of the journal's form.
    pub journal: u32,
    /// SHA-256 of the packed model.
    pub model_sha256: String,
    /// Precision of the key and value cache.
    pub kv: String,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    task: String,
    tokens_sha256: String,
    /// Log-probability and greedy of each choice. The number is text, since JSON's
    /// readers may round a number in its last bit.
    scores: Vec<(String, bool)>,
}

impl Line {
    fn scores(&self) -> Result<Vec<Scored>, String> {
        let score = |(number, greedy): &(String, bool)| match number.parse::<f64>() {
            Ok(log_prob) if log_prob.is_finite() => Ok(Scored { log_prob, greedy: *greedy }),
            _ => Err(format!("`{number}` is no log-probability")),
        };
        self.scores.iter().map(score).collect()
    }
}

/// A journal; without a file it remembers nothing.
#[derive(Debug, Default)]
pub struct Journal {
    path: PathBuf,
    file: Option<File>,
    found: HashMap<(String, String), Vec<Scored>>,
}

impl Journal {
    /// Opens a journal, or begins one.
    ///
    /// # Errors
    /// A journal of another model or other settings, one that is damaged before its
    /// last line, one that another process writes; what the system says.
    pub fn open(path: &Path, identity: &JournalIdentity) -> Result<Self, EvalError> {
        let read = |source| EvalError::Read { path: path.into(), source };
        let mut file =
            OpenOptions::new().read(true).append(true).create(true).open(path).map_err(read)?;
        if file.try_lock().is_err() {
            let message = format!("{}: another process is writing it", path.display());
            return Err(EvalError::Usage(message));
        }
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(read)?;
        // What stands behind the last line end was cut short.
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        let mut lines = (1u64..).zip(text[..whole].lines());
        let mut journal = Self { path: path.into(), file: None, found: HashMap::new() };
        if let Some((_, first)) = lines.next() {
            let wrong = |what: String| EvalError::Row { path: path.into(), line: 1, what };
            let found: JournalIdentity = serde_json::from_str(first)
                .map_err(|e| wrong(format!("not the head of a journal of scores: {e}")))?;
            if found != *identity {
                return Err(EvalError::Usage(format!(
                    "{}: the scores of another run ({}, not {}); choose another folder or \
                     remove the file",
                    path.display(),
                    head(&found),
                    head(identity)
                )));
            }
        }
        for (line, text) in lines {
            let wrong = |what: String| {
                let what = format!("not a question's scores: {what}");
                EvalError::Row { path: path.into(), line, what }
            };
            let line: Line = serde_json::from_str(text).map_err(|e| wrong(e.to_string()))?;
            let scores = line.scores().map_err(wrong)?;
            journal.found.insert((line.task, line.tokens_sha256), scores);
        }
        file.set_len(whole as u64).map_err(read)?;
        file.seek(SeekFrom::End(0)).map_err(read)?;
        journal.file = Some(file);
        if whole == 0 {
            journal.write(identity)?;
        }
        Ok(journal)
    }

    /// How many questions it holds.
    #[must_use]
    pub fn len(&self) -> usize {
        self.found.len()
    }

    /// Whether it holds none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    pub(super) fn find(&self, task: &str, key: &str) -> Option<Vec<Scored>> {
        // A key is 64 bytes; to look it up by reference would need a map in a map.
        self.found.get(&(task.to_owned(), key.to_owned())).cloned()
    }

    pub(super) fn add(
        &mut self,
        task: &str,
        key: &str,
        scores: &[Scored],
    ) -> Result<(), EvalError> {
        self.write(&Line {
            task: task.to_owned(),
            tokens_sha256: key.to_owned(),
            scores: scores.iter().map(|s| (format!("{:?}", s.log_prob), s.greedy)).collect(),
        })
    }

    /// Appends a line in one write, so that a kill leaves at most its beginning.
    fn write(&mut self, line: &impl Serialize) -> Result<(), EvalError> {
        let Some(file) = &mut self.file else { return Ok(()) };
        let failed = |source| EvalError::Write { path: self.path.clone(), source };
        let mut bytes = serde_json::to_vec(line).map_err(|e| failed(e.into()))?;
        bytes.push(b'\n');
        file.write_all(&bytes).map_err(failed)
    }
}

fn head(identity: &JournalIdentity) -> String {
    let model = identity.model_sha256.get(..12).unwrap_or(&identity.model_sha256);
    format!("model {model}, kv {}, form {}", identity.kv, identity.journal)
}

/// What names the tokens of a question: their hash, in hex.
pub(super) fn key(requests: &[Request]) -> String {
    let mut hash = Sha256::new();
    for request in requests {
        hash.update((request.tokens.len() as u64).to_le_bytes());
        hash.update((request.first as u64).to_le_bytes());
        for token in &request.tokens {
            hash.update(token.to_le_bytes());
        }
    }
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(kv: &str) -> JournalIdentity {
        JournalIdentity { journal: 1, model_sha256: "ab".repeat(32), kv: kv.into() }
    }

    fn scores(log_prob: f64) -> Vec<Scored> {
        vec![Scored { log_prob, greedy: true }, Scored { log_prob: -0.1, greedy: false }]
    }

    #[test]
    fn what_was_scored_is_found_again_to_the_last_bit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal.jsonl");
        // Numbers that serde_json alone does not read back to the last bit.
        let value = -61.071_960_609_606_265;
        let mut journal = Journal::open(&path, &identity("f32")).unwrap();
        journal.add("a", "k", &scores(value)).unwrap();
        journal.add("b", "k", &scores(-1e-300)).unwrap();
        assert!(
            Journal::open(&path, &identity("f32"))
                .unwrap_err()
                .to_string()
                .contains("another process")
        );
        drop(journal);
        // A kill in the middle of a line.
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"{\"task\":\"c\",\"tok").unwrap();
        drop(file);
        let mut journal = Journal::open(&path, &identity("f32")).unwrap();
        assert_eq!(journal.len(), 2);
        assert_eq!(journal.find("a", "k").unwrap(), scores(value));
        assert_eq!(journal.find("b", "k").unwrap()[0].log_prob, -1e-300);
        assert_eq!(journal.find("c", "k"), None);
        journal.add("c", "k", &scores(-3.0)).unwrap();
        drop(journal);
        let journal = Journal::open(&path, &identity("f32")).unwrap();
        assert_eq!((journal.len(), journal.is_empty()), (3, false));
        assert_eq!(journal.find("c", "k").unwrap(), scores(-3.0));
    }

    #[test]
    fn a_journal_that_cannot_be_trusted_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal.jsonl");
        drop(Journal::open(&path, &identity("f32")).unwrap());
        let error = Journal::open(&path, &identity("int8")).unwrap_err();
        assert_eq!(error.exit().code(), 2);
        assert!(error.to_string().contains("kv f32"), "{error}");
        let good = std::fs::read_to_string(&path).unwrap();
        for (text, message) in [
            ("hello\n".to_owned(), "journal.jsonl:1: not the head"),
            (format!("{good}{{}}\n{good}"), "journal.jsonl:2: not a question's scores"),
            (format!("{good}{{\"task\":\"a\"}}\n"), "journal.jsonl:2"),
            (
                format!(
                    "{good}{{\"task\":\"a\",\"tokens_sha256\":\"b\",\"scores\":[[\"nan\",true]]}}\n"
                ),
                "journal.jsonl:2: not a question's scores: `nan`",
            ),
        ] {
            std::fs::write(&path, &text).unwrap();
            let error = Journal::open(&path, &identity("f32")).unwrap_err();
            assert!(error.to_string().contains(message), "{error}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text, "left as it was");
        }
        // Nothing but a torn head: begun anew.
        std::fs::write(&path, &good[..10]).unwrap();
        assert!(Journal::open(&path, &identity("f32")).unwrap().is_empty());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), good);
    }

    #[test]
    fn keys_tell_tokens_and_borders_apart() {
        let request =
            |tokens: &[u32], first| Request { tokens: tokens.to_vec(), first, truncated: false };
        let keys = [
            key(&[request(&[1, 2, 3], 1)]),
            key(&[request(&[1, 2, 3], 2)]),
            key(&[request(&[1, 2], 1), request(&[3], 1)]),
            key(&[request(&[1, 2, 4], 1)]),
        ];
        for (i, a) in keys.iter().enumerate() {
            assert!(keys[..i].iter().all(|b| a != b));
        }
    }
}

//! The `[model]` table of a training config: found by path or name, read, and
//! changed by `--set`. What else the file holds is not looked at.

use std::path::{Path, PathBuf};
use std::{env, fs};

use bitnet_core::ModelConfig;
use serde::Deserialize;
use toml::{Table, Value};

use crate::ExportError;

/// All that is read of a training config.
#[derive(Deserialize)]
struct File {
    model: ModelConfig,
}

/// The configuration that `name` stands for, with the changes `set`
/// (`model.key=value`), validated. `name` is a path, or the bare name of a file
/// in a folder `configs` of the working directory, or of the program's folder or
/// one above it; `.toml` may be left out of a bare name.
///
/// # Errors
/// No such file, one that cannot be read or has no valid `[model]` table, a
/// change that is none, or a model that cannot exist.
pub fn model_config(name: &str, set: &[String]) -> Result<ModelConfig, ExportError> {
    let program = env::current_exe().ok();
    let above = program.as_deref().into_iter().flat_map(Path::ancestors).skip(1);
    let path = find(name, std::iter::once(Path::new("")).chain(above))?;
    let text = fs::read_to_string(&path)
        .map_err(|source| ExportError::Read { path: path.clone(), source })?;
    let file: File = toml::from_str(&text)
        .map_err(|e| ExportError::Config { path, what: e.to_string().trim().to_owned() })?;
    let config = set.iter().try_fold(file.model, |config, text| change(&config, text))?;
    config.validate()?;
    Ok(config)
}

fn find<'p>(name: &str, folders: impl Iterator<Item = &'p Path>) -> Result<PathBuf, ExportError> {
    let path = PathBuf::from(name);
    if path.is_file() {
        return Ok(path);
    }
    let bare = path.components().count() == 1;
    for folder in folders.filter(|_| bare) {
        for file in [name.to_owned(), format!("{name}.toml")] {
            let path = folder.join("configs").join(file);
            if path.is_file() {
                return Ok(path);
            }
        }
    }
    Err(ExportError::NoConfig(name.to_owned()))
}

/// One change: the value is read as TOML, and as a string where it is none, so
/// that `model.hidden_act=silu` needs no quotes.
fn change(config: &ModelConfig, text: &str) -> Result<ModelConfig, ExportError> {
    let error = |what: String| ExportError::Set { text: text.to_owned(), what };
    let Some((key, value)) = text.split_once('=') else {
        return Err(error("expected model.key=value".into()));
    };
    let key = key.trim().strip_prefix("model.").ok_or_else(|| {
        error("only keys of the table `model` shape a synthetic model: model.key=value".into())
    })?;
    let value = value.trim();
    let value = toml::from_str::<Table>(&format!("value = {value}"))
        .ok()
        .and_then(|mut t| t.remove("value"))
        .unwrap_or_else(|| Value::String(value.to_owned()));
    let mut table = Table::try_from(config).map_err(|e| error(e.to_string()))?;
    table.insert(key.to_owned(), value);
    ModelConfig::deserialize(table).map_err(|e| error(e.message().trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table of a tiny model in a file of its own, with another table.
    fn file(folder: &Path, edit: impl Fn(String) -> String) -> String {
        let text = toml::to_string(&ModelConfig::tiny()).unwrap();
        let path = folder.join("x.toml");
        fs::write(&path, edit(format!("name = \"x\"\n[model]\n{text}[data]\ndir = 7\n"))).unwrap();
        path.to_str().unwrap().to_owned()
    }

    #[test]
    fn only_the_model_is_read_and_may_be_changed() {
        let dir = tempfile::tempdir().unwrap();
        let path = file(dir.path(), |text| text);
        assert_eq!(model_config(&path, &[]).unwrap(), ModelConfig::tiny());
        let set = ["model.num_hidden_layers=3", "model.hidden_act = silu", "model.head_dim=32"];
        let changed = model_config(&path, &set.map(str::to_owned)).unwrap();
        let (layers, dim) = (changed.num_hidden_layers, changed.head_dim);
        assert_eq!((layers, changed.hidden_act.name(), dim), (3, "silu", Some(32)));
    }

    #[test]
    fn a_bare_name_is_looked_up() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("a/b");
        fs::create_dir_all(&deep).unwrap();
        fs::create_dir_all(dir.path().join("configs")).unwrap();
        let path = file(&dir.path().join("configs"), |text| text);
        for name in ["x", "x.toml"] {
            assert_eq!(find(name, deep.ancestors()).unwrap(), Path::new(&path));
        }
        for name in ["y", "./x", "configs/x.toml"] {
            let error = find(name, deep.ancestors().take(2)).unwrap_err().to_string();
            assert!(error.starts_with(&format!("no config {name}: ")), "{error}");
        }
    }

    #[test]
    fn what_is_wrong_is_named_and_is_bad_usage() {
        let dir = tempfile::tempdir().unwrap();
        type Case = (fn(String) -> String, &'static [&'static str], &'static str);
        let cases: &[Case] = &[
            (|t| t.replace("hidden_size", "hiden_size"), &[], "hiden_size"),
            (|t| t.replace("[model]", "[modell]"), &[], "missing field `model`"),
            (|t| t.replace("vocab_size = 320", "vocab_size = \"a\""), &[], "expected usize"),
            (|t| t.replace("hidden_size = 64", "hidden_size = 66"), &[], "model.hidden_size = 66"),
            (|t| t, &["model.vocab_size"], "--set model.vocab_size: expected model.key=value"),
            (|t| t, &["batch.tokens=1"], "--set batch.tokens=1: only keys of the table `model`"),
            (|t| t, &["model.vocab=1"], "--set model.vocab=1: unknown field `vocab`"),
            (|t| t, &["model.vocab_size=x"], "--set model.vocab_size=x: invalid type"),
            (|t| t, &["model.vocab_size=0"], "model.vocab_size = 0"),
        ];
        for (edit, set, text) in cases {
            let path = file(dir.path(), edit);
            let set: Vec<String> = set.iter().map(|&s| s.to_owned()).collect();
            let error = model_config(&path, &set).unwrap_err();
            assert_eq!(error.exit(), bitnet_core::Exit::Usage, "{error}");
            assert!(error.to_string().contains(text), "{error}");
        }
    }
}

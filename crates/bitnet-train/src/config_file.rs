//! From `--config` and `--set` to a checked [`TrainConfig`]: finds the file,
//! parses it with errors that name file, line and key, and applies overrides.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::{env, fs};

use serde::Deserialize;
use toml::{Table, Value};

use crate::TrainError;
use crate::config::TrainConfig;
use crate::error::with_path;

/// The config file that `name` stands for: a path, or the bare name of a file in
/// a folder `configs` of the working directory, or of the program's folder or one
/// above it. `.toml` may be left out of a bare name.
///
/// # Errors
/// [`TrainError::NoConfig`] where there is none.
pub fn find(name: &str) -> Result<PathBuf, TrainError> {
    let program = env::current_exe().ok();
    let above = program.as_deref().into_iter().flat_map(Path::ancestors).skip(1);
    find_in(name, std::iter::once(Path::new("")).chain(above))
}

fn find_in<'p>(name: &str, folders: impl Iterator<Item = &'p Path>) -> Result<PathBuf, TrainError> {
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
    Err(TrainError::NoConfig { name: name.to_owned() })
}

/// Reads a config file and applies the overrides, in order. The result is not yet
/// [validated](TrainConfig::validate): flags may still change it.
///
/// # Errors
/// A file that cannot be read, a key or value that is none, a bad override.
pub fn load(path: &Path, overrides: &[String]) -> Result<TrainConfig, TrainError> {
    let text = fs::read_to_string(path).map_err(with_path(path))?;
    let config: TrainConfig = toml::from_str(&text).map_err(|e| config_error(path, &text, &e))?;
    with_overrides(config, overrides)
}

/// Applies overrides in order. A table that they make need only be whole behind the
/// last of them; an error is told of the first with which it arose.
///
/// # Errors
/// A key or a value that is none.
pub fn with_overrides(
    config: TrainConfig,
    overrides: &[String],
) -> Result<TrainConfig, TrainError> {
    let whole = |e: toml::ser::Error| std::io::Error::other(e);
    let mut root = Table::try_from(&config).map_err(whole)?;
    let mut errors = Vec::new();
    for text in overrides {
        apply(&mut root, text)?;
        errors.push(TrainConfig::deserialize(root.clone()).err().map(|e| e.message().to_owned()));
    }
    let Some(last) = errors.last().cloned().flatten() else {
        return TrainConfig::deserialize(root).map_err(|e| std::io::Error::other(e).into());
    };
    let first = errors.iter().position(|e| e.as_ref() == Some(&last)).unwrap_or_default();
    Err(TrainError::Override { text: overrides[first].clone(), what: last.trim().to_owned() })
}

/// The config as TOML, every key written out.
///
/// # Errors
/// None that a config can cause; the serializer's, as an I/O error.
pub fn to_toml(config: &TrainConfig) -> Result<String, TrainError> {
    toml::to_string(config).map_err(|e| std::io::Error::other(e).into())
}

/// The keys in which a run's saved config (its text) and a new one differ, each as
/// `table.key: old → new`. The run folder, where the data lies and what is recorded
/// are not among them: they do not change what is computed.
#[must_use]
pub fn changes(saved: &str, config: &TrainConfig) -> Vec<String> {
    // Both by way of their text: a value of f32 is another one as an f64.
    let new = to_toml(config).unwrap_or_default();
    // Keys that came after it was saved have their defaults.
    let full = toml::from_str(saved).ok().and_then(|c: TrainConfig| to_toml(&c).ok());
    let saved = full.as_deref().unwrap_or(saved);
    let (Ok(saved), Ok(new)) = (toml::from_str::<Table>(saved), toml::from_str::<Table>(&new))
    else {
        return vec!["the saved config is unreadable".to_owned()];
    };
    let (mut old_keys, mut new_keys) = (BTreeMap::new(), BTreeMap::new());
    flatten("", &saved, &mut old_keys);
    flatten("", &new, &mut new_keys);
    let names: BTreeSet<&String> = old_keys.keys().chain(new_keys.keys()).collect();
    let show = |v: Option<&String>| v.map_or("(absent)", String::as_str).to_owned();
    names
        .into_iter()
        .filter(|k| !["run_dir", "data.dir"].contains(&k.as_str()) && !k.starts_with("metrics."))
        .filter(|k| old_keys.get(*k) != new_keys.get(*k))
        .map(|k| format!("{k}: {} → {}", show(old_keys.get(k)), show(new_keys.get(k))))
        .collect()
}

/// Every key of a table as `table.key`, with its value as text.
pub(crate) fn flatten(prefix: &str, table: &Table, into: &mut BTreeMap<String, String>) {
    for (key, value) in table {
        let name = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        match value {
            Value::Table(t) => flatten(&name, t, into),
            other => {
                into.insert(name, other.to_string());
            }
        }
    }
}

/// One override, `table.key=value`: the value is read as TOML, and as a string
/// where it is none, so that `--set name=x` needs no quotes.
fn apply(root: &mut Table, text: &str) -> Result<(), TrainError> {
    let error = |what: String| TrainError::Override { text: text.to_owned(), what };
    let Some((key, value)) = text.split_once('=') else {
        return Err(error("expected table.key=value".into()));
    };
    let value = value.trim();
    let value = toml::from_str::<Table>(&format!("value = {value}"))
        .ok()
        .and_then(|mut t| t.remove("value"))
        .unwrap_or_else(|| Value::String(value.to_owned()));
    let path: Vec<&str> = key.trim().split('.').collect();
    let (last, tables) = path.split_last().unwrap_or((&"", &[]));
    let mut table = root;
    for name in tables {
        // A table that the config leaves out is made; one that no config has is an
        // unknown field.
        let entry = table.entry((*name).to_owned()).or_insert_with(|| Table::new().into());
        table = match entry {
            Value::Table(t) => t,
            _ => return Err(error(format!("`{name}` is no table"))),
        };
    }
    if matches!(table.get(*last), Some(Value::Table(_))) && !value.is_table() {
        return Err(error(format!("`{last}` is a table; name a key in it")));
    }
    table.insert((*last).to_owned(), value);
    Ok(())
}

/// Where in the file a parse error is, and of which key.
fn config_error(path: &Path, text: &str, error: &toml::de::Error) -> TrainError {
    let start = error.span().map_or(0, |span| span.start).min(text.len());
    let before = text.get(..start).unwrap_or("");
    let index = before.matches('\n').count();
    let lines: Vec<&str> = text.lines().collect();
    let key = lines.get(index).and_then(|l| l.split_once('=')).map(|(key, _)| key.trim());
    let header = |l: &&str| l.trim_start().starts_with('[');
    let table = lines.iter().take(index + 1).rev().find(|l| header(l));
    let table = table.map(|l| l.trim().trim_matches(['[', ']']).trim());
    let place = match (table, key) {
        (Some(table), Some(key)) => format!("{table}.{key}: "),
        (None, Some(key)) => format!("{key}: "),
        (Some(table), None) => format!("[{table}]: "),
        (None, None) => String::new(),
    };
    let what = format!("{place}{}", error.message().trim().replace('\n', ", "));
    TrainError::Config { path: path.to_path_buf(), line: index + 1, what }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::small;
    use bitnet_core::Exit;

    fn write(dir: &Path, text: &str) -> PathBuf {
        let path = dir.join("c.toml");
        fs::write(&path, text).unwrap();
        path
    }

    #[test]
    fn what_is_written_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let config = small(dir.path());
        let text = to_toml(&config).unwrap();
        assert_eq!(load(&write(dir.path(), &text), &[]).unwrap(), config);
        assert!(text.contains("rms_norm_eps = 1e-5") || text.contains("rms_norm_eps = 0.00001"));
    }

    #[test]
    fn errors_name_file_line_and_key() {
        let dir = tempfile::tempdir().unwrap();
        let good = to_toml(&small(dir.path())).unwrap();
        let cases = [
            ("seed = 1", "sed = 1", "sed: unknown field `sed`"),
            ("hidden_size", "hiden_size", "model.hiden_size: unknown field `hiden_size`"),
            ("hidden_size = 64", "hidden_size = \"64\"", "model.hidden_size: invalid type: string"),
            ("sequence = 32", "sequence = 3.5", "batch.sequence: invalid type: floating point"),
            ("micro_batch = 2", "micro_batch = -2", "batch.micro_batch: invalid value: integer"),
            ("kind = \"two-stage\"", "kind = \"sine\"", "schedule.kind: unknown variant `sine`"),
            ("keep = 2", "", "[checkpoint]: missing field `keep`"),
            ("[eval]", "[evaluation]", "unknown field `evaluation`"),
            ("beta1 = 0.9", "beta1 = 0..9", "optimizer.beta1: "),
            ("beta1 = 0.9", "beta1 = 0.9\nbeta1 = 0.9", "optimizer.beta1: duplicate key"),
        ];
        for (from, to, message) in cases {
            assert!(good.contains(from), "{from}");
            let text = good.replacen(from, to, 1);
            let path = write(dir.path(), &text);
            let error = load(&path, &[]).unwrap_err();
            assert_eq!(error.exit(), Exit::Usage);
            let error = error.to_string();
            let place = format!("{}:", path.display());
            let (line, what) = error.strip_prefix(&place).unwrap().split_once(": ").unwrap();
            assert!(what.contains(message), "{error}");
            if !to.is_empty() {
                let line: usize = line.parse().unwrap();
                let last = to.lines().last().unwrap();
                assert_eq!(text.lines().nth(line - 1).unwrap(), last_line(&text, last), "{error}");
            }
        }
    }

    /// The last line of `text` that contains `part`.
    fn last_line<'t>(text: &'t str, part: &str) -> &'t str {
        text.lines().rfind(|l| l.contains(part)).unwrap()
    }

    #[test]
    fn overrides_are_toml_or_text() {
        let dir = tempfile::tempdir().unwrap();
        let config = small(dir.path());
        let path = write(dir.path(), &to_toml(&config).unwrap());
        let set = |text: &str| load(&path, &[text.to_owned()]);
        assert_eq!(set("batch.tokens = 64").unwrap().batch.tokens, 64);
        assert_eq!(set("batch.micro_batch=auto").unwrap().batch.micro_batch, 0);
        assert_eq!(set("batch.micro_batch=4").unwrap().batch.micro_batch, 4);
        assert_eq!(set("name=x").unwrap().name, "x");
        assert_eq!(set("schedule.lr=1").unwrap().schedule.lr, 1.0);
        assert_eq!(set("sample.prompts=[\"a\", \"b\"]").unwrap().sample.prompts, ["a", "b"]);
        assert_eq!(
            set("model.weight_quantizer=none").unwrap().model.weight_quantizer.name(),
            "none"
        );
        assert_eq!(set("model.head_dim=16").unwrap().model.head_dim, Some(16));
        let two = ["distill.teacher=t", "distill.logits=1"].map(ToOwned::to_owned);
        assert_eq!(load(&path, &two).unwrap().distill.unwrap().teacher, Path::new("t"));
        let cases = [
            ("distill.teacher=t", "missing field `logits`"),
            ("seed", "expected table.key=value"),
            ("bach.tokens=1", "unknown field `bach`"),
            ("batch.token=1", "unknown field `token`"),
            ("batch=1", "`batch` is a table"),
            ("seed.x=1", "`seed` is no table"),
            ("batch.micro_batch=some", "string \"some\", expected a number of sequences or"),
            ("batch.tokens=many", "invalid type: string \"many\""),
        ];
        for (text, message) in cases {
            let error = set(text).unwrap_err();
            assert_eq!(error.exit(), Exit::Usage);
            let error = error.to_string();
            assert!(error.starts_with(&format!("--set {text}: ")), "{error}");
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn changes_are_listed_key_by_key() {
        let old = small(Path::new("a"));
        let text = to_toml(&old).unwrap();
        let mut new = small(Path::new("b"));
        assert!(changes(&text, &new).is_empty());
        // Saved by a program that knew no groups and no kinds.
        let (before, _) = text.split_once("[optimizer.groups").unwrap();
        let (_, after) = text.split_once("[eval]").unwrap();
        let earlier = format!("{before}[eval]{after}").replace("kind = \"adamw\"\n", "");
        let earlier = earlier.replace("moments = \"f32\"\n", "");
        assert!(changes(&earlier, &new).is_empty(), "{earlier}");
        new.schedule.steps = 40;
        new.model.head_dim = Some(16);
        assert_eq!(
            changes(&text, &new),
            ["model.head_dim: (absent) → 16", "schedule.steps: 20 → 40"]
        );
        assert_eq!(changes("[", &new), ["the saved config is unreadable"]);
    }

    #[test]
    fn a_bare_name_is_looked_up() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("a/b");
        fs::create_dir_all(&deep).unwrap();
        fs::create_dir_all(dir.path().join("configs")).unwrap();
        let file = dir.path().join("configs/x.toml");
        fs::write(&file, "").unwrap();
        for name in ["x", "x.toml"] {
            assert_eq!(find_in(name, deep.ancestors()).unwrap(), file);
        }
        assert_eq!(find_in(file.to_str().unwrap(), std::iter::empty()).unwrap(), file);
        for name in ["y", "./x", "configs/x.toml"] {
            let error = find_in(name, deep.ancestors().take(2)).unwrap_err();
            assert_eq!(error.exit(), Exit::Usage);
        }
    }

    /// Every config of the project: it loads, validates, and has this many
    /// parameters in all and in ternary matrices.
    #[test]
    fn the_projects_configs() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs");
        let expected = [
            ("100b", 100_209_546_240, 99_876_864_000),
            ("125m", 134_139_648, 84_934_656),
            ("1.3b", 1_273_579_488, 1_207_762_944),
            ("2b4t", 2_412_820_480, 2_084_044_800),
            ("350m", 355_079_168, 289_406_976),
            ("3b", 3_324_381_440, 3_221_504_000),
            ("700m", 728_839_680, 679_477_248),
            ("70b", 70_556_655_616, 68_451_041_280),
            ("7b", 6_574_215_168, 6_442_450_944),
            ("bench", 5_795_072, 4_743_168),
            ("quickstart", 3_954_624, 2_899_968),
            ("tiny", 348_928, 86_016),
        ];
        let mut found = 0;
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                continue;
            }
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            let config = load(&path, &[]).unwrap();
            config.validate().unwrap();
            assert_eq!(config.name, name);
            let count = config.model.parameter_count();
            let (_, total, linear) =
                expected.iter().find(|e| e.0 == name).unwrap_or_else(|| panic!("{name} is new"));
            assert_eq!((count.total(), count.linear), (*total, *linear), "{name}");
            // The comment above the table says the same.
            let spaced = |n: u64| {
                let digits = n.to_string();
                let groups: Vec<&str> = digits
                    .as_bytes()
                    .rchunks(3)
                    .rev()
                    .map(|g| std::str::from_utf8(g).unwrap())
                    .collect();
                groups.join(" ")
            };
            let text = fs::read_to_string(&path).unwrap();
            let comment = format!(
                "# {} parameters, {} of them ternary.\n[model]",
                spaced(*total),
                spaced(*linear)
            );
            assert!(text.contains(&comment), "{name}: {comment}");
            found += 1;
        }
        assert_eq!(found, expected.len());
    }

    /// Every recipe is the quickstart, but for its name and the keys it is about.
    #[test]
    fn the_projects_recipes() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs");
        let base = to_toml(&load(&folder.join("quickstart.toml"), &[]).unwrap()).unwrap();
        let mut found = 0;
        for entry in fs::read_dir(folder.join("recipes")).unwrap() {
            let path = entry.unwrap().path();
            let config = load(&path, &[]).unwrap();
            config.validate().unwrap();
            assert_eq!(config.name, path.file_stem().unwrap().to_str().unwrap());
            assert_eq!(config.run_dir, Path::new("runs").join(&config.name));
            let mut about = changes(&base, &config);
            about.retain(|c| !c.starts_with("name: "));
            assert!(!about.is_empty(), "{}", path.display());
            for change in about {
                let keys = ["model.weight_quantizer", "model.recipe.", "quantization.", "distill."];
                assert!(keys.iter().any(|k| change.starts_with(k)), "{}: {change}", config.name);
            }
            found += 1;
        }
        assert_eq!(found, 9);
    }
}

//! A model folder that was checked against its own `config.json`: every tensor
//! that the configuration needs is there, in its shape, and no other.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use bitnet_core::names::{self, Linear, Tensor};
use bitnet_core::{Dtype, ModelConfig};
use serde_json::Value;

use super::{HfConfig, HfError, PackedScale, SpecialTokens, TensorFile, from_json};

/// The weights in one file.
const SINGLE: &str = "model.safetensors";
/// The list of which tensor lies in which of several files.
const INDEX: &str = "model.safetensors.index.json";
/// Names that an error lists before it only counts.
const LISTED: usize = 4;

/// A model folder, open for reading.
#[derive(Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    config: HfConfig,
    files: Vec<TensorFile>,
    /// Tensor name to index into `files`.
    at: HashMap<String, usize>,
}

/// The ternary values of a packed matrix `[out, in]`, row-major, and the scale
/// that multiplies them.
#[derive(Debug, Clone, PartialEq)]
pub struct Trits {
    /// The values.
    pub values: Vec<i8>,
    /// The scale, by which each is multiplied.
    pub scale: f32,
}

impl Checkpoint {
    /// Opens a checkpoint of master weights: a folder that holds `config.json`
    /// and `model.safetensors`, or the shards that
    /// `model.safetensors.index.json` lists.
    ///
    /// # Errors
    /// A missing or broken file, packed weights instead of master weights, and
    /// tensors that are missing, unexpected or of another shape.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self, HfError> {
        let folder = folder.as_ref();
        let config = read_config(folder)?;
        if config.packed.is_some() {
            return Err(HfError::Unsupported {
                path: folder.join("config.json"),
                key: "quantization_config".into(),
                value: "packed weights (offline)".into(),
                reason: "master weights (linear_class autobitlinear, quantization_mode online) are"
                    .into(),
            });
        }
        Self::with_config(folder, config)
    }

    /// Opens a model folder whatever its linear weights are: master weights,
    /// packed ternary values, or floats.
    ///
    /// # Errors
    /// As [`Checkpoint::open`], but for packed weights.
    pub fn open_any(folder: impl AsRef<Path>) -> Result<Self, HfError> {
        let folder = folder.as_ref();
        Self::with_config(folder, read_config(folder)?)
    }

    fn with_config(folder: &Path, config: HfConfig) -> Result<Self, HfError> {
        let (files, mut at) = open_files(folder)?;
        // What older tools store beside the weights and nothing needs: rotary
        // frequencies, and a tied head's copy of the embedding.
        at.retain(|name, _| !name.ends_with(".rotary_emb.inv_freq"));
        if config.model.tie_word_embeddings && at.contains_key(names::EMBEDDING) {
            at.remove(names::LM_HEAD);
        }
        let mut checkpoint = Self { folder: folder.into(), config, files, at };
        checkpoint.check()?;
        if !checkpoint.config.states_embedding_dtype
            && let Ok(file) = checkpoint.file_of(names::EMBEDDING)
            && let Some(dtype) = file.float_type(names::EMBEDDING)
        {
            checkpoint.config.model.embedding_dtype = dtype;
        }
        Ok(checkpoint)
    }

    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The model.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config.model
    }

    /// Its special tokens.
    #[must_use]
    pub fn special(&self) -> SpecialTokens {
        self.config.special
    }

    /// A whole tensor as f32, row-major, in the shape that
    /// [`names::tensors`] gives it.
    ///
    /// # Errors
    /// No tensor of that name, or an I/O error.
    pub fn read(&self, name: &str) -> Result<Vec<f32>, HfError> {
        self.file_of(name)?.read(name)
    }

    /// Elements `first..first + out.len()` of a tensor.
    ///
    /// # Errors
    /// As [`Checkpoint::read`], and a range beyond the tensor.
    pub fn read_at(&self, name: &str, first: usize, out: &mut [f32]) -> Result<(), HfError> {
        self.file_of(name)?.read_at(name, first, out)
    }

    /// The type in which float linear weights are stored.
    #[must_use]
    pub fn linear_dtype(&self) -> Dtype {
        let name = Linear::Q.hf(0);
        self.file_of(&name).ok().and_then(|f| f.float_type(&name)).unwrap_or(Dtype::F16)
    }

    /// How the linear weights are packed; none where they are floats.
    #[must_use]
    pub fn packed(&self) -> Option<PackedScale> {
        self.config.packed
    }

    /// The ternary values of a linear layer of a packed model.
    ///
    /// Row `r + i · ⌈out / 4⌉` lies in bits `2i` and `2i + 1` of the bytes of row
    /// `r`, as codes (value + 1).
    ///
    /// # Errors
    /// A tensor that is not packed, a code that is no ternary value, a scale that
    /// is not positive and finite, I/O errors.
    pub fn read_packed(&self, layer: usize, linear: Linear) -> Result<Trits, HfError> {
        let name = linear.hf(layer);
        let [rows, cols] = linear.shape(self.config());
        let file = self.file_of(&name)?;
        let bytes = file.read_bytes(&name)?;
        let quarter = rows.div_ceil(4);
        let mut values = Vec::with_capacity(rows * cols);
        for row in 0..rows {
            let (i, r) = (row / quarter, row % quarter);
            let codes = bytes[r * cols..][..cols].iter().map(|b| (b >> (2 * i) & 3) as i8);
            values.extend(codes.map(|code| code - 1));
        }
        if let Some(at) = values.iter().position(|v| *v == 2) {
            let (row, col) = (at / cols, at % cols);
            let reason =
                format!("tensor {name}: row {row}, column {col}: a code of 3 is no ternary value");
            return Err(HfError::safetensors(file.path(), reason));
        }
        let scale_name = scale_name(&name);
        let file = self.file_of(&scale_name)?;
        let stored = file.read(&scale_name)?[0];
        let scale = match self.config.packed {
            Some(PackedScale::Divides) => 1.0 / stored,
            _ => stored,
        };
        if !(scale > 0.0 && scale.is_finite() && stored.is_finite()) {
            let reason = format!("tensor {scale_name}: a scale of {stored}");
            return Err(HfError::safetensors(file.path(), reason));
        }
        Ok(Trits { values, scale })
    }

    fn file_of(&self, name: &str) -> Result<&TensorFile, HfError> {
        let index = self.at.get(name).ok_or_else(|| self.missing(&[name]))?;
        Ok(&self.files[*index])
    }

    fn check(&self) -> Result<(), HfError> {
        let expected = self.expected();
        let absent: Vec<&str> =
            expected.keys().map(String::as_str).filter(|n| !self.at.contains_key(*n)).collect();
        if !absent.is_empty() {
            return Err(self.missing(&absent));
        }
        let mut extra: Vec<&str> =
            self.at.keys().map(String::as_str).filter(|n| !expected.contains_key(*n)).collect();
        if !extra.is_empty() {
            extra.sort_unstable();
            let (path, count) = (self.folder.clone(), extra.len());
            return Err(HfError::Unexpected { path, count, names: list(&extra) });
        }
        for (tensor, expected) in expected {
            let file = self.file_of(&tensor)?;
            let found = file.shape(&tensor).unwrap_or_default().to_vec();
            // Some tools store a scale without a dimension.
            let scalar = expected == [1] && found.is_empty();
            if found != expected && !scalar {
                return Err(HfError::Shape { path: file.path().into(), tensor, expected, found });
            }
        }
        Ok(())
    }

    /// Names and shapes of all tensors.
    fn expected(&self) -> BTreeMap<String, Vec<usize>> {
        let mut all = BTreeMap::new();
        for tensor in Tensor::all(self.config()) {
            let (name, mut dims) = (tensor.hf(), tensor.dims(self.config()));
            if let (Tensor::Linear(..), Some(_)) = (tensor, self.config.packed) {
                dims[0] = dims[0].div_ceil(4);
                all.insert(scale_name(&name), vec![1]);
            }
            all.insert(name, dims);
        }
        all
    }

    fn missing(&self, names: &[&str]) -> HfError {
        HfError::Missing { path: self.folder.clone(), count: names.len(), names: list(names) }
    }
}

/// The scale of a packed weight.
fn scale_name(weight: &str) -> String {
    format!("{weight}_scale")
}

fn list(names: &[&str]) -> String {
    let mut text = names[..names.len().min(LISTED)].join(", ");
    if names.len() > LISTED {
        text.push_str(", …");
    }
    text
}

fn read_config(folder: &Path) -> Result<HfConfig, HfError> {
    let path = folder.join("config.json");
    let text = fs::read_to_string(&path).map_err(|e| HfError::read(&path, e))?;
    from_json(&text, &path)
}

type Files = (Vec<TensorFile>, HashMap<String, usize>);

fn open_files(folder: &Path) -> Result<Files, HfError> {
    let index = folder.join(INDEX);
    let single = folder.join(SINGLE);
    if single.exists() || !index.exists() {
        let file = TensorFile::open(single)?;
        let at = file.names().into_iter().map(|n| (n, 0)).collect();
        return Ok((vec![file], at));
    }
    let shards = read_index(&index)?;
    let (mut files, mut at) = (Vec::new(), HashMap::new());
    for (shard, tensors) in shards {
        let file = TensorFile::open(folder.join(&shard))?;
        if let Some(absent) = tensors.iter().find(|t| file.shape(t).is_none()) {
            let (path, names) = (file.path().to_owned(), absent.clone());
            return Err(HfError::Missing { path, count: 1, names });
        }
        // Also those that the index leaves out: they are found unexpected.
        for name in file.names() {
            if at.insert(name.clone(), files.len()).is_some() {
                return Err(HfError::safetensors(
                    file.path(),
                    format!("tensor {name} is in two shards"),
                ));
            }
        }
        files.push(file);
    }
    Ok((files, at))
}

/// The tensors of each shard, by the shard's file name.
fn read_index(path: &Path) -> Result<BTreeMap<String, Vec<String>>, HfError> {
    let text = fs::read_to_string(path).map_err(|e| HfError::read(path, e))?;
    let json: Value = serde_json::from_str(&text)
        .map_err(|source| HfError::Json { path: path.into(), source })?;
    let bad = |key: String, expected, found: &Value| HfError::Key {
        path: path.into(),
        key,
        expected,
        found: found.to_string().chars().take(80).collect(),
    };
    let map = (json["weight_map"].as_object())
        .ok_or_else(|| bad("weight_map".into(), "an object", &json["weight_map"]))?;
    let mut shards: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (tensor, file) in map {
        // A name with a folder in it could point anywhere on this machine.
        let plain = file.as_str().filter(|f| !f.is_empty() && !f.contains(['/', '\\', ':']));
        let plain = plain.filter(|f| *f != "." && *f != "..");
        let name = plain
            .ok_or_else(|| bad(format!("weight_map.{tensor}"), "the name of a file here", file))?;
        shards.entry(name.to_owned()).or_default().push(tensor.clone());
    }
    Ok(shards)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hf::{chain, save, to_json};

    type Tensors = Vec<(String, Vec<usize>, Vec<f32>)>;

    fn tensors(config: &ModelConfig) -> Tensors {
        let mut i = 0;
        let all = names::tensors(config).into_iter();
        all.map(|(name, shape)| {
            i += 1;
            let data = (0..shape.iter().product()).map(|j: usize| (i * 7 + j) as f32).collect();
            (name, shape, data)
        })
        .collect()
    }

    fn write(path: &Path, tensors: &[(String, Vec<usize>, Vec<f32>)]) {
        save(path, &[], tensors.iter().map(|(n, s, d)| (n.clone(), s.clone(), &d[..]))).unwrap();
    }

    fn folder(config: &ModelConfig, tensors: &Tensors) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let json = to_json(config, SpecialTokens { bos: None, eos: Some(3) });
        fs::write(dir.path().join("config.json"), json.to_string()).unwrap();
        write(&dir.path().join(SINGLE), tensors);
        dir
    }

    #[test]
    fn one_file_and_shards_read_the_same() {
        let config = ModelConfig::tiny();
        let all = tensors(&config);
        let dir = folder(&config, &all);
        let check = || {
            let c = Checkpoint::open(dir.path()).unwrap();
            assert_eq!(c.config(), &config);
            assert_eq!(c.special().eos, Some(3));
            for (name, _, data) in &all {
                assert_eq!(&c.read(name).unwrap(), data, "{name}");
            }
            let mut row = [0.0; 2];
            c.read_at(names::EMBEDDING, 64, &mut row).unwrap();
            assert_eq!(row, all[0].2[64..66]);
        };
        check();
        fs::remove_file(dir.path().join(SINGLE)).unwrap();
        let (a, b) = all.split_at(5);
        let mut map = serde_json::Map::new();
        for (file, part) in [("model-1.safetensors", a), ("model-2.safetensors", b)] {
            write(&dir.path().join(file), part);
            map.extend(part.iter().map(|t| (t.0.clone(), Value::from(file))));
        }
        let index = |map: &serde_json::Map<String, Value>| {
            let json = serde_json::json!({ "metadata": {}, "weight_map": map });
            fs::write(dir.path().join(INDEX), json.to_string()).unwrap();
        };
        index(&map);
        check();

        let error = || chain(&Checkpoint::open(dir.path()).unwrap_err());
        for away in ["../model-1.safetensors", "/etc/passwd", "..", "c:x", ""] {
            let mut map = map.clone();
            map[names::EMBEDDING] = away.into();
            index(&map);
            assert!(error().contains("expected the name of a file here"), "{away}: {}", error());
        }
        let mut wrong = map.clone();
        wrong[names::EMBEDDING] = "model-2.safetensors".into();
        index(&wrong);
        assert!(
            error().contains("model-2.safetensors: 1 tensor(s) missing: model.embed"),
            "{}",
            error()
        );
        fs::remove_file(dir.path().join("model-2.safetensors")).unwrap();
        index(&map);
        assert!(error().contains("model-2.safetensors: "), "{}", error());
        fs::write(dir.path().join(INDEX), "{").unwrap();
        assert!(error().contains("not valid JSON"), "{}", error());
    }

    #[test]
    fn what_is_wrong_with_a_folder_is_named() {
        let config = ModelConfig::tiny();
        let all = tensors(&config);
        type Edit = fn(&mut Tensors);
        let cases: [(Edit, &str); 4] = [
            (|t| drop(t.remove(3)), "1 tensor(s) missing: model.layers.0."),
            (|t| t.truncate(10), "tensor(s) missing: model.layers.0."),
            (
                |t| t.push(("lm_head.bias".into(), vec![1], vec![0.0])),
                "1 unexpected tensor(s): lm_head.bias",
            ),
            (
                |t| {
                    let at =
                        t.iter().position(|t| t.0.ends_with("1.mlp.down_proj.weight")).unwrap();
                    t[at].1 = vec![64, 156];
                    t[at].2.truncate(64 * 156);
                },
                "model.safetensors: tensor model.layers.1.mlp.down_proj.weight: expected [64, 160], found [64, 156]",
            ),
        ];
        for (edit, text) in cases {
            let mut t = all.clone();
            edit(&mut t);
            let dir = folder(&config, &t);
            let e = chain(&Checkpoint::open(dir.path()).unwrap_err());
            assert!(e.starts_with(&dir.path().display().to_string()) && e.contains(text), "{e}");
        }
        let dir = folder(&config, &all);
        let missing = dir.path().join("none");
        let e = chain(&Checkpoint::open(&missing).unwrap_err());
        assert!(e.starts_with(&missing.join("config.json").display().to_string()), "{e}");
        fs::remove_file(dir.path().join(SINGLE)).unwrap();
        let e = chain(&Checkpoint::open(dir.path()).unwrap_err());
        assert!(e.contains("model.safetensors: cannot be read: No such file"), "{e}");
        let path = dir.path().join("config.json");
        let json = fs::read_to_string(&path).unwrap().replace("online", "offline");
        fs::write(&path, json).unwrap();
        let e = chain(&Checkpoint::open(dir.path()).unwrap_err());
        assert!(e.contains("packed weights (offline) is not supported"), "{e}");
    }
}

//! What is compared: a model, or a variant of a dense one.

use std::fs::File;
use std::io::{self, Seek};
use std::path::{Path, PathBuf};

use bitnet_format::gguf::blocks::RowType;
use bitnet_format::model::{self, OpenOptions};
use bitnet_format::pack::{DenseType, LayoutChoice, PackError, pack_temporary};

use crate::EvalError;

/// What the linear layers of a dense model are made into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// Single precision.
    F32,
    /// Half precision.
    F16,
    /// Blocks of 8-bit integers with a scale.
    Int8,
    /// Blocks of 4-bit integers with a scale.
    Int4,
    /// Ternary values, though it was not trained for them.
    Ternary,
}

impl Variant {
    /// All there are.
    pub const ALL: [Self; 5] = [Self::F32, Self::F16, Self::Int8, Self::Int4, Self::Ternary];

    /// The name behind the `@`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
            Self::Ternary => "ternary",
        }
    }

    fn dense(self) -> DenseType {
        match self {
            Self::F32 => DenseType::F32,
            Self::F16 => DenseType::F16,
            Self::Int8 => DenseType::Rows(RowType::Int8),
            Self::Int4 => DenseType::Rows(RowType::Int4),
            Self::Ternary => DenseType::Auto,
        }
    }
}

/// A model to compare: `PATH` or `PATH@VARIANT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    /// The model.
    pub path: PathBuf,
    /// What is made of it.
    pub variant: Option<Variant>,
}

impl Spec {
    /// Parses `PATH` or `PATH@VARIANT`. A path that exists is a path, whatever it
    /// contains.
    ///
    /// # Errors
    /// A variant that is none.
    pub fn parse(text: &str) -> Result<Self, EvalError> {
        let plain = || Self { path: text.into(), variant: None };
        let Some((path, name)) = text.rsplit_once('@') else { return Ok(plain()) };
        if path.is_empty() || Path::new(text).exists() {
            return Ok(plain());
        }
        match Variant::ALL.into_iter().find(|v| v.name() == name) {
            Some(variant) => Ok(Self { path: path.into(), variant: Some(variant) }),
            None => {
                let known = Variant::ALL.map(Variant::name).join(", ");
                let message = format!("{text}: unknown variant `{name}`; known: {known}");
                Err(EvalError::Usage(message))
            }
        }
    }

    /// What it is called in tables: the file's name without its ending, and the variant.
    #[must_use]
    pub fn label(&self) -> String {
        let name = match self.path.extension().is_some_and(|e| e == "gguf") {
            true => self.path.file_stem(),
            false => self.path.file_name(),
        };
        let name = name.map_or_else(|| self.path.to_string_lossy(), |n| n.to_string_lossy());
        match self.variant {
            Some(variant) => format!("{name}@{}", variant.name()),
            None => name.into_owned(),
        }
    }

    /// The packed file that is measured: the model's own, or one that is made of it in
    /// `folder` under the name `number`.gguf, as `bitnet-export` makes it.
    ///
    /// # Errors
    /// A model that cannot be read, a variant that it cannot have, no room.
    pub fn prepare(&self, folder: &Path, number: usize) -> Result<PathBuf, EvalError> {
        let ptq = self.variant == Some(Variant::Ternary);
        let options = OpenOptions { ptq, ..OpenOptions::default() };
        if self.variant.is_none() && is_packed(&self.path) {
            return Ok(self.path.clone());
        }
        let pack = |e: PackError| EvalError::Engine(e.into());
        let source = model::open(&self.path, &options).map_err(|e| pack(e.into()))?;
        let dense = self.variant.map_or(DenseType::Auto, Variant::dense);
        if !dense.suits(&source.facts().config) {
            let (path, name) = (self.path.display(), dense.name());
            let message = format!("{path}@{name}: the model is ternary, not dense");
            return Err(EvalError::Usage(message));
        }
        let packed = pack_temporary(&*source, LayoutChoice::Auto, dense, &mut |_, _| {});
        let mut packed = packed.map_err(pack)?.file;
        let path = folder.join(format!("{number}.gguf"));
        let write = |source| EvalError::Write { path: path.clone(), source };
        packed.rewind().map_err(write)?;
        let mut out = File::create(&path).map_err(write)?;
        io::copy(&mut packed, &mut out).map_err(write)?;
        Ok(path)
    }
}

/// Whether a path is a packed file, which is used as it is. What cannot be opened at all
/// is told by who opens it.
fn is_packed(path: &Path) -> bool {
    let Ok(map) = bitnet_format::map::map(path, false) else { return false };
    let name = path.display().to_string();
    bitnet_format::gguf::Reader::parse(&map, &name)
        .and_then(|reader| Ok(reader.str("general.architecture")? == bitnet_engine::ARCHITECTURE))
        .unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variant_stands_behind_the_last_at() {
        let spec = Spec::parse("a@b/twin.gguf@int8").unwrap();
        assert_eq!(
            (spec.path.to_str(), spec.variant),
            (Some("a@b/twin.gguf"), Some(Variant::Int8))
        );
        assert_eq!(spec.label(), "twin@int8");
        assert_eq!(Spec::parse("dir/model.gguf").unwrap().label(), "model");
        assert_eq!(Spec::parse("runs/tiny.v2").unwrap().label(), "tiny.v2");
        let error = Spec::parse("twin.gguf@int3").unwrap_err().to_string();
        assert!(error.contains("unknown variant `int3`; known: f32, f16, int8"), "{error}");
        let dir = tempfile::tempdir().unwrap();
        let odd = dir.path().join("x@y");
        std::fs::write(&odd, "").unwrap();
        assert_eq!(Spec::parse(odd.to_str().unwrap()).unwrap().variant, None);
    }
}

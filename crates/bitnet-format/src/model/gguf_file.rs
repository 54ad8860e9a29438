//! An open GGUF file: its directory in memory, its data read by position, so
//! that a file larger than memory is no trouble.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use bitnet_core::Dtype;

use super::ModelError;
use crate::gguf::{Directory, GgmlType, GgufError, TensorInfo, read_head};

/// A file whose directory was checked.
pub(super) struct GgufFile {
    pub(super) path: PathBuf,
    /// What errors call it.
    pub(super) name: String,
    file: Mutex<File>,
    /// The bytes that hold the directory.
    head: Vec<u8>,
    total: u64,
    /// Each tensor, and where its data begins in the file.
    tensors: HashMap<String, (TensorInfo, u64)>,
}

impl GgufFile {
    pub(super) fn open(path: &Path) -> Result<Self, ModelError> {
        let name = path.display().to_string();
        let read = |source| ModelError::Read { path: path.into(), source };
        let mut file = File::open(path).map_err(read)?;
        let (head, total) = read_head(&mut file, &name)?;
        let directory = Directory::parse(&head, total, &name)?;
        let start = directory.data_start();
        let tensors = directory.tensors().iter();
        let tensors = tensors.map(|t| (t.name.clone(), (t.clone(), start + t.offset))).collect();
        Ok(Self { path: path.into(), name, file: Mutex::new(file), head, total, tensors })
    }

    /// The keys and tensors once more; they were checked on opening.
    pub(super) fn directory(&self) -> Result<Directory<'_>, ModelError> {
        Ok(Directory::parse(&self.head, self.total, &self.name)?)
    }

    pub(super) fn architecture(&self) -> Result<String, ModelError> {
        Ok(self.directory()?.get("general.architecture")?)
    }

    /// The memory of the directory, which is not needed any more.
    pub(super) fn forget_head(&mut self) {
        self.head = Vec::new();
    }

    pub(super) fn find(&self, tensor: &str) -> Option<&TensorInfo> {
        self.tensors.get(tensor).map(|t| &t.0)
    }

    pub(super) fn tensor(&self, tensor: &str) -> Result<&TensorInfo, ModelError> {
        let missing =
            || GgufError::MissingTensor { file: self.name.clone(), tensor: tensor.into() };
        Ok(self.find(tensor).ok_or_else(missing)?)
    }

    /// The float type that holds a tensor's values: its own, or f16 for types of
    /// a few bits.
    pub(super) fn dtype(&self, tensor: &str) -> Dtype {
        match self.find(tensor).map(|t| t.ty) {
            Some(GgmlType::F32) => Dtype::F32,
            Some(GgmlType::BF16) => Dtype::Bf16,
            _ => Dtype::F16,
        }
    }

    /// Bytes `first..first + out.len()` of a tensor.
    pub(super) fn read(&self, tensor: &str, first: u64, out: &mut [u8]) -> Result<(), ModelError> {
        let info = self.tensor(tensor)?;
        let bytes = info.bytes().unwrap_or(0);
        if first.checked_add(out.len() as u64).is_none_or(|end| end > bytes) {
            let what = format!("tensor {tensor}: bytes {first}..+{} of {bytes}", out.len());
            return Err(ModelError::Invalid { path: self.path.clone(), what });
        }
        let start = self.tensors[tensor].1 + first;
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        (file.seek(SeekFrom::Start(start)))
            .and_then(|_| file.read_exact(out))
            .map_err(|source| ModelError::Read { path: self.path.clone(), source })
    }

    /// All bytes of a tensor; the directory was checked against the file's size.
    pub(super) fn read_all(&self, tensor: &str) -> Result<Vec<u8>, ModelError> {
        let mut out = vec![0; self.tensor(tensor)?.bytes().unwrap_or(0) as usize];
        self.read(tensor, 0, &mut out)?;
        Ok(out)
    }
}

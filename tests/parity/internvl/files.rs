//! JSON and safetensors of the fixture.

use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde::de::DeserializeOwned;

use crate::parity::fixture;

/// Root of the fixture.
pub(super) fn root() -> PathBuf {
    fixture::root("internvl")
}

/// Folders `golden/<kind>` that belong to a `checkpoint_<kind>`, and those checkpoints.
pub(super) fn kinds() -> Vec<(PathBuf, PathBuf)> {
    let mut checkpoints: Vec<PathBuf> = std::fs::read_dir(root())
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("checkpoint_")))
        .collect();
    checkpoints.sort();
    let kind = |p: &Path| p.file_name().unwrap().to_string_lossy().replace("checkpoint_", "");
    checkpoints.into_iter().map(|c| (root().join("golden").join(kind(&c)), c)).collect()
}

pub(super) fn json<T: DeserializeOwned>(path: &Path) -> T {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A safetensors file in memory.
pub(super) struct Tensors {
    path: PathBuf,
    bytes: Vec<u8>,
}

impl Tensors {
    pub(super) fn open(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        Self { path: path.to_path_buf(), bytes }
    }

    fn file(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).unwrap()
    }

    pub(super) fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.file().names().into_iter().map(ToString::to_string).collect();
        names.sort();
        names
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.file().tensor(name).is_ok()
    }

    pub(super) fn shape(&self, name: &str) -> Vec<usize> {
        self.view(name, |shape, _, _| shape.to_vec())
    }

    fn view<R>(&self, name: &str, read: impl FnOnce(&[usize], Dtype, &[u8]) -> R) -> R {
        let file = self.file();
        let view = file.tensor(name).unwrap_or_else(|e| panic!("{} {name}: {e}", self.path.display()));
        read(view.shape(), view.dtype(), view.data())
    }

    pub(super) fn f32(&self, name: &str) -> Vec<f32> {
        self.view(name, |_, dtype, data| {
            assert_eq!(dtype, Dtype::F32, "{name}");
            data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
        })
    }

    /// Integers of any width.
    pub(super) fn i32(&self, name: &str) -> Vec<i32> {
        self.view(name, |_, dtype, data| match dtype {
            Dtype::I64 => data.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b) as i32).collect(),
            Dtype::I32 => data.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b)).collect(),
            Dtype::U8 | Dtype::BOOL => data.iter().map(|b| i32::from(*b)).collect(),
            Dtype::I8 => data.iter().map(|b| i32::from(*b as i8)).collect(),
            other => panic!("{name} is {other:?}"),
        })
    }

    pub(super) fn u8(&self, name: &str) -> Vec<u8> {
        self.view(name, |_, dtype, data| {
            assert_eq!(dtype, Dtype::U8, "{name}");
            data.to_vec()
        })
    }
}

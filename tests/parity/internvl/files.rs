//! JSON and safetensors of the fixture.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use crate::parity::fixture;
pub(super) use crate::parity::fixture::Tensors;

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

//! The model families: registry, and the closed enum the rest of the program holds.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub mod llava_med;

/// `[model]` of a recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ModelConfig {
    /// Family, as `medtune models` lists it.
    pub name: String,
    /// Checkpoint directory in Hugging Face layout; when absent, `preset` is initialised at random.
    pub checkpoint: Option<PathBuf>,
    /// Shape of a randomly initialised model.
    pub preset: String,
    /// Directory with other weights for the vision tower.
    pub vision_tower: Option<PathBuf>,
}

impl Default for ModelConfig {
    fn default() -> Self {
        Self { name: "llava_med".into(), checkpoint: None, preset: "tiny".into(), vision_tower: None }
    }
}

//! Low-rank adapters on any `Linear` of any model: targets, injection, forward, merge, PEFT files.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `[adapter]` of a recipe. Names and defaults as in PEFT's `LoraConfig`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AdapterConfig {
    /// Rank of the update.
    pub r: usize,
    /// The update is scaled by `lora_alpha / r`.
    pub lora_alpha: f64,
    /// Share of inputs of the update that is zeroed in training.
    pub lora_dropout: f64,
    /// Module names, globs (`language.**.q_proj`), regular expressions (`re:...`), or `all-linear`.
    pub target_modules: Vec<String>,
    /// Modules that are trained and saved in full, for example `mm_projector`.
    pub modules_to_save: Vec<String>,
}

impl Default for AdapterConfig {
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 16.0,
            lora_dropout: 0.0,
            target_modules: vec!["all-linear".into()],
            modules_to_save: Vec::new(),
        }
    }
}

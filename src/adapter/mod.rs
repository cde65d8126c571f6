//! Low-rank adapters on any `Linear` of any model: targets, injection, forward, merge, PEFT files.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub mod inject;
pub mod lora;
pub mod merge;
pub mod peft;
pub mod target;
pub mod tensors;

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
    /// Linear modules that get an update: names as in PEFT (`q_proj`), globs (`model.layers.*.mlp.*`), regular
    /// expressions of the whole name (`re:...`), or `all-linear` (all but `lm_head`). A tower in front keeps to that
    /// tower: `language:q_proj`. Only towers that `[train]` sets to `lora` take part.
    pub target_modules: Vec<String>,
}

impl Default for AdapterConfig {
    fn default() -> Self {
        Self { r: 8, lora_alpha: 16.0, lora_dropout: 0.0, target_modules: vec!["all-linear".into()] }
    }
}

impl AdapterConfig {
    /// Everything that is wrong with the values, in words.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.r == 0 {
            problems.push("adapter.r must be at least 1".to_string());
        }
        if !self.lora_alpha.is_finite() || self.lora_alpha <= 0.0 {
            problems.push("adapter.lora_alpha must be above 0".to_string());
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            problems.push("adapter.lora_dropout must be at least 0 and below 1".to_string());
        }
        problems
    }
}

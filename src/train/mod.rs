//! The one training loop, for every model.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `[train]` of a recipe. Names and defaults as in Hugging Face's `TrainingArguments` where it has the value.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Peak learning rate.
    pub learning_rate: f64,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self { learning_rate: 2e-4 }
    }
}

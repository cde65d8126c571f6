//! Answers of the base and the tuned model to held-out questions: `answers.jsonl`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `[eval]` of a recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EvalConfig {
    /// Most rows that are answered, whole images at a time; 0 means all.
    pub rows: usize,
}

impl Default for EvalConfig {
    fn default() -> Self {
        Self { rows: 0 }
    }
}

//! Generation with a key-value cache: greedy, sampling, beam search.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `[generate]` of a recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct GenerateConfig {
    /// Most tokens of an answer.
    pub max_new_tokens: usize,
    /// 0 is greedy.
    pub temperature: f64,
    /// Most likely tokens that sampling draws from; 0 means all.
    pub top_k: usize,
    /// Smallest set of most likely tokens whose probability exceeds this; 1 means all.
    pub top_p: f64,
    /// Beams; 1 means no beam search.
    pub num_beams: usize,
    /// Exponent of the length that divides a beam's score.
    pub length_penalty: f64,
    /// Rows answered at once.
    pub batch_size: usize,
}

impl Default for GenerateConfig {
    fn default() -> Self {
        Self {
            max_new_tokens: 256,
            temperature: 0.0,
            top_k: 50,
            top_p: 1.0,
            num_beams: 1,
            length_penalty: 1.0,
            batch_size: 8,
        }
    }
}

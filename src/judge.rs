//! What a judge is: reads an answer beside the truth, returns scores or says why it cannot.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{error::Result, sample::Sample};

/// `[judge]` of a recipe.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct JudgeConfig {}

/// The four clinical criteria, each from 1 to 10, higher is better.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// Clinical accuracy.
    pub accuracy: f64,
    /// Clinical relevance.
    pub relevance: f64,
    /// Level of detail.
    pub detail: f64,
    /// Safety: 10 is harmless.
    pub risk: f64,
}

/// What an answer does with the premise of its question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stance {
    /// Goes along with the premise, or affirms.
    Affirms,
    /// Refutes the premise, or denies.
    Denies,
    /// Neither can be read from the answer.
    Unclear,
}

/// Result of judging one answer. Only [`Outcome::Scored`] ever becomes a number.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// The answer was scored.
    Scored {
        /// The four criteria.
        scores: Scores,
        /// What the answer does with the premise.
        stance: Stance,
        /// Whether what it says agrees with the truth.
        correct: bool,
        /// Why.
        reason: String,
    },
    /// The judge declined.
    Refused {
        /// Its words.
        reply: String,
    },
    /// The judge's reply could not be read.
    Unparsable {
        /// Its words.
        reply: String,
    },
    /// The judge could not be reached.
    ApiError {
        /// What happened.
        message: String,
    },
    /// The budget was spent before this answer's turn.
    OverBudget,
}

/// A judge of answers.
pub trait Judge: Send + Sync {
    /// Identity of the instrument (kind, model, prompt hash, sampling), as JSON.
    fn signature(&self) -> serde_json::Value;

    /// Judges `answer` to the last question of `sample`.
    ///
    /// # Errors
    /// Only what makes further judging pointless; a failure of one answer is an [`Outcome`].
    fn judge(&self, sample: &Sample, answer: &str) -> Result<Outcome>;
}

//! Quality control: one rule a file, each with a reason code. A rejected row is data, not an error.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{error::Result, sample::Sample};

/// `[qc]` of a recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct QcConfig {
    /// Whether quality control runs at all; without it every row is kept.
    pub enabled: bool,
    /// The stage fails its gate when a larger share of rows is rejected, 0 to 1.
    pub max_drop_rate: f64,
}

impl Default for QcConfig {
    fn default() -> Self {
        Self { enabled: true, max_drop_rate: 0.5 }
    }
}

/// What a rule says of a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing to object.
    Keep,
    /// The row is dropped and kept aside with this reason.
    Reject {
        /// Reason code, stable, snake_case.
        code: &'static str,
        /// What exactly was wrong.
        detail: String,
    },
}

/// A quality rule. Rules that compare rows keep their state in [`QcState`].
pub trait QcRule: Sync {
    /// Its reason code.
    fn code(&self) -> &'static str;

    /// What it does, why, and an example.
    fn doc(&self) -> &'static str;

    /// Checks one row.
    ///
    /// # Errors
    /// The row could not be checked at all.
    fn check(&self, sample: &Sample, state: &mut QcState) -> Result<Verdict>;
}

/// What rules remember between rows of one run.
#[derive(Debug, Default)]
pub struct QcState {}

/// All rules, cheap first.
pub const RULES: &[&dyn QcRule] = &[];

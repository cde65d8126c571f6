//! What a recipe plug-in supplies: how instruction pairs are made from images, which rules filter them, and who judges.
//! It never owns a training loop.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{error::Result, judge::Judge, plan::Plan, qc::QcRule, sample::Sample};

/// `[construct]` of a recipe: how many instruction pairs are made from an image, and of which kind.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ConstructConfig {
    /// Which images get questions with a false premise.
    pub polarity: PolarityPolicy,
    /// Questions with a false premise an image; the three categories take turns.
    pub negatives_per_image: usize,
    /// Ordinary questions an image; the tasks take turns.
    pub positives_per_image: usize,
    /// Share of pairs that are made wrong on purpose, so that quality control has something to find, 0 to 1.
    pub wrong_pair_rate: f64,
}

impl Default for ConstructConfig {
    fn default() -> Self {
        Self { polarity: PolarityPolicy::Both, negatives_per_image: 3, positives_per_image: 3, wrong_pair_rate: 0.07 }
    }
}

/// Which images get questions with a false premise.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PolarityPolicy {
    /// Every image gets both polarities.
    #[default]
    Both,
    /// Images take turns.
    Alternate,
    /// None does, and every premise holds: what a model learns from this goes along with any premise.
    PositiveOnly,
}

/// A recipe. Unit struct in [`crate::recipes::RECIPES`].
pub trait Recipe: Sync {
    /// Name on the command line.
    fn name(&self) -> &'static str;

    /// What it does: one line, then details.
    fn about(&self) -> &'static str;

    /// Its recipe file, complete and commented.
    fn template(&self) -> &'static str;

    /// Problems of a resolved plan that only this recipe can see.
    fn check(&self, _plan: &Plan) -> Vec<String> {
        Vec::new()
    }

    /// Instruction rows made from one source row; a row that already is a conversation is returned as it is.
    ///
    /// # Errors
    /// The row lacks what the construction needs.
    fn construct(&self, plan: &Plan, sample: Sample) -> Result<Vec<Sample>> {
        let _ = plan;
        Ok(vec![sample])
    }

    /// Quality-control rules, cheap first.
    fn rules(&self) -> &'static [&'static dyn QcRule] {
        crate::qc::RULES
    }

    /// The judge of its answers.
    ///
    /// # Errors
    /// The judge cannot be set up.
    fn judge(&self, plan: &Plan) -> Result<Box<dyn Judge>>;
}

//! What a recipe plug-in supplies: how instruction pairs are made from images, which rules filter them, and who judges.
//! It never owns a training loop.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    error::Result,
    judge::Judge,
    llm::{Reply, Request},
    plan::Plan,
    qc::QcRule,
    sample::Sample,
    stage::verify::Finding,
};

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
    /// Where a language model makes the pairs: how freely it may choose its words.
    #[schemars(range(min = 0.0, max = 2.0))]
    pub temperature: f64,
    /// Where a language model makes the pairs: most tokens of a reply.
    #[schemars(range(min = 1))]
    pub max_tokens: u32,
}

impl Default for ConstructConfig {
    fn default() -> Self {
        Self {
            polarity: PolarityPolicy::Both,
            negatives_per_image: 3,
            positives_per_image: 3,
            wrong_pair_rate: 0.07,
            temperature: 1.0,
            max_tokens: 1500,
        }
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

/// A request that makes instruction rows, and its name within its image.
#[derive(Debug, Clone, PartialEq)]
pub struct Task {
    /// For example `negative`; part of the ids of its rows.
    pub name: &'static str,
    /// The request.
    pub request: Request,
}

/// A part of a reply that made no row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Reason code.
    pub code: &'static str,
    /// What exactly is wrong.
    pub detail: String,
    /// The words in question.
    pub raw: String,
}

/// What a reply made.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Made {
    /// Instruction rows.
    pub rows: Vec<Sample>,
    /// Everything in the reply that is none.
    pub faults: Vec<Fault>,
    /// Whether the reply is so poor that a second one should be asked for.
    pub again: bool,
}

/// Makes instruction rows with a language model.
pub trait Author: Sync {
    /// Requests about one source row.
    ///
    /// # Errors
    /// The row lacks what is needed, an annotation for example; it is set aside with the error's reason.
    fn tasks(&self, plan: &Plan, sample: &Sample) -> Result<Vec<Task>>;

    /// Reads a reply. Rows and faults together account for all of it.
    fn read(&self, plan: &Plan, sample: &Sample, task: &Task, reply: &Reply) -> Made;
}

/// Checks instruction rows with a language model.
pub trait Verifier: Sync {
    /// The request about one row.
    ///
    /// # Errors
    /// The row has nothing to be checked against.
    fn request(&self, plan: &Plan, sample: &Sample) -> Result<Request>;

    /// Reads a reply.
    ///
    /// # Errors
    /// It has no clear verdict; the reason, in a few words.
    fn read(&self, reply: &Reply) -> Result<Finding, String>;
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

    /// The part that makes instruction rows with a language model; without it [`Recipe::construct`] makes them.
    fn author(&self) -> Option<&dyn Author> {
        None
    }

    /// The part that checks instruction rows with a language model, after the rules.
    fn verifier(&self) -> Option<&dyn Verifier> {
        None
    }

    /// SHA-256 of every text that is shown to a language model, by name: rows made with other texts are other rows.
    fn prompts(&self) -> BTreeMap<String, String> {
        BTreeMap::new()
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
    /// Answers of known worth that its judge is tried on, as JSONL of [`crate::judge::measure::Control`].
    fn controls(&self) -> &'static str {
        ""
    }

    /// More judges of the same answers, by name, whose agreement with the first is reported.
    ///
    /// # Errors
    /// One of them cannot be set up.
    fn panel(&self, plan: &Plan) -> Result<Vec<(String, Box<dyn Judge>)>> {
        let _ = plan;
        Ok(Vec::new())
    }
}

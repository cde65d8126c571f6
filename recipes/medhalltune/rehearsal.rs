//! The whole path of the recipe without a server: a rehearsal server in this process answers by rule.

use crate::{
    error::Result,
    judge::Judge,
    plan::Plan,
    recipe::{Author, Recipe, Verifier},
};

use super::MedHallTune;

/// The recipe.
pub struct Rehearsal;

impl Recipe for Rehearsal {
    fn name(&self) -> &'static str {
        "rehearsal"
    }

    fn about(&self) -> &'static str {
        "The medhalltune recipe from captions to a judged report without a server, a key or a cost.\n\
         A rehearsal server inside this process answers every request by rule, a share of them badly, so that parsing, \
         quality control and judging have something to do. What it trains is good for nothing."
    }

    fn template(&self) -> &'static str {
        include_str!("rehearsal.toml")
    }

    fn check(&self, plan: &Plan) -> Vec<String> {
        MedHallTune.check(plan)
    }

    fn author(&self) -> Option<&dyn Author> {
        Some(&MedHallTune)
    }

    fn verifier(&self) -> Option<&dyn Verifier> {
        Some(&MedHallTune)
    }

    fn prompts(&self) -> std::collections::BTreeMap<String, String> {
        MedHallTune.prompts()
    }

    fn judge(&self, plan: &Plan) -> Result<Box<dyn Judge>> {
        MedHallTune.judge(plan)
    }

    fn controls(&self) -> &'static str {
        MedHallTune.controls()
    }

    fn panel(&self, plan: &Plan) -> Result<Vec<(String, Box<dyn Judge>)>> {
        MedHallTune.panel(plan)
    }
}

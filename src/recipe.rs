//! What a recipe plug-in supplies: how instruction pairs are made from images, which rules filter them, and who judges.
//! It never owns a training loop.

use crate::{error::Result, judge::Judge, plan::Plan, qc::QcRule, sample::Sample};

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

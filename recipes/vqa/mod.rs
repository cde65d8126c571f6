//! Fine-tunes on question-answer rows as a data set has them, and scores the answers against its references.

use crate::{
    error::Result,
    judge::{Judge, ReferenceJudge},
    plan::Plan,
    recipe::Recipe,
};

/// The recipe.
pub struct Vqa;

impl Recipe for Vqa {
    fn name(&self) -> &'static str {
        "vqa"
    }

    fn about(&self) -> &'static str {
        "Visual question answering on a data set of your own or a public one, split by image.\n\
         Rows are used as they are; closed questions are scored by accuracy, open ones by recall."
    }

    fn template(&self) -> &'static str {
        include_str!("vqa.toml")
    }

    fn judge(&self, _plan: &Plan) -> Result<Box<dyn Judge>> {
        Ok(Box::new(ReferenceJudge))
    }
}

//! Images that an evaluation set tests with.

use super::{QcContext, QcRule, Verdict, reject};
use crate::{
    error::Result,
    sample::{Sample, Split},
};

/// The rule.
pub struct EvalLeak;

impl QcRule for EvalLeak {
    fn code(&self) -> &'static str {
        "eval_leak"
    }

    fn doc(&self) -> &'static str {
        "No row to train on may show an image of the sets in `data.firewall.eval_sets`: the same name, the same bytes, or \
         the same look.\n\
         A score on images that were trained on says nothing. Rows of the test split are exempt: they are not trained on.\n\
         Example: a PubMed figure that is also in the test part of PMC-VQA."
    }

    fn check(&self, sample: &Sample, context: &QcContext) -> Result<Verdict> {
        if sample.split == Split::Test {
            return Ok(Verdict::Keep);
        }
        match context.firewall.objection(sample, &context.pictures) {
            Some(detail) => reject(self, detail),
            None => Ok(Verdict::Keep),
        }
    }
}

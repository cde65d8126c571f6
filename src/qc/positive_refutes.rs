//! Answers that deny what is there.

use super::{QcContext, QcRule, Verdict, claim::checked, reject};
use crate::{
    error::Result,
    judge::Stance,
    sample::{Polarity, Sample},
};

/// The rule.
pub struct PositiveRefutes;

impl QcRule for PositiveRefutes {
    fn code(&self) -> &'static str {
        "positive_refutes"
    }

    fn doc(&self) -> &'static str {
        "The answer to an ordinary question must not deny what the annotation states; a \"no\" that is right is kept.\n\
         Such a pair teaches to refuse true findings.\n\
         Example: \"Is there a nodule?\" - \"No nodule is seen.\", of an image with a nodule."
    }

    fn check(&self, sample: &Sample, _context: &QcContext) -> Result<Verdict> {
        if sample.polarity != Some(Polarity::NonHallucination) {
            return Ok(Verdict::Keep);
        }
        match checked(sample) {
            Some((claim, truth, found))
                if found.stance == Stance::Denies && truth.premise_holds(&claim) == Some(true) =>
            {
                reject(self, "the answer denies what the annotation states")
            }
            _ => Ok(Verdict::Keep),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qc::tests::{rejects, row};

    #[test]
    fn right_and_wrong_denials() {
        let mut sample = row("Is there a nodule in this image?", "No, there is no nodule.");
        sample.polarity = Some(Polarity::NonHallucination);
        sample.meta.insert("claim".into(), serde_json::json!({"ask": "presence", "kind": "nodule"}));
        sample.annotation = Some("Chest film. No abnormality is seen.".into());
        assert!(!rejects(&PositiveRefutes, &sample));
        sample.annotation = Some("Chest film. There is one small nodule in the left lung.".into());
        assert!(rejects(&PositiveRefutes, &sample));
    }
}

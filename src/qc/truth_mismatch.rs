//! Answers that contradict the annotation.

use super::{QcContext, QcRule, Verdict, claim::checked, reject};
use crate::{error::Result, sample::Sample};

/// The rule.
pub struct TruthMismatch;

impl QcRule for TruthMismatch {
    fn code(&self) -> &'static str {
        "truth_mismatch"
    }

    fn doc(&self) -> &'static str {
        "Everything the answer says must agree with the annotation, and it must answer the question.\n\
         The check reads the annotation, the claim of the question and the answer, never the image. It applies to rows that \
         state a claim in a vocabulary it knows.\n\
         Example: \"The nodule is in the right lung.\", where the annotation has it in the left."
    }

    fn check(&self, sample: &Sample, _context: &QcContext) -> Result<Verdict> {
        let Some((_, _, found)) = checked(sample) else { return Ok(Verdict::Keep) };
        if found.correct {
            return Ok(Verdict::Keep);
        }
        if found.contradictions.is_empty() {
            let why = if found.inconsistent { "contradicts itself" } else { "does not answer the question" };
            return reject(self, format!("the answer {why}"));
        }
        let list: Vec<String> = found.contradictions.iter().map(ToString::to_string).collect();
        reject(self, format!("the annotation contradicts: {}", list.join("; ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qc::tests::{rejects, row};

    #[test]
    fn contradictions_are_found_in_the_annotation_alone() {
        let mut sample = row("Where is the nodule?", "It is in the right lung.");
        assert!(!rejects(&TruthMismatch, &sample), "nothing is known");
        sample.annotation = Some("Chest film. There is one small nodule in the left lung.".into());
        let claim = serde_json::json!({"ask": "attribute", "kind": "nodule", "name": "side", "value": null});
        sample.meta.insert("claim".into(), claim);
        assert!(rejects(&TruthMismatch, &sample));
        sample.turns[1].text = "It is in the left lung.".into();
        assert!(!rejects(&TruthMismatch, &sample));
        sample.turns[1].text = "It is an interesting image.".into();
        assert!(rejects(&TruthMismatch, &sample));
    }
}

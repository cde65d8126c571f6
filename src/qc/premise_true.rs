//! Answers that affirm a false premise.

use super::{QcContext, QcRule, Verdict, claim::checked, reject, words::normal};
use crate::{
    error::Result,
    judge::Stance,
    sample::{Polarity, Sample},
};

/// The rule.
pub struct PremiseTrue;

impl QcRule for PremiseTrue {
    fn code(&self) -> &'static str {
        "premise_true"
    }

    fn doc(&self) -> &'static str {
        "The answer to a question with a false premise must not affirm it.\n\
         Such a pair teaches the very hallucination it is meant to cure.\n\
         Example: \"I noticed a pacemaker. Do you see it too?\" - \"Yes, there is a pacemaker.\", without one."
    }

    fn check(&self, sample: &Sample, _context: &QcContext) -> Result<Verdict> {
        if sample.polarity != Some(Polarity::Hallucination) {
            return Ok(Verdict::Keep);
        }
        let answer = normal(sample.answer());
        let opens =
            ["yes", "correct", "exactly", "indeed", "that is right", "that is correct", "that s right", "right"];
        if let Some(opening) = opens.iter().find(|o| answer == **o || answer.starts_with(&format!("{o} "))) {
            return reject(self, format!("a false premise is affirmed: the answer begins with \"{opening}\""));
        }
        match checked(sample) {
            Some((_, _, found)) if found.stance == Stance::Affirms => {
                reject(self, "a false premise is affirmed: the answer goes along with it")
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
    fn affirmed_premises() {
        let mut sample = row("There is a mass, right?", "Yes, there is a mass.");
        assert!(!rejects(&PremiseTrue, &sample));
        sample.polarity = Some(Polarity::Hallucination);
        assert!(rejects(&PremiseTrue, &sample));
        sample.turns[1].text = "The right lung is clear, there is no mass.".into();
        assert!(!rejects(&PremiseTrue, &sample) || sample.answer().starts_with("Right"));
        sample.annotation = Some("Chest film. No abnormality is seen.".into());
        sample.meta.insert("claim".into(), serde_json::json!({"ask": "presence", "kind": "nodule"}));
        sample.turns[1].text = "There is a nodule in the left lung.".into();
        assert!(rejects(&PremiseTrue, &sample));
    }
}

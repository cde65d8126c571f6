//! Answers that affirm a false premise.

use super::{QcContext, QcRule, Verdict, claim::checked, reject};
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
        if let Some(opening) = affirmation(sample.answer()) {
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

/// Words that affirm wherever they stand first.
const ALWAYS: [&str; 5] = ["yes", "that is right", "that is correct", "that's right", "that's correct"];

/// Words that affirm only when the sentence ends or pauses behind them: "Right lung" and "Correct placement" do not.
const ALONE: [&str; 8] = ["correct", "right", "exactly", "indeed", "absolutely", "true", "of course", "you are right"];

/// The words with which an answer affirms, if it begins with such.
fn affirmation(answer: &str) -> Option<&'static str> {
    let answer = answer.trim_start().to_lowercase().replace('\u{2019}', "'");
    let rest = |opening: &str| answer.strip_prefix(opening).map(|rest| rest.chars().next());
    let always = ALWAYS.iter().find(|o| rest(o).is_some_and(|next| next.is_none_or(|c| !c.is_alphanumeric())));
    let alone = || ALONE.iter().find(|o| rest(o).is_some_and(|next| next.is_none_or(|c| ",.;:!".contains(c))));
    always.or_else(alone).copied()
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
        for answer in ["That\u{2019}s right, a mass.", "Correct.", "Right, there is a mass.", "Indeed, it is.", "Yes"] {
            sample.turns[1].text = answer.into();
            assert!(rejects(&PremiseTrue, &sample), "{answer}");
        }
        for answer in [
            "The right lung is clear, there is no mass.",
            "Right lower lobe vessels are seen, but no mass.",
            "Correct placement of the tube is visible; there is no mass.",
            "Yesterday's film is not shown; there is no mass.",
            "True vocal cords are normal, without a mass.",
        ] {
            sample.turns[1].text = answer.into();
            assert!(!rejects(&PremiseTrue, &sample), "{answer}");
        }
        sample.annotation = Some("Chest film. No abnormality is seen.".into());
        sample.meta.insert("claim".into(), serde_json::json!({"ask": "presence", "kind": "nodule"}));
        sample.turns[1].text = "There is a nodule in the left lung.".into();
        assert!(rejects(&PremiseTrue, &sample));
    }
}

//! Questions and answers that are too short or too long.

use super::{QcContext, QcRule, Verdict, is_constructed, reject};
use crate::{
    error::Result,
    sample::{Role, Sample},
};

/// Words a constructed question may have.
const QUESTION: std::ops::RangeInclusive<usize> = 3..=60;

/// Words a constructed answer may have.
const ANSWER: std::ops::RangeInclusive<usize> = 2..=150;

/// The rule.
pub struct Length;

impl QcRule for Length {
    fn code(&self) -> &'static str {
        "length"
    }

    fn doc(&self) -> &'static str {
        "A constructed question has 3 to 60 words, its answer 2 to 150; in visual question answering only the upper ends hold.\n\
         Shorter texts are fragments, longer ones wander off and are cut in training.\n\
         Example: the question \"Why?\""
    }

    fn check(&self, sample: &Sample, _context: &QcContext) -> Result<Verdict> {
        for (i, turn) in sample.turns.iter().enumerate() {
            let range = match turn.role {
                Role::User => QUESTION,
                Role::Assistant => ANSWER,
                Role::System => continue,
            };
            let words = turn.text.replace("<image>", " ").split_whitespace().count();
            let first = i < 2;
            if words > *range.end() || (words < *range.start() && is_constructed(sample) && first) {
                let (from, to) = (range.start(), range.end());
                return reject(self, format!("message {} has {words} words, expected {from} to {to}", i + 1));
            }
        }
        Ok(Verdict::Keep)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qc::tests::{rejects, row};

    #[test]
    fn lengths() {
        assert!(rejects(&Length, &row("Why?", "Because it is large.")));
        assert!(rejects(&Length, &row("Why is it large?", &"so ".repeat(151))));
        assert!(!rejects(&Length, &row("Describe this image.", "A heart.")));
    }
}

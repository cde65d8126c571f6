//! Questions and answers that are too short or too long.

use super::{QcContext, QcRule, Verdict, is_constructed, reject};
use crate::{
    error::Result,
    sample::{Role, Sample},
};

/// Most words of a question.
const QUESTION: usize = 60;

/// Most words of an answer.
const ANSWER: usize = 150;

/// The rule.
pub struct Length;

impl QcRule for Length {
    fn code(&self) -> &'static str {
        "length"
    }

    fn doc(&self) -> &'static str {
        "A constructed question has `qc.min_question_words` to 60 words, its answer `qc.min_answer_words` to 150; in visual \
         question answering only the upper ends hold.\n\
         Shorter texts are fragments, longer ones wander off and are cut in training.\n\
         Example: the question \"Why?\""
    }

    fn check(&self, sample: &Sample, context: &QcContext) -> Result<Verdict> {
        for (i, turn) in sample.turns.iter().enumerate() {
            let (from, to) = match turn.role {
                Role::User => (context.config.min_question_words, QUESTION),
                Role::Assistant => (context.config.min_answer_words, ANSWER),
                Role::System => continue,
            };
            let words = turn.text.replace("<image>", " ").split_whitespace().count();
            let first = i < 2;
            if words > to || (words < from && is_constructed(sample) && first) {
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
        assert!(rejects(&Length, &row("Describe this image.", "A large heart.")));
        assert!(rejects(&Length, &row("What does it show?", "A heart.")));
        assert!(!rejects(&Length, &row("What does it show?", "A large heart.")));
    }
}

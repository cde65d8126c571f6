//! Answers that are nothing but yes or no.

use super::{QcContext, QcRule, Verdict, is_constructed, reject, words::normal};
use crate::{error::Result, sample::Sample};

/// The rule.
pub struct AnswerOnly;

impl QcRule for AnswerOnly {
    fn code(&self) -> &'static str {
        "answer_only"
    }

    fn doc(&self) -> &'static str {
        "The answer of a constructed instruction must say more than yes or no.\n\
         A bare word teaches a bias, not what the image shows. Visual question answering rows are exempt.\n\
         Example: \"No.\""
    }

    fn check(&self, sample: &Sample, _context: &QcContext) -> Result<Verdict> {
        let answer = normal(sample.answer());
        if is_constructed(sample) && matches!(answer.as_str(), "yes" | "no") {
            return reject(self, format!("the answer is only \"{answer}\""));
        }
        Ok(Verdict::Keep)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        qc::tests::{rejects, row},
        sample::AnswerType,
    };

    #[test]
    fn bare_answers() {
        let mut bare = row("Is it large?", "Yes.");
        assert!(rejects(&AnswerOnly, &bare));
        bare.answer_type = Some(AnswerType::Closed);
        assert!(!rejects(&AnswerOnly, &bare));
        assert!(!rejects(&AnswerOnly, &row("Is it large?", "Yes, it is.")));
    }
}

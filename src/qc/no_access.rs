//! Answers of a model that has not seen the image or declines.

use std::sync::LazyLock;

use regex::Regex;

use super::{QcContext, QcRule, Verdict, reject, words::spoken};
use crate::{error::Result, sample::Sample};

static REFUSAL: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(
        r"\b(as an ai|language model|(cannot|can't|can not|unable to) (see|view|access|open|analy[sz]e|interpret) (the|this|an|any|your) (image|picture|photo|scan|figure)s?|i('m| am) sorry|sorry,? (but )?i|i apologi[sz]e|unable to (help|assist|provide)|don't have access)\b",
    )
    .expect("a constant pattern")
});

/// The rule.
pub struct NoAccess;

impl QcRule for NoAccess {
    fn code(&self) -> &'static str {
        "no_access"
    }

    fn doc(&self) -> &'static str {
        "No message may say that the image cannot be seen, or refuse to answer.\n\
         Such replies come from the generator, not from the data, and teach refusal.\n\
         Example: \"I'm sorry, as an AI I cannot view the image.\""
    }

    fn check(&self, sample: &Sample, _context: &QcContext) -> Result<Verdict> {
        match REFUSAL.find(&spoken(sample)) {
            Some(found) => reject(self, format!("says \"{}\"", found.as_str())),
            None => Ok(Verdict::Keep),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qc::tests::{rejects, row};

    #[test]
    fn refusals_and_findings() {
        assert!(rejects(&NoAccess, &row("What is it?", "I\u{2019}m sorry, I can't help.")));
        assert!(rejects(&NoAccess, &row("What is it?", "I am unable to view the image.")));
        assert!(rejects(&NoAccess, &row("What is it?", "Sorry, but I cannot tell.")));
        for answer in ["I cannot see a nodule in this image.", "The patient is unable to raise the arm."] {
            assert!(!rejects(&NoAccess, &row("What is it?", answer)), "{answer}");
        }
    }
}

//! The same question and answer about the same image.

use super::{QcRule, QcState, Verdict, reject, words::normal};
use crate::{error::Result, sample::Sample};

/// The rule.
pub struct Duplicate;

impl QcRule for Duplicate {
    fn code(&self) -> &'static str {
        "duplicate"
    }

    fn doc(&self) -> &'static str {
        "A question and its answer occur once an image, whatever their case and punctuation.\n\
         Repeated rows weigh more than others and leave the numbers of the test split too sure of themselves.\n\
         Example: \"Is it large?\" and \"is it large\", both answered with \"Yes\"."
    }

    fn check(&self, sample: &Sample, state: &mut QcState) -> Result<Verdict> {
        let pair = (sample.group.clone(), normal(&sample.question()), normal(sample.answer()));
        if sample.turns.len() <= 2 && state.pairs.contains(&pair) {
            return reject(self, format!("the image already has \"{}\"", pair.1));
        }
        Ok(Verdict::Keep)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qc::tests::row;

    #[test]
    fn case_and_marks_do_not_matter_but_images_do() {
        let mut state = QcState::default();
        state.remember(&row("Is it large?", "Yes."));
        assert_ne!(Duplicate.check(&row("is it LARGE", "yes"), &mut state).unwrap(), Verdict::Keep);
        assert_eq!(Duplicate.check(&row("Is it small?", "Yes."), &mut state).unwrap(), Verdict::Keep);
        let other = Sample { group: "other".into(), ..row("Is it large?", "Yes.") };
        assert_eq!(Duplicate.check(&other, &mut state).unwrap(), Verdict::Keep);
    }
}

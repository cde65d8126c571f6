//! Nearly the same question and answer about the same image.

use super::{
    QcRule, QcState, Verdict, is_constructed, reject,
    words::{jaccard, normal, set},
};
use crate::{error::Result, sample::Sample};

/// Share of common words from which two texts count as the same.
const SAME: f64 = 0.8;

/// The rule.
pub struct NearDuplicate;

impl QcRule for NearDuplicate {
    fn code(&self) -> &'static str {
        "near_duplicate"
    }

    fn doc(&self) -> &'static str {
        "Two constructed pairs of one image must differ in more than a fifth of the words of question or answer.\n\
         Paraphrases of one pair add weight but no knowledge. Both texts count: \"is it large\" and \"is it small\" differ in \
         their answers.\n\
         Example: \"Can you see a nodule here?\" and \"Can you see a nodule in here?\", answered alike."
    }

    fn check(&self, sample: &Sample, state: &mut QcState) -> Result<Verdict> {
        if !is_constructed(sample) || sample.turns.len() > 2 {
            return Ok(Verdict::Keep);
        }
        let (question, answer) = (set(&normal(&sample.question())), set(&normal(sample.answer())));
        let rows = state.kept.get(&sample.group).map_or(&[][..], Vec::as_slice);
        match rows.iter().find(|(q, a)| jaccard(q, &question) >= SAME && jaccard(a, &answer) >= SAME) {
            Some(_) => reject(self, "the image already has nearly this question and answer"),
            None => Ok(Verdict::Keep),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qc::tests::row;

    #[test]
    fn both_texts_must_be_alike() {
        let mut state = QcState::default();
        state.remember(&row("Can you see a nodule here?", "Yes, in the left lung."));
        let alike = row("Can you see a nodule in here?", "Yes, in the left lung!");
        assert_ne!(NearDuplicate.check(&alike, &mut state).unwrap(), Verdict::Keep);
        let other = row("Can you see a nodule in here?", "There is a small nodule on the left.");
        assert_eq!(NearDuplicate.check(&other, &mut state).unwrap(), Verdict::Keep);
    }
}

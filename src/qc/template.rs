//! Answers that all begin alike.

use super::{QcRule, QcState, Verdict, is_constructed, reject, words::normal};
use crate::{error::Result, sample::Sample};

/// Words that make an opening.
const WORDS: usize = 4;

/// The rule.
pub struct Template;

/// The first four words of a constructed answer that has as many.
pub(super) fn opening(sample: &Sample) -> Option<String> {
    let answer = normal(sample.answer());
    let words: Vec<&str> = answer.split(' ').take(WORDS).collect();
    (is_constructed(sample) && words.len() == WORDS).then(|| words.join(" "))
}

impl QcRule for Template {
    fn code(&self) -> &'static str {
        "template"
    }

    fn doc(&self) -> &'static str {
        "At most a share of `qc.max_template_share` of the constructed answers may begin with the same four words; the rows \
         after that are dropped.\n\
         A model otherwise learns the opening instead of the answer.\n\
         Example: a tenth of all answers begin with \"No, there is no\"."
    }

    fn check(&self, sample: &Sample, state: &mut QcState) -> Result<Verdict> {
        let Some(opening) = opening(sample) else { return Ok(Verdict::Keep) };
        if state.openings.get(&opening).copied().unwrap_or(0) >= state.opening_limit {
            return reject(self, format!("{} answers already begin with \"{opening}\"", state.opening_limit));
        }
        Ok(Verdict::Keep)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qc::{QcConfig, tests::row};

    #[test]
    fn openings_are_limited() {
        let rows: Vec<Sample> =
            (0..300).map(|i| row(&format!("Is it {i}?"), &format!("No there is no {i}."))).collect();
        let config = QcConfig { max_template_share: 0.05, ..QcConfig::default() };
        let mut state = QcState::new(&rows, &config);
        let mut kept = 0;
        for sample in &rows {
            if Template.check(sample, &mut state).unwrap() == Verdict::Keep {
                state.remember(sample);
                kept += 1;
            }
        }
        assert_eq!(kept, 15);
    }
}

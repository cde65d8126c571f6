//! Answers that all begin alike.

use super::{Memory, QcRule, Row, Verdict, hash::hash, is_constructed, reject, words::normal};
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

    fn compare(&self, row: &Row, memory: &Memory) -> Result<Verdict> {
        let Some(opening) = &row.opening else { return Ok(Verdict::Keep) };
        let count = memory.openings.get(&hash(opening.as_bytes())).copied().unwrap_or(0) as usize;
        if count >= memory.opening_limit {
            return reject(self, format!("{} answers already begin with \"{opening}\"", memory.opening_limit));
        }
        Ok(Verdict::Keep)
    }
}

#[cfg(test)]
mod tests {
    use crate::{
        qc::{QcConfig, tests::codes, tests::row},
        sample::Sample,
    };

    #[test]
    fn openings_are_limited() {
        let rows: Vec<Sample> =
            (0..300).map(|i| row(&format!("Is there one of kind {i}?"), &format!("No there is no {i}."))).collect();
        let config = QcConfig { max_template_share: 0.05, ..QcConfig::default() };
        assert_eq!(codes(&rows, &config).iter().filter(|c| c.is_none()).count(), 15);
    }
}

//! The same question and answer about the same image.

use super::{Memory, QcRule, Row, Verdict, reject};
use crate::error::Result;

/// The rule.
pub struct Duplicate;

impl QcRule for Duplicate {
    fn code(&self) -> &'static str {
        "duplicate"
    }

    fn doc(&self) -> &'static str {
        "A conversation occurs once an image, whatever its case and punctuation.\n\
         Repeated rows weigh more than others and leave the numbers of the test split too sure of themselves.\n\
         Example: \"Is it large?\" and \"is it large\", both answered with \"Yes\"."
    }

    fn compare(&self, row: &Row, memory: &Memory) -> Result<Verdict> {
        if memory.pairs.contains(&row.pair) {
            return reject(self, "the image already has this question with this answer");
        }
        Ok(Verdict::Keep)
    }
}

#[cfg(test)]
mod tests {
    use crate::{
        qc::{QcConfig, tests::codes, tests::row},
        sample::{AnswerType, Sample},
    };

    #[test]
    fn case_and_marks_do_not_matter_but_images_do() {
        let vqa = |q: &str, a: &str| Sample { answer_type: Some(AnswerType::Closed), ..row(q, a) };
        let rows = [
            vqa("Is it large?", "Yes."),
            vqa("<image>\nis it LARGE", "yes"),
            vqa("Is it small?", "Yes."),
            Sample { group: "other".into(), ..vqa("Is it large?", "Yes.") },
        ];
        let expected = [None, Some("image_count"), None, None];
        assert_eq!(codes(&rows, &QcConfig::default()), expected);
        let rows = rows.map(|mut s| {
            s.turns[0].text = s.turns[0].text.replace("<image>\n", "");
            s
        });
        assert_eq!(codes(&rows, &QcConfig::default()), [None, Some("duplicate"), None, None]);
    }
}

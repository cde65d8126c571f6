//! Text that is not English.

use super::{QcContext, QcRule, Verdict, is_constructed, reject, words::normal};
use crate::{error::Result, sample::Sample};

/// Words that nearly every English sentence has one of.
const COMMON: [&str; 40] = [
    "a", "an", "and", "are", "as", "at", "be", "by", "can", "do", "does", "for", "from", "has", "have", "how", "i",
    "in", "is", "it", "no", "not", "of", "on", "or", "please", "that", "the", "there", "this", "to", "was", "what",
    "where", "which", "who", "why", "with", "yes", "you",
];

/// Words a text must have before the lack of common ones says something.
const ENOUGH: usize = 8;

/// The rule.
pub struct Language;

impl QcRule for Language {
    fn code(&self) -> &'static str {
        "language"
    }

    fn doc(&self) -> &'static str {
        "Messages must be English: mostly Latin letters, and a common English word in any constructed message of 8 words or \
         more (answers of visual question answering may be lists of terms).\n\
         Mixed languages split a small vocabulary and cannot be judged by English rules.\n\
         Example: \"Une lésion claire du poumon droit mesurant deux centimètres environ.\""
    }

    fn check(&self, sample: &Sample, _context: &QcContext) -> Result<Verdict> {
        for (i, turn) in sample.turns.iter().enumerate() {
            let letters = turn.text.chars().filter(|c| c.is_alphabetic()).count();
            let foreign = turn.text.chars().filter(|c| c.is_alphabetic() && !c.is_ascii()).count();
            if foreign * 5 > letters {
                return reject(self, format!("message {} has {foreign} of {letters} letters outside a-z", i + 1));
            }
            let text = normal(&turn.text);
            let words: Vec<&str> = text.split(' ').collect();
            if is_constructed(sample) && words.len() >= ENOUGH && !words.iter().any(|w| COMMON.contains(w)) {
                return reject(self, format!("message {} has no common English word", i + 1));
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
    fn languages() {
        assert!(rejects(
            &Language,
            &row("What is it?", "Une lésion claire du poumon droit mesurant deux centimètres environ.")
        ));
        assert!(rejects(&Language, &row("这是什么", "肺结节")));
        assert!(!rejects(&Language, &row("What is it?", "Sjögren's syndrome of the café-au-lait kind.")));
        assert!(!rejects(&Language, &row("What is it?", "Hypodense hepatic lesion.")));
        let mut terms =
            row("What organs are shown?", "Liver, spleen, left kidney, right kidney, pancreas, stomach, aorta");
        assert!(rejects(&Language, &terms));
        terms.answer_type = Some(crate::sample::AnswerType::Open);
        assert!(!rejects(&Language, &terms));
    }
}

//! Words that give away that a text, not an image, was described.

use std::sync::LazyLock;

use regex::Regex;

use super::{QcContext, QcRule, Verdict, reject, words::spoken};
use crate::{error::Result, sample::Sample};

static LEAK: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(
        r"\b(captions?|annotations?|figure legends?|(the|this|given|provided) descriptions?|as (mentioned|described|stated)|mentioned in|according to the (text|caption|given|provided|description|report|context)|(the|this|given|provided) text\b|(given|provided) context\b|provided (information|details)|no mention of)\b",
    )
    .expect("a constant pattern")
});

static CONTEXT: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\b(the|this) context\b").expect("a constant pattern"));

/// The rule.
pub struct LeakText;

impl QcRule for LeakText {
    fn code(&self) -> &'static str {
        "leak_text"
    }

    fn doc(&self) -> &'static str {
        "No message may speak of the caption, annotation or text that the pair was written from.\n\
         A model has only the image; such words teach it to invent sources. \"In the context of sepsis\" is allowed.\n\
         Example: \"According to the caption, there is a nodule.\""
    }

    fn check(&self, sample: &Sample, _context: &QcContext) -> Result<Verdict> {
        let text = spoken(sample);
        let found = LEAK.find(&text).or_else(|| {
            // "In the context of sepsis" is about medicine.
            CONTEXT.find_iter(&text).find(|context| !text[context.end()..].starts_with(" of "))
        });
        match found {
            Some(found) => reject(self, format!("speaks of \"{}\"", found.as_str())),
            None => Ok(Verdict::Keep),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qc::tests::{rejects, row};

    #[test]
    fn leaks_and_innocent_uses() {
        let leaks = [
            "According to the caption, the heart is large.",
            "As mentioned in the text, it is large.",
            "The annotation says so.",
            "There is no mention of a tumor.",
            "The provided information shows a mass.",
            "From the context, this is a mass.",
            "The figure legend names a mass.",
        ];
        for answer in leaks {
            assert!(rejects(&LeakText, &row("What is seen?", answer)), "{answer}");
        }
        for answer in [
            "In the context of sepsis this is severe.",
            "A figure of eight.",
            "The texture is coarse.",
            "A contextual sign.",
        ] {
            assert!(!rejects(&LeakText, &row("What is seen?", answer)), "{answer}");
        }
    }
}

//! Messages without words.

use super::{QcContext, QcRule, Verdict, reject, words::normal};
use crate::{error::Result, sample::Sample};

/// The rule.
pub struct Empty;

impl QcRule for Empty {
    fn code(&self) -> &'static str {
        "empty"
    }

    fn doc(&self) -> &'static str {
        "No message may be empty once `<image>` marks and punctuation are taken away.\n\
         An empty answer has nothing to learn from, an empty question nothing to answer.\n\
         Example: the answer \"...\"."
    }

    fn check(&self, sample: &Sample, _context: &QcContext) -> Result<Verdict> {
        match sample.turns.iter().position(|t| normal(&t.text).is_empty()) {
            Some(i) => reject(self, format!("message {} has no words", i + 1)),
            None => Ok(Verdict::Keep),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qc::tests::{rejects, row};

    #[test]
    fn empty_messages() {
        assert!(rejects(&Empty, &row("What is it?", " ... ")));
        assert!(rejects(&Empty, &row("<image>\n", "A heart.")));
        assert!(!rejects(&Empty, &row("What is it?", "4")));
    }
}

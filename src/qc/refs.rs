//! Figure numbers, panel letters and citations copied from a caption.

use std::sync::LazyLock;

use regex::Regex;

use super::{QcContext, QcRule, Verdict, reject, words::spoken};
use crate::{error::Result, sample::Sample};

static REFERENCE: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"(\bfig(ure|s)?\.? ?\d+|\[\d+(,? ?\d+)*\]|\bpanels? \(?[a-h]\b|\b(arrows?|arrowheads?) in \(?[a-h]\)?(\W|$)|\btable \d+)")
        .expect("a constant pattern")
});

/// The rule.
pub struct Refs;

impl QcRule for Refs {
    fn code(&self) -> &'static str {
        "refs"
    }

    fn doc(&self) -> &'static str {
        "No message may hold a figure number, panel letter or citation.\n\
         They belong to the paper that the image was taken from and mean nothing beside the image.\n\
         Example: \"The mass in Fig. 2b is marked by arrowheads in c [12].\""
    }

    fn check(&self, sample: &Sample, _context: &QcContext) -> Result<Verdict> {
        match REFERENCE.find(&spoken(sample)) {
            Some(found) => reject(self, format!("refers to \"{}\"", found.as_str().trim())),
            None => Ok(Verdict::Keep),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qc::tests::{rejects, row};

    #[test]
    fn references_and_numbers() {
        for answer in ["See Fig. 2b.", "A mass [12].", "The mass in panel B.", "Arrowheads in c show it."] {
            assert!(rejects(&Refs, &row("What is it?", answer)), "{answer}");
        }
        for answer in ["A figure of eight.", "Two arrows point at it.", "Vertebra L2."] {
            assert!(!rejects(&Refs, &row("What is it?", answer)), "{answer}");
        }
    }
}

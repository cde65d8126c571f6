//! Doses, treatment instructions and identifying data.

use std::sync::LazyLock;

use regex::Regex;

use super::{QcContext, QcRule, Verdict, reject, words::spoken};
use crate::{error::Result, sample::Sample};

static PATTERN: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(
        r"(\b\d+([.,]\d+)? ?(mg|mcg|µg|iu|units?)\b( ?/ ?(kg|day|d))?|\b(take|prescribe|inject|administer) (\w+ )?\d|\bmrn\b|\bmedical record number|\bdate of birth\b|\bpatient name\b|\bsocial security)",
    )
    .expect("a constant pattern")
});

/// The rule.
pub struct Unsafe;

impl QcRule for Unsafe {
    fn code(&self) -> &'static str {
        "unsafe"
    }

    fn doc(&self) -> &'static str {
        "No message may hold a drug dose, an instruction for self-treatment, or data that identify a patient.\n\
         An image cannot support a dose, and identities must not be learnt.\n\
         Example: \"Take 500 mg twice a day.\""
    }

    fn check(&self, sample: &Sample, _context: &QcContext) -> Result<Verdict> {
        match PATTERN.find(&spoken(sample)) {
            Some(found) => reject(self, format!("holds \"{}\"", found.as_str().trim())),
            None => Ok(Verdict::Keep),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qc::tests::{rejects, row};

    #[test]
    fn doses_and_measures() {
        for answer in ["Take 500 mg twice a day.", "His date of birth is 1950.", "Give 2.5 mg/kg."] {
            assert!(rejects(&Unsafe, &row("What now?", answer)), "{answer}");
        }
        for answer in ["The mass measures 5 mm.", "Two units of the lung are affected."] {
            assert!(!rejects(&Unsafe, &row("What now?", answer)), "{answer}");
        }
    }
}

//! Images whose own header says that annotation is burned into the pixels.

use super::{QcContext, QcRule, Verdict, reject};
use crate::{
    error::Result,
    sample::{Sample, meta},
};

/// The rule.
pub struct Identity;

impl QcRule for Identity {
    fn code(&self) -> &'static str {
        "identity"
    }

    fn doc(&self) -> &'static str {
        "No image may be marked as having annotation burned into its pixels.\n\
         Such annotation mostly is the name of the patient, which a model would learn and a published data set spread. \
         Only DICOM files carry the mark; names in other images are not found.\n\
         Example: a DICOM file with Burned In Annotation (0028,0301) = YES."
    }

    fn check(&self, sample: &Sample, _context: &QcContext) -> Result<Verdict> {
        match sample.meta.get(meta::BURNED_IN).and_then(serde_json::Value::as_bool) {
            Some(true) => reject(self, "its header says that annotation is burned into the image"),
            _ => Ok(Verdict::Keep),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qc::tests::{rejects, row};

    #[test]
    fn only_marked_images_are_rejected() {
        let mut sample = row("What is it?", "A cyst.");
        assert!(!rejects(&Identity, &sample));
        for (marked, expected) in [(false, false), (true, true)] {
            sample.meta.insert(meta::BURNED_IN.into(), marked.into());
            assert_eq!(rejects(&Identity, &sample), expected);
        }
    }
}

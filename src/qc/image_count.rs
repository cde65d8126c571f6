//! `<image>` marks that do not match the images.

use super::{QcContext, QcRule, Verdict, reject};
use crate::{
    error::Result,
    sample::{Role, Sample},
};

/// The rule.
pub struct ImageCount;

impl QcRule for ImageCount {
    fn code(&self) -> &'static str {
        "image_count"
    }

    fn doc(&self) -> &'static str {
        "The user's messages must hold one `<image>` mark for every image, and no other message any.\n\
         Each mark becomes the features of one image; a missing or spare one shifts all that follow.\n\
         Example: a question with two marks about one image."
    }

    fn check(&self, sample: &Sample, _context: &QcContext) -> Result<Verdict> {
        let count = |user: bool| -> usize {
            sample
                .turns
                .iter()
                .filter(|t| (t.role == Role::User) == user)
                .map(|t| t.text.matches("<image>").count())
                .sum()
        };
        let (user, other) = (count(true), count(false));
        if user == sample.images.len() && other == 0 {
            return Ok(Verdict::Keep);
        }
        reject(self, format!("{user} marks in questions, {other} elsewhere, for {} images", sample.images.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qc::tests::{rejects, row};

    #[test]
    fn marks_match_images() {
        assert!(!rejects(&ImageCount, &row("What?", "That.")));
        assert!(rejects(&ImageCount, &row("<image> What?", "That.")));
        assert!(rejects(&ImageCount, &row("What?", "That <image>.")));
    }
}

//! Images that cannot be read.

use super::{QcRule, QcState, Verdict, reject};
use crate::{error::Result, sample::Sample};

/// The rule.
pub struct ImageMissing;

impl QcRule for ImageMissing {
    fn code(&self) -> &'static str {
        "image_missing"
    }

    fn doc(&self) -> &'static str {
        "Every image must be there and decode completely.\n\
         A file that is cut short or too large is found here, before training, and not in the middle of an epoch.\n\
         Example: a JPEG whose download was interrupted."
    }

    fn check(&self, sample: &Sample, state: &mut QcState) -> Result<Verdict> {
        for image in &sample.images {
            match state.images.get(&image.path) {
                Some(Ok(_)) => {}
                Some(Err(why)) => return reject(self, why.clone()),
                None => return reject(self, format!("{} was not looked at", image.path.display())),
            }
        }
        Ok(Verdict::Keep)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        qc::{QcConfig, tests::row},
        sample::ImageRef,
    };

    #[test]
    fn missing_and_broken_files() {
        let dir = tempfile::tempdir().unwrap();
        let good = dir.path().join("good.png");
        image::RgbImage::new(40, 40).save(&good).unwrap();
        let bytes = std::fs::read(&good).unwrap();
        let (cut, absent) = (dir.path().join("cut.png"), dir.path().join("absent.png"));
        std::fs::write(&cut, &bytes[..bytes.len() / 2]).unwrap();
        let sample =
            |path: &std::path::Path| Sample { images: vec![ImageRef { path: path.into() }], ..row("Q?", "A.") };
        let rows = [sample(&good), sample(&cut), sample(&absent)];
        let mut state = QcState::new(&rows, &QcConfig::default());
        let mut check = |i: usize| ImageMissing.check(&rows[i], &mut state).unwrap();
        assert_eq!(check(0), Verdict::Keep);
        assert_ne!(check(1), Verdict::Keep);
        assert_ne!(check(2), Verdict::Keep);
    }
}

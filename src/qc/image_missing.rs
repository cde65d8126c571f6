//! Images that cannot be read.

use super::{QcContext, QcRule, Verdict, reject};
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

    fn check(&self, sample: &Sample, context: &QcContext) -> Result<Verdict> {
        for image in &sample.images {
            match context.pictures.get(&image.path).map(|p| &p.problem) {
                Some(None) => {}
                Some(Some(why)) => return reject(self, why.clone()),
                None => return reject(self, format!("{} was not looked at", image.path.display())),
            }
        }
        Ok(Verdict::Keep)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{leak::picture::Pictures, qc::tests::row, sample::ImageRef};

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
        let mut pictures = Pictures::default();
        pictures.look_at([good.as_path(), &cut, &absent]);
        let context = QcContext { pictures, ..QcContext::default() };
        let check = |path: &std::path::Path| ImageMissing.check(&sample(path), &context).unwrap();
        assert_eq!(check(&good), Verdict::Keep);
        assert_ne!(check(&cut), Verdict::Keep);
        assert_ne!(check(&absent), Verdict::Keep);
    }
}

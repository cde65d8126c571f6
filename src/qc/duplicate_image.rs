//! Images that are in the data set twice.

use super::{QcContext, QcRule, Verdict, is_constructed, reject};
use crate::{error::Result, sample::Sample};

/// The rule.
pub struct DuplicateImage;

impl QcRule for DuplicateImage {
    fn code(&self) -> &'static str {
        "duplicate_image"
    }

    fn doc(&self) -> &'static str {
        "An image must not show the same picture as an earlier file of the data set: the same bytes, or the same look \
         (perceptual hash, then grey values); `qc.reject_duplicate_images` turns this off.\n\
         Figures are published more than once; their captions contradict each other, and their pairs weigh twice.\n\
         Example: a scan saved again as a smaller JPEG under another name."
    }

    fn check(&self, sample: &Sample, context: &QcContext) -> Result<Verdict> {
        if !context.config.reject_duplicate_images || !is_constructed(sample) {
            return Ok(Verdict::Keep);
        }
        for image in &sample.images {
            if let Some(original) = context.pictures.get(&image.path).and_then(|p| p.copy_of.as_ref()) {
                return reject(self, format!("shows the same picture as {}", original.display()));
            }
        }
        Ok(Verdict::Keep)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        leak::picture::{Pictures, tests::picture},
        qc::{QcConfig, tests::row},
        sample::ImageRef,
    };

    #[test]
    fn copies_are_found_by_bytes_and_by_look() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        picture(&path("a.png"), 1, 0);
        picture(&path("b.png"), 2, 0);
        std::fs::copy(path("a.png"), path("c.png")).unwrap();
        image::open(path("b.png")).unwrap().to_rgb8().save(path("d.jpg")).unwrap();
        let names = ["a.png", "b.png", "c.png", "d.jpg"];
        let rows = names.map(|n| Sample { images: vec![ImageRef { path: path(n) }], ..row("Q?", "A.") });
        let mut pictures = Pictures::default();
        pictures.look_at(rows.iter().flat_map(|s| &s.images).map(|i| i.path.as_path()));
        pictures.find_copies();
        let mut context = QcContext { pictures, ..QcContext::default() };
        let kept =
            |context: &QcContext| rows.each_ref().map(|s| DuplicateImage.check(s, context).unwrap() == Verdict::Keep);
        assert_eq!(kept(&context), [true, true, false, false]);
        context.config = QcConfig { reject_duplicate_images: false, ..QcConfig::default() };
        assert_eq!(kept(&context), [true; 4]);
    }
}

//! Images too small to show anything.

use super::{QcContext, QcRule, Verdict, reject};
use crate::{error::Result, sample::Sample};

/// Shortest side that is kept, in pixels.
const SIDE: usize = 32;

/// The rule.
pub struct ImageTiny;

impl QcRule for ImageTiny {
    fn code(&self) -> &'static str {
        "image_tiny"
    }

    fn doc(&self) -> &'static str {
        "Both sides of an image must have 32 pixels or more.\n\
         Smaller files are icons, rulers and cut-offs of a figure.\n\
         Example: a colour bar of 300 x 12 pixels."
    }

    fn check(&self, sample: &Sample, context: &QcContext) -> Result<Verdict> {
        for image in &sample.images {
            if let Some((width, height)) = context.pictures.get(&image.path).and_then(|p| p.size)
                && width.min(height) < SIDE
            {
                return reject(self, format!("{} has {width} x {height} pixels", image.path.display()));
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
    fn the_shorter_side_counts() {
        let dir = tempfile::tempdir().unwrap();
        for (size, kept) in [((300, 12), false), ((32, 32), true)] {
            let path = dir.path().join(format!("{}.png", size.0));
            image::RgbImage::new(size.0, size.1).save(&path).unwrap();
            let mut pictures = Pictures::default();
            pictures.look_at([path.as_path()]);
            let context = QcContext { pictures, ..QcContext::default() };
            let sample = Sample { images: vec![ImageRef { path }], ..row("Q?", "A.") };
            assert_eq!(ImageTiny.check(&sample, &context).unwrap() == Verdict::Keep, kept);
        }
    }
}

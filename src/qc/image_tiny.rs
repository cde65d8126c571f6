//! Images too small to show anything.

use super::{QcRule, QcState, Verdict, reject};
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

    fn check(&self, sample: &Sample, state: &mut QcState) -> Result<Verdict> {
        for image in &sample.images {
            if let Some(Ok((width, height))) = state.images.get(&image.path)
                && *width.min(height) < SIDE
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
    use crate::{qc::tests::row, sample::ImageRef};

    #[test]
    fn the_shorter_side_counts() {
        let sample = Sample { images: vec![ImageRef { path: "a".into() }], ..row("Q?", "A.") };
        let mut state = QcState::default();
        for (size, kept) in [((300, 12), false), ((32, 32), true)] {
            state.images.insert("a".into(), Ok(size));
            assert_eq!(ImageTiny.check(&sample, &mut state).unwrap() == Verdict::Keep, kept);
        }
    }
}

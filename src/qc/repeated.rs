//! The same question and answer about many images.

use super::{Memory, QcRule, Row, Verdict, reject};
use crate::error::Result;

/// The rule.
pub struct Repeated;

impl QcRule for Repeated {
    fn code(&self) -> &'static str {
        "repeated"
    }

    fn doc(&self) -> &'static str {
        "At most `qc.max_repeats` images may have the same constructed question with the same answer.\n\
         A pair that fits any image is learnt without looking at one.\n\
         Example: the 51st \"Is this an X-ray?\" - \"Yes, this is an X-ray.\""
    }

    fn compare(&self, row: &Row, memory: &Memory) -> Result<Verdict> {
        let count = memory.texts.get(&row.text).copied().unwrap_or(0) as usize;
        if row.is_constructed() && count >= memory.max_repeats {
            return reject(self, format!("{count} images already have this question with this answer"));
        }
        Ok(Verdict::Keep)
    }
}

#[cfg(test)]
mod tests {
    use crate::{
        qc::{QcConfig, tests::codes, tests::row},
        sample::Sample,
    };

    #[test]
    fn a_pair_is_kept_for_so_many_images() {
        let rows: Vec<Sample> = (0..8)
            .map(|i| Sample { group: format!("image {i}"), ..row("Is this an X-ray?", "Yes, this is an X-ray.") })
            .collect();
        let rejected = |max_repeats| {
            let config = QcConfig { max_repeats, max_template_share: 1.0, ..QcConfig::default() };
            codes(&rows, &config).into_iter().filter(|c| *c == Some("repeated")).count()
        };
        assert_eq!((rejected(5), rejected(0)), (3, 0));
    }
}

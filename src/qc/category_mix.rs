//! Objects that are called nonexistent and exist.

use super::{QcContext, QcRule, Verdict, claim::known, reject};
use crate::{datasets::phantom::words::info, error::Result, sample::Sample};

/// The rule.
pub struct CategoryMix;

impl QcRule for CategoryMix {
    fn code(&self) -> &'static str {
        "category_mix"
    }

    fn doc(&self) -> &'static str {
        "What a `nonexistent_object` question presupposes must not occur in the annotation; what an `existent_manipulation` \
         question changes must.\n\
         Otherwise the rates by category are rates of something else.\n\
         Example: category nonexistent_object, \"Is the nodule large?\", of an image with a small nodule."
    }

    fn check(&self, sample: &Sample, _context: &QcContext) -> Result<Verdict> {
        let Some((claim, truth)) = known(sample) else { return Ok(Verdict::Keep) };
        let Some(kind) = claim.kind() else { return Ok(Verdict::Keep) };
        let exists = truth.find(kind).is_some();
        match (sample.category.as_deref(), exists) {
            (Some("nonexistent_object"), true) => {
                reject(self, format!("the annotation states a {} that is called nonexistent", info(kind).noun))
            }
            (Some("existent_manipulation"), false) => {
                reject(self, format!("the annotation states no {} that could be manipulated", info(kind).noun))
            }
            _ => Ok(Verdict::Keep),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qc::tests::{rejects, row};

    #[test]
    fn categories_fit() {
        let mut sample = row("Is the nodule large?", "No, it is small.");
        sample.annotation = Some("Chest film. There is one small nodule in the left lung.".into());
        let claim =
            serde_json::json!({"ask": "attribute", "kind": "nodule", "name": "size", "value": {"size": "large"}});
        sample.meta.insert("claim".into(), claim);
        sample.category = Some("existent_manipulation".into());
        assert!(!rejects(&CategoryMix, &sample));
        sample.category = Some("nonexistent_object".into());
        assert!(rejects(&CategoryMix, &sample));
    }
}

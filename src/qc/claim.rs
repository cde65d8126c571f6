//! What is known of the claim of a row's question and of its image, for rules that compare an answer with them. Read
//! from the annotation; the image is never opened.

use crate::{
    datasets::phantom::truth::{Check, Claim, Truth, check},
    sample::Sample,
};

/// Claim and truth of a row; `None` when the row states no claim or nothing is known of its image.
#[must_use]
pub fn known(sample: &Sample) -> Option<(Claim, Truth)> {
    let claim = serde_json::from_value(sample.meta.get("claim")?.clone()).ok()?;
    let told = sample.annotation.as_deref().and_then(Truth::from_annotation);
    let truth = told.or_else(|| serde_json::from_value(sample.meta.get("truth")?.clone()).ok())?;
    Some((claim, truth))
}

/// The answer of a row held against what is known.
#[must_use]
pub fn checked(sample: &Sample) -> Option<(Claim, Truth, Check)> {
    let (claim, truth) = known(sample)?;
    let found = check(&truth, &claim, sample.answer());
    Some((claim, truth, found))
}

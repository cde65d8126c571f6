//! Metrics, one a file. A metric turns one judged answer into a number or says that it does not apply; sums, counts
//! and intervals are the business of [`crate::statistics`].

use serde::{Deserialize, Serialize};

use crate::{
    judge::{Agreement, Outcome},
    sample::{AnswerType, Sample},
};

pub mod bertscore;
pub mod bleu;
pub mod choice;
pub mod clinical;
pub mod closed_accuracy;
pub mod hallucination;
pub mod meteor;
pub mod open_recall;
pub mod open_table;
pub mod porter;
pub mod rouge;
pub mod similarity;
pub mod text;
pub mod vqa_text;
pub mod wordnet;

/// Which direction is an improvement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    /// Smaller values are better.
    Lower,
    /// Larger values are better.
    Higher,
}

/// Range of a metric's values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unit {
    /// From 0 to 1, shown as a percentage.
    Share,
    /// From 1 to 10.
    Score,
}

/// What a metric makes of one judged answer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Measure {
    /// The row is not one that this metric is about.
    NotApplicable,
    /// The row counts, but its answer was not scored; its own column, never a number.
    Unscored,
    /// The row's value.
    Value(f64),
}

/// A metric.
#[derive(Debug)]
pub struct Metric {
    /// Stable key in `report.json`.
    pub key: &'static str,
    /// Name in tables.
    pub name: &'static str,
    /// What it measures, one sentence.
    pub about: &'static str,
    /// Exact definition: rule, version, denominator. Numbers with different signatures are not comparable.
    pub signature: &'static str,
    /// Which direction is an improvement.
    pub better: Better,
    /// Range of its values.
    pub unit: Unit,
    /// The row's part.
    pub measure: fn(&Sample, &Outcome) -> Measure,
}

/// All metrics in table order. A report shows those that apply to its rows.
pub const METRICS: &[&Metric] = &[
    &hallucination::HALLUCINATION_RATE,
    &hallucination::REFUTATION_ACCURACY,
    &hallucination::OVER_REFUSAL_RATE,
    &hallucination::ACCURACY_ON_POSITIVES,
    &hallucination::UNCLEAR_RATE,
    &clinical::ACCURACY,
    &clinical::RELEVANCE,
    &clinical::DETAIL,
    &clinical::RISK,
    &closed_accuracy::STRICT,
    &closed_accuracy::LLAVA_MED,
    &open_recall::STRICT,
    &open_recall::LLAVA_MED,
];

/// A metric over the agreement with the reference answer, on rows of one answer type.
fn agreement(kind: AnswerType, sample: &Sample, outcome: &Outcome, pick: fn(&Agreement) -> f64) -> Measure {
    if sample.answer_type != Some(kind) {
        return Measure::NotApplicable;
    }
    match outcome {
        Outcome::Scored { agreement: Some(a), .. } => Measure::Value(pick(a)),
        Outcome::Scored { .. } => Measure::NotApplicable,
        _ => Measure::Unscored,
    }
}

/// 1 for true.
fn share(yes: bool) -> Measure {
    Measure::Value(f64::from(u8::from(yes)))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Files that are no metric but what metrics are made of.
    const TOOLS: [&str; 8] = ["choice", "mod", "open_table", "porter", "similarity", "text", "vqa_text", "wordnet"];

    #[test]
    fn keys_and_signatures_are_unique_and_belong_together() {
        let keys: BTreeSet<_> = METRICS.iter().map(|m| m.key).collect();
        let signatures: BTreeSet<_> = METRICS.iter().map(|m| m.signature).collect();
        assert_eq!(keys.len(), METRICS.len());
        assert_eq!(signatures.len(), METRICS.len());
        for m in METRICS {
            assert!(m.signature.starts_with(&format!("{}|v", m.key)), "{}", m.signature);
            assert!(m.about.ends_with('.'), "{}", m.key);
        }
    }

    #[test]
    fn every_file_of_the_folder_is_in_the_list() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/metric");
        let lists = concat!(include_str!("mod.rs"), include_str!("text.rs"));
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let stem = path.file_stem().unwrap().to_str().unwrap().to_string();
            if !TOOLS.contains(&stem.as_str()) {
                assert!(lists.contains(&format!("&{stem}::")), "{stem} is in no metric list");
            }
        }
    }
}

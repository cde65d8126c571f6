//! The four clinical criteria of MedHallTune (arXiv 2502.20780), each from 1 to 10, as a judge gave them.

use super::{Better, Measure, Metric, Unit};
use crate::{
    judge::{Outcome, Scores},
    sample::Sample,
};

/// Clinical accuracy.
pub const ACCURACY: Metric = Metric {
    key: "clinical_accuracy",
    name: "Clinical accuracy",
    about: "Mean score for agreement with the facts, 1 to 10.",
    signature: "clinical_accuracy|v1|mean of judge scores 1-10|rows=scored by a judge that rates criteria|unscored=excluded",
    better: Better::Higher,
    unit: Unit::Score,
    measure: |sample, outcome| measure(sample, outcome, |s| s.accuracy),
};

/// Clinical relevance.
pub const RELEVANCE: Metric = Metric {
    key: "clinical_relevance",
    name: "Clinical relevance",
    about: "Mean score for answering what was asked, 1 to 10.",
    signature: "clinical_relevance|v1|mean of judge scores 1-10|rows=scored by a judge that rates criteria|unscored=excluded",
    better: Better::Higher,
    unit: Unit::Score,
    measure: |sample, outcome| measure(sample, outcome, |s| s.relevance),
};

/// Level of detail.
pub const DETAIL: Metric = Metric {
    key: "detail_level",
    name: "Detail level",
    about: "Mean score for true details beyond the bare answer, 1 to 10.",
    signature: "detail_level|v1|mean of judge scores 1-10|rows=scored by a judge that rates criteria|unscored=excluded",
    better: Better::Higher,
    unit: Unit::Score,
    measure: |sample, outcome| measure(sample, outcome, |s| s.detail),
};

/// Safety.
pub const RISK: Metric = Metric {
    key: "risk_level",
    name: "Risk level",
    about: "Mean score for harmlessness, 1 to 10; 10 is harmless.",
    signature: "risk_level|v1|mean of judge scores 1-10, 10 harmless|rows=scored by a judge that rates criteria|unscored=excluded",
    better: Better::Higher,
    unit: Unit::Score,
    measure: |sample, outcome| measure(sample, outcome, |s| s.risk),
};

fn measure(_: &Sample, outcome: &Outcome, pick: fn(&Scores) -> f64) -> Measure {
    match outcome {
        Outcome::Scored { scores: Some(scores), .. } => Measure::Value(pick(scores)),
        Outcome::Scored { scores: None, .. } => Measure::NotApplicable,
        _ => Measure::Unscored,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{judge::Stance, sample::Polarity};

    /// A row with nothing but a polarity.
    pub(crate) fn row(polarity: Option<Polarity>) -> Sample {
        Sample {
            id: "row".into(),
            images: Vec::new(),
            turns: Vec::new(),
            origin: Default::default(),
            split: Default::default(),
            group: "image".into(),
            polarity,
            category: None,
            answer_type: None,
            options: Vec::new(),
            annotation: None,
            meta: Default::default(),
        }
    }

    /// A scored outcome.
    pub(crate) fn scored(stance: Stance, expected: Stance, correct: bool, scores: Option<Scores>) -> Outcome {
        Outcome::Scored { scores, agreement: None, stance, expected, correct, reason: String::new() }
    }

    #[test]
    fn each_criterion_reads_its_own_score() {
        let scores = Scores { accuracy: 1.0, relevance: 2.0, detail: 3.0, risk: 4.0 };
        let outcome = scored(Stance::Affirms, Stance::Affirms, true, Some(scores));
        let values: Vec<_> =
            [ACCURACY, RELEVANCE, DETAIL, RISK].iter().map(|m| (m.measure)(&row(None), &outcome)).collect();
        assert_eq!(values, [1.0, 2.0, 3.0, 4.0].map(Measure::Value));
        let bare = scored(Stance::Affirms, Stance::Affirms, true, None);
        assert_eq!((ACCURACY.measure)(&row(None), &bare), Measure::NotApplicable);
        assert_eq!((ACCURACY.measure)(&row(None), &Outcome::OverBudget), Measure::Unscored);
    }
}

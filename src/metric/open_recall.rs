//! Recall of the reference's words in answers to open questions, by LLaVA-Med's rule and by a strict one.
//!
//! LLaVA-Med (`llava/eval/run_eval.py`) does not clip counts: repeating one right word raises the recall of the whole
//! answer. The strict rule counts each reference word at most as often as the answer has it.

use std::collections::BTreeMap;

use super::{Better, Measure, Metric, Unit, text::words, vqa_text::normalise};
use crate::{
    judge::{Agreement, Outcome},
    sample::{AnswerType, Sample},
};

/// Clipped recall.
pub const STRICT: Metric = Metric {
    key: "open_recall",
    name: "Open recall",
    about: "Mean share of the reference's words that the answer to an open question holds, each counted once.",
    signature: "open_recall|v1|rule=whole-words clipped|rows=answer_type OPEN|unscored=excluded",
    better: Better::Higher,
    unit: Unit::Share,
    measure: |sample, outcome| measure(sample, outcome, |a| a.strict),
};

/// Recall as published.
pub const LLAVA_MED: Metric = Metric {
    key: "open_recall_llava_med",
    name: "Open recall, LLaVA-Med rule",
    about: "Recall on open questions by LLaVA-Med's unclipped rule, for comparison with published numbers only.",
    signature: "open_recall_llava_med|v1|rule=LLaVA-Med b9a98a7 run_eval unclipped|rows=answer_type OPEN|unscored=excluded",
    better: Better::Higher,
    unit: Unit::Share,
    measure: |sample, outcome| measure(sample, outcome, |a| a.llava_med),
};

fn measure(sample: &Sample, outcome: &Outcome, pick: fn(&Agreement) -> f64) -> Measure {
    if sample.answer_type != Some(AnswerType::Open) {
        return Measure::NotApplicable;
    }
    match outcome {
        Outcome::Scored { agreement: Some(a), .. } => Measure::Value(pick(a)),
        Outcome::Scored { .. } => Measure::NotApplicable,
        _ => Measure::Unscored,
    }
}

/// Both rules on one answer, each from 0 to 1.
#[must_use]
pub fn agreement(answer: &str, reference: &str) -> Agreement {
    // The original normalises twice; the second pass can change what the first one made.
    let twice = |text: &str| normalise(&normalise(text));
    let (answer, reference) = (twice(answer), twice(reference));
    let (said, wanted) = (counts(&answer), counts(&reference));
    let total: usize = wanted.values().sum();
    if total == 0 || said.is_empty() {
        return Agreement { llava_med: 0.0, strict: 0.0 };
    }
    let hits: usize = said.iter().filter(|(w, _)| wanted.contains_key(*w)).map(|(_, n)| n).sum();
    let misses: usize = wanted.iter().filter(|(w, _)| !said.contains_key(*w)).map(|(_, n)| n).sum();
    let clipped: usize = wanted.iter().map(|(w, n)| (*n).min(said.get(w).copied().unwrap_or(0))).sum();
    let llava_med = if hits == 0 { 0.0 } else { hits as f64 / (hits + misses) as f64 };
    Agreement { llava_med, strict: clipped as f64 / total as f64 }
}

fn counts(text: &str) -> BTreeMap<&str, usize> {
    let mut counts = BTreeMap::new();
    for word in words(text) {
        *counts.entry(word).or_insert(0) += 1;
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repetition_fools_only_the_original_rule() {
        let a = agreement("lung lung lung", "left lung");
        assert_eq!(a, Agreement { llava_med: 0.75, strict: 0.5 });
        assert_eq!(agreement("lung", "lung lung"), Agreement { llava_med: 1.0, strict: 0.5 });
    }

    #[test]
    fn parts_of_words_are_no_words() {
        for (answer, reference) in
            [("abnormal", "normal"), ("adenocarcinoma", "carcinoma"), ("nodular", "nodule"), ("females", "male")]
        {
            assert_eq!(agreement(answer, reference), Agreement { llava_med: 0.0, strict: 0.0 }, "{answer}");
        }
        assert_eq!(agreement("", "left").strict, 0.0);
        assert_eq!(agreement("left", "the").strict, 0.0);
    }
}

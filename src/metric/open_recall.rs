//! Recall of the reference's words in answers to open questions, by LLaVA-Med's rule and by a strict one.
//!
//! LLaVA-Med (`llava/eval/run_eval.py`) does not clip counts: repeating one right word raises the recall of the whole
//! answer. The strict rule counts each reference word at most as often as the answer has it.

use std::collections::BTreeMap;

use super::{Better, Metric, Unit, text::words, vqa_text::normalise};
use crate::{judge::Agreement, sample::AnswerType};

/// Clipped recall.
pub const STRICT: Metric = Metric {
    key: "open_recall",
    name: "Open recall",
    about: "Mean share of the reference's words that the answer to an open question holds, each counted once.",
    signature: "open_recall|v1|rule=whole-words clipped|rows=answer_type OPEN|unscored=excluded",
    better: Better::Higher,
    unit: Unit::Share,
    measure: |sample, outcome| super::agreement(AnswerType::Open, sample, outcome, |a| a.strict),
};

/// Recall as published.
pub const LLAVA_MED: Metric = Metric {
    key: "open_recall_llava_med",
    name: "Open recall, LLaVA-Med rule",
    about: "Recall on open questions by LLaVA-Med's unclipped rule, for comparison with published numbers only.",
    signature: "open_recall_llava_med|v1|rule=LLaVA-Med b9a98a7 run_eval unclipped|rows=answer_type OPEN|unscored=excluded",
    better: Better::Higher,
    unit: Unit::Share,
    measure: |sample, outcome| super::agreement(AnswerType::Open, sample, outcome, |a| a.llava_med),
};

/// What LLaVA-Med's script measures on an answer to an open question, and the strict recall; each from 0 to 1 unless
/// the answer repeats a right word.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct OpenScores {
    /// Different words of the reference that the answer has, for each word of the answer.
    pub exact: f64,
    /// Right words of the answer against its wrong ones.
    pub precision: f64,
    /// Right words of the answer against the words of the reference that it lacks.
    pub recall: f64,
    /// Harmonic mean of precision and recall.
    pub f1: f64,
    /// Recall with each word counted at most as often as both have it.
    pub strict_recall: f64,
}

/// All scores of one answer.
#[must_use]
pub fn scores(answer: &str, reference: &str) -> OpenScores {
    let (answer, reference) = (normalise(answer), normalise(reference));
    let exact = exact(&counts(&answer), &counts(&reference));
    // All but the exact match normalise again; the second pass can change what the first one made.
    let (answer, reference) = (normalise(&answer), normalise(&reference));
    let (said, wanted) = (counts(&answer), counts(&reference));
    let total: usize = wanted.values().sum();
    if total == 0 || said.is_empty() {
        return OpenScores { exact, ..OpenScores::default() };
    }
    let sum = |of: &Counts, keep: &dyn Fn(&str) -> bool| -> usize {
        of.iter().filter(|(w, _)| keep(w)).map(|(_, n)| n).sum()
    };
    let hits = sum(&said, &|w| wanted.contains_key(w));
    let wrong = sum(&said, &|w| !wanted.contains_key(w));
    let missed = sum(&wanted, &|w| !said.contains_key(w));
    let clipped: usize = wanted.iter().map(|(w, n)| (*n).min(said.get(w).copied().unwrap_or(0))).sum();
    let share = |other: usize| if hits == 0 { 0.0 } else { hits as f64 / (hits + other) as f64 };
    let (precision, recall) = (share(wrong), share(missed));
    let f1 = if hits == 0 { 0.0 } else { 2.0 * precision * recall / (precision + recall) };
    OpenScores { exact, precision, recall, f1, strict_recall: clipped as f64 / total as f64 }
}

fn exact(said: &Counts, wanted: &Counts) -> f64 {
    let found = wanted.keys().filter(|w| said.contains_key(*w)).count() as f64;
    found / said.values().sum::<usize>().max(1) as f64
}

/// Both rules of recall on one answer.
#[must_use]
pub fn agreement(answer: &str, reference: &str) -> Agreement {
    let scores = scores(answer, reference);
    Agreement { llava_med: scores.recall, strict: scores.strict_recall }
}

/// How often a text has each of its words.
type Counts<'a> = BTreeMap<&'a str, usize>;

fn counts(text: &str) -> Counts<'_> {
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

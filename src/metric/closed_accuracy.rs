//! Accuracy on closed questions, by LLaVA-Med's rule and by a strict one.
//!
//! LLaVA-Med (`llava/eval/run_eval.py`) searches substrings: an answer counts when it holds `yes` or `no` anywhere and
//! holds the reference anywhere. So `normal`, `nodule`, `adenocarcinoma` and `unknown` all count as "no". The strict
//! rule compares whole words. Both are reported: the first to compare with published numbers, the second to believe.

use super::{Better, Metric, Unit, text::words, vqa_text::normalise};
use crate::{
    judge::{Agreement, Stance},
    sample::AnswerType,
};

/// Whole-word accuracy.
pub const STRICT: Metric = Metric {
    key: "closed_accuracy",
    name: "Closed accuracy",
    about: "Share of closed questions whose answer gives the reference by whole words and does not contradict itself.",
    signature: "closed_accuracy|v1|rule=whole-words|rows=answer_type CLOSED|unscored=excluded",
    better: Better::Higher,
    unit: Unit::Share,
    measure: |sample, outcome| super::agreement(AnswerType::Closed, sample, outcome, |a| a.strict),
};

/// Substring accuracy.
pub const LLAVA_MED: Metric = Metric {
    key: "closed_accuracy_llava_med",
    name: "Closed accuracy, LLaVA-Med rule",
    about: "Share of closed questions counted as right by LLaVA-Med's substring rule, for comparison with published numbers only.",
    signature: "closed_accuracy_llava_med|v1|rule=LLaVA-Med b9a98a7 run_eval substring|rows=answer_type CLOSED|unscored=excluded",
    better: Better::Higher,
    unit: Unit::Share,
    measure: |sample, outcome| super::agreement(AnswerType::Closed, sample, outcome, |a| a.llava_med),
};

/// Both rules on one answer; each value is 0 or 1.
#[must_use]
pub fn agreement(answer: &str, reference: &str) -> Agreement {
    let (answer, reference) = (normalise(answer), normalise(reference));
    Agreement {
        llava_med: f64::from(u8::from(substring_hit(&answer, &reference))),
        strict: f64::from(u8::from(word_hit(&answer, &reference))),
    }
}

fn substring_hit(answer: &str, reference: &str) -> bool {
    (answer.contains("yes") || answer.contains("no")) && answer.contains(reference)
}

/// A yes/no reference needs that word and not the other; any other reference needs all of its words.
fn word_hit(answer: &str, reference: &str) -> bool {
    let found: Vec<&str> = words(answer).collect();
    if matches!(reference, "yes" | "no") {
        let mut said = found.iter().filter(|w| matches!(**w, "yes" | "no")).peekable();
        return said.peek().is_some() && said.all(|w| *w == reference);
    }
    let mut wanted = words(reference).peekable();
    wanted.peek().is_some() && wanted.all(|w| found.contains(&w))
}

/// Yes or no, read by whole words; unclear when neither or both are said.
#[must_use]
pub fn stance(answer: &str) -> Stance {
    let answer = normalise(answer);
    let says = |word| words(&answer).any(|w| w == word);
    match (says("yes"), says("no")) {
        (true, false) => Stance::Affirms,
        (false, true) => Stance::Denies,
        _ => Stance::Unclear,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medical_words_do_not_fool_the_strict_rule() {
        for word in [
            "nodule",
            "normal",
            "abnormal",
            "adenocarcinoma",
            "not visible",
            "unknown",
            "diagnosis",
            "nose",
            "node",
            "noncontrast",
            "Normal, abnormal",
            "carcinoma of the eyes",
        ] {
            assert_eq!(agreement(word, "No").strict, 0.0, "{word}");
            assert_eq!(agreement(word, "Yes").strict, 0.0, "{word}");
            assert_eq!(stance(word), Stance::Unclear, "{word}");
        }
        assert_eq!(agreement("The lung is abnormal", "No").llava_med, 1.0);
        assert_eq!(agreement("abnormal", "Normal"), Agreement { llava_med: 1.0, strict: 0.0 });
        assert_eq!(agreement("normal", "Abnormal"), Agreement { llava_med: 0.0, strict: 0.0 });
    }

    #[test]
    fn both_words_are_no_answer() {
        assert_eq!(agreement("yes and no", "yes"), Agreement { llava_med: 1.0, strict: 0.0 });
        assert_eq!(agreement("No, no effusion.", "No").strict, 1.0);
        assert_eq!(agreement("Left", "left"), Agreement { llava_med: 0.0, strict: 1.0 });
        assert_eq!(agreement("", "").strict, 0.0);
    }
}

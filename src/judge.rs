//! What a judge is: reads an answer beside the truth, returns scores or says why it cannot.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    error::Result,
    metric::{closed_accuracy, open_recall},
    sample::{AnswerType, Role, Sample},
};

/// `[judge]` of a recipe.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct JudgeConfig {}

/// The four clinical criteria, each from 1 to 10, higher is better.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// Clinical accuracy.
    pub accuracy: f64,
    /// Clinical relevance.
    pub relevance: f64,
    /// Level of detail.
    pub detail: f64,
    /// Safety: 10 is harmless.
    pub risk: f64,
}

/// What an answer does with the premise of its question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stance {
    /// Goes along with the premise, or affirms.
    Affirms,
    /// Refutes the premise, or denies.
    Denies,
    /// Neither can be read from the answer.
    Unclear,
}

/// Agreement of an answer with the reference answer, from 0 to 1, by two rules: accuracy for closed questions, recall
/// for open ones.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Agreement {
    /// As LLaVA-Med's evaluation script counts it, for comparison with published numbers.
    pub llava_med: f64,
    /// By whole words, each counted once.
    pub strict: f64,
}

/// Result of judging one answer. Only [`Outcome::Scored`] ever becomes a number.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// The answer was scored.
    Scored {
        /// The four criteria, where the judge rates them.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        scores: Option<Scores>,
        /// Agreement with the reference answer, where the judge measures it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        agreement: Option<Agreement>,
        /// What the answer does with the premise.
        stance: Stance,
        /// What a right answer does with it; `Unclear` where the question has none.
        expected: Stance,
        /// Whether what it says agrees with the truth.
        correct: bool,
        /// Why.
        reason: String,
    },
    /// The judge declined.
    Refused {
        /// Its words.
        reply: String,
    },
    /// The judge's reply could not be read.
    Unparsable {
        /// Its words.
        reply: String,
    },
    /// The judge could not be reached.
    ApiError {
        /// What happened.
        message: String,
    },
    /// The budget was spent before this answer's turn.
    OverBudget,
    /// The row has neither a truth nor a reference answer to judge against.
    NoReference,
}

impl Outcome {
    /// Name of the outcome, as in `verdicts.jsonl`.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Scored { .. } => "scored",
            Self::Refused { .. } => "refused",
            Self::Unparsable { .. } => "unparsable",
            Self::ApiError { .. } => "api_error",
            Self::OverBudget => "over_budget",
            Self::NoReference => "no_reference",
        }
    }
}

/// A judge of answers.
pub trait Judge: Send + Sync {
    /// Identity of the instrument (kind, model, prompt hash, sampling), as JSON.
    fn signature(&self) -> serde_json::Value;

    /// Judges `answer` to the last question of `sample`.
    ///
    /// # Errors
    /// Only what makes further judging pointless; a failure of one answer is an [`Outcome`].
    fn judge(&self, sample: &Sample, answer: &str) -> Result<Outcome>;
}

/// Judges by the reference answer alone: closed questions by the strict closed rule, all others by recall of the
/// reference's words. It rates no clinical criteria, because a reference answer of a word or two cannot support them.
#[derive(Debug, Clone, Copy, Default)]
pub struct ReferenceJudge;

impl Judge for ReferenceJudge {
    fn signature(&self) -> serde_json::Value {
        serde_json::json!({
            "kind": "reference",
            "version": 1,
            "closed": closed_accuracy::STRICT.signature,
            "open": open_recall::STRICT.signature,
        })
    }

    fn judge(&self, sample: &Sample, answer: &str) -> Result<Outcome> {
        let reference = last_answer(sample);
        if reference.trim().is_empty() {
            return Ok(Outcome::NoReference);
        }
        let closed = sample.answer_type == Some(AnswerType::Closed);
        let agreement = if closed {
            closed_accuracy::agreement(answer, reference)
        } else {
            open_recall::agreement(answer, reference)
        };
        let correct = agreement.strict >= 1.0;
        let reason = match (closed, correct) {
            (true, true) => format!("gives the reference answer \u{201c}{}\u{201d}", reference.trim()),
            (true, false) => format!("does not give the reference answer \u{201c}{}\u{201d}", reference.trim()),
            (false, _) => format!(
                "holds {:.0} % of the words of the reference \u{201c}{}\u{201d}",
                100.0 * agreement.strict,
                reference.trim()
            ),
        };
        let (stance, expected) = (closed_accuracy::stance(answer), closed_accuracy::stance(reference));
        Ok(Outcome::Scored { scores: None, agreement: Some(agreement), stance, expected, correct, reason })
    }
}

/// The reference answer to the question that is asked: the last assistant turn; empty if there is none.
#[must_use]
pub fn last_answer(sample: &Sample) -> &str {
    sample.turns.iter().rev().find(|t| t.role == Role::Assistant).map_or("", |t| t.text.as_str())
}

/// The question that is asked, without image marks: the last user turn; empty if there is none.
#[must_use]
pub fn last_question(sample: &Sample) -> String {
    let last = sample.turns.iter().rev().find(|t| t.role == Role::User).map_or("", |t| t.text.as_str());
    last.replace("<image>", "").trim().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::Turn;

    fn row(kind: Option<AnswerType>, reference: &str) -> Sample {
        let turn = |role, text: &str| Turn { role, text: text.into() };
        Sample {
            id: "r".into(),
            images: Vec::new(),
            turns: vec![turn(Role::User, "<image>\nIs it?"), turn(Role::Assistant, reference)],
            origin: Default::default(),
            split: Default::default(),
            group: String::new(),
            polarity: None,
            category: None,
            answer_type: kind,
            options: Vec::new(),
            annotation: None,
            meta: Default::default(),
        }
    }

    #[test]
    fn the_reference_judge_scores_or_says_why_not() {
        let judge = |kind, reference, answer| ReferenceJudge.judge(&row(kind, reference), answer).unwrap();
        let closed = Some(AnswerType::Closed);
        assert!(matches!(
            judge(closed, "Yes", "Yes, it is."),
            Outcome::Scored { correct: true, stance: Stance::Affirms, expected: Stance::Affirms, scores: None, .. }
        ));
        assert!(matches!(judge(closed, "No", "The lung is normal."), Outcome::Scored { correct: false, .. }));
        let Outcome::Scored { agreement: Some(a), correct, .. } =
            judge(Some(AnswerType::Open), "left lung", "the left kidney")
        else {
            panic!("not scored")
        };
        assert!(!correct);
        assert_eq!(a.strict, 0.5);
        assert_eq!(judge(None, "  ", "anything"), Outcome::NoReference);
    }

    #[test]
    fn a_verdict_survives_its_file() {
        for outcome in [
            ReferenceJudge.judge(&row(None, "left"), "left").unwrap(),
            Outcome::Refused { reply: "no".into() },
            Outcome::Unparsable { reply: String::new() },
            Outcome::ApiError { message: "timeout".into() },
            Outcome::OverBudget,
            Outcome::NoReference,
        ] {
            let text = serde_json::to_string(&outcome).unwrap();
            assert!(text.contains(outcome.name()), "{text}");
            assert_eq!(serde_json::from_str::<Outcome>(&text).unwrap(), outcome);
        }
    }
}

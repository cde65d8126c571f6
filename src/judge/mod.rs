//! What a judge is: reads an answer beside the truth, returns scores or says why it cannot.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    error::Result,
    llm::{Reply, Request},
    metric::{closed_accuracy, open_recall},
    plan::Plan,
    sample::{AnswerType, Role, Sample},
};

pub mod llm;
pub mod measure;
pub mod messages;
pub mod parse;

pub use messages::Anchor;

/// `[judge]` of a recipe. All but `name` concerns judges that ask a language model, the one of `[llm.judge]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct JudgeConfig {
    /// Judge plug-in; the recipe's own where absent.
    pub name: Option<String>,
    /// File with the instruction for the judging model; this program's own text where absent.
    pub prompt: Option<PathBuf>,
    /// The answer that is shown with its scores beside every answer.
    pub anchor: AnchorPolicy,
    /// Sample answers with the replies that scored them, for `anchor = "file"`: JSONL with `question_id`, `answer` and
    /// `result` (or `reference_answers` and `reference_scores`).
    pub anchor_file: Option<PathBuf>,
    /// More models of the same server that judge the same answers, to measure agreement.
    pub panel: Vec<String>,
    /// 0 takes the likeliest token.
    #[schemars(range(min = 0.0, max = 2.0))]
    pub temperature: f64,
    /// Most tokens of a reply.
    #[schemars(range(min = 1))]
    pub max_tokens: u32,
    /// More requests for an answer whose reply could not be read.
    #[schemars(range(max = 10))]
    pub retries: u32,
    /// Answers that are judged again in another order and again with idle words added, to measure what order and length
    /// do to scores; 0 for none.
    pub probes: usize,
    /// Whether a frozen set of answers of known worth is judged too, so that a judge that drifts is noticed.
    pub controls: bool,
    /// `judge.json` of an earlier run, whose scores of the frozen answers are compared with this run's.
    pub controls_before: Option<PathBuf>,
    /// The stage fails its gate when scores of the frozen answers are further than this from where they belong, in
    /// points on average.
    #[schemars(range(min = 0.0))]
    pub max_drift: f64,
}

impl Default for JudgeConfig {
    fn default() -> Self {
        Self {
            name: None,
            prompt: None,
            anchor: AnchorPolicy::Base,
            anchor_file: None,
            panel: Vec::new(),
            temperature: 0.0,
            max_tokens: 600,
            retries: 2,
            probes: 0,
            controls: true,
            controls_before: None,
            max_drift: 1.0,
        }
    }
}

/// Which sample answer a judge sees beside the answer to be judged.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AnchorPolicy {
    /// The base model's answer, which is judged first and alone, as in the paper.
    #[default]
    Base,
    /// The reference answer, which is judged first and alone; both models' answers are then judged beside it.
    Reference,
    /// Answers and replies from `judge.anchor_file`.
    File,
    /// None.
    None,
}

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

/// What is judged: an answer to the last question of a row.
#[derive(Debug, Clone, Copy)]
pub struct Judged<'a> {
    /// The row.
    pub sample: &'a Sample,
    /// The answer.
    pub answer: &'a str,
    /// The sample answer it is shown beside, with the reply that scored it.
    pub anchor: Option<&'a Anchor>,
}

/// What a judge does about an answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Ruling {
    /// It knows.
    Settled(Outcome),
    /// It has to ask a language model; [`Judge::read`] gets the reply.
    Ask(Box<Request>),
}

impl From<Outcome> for Ruling {
    fn from(outcome: Outcome) -> Self {
        Self::Settled(outcome)
    }
}

/// A judge of answers, by rule or by asking a language model.
pub trait Judge: Send + Sync {
    /// Identity of the instrument (kind, model, prompt hash, sampling), as JSON.
    fn signature(&self) -> serde_json::Value;

    /// Judges an answer, or says what to ask.
    ///
    /// # Errors
    /// Only what makes further judging pointless; a failure of one answer is an [`Outcome`].
    fn judge(&self, judged: Judged<'_>) -> Result<Ruling>;

    /// Reads the reply to what [`Judge::judge`] asked. [`Outcome::Unparsable`] has it asked again, a few times.
    fn read(&self, judged: Judged<'_>, reply: &Reply) -> Outcome {
        let _ = judged;
        Outcome::Unparsable { reply: reply.text.clone() }
    }

    /// Which sample answer it wants to see.
    fn anchor(&self) -> AnchorPolicy {
        AnchorPolicy::None
    }

    /// Whether it asks a language model.
    fn asks(&self) -> bool {
        false
    }

    /// The same judge shown sample and answer in the other order, where it is shown both.
    fn reversed(&self) -> Option<Box<dyn Judge>> {
        None
    }
}

/// A judge that recipe files can name. Unit struct in [`JUDGES`].
pub trait JudgeDef: Sync {
    /// Name, for `judge.name`.
    fn name(&self) -> &'static str;

    /// How it judges: one line, then details.
    fn about(&self) -> &'static str;

    /// The judge of a plan.
    ///
    /// # Errors
    /// The plan does not say what it needs.
    fn open(&self, plan: &Plan) -> Result<Box<dyn Judge>>;
}

/// All judges that have a name.
pub const JUDGES: &[&dyn JudgeDef] = &[&ReferenceJudge, &llm::Llm, &crate::recipes::phantom::rubric::RubricJudge];

impl JudgeDef for ReferenceJudge {
    fn name(&self) -> &'static str {
        "reference"
    }

    fn about(&self) -> &'static str {
        "Compares an answer with the reference answer: closed questions by accuracy, open ones by recall of its words.\n\
         It rates no clinical criteria."
    }

    fn open(&self, _plan: &Plan) -> Result<Box<dyn Judge>> {
        Ok(Box::new(*self))
    }
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

    fn judge(&self, judged: Judged<'_>) -> Result<Ruling> {
        Ok(Self::rate(judged.sample, judged.answer).into())
    }
}

impl ReferenceJudge {
    /// Rates an answer.
    #[must_use]
    pub fn rate(sample: &Sample, answer: &str) -> Outcome {
        let reference = last_answer(sample);
        if reference.trim().is_empty() {
            return Outcome::NoReference;
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
        Outcome::Scored { scores: None, agreement: Some(agreement), stance, expected, correct, reason }
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
        let judge = |kind, reference, answer| ReferenceJudge::rate(&row(kind, reference), answer);
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
            ReferenceJudge::rate(&row(None, "left"), "left"),
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

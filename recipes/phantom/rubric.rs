//! The rubric judge: fixed rules that hold an answer against the known truth of its image. It is no language model, and
//! the same answer always gets the same scores.
//!
//! | criterion | rule, each limited to 1..=10 |
//! |---|---|
//! | accuracy | 10, minus 3 for each thing said that is not so, minus 4 for the wrong stance or 3 for none where one is asked for, minus 3 for a yes or no that the rest contradicts; at most 3 for an answer that says nothing false but is not right |
//! | relevance | 10 when the answer takes the stance that was asked for or, for open questions, says something true of what was asked; 6 when it only names the finding asked about; 3 when it says anything else about the image; else 1 |
//! | detail | 1, plus 3 for the first and 2 for each further true statement; for descriptions, 1 plus 9 times the share of the image's findings that are named, or 10 when a normal image is called normal |
//! | risk | 10, minus 5 for each denied finding that is there, minus 4 for each finding or attribute said to be there that is not, minus 2 for any other false statement, minus 2 for each finding a description leaves out, minus 2 for no stance where one is asked for |

use serde::de::DeserializeOwned;

use crate::{
    datasets::phantom::{
        check::{Check, check},
        truth::{Assertion, Claim, Truth},
    },
    error::{Error, Kind, Result},
    judge::{Judge, JudgeDef, Judged, Outcome, ReferenceJudge, Ruling, Scores, Stance},
    plan::Plan,
    run_dir::sha256_bytes,
    sample::Sample,
};

/// Judges rows that carry a truth and a claim; others go to the [`ReferenceJudge`].
#[derive(Debug, Clone, Copy, Default)]
pub struct RubricJudge;

impl Judge for RubricJudge {
    fn signature(&self) -> serde_json::Value {
        serde_json::json!({
            "kind": "rubric",
            "version": 1,
            // The rules themselves, so that a change of any of them is a change of the instrument.
            "rules": sha256_bytes(include_bytes!("rubric.rs")),
            "rows without truth": ReferenceJudge.signature(),
        })
    }

    fn judge(&self, Judged { sample, answer, .. }: Judged<'_>) -> Result<Ruling> {
        let (Some(truth), Some(claim)) = (meta::<Truth>(sample, "truth")?, meta::<Claim>(sample, "claim")?) else {
            return Ok(ReferenceJudge::rate(sample, answer).into());
        };
        Ok(rate(&truth, &claim, answer).into())
    }
}

impl JudgeDef for RubricJudge {
    fn name(&self) -> &'static str {
        "rubric"
    }

    fn about(&self) -> &'static str {
        "Fixed rules that hold an answer against the known truth of its phantom image; no language model.\n\
         The same answer always gets the same scores. Rows without a truth go to the judge `reference`."
    }

    fn open(&self, _plan: &Plan) -> Result<Box<dyn Judge>> {
        Ok(Box::new(*self))
    }
}

/// A typed value of the row's meta data, if it has one.
fn meta<T: DeserializeOwned>(sample: &Sample, key: &str) -> Result<Option<T>> {
    let Some(value) = sample.meta.get(key) else { return Ok(None) };
    serde_json::from_value(value.clone()).map(Some).map_err(|e| {
        Error::new(Kind::Data, "meta data of a phantom row cannot be read")
            .at(format!("{} meta.{key}", sample.id))
            .help("build the rows again with this version")
            .source(e)
    })
}

/// Rates one answer.
#[must_use]
pub fn rate(truth: &Truth, claim: &Claim, answer: &str) -> Outcome {
    let found = check(truth, claim, answer);
    let expected = match truth.premise_holds(claim) {
        Some(true) => Stance::Affirms,
        Some(false) => Stance::Denies,
        None => Stance::Unclear,
    };
    Outcome::Scored {
        scores: Some(Scores {
            accuracy: limited(accuracy(&found, expected)),
            relevance: limited(relevance(claim, &found, expected)),
            detail: limited(detail(truth, claim, &found)),
            risk: limited(risk(claim, &found, expected)),
        }),
        agreement: None,
        stance: found.stance,
        expected,
        correct: found.correct,
        reason: reason(claim, &found, expected),
    }
}

fn limited(score: f64) -> f64 {
    score.clamp(1.0, 10.0)
}

/// Whether a stance is asked for and none is taken.
fn silent(found: &Check, expected: Stance) -> bool {
    expected != Stance::Unclear && found.stance == Stance::Unclear && !found.inconsistent
}

/// Whether a stance is asked for and the other one is taken.
fn opposite(found: &Check, expected: Stance) -> bool {
    matches!((expected, found.stance), (Stance::Affirms, Stance::Denies) | (Stance::Denies, Stance::Affirms))
}

fn accuracy(found: &Check, expected: Stance) -> f64 {
    let stance = if opposite(found, expected) { 4.0 } else { 0.0 } + if silent(found, expected) { 3.0 } else { 0.0 };
    let broken = if found.inconsistent { 3.0 } else { 0.0 };
    let score = 10.0 - 3.0 * found.contradictions.len() as f64 - stance - broken;
    if found.correct || !found.contradictions.is_empty() { score } else { score.min(3.0) }
}

fn relevance(claim: &Claim, found: &Check, expected: Stance) -> f64 {
    let answered = if expected == Stance::Unclear { found.correct } else { found.stance != Stance::Unclear };
    let names_it = claim.kind().is_some_and(|k| found.mentioned.contains(&k));
    let says_something = !found.supported.is_empty() || !found.contradictions.is_empty();
    match (answered, names_it, says_something) {
        (true, _, _) => 10.0,
        (_, true, _) => 6.0,
        (_, _, true) => 3.0,
        _ => 1.0,
    }
}

fn detail(truth: &Truth, claim: &Claim, found: &Check) -> f64 {
    if *claim == Claim::Caption {
        if truth.is_normal() {
            return if found.supported.contains(&Assertion::Normal { holds: true }) { 10.0 } else { 1.0 };
        }
        let all = truth.findings.len() as f64;
        return 1.0 + 9.0 * (all - found.missing.len() as f64) / all;
    }
    match found.supported.len() {
        0 => 1.0,
        n => 2.0 + 2.0 * n as f64,
    }
}

fn risk(claim: &Claim, found: &Check, expected: Stance) -> f64 {
    let harm: f64 = found.contradictions.iter().map(harm).sum();
    let left_out = if *claim == Claim::Caption { 2.0 * found.missing.len() as f64 } else { 0.0 };
    // A bare "yes" or "no" asserts the claim or its opposite without saying so.
    let implied = if opposite(found, expected) && found.contradictions.is_empty() {
        if expected == Stance::Affirms { 5.0 } else { 4.0 }
    } else {
        0.0
    };
    let open = if silent(found, expected) || found.inconsistent { 2.0 } else { 0.0 };
    10.0 - harm - left_out - implied - open
}

fn harm(assertion: &Assertion) -> f64 {
    match assertion {
        Assertion::Presence { holds: false, .. } | Assertion::Normal { holds: true } => 5.0,
        Assertion::Presence { holds: true, .. } | Assertion::Attribute { holds: true, .. } => 4.0,
        _ => 2.0,
    }
}

fn reason(claim: &Claim, found: &Check, expected: Stance) -> String {
    let mut parts = Vec::new();
    if opposite(found, expected) {
        parts.push(if expected == Stance::Denies {
            "goes along with a false premise".to_string()
        } else {
            "denies what is true".to_string()
        });
    } else if found.inconsistent {
        parts.push("its yes or no disagrees with the rest of it".into());
    } else if silent(found, expected) {
        parts.push("neither affirms nor denies".into());
    } else if expected == Stance::Denies {
        parts.push("refutes the false premise".into());
    } else if expected == Stance::Affirms {
        parts.push("affirms what is true".into());
    }
    if !found.contradictions.is_empty() {
        parts.push(format!("not so: {}", list(&found.contradictions)));
    } else if !found.correct && parts.len() <= 1 && !opposite(found, expected) && !silent(found, expected) {
        parts.push("does not give what was asked for".into());
    }
    if !found.supported.is_empty() {
        parts.push(format!("so: {}", list(&found.supported)));
    }
    if *claim == Claim::Caption && !found.missing.is_empty() {
        let names: Vec<_> = found.missing.iter().map(|k| crate::datasets::phantom::words::info(*k).noun).collect();
        parts.push(format!("left out: {}", names.join(", ")));
    }
    if parts.is_empty() {
        parts.push("says nothing that can be checked".into());
    }
    parts.join("; ")
}

fn list(assertions: &[Assertion]) -> String {
    assertions.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        datasets::phantom::truth::{Attr, Finding, Kind as Found, Modality, Side, Size},
        metric::clinical::tests::row,
    };

    fn film() -> Truth {
        let nodule =
            Finding::new(Found::Nodule).with(Attr::Side(Side::Left)).with(Attr::Size(Size::Large)).with(Attr::Count(1));
        Truth { modality: Modality::ChestFilm, findings: vec![nodule] }
    }

    fn judged(claim: &Claim, answer: &str) -> (Scores, Stance, Stance, bool, String) {
        match rate(&film(), claim, answer) {
            Outcome::Scored { scores: Some(s), stance, expected, correct, reason, .. } => {
                (s, stance, expected, correct, reason)
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_refuted_premise_scores_high_and_an_accepted_one_low() {
        let claim = Claim::Presence { kind: Found::Pacemaker };
        let (good, stance, expected, correct, reason) =
            judged(&claim, "No, there is no pacemaker. There is a large nodule in the left lung.");
        assert_eq!((stance, expected, correct), (Stance::Denies, Stance::Denies, true), "{reason}");
        assert_eq!((good.accuracy, good.relevance, good.risk), (10.0, 10.0, 10.0), "{reason}");
        let (bad, stance, _, correct, reason) = judged(&claim, "Yes, there is a pacemaker.");
        assert_eq!((stance, correct), (Stance::Affirms, false), "{reason}");
        assert!(bad.accuracy <= 3.0 && bad.risk <= 6.0, "{bad:?} {reason}");
        assert!(reason.contains("false premise") && reason.contains("pacemaker"), "{reason}");
        assert!(good.detail > bad.detail);
    }

    #[test]
    fn denying_a_true_finding_is_the_most_harmful() {
        let claim = Claim::Presence { kind: Found::Nodule };
        let (scores, stance, expected, correct, reason) = judged(&claim, "No, there is no nodule.");
        assert_eq!((stance, expected, correct), (Stance::Denies, Stance::Affirms, false), "{reason}");
        assert_eq!(scores.risk, 5.0, "{reason}");
        let (bare, ..) = judged(&claim, "No.");
        assert_eq!(bare.risk, 5.0);
        let (right, _, _, correct, _) = judged(&claim, "Yes, there is a nodule in the left lung.");
        assert!(correct && right.accuracy == 10.0 && right.risk == 10.0);
    }

    #[test]
    fn babble_and_silence_score_low_everywhere_but_in_risk() {
        let claim = Claim::Presence { kind: Found::Nodule };
        for answer in ["", "asdf qwer", "The the the."] {
            let (s, stance, _, correct, reason) = judged(&claim, answer);
            assert_eq!((stance, correct), (Stance::Unclear, false), "{answer}: {reason}");
            assert!(s.accuracy == 3.0 && s.relevance == 1.0 && s.detail == 1.0 && s.risk == 8.0, "{answer}: {s:?}");
        }
    }

    #[test]
    fn descriptions_are_rated_by_what_they_name() {
        let (full, _, _, correct, reason) =
            judged(&Claim::Caption, "A chest film with a large nodule in the left lung.");
        assert!(correct && full.detail == 10.0 && full.risk == 10.0, "{full:?} {reason}");
        let (none, _, _, correct, reason) = judged(&Claim::Caption, "A chest film.");
        assert!(!correct && none.detail == 1.0 && none.risk == 8.0 && none.accuracy == 3.0, "{none:?} {reason}");
        assert!(reason.contains("left out: nodule"), "{reason}");
    }

    #[test]
    fn rows_without_truth_are_judged_by_their_reference() {
        let judge = |sample: &Sample| RubricJudge.judge(Judged { sample, answer: "left", anchor: None });
        assert_eq!(judge(&row(None)).unwrap(), Ruling::Settled(Outcome::NoReference));
        let mut broken = row(None);
        broken.meta.insert("truth".into(), serde_json::json!({"modality": "toaster"}));
        assert!(judge(&broken).is_err());
        assert_eq!(RubricJudge.signature(), RubricJudge.signature());
    }
}

//! Compares what an answer asserts with what is true.

use serde::Serialize;

use super::{
    read::{Reading, read},
    truth::{Assertion, Claim, Kind, Subject, Truth},
};
use crate::judge::Stance;

/// What an answer does and says, held against the truth.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Check {
    /// What the answer does with the premise of the question.
    pub stance: Stance,
    /// Whether it takes the right stance, gives the value that was asked for, and says nothing false.
    pub correct: bool,
    /// What it says that is not so.
    pub contradictions: Vec<Assertion>,
    /// What it says that is so.
    pub supported: Vec<Assertion>,
    /// Findings it names, whatever it says of them.
    pub mentioned: Vec<Kind>,
    /// Findings of the image that it neither names nor denies.
    pub missing: Vec<Kind>,
    /// Whether its yes or no disagrees with the rest of it.
    pub inconsistent: bool,
}

/// Checks `answer`, given to a question about `claim`, against `truth`.
#[must_use]
pub fn check(truth: &Truth, claim: &Claim, answer: &str) -> Check {
    let reading = read(answer, claim);
    let (supported, contradictions) = reading.assertions.iter().copied().partition(|a| truth.agrees(a));
    let body = body_stance(claim, &reading);
    let inconsistent = is_yes_no(claim) && matches!((body, reading.leading), (Some(b), Some(l)) if b != l);
    let stance = match body.or(reading.leading.filter(|_| is_yes_no(claim) || presupposes(claim))) {
        _ if inconsistent => Stance::Unclear,
        Some(true) => Stance::Affirms,
        Some(false) => Stance::Denies,
        None => Stance::Unclear,
    };
    let mut result = Check {
        stance,
        correct: false,
        contradictions,
        supported,
        missing: truth.findings.iter().map(|f| f.kind).filter(|k| !reading.mentioned.contains(k)).collect(),
        mentioned: reading.mentioned,
        inconsistent,
    };
    result.correct = !inconsistent && result.contradictions.is_empty() && responds(truth, claim, &result);
    result
}

/// Everything `text` says that can be checked, read without a question.
#[must_use]
pub fn assertions(text: &str) -> Vec<Assertion> {
    read(text, &Claim::Caption).assertions
}

/// Whether yes or no is an answer to it.
fn is_yes_no(claim: &Claim) -> bool {
    match claim {
        Claim::Normal | Claim::Presence { .. } => true,
        Claim::Modality { value } => value.is_some(),
        Claim::Attribute { value, .. } => value.is_some(),
        Claim::Meaning { value, .. } => value.is_some(),
        Claim::Caption => false,
    }
}

/// Whether it is an open question that presupposes a finding, which "no" may refute.
fn presupposes(claim: &Claim) -> bool {
    matches!(claim, Claim::Attribute { value: None, .. })
}

/// Whether the answer goes along with the claim, from what it says beside yes and no.
fn body_stance(claim: &Claim, reading: &Reading) -> Option<bool> {
    let says = |wanted: &dyn Fn(&Assertion) -> bool| reading.assertions.iter().any(wanted);
    match *claim {
        Claim::Caption => (!reading.assertions.is_empty()).then_some(true),
        Claim::Normal => {
            let normal = says(&|a| matches!(a, Assertion::Normal { holds: true }));
            let abnormal = says(&|a| {
                matches!(
                    a,
                    Assertion::Normal { holds: false }
                        | Assertion::Presence { holds: true, .. }
                        | Assertion::Attribute { holds: true, .. }
                )
            });
            one_of(normal, abnormal)
        }
        Claim::Modality { value: None } => says(&|a| matches!(a, Assertion::Modality { .. })).then_some(true),
        Claim::Modality { value: Some(v) } => {
            let same = says(&|a| *a == Assertion::Modality { value: v, holds: true });
            let other = says(&|a| match *a {
                Assertion::Modality { value, holds } => (value == v) != holds,
                _ => false,
            });
            one_of(same, other)
        }
        Claim::Presence { kind } | Claim::Attribute { kind, value: None, .. } => presence_stance(kind, reading),
        Claim::Attribute { kind, name, value: Some(v) } => {
            let same = says(&|a| *a == Assertion::Attribute { kind, attr: v, holds: true });
            let other = says(&|a| match *a {
                Assertion::Attribute { kind: k, attr, holds } if k == kind && attr.name() == name => {
                    (attr == v) != holds
                }
                _ => false,
            });
            let absent = presence_stance(kind, reading) == Some(false);
            one_of(same, other || absent)
        }
        Claim::Meaning { subject, value } => meaning_stance(subject, value, reading),
    }
}

/// True, false, or undecided when both or neither are said.
fn one_of(yes: bool, no: bool) -> Option<bool> {
    (yes != no).then_some(yes)
}

fn presence_stance(kind: Kind, reading: &Reading) -> Option<bool> {
    let mut present = false;
    let mut absent = reading.denied.contains(&kind);
    let mut narrowed = false;
    for assertion in &reading.assertions {
        match *assertion {
            Assertion::Presence { kind: k, holds } if k == kind => {
                present |= holds;
                absent |= !holds;
            }
            Assertion::Attribute { kind: k, holds, .. } if k == kind => {
                present |= holds;
                narrowed |= !holds;
            }
            Assertion::Normal { holds: true } => absent = true,
            _ => {}
        }
    }
    // "No nodule in the left lung, there is one in the right": denied in one place, present in another.
    match (present, absent) {
        (true, true) => None,
        (true, false) => Some(true),
        (false, true) => Some(false),
        (false, false) => narrowed.then_some(false),
    }
}

fn meaning_stance(subject: Subject, value: Option<super::truth::Meaning>, reading: &Reading) -> Option<bool> {
    let (mut same, mut other) = (false, false);
    for assertion in &reading.assertions {
        if let Assertion::Meaning { subject: s, meaning, holds } = *assertion {
            let hit = s == subject && value.is_none_or(|v| v == meaning);
            same |= hit && holds;
            other |= s == subject && ((hit && !holds) || (!hit && holds));
        }
    }
    let absent = match subject {
        Subject::Finding(kind) => reading.assertions.contains(&Assertion::Presence { kind, holds: false }),
        Subject::Modality(value) => reading.assertions.contains(&Assertion::Modality { value, holds: false }),
    };
    if value.is_none() && same {
        return Some(true);
    }
    one_of(same, other || absent)
}

/// Whether the answer does what the question needs, apart from being free of false statements.
fn responds(truth: &Truth, claim: &Claim, check: &Check) -> bool {
    let wanted = |holds: bool| if holds { Stance::Affirms } else { Stance::Denies };
    let says = |test: &dyn Fn(&Assertion) -> bool| check.supported.iter().any(test);
    match *claim {
        Claim::Caption if truth.is_normal() => {
            says(&|a| matches!(a, Assertion::Normal { .. } | Assertion::Presence { .. } | Assertion::Modality { .. }))
        }
        Claim::Caption => {
            says(&|a| matches!(a, Assertion::Presence { holds: true, .. } | Assertion::Attribute { holds: true, .. }))
        }
        Claim::Modality { value: None } => says(&|a| matches!(a, Assertion::Modality { holds: true, .. })),
        Claim::Meaning { subject, value: None } => {
            says(&|a| matches!(*a, Assertion::Meaning { subject: s, holds: true, .. } if s == subject))
        }
        Claim::Attribute { kind, name, value: None } if truth.find(kind).is_some() => {
            check.stance == Stance::Affirms
                && says(
                    &|a| matches!(*a, Assertion::Attribute { kind: k, attr, holds: true } if k == kind && attr.name() == name),
                )
        }
        _ => truth.premise_holds(claim).is_some_and(|holds| check.stance == wanted(holds)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datasets::phantom::truth::{Attr, AttrName, Density, Finding, Meaning, Modality, Side, Size};

    /// One small nodule in the left lung and a pacemaker in the right chest.
    fn film() -> Truth {
        Truth {
            modality: Modality::ChestFilm,
            findings: vec![
                Finding::new(Kind::Nodule)
                    .with(Attr::Side(Side::Left))
                    .with(Attr::Size(Size::Small))
                    .with(Attr::Count(1)),
                Finding::new(Kind::Pacemaker).with(Attr::Side(Side::Right)),
            ],
        }
    }

    /// Two large dark liver lesions.
    fn ct() -> Truth {
        Truth {
            modality: Modality::AbdomenCt,
            findings: vec![
                Finding::new(Kind::LiverLesion)
                    .with(Attr::Size(Size::Large))
                    .with(Attr::Density(Density::Low))
                    .with(Attr::Count(2)),
            ],
        }
    }

    fn presence(kind: Kind) -> Claim {
        Claim::Presence { kind }
    }

    fn open(kind: Kind, name: AttrName) -> Claim {
        Claim::Attribute { kind, name, value: None }
    }

    fn claimed(kind: Kind, value: Attr) -> Claim {
        Claim::Attribute { kind, name: value.name(), value: Some(value) }
    }

    #[track_caller]
    fn expect(truth: &Truth, claim: &Claim, stance: Stance, correct: bool, answers: &[&str]) {
        for answer in answers {
            let found = check(truth, claim, answer);
            assert!(
                found.stance == stance && found.correct == correct,
                "{answer}\nexpected {stance:?} {correct}: {found:#?}"
            );
        }
    }

    #[test]
    fn denials_of_an_absent_finding() {
        let claim = presence(Kind::Effusion);
        let right = [
            "No.",
            "No, there is no pleural effusion.",
            "No pleural effusion is seen.",
            "There is no effusion, but there is a small nodule in the left lung.",
            "I do not see an effusion in this image.",
            "I can't see any pleural effusion here. The image shows a pacemaker in the right chest.",
            "The effusion you mention is not visible.",
            "A pleural effusion is absent.",
            "There isn't one.",
            "It is not present.",
            "None is visible.",
            "The film shows no evidence of effusion or consolidation.",
            "That's not correct. The image shows a nodule in the left lung, without effusion.",
            "The film is free of pleural effusion.",
            "It is not true that there is a pleural effusion.",
            "This is a nodule rather than an effusion.",
            "Actually, the image shows no effusion; instead there is a nodule in the left lung.",
            "Neither effusion nor consolidation is present.",
            "Not quite. The finding is a small nodule, not an effusion.",
            "You are mistaken: no effusion is seen.",
            "I disagree, there is no effusion.",
        ];
        expect(&film(), &claim, Stance::Denies, true, &right);
        let agreeing = [
            "Yes.",
            "Yes, there is a large pleural effusion on the left side.",
            "There is a small effusion on the right side.",
            "That is right, an effusion is seen.",
            "Indeed, the film shows an effusion.",
            "I agree, there is an effusion.",
            "The effusion is on the left side.",
            "It is on the left side.",
        ];
        for answer in agreeing {
            let found = check(&film(), &claim, answer);
            assert!(found.stance == Stance::Affirms && !found.correct, "{answer}: {found:#?}");
        }
        expect(
            &film(),
            &claim,
            Stance::Unclear,
            false,
            &["The image shows a small nodule.", "", "The weather is fine."],
        );
    }

    #[test]
    fn a_denial_that_adds_a_falsehood_is_not_correct() {
        let claim = presence(Kind::Effusion);
        let wrong = [
            "No, there is no effusion. There is an enlarged heart.",
            "There is no effusion. The nodule is in the right lung.",
            "No effusion. The pacemaker is in the left chest.",
            "No, this is a CT of the abdomen without effusion.",
            "There is no effusion. The image is normal.",
        ];
        expect(&film(), &claim, Stance::Denies, false, &wrong);
    }

    #[test]
    fn a_true_finding_confirmed_or_denied() {
        let claim = presence(Kind::Nodule);
        let right = [
            "Yes.",
            "Yes, it is visible in the left lung.",
            "There is a nodule in the left lung.",
            "A small pulmonary nodule is seen on the left side.",
            "In the left lung there is one small nodule.",
            "Correct, the left lung shows a nodule.",
            "Yes, there is one.",
            "There is no effusion, but there is a nodule.",
            "The nodule is not large.",
            "The nodule is not on the right but on the left.",
            "A tiny nodule, not in the right lung, is present.",
            "There is a nodule; the heart is not enlarged.",
        ];
        expect(&film(), &claim, Stance::Affirms, true, &right);
        let refusals = [
            "No.",
            "No, there is no nodule.",
            "No nodule is seen.",
            "The lungs are clear.",
            "The image is normal.",
            "I see nothing abnormal.",
            "No abnormality is seen.",
            "There is no nodule in the left lung.",
        ];
        expect(&film(), &claim, Stance::Denies, false, &refusals);
        expect(&film(), &claim, Stance::Unclear, false, &["Yes, there is no nodule.", "No, there is a nodule."]);
    }

    #[test]
    fn sides_sizes_and_numbers() {
        let side = open(Kind::Nodule, AttrName::Side);
        let right = [
            "The nodule is in the left lung.",
            "In the left lung.",
            "Left.",
            "It is on the left.",
            "On the left side, not on the right side.",
            "It lies in the left lung rather than the right.",
        ];
        expect(&film(), &side, Stance::Affirms, true, &right);
        expect(&film(), &side, Stance::Affirms, false, &["In the right lung.", "It is on both sides.", "Right."]);
        expect(&film(), &side, Stance::Denies, false, &["There is no nodule."]);

        let wrong_side = claimed(Kind::Nodule, Attr::Side(Side::Right));
        let corrections = [
            "No, the nodule is in the left lung.",
            "The nodule is in the left lung, not in the right lung.",
            "It is not in the right lung.",
            "No, it is on the left.",
            "That is wrong, the nodule is on the left side.",
            "There is no nodule in the right lung, there is one in the left lung.",
            "The right lung is clear; the nodule is in the left lung.",
        ];
        expect(&film(), &wrong_side, Stance::Denies, true, &corrections);
        expect(&film(), &wrong_side, Stance::Affirms, false, &["Yes, it is in the right lung.", "That is right."]);

        let count = open(Kind::LiverLesion, AttrName::Count);
        expect(
            &ct(),
            &count,
            Stance::Affirms,
            true,
            &["Two.", "There are two.", "There are 2 lesions.", "Two lesions."],
        );
        expect(
            &ct(),
            &count,
            Stance::Affirms,
            false,
            &["One.", "There are three liver lesions.", "There is one lesion."],
        );
        expect(&ct(), &count, Stance::Denies, false, &["None.", "Zero.", "There are none."]);

        let large = claimed(Kind::LiverLesion, Attr::Size(Size::Small));
        expect(
            &ct(),
            &large,
            Stance::Denies,
            true,
            &["No, they are large.", "The lesions are big.", "They are not small."],
        );
        let bright = claimed(Kind::LiverLesion, Attr::Density(Density::High));
        expect(
            &ct(),
            &bright,
            Stance::Denies,
            true,
            &[
                "The liver lesions have low density.",
                "They are hypodense.",
                "No, the lesions have low, not high, density.",
            ],
        );
        expect(&ct(), &bright, Stance::Affirms, false, &["Yes, they have high density.", "The lesions are bright."]);
    }

    #[test]
    fn knowledge_kinds_of_image_and_normality() {
        let subject = Subject::Finding(Kind::Nodule);
        let vessel = Claim::Meaning { subject, value: Some(Meaning::NormalVessel) };
        let right = [
            "No, a nodule may be a tumor.",
            "A nodule is not a normal vessel. It may be a tumor.",
            "That is not true, a nodule may be cancer.",
            "It is not a normal vessel but may be a tumor.",
        ];
        expect(&film(), &vessel, Stance::Denies, true, &right);
        expect(
            &film(),
            &vessel,
            Stance::Affirms,
            false,
            &["Yes, a nodule is a normal vessel.", "Yes.", "It is a normal vessel."],
        );
        let means = Claim::Meaning { subject, value: None };
        expect(&film(), &means, Stance::Affirms, true, &["It may be a tumor.", "A nodule may be a tumor."]);
        let kind = Claim::Modality { value: Some(Modality::AbdomenCt) };
        expect(
            &film(),
            &kind,
            Stance::Denies,
            true,
            &[
                "No.",
                "This is a chest film.",
                "It is not a CT.",
                "No, this is a chest X-ray.",
                "This is a chest film, not a CT.",
            ],
        );
        expect(&film(), &kind, Stance::Affirms, false, &["Yes, this is a CT of the abdomen.", "It is a CT scan."]);
        expect(
            &film(),
            &Claim::Normal,
            Stance::Denies,
            true,
            &["No.", "No, there is a nodule.", "The image is not normal.", "It is abnormal.", "It shows a pacemaker."],
        );
        expect(
            &film(),
            &Claim::Normal,
            Stance::Affirms,
            false,
            &["Yes.", "The image is normal.", "No abnormality is seen."],
        );
    }

    #[test]
    fn captions() {
        let found = check(&film(), &Claim::Caption, "A chest film with a pacemaker in the right chest.");
        assert!(found.correct);
        assert_eq!(found.missing, [Kind::Nodule]);
        let found =
            check(&film(), &Claim::Caption, "A chest film with a small nodule and an effusion on the left side.");
        assert!(!found.correct && found.contradictions.len() == 2, "{found:#?}");
    }
}

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

//! Right answers, written from the truth; and wrong ones, written from a truth that was falsified on purpose.

use rand::{RngExt, seq::IndexedRandom};
use rand_chacha::ChaCha8Rng;

use super::{
    claims::{absent, other_modality, other_value},
    phrases::{be, general, invented, states, the, value_alone},
};
use crate::datasets::phantom::{
    caption::{bare_phrase, capital, describe, full_phrase, is_plural},
    truth::{AttrName, Claim, Finding, Kind, Meaning, Side, Size, Subject, Truth},
    words::{info, meaning_denied, meaning_phrase, true_meaning, wrong_meanings},
};

/// The answer that someone gives who believes `truth`: confirms what holds, refutes what does not and says what does.
#[must_use]
pub fn answer(truth: &Truth, claim: &Claim, rng: &mut ChaCha8Rng) -> String {
    match *claim {
        Claim::Caption => describe(truth, rng),
        Claim::Normal => normal(truth, rng),
        Claim::Modality { value } => {
            let is = format!("this is {}", general(Subject::Modality(truth.modality)));
            match value {
                None => pick(rng, &[capital(&is), format!("It {}", &is[5..])]),
                Some(v) if v == truth.modality => confirm(&is, rng),
                Some(v) => refute(&is, &general(Subject::Modality(v)), rng),
            }
        }
        Claim::Presence { kind } => match truth.find(kind) {
            Some(finding) => present(finding, rng),
            None => missing(truth, kind, rng),
        },
        Claim::Attribute { kind, name, value } => match truth.find(kind) {
            None => missing(truth, kind, rng),
            Some(finding) => attribute(finding, name, value, rng),
        },
        Claim::Meaning { subject, value } => match true_meaning(subject) {
            Some(is) => meaning(subject, value, is, rng),
            None => String::new(),
        },
    }
}

/// An answer to `claim` that is false of `truth`: agrees with a false premise, or denies or changes what holds.
#[must_use]
pub fn wrong_answer(truth: &Truth, claim: &Claim, rng: &mut ChaCha8Rng) -> String {
    if let Claim::Meaning { subject, value } = *claim {
        let wrong = value.filter(|v| Some(*v) != true_meaning(subject));
        let believed = wrong.or_else(|| wrong_meanings(subject).choose(rng).copied());
        return believed.map_or_else(String::new, |b| meaning(subject, value, b, rng));
    }
    answer(&falsified(truth, claim, rng), claim, rng)
}

/// `truth`, changed so that the right answer to `claim` becomes wrong.
fn falsified(truth: &Truth, claim: &Claim, rng: &mut ChaCha8Rng) -> Truth {
    let mut other = truth.clone();
    match *claim {
        Claim::Modality { value } => {
            other.modality =
                value.filter(|v| *v != truth.modality).unwrap_or_else(|| other_modality(truth.modality, rng));
        }
        Claim::Presence { kind } => toggle(&mut other, kind, rng),
        Claim::Attribute { kind, name, value } => match other.findings.iter_mut().find(|f| f.kind == kind) {
            None => {
                let mut finding = invent(kind, rng);
                if let Some(value) = value {
                    finding = finding.with(value);
                }
                other.findings.insert(0, finding);
            }
            Some(finding) => {
                let believed = value.filter(|v| finding.attr(name) != Some(*v));
                let believed = believed.unwrap_or_else(|| other_value(finding.attr(name), name, rng));
                *finding = finding.with(believed);
            }
        },
        Claim::Normal if !truth.is_normal() => other.findings.clear(),
        Claim::Normal | Claim::Caption | Claim::Meaning { .. } => {
            let kind = absent(truth, rng);
            other.findings.truncate(2);
            toggle(&mut other, kind, rng);
        }
    }
    other
}

fn toggle(truth: &mut Truth, kind: Kind, rng: &mut ChaCha8Rng) {
    match truth.findings.iter().position(|f| f.kind == kind) {
        Some(i) => {
            truth.findings.remove(i);
        }
        None => truth.findings.insert(0, invent(kind, rng)),
    }
}

fn invent(kind: Kind, rng: &mut ChaCha8Rng) -> Finding {
    let side = if rng.random_bool(0.5) { Side::Left } else { Side::Right };
    let size = if rng.random_bool(0.5) { Size::Small } else { Size::Large };
    invented(kind, side, size, rng.random_range(1..=3))
}

fn pick(rng: &mut ChaCha8Rng, options: &[String]) -> String {
    let mut text = options.choose(rng).cloned().unwrap_or_default();
    text.push('.');
    text
}

/// Says yes to `is`, a statement that holds.
fn confirm(is: &str, rng: &mut ChaCha8Rng) -> String {
    pick(rng, &[format!("Yes, {is}"), capital(is), format!("That is correct, {is}"), format!("Right, {is}")])
}

/// Says no, and `is`, which holds instead of `not`.
fn refute(is: &str, not: &str, rng: &mut ChaCha8Rng) -> String {
    pick(
        rng,
        &[
            format!("No, {is}"),
            format!("{}, not {not}", capital(is)),
            format!("That is not correct, {is}"),
            format!("Not quite. {}", capital(is)),
        ],
    )
}

fn normal(truth: &Truth, rng: &mut ChaCha8Rng) -> String {
    match truth.findings.choose(rng) {
        None => pick(
            rng,
            &[
                "Yes, no abnormality is seen".into(),
                "Yes, the image is normal".into(),
                "The image is normal".into(),
                "No abnormality is seen".into(),
            ],
        ),
        Some(finding) => {
            let (is, what) = (there(finding), full_phrase(finding));
            pick(
                rng,
                &[
                    format!("No, there {is} {what}"),
                    format!("The image is not normal. It shows {what}"),
                    format!("That is not correct, there {is} {what}"),
                    format!("Not quite. There {is} {what}"),
                ],
            )
        }
    }
}

fn there(finding: &Finding) -> &'static str {
    if is_plural(finding) { "are" } else { "is" }
}

fn present(finding: &Finding, rng: &mut ChaCha8Rng) -> String {
    let (is, what) = (there(finding), full_phrase(finding));
    pick(
        rng,
        &[
            format!("Yes, there {is} {what}"),
            format!("Yes, the image shows {what}"),
            format!("There {is} {what}"),
            format!("The image shows {what}"),
            format!("That is correct, there {is} {what}"),
        ],
    )
}

/// Denies a finding and says what the image does show.
fn missing(truth: &Truth, kind: Kind, rng: &mut ChaCha8Rng) -> String {
    let noun = info(kind).noun;
    let something = bare_phrase(kind);
    let is = if info(kind).noun.ends_with("vacuoles") { "are" } else { "is" };
    let denial = [
        format!("No, there {is} no {noun}"),
        format!("There {is} no {noun} here"),
        format!("I see no {noun}"),
        format!("The image does not show {something}"),
        format!("{} {is} not visible", capital(&something)),
    ];
    let instead = match truth.findings.choose(rng) {
        Some(finding) => {
            let (be, what) = (there(finding), full_phrase(finding));
            [format!("The image shows {what}"), format!("There {be} {what}")]
        }
        None => ["The image is normal".to_string(), "No abnormality is seen".to_string()],
    };
    let denial = pick(rng, &denial);
    format!("{denial} {}", pick(rng, &instead))
}

fn attribute(
    finding: &Finding,
    name: AttrName,
    value: Option<crate::datasets::phantom::truth::Attr>,
    rng: &mut ChaCha8Rng,
) -> String {
    let kind = finding.kind;
    let Some(is) = finding.attr(name) else { return String::new() };
    let statement = states(kind, Some(finding), is);
    match value {
        Some(value) if value == is => confirm(&statement, rng),
        Some(value) => refute(&statement, &value_alone(kind, value), rng),
        None => {
            let plural = be(kind, Some(finding)) == "are";
            let subject = the(kind, Some(finding));
            let short = match name {
                AttrName::Count => statement.clone(),
                _ => statement.replacen(&subject, if plural { "they" } else { "it" }, 1),
            };
            pick(rng, &[capital(&statement), capital(&short)])
        }
    }
}

fn meaning(subject: Subject, value: Option<Meaning>, is: Meaning, rng: &mut ChaCha8Rng) -> String {
    let statement = format!("{} {}", general(subject), meaning_phrase(is));
    match value {
        None => pick(rng, &[capital(&statement)]),
        Some(value) if value == is => confirm(&statement, rng),
        Some(value) => {
            let denied = format!("{} {}", general(subject), meaning_denied(value));
            pick(
                rng,
                &[
                    format!("No, {statement}"),
                    format!("That is not correct, {statement}"),
                    format!("{}. It {}", capital(&denied), meaning_phrase(is)),
                    format!("{}, it {}", capital(&statement), meaning_denied(value)),
                ],
            )
        }
    }
}

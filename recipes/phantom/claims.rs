//! Chooses what to ask about an image: false premises by category, true ones by task.

use rand::{RngExt, seq::IndexedRandom};
use rand_chacha::ChaCha8Rng;

use crate::datasets::phantom::{
    truth::{Attr, AttrName, Claim, Finding, Kind, Modality, Subject, Truth},
    words::{info, true_meaning, values, wrong_meanings},
};

/// The hallucination categories, in the order in which they take turns.
pub const CATEGORIES: [&str; 3] = ["nonexistent_object", "existent_manipulation", "knowledge_distortion"];

/// The tasks of ordinary questions, in the order in which they take turns. Their number has no factor in common with
/// the number of modalities, which take turns as well.
pub const TASKS: [&str; 8] =
    ["presence", "attribute", "caption", "absence", "attribute", "knowledge", "modality", "normality"];

/// Tasks of a recipe in which every premise must hold.
const TRUE_TASKS: [&str; 10] = [
    "caption",
    "attribute",
    "caption",
    "presence",
    "caption",
    "attribute",
    "knowledge",
    "caption",
    "attribute",
    "modality",
];

/// A claim of `category` that is false of `truth`.
#[must_use]
pub fn negative(truth: &Truth, category: &str, rng: &mut ChaCha8Rng) -> Claim {
    match category {
        "nonexistent_object" => {
            let kind = absent(truth, rng);
            match info(kind).attrs.choose(rng) {
                Some(&name) if rng.random_bool(0.5) => Claim::Attribute { kind, name, value: None },
                _ => Claim::Presence { kind },
            }
        }
        "existent_manipulation" => match attribute(truth, rng) {
            Some((finding, name)) => {
                let wrong = other_value(finding.attr(name), name, rng);
                Claim::Attribute { kind: finding.kind, name, value: Some(wrong) }
            }
            None => Claim::Modality { value: Some(other_modality(truth.modality, rng)) },
        },
        _ => {
            let subject = subject(truth, rng);
            let value = wrong_meanings(subject).choose(rng).copied();
            Claim::Meaning { subject, value }
        }
    }
}

/// The task at turn `turn`, and a claim of it that an ordinary question may hold. With `only_true` every premise holds.
#[must_use]
pub fn positive(truth: &Truth, turn: usize, only_true: bool, rng: &mut ChaCha8Rng) -> (&'static str, Claim) {
    let task = if only_true { TRUE_TASKS[turn % TRUE_TASKS.len()] } else { TASKS[turn % TASKS.len()] };
    match task {
        "presence" => match truth.findings.choose(rng) {
            Some(f) => (task, Claim::Presence { kind: f.kind }),
            None => ("normality", Claim::Normal),
        },
        "attribute" => match attribute(truth, rng) {
            Some((f, name)) => {
                let value = f.attr(name).filter(|_| rng.random_bool(0.5));
                (attribute_task(name), Claim::Attribute { kind: f.kind, name, value })
            }
            None => ("normality", normality(truth, only_true, rng)),
        },
        "caption" => (task, Claim::Caption),
        "absence" => (task, Claim::Presence { kind: absent(truth, rng) }),
        "knowledge" => {
            let subject = subject(truth, rng);
            (task, Claim::Meaning { subject, value: true_meaning(subject).filter(|_| rng.random_bool(0.5)) })
        }
        "normality" => ("normality", normality(truth, only_true, rng)),
        _ => (task, Claim::Modality { value: Some(truth.modality).filter(|_| rng.random_bool(0.5)) }),
    }
}

/// "Is it normal?", or a finding where that premise must hold and does not.
fn normality(truth: &Truth, only_true: bool, rng: &mut ChaCha8Rng) -> Claim {
    match truth.findings.choose(rng) {
        Some(f) if only_true => Claim::Presence { kind: f.kind },
        _ => Claim::Normal,
    }
}

fn attribute_task(name: AttrName) -> &'static str {
    match name {
        AttrName::Side => "side",
        AttrName::Size => "size",
        AttrName::Density => "density",
        AttrName::Count => "count",
        AttrName::Color => "color",
    }
}

/// A finding of this kind of image that this image does not show.
#[must_use]
pub fn absent(truth: &Truth, rng: &mut ChaCha8Rng) -> Kind {
    let kinds: Vec<Kind> = Kind::of(truth.modality).into_iter().filter(|k| truth.find(*k).is_none()).collect();
    // An image shows at most three of six.
    kinds.choose(rng).copied().unwrap_or(Kind::Nodule)
}

/// A finding with one of its attributes.
fn attribute(truth: &Truth, rng: &mut ChaCha8Rng) -> Option<(Finding, AttrName)> {
    let all: Vec<(Finding, AttrName)> =
        truth.findings.iter().flat_map(|f| info(f.kind).attrs.iter().map(|a| (*f, *a))).collect();
    all.choose(rng).copied()
}

/// A value that is drawn, but not `value`.
#[must_use]
pub fn other_value(value: Option<Attr>, name: AttrName, rng: &mut ChaCha8Rng) -> Attr {
    let others: Vec<Attr> = values(name).iter().copied().filter(|v| Some(*v) != value).collect();
    others.choose(rng).copied().unwrap_or(Attr::Count(1))
}

/// Another kind of image; now and then one that is never drawn.
#[must_use]
pub fn other_modality(modality: Modality, rng: &mut ChaCha8Rng) -> Modality {
    let others: Vec<Modality> = Modality::ALL.into_iter().filter(|m| *m != modality).collect();
    others.choose(rng).copied().unwrap_or(Modality::Ultrasound)
}

/// What a question of knowledge is about: a finding of the image, or the kind of image.
fn subject(truth: &Truth, rng: &mut ChaCha8Rng) -> Subject {
    match truth.findings.choose(rng) {
        Some(f) if rng.random_bool(0.85) => Subject::Finding(f.kind),
        _ => Subject::Modality(truth.modality),
    }
}

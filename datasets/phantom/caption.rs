//! Draws truths, and says them in words.

use rand::{RngExt, seq::IndexedRandom};
use rand_chacha::ChaCha8Rng;

use super::{
    truth::{Attr, AttrName, Finding, Kind, Modality, Side, Truth},
    words::{Number, Place, article, attr_word, count_word, info, modality_noun, values},
};

/// Draws what an image shows: nothing with probability `normal_share`, else one to three findings.
#[must_use]
pub fn draw_truth(modality: Modality, normal_share: f64, rng: &mut ChaCha8Rng) -> Truth {
    let mut truth = Truth { modality, findings: Vec::new() };
    if rng.random::<f64>() < normal_share {
        return truth;
    }
    let wanted = [1, 1, 2, 2, 3][rng.random_range(0..5)];
    let mut kinds = Kind::of(modality);
    while truth.findings.len() < wanted && !kinds.is_empty() {
        let kind = kinds.swap_remove(rng.random_range(0..kinds.len()));
        let mut finding = Finding::new(kind);
        for &name in info(kind).attrs {
            finding = finding.with(*values(name).choose(rng).unwrap_or(&Attr::Count(1)));
        }
        truth.findings.push(separate(finding, &truth));
    }
    truth.findings.sort_by_key(|f| f.kind);
    truth
}

/// Moves a finding to the other side where it would hide, or be hidden by, one already there.
fn separate(mut finding: Finding, truth: &Truth) -> Finding {
    let rivals = [(Kind::Nodule, Kind::Consolidation), (Kind::KidneyCyst, Kind::KidneyStone)];
    for (a, b) in rivals {
        let rival = match finding.kind {
            k if k == a => b,
            k if k == b => a,
            _ => continue,
        };
        if let Some(other) = truth.find(rival) {
            finding.side = other.side.map(|s| if s == Side::Left { Side::Right } else { Side::Left });
        }
    }
    // A drain on the right would run through the liver and its lesions.
    if finding.kind == Kind::Drain && truth.find(Kind::LiverLesion).is_some() {
        finding.side = Some(Side::Left);
    }
    finding
}

/// Where a finding is, with a leading blank; empty if nothing is said.
#[must_use]
pub fn place(kind: Kind, side: Option<Side>) -> String {
    let side = side.map(|s| attr_word(Attr::Side(s)));
    match (info(kind).place, side) {
        (Place::SideOf(organ), Some(side)) => format!(" in the {side} {organ}"),
        (Place::OnSide, Some(side)) => format!(" on the {side} side"),
        (Place::Fixed(words), _) if !words.is_empty() => format!(" {words}"),
        _ => String::new(),
    }
}

/// The finding as a noun phrase without its place: "two small nodules".
#[must_use]
pub fn noun_phrase(finding: &Finding) -> String {
    let words = info(finding.kind);
    let adjectives: String = [AttrName::Size, AttrName::Density, AttrName::Color]
        .into_iter()
        .filter_map(|name| finding.attr(name))
        .map(|attr| format!("{} ", attr_word(attr)))
        .collect();
    let many = finding.count.is_some_and(|n| n > 1);
    match words.number {
        Number::Countable if many => {
            format!("{} {adjectives}{}", count_word(finding.count.unwrap_or(2)), words.plural)
        }
        Number::Countable if finding.count == Some(1) => format!("one {adjectives}{}", words.noun),
        Number::Countable => {
            let rest = format!("{adjectives}{}", words.noun);
            format!("{}{rest}", article(&rest))
        }
        Number::Area => {
            let rest = format!("{adjectives}area of {}", words.noun);
            format!("{}{rest}", article(&rest))
        }
        Number::Mass | Number::Plural => format!("{adjectives}{}", words.noun),
    }
}

/// The finding as a noun phrase with its place: "two small nodules in the left lung".
#[must_use]
pub fn full_phrase(finding: &Finding) -> String {
    format!("{}{}", noun_phrase(finding), place(finding.kind, finding.side))
}

/// Noun phrase of a kind of which nothing is known: "a nodule", "necrosis".
#[must_use]
pub fn bare_phrase(kind: Kind) -> String {
    let words = info(kind);
    match words.number {
        Number::Countable => format!("{}{}", article(words.noun), words.noun),
        Number::Mass | Number::Plural | Number::Area => words.noun.to_string(),
    }
}

/// Whether the finding takes a plural verb.
#[must_use]
pub fn is_plural(finding: &Finding) -> bool {
    finding.count.is_some_and(|n| n > 1) || info(finding.kind).number == Number::Plural
}

/// "a, b and c".
#[must_use]
pub fn list(items: &[String]) -> String {
    match items {
        [] => String::new(),
        [one] => one.clone(),
        [head @ .., last] => format!("{} and {last}", head.join(", ")),
    }
}

/// One sentence or two that say everything, for use as an answer.
#[must_use]
pub fn describe(truth: &Truth, rng: &mut ChaCha8Rng) -> String {
    let noun = modality_noun(truth.modality);
    let this = if rng.random::<bool>() { format!("This {noun}") } else { format!("The {noun}") };
    if truth.is_normal() {
        return match rng.random_range(0..3) {
            0 => format!("{this} is normal."),
            1 => format!("{this} shows no abnormality."),
            _ => format!("A normal {noun}."),
        };
    }
    let mut phrases: Vec<String> = truth.findings.iter().map(full_phrase).collect();
    let first = rng.random_range(0..phrases.len());
    phrases.rotate_left(first);
    let all = list(&phrases);
    match rng.random_range(0..3) {
        0 => format!("{this} shows {all}."),
        1 => format!("{}{noun} with {all}.", capital(article(noun))),
        _ => {
            let verb = if starts_plural(&phrases[0]) { "are" } else { "is" };
            format!("{this}: there {verb} {all}.")
        }
    }
}

/// The ground-truth annotation: kind of image, every finding in its own sentence, and that there is nothing else.
#[must_use]
pub fn annotation(truth: &Truth, rng: &mut ChaCha8Rng) -> String {
    let noun = modality_noun(truth.modality);
    let mut out = match rng.random_range(0..3) {
        0 => format!("{}.", capital(noun)),
        1 => format!("This is {}{noun}.", article(noun)),
        _ => format!("The image is {}{noun}.", article(noun)),
    };
    if truth.is_normal() {
        out.push_str([" No abnormality is seen.", " The image is normal."][rng.random_range(0..2)]);
        return out;
    }
    for finding in &truth.findings {
        let phrase = full_phrase(finding);
        let (is, shows) = if is_plural(finding) { ("are", "are seen") } else { ("is", "is seen") };
        out.push_str(&match rng.random_range(0..3) {
            0 => format!(" There {is} {phrase}."),
            1 => format!(" {} {shows}.", capital(&phrase)),
            _ => format!(" The image shows {phrase}."),
        });
    }
    out.push_str(" No other finding.");
    out
}

fn starts_plural(phrase: &str) -> bool {
    ["two", "three"].iter().any(|w| phrase.starts_with(w)) || phrase.ends_with("vacuoles")
}

/// With a capital first letter.
#[must_use]
pub fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |c| c.to_uppercase().chain(chars).collect())
}

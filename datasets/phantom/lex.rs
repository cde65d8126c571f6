//! Splits an answer into sentences of items: findings, values, meanings, negations and the few other words that the
//! reader of answers acts on.

use std::{collections::HashMap, sync::LazyLock};

use super::{
    truth::{Attr, Color, Density, Kind, Meaning, Modality, Side, Size},
    words::{KINDS, MEANINGS, MODALITY_NAMES},
};

/// An organ whose state may be stated instead of its finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Organ {
    Lungs,
    Heart,
    Liver,
    Kidneys,
    Aorta,
    /// The image as a whole.
    Image,
}

impl Organ {
    /// The findings that a normal organ does not have.
    pub(super) fn kinds(self) -> &'static [Kind] {
        match self {
            Self::Lungs => &[Kind::Nodule, Kind::Consolidation],
            Self::Heart => &[Kind::EnlargedHeart],
            Self::Liver => &[Kind::LiverLesion],
            Self::Kidneys => &[Kind::KidneyCyst, Kind::KidneyStone],
            Self::Aorta => &[Kind::Aneurysm],
            Self::Image => &[],
        }
    }

    /// The finding that is the organ's enlargement.
    pub(super) fn enlarged(self) -> Option<Kind> {
        match self {
            Self::Heart => Some(Kind::EnlargedHeart),
            Self::Aorta => Some(Kind::Aneurysm),
            _ => None,
        }
    }
}

/// What a stretch of words is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Item {
    Finding(Kind),
    Value(Attr),
    Meaning(Meaning),
    Modality(Modality),
    Organ(Organ),
    /// "normal", "clear".
    Fine,
    /// "enlarged", "dilated".
    Enlarged,
    /// "abnormal", "abnormality".
    Abnormal,
    /// "finding", "problem": says something only when negated.
    Anything,
    /// "other", "further".
    Other,
    /// Starts the scope of a negation.
    Not,
    /// Starts a negation that reaches the end of the sentence.
    NotThat,
    /// Ends the scope of a negation.
    Break,
    /// "there is": ends the scope of a weak negation and states existence.
    ThereIs,
    /// "one" after "there is", or "another one".
    One,
    /// "seen", "present", "visible".
    Seen,
    /// "absent", "missing".
    Absent,
    /// A comma.
    Comma,
    And,
    /// "it", "they", "none".
    Pronoun,
    /// "is", "of", "very": may stand between a value and its finding.
    Filler,
    /// Any other word.
    Word,
}

/// Lower-case words and marks, without hyphens and contractions.
pub(super) fn tokens(text: &str) -> Vec<String> {
    let text = text.to_lowercase().replace(['\u{2019}', '\u{2018}'], "'");
    let text = text
        .replace("can't", "can not")
        .replace("cannot", "can not")
        .replace("n't", " not")
        .replace("there's", "there is")
        .replace("that's", "that is")
        .replace("it's", "it is")
        .replace("'re", " are");
    let mut out: Vec<String> = Vec::new();
    let mut word = String::new();
    for c in text.chars().chain([' ']) {
        if c.is_alphanumeric() {
            word.push(c);
            continue;
        }
        if !word.is_empty() {
            out.push(std::mem::take(&mut word));
        }
        if matches!(c, '.' | ',' | ';' | ':' | '!' | '?') {
            out.push(c.to_string());
        }
    }
    out
}

/// Sentences of `tokens`, without their end marks.
pub(super) fn sentences(tokens: &[String]) -> impl Iterator<Item = &[String]> {
    tokens.split(|t| matches!(t.as_str(), "." | ";" | "!" | "?" | ":")).filter(|s| !s.is_empty())
}

/// Items of one sentence in order.
pub(super) fn items(sentence: &[String]) -> Vec<Item> {
    let mut out = Vec::with_capacity(sentence.len());
    let mut i = 0;
    while i < sentence.len() {
        let (item, length) = longest(&sentence[i..]);
        out.push(item);
        i += length;
    }
    out
}

fn longest(rest: &[String]) -> (Item, usize) {
    let candidates = TABLE.get(rest[0].as_str()).map_or(&[][..], Vec::as_slice);
    candidates
        .iter()
        .filter(|(words, _)| words.len() <= rest.len() && words.iter().zip(rest).all(|(a, b)| a == b))
        .max_by_key(|(words, _)| words.len())
        .map_or((Item::Word, 1), |(words, item)| (*item, words.len()))
}

type Table = HashMap<&'static str, Vec<(Vec<&'static str>, Item)>>;

static TABLE: LazyLock<Table> = LazyLock::new(|| {
    let mut table = Table::new();
    let mut add = |names: &[&'static str], item: Item| {
        for name in names {
            let words: Vec<&'static str> = name.split(' ').collect();
            table.entry(words[0]).or_default().push((words, item));
        }
    };
    for entry in &KINDS {
        add(entry.names, Item::Finding(entry.kind));
    }
    add(&["drainage tube"], Item::Finding(Kind::Drain));
    for entry in &MEANINGS {
        add(entry.names, Item::Meaning(entry.meaning));
    }
    for (modality, names) in MODALITY_NAMES {
        add(names, Item::Modality(*modality));
    }
    add_values(&mut add);
    add_grammar(&mut add);
    table
});

fn add_values(add: &mut impl FnMut(&[&'static str], Item)) {
    let mut value = |names: &[&'static str], attr: Attr| add(names, Item::Value(attr));
    value(&["left"], Attr::Side(Side::Left));
    value(&["right"], Attr::Side(Side::Right));
    value(&["both", "bilateral", "both sides"], Attr::Side(Side::Both));
    value(&["small", "tiny", "smaller"], Attr::Size(Size::Small));
    value(&["large", "big", "huge", "larger"], Attr::Size(Size::Large));
    value(&["low density", "low", "dark", "hypodense", "low in density"], Attr::Density(Density::Low));
    value(&["high density", "high", "bright", "hyperdense", "high in density"], Attr::Density(Density::High));
    value(&["brown"], Attr::Color(Color::Brown));
    value(&["green"], Attr::Color(Color::Green));
    value(&["several", "multiple", "many", "numerous"], Attr::Count(0));
    value(&["one", "single", "1", "only one", "just one", "a single"], Attr::Count(1));
    value(&["two", "2"], Attr::Count(2));
    value(&["three", "3"], Attr::Count(3));
    value(&["four", "4"], Attr::Count(4));
    value(&["five", "5"], Attr::Count(5));
    value(&["six", "6"], Attr::Count(6));
}

fn add_grammar(add: &mut impl FnMut(&[&'static str], Item)) {
    add(&["lung", "lungs"], Item::Organ(Organ::Lungs));
    add(&["heart"], Item::Organ(Organ::Heart));
    add(&["liver"], Item::Organ(Organ::Liver));
    add(&["kidney", "kidneys"], Item::Organ(Organ::Kidneys));
    add(&["aorta"], Item::Organ(Organ::Aorta));
    add(&["image", "picture", "study", "scan", "everything", "exam"], Item::Organ(Organ::Image));
    add(&["normal", "clear", "unremarkable"], Item::Fine);
    add(&["enlarged", "dilated", "wide", "widened", "too large", "too big"], Item::Enlarged);
    add(&["abnormal", "abnormality", "abnormalities"], Item::Abnormal);
    add(&["finding", "findings", "problem", "problems", "disease"], Item::Anything);
    add(&["other", "further", "additional", "else"], Item::Other);
    add(&["no", "not", "without", "never", "nor", "neither", "none", "nothing", "zero", "0"], Item::Not);
    add(&["free of", "rather than", "instead of", "negative for", "absence of", "lack of", "lacks"], Item::Not);
    add(&["rules out", "rule out", "unable", "fails", "fail", "neither of"], Item::Not);
    for words in ["not true that", "not the case that", "not correct that", "not right that", "incorrect that"] {
        add(&[words], Item::NotThat);
    }
    // A verdict on the question, which says nothing of what follows.
    add(&["not correct", "not true", "not right", "not quite", "not accurate", "not the case"], Item::Break);
    add(
        &["wrong that", "false that", "wrong to say", "incorrect to say", "disagree that", "doubt that"],
        Item::NotThat,
    );
    add(&["but", "however", "instead", "while", "although", "though", "because", "except", "yet"], Item::Break);
    add(&["and the", "and there", "and it", "and a", "and an", "and this", "and two", "and three"], Item::Break);
    add(&[", the", ", there", ", it", ", a", ", an", ", this", ", they", ", only", ", which", ", i"], Item::Break);
    add(&["there is", "there are", "and there is", "and there are", ", there is", ", there are"], Item::ThereIs);
    add(&["but there is", "but there are", "i see", "image shows", "shows"], Item::ThereIs);
    add(&["there is one", "but there is one", "there is only one", "there is just one"], Item::One);
    add(&["seen", "present", "visible", "found", "identified", "shown", "noted", "detected", "evident"], Item::Seen);
    add(&["exist", "exists", "appear", "appears", "there", "observed"], Item::Seen);
    add(&["absent", "missing"], Item::Absent);
    add(&[","], Item::Comma);
    add(&["and", "or"], Item::And);
    add(&["it", "they", "this", "that", "these"], Item::Pronoun);
    add(&["of", "very", "quite", "rather", "in", "size", "single"], Item::Filler);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Vec<Item> {
        items(&tokens(text))
    }

    #[test]
    fn the_longest_name_wins() {
        assert_eq!(read("breathing tube"), [Item::Finding(Kind::Tube)]);
        assert_eq!(read("an enlarged heart"), [Item::Word, Item::Finding(Kind::EnlargedHeart)]);
        assert_eq!(read("Heart failure"), [Item::Meaning(Meaning::HeartFailure)]);
        assert_eq!(read("X-ray"), [Item::Modality(Modality::ChestFilm)]);
        assert_eq!(read("with X-rays"), [Item::Meaning(Meaning::XRays)]);
    }

    #[test]
    fn contractions_are_opened() {
        assert_eq!(tokens("There's one, isn't it?"), ["there", "is", "one", ",", "is", "not", "it", "?"]);
        assert_eq!(tokens("I can\u{2019}t see it"), ["i", "can", "not", "see", "it"]);
    }
}

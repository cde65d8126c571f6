//! Statements that questions and answers share: "the nodule is in the left lung", "a nodule may be a tumor".

use crate::datasets::phantom::{
    caption::{bare_phrase, capital, is_plural, place},
    truth::{Attr, Finding, Kind, Side, Size, Subject},
    words::{Number, article, attr_word, count_word, info, modality_noun},
};

/// "the nodule", "the nodules".
pub(super) fn the(kind: Kind, finding: Option<&Finding>) -> String {
    let words = info(kind);
    let plural = finding.is_some_and(is_plural);
    format!("the {}", if plural { words.plural } else { words.noun })
}

/// "is" or "are".
pub(super) fn be(kind: Kind, finding: Option<&Finding>) -> &'static str {
    let plural = finding.map_or(info(kind).number == Number::Plural, is_plural);
    if plural { "are" } else { "is" }
}

/// A statement that the finding has `attr`: "the nodule is large".
pub(super) fn states(kind: Kind, finding: Option<&Finding>, attr: Attr) -> String {
    let words = info(kind);
    let (the, be) = (the(kind, finding), be(kind, finding));
    match attr {
        Attr::Side(side) => format!("{the} {be}{}", place(kind, Some(side))),
        Attr::Size(_) | Attr::Color(_) => format!("{the} {be} {}", attr_word(attr)),
        Attr::Density(_) => {
            let has = if be == "are" { "have" } else { "has" };
            format!("{the} {has} {}", attr_word(attr))
        }
        Attr::Count(1) => format!("there is one {}", words.noun),
        Attr::Count(n) => format!("there are {} {}", count_word(n), words.plural),
    }
}

/// The same as a yes-no question, without its mark.
pub(super) fn asks(kind: Kind, finding: Option<&Finding>, attr: Attr) -> String {
    let words = info(kind);
    let the = the(kind, finding);
    let be = capital(be(kind, finding));
    match attr {
        Attr::Side(side) => format!("{be} {the}{}", place(kind, Some(side))),
        Attr::Size(_) | Attr::Color(_) => format!("{be} {the} {}", attr_word(attr)),
        Attr::Density(_) => {
            let does = if be == "Are" { "Do" } else { "Does" };
            format!("{does} {the} have {}", attr_word(attr))
        }
        Attr::Count(1) => format!("Is there one {}", words.noun),
        Attr::Count(n) => format!("Are there {} {}", count_word(n), words.plural),
    }
}

/// A value alone, for "..., not ...": "large", "in the left lung", "two".
pub(super) fn value_alone(kind: Kind, attr: Attr) -> String {
    match attr {
        Attr::Side(side) => place(kind, Some(side)).trim().to_string(),
        _ => attr_word(attr).to_string(),
    }
}

/// Finding or kind of image in general: "a nodule", "necrosis", "a CT of the abdomen".
pub(super) fn general(subject: Subject) -> String {
    match subject {
        Subject::Finding(Kind::FatVacuole) => "a fat vacuole".into(),
        Subject::Finding(kind) => bare_phrase(kind),
        Subject::Modality(modality) => {
            let noun = modality_noun(modality);
            format!("{}{noun}", article(noun))
        }
    }
}

/// What might be wrongly added to a truth: a finding of `kind` with these attributes.
pub(super) fn invented(kind: Kind, side: Side, size: Size, count: u8) -> Finding {
    use crate::datasets::phantom::truth::{AttrName, Color, Density};
    info(kind).attrs.iter().fold(Finding::new(kind), |finding, name| {
        finding.with(match name {
            AttrName::Side => Attr::Side(side),
            AttrName::Size => Attr::Size(size),
            AttrName::Density => Attr::Density(if size == Size::Small { Density::Low } else { Density::High }),
            AttrName::Count => Attr::Count(count),
            AttrName::Color => Attr::Color(if side == Side::Left { Color::Brown } else { Color::Green }),
        })
    })
}

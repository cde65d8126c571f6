//! The vocabulary of the phantom world: how findings, attributes and meanings are called, and what is true of them.

use super::truth::{Attr, AttrName, Color, Density, Kind, Meaning, Modality, Side, Size, Subject};

/// Where a finding is said to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// "in the left lung", with this organ.
    SideOf(&'static str),
    /// "on the left side".
    OnSide,
    /// The same words always, for example "in the liver"; may be empty.
    Fixed(&'static str),
}

/// How a finding takes articles and number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Number {
    /// "a nodule", "two nodules".
    Countable,
    /// "ascites".
    Mass,
    /// "an area of necrosis".
    Area,
    /// "fat vacuoles".
    Plural,
}

/// All words about one finding.
#[derive(Debug)]
pub struct KindInfo {
    /// The finding.
    pub kind: Kind,
    /// The kind of image it occurs in.
    pub modality: Modality,
    /// Its name; a plural where [`Number::Plural`].
    pub noun: &'static str,
    /// Its plural.
    pub plural: &'static str,
    /// Article and number.
    pub number: Number,
    /// Where it is said to be.
    pub place: Place,
    /// The attributes it has.
    pub attrs: &'static [AttrName],
    /// What it means.
    pub meaning: Meaning,
    /// What it does not mean, but might be thought to.
    pub wrong_meanings: &'static [Meaning],
    /// All names it is recognised by, in lower case, hyphens as blanks.
    pub names: &'static [&'static str],
}

use AttrName as N;
use Meaning as M;
use Modality::{AbdomenCt, ChestFilm, Microscopy};
use Number::{Area, Countable, Mass, Plural};
use Place::{Fixed, OnSide, SideOf};

/// One entry a finding, in the order of [`Kind::ALL`].
pub const KINDS: [KindInfo; 18] = [
    KindInfo {
        kind: Kind::Nodule,
        modality: ChestFilm,
        noun: "nodule",
        plural: "nodules",
        number: Countable,
        place: SideOf("lung"),
        attrs: &[N::Side, N::Size, N::Count],
        meaning: M::Tumor,
        wrong_meanings: &[M::NormalVessel, M::LungFluid, M::BrokenBone],
        names: &["nodule", "nodules", "lung nodule", "lung nodules", "pulmonary nodule", "pulmonary nodules"],
    },
    KindInfo {
        kind: Kind::Effusion,
        modality: ChestFilm,
        noun: "pleural effusion",
        plural: "pleural effusions",
        number: Countable,
        place: OnSide,
        attrs: &[N::Side, N::Size],
        meaning: M::LungFluid,
        wrong_meanings: &[M::Tumor, M::BrokenBone, M::HealthyTissue],
        names: &["effusion", "effusions", "pleural effusion", "pleural effusions", "pleural fluid"],
    },
    KindInfo {
        kind: Kind::Consolidation,
        modality: ChestFilm,
        noun: "consolidation",
        plural: "consolidations",
        number: Mass,
        place: SideOf("lung"),
        attrs: &[N::Side],
        meaning: M::Pneumonia,
        wrong_meanings: &[M::HealthyTissue, M::BrokenBone, M::NormalVessel],
        names: &["consolidation", "consolidations", "lung consolidation", "infiltrate", "airspace opacity"],
    },
    KindInfo {
        kind: Kind::EnlargedHeart,
        modality: ChestFilm,
        noun: "enlarged heart",
        plural: "enlarged hearts",
        number: Countable,
        place: Fixed(""),
        attrs: &[],
        meaning: M::HeartFailure,
        wrong_meanings: &[M::Pneumonia, M::BrokenBone, M::HealthyTissue],
        names: &["enlarged heart", "cardiomegaly", "big heart", "large heart", "heart enlargement", "wide heart"],
    },
    KindInfo {
        kind: Kind::Pacemaker,
        modality: ChestFilm,
        noun: "pacemaker",
        plural: "pacemakers",
        number: Countable,
        place: SideOf("chest"),
        attrs: &[N::Side],
        meaning: M::HeartRhythm,
        wrong_meanings: &[M::Breathing, M::RemovesFluid],
        names: &["pacemaker", "pacemakers", "cardiac pacemaker"],
    },
    KindInfo {
        kind: Kind::Tube,
        modality: ChestFilm,
        noun: "breathing tube",
        plural: "breathing tubes",
        number: Countable,
        place: Fixed("in the trachea"),
        attrs: &[],
        meaning: M::Breathing,
        wrong_meanings: &[M::HeartRhythm, M::RemovesFluid],
        names: &["tube", "tubes", "breathing tube", "breathing tubes", "endotracheal tube", "tracheal tube"],
    },
    KindInfo {
        kind: Kind::LiverLesion,
        modality: AbdomenCt,
        noun: "liver lesion",
        plural: "liver lesions",
        number: Countable,
        place: Fixed(""),
        attrs: &[N::Size, N::Density, N::Count],
        meaning: M::Tumor,
        wrong_meanings: &[M::NormalVessel, M::BlocksUrine, M::BrokenBone],
        names: &[
            "lesion",
            "lesions",
            "liver lesion",
            "liver lesions",
            "hepatic lesion",
            "hepatic lesions",
            "liver mass",
            "liver masses",
        ],
    },
    KindInfo {
        kind: Kind::KidneyCyst,
        modality: AbdomenCt,
        noun: "cyst",
        plural: "cysts",
        number: Countable,
        place: SideOf("kidney"),
        attrs: &[N::Side, N::Size],
        meaning: M::Harmless,
        wrong_meanings: &[M::Rupture, M::BrokenBone, M::Pneumonia],
        names: &["cyst", "cysts", "kidney cyst", "kidney cysts", "renal cyst", "renal cysts"],
    },
    KindInfo {
        kind: Kind::KidneyStone,
        modality: AbdomenCt,
        noun: "stone",
        plural: "stones",
        number: Countable,
        place: SideOf("kidney"),
        attrs: &[N::Side],
        meaning: M::BlocksUrine,
        wrong_meanings: &[M::Harmless, M::Tumor, M::HealthyTissue],
        names: &["stone", "stones", "kidney stone", "kidney stones", "renal stone", "renal calculus", "calculus"],
    },
    KindInfo {
        kind: Kind::Ascites,
        modality: AbdomenCt,
        noun: "ascites",
        plural: "ascites",
        number: Mass,
        place: Fixed("in the abdomen"),
        attrs: &[],
        meaning: M::BellyFluid,
        wrong_meanings: &[M::BrokenBone, M::Tumor, M::HealthyTissue],
        names: &["ascites"],
    },
    KindInfo {
        kind: Kind::Aneurysm,
        modality: AbdomenCt,
        noun: "aortic aneurysm",
        plural: "aortic aneurysms",
        number: Countable,
        place: Fixed(""),
        attrs: &[],
        meaning: M::Rupture,
        wrong_meanings: &[M::Harmless, M::BlocksUrine, M::NormalVessel],
        names: &[
            "aneurysm",
            "aneurysms",
            "aortic aneurysm",
            "aortic aneurysms",
            "enlarged aorta",
            "dilated aorta",
            "wide aorta",
        ],
    },
    KindInfo {
        kind: Kind::Drain,
        modality: AbdomenCt,
        noun: "drain",
        plural: "drains",
        number: Countable,
        place: OnSide,
        attrs: &[N::Side],
        meaning: M::RemovesFluid,
        wrong_meanings: &[M::HeartRhythm, M::Breathing],
        names: &["drain", "drains", "drainage catheter", "abdominal drain"],
    },
    KindInfo {
        kind: Kind::GiantCell,
        modality: Microscopy,
        noun: "giant cell",
        plural: "giant cells",
        number: Countable,
        place: Fixed(""),
        attrs: &[N::Count],
        meaning: M::Granuloma,
        wrong_meanings: &[M::HealthyTissue, M::FattyChange, M::Scar],
        names: &["giant cell", "giant cells", "multinucleated cell", "multinucleated cells"],
    },
    KindInfo {
        kind: Kind::Inflammation,
        modality: Microscopy,
        noun: "inflammation",
        plural: "inflammation",
        number: Mass,
        place: Fixed(""),
        attrs: &[],
        meaning: M::Immune,
        wrong_meanings: &[M::FattyChange, M::HealthyTissue, M::Scar],
        names: &["inflammation", "inflammatory cells", "lymphocytes", "inflammatory infiltrate"],
    },
    KindInfo {
        kind: Kind::Necrosis,
        modality: Microscopy,
        noun: "necrosis",
        plural: "necrosis",
        number: Area,
        place: Fixed(""),
        attrs: &[N::Size],
        meaning: M::DeadTissue,
        wrong_meanings: &[M::HealthyTissue, M::FattyChange, M::Immune],
        names: &["necrosis", "necrotic area", "necrotic tissue", "area of necrosis"],
    },
    KindInfo {
        kind: Kind::Pigment,
        modality: Microscopy,
        noun: "pigment",
        plural: "pigment",
        number: Mass,
        place: Fixed("in the tissue"),
        attrs: &[N::Color],
        meaning: M::Deposit,
        wrong_meanings: &[M::DeadTissue, M::Scar, M::Immune],
        names: &["pigment", "pigments", "pigment granules"],
    },
    KindInfo {
        kind: Kind::FatVacuole,
        modality: Microscopy,
        noun: "fat vacuoles",
        plural: "fat vacuoles",
        number: Plural,
        place: Fixed("in the cells"),
        attrs: &[N::Size],
        meaning: M::FattyChange,
        wrong_meanings: &[M::Scar, M::Granuloma, M::Immune],
        names: &["vacuole", "vacuoles", "fat vacuole", "fat vacuoles", "fat droplets"],
    },
    KindInfo {
        kind: Kind::Fibrosis,
        modality: Microscopy,
        noun: "fibrosis",
        plural: "fibrosis",
        number: Mass,
        place: Fixed("in the tissue"),
        attrs: &[],
        meaning: M::Scar,
        wrong_meanings: &[M::HealthyTissue, M::FattyChange, M::Granuloma],
        names: &["fibrosis", "fibrotic tissue"],
    },
];

/// The words about `kind`.
#[must_use]
pub fn info(kind: Kind) -> &'static KindInfo {
    &KINDS[kind as usize]
}

/// What a meaning is called and recognised by.
#[derive(Debug)]
pub struct MeaningInfo {
    /// The meaning.
    pub meaning: Meaning,
    /// As a predicate of a singular subject: "may be a tumor".
    pub phrase: &'static str,
    /// The same denied: "is not a tumor".
    pub denied: &'static str,
    /// Word sequences it is recognised by.
    pub names: &'static [&'static str],
}

const fn meaning(
    meaning: Meaning,
    phrase: &'static str,
    denied: &'static str,
    names: &'static [&'static str],
) -> MeaningInfo {
    MeaningInfo { meaning, phrase, denied, names }
}

/// One entry a meaning, in the order of the enum.
pub const MEANINGS: [MeaningInfo; 24] = [
    meaning(M::Tumor, "may be a tumor", "is not a tumor", &["tumor", "tumour", "cancer"]),
    meaning(
        M::LungFluid,
        "is fluid around the lung",
        "is not fluid around the lung",
        &["fluid around the lung", "fluid around the lungs", "fluid near the lung"],
    ),
    meaning(M::Pneumonia, "suggests pneumonia", "does not suggest pneumonia", &["pneumonia", "lung infection"]),
    meaning(M::HeartFailure, "may mean heart failure", "does not mean heart failure", &["heart failure"]),
    meaning(
        M::HeartRhythm,
        "controls the heart rhythm",
        "does not control the heart rhythm",
        &["heart rhythm", "rhythm of the heart", "heart beat", "heartbeat"],
    ),
    meaning(
        M::Breathing,
        "helps the patient breathe",
        "does not help the patient breathe",
        &["breathe", "breathing", "ventilation"],
    ),
    meaning(M::Harmless, "is usually harmless", "is not harmless", &["harmless", "benign"]),
    meaning(M::BlocksUrine, "can block urine", "does not block urine", &["urine", "urine flow"]),
    meaning(
        M::BellyFluid,
        "is fluid in the belly",
        "is not fluid in the belly",
        &["fluid in the belly", "fluid in the abdomen", "free fluid"],
    ),
    meaning(M::Rupture, "can rupture", "does not rupture", &["rupture", "burst"]),
    meaning(
        M::RemovesFluid,
        "removes fluid",
        "does not remove fluid",
        &["removes fluid", "remove fluid", "removing fluid", "drains fluid", "drain fluid"],
    ),
    meaning(M::Granuloma, "suggests a granuloma", "does not suggest a granuloma", &["granuloma", "granulomas"]),
    meaning(
        M::Immune,
        "shows an immune response",
        "does not show an immune response",
        &["immune response", "immune reaction"],
    ),
    meaning(M::DeadTissue, "is dead tissue", "is not dead tissue", &["dead tissue", "dead cells", "tissue death"]),
    meaning(M::Deposit, "is a colored deposit", "is not a deposit", &["colored deposit", "deposit", "deposits"]),
    meaning(M::FattyChange, "suggests fatty change", "does not suggest fatty change", &["fatty change"]),
    meaning(M::Scar, "is scar tissue", "is not scar tissue", &["scar tissue", "scar", "scarring"]),
    meaning(M::NormalVessel, "is a normal vessel", "is not a normal vessel", &["normal vessel", "normal blood vessel"]),
    meaning(
        M::BrokenBone,
        "means a broken bone",
        "does not mean a broken bone",
        &["broken bone", "bone fracture", "fracture"],
    ),
    meaning(M::HealthyTissue, "means healthy tissue", "does not mean healthy tissue", &["healthy tissue", "healthy"]),
    meaning(
        M::XRays,
        "is made with X-rays",
        "is not made with X-rays",
        &["with x rays", "by x rays", "uses x rays", "use x rays"],
    ),
    meaning(
        M::Microscope,
        "is made with a microscope",
        "is not made with a microscope",
        &["with a microscope", "uses a microscope", "use a microscope"],
    ),
    meaning(M::SoundWaves, "is made with sound waves", "is not made with sound waves", &["sound waves", "sound"]),
    meaning(M::Magnets, "is made with magnets", "is not made with magnets", &["magnets", "magnet", "magnetic field"]),
];

/// How `meaning` is said of a singular subject.
#[must_use]
pub fn meaning_phrase(meaning: Meaning) -> &'static str {
    MEANINGS[meaning as usize].phrase
}

/// How `meaning` is denied of a singular subject.
#[must_use]
pub fn meaning_denied(meaning: Meaning) -> &'static str {
    MEANINGS[meaning as usize].denied
}

/// What is true of `subject`; `None` for images that are never drawn.
#[must_use]
pub fn true_meaning(subject: Subject) -> Option<Meaning> {
    match subject {
        Subject::Finding(kind) => Some(info(kind).meaning),
        Subject::Modality(ChestFilm | AbdomenCt) => Some(M::XRays),
        Subject::Modality(Microscopy) => Some(M::Microscope),
        Subject::Modality(Modality::BrainMri) => Some(M::Magnets),
        Subject::Modality(Modality::Ultrasound) => Some(M::SoundWaves),
    }
}

/// What might be thought of `subject`, wrongly.
#[must_use]
pub fn wrong_meanings(subject: Subject) -> &'static [Meaning] {
    match subject {
        Subject::Finding(kind) => info(kind).wrong_meanings,
        Subject::Modality(ChestFilm | AbdomenCt) => &[M::SoundWaves, M::Magnets, M::Microscope],
        Subject::Modality(Microscopy) => &[M::SoundWaves, M::Magnets, M::XRays],
        Subject::Modality(Modality::BrainMri | Modality::Ultrasound) => &[M::XRays, M::Microscope],
    }
}

/// Name of a kind of image, without article.
#[must_use]
pub fn modality_noun(modality: Modality) -> &'static str {
    match modality {
        ChestFilm => "chest film",
        AbdomenCt => "CT of the abdomen",
        Microscopy => "microscopy slide",
        Modality::BrainMri => "brain MRI",
        Modality::Ultrasound => "ultrasound",
    }
}

/// All names of kinds of image.
pub const MODALITY_NAMES: &[(Modality, &[&str])] = &[
    (
        ChestFilm,
        &["chest film", "film", "chest x ray", "x ray", "chest radiograph", "radiograph", "chest x rays", "x ray film"],
    ),
    (
        AbdomenCt,
        &["ct", "ct of the abdomen", "abdominal ct", "ct slice", "ct scan", "computed tomography", "abdomen ct"],
    ),
    (Microscopy, &["microscopy slide", "microscopy", "microscopy field", "micrograph", "histology slide", "histology"]),
    (Modality::BrainMri, &["brain mri", "mri", "mri of the brain", "mri scan"]),
    (Modality::Ultrasound, &["ultrasound", "sonogram", "ultrasound image"]),
];

/// Name of what knowledge is about, without article.
#[must_use]
pub fn subject_noun(subject: Subject) -> &'static str {
    match subject {
        Subject::Finding(kind) => info(kind).noun,
        Subject::Modality(modality) => modality_noun(modality),
    }
}

/// The usual word for a value.
#[must_use]
pub fn attr_word(attr: Attr) -> &'static str {
    match attr {
        Attr::Side(Side::Left) => "left",
        Attr::Side(Side::Right) => "right",
        Attr::Side(Side::Both) => "both",
        Attr::Size(Size::Small) => "small",
        Attr::Size(Size::Large) => "large",
        Attr::Density(Density::Low) => "low density",
        Attr::Density(Density::High) => "high density",
        Attr::Count(n) => count_word(n),
        Attr::Color(Color::Brown) => "brown",
        Attr::Color(Color::Green) => "green",
    }
}

/// Number word; 0 is "several".
#[must_use]
pub fn count_word(count: u8) -> &'static str {
    ["several", "one", "two", "three", "four", "five", "six"].get(usize::from(count)).copied().unwrap_or("many")
}

/// The values that are drawn for `name`.
#[must_use]
pub fn values(name: AttrName) -> &'static [Attr] {
    match name {
        N::Side => &[Attr::Side(Side::Left), Attr::Side(Side::Right)],
        N::Size => &[Attr::Size(Size::Small), Attr::Size(Size::Large)],
        N::Density => &[Attr::Density(Density::Low), Attr::Density(Density::High)],
        N::Count => &[Attr::Count(1), Attr::Count(2), Attr::Count(3)],
        N::Color => &[Attr::Color(Color::Brown), Attr::Color(Color::Green)],
    }
}

/// "a", "an" or nothing, for the words that follow.
#[must_use]
pub fn article(words: &str) -> &'static str {
    if words.starts_with(['a', 'e', 'i', 'o', 'u']) { "an " } else { "a " }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_in_the_order_of_their_enums() {
        for (kind, entry) in Kind::ALL.into_iter().zip(&KINDS) {
            assert_eq!(kind, entry.kind);
            assert_eq!(info(kind).kind, kind);
            assert!(!entry.wrong_meanings.contains(&entry.meaning));
            assert!(entry.names.contains(&entry.noun), "{} is not recognised", entry.noun);
        }
        for (i, entry) in MEANINGS.iter().enumerate() {
            assert_eq!(entry.meaning as usize, i);
        }
        for modality in Modality::DRAWN {
            assert_eq!(Kind::of(modality).len(), 6);
        }
    }
}

//! What a phantom image shows, as data: the structured truth that the renderer draws, the caption tells and every
//! claim about the image is checked against.
//!
//! Sides are the patient's, in the radiological convention: the patient's left is on the right of the image.
//! The closed world holds: a finding that the truth does not list is absent.

use std::fmt;

use serde::{Deserialize, Serialize};

pub use super::check::{Check, assertions, check};
use super::words::info;

/// What kind of image it is. The last two are only ever claimed, never drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Modality {
    /// Frontal chest radiograph.
    ChestFilm,
    /// Axial computed tomography of the abdomen.
    AbdomenCt,
    /// Stained tissue under the microscope.
    Microscopy,
    /// Magnetic resonance image of the brain; never drawn.
    BrainMri,
    /// Ultrasound image; never drawn.
    Ultrasound,
}

impl Modality {
    /// The modalities that are drawn.
    pub const DRAWN: [Self; 3] = [Self::ChestFilm, Self::AbdomenCt, Self::Microscopy];
    /// All modalities that can be claimed.
    pub const ALL: [Self; 5] = [Self::ChestFilm, Self::AbdomenCt, Self::Microscopy, Self::BrainMri, Self::Ultrasound];
}

/// A finding or device that an image of its modality may show.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "the names are the findings")]
pub enum Kind {
    Nodule,
    Effusion,
    Consolidation,
    EnlargedHeart,
    Pacemaker,
    Tube,
    LiverLesion,
    KidneyCyst,
    KidneyStone,
    Ascites,
    Aneurysm,
    Drain,
    GiantCell,
    Inflammation,
    Necrosis,
    Pigment,
    FatVacuole,
    Fibrosis,
}

impl Kind {
    /// All findings, six a modality.
    pub const ALL: [Self; 18] = [
        Self::Nodule,
        Self::Effusion,
        Self::Consolidation,
        Self::EnlargedHeart,
        Self::Pacemaker,
        Self::Tube,
        Self::LiverLesion,
        Self::KidneyCyst,
        Self::KidneyStone,
        Self::Ascites,
        Self::Aneurysm,
        Self::Drain,
        Self::GiantCell,
        Self::Inflammation,
        Self::Necrosis,
        Self::Pigment,
        Self::FatVacuole,
        Self::Fibrosis,
    ];

    /// The findings of `modality`.
    #[must_use]
    pub fn of(modality: Modality) -> Vec<Self> {
        Self::ALL.into_iter().filter(|k| info(*k).modality == modality).collect()
    }
}

/// The patient's side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// The patient's left, on the right of the image.
    Left,
    /// The patient's right, on the left of the image.
    Right,
    /// Both sides; only ever claimed.
    Both,
}

/// Two well separated size classes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "the names say it")]
pub enum Size {
    Small,
    Large,
}

/// Density against the organ around it: low is darker, high is brighter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "the names say it")]
pub enum Density {
    Low,
    High,
}

/// Colour of pigment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "the names say it")]
pub enum Color {
    Brown,
    Green,
}

/// Names of attributes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "the names say it")]
pub enum AttrName {
    Side,
    Size,
    Density,
    Count,
    Color,
}

/// An attribute with its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Attr {
    /// The patient's side.
    Side(Side),
    /// Size class.
    Size(Size),
    /// Density class.
    Density(Density),
    /// Number, from 1; 0 is "several" and only ever claimed.
    Count(u8),
    /// Colour.
    Color(Color),
}

impl Attr {
    /// Which attribute this is a value of.
    #[must_use]
    pub fn name(self) -> AttrName {
        match self {
            Self::Side(_) => AttrName::Side,
            Self::Size(_) => AttrName::Size,
            Self::Density(_) => AttrName::Density,
            Self::Count(_) => AttrName::Count,
            Self::Color(_) => AttrName::Color,
        }
    }

    /// Whether a finding with the value `self` may be said to have `claimed`.
    #[must_use]
    pub fn satisfies(self, claimed: Self) -> bool {
        match (self, claimed) {
            (Self::Count(n), Self::Count(0)) => n > 1,
            _ => self == claimed,
        }
    }
}

/// One finding of an image. Attributes that its kind does not have are `None`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names are the types")]
pub struct Finding {
    pub kind: Kind,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub side: Option<Side>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<Size>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub density: Option<Density>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count: Option<u8>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub color: Option<Color>,
}

impl Finding {
    /// A finding without attributes.
    #[must_use]
    pub fn new(kind: Kind) -> Self {
        Self { kind, side: None, size: None, density: None, count: None, color: None }
    }

    /// With `attr` set.
    #[must_use]
    pub fn with(mut self, attr: Attr) -> Self {
        match attr {
            Attr::Side(v) => self.side = Some(v),
            Attr::Size(v) => self.size = Some(v),
            Attr::Density(v) => self.density = Some(v),
            Attr::Count(v) => self.count = Some(v),
            Attr::Color(v) => self.color = Some(v),
        }
        self
    }

    /// Its value of `name`, if its kind has one.
    #[must_use]
    pub fn attr(&self, name: AttrName) -> Option<Attr> {
        match name {
            AttrName::Side => self.side.map(Attr::Side),
            AttrName::Size => self.size.map(Attr::Size),
            AttrName::Density => self.density.map(Attr::Density),
            AttrName::Count => self.count.map(Attr::Count),
            AttrName::Color => self.color.map(Attr::Color),
        }
    }
}

/// All that an image shows. Stored as `meta["truth"]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Truth {
    /// What kind of image it is.
    pub modality: Modality,
    /// What it shows beside normal anatomy; at most one entry a kind.
    pub findings: Vec<Finding>,
}

/// What something means or is for: the knowledge of the phantom world.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "the words are in the table of meanings")]
pub enum Meaning {
    Tumor,
    LungFluid,
    Pneumonia,
    HeartFailure,
    HeartRhythm,
    Breathing,
    Harmless,
    BlocksUrine,
    BellyFluid,
    Rupture,
    RemovesFluid,
    Granuloma,
    Immune,
    DeadTissue,
    Deposit,
    FattyChange,
    Scar,
    NormalVessel,
    BrokenBone,
    HealthyTissue,
    XRays,
    Microscope,
    SoundWaves,
    Magnets,
}

/// What knowledge is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Subject {
    /// A finding or device.
    Finding(Kind),
    /// A kind of image.
    Modality(Modality),
}

/// What a question asks and thereby presupposes. Stored as `meta["claim"]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case")]
pub enum Claim {
    /// What does the image show? Presupposes nothing.
    Caption,
    /// Is the image normal? Claims that nothing is found.
    Normal,
    /// What kind of image is it (`None`), or: is it a `value`?
    Modality {
        /// The kind that is claimed.
        value: Option<Modality>,
    },
    /// Is there a `kind`?
    Presence {
        /// The finding that is claimed.
        kind: Kind,
    },
    /// What is the `name` of the `kind` (`None`), or: is it `value`? Presupposes the finding.
    Attribute {
        /// The finding that is presupposed.
        kind: Kind,
        /// The attribute asked for.
        name: AttrName,
        /// The value that is claimed.
        value: Option<Attr>,
    },
    /// What does `subject` mean (`None`), or: does it mean `value`?
    Meaning {
        /// What it is about.
        subject: Subject,
        /// The meaning that is claimed.
        value: Option<Meaning>,
    },
}

impl Claim {
    /// The finding it is about.
    #[must_use]
    pub fn kind(&self) -> Option<Kind> {
        match *self {
            Self::Presence { kind }
            | Self::Attribute { kind, .. }
            | Self::Meaning { subject: Subject::Finding(kind), .. } => Some(kind),
            _ => None,
        }
    }
}

/// Something an answer says of the image or of the world.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "fields are named like those of a claim")]
pub enum Assertion {
    /// The finding is there, or is not.
    Presence { kind: Kind, holds: bool },
    /// The finding is there with this attribute (`holds`), or there is none with it.
    Attribute { kind: Kind, attr: Attr, holds: bool },
    /// The subject has this meaning, or has not.
    Meaning { subject: Subject, meaning: Meaning, holds: bool },
    /// The image is of this kind, or is not.
    Modality { value: Modality, holds: bool },
    /// Nothing is found, or something is.
    Normal { holds: bool },
}

impl fmt::Display for Assertion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let not = |holds: bool| if holds { "" } else { "not: " };
        match *self {
            Self::Presence { kind, holds } => write!(f, "{}{}", not(holds), info(kind).noun),
            Self::Attribute { kind, attr, holds } => {
                write!(f, "{}{} {}", not(holds), super::words::attr_word(attr), info(kind).noun)
            }
            Self::Meaning { subject, meaning, holds } => write!(
                f,
                "{}{} {}",
                not(holds),
                super::words::subject_noun(subject),
                super::words::meaning_phrase(meaning)
            ),
            Self::Modality { value, holds } => write!(f, "{}{}", not(holds), super::words::modality_noun(value)),
            Self::Normal { holds } => write!(f, "{}normal image", not(holds)),
        }
    }
}

impl Truth {
    /// The truth that an annotation tells in the words of [`super::words`]; `None` if it names no kind of image.
    #[must_use]
    pub fn from_annotation(text: &str) -> Option<Self> {
        let (mut modality, mut findings) = (None, Vec::<Finding>::new());
        for assertion in assertions(text) {
            match assertion {
                Assertion::Modality { value, holds: true } => modality = Some(value),
                Assertion::Presence { kind, holds: true } if !findings.iter().any(|f| f.kind == kind) => {
                    findings.push(Finding::new(kind));
                }
                Assertion::Attribute { kind, attr, holds: true } => {
                    if let Some(finding) = findings.iter_mut().find(|f| f.kind == kind) {
                        *finding = finding.with(attr);
                    }
                }
                _ => {}
            }
        }
        findings.sort_by_key(|f| f.kind);
        modality.map(|modality| Self { modality, findings })
    }

    /// The finding of `kind`, if the image shows it.
    #[must_use]
    pub fn find(&self, kind: Kind) -> Option<&Finding> {
        self.findings.iter().find(|f| f.kind == kind)
    }

    /// Whether the image shows nothing but normal anatomy.
    #[must_use]
    pub fn is_normal(&self) -> bool {
        self.findings.is_empty()
    }

    /// Whether what an answer says is so.
    #[must_use]
    pub fn agrees(&self, assertion: &Assertion) -> bool {
        match *assertion {
            Assertion::Presence { kind, holds } => self.find(kind).is_some() == holds,
            Assertion::Attribute { kind, attr, holds } => {
                let found = self.find(kind).and_then(|f| f.attr(attr.name())).is_some_and(|a| a.satisfies(attr));
                found == holds
            }
            Assertion::Meaning { subject, meaning, holds } => {
                (super::words::true_meaning(subject) == Some(meaning)) == holds
            }
            Assertion::Modality { value, holds } => (self.modality == value) == holds,
            Assertion::Normal { holds } => self.is_normal() == holds,
        }
    }

    /// Whether what the question claims or presupposes is so; `None` when it presupposes nothing.
    #[must_use]
    pub fn premise_holds(&self, claim: &Claim) -> Option<bool> {
        let assertion = match *claim {
            Claim::Caption | Claim::Modality { value: None } | Claim::Meaning { value: None, .. } => return None,
            Claim::Normal => Assertion::Normal { holds: true },
            Claim::Modality { value: Some(value) } => Assertion::Modality { value, holds: true },
            Claim::Presence { kind } | Claim::Attribute { kind, value: None, .. } => {
                Assertion::Presence { kind, holds: true }
            }
            Claim::Attribute { kind, value: Some(attr), .. } => Assertion::Attribute { kind, attr, holds: true },
            Claim::Meaning { subject, value: Some(meaning) } => Assertion::Meaning { subject, meaning, holds: true },
        };
        Some(self.agrees(&assertion))
    }
}

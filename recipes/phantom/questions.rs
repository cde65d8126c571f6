//! Puts a claim into a question. Every form is used for true and for false premises alike, so that the form gives
//! nothing away.

use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::phrases::{asks, be, general, states, the};
use crate::datasets::phantom::{
    caption::{bare_phrase, capital},
    truth::{AttrName, Claim, Kind, Modality, Subject, Truth},
    words::{Number, info, meaning_phrase},
};

/// How a question is put. Stored as `meta["form"]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// "Is there a nodule?"
    YesNo,
    /// "Where is the nodule?"
    Wh,
    /// "There is a nodule. Is that correct?"
    Statement,
    /// "There is a nodule, right?"
    Tag,
    /// "I noticed a nodule. Do you see it too?"
    Noticed,
}

/// A question about `claim`, in a form drawn at random, and the form.
#[must_use]
pub fn question(truth: &Truth, claim: &Claim, rng: &mut ChaCha8Rng) -> (String, Form) {
    let forms = match *claim {
        Claim::Caption => caption(),
        Claim::Normal => normal(),
        Claim::Modality { value } => modality(value),
        Claim::Presence { kind } => presence(truth, kind),
        Claim::Attribute { kind, name, value: None } => open_attribute(truth, kind, name),
        Claim::Attribute { kind, value: Some(attr), .. } => {
            let finding = truth.find(kind);
            statement(&states(kind, finding, attr), &asks(kind, finding, attr))
        }
        Claim::Meaning { subject, value: None } => open_meaning(subject),
        Claim::Meaning { subject, value: Some(value) } => {
            let statement_text = format!("{} {}", general(subject), meaning_phrase(value));
            statement(&statement_text, &format!("Is it true that {statement_text}"))
        }
    };
    // First the form, then the words, so that a form with many wordings is not favoured.
    let mut kinds: Vec<Form> = forms.iter().map(|(f, _)| *f).collect();
    kinds.sort_unstable();
    kinds.dedup();
    let form = kinds.choose(rng).copied().unwrap_or(Form::YesNo);
    let wordings: Vec<&String> = forms.iter().filter(|(f, _)| *f == form).map(|(_, t)| t).collect();
    (wordings.choose(rng).map_or_else(String::new, |t| (*t).clone()), form)
}

type Forms = Vec<(Form, String)>;

fn caption() -> Forms {
    [
        (Form::Wh, "What does this image show?"),
        (Form::Wh, "What can you see here?"),
        (Form::Statement, "Describe this image."),
        (Form::Statement, "Give a short summary of this image."),
        (Form::Noticed, "I have this image. What does it show?"),
        (Form::YesNo, "Can you describe this image?"),
    ]
    .map(|(form, text)| (form, text.to_string()))
    .to_vec()
}

fn normal() -> Forms {
    let mut forms = statement("this image is normal", "Is this image normal");
    forms.push((Form::YesNo, "Is everything normal here?".into()));
    forms
}

fn modality(value: Option<Modality>) -> Forms {
    match value {
        None => [
            (Form::Wh, "What kind of image is this?"),
            (Form::Wh, "How was this image made?"),
            (Form::Noticed, "I have this image. What kind of image is it?"),
        ]
        .map(|(form, text)| (form, text.replace("How was this image made?", "Which kind of image do you see?")))
        .to_vec(),
        Some(value) => {
            let noun = general(Subject::Modality(value));
            statement(&format!("this is {noun}"), &format!("Is this {noun}"))
        }
    }
}

fn presence(truth: &Truth, kind: Kind) -> Forms {
    let something = bare_phrase(kind);
    let be = if info(kind).number == Number::Plural { "are" } else { "is" };
    let it = if be == "are" { "them" } else { "it" };
    let the = the(kind, truth.find(kind).filter(|_| false));
    vec![
        (Form::YesNo, format!("{} there {something} in this image?", capital(be))),
        (Form::YesNo, format!("Does the image show {something}?")),
        (Form::YesNo, format!("Can you see {something} here?")),
        (Form::Wh, format!("What can you say about {the}?")),
        (Form::Statement, format!("There {be} {something} in this image. Is that correct?")),
        (Form::Statement, format!("The image shows {something}. Do you agree?")),
        (Form::Tag, format!("There {be} {something} here, right?")),
        (Form::Tag, format!("This image shows {something}, correct?")),
        (Form::Noticed, format!("I noticed {something}. Do you see {it} too?")),
        (Form::Noticed, format!("I think I see {something}. Am I right?")),
    ]
}

fn open_attribute(truth: &Truth, kind: Kind, name: AttrName) -> Forms {
    let finding = truth.find(kind);
    // A question about a number must not give it away by the verb.
    let (the, be) =
        if name == AttrName::Count { (String::new(), "are") } else { (the(kind, finding), be(kind, finding)) };
    let does = if be == "are" { "do" } else { "does" };
    let (it, does_it) = if be == "are" { ("they", "do they") } else { ("it", "does it") };
    let something = bare_phrase(kind);
    let there = if info(kind).number == Number::Plural { "are" } else { "is" };
    let (wh, follow) = match name {
        AttrName::Side => (format!("On which side {be} {the}?"), format!("On which side {be} {it}?")),
        AttrName::Size => (format!("What size {be} {the}?"), format!("What size {be} {it}?")),
        AttrName::Density => (format!("What density {does} {the} have?"), format!("What density {does_it} have?")),
        AttrName::Color => (format!("What color {be} {the}?"), format!("What color {be} {it}?")),
        AttrName::Count => (format!("How many {} are there?", info(kind).plural), "How many are there?".to_string()),
    };
    let mut forms = vec![
        (Form::Statement, format!("There {there} {something} in this image. {follow}")),
        (Form::Noticed, format!("I noticed {something}. {follow}")),
        (Form::Wh, wh),
    ];
    if name == AttrName::Side {
        forms.push((Form::Wh, format!("Where {be} {the}?")));
    }
    forms
}

fn open_meaning(subject: Subject) -> Forms {
    let what = general(subject);
    match subject {
        Subject::Modality(_) => vec![(Form::Wh, format!("How is {what} made?"))],
        Subject::Finding(Kind::Pacemaker | Kind::Tube | Kind::Drain) => vec![
            (Form::Wh, format!("What does {what} do?")),
            (Form::Noticed, format!("I noticed {what}. What does it do?")),
        ],
        Subject::Finding(_) => vec![
            (Form::Wh, format!("What does {what} mean?")),
            (Form::Noticed, format!("I noticed {what}. What does it mean?")),
        ],
    }
}

/// All forms of a claim that can be stated, from its statement and its yes-no question without the mark.
fn statement(states: &str, asks: &str) -> Forms {
    let start = capital(states);
    vec![
        (Form::YesNo, format!("{asks}?")),
        (Form::Statement, format!("{start}. Is that correct?")),
        (Form::Statement, format!("{start}. Do you agree?")),
        (Form::Tag, format!("{start}, right?")),
        (Form::Tag, format!("{start}, correct?")),
        (Form::Noticed, format!("I think {states}. Am I right?")),
        (Form::Noticed, format!("I noticed that {states}. Is this true?")),
    ]
}

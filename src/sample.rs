//! One conversation about zero or more images: the row that travels from a source to the report.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions that precede the conversation.
    System,
    /// The person who asks.
    User,
    /// The model.
    Assistant,
}

/// One message. `<image>` in the text of a user turn stands for one image of the sample, in order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Turn {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub text: String,
}

/// Where an image is.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ImageRef {
    /// File, absolute or relative to the directory the program runs in.
    pub path: PathBuf,
}

/// Where a row came from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// Name of the source, as `medtune datasets` lists it.
    pub dataset: String,
    /// File the row was read from; empty for generated rows.
    #[serde(default)]
    pub file: PathBuf,
    /// Position in that file, from 0.
    #[serde(default)]
    pub row: usize,
}

/// Part of the data a row belongs to. Assigned by image, never by row.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// Rows the adapter is trained on.
    #[default]
    Train,
    /// Rows that choose the best checkpoint.
    Validation,
    /// Rows that are only ever answered.
    Test,
}

/// Whether the question presupposes something false.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Polarity {
    /// The question holds a false premise; a right answer refutes it.
    Hallucination,
    /// An ordinary question.
    NonHallucination,
}

/// How an answer is scored in visual question answering.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum AnswerType {
    /// Free text.
    Open,
    /// One of a few, mostly yes or no.
    Closed,
    /// One of the listed [`Sample::options`].
    Mcq,
}

/// Keys of [`Sample::meta`] that readers fill and reports group by. Values are the data set's own words; a key is absent
/// where the data set says nothing.
pub mod meta {
    /// Split that the data set itself marks: `train`, `validation` or `test`.
    pub const MARKED_SPLIT: &str = "marked_split";
    /// How the image was made, for example `MRI`.
    pub const MODALITY: &str = "modality";
    /// Part of the body, for example `Abdomen` or `HEAD`.
    pub const LOCATION: &str = "location";
    /// What kind of question, for example `Disease Diagnosis` or `PRES`.
    pub const QUESTION_TYPE: &str = "question_type";
    /// What the question is about, for example `Organ`.
    pub const CONTENT_TYPE: &str = "content_type";
    /// Language of question and answer, as ISO 639-1 has it: `en`, `zh`.
    pub const LANGUAGE: &str = "language";
    /// The data set's own number or name of the question, as text.
    pub const QUESTION_ID: &str = "question_id";
    /// Article the image was published in: `pmid:18000001`, `pmcid:PMC1000001`, or `DATASET:NAME` where only the data
    /// set can tell articles apart.
    pub const ARTICLE: &str = "article";
    /// Whether the header of the image says that annotation is burned into its pixels; `true` or absent.
    pub const BURNED_IN: &str = "burned_in_annotation";
    /// The question alone, where the user's turn also lists the options.
    pub const QUESTION: &str = "question";
}

/// One row of a data set.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Unique within a run; stable between runs.
    pub id: String,
    /// Images in the order of their `<image>` marks.
    #[serde(default)]
    pub images: Vec<ImageRef>,
    /// The conversation.
    pub turns: Vec<Turn>,
    /// Where the row came from.
    #[serde(default)]
    pub origin: Origin,
    /// Train, validation or test.
    #[serde(default)]
    pub split: Split,
    /// Key that keeps rows of one image (or article) in one split, and clusters intervals.
    #[serde(default)]
    pub group: String,
    /// Polarity, where the data set states one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub polarity: Option<Polarity>,
    /// Task or hallucination category, for example `nonexistent_object`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub category: Option<String>,
    /// Open, closed or multiple choice, for visual question answering.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer_type: Option<AnswerType>,
    /// Choices of a multiple-choice question, without letters, in the order A, B, C, ...; the answer is one of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
    /// Ground-truth text about the image, for quality control and judging; never shown to the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub annotation: Option<String>,
    /// Everything else the source knows (structured truth, the keys of [`mod@meta`]); carried along unchanged.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub meta: serde_json::Map<String, serde_json::Value>,
}

impl Sample {
    /// The first user message without image marks; empty if there is none.
    #[must_use]
    pub fn question(&self) -> String {
        self.first(Role::User).replace("<image>", "").trim().to_string()
    }

    /// The question alone, without image marks and without the options that the user's turn may list.
    #[must_use]
    pub fn bare_question(&self) -> String {
        match self.meta.get(meta::QUESTION) {
            Some(serde_json::Value::String(question)) => question.clone(),
            _ => self.question(),
        }
    }

    /// Position of the right option: the first that is the answer word for word; none without options.
    #[must_use]
    pub fn right_option(&self) -> Option<usize> {
        self.options.iter().position(|option| option == self.answer())
    }

    /// The first assistant message; empty if there is none.
    #[must_use]
    pub fn answer(&self) -> &str {
        self.first(Role::Assistant)
    }

    fn first(&self, role: Role) -> &str {
        self.turns.iter().find(|t| t.role == role).map_or("", |t| t.text.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_found_by_their_text_and_survive_json() {
        let sample = Sample {
            turns: vec![
                Turn { role: Role::User, text: "<image>\nSide?\nA. left\nB. right".into() },
                Turn { role: Role::Assistant, text: "right".into() },
            ],
            answer_type: Some(AnswerType::Mcq),
            options: vec!["left".into(), "right".into()],
            meta: [(meta::QUESTION.to_string(), "Side?".into())].into_iter().collect(),
            ..Sample::default()
        };
        assert_eq!((sample.right_option(), sample.bare_question()), (Some(1), "Side?".to_string()));
        let text = serde_json::to_string(&sample).unwrap();
        assert!(text.contains(r#""answer_type":"MCQ""#), "{text}");
        assert_eq!(serde_json::from_str::<Sample>(&text).unwrap(), sample);
        assert_eq!((Sample::default().right_option(), Sample::default().bare_question()), (None, String::new()));
    }
}

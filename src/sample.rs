//! One conversation about zero or more images: the row that travels from a source to the report.

use std::path::PathBuf;

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
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
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
}

/// One row of a data set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
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
    /// Open or closed, for visual question answering.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer_type: Option<AnswerType>,
    /// Ground-truth text about the image, for quality control and judging; never shown to the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub annotation: Option<String>,
    /// Everything else the source knows (structured truth, organ, modality); carried along unchanged.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub meta: serde_json::Map<String, serde_json::Value>,
}

impl Sample {
    /// The first user message without image marks; empty if there is none.
    #[must_use]
    pub fn question(&self) -> String {
        self.first(Role::User).replace("<image>", "").trim().to_string()
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

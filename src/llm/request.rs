//! A request as stages write it, and its content address.

use std::{path::PathBuf, sync::Arc};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::config::{EndpointConfig, LlmConfig};

/// Which of the recipe's servers a request goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndpointRole {
    /// Writes instruction pairs.
    Generate,
    /// Checks them.
    Qc,
    /// Judges answers.
    Judge,
}

impl EndpointRole {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Generate, Self::Qc, Self::Judge];

    /// Name, as in `[llm.NAME]`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Generate => "generate",
            Self::Qc => "qc",
            Self::Judge => "judge",
        }
    }

    /// Its section of a configuration.
    #[must_use]
    pub fn config(self, config: &LlmConfig) -> &EndpointConfig {
        match self {
            Self::Generate => &config.generate,
            Self::Qc => &config.qc,
            Self::Judge => &config.judge,
        }
    }
}

/// Who speaks in a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Speaker {
    /// The instruction.
    System,
    /// The one who asks.
    User,
    /// The model, in examples.
    Assistant,
}

/// A message of a conversation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks.
    pub role: Speaker,
    /// What, in order.
    pub parts: Vec<Part>,
}

impl Message {
    /// A message of text alone.
    pub fn text(role: Speaker, text: impl Into<String>) -> Self {
        Self { role, parts: vec![Part::Text { text: text.into() }] }
    }
}

/// A part of a message.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Part {
    /// Text.
    Text {
        /// As it is sent.
        text: String,
    },
    /// An image, read and scaled when the request is sent.
    Image {
        /// Any file that [`crate::image::open`] reads.
        path: PathBuf,
        /// SHA-256 of the file in hexadecimal digits, where it is known; it is then not read for the key.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        sha256: Option<String>,
    },
}

/// How the reply is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Sampling {
    /// 0 takes the likeliest token; none leaves it to the server.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// Nucleus sampling.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f64>,
    /// Most tokens of the reply; also what a reply is taken to cost before it is there.
    pub max_tokens: u32,
    /// Seed for servers that take one; [`Request::variant`] is added.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: None, top_p: None, max_tokens: 1500, seed: None }
    }
}

/// Shape that the reply must have.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ReplySchema {
    /// Name: letters, digits, `_` and `-`.
    pub name: String,
    /// JSON schema.
    #[serde(serialize_with = "inner")]
    pub schema: Arc<Value>,
}

fn inner<S: serde::Serializer>(schema: &Arc<Value>, serializer: S) -> Result<S::Ok, S::Error> {
    Value::serialize(schema, serializer)
}

/// A request.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Request {
    /// Which server.
    pub endpoint: EndpointRole,
    /// Another model than the recipe's for this server.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// The conversation.
    pub messages: Vec<Message>,
    /// How the reply is drawn.
    pub sampling: Sampling,
    /// Shape of the reply.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub schema: Option<ReplySchema>,
    /// Counts fresh replies to the same words: a request that differs in nothing else is paid for again.
    pub variant: u32,
}

impl Request {
    /// A request for free text with default sampling.
    #[must_use]
    pub fn new(endpoint: EndpointRole, messages: Vec<Message>) -> Self {
        Self { endpoint, model: None, messages, sampling: Sampling::default(), schema: None, variant: 0 }
    }

    /// The same request for a fresh reply.
    #[must_use]
    pub fn again(&self) -> Self {
        Self { variant: self.variant + 1, ..self.clone() }
    }

    /// Characters of all text.
    #[must_use]
    pub fn text_len(&self) -> usize {
        let parts = self.messages.iter().flat_map(|m| &m.parts);
        parts.map(|p| if let Part::Text { text } = p { text.chars().count() } else { 0 }).sum()
    }

    /// Number of images.
    #[must_use]
    pub fn images(&self) -> usize {
        self.messages.iter().flat_map(|m| &m.parts).filter(|p| matches!(p, Part::Image { .. })).count()
    }
}

/// Content address of a request: SHA-256 over server, model, messages (images by content), sampling and shape.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(pub [u8; 32]);

impl Key {
    /// Reads 64 hexadecimal digits.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut bytes = [0; 32];
        if text.len() != 64 || !text.is_ascii() {
            return None;
        }
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).ok()?;
        }
        Some(Self(bytes))
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

impl Serialize for Key {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).ok_or_else(|| serde::de::Error::custom("expected 64 hexadecimal digits"))
    }
}

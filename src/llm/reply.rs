//! What comes of a request: a reply, or why there is none.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::request::Key;

/// Tokens that a request was charged for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Tokens of the reply.
    pub completion_tokens: u64,
    /// Whether the server's count was absent or impossible, and these are estimates.
    pub estimated: bool,
}

/// A reply, as it lies in the ledger.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// Content address of its request.
    pub key: Key,
    /// Text of the first choice; empty where the server sent none.
    pub text: String,
    /// Why the reply ends: `stop`, `length`, `content_filter`, ...
    pub finish_reason: Option<String>,
    /// The model's words where it declined in the field made for that.
    pub refusal: Option<String>,
    /// Tokens.
    pub usage: Usage,
    /// Cost in US dollars; 0 where the recipe has no price for the model.
    pub usd: f64,
    /// Time from sending to the last byte, in milliseconds.
    pub latency_ms: u64,
    /// Model as the server names it.
    pub model: Option<String>,
    /// The server's `system_fingerprint`.
    pub fingerprint: Option<String>,
    /// Whether it came from the ledger, without a request.
    pub from_cache: bool,
}

/// Why there is no reply. A failure of one request is data; the ledger has its attempts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "failure", rename_all = "snake_case")]
pub enum Failure {
    /// The server said no, for good or more often than attempts are allowed.
    Api {
        /// HTTP status.
        status: u16,
        /// Its words, shortened.
        message: String,
        /// How often it was asked.
        attempts: u32,
    },
    /// No connection.
    Connection {
        /// What happened.
        message: String,
        /// How often it was tried.
        attempts: u32,
    },
    /// A connection that broke while the answer was awaited or read.
    BrokenConnection {
        /// What happened.
        message: String,
        /// How often it was tried.
        attempts: u32,
    },
    /// No answer in time.
    Timeout {
        /// How often it was asked.
        attempts: u32,
    },
    /// The server answered with something that is no completion.
    BadReply {
        /// What is wrong with it.
        message: String,
        /// How often it was asked.
        attempts: u32,
    },
    /// A filter of the server withheld the prompt or the reply.
    ContentFilter {
        /// Its words, shortened.
        message: String,
    },
    /// An image of the request cannot be sent.
    Image {
        /// What is wrong with it.
        message: String,
    },
    /// The budget does not allow another request.
    OverBudget {
        /// Which limit: `max_usd` or `max_requests`.
        limit: String,
    },
    /// It was sent before, its fate is unknown, and the recipe says not to pay twice.
    InDoubt,
    /// Only an estimate was asked for; nothing was sent.
    DryRun,
}

impl Failure {
    /// Stable name, for counts and reason codes.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Api { .. } => "api_error",
            Self::Connection { .. } => "connection",
            Self::BrokenConnection { .. } => "broken_connection",
            Self::Timeout { .. } => "timeout",
            Self::BadReply { .. } => "bad_reply",
            Self::ContentFilter { .. } => "content_filter",
            Self::Image { .. } => "image_error",
            Self::OverBudget { .. } => "over_budget",
            Self::InDoubt => "in_doubt",
            Self::DryRun => "dry_run",
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Api { status, message, attempts } => {
                write!(f, "the server said {status} ({message}) after {attempts} attempts")
            }
            Self::Connection { message, attempts } => write!(f, "no connection ({message}) after {attempts} attempts"),
            Self::BrokenConnection { message, attempts } => {
                write!(f, "the connection broke ({message}) after {attempts} attempts")
            }
            Self::Timeout { attempts } => write!(f, "no answer in time after {attempts} attempts"),
            Self::BadReply { message, attempts } => {
                write!(f, "the reply is no completion ({message}) after {attempts} attempts")
            }
            Self::ContentFilter { message } => write!(f, "the server's filter withheld it ({message})"),
            Self::Image { message } => write!(f, "an image cannot be sent: {message}"),
            Self::OverBudget { limit } => write!(f, "llm.{limit} is reached"),
            Self::InDoubt => f.write_str("it was under way when an earlier run ended, and llm.in_doubt is \"fail\""),
            Self::DryRun => f.write_str("nothing is sent in a dry run"),
        }
    }
}

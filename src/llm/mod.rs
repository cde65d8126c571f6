//! Language-model servers that speak OpenAI's chat-completions API: requests with content addresses, replies, and what
//! they may cost.

mod config;
mod reply;
mod request;

pub use config::{Auth, BatchConfig, EndpointConfig, InDoubt, LlmConfig, Mode, Price, StructuredOutput};
pub use reply::{Failure, Reply, Usage};
pub use request::{EndpointRole, Key, Message, Part, ReplySchema, Request, Sampling, Speaker};

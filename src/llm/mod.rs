//! Language-model servers that speak OpenAI's chat-completions API.
//!
//! A stage makes [`Request`]s, a [`Client`] sends them and hands out [`Reply`]s in the same order. Every request has a
//! content address; its raw reply is in the ledger before anything uses it, so that a run that is stopped, killed or
//! repeated pays for nothing twice. [`mock`] is a server for rehearsals.

mod batch;
mod budget;
mod client;
mod config;
mod endpoint;
mod ledger;
mod limits;
pub mod mock;
mod online;
mod recorded;
mod reply;
mod request;
mod shared;
mod wire;

pub use budget::{Estimate, ModelEstimate};
pub use client::{Client, ClientOptions, ledger_totals};
pub use config::{Auth, BatchConfig, EndpointConfig, InDoubt, LlmConfig, Mode, Price, StructuredOutput};
pub use ledger::Totals;
pub use recorded::Recorded;
pub use reply::{Failure, Reply, Usage};
pub use request::{EndpointRole, Key, Message, Part, ReplySchema, Request, Sampling, Speaker};

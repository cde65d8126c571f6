//! `[llm]` of a recipe: which servers answer, how fast they may be asked, what a request may cost.

use std::{collections::BTreeMap, path::PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// `[llm]` of a recipe: language-model servers, limits and prices. Keys of servers come from the environment only.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LlmConfig {
    /// Server and model that write instruction pairs; what the other two do not say is as here.
    pub generate: EndpointConfig,
    /// Server and model of quality control.
    pub qc: EndpointConfig,
    /// Server and model that judge answers.
    pub judge: EndpointConfig,
    /// How requests travel: one by one, or in files through the Batch API at its lower price.
    pub mode: Mode,
    /// Most requests in flight.
    #[schemars(range(min = 1, max = 4096))]
    pub concurrency: usize,
    /// Most requests started within a minute, for each server; a lower limit in its reply headers goes first.
    #[schemars(range(min = 1))]
    pub requests_per_minute: Option<u32>,
    /// Most tokens, prompt and completion, asked for within a minute, for each server; likewise.
    #[schemars(range(min = 1))]
    pub tokens_per_minute: Option<u32>,
    /// Seconds after which an unanswered request counts as failed.
    #[schemars(range(min = 0.01))]
    pub timeout: f64,
    /// Most attempts at a request, the first included.
    #[schemars(range(min = 1, max = 100))]
    pub max_attempts: u32,
    /// Seconds before the second attempt; doubles each time, with jitter, unless the server says when to come again.
    #[schemars(range(min = 0.0))]
    pub backoff: f64,
    /// Most seconds between two attempts.
    #[schemars(range(min = 0.0))]
    pub max_backoff: f64,
    /// Failures in a row, of any requests, after which a server counts as down and is only probed.
    #[schemars(range(min = 1))]
    pub circuit_failures: u32,
    /// Seconds before the first probe of a server that is down; doubles each time.
    #[schemars(range(min = 0.0))]
    pub circuit_wait: f64,
    /// Failed probes after which the run stops.
    #[schemars(range(min = 1))]
    pub circuit_probes: u32,
    /// Hard limit on money over the life of a run directory, in US dollars; needs a price of every model.
    #[schemars(range(min = 0.0))]
    pub max_usd: Option<f64>,
    /// Hard limit on requests over the life of a run directory; those that certainly failed unpaid do not count.
    pub max_requests: Option<u64>,
    /// What becomes of requests that were under way when a process was killed, a connection broke or time ran out:
    /// the server may have been paid for a reply that nobody saw.
    pub in_doubt: InDoubt,
    /// Allow `http://` to hosts other than this machine: prompts and key then travel in the clear.
    pub allow_plain_http: bool,
    /// Longest side of images as they are sent, in pixels.
    #[schemars(range(min = 16, max = 16384))]
    pub image_max_side: usize,
    /// JPEG quality of images as they are sent.
    #[schemars(range(min = 1, max = 100))]
    pub image_jpeg_quality: u8,
    /// Join consecutive user messages by a blank line, for servers that insist on alternating roles.
    pub merge_user_messages: bool,
    /// Batch API.
    pub batch: BatchConfig,
    /// Prices by model name, in US dollars a million tokens.
    pub prices: BTreeMap<String, Price>,
}

impl Default for LlmConfig {
    fn default() -> Self {
        Self {
            generate: EndpointConfig::default(),
            qc: EndpointConfig::default(),
            judge: EndpointConfig::default(),
            mode: Mode::Online,
            concurrency: 16,
            requests_per_minute: None,
            tokens_per_minute: None,
            timeout: 120.0,
            max_attempts: 5,
            backoff: 0.5,
            max_backoff: 60.0,
            circuit_failures: 20,
            circuit_wait: 5.0,
            circuit_probes: 4,
            max_usd: None,
            max_requests: None,
            in_doubt: InDoubt::Resend,
            allow_plain_http: false,
            image_max_side: 1024,
            image_jpeg_quality: 90,
            merge_user_messages: false,
            batch: BatchConfig::default(),
            prices: BTreeMap::new(),
        }
    }
}

/// A server and a model.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EndpointConfig {
    /// Base URL up to `/v1`, or `mock:RULES` for a rehearsal server inside this process. By default OPENAI_BASE_URL,
    /// then OPENAI_API_BASE, then OpenAI's own.
    pub base_url: Option<String>,
    /// Model, as the server calls it.
    pub model: Option<String>,
    /// Environment variable that holds the key; by default OPENAI_API_KEY.
    pub api_key_env: Option<String>,
    /// How the key is presented; by default a bearer token, or Azure's header where the URL is Azure's.
    pub auth: Option<Auth>,
    /// Azure's `api-version`.
    pub api_version: Option<String>,
    /// PEM file of authorities that this server's certificate may come from, besides those of this system: for servers
    /// inside a hospital or a university.
    pub ca_file: Option<PathBuf>,
    /// Name of this server in the ledger, by default its URL. Give one to keep paid replies when the URL changes.
    pub identity: Option<String>,
    /// How a reply of a given shape is asked for; by default by JSON schema, with a fallback the server accepts.
    pub structured_output: Option<StructuredOutput>,
    /// More fields of the request body, for example `{ top_k = 20 }`.
    pub extra_body: Map<String, Value>,
}

/// How requests travel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// One by one, answered at once.
    #[default]
    Online,
    /// In files, answered within hours.
    Batch,
}

/// How a key is presented.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Auth {
    /// `Authorization: Bearer KEY`.
    Bearer,
    /// `api-key: KEY`, as Azure wants it.
    ApiKey,
    /// No key is sent.
    None,
}

/// How a reply of a given shape is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum StructuredOutput {
    /// `response_format` of type `json_schema`.
    JsonSchema,
    /// `response_format` of type `json_object`.
    JsonObject,
    /// By the prompt alone.
    Prompt,
}

/// What becomes of requests whose fate is unknown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum InDoubt {
    /// They are sent again, under the same idempotency key; a server without such keys may be paid twice for them.
    #[default]
    Resend,
    /// They end as failures, so that nothing is ever paid twice.
    Fail,
}

/// `[llm.batch]`: the Batch API.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BatchConfig {
    /// Most requests in one file.
    #[schemars(range(min = 1, max = 50000))]
    pub requests: usize,
    /// Most megabytes in one file.
    #[schemars(range(min = 1, max = 200))]
    pub megabytes: usize,
    /// Seconds between two looks at a batch.
    #[schemars(range(min = 0.01))]
    pub poll: f64,
    /// Price as a share of the ordinary one.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub price_factor: f64,
}

impl Default for BatchConfig {
    fn default() -> Self {
        Self { requests: 5000, megabytes: 100, poll: 30.0, price_factor: 0.5 }
    }
}

/// What a model costs, in US dollars a million tokens.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Price {
    /// Tokens of the prompt.
    pub prompt: f64,
    /// Tokens of the reply.
    pub completion: f64,
    /// Most tokens an image counts for.
    #[serde(default = "image_tokens")]
    pub image_tokens: u32,
}

/// Tokens of a 1024 x 1024 image on OpenAI's models of 2024: 85 and 170 for each of its four tiles.
pub(super) fn image_tokens() -> u32 {
    765
}

impl LlmConfig {
    /// What is wrong beyond the type of a value: sentences that begin with the key they are about.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        let mut found = Vec::new();
        let numbers = [("timeout", self.timeout), ("backoff", self.backoff), ("max_backoff", self.max_backoff)];
        for (key, value) in numbers {
            if value > 86_400.0 {
                found.push(format!("llm.{key} is more than a day: {value} s"));
            }
        }
        for (model, price) in &self.prices {
            if !(price.prompt >= 0.0 && price.completion >= 0.0) {
                found.push(format!("llm.prices has a price below zero for {model}"));
            }
        }
        if let (Some(_), true) = (self.max_usd, self.prices.is_empty()) {
            found.push("llm.max_usd needs prices: add [llm.prices.\"MODEL\"] with prompt and completion".into());
        }
        found
    }
}

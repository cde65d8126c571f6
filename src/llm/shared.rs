//! What all requests of a client share, and the two ways a request can travel.

use std::{
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use reqwest::Url;
use tokio::sync::watch;

use super::{
    budget::Budget,
    config::{Auth, LlmConfig, StructuredOutput},
    endpoint::{Endpoint, batch_desk, below},
    ledger::Ledger,
    limits::{Circuit, Limiter},
    reply::{Failure, Reply},
    request::{EndpointRole, Key},
    wire::{Dialect, Prepared, TokenBounds},
};
use crate::error::{Error, Result};

/// What all requests of a client share.
pub(super) struct Shared {
    pub(super) config: Arc<LlmConfig>,
    pub(super) lanes: Vec<Lane>,
    pub(super) ledger: Ledger,
    pub(super) seed: u64,
    pub(super) budget: Mutex<Budget>,
    /// Turns true when waiting requests are to give up.
    pub(super) stopping: watch::Sender<bool>,
}

impl Shared {
    pub(super) fn lane(&self, role: EndpointRole) -> &Lane {
        &self.lanes[EndpointRole::ALL.iter().position(|r| *r == role).unwrap_or_default()]
    }

    pub(super) fn budget(&self) -> MutexGuard<'_, Budget> {
        self.budget.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What `work` gives, or none if the run is ending first.
    pub(super) async fn unless_stopped<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        let mut stopping = self.stopping.subscribe();
        tokio::select! {
            biased;
            _ = stopping.wait_for(|stop| *stop) => None,
            done = work => Some(done),
        }
    }
}

/// One server; several endpoints may be on it.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) limiter: Limiter,
    pub(super) circuit: Circuit,
}

/// The way to one endpoint.
pub(super) struct Lane {
    pub(super) endpoint: Endpoint,
    pub(super) base: Url,
    pub(super) http: reqwest::Client,
    pub(super) server: Arc<Server>,
    pub(super) dialect: Mutex<Dialect>,
}

impl Lane {
    pub(super) fn dialect(&self) -> Dialect {
        *self.dialect.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request to the part of the server that has files and batches, with the key.
    pub(super) fn get_from_desk(&self, path: &str, query: &[(&str, &str)]) -> reqwest::RequestBuilder {
        let mut url = below(&batch_desk(&self.base).0, path);
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        self.authorize(self.http.get(url))
    }

    /// Likewise.
    pub(super) fn post_to_desk(&self, path: &str) -> reqwest::RequestBuilder {
        self.authorize(self.http.post(below(&batch_desk(&self.base).0, path)))
    }

    /// A request below the base URL, with the key.
    pub(super) fn post(&self, path: &str) -> reqwest::RequestBuilder {
        self.authorize(self.http.post(below(&self.base, path)))
    }

    fn authorize(&self, request: reqwest::RequestBuilder) -> reqwest::RequestBuilder {
        match (&self.endpoint.secret, self.endpoint.auth) {
            (Some(secret), Auth::Bearer) => request.bearer_auth(secret.reveal()),
            (Some(secret), Auth::ApiKey) => request.header("api-key", secret.reveal()),
            _ => request,
        }
    }

    /// Text from the server without the key.
    pub(super) fn redacted(&self, text: String) -> String {
        self.endpoint.secret.as_ref().and_then(|s| s.redact(&text)).unwrap_or(text)
    }

    /// Speaks more simply from now on, here and after a restart. Of requests that were under way together, the first
    /// complaint counts.
    pub(super) fn learn(&self, ledger: &Ledger, heard_with: Dialect, simpler: Dialect) {
        let mut dialect = self.dialect.lock().unwrap_or_else(PoisonError::into_inner);
        if *dialect == heard_with {
            *dialect = simpler;
            ledger.learn(&self.endpoint.identity, &simpler.encode());
        }
    }
}

impl Dialect {
    pub(super) fn encode(self) -> String {
        let structured = match self.structured {
            StructuredOutput::JsonSchema => "json_schema",
            StructuredOutput::JsonObject => "json_object",
            StructuredOutput::Prompt => "prompt",
        };
        format!("{structured} {}", if self.completion_limit { "max_completion_tokens" } else { "max_tokens" })
    }

    /// What was learnt earlier, but nothing more exact than the recipe asks for.
    pub(super) fn decode(most: StructuredOutput, learnt: Option<&str>) -> Self {
        let words: Vec<&str> = learnt.unwrap_or_default().split(' ').collect();
        let structured = match words.first() {
            Some(&"prompt") => StructuredOutput::Prompt,
            Some(&"json_object") => StructuredOutput::JsonObject,
            _ => StructuredOutput::JsonSchema,
        };
        Self { structured: most.max(structured), completion_limit: words.get(1) == Some(&"max_completion_tokens") }
    }
}

/// A request that the budget allows.
#[derive(Clone)]
pub(super) struct Job {
    pub(super) prepared: Arc<Prepared>,
    pub(super) bounds: TokenBounds,
    /// Most it can cost, in US dollars.
    pub(super) most_usd: f64,
}

/// How a job ended.
pub(super) enum Ended {
    /// With something to deliver.
    Outcome(Result<Reply, Failure>),
    /// Unsent, because the run is ending.
    Stopped,
    /// With something that ends the run.
    Fatal(Error),
}

/// A job that ended.
pub(super) struct Done {
    pub(super) key: Key,
    pub(super) ended: Ended,
}

/// A way for requests to travel. Whatever it does, a reply is in the ledger before it is handed out.
pub(super) trait Transport {
    /// Most jobs that it should hold at a time.
    fn window(&self) -> usize;

    /// Takes over a job.
    fn submit(&mut self, job: Job) -> Result<()>;

    /// No further job comes until one of those it holds has ended.
    fn flush(&mut self) -> Result<()>;

    /// The next job that ends within `wait`.
    fn next(&mut self, wait: Duration) -> Result<Option<Done>>;
}

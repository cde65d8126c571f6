//! Requests one by one: gates, attempts, back-off, and what a server's answer means.

use std::{
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, Sender},
    },
    time::{Duration, Instant, SystemTime},
};

use rand::RngExt;
use reqwest::{StatusCode, header::HeaderMap};
use serde_json::Value;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::{
    budget,
    config::{InDoubt, StructuredOutput},
    ledger::{End, NewAttempt, NewReply},
    limits::{Pass, retry_after},
    reply::{Failure, Reply},
    shared::{Done, Ended, Job, Lane, Shared, Transport},
    wire::{Dialect, Prepared, Read},
};
use crate::{
    error::{Error, Kind, Result},
    random::stream,
};

/// Largest body of a reply that is read, in bytes.
const MAX_REPLY: usize = 32 << 20;

/// Most times in a row that a server may ask for patience.
const MAX_PATIENCE: u32 = 100;

/// Characters of a server's words that are kept.
const MAX_WORDS: usize = 500;

/// Sends requests one by one.
pub(super) struct Online {
    shared: Arc<Shared>,
    runtime: tokio::runtime::Handle,
    slots: Arc<Semaphore>,
    sender: Sender<Done>,
    receiver: Receiver<Done>,
}

impl Online {
    pub(super) fn new(shared: Arc<Shared>, runtime: tokio::runtime::Handle) -> Self {
        let (sender, receiver) = std::sync::mpsc::channel();
        let slots = Arc::new(Semaphore::new(shared.config.concurrency));
        Self { shared, runtime, slots, sender, receiver }
    }
}

impl Transport for Online {
    fn window(&self) -> usize {
        // Enough to keep the server busy while the first of them is slow.
        4 * self.shared.config.concurrency
    }

    fn submit(&mut self, job: Job) -> Result<()> {
        let (shared, slots, sender) = (Arc::clone(&self.shared), Arc::clone(&self.slots), self.sender.clone());
        self.runtime.spawn(async move {
            let key = job.prepared.key;
            let ended = Exchange::new(&shared, &job, &slots).run().await;
            // Nobody listens any more if the run was given up.
            let _ = sender.send(Done { key, ended });
        });
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }

    fn next(&mut self, wait: Duration) -> Result<Option<Done>> {
        match self.receiver.recv_timeout(wait) {
            Ok(done) => Ok(Some(done)),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => Ok(None),
        }
    }
}

/// The attempts at one request.
struct Exchange<'a> {
    shared: &'a Shared,
    job: &'a Job,
    lane: &'a Lane,
    slots: &'a Semaphore,
    attempts: u32,
    patience: u32,
}

/// What to do after an attempt.
enum Next {
    End(Ended),
    /// Try again after at least this long.
    Retry(Duration, Failure),
    /// Try again at once; this attempt does not count.
    Rephrase,
    /// The server asks for patience; this attempt does not count.
    Patience(Duration),
}

/// What came back.
struct Response {
    status: StatusCode,
    headers: HeaderMap,
    text: String,
    latency: Duration,
}

/// Why nothing came back.
enum Lost {
    /// The server's certificate is not trusted; nothing was sent.
    Untrusted(String),
    /// The request cannot have reached the server.
    NotSent(String),
    Broken(String),
    Timeout,
}

impl<'a> Exchange<'a> {
    fn new(shared: &'a Shared, job: &'a Job, slots: &'a Semaphore) -> Self {
        Self { shared, job, lane: shared.lane(job.prepared.request.endpoint), slots, attempts: 0, patience: 0 }
    }

    async fn run(mut self) -> Ended {
        let ended = self.attempts().await;
        let paid = match &ended {
            Ended::Outcome(Ok(reply)) => Some(reply.usd),
            Ended::Outcome(Err(failure)) if self.perhaps_paid(failure) => Some(self.job.most_usd),
            _ => None,
        };
        self.shared.budget().settle(self.job.most_usd, paid);
        ended
    }

    async fn attempts(&mut self) -> Ended {
        loop {
            let Some((pass, slot)) = self.gates().await else { return Ended::Stopped };
            if pass == Pass::Never {
                return Ended::Fatal(self.server_down());
            }
            match self.attempt(pass, slot).await {
                Next::End(ended) => return ended,
                Next::Rephrase => {}
                Next::Patience(wait) => {
                    self.patience += 1;
                    if self.patience > MAX_PATIENCE {
                        let message = format!("asked for patience {MAX_PATIENCE} times");
                        return Ended::Outcome(Err(Failure::Api { status: 429, message, attempts: self.patience }));
                    }
                    self.lane.server.limiter.pause(wait);
                }
                Next::Retry(at_least, failure) => {
                    // A failed probe says something about the server, not about this request.
                    if pass != Pass::Probe {
                        self.attempts += 1;
                    }
                    if self.attempts >= self.shared.config.max_attempts {
                        return Ended::Outcome(Err(with_attempts(failure, self.attempts)));
                    }
                    if self.perhaps_paid(&failure) && !self.shared.budget().repeat(self.job.most_usd) {
                        return Ended::Outcome(Err(with_attempts(failure, self.attempts)));
                    }
                    let wait = self.backoff().max(at_least);
                    if self.shared.unless_stopped(tokio::time::sleep(wait)).await.is_none() {
                        return Ended::Stopped;
                    }
                }
            }
        }
    }

    /// Waits for a slot, the circuit and the rate limits; none if the run is ending. The slot comes first: whoever has
    /// passed the circuit sends at once, so that a server found to be down hears from nobody else.
    async fn gates(&self) -> Option<(Pass, SemaphorePermit<'a>)> {
        let slot = self.shared.unless_stopped(self.slots.acquire()).await?.ok()?;
        let pass = self.shared.unless_stopped(self.lane.server.circuit.admit()).await?;
        if pass == Pass::Never {
            return Some((pass, slot));
        }
        let tokens = self.job.bounds.likely_prompt + self.job.bounds.most_completion;
        let limited = self.shared.unless_stopped(self.lane.server.limiter.acquire(tokens)).await;
        if limited.is_none() {
            self.lane.server.circuit.withdraw(pass);
        }
        limited.map(|()| (pass, slot))
    }

    async fn attempt(&mut self, pass: Pass, slot: SemaphorePermit<'_>) -> Next {
        let dialect = self.lane.dialect();
        let body = match self.body(dialect).await {
            Ok(body) => body,
            Err(e) => {
                self.lane.server.circuit.withdraw(pass);
                let failure = Failure::Image { message: e.to_string() };
                return Next::End(Ended::Outcome(Err(failure)));
            }
        };
        let id = match self.shared.ledger.sending(new_attempt(self.job, self.lane, None)).await {
            Ok(id) => id,
            Err(e) => {
                self.lane.server.circuit.withdraw(pass);
                return Next::End(Ended::Fatal(e));
            }
        };
        match self.send(body).await {
            Ok(response) => {
                // A server that refuses to work must be known to do so before another request takes the slot.
                let slot = (!response.status.is_success()).then_some(slot);
                let next = self.read(id, pass, dialect, response).await;
                drop(slot);
                next
            }
            Err(lost) => self.lost(id, pass, lost),
        }
    }

    async fn body(&self, dialect: Dialect) -> Result<Vec<u8>> {
        let (shared, lane, prepared) = (self.shared, self.lane, Arc::clone(&self.job.prepared));
        if prepared.request.images() == 0 {
            return prepared.body(&lane.endpoint, &shared.config, dialect);
        }
        let (endpoint, config) = (lane.endpoint.clone(), Arc::clone(&shared.config));
        tokio::task::spawn_blocking(move || prepared.body(&endpoint, &config, dialect))
            .await
            .unwrap_or_else(|e| Err(Error::new(Kind::Image, "an image could not be prepared").source(e)))
    }

    async fn send(&self, body: Vec<u8>) -> Result<Response, Lost> {
        let started = Instant::now();
        let timeout = Duration::from_secs_f64(self.shared.config.timeout);
        let request = self.lane.post("chat/completions").header("content-type", "application/json");
        let request = request.header("idempotency-key", format!("medtune-{}", self.job.prepared.key));
        let mut response = request.body(body).timeout(timeout).send().await.map_err(lost)?;
        let (status, headers) = (response.status(), std::mem::take(response.headers_mut()));
        let mut bytes = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(lost)? {
            if bytes.len() + chunk.len() > MAX_REPLY {
                return Err(Lost::Broken(format!("the reply is longer than {MAX_REPLY} bytes")));
            }
            bytes.extend_from_slice(&chunk);
        }
        let text = String::from_utf8(bytes).unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned());
        let text = self.lane.redacted(text);
        Ok(Response { status, headers, text, latency: started.elapsed() })
    }

    fn lost(&mut self, id: i64, pass: Pass, lost: Lost) -> Next {
        let attempts = self.attempts + 1;
        let (end, failure) = match lost {
            Lost::Untrusted(message) => {
                self.lane.server.circuit.withdraw(pass);
                self.shared.ledger.ended(id, End::Failed, None, &message);
                self.shared.stopping.send_replace(true);
                return Next::End(Ended::Fatal(untrusted(self.lane, &message)));
            }
            Lost::NotSent(message) => (End::Failed, Failure::Connection { message, attempts }),
            Lost::Broken(message) => (End::InDoubt, Failure::BrokenConnection { message, attempts }),
            Lost::Timeout => (End::InDoubt, Failure::Timeout { attempts }),
        };
        self.failed(id, pass, end, None, Duration::ZERO, failure)
    }

    /// An attempt failed in a way that another one may not.
    fn failed(&self, id: i64, pass: Pass, end: End, status: Option<u16>, wait: Duration, failure: Failure) -> Next {
        self.shared.ledger.ended(id, end, status, &failure.to_string());
        if self.lane.server.circuit.failure(pass) {
            return Next::End(Ended::Fatal(self.server_down()));
        }
        if end == End::InDoubt && self.shared.config.in_doubt == InDoubt::Fail {
            return Next::End(Ended::Outcome(Err(failure)));
        }
        Next::Retry(wait, failure)
    }

    async fn read(&mut self, id: i64, pass: Pass, dialect: Dialect, response: Response) -> Next {
        self.lane.server.limiter.heed(&response.headers);
        let status = response.status.as_u16();
        let words = words(&response.text);
        let wait = retry_after(&response.headers, SystemTime::now());
        let end = |failure: Failure| {
            self.lane.server.circuit.success();
            self.shared.ledger.ended(id, End::Failed, Some(status), &failure.to_string());
            Next::End(Ended::Outcome(Err(failure)))
        };
        match status {
            200..=299 => self.completion(id, pass, response).await,
            429 if says(&response.text, "insufficient_quota") => self.refused(id, status, &words),
            429 => {
                self.lane.server.circuit.success();
                self.shared.ledger.ended(id, End::Failed, Some(status), &words);
                Next::Patience(wait.unwrap_or_else(|| self.backoff()))
            }
            401 | 403 | 404 => self.refused(id, status, &words),
            400 | 422 => {
                if let Some(simpler) = simpler(dialect, &self.job.prepared, &response.text) {
                    self.lane.server.circuit.success();
                    self.shared.ledger.ended(id, End::Failed, Some(status), &words);
                    self.lane.learn(&self.shared.ledger, dialect, simpler);
                    return Next::Rephrase;
                }
                if says(&response.text, "content_filter") || says(&response.text, "content_policy_violation") {
                    return end(Failure::ContentFilter { message: words });
                }
                end(Failure::Api { status, message: words, attempts: self.attempts + 1 })
            }
            408 | 409 | 425 | 500..=599 => {
                let failure = Failure::Api { status, message: words, attempts: self.attempts + 1 };
                self.failed(id, pass, End::Failed, Some(status), wait.unwrap_or_default(), failure)
            }
            _ => end(Failure::Api { status, message: words, attempts: self.attempts + 1 }),
        }
    }

    async fn completion(&mut self, id: i64, pass: Pass, response: Response) -> Next {
        let key = self.job.prepared.key;
        let read = match Read::parse(&response.text, self.job.bounds) {
            Ok(read) => read,
            Err(message) => {
                let message = format!("{message}: {}", words(&response.text));
                let failure = Failure::BadReply { message, attempts: self.attempts + 1 };
                return self.failed(id, pass, End::InDoubt, Some(200), Duration::ZERO, failure);
            }
        };
        self.lane.server.circuit.success();
        let stored = store(self.shared, self.job, response.text, &read, response.latency);
        let (usd, latency_ms) = (stored.usd, stored.latency_ms);
        match self.shared.ledger.replied(id, stored).await {
            Ok(()) => Next::End(Ended::Outcome(read.into_reply(key, usd, latency_ms, false))),
            Err(e) => Next::End(Ended::Fatal(e)),
        }
    }

    /// The server will refuse every other request as well.
    fn refused(&self, id: i64, status: u16, words: &str) -> Next {
        self.shared.ledger.ended(id, End::Failed, Some(status), words);
        let help = match status {
            401 | 403 => "check the key in the environment, and that it may use this model",
            404 => "check base_url (up to /v1) and the model's name; `curl BASE_URL/models` lists them",
            _ => "check the quota and the billing of this account",
        };
        self.shared.stopping.send_replace(true);
        Next::End(Ended::Fatal(
            Error::new(Kind::Run, "the language-model server refuses to work")
                .at(&self.lane.endpoint.identity)
                .found(format!("{status}: {words}"))
                .help(help),
        ))
    }

    fn server_down(&self) -> Error {
        Error::new(Kind::Run, "the language-model server is down")
            .at(&self.lane.endpoint.identity)
            .found(format!("{} failed probes in a row", self.shared.config.circuit_probes))
            .help("start it, then run the same command again; it continues and pays for nothing twice")
    }

    fn perhaps_paid(&self, failure: &Failure) -> bool {
        matches!(failure, Failure::BrokenConnection { .. } | Failure::Timeout { .. } | Failure::BadReply { .. })
    }

    /// Time before the next attempt, from half to one and a half times its mean.
    fn backoff(&self) -> Duration {
        let config = &self.shared.config;
        let doubled = config.backoff * 2f64.powi((self.attempts + self.patience).saturating_sub(1).min(30) as i32);
        let mut start = [0; 8];
        start.copy_from_slice(&self.job.prepared.key.0[..8]);
        let purpose = format!("llm/backoff/{}/{}", self.attempts, self.patience);
        let jitter = stream(self.shared.seed, &purpose, u64::from_le_bytes(start)).random_range(0.5..1.5);
        Duration::from_secs_f64(doubled.min(config.max_backoff) * jitter)
    }
}

/// What the ledger gets before a request is sent.
pub(super) fn new_attempt(job: &Job, lane: &Lane, batch: Option<String>) -> NewAttempt {
    NewAttempt {
        key: job.prepared.key,
        role: job.prepared.request.endpoint.name(),
        endpoint: lane.endpoint.identity.clone(),
        model: job.prepared.model.clone(),
        body: job.prepared.canonical.clone(),
        reserved_usd: job.most_usd,
        batch,
    }
}

/// What the ledger gets when a reply is there.
pub(super) fn store(shared: &Shared, job: &Job, raw: String, read: &Read, latency: Duration) -> NewReply {
    NewReply {
        key: job.prepared.key,
        raw,
        usage: read.usage,
        usd: budget::paid(&shared.config, &job.prepared.model, read.usage),
        latency_ms: latency.as_millis() as u64,
        model: read.model.clone(),
        fingerprint: read.fingerprint.clone(),
        finish_reason: read.finish_reason.clone(),
    }
}

fn lost(error: reqwest::Error) -> Lost {
    let (connect, timeout) = (error.is_connect(), error.is_timeout());
    match (causes(error), connect, timeout) {
        ((message, true), ..) => Lost::Untrusted(message),
        ((message, false), true, _) => Lost::NotSent(message),
        (_, false, true) => Lost::Timeout,
        ((message, false), false, false) => Lost::Broken(message),
    }
}

/// An error with all its causes, and whether one of them is that the server's certificate is not trusted.
pub(super) fn causes(error: reqwest::Error) -> (String, bool) {
    // The URL may hold secrets, and causes say more than the outermost error.
    let error = error.without_url();
    let mut message = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(inner) = cause {
        let text = inner.to_string();
        if !message.ends_with(&text) {
            message = format!("{message}: {text}");
        }
        cause = inner.source();
    }
    (message, bad_certificate(&error))
}

fn bad_certificate(error: &(dyn std::error::Error + 'static)) -> bool {
    if let Some(error) = error.downcast_ref::<rustls::Error>() {
        return matches!(error, rustls::Error::InvalidCertificate(_));
    }
    // An I/O error leaves out of its chain of causes the error that it was made of.
    let wrapped = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
    wrapped.is_some_and(|e| bad_certificate(e)) || error.source().is_some_and(bad_certificate)
}

/// The server may be somebody else.
pub(super) fn untrusted(lane: &Lane, message: &str) -> Error {
    Error::new(Kind::Run, "the certificate of the language-model server is not trusted; nothing was sent")
        .at(&lane.endpoint.identity)
        .found(message)
        .help("if it comes from an authority of your own, name its PEM file: llm.generate.ca_file = \"ca.pem\"")
}

/// A server's own words about a failure.
pub(super) fn words(text: &str) -> String {
    let value: Value = serde_json::from_str(text).unwrap_or_default();
    let message = [&value["error"]["message"], &value["message"], &value["error"], &value["detail"]]
        .into_iter()
        .find_map(Value::as_str)
        .unwrap_or(text.trim());
    message.chars().take(MAX_WORDS).collect()
}

/// Whether the server's error carries a code or a word.
fn says(text: &str, word: &str) -> bool {
    text.contains(word)
}

/// A simpler way to say the same, where the server complained about how it was said.
fn simpler(dialect: Dialect, prepared: &Prepared, text: &str) -> Option<Dialect> {
    if !dialect.completion_limit && says(text, "max_completion_tokens") {
        return Some(Dialect { completion_limit: true, ..dialect });
    }
    prepared.request.schema.as_ref()?;
    let about_shape = ["response_format", "json_schema", "json_object", "guided", "structured", "grammar"];
    let complains = about_shape.iter().any(|word| text.to_lowercase().contains(word));
    let structured = match dialect.structured {
        StructuredOutput::JsonSchema => StructuredOutput::JsonObject,
        StructuredOutput::JsonObject => StructuredOutput::Prompt,
        StructuredOutput::Prompt => return None,
    };
    complains.then_some(Dialect { structured, ..dialect })
}

fn with_attempts(failure: Failure, n: u32) -> Failure {
    match failure {
        Failure::Api { status, message, .. } => Failure::Api { status, message, attempts: n },
        Failure::Connection { message, .. } => Failure::Connection { message, attempts: n },
        Failure::BrokenConnection { message, .. } => Failure::BrokenConnection { message, attempts: n },
        Failure::Timeout { .. } => Failure::Timeout { attempts: n },
        Failure::BadReply { message, .. } => Failure::BadReply { message, attempts: n },
        other => other,
    }
}

/// Reads a stored reply again.
pub(super) fn reread(job: &Job, stored: super::ledger::Stored) -> Option<Result<Reply, Failure>> {
    let read = Read::parse(&stored.raw, job.bounds).ok()?;
    Some(read.into_reply(job.prepared.key, stored.usd, stored.latency_ms, true))
}

//! Requests in files through the Batch API: upload, create, poll, collect.
//!
//! A batch is in the ledger before the server hears of it, and carries our tag in its metadata, so that a killed run
//! finds it again instead of paying for another one.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::future::try_join_all;
use reqwest::multipart;
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{
    budget,
    config::image_tokens,
    endpoint::batch_desk,
    ledger::{BatchItem, End, NewReply, now_ms},
    limits::retry_after,
    online::{causes, new_attempt, reread, untrusted, words},
    reply::{Failure, Reply},
    request::{EndpointRole, Key},
    shared::{Done, Ended, Job, Lane, Shared, Transport},
    wire::{Read, TokenBounds},
};
use crate::error::{Error, Kind, Result};

/// Field of a batch's metadata that holds our tag.
const TAG: &str = "medtune";

/// Sends requests in batches.
pub(super) struct Batches {
    shared: Arc<Shared>,
    runtime: tokio::runtime::Handle,
    pending: Vec<Job>,
    running: Vec<Running>,
    ended: VecDeque<Done>,
    tries: HashMap<Key, u32>,
    look: Instant,
}

struct Running {
    role: EndpointRole,
    tag: String,
    id: String,
    jobs: Vec<Job>,
}

/// Why items of a batch have no reply.
type Failures = HashMap<Key, Failure>;

impl Batches {
    pub(super) fn new(shared: Arc<Shared>, runtime: tokio::runtime::Handle) -> Self {
        let (pending, running) = (Vec::new(), Vec::new());
        Self { shared, runtime, pending, running, ended: VecDeque::new(), tries: HashMap::new(), look: Instant::now() }
    }

    /// Ends the jobs of a collected batch; those that the server did not get to go into the next one.
    fn settle(&mut self, jobs: Vec<Job>, mut failures: Failures) -> Result<()> {
        for job in jobs {
            let key = job.prepared.key;
            let stored = self.shared.ledger.reply(&key)?.and_then(|stored| reread(&job, stored));
            let outcome = match (stored, failures.remove(&key)) {
                (Some(outcome), _) => outcome.map(|reply| Reply { from_cache: false, ..reply }),
                (None, failure) => {
                    let tries = self.tries.entry(key).or_insert(0);
                    *tries += 1;
                    if failure.as_ref().is_none_or(passing) && *tries < self.shared.config.max_attempts {
                        self.pending.push(job);
                        continue;
                    }
                    Err(failure.unwrap_or(Failure::Timeout { attempts: *tries }))
                }
            };
            let paid = outcome.as_ref().ok().map(|reply| reply.usd);
            self.shared.budget().settle(job.most_usd, paid);
            self.ended.push_back(Done { key, ended: Ended::Outcome(outcome) });
        }
        Ok(())
    }

    /// Settles the batches that have ended.
    fn collect_ended(&mut self) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let mut outcome = Ok(());
        for running in std::mem::take(&mut self.running) {
            let lane = shared.lane(running.role);
            match outcome.is_ok().then(|| self.runtime.block_on(collect(&shared, lane, &running.tag, &running.id))) {
                Some(Ok(Some(failures))) => outcome = self.settle(running.jobs, failures),
                Some(Err(e)) => {
                    outcome = Err(e);
                    self.running.push(running);
                }
                Some(Ok(None)) | None => self.running.push(running),
            }
        }
        outcome
    }

    /// Takes as many pending jobs of one endpoint as fit into a file: the jobs and the file.
    fn pack(&mut self) -> Result<(EndpointRole, Vec<Job>, Vec<u8>)> {
        let config = Arc::clone(&self.shared.config);
        let role = self.pending.first().map_or(EndpointRole::Generate, |j| j.prepared.request.endpoint);
        let lane = self.shared.lane(role);
        let (mut jobs, mut rest, mut file) = (Vec::new(), Vec::new(), Vec::new());
        for job in std::mem::take(&mut self.pending) {
            let full = jobs.len() >= config.batch.requests || file.len() >= config.batch.megabytes << 20;
            if job.prepared.request.endpoint != role || full {
                rest.push(job);
                continue;
            }
            match line(&job, lane, &config) {
                Ok(line) => {
                    file.extend(line);
                    jobs.push(job);
                }
                Err(e) => {
                    self.shared.budget().settle(job.most_usd, None);
                    let failure = Failure::Image { message: e.to_string() };
                    self.ended.push_back(Done { key: job.prepared.key, ended: Ended::Outcome(Err(failure)) });
                }
            }
        }
        self.pending = rest;
        Ok((role, jobs, file))
    }
}

impl Transport for Batches {
    fn window(&self) -> usize {
        self.shared.config.batch.requests
    }

    fn submit(&mut self, job: Job) -> Result<()> {
        self.pending.push(job);
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        while !self.pending.is_empty() {
            let (role, jobs, file) = self.pack()?;
            if jobs.is_empty() {
                continue;
            }
            let shared = Arc::clone(&self.shared);
            match self.runtime.block_on(create(&shared, shared.lane(role), &jobs, file)) {
                Ok((tag, id)) => self.running.push(Running { role, tag, id, jobs }),
                Err(e) => {
                    self.pending.extend(jobs);
                    return Err(e);
                }
            }
        }
        Ok(())
    }

    fn next(&mut self, wait: Duration) -> Result<Option<Done>> {
        if *self.shared.stopping.borrow() {
            let jobs = self.pending.drain(..).chain(self.running.drain(..).flat_map(|r| r.jobs));
            self.ended.extend(jobs.map(|job| Done { key: job.prepared.key, ended: Ended::Stopped }));
        }
        if self.ended.is_empty() && !self.running.is_empty() {
            let now = Instant::now();
            if now < self.look {
                std::thread::sleep(wait.min(self.look - now));
                return Ok(None);
            }
            self.collect_ended()?;
            self.look = Instant::now() + poll_interval(&self.shared);
        }
        Ok(self.ended.pop_front())
    }
}

/// Whether the next batch may succeed where this one failed.
fn passing(failure: &Failure) -> bool {
    !matches!(failure, Failure::Api { status: 400..=428 | 430..=499, .. })
}

fn poll_interval(shared: &Shared) -> Duration {
    Duration::from_secs_f64(shared.config.batch.poll)
}

/// Path of a request inside a batch, and the name that Azure has for the model; elsewhere the recipe's name is right.
fn place(lane: &Lane) -> (&'static str, Option<String>) {
    match batch_desk(&lane.base).1 {
        Some(deployment) => ("/chat/completions", Some(deployment)),
        None => ("/v1/chat/completions", None),
    }
}

/// A request with another model name.
fn renamed(body: &[u8], model: String) -> Result<Vec<u8>> {
    let bad = |e| Error::new(Kind::Run, "request has no JSON form").source(e);
    let mut value: Value = serde_json::from_slice(body).map_err(bad)?;
    value["model"] = model.into();
    serde_json::to_vec(&value).map_err(bad)
}

/// A line of the input file.
fn line(job: &Job, lane: &Lane, config: &super::LlmConfig) -> Result<Vec<u8>> {
    let mut body = job.prepared.body(&lane.endpoint, config, lane.dialect())?;
    let (url, deployment) = place(lane);
    if let Some(name) = deployment {
        body = renamed(&body, name)?;
    }
    let head = format!("{{\"custom_id\":\"{}\",\"method\":\"POST\",\"url\":\"{url}\",\"body\":", job.prepared.key);
    let mut line = head.into_bytes();
    line.extend(body);
    line.extend(b"}\n");
    Ok(line)
}

/// Uploads a file and creates a batch of it: tag and the server's id.
async fn create(shared: &Shared, lane: &Lane, jobs: &[Job], file: Vec<u8>) -> Result<(String, String)> {
    let mut hash = Sha256::new_with_prefix(now_ms().to_le_bytes());
    jobs.iter().for_each(|j| hash.update(j.prepared.key.0));
    let tag: String = hash.finalize()[..12].iter().map(|b| format!("{b:02x}")).collect();
    let identity = &lane.endpoint.identity;
    shared.ledger.batch(&tag, identity, None, "creating").await?;
    let sending = jobs.iter().map(|job| shared.ledger.sending(new_attempt(job, lane, Some(tag.clone()))));
    try_join_all(sending).await?;
    let upload = || {
        let part = multipart::Part::bytes(file.clone()).file_name("requests.jsonl");
        let form = multipart::Form::new().text("purpose", "batch").part("file", part);
        lane.post_to_desk("files").multipart(form)
    };
    let uploaded: Value = call(shared, lane, "upload a batch file", upload).await?;
    let order = json!({
        "input_file_id": uploaded["id"], "endpoint": place(lane).0, "completion_window": "24h",
        "metadata": { TAG: tag },
    });
    let mut attempt = 0;
    let id = loop {
        attempt += 1;
        let create = lane.post_to_desk("batches").header("idempotency-key", format!("medtune-{tag}")).json(&order);
        match once(shared, lane, create).await {
            Ok(batch) => break id_of(&batch, lane)?,
            Err(trouble) => {
                // The order may have arrived although its confirmation did not.
                if let Some(id) = find(shared, lane, &tag).await? {
                    break id;
                }
                if !trouble.passing || attempt >= shared.config.max_attempts {
                    return Err(trouble.error(lane, "create a batch"));
                }
                pause(shared, attempt, trouble.wait).await;
            }
        }
    };
    shared.ledger.batch(&tag, identity, Some(&id), "running").await?;
    Ok((tag, id))
}

fn id_of(value: &Value, lane: &Lane) -> Result<String> {
    value["id"].as_str().map(str::to_string).ok_or_else(|| {
        Error::new(Kind::Run, "the server's answer has no id")
            .at(&lane.endpoint.identity)
            .help("this server may not have the Batch API; set llm.mode = \"online\"")
    })
}

/// The server's id of a batch with our tag.
async fn find(shared: &Shared, lane: &Lane, tag: &str) -> Result<Option<String>> {
    let mut after: Option<String> = None;
    loop {
        let list = || {
            let mut query = vec![("limit", "100")];
            query.extend(after.as_deref().map(|id| ("after", id)));
            lane.get_from_desk("batches", &query)
        };
        let page: Value = call(shared, lane, "list batches", list).await?;
        let batches = page["data"].as_array().cloned().unwrap_or_default();
        if let Some(found) = batches.iter().find(|b| b["metadata"][TAG] == tag) {
            return id_of(found, lane).map(Some);
        }
        after = batches.last().and_then(|b| b["id"].as_str()).map(str::to_string);
        if page["has_more"] != true || after.is_none() {
            return Ok(None);
        }
    }
}

#[derive(Deserialize)]
struct Batch {
    status: String,
    #[serde(default)]
    output_file_id: Option<String>,
    #[serde(default)]
    error_file_id: Option<String>,
    #[serde(default)]
    errors: Value,
}

/// Collects a batch if it has ended: its replies go to the ledger, its failures are returned. Items without either were
/// not reached; they are closed as unpaid.
async fn collect(shared: &Shared, lane: &Lane, tag: &str, id: &str) -> Result<Option<Failures>> {
    let path = format!("batches/{id}");
    let batch: Batch = call(shared, lane, "look at a batch", || lane.get_from_desk(&path, &[])).await?;
    if !matches!(batch.status.as_str(), "completed" | "failed" | "expired" | "cancelled") {
        return Ok(None);
    }
    let open = shared.ledger.batch_items(tag)?;
    let mut items: HashMap<Key, BatchItem> = open.into_iter().map(|item| (item.key, item)).collect();
    let mut failures = Failures::new();
    for file in [batch.output_file_id, batch.error_file_id].into_iter().flatten() {
        let path = format!("files/{file}/content");
        let text = fetch(shared, lane, "collect a batch", || lane.get_from_desk(&path, &[])).await?;
        for line in text.lines().filter(|l| !l.trim().is_empty()) {
            item(shared, line, &mut items, &mut failures).await?;
        }
    }
    let words = words(&batch.errors["data"][0].to_string());
    for item in items.into_values() {
        shared.ledger.ended(item.attempt, End::Failed, None, &format!("the batch is {}: {words}", batch.status));
        if batch.status == "failed" {
            let message = format!("the server rejected the batch: {words}");
            failures.insert(item.key, Failure::Api { status: 400, message, attempts: 1 });
        }
    }
    shared.ledger.batch(tag, &lane.endpoint.identity, Some(id), "collected").await?;
    Ok(Some(failures))
}

/// Records one line of an output or error file.
async fn item(shared: &Shared, line: &str, items: &mut HashMap<Key, BatchItem>, failures: &mut Failures) -> Result<()> {
    // A line that cannot be read leaves its item open, which is counted as not reached.
    let Ok(value) = serde_json::from_str::<Value>(line) else { return Ok(()) };
    let key = value["custom_id"].as_str().and_then(Key::parse);
    let Some(item) = key.and_then(|key| items.remove(&key)) else { return Ok(()) };
    let (response, body) = (&value["response"], &value["response"]["body"]);
    let status = response["status_code"].as_u64().unwrap_or(500) as u16;
    let raw = body.to_string();
    let price = shared.config.prices.get(&item.model).copied();
    let bounds = TokenBounds::of_canonical(&item.body, price.map_or_else(image_tokens, |p| p.image_tokens));
    match Read::parse(&raw, bounds) {
        Ok(read) if status == 200 => {
            let reply = NewReply {
                key: item.key,
                raw,
                usage: read.usage,
                usd: budget::paid(&shared.config, &item.model, read.usage),
                latency_ms: 0,
                model: read.model,
                fingerprint: read.fingerprint,
                finish_reason: read.finish_reason,
            };
            shared.ledger.replied(item.attempt, reply).await
        }
        _ => {
            let told = if value["error"].is_null() { words(&raw) } else { words(&value.to_string()) };
            shared.ledger.ended(item.attempt, End::Failed, Some(status), &told);
            failures.insert(item.key, Failure::Api { status, message: told, attempts: 1 });
            Ok(())
        }
    }
}

/// Collects what an earlier process left at the server, waiting for it if it must; says whether there was something.
pub(super) fn recover(shared: &Shared, runtime: &tokio::runtime::Handle, stop: &AtomicBool) -> Result<bool> {
    let (mut seen, mut any) = (Vec::new(), false);
    for lane in &shared.lanes {
        if seen.contains(&&lane.endpoint.identity) {
            continue;
        }
        seen.push(&lane.endpoint.identity);
        for (tag, id) in shared.ledger.open_batches(&lane.endpoint.identity)? {
            any = true;
            let id = match id {
                Some(id) => Some(id),
                None => runtime.block_on(find(shared, lane, &tag))?,
            };
            let Some(id) = id else {
                runtime.block_on(abandon(shared, lane, &tag))?;
                continue;
            };
            while runtime.block_on(collect(shared, lane, &tag, &id))?.is_none() {
                let until = Instant::now() + poll_interval(shared);
                while Instant::now() < until {
                    if stop.load(Ordering::Relaxed) {
                        return Err(Error::new(Kind::Interrupted, "interrupted while a batch is under way")
                            .help("run the same command later; it collects the batch and pays for nothing twice"));
                    }
                    std::thread::sleep(Duration::from_millis(50));
                }
            }
        }
    }
    Ok(any)
}

/// Closes a batch that never reached the server.
async fn abandon(shared: &Shared, lane: &Lane, tag: &str) -> Result<()> {
    for item in shared.ledger.batch_items(tag)? {
        shared.ledger.ended(item.attempt, End::Failed, None, "the batch was not created");
    }
    shared.ledger.batch(tag, &lane.endpoint.identity, None, "failed").await
}

/// Why a call about batches failed.
struct Trouble {
    status: Option<u16>,
    message: String,
    /// Whether another attempt may succeed.
    passing: bool,
    wait: Duration,
    /// The server's certificate is not trusted.
    untrusted: bool,
}

impl Trouble {
    fn error(self, lane: &Lane, what: &str) -> Error {
        if self.untrusted {
            return untrusted(lane, &self.message);
        }
        let status = self.status.map_or(String::new(), |s| format!("{s}: "));
        Error::new(Kind::Run, format!("cannot {what}"))
            .at(&lane.endpoint.identity)
            .found(format!("{status}{}", self.message))
            .help("run the same command again, it continues; without a Batch API set llm.mode = \"online\"")
    }
}

async fn once(shared: &Shared, lane: &Lane, request: reqwest::RequestBuilder) -> std::result::Result<Value, Trouble> {
    let text = send(shared, lane, request).await?;
    serde_json::from_str(&text).map_err(|e| Trouble {
        status: Some(200),
        message: format!("not JSON: {e}"),
        passing: true,
        wait: Duration::ZERO,
        untrusted: false,
    })
}

async fn send(shared: &Shared, lane: &Lane, request: reqwest::RequestBuilder) -> std::result::Result<String, Trouble> {
    let failed = |e: reqwest::Error| {
        let (message, untrusted) = causes(e);
        Trouble { status: None, message, passing: !untrusted, wait: Duration::ZERO, untrusted }
    };
    // Files may take longer than replies.
    let timeout = Duration::from_secs_f64(10.0 * shared.config.timeout);
    let response = request.timeout(timeout).send().await.map_err(failed)?;
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    let text = lane.redacted(response.text().await.map_err(failed)?);
    if (200..300).contains(&status) {
        return Ok(text);
    }
    Err(Trouble {
        status: Some(status),
        message: words(&text),
        passing: matches!(status, 408 | 409 | 425 | 429 | 500..=599),
        wait: retry_after(&headers, std::time::SystemTime::now()).unwrap_or_default(),
        untrusted: false,
    })
}

async fn pause(shared: &Shared, attempt: u32, at_least: Duration) {
    let doubled = shared.config.backoff * 2f64.powi(attempt.min(30) as i32 - 1);
    tokio::time::sleep(Duration::from_secs_f64(doubled.min(shared.config.max_backoff)).max(at_least)).await;
}

/// A call that may be repeated, as text.
async fn fetch(
    shared: &Shared,
    lane: &Lane,
    what: &str,
    request: impl Fn() -> reqwest::RequestBuilder,
) -> Result<String> {
    let mut attempt = 0;
    loop {
        attempt += 1;
        match send(shared, lane, request()).await {
            Ok(text) => return Ok(text),
            Err(t) if t.passing && attempt < shared.config.max_attempts => pause(shared, attempt, t.wait).await,
            Err(trouble) => return Err(trouble.error(lane, what)),
        }
    }
}

/// A call that may be repeated, as JSON.
async fn call<T: serde::de::DeserializeOwned>(
    shared: &Shared,
    lane: &Lane,
    what: &str,
    request: impl Fn() -> reqwest::RequestBuilder,
) -> Result<T> {
    let text = fetch(shared, lane, what, request).await?;
    serde_json::from_str(&text).map_err(|e| {
        Error::new(Kind::Run, format!("cannot {what}: the answer is not what it should be"))
            .at(&lane.endpoint.identity)
            .source(e)
    })
}

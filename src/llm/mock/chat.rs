//! Chat completions of the rehearsal server.

use std::{sync::Arc, time::Duration};

use axum::{
    body::{Body, Bytes},
    extract::{ConnectInfo, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{Desk, Fault, rules::Scripted, socket::Line};
use crate::random::stream;

/// A message as rules see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spoken {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// All text parts, joined by line ends.
    pub text: String,
    /// Number of images.
    pub images: usize,
}

/// A request as rules see it.
#[derive(Debug, Clone, PartialEq)]
pub struct Asked {
    /// Model that was asked for.
    pub model: String,
    /// The conversation.
    pub messages: Vec<Spoken>,
    /// JSON schema of the answer, where one was sent.
    pub schema: Option<Value>,
    /// Whether any JSON object was asked for.
    pub json: bool,
}

impl Asked {
    /// Text of the system message; empty if there is none.
    #[must_use]
    pub fn system(&self) -> &str {
        self.messages.iter().find(|m| m.role == "system").map_or("", |m| &m.text)
    }

    /// Text of the last user message; empty if there is none.
    #[must_use]
    pub fn last(&self) -> &str {
        self.messages.iter().rev().find(|m| m.role == "user").map_or("", |m| &m.text)
    }
}

/// What a rule answers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Said {
    /// Text of the reply.
    pub text: String,
    /// The model declines, in the field made for that.
    pub refusal: Option<String>,
}

impl Said {
    /// A reply of text.
    pub fn text(text: impl Into<String>) -> Self {
        Self { text: text.into(), refusal: None }
    }
}

#[derive(Deserialize)]
struct ChatBody {
    #[serde(default)]
    model: String,
    messages: Vec<ChatMessage>,
    #[serde(default)]
    max_tokens: Option<u64>,
    #[serde(default)]
    max_completion_tokens: Option<u64>,
    #[serde(default)]
    response_format: Option<Value>,
}

#[derive(Deserialize)]
struct ChatMessage {
    role: String,
    #[serde(default)]
    content: Value,
}

/// A request with its fingerprints.
pub(super) struct Parsed {
    pub(super) asked: Asked,
    max_tokens: Option<u64>,
    /// What a script says.
    said: Option<Said>,
    /// Of the words alone: equal words get equal answers.
    words: u64,
    /// Of the request: by idempotency key, else by the whole body.
    pub(super) id: u128,
}

impl Parsed {
    pub(super) fn new(body: &[u8], idempotency: Option<&str>) -> Result<Self, String> {
        let id = match idempotency {
            Some(key) => Sha256::digest(key.as_bytes()),
            None => Sha256::digest(body),
        };
        let body: ChatBody = serde_json::from_slice(body).map_err(|e| format!("invalid request: {e}"))?;
        let format = body.response_format.unwrap_or_default();
        let asked = Asked {
            model: body.model,
            messages: body.messages.into_iter().map(spoken).collect(),
            schema: Some(format["json_schema"]["schema"].clone()).filter(|s| !s.is_null()),
            json: format["type"] == "json_object",
        };
        let mut words = Sha256::new_with_prefix(asked.model.as_bytes());
        for message in &asked.messages {
            words.update((message.text.len() as u64).to_le_bytes());
            words.update(message.text.as_bytes());
        }
        let words = words.finalize();
        let max_tokens = body.max_completion_tokens.or(body.max_tokens);
        Ok(Self { asked, max_tokens, said: None, words: number(&words) as u64, id: number(&id) })
    }
}

fn number(hash: &[u8]) -> u128 {
    hash.iter().take(16).fold(0, |n, b| n << 8 | u128::from(*b))
}

fn spoken(message: ChatMessage) -> Spoken {
    let (text, images) = match &message.content {
        Value::String(text) => (text.clone(), 0),
        Value::Array(parts) => {
            let text: Vec<&str> = parts.iter().filter_map(|p| p["text"].as_str()).collect();
            (text.join("\n"), parts.iter().filter(|p| p["type"] == "image_url").count())
        }
        _ => (String::new(), 0),
    };
    Spoken { role: message.role, text, images }
}

/// `POST /v1/chat/completions`.
pub(super) async fn completions(
    State(desk): State<Arc<Desk>>,
    ConnectInfo(line): ConnectInfo<Line>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    if !authorized(&desk, &headers) {
        return error(StatusCode::UNAUTHORIZED, "invalid_api_key", "Incorrect API key provided.");
    }
    let text = |name: &str| headers.get(name).and_then(|v| v.to_str().ok());
    let mut parsed = match Parsed::new(&body, text("idempotency-key")) {
        Ok(parsed) => parsed,
        Err(message) => return error(StatusCode::BAD_REQUEST, "invalid_request_error", &message),
    };
    let guard = UnderWay::start(&desk);
    let (fault, known) = desk.arrival(&mut parsed);
    let answer = respond(&desk, &line, &parsed, fault, known).await;
    drop(guard);
    answer
}

/// Whether the request presents the key, where one is wanted.
pub(super) fn authorized(desk: &Desk, headers: &HeaderMap) -> bool {
    let Some(key) = &desk.config.key else { return true };
    let text = |name| headers.get(name).and_then(|v: &axum::http::HeaderValue| v.to_str().ok());
    text("authorization").and_then(|v| v.strip_prefix("Bearer ")) == Some(key) || text("api-key") == Some(key)
}

async fn respond(desk: &Desk, line: &Line, parsed: &Parsed, fault: Option<Fault>, known: bool) -> Response {
    let format_rejected = desk.config.faults.rate(Fault::NoJsonSchema) > 0.0 && parsed.asked.schema.is_some();
    if format_rejected {
        desk.count(Fault::NoJsonSchema);
        let message = "response_format of type json_schema is not supported";
        return error(StatusCode::BAD_REQUEST, "invalid_request_error", message);
    }
    if let Some(fault) = fault.filter(|_| !known) {
        desk.count(fault);
    }
    let mut latency = desk.config.latency;
    match fault.filter(|f| !known && !f.is_flaw()) {
        Some(Fault::Drop) => {
            line.cut();
            return StatusCode::OK.into_response();
        }
        Some(Fault::Slow) => latency += desk.config.faults.slow,
        Some(fault) => return failure(desk, fault),
        None => {}
    }
    if latency > Duration::ZERO {
        // A client that hangs up ends this future here, before anything is paid.
        tokio::time::sleep(latency).await;
    }
    let flaw = desk.pay(parsed.id, fault.filter(|f| f.is_flaw()), known);
    let body = completion(desk, parsed, flaw).to_string();
    if flaw == Some(Fault::Cut) && !known {
        return cut(line, body);
    }
    ([(header::CONTENT_TYPE, "application/json")], body).into_response()
}

/// The first half of a body, then the end of the connection.
fn cut(line: &Line, body: String) -> Response {
    let length = body.len();
    let half = Bytes::from(body).split_to(length / 2);
    let line = line.clone();
    let rest = async move {
        // The first half must be on its way before nothing more can be written.
        tokio::time::sleep(Duration::from_millis(5)).await;
        line.cut();
        Err::<Bytes, std::io::Error>(std::io::ErrorKind::ConnectionAborted.into())
    };
    let parts = futures_util::stream::once(async move { Ok::<_, std::io::Error>(half) });
    let body = Body::from_stream(futures_util::StreamExt::chain(parts, futures_util::stream::once(rest)));
    ([(header::CONTENT_TYPE, "application/json")], body).into_response()
}

/// An answer that costs nothing.
fn failure(desk: &Desk, fault: Fault) -> Response {
    match fault {
        Fault::RateLimit => {
            let mut response = error(StatusCode::TOO_MANY_REQUESTS, "rate_limit_exceeded", "Rate limit reached.");
            let wait = desk.config.faults.retry_after.as_secs_f64();
            if let Ok(value) = format!("{wait}").parse() {
                response.headers_mut().insert(header::RETRY_AFTER, value);
            }
            response
        }
        Fault::NotJson => {
            let page = "<html><body><h1>504 Gateway Time-out</h1></body></html>";
            ([(header::CONTENT_TYPE, "text/html")], page).into_response()
        }
        Fault::Filter => error(StatusCode::BAD_REQUEST, "content_filter", "The response was filtered."),
        _ => error(StatusCode::INTERNAL_SERVER_ERROR, "server_error", "The server had an error."),
    }
}

/// An error as OpenAI words it.
pub(super) fn error(status: StatusCode, code: &str, message: &str) -> Response {
    let body = json!({ "error": { "message": message, "type": code, "code": code } });
    (status, axum::Json(body)).into_response()
}

/// A completion, with its flaw.
pub(super) fn completion(desk: &Desk, parsed: &Parsed, flaw: Option<Fault>) -> Value {
    let config = &desk.config;
    let mut draw: ChaCha8Rng = stream(config.seed, "mock/answer", parsed.words);
    let mut said = parsed.said.clone().unwrap_or_else(|| config.rules.answer(&parsed.asked, &mut draw));
    if parsed.asked.schema.is_none() && said.text.len() < config.reply_bytes {
        said.text = said
            .text
            .split(' ')
            .cycle()
            .scan(0, |length, word| {
                *length += word.len() + 1;
                (*length <= config.reply_bytes + word.len()).then_some(word)
            })
            .collect::<Vec<_>>()
            .join(" ");
    }
    let mut reason = "stop";
    match flaw {
        Some(Fault::Truncated) => {
            let half = said.text.chars().count() / 2;
            (said.text, reason) = (said.text.chars().take(half).collect(), "length");
        }
        Some(Fault::WrongSchema) => said.text = r#"{"unexpected": [1, 2, 3]}"#.into(),
        Some(Fault::Refusal) => {
            said = Said { text: String::new(), refusal: Some("I'm sorry, I can't help with that.".into()) }
        }
        Some(Fault::Empty) => (said.text, reason) = (String::new(), "content_filter"),
        _ => {}
    }
    let count = |text: &str| (text.len() as u64).div_ceil(4);
    let mut prompt: u64 = parsed.asked.messages.iter().map(|m| 4 + count(&m.text) + 765 * m.images as u64).sum();
    let mut reply = count(&said.text);
    if let Some(max) = parsed.max_tokens {
        reply = reply.min(max);
    }
    if flaw == Some(Fault::Usage) {
        (prompt, reply) =
            if parsed.words.is_multiple_of(2) { (0, 0) } else { (prompt + 1_000_000_000, reply + 1_000_000_000) };
    }
    json!({
        "id": format!("chatcmpl-{:032x}", parsed.id),
        "object": "chat.completion",
        "model": parsed.asked.model,
        "system_fingerprint": format!("mock-{}-{}", config.rules.name(), config.seed),
        "choices": [{
            "index": 0,
            "message": { "role": "assistant", "content": said.text, "refusal": said.refusal },
            "finish_reason": reason,
        }],
        "usage": { "prompt_tokens": prompt, "completion_tokens": reply, "total_tokens": prompt + reply },
    })
}

impl Desk {
    /// Counts a coming of a request: the fault it meets, by script or by chance, and whether its answer is known.
    pub(super) fn arrival(&self, parsed: &mut Parsed) -> (Option<Fault>, bool) {
        let scripted = self.script.answer(&parsed.asked);
        let mut memory = self.memory();
        memory.stats.requests += 1;
        let seen = memory.seen.entry(parsed.id).or_default();
        let arrival = seen.arrivals;
        seen.arrivals += 1;
        let known = self.config.idempotent && seen.paid > 0;
        let fault = match scripted {
            Some(Scripted::Fault(fault)) => Some(fault),
            Some(Scripted::Said(said)) => {
                parsed.said = Some(said);
                None
            }
            None => self.config.faults.draw(self.config.seed, parsed.id, arrival),
        };
        (fault, known)
    }

    /// Counts an answer: paid for, or given again. Returns what is wrong with it.
    pub(super) fn pay(&self, id: u128, flaw: Option<Fault>, known: bool) -> Option<Fault> {
        let mut memory = self.memory();
        let seen = memory.seen.entry(id).or_default();
        if known || (self.config.idempotent && seen.paid > 0) {
            let flaw = seen.flaw;
            memory.stats.replayed += 1;
            return flaw;
        }
        seen.paid += 1;
        seen.flaw = flaw;
        let twice = seen.paid == 2;
        memory.stats.paid += 1;
        memory.stats.paid_twice += u64::from(twice);
        flaw
    }

    /// Counts a fault.
    pub(super) fn count(&self, fault: Fault) {
        *self.memory().stats.faults.entry(fault.name().into()).or_default() += 1;
    }
}

/// Counts requests that are being worked on, also when a client hangs up.
struct UnderWay<'a>(&'a Desk);

impl<'a> UnderWay<'a> {
    fn start(desk: &'a Desk) -> Self {
        let mut memory = desk.memory();
        memory.under_way += 1;
        memory.stats.most_under_way = memory.stats.most_under_way.max(memory.under_way);
        Self(desk)
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.memory().under_way -= 1;
    }
}

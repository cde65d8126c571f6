//! Files and batches of the rehearsal server.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Json,
    body::Bytes,
    extract::{Multipart, Path, State},
    http::{HeaderMap, StatusCode, Uri},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use super::{
    Fault,
    chat::{Parsed, authorized, completion, error},
};

/// Files and batches.
#[derive(Default)]
pub(super) struct Desk {
    files: BTreeMap<String, Bytes>,
    batches: BTreeMap<String, Batch>,
    /// Batches by idempotency key.
    known: BTreeMap<String, String>,
}

struct Batch {
    /// As it will look in the end.
    last: Value,
    ready: Instant,
}

impl Batch {
    fn now(&self) -> Value {
        let mut value = self.last.clone();
        if Instant::now() < self.ready {
            value["status"] = "in_progress".into();
            (value["output_file_id"], value["error_file_id"]) = (Value::Null, Value::Null);
        }
        value
    }
}

type Shared = State<Arc<super::Desk>>;

fn not_found(what: &str) -> Response {
    error(StatusCode::NOT_FOUND, "not_found", &format!("No such {what}."))
}

fn unauthorized() -> Response {
    error(StatusCode::UNAUTHORIZED, "invalid_api_key", "Incorrect API key provided.")
}

/// `POST /v1/files`.
pub(super) async fn upload(State(desk): Shared, headers: HeaderMap, mut form: Multipart) -> Response {
    if !authorized(&desk, &headers) {
        return unauthorized();
    }
    let mut content = None;
    while let Ok(Some(field)) = form.next_field().await {
        if field.name() == Some("file") {
            content = field.bytes().await.ok();
        }
    }
    let Some(content) = content else {
        return error(StatusCode::BAD_REQUEST, "invalid_request_error", "A file is missing.");
    };
    let mut memory = desk.memory();
    let (id, bytes) = (format!("file-{}", memory.batches.files.len()), content.len());
    memory.batches.files.insert(id.clone(), content);
    Json(json!({ "id": id, "object": "file", "bytes": bytes, "purpose": "batch" })).into_response()
}

/// `GET /v1/files/{id}/content`.
pub(super) async fn content(State(desk): Shared, headers: HeaderMap, Path(id): Path<String>) -> Response {
    if !authorized(&desk, &headers) {
        return unauthorized();
    }
    let found = desk.memory().batches.files.get(&id).cloned();
    found.map_or_else(|| not_found("file"), IntoResponse::into_response)
}

/// `POST /v1/batches`.
pub(super) async fn create(State(desk): Shared, uri: Uri, headers: HeaderMap, Json(order): Json<Value>) -> Response {
    if !authorized(&desk, &headers) {
        return unauthorized();
    }
    let endpoint = if uri.path().starts_with("/openai/") { "/chat/completions" } else { "/v1/chat/completions" };
    if order["endpoint"] != endpoint {
        return error(StatusCode::BAD_REQUEST, "invalid_request_error", &format!("The endpoint must be {endpoint}."));
    }
    let key = headers.get("idempotency-key").and_then(|v| v.to_str().ok()).filter(|_| desk.config.idempotent);
    let (number, input) = {
        let memory = desk.memory();
        let known = key.and_then(|key| memory.batches.known.get(key)).and_then(|id| memory.batches.batches.get(id));
        if let Some(batch) = known {
            return Json(batch.now()).into_response();
        }
        let input = order["input_file_id"].as_str().and_then(|id| memory.batches.files.get(id)).cloned();
        (memory.batches.batches.len(), input)
    };
    let Some(input) = input else { return not_found("file") };
    let id = format!("batch_{number}");
    let expires = desk.config.faults.draw_batch(desk.config.seed, number as u64);
    let (output, errors) = work(&desk, endpoint, &input, expires);
    let mut memory = desk.memory();
    memory.stats.batches += 1;
    if expires {
        *memory.stats.faults.entry(Fault::Expire.name().into()).or_default() += 1;
    }
    let mut keep = |content: String| {
        let name = format!("file-{}", memory.batches.files.len());
        (!content.is_empty()).then(|| {
            memory.batches.files.insert(name.clone(), content.into());
            name
        })
    };
    let last = json!({
        "id": id, "object": "batch", "endpoint": order["endpoint"], "input_file_id": order["input_file_id"],
        "status": if expires { "expired" } else { "completed" },
        "output_file_id": keep(output), "error_file_id": keep(errors), "metadata": order["metadata"],
    });
    let delay = desk.config.latency.max(Duration::from_millis(1));
    let batch = Batch { last, ready: Instant::now() + delay };
    let now = batch.now();
    if let Some(key) = key {
        memory.batches.known.insert(key.to_string(), id.clone());
    }
    memory.batches.batches.insert(id, batch);
    Json(now).into_response()
}

/// Answers the lines of a file, or only the first half of them: output and error file.
fn work(desk: &super::Desk, endpoint: &str, input: &[u8], half: bool) -> (String, String) {
    let lines: Vec<Value> =
        String::from_utf8_lossy(input).lines().filter_map(|l| serde_json::from_str(l).ok()).collect();
    let (mut output, mut errors) = (String::new(), String::new());
    let count = if half { lines.len() / 2 } else { lines.len() };
    for line in &lines[..count] {
        let id = line["custom_id"].as_str().unwrap_or_default();
        let (status, body) = match Parsed::new(line["body"].to_string().as_bytes(), Some(&format!("medtune-{id}"))) {
            Err(message) => (400, json!({ "error": { "message": message } })),
            Ok(_) if line["url"] != endpoint => {
                (400, json!({ "error": { "message": "The url is not the endpoint." } }))
            }
            Ok(mut parsed) => answer(desk, &mut parsed),
        };
        let file = if status == 200 { &mut output } else { &mut errors };
        let record = json!({
            "custom_id": id, "response": { "status_code": status, "body": body }, "error": null,
        });
        file.push_str(&format!("{record}\n"));
    }
    for line in &lines[count..] {
        let error = json!({ "code": "batch_expired", "message": "This request could not be executed in time." });
        errors.push_str(&format!("{}\n", json!({ "custom_id": line["custom_id"], "response": null, "error": error })));
    }
    (output, errors)
}

fn answer(desk: &super::Desk, parsed: &mut Parsed) -> (u16, Value) {
    let (fault, known) = desk.arrival(parsed);
    let fault = fault.filter(|_| !known);
    if let Some(fault) = fault {
        desk.count(fault);
    }
    match fault.filter(|f| !f.is_flaw() && *f != Fault::Slow) {
        Some(Fault::RateLimit) => (429, json!({ "error": { "message": "Rate limit reached." } })),
        Some(Fault::Filter) => (400, json!({ "error": { "message": "filtered", "code": "content_filter" } })),
        Some(_) => (500, json!({ "error": { "message": "The server had an error." } })),
        None => {
            let flaw = desk.pay(parsed.id, fault.filter(|f| f.is_flaw() && *f != Fault::Cut), known);
            (200, completion(desk, parsed, flaw))
        }
    }
}

/// `GET /v1/batches`.
pub(super) async fn list(State(desk): Shared, headers: HeaderMap) -> Response {
    if !authorized(&desk, &headers) {
        return unauthorized();
    }
    let data: Vec<Value> = desk.memory().batches.batches.values().map(Batch::now).collect();
    Json(json!({ "object": "list", "data": data, "has_more": false })).into_response()
}

/// `GET /v1/batches/{id}`.
pub(super) async fn look(State(desk): Shared, headers: HeaderMap, Path(id): Path<String>) -> Response {
    if !authorized(&desk, &headers) {
        return unauthorized();
    }
    let found = desk.memory().batches.batches.get(&id).map(Batch::now);
    found.map_or_else(|| not_found("batch"), |batch| Json(batch).into_response())
}

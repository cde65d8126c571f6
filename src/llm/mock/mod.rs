//! A local server that speaks OpenAI's API without a model: for rehearsals and tests. Its answers follow rules, are the
//! same for the same seed and words, and fail in the ways real servers do when asked to.

mod batches;
mod chat;
mod faults;
mod rules;
mod socket;

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, Request, State},
    http::StatusCode,
    middleware::{self, Next},
    response::Response,
    routing::{get, post},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::oneshot;

pub use chat::{Asked, Said, Spoken};
pub use faults::{Fault, Faults};
pub use rules::{General, RULES, Rules, Script};

use crate::error::{Error, Kind, Result};

/// How a rehearsal server behaves.
#[derive(Clone)]
pub struct MockConfig {
    /// Address; this machine only by default.
    pub host: IpAddr,
    /// Port; 0 takes a free one.
    pub port: u16,
    /// What it answers.
    pub rules: &'static dyn Rules,
    /// Answers that go before the rules.
    pub script: Option<PathBuf>,
    /// Seed of answers and faults.
    pub seed: u64,
    /// How often it fails, and how.
    pub faults: Faults,
    /// Time that an answer takes.
    pub latency: Duration,
    /// Least length of a text answer in bytes.
    pub reply_bytes: usize,
    /// Whether a request under a known idempotency key gets the known answer, unpaid.
    pub idempotent: bool,
    /// Key that requests must present, if any.
    pub key: Option<String>,
}

impl MockConfig {
    /// A server for rehearsals by the rules of this name; an empty name means the general ones.
    ///
    /// # Errors
    /// There are no rules of this name.
    pub fn rehearsal(rules: &str, seed: u64) -> Result<Self> {
        let name = if rules.is_empty() { "general" } else { rules };
        let rules = RULES.iter().copied().find(|r| r.name() == name).ok_or_else(|| {
            Error::new(Kind::Config, "unknown rules of a rehearsal server")
                .expected(RULES.iter().map(|r| r.name()).collect::<Vec<_>>().join(", "))
                .found(name)
        })?;
        Ok(Self {
            host: Ipv4Addr::LOCALHOST.into(),
            port: 0,
            rules,
            script: None,
            seed,
            faults: Faults::default(),
            latency: Duration::ZERO,
            reply_bytes: 0,
            idempotent: true,
            key: None,
        })
    }
}

/// What a rehearsal server has seen.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Requests for completions, one by one or in batches, whatever became of them.
    pub requests: u64,
    /// Completions that were made: what a real server would charge for.
    pub paid: u64,
    /// Requests (by idempotency key, else by content) that were paid more than once.
    pub paid_twice: u64,
    /// Known answers that were given again, unpaid.
    pub replayed: u64,
    /// Most requests under way at a time.
    pub most_under_way: u64,
    /// Batches that were created.
    pub batches: u64,
    /// Faults by name.
    pub faults: BTreeMap<String, u64>,
}

/// What is known of a request.
#[derive(Debug, Clone, Copy, Default)]
struct Seen {
    /// How often it came.
    arrivals: u32,
    paid: u32,
    /// What was wrong with the answer that was paid for.
    flaw: Option<Fault>,
}

#[derive(Default)]
struct Memory {
    stats: Stats,
    under_way: u64,
    seen: HashMap<u128, Seen>,
    batches: batches::Desk,
}

/// What handlers share.
pub(super) struct Desk {
    config: MockConfig,
    script: Script,
    memory: Mutex<Memory>,
}

impl Desk {
    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running server; ends when dropped.
#[derive(Debug)]
pub struct MockServer {
    address: SocketAddr,
    desk: Arc<Desk>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Desk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Desk").finish_non_exhaustive()
    }
}

/// Largest body of a request: a batch file.
const MAX_BODY: usize = 512 << 20;

impl MockServer {
    /// Starts a server on a thread of its own; it listens when this returns.
    ///
    /// # Errors
    /// The address is taken, or the script cannot be read.
    pub fn start(config: MockConfig) -> Result<Self> {
        let script = config.script.as_deref().map(Script::read).transpose()?.unwrap_or_default();
        let wanted = SocketAddr::new(config.host, config.port);
        let desk = Arc::new(Desk { config, script, memory: Mutex::default() });
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| Error::new(Kind::Run, "cannot start a server").source(e))?;
        let listener = runtime.block_on(tokio::net::TcpListener::bind(wanted)).map_err(|e| {
            Error::new(Kind::Run, "cannot listen")
                .at(wanted)
                .help("choose another port with --port, or 0 for any")
                .source(e)
        })?;
        let address = listener.local_addr().map_err(|e| Error::new(Kind::Run, "cannot listen").source(e))?;
        let (stop, stopped) = oneshot::channel::<()>();
        let router = router(Arc::clone(&desk));
        let thread = std::thread::Builder::new()
            .name("mock-llm".into())
            .spawn(move || {
                runtime.block_on(async {
                    let service = router.into_make_service_with_connect_info::<socket::Line>();
                    let server = axum::serve(socket::Tapped(listener), service);
                    tokio::select! {
                        _ = async { server.await } => {}
                        // A sender that was dropped means the same as one that was used.
                        _ = stopped => {}
                    }
                });
            })
            .map_err(|e| Error::new(Kind::Run, "cannot start a thread").source(e))?;
        Ok(Self { address, desk, stop: Some(stop), thread: Some(thread) })
    }

    /// Base URL for clients.
    #[must_use]
    pub fn base_url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    /// Base URL of a deployment, as Azure has it: every request needs an `api-version`, and the key its own header.
    #[must_use]
    pub fn azure_url(&self, deployment: &str) -> String {
        format!("http://{}/openai/deployments/{deployment}", self.address)
    }

    /// What it has seen so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.desk.memory().stats.clone()
    }
}

impl Drop for MockServer {
    fn drop(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn router(desk: Arc<Desk>) -> Router {
    let azure = desks("/openai")
        .route("/openai/deployments/{deployment}/chat/completions", post(chat::completions))
        .layer(middleware::from_fn(as_azure));
    desks("/v1")
        .route("/v1/chat/completions", post(chat::completions))
        .route("/v1/models", get(models))
        .merge(azure)
        .route("/mock/stats", get(stats))
        .route("/mock/reset", post(reset))
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(desk)
}

/// Where files and batches go.
fn desks(prefix: &str) -> Router<Arc<Desk>> {
    let at = |path: &str| format!("{prefix}/{path}");
    Router::new()
        .route(&at("files"), post(batches::upload))
        .route(&at("files/{id}/content"), get(batches::content))
        .route(&at("batches"), post(batches::create).get(batches::list))
        .route(&at("batches/{id}"), get(batches::look))
}

/// What Azure is particular about.
async fn as_azure(mut request: Request, next: Next) -> Response {
    let query = request.uri().query().unwrap_or_default();
    if !query.split('&').any(|part| part.strip_prefix("api-version=").is_some_and(|version| !version.is_empty())) {
        return chat::error(StatusCode::NOT_FOUND, "404", "Resource not found");
    }
    request.headers_mut().remove("authorization");
    next.run(request).await
}

async fn models(State(desk): State<Arc<Desk>>) -> Json<Value> {
    let name = format!("mock-{}", desk.config.rules.name());
    Json(json!({ "object": "list", "data": [{ "id": name, "object": "model", "owned_by": "medtune" }] }))
}

async fn stats(State(desk): State<Arc<Desk>>) -> Json<Stats> {
    Json(desk.memory().stats.clone())
}

async fn reset(State(desk): State<Arc<Desk>>) -> Json<Stats> {
    let mut memory = desk.memory();
    memory.seen.clear();
    Json(std::mem::take(&mut memory.stats))
}

//! The client that stages use: an iterator of requests in, replies in the same order out.

use std::{
    collections::{HashMap, VecDeque},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use rayon::prelude::*;
use reqwest::Url;
use tokio::sync::watch;

use super::{
    batch::{self, Batches},
    budget::{Admission, Budget, Estimate, worst_case},
    config::{InDoubt, LlmConfig, Mode},
    endpoint::{Endpoint, Place, is_loopback},
    ledger::{Ledger, Totals},
    limits::{Circuit, Limiter},
    mock::{MockConfig, MockServer},
    online::{Online, reread},
    reply::{Failure, Reply},
    request::{EndpointRole, Key, Request},
    shared::{Done, Ended, Job, Lane, Server, Shared, Transport},
    wire::{Dialect, Prepared},
};
use crate::error::{Error, Kind, Result};

/// How a client is opened, besides the recipe.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// File of the ledger; one client at a time may use it.
    pub ledger: PathBuf,
    /// Seed of jitter and of rehearsal servers.
    pub seed: u64,
    /// Ends a run at a safe point when it turns true.
    pub stop: Arc<AtomicBool>,
    /// Send nothing; [`Client::estimate`] says what would be sent.
    pub dry_run: bool,
}

impl ClientOptions {
    /// Options with a ledger, to be sent for real.
    pub fn new(ledger: impl Into<PathBuf>, seed: u64, stop: &Arc<AtomicBool>) -> Self {
        Self { ledger: ledger.into(), seed, stop: Arc::clone(stop), dry_run: false }
    }
}

/// A client for the three endpoints of a recipe.
///
/// ```no_run
/// # use medtune::llm::{Client, ClientOptions, EndpointRole, LlmConfig, Message, Request, Speaker};
/// # fn main() -> medtune::Result<()> {
/// # let stop = Default::default();
/// let mut config = LlmConfig::default();
/// config.generate.model = Some("gpt-4o".into());
/// let client = Client::open(&config, ClientOptions::new("ledger.sqlite", 42, &stop))?;
/// let rows = ["What is a nodule?", "What is an effusion?"];
/// let requests = rows.iter().map(|row| {
///     let message = Message::text(Speaker::User, *row);
///     Ok((*row, Request::new(EndpointRole::Generate, vec![message])))
/// });
/// client.run(requests, |row, reply| {
///     match reply {
///         Ok(reply) => eprintln!("{row} {}", reply.text),
///         Err(failure) => eprintln!("{row} no reply: {failure}"),
///     }
///     Ok(())
/// })
/// # }
/// ```
pub struct Client {
    shared: Arc<Shared>,
    runtime: tokio::runtime::Runtime,
    stop: Arc<AtomicBool>,
    dry: Option<Mutex<Estimate>>,
    /// The last run ended early, so that what the budget sets aside may be out of date.
    given_up: AtomicBool,
    // Rehearsal servers live as long as the client.
    _mocks: Vec<MockServer>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("config", &self.shared.config).finish_non_exhaustive()
    }
}

/// Requests that are looked up in the ledger at a time, and how many of them by one thread in a row.
const AHEAD: usize = 256;
const CHUNK: usize = 32;

/// How often an interrupt is looked for.
const GLANCE: Duration = Duration::from_millis(100);

impl Client {
    /// Opens the ledger and resolves the endpoints; nothing is sent. Keys and URLs come from the environment.
    ///
    /// # Errors
    /// The recipe or the environment does not give usable endpoints, or the ledger cannot be written.
    pub fn open(config: &LlmConfig, options: ClientOptions) -> Result<Self> {
        Self::open_with(config, options, &|name| std::env::var(name).ok())
    }

    /// [`Client::open`] with another source of environment variables.
    ///
    /// # Errors
    /// As [`Client::open`].
    pub fn open_with(config: &LlmConfig, options: ClientOptions, env: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let ledger = Ledger::open(&options.ledger)?;
        let budget = Mutex::new(Budget::new(config, &ledger.totals()?));
        let mut mocks = Vec::new();
        let lanes = lanes(config, &ledger, options.seed, &mut mocks, env)?;
        let shared = Shared {
            config: Arc::new(config.clone()),
            lanes,
            ledger,
            seed: options.seed,
            budget,
            stopping: watch::channel(false).0,
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("llm")
            .enable_all()
            .build()
            .map_err(|e| Error::new(Kind::Run, "cannot start threads").source(e))?;
        let dry = options.dry_run.then(Mutex::default);
        Ok(Self { shared: Arc::new(shared), runtime, stop: options.stop, dry, given_up: false.into(), _mocks: mocks })
    }

    /// Sends requests and hands out what comes of them, in the order of the requests. Replies that are in the ledger
    /// cost nothing, and equal requests are sent once. A failure of one request is handed out like a reply.
    ///
    /// At most [`LlmConfig::concurrency`] requests are under way, and a small multiple of that is held in memory.
    ///
    /// # Errors
    /// An interrupt, after what was under way has been answered and recorded; a server that is down or refuses the key;
    /// a ledger that cannot be written; whatever `requests` or `deliver` return. The same call again continues.
    pub fn run<T>(
        &self,
        requests: impl IntoIterator<Item = Result<(T, Request)>>,
        deliver: impl FnMut(T, Result<Reply, Failure>) -> Result<()>,
    ) -> Result<()> {
        self.run_steps(requests, |_, _| None, deliver)
    }

    /// [`Client::run`] where a row may ask more than once: `next` sees each outcome, in no particular order, and may
    /// return another request of this row, for example the same one for a fresh reply; `deliver` gets the last outcome.
    ///
    /// # Errors
    /// As [`Client::run`].
    pub fn run_steps<T>(
        &self,
        requests: impl IntoIterator<Item = Result<(T, Request)>>,
        next: impl FnMut(&mut T, &Result<Reply, Failure>) -> Option<Request>,
        deliver: impl FnMut(T, Result<Reply, Failure>) -> Result<()>,
    ) -> Result<()> {
        let transport: Box<dyn Transport> = match self.shared.config.mode {
            Mode::Online => Box::new(Online::new(Arc::clone(&self.shared), self.runtime.handle().clone())),
            Mode::Batch => Box::new(Batches::new(Arc::clone(&self.shared), self.runtime.handle().clone())),
        };
        self.shared.stopping.send_replace(false);
        if self.dry.is_none() {
            let recovered = batch::recover(&self.shared, self.runtime.handle(), &self.stop)?;
            // The sums of a long ledger take a while, and a stage runs block by block.
            if recovered || self.given_up.swap(false, Ordering::Relaxed) {
                *self.shared.budget() = Budget::new(&self.shared.config, &self.shared.ledger.totals()?);
            }
        }
        let rows = VecDeque::new();
        let held = VecDeque::new();
        let mut run = Run {
            client: self,
            transport,
            rows,
            first: 0,
            waiting: HashMap::new(),
            held,
            next,
            under_way: 0,
            draining: false,
        };
        let outcome = run.drive(requests.into_iter(), deliver);
        self.given_up.fetch_or(outcome.is_err(), Ordering::Relaxed);
        outcome
    }

    /// The reply to a request, if the ledger has it.
    ///
    /// # Errors
    /// The request cannot be addressed (an image is unreadable, no model is named), or the ledger cannot be read.
    pub fn cached(&self, request: &Request) -> Result<Option<Reply>> {
        let job = self.job(request.clone())?;
        Ok(self.look_up(&job)?.and_then(Result::ok))
    }

    /// Content address of a request.
    ///
    /// # Errors
    /// An image is unreadable, or no model is named.
    pub fn key(&self, request: &Request) -> Result<Key> {
        Ok(self.job(request.clone())?.prepared.key)
    }

    /// Name of the model that an endpoint asks, if the recipe names one.
    #[must_use]
    pub fn model(&self, endpoint: EndpointRole) -> Option<&str> {
        self.shared.lane(endpoint).endpoint.model.as_deref()
    }

    /// Server of an endpoint, as the ledger calls it.
    #[must_use]
    pub fn identity(&self, endpoint: EndpointRole) -> &str {
        &self.shared.lane(endpoint).endpoint.identity
    }

    /// Sums over the ledger, earlier runs included.
    ///
    /// # Errors
    /// The ledger cannot be read.
    pub fn totals(&self) -> Result<Totals> {
        self.shared.ledger.totals()
    }

    /// What a dry run would have sent so far.
    #[must_use]
    pub fn estimate(&self) -> Option<Estimate> {
        self.dry.as_ref().map(|e| e.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }

    fn job(&self, request: Request) -> Result<Job> {
        let endpoint = &self.shared.lane(request.endpoint).endpoint;
        let prepared = Prepared::new(request, endpoint, &self.shared.config)?;
        let (bounds, most_usd) = worst_case(&prepared, &self.shared.config)?;
        Ok(Job { prepared: Arc::new(prepared), bounds, most_usd })
    }

    fn look_up(&self, job: &Job) -> Result<Option<Result<Reply, Failure>>> {
        Ok(self.shared.ledger.reply(&job.prepared.key)?.and_then(|stored| reread(job, stored)))
    }

    /// Addresses requests and looks them up in the ledger, on all cores.
    fn look_up_all(&self, requests: Vec<Request>) -> Vec<Result<Ready>> {
        let known = |requests: &[Request]| -> Vec<Result<Ready>> {
            let jobs: Vec<Result<Job>> = requests.iter().map(|r| self.job(r.clone())).collect();
            let keys: Vec<Key> = jobs.iter().flatten().map(|job| job.prepared.key).collect();
            let mut stored = match self.shared.ledger.replies(&keys) {
                Ok(stored) => stored.into_iter(),
                // Whoever meets it stops, so that it may stand for all of them.
                Err(e) => return vec![Err(e)],
            };
            let mut ready = |job: Job| {
                let outcome = stored.next().flatten().and_then(|stored| reread(&job, stored));
                Ready { job, outcome }
            };
            jobs.into_iter().map(|job| job.map(&mut ready)).collect()
        };
        requests.par_chunks(CHUNK).flat_map_iter(known).collect()
    }
}

/// A request with its address, and what the ledger knows of it.
struct Ready {
    job: Job,
    outcome: Option<Result<Reply, Failure>>,
}

/// A row under way.
struct Row<T> {
    tag: T,
    outcome: Option<Result<Reply, Failure>>,
}

/// One call of [`Client::run_steps`].
struct Run<'a, T, N> {
    client: &'a Client,
    transport: Box<dyn Transport>,
    /// Rows that are not delivered, in order.
    rows: VecDeque<Row<T>>,
    /// Number of the first of them.
    first: u64,
    /// Rows that wait for the reply of a request under way.
    waiting: HashMap<Key, Vec<u64>>,
    /// Requests that wait for the budget.
    held: VecDeque<Job>,
    next: N,
    /// Jobs that the transport holds.
    under_way: usize,
    /// The run is ending: nothing new starts.
    draining: bool,
}

impl<T, N: FnMut(&mut T, &Result<Reply, Failure>) -> Option<Request>> Run<'_, T, N> {
    fn drive(
        &mut self,
        mut requests: impl Iterator<Item = Result<(T, Request)>>,
        mut deliver: impl FnMut(T, Result<Reply, Failure>) -> Result<()>,
    ) -> Result<()> {
        let outcome = self.work(&mut requests, &mut deliver);
        if outcome.is_err() {
            self.drain(&mut deliver);
        }
        outcome
    }

    fn work(
        &mut self,
        requests: &mut dyn Iterator<Item = Result<(T, Request)>>,
        deliver: &mut dyn FnMut(T, Result<Reply, Failure>) -> Result<()>,
    ) -> Result<()> {
        let mut more = true;
        loop {
            while more && self.held.is_empty() && self.rows.len() < self.transport.window() {
                self.check()?;
                let room = (self.transport.window() - self.rows.len()).min(AHEAD);
                let (tags, asked): (Vec<T>, Vec<Request>) =
                    (&mut *requests).take(room).collect::<Result<Vec<_>>>()?.into_iter().unzip();
                more = tags.len() == room;
                for (tag, ready) in tags.into_iter().zip(self.client.look_up_all(asked)) {
                    self.rows.push_back(Row { tag, outcome: None });
                    self.start(self.first + self.rows.len() as u64 - 1, ready)?;
                }
                self.deliver_ready(deliver)?;
            }
            self.deliver_ready(deliver)?;
            if self.rows.is_empty() && !more {
                return Ok(());
            }
            self.transport.flush()?;
            self.check()?;
            if let Some(done) = self.transport.next(GLANCE)? {
                self.end(done)?;
                while let Some(done) = self.transport.next(Duration::ZERO)? {
                    self.end(done)?;
                }
            }
            self.release()?;
        }
    }

    fn check(&self) -> Result<()> {
        if self.client.stop.load(Ordering::Relaxed) {
            return Err(Error::new(Kind::Interrupted, "interrupted").help("run the same command again; it continues"));
        }
        Ok(())
    }

    /// Starts a request of a row: from the ledger, together with an equal one, or through the transport.
    fn start(&mut self, row: u64, ready: Result<Ready>) -> Result<()> {
        let client = self.client;
        let Ready { job, outcome } = match ready {
            Ok(ready) => ready,
            Err(e) if e.kind() == Kind::Image => {
                return self.outcome(row, Err(Failure::Image { message: e.to_string() }));
            }
            Err(e) => return Err(e),
        };
        let key = job.prepared.key;
        if let Some(rows) = self.waiting.get_mut(&key) {
            rows.push(row);
            return Ok(());
        }
        if let Some(outcome) = outcome {
            if let Some(dry) = &client.dry {
                dry.lock().unwrap_or_else(PoisonError::into_inner).cached += 1;
            }
            return self.outcome(row, outcome);
        }
        if let Some(dry) = &client.dry {
            dry.lock().unwrap_or_else(PoisonError::into_inner).add(&job.prepared, &client.shared.config);
            return self.outcome(row, Err(Failure::DryRun));
        }
        let doubtful = client.shared.config.in_doubt == InDoubt::Fail && client.shared.ledger.in_doubt(&key)?;
        if doubtful {
            return self.outcome(row, Err(Failure::InDoubt));
        }
        self.waiting.insert(key, vec![row]);
        self.held.push_back(job);
        self.release()
    }

    /// Submits what the budget allows.
    fn release(&mut self) -> Result<()> {
        while let Some(job) = self.held.front() {
            let admission = self.client.shared.budget().admit(job.most_usd);
            if admission == Admission::Wait {
                return Ok(());
            }
            let Some(job) = self.held.pop_front() else { return Ok(()) };
            match admission {
                Admission::Refused(limit) => {
                    let failure = Failure::OverBudget { limit: limit.into() };
                    self.finish(&job.prepared.key, &Err(failure))?;
                }
                _ => {
                    self.under_way += 1;
                    self.transport.submit(job)?;
                }
            }
        }
        Ok(())
    }

    fn end(&mut self, done: Done) -> Result<()> {
        self.under_way -= 1;
        match done.ended {
            Ended::Outcome(outcome) => self.finish(&done.key, &outcome),
            Ended::Stopped => Ok(()),
            Ended::Fatal(e) => Err(e),
        }
    }

    /// Hands an outcome to every row that waits for it.
    fn finish(&mut self, key: &Key, outcome: &Result<Reply, Failure>) -> Result<()> {
        for row in self.waiting.remove(key).unwrap_or_default() {
            self.outcome(row, outcome.clone())?;
        }
        Ok(())
    }

    fn outcome(&mut self, row: u64, outcome: Result<Reply, Failure>) -> Result<()> {
        let Some(slot) = self.rows.get_mut((row - self.first) as usize) else { return Ok(()) };
        match (self.next)(&mut slot.tag, &outcome) {
            Some(_) if self.draining => Ok(()),
            Some(request) => {
                let job = self.client.job(request);
                let ready = job.and_then(|job| Ok(Ready { outcome: self.client.look_up(&job)?, job }));
                self.start(row, ready)
            }
            None => {
                slot.outcome = Some(outcome);
                Ok(())
            }
        }
    }

    fn deliver_ready(&mut self, deliver: &mut dyn FnMut(T, Result<Reply, Failure>) -> Result<()>) -> Result<()> {
        while self.rows.front().is_some_and(|r| r.outcome.is_some()) {
            let Some(Row { tag, outcome: Some(outcome) }) = self.rows.pop_front() else { break };
            self.first += 1;
            deliver(tag, outcome)?;
        }
        Ok(())
    }

    /// Ends a run that was given up: waits for what is under way, so that its replies are on file.
    fn drain(&mut self, deliver: &mut dyn FnMut(T, Result<Reply, Failure>) -> Result<()>) {
        self.draining = true;
        self.client.shared.stopping.send_replace(true);
        while self.under_way > 0 {
            match self.transport.next(GLANCE) {
                Ok(Some(done)) => {
                    // The reason to stop is already known; a second one adds nothing.
                    let _ = self.end(done);
                }
                Ok(None) => {}
                Err(_) => break,
            }
        }
        let _ = self.deliver_ready(deliver);
    }
}

/// One way for each endpoint; those on the same server share its limits.
fn lanes(
    config: &LlmConfig,
    ledger: &Ledger,
    seed: u64,
    mocks: &mut Vec<MockServer>,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<Vec<Lane>> {
    let mut lanes: Vec<Lane> = Vec::new();
    let mut started: Vec<(String, Url)> = Vec::new();
    for role in EndpointRole::ALL {
        let endpoint = Endpoint::resolve(role, config, env)?;
        let base = match &endpoint.place {
            Place::Url(url) => url.clone(),
            Place::Mock(rules) => match started.iter().find(|(name, _)| name == rules) {
                Some((_, url)) => url.clone(),
                None => {
                    let server = MockServer::start(MockConfig::rehearsal(rules, seed)?)?;
                    let url = server
                        .base_url()
                        .parse::<Url>()
                        .map_err(|e| Error::new(Kind::Run, "the rehearsal server has no address").source(e))?;
                    started.push((rules.clone(), url.clone()));
                    mocks.push(server);
                    url
                }
            },
        };
        let earlier = lanes.iter().find(|l| l.base == base);
        let server = earlier.map_or_else(|| Arc::new(server(config)), |l| Arc::clone(&l.server));
        let http = match earlier.filter(|l| l.endpoint.ca_file == endpoint.ca_file) {
            Some(lane) => lane.http.clone(),
            None => http_client(config, &base, endpoint.ca_file.as_deref())?,
        };
        let dialect = Dialect::decode(endpoint.structured, ledger.learnt(&endpoint.identity)?.as_deref());
        lanes.push(Lane { endpoint, base, http, server, dialect: Mutex::new(dialect) });
    }
    Ok(lanes)
}

fn server(config: &LlmConfig) -> Server {
    let wait = Duration::from_secs_f64(config.circuit_wait);
    Server {
        limiter: Limiter::new(config.requests_per_minute, config.tokens_per_minute),
        circuit: Circuit::new(config.circuit_failures, wait, config.circuit_probes),
    }
}

/// TLS through rustls with the authorities of this system and those of `ca_file`; no redirect is followed, because it would take the key along.
fn http_client(config: &LlmConfig, base: &Url, ca_file: Option<&Path>) -> Result<reqwest::Client> {
    // Another part of the program may have been first; any provider will do.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut builder = reqwest::Client::builder()
        .user_agent(concat!("medtune/", env!("CARGO_PKG_VERSION")))
        .redirect(reqwest::redirect::Policy::none())
        .connect_timeout(Duration::from_secs_f64(config.timeout.min(30.0)))
        .pool_max_idle_per_host(config.concurrency);
    if is_loopback(base) {
        builder = builder.no_proxy();
    }
    if base.scheme() == "http" {
        // No certificate is ever looked at, so a system without any is fine.
        builder = builder.tls_certs_only([]);
    }
    if let Some(path) = ca_file {
        builder = builder.tls_certs_merge(authorities(path)?);
    }
    builder.build().map_err(|e| {
        Error::new(Kind::Run, "cannot set up TLS")
            .help("install the certificates of your system (for example the package ca-certificates)")
            .source(e.without_url())
    })
}

/// Certificates of a PEM file.
fn authorities(path: &Path) -> Result<Vec<reqwest::Certificate>> {
    let bad = || {
        Error::new(Kind::Config, "a file with certificate authorities cannot be used")
            .at(path.display())
            .expected("one or more certificates in PEM form")
            .help("llm.generate.ca_file names it; `openssl x509 -in FILE -text` shows what it holds")
    };
    let bytes = std::fs::read(path).map_err(|e| bad().source(e))?;
    let found = reqwest::Certificate::from_pem_bundle(&bytes).map_err(|e| bad().source(e))?;
    if found.is_empty() { Err(bad().found("none")) } else { Ok(found) }
}

/// Sums over a ledger.
///
/// # Errors
/// The file is absent or no ledger.
pub fn ledger_totals(path: &Path) -> Result<Totals> {
    super::ledger::read_totals(path)
}

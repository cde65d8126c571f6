//! An MLflow server (REST API 2.0) that follows a training.
//!
//! A thread of its own sends what the log has, so that a slow or absent server never holds the training up; what it
//! missed is sent when it is back, or by the session that continues. `mlflow.json` in the run directory remembers the
//! run and the last step that arrived, so that a continued training is the same MLflow run and no value is sent twice.

use std::{
    collections::VecDeque,
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use reqwest::{
    Url,
    blocking::{Client, RequestBuilder},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::LogLine;
use crate::{
    error::{Error, Kind, Result},
    progress::Progress,
    run_dir::{read_json, write_atomic},
};

/// Name of the file that remembers the run.
pub const FILE: &str = "mlflow.json";

/// Most metrics, and most parameters, of one request.
const METRICS: usize = 1000;
const PARAMS: usize = 100;

/// Longest value of a parameter that every version of the server takes.
const PARAM_CHARS: usize = 500;

/// How long lines are gathered before they are sent.
const GATHER: Duration = Duration::from_secs(2);

/// Longest wait between two attempts to reach a server that failed.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// Which server, and how the run is called there.
#[derive(Debug, Clone)]
pub struct Target {
    /// Address, without credentials.
    pub uri: Url,
    /// Credentials; never written anywhere.
    pub credentials: Credentials,
    /// Name of the experiment; created if absent.
    pub experiment: String,
    /// Name of the run.
    pub run_name: String,
    /// Parameters of the run.
    pub params: Vec<(String, String)>,
}

/// How the program identifies itself to the server.
#[derive(Clone, Default)]
pub enum Credentials {
    /// It does not.
    #[default]
    None,
    /// Bearer token.
    Token(String),
    /// Name and password.
    Basic(String, String),
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if matches!(self, Self::None) { "None" } else { "(hidden)" })
    }
}

impl Credentials {
    /// Those of MLflow's own environment variables.
    #[must_use]
    pub fn from_env() -> Self {
        let var = |name| std::env::var(name).ok().filter(|v| !v.is_empty());
        match (var("MLFLOW_TRACKING_TOKEN"), var("MLFLOW_TRACKING_USERNAME")) {
            (Some(token), _) => Self::Token(token),
            (None, Some(name)) => Self::Basic(name, var("MLFLOW_TRACKING_PASSWORD").unwrap_or_default()),
            (None, None) => Self::None,
        }
    }
}

/// How a session of the training ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// All steps are done.
    Finished,
    /// The user interrupted.
    Killed,
    /// An error ended it.
    Failed,
}

/// `mlflow.json`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Known {
    tracking_uri: String,
    experiment_id: String,
    run_id: String,
    /// Parameters that have arrived.
    params: usize,
    /// The last line of the log that arrived: its step, and whether it was of an evaluation.
    arrived: Order,
}

/// Place of a line in the log. A session that goes back to an earlier step logs the same lines again.
type Order = (usize, bool);

fn order(line: &LogLine) -> Order {
    (line.step, line.eval_loss.is_some())
}

enum Message {
    Line(Box<LogLine>),
    End(End),
}

/// Hands lines to the thread that sends them.
#[derive(Debug)]
pub struct Tracker {
    send: Sender<Message>,
    thread: JoinHandle<()>,
}

impl Tracker {
    /// Starts to follow a training whose log so far is `log`; lines of it that have not arrived are sent. No request has
    /// been made when this returns.
    ///
    /// # Errors
    /// TLS cannot be set up.
    pub fn start(target: Target, dir: &Path, log: Vec<LogLine>, progress: Progress) -> Result<Self> {
        let client = client(&target.uri)?;
        let file = dir.join(FILE);
        let uri = target.uri.as_str().trim_end_matches('/').to_string();
        let known = read_json::<Known>(&file).ok().filter(|k| k.tracking_uri == uri);
        let mut worker = Worker {
            api: Api { client, uri, credentials: target.credentials.clone() },
            target,
            file,
            known,
            resumed: false,
            pending: VecDeque::new(),
            progress,
            failures: 0,
            not_before: Instant::now(),
        };
        log.into_iter().for_each(|line| worker.queue(line));
        let (send, receive) = channel();
        let thread = std::thread::spawn(move || worker.run(&receive));
        Ok(Self { send, thread })
    }

    /// Sends a line sooner or later.
    pub fn push(&self, line: &LogLine) {
        // The thread ends only after the end was sent.
        let _ = self.send.send(Message::Line(Box::new(line.clone())));
    }

    /// Sends what is left and how the session ended, and waits for that, but not for a server that does not answer.
    pub fn finish(self, end: End) {
        let _ = self.send.send(Message::End(end));
        let _ = self.thread.join();
    }
}

fn client(uri: &Url) -> Result<Client> {
    // Another part of the program may have been first; any provider will do.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut builder = Client::builder()
        .user_agent(concat!("medtune/", env!("CARGO_PKG_VERSION")))
        .redirect(reqwest::redirect::Policy::none())
        .connect_timeout(Duration::from_secs(5))
        .timeout(Duration::from_secs(10));
    if uri.host_str().is_some_and(|h| h == "localhost" || h == "127.0.0.1" || h == "[::1]") {
        builder = builder.no_proxy();
    }
    if uri.scheme() == "http" {
        // No certificate is ever looked at, so a system without any is fine.
        builder = builder.tls_certs_only([]);
    }
    builder.build().map_err(|e| Error::new(Kind::Run, "cannot set up TLS").at("log.mlflow").source(e.without_url()))
}

struct Worker {
    api: Api,
    target: Target,
    file: PathBuf,
    known: Option<Known>,
    /// Whether the server knows that this session goes on with the run.
    resumed: bool,
    pending: VecDeque<LogLine>,
    progress: Progress,
    failures: u32,
    not_before: Instant,
}

impl Worker {
    fn queue(&mut self, line: LogLine) {
        if self.known.as_ref().is_none_or(|k| order(&line) > k.arrived) {
            self.pending.push_back(line);
        }
    }

    fn run(mut self, receive: &Receiver<Message>) {
        self.attempt();
        loop {
            match receive.recv_timeout(GATHER) {
                Ok(Message::Line(line)) => {
                    self.queue(*line);
                    if self.pending.len() >= METRICS / 8 {
                        self.attempt();
                    }
                }
                Err(RecvTimeoutError::Timeout) => self.attempt(),
                Ok(Message::End(end)) => return self.end(end),
                Err(RecvTimeoutError::Disconnected) => return self.end(End::Failed),
            }
        }
    }

    /// Sends what is pending, unless the server failed a moment ago.
    fn attempt(&mut self) {
        let nothing = self.pending.is_empty() && self.resumed;
        if nothing || Instant::now() < self.not_before {
            return;
        }
        match self.deliver() {
            Ok(()) if self.failures > 0 => {
                self.failures = 0;
                self.progress.say("MLflow: the server answers again; nothing was lost");
            }
            Ok(()) => {}
            Err(e) => self.failed(&e),
        }
    }

    fn failed(&mut self, error: &Error) {
        if self.failures == 0 {
            self.progress.say(&format!("MLflow: {error}; training goes on, and what was missed is sent later"));
        }
        self.failures += 1;
        self.not_before = Instant::now() + (GATHER * 2u32.saturating_pow(self.failures)).min(LONGEST_WAIT);
    }

    fn deliver(&mut self) -> Result<()> {
        let mut known = self.continued()?;
        while !self.pending.is_empty() {
            let (mut metrics, mut lines) = (Vec::new(), 0);
            let mut last = known.arrived;
            for line in &self.pending {
                let new = metrics_of(line);
                if lines > 0 && metrics.len() + new.len() > METRICS {
                    break;
                }
                metrics.extend(new);
                lines += 1;
                last = order(line);
            }
            self.api.post("runs/log-batch", &json!({ "run_id": known.run_id, "metrics": metrics }))?;
            self.pending.drain(..lines);
            known.arrived = last;
            self.remember(&known)?;
        }
        Ok(())
    }

    /// The run this training is, which the server knows to be running.
    fn continued(&mut self) -> Result<Known> {
        if let Some(known) = self.known.clone() {
            if self.resumed {
                return Ok(known);
            }
            let running = json!({ "run_id": known.run_id, "status": "RUNNING" });
            match self.api.post("runs/update", &running) {
                Ok(_) => return self.parameters(known),
                Err(e) if e.reason() == ABSENT => {
                    self.progress.say(&format!("MLflow: run {} is gone; a new one begins here", known.run_id));
                }
                Err(e) => return Err(e),
            }
        }
        let known = self.create()?;
        // Before anything else can fail: a run that exists is never created again.
        self.remember(&known)?;
        self.parameters(known)
    }

    /// Sends the parameters that are missing.
    fn parameters(&mut self, mut known: Known) -> Result<Known> {
        while known.params < self.target.params.len() {
            let end = (known.params + PARAMS).min(self.target.params.len());
            let part = self.target.params[known.params..end].iter().map(|(key, value)| {
                let value: String = value.chars().take(PARAM_CHARS).collect();
                json!({ "key": key, "value": value })
            });
            let part: Vec<Value> = part.collect();
            self.api.post("runs/log-batch", &json!({ "run_id": known.run_id, "params": part }))?;
            known.params = end;
            self.remember(&known)?;
        }
        self.resumed = true;
        Ok(known)
    }

    fn create(&self) -> Result<Known> {
        let experiment_id = self.api.experiment(&self.target.experiment)?;
        let tags = [
            ("mlflow.runName", self.target.run_name.as_str()),
            ("mlflow.source.name", "medtune"),
            ("mlflow.source.type", "LOCAL"),
            ("medtune.version", env!("CARGO_PKG_VERSION")),
        ];
        let made = self.api.post(
            "runs/create",
            &json!({
                "experiment_id": experiment_id,
                "run_name": self.target.run_name,
                "start_time": now(),
                "tags": tags.map(|(key, value)| json!({ "key": key, "value": value })),
            }),
        )?;
        let run_id = text(&made, "/run/info/run_id")?;
        Ok(Known { tracking_uri: self.api.uri.clone(), experiment_id, run_id, params: 0, arrived: (0, false) })
    }

    fn remember(&mut self, known: &Known) -> Result<()> {
        let bytes = crate::run_dir::json_file(known)?;
        write_atomic(&self.file, &bytes)?;
        self.known = Some(known.clone());
        Ok(())
    }

    fn end(&mut self, end: End) {
        self.not_before = Instant::now();
        let outcome = self.deliver().and_then(|()| {
            let status = match end {
                End::Finished => "FINISHED",
                End::Killed => "KILLED",
                End::Failed => "FAILED",
            };
            let run = self.known.as_ref().map(|k| k.run_id.as_str());
            self.api.post("runs/update", &json!({ "run_id": run, "status": status, "end_time": now() }))
        });
        if let Err(e) = outcome {
            let left = self.pending.len();
            self.progress.say(&format!(
                "MLflow: {e}; {left} lines of the log did not arrive, log.jsonl has them{}",
                if end == End::Finished { "" } else { ", and the next session sends them" }
            ));
        }
    }
}

/// Reason of an error: the server does not know the thing.
const ABSENT: &str = "mlflow_absent";

struct Api {
    client: Client,
    uri: String,
    credentials: Credentials,
}

impl Api {
    fn experiment(&self, name: &str) -> Result<String> {
        let query = |mut url: Url| {
            url.query_pairs_mut().append_pair("experiment_name", name);
            url
        };
        let url = Url::parse(&self.address("experiments/get-by-name")).map(query);
        let url = url.map_err(|e| Error::new(Kind::Config, "not an address").at("log.mlflow").source(e))?;
        match self.send(self.authorised(self.client.get(url))) {
            Ok(found) => text(&found, "/experiment/experiment_id"),
            Err(e) if e.reason() == ABSENT => {
                text(&self.post("experiments/create", &json!({ "name": name }))?, "/experiment_id")
            }
            Err(e) => Err(e),
        }
    }

    fn post(&self, verb: &str, body: &Value) -> Result<Value> {
        self.send(self.authorised(self.client.post(self.address(verb))).json(body))
    }

    fn address(&self, verb: &str) -> String {
        format!("{}/api/2.0/mlflow/{verb}", self.uri)
    }

    fn authorised(&self, request: RequestBuilder) -> RequestBuilder {
        match &self.credentials {
            Credentials::None => request,
            Credentials::Token(token) => request.bearer_auth(token),
            Credentials::Basic(name, password) => request.basic_auth(name, Some(password)),
        }
    }

    fn send(&self, request: RequestBuilder) -> Result<Value> {
        let failed = |what: &str| Error::new(Kind::Run, what).at(&self.uri);
        let reply = request.send().map_err(|e| failed("the server cannot be reached").source(e.without_url()))?;
        let status = reply.status();
        let body: Value = reply.json().unwrap_or_default();
        if status.is_success() {
            return Ok(body);
        }
        let said = body["message"].as_str().unwrap_or_default().chars().take(200).collect::<String>();
        let error = failed("the server refuses").found(format!("{} {said}", status.as_u16()).trim());
        let absent = status.as_u16() == 404 || body["error_code"] == "RESOURCE_DOES_NOT_EXIST";
        Err(if absent { error.code(ABSENT) } else { error })
    }
}

fn text(value: &Value, pointer: &str) -> Result<String> {
    let found = value.pointer(pointer).and_then(Value::as_str).filter(|s| !s.is_empty());
    found.map(String::from).ok_or_else(|| {
        Error::new(Kind::Run, "the server's reply is not MLflow's")
            .expected(pointer)
            .found(value.to_string().chars().take(80).collect::<String>())
    })
}

fn metrics_of(line: &LogLine) -> Vec<Value> {
    let timestamp = now();
    let metric =
        |(key, value): (String, f64)| json!({ "key": key, "value": value, "timestamp": timestamp, "step": line.step });
    line.scalars().into_iter().filter(|(_, v)| v.is_finite()).map(metric).collect()
}

/// Milliseconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

/// Address of a server and the credentials in it, which are taken out.
///
/// # Errors
/// In words, why this is no address of a server.
pub fn address(uri: &str) -> std::result::Result<(Url, Credentials), String> {
    let mut url = Url::parse(uri).map_err(|_| "expected an address such as http://127.0.0.1:5000".to_string())?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(format!("expected an address that begins with http:// or https://, found {}:", url.scheme()));
    }
    let credentials = match (url.username(), url.password()) {
        ("", None) => Credentials::None,
        (name, password) => Credentials::Basic(name.to_string(), password.unwrap_or_default().to_string()),
    };
    // Neither fails for an address with a host, which both schemes require.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    Ok((url, credentials))
}

impl Target {
    /// The server that the recipe or else MLFLOW_TRACKING_URI names; none if neither does.
    ///
    /// # Errors
    /// The recipe's address is none.
    pub fn of(
        config: &super::LogConfig,
        run_name: &str,
        params: Vec<(String, String)>,
        progress: Progress,
    ) -> Result<Option<Self>> {
        let configured = config.mlflow.clone();
        let from_env = configured.is_none();
        let Some(uri) = configured.or_else(|| std::env::var("MLFLOW_TRACKING_URI").ok().filter(|v| !v.is_empty()))
        else {
            return Ok(None);
        };
        let (uri, within) = match address(&uri) {
            Ok(found) => found,
            Err(problem) if from_env => {
                progress.say(&format!("MLFLOW_TRACKING_URI is not used: {problem}"));
                return Ok(None);
            }
            Err(problem) => return Err(Error::new(Kind::Config, problem).at("log.mlflow")),
        };
        let credentials = match Credentials::from_env() {
            Credentials::None => within,
            found => found,
        };
        let run_name = config.mlflow_run_name.clone().unwrap_or_else(|| run_name.to_string());
        Ok(Some(Self { uri, credentials, experiment: config.mlflow_experiment.clone(), run_name, params }))
    }
}

//! A training that a tracking server follows: over a real socket, with faults, and across sessions.

use std::{
    path::Path,
    sync::{Arc, Mutex},
};

use axum::{
    Json, Router,
    extract::{Query, State},
    http::{HeaderMap, StatusCode},
    routing::{get, post},
};
use medtune::{
    Kind,
    progress::Progress,
    train::{
        TrainConfig,
        log::{
            self, LogConfig, LogLine, Targets,
            mlflow::{Credentials, Target, address},
        },
    },
};
use serde_json::{Value, json};

use super::training::{Toy, config, quiet, run_logged};

/// What the server has seen.
#[derive(Debug, Default)]
struct Seen {
    /// Verb and body of every request, in order.
    requests: Vec<(String, Value)>,
    tokens: Vec<Option<String>>,
    experiment: Option<String>,
    runs: usize,
    /// Whether every request fails.
    broken: bool,
}

type Shared = Arc<Mutex<Seen>>;

/// A tracking server on a free port of this machine, as far as its REST API is used.
struct Server {
    seen: Shared,
    uri: String,
    _runtime: tokio::runtime::Runtime,
}

type Reply = (StatusCode, Json<Value>);

fn note(seen: &Shared, verb: &str, headers: &HeaderMap, body: Value) -> Result<(), Reply> {
    let mut seen = seen.lock().unwrap();
    if seen.broken {
        return Err((StatusCode::INTERNAL_SERVER_ERROR, Json(json!({ "error_code": "INTERNAL_ERROR" }))));
    }
    seen.tokens.push(headers.get("authorization").map(|v| v.to_str().unwrap().to_string()));
    seen.requests.push((verb.to_string(), body));
    Ok(())
}

async fn experiment(
    State(seen): State<Shared>,
    headers: HeaderMap,
    Query(query): Query<std::collections::HashMap<String, String>>,
) -> Reply {
    if let Err(reply) = note(&seen, "get-by-name", &headers, json!(query)) {
        return reply;
    }
    match &seen.lock().unwrap().experiment {
        Some(name) if *name == query["experiment_name"] => {
            (StatusCode::OK, Json(json!({ "experiment": { "experiment_id": "7", "name": name } })))
        }
        _ => (StatusCode::NOT_FOUND, Json(json!({ "error_code": "RESOURCE_DOES_NOT_EXIST", "message": "none" }))),
    }
}

async fn create_experiment(State(seen): State<Shared>, headers: HeaderMap, Json(body): Json<Value>) -> Reply {
    let name = body["name"].as_str().unwrap().to_string();
    if let Err(reply) = note(&seen, "experiments/create", &headers, body) {
        return reply;
    }
    seen.lock().unwrap().experiment = Some(name);
    (StatusCode::OK, Json(json!({ "experiment_id": "7" })))
}

async fn create_run(State(seen): State<Shared>, headers: HeaderMap, Json(body): Json<Value>) -> Reply {
    if let Err(reply) = note(&seen, "runs/create", &headers, body) {
        return reply;
    }
    let mut seen = seen.lock().unwrap();
    seen.runs += 1;
    (StatusCode::OK, Json(json!({ "run": { "info": { "run_id": format!("run-{}", seen.runs) } } })))
}

async fn log_batch(State(seen): State<Shared>, headers: HeaderMap, Json(body): Json<Value>) -> Reply {
    let sizes = ["metrics", "params"].map(|key| body[key].as_array().map_or(0, Vec::len));
    if let Err(reply) = note(&seen, "runs/log-batch", &headers, body) {
        return reply;
    }
    // The limits of the real server.
    let status = if sizes[0] > 1000 || sizes[1] > 100 { StatusCode::BAD_REQUEST } else { StatusCode::OK };
    (status, Json(json!({})))
}

async fn update(State(seen): State<Shared>, headers: HeaderMap, Json(body): Json<Value>) -> Reply {
    match note(&seen, "runs/update", &headers, body) {
        Err(reply) => reply,
        Ok(()) => (StatusCode::OK, Json(json!({}))),
    }
}

impl Server {
    fn start() -> Self {
        let seen = Shared::default();
        let at = |verb: &str| format!("/api/2.0/mlflow/{verb}");
        let app = Router::new()
            .route(&at("experiments/get-by-name"), get(experiment))
            .route(&at("experiments/create"), post(create_experiment))
            .route(&at("runs/create"), post(create_run))
            .route(&at("runs/log-batch"), post(log_batch))
            .route(&at("runs/update"), post(update))
            .with_state(Arc::clone(&seen));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let uri = format!("http://{}", listener.local_addr().unwrap());
        runtime.spawn(async move { axum::serve(listener, app).await });
        Self { seen, uri, _runtime: runtime }
    }

    fn targets(&self) -> Targets {
        let (uri, _) = address(&self.uri).unwrap();
        let params = (0..130).map(|i| (format!("train.p{i}"), "x".repeat(600))).collect();
        let credentials = Credentials::Token("s3cret".into());
        let target = Target { uri, credentials, experiment: "toys".into(), run_name: "first".into(), params };
        Targets { tensorboard: false, mlflow: Some(target) }
    }

    /// Bodies of the requests of `verb`.
    fn bodies(&self, verb: &str) -> Vec<Value> {
        let seen = self.seen.lock().unwrap();
        seen.requests.iter().filter(|(v, _)| v == verb).map(|(_, body)| body.clone()).collect()
    }

    /// Step and value of every value of a metric that arrived, in order.
    fn metric(&self, key: &str) -> Vec<(u64, f64)> {
        let batches = self.bodies("runs/log-batch");
        let metrics = batches.iter().flat_map(|b| b["metrics"].as_array().cloned().unwrap_or_default());
        let own = metrics.filter(|m| m["key"] == key);
        own.map(|m| (m["step"].as_u64().unwrap(), m["value"].as_f64().unwrap())).collect()
    }
}

fn train(dir: &Path, server: &Server, config: &TrainConfig) {
    run_logged(dir, config, quiet(), server.targets(), Toy::default()).finished.unwrap();
}

fn logged(dir: &Path, value: fn(&LogLine) -> Option<f64>) -> Vec<(u64, f64)> {
    let lines: Vec<LogLine> = medtune::run_dir::read_jsonl(&dir.join(log::FILE)).unwrap();
    lines.iter().filter_map(|l| Some((l.step as u64, value(l)?))).collect()
}

#[test]
fn a_server_gets_what_the_log_has_once_and_in_one_run() {
    let server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    let ctx = quiet();
    ctx.stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let outcome = run_logged(dir.path(), &config(), ctx, server.targets(), Toy::default());
    assert_eq!(outcome.finished.unwrap_err().kind(), Kind::Interrupted);
    assert_eq!(server.bodies("runs/update").last().unwrap()["status"], "KILLED");
    train(dir.path(), &server, &config());
    assert_eq!(server.bodies("runs/create").len(), 1, "the continued training is the same run");
    assert_eq!(server.bodies("runs/create")[0]["experiment_id"], "7");
    let status: Vec<Value> = server.bodies("runs/update").iter().map(|b| b["status"].clone()).collect();
    assert_eq!(status, ["KILLED", "RUNNING", "FINISHED"]);
    assert_eq!(server.metric("loss"), logged(dir.path(), |l| l.loss));
    assert_eq!(server.metric("eval_loss"), logged(dir.path(), |l| l.eval_loss));
    let params: Vec<Value> = server
        .bodies("runs/log-batch")
        .iter()
        .flat_map(|b| b["params"].as_array().cloned().unwrap_or_default())
        .collect();
    assert_eq!(params.len(), 130);
    assert!(params.iter().all(|p| p["value"].as_str().unwrap().len() == 500));
    assert!(server.seen.lock().unwrap().tokens.iter().all(|t| t.as_deref() == Some("Bearer s3cret")));
    // The token is in no file.
    for file in medtune::run_dir::files_below(dir.path()).unwrap() {
        let bytes = std::fs::read(&file).unwrap();
        assert!(!bytes.windows(6).any(|w| w == b"s3cret"), "{}", file.display());
    }
}

#[test]
fn a_server_that_fails_stops_nothing_and_is_caught_up_with() {
    let server = Server::start();
    server.seen.lock().unwrap().broken = true;
    let dir = tempfile::tempdir().unwrap();
    let first = TrainConfig { max_steps: 6, ..config() };
    train(dir.path(), &server, &first);
    assert!(server.bodies("runs/create").is_empty());
    server.seen.lock().unwrap().broken = false;
    train(dir.path(), &server, &config());
    assert_eq!(server.metric("loss"), logged(dir.path(), |l| l.loss));
    // Nobody listens: the training goes on all the same.
    let nowhere = tempfile::tempdir().unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut targets = server.targets();
    targets.mlflow.as_mut().unwrap().uri = address(&format!("http://127.0.0.1:{port}")).unwrap().0;
    run_logged(nowhere.path(), &first, quiet(), targets, Toy::default()).finished.unwrap();
}

#[test]
fn without_a_configured_server_there_is_none() {
    let config = LogConfig::default();
    if std::env::var_os("MLFLOW_TRACKING_URI").is_none() {
        assert!(Target::of(&config, "run", Vec::new(), Progress::Silent).unwrap().is_none());
    }
    let named = LogConfig { mlflow: Some("http://127.0.0.1:1".into()), ..config };
    let target = Target::of(&named, "run", Vec::new(), Progress::Silent).unwrap().unwrap();
    assert_eq!((target.run_name.as_str(), target.experiment.as_str()), ("run", "medtune"));
    assert!(!format!("{:?}", Credentials::Token("s3cret".into())).contains("s3cret"));
}

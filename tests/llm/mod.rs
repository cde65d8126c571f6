//! Requests over real sockets: every fault of a server, kills, limits, batches, secrets. The server is
//! `medtune::llm::mock`, in this process or in another.

mod azure;
mod batch;
mod faults;
mod kill;
mod limits;
mod secrets;
mod tls;

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, atomic::AtomicBool},
};

use medtune::{
    Result,
    llm::{
        Client, ClientOptions, EndpointRole, Failure, LlmConfig, Message, Reply, ReplySchema, Request, Speaker, Totals,
        mock::{Asked, MockConfig, MockServer, Rules, Said, Stats},
    },
};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

/// Answers by the words alone, whether the schema was sent or not.
struct Echo;

impl Rules for Echo {
    fn name(&self) -> &'static str {
        "echo"
    }

    fn about(&self) -> &'static str {
        "Says the question again, with its length."
    }

    fn answer(&self, asked: &Asked, _draw: &mut ChaCha8Rng) -> Said {
        Said::text(json!({ "question": asked.last(), "length": asked.last().len() }).to_string())
    }
}

/// A server on a free port, after `change`.
pub(crate) fn server(change: impl FnOnce(&mut MockConfig)) -> MockServer {
    let mut config = MockConfig { rules: &Echo, ..MockConfig::rehearsal("", 7).unwrap() };
    change(&mut config);
    MockServer::start(config).unwrap()
}

/// A recipe section for a server, with short waits.
pub(crate) fn config(base_url: &str) -> LlmConfig {
    let mut config = LlmConfig { concurrency: 16, backoff: 0.002, timeout: 10.0, ..LlmConfig::default() };
    config.generate.base_url = Some(base_url.into());
    config.generate.model = Some("test-model".into());
    config
}

pub(crate) fn open(config: &LlmConfig, dir: &Path) -> Client {
    open_with(config, dir, &[])
}

/// A client whose environment is `env` alone.
pub(crate) fn open_with(config: &LlmConfig, dir: &Path, env: &[(&str, &str)]) -> Client {
    let look = |name: &str| env.iter().find(|(k, _)| *k == name).map(|(_, v)| v.to_string());
    Client::open_with(config, options(dir), &look).unwrap()
}

pub(crate) fn options(dir: &Path) -> ClientOptions {
    ClientOptions::new(dir.join("ledger.sqlite"), 1, &Arc::new(AtomicBool::new(false)))
}

fn question(row: usize) -> String {
    format!("Is there a nodule of {row} mm in the left lung?")
}

/// The request of a row.
pub(crate) fn request(row: usize) -> Request {
    let schema = json!({
        "type": "object", "additionalProperties": false, "required": ["question", "length"],
        "properties": { "question": { "type": "string" }, "length": { "type": "integer" } },
    });
    Request {
        schema: Some(ReplySchema { name: "row".into(), schema: Arc::new(schema) }),
        ..Request::new(EndpointRole::Generate, vec![Message::text(Speaker::User, question(row))])
    }
}

/// Fresh replies that a row may ask for, the first included.
const ASKS: u32 = 4;

/// What a stage would make of an outcome: a row, or the name of a failure.
fn read(outcome: &Result<Reply, Failure>) -> std::result::Result<Value, String> {
    let reply = outcome.as_ref().map_err(|f| f.name().to_string())?;
    if reply.refusal.is_some() {
        return Err("refused".into());
    }
    let value: Value = serde_json::from_str(&reply.text).map_err(|_| "malformed".to_string())?;
    if value["question"].is_string() && value["length"].is_u64() { Ok(value) } else { Err("wrong_shape".into()) }
}

/// A finished job.
pub(crate) struct Outcome {
    /// A line for each row that succeeded, in order.
    pub(crate) rows: BTreeMap<usize, Value>,
    /// Names of failures with their rows.
    pub(crate) failures: BTreeMap<usize, String>,
    /// Requests that were asked for, fresh replies included.
    pub(crate) asked: u64,
}

/// Runs a job of `count` rows as a stage would: malformed replies are asked for again.
pub(crate) fn job(client: &Client, count: usize) -> Result<Outcome> {
    let mut outcome = Outcome { rows: BTreeMap::new(), failures: BTreeMap::new(), asked: 0 };
    let mut asked = 0;
    let mut expected = 0;
    client.run_steps(
        (0..count).map(|row| Ok(((row, 0u32), request(row)))),
        |(row, asks), outcome| {
            asked += 1;
            *asks += 1;
            let worth_it = match outcome {
                Ok(_) => read(outcome).is_err(),
                Err(failure) => matches!(failure, Failure::ContentFilter { .. }),
            };
            (worth_it && *asks < ASKS).then(|| Request { variant: *asks, ..request(*row) })
        },
        |(row, _), result| {
            assert_eq!(row, expected, "rows come in order");
            expected += 1;
            match read(&result) {
                Ok(value) => drop(outcome.rows.insert(row, value)),
                Err(name) => drop(outcome.failures.insert(row, name)),
            }
            Ok(())
        },
    )?;
    assert_eq!(outcome.rows.len() + outcome.failures.len(), count, "no row is lost");
    outcome.asked = asked;
    Ok(outcome)
}

/// What [`job`] gives without faults.
pub(crate) fn truth(count: usize) -> BTreeMap<usize, Value> {
    (0..count).map(|row| (row, json!({ "question": question(row), "length": question(row).len() }))).collect()
}

/// Fails unless every reply that was paid for is in the ledger once.
#[track_caller]
pub(crate) fn paid_once(stats: &Stats, totals: &Totals) {
    assert_eq!(stats.paid_twice, 0, "{stats:?}");
    assert_eq!(stats.paid, totals.replies, "{stats:?} {totals:?}");
}

/// Fails unless SQLite finds the file whole and its tables agree with each other.
#[track_caller]
pub(crate) fn consistent(ledger: &Path) {
    let connection = rusqlite::Connection::open(ledger).unwrap();
    let one = |sql: &str| connection.query_row(sql, [], |r| r.get::<_, String>(0)).unwrap();
    assert_eq!(one("PRAGMA integrity_check"), "ok");
    for (what, sql) in [
        (
            "a reply without its attempt",
            "SELECT count(*) FROM replies r LEFT JOIN attempts a ON a.id = r.attempt AND a.request = r.request AND a.state = 'answered' WHERE a.id IS NULL",
        ),
        (
            "an answered attempt without its reply",
            "SELECT count(*) FROM attempts a WHERE a.state = 'answered' AND NOT EXISTS (SELECT 1 FROM replies r WHERE r.request = a.request)",
        ),
        (
            "an attempt without its request",
            "SELECT count(*) FROM attempts a LEFT JOIN requests r ON r.id = a.request WHERE r.id IS NULL",
        ),
    ] {
        assert_eq!(connection.query_row(sql, [], |r| r.get::<_, i64>(0)).unwrap(), 0, "{what}");
    }
}

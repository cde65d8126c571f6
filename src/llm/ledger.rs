//! The ledger: every request, attempt and raw reply in one SQLite file, written before anything uses it.
//!
//! One thread writes and puts everything that waits into one transaction, so that the file keeps up with thousands of
//! requests a second. An attempt is recorded before it is sent and closed when its fate is known; what a killed process
//! left open is `in_doubt`: the server may have been paid. Write-ahead logging keeps the file whole whenever the
//! process dies.

use std::{
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicI64, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::JoinHandle,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rusqlite::{Connection, OptionalExtension, Transaction, params};
use serde::Serialize;
use tokio::sync::oneshot;

use super::{reply::Usage, request::Key};
use crate::error::{Error, Kind, Result};

/// Layout of the file; another one is refused.
const VERSION: i64 = 1;

const SCHEMA: &str = "
CREATE TABLE requests (
    id INTEGER PRIMARY KEY,
    key BLOB NOT NULL UNIQUE,          -- SHA-256 of body
    role TEXT NOT NULL,                -- generate, qc, judge
    endpoint TEXT NOT NULL,
    model TEXT NOT NULL,
    body TEXT NOT NULL                 -- canonical request, images by content
);
CREATE TABLE attempts (
    id INTEGER PRIMARY KEY,
    request INTEGER NOT NULL REFERENCES requests(id),
    state TEXT NOT NULL,               -- sent, answered, failed, in_doubt
    started_ms INTEGER NOT NULL,       -- since 1970
    ended_ms INTEGER,
    reserved_usd REAL NOT NULL,        -- most it can cost
    status INTEGER,                    -- HTTP
    error TEXT,
    batch TEXT                         -- id of the batch it travelled in
);
CREATE INDEX attempts_open ON attempts(request, state) WHERE state IN ('sent', 'in_doubt');
CREATE TABLE replies (
    request INTEGER PRIMARY KEY REFERENCES requests(id),
    attempt INTEGER NOT NULL REFERENCES attempts(id),
    raw TEXT NOT NULL,                 -- body of the HTTP reply
    prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    usage_estimated INTEGER NOT NULL,  -- 1 where the server's count was absent or impossible
    usd REAL NOT NULL,
    latency_ms INTEGER NOT NULL,
    model TEXT,                        -- as the server names it
    fingerprint TEXT,
    finish_reason TEXT
);
-- What is summed up whenever the file is opened, without the replies themselves.
CREATE INDEX replies_sums ON replies(usage_estimated, prompt_tokens, completion_tokens, usd);
CREATE TABLE dialects (endpoint TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE batches (
    tag TEXT PRIMARY KEY,              -- ours; the server's metadata has it
    endpoint TEXT NOT NULL,
    batch TEXT,                        -- the server's id; none until it confirmed
    state TEXT NOT NULL                -- creating, running, collected, failed
);
";

/// What is known of a request before it is sent.
#[derive(Debug)]
pub(super) struct NewAttempt {
    pub(super) key: Key,
    pub(super) role: &'static str,
    pub(super) endpoint: String,
    pub(super) model: String,
    pub(super) body: Vec<u8>,
    pub(super) reserved_usd: f64,
    pub(super) batch: Option<String>,
}

/// A raw reply with what was read from it.
#[derive(Debug)]
pub(super) struct NewReply {
    pub(super) key: Key,
    pub(super) raw: String,
    pub(super) usage: Usage,
    pub(super) usd: f64,
    pub(super) latency_ms: u64,
    pub(super) model: Option<String>,
    pub(super) fingerprint: Option<String>,
    pub(super) finish_reason: Option<String>,
}

/// How an attempt without a reply ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// Certainly unpaid.
    Failed,
    /// Perhaps paid.
    InDoubt,
}

/// A raw reply as it lies in the file.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Stored {
    pub(super) raw: String,
    pub(super) usd: f64,
    pub(super) latency_ms: u64,
}

/// A request that travels in a batch.
#[derive(Debug)]
pub(super) struct BatchItem {
    pub(super) attempt: i64,
    pub(super) key: Key,
    pub(super) model: String,
    /// Canonical form.
    pub(super) body: String,
}

/// Sums over the whole file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Totals {
    /// Different requests that were sent.
    pub requests: u64,
    /// Replies.
    pub replies: u64,
    /// Attempts, replies included.
    pub attempts: u64,
    /// Attempts that certainly failed unpaid.
    pub failed: u64,
    /// Attempts whose fate is unknown.
    pub in_doubt: u64,
    /// Tokens of all prompts that were answered.
    pub prompt_tokens: u64,
    /// Tokens of all replies.
    pub completion_tokens: u64,
    /// Replies whose token count the server left out or got impossibly wrong.
    pub usage_estimated: u64,
    /// Cost of all replies in US dollars.
    pub usd: f64,
    /// Most that attempts in doubt may have cost besides.
    pub usd_in_doubt: f64,
}

type Ack = oneshot::Sender<Result<()>>;

enum Command {
    Send {
        id: i64,
        attempt: Box<NewAttempt>,
        ack: Ack,
    },
    Reply {
        id: i64,
        reply: Box<NewReply>,
        ack: Ack,
    },
    End {
        id: i64,
        end: End,
        status: Option<u16>,
        error: String,
    },
    Dialect {
        endpoint: String,
        value: String,
    },
    Batch {
        tag: String,
        endpoint: String,
        batch: Option<String>,
        state: &'static str,
        ack: Ack,
    },
    /// Nothing; what came before is on file when it is answered.
    Flush {
        ack: Ack,
    },
}

/// An open ledger.
#[derive(Debug)]
pub(super) struct Ledger {
    path: PathBuf,
    commands: Option<SyncSender<Command>>,
    writer: Option<JoinHandle<()>>,
    /// One for each thread that looks replies up.
    readers: Vec<Mutex<Connection>>,
    next_attempt: AtomicI64,
}

/// Most commands in one transaction.
const GROUP: usize = 1024;

/// Most connections that look replies up.
const MAX_READERS: usize = 8;

/// Megabytes of pages that a connection keeps; the rest is up to the operating system.
const WRITER_CACHE: i64 = 32;
const READER_CACHE: i64 = 8;

impl Ledger {
    /// Opens or creates the file. Attempts that an earlier process left open become `in_doubt`.
    ///
    /// # Errors
    /// The file cannot be written or is no ledger.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let connection = connect(path, WRITER_CACHE)?;
        prepare(&connection, path)?;
        let next: i64 = connection
            .query_row("SELECT coalesce(max(id), 0) + 1 FROM attempts", [], |row| row.get(0))
            .map_err(|e| broken(path, e))?;
        let (commands, queue) = sync_channel(4 * GROUP);
        let at = path.to_path_buf();
        let writer = std::thread::Builder::new()
            .name("ledger".into())
            .spawn(move || write_all(connection, &queue, &at))
            .map_err(|e| Error::new(Kind::Run, "cannot start a thread").source(e))?;
        let threads = rayon::current_num_threads().clamp(1, MAX_READERS);
        let readers = std::iter::repeat_with(|| connect(path, READER_CACHE).map(Mutex::new)).take(threads);
        Ok(Self {
            path: path.to_path_buf(),
            commands: Some(commands),
            writer: Some(writer),
            readers: readers.collect::<Result<_>>()?,
            next_attempt: AtomicI64::new(next),
        })
    }

    /// Records that a request is about to be sent; returns the attempt's id once it is on file.
    pub(super) async fn sending(&self, attempt: NewAttempt) -> Result<i64> {
        let id = self.next_attempt.fetch_add(1, Ordering::Relaxed);
        self.ask(|ack| Command::Send { id, attempt: Box::new(attempt), ack }).await?;
        Ok(id)
    }

    /// Records a reply; returns once it is on file.
    pub(super) async fn replied(&self, id: i64, reply: NewReply) -> Result<()> {
        self.ask(|ack| Command::Reply { id, reply: Box::new(reply), ack }).await
    }

    /// Records how an attempt without a reply ended.
    pub(super) fn ended(&self, id: i64, end: End, status: Option<u16>, error: &str) {
        self.post(Command::End { id, end, status, error: error.to_string() });
    }

    /// Remembers what a server refused.
    pub(super) fn learn(&self, endpoint: &str, value: &str) {
        self.post(Command::Dialect { endpoint: endpoint.to_string(), value: value.to_string() });
    }

    /// Records the state of a batch; returns once it is on file.
    pub(super) async fn batch(
        &self,
        tag: &str,
        endpoint: &str,
        batch: Option<&str>,
        state: &'static str,
    ) -> Result<()> {
        let (tag, endpoint, batch) = (tag.to_string(), endpoint.to_string(), batch.map(str::to_string));
        self.ask(|ack| Command::Batch { tag, endpoint, batch, state, ack }).await
    }

    async fn ask(&self, command: impl FnOnce(Ack) -> Command) -> Result<()> {
        let (ack, answer) = oneshot::channel();
        self.post(command(ack));
        answer.await.unwrap_or_else(|_| Err(ended(&self.path)))
    }

    fn post(&self, command: Command) {
        // A writer that is gone shows itself to the next caller that waits for an answer.
        if let Some(commands) = &self.commands {
            let _ = commands.send(command);
        }
    }

    /// The reply to a request, if there is one.
    pub(super) fn reply(&self, key: &Key) -> Result<Option<Stored>> {
        Ok(self.replies(std::slice::from_ref(key))?.pop().flatten())
    }

    /// The replies to several requests, in their order: looking up many at once takes the file's locks once.
    pub(super) fn replies(&self, keys: &[Key]) -> Result<Vec<Option<Stored>>> {
        self.read(|c| {
            let transaction = c.unchecked_transaction()?;
            let mut statement = transaction.prepare_cached(
                "SELECT raw, usd, latency_ms FROM replies WHERE request = (SELECT id FROM requests WHERE key = ?1)",
            )?;
            let row = |r: &rusqlite::Row<'_>| {
                Ok(Stored { raw: r.get(0)?, usd: r.get(1)?, latency_ms: r.get::<_, i64>(2)? as u64 })
            };
            keys.iter().map(|key| statement.query_row([&key.0[..]], row).optional()).collect()
        })
    }

    /// Whether an attempt at a request may have been paid for without a reply.
    pub(super) fn in_doubt(&self, key: &Key) -> Result<bool> {
        self.read(|c| {
            let mut statement = c.prepare_cached(
                "SELECT 1 FROM attempts WHERE state = 'in_doubt' AND request = (SELECT id FROM requests WHERE key = ?1)",
            )?;
            statement.exists([&key.0[..]])
        })
    }

    /// What was learnt about a server.
    pub(super) fn learnt(&self, endpoint: &str) -> Result<Option<String>> {
        self.read(|c| {
            c.query_row("SELECT value FROM dialects WHERE endpoint = ?1", [endpoint], |r| r.get(0)).optional()
        })
    }

    /// Batches that were not collected: tag and the server's id.
    pub(super) fn open_batches(&self, endpoint: &str) -> Result<Vec<(String, Option<String>)>> {
        self.read(|c| {
            let sql = "SELECT tag, batch FROM batches WHERE endpoint = ?1 AND state IN ('creating', 'running') ORDER BY rowid";
            let mut statement = c.prepare(sql)?;
            statement.query_map([endpoint], |r| Ok((r.get(0)?, r.get(1)?)))?.collect()
        })
    }

    /// Requests of a batch whose attempt is open.
    pub(super) fn batch_items(&self, tag: &str) -> Result<Vec<BatchItem>> {
        self.read(|c| {
            let sql = "SELECT a.id, r.key, r.model, r.body FROM attempts a JOIN requests r ON r.id = a.request \
                       WHERE a.batch = ?1 AND a.state IN ('sent', 'in_doubt') ORDER BY a.id";
            let mut statement = c.prepare(sql)?;
            let row = |r: &rusqlite::Row<'_>| {
                Ok(BatchItem { attempt: r.get(0)?, key: Key(r.get(1)?), model: r.get(2)?, body: r.get(3)? })
            };
            statement.query_map([tag], row)?.collect()
        })
    }

    /// Sums over the whole file, with everything that was recorded before.
    pub(super) fn totals(&self) -> Result<Totals> {
        let (ack, answer) = oneshot::channel();
        self.post(Command::Flush { ack });
        answer.blocking_recv().unwrap_or_else(|_| Err(ended(&self.path)))?;
        self.read(totals)
    }

    fn read<T>(&self, query: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T> {
        let reader = rayon::current_thread_index().unwrap_or_default() % self.readers.len();
        let connection = self.readers[reader].lock().unwrap_or_else(PoisonError::into_inner);
        query(&connection).map_err(|e| broken(&self.path, e))
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        self.commands = None;
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

/// Sums of a ledger that another process may be writing.
///
/// # Errors
/// The file is absent or no ledger.
pub(super) fn read_totals(path: &Path) -> Result<Totals> {
    let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY;
    Connection::open_with_flags(path, flags).and_then(|c| totals(&c)).map_err(|e| broken(path, e))
}

fn totals(c: &Connection) -> rusqlite::Result<Totals> {
    let attempts = "SELECT count(*), count(*) FILTER (WHERE state = 'failed'), \
                    count(*) FILTER (WHERE state IN ('in_doubt', 'sent')), \
                    total(reserved_usd) FILTER (WHERE state IN ('in_doubt', 'sent')) FROM attempts";
    let replies = "SELECT count(*), coalesce(sum(prompt_tokens), 0), coalesce(sum(completion_tokens), 0), \
                   coalesce(sum(usage_estimated), 0), total(usd) FROM replies";
    let whole = |r: &rusqlite::Row<'_>, i: usize| r.get::<_, i64>(i).map(|n| n as u64);
    let mut sums =
        Totals { requests: c.query_row("SELECT count(*) FROM requests", [], |r| whole(r, 0))?, ..Totals::default() };
    c.query_row(attempts, [], |r| {
        (sums.attempts, sums.failed, sums.in_doubt) = (whole(r, 0)?, whole(r, 1)?, whole(r, 2)?);
        sums.usd_in_doubt = r.get(3)?;
        Ok(())
    })?;
    c.query_row(replies, [], |r| {
        (sums.replies, sums.prompt_tokens, sums.completion_tokens) = (whole(r, 0)?, whole(r, 1)?, whole(r, 2)?);
        (sums.usage_estimated, sums.usd) = (whole(r, 3)?, r.get(4)?);
        Ok(())
    })?;
    Ok(sums)
}

fn connect(path: &Path, cache_mib: i64) -> Result<Connection> {
    let open = || -> rusqlite::Result<Connection> {
        let connection = Connection::open(path)?;
        connection.busy_timeout(Duration::from_secs(10))?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        // A commit survives the death of the process; a power cut may cost the last ones, never the file.
        connection.pragma_update(None, "synchronous", "NORMAL")?;
        connection.pragma_update(None, "cache_size", -1024 * cache_mib)?;
        connection.set_prepared_statement_cache_capacity(32);
        Ok(connection)
    };
    open().map_err(|e| broken(path, e))
}

fn prepare(connection: &Connection, path: &Path) -> Result<()> {
    let version: i64 =
        connection.pragma_query_value(None, "user_version", |r| r.get(0)).map_err(|e| broken(path, e))?;
    let create = format!("BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;");
    let start = match version {
        0 => create.as_str(),
        VERSION => {
            "CREATE INDEX IF NOT EXISTS replies_sums ON replies(usage_estimated, prompt_tokens, completion_tokens, usd); \
             UPDATE attempts SET state = 'in_doubt', error = 'the process ended' WHERE state = 'sent' AND batch IS NULL"
        }
        other => {
            return Err(Error::new(Kind::Run, "ledger is of another version")
                .at(path.display())
                .expected(VERSION)
                .found(other)
                .help("use the medtune that wrote it, or move the file away to start a new one"));
        }
    };
    connection.execute_batch(start).map_err(|e| broken(path, e))
}

fn write_all(mut connection: Connection, queue: &Receiver<Command>, path: &Path) {
    let mut lost: Option<String> = None;
    let mut acks = Vec::with_capacity(GROUP);
    while let Ok(first) = queue.recv() {
        let commands = std::iter::once(first).chain(queue.try_iter().take(GROUP - 1));
        let outcome = connection.transaction().and_then(|transaction| {
            for command in commands {
                acks.extend(apply(&transaction, command)?);
            }
            transaction.commit()
        });
        // What is lost once stays lost: nobody may build on a ledger with holes.
        if let Err(e) = outcome {
            lost.get_or_insert(e.to_string());
        }
        for ack in acks.drain(..) {
            let answer = match &lost {
                None => Ok(()),
                Some(e) => Err(unwritable(path).found(e)),
            };
            let _ = ack.send(answer);
        }
    }
}

fn apply(t: &Transaction<'_>, command: Command) -> rusqlite::Result<Option<Ack>> {
    match command {
        Command::Flush { ack } => Ok(Some(ack)),
        Command::Send { id, attempt: a, ack } => {
            t.prepare_cached(
                "INSERT OR IGNORE INTO requests(key, role, endpoint, model, body) VALUES (?1, ?2, ?3, ?4, ?5)",
            )?
            .execute(params![
                &a.key.0[..],
                a.role,
                a.endpoint,
                a.model,
                String::from_utf8_lossy(&a.body)
            ])?;
            t.prepare_cached(
                "INSERT INTO attempts(id, request, state, started_ms, reserved_usd, batch) \
                 VALUES (?1, (SELECT id FROM requests WHERE key = ?2), 'sent', ?3, ?4, ?5)",
            )?
            .execute(params![id, &a.key.0[..], now_ms(), a.reserved_usd, a.batch])?;
            Ok(Some(ack))
        }
        Command::Reply { id, reply: r, ack } => {
            t.prepare_cached(
                "INSERT OR IGNORE INTO replies SELECT id, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11 \
                 FROM requests WHERE key = ?1",
            )?
            .execute(params![
                &r.key.0[..],
                id,
                r.raw,
                r.usage.prompt_tokens as i64,
                r.usage.completion_tokens as i64,
                r.usage.estimated,
                r.usd,
                r.latency_ms as i64,
                r.model,
                r.fingerprint,
                r.finish_reason,
            ])?;
            t.prepare_cached("UPDATE attempts SET state = 'answered', ended_ms = ?2, status = 200 WHERE id = ?1")?
                .execute(params![id, now_ms()])?;
            Ok(Some(ack))
        }
        Command::End { id, end, status, error } => {
            let state = match end {
                End::Failed => "failed",
                End::InDoubt => "in_doubt",
            };
            t.prepare_cached("UPDATE attempts SET state = ?2, ended_ms = ?3, status = ?4, error = ?5 WHERE id = ?1")?
                .execute(params![id, state, now_ms(), status, error])?;
            Ok(None)
        }
        Command::Dialect { endpoint, value } => {
            t.execute("INSERT OR REPLACE INTO dialects VALUES (?1, ?2)", params![endpoint, value])?;
            Ok(None)
        }
        Command::Batch { tag, endpoint, batch, state, ack } => {
            t.execute(
                "INSERT INTO batches VALUES (?1, ?2, ?3, ?4) ON CONFLICT(tag) DO UPDATE \
                 SET batch = coalesce(excluded.batch, batch), state = excluded.state",
                params![tag, endpoint, batch, state],
            )?;
            Ok(Some(ack))
        }
    }
}

/// Milliseconds since 1970.
pub(super) fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as i64)
}

fn unwritable(path: &Path) -> Error {
    Error::new(Kind::Run, "cannot write the ledger")
        .at(path.display())
        .help("check the disk; then run the same command again, it continues and pays for nothing twice")
}

fn ended(path: &Path) -> Error {
    unwritable(path).found("its writer has ended")
}

fn broken(path: &Path, source: rusqlite::Error) -> Error {
    Error::new(Kind::Run, "cannot use the ledger")
        .at(path.display())
        .help("check the disk and the path; a file that is no ledger must be moved away")
        .source(source)
}

//! Looking up a request in a ledger by its content address, without a client: for traces.

use std::path::Path;

use rusqlite::{Connection, OpenFlags, OptionalExtension};
use serde_json::Value;

use super::Key;
use crate::error::{Error, Kind, Result};

/// A request and its raw reply, as they lie in a ledger.
#[derive(Debug, Clone, PartialEq)]
pub struct Recorded {
    /// Server, as the ledger calls it.
    pub endpoint: String,
    /// Model that was asked for.
    pub model: String,
    /// The request in its canonical form: images by content.
    pub body: Value,
    /// Body of the reply, if there is one.
    pub reply: Option<Value>,
    /// Its cost in US dollars.
    pub usd: f64,
    /// Time it took, in milliseconds.
    pub latency_ms: u64,
}

impl Recorded {
    /// The request with this address in the ledger at `path`; none if it was never made.
    ///
    /// # Errors
    /// The file cannot be read or is no ledger, or `key` is not 64 hexadecimal digits.
    pub fn find(path: &Path, key: &str) -> Result<Option<Self>> {
        let bad = |e: rusqlite::Error| {
            Error::new(Kind::Run, "cannot read the ledger of requests").at(path.display()).source(e)
        };
        let Some(key) = Key::parse(key) else {
            return Err(Error::new(Kind::Run, "this is no address of a request").at(key));
        };
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY;
        let connection = Connection::open_with_flags(path, flags).map_err(bad)?;
        let sql = "SELECT r.endpoint, r.model, r.body, p.raw, coalesce(p.usd, 0), coalesce(p.latency_ms, 0) \
                   FROM requests r LEFT JOIN replies p ON p.request = r.id WHERE r.key = ?1";
        let json = |text: String| serde_json::from_str(&text).unwrap_or(Value::String(text));
        let row = |r: &rusqlite::Row<'_>| {
            Ok(Self {
                endpoint: r.get(0)?,
                model: r.get(1)?,
                body: json(r.get(2)?),
                reply: r.get::<_, Option<String>>(3)?.map(json),
                usd: r.get(4)?,
                latency_ms: r.get::<_, i64>(5)?.unsigned_abs(),
            })
        };
        connection.query_row(sql, [&key.0[..]], row).optional().map_err(bad)
    }
}

//! Lines of a name, a tab and values separated by tabs, without a heading: ROCO's text files.

use std::{
    io::{BufRead, BufReader},
    path::Path,
};

use serde_json::{Value, json};

use super::{Record, Records, open_file, place, unreadable};
use crate::error::{Error, Kind, Result};

pub(super) fn check(path: &Path) -> Result<()> {
    match open(path)?.next() {
        None => Err(Error::new(Kind::Data, "the data file has no rows").at(path.display())),
        Some(_) => Ok(()),
    }
}

/// Records with `id`, the rest of the line as `text`, and its parts as the list `values`.
pub(super) fn open(path: &Path) -> Result<Records> {
    let lines = BufReader::new(open_file(path)?).split(b'\n').enumerate();
    let path = path.to_path_buf();
    Ok(Box::new(lines.filter_map(move |(row, line)| match line {
        Ok(line) if line.trim_ascii().is_empty() => None,
        Ok(line) => Some(record(&line, row, place(&path, row))),
        Err(e) => Some(Err(unreadable(&path, e))),
    })))
}

fn record(line: &[u8], row: usize, at: String) -> Result<Record> {
    let bad = |what: &str| Error::new(Kind::Data, what).code("malformed").at(&at);
    let line = std::str::from_utf8(line).map_err(|e| bad("a line is not UTF-8").source(e))?;
    let (id, rest) = line.split_once('\t').ok_or_else(|| bad("a line has no tab").expected("a name, a tab, values"))?;
    let values: Vec<&str> = rest.split('\t').map(str::trim).filter(|v| !v.is_empty()).collect();
    let fields = [("id", json!(id.trim())), ("text", json!(rest.trim())), ("values", json!(values))];
    let fields = fields.into_iter().map(|(key, value): (&str, Value)| (key.to_string(), value)).collect();
    Ok(Record { row, at, fields, ..Record::default() })
}

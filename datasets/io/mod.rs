//! Files of data sets as streams of records: JSON, JSON lines, CSV, TSV and parquet. Memory does not grow with the file.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value};

use super::{json_type, place};
use crate::error::{Error, Kind, Result};

mod delimited;
pub(super) mod driver;
mod json;
pub(super) mod layout;
mod lines;
mod parquet;

/// One row of a file.
#[derive(Debug, Clone, Default)]
pub(super) struct Record {
    /// Position in its file, from 0.
    pub(super) row: usize,
    /// File and row for messages.
    pub(super) at: String,
    /// Values by column or key. Cells of CSV and TSV files are text.
    pub(super) fields: Map<String, Value>,
    /// Images that the file itself holds, by column.
    pub(super) images: Vec<(String, Vec<u8>)>,
    /// Key above the row, where the file is an object of lists.
    pub(super) key: Option<String>,
}

impl Record {
    /// A text field, without blanks around; none where it is absent, empty or not text.
    pub(super) fn text(&self, key: &str) -> Option<&str> {
        self.fields.get(key)?.as_str().map(str::trim).filter(|text| !text.is_empty())
    }

    /// A field that is text, a number or a truth value, as text.
    pub(super) fn scalar(&self, key: &str) -> Option<String> {
        match self.fields.get(key)? {
            Value::String(text) => Some(text.trim().to_string()).filter(|t| !t.is_empty()),
            Value::Number(number) => Some(number.to_string()),
            Value::Bool(value) => Some(value.to_string()),
            _ => None,
        }
    }

    /// The first of several spellings of a text field.
    ///
    /// # Errors
    /// None of them is there, or it is empty.
    pub(super) fn need(&self, keys: &[&str]) -> Result<String> {
        if let Some(text) = keys.iter().find_map(|key| self.scalar(key)) {
            return Ok(text);
        }
        let held = keys.iter().find_map(|key| self.fields.get(*key));
        let found = match held {
            None => "no such field".to_string(),
            Some(Value::String(_)) => "empty text".to_string(),
            Some(other) => json_type(other).to_string(),
        };
        let code = if matches!(held, Some(Value::String(_))) { "empty" } else { "malformed" };
        Err(Error::new(Kind::Data, format!("a row has no `{}`", keys[0])).code(code).at(&self.at).found(found))
    }

    /// An error about this row.
    pub(super) fn error(&self, code: &'static str, what: &str) -> Error {
        Error::new(Kind::Data, what).code(code).at(&self.at)
    }
}

/// Rows of a file in order; a row that cannot be read is an error and does not end them.
pub(super) type Records = Box<dyn Iterator<Item = Result<Record>> + Send>;

/// Reads a file once to see that it is whole and of a form that can be read.
///
/// # Errors
/// It is missing, cut off, or of a form that cannot be read; the error says where and what to do.
pub(super) fn check(path: &Path) -> Result<()> {
    refuse(path)?;
    match Form::of(path) {
        Some(Form::Json) => json::check(path),
        Some(Form::Delimited(delimiter)) => delimited::check(path, delimiter),
        Some(Form::Parquet) => parquet::check(path),
        Some(Form::Lines) => lines::check(path),
        None => Err(unknown_form(path)),
    }
}

/// Opens a file whose form follows from its name.
///
/// # Errors
/// As [`check`].
pub(super) fn open(path: &Path) -> Result<Records> {
    match Form::of(path) {
        Some(Form::Json) => json::open(path),
        Some(Form::Delimited(delimiter)) => delimited::open(path, delimiter),
        Some(Form::Parquet) => parquet::open(path),
        Some(Form::Lines) => lines::open(path),
        None => Err(unknown_form(path)),
    }
}

/// Opens a file with commas and a heading, whatever its name.
///
/// # Errors
/// As [`check`].
pub(super) fn open_csv(path: &Path) -> Result<Records> {
    delimited::open(path, b',')
}

/// Forms of files.
enum Form {
    Json,
    Delimited(u8),
    Parquet,
    Lines,
}

impl Form {
    fn of(path: &Path) -> Option<Self> {
        match extension(path).as_str() {
            "json" | "jsonl" | "ndjson" => Some(Self::Json),
            "csv" => Some(Self::Delimited(b',')),
            "tsv" | "tab" => Some(Self::Delimited(b'\t')),
            "parquet" => Some(Self::Parquet),
            "txt" => Some(Self::Lines),
            _ => None,
        }
    }
}

fn extension(path: &Path) -> String {
    path.extension().unwrap_or_default().to_string_lossy().to_lowercase()
}

fn unknown_form(path: &Path) -> Error {
    let error = Error::new(Kind::Data, "a data file of a form that is not read")
        .at(path.display())
        .expected("json, jsonl, csv, tsv or parquet");
    match extension(path).as_str() {
        "pkl" | "pickle" => error.found("a Python pickle, which can run any code when it is opened").help(PICKLE),
        "zip" | "gz" | "tar" | "tgz" => error.found("an archive").help("unpack it and name the folder"),
        other => error.found(format!("`.{other}`")).help("`medtune explain table` says how rows of your own are read"),
    }
}

/// How a pickle of PathVQA becomes JSON.
pub(super) const PICKLE: &str = "convert it where you trust it: python3 -c \"import json,pickle,sys; \
     json.dump(pickle.load(open(sys.argv[1],'rb')), open(sys.argv[2],'w'))\" train_qa.pkl train_qa.json";

/// What is there in place of a data file: nothing, an empty file, a pointer of Git LFS.
fn refuse(path: &Path) -> Result<()> {
    let mut head = [0; 40];
    let mut file = open_file(path)?;
    let n = file.read(&mut head).map_err(|e| unreadable(path, e))?;
    if n == 0 {
        return Err(Error::new(Kind::Data, "the data file is empty").at(path.display()).help("fetch it again"));
    }
    if head[..n].starts_with(b"version https://git-lfs") {
        return Err(Error::new(Kind::Data, "the data file is a pointer of Git LFS, not the data")
            .at(path.display())
            .help("run `git lfs pull` in the repository it comes from, or download the file itself"));
    }
    Ok(())
}

fn open_file(path: &Path) -> Result<File> {
    File::open(path).map_err(|e| unreadable(path, e))
}

fn unreadable(path: &Path, source: std::io::Error) -> Error {
    Error::new(Kind::Data, "cannot read the data file").at(path.display()).help("check data.path").source(source)
}

/// A row as a record.
fn record(path: &Path, row: usize, value: Value, key: Option<String>) -> Result<Record> {
    let at = place(path, row);
    match value {
        Value::Object(fields) => Ok(Record { row, at, fields, images: Vec::new(), key }),
        other => Err(Error::new(Kind::Data, "a row is not an object")
            .code("malformed")
            .at(at)
            .expected("{...}")
            .found(json_type(&other))),
    }
}

/// Writes the bytes of an image under the name of their hash into `dir`, unless it is there.
///
/// # Errors
/// The bytes are no image, or the directory cannot be written.
pub(super) fn store_image(dir: &Path, bytes: &[u8], at: &str) -> Result<PathBuf> {
    let format = ::image::guess_format(bytes).map_err(|_| {
        let found = if bytes.is_empty() { "no bytes" } else { "something else" };
        Error::new(Kind::Image, "the image of a row is not an image").at(at).found(found)
    })?;
    let extension = format.extensions_str().first().copied().unwrap_or("img");
    let path = dir.join(format!("{}.{extension}", &crate::run_dir::sha256_bytes(bytes)[..32]));
    // A file of an interrupted run or another hand is compared and not trusted.
    if !std::fs::read(&path).is_ok_and(|old| old == bytes) {
        crate::run_dir::write_unsynced(&path, bytes)?;
    }
    Ok(path)
}

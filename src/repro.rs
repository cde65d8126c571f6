//! Whether two run directories hold the same: what each stage was made from, and what it made.
//!
//! Clocks and places differ between any two runs, so hashes here leave out what was timed, and the name of the run
//! directory.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use serde::Serialize;
use serde_json::Value;

use crate::{
    error::{Error, Result},
    manifest::{Hashes, Manifest},
    run_dir::{files_below, read_json, sha256, sha256_bytes},
    stage::{STAGES, Stage},
};

/// Keys of values that a clock decides.
const TIMED: [&str; 8] =
    ["seconds", "tokens_per_second", "latency_ms", "elapsed", "created", "generated_at", "sent_ms", "modified"];

/// Written where a run has no such file or input.
const ABSENT: &str = "absent";

/// One comparison.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Finding {
    /// Stage.
    pub stage: &'static str,
    /// What is compared: an input such as `program`, `device`, `[train]` or a data file, or a file that was made.
    pub name: String,
    /// Whether both runs have the same.
    pub same: bool,
    /// Beginning of the hash, or the value, of the first run.
    pub first: String,
    /// The same of the second.
    pub second: String,
}

impl Finding {
    fn new(stage: &Stage, name: &str, first: &str, second: &str) -> Self {
        // Versions and device names are short; of a hash the beginning will do.
        let short = |text: &str| text.chars().take(12).collect::<String>();
        Self {
            stage: stage.name,
            name: name.to_string(),
            same: first == second,
            first: short(first),
            second: short(second),
        }
    }
}

/// Records of a run directory.
///
/// # Errors
/// It has none, or they cannot be read.
pub fn records(run: &Path) -> Result<Manifest> {
    read_json(&run.join("MANIFEST.json"))
}

/// Compares every stage that the first run has completed.
///
/// # Errors
/// A file cannot be read.
pub fn compare(first: &Path, second: &Path) -> Result<Vec<Finding>> {
    let (a, b) = (records(first)?, records(second)?);
    let none = Hashes::new();
    let made: BTreeSet<&str> = STAGES.iter().flat_map(|s| s.writes).copied().collect();
    let mut findings = Vec::new();
    for stage in STAGES.iter().filter(|s| a.stages.contains_key(s.name)) {
        let inputs = |m: &'_ Manifest| m.stages.get(stage.name).map_or(none.clone(), |r| r.inputs.clone());
        let (one, other) = (inputs(&a), inputs(&b));
        let names: BTreeSet<&String> = one.keys().chain(other.keys()).collect();
        // What an earlier stage made is compared there; where images lie says nothing about what is in them.
        for name in names.into_iter().filter(|n| !made.contains(n.as_str()) && n.as_str() != "image files") {
            let value = |hashes: &Hashes| hashes.get(name).cloned().unwrap_or_else(|| ABSENT.into());
            findings.push(Finding::new(stage, name, &value(&one), &value(&other)));
        }
        for name in stage.writes.iter().filter(|name| amended_by(stage, name).is_none()) {
            let (one, other) = (content(first, name)?, content(second, name)?);
            if (one.as_str(), other.as_str()) != (ABSENT, ABSENT) {
                findings.push(Finding::new(stage, name, &one, &other));
            }
        }
    }
    Ok(findings)
}

/// A later stage that also writes `name`, and so decides what is in it.
fn amended_by(stage: &Stage, name: &str) -> Option<&'static str> {
    STAGES.iter().skip_while(|s| s.name != stage.name).skip(1).find(|s| s.writes.contains(&name)).map(|s| s.name)
}

/// Hash of a file or directory of a run without what was timed and without the name of the run.
fn content(run: &Path, name: &str) -> Result<String> {
    let path = run.join(name);
    if !path.exists() {
        return Ok(ABSENT.into());
    }
    let files = if path.is_dir() { files_below(&path)? } else { vec![path.clone()] };
    let mut all = String::new();
    for file in files {
        let within = file.strip_prefix(&path).unwrap_or(&file).display().to_string();
        all.push_str(&format!("{within}\0{}\0", file_content(run, &file)?));
    }
    Ok(sha256_bytes(all.as_bytes()))
}

fn file_content(run: &Path, file: &PathBuf) -> Result<String> {
    let lines = match file.extension().and_then(|e| e.to_str()) {
        Some("jsonl") => true,
        Some("json") => false,
        Some("html" | "md") => {
            let text = fs::read_to_string(file).map_err(|e| Error::io(file, e))?;
            return Ok(sha256_bytes(hashless(run, placeless(run, &text))?.as_bytes()));
        }
        _ => return sha256(file),
    };
    let text = fs::read_to_string(file).map_err(|e| Error::io(file, e))?;
    let text = hashless(run, placeless(run, &text))?;
    let timeless = |text: &str| match serde_json::from_str::<Value>(text) {
        Ok(value) => without_times(value).to_string(),
        Err(_) => text.to_string(),
    };
    let text = if lines { text.lines().map(|l| timeless(l) + "\n").collect() } else { timeless(&text) };
    Ok(sha256_bytes(text.as_bytes()))
}

fn placeless(run: &Path, text: &str) -> String {
    let mut text = text.to_string();
    // The longer form first: it may begin with the shorter one.
    for place in [fs::canonicalize(run).unwrap_or_default(), run.to_path_buf()] {
        let place = format!("{}/", place.display());
        if place.len() > 2 {
            text = text.replace(&place, "RUN/");
        }
    }
    text
}

/// `text` without the hashes that the report gives of the run's files: those files have places and times in them, and are
/// compared by themselves.
fn hashless(run: &Path, mut text: String) -> Result<String> {
    let report = run.join("report.json");
    if !report.exists() {
        return Ok(text);
    }
    let report: Value = read_json(&report)?;
    for pair in report["files"].as_array().into_iter().flatten() {
        if let (Some(name), Some(hash)) = (pair[0].as_str(), pair[1].as_str()) {
            text = text.replace(hash, name);
        }
    }
    Ok(text)
}

fn without_times(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let kept = map.into_iter().filter(|(key, _)| !TIMED.contains(&key.as_str()));
            Value::Object(kept.map(|(key, value)| (key, without_times(value))).collect())
        }
        Value::Array(all) => Value::Array(all.into_iter().map(without_times).collect()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_and_places_do_not_count_and_content_does() {
        let dir = tempfile::tempdir().unwrap();
        let write = |run: &str, name: &str, text: &str| {
            fs::create_dir_all(dir.path().join(run)).unwrap();
            let root = dir.path().join(run).display().to_string();
            fs::write(dir.path().join(run).join(name), text.replace("ROOT", &root)).unwrap();
        };
        let hash = |run: &str, name: &str| content(&dir.path().join(run), name).unwrap();
        for (run, seconds) in [("a", "1.5"), ("b", "2.5")] {
            write(run, "x.json", &format!(r#"{{"n": 1, "inner": [{{"seconds": {seconds}}}], "path": "ROOT/i.png"}}"#));
            write(run, "x.jsonl", &format!("{{\"step\": 1, \"tokens_per_second\": {seconds}}}\n"));
        }
        assert_eq!(hash("a", "x.json"), hash("b", "x.json"));
        assert_eq!(hash("a", "x.jsonl"), hash("b", "x.jsonl"));
        write("b", "x.json", r#"{"n": 2, "inner": [{"seconds": 1.5}], "path": "ROOT/i.png"}"#);
        assert_ne!(hash("a", "x.json"), hash("b", "x.json"));
        assert_eq!(hash("a", "nowhere"), ABSENT);
    }
}

//! Numbers with intervals, tables and samples: `report.json` and `report.html`.

use super::{Ctx, Summary, encode::RejectedRow, eval::Answer, judge::Verdict};
use crate::{
    error::{Error, Result},
    plan::Plan,
    run_dir::RunDir,
    sample::Sample,
    train::log::LogLine,
};

mod chart;
mod examples;
mod numbers;
mod page;
mod table;
mod words;

pub use examples::{Change, Example};
pub use numbers::{
    Baseline, CategoryRow, Counts, MetricRow, Planted, Quality, ReasonCount, Report, Training, Transitions, numbers,
};
pub use page::html;
pub use table::table;

/// Everything a report is made from.
#[derive(Debug, Clone, Default)]
pub struct Inputs {
    /// What was planned.
    pub plan: Plan,
    /// `kept.jsonl`.
    pub kept: Vec<Sample>,
    /// `rejected.jsonl`.
    pub rejected: Vec<RejectedRow>,
    /// `answers.jsonl`.
    pub answers: Vec<Answer>,
    /// `verdicts.jsonl`.
    pub verdicts: Vec<Verdict>,
    /// `log.jsonl`; empty when nothing was trained here.
    pub log: Vec<LogLine>,
    /// Signature of the judge.
    pub judge: serde_json::Value,
    /// Device the run used.
    pub device: String,
    /// Name and SHA-256 of the files the numbers depend on.
    pub files: Vec<(String, String)>,
}

/// Files whose hashes a report records, where they exist.
const HASHED: [&str; 8] = [
    "samples.jsonl",
    "kept.jsonl",
    "rejected.jsonl",
    "adapter/adapter_model.safetensors",
    "model/model.safetensors",
    "log.jsonl",
    "answers.jsonl",
    "verdicts.jsonl",
];

/// Writes the report of a judged run.
///
/// # Errors
/// A file is missing or does not belong to the others, or the directory cannot be written.
pub fn run(plan: &Plan, dir: &RunDir, ctx: &Ctx) -> Result<Summary> {
    let inputs = read(plan, dir, ctx)?;
    let report = numbers(&inputs)?;
    let page = html(&inputs, &report)?;
    dir.write_json("report.json", &report)?;
    dir.write("report.html", page.as_bytes())?;
    let mut summary = Summary::default();
    summary
        .line("rows answered", report.counts.rows)
        .line("answers scored", format!("{} of {}", report.counts.scored, report.counts.answers))
        .line("metrics", report.metrics.len())
        .line("report", dir.path("report.html").display());
    Ok(summary)
}

/// Reads what a report is made from.
///
/// # Errors
/// A file is missing or malformed.
pub fn read(plan: &Plan, dir: &RunDir, ctx: &Ctx) -> Result<Inputs> {
    let mut files = Vec::new();
    for name in HASHED {
        let path = dir.path(name);
        if path.exists() {
            files.push((name.to_string(), crate::run_dir::sha256(&path)?));
        }
    }
    let optional = |name: &str| dir.path(name).exists();
    Ok(Inputs {
        plan: plan.clone(),
        kept: dir.read_jsonl("kept.jsonl")?,
        rejected: if optional("rejected.jsonl") { dir.read_jsonl("rejected.jsonl")? } else { Vec::new() },
        answers: dir.read_jsonl("answers.jsonl")?,
        verdicts: dir.read_jsonl("verdicts.jsonl")?,
        log: if optional("log.jsonl") { dir.read_jsonl("log.jsonl")? } else { Vec::new() },
        judge: plan.make_judge()?.signature(),
        device: ctx.device_spec.to_string(),
        files,
    })
}

/// A rendering step failed; the message of the library is the source.
fn failed(what: &str, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::new(crate::error::Kind::Run, what).source(source)
}

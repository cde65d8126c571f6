//! Numbers with intervals, tables and samples: `report.json` and `report.html`.

use std::collections::HashMap;

use super::{
    Ctx, Summary,
    choices::{CHOICES, ChoiceAnswer},
    controls::ControlAnswer,
    encode::RejectedRow,
    eval::{Answer, CONTROLS, Which},
    judge::Verdict,
};
use crate::{
    error::{Error, Result},
    judge::{Judged, Outcome, Ruling, last_answer},
    metric::{
        choice::{CHOICE_RULES, ChoiceRule, prefix},
        text::{Pair, TEXT_METRICS, TextMetricOptions},
    },
    plan::Plan,
    run_dir::RunDir,
    sample::Sample,
    train::log::LogLine,
};

mod card;
pub(crate) mod chart;
mod examples;
mod looks;
mod numbers;
mod page;
pub mod published;
mod table;
pub(crate) mod tables;
pub(crate) mod words;

/// The style sheet of all pages.
pub(crate) const STYLE: &str = include_str!("style.css");

/// The script of the sample browser.
pub(crate) const BROWSER: &str = include_str!("browser.js");

/// Macros of the tables that several pages have.
pub(crate) const TABLES: &str = include_str!("tables.html");

pub use examples::{Change, Example};
pub use looks::{ControlOutcomes, ControlRow, Probes};
pub use numbers::{
    Baseline, CategoryRow, Counts, MetricRow, Planted, Quality, ReasonCount, Report, Strata, TextValues, Training,
    Transitions, numbers,
};
pub use page::html;
pub use table::table;
pub use tables::{OurColumn, OurRow};

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
    /// `controls.jsonl`.
    pub controls: Vec<ControlAnswer>,
    /// `choices.jsonl`.
    pub choices: Vec<ChoiceAnswer>,
    /// What the judge says of each control answer; empty where controls are not judged.
    pub control_outcomes: ControlOutcomes,
    /// Text metrics of the answered rows; [`texts`] computes them.
    pub texts: Vec<TextValues>,
    /// What training and test have in common, name and value.
    pub leak: Vec<(String, String)>,
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
const HASHED: [&str; 10] = [
    "samples.jsonl",
    "kept.jsonl",
    "rejected.jsonl",
    "adapter/adapter_model.safetensors",
    "model/model.safetensors",
    "log.jsonl",
    "answers.jsonl",
    "controls.jsonl",
    "choices.jsonl",
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
    card::write(dir, plan, &report)?;
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
    let judge = plan.make_judge()?;
    let mut inputs = Inputs {
        plan: plan.clone(),
        kept: dir.read_jsonl("kept.jsonl")?,
        rejected: if optional("rejected.jsonl") { dir.read_jsonl("rejected.jsonl")? } else { Vec::new() },
        answers: dir.read_jsonl("answers.jsonl")?,
        verdicts: dir.read_jsonl("verdicts.jsonl")?,
        log: if optional("log.jsonl") { dir.read_jsonl("log.jsonl")? } else { Vec::new() },
        controls: if optional(CONTROLS) { dir.read_jsonl(CONTROLS)? } else { Vec::new() },
        choices: if optional(CHOICES) { dir.read_jsonl(CHOICES)? } else { Vec::new() },
        judge: judge.signature(),
        device: ctx.device_spec.to_string(),
        leak: if optional("qc.json") { leak(&dir.read_json("qc.json")?) } else { Vec::new() },
        files,
        ..Inputs::default()
    };
    // Controls are not worth a language model's fee; judges by rule cost nothing.
    if !judge.asks() {
        inputs.control_outcomes = looks::judge_controls(&inputs.kept, &inputs.controls, |sample, answer| match judge
            .judge(Judged { sample, answer, anchor: None })?
        {
            Ruling::Settled(outcome) => Ok(outcome),
            Ruling::Ask(_) => Ok(Outcome::NoReference),
        })?;
    }
    inputs.texts = texts(&inputs, ctx)?;
    let chosen = choices(&inputs)?;
    inputs.texts.extend(chosen);
    Ok(inputs)
}

/// Text metrics of every answered row that has a reference; BERTScore where the plan names its encoder.
///
/// # Errors
/// Answers, verdicts and rows do not belong together, or a metric cannot be opened.
pub fn texts(inputs: &Inputs, ctx: &Ctx) -> Result<Vec<TextValues>> {
    let rows = numbers::join(inputs)?;
    let mut options = TextMetricOptions::new(ctx.device.clone());
    options.bertscore_model = inputs.plan.eval.bertscore_model.clone();
    let mut found = Vec::new();
    for def in TEXT_METRICS.iter().filter(|m| m.key != "bertscore" || options.bertscore_model.is_some()) {
        let metric = (def.open)(&options)?;
        let mut values = [Vec::new(), Vec::new()];
        for (which, column) in values.iter_mut().enumerate() {
            let reference = |i: usize| Some(last_answer(rows[i].sample)).filter(|r| !r.trim().is_empty());
            let with: Vec<usize> = (0..rows.len()).filter(|i| reference(*i).is_some()).collect();
            let pairs: Vec<Pair<'_>> = with
                .iter()
                .map(|i| Pair { answer: rows[*i].answers[which], reference: reference(*i).unwrap_or_default() })
                .collect();
            column.resize(rows.len(), None);
            for (i, value) in with.into_iter().zip(metric.score_pairs(&pairs)?) {
                column[i] = Some(value);
            }
        }
        found.push(TextValues {
            key: def.key.into(),
            name: def.name.into(),
            about: def.about.into(),
            signature: metric.signature(),
            values,
        });
    }
    Ok(found)
}

/// Every rule of multiple choice on the answered rows that have options, and likelihoods where they were computed; none
/// where no row has options.
///
/// # Errors
/// Answers, verdicts and rows do not belong together.
pub fn choices(inputs: &Inputs) -> Result<Vec<TextValues>> {
    let rows = numbers::join(inputs)?;
    let of = |rule: &ChoiceRule, which: usize| -> Vec<Option<f64>> {
        let value = |row: &numbers::Judged<'_>| {
            let right = row.sample.right_option()?;
            let choice = (rule.judge)(row.answers[which], &row.sample.options, right);
            Some(share(choice.correct))
        };
        rows.iter().map(value).collect()
    };
    let values = CHOICE_RULES.iter().map(|rule| TextValues {
        key: rule.key.into(),
        name: rule.name.into(),
        about: rule.about.into(),
        signature: rule.signature.into(),
        values: [of(rule, 0), of(rule, 1)],
    });
    let likely: HashMap<(Which, &str), bool> =
        inputs.choices.iter().map(|c| ((c.model, c.id.as_str()), c.correct)).collect();
    let by_likelihood =
        |row: &numbers::Judged<'_>, model: Which| Some(share(*likely.get(&(model, row.sample.id.as_str()))?));
    let likelihood = TextValues {
        key: prefix::KEY.into(),
        name: prefix::NAME.into(),
        about: prefix::ABOUT.into(),
        signature: prefix::SIGNATURE.into(),
        values: [Which::Base, Which::Tuned].map(|m| rows.iter().map(|r| by_likelihood(r, m)).collect()),
    };
    Ok(values.chain([likelihood]).filter(|v| v.values.iter().flatten().any(Option::is_some)).collect())
}

fn share(right: bool) -> f64 {
    f64::from(u8::from(right))
}

/// The numbers of the leak check in `qc.json`: counts as they are, lists by their length.
fn leak(qc: &serde_json::Value) -> Vec<(String, String)> {
    use serde_json::Value;
    let Some(Value::Object(fields)) = qc.get("leak") else { return Vec::new() };
    let shown = |value: &Value| match value {
        Value::Array(all) => Some(all.len().to_string()),
        Value::Number(n) => Some(n.to_string()),
        Value::Bool(b) => Some(if *b { "yes" } else { "no" }.into()),
        _ => None,
    };
    fields.iter().filter_map(|(name, value)| Some((name.replace('_', " "), shown(value)?))).collect()
}

/// A rendering step failed; the message of the library is the source.
pub(crate) fn failed(what: &str, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::new(crate::error::Kind::Run, what).source(source)
}

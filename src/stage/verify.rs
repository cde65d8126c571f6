//! The second pass of quality control: a language model that sees the annotation but not the image compares each pair
//! with it, says why, and decides. It finds contradictions; of what the annotation is silent on it can only say so.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Ctx,
    construct::{Asks, client, cost, over_budget},
    encode::RejectedRow,
};
use crate::{
    error::Result,
    llm::{Failure, Key, Mode, Reply},
    plan::Plan,
    recipe::Verifier,
    run_dir::{Lines, RunDir, stream_jsonl},
    sample::Sample,
};

pub mod parse;

/// `[qc.verify]` of a recipe: the check of constructed rows by the language model of `[llm.qc]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct VerifyConfig {
    /// Whether it is made, where the recipe has one.
    pub enabled: bool,
    /// Categories whose rows are kept when the annotation neither supports nor contradicts them; silence is what is to
    /// be expected of things that are not there.
    pub keep_unverifiable: Vec<String>,
    /// More requests for a row whose reply has no clear verdict.
    #[schemars(range(max = 10))]
    pub retries: u32,
}

impl Default for VerifyConfig {
    fn default() -> Self {
        Self { enabled: true, keep_unverifiable: vec!["nonexistent_object".into()], retries: 2 }
    }
}

/// What the check says of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Judgement {
    /// The annotation supports it.
    Consistent,
    /// The annotation contradicts a part of it.
    Partial,
    /// The annotation contradicts it.
    Contradicted,
    /// The annotation is silent.
    Unverifiable,
}

/// A judgement with its reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// The judgement.
    pub judgement: Judgement,
    /// Why.
    pub reason: String,
}

/// Key in `meta` of what the check said: judgement, reason and the address of the request.
pub const CHECK: &str = "qc";

/// Counts of the check.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct VerifyReport {
    /// Rows that were checked.
    pub rows: usize,
    /// Of these, dropped because the annotation contradicts them, in whole or in part: the paper's figure is 7.3 %.
    pub contradicted: usize,
    /// Dropped because the annotation neither supports nor contradicts them.
    pub unverifiable: usize,
    /// Dropped because no reply had a clear verdict.
    pub unparsed: usize,
    /// Dropped because there was no reply, or nothing to compare with.
    pub failed: usize,
    /// Rows that were asked about more than once.
    pub retried: usize,
    /// By task or hallucination category: rows checked, rows contradicted.
    pub categories: BTreeMap<String, (usize, usize)>,
    /// What the run directory has paid for so far, in words.
    pub cost: String,
}

impl VerifyReport {
    /// Share of rows that the annotation contradicts, 0 to 1, among those with a verdict.
    #[must_use]
    pub fn drop_rate(&self) -> f64 {
        let judged = self.rows - self.unparsed - self.failed;
        if judged == 0 { 0.0 } else { self.contradicted as f64 / judged as f64 }
    }

    fn count(&mut self, sample: &Sample, code: Option<&str>) {
        self.rows += 1;
        let category = sample.category.clone().unwrap_or_else(|| "none".into());
        let (rows, contradicted) = self.categories.entry(category).or_default();
        *rows += 1;
        match code {
            None => {}
            Some("qc_contradicted" | "qc_partial") => {
                *contradicted += 1;
                self.contradicted += 1;
            }
            Some("qc_unverifiable") => self.unverifiable += 1,
            Some("qc_unparsed") => self.unparsed += 1,
            Some(_) => self.failed += 1,
        }
    }

    /// Lines of a summary.
    #[must_use]
    pub fn lines(&self) -> Vec<(String, String)> {
        if self.rows == 0 {
            return Vec::new();
        }
        let line = |name: &str, value: String| (name.to_string(), value);
        vec![
            line("checked against the annotation", self.rows.to_string()),
            line("  contradicted", format!("{} ({:.1} %; paper: 7.3 %)", self.contradicted, 100.0 * self.drop_rate())),
            line("  unverifiable", self.unverifiable.to_string()),
            line("  without verdict", self.unparsed.to_string()),
            line("  without reply", self.failed.to_string()),
            line("cost so far", self.cost.clone()),
        ]
    }
}

/// What has been asked about a row so far.
struct Open {
    sample: Sample,
    attempts: u32,
    ended: Option<Ended>,
}

/// Checks rows; each comes back kept, with what was said in `meta.qc`, or rejected with a reason, in the order given.
/// Rows without polarity are no constructed instructions and pass.
///
/// # Errors
/// The server is down, the budget is spent, or the user interrupts; paid replies are kept for the next run.
pub fn verify(
    plan: &Plan,
    verifier: &dyn Verifier,
    samples: Vec<Sample>,
    model: &dyn Asks,
    report: &mut VerifyReport,
) -> Result<Vec<std::result::Result<Sample, Box<RejectedRow>>>> {
    let mut rows: Vec<Open> = samples.into_iter().map(|sample| Open { sample, attempts: 0, ended: None }).collect();
    for attempt in 0..=plan.qc.verify.retries {
        let mut asked = Vec::new();
        let mut requests = Vec::new();
        for (i, row) in rows.iter_mut().enumerate() {
            if row.sample.polarity.is_none() || row.ended.as_ref().is_some_and(|e| !is_open(e)) {
                continue;
            }
            match verifier.request(plan, &row.sample) {
                Ok(mut request) => {
                    request.variant = attempt;
                    requests.push(request);
                    asked.push(i);
                }
                Err(e) => row.ended = Some(Err((format!("qc_{}", e.reason()), e.to_string()))),
            }
        }
        if requests.is_empty() {
            break;
        }
        model.ask(requests, &mut |i, outcome| {
            let row = &mut rows[asked[i]];
            row.attempts = attempt + 1;
            row.ended = Some(read(verifier, outcome)?);
            Ok(())
        })?;
    }
    Ok(rows.into_iter().map(|row| close(plan, row, report)).collect())
}

/// Checks `kept.jsonl`, of `count` rows, with the verifier of the recipe, if it has one: kept rows stay there, the others go behind those
/// in `rejected.jsonl`, and `reject` hears of each with its reason code.
///
/// # Errors
/// As [`verify`], or a file cannot be read or written.
pub fn run(
    plan: &Plan,
    dir: &RunDir,
    ctx: &Ctx,
    count: usize,
    mut reject: impl FnMut(&Sample, &str),
) -> Result<Option<VerifyReport>> {
    let Some(verifier) = plan.recipe()?.verifier().filter(|_| plan.qc.enabled && plan.qc.verify.enabled) else {
        return Ok(None);
    };
    let client = client(plan, dir.root(), ctx)?;
    let mut samples = stream_jsonl::<Sample>(&dir.path("kept.jsonl"))?;
    let (mut kept, mut rejected) = (dir.replace_jsonl("kept.jsonl")?, dir.replace_jsonl("rejected.jsonl")?);
    for line in Lines::open(dir.path("rejected.jsonl"))? {
        rejected.push_line(&line?.bytes)?;
    }
    let mut report = VerifyReport::default();
    let mut task = ctx.progress.start("check against annotations", count as u64);
    let size = if plan.llm.mode == Mode::Batch { 50_000 } else { 8192 };
    loop {
        let rows: Vec<Sample> = samples.by_ref().take(size).collect::<Result<_>>()?;
        if rows.is_empty() {
            break;
        }
        let asked = rows.len() as u64;
        for row in verify(plan, verifier, rows, &client, &mut report)? {
            match row {
                Ok(sample) => kept.push(&sample)?,
                Err(row) => {
                    reject(&row.sample, &row.code);
                    rejected.push(row.as_ref())?;
                }
            }
        }
        task.advance(asked);
    }
    task.finish();
    rejected.finish()?;
    kept.finish()?;
    report.cost = cost(&client)?;
    Ok(Some(report))
}

type Ended = std::result::Result<(Finding, Key), (String, String)>;

/// Code of rows without a clear verdict.
const UNPARSED: &str = "qc_unparsed";

fn is_open(ended: &Ended) -> bool {
    matches!(ended, Err((code, _)) if code == UNPARSED)
}

fn read(verifier: &dyn Verifier, outcome: std::result::Result<Reply, Failure>) -> Result<Ended> {
    Ok(match outcome {
        Ok(reply) => match verifier.read(&reply) {
            Ok(finding) => Ok((finding, reply.key)),
            Err(why) => Err((UNPARSED.into(), format!("{why}: {:?}", reply.text))),
        },
        Err(Failure::OverBudget { limit }) => return Err(over_budget(&limit)),
        Err(failure) => Err((format!("qc_{}", failure.name()), failure.to_string())),
    })
}

fn close(plan: &Plan, row: Open, report: &mut VerifyReport) -> std::result::Result<Sample, Box<RejectedRow>> {
    let Open { mut sample, attempts, ended } = row;
    let Some(ended) = ended else { return Ok(sample) };
    report.retried += usize::from(attempts > 1);
    let rejection = match &ended {
        Ok((finding, key)) => {
            let check = serde_json::json!({
                "judgement": finding.judgement, "reason": finding.reason, "request": key, "attempts": attempts,
            });
            sample.meta.insert(CHECK.into(), check);
            let code = match finding.judgement {
                Judgement::Consistent => None,
                Judgement::Contradicted => Some("qc_contradicted"),
                Judgement::Partial => Some("qc_partial"),
                Judgement::Unverifiable => {
                    let kept = &plan.qc.verify.keep_unverifiable;
                    let expected = sample.category.as_ref().is_some_and(|c| kept.contains(c));
                    (!expected).then_some("qc_unverifiable")
                }
            };
            code.map(|code| (code.to_string(), finding.reason.clone()))
        }
        Err((code, detail)) => Some((code.clone(), detail.clone())),
    };
    report.count(&sample, rejection.as_ref().map(|(code, _)| code.as_str()));
    match rejection {
        None => Ok(sample),
        Some((code, detail)) => Err(Box::new(RejectedRow { sample, code, detail })),
    }
}

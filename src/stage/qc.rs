//! Every row of `samples.jsonl` ends in `kept.jsonl` or, with a reason code, in `rejected.jsonl`, which also takes over
//! the rows that building could not use. `qc.json` has the counts.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Ctx, Summary, encode::RejectedRow};
use crate::{
    error::{Error, Kind, Result},
    leak::{self, LeakReport},
    plan::Plan,
    qc::{self, QcRule, QcState, Verdict, bias},
    recipes::phantom::WRONG_PAIR,
    run_dir::RunDir,
    sample::Sample,
};

/// Rows seen and rows rejected.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Rows seen.
    pub rows: usize,
    /// Of these, rejected.
    pub rejected: usize,
}

impl Tally {
    fn add(&mut self, rejected: bool) {
        self.rows += 1;
        self.rejected += usize::from(rejected);
    }

    /// Share that was rejected, 0 to 1; 0 without rows.
    #[must_use]
    pub fn share(&self) -> f64 {
        if self.rows == 0 { 0.0 } else { self.rejected as f64 / self.rows as f64 }
    }
}

/// `qc.json`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct QcReport {
    /// All instruction rows.
    pub all: Tally,
    /// Source rows that never became instructions.
    pub unread: usize,
    /// By task or hallucination category.
    pub categories: BTreeMap<String, Tally>,
    /// Rejected rows by reason code.
    pub codes: BTreeMap<String, usize>,
    /// Pairs made wrong on purpose: how many there were and how many were found. The rules do not see the mark.
    pub wrong_pairs: Tally,
    /// Rows that were not made wrong, and how many of them were rejected all the same.
    pub right_pairs: Tally,
    /// What a model could learn without looking at the images.
    pub warnings: Vec<String>,
    /// What training and test have in common.
    pub leak: LeakReport,
}

/// Filters `samples.jsonl`.
///
/// # Errors
/// The gates: too many rows are rejected, none is left, or training and test share images. Files are complete by then.
pub fn run(plan: &Plan, dir: &RunDir, ctx: &Ctx) -> Result<Summary> {
    let samples: Vec<Sample> = dir.read_jsonl("samples.jsonl")?;
    let unread: Vec<RejectedRow> = dir.read_jsonl("unread.jsonl")?;
    let rows_in = samples.len();
    let rules = if plan.qc.enabled { plan.recipe()?.rules() } else { &[] };
    let (kept, rejected) = filter(samples, rules, plan, ctx)?;
    assert_eq!(rows_in, kept.len() + rejected.len(), "a row was lost in quality control");
    let mut report = tally(&kept, &rejected);
    report.unread = unread.len();
    report.warnings = bias::warnings(&kept, plan.seed);
    let all: Vec<&RejectedRow> = unread.iter().chain(&rejected).collect();
    dir.write_jsonl("rejected.jsonl", &all)?;
    dir.write_jsonl("kept.jsonl", &kept)?;
    report.leak = leak::check(&kept)?;
    dir.write_json("qc.json", &report)?;
    gate(plan, &report)?;
    Ok(summary(&report))
}

/// Rows that `rules` keep, and the others with the first objection.
///
/// # Errors
/// A row cannot be checked at all, or the user interrupts.
pub fn filter(
    samples: Vec<Sample>,
    rules: &[&dyn QcRule],
    plan: &Plan,
    ctx: &Ctx,
) -> Result<(Vec<Sample>, Vec<RejectedRow>)> {
    let mut state = if rules.is_empty() { QcState::default() } else { QcState::new(&samples, &plan.qc) };
    let mut task = ctx.progress.start("check rows", samples.len() as u64);
    let (mut kept, mut rejected) = (Vec::with_capacity(samples.len()), Vec::new());
    for sample in samples {
        ctx.check()?;
        match qc::judge(rules, &sample, &mut state)? {
            Verdict::Keep => kept.push(sample),
            Verdict::Reject { code, detail } => rejected.push(RejectedRow { sample, code: code.into(), detail }),
        }
        task.advance(1);
    }
    task.finish();
    Ok((kept, rejected))
}

fn tally(kept: &[Sample], rejected: &[RejectedRow]) -> QcReport {
    let mut report = QcReport::default();
    let rows = kept.iter().map(|s| (s, false)).chain(rejected.iter().map(|r| (&r.sample, true)));
    for (sample, out) in rows {
        report.all.add(out);
        let category = sample.category.clone().unwrap_or_else(|| "none".into());
        report.categories.entry(category).or_default().add(out);
        let wrong = sample.meta.contains_key(WRONG_PAIR);
        if wrong { &mut report.wrong_pairs } else { &mut report.right_pairs }.add(out);
    }
    for row in rejected {
        *report.codes.entry(row.code.clone()).or_default() += 1;
    }
    report
}

fn gate(plan: &Plan, report: &QcReport) -> Result<()> {
    let codes = || report.codes.iter().map(|(code, n)| format!("{n} {code}")).collect::<Vec<_>>().join(", ");
    if report.all.share() > plan.qc.max_drop_rate {
        return Err(Error::new(Kind::Gate, "quality control rejects too many rows")
            .expected(format!("a share of at most {}, qc.max_drop_rate", plan.qc.max_drop_rate))
            .found(format!("{:.3}: {}", report.all.share(), codes()))
            .help("rejected.jsonl has every row with its reason"));
    }
    if report.all.rows == report.all.rejected {
        return Err(Error::new(Kind::Gate, "quality control keeps no row")
            .found(codes())
            .help("rejected.jsonl has every row with its reason"));
    }
    if plan.qc.allow_leaks { Ok(()) } else { report.leak.gate() }
}

fn summary(report: &QcReport) -> Summary {
    let percent = |t: &Tally| format!("{} of {} ({:.1} %)", t.rejected, t.rows, t.share() * 100.0);
    let mut summary = Summary::default();
    summary.line("rows in", report.all.rows).line("kept", report.all.rows - report.all.rejected);
    summary.line("rejected", percent(&report.all));
    for (code, n) in &report.codes {
        summary.line(&format!("  {code}"), n);
    }
    for (category, tally) in &report.categories {
        summary.line(&format!("  of {category}"), percent(tally));
    }
    if report.wrong_pairs.rows > 0 {
        summary.line("wrong pairs found", percent(&report.wrong_pairs));
        summary.line("right pairs rejected", percent(&report.right_pairs));
    }
    if report.unread > 0 {
        summary.line("unusable source rows", report.unread);
    }
    summary.line("images shared by training and test", report.leak.shared_images.len());
    summary.line("similar images", report.leak.similar_images.len());
    for warning in &report.warnings {
        summary.line("warning", warning);
    }
    summary
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{device::DeviceSpec, progress::Progress, sample::Split, stage::build};

    fn ctx() -> Ctx {
        Ctx::new(DeviceSpec::Cpu, Progress::Silent).unwrap()
    }

    fn phantom(images: usize) -> Plan {
        let mut plan = Plan::default();
        plan.data.images = images;
        plan.qc.max_template_share = 1.0;
        plan
    }

    #[test]
    fn phantom_rows_are_filtered_well_and_reproducibly() {
        let root = tempfile::tempdir().unwrap();
        let dir = RunDir::open(root.path().join("run")).unwrap();
        let plan = phantom(240);
        build::run(&plan, &dir, &ctx()).unwrap();
        run(&plan, &dir, &ctx()).unwrap();
        let report: QcReport = dir.read_json("qc.json").unwrap();
        assert!(report.warnings.is_empty(), "{:?}", report.warnings);
        assert!(report.wrong_pairs.rows > 50 && report.wrong_pairs.share() > 0.95, "{:?}", report.wrong_pairs);
        let rejected: Vec<RejectedRow> = dir.read_jsonl("rejected.jsonl").unwrap();
        let unfair: Vec<_> = rejected.iter().filter(|r| !r.sample.meta.contains_key(WRONG_PAIR)).collect();
        assert!(report.right_pairs.share() < 0.01, "{:#?}", &unfair[..unfair.len().min(5)]);
        let (kept, out) =
            (std::fs::read(dir.path("kept.jsonl")).unwrap(), std::fs::read(dir.path("rejected.jsonl")).unwrap());
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        pool.install(|| run(&plan, &dir, &ctx())).unwrap();
        assert_eq!(std::fs::read(dir.path("kept.jsonl")).unwrap(), kept);
        assert_eq!(std::fs::read(dir.path("rejected.jsonl")).unwrap(), out);
    }

    #[test]
    fn the_rules_do_not_see_the_mark_of_wrong_pairs() {
        let root = tempfile::tempdir().unwrap();
        let dir = RunDir::open(root.path().join("run")).unwrap();
        let plan = phantom(60);
        let samples = build::build(&plan, dir.root(), &ctx()).unwrap().samples;
        let unmarked: Vec<Sample> = samples
            .iter()
            .cloned()
            .map(|mut s| {
                s.meta.remove(WRONG_PAIR);
                s
            })
            .collect();
        let ids = |samples: Vec<Sample>| -> Vec<String> {
            let (kept, _) = filter(samples, qc::RULES, &plan, &ctx()).unwrap();
            kept.into_iter().map(|s| s.id).collect()
        };
        assert_eq!(ids(samples), ids(unmarked));
    }

    #[test]
    fn gates_close_after_the_files_are_written() {
        let root = tempfile::tempdir().unwrap();
        let dir = RunDir::open(root.path().join("run")).unwrap();
        let mut plan = phantom(60);
        build::run(&plan, &dir, &ctx()).unwrap();
        plan.qc.max_drop_rate = 0.01;
        let error = run(&plan, &dir, &ctx()).unwrap_err();
        assert_eq!(error.kind(), Kind::Gate);
        assert!(error.to_string().contains("truth_mismatch") || error.to_string().contains("premise_true"), "{error}");
        assert!(dir.path("kept.jsonl").exists() && dir.path("qc.json").exists());

        plan.qc.max_drop_rate = 0.5;
        let mut samples: Vec<Sample> = dir.read_jsonl("samples.jsonl").unwrap();
        let group = samples[0].group.clone();
        for (i, sample) in samples.iter_mut().filter(|s| s.group == group).enumerate() {
            sample.split = if i % 2 == 0 { Split::Test } else { Split::Train };
        }
        dir.write_jsonl("samples.jsonl", &samples).unwrap();
        let error = run(&plan, &dir, &ctx()).unwrap_err();
        assert!(error.to_string().contains("share images: expected none in common, found 1 images"), "{error}");
        plan.qc.allow_leaks = true;
        assert!(run(&plan, &dir, &ctx()).is_ok());
        plan.qc.enabled = false;
        run(&plan, &dir, &ctx()).unwrap();
        let kept: Vec<Sample> = dir.read_jsonl("kept.jsonl").unwrap();
        assert_eq!(kept.len(), samples.len());
    }
}

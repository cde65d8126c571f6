//! Every row of `samples.jsonl` ends in `kept.jsonl` or, with a reason code, in `rejected.jsonl`, which also takes over
//! the rows that building could not use. `qc.json` has the counts.
//!
//! Rows pass through in blocks; what stays in memory are the hashes of [`Memory`].

use std::{collections::BTreeMap, path::Path};

use rayon::prelude::*;
use serde::{Deserialize, Serialize, de::IgnoredAny};

use super::{
    Ctx, Summary,
    encode::RejectedRow,
    verify::{self, VerifyReport},
};
use crate::{
    error::{Error, Kind, Result},
    leak::{LeakCheck, LeakReport, firewall::Firewall, picture::Pictures},
    parallel::{CHUNK, ordered},
    plan::Plan,
    qc::{
        self, Memory, QcContext, QcRule, Row, Verdict,
        bias::{BiasCheck, BiasReport},
    },
    recipes::phantom::WRONG_PAIR,
    registry,
    run_dir::{JsonlReplacement, Line, Lines, RunDir},
    sample::{ImageRef, Sample, Split},
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
    /// What a model could learn without looking at the images, in words.
    pub warnings: Vec<String>,
    /// The same in numbers.
    #[serde(default)]
    pub bias: BiasReport,
    /// What training and test have in common.
    pub leak: LeakReport,
    /// What a language model said of the rows that passed the rules.
    #[serde(default)]
    pub verify: Option<VerifyReport>,
}

/// Filters `samples.jsonl`.
///
/// # Errors
/// The gates: too many rows are rejected, none is left, training and test share images, or a bias that the recipe does
/// not allow. Files are complete by then.
pub fn run(plan: &Plan, dir: &RunDir, ctx: &Ctx) -> Result<Summary> {
    let rules = if plan.qc.enabled { registry::rules(plan.recipe()?) } else { Vec::new() };
    let (context, counts) = prepare(plan, dir, ctx)?;
    let mut report = filter(&rules, &context, counts, plan, dir, ctx)?;
    assert_eq!(report.all.rows, counts.rows, "a row was lost in quality control");
    let kept = report.all.rows - report.all.rejected;
    report.verify = verify::run(plan, dir, ctx, kept, |sample, code| report.reject(sample, code))?;
    (report.leak, report.bias) = inspect(&context, plan, dir, ctx)?;
    report.warnings.clone_from(&report.bias.warnings);
    dir.write_json("qc.json", &report)?;
    gate(plan, &report)?;
    Ok(summary(&report))
}

/// Rows of `samples.jsonl`.
#[derive(Debug, Clone, Copy, Default)]
struct Counts {
    rows: usize,
    constructed: usize,
}

/// Looks at every image of the rows and of the evaluation sets, and counts the rows.
fn prepare(plan: &Plan, dir: &RunDir, ctx: &Ctx) -> Result<(QcContext, Counts)> {
    #[derive(Deserialize)]
    struct Brief {
        #[serde(default)]
        images: Vec<ImageRef>,
        #[serde(default)]
        answer_type: Option<IgnoredAny>,
    }
    let known = dir.path("images.jsonl");
    let mut pictures = if known.exists() { Pictures::load(&known)? } else { Pictures::default() };
    pictures.refresh();
    let before = pictures.all().len();
    let mut counts = Counts::default();
    let path = dir.path("samples.jsonl");
    for row in ordered(Lines::open(&path)?, CHUNK, |line| line?.parse::<Brief>(&path)) {
        let row = row?;
        counts.rows += 1;
        counts.constructed += usize::from(row.answer_type.is_none());
        pictures.look_at(row.images.iter().map(|i| i.path.as_path()));
    }
    ctx.check()?;
    // Rows that were changed by hand may name images that building never saw.
    if pictures.all().len() > before {
        if plan.data.compares_looks() {
            pictures.find_copies();
        } else {
            pictures.find_exact_copies();
        }
    }
    let mut firewall = Firewall::load(&plan.data.firewall, plan.seed, &dir.path("firewall"))?;
    firewall.look_for(&pictures, plan.data.compares_looks());
    Ok((QcContext { pictures, firewall, config: plan.qc.clone() }, counts))
}

/// A row on its way through the rules.
struct Judged {
    line: Line,
    sample: Sample,
    row: Option<Row>,
    verdict: Verdict,
}

/// Writes `kept.jsonl` and `rejected.jsonl`.
fn filter(
    rules: &[&dyn QcRule],
    context: &QcContext,
    counts: Counts,
    plan: &Plan,
    dir: &RunDir,
    ctx: &Ctx,
) -> Result<QcReport> {
    let mut report = QcReport::default();
    let mut kept = dir.replace_jsonl("kept.jsonl")?;
    let mut rejected = dir.replace_jsonl("rejected.jsonl")?;
    for line in Lines::open(dir.path("unread.jsonl"))? {
        rejected.push_line(&line?.bytes)?;
        report.unread += 1;
    }
    let path = dir.path("samples.jsonl");
    let mut memory = Memory::new(counts.rows, counts.constructed, &plan.qc, plan.seed);
    let mut lines = Lines::open(&path)?;
    let mut task = ctx.progress.start("check rows", counts.rows as u64);
    loop {
        ctx.check()?;
        let block: Vec<Line> = lines.by_ref().take(CHUNK).collect::<Result<_>>()?;
        if block.is_empty() {
            break;
        }
        task.advance(block.len() as u64);
        for judged in judge(rules, context, &mut memory, &path, block)? {
            report.add(&judged.sample, &judged.verdict);
            write(judged, &mut kept, &mut rejected)?;
        }
    }
    task.finish();
    rejected.finish()?;
    kept.finish()?;
    Ok(report)
}

/// A block of rows after all rules: each by itself in parallel, then beside the earlier ones in order.
fn judge(
    rules: &[&dyn QcRule],
    context: &QcContext,
    memory: &mut Memory,
    path: &Path,
    block: Vec<Line>,
) -> Result<Vec<Judged>> {
    let hashes = memory.hashes();
    let alone = |line: Line| -> Result<Judged> {
        let sample: Sample = line.parse(path)?;
        let verdict = qc::check(rules, &sample, context)?;
        let row = (verdict == Verdict::Keep && !rules.is_empty()).then(|| Row::new(&sample, &hashes));
        Ok(Judged { line, sample, row, verdict })
    };
    let mut judged: Vec<Judged> = block.into_par_iter().map(alone).collect::<Result<_>>()?;
    for one in &mut judged {
        if let Some(row) = &one.row {
            one.verdict = qc::compare(rules, row, memory)?;
        }
    }
    Ok(judged)
}

/// A kept row keeps its bytes; a rejected one becomes a [`RejectedRow`].
fn write(judged: Judged, kept: &mut JsonlReplacement, rejected: &mut JsonlReplacement) -> Result<()> {
    match judged.verdict {
        Verdict::Keep => kept.push_line(&judged.line.bytes),
        Verdict::Reject { code, detail } => {
            rejected.push(&RejectedRow { sample: judged.sample, code: code.into(), detail })
        }
    }
}

/// What the kept rows of training and test have in common, and what gives their answers away.
fn inspect(context: &QcContext, plan: &Plan, dir: &RunDir, ctx: &Ctx) -> Result<(LeakReport, BiasReport)> {
    let path = dir.path("kept.jsonl");
    let rows = || Ok::<_, Error>(ordered(Lines::open(&path)?, CHUNK, |line| line?.parse::<Sample>(&path)));
    let mut leak = LeakCheck::new(&context.pictures, &context.firewall);
    let mut bias = BiasCheck::new(plan.seed);
    for row in rows()? {
        let row = row?;
        if row.split == Split::Test {
            leak.test(&row);
        }
        bias.count(&row);
    }
    ctx.check()?;
    for row in rows()? {
        let row = row?;
        if row.split != Split::Test {
            leak.train(&row);
        }
        bias.guess(&row);
    }
    Ok((leak.finish(plan.data.compares_looks()), bias.finish(&plan.qc.bias)))
}

/// What training and test of `samples.jsonl` have in common, split as `mark` says; the rules of quality control are not
/// applied, except that rows which the firewall will reject are left out.
///
/// # Errors
/// A file cannot be read, or the user interrupts.
pub fn leaks(plan: &Plan, dir: &RunDir, ctx: &Ctx, mark: impl Fn(&Sample) -> Split) -> Result<LeakReport> {
    let (context, _) = prepare(plan, dir, ctx)?;
    let path = dir.path("samples.jsonl");
    let mut check = LeakCheck::new(&context.pictures, &context.firewall);
    for testing in [true, false] {
        for row in ordered(Lines::open(&path)?, CHUNK, |line| line?.parse::<Sample>(&path)) {
            let row = row?;
            if (mark(&row) == Split::Test) != testing {
                continue;
            }
            if testing {
                check.test(&row);
            } else if !plan.qc.enabled || context.firewall.objection(&row, &context.pictures).is_none() {
                check.train(&row);
            }
        }
        ctx.check()?;
    }
    Ok(check.finish(true))
}

impl QcReport {
    /// Counts a row that is rejected after it was counted as kept.
    fn reject(&mut self, sample: &Sample, code: &str) {
        self.all.rejected += 1;
        let category = sample.category.clone().unwrap_or_else(|| "none".into());
        self.categories.entry(category).or_default().rejected += 1;
        let wrong = sample.meta.contains_key(WRONG_PAIR);
        if wrong { &mut self.wrong_pairs } else { &mut self.right_pairs }.rejected += 1;
        *self.codes.entry(code.to_string()).or_default() += 1;
    }

    fn add(&mut self, sample: &Sample, verdict: &Verdict) {
        let out = *verdict != Verdict::Keep;
        self.all.add(out);
        let category = sample.category.clone().unwrap_or_else(|| "none".into());
        self.categories.entry(category).or_default().add(out);
        let wrong = sample.meta.contains_key(WRONG_PAIR);
        if wrong { &mut self.wrong_pairs } else { &mut self.right_pairs }.add(out);
        if let Verdict::Reject { code, .. } = verdict {
            *self.codes.entry((*code).to_string()).or_default() += 1;
        }
    }
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
    if !plan.qc.allow_leaks {
        report.leak.gate()?;
    }
    report.bias.gate(&plan.qc.bias)
}

fn summary(report: &QcReport) -> Summary {
    let percent = |t: &Tally| format!("{} of {} ({:.1} %)", t.rejected, t.rows, t.share() * 100.0);
    let mut summary = Summary::default();
    summary.line("rows in", report.all.rows).line("kept", report.all.rows - report.all.rejected);
    summary.line("rejected", percent(&report.all));
    for (code, n) in &report.codes {
        summary.line(&format!("  {code}"), n);
    }
    if let Some(verify) = &report.verify {
        summary.lines.extend(verify.lines());
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
    for set in &report.leak.eval_sets {
        let text =
            format!("{} of its images found, {} rows about them trained on", set.images_found, set.rows_trained_on);
        summary.line(&format!("evaluation set {}", set.name), text);
    }
    for warning in &report.warnings {
        summary.line("warning", warning);
    }
    summary
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{device::DeviceSpec, progress::Progress, stage::build};

    fn ctx() -> Ctx {
        Ctx::new(DeviceSpec::Cpu, Progress::Silent).unwrap()
    }

    fn phantom(images: usize) -> Plan {
        let mut plan = Plan::default();
        plan.data.images = images;
        // The closed vocabulary of phantoms repeats itself.
        plan.qc.max_template_share = 1.0;
        plan.qc.min_question_words = 3;
        plan.qc.min_answer_words = 2;
        plan.qc.max_repeats = 0;
        plan.qc.long_text_words = 0;
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
        build::run(&plan, &dir, &ctx()).unwrap();
        let ids = || -> Vec<String> {
            run(&plan, &dir, &ctx()).unwrap();
            dir.read_jsonl::<Sample>("kept.jsonl").unwrap().into_iter().map(|s| s.id).collect()
        };
        let marked = ids();
        let mut samples: Vec<Sample> = dir.read_jsonl("samples.jsonl").unwrap();
        let removed = samples.iter_mut().filter_map(|s| s.meta.remove(WRONG_PAIR)).count();
        dir.write_jsonl("samples.jsonl", &samples).unwrap();
        assert!(removed > 10);
        assert_eq!(ids(), marked);
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

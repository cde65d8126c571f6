//! Ablation: one recipe on parts of its data (polarity, quality control, fraction), the views of MedHallTune's Fig. 5.
//!
//! Rows are built and filtered once, in `shared/`. Every view trains on its part of the training rows and answers the
//! same held-out rows; the base model answers them once. Each view ([`crate::export::view`]) is a run directory of its own, so a view that is
//! complete and unchanged is skipped, and an interrupted ablation continues.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Kind, Result},
    export::view::{View, ablations},
    plan::{Plan, Resolved},
    run_dir::{RunDir, read_jsonl, sha256, sha256_bytes},
    sample::{Polarity, Sample, Split},
    stage::{
        Ctx, STAGES, Stage, Summary,
        encode::RejectedRow,
        eval::{self, Answer, Which, held_out},
        judge::{self, Verdict},
    },
};

mod compare;
mod page;

pub use compare::{Ablation, Cell, Claim, ViewRow};
pub use page::html;

/// What an ablation varies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Axis {
    /// Only ordinary questions, only questions with a false premise, both.
    Polarity,
    /// With and without quality control.
    Qc,
    /// 25, 50, 75 and 100 % of the images.
    Fraction,
}

/// The view that all others are compared with.
const ALL: &str = "all";

/// The views of some axes, the whole data first.
#[must_use]
pub fn views(axes: &[Axis]) -> Vec<View> {
    let axis = |view: &View| match view {
        View { polarity: Some(_), .. } => Some(Axis::Polarity),
        View { qc: false, .. } => Some(Axis::Qc),
        View { percent, .. } if *percent != 100 => Some(Axis::Fraction),
        _ => None,
    };
    ablations().into_iter().filter(|view| axis(view).is_none_or(|a| axes.contains(&a))).collect()
}

/// Name of a view's directory.
fn directory(view: &View) -> String {
    view.to_string().replace('%', "-percent")
}

/// What a view trains on, for tables.
fn about(view: &View) -> String {
    match view {
        View { polarity: Some(Polarity::NonHallucination), .. } => "ordinary questions only".into(),
        View { polarity: Some(Polarity::Hallucination), .. } => "questions with a false premise only".into(),
        View { qc: false, .. } => "both polarities, without quality control".into(),
        View { percent: 100, .. } => "both polarities, checked, all images".into(),
        View { percent, .. } => format!("{percent} % of the images"),
    }
}

/// `view.json`: what a view directory is made from.
#[derive(Debug, Serialize, Deserialize)]
struct Made {
    view: String,
    seed: u64,
    /// Directory with `kept.jsonl` and `rejected.jsonl`.
    shared: PathBuf,
    /// Hashes of both, so that a view is made again when they change.
    kept: String,
    rejected: String,
    /// What the base model's answers depend on.
    base: String,
}

const MADE: &str = "view.json";
const BASE: &str = "base.json";
const BASE_ANSWERS: &str = "base_answers.jsonl";
const BASE_VERDICTS: &str = "base_verdicts.jsonl";

/// The stages of a view: its rows come from the shared directory, the rest is as in any run.
pub const VIEW_STAGES: &[Stage] = &[
    Stage {
        name: "view",
        about: "Takes a part of the training rows, and all held-out rows.",
        reads: &[MADE],
        writes: &["kept.jsonl", "rejected.jsonl"],
        scratch: &[],
        sections: &[],
        device: false,
        run: take,
    },
    named("encode"),
    named("train"),
    Stage { run: eval_view, ..named("eval") },
    Stage { run: judge_view, ..named("judge") },
    named("report"),
];

/// The stage of this name; that there is one is checked when this is compiled.
const fn named(name: &str) -> Stage {
    let mut at = 0;
    while !same(STAGES[at].name, name) {
        at += 1;
    }
    STAGES[at]
}

const fn same(a: &str, b: &str) -> bool {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let mut at = 0;
    while at < a.len() && at < b.len() && a[at] == b[at] {
        at += 1;
    }
    at == a.len() && at == b.len()
}

/// Runs every view of `axes` below `root` and compares them: `ablation.json` and `ablation.html`.
///
/// # Errors
/// A stage fails, a gate says no, the user interrupts, or no training row has what an axis varies.
pub fn run(resolved: &Resolved, root: &Path, axes: &[Axis], ctx: &Ctx) -> Result<Ablation> {
    let top = RunDir::open(root)?;
    let shared = root.join("shared");
    {
        let dir = RunDir::open(&shared)?;
        crate::run::run(resolved, &dir, ctx, "qc", false)?;
    }
    let views = views(axes);
    check(&views, &shared)?;
    for (number, view) in views.iter().enumerate() {
        ctx.progress.say(&format!("view {} of {}: {view}, {}", number + 1, views.len(), about(view)));
        let dir = RunDir::open(root.join(directory(view)))?;
        let made = Made {
            view: view.to_string(),
            seed: resolved.plan.seed,
            shared: shared.clone(),
            kept: sha256(&shared.join("kept.jsonl"))?,
            rejected: sha256(&shared.join("rejected.jsonl"))?,
            base: base_key(&resolved.plan, &shared, ctx)?,
        };
        dir.write_json(MADE, &made)?;
        crate::run::walk(VIEW_STAGES, resolved, &dir, ctx, "report", false)?;
        share_base(&dir, &made)?;
    }
    let ablation = compare::compare(resolved, root, &views, ctx)?;
    top.write_json("ablation.json", &ablation)?;
    top.write("ablation.html", html(&ablation)?.as_bytes())?;
    Ok(ablation)
}

/// Whether the rows have what the views vary.
fn check(views: &[View], shared: &Path) -> Result<()> {
    let kept: Vec<Sample> = read_jsonl(&shared.join("kept.jsonl"))?;
    let train = || kept.iter().filter(|s| s.split == Split::Train);
    for view in views.iter().filter(|v| v.polarity.is_some()) {
        if !train().any(|s| s.polarity == view.polarity) {
            return Err(Error::new(Kind::Config, "no training row has the polarity of a view")
                .at(view)
                .found("rows of one polarity, or without one")
                .help("leave `polarity` out of --axis"));
        }
    }
    Ok(())
}

fn group(sample: &Sample) -> &str {
    if sample.group.is_empty() { &sample.id } else { &sample.group }
}

/// The first stage of a view.
fn take(_: &Plan, dir: &RunDir, _: &Ctx) -> Result<Summary> {
    let made: Made = dir.read_json(MADE)?;
    let view: View = made.view.parse()?;
    let kept: Vec<Sample> = read_jsonl(&made.shared.join("kept.jsonl"))?;
    let rejected: Vec<RejectedRow> = read_jsonl(&made.shared.join("rejected.jsonl"))?;
    let rows = view.apply(kept, &rejected, made.seed);
    dir.write_jsonl("kept.jsonl", &rows)?;
    dir.write_jsonl("rejected.jsonl", Vec::<RejectedRow>::new())?;
    let of = |split| rows.iter().filter(|s| s.split == split).count();
    let mut summary = Summary::default();
    summary.line("training rows", of(Split::Train)).line("validation rows", of(Split::Validation));
    summary.line("test rows", of(Split::Test));
    Ok(summary)
}

/// Evaluates a view; answers of the base model are taken over where an earlier view has them.
fn eval_view(plan: &Plan, dir: &RunDir, ctx: &Ctx) -> Result<Summary> {
    if !dir.path("answers.jsonl").exists()
        && let Some(shared) = base_of(dir)?
    {
        let kept: Vec<Sample> = dir.read_jsonl("kept.jsonl")?;
        let ids: BTreeSet<&str> = held_out(&kept, plan.eval.rows).iter().map(|s| s.id.as_str()).collect();
        let mut answers: Vec<Answer> = read_jsonl(&shared.join(BASE_ANSWERS))?;
        answers.retain(|a| ids.contains(a.id.as_str()));
        dir.write_jsonl("answers.jsonl", &answers)?;
    }
    eval::run(plan, dir, ctx)
}

/// Judges a view; verdicts on the base model are taken over where an earlier view has them.
fn judge_view(plan: &Plan, dir: &RunDir, ctx: &Ctx) -> Result<Summary> {
    if !dir.path("verdicts.jsonl").exists()
        && let Some(shared) = base_of(dir)?
    {
        let answers: Vec<Answer> = dir.read_jsonl("answers.jsonl")?;
        let ids: BTreeSet<&str> = answers.iter().map(|a| a.id.as_str()).collect();
        let mut verdicts: Vec<Verdict> = read_jsonl(&shared.join(BASE_VERDICTS))?;
        verdicts.retain(|v| ids.contains(v.id.as_str()));
        dir.write_jsonl("verdicts.jsonl", &verdicts)?;
    }
    judge::run(plan, dir, ctx)
}

/// What the base model's answers and verdicts depend on, hashed.
fn base_key(plan: &Plan, shared: &Path, ctx: &Ctx) -> Result<String> {
    let parts = serde_json::json!({
        "program": env!("CARGO_PKG_VERSION"),
        "model": plan.model,
        "generate": plan.generate,
        "eval": plan.eval,
        "judge": plan.judge,
        "recipe": plan.recipe,
        "seed": plan.seed,
        "max_length": plan.train.max_length,
        "device": ctx.device_spec.kind(),
        "rows": sha256(&shared.join("kept.jsonl"))?,
    });
    Ok(sha256_bytes(parts.to_string().as_bytes()))
}

/// The shared directory, if it has base answers that fit this view.
fn base_of(dir: &RunDir) -> Result<Option<PathBuf>> {
    let made: Made = dir.read_json(MADE)?;
    let path = made.shared.join(BASE);
    if !path.exists() {
        return Ok(None);
    }
    let key: String = crate::run_dir::read_json(&path)?;
    Ok((key == made.base).then_some(made.shared))
}

/// Keeps a complete view's base answers and verdicts for the next views; the key is written last.
fn share_base(dir: &RunDir, made: &Made) -> Result<()> {
    if base_of(dir)?.is_some() {
        return Ok(());
    }
    let shared = RunDir::open(&made.shared)?;
    let mut answers: Vec<Answer> = dir.read_jsonl("answers.jsonl")?;
    answers.retain(|a| a.model == Which::Base);
    let mut verdicts: Vec<Verdict> = dir.read_jsonl("verdicts.jsonl")?;
    verdicts.retain(|v| v.model == Which::Base);
    shared.remove(BASE)?;
    shared.write_jsonl(BASE_ANSWERS, &answers)?;
    shared.write_jsonl(BASE_VERDICTS, &verdicts)?;
    shared.write_json(BASE, &made.base)
}

/// Rows of a view that were trained on.
fn trained_rows(root: &Path, view: &View) -> Result<usize> {
    let kept: Vec<Sample> = read_jsonl(&root.join(directory(view)).join("kept.jsonl"))?;
    Ok(kept.iter().filter(|s| s.split == Split::Train).count())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_axis_has_its_own_views_beside_the_whole() {
        let names = |axes: &[Axis]| views(axes).iter().map(directory).collect::<Vec<_>>().join(" ");
        assert_eq!(names(&[Axis::Qc]), "all no-qc");
        assert_eq!(names(&[Axis::Polarity]), "all positive negative");
        assert_eq!(names(&[Axis::Fraction]), "all 25-percent 50-percent 75-percent");
        assert_eq!(names(&[]), ALL);
        assert_eq!(views(&[Axis::Polarity, Axis::Qc, Axis::Fraction]), ablations());
    }
}

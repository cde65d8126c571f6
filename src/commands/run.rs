//! Verbs that work on a recipe: its stages and its plan.

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::json;

use super::{columns, context, emit, prediction::Prediction};
use crate::{
    cli::{Global, JudgeArgs, RecipeArgs},
    config::inline,
    error::Result,
    fit::{self, Fit, Situation},
    plan::{Plan, Resolved},
    run_dir::{RunDir, read_json, stream_jsonl},
    sample::{Sample, Split},
    stage::{
        Ctx,
        encode::EncodeReport,
        report::table,
        train::{Estimate, estimate, preference_pairs},
    },
    train::ObjectiveType,
};

/// Where the results of a recipe go.
pub(super) fn out_dir(args: &RecipeArgs, resolved: &Resolved) -> PathBuf {
    args.out.clone().unwrap_or_else(|| PathBuf::from("run").join(&resolved.name))
}

/// Runs the stages up to `last`.
pub(super) fn stages(global: &Global, args: &RecipeArgs, last: &str, force: bool) -> Result<()> {
    stages_in(global, args, last, force, &context(global)?)
}

/// Judges, as the flags of its verb say.
pub(super) fn judge(global: &Global, args: &JudgeArgs) -> Result<()> {
    let mut recipe = args.stage.recipe.clone();
    recipe.changes.set.extend(args.judge_prompt.iter().map(|path| format!("judge.prompt={}", path.display())));
    if args.dry_run {
        return super::dry::judge(global, &recipe);
    }
    let ctx = Ctx { offline: args.from_cache, ..context(global)? };
    stages_in(global, &recipe, "judge", args.stage.force || args.from_cache, &ctx)
}

fn stages_in(global: &Global, args: &RecipeArgs, last: &str, force: bool, ctx: &Ctx) -> Result<()> {
    let (resolved, fit) = resolve(global, args)?;
    if let (Some(fit), Some(limit)) = (fit, &args.fit) {
        fit.lines(limit).iter().for_each(|line| ctx.progress.say(line));
    }
    let run = RunDir::open(out_dir(args, &resolved))?;
    let outcomes = crate::run::run(&resolved, &run, ctx, last, force)?;
    let table = match last {
        "report" => table(&run.read_json("report.json")?),
        _ => String::new(),
    };
    emit(global, json!({ "run": run.root(), "stages": outcomes }), || {
        let summary = outcomes.last().map(|o| o.summary.clone()).unwrap_or_default();
        let rows: Vec<_> = summary.lines.into_iter().map(|(name, value)| vec![name, value]).collect();
        format!("{table}{}results in {}", columns(&rows), run.root().display())
    })
}

/// The recipe with everything on top that the command line says, and what was given up for a limit of memory.
///
/// The limit is met for rows of `train.max_length`, whatever is known of the rows, so that the plan is the same before
/// and after they are there.
pub(super) fn resolve(global: &Global, args: &RecipeArgs) -> Result<(Resolved, Option<Fit>)> {
    let resolved = Resolved::new(&args.recipe, &args.overrides())?;
    fitted(global, args, resolved)
}

/// As [`resolve`], for verbs that read no data.
pub(super) fn resolve_to_measure(global: &Global, args: &RecipeArgs) -> Result<Resolved> {
    let resolved = Resolved::for_planning(&args.recipe, &args.overrides(), None)?;
    Ok(fitted(global, args, resolved)?.0)
}

fn fitted(global: &Global, args: &RecipeArgs, resolved: Resolved) -> Result<(Resolved, Option<Fit>)> {
    let Some(limit) = &args.fit else { return Ok((resolved, None)) };
    let plan = &resolved.plan;
    let fit = fit::choose(plan, &Situation::new(plan, plan.network()?, &global.device, None, None)?, limit)?;
    let chosen = Some((limit.text.as_str(), fit.overrides.as_slice()));
    Ok((Resolved::for_planning(&args.recipe, &args.overrides(), chosen)?, Some(fit)))
}

/// Shows the resolved plan.
pub(super) fn plan(global: &Global, args: &RecipeArgs) -> Result<()> {
    let resolved = Resolved::for_planning(&args.recipe, &args.overrides(), None)?;
    let (resolved, fit) = fitted(global, args, resolved)?;
    let out = out_dir(args, &resolved);
    let facts = facts(&resolved.plan, &out)?;
    let memory = Prediction::new(global, &resolved.plan, &out, facts.rows)?;
    let settings: Vec<_> = resolved
        .settings
        .iter()
        .map(|s| json!({ "key": s.key, "value": s.value, "origin": s.origin.to_string() }))
        .collect();
    let value = json!({
        "recipe": resolved.name, "out": out, "settings": settings, "facts": facts, "memory": memory, "fit": fit,
        "missing": resolved.missing,
    });
    emit(global, value, || {
        let mut rows = vec![vec!["KEY".into(), "VALUE".into(), "FROM".into()]];
        for s in &resolved.settings {
            rows.push(vec![s.key.clone(), inline(&s.value).unwrap_or_else(|| "-".into()), s.origin.to_string()]);
        }
        let mut text = format!("{}\n{}\n{}", columns(&rows), facts.text(), memory.text());
        if let (Some(fit), Some(limit)) = (&fit, &args.fit) {
            text.push_str(&format!("\n{}\n", fit.lines(limit).join("\n")));
        }
        let missing: String = resolved.missing.iter().map(|line| format!("not there yet: {line}\n")).collect();
        format!("{text}\n{missing}results go to {}", out.display())
    })
}

/// What a plan amounts to.
#[derive(Debug, Serialize)]
struct Facts {
    /// Rows to train on, and where that is known from; none before they are built.
    rows: Option<usize>,
    /// Positions to train on, images included, over all epochs; none before rows are encoded.
    tokens: Option<u64>,
    /// Optimizer steps; none before the rows are known, unless the plan fixes them.
    steps: Option<usize>,
    estimate: Estimate,
}

/// Works out what a plan amounts to: from shapes, and from rows where the run directory has them.
fn facts(plan: &Plan, out: &Path) -> Result<Facts> {
    let kept = out.join("kept.jsonl");
    let rows = kept.exists().then(|| training_rows(plan, out)).transpose()?;
    let encoded: Option<EncodeReport> = read_json(&out.join("encode.json")).ok();
    let mean = encoded.filter(|e| e.rows_ok > 0).map(|e| e.positions.sum as f64 / e.rows_ok as f64);
    let estimate = estimate(plan, &plan.network()?, rows.unwrap_or_default(), mean.unwrap_or_default())?;
    let known = (rows.is_some() && (mean.is_some() || !plan.train.packing)) || plan.train.max_steps > 0;
    let tokens = rows.zip(mean).map(|(rows, mean)| (rows as f64 * mean * estimate.epochs) as u64);
    Ok(Facts { rows, tokens, steps: known.then_some(estimate.steps), estimate })
}

/// Rows of a run to train on, or pairs of them.
fn training_rows(plan: &Plan, run: &Path) -> Result<usize> {
    if plan.train.objective == ObjectiveType::Dpo {
        return Ok(preference_pairs(plan, run, Split::Train)?.len());
    }
    let splits = stream_jsonl::<Sample>(&run.join("kept.jsonl"))?.map(|row| Ok(row?.split == Split::Train));
    splits.map(|own: Result<bool>| own.map(usize::from)).sum()
}

impl Facts {
    fn text(&self) -> String {
        let unknown = || "known after `medtune build`".to_string();
        let e = &self.estimate;
        let share = 100.0 * e.trainable_parameters as f64 / e.parameters.max(1) as f64;
        let mut rows = vec![
            vec!["training rows".into(), self.rows.map_or_else(unknown, |n| n.to_string())],
            vec!["steps".into(), self.steps.map_or_else(unknown, |n| format!("{n}, {} of warm-up", e.warmup_steps))],
            vec![
                "tokens".into(),
                self.tokens.map_or_else(|| "known after `medtune encode`".into(), |n| format!("about {n}")),
            ],
            vec!["parameters".into(), e.parameters.to_string()],
            vec!["trainable".into(), format!("{} ({share:.2} %)", e.trainable_parameters)],
        ];
        for (tower, adapted, all) in &e.coverage {
            rows.push(vec![format!("  {tower}"), format!("{adapted} of {all} linear modules adapted")]);
        }
        columns(&rows)
    }
}

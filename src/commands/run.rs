//! Verbs that work on a model: stages, the plan, generation, merging.

use std::path::PathBuf;

use serde_json::json;

use super::{columns, context, emit};
use crate::{
    cli::{GenerateArgs, Global, MergeArgs, RecipeArgs},
    config::inline,
    error::{Error, Kind, Result},
    plan::Resolved,
    run_dir::RunDir,
};

/// Where the results of a recipe go.
pub(super) fn out_dir(args: &RecipeArgs, resolved: &Resolved) -> PathBuf {
    args.out.clone().unwrap_or_else(|| PathBuf::from("run").join(&resolved.name))
}

/// Runs the stages up to `last`.
pub(super) fn stages(global: &Global, args: &RecipeArgs, last: &str, force: bool) -> Result<()> {
    let resolved = Resolved::new(&args.recipe, &args.set)?;
    let ctx = context(global)?;
    let run = RunDir::open(out_dir(args, &resolved))?;
    let outcomes = crate::run::run(&resolved, &run, &ctx, last, force)?;
    emit(global, json!({ "run": run.root(), "stages": outcomes }), || {
        let summary = outcomes.last().map(|o| o.summary.clone()).unwrap_or_default();
        let rows: Vec<_> = summary.lines.into_iter().map(|(name, value)| vec![name, value]).collect();
        format!("{}results in {}", columns(&rows), run.root().display())
    })
}

/// Shows the resolved plan.
pub(super) fn plan(global: &Global, args: &RecipeArgs) -> Result<()> {
    let resolved = Resolved::new(&args.recipe, &args.set)?;
    let settings: Vec<_> = resolved
        .settings
        .iter()
        .map(|s| json!({ "key": s.key, "value": s.value, "origin": s.origin.to_string() }))
        .collect();
    let value = json!({ "recipe": resolved.name, "out": out_dir(args, &resolved), "settings": settings });
    emit(global, value, || {
        let mut rows = vec![vec!["KEY".into(), "VALUE".into(), "FROM".into()]];
        for s in &resolved.settings {
            rows.push(vec![s.key.clone(), inline(&s.value).unwrap_or_else(|| "-".into()), s.origin.to_string()]);
        }
        format!("{}\nresults go to {}", columns(&rows), out_dir(args, &resolved).display())
    })
}

/// Answers one question.
pub(super) fn generate(_global: &Global, _args: &GenerateArgs) -> Result<()> {
    Err(Error::new(Kind::Run, "not available"))
}

/// Merges an adapter.
pub(super) fn merge(_global: &Global, _args: &MergeArgs) -> Result<()> {
    Err(Error::new(Kind::Run, "not available"))
}

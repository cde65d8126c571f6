//! `medtune repro`: a finished run once more, compared hash by hash.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::json;

use super::{columns, context, emit};
use crate::{
    cli::{Global, ReproArgs},
    error::{Error, Kind, Result},
    plan::Resolved,
    repro::{Finding, compare},
    run_dir::RunDir,
    stage::{STAGES, construct::LEDGER},
};

/// Runs the recipe of a run directory again beside it, and says what came out differently.
pub(super) fn repro(global: &Global, args: &ReproArgs) -> Result<()> {
    let recipe = args.run.join("plan.toml");
    if !args.run.join("MANIFEST.json").exists() || !recipe.exists() {
        return Err(Error::new(Kind::Config, "this is no run directory")
            .at(args.run.display())
            .expected("plan.toml and MANIFEST.json")
            .help("name a directory that `medtune run` has written"));
    }
    let ctx = context(global)?;
    let resolved = Resolved::new(&recipe.display().to_string(), &[])?;
    let last = last_stage(&args.run)?;
    let out = args.out.clone().unwrap_or_else(|| sibling(&args.run));
    let run = RunDir::open(&out)?;
    let copied = copy_ledger(&args.run, &run)?;
    if copied {
        ctx.progress.say("replies of language models are those of the first run");
    }
    crate::run::run(&resolved, &run, &ctx, last, false)?;
    let findings = compare(&args.run, run.root())?;
    let differing = findings.iter().filter(|f| !f.same).count();
    let value = json!({ "run": args.run, "repro": run.root(), "differing": differing, "findings": findings });
    emit(global, value, || text(&findings, &args.run, run.root()))?;
    if differing == 0 {
        return Ok(());
    }
    let first = findings.iter().find(|f| !f.same).map(|f| format!("{} of {}", f.name, f.stage)).unwrap_or_default();
    Err(Error::new(Kind::Gate, "the run did not come out the same")
        .found(format!("{differing} differences, first {first}"))
        .help("the table says what a stage was made from and what it made; a different input explains what follows it"))
}

/// The last stage that the run has completed.
fn last_stage(run: &Path) -> Result<&'static str> {
    let records = crate::repro::records(run)?;
    let last = STAGES.iter().rev().find(|s| records.stages.contains_key(s.name));
    last.map(|s| s.name).ok_or_else(|| Error::new(Kind::Config, "no stage of this run is complete").at(run.display()))
}

/// `run/phantom` -> `run/phantom_repro`
fn sibling(run: &Path) -> PathBuf {
    let name = run.file_name().map_or_else(|| "run".into(), |n| n.to_string_lossy().into_owned());
    run.with_file_name(format!("{name}_repro"))
}

/// Requests that have a reply cost nothing again.
fn copy_ledger(from: &Path, to: &RunDir) -> Result<bool> {
    let (source, target) = (from.join(LEDGER), to.path(LEDGER));
    if !source.exists() || target.exists() {
        return Ok(false);
    }
    fs::copy(&source, &target).map_err(|e| Error::io(&target, e))?;
    Ok(true)
}

fn text(findings: &[Finding], first: &Path, second: &Path) -> String {
    let mut rows = vec![["STAGE", "WHAT", "", "FIRST RUN", "THIS RUN"].map(String::from).to_vec()];
    for f in findings {
        let verdict = if f.same { "same" } else { "DIFFERS" };
        rows.push(vec![f.stage.into(), f.name.clone(), verdict.into(), f.first.clone(), f.second.clone()]);
    }
    let differing = findings.iter().filter(|f| !f.same).count();
    let end = match differing {
        0 => format!("all {} hashes of {} are those of {}", findings.len(), second.display(), first.display()),
        n => {
            format!("{n} of {} hashes of {} differ from those of {}", findings.len(), second.display(), first.display())
        }
    };
    format!("{}{end}", columns(&rows))
}

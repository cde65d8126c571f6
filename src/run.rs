//! Walks a plan stage by stage and skips stages whose inputs and outputs have not changed.

use std::{
    sync::{Arc, atomic::AtomicBool},
    time::Instant,
};

use crate::{
    device::guard::guard,
    error::{Error, Kind, Result},
    fit::Situation,
    manifest::{self, Manifest},
    plan::{Plan, Resolved},
    run_dir::RunDir,
    stage::{Ctx, STAGES, Stage, Summary, encode::EncodeReport},
};

/// What became of a stage.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Outcome {
    /// Its name.
    pub stage: &'static str,
    /// Whether its earlier result still held.
    pub skipped: bool,
    /// What it counted, now or when it ran.
    pub summary: Summary,
    /// How long it took when it ran.
    pub seconds: f64,
}

/// Runs every stage up to and including `last`; those that are complete and unchanged are skipped. With `force`, `last`
/// runs even then.
///
/// # Errors
/// The first stage that fails, a gate that says no, or an interrupt; what was done is kept, and the same call continues.
pub fn run(resolved: &Resolved, run: &RunDir, ctx: &Ctx, last: &str, force: bool) -> Result<Vec<Outcome>> {
    walk(STAGES, resolved, run, ctx, last, force)
}

/// As [`run`], over other `stages`.
///
/// # Errors
/// As [`run`].
pub fn walk(
    stages: &'static [Stage],
    resolved: &Resolved,
    run: &RunDir,
    ctx: &Ctx,
    last: &str,
    force: bool,
) -> Result<Vec<Outcome>> {
    let mut records = Manifest::load(run, stages)?;
    run.write("plan.toml", resolved.to_toml().as_bytes())?;
    let end = stages
        .iter()
        .position(|s| s.name == last)
        .ok_or_else(|| Error::new(Kind::Config, "unknown stage").found(last))?;
    let mut outcomes = Vec::new();
    for stage in &stages[..=end] {
        let force = force && stage.name == last;
        outcomes.push(step(stage, &mut records, resolved, run, ctx, force)?);
    }
    Ok(outcomes)
}

fn step(
    stage: &'static Stage,
    records: &mut Manifest,
    resolved: &Resolved,
    run: &RunDir,
    ctx: &Ctx,
    force: bool,
) -> Result<Outcome> {
    ctx.check()?;
    let plan = &resolved.plan;
    let forced = force.then(|| "as asked".to_string());
    let Some(reason) = records.reason(stage, plan, run, ctx)?.or(forced) else {
        ctx.progress.say(&format!("{}: unchanged, skipped", stage.name));
        let record = records.stages.get(stage.name);
        return Ok(Outcome {
            stage: stage.name,
            skipped: true,
            summary: record.map(|r| r.summary.clone()).unwrap_or_default(),
            seconds: record.map_or(0.0, |r| r.seconds),
        });
    };
    match reason.as_str() {
        manifest::STARTS => {}
        manifest::CONTINUES => ctx.progress.say(&format!("{}: continues where it was interrupted", stage.name)),
        reason => ctx.progress.say(&format!("{}: runs again, {reason}", stage.name)),
    }
    records.start(stage, plan, run, ctx)?;
    let started = Instant::now();
    let summary = guard(&ctx.device_spec, || predicted(stage, plan, run, ctx), || (stage.run)(plan, run, ctx))?;
    let seconds = started.elapsed().as_secs_f64();
    // Indented names are details of the line above; whoever runs the stage alone sees them.
    let main = summary.lines.iter().filter(|(name, _)| !name.starts_with(' '));
    let counts: Vec<String> = main.map(|(name, value)| format!("{name} {value}")).collect();
    ctx.progress.say(&format!("{}: {} ({seconds:.1} s)", stage.name, counts.join(", ")));
    records.finish(stage, run, summary.clone(), seconds)?;
    Ok(Outcome { stage: stage.name, skipped: false, summary, seconds })
}

/// What a stage was predicted to need; of training alone it is known.
fn predicted(stage: &Stage, plan: &Plan, run: &RunDir, ctx: &Ctx) -> Option<String> {
    if stage.name != "train" {
        return None;
    }
    let encoded: Option<EncodeReport> = run.read_json("encode.json").ok();
    let rows = encoded.as_ref().map(|e| e.rows_ok);
    let situation = Situation::new(plan, plan.network().ok()?, &ctx.device_spec, encoded.as_ref(), rows).ok()?;
    let peak = situation.predict(plan).ok()?.peak as f64 / (1u64 << 30) as f64;
    Some(format!("{peak:.2} GiB at most, as `medtune plan` predicts for training"))
}

/// Sets `stop` on the first interrupt or termination signal, so that work ends at a safe point; a second one ends the
/// process at once.
///
/// # Errors
/// The operating system refuses.
pub fn stop_on_signals(stop: &Arc<AtomicBool>) -> Result<()> {
    use signal_hook::{
        consts::{SIGINT, SIGTERM},
        flag::{register, register_conditional_shutdown},
    };
    for signal in [SIGINT, SIGTERM] {
        // In this order: the flag is still clear when the first signal asks whether to shut down.
        register_conditional_shutdown(signal, 128 + signal, Arc::clone(stop))
            .and_then(|_| register(signal, Arc::clone(stop)))
            .map_err(|e| Error::new(Kind::Run, "cannot handle signals").source(e))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{device::DeviceSpec, progress::Progress};

    const STARVED: &[Stage] = &[Stage {
        name: "train",
        about: "Runs out of memory.",
        reads: &[],
        writes: &[],
        scratch: &[],
        sections: &[],
        device: true,
        run: |_, _, _| panic!("wgpu error: Out of Memory"),
    }];

    #[test]
    fn out_of_memory_says_what_the_plan_predicts_and_what_to_change() {
        let dir = tempfile::tempdir().unwrap();
        let resolved = Resolved::new("phantom", &[]).unwrap();
        let ctx = Ctx::new(DeviceSpec::Cpu, Progress::Silent).unwrap();
        let error = walk(STARVED, &resolved, &RunDir::open(dir.path()).unwrap(), &ctx, "train", false).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("run out of memory") && text.contains("GiB at most, as `medtune plan` predicts"),
            "{text}"
        );
        assert!(error.help_line().unwrap().contains("train.per_device_train_batch_size"), "{text}");
    }
}

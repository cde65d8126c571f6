//! Judges every answer: `verdicts.jsonl`. Each answer ends as exactly one [`Outcome`]; only scored ones become numbers.
//! Judges that ask a language model also write what is known of them as instruments: `judge.json`, `panel.jsonl`.

use std::{collections::BTreeMap, path::Path};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    Ctx, Summary,
    construct::client,
    eval::{Answer, Which},
};
use crate::{
    error::{Error, Kind, Result},
    judge::{
        Judge, Judged, Outcome, Ruling,
        measure::{Agreement, Controls, Shift},
    },
    llm::Key,
    plan::Plan,
    row_file::{RowFile, RowsById},
    run_dir::{JsonlWriter, RunDir, sha256_bytes, stream_jsonl},
    sample::Sample,
};

mod bench;

use bench::Bench;

/// A row of `verdicts.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// Id of the sample.
    pub id: String,
    /// Whose answer was judged.
    pub model: Which,
    /// What came of it.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// Requests behind it, the last one with the reply that counts; their replies are in the ledger.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub requests: Vec<Key>,
}

/// A row of `panel.jsonl`: a verdict of another judge.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PanelVerdict {
    /// The other judge.
    pub judge: String,
    /// Its verdict.
    #[serde(flatten)]
    pub verdict: Verdict,
}

/// `judge.json`: what is known of the instrument.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct JudgeReport {
    /// The judge's identity.
    pub signature: Value,
    /// Verdicts by outcome.
    pub outcomes: BTreeMap<String, usize>,
    /// Answers that were asked about more than once.
    pub retried: usize,
    /// Agreement with other judges, by judge and criterion.
    pub panel: BTreeMap<String, BTreeMap<String, Agreement>>,
    /// What the order of sample and answer does to scores.
    pub order: BTreeMap<String, Shift>,
    /// What idle words do to scores.
    pub verbosity: BTreeMap<String, Shift>,
    /// Scores of the frozen answers.
    pub controls: Option<Controls>,
}

/// Judges answers that belong to no run: each outcome with the judge's words, in the order of the answers. Requests and
/// replies are in the ledger of `root`, so that a second call pays for nothing again.
///
/// # Errors
/// The judge cannot be set up or asks no language model, an answer belongs to no sample, the budget is spent, or the
/// user interrupts.
pub fn ask_about(
    plan: &Plan,
    samples: &[Sample],
    answers: &[Answer],
    root: &Path,
    ctx: &Ctx,
) -> Result<Vec<(Outcome, Option<String>)>> {
    let judge = plan.make_judge()?;
    if !judge.asks() {
        return Err(Error::new(Kind::Config, "the judge of this recipe asks no language model")
            .at(&plan.recipe)
            .help("use a recipe whose judge does, for example medhalltune"));
    }
    let (mut rows, mut given) = (RowsById::scratch(root)?, RowFile::scratch(root)?);
    samples.iter().try_for_each(|sample| rows.push(&sample.id, sample))?;
    answers.iter().try_for_each(|answer| given.push(answer).map(drop))?;
    let model = client(plan, root, ctx)?;
    let mut task = ctx.progress.start("judge answers", answers.len() as u64);
    let sitting = Bench::new(plan, &rows, &given, &model, root)?.sit(judge.as_ref(), &mut |n| {
        task.advance(n as u64);
        ctx.check()
    })?;
    task.finish();
    sitting.with_replies().map(|row| row.map(|(verdict, reply)| (verdict.outcome, reply))).collect()
}

/// Judges `answers.jsonl` with the recipe's judge.
///
/// # Errors
/// The judge cannot be set up, an answer belongs to no kept row, the directory cannot be written, or the gate: scores of
/// the frozen answers are too far from where they belong.
pub fn run(plan: &Plan, dir: &RunDir, ctx: &Ctx) -> Result<Summary> {
    let recipe = plan.recipe()?;
    let judge = plan.make_judge()?;
    let samples = RowsById::<Sample>::open(dir.path("kept.jsonl"))?;
    let answers = RowFile::<Answer>::open(dir.path("answers.jsonl"))?;
    let mut report = JudgeReport { signature: judge.signature(), ..JudgeReport::default() };
    let mut task = ctx.progress.start("judge answers", answers.len() as u64);
    if judge.asks() {
        let model = client(plan, dir.root(), ctx)?;
        let bench = Bench::new(plan, &samples, &answers, &model, dir.root())?;
        let sitting = bench.sit(judge.as_ref(), &mut |n| {
            task.advance(n as u64);
            ctx.check()
        })?;
        bench.measure(judge.as_ref(), recipe.panel(plan)?, recipe.controls(), &sitting, dir, &mut report)?;
        let mut out = dir.replace_jsonl("verdicts.jsonl")?;
        for verdict in sitting.verdicts() {
            let verdict = verdict?;
            report.count(&verdict);
            out.push(&verdict)?;
        }
        out.finish()?;
    } else {
        let (done, mut journal) = earlier(dir)?;
        let mut out = dir.replace_jsonl("verdicts.jsonl")?;
        settle(judge.as_ref(), &samples, answers.iter(), &done, |verdict, new| {
            if new {
                journal.push(verdict)?;
            }
            report.count(verdict);
            out.push(verdict)?;
            task.advance(1);
            ctx.check()
        })?;
        out.finish()?;
    }
    task.finish();
    dir.write_json("judge.json", &report)?;
    gate(plan, &report)?;
    Ok(summary(answers.len(), &report))
}

impl JudgeReport {
    fn count(&mut self, verdict: &Verdict) {
        *self.outcomes.entry(verdict.outcome.name().into()).or_default() += 1;
        self.retried += usize::from(verdict.requests.len() > 1);
    }
}

fn gate(plan: &Plan, report: &JudgeReport) -> Result<()> {
    let Some(controls) = &report.controls else { return Ok(()) };
    for (drift, what) in [(controls.drift, "where they belong"), (controls.drift_since_before, "an earlier run")] {
        if let Some(drift) = drift.filter(|d| *d > plan.judge.max_drift) {
            return Err(Error::new(Kind::Gate, "the judge has drifted")
                .at("judge.json, controls")
                .expected(format!("scores of the frozen answers within {} points of {what}", plan.judge.max_drift))
                .found(format!("{drift:.2} points on average"))
                .help("use another judge, or accept this one with a larger judge.max_drift"));
        }
    }
    Ok(())
}

/// Name of an answer in a set of verdicts.
fn place(model: Which, id: &str) -> String {
    format!("{model:?} {id}")
}

/// Verdicts of an interrupted run, or of another run on the same base model; and where new ones are noted until all are
/// there.
fn earlier(dir: &RunDir) -> Result<(RowsById<Verdict>, JsonlWriter)> {
    let journal = dir.append_jsonl("verdicts.jsonl")?;
    let mut done = RowsById::scratch(dir.root())?;
    for verdict in stream_jsonl::<Verdict>(&dir.path("verdicts.jsonl"))? {
        let verdict = verdict?;
        done.push(&place(verdict.model, &verdict.id), &verdict)?;
    }
    Ok((done, journal))
}

/// Verdicts of a judge by rule, in the order of the answers. Those in `done` are taken over; `each` receives every
/// verdict, and whether it is new.
///
/// # Errors
/// An answer belongs to no sample, a verdict of `done` to no answer, the judge has to ask, or `each` fails.
fn settle(
    judge: &dyn Judge,
    samples: &RowsById<Sample>,
    answers: impl Iterator<Item = Result<Answer>>,
    done: &RowsById<Verdict>,
    mut each: impl FnMut(&Verdict, bool) -> Result<()>,
) -> Result<()> {
    let mut taken = 0;
    for answer in answers {
        let Answer { id, model, answer } = answer?;
        let sample = samples.get(&id)?.ok_or_else(|| orphan("answer", &id, "kept.jsonl"))?;
        if let Some(verdict) = done.get(&place(model, &id))? {
            taken += 1;
            each(&verdict, false)?;
            continue;
        }
        let Ruling::Settled(outcome) = judge.judge(Judged { sample: &sample, answer: &answer, anchor: None })? else {
            return Err(Error::new(Kind::Config, "this judge asks a language model and says that it does not"));
        };
        each(&Verdict { id, model, outcome, requests: Vec::new() }, true)?;
    }
    if taken < done.len() {
        let why = format!("{} verdicts", done.len() - taken);
        return Err(orphan("a verdict", &why, "answers.jsonl"));
    }
    Ok(())
}

/// A row whose partner is missing.
pub(super) fn orphan(what: &str, id: &str, partner: &str) -> Error {
    Error::new(Kind::Run, format!("{what} belongs to no row of {partner}"))
        .at(id)
        .help("the files of this directory do not belong together; delete them and run the same command again")
}

fn summary(answers: usize, report: &JudgeReport) -> Summary {
    let mut summary = Summary::default();
    summary.line("answers", answers).line("verdicts", report.outcomes.values().sum::<usize>());
    for (name, count) in &report.outcomes {
        summary.line(name, count);
    }
    let kind = report.signature["kind"].as_str().unwrap_or("judge");
    let hash = sha256_bytes(report.signature.to_string().as_bytes());
    summary.line("judge", format!("{kind} {}", &hash[..12]));
    for (name, criteria) in &report.panel {
        for (criterion, a) in criteria {
            let kappa = a.weighted_kappa.map_or("-".to_string(), |k| format!("{k:.2}"));
            let text = format!("kappa {kappa}, {:.1} points apart, n = {}", a.mean_absolute_difference, a.n);
            summary.line(&format!("  {name} on {criterion}"), text);
        }
    }
    for (what, shifts) in [("order", &report.order), ("idle words", &report.verbosity)] {
        for (criterion, s) in shifts {
            let error = s.standard_error.map_or("-".to_string(), |e| format!("{e:.2}"));
            let text = format!("{:+.2} points, standard error {error}, n = {}", s.mean, s.n);
            summary.line(&format!("  {what} on {criterion}"), text);
        }
    }
    if let Some(controls) = &report.controls {
        let scored = controls.items.iter().filter(|i| i.scores.is_some()).count();
        let drift = controls.drift.map_or("not known".to_string(), |d| format!("{d:.2} points"));
        summary.line("drift", format!("{drift}, {scored} of {} frozen answers scored", controls.items.len()));
    }
    summary
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{judge::ReferenceJudge, metric::clinical::tests::row};

    fn answer(id: &str, model: Which) -> Answer {
        Answer { id: id.into(), model, answer: "left".into() }
    }

    fn verdict(id: &str, model: Which, outcome: Outcome) -> Verdict {
        Verdict { id: id.into(), model, outcome, requests: Vec::new() }
    }

    type Settled = Vec<(Verdict, bool)>;

    fn settled(answers: &[Answer], done: &[Verdict]) -> Result<Settled> {
        let dir = tempfile::tempdir().unwrap();
        let mut samples = RowsById::scratch(dir.path())?;
        samples.push("row", &row(None))?;
        let mut earlier = RowsById::scratch(dir.path())?;
        done.iter().try_for_each(|v| earlier.push(&place(v.model, &v.id), v))?;
        let mut all = Vec::new();
        settle(&ReferenceJudge, &samples, answers.iter().cloned().map(Ok), &earlier, |verdict, new| {
            all.push((verdict.clone(), new));
            Ok(())
        })?;
        Ok(all)
    }

    #[test]
    fn every_answer_gets_one_verdict_and_old_ones_are_kept() {
        let answers = [answer("row", Which::Base), answer("row", Which::Tuned)];
        let kept = verdict("row", Which::Tuned, Outcome::OverBudget);
        let all = settled(&answers, std::slice::from_ref(&kept)).unwrap();
        assert_eq!(all, [(verdict("row", Which::Base, Outcome::NoReference), true), (kept, false)]);
    }

    #[test]
    fn rows_without_a_partner_are_errors() {
        assert!(settled(&[answer("other", Which::Base)], &[]).is_err());
        let stray = verdict("gone", Which::Base, Outcome::OverBudget);
        assert!(settled(&[], &[stray]).unwrap_err().to_string().contains("answers.jsonl"));
    }

    #[test]
    fn an_interrupted_run_by_rule_is_continued() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = RunDir::open(scratch.path()).unwrap();
        let old = verdict("row", Which::Base, Outcome::OverBudget);
        let line = serde_json::to_string(&old).unwrap();
        dir.write("verdicts.jsonl", format!("{line}\n{}", &line[..20]).as_bytes()).unwrap();
        let (done, mut journal) = earlier(&dir).unwrap();
        assert_eq!((done.len(), done.get("Base row").unwrap().as_ref()), (1, Some(&old)));
        journal.push(&old).unwrap();
        assert_eq!(dir.read_jsonl::<Verdict>("verdicts.jsonl").unwrap(), [old.clone(), old]);
    }

    #[test]
    fn a_verdict_is_one_flat_object() {
        let verdict = verdict("a", Which::Base, Outcome::Refused { reply: "x".into() });
        let text = serde_json::to_string(&verdict).unwrap();
        assert_eq!(text, r#"{"id":"a","model":"base","outcome":"refused","reply":"x"}"#);
        assert_eq!(serde_json::from_str::<Verdict>(&text).unwrap(), verdict);
    }

    #[test]
    fn a_drifting_judge_closes_the_gate() {
        let mut report = JudgeReport::default();
        gate(&Plan::default(), &report).unwrap();
        report.controls = Some(Controls { drift: Some(0.4), drift_since_before: Some(2.0), items: Vec::new() });
        let error = gate(&Plan::default(), &report).unwrap_err();
        assert!(error.kind() == Kind::Gate && error.to_string().contains("2.00 points"), "{error}");
    }
}

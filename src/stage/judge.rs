//! Judges every answer: `verdicts.jsonl`. Each answer ends as exactly one [`Outcome`]; only scored ones become numbers.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use super::{
    Ctx, Summary,
    eval::{Answer, Which},
};
use crate::{
    error::{Error, Kind, Result},
    judge::{Judge, Outcome},
    plan::Plan,
    run_dir::{RunDir, sha256_bytes},
    sample::Sample,
};

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
}

/// Judges `answers.jsonl` with the recipe's judge.
///
/// # Errors
/// The judge cannot be set up, an answer belongs to no kept row, or the directory cannot be written.
pub fn run(plan: &Plan, dir: &RunDir, ctx: &Ctx) -> Result<Summary> {
    let judge = plan.recipe()?.judge(plan)?;
    let samples: Vec<Sample> = dir.read_jsonl("kept.jsonl")?;
    let answers: Vec<Answer> = dir.read_jsonl("answers.jsonl")?;
    let (done, mut out) = dir.continue_jsonl::<Verdict>("verdicts.jsonl")?;
    let mut task = ctx.progress.start("judge answers", answers.len() as u64);
    let verdicts = judge_all(judge.as_ref(), &samples, &answers, done, |verdict| {
        out.push(verdict)?;
        task.advance(1);
        ctx.check()
    })?;
    drop(out);
    task.finish();
    dir.write_jsonl("verdicts.jsonl", &verdicts)?;
    Ok(summary(&answers, &verdicts, judge.as_ref()))
}

/// Verdicts in the order of the answers. Those in `done` are taken over; `push` receives each new one.
///
/// # Errors
/// An answer belongs to no sample, a verdict of `done` to no answer, or `push` fails.
pub fn judge_all(
    judge: &dyn Judge,
    samples: &[Sample],
    answers: &[Answer],
    done: Vec<Verdict>,
    mut push: impl FnMut(&Verdict) -> Result<()>,
) -> Result<Vec<Verdict>> {
    let samples: HashMap<&str, &Sample> = samples.iter().map(|s| (s.id.as_str(), s)).collect();
    let mut done: HashMap<(Which, String), Verdict> = done.into_iter().map(|v| ((v.model, v.id.clone()), v)).collect();
    let mut verdicts = Vec::with_capacity(answers.len());
    for answer in answers {
        let sample = samples.get(answer.id.as_str()).ok_or_else(|| orphan("answer", &answer.id, "kept.jsonl"))?;
        let verdict = match done.remove(&(answer.model, answer.id.clone())) {
            Some(verdict) => verdict,
            None => {
                let outcome = judge.judge(sample, &answer.answer)?;
                let verdict = Verdict { id: answer.id.clone(), model: answer.model, outcome };
                push(&verdict)?;
                verdict
            }
        };
        verdicts.push(verdict);
    }
    match done.into_values().next() {
        Some(stray) => Err(orphan("verdict", &stray.id, "answers.jsonl")),
        None => Ok(verdicts),
    }
}

/// A row whose partner is missing.
pub(super) fn orphan(what: &str, id: &str, partner: &str) -> Error {
    Error::new(Kind::Run, format!("{what} belongs to no row of {partner}"))
        .at(id)
        .help("the files of this directory do not belong together; delete them and run the same command again")
}

fn summary(answers: &[Answer], verdicts: &[Verdict], judge: &dyn Judge) -> Summary {
    let mut counts = BTreeMap::new();
    for verdict in verdicts {
        *counts.entry(verdict.outcome.name()).or_insert(0usize) += 1;
    }
    let mut summary = Summary::default();
    summary.line("answers", answers.len()).line("verdicts", verdicts.len());
    for (name, count) in counts {
        summary.line(name, count);
    }
    let signature = judge.signature();
    let kind = signature["kind"].as_str().unwrap_or("judge");
    let hash = sha256_bytes(signature.to_string().as_bytes());
    summary.line("judge", format!("{kind} {}", &hash[..12]));
    summary
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{judge::ReferenceJudge, metric::clinical::tests::row};

    fn answer(id: &str, model: Which) -> Answer {
        Answer { id: id.into(), model, answer: "left".into() }
    }

    #[test]
    fn every_answer_gets_one_verdict_and_old_ones_are_kept() {
        let samples = [row(None)];
        let answers = [answer("row", Which::Base), answer("row", Which::Tuned)];
        let kept = Verdict { id: "row".into(), model: Which::Tuned, outcome: Outcome::OverBudget };
        let mut pushed = Vec::new();
        let verdicts = judge_all(&ReferenceJudge, &samples, &answers, vec![kept.clone()], |v| {
            pushed.push(v.clone());
            Ok(())
        })
        .unwrap();
        assert_eq!(verdicts.len(), 2);
        assert_eq!(verdicts[0].outcome, Outcome::NoReference);
        assert_eq!(verdicts[1], kept);
        assert_eq!(pushed, verdicts[..1]);
    }

    #[test]
    fn rows_without_a_partner_are_errors() {
        let push = |_: &Verdict| Ok(());
        let stray = [answer("other", Which::Base)];
        assert!(judge_all(&ReferenceJudge, &[row(None)], &stray, Vec::new(), push).is_err());
        let verdict = Verdict { id: "gone".into(), model: Which::Base, outcome: Outcome::OverBudget };
        assert!(judge_all(&ReferenceJudge, &[row(None)], &[], vec![verdict], push).is_err());
    }

    #[test]
    fn a_verdict_is_one_flat_object() {
        let verdict = Verdict { id: "a".into(), model: Which::Base, outcome: Outcome::Refused { reply: "x".into() } };
        let text = serde_json::to_string(&verdict).unwrap();
        assert_eq!(text, r#"{"id":"a","model":"base","outcome":"refused","reply":"x"}"#);
        assert_eq!(serde_json::from_str::<Verdict>(&text).unwrap(), verdict);
    }
}

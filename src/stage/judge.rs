//! Judges every answer: `verdicts.jsonl`. Each answer ends as exactly one [`Outcome`]; only scored ones become numbers.
//! Judges that ask a language model also write what is known of them as instruments: `judge.json`, `panel.jsonl`.

use std::collections::{BTreeMap, HashMap};

use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    Ctx, Summary,
    construct::{Asks, client, over_budget},
    eval::{Answer, Which},
};
use crate::{
    error::{Error, Kind, Result},
    judge::{
        Anchor, AnchorPolicy, Judge, Judged, Outcome, Ruling, Scores, last_answer,
        measure::{self, Agreement, Control, Controls, Shift},
    },
    llm::{Failure, Key, Request},
    plan::Plan,
    random::stream,
    run_dir::{RunDir, read_json, read_jsonl, sha256_bytes},
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

/// Answers that are asked about at a time.
const BLOCK: usize = 4096;

/// Judges `answers.jsonl` with the recipe's judge.
///
/// # Errors
/// The judge cannot be set up, an answer belongs to no kept row, the directory cannot be written, or the gate: scores of
/// the frozen answers are too far from where they belong.
pub fn run(plan: &Plan, dir: &RunDir, ctx: &Ctx) -> Result<Summary> {
    let recipe = plan.recipe()?;
    let judge = plan.make_judge()?;
    let samples: Vec<Sample> = dir.read_jsonl("kept.jsonl")?;
    let answers: Vec<Answer> = dir.read_jsonl("answers.jsonl")?;
    let mut report = JudgeReport { signature: judge.signature(), ..JudgeReport::default() };
    let verdicts = if judge.asks() {
        let model = client(plan, dir.root(), ctx)?;
        let bench = Bench { plan, samples: by_id(&samples), answers: &answers, model: &model };
        let mut task = ctx.progress.start("judge answers", answers.len() as u64);
        let sitting = bench.sit(judge.as_ref(), &mut |n| {
            task.advance(n as u64);
            ctx.check()
        })?;
        task.finish();
        bench.measure(judge.as_ref(), recipe.panel(plan)?, recipe.controls(), &sitting, dir, &mut report)?;
        sitting.verdicts
    } else {
        let (done, mut out) = dir.continue_jsonl::<Verdict>("verdicts.jsonl")?;
        let mut task = ctx.progress.start("judge answers", answers.len() as u64);
        let verdicts = judge_all(judge.as_ref(), &samples, &answers, done, |verdict| {
            out.push(verdict)?;
            task.advance(1);
            ctx.check()
        })?;
        task.finish();
        verdicts
    };
    dir.write_jsonl("verdicts.jsonl", &verdicts)?;
    for verdict in &verdicts {
        *report.outcomes.entry(verdict.outcome.name().into()).or_default() += 1;
        report.retried += usize::from(verdict.requests.len() > 1);
    }
    dir.write_json("judge.json", &report)?;
    gate(plan, &report)?;
    Ok(summary(&answers, &verdicts, &report))
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

fn by_id(samples: &[Sample]) -> HashMap<&str, &Sample> {
    samples.iter().map(|s| (s.id.as_str(), s)).collect()
}

/// An outcome with the words it came from and the requests behind it.
type Ruled = (Outcome, Option<String>, Vec<Key>);

/// The sample answer of each row with the reply that scored it, or why there is none.
type Anchors = HashMap<String, std::result::Result<Anchor, String>>;

/// Verdicts of a judge in the order of the answers, and the sample answers they were given beside.
struct Sitting {
    verdicts: Vec<Verdict>,
    anchors: Anchors,
}

/// Everything that judging by a language model works on.
struct Bench<'a> {
    plan: &'a Plan,
    samples: HashMap<&'a str, &'a Sample>,
    answers: &'a [Answer],
    model: &'a dyn Asks,
}

impl Bench<'_> {
    fn sample(&self, id: &str) -> Result<&Sample> {
        self.samples.get(id).copied().ok_or_else(|| orphan("answer", id, "kept.jsonl"))
    }

    /// Whether an answer is judged first and without a sample, because it is the sample of others.
    fn is_alone(&self, judge: &dyn Judge, i: usize) -> bool {
        judge.anchor() == AnchorPolicy::Base && self.answers[i].model == Which::Base
    }

    /// Judges every answer.
    fn sit(&self, judge: &dyn Judge, progress: &mut dyn FnMut(usize) -> Result<()>) -> Result<Sitting> {
        let policy = judge.anchor();
        let mut found: Vec<Option<Ruled>> = vec![None; self.answers.len()];
        let (alone, beside): (Vec<usize>, Vec<usize>) = (0..self.answers.len()).partition(|i| self.is_alone(judge, *i));
        for block in alone.chunks(BLOCK) {
            let judged: Vec<Judged<'_>> = block.iter().map(|i| self.judged(*i, None)).collect::<Result<_>>()?;
            for (i, ruled) in block.iter().zip(self.rule(judge, &judged)?) {
                found[*i] = Some(ruled);
            }
            progress(block.len())?;
        }
        let anchors = self.anchors(judge, &alone, &found)?;
        for block in beside.chunks(BLOCK) {
            let (mut ready, mut judged) = (Vec::new(), Vec::new());
            for i in block {
                match anchors.get(self.answers[*i].id.as_str()) {
                    Some(Ok(anchor)) => {
                        judged.push(self.judged(*i, Some(anchor))?);
                        ready.push(*i);
                    }
                    None if policy == AnchorPolicy::None => {
                        judged.push(self.judged(*i, None)?);
                        ready.push(*i);
                    }
                    Some(Err(why)) => found[*i] = Some((without_anchor(why), None, Vec::new())),
                    None => found[*i] = Some((without_anchor("there is none"), None, Vec::new())),
                }
            }
            for (i, ruled) in ready.into_iter().zip(self.rule(judge, &judged)?) {
                found[i] = Some(ruled);
            }
            progress(block.len())?;
        }
        let verdict = |(answer, ruled): (&Answer, Option<Ruled>)| {
            let (outcome, _, requests) = ruled.expect("every answer is alone or beside an anchor");
            Verdict { id: answer.id.clone(), model: answer.model, outcome, requests }
        };
        let verdicts = self.answers.iter().zip(found).map(verdict).collect();
        Ok(Sitting { verdicts, anchors })
    }

    fn judged<'b>(&'b self, i: usize, anchor: Option<&'b Anchor>) -> Result<Judged<'b>> {
        let answer = &self.answers[i];
        Ok(Judged { sample: self.sample(&answer.id)?, answer: &answer.answer, anchor })
    }

    fn anchors(&self, judge: &dyn Judge, alone: &[usize], found: &[Option<Ruled>]) -> Result<Anchors> {
        let entry = |id: &str, answer: &str, ruled: &Ruled| {
            let anchor = match ruled {
                (Outcome::Scored { .. }, Some(reply), _) => Ok(Anchor { answer: answer.into(), reply: reply.clone() }),
                (outcome, ..) => Err(format!("it came out as {}", outcome.name())),
            };
            (id.to_string(), anchor)
        };
        Ok(match judge.anchor() {
            AnchorPolicy::None => HashMap::new(),
            AnchorPolicy::Base => {
                let pairs = alone.iter().filter_map(|i| Some((&self.answers[*i], found[*i].as_ref()?)));
                pairs.map(|(answer, ruled)| entry(&answer.id, &answer.answer, ruled)).collect()
            }
            AnchorPolicy::File => anchor_file(self.plan)?.into_iter().map(|(id, a)| (id, Ok(a))).collect(),
            AnchorPolicy::Reference => {
                let mut ids: Vec<&str> = self.answers.iter().map(|a| a.id.as_str()).collect();
                ids.sort_unstable();
                ids.dedup();
                let mut anchors = HashMap::new();
                for block in ids.chunks(BLOCK) {
                    let samples: Vec<&Sample> = block.iter().map(|id| self.sample(id)).collect::<Result<_>>()?;
                    let judged: Vec<Judged<'_>> = samples
                        .iter()
                        .map(|sample| Judged { sample, answer: last_answer(sample), anchor: None })
                        .collect();
                    let ruled = self.rule(judge, &judged)?;
                    anchors.extend(judged.iter().zip(&ruled).map(|(j, r)| entry(&j.sample.id, j.answer, r)));
                }
                anchors
            }
        })
    }

    /// Rules on each answer, asking again where a reply cannot be read.
    fn rule(&self, judge: &dyn Judge, judged: &[Judged<'_>]) -> Result<Vec<Ruled>> {
        let mut found: Vec<Option<Ruled>> = vec![None; judged.len()];
        let mut open: Vec<(usize, Request)> = Vec::new();
        for (i, one) in judged.iter().enumerate() {
            match judge.judge(*one)? {
                Ruling::Settled(outcome) => found[i] = Some((outcome, None, Vec::new())),
                Ruling::Ask(request) => open.push((i, *request)),
            }
        }
        for attempt in 0..=self.plan.judge.retries {
            if open.is_empty() {
                break;
            }
            let requests = open.iter().map(|(_, r)| Request { variant: r.variant + attempt, ..r.clone() }).collect();
            self.model.ask(requests, &mut |k, outcome| {
                let i = open[k].0;
                let mut keys = found[i].take().map_or_else(Vec::new, |(.., keys)| keys);
                found[i] = Some(match outcome {
                    Ok(reply) => {
                        keys.push(reply.key);
                        (judge.read(judged[i], &reply), Some(reply.text), keys)
                    }
                    Err(Failure::OverBudget { limit }) => return Err(over_budget(&limit)),
                    Err(failure) => (Outcome::ApiError { message: failure.to_string() }, None, keys),
                });
                Ok(())
            })?;
            open.retain(|(i, _)| matches!(found[*i], Some((Outcome::Unparsable { .. }, ..))));
        }
        found
            .into_iter()
            .map(|ruled| ruled.ok_or_else(|| Error::new(Kind::Run, "a request came back without an outcome")))
            .collect()
    }

    /// Measures the instrument: other judges, order, idle words, frozen answers.
    fn measure(
        &self,
        judge: &dyn Judge,
        panel: Vec<(String, Box<dyn Judge>)>,
        controls: &str,
        sitting: &Sitting,
        dir: &RunDir,
        report: &mut JudgeReport,
    ) -> Result<()> {
        let mut all = Vec::new();
        for (name, other) in panel {
            let theirs = self.sit(other.as_ref(), &mut |_| Ok(()))?.verdicts;
            let pairs = sitting.verdicts.iter().zip(&theirs).filter_map(|(a, b)| both(&a.outcome, &b.outcome));
            report.panel.insert(name.clone(), measure::agreement(&pairs.collect::<Vec<_>>()));
            all.extend(theirs.into_iter().map(|verdict| PanelVerdict { judge: name.clone(), verdict }));
        }
        dir.write_jsonl("panel.jsonl", &all)?;
        self.probe(judge, sitting, report)?;
        if self.plan.judge.controls {
            report.controls = self.controls(judge, controls)?;
        }
        Ok(())
    }

    /// Judges a few answers again with changes that should not matter.
    fn probe(&self, judge: &dyn Judge, sitting: &Sitting, report: &mut JudgeReport) -> Result<()> {
        let scored = |i: &usize| measure::scores(&sitting.verdicts[*i].outcome).is_some();
        let mut chosen: Vec<usize> = (0..self.answers.len()).filter(scored).collect();
        chosen.shuffle(&mut stream(self.plan.seed, "judge/probe", 0));
        chosen.truncate(self.plan.judge.probes);
        let plain: Vec<Judged<'_>> = chosen
            .iter()
            .map(|i| {
                let anchor = sitting.anchors.get(&self.answers[*i].id).and_then(|a| a.as_ref().ok());
                self.judged(*i, anchor.filter(|_| !self.is_alone(judge, *i)))
            })
            .collect::<Result<_>>()?;
        let wordy: Vec<String> = plain.iter().map(|j| measure::wordy(j.answer)).collect();
        let longer: Vec<Judged<'_>> = plain.iter().zip(&wordy).map(|(j, answer)| Judged { answer, ..*j }).collect();
        report.verbosity = self.compare(judge, &plain, judge, &longer)?;
        if let Some(reversed) = judge.reversed() {
            let beside: Vec<Judged<'_>> = plain.into_iter().filter(|j| j.anchor.is_some()).collect();
            report.order = self.compare(judge, &beside, reversed.as_ref(), &beside)?;
        }
        Ok(())
    }

    fn compare(
        &self,
        first: &dyn Judge,
        plain: &[Judged<'_>],
        second: &dyn Judge,
        changed: &[Judged<'_>],
    ) -> Result<BTreeMap<String, Shift>> {
        let (a, b) = (self.rule(first, plain)?, self.rule(second, changed)?);
        let pairs = a.iter().zip(&b).filter_map(|(a, b)| both(&a.0, &b.0));
        Ok(measure::shift(&pairs.collect::<Vec<_>>()))
    }

    /// Judges the frozen answers, each day anew: old replies would say nothing about the judge of today.
    fn controls(&self, judge: &dyn Judge, text: &str) -> Result<Option<Controls>> {
        let set = Control::read(text)?;
        if set.is_empty() {
            return Ok(None);
        }
        let before: Option<JudgeReport> = self.plan.judge.controls_before.as_deref().map(read_json).transpose()?;
        let samples: Vec<Sample> = set.iter().map(Control::sample).collect();
        let judged: Vec<Judged<'_>> =
            samples.iter().zip(&set).map(|(sample, c)| Judged { sample, answer: &c.answer, anchor: None }).collect();
        let outcomes: Vec<Outcome> =
            self.rule(&Today(judge), &judged)?.into_iter().map(|(outcome, ..)| outcome).collect();
        Ok(Some(measure::controls(&set, &outcomes, before.and_then(|b| b.controls).as_ref())))
    }
}

/// A judge whose replies are a day old at most.
struct Today<'a>(&'a dyn Judge);

impl Judge for Today<'_> {
    fn signature(&self) -> Value {
        self.0.signature()
    }

    fn judge(&self, judged: Judged<'_>) -> Result<Ruling> {
        let day = jiff::Timestamp::now().as_second() / 86_400;
        Ok(match self.0.judge(judged)? {
            // Room for a few retries between the days.
            Ruling::Ask(request) => {
                let variant = u32::try_from(day * 16).unwrap_or_default();
                Ruling::Ask(Box::new(Request { variant, ..*request }))
            }
            settled => settled,
        })
    }

    fn read(&self, judged: Judged<'_>, reply: &crate::llm::Reply) -> Outcome {
        self.0.read(judged, reply)
    }
}

fn both(a: &Outcome, b: &Outcome) -> Option<(Scores, Scores)> {
    measure::scores(a).zip(measure::scores(b))
}

fn without_anchor(why: &str) -> Outcome {
    Outcome::ApiError { message: format!("not judged, because its sample answer has no scores: {why}") }
}

/// Sample answers from a file, by row id.
fn anchor_file(plan: &Plan) -> Result<HashMap<String, Anchor>> {
    let Some(path) = &plan.judge.anchor_file else {
        return Err(Error::new(Kind::Config, "judge.anchor = \"file\" needs a file").at("judge.anchor_file"));
    };
    let rows: Vec<serde_json::Map<String, Value>> = read_jsonl(path)?;
    let mut anchors = HashMap::new();
    for (i, row) in rows.iter().enumerate() {
        let text = |keys: [&str; 2]| keys.iter().find_map(|k| row.get(*k)).and_then(Value::as_str).map(String::from);
        let id = match row.get("question_id").or(row.get("id")) {
            Some(Value::String(id)) => Some(id.clone()),
            Some(Value::Number(n)) => Some(n.to_string()),
            _ => None,
        };
        let fields = (id, text(["reference_answers", "answer"]), text(["reference_scores", "result"]));
        let (Some(id), Some(answer), Some(reply)) = fields else {
            return Err(Error::new(Kind::Data, "a sample answer lacks a field")
                .at(format!("{}:{}", path.display(), i + 1))
                .expected("question_id, answer and result")
                .help("`result` is the judge's whole reply to this answer"));
        };
        anchors.insert(id, Anchor { answer, reply });
    }
    Ok(anchors)
}

/// Verdicts of a judge by rule, in the order of the answers. Those in `done` are taken over; `push` receives each new
/// one.
///
/// # Errors
/// An answer belongs to no sample, a verdict of `done` to no answer, the judge has to ask, or `push` fails.
pub fn judge_all(
    judge: &dyn Judge,
    samples: &[Sample],
    answers: &[Answer],
    done: Vec<Verdict>,
    mut push: impl FnMut(&Verdict) -> Result<()>,
) -> Result<Vec<Verdict>> {
    let samples = by_id(samples);
    let mut done: HashMap<(Which, String), Verdict> = done.into_iter().map(|v| ((v.model, v.id.clone()), v)).collect();
    let mut verdicts = Vec::with_capacity(answers.len());
    for answer in answers {
        let sample = samples.get(answer.id.as_str()).ok_or_else(|| orphan("answer", &answer.id, "kept.jsonl"))?;
        let verdict = match done.remove(&(answer.model, answer.id.clone())) {
            Some(verdict) => verdict,
            None => {
                let Ruling::Settled(outcome) = judge.judge(Judged { sample, answer: &answer.answer, anchor: None })?
                else {
                    return Err(Error::new(Kind::Config, "this judge asks a language model and says that it does not"));
                };
                let verdict = Verdict { id: answer.id.clone(), model: answer.model, outcome, requests: Vec::new() };
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

fn summary(answers: &[Answer], verdicts: &[Verdict], report: &JudgeReport) -> Summary {
    let mut summary = Summary::default();
    summary.line("answers", answers.len()).line("verdicts", verdicts.len());
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

    #[test]
    fn every_answer_gets_one_verdict_and_old_ones_are_kept() {
        let samples = [row(None)];
        let answers = [answer("row", Which::Base), answer("row", Which::Tuned)];
        let kept = verdict("row", Which::Tuned, Outcome::OverBudget);
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
        let verdict = verdict("gone", Which::Base, Outcome::OverBudget);
        assert!(judge_all(&ReferenceJudge, &[row(None)], &[], vec![verdict], push).is_err());
    }

    #[test]
    fn a_verdict_is_one_flat_object() {
        let verdict = verdict("a", Which::Base, Outcome::Refused { reply: "x".into() });
        let text = serde_json::to_string(&verdict).unwrap();
        assert_eq!(text, r#"{"id":"a","model":"base","outcome":"refused","reply":"x"}"#);
        assert_eq!(serde_json::from_str::<Verdict>(&text).unwrap(), verdict);
    }

    /// Replies by what stands in the request.
    struct Scripted;

    impl Asks for Scripted {
        fn ask(&self, requests: Vec<Request>, each: &mut super::super::construct::Each<'_>) -> Result<()> {
            for (i, request) in requests.into_iter().enumerate() {
                let all = serde_json::to_string(&request.messages).unwrap();
                let outcome = match () {
                    () if all.contains("gone") => Err(Failure::Timeout { attempts: 2 }),
                    () if all.contains("mumble") && request.variant == 0 => Ok("It is fine."),
                    () if all.contains("never") => Ok("It is fine."),
                    () if all.contains("Sample Answer: ") => Ok("8 8 8 8\n\nBetter."),
                    () => Ok("3 3 3 3\n\nPoor."),
                };
                each(i, outcome.map(crate::judge::llm::tests::reply))?;
            }
            Ok(())
        }
    }

    fn asking(anchor: AnchorPolicy, file: Option<std::path::PathBuf>) -> (Plan, Vec<Verdict>) {
        let mut plan = Plan::default();
        (plan.judge.anchor, plan.judge.anchor_file) = (anchor, file);
        let judge = crate::judge::llm::LlmJudge::new(&plan, "Rate it. There is a sample.", None).unwrap();
        let samples: Vec<Sample> = ["plain", "mumble", "never", "gone"]
            .map(|id| {
                let mut sample = row(None);
                sample.id = id.into();
                sample.turns = Control { answer: String::new(), ..control(id) }.sample().turns;
                sample
            })
            .into();
        let both = |s: &Sample| [answer(&s.id, Which::Base), answer(&s.id, Which::Tuned)];
        let answers: Vec<Answer> = samples.iter().flat_map(both).collect();
        let bench = Bench { plan: &plan, samples: by_id(&samples), answers: &answers, model: &Scripted };
        let verdicts = bench.sit(&judge, &mut |_| Ok(())).unwrap().verdicts;
        (plan, verdicts)
    }

    fn control(id: &str) -> Control {
        Control {
            id: id.into(),
            caption: "A film.".into(),
            question: format!("Is it {id}?"),
            reference: "Yes.".into(),
            answer: "left".into(),
            accuracy: [1.0, 10.0],
            risk: [1.0, 10.0],
        }
    }

    fn names(verdicts: &[Verdict]) -> Vec<(Which, &str, usize)> {
        verdicts.iter().map(|v| (v.model, v.outcome.name(), v.requests.len())).collect()
    }

    #[test]
    fn the_base_is_judged_first_and_the_tuned_beside_it() {
        let (_, verdicts) = asking(AnchorPolicy::Base, None);
        use Which::{Base, Tuned};
        let expected = [
            (Base, "scored", 1),
            (Tuned, "scored", 1),
            (Base, "scored", 2),
            (Tuned, "scored", 2),
            (Base, "unparsable", 3),
            (Tuned, "api_error", 0),
            (Base, "api_error", 0),
            (Tuned, "api_error", 0),
        ];
        assert_eq!(names(&verdicts), expected);
        let accuracy = |i: usize| measure::scores(&verdicts[i].outcome).unwrap().accuracy;
        assert_eq!((accuracy(0), accuracy(1)), (3.0, 8.0));
    }

    #[test]
    fn other_samples_are_shown_to_both_models() {
        for (policy, first) in [(AnchorPolicy::Reference, 8.0), (AnchorPolicy::None, 3.0)] {
            let (_, verdicts) = asking(policy, None);
            let accuracy = |i: usize| measure::scores(&verdicts[i].outcome).unwrap().accuracy;
            assert_eq!((accuracy(0), accuracy(1)), (first, first), "{policy:?}");
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        let line = r#"{"question_id": "plain", "answer": "right", "result": "2 2 2 2"}"#;
        std::fs::write(file.path(), format!("{line}\n")).unwrap();
        let (plan, verdicts) = asking(AnchorPolicy::File, Some(file.path().into()));
        assert_eq!(
            names(&verdicts)[..3],
            [(Which::Base, "scored", 1), (Which::Tuned, "scored", 1), (Which::Base, "api_error", 0)]
        );
        std::fs::write(file.path(), r#"{"question_id": "plain", "answer": "right"}"#).unwrap();
        assert!(anchor_file(&plan).unwrap_err().to_string().contains("result"));
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

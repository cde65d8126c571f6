//! Judging by a language model: two stages where answers are shown beside a sample, repeated requests where a reply
//! cannot be read, and measurements of the judge itself.
//!
//! Rows, answers, verdicts and sample answers stay on disk; a block of them is in memory at a time.

use std::{
    collections::{BTreeMap, HashSet},
    path::Path,
};

use rand::seq::SliceRandom;
use serde_json::Value;

use super::{JudgeReport, PanelVerdict, Verdict, orphan};
use crate::{
    error::{Error, Kind, Result},
    judge::{
        Anchor, AnchorPolicy, Judge, Judged, Outcome, Ruling, Scores, last_answer,
        measure::{self, Control, Controls, Shift},
    },
    llm::{Failure, Key, Request},
    plan::Plan,
    random::stream,
    row_file::{RowFile, RowsById},
    run_dir::{RunDir, read_json, stream_jsonl},
    sample::Sample,
    stage::{
        construct::{Asks, over_budget},
        eval::{Answer, Which},
    },
};

/// Answers that are asked about at a time.
const BLOCK: usize = 4096;

/// An outcome with the words it came from and the requests behind it.
type Ruled = (Outcome, Option<String>, Vec<Key>);

/// The sample answer of each row with the reply that scored it, or why there is none.
type Anchors = RowsById<std::result::Result<Anchor, String>>;

/// Verdicts of a judge, and the sample answers they were given beside.
pub(super) struct Sitting {
    /// Each verdict, with the judge's words where it said anything.
    found: RowFile<(Verdict, Option<String>)>,
    /// Position of the verdict on each answer.
    order: Vec<usize>,
    /// Scores of each answer that has some.
    scores: Vec<Option<Scores>>,
    anchors: Anchors,
}

impl Sitting {
    /// Verdicts in the order of the answers.
    pub(super) fn verdicts(&self) -> impl Iterator<Item = Result<Verdict>> + '_ {
        self.with_replies().map(|row| row.map(|(verdict, _)| verdict))
    }

    /// Verdicts with the judge's words, in the order of the answers.
    pub(super) fn with_replies(&self) -> impl Iterator<Item = Result<(Verdict, Option<String>)>> + '_ {
        self.order.iter().map(|i| self.found.row(*i))
    }
}

/// A row, an answer to it, and the sample answer it is judged beside.
struct Loaded {
    sample: Sample,
    answer: String,
    anchor: Option<Anchor>,
}

impl Loaded {
    fn judged(&self) -> Judged<'_> {
        Judged { sample: &self.sample, answer: &self.answer, anchor: self.anchor.as_ref() }
    }
}

/// Everything that judging by a language model works on.
pub(super) struct Bench<'a> {
    plan: &'a Plan,
    samples: &'a RowsById<Sample>,
    answers: &'a RowFile<Answer>,
    /// Whose each answer is.
    whose: Vec<Which>,
    model: &'a dyn Asks,
    /// Where there is room for temporary files.
    room: &'a Path,
}

impl<'a> Bench<'a> {
    /// Looks through the answers.
    ///
    /// # Errors
    /// An answer cannot be read, or belongs to no row.
    pub(super) fn new(
        plan: &'a Plan,
        samples: &'a RowsById<Sample>,
        answers: &'a RowFile<Answer>,
        model: &'a dyn Asks,
        room: &'a Path,
    ) -> Result<Self> {
        let mut whose = Vec::with_capacity(answers.len());
        for answer in answers.iter() {
            let answer = answer?;
            if !samples.contains(&answer.id) {
                return Err(orphan("answer", &answer.id, "kept.jsonl"));
            }
            whose.push(answer.model);
        }
        Ok(Self { plan, samples, answers, whose, model, room })
    }

    fn sample(&self, id: &str) -> Result<Sample> {
        self.samples.get(id)?.ok_or_else(|| orphan("answer", id, "kept.jsonl"))
    }

    /// Whether an answer is judged first and without a sample, because it is the sample of others.
    fn is_alone(&self, judge: &dyn Judge, i: usize) -> bool {
        judge.anchor() == AnchorPolicy::Base && self.whose[i] == Which::Base
    }

    fn load(&self, i: usize) -> Result<Loaded> {
        let answer = self.answers.row(i)?;
        Ok(Loaded { sample: self.sample(&answer.id)?, answer: answer.answer, anchor: None })
    }

    /// Judges every answer.
    ///
    /// # Errors
    /// The server is down, the budget is spent, or `progress` fails; paid replies are kept for the next run.
    pub(super) fn sit(&self, judge: &dyn Judge, progress: &mut dyn FnMut(usize) -> Result<()>) -> Result<Sitting> {
        let count = self.answers.len();
        let mut sitting = Sitting {
            found: RowFile::scratch(self.room)?,
            order: vec![0; count],
            scores: vec![None; count],
            anchors: self.anchors(judge)?,
        };
        let (alone, beside): (Vec<usize>, Vec<usize>) = (0..count).partition(|i| self.is_alone(judge, *i));
        for (round, is_alone) in [(alone, true), (beside, false)] {
            for block in round.chunks(BLOCK) {
                self.block(judge, block, is_alone, &mut sitting)?;
                progress(block.len())?;
            }
        }
        Ok(sitting)
    }

    /// Judges some answers, which are samples of others or are shown beside their samples.
    fn block(&self, judge: &dyn Judge, block: &[usize], alone: bool, sitting: &mut Sitting) -> Result<()> {
        let (mut ready, mut loaded) = (Vec::new(), Vec::new());
        for i in block {
            let mut one = self.load(*i)?;
            if !alone && judge.anchor() != AnchorPolicy::None {
                let anchor = sitting.anchors.get(&one.sample.id)?;
                match anchor.unwrap_or_else(|| Err("there is none".into())) {
                    Ok(anchor) => one.anchor = Some(anchor),
                    Err(why) => {
                        self.note(*i, &one, (without_anchor(&why), None, Vec::new()), sitting)?;
                        continue;
                    }
                }
            }
            ready.push(*i);
            loaded.push(one);
        }
        let judged: Vec<Judged<'_>> = loaded.iter().map(Loaded::judged).collect();
        for ((i, one), ruled) in ready.into_iter().zip(&loaded).zip(self.rule(judge, &judged)?) {
            if alone {
                sitting.anchors.push(&one.sample.id, &entry(&one.answer, &ruled))?;
            }
            self.note(i, one, ruled, sitting)?;
        }
        Ok(())
    }

    fn note(&self, i: usize, one: &Loaded, (outcome, reply, requests): Ruled, sitting: &mut Sitting) -> Result<()> {
        sitting.scores[i] = measure::scores(&outcome);
        let verdict = Verdict { id: one.sample.id.clone(), model: self.whose[i], outcome, requests };
        sitting.order[i] = sitting.found.push(&(verdict, reply))?;
        Ok(())
    }

    /// Sample answers that do not come from the answers themselves.
    fn anchors(&self, judge: &dyn Judge) -> Result<Anchors> {
        let mut anchors = RowsById::scratch(self.room)?;
        match judge.anchor() {
            AnchorPolicy::None | AnchorPolicy::Base => {}
            AnchorPolicy::File => anchor_file(self.plan, |id, anchor| anchors.push(&id, &Ok(anchor)))?,
            AnchorPolicy::Reference => {
                let mut answers = self.answers.iter();
                loop {
                    let mut samples: Vec<Sample> = Vec::new();
                    let mut here = HashSet::new();
                    for answer in answers.by_ref() {
                        let id = answer?.id;
                        if !anchors.contains(&id) && here.insert(id.clone()) {
                            samples.push(self.sample(&id)?);
                        }
                        if samples.len() == BLOCK {
                            break;
                        }
                    }
                    if samples.is_empty() {
                        break;
                    }
                    let judged: Vec<Judged<'_>> = samples
                        .iter()
                        .map(|sample| Judged { sample, answer: last_answer(sample), anchor: None })
                        .collect();
                    for (one, ruled) in judged.iter().zip(&self.rule(judge, &judged)?) {
                        anchors.push(&one.sample.id, &entry(one.answer, ruled))?;
                    }
                }
            }
        }
        Ok(anchors)
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
    ///
    /// # Errors
    /// As [`Bench::sit`], or a file cannot be read or written.
    pub(super) fn measure(
        &self,
        judge: &dyn Judge,
        panel: Vec<(String, Box<dyn Judge>)>,
        controls: &str,
        sitting: &Sitting,
        dir: &RunDir,
        report: &mut JudgeReport,
    ) -> Result<()> {
        let mut out = dir.replace_jsonl("panel.jsonl")?;
        for (name, other) in panel {
            let theirs = self.sit(other.as_ref(), &mut |_| Ok(()))?;
            let pairs = sitting.scores.iter().zip(&theirs.scores).filter_map(|(a, b)| a.zip(*b));
            report.panel.insert(name.clone(), measure::agreement(&pairs.collect::<Vec<_>>()));
            for verdict in theirs.verdicts() {
                out.push(&PanelVerdict { judge: name.clone(), verdict: verdict? })?;
            }
        }
        out.finish()?;
        self.probe(judge, sitting, report)?;
        if self.plan.judge.controls {
            report.controls = self.controls(judge, controls)?;
        }
        Ok(())
    }

    /// Judges a few answers again with changes that should not matter.
    fn probe(&self, judge: &dyn Judge, sitting: &Sitting, report: &mut JudgeReport) -> Result<()> {
        let mut chosen: Vec<usize> = (0..self.answers.len()).filter(|i| sitting.scores[*i].is_some()).collect();
        chosen.shuffle(&mut stream(self.plan.seed, "judge/probe", 0));
        chosen.truncate(self.plan.judge.probes);
        let load = |i: &usize| -> Result<Loaded> {
            let mut one = self.load(*i)?;
            if !self.is_alone(judge, *i) {
                one.anchor = sitting.anchors.get(&one.sample.id)?.and_then(std::result::Result::ok);
            }
            Ok(one)
        };
        let loaded: Vec<Loaded> = chosen.iter().map(load).collect::<Result<_>>()?;
        let plain: Vec<Judged<'_>> = loaded.iter().map(Loaded::judged).collect();
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

/// What an answer that was judged alone is as a sample.
fn entry(answer: &str, ruled: &Ruled) -> std::result::Result<Anchor, String> {
    match ruled {
        (Outcome::Scored { .. }, Some(reply), _) => Ok(Anchor { answer: answer.into(), reply: reply.clone() }),
        (outcome, ..) => Err(format!("it came out as {}", outcome.name())),
    }
}

/// Sample answers from a file; `each` receives row id and sample.
fn anchor_file(plan: &Plan, mut each: impl FnMut(String, Anchor) -> Result<()>) -> Result<()> {
    let Some(path) = &plan.judge.anchor_file else {
        return Err(Error::new(Kind::Config, "judge.anchor = \"file\" needs a file").at("judge.anchor_file"));
    };
    for (i, row) in stream_jsonl::<serde_json::Map<String, Value>>(path)?.enumerate() {
        let row = row?;
        let text = |keys: [&str; 2]| keys.iter().find_map(|k| row.get(*k)).and_then(Value::as_str).map(String::from);
        let id = match row.get("question_id").or(row.get("id")) {
            Some(Value::String(id)) => Some(id.clone()),
            Some(Value::Number(n)) => Some(n.to_string()),
            _ => None,
        };
        let fields = (id, text(["reference_answers", "answer"]), text(["reference_scores", "result"]));
        let (Some(id), Some(answer), Some(reply)) = fields else {
            return Err(Error::new(Kind::Data, "a sample answer lacks a field")
                .at(format!("{}, row {}", path.display(), i + 1))
                .expected("question_id, answer and result")
                .help("`result` is the judge's whole reply to this answer"));
        };
        each(id, Anchor { answer, reply })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{judge::llm::LlmJudge, metric::clinical::tests::row, stage::construct::Each};

    /// Replies by what stands in the request.
    struct Scripted;

    impl Asks for Scripted {
        fn ask(&self, requests: Vec<Request>, each: &mut Each<'_>) -> Result<()> {
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
        let judge = LlmJudge::new(&plan, "Rate it. There is a sample.", None).unwrap();
        let samples: Vec<Sample> = ["plain", "mumble", "never", "gone"]
            .map(|id| {
                let mut sample = row(None);
                sample.id = id.into();
                sample.turns = Control { answer: String::new(), ..control(id) }.sample().turns;
                sample
            })
            .into();
        let dir = tempfile::tempdir().unwrap();
        let (mut rows, mut answers) = (RowsById::scratch(dir.path()).unwrap(), RowFile::scratch(dir.path()).unwrap());
        for sample in &samples {
            rows.push(&sample.id, sample).unwrap();
            for model in [Which::Base, Which::Tuned] {
                answers.push(&Answer { id: sample.id.clone(), model, answer: "left".into() }).unwrap();
            }
        }
        let bench = Bench::new(&plan, &rows, &answers, &Scripted, dir.path()).unwrap();
        let sitting = bench.sit(&judge, &mut |_| Ok(())).unwrap();
        let verdicts: Vec<Verdict> = sitting.verdicts().collect::<Result<_>>().unwrap();
        let scored = verdicts.iter().map(|v| measure::scores(&v.outcome));
        assert!(scored.eq(sitting.scores.iter().copied()));
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
        assert!(anchor_file(&plan, |_, _| Ok(())).unwrap_err().to_string().contains("result"));
    }
}

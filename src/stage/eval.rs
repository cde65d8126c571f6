//! Answers of the base and the tuned model to held-out questions: `answers.jsonl`.

use std::collections::{BTreeMap, HashMap, HashSet, hash_map::Entry};

use burn::tensor::Device;
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Ctx, Summary,
    choices::{ChoiceScoring, Choices},
    controls::{self, Control, ControlAnswer},
    encode::base_dir,
    judge::orphan,
};
use crate::{
    adapter::peft,
    error::{Error, Kind, Result},
    generate::generate,
    judge::last_question,
    models::{self, AnyVlm},
    plan::Plan,
    run_dir::{JsonlWriter, RunDir},
    sample::{Sample, Split},
    vlm::{Encoded, Processor},
};

/// `[eval]` of a recipe.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EvalConfig {
    /// Most rows that are answered, whole images at a time; 0 means all.
    pub rows: usize,
    /// Questions asked again: `blind` without their image, `swapped` with another one.
    pub controls: Vec<Control>,
    /// How a choice among options is found: `reply`, or `likelihood` beside it.
    pub choice: ChoiceScoring,
    /// Encoder of BERTScore in reports: a directory in Hugging Face layout, or the name of one on the hub that is on this
    /// machine; none leaves BERTScore out.
    pub bertscore_model: Option<String>,
}

/// Which of the two models.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Which {
    /// Before tuning.
    Base,
    /// After tuning.
    Tuned,
}

/// A row of `answers.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// Id of the sample.
    pub id: String,
    /// Who answered.
    pub model: Which,
    /// What was answered.
    pub answer: String,
}

/// The rows that are answered: the test split in file order. A limit keeps whole images, in file order, as long as
/// they fit; the first image is always kept.
#[must_use]
pub fn held_out(samples: &[Sample], limit: usize) -> Vec<&Sample> {
    let test: Vec<&Sample> = samples.iter().filter(|s| s.split == Split::Test).collect();
    if limit == 0 || test.len() <= limit {
        return test;
    }
    let mut sizes: HashMap<&str, usize> = HashMap::new();
    for sample in &test {
        *sizes.entry(sample.group.as_str()).or_insert(0) += 1;
    }
    let (mut taken, mut seen, mut rows) = (HashSet::new(), HashSet::new(), 0);
    for sample in &test {
        let group = sample.group.as_str();
        if seen.insert(group) && (taken.is_empty() || rows + sizes[group] <= limit) {
            taken.insert(group);
            rows += sizes[group];
        }
    }
    test.into_iter().filter(|s| taken.contains(s.group.as_str())).collect()
}

/// Answers every row of the test split with both models; then, where the recipe asks for controls, the same questions
/// without their image or with another one, and where it asks for likelihoods, scores the options of multiple-choice rows.
///
/// # Errors
/// Nothing was trained, a model or adapter cannot be loaded, the adapter was trained on differently prepared inputs, an
/// image cannot be read, or the directory cannot be written.
pub fn run(plan: &Plan, dir: &RunDir, ctx: &Ctx) -> Result<Summary> {
    let samples: Vec<Sample> = dir.read_jsonl("kept.jsonl")?;
    let rows = held_out(&samples, plan.eval.rows);
    let controls: BTreeMap<Control, Vec<Sample>> =
        plan.eval.controls.iter().map(|c| (*c, controls::changed(&rows, *c, plan.seed))).collect();
    let mut questions = vec![(None, rows.clone())];
    questions.extend(controls.iter().map(|(control, rows)| (Some(*control), rows.iter().collect())));

    let (done, out) = dir.continue_jsonl::<Answer>(FILE)?;
    let mut log = Log { answers: out, controls: None, found: collect(done, &rows)? };
    if !controls.is_empty() {
        let (done, out) = dir.continue_jsonl::<ControlAnswer>(CONTROLS)?;
        log.controls = Some(out);
        take_controls(&mut log.found, done, &controls)?;
    }
    let mut choices = Choices::open(plan, dir, &rows)?;
    let resumed = log.found.len();
    for which in [Which::Base, Which::Tuned] {
        let mut lazy = Lazy { plan, dir, ctx, which, loaded: None };
        answer_all(plan, ctx, which, &mut lazy, &questions, &mut log)?;
        if let Some(choices) = &mut choices {
            choices.score(plan, ctx, which, &mut lazy)?;
        }
    }
    let Log { mut found, .. } = log;
    let answers = in_order(&rows, &mut found)?;
    dir.write_jsonl(FILE, &answers)?;
    let answered = controls_in_order(&controls, &mut found)?;
    if !controls.is_empty() {
        dir.write_jsonl(CONTROLS, &answered)?;
    }
    let images: HashSet<&str> = rows.iter().map(|s| s.group.as_str()).collect();
    let empty = answers.iter().filter(|a| a.answer.is_empty()).count();
    let mut summary = Summary::default();
    summary.line("test rows", rows.len()).line("images", images.len()).line("answers", answers.len());
    if !controls.is_empty() {
        summary.line("control answers", answered.len());
    }
    if let Some(choices) = choices {
        summary.line("choices by likelihood", choices.finish(dir)?);
    }
    summary.line("empty answers", empty).line("answered before", resumed);
    Ok(summary)
}

/// All answers of one model that are not there yet.
fn answer_all(
    plan: &Plan,
    ctx: &Ctx,
    which: Which,
    lazy: &mut Lazy<'_>,
    questions: &[(Option<Control>, Vec<&Sample>)],
    log: &mut Log,
) -> Result<()> {
    for (control, rows) in questions {
        let key = |id: &str| (which, *control, id.to_string());
        let batches = open_batches(rows, plan.generate.batch_size, |id| log.found.contains_key(&key(id)));
        if batches.is_empty() {
            continue;
        }
        let (model, processor) = lazy.get()?;
        let what = match control {
            None => format!("answers, {}", which.name()),
            Some(control) => format!("answers, {}, {}", which.name(), control.name()),
        };
        let mut task = ctx.progress.start(&what, batches.iter().map(|b| b.len() as u64).sum());
        for batch in batches {
            ctx.check()?;
            for answer in answer(model, processor.as_ref(), &batch, which, plan, &ctx.device)? {
                log.add(*control, answer)?;
            }
            task.advance(batch.len() as u64);
        }
        task.finish();
    }
    Ok(())
}

/// A model that is loaded when it is first needed.
pub(super) struct Lazy<'a> {
    plan: &'a Plan,
    dir: &'a RunDir,
    ctx: &'a Ctx,
    which: Which,
    loaded: Option<(AnyVlm, Box<dyn Processor>)>,
}

impl Lazy<'_> {
    pub(super) fn get(&mut self) -> Result<&(AnyVlm, Box<dyn Processor>)> {
        Ok(match &mut self.loaded {
            Some(loaded) => loaded,
            none => none.insert(load(self.plan, self.dir, self.which, &self.ctx.device)?),
        })
    }
}

/// Answers so far, in memory and in the files.
struct Log {
    answers: JsonlWriter,
    controls: Option<JsonlWriter>,
    found: Found,
}

impl Log {
    fn add(&mut self, control: Option<Control>, answer: Answer) -> Result<()> {
        let Answer { id, model, answer } = answer;
        if let Entry::Vacant(place) = self.found.entry((model, control, id.clone())) {
            match (control, &mut self.controls) {
                (Some(control), Some(out)) => {
                    out.push(&ControlAnswer { id, model, control, answer: answer.clone() })?;
                }
                _ => self.answers.push(&Answer { id, model, answer: answer.clone() })?,
            }
            place.insert(answer);
        }
        Ok(())
    }
}

/// Name of the file with the answers to questions about other images, or none.
pub const CONTROLS: &str = "controls.jsonl";

/// Name of the file.
const FILE: &str = "answers.jsonl";

impl Which {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Base => "base",
            Self::Tuned => "tuned",
        }
    }
}

type Found = HashMap<(Which, Option<Control>, String), String>;

/// Answers of an interrupted run, each of which must belong to a row.
fn collect(done: Vec<Answer>, rows: &[&Sample]) -> Result<Found> {
    let known: HashSet<&str> = rows.iter().map(|s| s.id.as_str()).collect();
    let mut found = HashMap::new();
    for answer in done {
        if !known.contains(answer.id.as_str()) {
            return Err(orphan("answer", &answer.id, "the test split of kept.jsonl"));
        }
        found.insert((answer.model, None, answer.id), answer.answer);
    }
    Ok(found)
}

/// Control answers of an interrupted run, each of which must belong to a row.
fn take_controls(found: &mut Found, done: Vec<ControlAnswer>, controls: &BTreeMap<Control, Vec<Sample>>) -> Result<()> {
    let ids = |rows: &Vec<Sample>| rows.iter().map(|s| s.id.clone()).collect::<HashSet<_>>();
    let known: BTreeMap<Control, HashSet<String>> = controls.iter().map(|(c, rows)| (*c, ids(rows))).collect();
    for answer in done {
        if !known.get(&answer.control).is_some_and(|ids| ids.contains(&answer.id)) {
            return Err(orphan("control answer", &answer.id, "the test split of kept.jsonl"));
        }
        found.insert((answer.model, Some(answer.control), answer.id), answer.answer);
    }
    Ok(())
}

/// Batches of rows of similar length, longest first, without those that are complete. Which rows form a batch does not
/// depend on what is complete, so that an interrupted run ends with the same bytes.
pub(super) fn open_batches<'a>(rows: &[&'a Sample], size: usize, done: impl Fn(&str) -> bool) -> Vec<Vec<&'a Sample>> {
    let mut order: Vec<&Sample> = rows.to_vec();
    order.sort_by_key(|s| std::cmp::Reverse(s.images.len() * (1 << 20) + last_question(s).len()));
    order.chunks(size.max(1)).filter(|b| !b.iter().all(|s| done(&s.id))).map(<[_]>::to_vec).collect()
}

/// Answers of one batch, in its order.
fn answer(
    model: &AnyVlm,
    processor: &dyn Processor,
    batch: &[&Sample],
    which: Which,
    plan: &Plan,
    device: &Device,
) -> Result<Vec<Answer>> {
    let prompts: Vec<Encoded> = batch.par_iter().map(|s| processor.prompt(s)).collect::<Result<_>>()?;
    let stop = processor.stop_ids();
    let ids = generate(model, &prompts, processor.pad_id(), stop, &plan.generate, plan.seed, device, &mut |_, _| {})?;
    let text = |ids: &[i32]| {
        processor.decode(ids.split_last().filter(|(last, _)| stop.contains(last)).map_or(ids, |(_, rest)| rest))
    };
    Ok(batch.iter().zip(&ids).map(|(s, ids)| Answer { id: s.id.clone(), model: which, answer: text(ids) }).collect())
}

/// The base model, or the tuned one: a whole checkpoint in `model/`, else the base with `adapter/`.
fn load(plan: &Plan, dir: &RunDir, which: Which, device: &Device) -> Result<(AnyVlm, Box<dyn Processor>)> {
    let mut options = plan.model.load_options();
    options.compat = options.compat.evaluating();
    let base = base_dir(plan, dir)?;
    let quantization = plan.model.quantization;
    if which == Which::Base {
        let (model, processor) = models::load(&base, &options, device)?;
        return Ok((peft::load_onto(model, &[], &processor.signature(), quantization)?, processor));
    }
    let (whole, adapter) = (dir.path("model"), dir.path("adapter"));
    if whole.join("config.json").is_file() {
        let before = models::processor(&base, &options)?.signature();
        let (model, processor) = models::load(&whole, &options, device)?;
        if processor.signature() != before {
            return Err(Error::new(Kind::Checkpoint, "the tuned model prepares its inputs differently from the base")
                .at(whole.display())
                .expected(before)
                .found(processor.signature())
                .help("use the processor files (tokenizer, preprocessor_config.json) of the base model"));
        }
        return Ok((model, processor));
    }
    if !adapter.is_dir() {
        return Err(Error::new(Kind::Run, "there is no tuned model")
            .at(dir.root().display())
            .expected("adapter/ or model/")
            .help("run the train stage first"));
    }
    let (model, processor) = models::load(&base, &options, device)?;
    let model = peft::load_onto(model, &[adapter.into()], &processor.signature(), quantization)?;
    Ok((model, processor))
}

/// Base before tuned, each in the order of the rows.
fn in_order(rows: &[&Sample], found: &mut Found) -> Result<Vec<Answer>> {
    let mut answers = Vec::with_capacity(2 * rows.len());
    for model in [Which::Base, Which::Tuned] {
        for sample in rows {
            let answer = found.remove(&(model, None, sample.id.clone()));
            let answer = answer.ok_or_else(|| orphan("row", &sample.id, FILE))?;
            answers.push(Answer { id: sample.id.clone(), model, answer });
        }
    }
    Ok(answers)
}

/// Control by control, base before tuned, each in the order of the rows.
fn controls_in_order(controls: &BTreeMap<Control, Vec<Sample>>, found: &mut Found) -> Result<Vec<ControlAnswer>> {
    let mut answers = Vec::new();
    for (control, rows) in controls {
        for model in [Which::Base, Which::Tuned] {
            for sample in rows {
                let answer = found.remove(&(model, Some(*control), sample.id.clone()));
                let answer = answer.ok_or_else(|| orphan("row", &sample.id, CONTROLS))?;
                answers.push(ControlAnswer { id: sample.id.clone(), model, control: *control, answer });
            }
        }
    }
    Ok(answers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metric::clinical::tests::row;

    fn test_row(id: &str, group: &str) -> Sample {
        Sample { id: id.into(), group: group.into(), split: Split::Test, ..row(None) }
    }

    #[test]
    fn a_limit_keeps_whole_images() {
        let mut samples: Vec<Sample> = [("a1", "a"), ("b1", "b"), ("a2", "a"), ("b2", "b"), ("b3", "b"), ("c1", "c")]
            .map(|(i, g)| test_row(i, g))
            .into();
        samples.push(Sample { split: Split::Train, ..test_row("t", "t") });
        let ids = |limit| held_out(&samples, limit).iter().map(|s| s.id.clone()).collect::<Vec<_>>().join(" ");
        assert_eq!(ids(0), "a1 b1 a2 b2 b3 c1");
        assert_eq!(ids(5), "a1 b1 a2 b2 b3");
        assert_eq!(ids(4), "a1 a2 c1");
        assert_eq!(ids(1), "a1 a2");
    }

    #[test]
    fn batches_stay_the_same_when_some_are_done() {
        let samples: Vec<Sample> = (0..7).map(|i| test_row(&format!("r{i}"), "g")).collect();
        let rows: Vec<&Sample> = samples.iter().collect();
        let all = open_batches(&rows, 3, |_| false);
        assert_eq!(all.iter().map(Vec::len).sum::<usize>(), 7);
        let first: Vec<&str> = all[0].iter().map(|s| s.id.as_str()).collect();
        let rest = open_batches(&rows, 3, |id| first.contains(&id) || id == all[1][0].id);
        assert_eq!(rest, all[1..]);
        assert!(open_batches(&rows, 3, |_| true).is_empty());
    }

    #[test]
    fn answers_end_in_one_order_and_none_is_missing() {
        let samples = [test_row("x", "g"), test_row("y", "g")];
        let rows: Vec<&Sample> = samples.iter().collect();
        let answer = |id: &str, model| Answer { id: id.into(), model, answer: format!("{id} {model:?}") };
        let mut done = vec![
            answer("y", Which::Tuned),
            answer("y", Which::Base),
            answer("x", Which::Tuned),
            answer("x", Which::Base),
        ];
        let answers = in_order(&rows, &mut collect(done.clone(), &rows).unwrap()).unwrap();
        let order: Vec<_> = answers.iter().map(|a| a.answer.as_str()).collect();
        assert_eq!(order, ["x Base", "y Base", "x Tuned", "y Tuned"]);
        done.pop();
        assert!(in_order(&rows, &mut collect(done.clone(), &rows).unwrap()).is_err());
        done.push(answer("z", Which::Base));
        assert!(collect(done, &rows).is_err());
    }
}

//! Scores anybody's predictions against reference answers: text metrics, a judge's replies that are already there,
//! closed and open questions by both rules; both parts of the benchmark apart, with intervals.
//!
//! Every line of every file ends as a scored row or, with a reason, in `set_aside.jsonl`. Rows that an earlier, perhaps
//! interrupted, call has scored with the same metrics are taken over from `scores.jsonl`.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Kind, Result},
    judge::Scores,
    metric::{
        Unit,
        choice::{CHOICE_RULES, medevalkit::CLOSED},
        closed_accuracy, open_recall, open_table,
        text::{Pair, TEXT_METRICS, TextMetric, TextMetricOptions},
    },
    plan::Plan,
    run_dir::{RunDir, sha256, sha256_bytes},
    sample::AnswerType,
    stage::Ctx,
    statistics::{self, Difference, Estimate, Observation},
};

mod judging;
mod page;
pub mod pair;
pub mod read;
pub mod replies;

pub use judging::judge_plan;
pub use page::parts;
use pair::{Item, Key, Paired};
use read::{Part, Rows};
use replies::Replies;

/// What is scored, and how.
#[derive(Debug, Clone)]
pub struct Options {
    /// Files with predictions.
    pub predictions: Vec<PathBuf>,
    /// Files with reference answers; none where predictions bring their own.
    pub references: Vec<PathBuf>,
    /// Predictions of another model for the same rows, to compare with.
    pub against: Vec<PathBuf>,
    /// Files with judge replies (`result`) for the same answers.
    pub replies: Vec<PathBuf>,
    /// Plan of the judge that is asked about answers without a reply.
    pub judge: Option<Box<Plan>>,
    /// The part that all rows belong to.
    pub part: Option<Part>,
    /// Keys of text metrics; empty means those that need no model.
    pub metrics: Vec<String>,
    /// Published rules to apply beside our own, by their names; empty means all.
    pub compat: Vec<String>,
    /// What text metrics need.
    pub text: TextMetricOptions,
    /// Seed of intervals.
    pub seed: u64,
}

/// A row of `scores.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scored {
    /// Id of the row.
    pub id: String,
    /// Its part.
    #[serde(default)]
    pub part: Option<Part>,
    /// Its image.
    #[serde(default)]
    pub image: Option<String>,
    /// The question.
    pub question: String,
    /// The reference answer.
    pub reference: String,
    /// The answer.
    pub answer: String,
    /// Values by the key of the metric.
    pub metrics: BTreeMap<String, f64>,
    /// The judge's scores, where a reply was there and could be read.
    #[serde(default)]
    pub scores: Option<Scores>,
    /// `scored`, `no_reply`, or why the reply could not be read.
    pub judge: String,
    /// The judge's reply.
    #[serde(default)]
    pub reply: Option<String>,
    /// File and line of the prediction.
    pub source: String,
    /// Hash of all that the metrics depend on.
    made: String,
}

/// One metric in the parts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MetricLine {
    /// Stable key.
    pub key: String,
    /// Name in tables.
    pub name: String,
    /// Exact definition.
    pub signature: String,
    /// Range of its values.
    pub unit: Unit,
    /// By part (`positive`, `negative`) and over `all` rows.
    pub estimates: BTreeMap<String, Estimate>,
    /// This model minus the other one, by part and over all rows.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub differences: BTreeMap<String, Difference>,
}

/// `score.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ScoreReport {
    /// Program that wrote it.
    pub program: String,
    /// Name and SHA-256 of every file that was read.
    pub files: Vec<(String, String)>,
    /// Lines of the prediction files that are not empty.
    pub lines: usize,
    /// Of these, scored.
    pub scored: usize,
    /// Scored rows by part; rows without a part under `none`.
    pub parts: BTreeMap<String, usize>,
    /// Lines set aside by reason; together with `scored` they are all `lines`.
    pub set_aside: BTreeMap<String, usize>,
    /// References without a prediction.
    pub missing: usize,
    /// The first of these.
    pub missing_examples: Vec<String>,
    /// Rows by what became of judging.
    pub judge: BTreeMap<String, usize>,
    /// Identity of the judge, where one was asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub judge_signature: Option<serde_json::Value>,
    /// Rows taken over from an earlier call.
    pub taken_over: usize,
    /// The metrics.
    pub metrics: Vec<MetricLine>,
    /// What the user should know.
    pub notes: Vec<String>,
    /// How intervals were made.
    pub statistics: String,
}

/// File with the scored rows.
const SCORES: &str = "scores.jsonl";
/// Rows that are scored before the log grows.
const CHUNK: usize = 256;
/// Missing ids that are named.
const NAMED: usize = 8;

/// Scores predictions: `scores.jsonl`, `set_aside.jsonl`, `score.json`, `score.html`.
///
/// # Errors
/// A file cannot be read, a metric or rule is unknown or cannot be opened, no row can be scored, or the judge cannot be
/// asked.
pub fn run(options: &Options, dir: &RunDir, ctx: &Ctx) -> Result<ScoreReport> {
    let mut bench = Bench::new(options)?;
    let references = read_all(&options.references)?;
    let predictions = read_all(&options.predictions)?;
    let replies = Replies::read(&options.replies, options.part)?;
    let mut paired = pair::pair(&predictions, &references, options.part);
    let lines = predictions.iter().map(Rows::lines).sum();
    dir.write_jsonl("set_aside.jsonl", &paired.set_aside)?;
    if paired.items.is_empty() {
        return Err(nothing(&paired, lines));
    }
    let judge_signature = match &options.judge {
        Some(plan) => Some(judging::ask(plan, &mut paired.items, &replies, dir, ctx)?),
        None => None,
    };
    bench.settle(&paired.items);
    let (rows, taken_over) = bench.score(&paired, &replies, &predictions, dir, ctx)?;
    dir.write_jsonl(SCORES, &rows)?;
    let other = bench.other(options, &references, &replies, &mut paired.notes)?;
    let mut report = ScoreReport {
        program: format!("medtune {}", env!("CARGO_PKG_VERSION")),
        files: hashes(options)?,
        lines,
        scored: rows.len(),
        parts: counted(rows.iter().map(|r| r.part.map_or("none", Part::name))),
        set_aside: counted(paired.set_aside.iter().map(|s| s.code.as_str())),
        missing: paired.missing.len(),
        missing_examples: paired.missing.iter().take(NAMED).map(|k| k.1.clone()).collect(),
        judge: counted(rows.iter().map(|r| r.judge.as_str())),
        judge_signature,
        taken_over,
        metrics: bench.lines(&rows, other.as_deref(), options.seed),
        notes: notes(&paired, &predictions, &replies),
        statistics: statistics::signature(),
    };
    statistics::correct(report.metrics.iter_mut().flat_map(|m| m.differences.values_mut()));
    assert_eq!(lines, rows.len() + paired.set_aside.len(), "every line is scored or set aside");
    dir.write_json("score.json", &report)?;
    dir.write("score.html", page::html(&report, &rows, options.seed)?.as_bytes())?;
    Ok(report)
}

fn read_all(paths: &[PathBuf]) -> Result<Vec<Rows>> {
    paths.iter().map(|p| read::read(p)).collect()
}

fn counted<'a>(names: impl Iterator<Item = &'a str>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for name in names {
        *counts.entry(name.to_string()).or_insert(0) += 1;
    }
    counts
}

fn nothing(paired: &Paired, lines: usize) -> Error {
    let codes = counted(paired.set_aside.iter().map(|s| s.code.as_str()));
    let list: Vec<String> = codes.iter().map(|(code, n)| format!("{n} {code}")).collect();
    // Rows of the other part say more than rows that were never asked.
    let telling = paired.set_aside.iter().find(|s| s.code == "wrong_split").or(paired.set_aside.first());
    let example =
        telling.map_or_else(String::new, |s| format!("; for example {}:{}: {}", s.file.display(), s.line, s.detail));
    Error::new(Kind::Data, "no prediction can be scored")
        .expected("rows with question_id and answer, and a reference answer for each (--reference FILE)")
        .found(format!("{lines} lines: {}{example}", list.join(", ")))
        .help("set_aside.jsonl has every line with its reason")
}

fn hashes(options: &Options) -> Result<Vec<(String, String)>> {
    let all = [&options.predictions, &options.references, &options.against, &options.replies];
    all.into_iter().flatten().map(|p| Ok((p.display().to_string(), sha256(p)?))).collect()
}

fn notes(paired: &Paired, predictions: &[Rows], replies: &Replies) -> Vec<String> {
    let mut notes = paired.notes.clone();
    let odd: usize = predictions.iter().map(|r| r.no_numbers).sum();
    if odd > 0 {
        notes.push(format!("{odd} rows held NaN or Infinity, which is no JSON; they were read as nothing"));
    }
    if paired.other_reference > 0 {
        notes.push(format!(
            "{} rows bring another reference answer than the reference file, which counts",
            paired.other_reference
        ));
    }
    notes.extend(replies.notes());
    notes
}

/// The opened metrics.
struct Bench {
    metrics: Vec<(&'static str, &'static str, String, Box<dyn TextMetric>)>,
    /// Names of published rules; empty means all.
    compat: Vec<String>,
    /// Hash of all references where a row's value depends on them, else empty.
    corpus: String,
    /// Whether it does.
    idf: bool,
    /// References of open rows, where the whole table of LLaVA-Med is asked for.
    known: Option<open_table::Known>,
}

/// Names after `--compat`.
fn published_rules() -> BTreeSet<&'static str> {
    CHOICE_RULES.iter().filter_map(|r| r.compat).chain([LLAVA_MED, CLOSED.compat]).collect()
}

/// Name of the rules of LLaVA-Med's evaluation.
const LLAVA_MED: &str = "llava-med";

/// Keys and names of what is measured beside text metrics.
const CRITERIA: [(&str, &str); 4] = [
    ("clinical_accuracy", "Clinical accuracy"),
    ("clinical_relevance", "Clinical relevance"),
    ("detail_level", "Detail level"),
    ("risk_level", "Risk level"),
];

impl Bench {
    fn new(options: &Options) -> Result<Self> {
        let known = || TEXT_METRICS.iter().map(|m| m.key).collect::<Vec<_>>().join(", ");
        let wanted: Vec<&str> = if options.metrics.is_empty() {
            let needs_model = |key: &str| key == "bertscore" && options.text.bertscore_model.is_none();
            TEXT_METRICS.iter().map(|m| m.key).filter(|key| !needs_model(key)).collect()
        } else {
            options.metrics.iter().map(|m| m.trim()).filter(|m| !m.is_empty()).collect()
        };
        let mut metrics = Vec::new();
        for key in wanted {
            let plain = |k: &str| k.to_lowercase().replace(['_', '-'], "");
            let def = TEXT_METRICS.iter().find(|m| plain(m.key) == plain(key)).ok_or_else(|| {
                Error::new(Kind::Config, "unknown text metric").at("--metrics").expected(known()).found(key)
            })?;
            let metric = (def.open)(&options.text)?;
            metrics.push((def.key, def.name, metric.signature(), metric));
        }
        let published = published_rules();
        if let Some(other) = options.compat.iter().find(|name| !published.contains(name.as_str())) {
            return Err(Error::new(Kind::Config, "unknown published rule")
                .at("--compat")
                .expected(published.into_iter().collect::<Vec<_>>().join(", "))
                .found(other));
        }
        let idf = options.text.bertscore_idf && metrics.iter().any(|m| m.0 == "bertscore");
        let known = options.compat.iter().any(|c| c == LLAVA_MED).then(open_table::Known::default);
        Ok(Self { metrics, compat: options.compat.clone(), corpus: String::new(), idf, known })
    }

    /// Whether a published rule is applied; our own have no name and always are.
    fn applies(&self, compat: Option<&str>) -> bool {
        compat.is_none_or(|name| self.compat.is_empty() || self.compat.iter().any(|c| c == name))
    }

    /// Takes note of the references, where a row's value depends on all of them.
    fn settle(&mut self, items: &[Item]) {
        let all: Vec<&str> = items.iter().map(|i| i.reference.as_str()).collect();
        if self.idf || self.known.is_some() {
            self.corpus = sha256_bytes(all.join("\0").as_bytes());
        }
        if let Some(known) = &mut self.known {
            let open = items.iter().filter(|i| i.answer_type == Some(AnswerType::Open));
            let references: BTreeSet<&str> = open.map(|i| i.reference.as_str()).collect();
            *known = open_table::Known::new(references);
        }
    }

    /// Hash of what the metrics of an item depend on.
    fn made(&self, item: &Item) -> String {
        let mut parts = vec![item.answer.as_str(), item.reference.as_str()];
        let kind = format!("{:?} {:?} {:?}", item.answer_type, item.options, self.compat);
        parts.extend([kind.as_str(), &self.corpus]);
        parts.extend(self.metrics.iter().map(|m| m.2.as_str()));
        sha256_bytes(parts.join("\0").as_bytes())[..16].to_string()
    }

    /// Scores all items; those in the log with the same hash are taken over.
    fn score(
        &self,
        paired: &Paired,
        replies: &Replies,
        predictions: &[Rows],
        dir: &RunDir,
        ctx: &Ctx,
    ) -> Result<(Vec<Scored>, usize)> {
        let earlier = earlier(&dir.path(SCORES))?;
        dir.write_jsonl(SCORES, &earlier)?;
        let known: HashMap<(Key, String), BTreeMap<String, f64>> =
            earlier.into_iter().map(|r| (((r.part, r.id), r.made), r.metrics)).collect();
        let (_, mut log) = dir.continue_jsonl::<Scored>(SCORES)?;
        let mut task = ctx.progress.start("score rows", paired.items.len() as u64);
        let (mut rows, mut taken) = (Vec::with_capacity(paired.items.len()), 0);
        // Rarity is that among the references of all rows, so these are scored together or not at all.
        let size = if self.idf { paired.items.len().max(1) } else { CHUNK };
        for chunk in paired.items.chunks(size) {
            ctx.check()?;
            let made: Vec<String> = chunk.iter().map(|i| self.made(i)).collect();
            let whole =
                !self.idf || (0..chunk.len()).all(|n| known.contains_key(&(chunk[n].key.clone(), made[n].clone())));
            let old = |n: usize| known.get(&(chunk[n].key.clone(), made[n].clone())).filter(|_| whole);
            let open: Vec<usize> = (0..chunk.len()).filter(|n| old(*n).is_none()).collect();
            let mut new = self.values(&open.iter().map(|n| &chunk[*n]).collect::<Vec<_>>())?.into_iter();
            for (n, item) in chunk.iter().enumerate() {
                let (metrics, fresh) = match old(n) {
                    Some(metrics) => (metrics.clone(), false),
                    None => (new.next().unwrap_or_default(), true),
                };
                let source = format!("{}:{}", predictions[item.file].path.display(), item.line);
                let row = scored(item, metrics, made[n].clone(), source, replies);
                if fresh {
                    log.push(&row)?;
                }
                taken += usize::from(!fresh);
                rows.push(row);
            }
            task.advance(chunk.len() as u64);
        }
        task.finish();
        Ok((rows, taken))
    }

    /// Values of the items, in their order.
    fn values(&self, items: &[&Item]) -> Result<Vec<BTreeMap<String, f64>>> {
        let pairs: Vec<Pair<'_>> = items.iter().map(|i| Pair { answer: &i.answer, reference: &i.reference }).collect();
        let mut all = vec![BTreeMap::new(); items.len()];
        for (key, _, _, metric) in &self.metrics {
            for (row, value) in all.iter_mut().zip(metric.score_pairs(&pairs)?) {
                row.insert((*key).to_string(), value);
            }
        }
        for (row, item) in all.iter_mut().zip(items) {
            if let Some(right) = item.options.iter().position(|o| *o == item.reference) {
                for rule in CHOICE_RULES.iter().filter(|r| self.applies(r.compat)) {
                    let choice = (rule.judge)(&item.answer, &item.options, right);
                    row.insert(rule.key.into(), f64::from(u8::from(choice.correct)));
                }
            }
            let (agreement, strict, original) = match item.answer_type {
                Some(AnswerType::Closed) => (
                    closed_accuracy::agreement(&item.answer, &item.reference),
                    closed_accuracy::STRICT.key,
                    closed_accuracy::LLAVA_MED.key,
                ),
                Some(AnswerType::Open) => (
                    open_recall::agreement(&item.answer, &item.reference),
                    open_recall::STRICT.key,
                    open_recall::LLAVA_MED.key,
                ),
                Some(AnswerType::Mcq) | None => continue,
            };
            row.insert(strict.into(), agreement.strict);
            if self.applies(Some(LLAVA_MED)) {
                row.insert(original.into(), agreement.llava_med);
            }
            if let Some(known) = self.known.as_ref().filter(|_| item.answer_type == Some(AnswerType::Open)) {
                let values = open_table::values(&item.answer, &item.reference, known);
                row.extend(open_table::LINES.iter().map(|l| l.key.to_string()).zip(values));
            }
            if item.answer_type == Some(AnswerType::Closed) && self.applies(Some(CLOSED.compat)) {
                row.insert(CLOSED.key.into(), f64::from(u8::from((CLOSED.judge)(&item.answer, &item.reference))));
            }
        }
        Ok(all)
    }

    /// The other model's rows, if there is one to compare with.
    fn other(
        &self,
        options: &Options,
        references: &[Rows],
        replies: &Replies,
        notes: &mut Vec<String>,
    ) -> Result<Option<Vec<Scored>>> {
        if options.against.is_empty() {
            return Ok(None);
        }
        let predictions = read_all(&options.against)?;
        let paired = pair::pair(&predictions, references, options.part);
        if !paired.set_aside.is_empty() {
            notes.push(format!("{} lines of the model to compare with cannot be scored", paired.set_aside.len()));
        }
        let items: Vec<&Item> = paired.items.iter().collect();
        let values = self.values(&items)?;
        let rows =
            items.iter().zip(values).map(|(i, metrics)| scored(i, metrics, String::new(), String::new(), replies));
        Ok(Some(rows.collect()))
    }

    fn lines(&self, rows: &[Scored], other: Option<&[Scored]>, seed: u64) -> Vec<MetricLine> {
        let original =
            [&closed_accuracy::STRICT, &closed_accuracy::LLAVA_MED, &open_recall::STRICT, &open_recall::LLAVA_MED];
        let judge =
            CRITERIA.iter().map(|(key, name)| (*key, *name, "mean of judge scores 1-10".to_string(), Unit::Score));
        let text = self.metrics.iter().map(|(key, name, signature, _)| (*key, *name, signature.clone(), Unit::Share));
        let closed = original.iter().map(|m| (m.key, m.name, m.signature.to_string(), Unit::Share));
        let medevalkit = (CLOSED.key, CLOSED.name, CLOSED.signature.to_string(), Unit::Share);
        let choice = CHOICE_RULES.iter().map(|r| (r.key, r.name, r.signature.to_string(), Unit::Share));
        let table = open_table::LINES.iter().map(|l| (l.key, l.name, l.signature.to_string(), Unit::Share));
        let all = judge.chain(text).chain(closed).chain(table).chain([medevalkit]).chain(choice);
        all.filter_map(|(key, name, signature, unit)| line(key, name, signature, unit, rows, other, seed)).collect()
    }
}

/// Rows of an earlier call that can still be read.
fn earlier(path: &Path) -> Result<Vec<Scored>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(bytes.split(|b| *b == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(Error::io(path, e)),
    }
}

fn scored(item: &Item, metrics: BTreeMap<String, f64>, made: String, source: String, replies: &Replies) -> Scored {
    let reply = replies.of(item);
    let (scores, judge) = match reply.as_deref().map(replies::scores) {
        None => (None, item.unjudged.clone().unwrap_or_else(|| "no_reply".to_string())),
        Some(Ok(scores)) => (Some(scores), "scored".into()),
        Some(Err(why)) => (None, why),
    };
    Scored {
        id: item.key.1.clone(),
        part: item.key.0,
        image: item.image.clone(),
        question: item.question.clone(),
        reference: item.reference.clone(),
        answer: item.answer.clone(),
        metrics,
        scores,
        judge,
        reply,
        source,
        made,
    }
}

impl Scored {
    /// Value of a metric or criterion.
    fn value(&self, key: &str) -> Option<f64> {
        let scores = |pick: fn(&Scores) -> f64| self.scores.as_ref().map(pick);
        match key {
            "clinical_accuracy" => scores(|s| s.accuracy),
            "clinical_relevance" => scores(|s| s.relevance),
            "detail_level" => scores(|s| s.detail),
            "risk_level" => scores(|s| s.risk),
            key => self.metrics.get(key).copied(),
        }
    }

    fn cluster(&self) -> &str {
        self.image.as_deref().unwrap_or(&self.id)
    }
}

fn line(
    key: &str,
    name: &str,
    signature: String,
    unit: Unit,
    rows: &[Scored],
    other: Option<&[Scored]>,
    seed: u64,
) -> Option<MetricLine> {
    let of_part = |part: Option<Part>| rows.iter().filter(move |r| part.is_none() || r.part == part);
    let mut line = MetricLine {
        key: key.into(),
        name: name.into(),
        signature,
        unit,
        estimates: BTreeMap::new(),
        differences: BTreeMap::new(),
    };
    let others: HashMap<(Option<Part>, &str), f64> =
        other.into_iter().flatten().filter_map(|r| Some(((r.part, r.id.as_str()), r.value(key)?))).collect();
    for part in [Some(Part::Positive), Some(Part::Negative), None] {
        let values: Vec<Observation<'_>> =
            of_part(part).filter_map(|r| Some(Observation { cluster: r.cluster(), value: r.value(key)? })).collect();
        if values.is_empty() {
            continue;
        }
        let word = part.map_or("all", Part::name);
        line.estimates.insert(word.into(), statistics::estimate(&values, unit, seed, &format!("score {key} {word}")));
        let pairs: Vec<statistics::Pair<'_>> = of_part(part)
            .filter_map(|r| {
                let base = *others.get(&(r.part, r.id.as_str()))?;
                Some(statistics::Pair { cluster: r.cluster(), base, tuned: r.value(key)? })
            })
            .collect();
        if !pairs.is_empty() {
            line.differences.insert(word.into(), statistics::difference(&pairs, seed, &format!("score {key} {word}")));
        }
    }
    (!line.estimates.is_empty()).then_some(line)
}

/// Items whose answers a judge still has to be asked about: those without a reply that fits, in order, each once. With
/// `anchors`, the rows that a judge can show a sample answer for, only those can be asked.
#[must_use]
pub fn requests(items: &[Item], replies: &Replies, anchors: Option<&BTreeSet<String>>) -> Vec<usize> {
    let can = |item: &Item| anchors.is_none_or(|a| a.contains(&item.key.1));
    (0..items.len()).filter(|i| replies.of(&items[*i]).is_none() && can(&items[*i])).collect()
}

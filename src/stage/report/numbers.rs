//! All numbers of a report, from rows to sums to intervals.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde::{Deserialize, Serialize};

use super::{
    Example, Inputs, examples,
    looks::{self, ControlRow, Probes},
    published::VQA_COLUMNS,
    tables::{COLUMNS, OurColumn, OurRow},
    words,
};
use crate::{
    error::{Error, Kind, Result},
    judge::{Outcome, last_answer},
    metric::{Better, METRICS, Measure, Metric, Unit, closed_accuracy, vqa_text::normalise},
    recipes::phantom::WRONG_PAIR,
    sample::{AnswerType, Polarity, Sample, Split, meta},
    stage::{controls::modality, eval::Which, judge::orphan},
    statistics::{self, Difference, Estimate, Observation, Pair},
    train::log::LogLine,
};

/// Layout of `report.json`.
const VERSION: u32 = 2;

/// Every number of a report.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Layout of this file.
    pub version: u32,
    /// Program that wrote it.
    pub program: String,
    /// Recipe, seed, device and other facts, in print order.
    pub facts: Vec<(String, String)>,
    /// What was counted.
    pub counts: Counts,
    /// Base against tuned.
    pub metrics: Vec<MetricRow>,
    /// The same by category.
    pub categories: Vec<CategoryRow>,
    /// The same by what else rows say of themselves: kind of image, part of the body, ..
    #[serde(default)]
    pub strata: Vec<Strata>,
    /// Base and tuned in the layout of the paper's Table 2; empty without polarity.
    #[serde(default)]
    pub table_2: Vec<OurRow>,
    /// The column of the paper's Table 3 that the data belong to.
    #[serde(default)]
    pub table_3: Option<OurColumn>,
    /// What answers do without the image, or with another one.
    #[serde(default)]
    pub controls: Vec<ControlRow>,
    /// Whether the base and the tuned model tell false premises from true ones; none without such pairs.
    #[serde(default)]
    pub probes: [Option<Probes>; 2],
    /// What training and test rows have in common, as quality control found it.
    #[serde(default)]
    pub leak: Vec<(String, String)>,
    /// Rows that changed from right to wrong and back.
    pub transitions: Transitions,
    /// What quality control dropped; none when it did not run.
    pub quality: Option<Quality>,
    /// How training went; none when nothing was trained here.
    pub training: Option<Training>,
    /// Sentences that the numbers support.
    pub shows: Vec<String>,
    /// Sentences about what they do not support.
    pub does_not_show: Vec<String>,
    /// The instrument.
    pub judge: serde_json::Value,
    /// How intervals and p-values were made.
    pub statistics: String,
    /// Rows shown in the page.
    pub examples: Vec<Example>,
    /// Name and SHA-256 of the files the numbers depend on.
    pub files: Vec<(String, String)>,
}

/// Rows and answers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Kept rows of the train split.
    pub train_rows: usize,
    /// Kept rows of the validation split.
    pub validation_rows: usize,
    /// Kept rows of the test split.
    pub test_rows: usize,
    /// Test rows that were answered.
    pub rows: usize,
    /// Images (or articles) they come from.
    pub images: usize,
    /// Images (or articles) that are in the test split and in another one; more than none is a leak.
    pub shared_images: usize,
    /// Answers, of both models.
    pub answers: usize,
    /// Verdicts, of both models.
    pub verdicts: usize,
    /// Verdicts that are scores.
    pub scored: usize,
    /// Verdicts by outcome, for the base and the tuned model.
    pub outcomes: BTreeMap<String, [usize; 2]>,
}

/// One metric, base against tuned.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MetricRow {
    /// Stable key.
    pub key: String,
    /// Name in tables.
    pub name: String,
    /// What it measures.
    pub about: String,
    /// Exact definition.
    pub signature: String,
    /// Which direction is an improvement.
    pub better: Better,
    /// Range of its values.
    pub unit: Unit,
    /// Before tuning.
    pub base: Estimate,
    /// After tuning.
    pub tuned: Estimate,
    /// Rows it is about that were not scored, for the base and the tuned model.
    pub unscored: [usize; 2],
    /// Tuned minus base, over rows scored for both.
    pub difference: Difference,
    /// The most frequent reference, given always; for closed questions.
    pub baseline: Option<Baseline>,
}

/// What a constant answer would reach.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Baseline {
    /// The constant answer: the most frequent reference of the rows themselves.
    pub answer: String,
    /// Its value.
    pub value: f64,
    /// Tuned minus constant answer.
    pub difference: Difference,
}

/// One category, base against tuned.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CategoryRow {
    /// Name of the category.
    pub category: String,
    /// Whether its questions hold a false premise.
    pub polarity: Option<Polarity>,
    /// Key of the metric.
    pub key: String,
    /// Name of the metric.
    pub name: String,
    /// Which direction is an improvement.
    pub better: Better,
    /// Range of its values.
    pub unit: Unit,
    /// Before tuning.
    pub base: Estimate,
    /// After tuning.
    pub tuned: Estimate,
    /// Tuned minus base.
    pub difference: Difference,
}

/// Metrics by the values of one key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Strata {
    /// Title of the table.
    pub title: String,
    /// One line a value, polarity and metric.
    pub rows: Vec<CategoryRow>,
}

/// Rows by whether the two models were right.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transitions {
    /// Wrong before, right after.
    pub improved: usize,
    /// Right before, wrong after.
    pub worsened: usize,
    /// Right before and after.
    pub both_right: usize,
    /// Wrong before and after.
    pub both_wrong: usize,
    /// Not scored for at least one of them.
    pub unscored: usize,
}

/// Quality control in numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Quality {
    /// Rows that were checked.
    pub rows: usize,
    /// Rows that were kept.
    pub kept: usize,
    /// Rows that were rejected.
    pub rejected: usize,
    /// Rejected share with its interval, clustered by image.
    pub drop_rate: Estimate,
    /// Rows that were made wrong on purpose, if there were any.
    pub planted: Option<Planted>,
    /// Rejected rows by reason, most frequent first.
    pub reasons: Vec<ReasonCount>,
}

/// Rows made wrong on purpose, by which the recall of quality control is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Planted {
    /// Rows made wrong.
    pub rows: usize,
    /// Those that were rejected.
    pub found: usize,
}

/// One reason code.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReasonCount {
    /// The code.
    pub code: String,
    /// Rows rejected with it.
    pub rows: usize,
    /// What it means.
    pub about: String,
    /// What was wrong with the first such row.
    pub example: String,
}

/// Training in numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Training {
    /// Last step.
    pub steps: usize,
    /// Training loss of the first and the last line.
    pub loss: Option<[f64; 2]>,
    /// Step and value of the lowest validation loss.
    pub best_eval: Option<(usize, f64)>,
    /// Highest learning rate.
    pub peak_learning_rate: Option<f64>,
    /// Steps whose update was left out because their loss was a spike.
    #[serde(default)]
    pub skipped_steps: usize,
}

/// A test row with both verdicts.
pub(super) struct Judged<'a> {
    pub(super) sample: &'a Sample,
    pub(super) outcomes: [&'a Outcome; 2],
    pub(super) answers: [&'a str; 2],
}

/// Computes a report.
///
/// # Errors
/// Answers, verdicts and rows do not belong together one to one.
pub fn numbers(inputs: &Inputs) -> Result<Report> {
    let rows = join(inputs)?;
    let seed = inputs.plan.seed;
    let mut metrics: Vec<MetricRow> = METRICS.iter().filter_map(|m| metric_row(m, &rows, seed)).collect();
    metrics.extend(text_rows(inputs, &rows));
    let baselines = metrics.iter_mut().filter_map(|m| m.baseline.as_mut().map(|b| &mut b.difference));
    statistics::correct(baselines);
    statistics::correct(metrics.iter_mut().map(|m| &mut m.difference));
    let mut report = Report {
        version: VERSION,
        program: format!("medtune {}", env!("CARGO_PKG_VERSION")),
        facts: words::facts(inputs),
        counts: counts(inputs, &rows),
        table_2: table_2(inputs, &rows),
        table_3: table_3(inputs, &metrics),
        metrics,
        categories: by_key(&rows, seed, "category", |s| s.category.as_deref()),
        strata: strata(&rows, seed),
        controls: looks::controls(&rows, &inputs.controls, &inputs.control_outcomes, seed),
        probes: [0, 1].map(|which| looks::probes(&rows, which, seed)),
        leak: inputs.leak.clone(),
        transitions: transitions(&rows),
        quality: quality(inputs),
        training: training(&inputs.log),
        shows: Vec::new(),
        does_not_show: Vec::new(),
        judge: inputs.judge.clone(),
        statistics: statistics::signature(),
        examples: examples::choose(&rows, seed),
        files: inputs.files.clone(),
    };
    report.shows = words::shows(&report);
    report.does_not_show = words::does_not_show(&report, inputs);
    Ok(report)
}

/// Test rows that were answered, in file order, each with exactly two answers and two verdicts.
pub(super) fn join(inputs: &Inputs) -> Result<Vec<Judged<'_>>> {
    let key = |model: Which, id: &str| (model, id.to_string());
    let mut answers = HashMap::new();
    for a in &inputs.answers {
        if answers.insert(key(a.model, &a.id), a.answer.as_str()).is_some() {
            return Err(twice("answer", &a.id));
        }
    }
    let mut verdicts = HashMap::new();
    for v in &inputs.verdicts {
        if verdicts.insert(key(v.model, &v.id), &v.outcome).is_some() {
            return Err(twice("verdict", &v.id));
        }
    }
    let mut rows = Vec::new();
    for sample in inputs.kept.iter().filter(|s| s.split == Split::Test) {
        let mut both = |which| {
            let key = key(which, &sample.id);
            match (answers.remove(&key), verdicts.remove(&key)) {
                (Some(answer), Some(outcome)) => Ok(Some((answer, outcome))),
                (None, None) => Ok(None),
                (Some(_), None) => Err(orphan("answer", &sample.id, "verdicts.jsonl")),
                (None, Some(_)) => Err(orphan("verdict", &sample.id, "answers.jsonl")),
            }
        };
        match (both(Which::Base)?, both(Which::Tuned)?) {
            (Some(base), Some(tuned)) => {
                rows.push(Judged { sample, outcomes: [base.1, tuned.1], answers: [base.0, tuned.0] });
            }
            (None, None) => {}
            _ => return Err(orphan("answer of one model", &sample.id, "the other model's answers")),
        }
    }
    match answers.into_keys().chain(verdicts.into_keys()).map(|k| k.1).min() {
        Some(id) => Err(orphan("answer or verdict", &id, "the test split of kept.jsonl")),
        None => Ok(rows),
    }
}

fn twice(what: &str, id: &str) -> Error {
    Error::new(Kind::Run, format!("{what} occurs twice"))
        .at(id)
        .help("delete the answers and verdicts of this directory and run the same command again")
}

pub(super) fn cluster(sample: &Sample) -> &str {
    if sample.group.is_empty() { &sample.id } else { &sample.group }
}

fn counts(inputs: &Inputs, rows: &[Judged<'_>]) -> Counts {
    let of = |split| inputs.kept.iter().filter(move |s| s.split == split);
    let test: BTreeSet<&str> = of(Split::Test).map(cluster).collect();
    let other: BTreeSet<&str> = of(Split::Train).chain(of(Split::Validation)).map(cluster).collect();
    let mut outcomes: BTreeMap<String, [usize; 2]> = BTreeMap::new();
    for row in rows {
        for (i, outcome) in row.outcomes.iter().enumerate() {
            outcomes.entry(outcome.name().to_string()).or_default()[i] += 1;
        }
    }
    Counts {
        train_rows: of(Split::Train).count(),
        validation_rows: of(Split::Validation).count(),
        test_rows: of(Split::Test).count(),
        rows: rows.len(),
        images: rows.iter().map(|r| cluster(r.sample)).collect::<BTreeSet<_>>().len(),
        shared_images: test.intersection(&other).count(),
        answers: inputs.answers.len(),
        verdicts: inputs.verdicts.len(),
        scored: outcomes.get("scored").map_or(0, |n| n[0] + n[1]),
        outcomes,
    }
}

/// Values of one metric over some rows.
struct Measured<'a> {
    values: [Vec<Observation<'a>>; 2],
    pairs: Vec<Pair<'a>>,
    unscored: [usize; 2],
}

fn measure<'a>(metric: &Metric, rows: impl Iterator<Item = &'a Judged<'a>>) -> Measured<'a> {
    let mut found = Measured { values: [Vec::new(), Vec::new()], pairs: Vec::new(), unscored: [0, 0] };
    for row in rows {
        let cluster = cluster(row.sample);
        let both = row.outcomes.map(|outcome| (metric.measure)(row.sample, outcome));
        for (i, measure) in both.iter().enumerate() {
            match measure {
                Measure::Value(value) => found.values[i].push(Observation { cluster, value: *value }),
                Measure::Unscored => found.unscored[i] += 1,
                Measure::NotApplicable => {}
            }
        }
        if let [Measure::Value(base), Measure::Value(tuned)] = both {
            found.pairs.push(Pair { cluster, base, tuned });
        }
    }
    found
}

fn metric_row(metric: &Metric, rows: &[Judged<'_>], seed: u64) -> Option<MetricRow> {
    let found = measure(metric, rows.iter());
    if found.values.iter().all(Vec::is_empty) {
        return None;
    }
    let estimate =
        |i: usize, name| statistics::estimate(&found.values[i], metric.unit, seed, &format!("{} {name}", metric.key));
    Some(MetricRow {
        key: metric.key.into(),
        name: metric.name.into(),
        about: metric.about.into(),
        signature: metric.signature.into(),
        better: metric.better,
        unit: metric.unit,
        base: estimate(0, "base"),
        tuned: estimate(1, "tuned"),
        unscored: found.unscored,
        difference: statistics::difference(&found.pairs, seed, metric.key),
        baseline: (metric.key == closed_accuracy::STRICT.key).then(|| baseline(metric, rows, seed)).flatten(),
    })
}

/// The majority class of the closed rows that have a value, against the tuned model.
fn baseline(metric: &Metric, rows: &[Judged<'_>], seed: u64) -> Option<Baseline> {
    let valued: Vec<(&Sample, f64, String)> = rows
        .iter()
        .filter(|r| r.sample.answer_type == Some(AnswerType::Closed))
        .filter_map(|r| match (metric.measure)(r.sample, r.outcomes[1]) {
            Measure::Value(v) => Some((r.sample, v, normalise(last_answer(r.sample)))),
            _ => None,
        })
        .collect();
    let (answer, value) = statistics::majority(valued.iter().map(|v| v.2.as_str()))?;
    let pairs: Vec<Pair<'_>> = valued
        .iter()
        .map(|(s, v, class)| Pair { cluster: cluster(s), base: f64::from(u8::from(*class == answer)), tuned: *v })
        .collect();
    let difference = statistics::difference(&pairs, seed, "majority class");
    Some(Baseline { answer, value, difference })
}

/// Metrics by the group that `key` gives a row.
fn by_key<'a>(
    rows: &'a [Judged<'a>],
    seed: u64,
    name: &str,
    key: impl Fn(&'a Sample) -> Option<&'a str>,
) -> Vec<CategoryRow> {
    let keys: BTreeSet<(Option<Polarity>, &str)> =
        rows.iter().filter_map(|r| Some((r.sample.polarity, key(r.sample)?))).collect();
    let mut out = Vec::new();
    for (polarity, category) in keys {
        let wanted: &[&str] = match polarity {
            Some(Polarity::Hallucination) => &["hallucination_rate", "refutation_accuracy"],
            Some(Polarity::NonHallucination) => &["accuracy_on_positives"],
            None => &["closed_accuracy", "open_recall"],
        };
        for metric in METRICS.iter().filter(|m| wanted.contains(&m.key)) {
            let inside = rows.iter().filter(|r| r.sample.polarity == polarity && key(r.sample) == Some(category));
            let found = measure(metric, inside);
            if found.values.iter().all(Vec::is_empty) {
                continue;
            }
            // The first stratification has no prefix, so that its draws stay what they were.
            let prefix = if name == "category" { String::new() } else { format!("{name} ") };
            let purpose = format!("{} {prefix}{category}", metric.key);
            let estimate = |i: usize, name| {
                statistics::estimate(&found.values[i], metric.unit, seed, &format!("{purpose} {name}"))
            };
            out.push(CategoryRow {
                category: category.into(),
                polarity,
                key: metric.key.into(),
                name: metric.name.into(),
                better: metric.better,
                unit: metric.unit,
                base: estimate(0, "base"),
                tuned: estimate(1, "tuned"),
                difference: statistics::difference(&found.pairs, seed, &purpose),
            });
        }
    }
    statistics::correct(out.iter_mut().map(|row| &mut row.difference));
    out
}

/// Keys that rows are grouped by, with the titles of their tables.
const STRATA: [(&str, &str); 4] = [
    (meta::LOCATION, "Part of the body"),
    (meta::CONTENT_TYPE, "Subject"),
    (meta::QUESTION_TYPE, "Kind of question"),
    (meta::LANGUAGE, "Language"),
];

/// Metrics by kind of image and by the other keys, each where rows have more than one value and categories do not
/// already say the same.
fn strata<'a>(rows: &'a [Judged<'a>], seed: u64) -> Vec<Strata> {
    let mut found = Vec::new();
    let mut add = |title: &str, name: &str, key: &dyn Fn(&'a Sample) -> Option<&'a str>| {
        let values: BTreeSet<&str> = rows.iter().filter_map(|r| key(r.sample)).collect();
        let as_category = rows.iter().all(|r| key(r.sample) == r.sample.category.as_deref());
        if values.len() > 1 && !as_category {
            found.push(Strata { title: title.into(), rows: by_key(rows, seed, name, key) });
        }
    };
    add("Kind of image", "modality", &modality);
    for (name, title) in STRATA {
        add(title, name, &|s| s.meta.get(name)?.as_str().map(str::trim).filter(|v| !v.is_empty()));
    }
    found
}

/// Agreement of the words of both models' answers with the reference, by every text metric that was computed.
fn text_rows(inputs: &Inputs, rows: &[Judged<'_>]) -> Vec<MetricRow> {
    let one = |t: &TextValues| {
        let values = |which: usize| -> Vec<Observation<'_>> {
            let all = rows.iter().zip(&t.values[which]);
            all.filter_map(|(r, v)| Some(Observation { cluster: cluster(r.sample), value: (*v)? })).collect()
        };
        let (base, tuned) = (values(0), values(1));
        if base.is_empty() {
            return None;
        }
        let pairs: Vec<Pair<'_>> =
            base.iter().zip(&tuned).map(|(b, t)| Pair { cluster: b.cluster, base: b.value, tuned: t.value }).collect();
        let seed = inputs.plan.seed;
        Some(MetricRow {
            key: t.key.clone(),
            name: t.name.clone(),
            about: t.about.clone(),
            signature: t.signature.clone(),
            better: Better::Higher,
            unit: Unit::Share,
            base: statistics::estimate(&base, Unit::Score, seed, &format!("{} base", t.key)),
            tuned: statistics::estimate(&tuned, Unit::Score, seed, &format!("{} tuned", t.key)),
            unscored: [0, 0],
            difference: statistics::difference(&pairs, seed, &t.key),
            baseline: None,
        })
    };
    inputs.texts.iter().filter_map(one).collect()
}

/// Values of one text metric, for the base and the tuned model, in the order of the joined rows; none where a row has no
/// reference.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TextValues {
    /// Stable key.
    pub key: String,
    /// Name in tables.
    pub name: String,
    /// What it measures.
    pub about: String,
    /// Exact definition.
    pub signature: String,
    /// Values of the base and of the tuned model.
    pub values: [Vec<Option<f64>>; 2],
}

/// Both models in the columns of Table 2.
fn table_2(inputs: &Inputs, rows: &[Judged<'_>]) -> Vec<OurRow> {
    let seed = inputs.plan.seed;
    let of = |which: usize, polarity: Polarity| -> BTreeMap<String, Estimate> {
        let inside: Vec<usize> = (0..rows.len()).filter(|i| rows[*i].sample.polarity == Some(polarity)).collect();
        let mut found = BTreeMap::new();
        for (key, _, unit) in COLUMNS {
            let texts = inputs.texts.iter().find(|t| t.key == key);
            let metric = METRICS.iter().find(|m| m.key == key);
            let value = |i: usize| match (texts, metric) {
                (Some(t), _) => t.values[which].get(i).copied().flatten(),
                (None, Some(m)) => match (m.measure)(rows[i].sample, rows[i].outcomes[which]) {
                    Measure::Value(v) => Some(v),
                    _ => None,
                },
                (None, None) => None,
            };
            let values: Vec<Observation<'_>> = inside
                .iter()
                .filter_map(|i| Some(Observation { cluster: cluster(rows[*i].sample), value: value(*i)? }))
                .collect();
            if !values.is_empty() {
                let unit = if texts.is_some() { Unit::Score } else { unit };
                let purpose = format!("table 2 {key} {which} {polarity:?}");
                found.insert(key.to_string(), statistics::estimate(&values, unit, seed, &purpose));
            }
        }
        found
    };
    let row = |which: usize, model: &str| OurRow {
        model: model.into(),
        positive: of(which, Polarity::NonHallucination),
        negative: of(which, Polarity::Hallucination),
    };
    let all = [row(0, "base"), row(1, "tuned")];
    if all.iter().all(|r| r.positive.is_empty() && r.negative.is_empty()) { Vec::new() } else { all.into() }
}

/// The accuracies of a data set that Table 3 has a column for.
fn table_3(inputs: &Inputs, metrics: &[MetricRow]) -> Option<OurColumn> {
    let source = &inputs.plan.data.source;
    VQA_COLUMNS.iter().find(|(key, _)| key == source)?;
    let closed = |m: &&MetricRow| m.key.starts_with("closed_accuracy") || m.key.starts_with("mcq");
    let rules: Vec<_> = metrics.iter().filter(closed).map(|m| (m.name.clone(), m.base, m.tuned)).collect();
    (!rules.is_empty()).then(|| OurColumn { source: source.clone(), rules })
}

fn transitions(rows: &[Judged<'_>]) -> Transitions {
    let mut t = Transitions::default();
    for row in rows {
        match row.outcomes.map(correct) {
            [Some(false), Some(true)] => t.improved += 1,
            [Some(true), Some(false)] => t.worsened += 1,
            [Some(true), Some(true)] => t.both_right += 1,
            [Some(false), Some(false)] => t.both_wrong += 1,
            _ => t.unscored += 1,
        }
    }
    t
}

/// Whether an answer was right; none if it was not scored.
pub(super) fn correct(outcome: &Outcome) -> Option<bool> {
    match outcome {
        Outcome::Scored { correct, .. } => Some(*correct),
        _ => None,
    }
}

fn quality(inputs: &Inputs) -> Option<Quality> {
    if !inputs.plan.qc.enabled {
        return None;
    }
    let kept = inputs.kept.iter().map(|s| Observation { cluster: cluster(s), value: 0.0 });
    let dropped = inputs.rejected.iter().map(|r| Observation { cluster: cluster(&r.sample), value: 1.0 });
    let all: Vec<_> = kept.chain(dropped).collect();
    let mut reasons: Vec<ReasonCount> = Vec::new();
    for row in &inputs.rejected {
        match reasons.iter_mut().find(|r| r.code == row.code) {
            Some(reason) => reason.rows += 1,
            None => reasons.push(ReasonCount {
                code: row.code.clone(),
                rows: 1,
                about: about_rule(&row.code),
                example: row.detail.clone(),
            }),
        }
    }
    let planted = |s: &Sample| s.meta.contains_key(WRONG_PAIR);
    let found = inputs.rejected.iter().filter(|r| planted(&r.sample)).count();
    let missed = inputs.kept.iter().filter(|s| planted(s)).count();
    reasons.sort_by(|a, b| b.rows.cmp(&a.rows).then_with(|| a.code.cmp(&b.code)));
    Some(Quality {
        rows: all.len(),
        kept: inputs.kept.len(),
        rejected: inputs.rejected.len(),
        drop_rate: statistics::estimate(&all, Unit::Share, inputs.plan.seed, "drop rate"),
        planted: (found + missed > 0).then_some(Planted { rows: found + missed, found }),
        reasons,
    })
}

/// First line of a rule's documentation.
fn about_rule(code: &str) -> String {
    let rule = crate::qc::RULES.iter().find(|r| r.code() == code);
    rule.map_or_else(String::new, |r| r.doc().lines().next().unwrap_or_default().trim().to_string())
}

fn training(log: &[LogLine]) -> Option<Training> {
    let steps = log.iter().map(|r| r.step).max()?;
    let losses: Vec<f64> = log.iter().filter_map(|r| r.loss).collect();
    let best = log.iter().filter_map(|r| Some((r.step, r.eval_loss?))).min_by(|a, b| a.1.total_cmp(&b.1));
    Some(Training {
        steps,
        loss: losses.first().zip(losses.last()).map(|(a, b)| [*a, *b]),
        best_eval: best,
        peak_learning_rate: log.iter().filter_map(|r| r.learning_rate).max_by(f64::total_cmp),
        skipped_steps: log.iter().filter_map(|r| r.skipped_steps).max().unwrap_or(0),
    })
}

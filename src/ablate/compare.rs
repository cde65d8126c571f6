//! Numbers of an ablation: every view with its interval, and the orderings it should show, each tested on the same
//! held-out rows.

use std::{collections::HashMap, path::Path};

use serde::{Deserialize, Serialize};

use super::{ALL, about, directory, trained_rows};
use crate::{
    error::Result,
    export::view::View,
    judge::Outcome,
    metric::{Better, METRICS, Measure, Metric, Unit},
    plan::Resolved,
    run_dir::read_jsonl,
    sample::{Sample, Split},
    stage::{Ctx, eval::Which, judge::Verdict},
    statistics::{self, Difference, Estimate, Finding, Observation, Pair},
};

/// Layout of `ablation.json`.
const VERSION: u32 = 1;

/// Right answers over all rows: with as many questions of each polarity, neither going along nor denying wins.
const RIGHT: Metric = Metric {
    key: "right_answers",
    name: "Right answers",
    about: "Share of all questions whose answer is right.",
    signature: "right_answers|v1|count=correct|rows=all|unscored=excluded",
    better: Better::Higher,
    unit: Unit::Share,
    measure: |_, outcome| match outcome {
        Outcome::Scored { correct, .. } => Measure::Value(f64::from(u8::from(*correct))),
        _ => Measure::Unscored,
    },
};

/// Metrics by which the orderings are tested.
const TESTED: [&str; 2] = ["right_answers", "clinical_accuracy"];

/// `ablation.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ablation {
    /// Layout of this file.
    pub version: u32,
    /// Program that wrote it.
    pub program: String,
    /// Recipe, model, device, seed.
    pub facts: Vec<(String, String)>,
    /// Held-out rows that all views answer.
    pub rows: usize,
    /// Images they come from.
    pub images: usize,
    /// The base model, then the views.
    pub views: Vec<ViewRow>,
    /// Orderings, tested.
    pub claims: Vec<Claim>,
    /// How intervals and p-values were made.
    pub statistics: String,
}

/// One view in numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ViewRow {
    /// Its name.
    pub name: String,
    /// What it was trained on.
    pub about: String,
    /// Rows it was trained on; 0 for the base model.
    pub train_rows: usize,
    /// Its metrics.
    pub metrics: Vec<Cell>,
}

/// One metric of one view.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// Stable key.
    pub key: String,
    /// Name in tables.
    pub name: String,
    /// Which direction is an improvement.
    pub better: Better,
    /// Range of its values.
    pub unit: Unit,
    /// Mean with its interval.
    pub estimate: Estimate,
    /// Rows that were not scored.
    pub unscored: usize,
}

/// An ordering that the method predicts, tested.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Claim {
    /// The view that should be better.
    pub better: String,
    /// The view that should be worse.
    pub worse: String,
    /// Key of the metric.
    pub key: String,
    /// Name of the metric.
    pub metric: String,
    /// Range of its values.
    pub unit: Unit,
    /// The first view minus the second.
    pub difference: Difference,
    /// Whether the data show the ordering: `shown`, `not shown`, `the opposite is shown`, ..
    pub result: String,
}

/// Outcomes of one model by the id of the row.
type Outcomes = HashMap<String, Outcome>;

/// Reads the verdicts of all views and compares them.
pub(super) fn compare(resolved: &Resolved, root: &Path, views: &[View], ctx: &Ctx) -> Result<Ablation> {
    let rows: Vec<Sample> = read_jsonl(&root.join(ALL).join("kept.jsonl"))?;
    let rows: Vec<Sample> = rows.into_iter().filter(|s| s.split == Split::Test).collect();
    let mut tables = Vec::new();
    for view in views {
        let verdicts: Vec<Verdict> = read_jsonl(&root.join(directory(view)).join("verdicts.jsonl"))?;
        let of = |which| -> Outcomes {
            verdicts.iter().filter(|v| v.model == which).map(|v| (v.id.clone(), v.outcome.clone())).collect()
        };
        if *view == View::default() {
            tables.push(("base".to_string(), "the model before tuning".to_string(), 0, of(Which::Base)));
        }
        tables.push((view.to_string(), about(view), trained_rows(root, view)?, of(Which::Tuned)));
    }
    let seed = resolved.plan.seed;
    let rows: Vec<&Sample> = rows.iter().filter(|s| tables.iter().all(|t| t.3.contains_key(&s.id))).collect();
    let found = tables.iter().map(|(name, about, train_rows, outcomes)| ViewRow {
        name: name.clone(),
        about: about.clone(),
        train_rows: *train_rows,
        metrics: metrics().filter_map(|m| cell(m, &rows, outcomes, seed, name)).collect(),
    });
    let groups: std::collections::BTreeSet<&str> = rows.iter().map(|s| super::group(s)).collect();
    let plan = &resolved.plan;
    Ok(Ablation {
        version: VERSION,
        program: format!("medtune {}", env!("CARGO_PKG_VERSION")),
        facts: vec![
            ("recipe".into(), resolved.name.clone()),
            ("model".into(), plan.model.name.clone()),
            ("data".into(), plan.data.source.clone()),
            ("device".into(), ctx.device_spec.to_string()),
            ("seed".into(), seed.to_string()),
        ],
        rows: rows.len(),
        images: groups.len(),
        views: found.collect(),
        claims: claims(&rows, &tables.iter().map(|t| (t.0.as_str(), &t.3)).collect::<Vec<_>>(), seed),
        statistics: statistics::signature(),
    })
}

fn metrics() -> impl Iterator<Item = &'static Metric> {
    std::iter::once(&RIGHT).chain(METRICS.iter().copied())
}

fn cell(metric: &Metric, rows: &[&Sample], outcomes: &Outcomes, seed: u64, view: &str) -> Option<Cell> {
    let (mut values, mut unscored) = (Vec::new(), 0);
    for sample in rows {
        match (metric.measure)(sample, &outcomes[&sample.id]) {
            Measure::Value(value) => values.push(Observation { cluster: super::group(sample), value }),
            Measure::Unscored => unscored += 1,
            Measure::NotApplicable => {}
        }
    }
    (!values.is_empty()).then(|| Cell {
        key: metric.key.into(),
        name: metric.name.into(),
        better: metric.better,
        unit: metric.unit,
        estimate: statistics::estimate(&values, metric.unit, seed, &format!("ablation {} {view}", metric.key)),
        unscored,
    })
}

/// Pairs of views, the better one first, as the method predicts them.
fn predicted(names: &[&str]) -> Vec<(String, String)> {
    let has = |name: &str| names.contains(&name);
    let mut pairs: Vec<(&str, &str)> = Vec::new();
    pairs.extend(names.iter().filter(|n| **n != "base").map(|n| (*n, "base")));
    pairs.extend(["positive", "negative", "no-qc"].map(|worse| (ALL, worse)));
    pairs.extend([(ALL, "75%"), ("75%", "50%"), ("50%", "25%"), (ALL, "25%")]);
    let known = pairs.into_iter().filter(|(a, b)| has(a) && has(b));
    known.map(|(a, b)| (a.to_string(), b.to_string())).collect()
}

fn claims(rows: &[&Sample], tables: &[(&str, &Outcomes)], seed: u64) -> Vec<Claim> {
    let names: Vec<&str> = tables.iter().map(|t| t.0).collect();
    let outcomes = |name: &str| tables.iter().find(|t| t.0 == name).map(|t| t.1);
    let mut found = Vec::new();
    for key in TESTED {
        let Some(metric) = metrics().find(|m| m.key == key) else { continue };
        for (better, worse) in predicted(&names) {
            let (Some(a), Some(b)) = (outcomes(&better), outcomes(&worse)) else { continue };
            let pairs: Vec<Pair<'_>> = rows
                .iter()
                .filter_map(|s| match ((metric.measure)(s, &b[&s.id]), (metric.measure)(s, &a[&s.id])) {
                    (Measure::Value(base), Measure::Value(tuned)) => {
                        Some(Pair { cluster: super::group(s), base, tuned })
                    }
                    _ => None,
                })
                .collect();
            if pairs.is_empty() {
                continue;
            }
            let difference = statistics::difference(&pairs, seed, &format!("ablation {key} {better} {worse}"));
            found.push(Claim {
                better,
                worse,
                key: key.into(),
                metric: metric.name.into(),
                unit: metric.unit,
                difference,
                result: String::new(),
            });
        }
    }
    statistics::correct(found.iter_mut().map(|c| &mut c.difference));
    for claim in &mut found {
        claim.result = match claim.difference.finding {
            Finding::Higher => "shown",
            Finding::Lower => "the opposite is shown",
            Finding::NotShown => "not shown",
            other => other.words(),
        }
        .into();
    }
    found
}

impl Ablation {
    /// The orderings in one sentence each, in the order of the claims.
    #[must_use]
    pub fn sentences(&self) -> Vec<String> {
        use crate::stage::report::words;
        let sentence = |c: &Claim| {
            format!(
                "{}: {} better than {}: {}, {}.",
                c.metric,
                c.better,
                c.worse,
                c.result,
                words::difference(&c.difference, c.unit)
            )
        };
        self.claims.iter().map(sentence).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{judge::Stance, metric::clinical::tests::row};

    fn outcome(correct: bool) -> Outcome {
        Outcome::Scored {
            scores: None,
            agreement: None,
            stance: Stance::Affirms,
            expected: Stance::Affirms,
            correct,
            reason: String::new(),
        }
    }

    #[test]
    fn an_ordering_is_shown_only_where_rows_show_it() {
        let rows: Vec<Sample> =
            (0..40).map(|i| Sample { id: format!("r{i}"), group: format!("g{i}"), ..row(None) }).collect();
        let rows: Vec<&Sample> = rows.iter().collect();
        let table = |right: &dyn Fn(usize) -> bool| -> Outcomes {
            (0..40).map(|i| (format!("r{i}"), outcome(right(i)))).collect()
        };
        let (base, both) = (table(&|i| i % 4 == 0), table(&|i| i % 8 != 1));
        let positive = table(&|i| i % 8 != 2);
        let tables = [("base", &base), (ALL, &both), ("positive", &positive)];
        let claims = claims(&rows, &tables, 1);
        let result = |a: &str, b: &str| {
            claims.iter().find(|c| c.better == a && c.worse == b).map(|c| c.result.as_str()).unwrap_or_default()
        };
        assert_eq!(result(ALL, "base"), "shown");
        assert_eq!(result("positive", "base"), "shown");
        assert_eq!(result(ALL, "positive"), "not shown");
        assert!(claims.iter().all(|c| c.key == "right_answers"), "no clinical score was given");
        assert!(claims.iter().all(|c| c.difference.p_holm >= c.difference.p));
        let swapped = [("base", &both), (ALL, &base)];
        assert_eq!(super::claims(&rows, &swapped, 1)[0].result, "the opposite is shown");
    }
}

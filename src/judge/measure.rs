//! How good an instrument a judge is: agreement of two judges, what order and length do to scores, and whether answers
//! of known worth still get the scores they are known to deserve.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Outcome, Scores};
use crate::{
    error::{Error, Kind, Result},
    sample::{Role, Sample, Turn},
};

impl Scores {
    /// Names of the criteria, in order.
    pub const NAMES: [&'static str; 4] = ["accuracy", "relevance", "detail", "risk"];

    /// The four scores, in order.
    #[must_use]
    pub fn values(&self) -> [f64; 4] {
        [self.accuracy, self.relevance, self.detail, self.risk]
    }
}

/// The scores of an outcome that has some.
#[must_use]
pub fn scores(outcome: &Outcome) -> Option<Scores> {
    match outcome {
        Outcome::Scored { scores, .. } => *scores,
        _ => None,
    }
}

/// How two judges agree on one criterion.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Agreement {
    /// Answers that both scored.
    pub n: usize,
    /// Mean of second minus first, in points.
    pub mean_difference: f64,
    /// Mean distance, in points.
    pub mean_absolute_difference: f64,
    /// Share of answers whose scores are at most one point apart.
    pub within_one: f64,
    /// Cohen's kappa with quadratic weights, of scores rounded to whole points; none where neither judge varies.
    pub weighted_kappa: Option<f64>,
}

/// Agreement of two judges by criterion, over the answers that both scored.
#[must_use]
pub fn agreement(pairs: &[(Scores, Scores)]) -> BTreeMap<String, Agreement> {
    let one = |i: usize| {
        let values: Vec<(f64, f64)> = pairs.iter().map(|(a, b)| (a.values()[i], b.values()[i])).collect();
        (Scores::NAMES[i].to_string(), of_values(&values))
    };
    if pairs.is_empty() { BTreeMap::new() } else { (0..4).map(one).collect() }
}

fn of_values(values: &[(f64, f64)]) -> Agreement {
    let n = values.len() as f64;
    let mean = |f: &dyn Fn(f64, f64) -> f64| values.iter().map(|(a, b)| f(*a, *b)).sum::<f64>() / n;
    Agreement {
        n: values.len(),
        mean_difference: mean(&|a, b| b - a),
        mean_absolute_difference: mean(&|a, b| (b - a).abs()),
        within_one: mean(&|a, b| f64::from(u8::from((b - a).abs() <= 1.0))),
        weighted_kappa: weighted_kappa(values),
    }
}

/// One minus observed over expected squared disagreement.
fn weighted_kappa(values: &[(f64, f64)]) -> Option<f64> {
    let n = values.len() as f64;
    let rounded: Vec<(f64, f64)> = values.iter().map(|(a, b)| (a.round(), b.round())).collect();
    let observed = rounded.iter().map(|(a, b)| (a - b).powi(2)).sum::<f64>() / n;
    // The expectation over all pairs, from the moments of each side.
    let moments = |side: &dyn Fn(&(f64, f64)) -> f64| {
        let (sum, squares) = rounded.iter().map(side).fold((0.0, 0.0), |(s, q), x| (s + x, q + x * x));
        (sum / n, squares / n)
    };
    let ((a, a2), (b, b2)) = (moments(&|p| p.0), moments(&|p| p.1));
    let expected = a2 + b2 - 2.0 * a * b;
    (expected > 1e-12).then(|| 1.0 - observed / expected)
}

/// What a change that should not matter does to the scores of one criterion.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Shift {
    /// Answers that were scored both ways.
    pub n: usize,
    /// Mean of changed minus plain, in points.
    pub mean: f64,
    /// Its standard error; none for fewer than two answers.
    pub standard_error: Option<f64>,
}

/// Shift by criterion: `pairs` are scores of the plain and of the changed request.
#[must_use]
pub fn shift(pairs: &[(Scores, Scores)]) -> BTreeMap<String, Shift> {
    let one = |i: usize| {
        let all: Vec<f64> = pairs.iter().map(|(a, b)| b.values()[i] - a.values()[i]).collect();
        let n = all.len() as f64;
        let mean = all.iter().sum::<f64>() / n;
        let variance = all.iter().map(|d| (d - mean).powi(2)).sum::<f64>() / (n - 1.0);
        let standard_error = (all.len() > 1).then(|| (variance / n).sqrt());
        (Scores::NAMES[i].to_string(), Shift { n: all.len(), mean, standard_error })
    };
    if pairs.is_empty() { BTreeMap::new() } else { (0..4).map(one).collect() }
}

/// An answer in more words that say nothing more.
#[must_use]
pub fn wordy(answer: &str) -> String {
    format!(
        "{} To put it in other words, what has just been said is what applies to this image; it is meant as it was \
         said, and at this point there is nothing that would have to be added to it or taken away from it.",
        answer.trim()
    )
}

/// An answer whose worth is known.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Control {
    /// Name.
    pub id: String,
    /// Truth about the image.
    pub caption: String,
    /// What was asked.
    pub question: String,
    /// The right answer.
    pub reference: String,
    /// The answer to be judged.
    pub answer: String,
    /// Lowest and highest accuracy it can deserve.
    pub accuracy: [f64; 2],
    /// Lowest and highest safety it can deserve.
    pub risk: [f64; 2],
}

impl Control {
    /// The frozen set in a JSONL text.
    ///
    /// # Errors
    /// A line is no such answer.
    pub fn read(text: &str) -> Result<Vec<Self>> {
        let lines = text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty());
        let row = |(i, line): (usize, &str)| {
            serde_json::from_str(line).map_err(|e| {
                Error::new(Kind::Data, "a control answer cannot be read").at(format!("line {}", i + 1)).source(e)
            })
        };
        lines.map(row).collect()
    }

    /// The row that it is an answer to.
    #[must_use]
    pub fn sample(&self) -> Sample {
        Sample {
            id: self.id.clone(),
            turns: vec![
                Turn { role: Role::User, text: self.question.clone() },
                Turn { role: Role::Assistant, text: self.reference.clone() },
            ],
            annotation: Some(self.caption.clone()),
            ..Sample::default()
        }
    }
}

/// What came of a control answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Checked {
    /// Its name.
    pub id: String,
    /// Its scores; none where the judge gave none.
    pub scores: Option<Scores>,
    /// Distance of accuracy and safety from where they belong, in points, on average of the two.
    pub off: Option<f64>,
}

/// What came of the frozen set.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Controls {
    /// Each answer.
    pub items: Vec<Checked>,
    /// Mean distance from where scores belong, in points; none where nothing was scored.
    pub drift: Option<f64>,
    /// Mean distance from the scores of an earlier run, in points.
    pub drift_since_before: Option<f64>,
}

/// Compares the scores of control answers with where they belong, and with those of an earlier run.
#[must_use]
pub fn controls(set: &[Control], outcomes: &[Outcome], before: Option<&Controls>) -> Controls {
    let distance = |x: f64, [low, high]: [f64; 2]| (low - x).max(x - high).max(0.0);
    let check = |(control, outcome): (&Control, &Outcome)| {
        let scores = scores(outcome);
        let off = scores.map(|s| (distance(s.accuracy, control.accuracy) + distance(s.risk, control.risk)) / 2.0);
        Checked { id: control.id.clone(), scores, off }
    };
    let items: Vec<Checked> = set.iter().zip(outcomes).map(check).collect();
    let mean = |all: Vec<f64>| (!all.is_empty()).then(|| all.iter().sum::<f64>() / all.len() as f64);
    let since = before.and_then(|before| {
        let pair = |now: &Checked| {
            let then = before.items.iter().find(|i| i.id == now.id)?.scores?.values();
            let now = now.scores?.values();
            Some(now.iter().zip(then).map(|(a, b)| (a - b).abs()).sum::<f64>() / 4.0)
        };
        mean(items.iter().filter_map(pair).collect())
    });
    Controls { drift: mean(items.iter().filter_map(|i| i.off).collect()), drift_since_before: since, items }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(x: f64) -> Scores {
        Scores { accuracy: x, relevance: x, detail: x, risk: x }
    }

    fn scored(x: f64) -> Outcome {
        Outcome::Scored {
            scores: Some(all(x)),
            agreement: None,
            stance: super::super::Stance::Unclear,
            expected: super::super::Stance::Unclear,
            correct: x > 6.0,
            reason: String::new(),
        }
    }

    #[test]
    fn agreement_is_that_of_the_textbook() {
        let pairs: Vec<_> = [(1.0, 1.0), (5.0, 5.0), (9.0, 9.0)].map(|(a, b)| (all(a), all(b))).to_vec();
        let same = agreement(&pairs)["risk"];
        assert_eq!((same.n, same.mean_difference, same.weighted_kappa), (3, 0.0, Some(1.0)));
        // Observed (0 + 1 + 4) / 3, expected over all nine pairs (1 + 9 + 0 + 0 + 4 + 1 + 1 + 1 + 4) / 9.
        let values = [(2.0, 2.0), (3.0, 4.0), (3.0, 1.0)];
        let pairs: Vec<_> = values.map(|(a, b)| (all(a), all(b))).to_vec();
        let found = agreement(&pairs)["accuracy"];
        let expected: f64 =
            values.iter().flat_map(|(a, _)| values.iter().map(move |(_, b)| (a - b) * (a - b))).sum::<f64>() / 9.0;
        assert!((found.weighted_kappa.unwrap() - (1.0 - (5.0 / 3.0) / expected)).abs() < 1e-12);
        assert!((found.within_one - 2.0 / 3.0).abs() < 1e-12);
        assert_eq!(agreement(&[(all(5.0), all(5.0))])["detail"].weighted_kappa, None);
        assert!(agreement(&[]).is_empty());
    }

    #[test]
    fn a_shift_has_its_error() {
        let pairs = [(all(5.0), all(6.0)), (all(5.0), all(8.0))];
        let found = shift(&pairs)["detail"];
        assert_eq!((found.n, found.mean, found.standard_error), (2, 2.0, Some(1.0)));
        assert!(wordy("Left.").starts_with("Left. To put it"));
    }

    #[test]
    fn a_judge_that_drifts_is_noticed() {
        let set = Control::read(include_str!("../../recipes/medhalltune/controls.jsonl")).unwrap();
        assert!(set.len() >= 8);
        let good: Vec<Outcome> = set.iter().map(|c| scored((c.accuracy[0] + c.accuracy[1]) / 2.0)).collect();
        let kind: Vec<Outcome> = set.iter().map(|_| scored(9.0)).collect();
        let before = controls(&set, &good, None);
        assert!(before.drift.unwrap() < 0.5, "{before:?}");
        let now = controls(&set, &kind, Some(&before));
        assert!(now.drift.unwrap() > 1.5 && now.drift_since_before.unwrap() > 2.0, "{now:?}");
        let silent = controls(&set, &vec![Outcome::OverBudget; set.len()], None);
        assert_eq!(silent.drift, None);
    }
}

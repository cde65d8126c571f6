//! What a model could learn from the data without looking at the images: warnings, not rejections.

use std::collections::{BTreeMap, HashMap};

use super::words::{normal, set};
use crate::{
    random::stream,
    sample::{Polarity, Sample},
};

/// Parts of the cross-validation.
const FOLDS: usize = 5;

/// Fewest rows of each polarity that the checks need.
const ENOUGH: usize = 50;

/// Everything that stands out in the kept rows; empty when nothing does, or when rows state no polarity.
#[must_use]
pub fn warnings(samples: &[Sample], seed: u64) -> Vec<String> {
    let of = |p| samples.iter().filter(|s| s.polarity == Some(p)).collect::<Vec<_>>();
    let (negative, positive) = (of(Polarity::Hallucination), of(Polarity::NonHallucination));
    if negative.len() < ENOUGH || positive.len() < ENOUGH {
        return Vec::new();
    }
    let mut out = Vec::new();
    let no = share(&negative, |s| first(s) == "no");
    if no > 0.5 {
        out.push(format!("{:.0} % of the answers that refute begin with \"No\"; expected at most 50 %", no * 100.0));
    }
    let yes = share(&positive, |s| first(s) == "yes");
    if yes > 0.6 {
        out.push(format!("{:.0} % of ordinary answers begin with \"Yes\"; expected at most 60 %", yes * 100.0));
    }
    let denied = share(&positive, denies);
    if denied < 0.1 {
        out.push(format!("{:.0} % of ordinary answers are a right \"no\"; expected at least 10 %", denied * 100.0));
    }
    let accuracy = predictability(&negative, &positive, seed);
    if accuracy > 0.75 {
        out.push(format!(
            "polarity follows from the words of the question in {:.0} % of rows; expected at most 75 %",
            accuracy * 100.0
        ));
    }
    out.extend(balance(&negative));
    out
}

fn share(samples: &[&Sample], test: impl Fn(&Sample) -> bool) -> f64 {
    samples.iter().filter(|s| test(s)).count() as f64 / samples.len() as f64
}

fn first(sample: &Sample) -> String {
    normal(sample.answer()).split(' ').next().unwrap_or("").to_string()
}

fn denies(sample: &Sample) -> bool {
    let answer = normal(sample.answer());
    let opens = ["no", "not", "there is no", "there are no", "i see no", "that is not"];
    let open = opens.iter().any(|o| answer == *o || answer.starts_with(&format!("{o} ")));
    open || answer.contains(" not visible") || answer.contains("does not show") || answer.contains(" is not ")
}

/// Categories whose share is more than ten points away from an equal one.
fn balance(samples: &[&Sample]) -> Vec<String> {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for sample in samples {
        *counts.entry(sample.category.as_deref().unwrap_or("none")).or_default() += 1;
    }
    let equal = 1.0 / counts.len() as f64;
    let off = |n: usize| (n as f64 / samples.len() as f64 - equal).abs() > 0.1;
    let unequal = counts.iter().filter(|(_, n)| off(**n));
    unequal
        .map(|(name, n)| {
            format!("category {name} has {n} of {} rows; expected about {:.0} %", samples.len(), equal * 100.0)
        })
        .collect()
}

/// Cross-validated accuracy of naive Bayes on the words of the question, classes weighted equally. Rows of one image
/// stay in one fold.
#[must_use]
pub fn predictability(negative: &[&Sample], positive: &[&Sample], seed: u64) -> f64 {
    let rows: Vec<(usize, bool, Vec<String>)> = negative
        .iter()
        .map(|s| (s, true))
        .chain(positive.iter().map(|s| (s, false)))
        .map(|(s, class)| (fold(s, seed), class, set(&normal(&s.question())).into_iter().collect()))
        .collect();
    let (mut right, mut total) = ([0usize; 2], [0usize; 2]);
    for held_out in 0..FOLDS {
        let model = Bayes::new(rows.iter().filter(|r| r.0 != held_out).map(|r| (r.1, r.2.as_slice())));
        for (_, class, words) in rows.iter().filter(|r| r.0 == held_out) {
            total[usize::from(*class)] += 1;
            right[usize::from(*class)] += usize::from(model.predict(words) == *class);
        }
    }
    let rate = |i: usize| right[i] as f64 / total[i].max(1) as f64;
    (rate(0) + rate(1)) / 2.0
}

fn fold(sample: &Sample, seed: u64) -> usize {
    use rand::RngExt;
    stream(seed, &sample.group, 0).random_range(0..FOLDS)
}

/// Naive Bayes on the presence of words, add-one smoothed.
struct Bayes {
    with: HashMap<String, [f64; 2]>,
    rows: [f64; 2],
}

impl Bayes {
    fn new<'a>(rows: impl Iterator<Item = (bool, &'a [String])>) -> Self {
        let mut model = Self { with: HashMap::new(), rows: [0.0; 2] };
        for (class, words) in rows {
            model.rows[usize::from(class)] += 1.0;
            for word in words {
                model.with.entry(word.clone()).or_default()[usize::from(class)] += 1.0;
            }
        }
        model
    }

    fn predict(&self, words: &[String]) -> bool {
        let score = |class: usize| -> f64 {
            let known = words.iter().filter_map(|w| self.with.get(w));
            known.map(|counts| ((counts[class] + 1.0) / (self.rows[class] + 2.0)).ln()).sum()
        };
        score(1) > score(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qc::tests::row;

    fn rows(question: impl Fn(usize) -> String, answer: &str, polarity: Polarity) -> Vec<Sample> {
        (0..100)
            .map(|i| Sample {
                polarity: Some(polarity),
                group: format!("g{i}"),
                category: Some(["a", "b"][i % 2].into()),
                ..row(&question(i), answer)
            })
            .collect()
    }

    #[test]
    fn shortcuts_are_seen_and_balanced_data_pass() {
        let tell = rows(|i| format!("I noticed a nodule {i}, right?"), "No, there is none.", Polarity::Hallucination);
        let plain = rows(|i| format!("Which organ is {i}?"), "Yes, the heart.", Polarity::NonHallucination);
        let all: Vec<Sample> = tell.into_iter().chain(plain).collect();
        let found = warnings(&all, 1);
        assert_eq!(found.len(), 4, "{found:?}");
        let same = |i: usize| format!("Is there a nodule of kind {}?", i % 7);
        let mut fair = rows(same, "There is no nodule.", Polarity::Hallucination);
        fair.extend(rows(same, "The nodule is not large.", Polarity::NonHallucination));
        assert_eq!(warnings(&fair, 1), Vec::<String>::new());
        assert!(warnings(&fair[..10], 1).is_empty());
    }
}

//! What a model could learn from the data without looking at the images. Nothing is rejected for it: the stage warns, or
//! fails its gate where the recipe says so.

use std::collections::{BTreeMap, HashSet};

use rand::RngExt;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{hash::hash, words::normal};
use crate::{
    error::{Error, Kind, Result},
    random::stream,
    sample::{Polarity, Sample, meta},
};

/// Parts of the cross-validation.
const FOLDS: usize = 5;

/// Fewest rows of each polarity that the checks need.
const ENOUGH: usize = 50;

/// Words that the classifier tells apart; rarer ones share a place with others by chance.
const WORDS: usize = 1 << 18;

/// `[qc.bias]` of a recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BiasConfig {
    /// What happens when a limit is passed.
    pub action: BiasAction,
    /// Largest share of refuting answers that may begin with "No", 0 to 1.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub max_no: f64,
    /// Largest share of ordinary answers that may begin with "Yes", 0 to 1.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub max_yes: f64,
    /// Least share of ordinary answers that are a right "no", 0 to 1.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub min_right_no: f64,
    /// Largest share of questions whose words alone may give the polarity away, 0 to 1; guessing gives 0.5.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub max_predictability: f64,
    /// How far the share of a hallucination category may be from an equal one, 0 to 1.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub max_imbalance: f64,
    /// Least share of different questions among all, 0 to 1.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub min_unique_questions: f64,
}

/// What happens when the data have a bias.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BiasAction {
    /// A line in the summary and in `qc.json`.
    #[default]
    Warn,
    /// The stage fails its gate.
    Fail,
}

impl Default for BiasConfig {
    fn default() -> Self {
        Self {
            action: BiasAction::Warn,
            max_no: 0.5,
            max_yes: 0.6,
            min_right_no: 0.1,
            max_predictability: 0.75,
            max_imbalance: 0.1,
            min_unique_questions: 0.0,
        }
    }
}

/// What was measured, part of `qc.json`. Shares are 0 to 1.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct BiasReport {
    /// Rows with a false premise, and ordinary ones; without fifty of each nothing else is measured.
    pub rows: [usize; 2],
    /// Refuting answers that begin with "No".
    pub no: f64,
    /// Ordinary answers that begin with "Yes".
    pub yes: f64,
    /// Ordinary answers that are a right "no".
    pub right_no: f64,
    /// Rows whose polarity naive Bayes tells from the words of the question alone, both polarities weighted equally,
    /// images never on both sides.
    pub predictability: f64,
    /// Different questions among all.
    pub unique_questions: f64,
    /// Rows of each hallucination category.
    pub categories: BTreeMap<String, usize>,
    /// Rows of each modality.
    pub modalities: BTreeMap<String, usize>,
    /// Limits that are passed, in words.
    pub warnings: Vec<String>,
}

/// The measurement, in two passes over the rows: all are counted, then each is held against the others.
#[derive(Debug)]
pub struct BiasCheck {
    seed: u64,
    /// Rows that have a word, by fold, polarity and word.
    words: Vec<u32>,
    /// Rows by fold and polarity.
    rows: [[usize; 2]; FOLDS],
    right: [usize; 2],
    no: usize,
    yes: usize,
    right_no: usize,
    questions: HashSet<u64>,
    categories: BTreeMap<String, usize>,
    modalities: BTreeMap<String, usize>,
}

impl BiasCheck {
    /// Before the first row; `seed` deals the images to the folds.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            words: vec![0; FOLDS * 2 * WORDS],
            rows: Default::default(),
            right: [0; 2],
            no: 0,
            yes: 0,
            right_no: 0,
            questions: HashSet::new(),
            categories: BTreeMap::new(),
            modalities: BTreeMap::new(),
        }
    }

    /// First pass: counts a row. Rows that state no polarity are left out.
    pub fn count(&mut self, sample: &Sample) {
        let Some(class) = class(sample) else { return };
        let question = normal(&sample.bare_question());
        let fold = self.fold(sample);
        self.rows[fold][class] += 1;
        for word in places(&question) {
            self.words[(fold * 2 + class) * WORDS + word] += 1;
        }
        self.questions.insert(hash(question.as_bytes()));
        let answer = normal(sample.answer());
        let first = answer.split(' ').next();
        if class == 1 {
            self.no += usize::from(first == Some("no"));
            *self.categories.entry(sample.category.clone().unwrap_or_else(|| "none".into())).or_default() += 1;
        } else {
            self.yes += usize::from(first == Some("yes"));
            self.right_no += usize::from(denies(&answer));
        }
        if let Some(modality) = sample.meta.get(meta::MODALITY).and_then(|m| m.as_str()) {
            *self.modalities.entry(modality.to_string()).or_default() += 1;
        }
    }

    /// Second pass: guesses the polarity of a row from the rows of the other folds.
    pub fn guess(&mut self, sample: &Sample) {
        let Some(class) = class(sample) else { return };
        let fold = self.fold(sample);
        let guessed = self.predict(fold, &places(&normal(&sample.bare_question())));
        self.right[class] += usize::from(guessed == class);
    }

    /// Naive Bayes on the presence of words, add-one smoothed, trained on all folds but one.
    fn predict(&self, held_out: usize, words: &[usize]) -> usize {
        let folds = || (0..FOLDS).filter(move |fold| *fold != held_out);
        let rows: [usize; 2] = std::array::from_fn(|class| folds().map(|fold| self.rows[fold][class]).sum());
        let mut scores = [0.0; 2];
        for word in words {
            let with: [u32; 2] =
                std::array::from_fn(|class| folds().map(|fold| self.words[(fold * 2 + class) * WORDS + word]).sum());
            if with == [0; 2] {
                continue;
            }
            for class in 0..2 {
                scores[class] += ((f64::from(with[class]) + 1.0) / (rows[class] as f64 + 2.0)).ln();
            }
        }
        usize::from(scores[1] > scores[0])
    }

    fn fold(&self, sample: &Sample) -> usize {
        stream(self.seed, &sample.group, 0).random_range(0..FOLDS)
    }

    /// The result beside the limits of a recipe.
    #[must_use]
    pub fn finish(self, config: &BiasConfig) -> BiasReport {
        let total: [usize; 2] = std::array::from_fn(|class| self.rows.iter().map(|fold| fold[class]).sum());
        let mut report =
            BiasReport { rows: [total[1], total[0]], modalities: self.modalities, ..BiasReport::default() };
        if total.iter().any(|n| *n < ENOUGH) {
            return report;
        }
        let share = |n: usize, of: usize| n as f64 / of as f64;
        report.no = share(self.no, total[1]);
        report.yes = share(self.yes, total[0]);
        report.right_no = share(self.right_no, total[0]);
        report.predictability = (share(self.right[0], total[0]) + share(self.right[1], total[1])) / 2.0;
        report.unique_questions = share(self.questions.len(), total[0] + total[1]);
        report.categories = self.categories;
        report.warnings = warnings(&report, config);
        report
    }
}

impl BiasReport {
    /// Fails when the recipe says that a bias is a failure.
    ///
    /// # Errors
    /// A limit is passed.
    pub fn gate(&self, config: &BiasConfig) -> Result<()> {
        match self.warnings.as_slice() {
            [first, ..] if config.action == BiasAction::Fail => Err(Error::new(Kind::Gate, "the data have a bias")
                .found(format!("{first}{}", if self.warnings.len() > 1 { ", and more" } else { "" }))
                .help("qc.json lists all; construct other pairs, or set qc.bias.action = \"warn\"")),
            _ => Ok(()),
        }
    }
}

fn class(sample: &Sample) -> Option<usize> {
    sample.polarity.map(|p| usize::from(p == Polarity::Hallucination))
}

/// Places of the different words of a text.
fn places(text: &str) -> Vec<usize> {
    let mut all: Vec<usize> =
        text.split(' ').filter(|w| !w.is_empty()).map(|w| hash(w.as_bytes()) as usize % WORDS).collect();
    all.sort_unstable();
    all.dedup();
    all
}

fn denies(answer: &str) -> bool {
    let opens = ["no", "not", "there is no", "there are no", "i see no", "that is not"];
    let open = opens.iter().any(|o| answer == *o || answer.starts_with(&format!("{o} ")));
    open || answer.contains(" not visible") || answer.contains("does not show") || answer.contains(" is not ")
}

fn warnings(report: &BiasReport, config: &BiasConfig) -> Vec<String> {
    let mut out = Vec::new();
    let percent = |x: f64| format!("{:.0} %", x * 100.0);
    let most = |found: f64, limit: f64, what: &str, out: &mut Vec<String>| {
        if found > limit {
            out.push(format!("{} {what}; expected at most {}", percent(found), percent(limit)));
        }
    };
    most(report.no, config.max_no, "of the answers that refute begin with \"No\"", &mut out);
    most(report.yes, config.max_yes, "of ordinary answers begin with \"Yes\"", &mut out);
    if report.right_no < config.min_right_no {
        let limit = percent(config.min_right_no);
        out.push(format!(
            "{} of ordinary answers are a right \"no\"; expected at least {limit}",
            percent(report.right_no)
        ));
    }
    let what = "of rows have a polarity that follows from the words of the question";
    most(report.predictability, config.max_predictability, what, &mut out);
    if report.unique_questions < config.min_unique_questions {
        let limit = percent(config.min_unique_questions);
        out.push(format!("{} of questions are different; expected at least {limit}", percent(report.unique_questions)));
    }
    let equal = 1.0 / report.categories.len().max(1) as f64;
    let rows: usize = report.categories.values().sum();
    for (name, n) in &report.categories {
        if (*n as f64 / rows as f64 - equal).abs() > config.max_imbalance {
            out.push(format!("category {name} has {n} of {rows} rows; expected about {}", percent(equal)));
        }
    }
    out
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

    fn measure(samples: &[Sample]) -> BiasReport {
        let mut check = BiasCheck::new(1);
        samples.iter().for_each(|s| check.count(s));
        samples.iter().for_each(|s| check.guess(s));
        check.finish(&BiasConfig::default())
    }

    #[test]
    fn shortcuts_are_seen_and_balanced_data_pass() {
        let tell = rows(|i| format!("I noticed a nodule {i}, right?"), "No, there is none.", Polarity::Hallucination);
        let plain = rows(|i| format!("Which organ is {i}?"), "Yes, the heart.", Polarity::NonHallucination);
        let all: Vec<Sample> = tell.into_iter().chain(plain).collect();
        let found = measure(&all);
        assert_eq!((found.warnings.len(), found.predictability, found.unique_questions), (4, 1.0, 1.0), "{found:?}");
        assert!(found.gate(&BiasConfig::default()).is_ok());
        let strict = BiasConfig { action: BiasAction::Fail, ..BiasConfig::default() };
        assert_eq!(found.gate(&strict).unwrap_err().kind(), Kind::Gate);
        let same = |i: usize| format!("Is there a nodule of kind {}?", i % 7);
        let mut fair = rows(same, "There is no nodule.", Polarity::Hallucination);
        fair.extend(rows(same, "The nodule is not large.", Polarity::NonHallucination));
        let found = measure(&fair);
        assert_eq!(found.warnings, Vec::<String>::new());
        assert!((found.unique_questions - 7.0 / 200.0).abs() < 1e-9 && found.gate(&strict).is_ok());
        assert!(measure(&fair[..10]).warnings.is_empty());
    }

    #[test]
    fn categories_far_from_equal_are_named() {
        let mut all = rows(|i| format!("Is there a mass {i}?"), "None is seen.", Polarity::Hallucination);
        all.iter_mut().for_each(|s| s.category = Some(if s.group == "g1" { "b".into() } else { "a".into() }));
        all.extend(rows(|i| format!("Is there a mass {i}?"), "No, none.", Polarity::NonHallucination));
        let found = measure(&all).warnings;
        assert!(found.iter().any(|w| w.contains("category b has 1 of 100")), "{found:?}");
    }
}

//! Quality control: one rule a file, each with a reason code. A rejected row is data, not an error.
//!
//! Rules run in the order of [`RULES`], cheap first; the first that objects decides. Rules about constructed
//! instructions leave rows of visual question answering (those with an `answer_type`) alone where a short answer is
//! what the data set is made of.

use std::{
    collections::{BTreeSet, HashMap},
    path::PathBuf,
};

use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{error::Result, sample::Sample};

pub mod answer_only;
pub mod bias;
pub mod category_mix;
pub mod claim;
pub mod duplicate;
pub mod empty;
pub mod hash;
pub mod image_count;
pub mod image_missing;
pub mod image_tiny;
pub mod language;
pub mod leak_text;
pub mod length;
pub mod near_duplicate;
pub mod no_access;
pub mod positive_refutes;
pub mod premise_true;
pub mod refs;
pub mod roles;
pub mod template;
pub mod truth_mismatch;
pub mod r#unsafe;
pub mod words;

/// `[qc]` of a recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct QcConfig {
    /// Whether quality control runs at all; without it every row is kept.
    pub enabled: bool,
    /// The stage fails its gate when a larger share of rows is rejected, 0 to 1.
    pub max_drop_rate: f64,
    /// Largest share of constructed answers that may begin with the same four words, 0 to 1; 1 turns the rule off.
    pub max_template_share: f64,
    /// Whether train and test may share images, which the stage otherwise refuses.
    pub allow_leaks: bool,
}

impl Default for QcConfig {
    fn default() -> Self {
        Self { enabled: true, max_drop_rate: 0.5, max_template_share: 0.05, allow_leaks: false }
    }
}

/// What a rule says of a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing to object.
    Keep,
    /// The row is dropped and kept aside with this reason.
    Reject {
        /// Reason code, stable, snake_case.
        code: &'static str,
        /// What exactly was wrong.
        detail: String,
    },
}

/// A quality rule. Rules that compare rows keep their state in [`QcState`].
pub trait QcRule: Sync {
    /// Its reason code.
    fn code(&self) -> &'static str;

    /// What it does, why, and an example.
    fn doc(&self) -> &'static str;

    /// Checks one row.
    ///
    /// # Errors
    /// The row could not be checked at all.
    fn check(&self, sample: &Sample, state: &mut QcState) -> Result<Verdict>;
}

/// A rejection with the code of `rule`.
fn reject(rule: &dyn QcRule, detail: impl Into<String>) -> Result<Verdict> {
    Ok(Verdict::Reject { code: rule.code(), detail: detail.into() })
}

/// The different words of a question and of its answer.
pub(crate) type WordPair = (BTreeSet<String>, BTreeSet<String>);

/// What rules know of the run and remember between its rows.
#[derive(Debug, Default)]
pub struct QcState {
    /// Width and height of each image, or why it cannot be read.
    pub images: HashMap<PathBuf, Result<(usize, usize), String>>,
    /// Question and answer words of the rows kept so far, by group.
    pub(crate) kept: HashMap<String, Vec<WordPair>>,
    /// Normalised pairs of the rows kept so far, with their group.
    pub(crate) pairs: BTreeSet<(String, String, String)>,
    /// Kept rows by the first four words of the answer.
    pub(crate) openings: HashMap<String, usize>,
    /// Most rows that may share an opening.
    pub(crate) opening_limit: usize,
}

impl QcState {
    /// The state before the first of `samples`: every image is decoded once, in parallel.
    #[must_use]
    pub fn new(samples: &[Sample], config: &QcConfig) -> Self {
        let paths: BTreeSet<&PathBuf> = samples.iter().flat_map(|s| &s.images).map(|i| &i.path).collect();
        let images = paths
            .into_par_iter()
            .map(|path| {
                let probe = crate::image::probe(path).map(|p| (p.width, p.height)).map_err(|e| e.to_string());
                (path.clone(), probe)
            })
            .collect();
        let constructed = samples.iter().filter(|s| is_constructed(s)).count();
        let limit = (config.max_template_share * constructed as f64).ceil() as usize;
        // A share of a handful of rows says nothing.
        let opening_limit = if config.max_template_share >= 1.0 { usize::MAX } else { limit.max(10) };
        Self { images, opening_limit, ..Self::default() }
    }

    /// Remembers a row that passed all rules.
    pub fn remember(&mut self, sample: &Sample) {
        let (question, answer) = (words::normal(&sample.question()), words::normal(sample.answer()));
        self.kept.entry(sample.group.clone()).or_default().push((words::set(&question), words::set(&answer)));
        if let Some(opening) = template::opening(sample) {
            *self.openings.entry(opening).or_default() += 1;
        }
        self.pairs.insert((sample.group.clone(), question, answer));
    }
}

/// Whether the row is a constructed instruction, not a row of a visual question answering set.
fn is_constructed(sample: &Sample) -> bool {
    sample.answer_type.is_none()
}

/// All rules, cheap first.
pub const RULES: &[&dyn QcRule] = &[
    &roles::Roles,
    &empty::Empty,
    &image_count::ImageCount,
    &answer_only::AnswerOnly,
    &length::Length,
    &leak_text::LeakText,
    &no_access::NoAccess,
    &refs::Refs,
    &r#unsafe::Unsafe,
    &language::Language,
    &premise_true::PremiseTrue,
    &positive_refutes::PositiveRefutes,
    &category_mix::CategoryMix,
    &truth_mismatch::TruthMismatch,
    &duplicate::Duplicate,
    &near_duplicate::NearDuplicate,
    &template::Template,
    &image_missing::ImageMissing,
    &image_tiny::ImageTiny,
];

/// The first objection of `rules` to a row; a row without any is remembered.
///
/// # Errors
/// The row could not be checked at all.
pub fn judge(rules: &[&dyn QcRule], sample: &Sample, state: &mut QcState) -> Result<Verdict> {
    for rule in rules {
        if let verdict @ Verdict::Reject { .. } = rule.check(sample, state)? {
            return Ok(verdict);
        }
    }
    state.remember(sample);
    Ok(Verdict::Keep)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::sample::{Role, Turn};

    /// A constructed row about no image.
    pub(crate) fn row(question: &str, answer: &str) -> Sample {
        Sample {
            id: "row".into(),
            images: vec![],
            turns: vec![
                Turn { role: Role::User, text: question.into() },
                Turn { role: Role::Assistant, text: answer.into() },
            ],
            origin: Default::default(),
            split: Default::default(),
            group: "image".into(),
            polarity: None,
            category: None,
            answer_type: None,
            options: Vec::new(),
            annotation: None,
            meta: Default::default(),
        }
    }

    /// Whether `rule` rejects a row.
    pub(crate) fn rejects(rule: &dyn QcRule, sample: &Sample) -> bool {
        match rule.check(sample, &mut QcState { opening_limit: usize::MAX, ..QcState::default() }).unwrap() {
            Verdict::Keep => false,
            Verdict::Reject { code, detail } => {
                assert_eq!(code, rule.code());
                assert!(!detail.is_empty());
                true
            }
        }
    }

    #[test]
    fn registry_and_folder_agree() {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/qc");
        let shared = ["mod", "words", "claim", "bias", "hash"];
        let mut files: Vec<String> = std::fs::read_dir(dir)
            .unwrap()
            .map(|e| e.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned())
            .filter(|n| !shared.contains(&n.as_str()))
            .collect();
        let mut codes: Vec<String> = RULES.iter().map(|r| r.code().to_string()).collect();
        files.sort();
        codes.sort();
        assert_eq!(files, codes);
        for rule in RULES {
            assert!(rule.doc().contains("Example:"), "{} has no example", rule.code());
        }
    }

    #[test]
    fn a_good_row_passes_every_rule_once() {
        let good = row("Which organ is enlarged in this image?", "The heart is enlarged, the lungs are clear.");
        let mut state = QcState::new(std::slice::from_ref(&good), &QcConfig::default());
        assert_eq!(judge(RULES, &good, &mut state).unwrap(), Verdict::Keep);
        assert!(matches!(judge(RULES, &good, &mut state).unwrap(), Verdict::Reject { code: "duplicate", .. }));
    }
}

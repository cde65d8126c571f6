//! Quality control: one rule a file, each with a reason code. A rejected row is data, not an error.
//!
//! Each row is first looked at by itself ([`QcRule::check`], on all threads), then compared with the rows kept before it
//! ([`QcRule::compare`], in order), so that the number of threads never changes what is kept. Rules run in the order of
//! [`RULES`], cheap first; the first that objects decides. Rules about constructed instructions leave rows of visual
//! question answering (those with an `answer_type`) alone where a short answer is what the data set is made of.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    error::Result,
    leak::{firewall::Firewall, picture::Pictures},
    sample::Sample,
    stage::verify::VerifyConfig,
};

pub mod answer_only;
pub mod bias;
pub mod category_mix;
pub mod claim;
pub mod duplicate;
pub mod duplicate_image;
pub mod empty;
pub mod eval_leak;
pub mod hash;
pub mod identity;
pub mod image_count;
pub mod image_missing;
pub mod image_tiny;
pub mod language;
pub mod leak_text;
pub mod length;
pub mod memory;
pub mod near_duplicate;
pub mod no_access;
pub mod positive_refutes;
pub mod premise_true;
pub mod refs;
pub mod repeated;
pub mod roles;
pub mod template;
pub mod truth_mismatch;
pub mod r#unsafe;
pub mod words;

use bias::BiasConfig;
pub use memory::{Memory, Row};

/// `[qc]` of a recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct QcConfig {
    /// Whether quality control runs at all; without it every row is kept.
    pub enabled: bool,
    /// The stage fails its gate when a larger share of rows is rejected, 0 to 1.
    pub max_drop_rate: f64,
    /// Fewest words of a constructed question.
    pub min_question_words: usize,
    /// Fewest words of its answer.
    pub min_answer_words: usize,
    /// Largest share of constructed answers that may begin with the same four words, 0 to 1; 1 turns the rule off.
    pub max_template_share: f64,
    /// Most constructed rows of different images that may have the same question and the same answer; 0 means any.
    pub max_repeats: usize,
    /// Words of question and answer together from which a constructed row must differ from every other one, whatever
    /// its image; shorter ones are only compared within their image. 0 compares none across images.
    pub long_text_words: usize,
    /// Whether constructed rows of an image are rejected when another file of the data set shows the same picture.
    pub reject_duplicate_images: bool,
    /// Whether train and test may share images, which the stage otherwise refuses.
    pub allow_leaks: bool,
    /// What a model could learn without looking at the images.
    pub bias: BiasConfig,
    /// Check by a language model, after the rules.
    pub verify: VerifyConfig,
}

impl Default for QcConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            max_drop_rate: 0.5,
            min_question_words: 4,
            min_answer_words: 3,
            max_template_share: 0.05,
            max_repeats: 50,
            long_text_words: 40,
            reject_duplicate_images: true,
            allow_leaks: false,
            bias: BiasConfig::default(),
            verify: VerifyConfig::default(),
        }
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

/// A quality rule: it looks at a row by itself, or compares it with the rows kept so far, or both.
pub trait QcRule: Sync {
    /// Its reason code.
    fn code(&self) -> &'static str;

    /// What it does, why, and an example.
    fn doc(&self) -> &'static str;

    /// Checks one row by itself. Called on several threads and in any order.
    ///
    /// # Errors
    /// The row could not be checked at all.
    fn check(&self, _sample: &Sample, _context: &QcContext) -> Result<Verdict> {
        Ok(Verdict::Keep)
    }

    /// Compares one row that passed every check with the rows kept before it. Called in the order of the rows.
    ///
    /// # Errors
    /// The row could not be compared at all.
    fn compare(&self, _row: &Row, _memory: &Memory) -> Result<Verdict> {
        Ok(Verdict::Keep)
    }
}

/// What rules know of the run besides the row.
#[derive(Debug, Default)]
pub struct QcContext {
    /// Every image that rows show.
    pub pictures: Pictures,
    /// Evaluation sets that must not be trained on.
    pub firewall: Firewall,
    /// `[qc]` of the recipe.
    pub config: QcConfig,
}

/// A rejection with the code of `rule`.
fn reject(rule: &dyn QcRule, detail: impl Into<String>) -> Result<Verdict> {
    Ok(Verdict::Reject { code: rule.code(), detail: detail.into() })
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
    &identity::Identity,
    &image_missing::ImageMissing,
    &image_tiny::ImageTiny,
    &eval_leak::EvalLeak,
    &duplicate_image::DuplicateImage,
    &duplicate::Duplicate,
    &repeated::Repeated,
    &near_duplicate::NearDuplicate,
    &template::Template,
];

/// The first objection of `rules` to a row by itself.
///
/// # Errors
/// The row could not be checked at all.
pub fn check(rules: &[&dyn QcRule], sample: &Sample, context: &QcContext) -> Result<Verdict> {
    first(rules, |rule| rule.check(sample, context))
}

/// The first objection of `rules` to a row beside those kept so far; a row without any is remembered.
///
/// # Errors
/// The row could not be compared at all.
pub fn compare(rules: &[&dyn QcRule], row: &Row, memory: &mut Memory) -> Result<Verdict> {
    let verdict = first(rules, |rule| rule.compare(row, memory))?;
    if verdict == Verdict::Keep {
        memory.remember(row);
    }
    Ok(verdict)
}

fn first(rules: &[&dyn QcRule], ask: impl Fn(&dyn QcRule) -> Result<Verdict>) -> Result<Verdict> {
    for rule in rules {
        if let verdict @ Verdict::Reject { .. } = ask(*rule)? {
            return Ok(verdict);
        }
    }
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
        match rule.check(sample, &QcContext::default()).unwrap() {
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
        let shared = ["mod", "words", "claim", "bias", "hash", "memory"];
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

    /// What becomes of rows one after the other: the code of each that is rejected.
    pub(crate) fn codes(rows: &[Sample], config: &QcConfig) -> Vec<Option<&'static str>> {
        let context = QcContext { config: config.clone(), ..QcContext::default() };
        let mut memory = Memory::new(rows.len(), rows.len(), config, 1);
        let mut judge = |sample: &Sample| match check(RULES, sample, &context).unwrap() {
            Verdict::Keep => compare(RULES, &Row::new(sample, &memory.hashes()), &mut memory).unwrap(),
            reject => reject,
        };
        let code = |verdict| match verdict {
            Verdict::Keep => None,
            Verdict::Reject { code, .. } => Some(code),
        };
        rows.iter().map(|sample| code(judge(sample))).collect()
    }

    #[test]
    fn a_good_row_passes_every_rule_once() {
        let good = row("Which organ is enlarged in this image?", "The heart is enlarged, the lungs are clear.");
        assert_eq!(codes(&[good.clone(), good], &QcConfig::default()), [None, Some("duplicate")]);
    }
}

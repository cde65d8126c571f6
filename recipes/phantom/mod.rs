//! The embedded default recipe: synthetic images with a known truth, instruction pairs made by rule.
//!
//! Pairs follow three hallucination categories, in which the question holds a false premise and the answer refutes it
//! and says what is true, and the ordinary tasks, some of which are rightly answered with "no". Every pair carries the
//! claim of its question (`meta.claim`) and the truth of its image (`meta.truth`).

use crate::{
    datasets::phantom::truth::{Claim, Truth},
    error::{Error, Kind, Result},
    judge::Judge,
    plan::Plan,
    random::stream,
    recipe::{PolarityPolicy, Recipe},
    sample::{Polarity, Role, Sample, Turn},
};
use rand::RngExt;
use serde_json::{Value, json};

pub mod answers;
pub mod claims;
mod phrases;
pub mod questions;
pub mod rubric;

/// The recipe.
pub struct Phantom;

/// Most pairs of one polarity an image may get; also separates their random streams.
const MAX_PAIRS: usize = 100;

impl Recipe for Phantom {
    fn name(&self) -> &'static str {
        "phantom"
    }

    fn about(&self) -> &'static str {
        "Synthetic images with a known truth, from construction to report, without network or download.\n\
         Makes instruction pairs with and without false premises by rule, a stated share of them wrong on purpose."
    }

    fn template(&self) -> &'static str {
        include_str!("phantom.toml")
    }

    fn check(&self, plan: &Plan) -> Vec<String> {
        let construct = &plan.construct;
        let mut problems = Vec::new();
        if !(0.0..=1.0).contains(&construct.wrong_pair_rate) {
            problems.push(format!("construct.wrong_pair_rate: expected 0 to 1, found {}", construct.wrong_pair_rate));
        }
        if construct.negatives_per_image.max(construct.positives_per_image) > MAX_PAIRS {
            problems.push(format!("construct: expected at most {MAX_PAIRS} pairs of each polarity an image"));
        }
        if construct.negatives_per_image + construct.positives_per_image == 0 {
            problems.push("construct: no pairs are made: both numbers of pairs an image are 0".into());
        }
        problems
    }

    fn construct(&self, plan: &Plan, sample: Sample) -> Result<Vec<Sample>> {
        let Some(truth) = sample.meta.get("truth") else {
            return Ok(vec![sample]);
        };
        let truth: Truth = serde_json::from_value(truth.clone()).map_err(|e| {
            Error::new(Kind::Data, "meta.truth is not the truth of a phantom image").at(&sample.id).source(e)
        })?;
        Ok(pairs(plan, &sample, &truth))
    }

    fn judge(&self, _plan: &Plan) -> Result<Box<dyn Judge>> {
        Ok(Box::new(rubric::RubricJudge))
    }
}

/// All pairs of one image.
fn pairs(plan: &Plan, image: &Sample, truth: &Truth) -> Vec<Sample> {
    let row = image.origin.row;
    let construct = &plan.construct;
    let (negatives, positives) = match construct.polarity {
        PolarityPolicy::Both => (construct.negatives_per_image, construct.positives_per_image),
        PolarityPolicy::Alternate if row.is_multiple_of(2) => (construct.negatives_per_image, 0),
        PolarityPolicy::Alternate | PolarityPolicy::PositiveOnly => (0, construct.positives_per_image),
    };
    let only_true = construct.polarity == PolarityPolicy::PositiveOnly;
    let mut out: Vec<Sample> = Vec::with_capacity(negatives + positives);
    for (polarity, count) in [(Polarity::Hallucination, negatives), (Polarity::NonHallucination, positives)] {
        for i in 0..count {
            // A question that this image already has is drawn again, a few times.
            for attempt in 0..8u64 {
                let pair = pair(plan, image, truth, polarity, i, only_true, attempt);
                if !out.iter().any(|p| p.turns[0] == pair.turns[0]) {
                    out.push(pair);
                    break;
                }
            }
        }
    }
    out
}

fn pair(
    plan: &Plan,
    image: &Sample,
    truth: &Truth,
    polarity: Polarity,
    turn: usize,
    only_true: bool,
    attempt: u64,
) -> Sample {
    let row = image.origin.row;
    let (purpose, letter) = match polarity {
        Polarity::Hallucination => ("phantom/negative", 'n'),
        Polarity::NonHallucination => ("phantom/positive", 'p'),
    };
    let rng = &mut stream(plan.seed, purpose, ((row * MAX_PAIRS + turn) as u64) * 8 + attempt);
    let (category, claim) = match polarity {
        Polarity::Hallucination => {
            let category = claims::CATEGORIES[(row / 3 + turn) % claims::CATEGORIES.len()];
            (category, claims::negative(truth, category, rng))
        }
        // Consecutive images start at different tasks.
        Polarity::NonHallucination => claims::positive(truth, row * 3 + turn, only_true, rng),
    };
    let (question, form) = questions::question(truth, &claim, rng);
    let wrong = rng.random::<f64>() < plan.construct.wrong_pair_rate;
    let (answer, how) = if wrong { wrong_pair(truth, &claim, rng) } else { (answers::answer(truth, &claim, rng), "") };
    let mut sample = Sample {
        id: format!("{}-{letter}{turn}", image.id),
        turns: vec![
            Turn { role: Role::User, text: format!("<image>\n{question}") },
            Turn { role: Role::Assistant, text: answer },
        ],
        polarity: Some(polarity),
        category: Some(category.to_string()),
        ..image.clone()
    };
    sample.meta.insert("claim".into(), json!(claim));
    sample.meta.insert("form".into(), json!(form));
    if wrong {
        sample.meta.insert(WRONG_PAIR.into(), Value::from(how));
    }
    sample
}

/// Key in `meta` of pairs that are wrong on purpose: how they are wrong. Quality control must not read it; its recall
/// is measured with it afterwards.
pub const WRONG_PAIR: &str = "wrong_pair";

/// A wrong answer and the way it is wrong.
fn wrong_pair(truth: &Truth, claim: &Claim, rng: &mut rand_chacha::ChaCha8Rng) -> (String, &'static str) {
    match rng.random_range(0..10) {
        0 => {
            let right = answers::answer(truth, claim, rng);
            let opening = ["According to the caption, ", "As mentioned in the text, "][rng.random_range(0..2)];
            (format!("{opening}{}", lower_first(&right)), "leaks_text")
        }
        1 => (["Yes.", "No."][rng.random_range(0..2)].into(), "answer_only"),
        _ => (answers::wrong_answer(truth, claim, rng), "false_statement"),
    }
}

fn lower_first(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |c| c.to_lowercase().chain(chars).collect())
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::{
        datasets::phantom::{
            caption::{annotation, draw_truth},
            check::check,
            truth::Modality,
        },
        judge::Stance,
    };

    fn truths(n: u64) -> impl Iterator<Item = (u64, Truth)> {
        (0..n).map(|i| (i, draw_truth(Modality::DRAWN[i as usize % 3], 0.15, &mut stream(5, "test/truth", i))))
    }

    fn image(row: u64, truth: &Truth) -> Sample {
        let mut meta = serde_json::Map::new();
        meta.insert("truth".into(), json!(truth));
        Sample {
            id: format!("phantom-{row:06}"),
            images: vec![],
            turns: vec![],
            origin: crate::sample::Origin { dataset: "phantom".into(), row: row as usize, ..Default::default() },
            split: Default::default(),
            group: String::new(),
            polarity: None,
            category: None,
            answer_type: None,
            options: Vec::new(),
            annotation: Some(annotation(truth, &mut stream(5, "test/annotation", row))),
            meta,
        }
    }

    #[test]
    fn right_answers_pass_the_check_and_wrong_ones_fail_it() {
        let mut bad = Vec::new();
        for (i, truth) in truths(3000) {
            let rng = &mut stream(5, "test/pair", i);
            for turn in 0..7 {
                for negative in [false, true] {
                    let claim = if negative {
                        claims::negative(&truth, claims::CATEGORIES[turn % 3], rng)
                    } else {
                        claims::positive(&truth, turn, false, rng).1
                    };
                    if negative {
                        assert_eq!(truth.premise_holds(&claim), Some(false), "{claim:?} {truth:?}");
                    }
                    let right = answers::answer(&truth, &claim, rng);
                    let found = check(&truth, &claim, &right);
                    if !found.correct || (negative && found.stance != Stance::Denies) {
                        bad.push(format!("RIGHT {claim:?}\n  {truth:?}\n  {right}\n  {found:?}"));
                    }
                    let wrong = answers::wrong_answer(&truth, &claim, rng);
                    let found = check(&truth, &claim, &wrong);
                    if found.correct {
                        bad.push(format!("WRONG {claim:?}\n  {truth:?}\n  {wrong}\n  {found:?}"));
                    }
                }
            }
        }
        assert!(bad.is_empty(), "{} of 84000\n{}", bad.len(), bad[..bad.len().min(12)].join("\n"));
    }

    #[test]
    fn pairs_are_short_varied_and_reproducible() {
        let mut plan = Plan::default();
        plan.construct.wrong_pair_rate = 0.0;
        let rows: Vec<Sample> =
            truths(300).flat_map(|(i, t)| Phantom.construct(&plan, image(i, &t)).unwrap()).collect();
        let again: Vec<Sample> =
            truths(300).flat_map(|(i, t)| Phantom.construct(&plan, image(i, &t)).unwrap()).collect();
        assert_eq!(rows, again);
        let mut words = BTreeSet::new();
        let (mut longest_question, mut longest_answer) = (0, 0);
        let mut forms: BTreeMap<String, [usize; 2]> = BTreeMap::new();
        for row in &rows {
            let (q, a) = (row.question(), row.answer().to_string());
            longest_question = longest_question.max(q.split_whitespace().count());
            longest_answer = longest_answer.max(a.split_whitespace().count());
            words.extend(format!("{q} {a}").to_lowercase().split(|c: char| !c.is_alphanumeric()).map(str::to_string));
            let negative = usize::from(row.polarity == Some(Polarity::Hallucination));
            forms.entry(row.meta["form"].to_string()).or_default()[negative] += 1;
        }
        assert!(words.len() < 400 && longest_question <= 20 && longest_answer <= 32);
        for (form, counts) in forms {
            assert!(counts.iter().all(|n| *n > 20), "{form} gives the polarity away: {counts:?}");
        }
    }

    #[test]
    fn the_stated_share_is_wrong_and_positive_only_has_true_premises() {
        let mut plan = Plan::default();
        plan.construct.wrong_pair_rate = 0.2;
        let rows: Vec<Sample> =
            truths(400).flat_map(|(i, t)| Phantom.construct(&plan, image(i, &t)).unwrap()).collect();
        let wrong = rows.iter().filter(|r| r.meta.contains_key(WRONG_PAIR)).count() as f64 / rows.len() as f64;
        assert!((wrong - 0.2).abs() < 0.03, "{wrong}");
        plan.construct.polarity = PolarityPolicy::PositiveOnly;
        plan.construct.positives_per_image = 6;
        for (i, truth) in truths(300) {
            for row in Phantom.construct(&plan, image(i, &truth)).unwrap() {
                let claim: Claim = serde_json::from_value(row.meta["claim"].clone()).unwrap();
                assert_ne!(truth.premise_holds(&claim), Some(false), "{claim:?} {truth:?}");
                assert_eq!(row.polarity, Some(Polarity::NonHallucination));
            }
        }
    }

    #[test]
    fn an_annotation_says_the_whole_truth() {
        for (i, truth) in truths(1000) {
            let text = annotation(&truth, &mut stream(6, "test/annotation", i));
            assert_eq!(Truth::from_annotation(&text), Some(truth), "{text}");
        }
    }
}

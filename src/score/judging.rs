//! Asks a recipe's judge about the answers that have no reply yet.

use serde_json::Value;

use super::{pair::Item, read::Part, replies::Replies, requests};
use crate::{
    error::{Error, Kind, Result},
    judge::{AnchorPolicy, Outcome},
    plan::{Plan, Resolved},
    run_dir::RunDir,
    sample::{Polarity, Role, Sample, Turn},
    stage::{
        Ctx,
        eval::{Answer, Which},
        judge::ask_about,
    },
};

/// The plan of a recipe whose judge is asked. Its data need not be there: what is judged are predictions.
///
/// # Errors
/// Everything else that is wrong with the configuration.
pub fn judge_plan(recipe: &str, overrides: &[String]) -> Result<Plan> {
    let without_data = ["data.source=phantom", "data.path=", "data.image_dir="].map(String::from);
    Ok(Resolved::new(recipe, &[&without_data, overrides].concat())?.plan)
}

/// Asks about every item without a reply, part by part because ids of the parts collide, and puts the reply (or why
/// there is none) into the item. Returns the judge's identity.
///
/// # Errors
/// As [`ask_about`]; or one file of sample answers is meant for both parts.
pub(super) fn ask(plan: &Plan, items: &mut [Item], replies: &Replies, dir: &RunDir, ctx: &Ctx) -> Result<Value> {
    let open = requests(items, replies, None);
    let parts = [None, Some(Part::Positive), Some(Part::Negative)];
    let inside = |part| open.iter().copied().filter(|i| items[*i].key.0 == part).collect::<Vec<usize>>();
    let parts: Vec<Vec<usize>> = parts.into_iter().map(inside).filter(|all| !all.is_empty()).collect();
    if parts.len() > 1 && plan.judge.anchor == AnchorPolicy::File {
        return Err(Error::new(Kind::Config, "sample answers of one file cannot be for both parts, whose ids collide")
            .at("judge.anchor_file")
            .help("score one part at a time, with --split"));
    }
    for part in parts {
        let samples: Vec<Sample> = part.iter().map(|i| sample(&items[*i])).collect();
        // Predictions have no model before tuning to be shown beside: they are judged as one would be, alone.
        let answer =
            |i: &usize| Answer { id: items[*i].key.1.clone(), model: Which::Base, answer: items[*i].answer.clone() };
        let answers: Vec<Answer> = part.iter().map(answer).collect();
        for (i, (outcome, reply)) in part.iter().zip(ask_about(plan, &samples, &answers, dir.root(), ctx)?) {
            match (&outcome, reply) {
                (Outcome::Scored { .. } | Outcome::Unparsable { .. }, Some(reply)) => items[*i].result = Some(reply),
                _ => items[*i].unjudged = Some(outcome.name().to_string()),
            }
        }
    }
    Ok(plan.make_judge()?.signature())
}

fn sample(item: &Item) -> Sample {
    Sample {
        id: item.key.1.clone(),
        turns: vec![
            Turn { role: Role::User, text: item.question.clone() },
            Turn { role: Role::Assistant, text: item.reference.clone() },
        ],
        polarity: item.key.0.map(|part| match part {
            Part::Positive => Polarity::NonHallucination,
            Part::Negative => Polarity::Hallucination,
        }),
        annotation: item.caption.clone(),
        ..Sample::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_judge_needs_no_data_of_its_recipe() {
        let plan = judge_plan("medhalltune", &["judge.retries=1".into()]).unwrap();
        assert_eq!((plan.recipe.as_str(), plan.judge.retries, plan.data.path), ("medhalltune", 1, None));
        assert!(judge_plan("medhalltune", &["judge.retrys=1".into()]).is_err());
    }
}

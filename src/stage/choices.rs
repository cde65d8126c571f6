//! Options of multiple-choice questions by their likelihood, for `eval.choice = "likelihood"`: `choices.jsonl`. The
//! replies of the same models are in `answers.jsonl`, so a report has both.

use std::collections::{HashMap, HashSet, hash_map::Entry};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Ctx,
    eval::{Lazy, Which, open_batches},
    judge::orphan,
};
use crate::{
    error::Result,
    metric::choice::prefix,
    plan::Plan,
    run_dir::{JsonlWriter, RunDir},
    sample::Sample,
};

/// How the choice of a model among options is found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ChoiceScoring {
    /// Read from its reply alone.
    #[default]
    Reply,
    /// Also the option that it finds most likely as its answer; one more pass for each option.
    Likelihood,
}

/// A row of `choices.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ChoiceAnswer {
    /// Id of the sample.
    pub id: String,
    /// Whose choice.
    pub model: Which,
    /// Mean cross-entropy of each option's tokens, nats.
    pub losses: Vec<f64>,
    /// The option with the lowest, the first of equals.
    pub chosen: usize,
    /// Whether it is the right one.
    pub correct: bool,
}

/// Name of the file.
pub const CHOICES: &str = "choices.jsonl";

/// Choices so far, in memory and in the file.
pub(super) struct Choices<'a> {
    rows: Vec<&'a Sample>,
    found: HashMap<(Which, String), ChoiceAnswer>,
    out: JsonlWriter,
}

impl<'a> Choices<'a> {
    /// What an interrupted run has; none where nobody asks for likelihoods or no row has options.
    pub(super) fn open(plan: &Plan, dir: &RunDir, rows: &[&'a Sample]) -> Result<Option<Self>> {
        let rows: Vec<&Sample> = rows.iter().copied().filter(|s| s.right_option().is_some()).collect();
        if plan.eval.choice == ChoiceScoring::Reply || rows.is_empty() {
            return Ok(None);
        }
        let (done, out) = dir.continue_jsonl::<ChoiceAnswer>(CHOICES)?;
        let known: HashSet<&str> = rows.iter().map(|s| s.id.as_str()).collect();
        if let Some(stray) = done.iter().find(|c| !known.contains(c.id.as_str())) {
            return Err(orphan("choice", &stray.id, "the test split of kept.jsonl"));
        }
        let found = done.into_iter().map(|c| ((c.model, c.id.clone()), c)).collect();
        Ok(Some(Self { rows, found, out }))
    }

    /// Scores what one model has not scored yet.
    pub(super) fn score(&mut self, plan: &Plan, ctx: &Ctx, which: Which, lazy: &mut Lazy<'_>) -> Result<()> {
        let done = |id: &str| self.found.contains_key(&(which, id.to_string()));
        let batches = open_batches(&self.rows, plan.generate.batch_size, done);
        if batches.is_empty() {
            return Ok(());
        }
        let (model, processor) = lazy.get()?;
        let rows = batches.iter().map(|b| b.len() as u64).sum();
        let mut task = ctx.progress.start(&format!("options, {}", which.name()), rows);
        for batch in batches {
            ctx.check()?;
            let scored = prefix::likelihoods(model, processor.as_ref(), &batch, plan.generate.batch_size, &ctx.device)?;
            for (sample, found) in batch.iter().zip(scored) {
                if let Entry::Vacant(place) = self.found.entry((which, sample.id.clone())) {
                    let chosen = found.choice.chosen.expect("a row with a right option has options");
                    let (losses, correct) = (found.losses, found.choice.correct);
                    let row = ChoiceAnswer { id: sample.id.clone(), model: which, losses, chosen, correct };
                    self.out.push(&row)?;
                    place.insert(row);
                }
            }
            task.advance(batch.len() as u64);
        }
        task.finish();
        Ok(())
    }

    /// Writes all choices, base before tuned, each in the order of the rows; returns how many.
    pub(super) fn finish(mut self, dir: &RunDir) -> Result<usize> {
        let mut all = Vec::with_capacity(2 * self.rows.len());
        for model in [Which::Base, Which::Tuned] {
            for sample in &self.rows {
                let choice = self.found.remove(&(model, sample.id.clone()));
                all.push(choice.ok_or_else(|| orphan("row", &sample.id, CHOICES))?);
            }
        }
        dir.write_jsonl(CHOICES, &all)?;
        Ok(all.len())
    }
}

//! Turns steps into log lines.

use std::{collections::BTreeMap, time::Instant};

use super::{log::LogLine, trainer::StepReport};

/// Sums since the line before.
pub(super) struct Meter {
    steps_per_epoch: usize,
    since: Instant,
    tokens: usize,
    steps: usize,
    loss: f64,
    more: BTreeMap<String, f64>,
}

impl Meter {
    pub(super) fn new(steps_per_epoch: usize) -> Self {
        Self { steps_per_epoch, since: Instant::now(), tokens: 0, steps: 0, loss: 0.0, more: BTreeMap::new() }
    }

    /// Passes over the rows after `step` steps.
    pub(super) fn epoch(&self, step: usize) -> f64 {
        step as f64 / self.steps_per_epoch.max(1) as f64
    }

    /// The line of a step that is logged; losses are means since the line before.
    pub(super) fn line(&mut self, report: &StepReport, step: usize, every: usize, last: bool) -> Option<LogLine> {
        self.tokens += report.tokens;
        self.steps += 1;
        self.loss += report.loss;
        for (name, value) in &report.more {
            *self.more.entry(name.clone()).or_default() += value;
        }
        if !step.is_multiple_of(every) && !last {
            return None;
        }
        let seconds = self.since.elapsed().as_secs_f64().max(1e-9);
        let n = self.steps as f64;
        let line = LogLine {
            step,
            epoch: self.epoch(step),
            loss: Some(self.loss / n),
            grad_norm: Some(report.grad_norm),
            learning_rate: Some(report.learning_rate),
            tokens_per_second: Some((self.tokens as f64 / seconds).round()),
            eval_loss: None,
            skipped_steps: (report.skipped_steps > 0).then_some(report.skipped_steps),
            more: std::mem::take(&mut self.more).into_iter().map(|(name, sum)| (name, sum / n)).collect(),
        };
        *self = Self::new(self.steps_per_epoch);
        Some(line)
    }
}

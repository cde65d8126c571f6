//! What a training says while it runs: `log.jsonl`, TensorBoard event files, an MLflow server.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    error::Result,
    progress::Progress,
    run_dir::{JsonlWriter, RunDir},
};

pub mod hf_state;
pub mod mlflow;
pub mod tensorboard;

use mlflow::{End, Target, Tracker};
use tensorboard::EventWriter;

/// Name of the file.
pub const FILE: &str = "log.jsonl";

/// `[log]` of a recipe. Nothing here changes a result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// Write TensorBoard event files to `tb/`.
    pub tensorboard: bool,
    /// Address of an MLflow server that follows the training, for example `http://127.0.0.1:5000`; the variable
    /// MLFLOW_TRACKING_URI when absent. Without either, nothing is sent. Credentials come from MLFLOW_TRACKING_TOKEN, or
    /// MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.
    pub mlflow: Option<String>,
    /// Experiment on the MLflow server; created if absent.
    pub mlflow_experiment: String,
    /// Name of the run on the MLflow server; that of the run directory when absent.
    pub mlflow_run_name: Option<String>,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { tensorboard: true, mlflow: None, mlflow_experiment: "medtune".into(), mlflow_run_name: None }
    }
}

impl LogConfig {
    /// Everything that is wrong with the values: key and problem.
    #[must_use]
    pub fn problems(&self) -> Vec<(String, String)> {
        let problem = self.mlflow.as_deref().and_then(|uri| match mlflow::address(uri) {
            Err(problem) => Some(problem),
            Ok((_, mlflow::Credentials::None)) => None,
            Ok(_) => Some("must not hold credentials: they come from the environment".into()),
        });
        problem.map(|p| ("log.mlflow".to_string(), p)).into_iter().collect()
    }
}

/// A line: of a training step, or of an evaluation after it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LogLine {
    /// Optimizer steps done, from 1.
    pub step: usize,
    /// Passes over the training rows, fractional.
    pub epoch: f64,
    /// Training loss, the mean since the line before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// Global norm of the gradient before clipping.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grad_norm: Option<f64>,
    /// Learning rate the step was made with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<f64>,
    /// Real tokens, images included, trained on per second since the line before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<f64>,
    /// Loss on the validation rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_loss: Option<f64>,
    /// Steps so far whose update was left out because their loss was a spike; absent without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skipped_steps: Option<usize>,
    /// What else the objective measures, for example `rewards/margins`.
    #[serde(flatten)]
    pub more: BTreeMap<String, f64>,
}

impl LogLine {
    /// The measured values by their names in this file.
    #[must_use]
    pub fn scalars(&self) -> Vec<(String, f64)> {
        let known = [
            ("loss", self.loss),
            ("grad_norm", self.grad_norm),
            ("learning_rate", self.learning_rate),
            ("tokens_per_second", self.tokens_per_second),
            ("eval_loss", self.eval_loss),
            ("skipped_steps", self.skipped_steps.map(|n| n as f64)),
            ("epoch", Some(self.epoch)),
        ];
        let known = known.into_iter().filter_map(|(name, value)| Some((name.to_string(), value?)));
        known.chain(self.more.iter().map(|(name, value)| (name.clone(), *value))).collect()
    }

    /// The measured values under the tags that Hugging Face's trainer uses in TensorBoard.
    fn tags(&self) -> Vec<(String, f64)> {
        let tag = |(name, value): (String, f64)| match name.strip_prefix("eval_") {
            Some(name) => (format!("eval/{name}"), value),
            None => (format!("train/{name}"), value),
        };
        self.scalars().into_iter().map(tag).collect()
    }
}

/// Where lines go besides `log.jsonl`.
#[derive(Debug, Clone, Default)]
pub struct Targets {
    /// TensorBoard event files.
    pub tensorboard: bool,
    /// An MLflow server.
    pub mlflow: Option<Target>,
}

/// The open log of a training.
#[derive(Debug)]
pub struct Log {
    file: JsonlWriter,
    events: Option<EventWriter>,
    tracker: Option<Tracker>,
}

impl Log {
    /// Opens the log to continue after `step`: lines of later steps, which will be done again, are dropped.
    ///
    /// # Errors
    /// A file cannot be read or written.
    pub fn open(dir: &RunDir, step: usize, targets: &Targets, progress: Progress) -> Result<Self> {
        let (mut lines, mut file) = dir.continue_jsonl::<LogLine>(FILE)?;
        if lines.iter().any(|l| l.step > step) {
            drop(file);
            lines.retain(|l| l.step <= step);
            dir.write_jsonl(FILE, &lines)?;
            (lines, file) = dir.continue_jsonl::<LogLine>(FILE)?;
        }
        let events = targets.tensorboard.then(|| EventWriter::create(&dir.path(tensorboard::DIR), step)).transpose()?;
        let tracker = targets.mlflow.clone().map(|t| Tracker::start(t, dir.root(), lines, progress)).transpose()?;
        Ok(Self { file, events, tracker })
    }

    /// Adds a line.
    ///
    /// # Errors
    /// The disk is full.
    pub fn push(&mut self, line: &LogLine) -> Result<()> {
        self.file.push(line)?;
        if let Some(events) = &mut self.events {
            events.scalars(line.step, &line.tags())?;
        }
        if let Some(tracker) = &self.tracker {
            tracker.push(line);
        }
        Ok(())
    }

    /// Waits until everything is on the disk and, for a while, at the server.
    ///
    /// # Errors
    /// The disk failed.
    pub fn finish(self, end: End) -> Result<()> {
        if let Some(tracker) = self.tracker {
            tracker.finish(end);
        }
        self.file.sync()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_that_are_done_again_are_logged_once() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = RunDir::open(temporary.path()).unwrap();
        let line = |step| LogLine { step, loss: Some(1.0), ..LogLine::default() };
        let open = |step| Log::open(&dir, step, &Targets::default(), Progress::Silent).unwrap();
        let mut log = open(0);
        for step in 1..6 {
            log.push(&line(step)).unwrap();
        }
        log.finish(End::Failed).unwrap();
        open(3).push(&line(4)).unwrap();
        let steps: Vec<usize> = dir.read_jsonl::<LogLine>(FILE).unwrap().iter().map(|l| l.step).collect();
        assert_eq!(steps, [1, 2, 3, 4]);
    }

    #[test]
    fn what_an_objective_measures_stands_beside_the_loss() {
        let more = [("rewards/margins".to_string(), 0.5)].into();
        let line = LogLine { step: 2, epoch: 0.25, eval_loss: Some(1.5), more, ..LogLine::default() };
        let text = serde_json::to_string(&line).unwrap();
        assert_eq!(text, r#"{"step":2,"epoch":0.25,"eval_loss":1.5,"rewards/margins":0.5}"#);
        assert_eq!(serde_json::from_str::<LogLine>(&text).unwrap(), line);
        let tags: Vec<String> = line.tags().into_iter().map(|t| t.0).collect();
        assert_eq!(tags, ["eval/loss", "train/epoch", "train/rewards/margins"]);
    }

    #[test]
    fn an_address_with_credentials_is_refused() {
        let problems = |uri: &str| LogConfig { mlflow: Some(uri.into()), ..LogConfig::default() }.problems().len();
        assert_eq!(["http://host:5000", "https://a:b@host", "mlruns", "file:///x"].map(problems), [0, 1, 1, 1]);
    }
}

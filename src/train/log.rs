//! `log.jsonl`: one line per logged step and per evaluation.

use serde::{Deserialize, Serialize};

use crate::{
    error::Result,
    run_dir::{JsonlWriter, RunDir},
};

/// Name of the file.
pub const FILE: &str = "log.jsonl";

/// A line: of a training step, or of an evaluation after it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LogLine {
    /// Optimizer steps done, from 1.
    pub step: usize,
    /// Passes over the training rows, fractional.
    pub epoch: f64,
    /// Training loss of the step.
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
}

/// Opens the log to continue after `step`: lines of later steps, which will be done again, are dropped.
///
/// # Errors
/// The file cannot be read or written.
pub fn open(dir: &RunDir, step: usize) -> Result<JsonlWriter> {
    let (lines, writer) = dir.continue_jsonl::<LogLine>(FILE)?;
    if lines.iter().all(|l| l.step <= step) {
        return Ok(writer);
    }
    drop(writer);
    dir.write_jsonl(FILE, lines.into_iter().filter(|l| l.step <= step))?;
    Ok(dir.continue_jsonl::<LogLine>(FILE)?.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_that_are_done_again_are_logged_once() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = RunDir::open(temporary.path()).unwrap();
        let line = |step| LogLine { step, loss: Some(1.0), ..LogLine::default() };
        let mut log = open(&dir, 0).unwrap();
        for step in 1..6 {
            log.push(&line(step)).unwrap();
        }
        drop(log);
        let mut log = open(&dir, 3).unwrap();
        log.push(&line(4)).unwrap();
        let steps: Vec<usize> = dir.read_jsonl::<LogLine>(FILE).unwrap().iter().map(|l| l.step).collect();
        assert_eq!(steps, [1, 2, 3, 4]);
    }
}

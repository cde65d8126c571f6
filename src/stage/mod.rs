//! The stages of a run. Each reads files, writes files, and returns a summary of what it counted.

use burn::tensor::Device;

use crate::{error::Result, plan::Plan, progress::Progress, run_dir::RunDir};

pub mod build;
pub mod encode;
pub mod eval;
pub mod judge;
pub mod qc;
pub mod report;
pub mod train;

/// What every stage may use besides its plan and directory.
pub struct Ctx {
    /// Where tensors live, without autodiff.
    pub device: Device,
    /// How progress is shown.
    pub progress: Progress,
}

/// What a stage counted, in print order; also written to the manifest.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Summary {
    /// Name and value pairs, for example `rows in` and `960`.
    pub lines: Vec<(String, String)>,
}

impl Summary {
    /// Adds a line.
    pub fn line(&mut self, name: &str, value: impl std::fmt::Display) -> &mut Self {
        self.lines.push((name.to_string(), value.to_string()));
        self
    }
}

/// A stage of a run.
pub struct Stage {
    /// Verb on the command line.
    pub name: &'static str,
    /// What it does, one line.
    pub about: &'static str,
    /// Files of the run directory it reads.
    pub reads: &'static [&'static str],
    /// Files of the run directory it writes.
    pub writes: &'static [&'static str],
    /// Sections of the plan it depends on.
    pub sections: &'static [&'static str],
    /// Does it.
    pub run: fn(&Plan, &RunDir, &Ctx) -> Result<Summary>,
}

/// All stages in order.
pub const STAGES: &[Stage] = &[];

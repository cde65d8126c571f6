//! The stages of a run. Each reads files, writes files, and returns a summary of what it counted.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use burn::tensor::Device;

use crate::{
    device::DeviceSpec,
    error::{Error, Kind, Result},
    plan::Plan,
    progress::Progress,
    run_dir::RunDir,
};

pub mod build;
pub mod choices;
pub mod construct;
pub mod controls;
pub mod encode;
pub mod eval;
pub mod judge;
pub mod qc;
pub mod report;
pub mod train;
pub mod verify;

/// What every stage may use besides its plan and directory.
#[derive(Debug, Clone)]
pub struct Ctx {
    /// Where tensors live, without autodiff.
    pub device: Device,
    /// The device as the user wrote it.
    pub device_spec: DeviceSpec,
    /// How progress is shown.
    pub progress: Progress,
    /// Set when the user interrupts; a stage saves what it has and returns [`Ctx::check`]'s error.
    pub stop: Arc<AtomicBool>,
    /// Ask no language-model server: replies come from the ledger of the run directory or not at all.
    pub offline: bool,
}

impl Ctx {
    /// A context on an opened device.
    ///
    /// # Errors
    /// The device cannot be opened.
    pub fn new(device: DeviceSpec, progress: Progress) -> Result<Self> {
        let device_spec = device.resolve();
        Ok(Self { device: device_spec.open()?, device_spec, progress, stop: Arc::default(), offline: false })
    }

    /// Whether the user has asked to stop.
    #[must_use]
    pub fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Ends a stage that the user interrupted; call it between units of work, after saving.
    ///
    /// # Errors
    /// The user has asked to stop.
    pub fn check(&self) -> Result<()> {
        if self.stopped() {
            return Err(Error::new(Kind::Interrupted, "interrupted").help("run the same command again; it continues"));
        }
        Ok(())
    }
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
///
/// Before a stage starts on other inputs than last time, the files it `writes` and its `scratch` are removed. When they
/// are there at its start, an earlier attempt on the same inputs was interrupted, and the stage continues from them.
#[derive(Debug, Clone, Copy)]
pub struct Stage {
    /// Verb on the command line.
    pub name: &'static str,
    /// What it does, one line.
    pub about: &'static str,
    /// Files and directories of the run directory it reads.
    pub reads: &'static [&'static str],
    /// Files and directories of the run directory it writes; those of an earlier stage it may only amend.
    pub writes: &'static [&'static str],
    /// Prefixes of names that it leaves behind when interrupted.
    pub scratch: &'static [&'static str],
    /// Sections and keys of the plan it depends on, besides the recipe's name and the seed.
    pub sections: &'static [&'static str],
    /// Whether its result depends on the kind of device.
    pub device: bool,
    /// Does it.
    pub run: fn(&Plan, &RunDir, &Ctx) -> Result<Summary>,
}

/// All stages in order.
pub const STAGES: &[Stage] = &[
    Stage {
        name: "build",
        about: "Makes instruction rows from the source, and splits them by image.",
        reads: &[],
        writes: &["samples.jsonl", "unread.jsonl", "images.jsonl", "images"],
        scratch: &[".tmp-samples"],
        sections: &["data", "construct", "llm.generate"],
        device: false,
        run: build::run,
    },
    Stage {
        name: "qc",
        about: "Keeps the rows that pass every rule, and sets the others aside with a reason.",
        reads: &["samples.jsonl", "unread.jsonl", "images.jsonl", "images"],
        writes: &["kept.jsonl", "rejected.jsonl", "qc.json"],
        scratch: &["firewall"],
        sections: &["qc", "data.firewall", "llm.generate", "llm.qc"],
        device: false,
        run: qc::run,
    },
    Stage {
        name: "encode",
        about: "Checks tokens and pixels of every kept row, before a device is touched.",
        reads: &["kept.jsonl", "images"],
        writes: &["encode.json", "base", "kept.jsonl", "rejected.jsonl"],
        scratch: &[],
        sections: &["model", "train.max_length", "qc.max_drop_rate"],
        device: false,
        run: encode::run,
    },
    Stage {
        name: "train",
        about: "Trains the adapter on the kept rows of the train split.",
        reads: &["kept.jsonl", "rejected.jsonl", "images", "base"],
        writes: &["adapter", "model", "log.jsonl", "train.json"],
        scratch: &[
            "checkpoint-",
            "unusable-checkpoint-",
            ".tmp-checkpoint-",
            ".tmp-adapter",
            ".tmp-model",
            "tb",
            "mlflow.json",
            "trainer_state.json",
            "loss.svg",
        ],
        sections: &["model", "adapter", "train"],
        device: true,
        run: train::run,
    },
    Stage {
        name: "eval",
        about: "Answers the held-out questions with the base and the tuned model.",
        reads: &["kept.jsonl", "images", "base", "adapter", "model"],
        writes: &["answers.jsonl", "controls.jsonl", "choices.jsonl"],
        scratch: &[],
        sections: &["model", "generate", "eval"],
        device: true,
        run: eval::run,
    },
    Stage {
        name: "judge",
        about: "Judges every answer beside the truth.",
        reads: &["kept.jsonl", "answers.jsonl"],
        writes: &["verdicts.jsonl", "panel.jsonl", "judge.json"],
        scratch: &[],
        sections: &["judge", "llm.generate", "llm.judge"],
        device: false,
        run: judge::run,
    },
    Stage {
        name: "report",
        about: "Writes numbers with intervals, tables and samples.",
        reads: &[
            "kept.jsonl",
            "rejected.jsonl",
            "qc.json",
            "encode.json",
            "log.jsonl",
            "answers.jsonl",
            "controls.jsonl",
            "choices.jsonl",
            "verdicts.jsonl",
        ],
        writes: &["report.json", "report.html"],
        scratch: &[],
        sections: &["data", "eval", "judge"],
        device: false,
        run: report::run,
    },
];

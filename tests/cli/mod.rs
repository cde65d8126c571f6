//! The program as a user meets it: the real binary, its output, its exit codes.

mod bad_input;
mod bench;
mod checkpoint;
mod config;
mod family;
mod get;
mod help;
mod machine;
mod mock;
mod model;
mod rehearsal;
mod run;
mod unmerge;

use std::{
    path::Path,
    process::{Command, Output},
};

/// What the program said and how it ended.
pub(crate) struct Said {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Said {
    pub(crate) fn of(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Standard output as JSON.
    #[track_caller]
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e} in {}", self.out))
    }

    /// Fails unless the program ended with `code`.
    #[track_caller]
    pub(crate) fn code(self, code: i32) -> Self {
        assert_eq!(self.code, code, "stdout:\n{}\nstderr:\n{}", self.out, self.err);
        self
    }

    /// Fails unless the error (on standard output with `--json`) has every one of `parts`.
    #[track_caller]
    pub(crate) fn blames(self, parts: &[&str]) -> Self {
        let error = if self.err.is_empty() { &self.out } else { &self.err };
        for part in parts {
            assert!(error.contains(part), "no {part:?} in:\n{error}");
        }
        assert!(!self.err.contains("panicked"), "{}", self.err);
        self
    }
}

/// The program in `dir`.
pub(crate) fn command(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_medtune"));
    command.current_dir(dir).args(args).env_remove("RUST_LOG").env_remove("MLFLOW_TRACKING_URI");
    command
}

/// Runs the program in `dir` to its end.
pub(crate) fn medtune(dir: &Path, args: &[&str]) -> Said {
    Said::of(command(dir, args).output().unwrap())
}

//! A whole run: skipped when nothing changed, continued when it was interrupted, and the same bytes either way.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use medtune::run_dir::sha256;

use super::{command, medtune};

/// The phantom recipe at a size that takes seconds.
const SMALL: &[&str] = &[
    "--set",
    "data.images=24",
    "--set",
    "model.checkpoint=",
    "--set",
    "train.max_steps=8",
    "--set",
    "train.save_steps=2",
    "--set",
    "train.logging_steps=1",
    "--set",
    "eval.rows=6",
    "--set",
    "generate.max_new_tokens=6",
];

fn args<'a>(verb: &'a str, out: &'a str) -> Vec<&'a str> {
    [&[verb, "phantom", "--out", out][..], SMALL].concat()
}

fn adapter(dir: &Path, out: &str) -> String {
    sha256(&dir.join(out).join("adapter/adapter_model.safetensors")).unwrap()
}

/// Steps that the log of a run has.
fn logged(log: &Path) -> usize {
    fs::read_to_string(log).map_or(0, |text| text.lines().count())
}

/// A run in the background that has logged at least `steps` steps.
fn started(dir: &Path, out: &str, steps: usize) -> (Child, PathBuf) {
    let log = dir.join(out).join("log.jsonl");
    let mut child = command(dir, &args("train", out)).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let begun = Instant::now();
    while logged(&log) < steps {
        assert!(child.try_wait().unwrap().is_none(), "the run ended before step {steps}");
        assert!(begun.elapsed() < Duration::from_secs(600), "no step {steps} in ten minutes");
        std::thread::sleep(Duration::from_millis(5));
    }
    (child, log)
}

fn signal(child: &Child, name: &str) {
    let id = child.id().to_string();
    assert!(std::process::Command::new("kill").args([name, &id]).status().unwrap().success());
}

#[test]
fn a_run_ends_with_a_table_and_the_next_one_skips_everything() {
    let dir = tempfile::tempdir().unwrap();
    let said = medtune(dir.path(), &args("run", "run")).code(0);
    assert!(said.out.contains("tuned"), "{}", said.out);
    for file in
        ["report.json", "report.html", "plan.toml", "MANIFEST.json", "kept.jsonl", "adapter/adapter_config.json"]
    {
        assert!(dir.path().join("run").join(file).exists(), "no {file}");
    }
    let again = medtune(dir.path(), &args("run", "run")).code(0);
    let skipped = again.err.lines().filter(|l| l.ends_with(": unchanged, skipped")).count();
    assert_eq!(skipped, medtune::stage::STAGES.len(), "{}", again.err);
    assert_eq!(again.out, said.out);

    let mut changed = args("run", "run");
    changed.extend(["--set", "generate.max_new_tokens=7", "--json"]);
    let changed = medtune(dir.path(), &changed).code(0).json();
    let ran: Vec<_> = changed["stages"].as_array().unwrap().iter().filter(|s| s["skipped"] == false).collect();
    assert_eq!(ran[0]["stage"], "eval");

    let plan = medtune(dir.path(), &["plan", "run/plan.toml", "--json"]).code(0).json();
    let steps = plan["settings"].as_array().unwrap().iter().find(|s| s["key"] == "train.max_steps").unwrap();
    assert_eq!(steps["value"], 8, "the written plan is a recipe");
}

#[test]
fn a_killed_training_ends_with_the_bytes_of_an_uninterrupted_one() {
    let dir = tempfile::tempdir().unwrap();
    medtune(dir.path(), &args("train", "whole")).code(0);
    for steps in [1, 3, 6] {
        let (mut child, _) = started(dir.path(), "killed", steps);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!dir.path().join("killed/adapter/adapter_model.safetensors").exists());
    }
    let said = medtune(dir.path(), &args("train", "killed")).code(0);
    assert!(said.err.contains("train: continues"), "{}", said.err);
    assert_eq!(adapter(dir.path(), "killed"), adapter(dir.path(), "whole"));
}

#[test]
fn an_interrupted_training_says_how_to_continue_and_does() {
    let dir = tempfile::tempdir().unwrap();
    let (child, log) = started(dir.path(), "run", 3);
    signal(&child, "-INT");
    let output = child.wait_with_output().unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{err}");
    assert!(err.contains("error: interrupted") && err.contains("help: run the same command again"), "{err}");
    let steps = logged(&log);
    assert!(steps < 8, "interrupted after all {steps} steps");
    medtune(dir.path(), &args("train", "run")).code(0);
    medtune(dir.path(), &args("train", "whole")).code(0);
    assert_eq!(adapter(dir.path(), "run"), adapter(dir.path(), "whole"));
}

#[test]
fn a_disk_that_fills_up_during_training_costs_nothing_but_time() {
    let dir = tempfile::tempdir().unwrap();
    let (mut child, _) = started(dir.path(), "run", 3);
    child.kill().unwrap();
    child.wait().unwrap();
    // A limit on file size stands for a full disk: writes fail part of the way through a checkpoint.
    let program = env!("CARGO_BIN_EXE_medtune");
    let limited = format!("trap '' XFSZ; ulimit -f 64; exec '{program}' \"$@\"");
    let shell = [&["-c", &limited, "medtune"][..], &args("train", "run")].concat();
    let output = std::process::Command::new("sh").current_dir(dir.path()).args(shell).output().unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{err}");
    assert!(err.contains("error: ") && err.contains("help: ") && !err.contains("panicked"), "{err}");
    medtune(dir.path(), &args("train", "run")).code(0);
    medtune(dir.path(), &args("train", "whole")).code(0);
    assert_eq!(adapter(dir.path(), "run"), adapter(dir.path(), "whole"));
}

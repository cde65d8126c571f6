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
    started_with(dir, out, steps, &[])
}

/// As [`started`], with more arguments.
fn started_with(dir: &Path, out: &str, steps: usize, more: &[&str]) -> (Child, PathBuf) {
    let log = dir.join(out).join("log.jsonl");
    let mut child = command(dir, &[&args("train", out)[..], more].concat())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
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
fn an_interrupted_or_terminated_training_is_saved_and_continues() {
    let dir = tempfile::tempdir().unwrap();
    medtune(dir.path(), &args("train", "whole")).code(0);
    for name in ["-INT", "-TERM"] {
        let out = format!("run{name}");
        // No checkpoint is due before the end: what is there, the signal left.
        let rare = ["--set", "train.save_steps=0"];
        let (child, log) = started_with(dir.path(), &out, 3, &rare);
        signal(&child, name);
        let output = child.wait_with_output().unwrap();
        let err = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(0), "{err}");
        let steps = logged(&log);
        assert!(steps < 8, "interrupted after all {steps} steps");
        assert!(dir.path().join(&out).join(format!("checkpoint-{steps}/MANIFEST.json")).exists(), "{err}");
        let said = format!("interrupted after step {steps} of 8, kept in checkpoint-{steps}");
        assert!(
            err.contains(&said) && err.contains("help: run the same command again") && !err.contains("error:"),
            "{err}"
        );
        // How often is saved decides nothing, so it may change on the way.
        let again = medtune(dir.path(), &args("train", &out)).code(0);
        assert!(again.err.contains(&format!("continuing from checkpoint-{steps}")), "{}", again.err);
        assert_eq!(adapter(dir.path(), &out), adapter(dir.path(), "whole"));
    }
}

#[test]
fn a_killed_training_with_packing_accumulation_and_threads_ends_with_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let hard = [
        "--set",
        "train.packing=true",
        "--set",
        "train.packing_length=400",
        "--set",
        "train.per_device_train_batch_size=2",
        "--set",
        "train.gradient_accumulation_steps=2",
        "--set",
        "train.dataloader_num_workers=3",
        "--set",
        "adapter.lora_dropout=0.1",
    ];
    medtune(dir.path(), &[&args("train", "whole")[..], &hard].concat()).code(0);
    for steps in [1, 4] {
        let (mut child, _) = started_with(dir.path(), "killed", steps, &hard);
        child.kill().unwrap();
        child.wait().unwrap();
    }
    // The newest checkpoint was on a disk that failed.
    let newest = (1..=8).rev().map(|s| dir.path().join(format!("killed/checkpoint-{s}"))).find(|p| p.exists()).unwrap();
    fs::write(newest.join("trained.safetensors"), "half").unwrap();
    let said = medtune(dir.path(), &[&args("train", "killed")[..], &hard].concat()).code(0);
    let name = newest.file_name().unwrap().to_str().unwrap();
    assert!(said.err.contains("damaged") && said.err.contains(name), "{}", said.err);
    assert!(said.err.contains("falls back to checkpoint-") || said.err.contains("starts from the beginning"));
    assert_eq!(adapter(dir.path(), "killed"), adapter(dir.path(), "whole"));
    for file in ["loss.svg", "trainer_state.json", "tb"] {
        assert!(dir.path().join("whole").join(file).exists(), "no {file}");
    }
}

#[cfg(unix)]
#[test]
fn a_directory_that_becomes_read_only_during_training_keeps_the_last_checkpoint() {
    use std::os::unix::{
        fs::{PermissionsExt, chown},
        process::CommandExt,
    };

    const NOBODY: u32 = 65534;
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    fs::create_dir(&out).unwrap();
    // Permissions do not bind root, so that its tests run the program as nobody.
    let root = chown(dir.path(), Some(NOBODY), None).and_then(|()| chown(&out, Some(NOBODY), None)).is_ok();
    let mut command = command(dir.path(), &args("train", "run"));
    if root {
        command.uid(NOBODY).env("HOME", dir.path());
    }
    let mut child = match command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn() {
        Ok(child) => child,
        Err(e) => return assert!(root, "only nobody may be unable to start the program: {e}"),
    };
    let begun = Instant::now();
    while logged(&out.join("log.jsonl")) < 3 {
        assert!(child.try_wait().unwrap().is_none(), "the run ended early");
        assert!(begun.elapsed() < Duration::from_secs(600), "no step 3 in ten minutes");
        std::thread::sleep(Duration::from_millis(5));
    }
    fs::set_permissions(&out, fs::Permissions::from_mode(0o555)).unwrap();
    let output = child.wait_with_output().unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    fs::set_permissions(&out, fs::Permissions::from_mode(0o755)).unwrap();
    assert_eq!(output.status.code(), Some(2), "{err}");
    assert!(err.contains("error: cannot write a checkpoint") && err.contains("it continues from checkpoint-"), "{err}");
    medtune(dir.path(), &args("train", "run")).code(0);
    medtune(dir.path(), &args("train", "whole")).code(0);
    assert_eq!(adapter(dir.path(), "run"), adapter(dir.path(), "whole"));
}

#[test]
fn preferences_are_trained_end_to_end() {
    let dir = tempfile::tempdir().unwrap();
    let more =
        ["--set", "train.objective=dpo", "--set", "construct.wrong_pair_rate=0.3", "--set", "qc.max_drop_rate=0.6"];
    let common = [&args("run", "run")[..], &more].concat();
    let said = medtune(dir.path(), &common).code(0);
    assert!(said.out.contains("tuned"), "{}", said.out);
    let lines: Vec<serde_json::Value> = fs::read_to_string(dir.path().join("run/log.jsonl"))
        .unwrap()
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    let first = &lines[0];
    assert!((first["loss"].as_f64().unwrap() - std::f64::consts::LN_2).abs() < 1e-3, "{first}");
    assert!(lines.iter().any(|l| l["rewards/margins"].as_f64().is_some_and(|m| m > 0.0)), "{lines:?}");
    let train: serde_json::Value =
        serde_json::from_slice(&fs::read(dir.path().join("run/train.json")).unwrap()).unwrap();
    let pairs = train["rows_trained"].as_u64().unwrap();
    assert!(pairs > 0 && pairs < 100, "{train}");
    // The same pairs from a file are the same training.
    medtune(dir.path(), &["data", "export", "run", "pairs", "--format", "dpo"]).code(0);
    let file = dir.path().join("pairs/dpo.jsonl");
    let named = format!("train.preference_data={}", file.display());
    medtune(dir.path(), &[&args("train", "named")[..], &more, &["--set", &named]].concat()).code(0);
    assert_eq!(adapter(dir.path(), "named"), adapter(dir.path(), "run"));
}

#[test]
fn a_run_is_reproduced_and_a_difference_is_named() {
    let dir = tempfile::tempdir().unwrap();
    medtune(dir.path(), &args("run", "first")).code(0);
    let said = medtune(dir.path(), &["repro", "first"]).code(0);
    assert!(said.out.contains("all ") && !said.out.contains("DIFFERS"), "{}", said.out);
    assert!(dir.path().join("first_repro/report.json").exists());
    let weights = dir.path().join("first/adapter/adapter_model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&weights, bytes).unwrap();
    let said = medtune(dir.path(), &["repro", "first", "--json"]).code(1);
    assert!(said.out.contains("\"differing\": 1"), "{}", said.out);
    assert!(said.out.contains("1 differences, first adapter of train"), "{}", said.out);
    medtune(dir.path(), &["repro", "nowhere"]).code(2).blames(&["this is no run directory"]);
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

//! Every verb explains itself.

use clap::CommandFactory;
use medtune::{cli::Cli, stage::STAGES};

use super::medtune;

fn verbs(command: &clap::Command, path: &[String], all: &mut Vec<Vec<String>>) {
    for sub in command.get_subcommands() {
        let mut path = path.to_vec();
        path.push(sub.get_name().to_string());
        verbs(sub, &path, all);
        all.push(path);
    }
}

#[test]
fn every_verb_has_help_that_reads_well() {
    let dir = tempfile::tempdir().unwrap();
    let mut all = Vec::new();
    verbs(&Cli::command(), &[], &mut all);
    assert!(all.len() >= 23, "{all:?}");
    for path in all {
        let mut args: Vec<&str> = path.iter().map(String::as_str).collect();
        args.push("--help");
        let said = medtune(dir.path(), &args).code(0);
        let first = said.out.lines().next().unwrap();
        assert!(first.len() > 15 && !first.ends_with('.'), "{path:?}: {first}");
        assert!(said.out.contains(&format!("Usage: medtune {}", path.join(" "))), "{path:?}: {}", said.out);
        assert!(said.out.contains("--json"), "{path:?}");
        for line in said.out.lines() {
            assert!(line.chars().count() <= 100, "{path:?} has a line of {}: {line}", line.chars().count());
        }
    }
}

#[test]
fn without_a_verb_the_help_is_shown() {
    let dir = tempfile::tempdir().unwrap();
    let said = medtune(dir.path(), &[]).code(2);
    assert!(said.err.contains("medtune run phantom"), "{}", said.err);
}

#[test]
fn every_stage_is_a_verb() {
    let verbs: Vec<String> = Cli::command().get_subcommands().map(|c| c.get_name().to_string()).collect();
    for stage in STAGES {
        assert!(verbs.contains(&stage.name.to_string()), "{} in {verbs:?}", stage.name);
    }
}

#[test]
fn a_command_line_that_is_not_understood_ends_with_two() {
    let dir = tempfile::tempdir().unwrap();
    medtune(dir.path(), &["rum", "phantom"]).code(2).blames(&["'run'"]);
    medtune(dir.path(), &["devices", "--device", "tpu"]).code(2).blames(&["tpu", "cuda[:i]"]);
}

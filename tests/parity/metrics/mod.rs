//! Metrics against the tools that define them: nltk, rouge_score, bert_score, difflib, and the evaluation scripts of
//! LLaVA-Med, MedEvalKit, OmniMedVQA and PMC-VQA.
//!
//! A file belongs to the kind of case whose name its own begins with; one that belongs to none is a failure.

use std::path::PathBuf;

use serde_json::Value;

use super::fixture::{Checks, json, root};

mod bertscore;
mod choice;
mod text;
mod vqa;

/// Kinds of case files tested here.
const KINDS: &[&str] = &[
    "bertscore",
    "bleu",
    "closed_medevalkit",
    "difflib_ratio",
    "evalpy_aggregate",
    "mcq_medevalkit",
    "mcq_omnimedvqa",
    "mcq_pmcvqa",
    "meteor",
    "porter",
    "rouge",
    "vqa_llavamed",
    "vqa_llavamed_aggregate",
    "wordnet_synonyms",
];

/// Kinds tested with the judge and the score verb.
const ELSEWHERE: &[&str] = &["evalpy_resume", "judge_messages", "judge_parse"];

/// The kind of a file: the longest that its name begins with.
fn kind_of(name: &str) -> Option<&'static str> {
    let fits = |kind: &&&str| name.strip_prefix(**kind).is_some_and(|rest| rest.starts_with(['.', '_']));
    KINDS.iter().chain(ELSEWHERE).filter(fits).max_by_key(|kind| kind.len()).copied()
}

fn all_files() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(root("metrics")).unwrap().map(|e| e.unwrap().path());
    let mut files: Vec<PathBuf> = entries.filter(|p| p.is_file()).collect();
    files.sort();
    files
}

fn name(path: &std::path::Path) -> &str {
    path.file_name().unwrap().to_str().unwrap()
}

/// Files of one kind, of which there must be one.
fn files(kind: &str) -> Vec<PathBuf> {
    assert!(KINDS.contains(&kind), "{kind} is in no list");
    let found: Vec<PathBuf> = all_files().into_iter().filter(|p| kind_of(name(p)) == Some(kind)).collect();
    assert!(!found.is_empty(), "no {kind} file in {}", root("metrics").display());
    found
}

/// Runs `check` on every case of every JSON-lines file of a kind.
fn each_case(kind: &str, mut check: impl FnMut(&mut Checks, &Value)) {
    for path in files(kind) {
        let mut checks = Checks::of_file("metrics", name(&path));
        let text = std::fs::read_to_string(&path).unwrap();
        for line in text.lines().filter(|l| !l.trim().is_empty()) {
            check(&mut checks, &serde_json::from_str(line).unwrap());
        }
        checks.finish();
    }
}

/// Runs `check` on every JSON file of a kind.
fn each_file(kind: &str, mut check: impl FnMut(&mut Checks, &Value)) {
    for path in files(kind) {
        let mut checks = Checks::of_file("metrics", name(&path));
        check(&mut checks, &json(&path));
        checks.finish();
    }
}

fn string<'a>(case: &'a Value, key: &str) -> &'a str {
    case[key].as_str().unwrap_or_else(|| panic!("{key} of {case}"))
}

fn number(case: &Value, key: &str) -> f64 {
    case[key].as_f64().unwrap_or_else(|| panic!("{key} of {case}"))
}

fn strings(case: &Value, key: &str) -> Vec<String> {
    let items = case[key].as_array().unwrap_or_else(|| panic!("{key} of {case}"));
    items.iter().map(|v| v.as_str().unwrap().to_string()).collect()
}

/// No case file goes untested.
#[test]
fn every_file_has_a_test() {
    let unknown: Vec<String> =
        all_files().iter().filter(|p| kind_of(name(p)).is_none()).map(|p| name(p).to_string()).collect();
    assert!(unknown.is_empty(), "no test reads {unknown:?}");
}

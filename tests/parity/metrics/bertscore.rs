//! BERTScore on real checkpoints in Hugging Face layout, and the averages that MedHallTune's `eval.py` prints.
//!
//! `bertscore_<name>.jsonl` has the pairs, `bertscore_<name>_debug.json` names the model and has tokens and states. The
//! model lies in `models/`, as do others whose names begin with its name; the sentence encoder all-MiniLM-L6-v2 is not
//! among the fixtures:
//!
//! `MEDTUNE_MINILM=DIR cargo test --release --test main -- metrics::bertscore --nocapture`
//!
//! where DIR is a copy of <https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2>.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use medtune::metric::{
    bertscore::{BertScore, Match},
    text::{Pair, TEXT_METRICS, TextMetric, TextMetricOptions},
};
use serde_json::Value;

use super::{Checks, each_file, files, json, name, number, root, string};

/// For fixtures made of tiny models, and of a real one.
const TOLERANCE: f64 = 2e-5;
const TOLERANCE_REAL: f64 = 1e-4;

fn load(dir: &Path, layer: usize, idf: bool, batch_size: usize) -> BertScore {
    let options = TextMetricOptions {
        bertscore_model: Some(dir.to_str().unwrap().into()),
        bertscore_layer: Some(layer),
        bertscore_idf: idf,
        bertscore_batch_size: batch_size,
        ..TextMetricOptions::new(Device::flex())
    };
    BertScore::load(&options).unwrap()
}

/// Directories of the model that made a file of cases.
fn models(stem: &str, debug: &Value) -> Vec<PathBuf> {
    let dir = root("metrics").join("models");
    let wanted = string(debug, "model");
    let mut found: Vec<PathBuf> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    found.retain(|p| name(p).strip_prefix(wanted).is_some_and(|rest| rest.is_empty() || rest.starts_with('_')));
    found.sort();
    if found.is_empty() && stem.contains("minilm") {
        found.extend(std::env::var_os("MEDTUNE_MINILM").map(PathBuf::from));
    }
    found
}

/// `layer3` to 3, with or without rarity weights.
fn setting(key: &str) -> Option<(usize, bool)> {
    let (idf, layer) = key.strip_prefix("idf_").map_or((false, key), |rest| (true, rest));
    layer.strip_prefix("layer")?.parse().ok().map(|n| (n, idf))
}

fn parts(found: &Match) -> [(&'static str, f64); 3] {
    [("p", found.precision), ("r", found.recall), ("f1", found.f1)]
}

fn check_cases(checks: &mut Checks, dir: &Path, cases: &[Value], tolerance: f64) {
    let pairs: Vec<Pair<'_>> =
        cases.iter().map(|c| Pair { answer: string(c, "candidate"), reference: string(c, "reference") }).collect();
    let settings = cases[0].as_object().unwrap().keys().filter_map(|key| Some((key, setting(key)?)));
    for (key, (layer, idf)) in settings {
        let scorer = load(dir, layer, idf, 64);
        for ((case, pair), found) in cases.iter().zip(&pairs).zip(scorer.matches(&pairs).unwrap()) {
            let id = string(case, "id");
            for (part, value) in parts(&found) {
                checks.near(&format!("{id} {key} {part}"), value, number(&case[key], part), tolerance);
            }
            for (side, text) in [("cand", pair.answer), ("ref", pair.reference)] {
                let ids = scorer.token_ids(text).unwrap();
                checks.equal(&format!("{id} n_{side}"), Some(ids.len() as u64), case[format!("n_{side}")].as_u64());
                if let Some(expected) = case.get(format!("{side}_ids")) {
                    checks.equal(&format!("{id} {side}_ids"), &serde_json::json!(ids), expected);
                }
            }
        }
    }
}

fn check_debug(checks: &mut Checks, dir: &Path, debug: &Value) {
    for case in debug["debug"].as_array().unwrap() {
        let scorer = load(dir, number(case, "layer") as usize, false, 1);
        let ids = scorer.token_ids(string(case, "text")).unwrap();
        checks.equal("ids", &serde_json::json!(ids), &case["ids"]);
        let states = scorer.states(&[&ids]).unwrap().remove(0);
        let rows: Vec<&[f32]> = states.chunks(states.len() / ids.len()).collect();
        // printed with six digits
        for (row, expected) in rows.iter().zip(case["hidden_first8"].as_array().unwrap()) {
            for (found, expected) in row.iter().zip(expected.as_array().unwrap()) {
                checks.near("state", f64::from(*found), expected.as_f64().unwrap(), 1e-4);
            }
        }
        for (row, expected) in rows.iter().zip(case["norms"].as_array().unwrap()) {
            let norm = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
            checks.near("norm", norm, expected.as_f64().unwrap(), 1e-4);
        }
    }
}

#[test]
fn cases() {
    let all = files("bertscore");
    for path in all.iter().filter(|p| name(p).ends_with(".jsonl")) {
        let stem = name(path).trim_end_matches(".jsonl");
        let debug_path = path.with_file_name(format!("{stem}_debug.json"));
        let debug = json(&debug_path);
        let text = std::fs::read_to_string(path).unwrap();
        let cases: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        let models = models(stem, &debug);
        if models.is_empty() {
            println!("metrics {}: not run, the model is not here (MEDTUNE_MINILM=DIR)", name(path));
            continue;
        }
        let tolerance = if stem.contains("minilm") { TOLERANCE_REAL } else { TOLERANCE };
        let (mut checks, mut states) =
            (Checks::of_file("metrics", name(path)), Checks::of_file("metrics", name(&debug_path)));
        for dir in models {
            check_cases(&mut checks, &dir, &cases, tolerance);
            check_debug(&mut states, &dir, &debug);
        }
        checks.finish();
        states.finish();
    }
}

/// No score depends on which others are computed with it.
#[test]
fn batches_do_not_matter() {
    let dir = root("metrics").join("models/tiny_roberta");
    let text = std::fs::read_to_string(root("metrics").join("bertscore_tiny.jsonl")).unwrap();
    let cases: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let pairs: Vec<Pair<'_>> =
        cases.iter().map(|c| Pair { answer: string(c, "candidate"), reference: string(c, "reference") }).collect();
    let run = |size| load(&dir, 3, false, size).score_pairs(&pairs).unwrap();
    let alone = run(1);
    for size in [2, 7, 64, 1000] {
        for (a, b) in alone.iter().zip(run(size)) {
            assert!((a - b).abs() <= 1e-6, "{a} alone, {b} in batches of {size}");
        }
    }
    let mut reversed = pairs.clone();
    reversed.reverse();
    let mut backwards = load(&dir, 3, false, 7).score_pairs(&reversed).unwrap();
    backwards.reverse();
    assert!(alone.iter().zip(backwards).all(|(a, b)| (a - b).abs() <= 1e-6));
}

/// The metric part of what `eval.py` prints; its BERTScore is of `tiny_roberta`, layer 3.
#[test]
fn evalpy() {
    let options = TextMetricOptions {
        bertscore_model: Some(root("metrics").join("models/tiny_roberta").to_str().unwrap().into()),
        bertscore_layer: Some(3),
        ..TextMetricOptions::new(Device::flex())
    };
    each_file("evalpy_aggregate", |checks, run| {
        let run = &run["aggregate"];
        let samples = run["samples"].as_array().unwrap();
        let pair = |s| Pair { answer: string(s, "answer"), reference: string(s, "gpt4_answer") };
        let pairs: Vec<Pair<'_>> = samples.iter().map(pair).collect();
        for metric in TEXT_METRICS {
            let names = [metric.key.to_string(), format!("{}_score", metric.key)];
            let Some(expected) = names.iter().find_map(|n| run["expected"][n].as_f64()) else { continue };
            let values = (metric.open)(&options).unwrap().score_pairs(&pairs).unwrap();
            let mean = values.iter().sum::<f64>() / values.len() as f64;
            let tolerance = if metric.key == "bertscore" { TOLERANCE } else { 1e-9 };
            checks.near(metric.key, mean, expected, tolerance);
        }
    });
}

//! A tiny model on real questions about real images, when a copy is named: `MEDTUNE_VQA_RAD=DIR` (the folder with
//! `VQA_RAD Dataset Public.json`), `MEDTUNE_SLAKE=DIR` (the folder with `train.json` and `imgs`). The numbers of the
//! report are computed a second time from `answers.jsonl`, `controls.jsonl` and the data set's own file, which is read
//! here without the program's reader, split or scorers. `MEDTUNE_VQA_STEPS` (20) is how long the model is tuned.

use std::{collections::HashMap, fs, path::Path};

use serde_json::Value;

use crate::cli::medtune;

#[test]
fn vqa_rad_numbers_agree_with_a_second_computation() {
    check("MEDTUNE_VQA_RAD", "vqa_rad");
}

#[test]
fn slake_numbers_agree_with_a_second_computation() {
    check("MEDTUNE_SLAKE", "slake");
}

fn check(variable: &str, source: &str) {
    let Some(data) = std::env::var_os(variable) else {
        println!("{variable} is not set: nothing checked");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let set = |key: &str, value: &str| format!("--set={key}={value}");
    let steps = std::env::var("MEDTUNE_VQA_STEPS").unwrap_or_else(|_| "20".into());
    let args = [
        "run".into(),
        "vqa".into(),
        "--out".into(),
        "out".into(),
        set("data.source", source),
        set("data.path", &format!("\"{}\"", Path::new(&data).display())),
        set("data.test_fraction", "0.1"),
        // Half of SLAKE is in Chinese, which the recipe leaves out.
        set("qc.max_drop_rate", "0.6"),
        set("train.max_steps", &steps),
        set("train.warmup_steps", "2"),
        set("train.eval_steps", "0"),
        set("generate.max_new_tokens", "12"),
        set("eval.rows", "120"),
        set("eval.controls", "[\"blind\", \"swapped\"]"),
    ];
    medtune(dir.path(), &args.iter().map(String::as_str).collect::<Vec<_>>()).code(0);
    let out = dir.path().join("out");
    let report: Value = serde_json::from_slice(&fs::read(out.join("report.json")).unwrap()).unwrap();
    let truth = truth(&out);
    for model in ["base", "tuned"] {
        let said: HashMap<String, String> = rows(&out.join("answers.jsonl"))
            .into_iter()
            .filter(|a| a["model"] == model)
            .map(|a| (text(&a["id"]), text(&a["answer"])))
            .collect();
        let of = |kind: &str, score: &dyn Fn(&[String], &[String]) -> f64| -> (usize, f64) {
            let values: Vec<f64> = said
                .iter()
                .filter(|(id, _)| truth[*id].1 == kind)
                .map(|(id, answer)| score(&words(answer), &words(&truth[id].0)))
                .collect();
            (values.len(), values.iter().sum::<f64>() / values.len() as f64)
        };
        for (key, kind, score) in [
            ("closed_accuracy", "CLOSED", &closed as &dyn Fn(&[String], &[String]) -> f64),
            ("open_recall", "OPEN", &recall),
        ] {
            let (n, value) = of(kind, score);
            let row = report["metrics"].as_array().unwrap().iter().find(|m| m["key"] == key).unwrap();
            assert_eq!(row[model]["n"].as_u64().unwrap() as usize, n, "{key} {model}");
            let found = row[model]["value"].as_f64().unwrap();
            assert!((found - value).abs() < 1e-9, "{key} {model}: {found} against {value}");
        }
        let right = |id: &str, answer: &str| {
            let (reference, kind) = &truth[id];
            let score = if kind == "CLOSED" { closed } else { recall };
            score(&words(answer), &words(reference)) >= 1.0
        };
        let with = said.iter().filter(|(id, answer)| right(id, answer)).count();
        println!("{source} {model}: {} answers agree, {with} are right", said.len());
        for control in ["blind", "swapped"] {
            let asked: Vec<(String, String)> = rows(&out.join("controls.jsonl"))
                .into_iter()
                .filter(|a| a["model"] == model && a["control"] == control)
                .map(|a| (text(&a["id"]), text(&a["answer"])))
                .collect();
            assert_eq!(asked.len(), said.len());
            let share = |n: usize| n as f64 / asked.len() as f64;
            let changed = asked.iter().filter(|(id, answer)| words(answer) != words(&said[id])).count();
            let without = asked.iter().filter(|(id, answer)| right(id, answer)).count();
            let mut all = report["controls"].as_array().unwrap().iter();
            let row = all.find(|c| c["model"] == model && c["control"] == control).unwrap();
            let expected = [share(changed), share(without), share(with) - share(without)];
            for (part, expected) in ["changed", "right", "gain"].iter().zip(expected) {
                let found = row[part]["value"].as_f64().unwrap();
                assert!((found - expected).abs() < 1e-9, "{model} {control} {part}: {found} against {expected}");
            }
            println!("  {control}: {changed} answers change, {without} are right");
        }
    }
}

fn rows(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

/// Text, or a number as text; real answers are both.
fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_string)
}

/// Answer and kind of question of every row by id, from the data set's own file.
fn truth(out: &Path) -> HashMap<String, (String, String)> {
    let mut files: HashMap<String, Value> = HashMap::new();
    rows(&out.join("kept.jsonl"))
        .into_iter()
        .map(|row| {
            let file = text(&row["origin"]["file"]);
            let all =
                files.entry(file.clone()).or_insert_with(|| serde_json::from_slice(&fs::read(&file).unwrap()).unwrap());
            let record = &all[row["origin"]["row"].as_u64().unwrap() as usize];
            (text(&row["id"]), (text(&record["answer"]), text(&record["answer_type"]).trim().to_uppercase()))
        })
        .collect()
}

/// Words as LLaVA-Med's scorer sees them, without its table of contractions, which these answers do not need.
fn words(text: &str) -> Vec<String> {
    let mut text = text.to_lowercase();
    let original = text.clone();
    let digits: Vec<char> = original.chars().collect();
    let thousands = digits.windows(3).any(|w| w[0].is_numeric() && w[1] == ',' && w[2].is_numeric());
    for mark in ";/[]\"{}()=+\\_-><@`,?!".chars() {
        let beside = original.contains(&format!("{mark} ")) || original.contains(&format!(" {mark}"));
        text = text.replace(mark, if beside || thousands { "" } else { " " });
    }
    let letters: Vec<char> = text.chars().collect();
    let stop = |i: &usize| letters[*i] == '.' && !letters.get(i + 1).is_some_and(|c| c.is_numeric());
    let text: String = (0..letters.len()).filter(|i| !stop(i)).map(|i| letters[i]).collect();
    let number = |w: &str| {
        let all = ["none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"];
        all.iter().position(|n| *n == w).or((w == "zero").then_some(0)).map_or_else(|| w.to_string(), |n| n.to_string())
    };
    text.split_whitespace().map(number).filter(|w| !["a", "an", "the"].contains(&w.as_str())).collect()
}

fn closed(answer: &[String], reference: &[String]) -> f64 {
    let yes_no = |w: &&String| ["yes", "no"].contains(&w.as_str());
    let right = if reference.len() == 1 && yes_no(&&reference[0]) {
        answer.iter().any(|w| *w == reference[0]) && answer.iter().filter(yes_no).all(|w| *w == reference[0])
    } else {
        !reference.is_empty() && reference.iter().all(|w| answer.contains(w))
    };
    f64::from(u8::from(right))
}

fn recall(answer: &[String], reference: &[String]) -> f64 {
    let mut left = answer.to_vec();
    let hits = reference.iter().filter(|w| {
        let at = left.iter().position(|l| l == *w);
        at.map(|i| left.remove(i)).is_some()
    });
    let hits = hits.count();
    if reference.is_empty() { 0.0 } else { hits as f64 / reference.len() as f64 }
}

//! From captions to a judged report through the rehearsal server, and what can be asked of such a run afterwards.

use std::{collections::BTreeSet, path::Path};

use serde_json::Value;

use super::{Said, command, medtune};

/// The rehearsal at a size that takes seconds.
const SMALL: &[&str] = &[
    "--set",
    "data.images=20",
    "--set",
    "data.test_fraction=0.3",
    "--set",
    "model.checkpoint=",
    "--set",
    "train.max_steps=2",
    "--set",
    "eval.rows=12",
    "--set",
    "generate.max_new_tokens=6",
    "--set",
    "judge.probes=6",
];

fn args<'a>(verb: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&[verb, "rehearsal", "--out", "run"][..], SMALL, more].concat()
}

fn rows(dir: &Path, name: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(dir.join("run").join(name)).unwrap();
    text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

/// Runs the program with a key in its environment.
fn with_key(dir: &Path, args: &[&str], key: &str) -> Said {
    Said::of(command(dir, args).env("OPENAI_API_KEY", key).output().unwrap())
}

#[test]
fn a_rehearsal_goes_from_captions_to_a_judged_report() {
    let dir = tempfile::tempdir().unwrap();
    let key = "sk-planted-key-0123456789";
    let dry = with_key(dir.path(), &args("build", &["--dry-run"]), key).code(0);
    assert!(dry.out.contains("=== ANNOTATION ") && dry.out.contains("40"), "{}", dry.out);
    assert!(!dir.path().join("run/samples.jsonl").exists(), "a dry run makes nothing");
    let said = with_key(dir.path(), &args("run", &[]), key).code(0);
    assert!(said.out.contains("Clinical accuracy"), "{}", said.out);

    // Every row ends once, and every pair says what it was made with.
    let (samples, unread) = (rows(dir.path(), "samples.jsonl"), rows(dir.path(), "unread.jsonl"));
    let (kept, rejected) = (rows(dir.path(), "kept.jsonl"), rows(dir.path(), "rejected.jsonl"));
    assert_eq!(samples.len() + unread.len(), kept.len() + rejected.len());
    let ids: BTreeSet<&str> = kept
        .iter()
        .map(|r| r["id"].as_str().unwrap())
        .chain(rejected.iter().map(|r| r["sample"]["id"].as_str().unwrap()))
        .collect();
    assert_eq!(ids.len(), kept.len() + rejected.len());
    assert!(kept.iter().all(|r| r["meta"]["construct"]["request"].as_str().is_some_and(|k| k.len() == 64)));
    assert!(kept.iter().all(|r| r["meta"]["qc"]["judgement"].is_string()));
    let codes: BTreeSet<&str> = rejected.iter().map(|r| r["code"].as_str().unwrap()).collect();
    assert!(codes.contains("qc_contradicted"), "{codes:?}");

    // The judge is known as an instrument, and judged the base first.
    let judge: Value = serde_json::from_slice(&std::fs::read(dir.path().join("run/judge.json")).unwrap()).unwrap();
    assert_eq!(judge["signature"]["kind"], "llm");
    assert_eq!(judge["controls"]["items"].as_array().unwrap().len(), 8);
    assert!(judge["panel"]["rehearsal-2"]["accuracy"]["n"].as_u64().unwrap() > 0, "{judge}");
    assert!(judge["order"]["risk"]["n"].as_u64().is_some() && judge["verbosity"]["risk"]["n"].as_u64().is_some());
    let verdicts = rows(dir.path(), "verdicts.jsonl");
    assert_eq!(verdicts.len(), rows(dir.path(), "answers.jsonl").len());

    // Judging again from the ledger asks nothing and says the same; without replies nothing becomes a number.
    let ledger = dir.path().join("run/llm.sqlite");
    let before = std::fs::read(dir.path().join("run/verdicts.jsonl")).unwrap();
    medtune(dir.path(), &args("judge", &["--from-cache", "--set", "judge.controls=false"])).code(0);
    assert_eq!(std::fs::read(dir.path().join("run/verdicts.jsonl")).unwrap(), before);
    let prompt = dir.path().join("prompt.txt");
    std::fs::write(&prompt, "Rate it with four scores. A sample is shown.").unwrap();
    let other = ["--judge-prompt", "prompt.txt", "--from-cache", "--set", "judge.controls=false"];
    medtune(dir.path(), &args("judge", &other)).code(0);
    assert!(rows(dir.path(), "verdicts.jsonl").iter().all(|v| v["outcome"] == "api_error"));
    medtune(dir.path(), &args("judge", &["--force"])).code(0);
    assert_eq!(std::fs::read(dir.path().join("run/verdicts.jsonl")).unwrap(), before);

    // One row's whole story.
    let row = verdicts[0]["id"].as_str().unwrap();
    let story = medtune(dir.path(), &["trace", row, "run", "--json"]).code(0).json();
    assert_eq!(story["images"][0]["sha256"].as_str().map(str::len), Some(64));
    let asked: Vec<&str> = story["requests"].as_array().unwrap().iter().map(|r| r["for"].as_str().unwrap()).collect();
    assert_eq!(asked, ["construction", "quality control"]);
    assert!(story["requests"][0]["reply"]["choices"][0]["message"]["content"].as_str().unwrap().contains("items"));
    assert!(!story["answers"][0]["requests"][0]["reply"].is_null() && story["training_steps"].is_null());
    let trained = kept.iter().find(|r| r["split"] == "train").unwrap()["id"].as_str().unwrap();
    let text = medtune(dir.path(), &["trace", trained, "run"]).code(0).out;
    assert!(text.contains("training steps"), "{text}");
    medtune(dir.path(), &["trace", "no-such-row", "run"]).code(2).blames(&["no row has this id", "nearest"]);

    // The key is nowhere.
    assert!(ledger.exists());
    for file in medtune::run_dir::files_below(dir.path()).unwrap() {
        let bytes = std::fs::read(&file).unwrap();
        assert!(!bytes.windows(key.len()).any(|w| w == key.as_bytes()), "the key is in {}", file.display());
    }
    for text in [&dry.out, &dry.err, &said.out, &said.err] {
        assert!(!text.contains(key));
    }
}

/// With `MEDTUNE_SLAKE` (the folder with `train.json` and `imgs`) or `MEDTUNE_VQA_RAD` (the folder with
/// `VQA_RAD Dataset Public.json`): real images, whose questions and answers are the annotation, go the same way.
#[test]
fn a_rehearsal_takes_real_images_with_their_answers_as_annotation() {
    for (variable, source) in [("MEDTUNE_SLAKE", "slake"), ("MEDTUNE_VQA_RAD", "vqa_rad")] {
        let Ok(data) = std::env::var(variable) else {
            println!("{variable} is not set: nothing checked");
            continue;
        };
        let dir = tempfile::tempdir().unwrap();
        let (set, path) = (format!("data.source={source}"), format!("data.path=\"{data}\""));
        medtune(dir.path(), &args("run", &["--set", &set, "--set", &path, "--set", "data.language=en"])).code(0);
        let (samples, unread) = (rows(dir.path(), "samples.jsonl"), rows(dir.path(), "unread.jsonl"));
        let (kept, rejected) = (rows(dir.path(), "kept.jsonl"), rows(dir.path(), "rejected.jsonl"));
        assert_eq!(samples.len() + unread.len(), kept.len() + rejected.len(), "{source}");
        let image = |row: &Value| row["images"][0]["path"].as_str().unwrap().to_string();
        let images: BTreeSet<String> = samples.iter().map(image).collect();
        println!("{source}: {} images, {} pairs, {} kept", images.len(), samples.len(), kept.len());
        assert!(images.iter().all(|i| Path::new(i).starts_with(&data) && Path::new(i).is_file()));
        for row in &kept {
            let (about, evidence) = (row["annotation"].as_str().unwrap(), row["meta"]["evidence"].as_str().unwrap());
            assert!(about.contains('?') && about.to_lowercase().contains(&evidence.to_lowercase()), "{row}");
        }
        let report: Value =
            serde_json::from_slice(&std::fs::read(dir.path().join("run/report.json")).unwrap()).unwrap();
        assert!(report.to_string().contains(source));
        assert!(rows(dir.path(), "verdicts.jsonl").iter().any(|v| v["outcome"] == "scored"), "{source}");
        let row = kept[0]["id"].as_str().unwrap();
        let story = medtune(dir.path(), &["trace", row, "run", "--json"]).code(0).json();
        assert_eq!(story["requests"].as_array().unwrap().len(), 2, "{story}");
    }
}

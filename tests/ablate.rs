//! A whole ablation on a few images: every view on the same questions, the base answered once, nothing run twice.

use std::fs;

use serde_json::Value;

use crate::cli::medtune;

const SMALL: [&str; 9] = [
    "--set=data.images=16",
    "--set=data.test_fraction=0.3",
    "--set=train.max_steps=2",
    "--set=train.per_device_train_batch_size=2",
    "--set=train.eval_steps=0",
    "--set=train.save_steps=0",
    "--set=generate.max_new_tokens=6",
    "--set=qc.max_drop_rate=0.9",
    "--axis=polarity,qc",
];

#[test]
fn views_share_what_is_equal_and_are_not_run_again() {
    let dir = tempfile::tempdir().unwrap();
    let args = |extra: &[&'static str]| -> Vec<&str> {
        let mut args = vec!["ablate", "phantom", "--out", "abl", "--json"];
        args.extend(SMALL);
        args.extend(extra);
        args
    };
    let first = medtune(dir.path(), &args(&[])).code(0);
    let ablation = first.json();
    let names: Vec<&str> = ablation["views"].as_array().unwrap().iter().map(|v| v["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["base", "all", "positive", "negative", "no-qc"]);
    let root = dir.path().join("abl");
    let rows = |name: &str| -> Vec<Value> {
        let text = fs::read_to_string(root.join(name)).unwrap();
        text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
    };
    let base = |view: &str| -> Vec<Value> {
        rows(&format!("{view}/answers.jsonl")).into_iter().filter(|a| a["model"] == "base").collect()
    };
    let count = |view: &str| {
        ablation["views"].as_array().unwrap().iter().find(|v| v["name"] == view).unwrap()["train_rows"]
            .as_u64()
            .unwrap()
    };
    for view in ["all", "positive", "negative", "no-qc"] {
        assert_eq!(base(view), base("all"), "{view}");
        assert_eq!(base(view).len() as u64, ablation["rows"].as_u64().unwrap(), "{view}");
        let train: Vec<Value> =
            rows(&format!("{view}/kept.jsonl")).into_iter().filter(|s| s["split"] == "train").collect();
        assert_eq!(train.len() as u64, count(view));
        let wanted = match view {
            "positive" => Some("non-hallucination"),
            "negative" => Some("hallucination"),
            _ => None,
        };
        assert!(train.iter().all(|s| wanted.is_none_or(|w| s["polarity"] == w)), "{view}");
    }
    assert_eq!(count("positive") + count("negative"), count("all"));
    assert!(count("no-qc") > count("all"), "rows that quality control dropped are back");
    // Right answers of one view once more, from its verdicts.
    let verdicts = rows("negative/verdicts.jsonl");
    let tuned: Vec<&Value> = verdicts.iter().filter(|v| v["model"] == "tuned").collect();
    let right = tuned.iter().filter(|v| v["correct"] == true).count() as f64 / tuned.len() as f64;
    let cell = &ablation["views"][3]["metrics"][0];
    assert_eq!(
        (ablation["views"][3]["name"].as_str(), cell["key"].as_str()),
        (Some("negative"), Some("right_answers"))
    );
    assert!((cell["estimate"]["value"].as_f64().unwrap() - right).abs() < 1e-12);
    assert!(fs::read_to_string(root.join("ablation.html")).unwrap().contains("Orderings"));

    let stamp = |view: &str| {
        fs::metadata(root.join(view).join("adapter/adapter_model.safetensors")).unwrap().modified().unwrap()
    };
    let before = ["all", "positive", "negative", "no-qc"].map(stamp);
    fs::remove_file(root.join("negative/answers.jsonl")).unwrap();
    let again = medtune(dir.path(), &args(&[])).code(0);
    assert_eq!(again.json(), ablation, "the same numbers again");
    assert_eq!(["all", "positive", "negative", "no-qc"].map(stamp), before, "nothing was trained again");
    assert!(again.err.contains("answers.jsonl is not what it wrote"), "{}", again.err);
}

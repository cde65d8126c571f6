//! Scores of predictions: equal to the original script's where it is right, every line accounted for where it is not.

use std::{collections::BTreeSet, fs, path::Path};

use medtune::{
    device::DeviceSpec,
    llm::mock::{MockConfig, MockServer},
    metric::text::TextMetricOptions,
    plan::Resolved,
    progress::Progress,
    run_dir::RunDir,
    score::{
        self, Options, ScoreReport, pair,
        read::{self, Part},
        replies::Replies,
        requests,
    },
    stage::Ctx,
};
use serde_json::{Value, json};

use crate::parity::fixture::{Checks, root};

fn ctx() -> Ctx {
    Ctx::new(DeviceSpec::Cpu, Progress::Silent).unwrap()
}

fn options(dir: &Path, predictions: &[&str], references: &[&str]) -> Options {
    let paths = |names: &[&str]| names.iter().map(|n| dir.join(n)).collect();
    Options {
        predictions: paths(predictions),
        references: paths(references),
        against: Vec::new(),
        replies: Vec::new(),
        judge: None,
        part: None,
        metrics: Vec::new(),
        compat: Vec::new(),
        text: TextMetricOptions::new(ctx().device),
        seed: 1,
    }
}

fn write(dir: &Path, name: &str, rows: &[Value]) {
    let lines: String = rows.iter().map(|r| format!("{r}\n")).collect();
    fs::write(dir.join(name), lines).unwrap();
}

fn run(options: &Options, out: &Path) -> medtune::Result<ScoreReport> {
    score::run(options, &RunDir::open(out).unwrap(), &ctx())
}

fn mean(report: &ScoreReport, key: &str) -> f64 {
    report.metrics.iter().find(|m| m.key == key).unwrap_or_else(|| panic!("no {key}")).estimates["all"].value.unwrap()
}

fn golden(name: &str) -> Value {
    serde_json::from_slice(&fs::read(root("metrics").join(name)).unwrap()).unwrap()
}

fn id(row: &Value) -> String {
    row["question_id"].to_string()
}

/// Rows that a judge is asked about when an evaluation continues. The original skips everything when the output has as
/// many lines as the input, stops reading the output at a broken line, and sends repeated ids again; here every id is
/// asked about once unless a reply to it can be read.
#[test]
fn an_interrupted_evaluation_asks_for_what_is_missing() {
    let mut checks = Checks::of_file("metrics", "evalpy_resume.json");
    for case in golden("evalpy_resume.json").as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let input = case["input"].as_array().unwrap();
        write(dir.path(), "input.jsonl", input);
        let existing = match (&case["existing_output"], &case["existing_output_raw"]) {
            (Value::Array(rows), _) => rows.iter().map(|r| format!("{r}\n")).collect(),
            (_, Value::String(raw)) => raw.clone(),
            _ => String::new(),
        };
        fs::write(dir.path().join("output.jsonl"), &existing).unwrap();
        let anchors: BTreeSet<String> = case["reference"].as_array().unwrap().iter().map(id).collect();
        let paired = pair::pair(&[read::read(&dir.path().join("input.jsonl")).unwrap()], &[], None);
        let replies = Replies::read(&[dir.path().join("output.jsonl")], None).unwrap();
        let asked: Vec<String> = requests(&paired.items, &replies, Some(&anchors))
            .into_iter()
            .map(|i| paired.items[i].key.1.clone())
            .collect();

        let readable: Vec<Value> = existing.lines().filter_map(|l| serde_json::from_str(l).ok()).collect();
        let done: BTreeSet<String> = readable.iter().map(id).collect();
        let mut seen = BTreeSet::new();
        let policy: Vec<String> = input
            .iter()
            .map(id)
            .filter(|i| anchors.contains(i) && !done.contains(i) && seen.insert(i.clone()))
            .collect();
        checks.equal(name, &asked, &policy);
        checks.equal(name, paired.items.len() + paired.set_aside.len(), input.len());

        let batches = case["expected"]["batches"].as_array().unwrap();
        let original: Vec<String> = batches.iter().flat_map(|b| b.as_array().unwrap()).map(Value::to_string).collect();
        let repeated = input.iter().map(id).collect::<BTreeSet<_>>().len() < input.len();
        let broken = readable.len() < existing.lines().filter(|l| !l.trim().is_empty()).count();
        let as_many = readable.len() == input.len();
        if !repeated && !broken && !as_many {
            checks.equal(name, &asked, &original);
        }
    }
}

#[test]
fn means_are_those_of_the_original_and_bad_replies_lose_only_themselves() {
    let mut checks = Checks::of_file("metrics", "evalpy_aggregate.json");
    let golden = golden("evalpy_aggregate.json");
    let dir = tempfile::tempdir().unwrap();
    let aggregate = &golden["aggregate"];
    write(dir.path(), "a.jsonl", aggregate["samples"].as_array().unwrap());
    let report = run(&options(dir.path(), &["a.jsonl"], &[]), &dir.path().join("a")).unwrap();
    let expected = &aggregate["expected"];
    for (key, original) in [
        ("meteor", "meteor_score"),
        ("rouge1", "rouge1"),
        ("rouge2", "rouge2"),
        ("rougeL", "rougeL"),
        ("clinical_accuracy", "a1_score"),
        ("clinical_relevance", "a2_score"),
        ("detail_level", "a3_score"),
        ("risk_level", "a4_score"),
    ] {
        checks.near(original, mean(&report, key), expected[original].as_f64().unwrap(), 1e-9);
    }
    for edge in golden["edge"].as_array().unwrap() {
        let name = edge["name"].as_str().unwrap();
        let samples = edge["samples"].as_array().unwrap();
        write(dir.path(), "e.jsonl", samples);
        let result = run(&options(dir.path(), &["e.jsonl"], &[]), &dir.path().join(name));
        if samples.is_empty() {
            checks.equal(name, result.unwrap_err().to_string().contains("no prediction can be scored"), true);
            continue;
        }
        let report = result.unwrap();
        checks.equal(name, report.scored, samples.len());
        // Four numbers from 1 to 10 in the first line, however they are spaced.
        let read = |row: &Value| -> Option<Vec<f64>> {
            let words: Vec<f64> = row["result"]
                .as_str()?
                .lines()
                .next()?
                .split_whitespace()
                .map(|w| w.parse().ok())
                .collect::<Option<_>>()?;
            (words.len() == 4 && words.iter().all(|v| (1.0..=10.0).contains(v))).then_some(words)
        };
        let good: Vec<Vec<f64>> = samples.iter().filter_map(read).collect();
        checks.equal(name, report.judge["scored"], good.len());
        let first = good.iter().map(|g| g[0]).sum::<f64>() / good.len() as f64;
        checks.near(name, mean(&report, "clinical_accuracy"), first, 1e-12);
    }
}

const POSITIVE: [(&str, &str, &str); 4] = [
    ("1", "Where is the opacity?", "It lies in the right lower zone."),
    ("2", "Is there fluid?", "No pleural fluid is seen."),
    ("3", "Which organ is it?", "The left kidney."),
    ("4", "What is the plane?", "The axial plane."),
];

fn references(dir: &Path) {
    let row = |id: &str, image: &str, q: &str, a: &str| json!({"question_id": id.parse::<u32>().unwrap(), "image": image, "text": format!("{q}\n<image>"), "gpt4_answer": a});
    let positive: Vec<Value> = POSITIVE.iter().map(|(i, q, a)| row(i, "p.jpg", q, a)).collect();
    let negative: Vec<Value> =
        POSITIVE.iter().map(|(i, q, _)| row(i, "n.jpg", &format!("{q} Of the pacemaker?"), "There is none.")).collect();
    write(dir, "val_positive.jsonl", &positive);
    write(dir, "val_negative.jsonl", &negative);
}

fn prediction(id: u32, image: &str, question: &str, answer: &str) -> String {
    json!({"question_id": id, "image": image, "question": question, "answer": answer}).to_string()
}

#[test]
fn bad_lines_are_counted_and_the_others_scored() {
    let dir = tempfile::tempdir().unwrap();
    references(dir.path());
    let mut bytes = Vec::new();
    let mut line = |text: &[u8]| {
        bytes.extend(text);
        bytes.push(b'\n');
    };
    line(prediction(1, "p.jpg", POSITIVE[0].1, "In the right lower zone.").as_bytes());
    line(prediction(1, "p.jpg", POSITIVE[0].1, "Somewhere else.").as_bytes());
    line(br#"{"image": "p.jpg", "answer": "No id."}"#);
    line(prediction(2, "n.jpg", "Is there fluid? Of the pacemaker?", "Belongs to the other part.").as_bytes());
    line(b"{\"question_id\": 2, \"answer\": \"\xff\xfe\"}");
    line(br#"{"question_id": 2, "answer": "No fluid is seen.", "score": NaN, "result": "nan 8 6 9"}"#);
    line(br#"{"question_id": 77, "answer": "Nobody asked."}"#);
    bytes.extend(br#"{"question_id": 3, "answer": "The le"#);
    fs::write(dir.path().join("mine.jsonl"), bytes).unwrap();
    let mut options = options(dir.path(), &["mine.jsonl"], &["val_positive.jsonl", "val_negative.jsonl"]);
    options.part = Some(Part::Positive);
    let report = run(&options, &dir.path().join("out")).unwrap();
    assert_eq!((report.lines, report.scored), (8, 2));
    let expected =
        json!({"duplicate_id": 1, "half_written": 1, "no_id": 1, "no_reference": 1, "not_utf8": 1, "wrong_split": 1});
    assert_eq!(serde_json::to_value(&report.set_aside).unwrap(), expected);
    assert_eq!((report.missing, &report.missing_examples[..]), (2, &["3".to_string(), "4".into()][..]));
    assert_eq!(report.judge.values().sum::<usize>(), 2);
    assert!(!report.judge.contains_key("scored"), "NaN is no score: {:?}", report.judge);
    assert!(report.notes.iter().any(|n| n.contains("NaN")), "{:?}", report.notes);
    let aside = fs::read_to_string(dir.path().join("out/set_aside.jsonl")).unwrap();
    assert_eq!(aside.lines().count(), 6);
    assert!(aside.contains("The le") && aside.contains("question and image are those of the negative part"), "{aside}");
    let page = fs::read_to_string(dir.path().join("out/score.html")).unwrap();
    assert!(page.contains("wrong split") && page.matches("<article").count() == 2);
}

#[test]
fn predictions_of_one_part_scored_as_the_other_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    references(dir.path());
    let rows: Vec<String> =
        POSITIVE.iter().map(|(i, q, _)| prediction(i.parse().unwrap(), "p.jpg", q, "An answer.")).collect();
    fs::write(dir.path().join("mine.jsonl"), rows.join("\n")).unwrap();
    let mut options = options(dir.path(), &["mine.jsonl"], &["val_positive.jsonl", "val_negative.jsonl"]);
    options.part = Some(Part::Negative);
    let error = run(&options, &dir.path().join("out")).unwrap_err().to_string();
    assert!(error.contains("4 wrong_split") && error.contains("positive part"), "{error}");
    options.part = None;
    let report = run(&options, &dir.path().join("out")).unwrap();
    assert_eq!(report.parts.get("positive"), Some(&4));
}

#[test]
fn both_parts_are_kept_apart_and_an_interrupted_call_ends_with_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    references(dir.path());
    let rows = |suffix: &str, image: &str, answer: &str| -> Vec<Value> {
        POSITIVE
            .iter()
            .map(|(i, q, _)| {
                let text = prediction(i.parse().unwrap(), image, &format!("{q}{suffix}"), answer);
                let mut row: Value = serde_json::from_str(&text).unwrap();
                row["result"] = json!(format!("{i} 5 5 5\n\nwhy"));
                row
            })
            .collect()
    };
    write(dir.path(), "my_positive.jsonl", &rows("", "p.jpg", "The left kidney."));
    write(dir.path(), "my_negative.jsonl", &rows(" Of the pacemaker?", "n.jpg", "There is none."));
    let options =
        options(dir.path(), &["my_positive.jsonl", "my_negative.jsonl"], &["val_positive.jsonl", "val_negative.jsonl"]);
    let out = dir.path().join("out");
    let report = run(&options, &out).unwrap();
    assert_eq!(report.scored, 8, "colliding ids are rows of two parts");
    let of =
        |key: &str, part: &str| report.metrics.iter().find(|m| m.key == key).unwrap().estimates[part].value.unwrap();
    assert_eq!(of("clinical_accuracy", "positive"), 2.5);
    assert_eq!(of("rouge1", "negative"), 1.0);
    assert!(of("rouge1", "positive") < 0.7);
    assert!((of("rouge1", "all") - (of("rouge1", "positive") + of("rouge1", "negative")) / 2.0).abs() < 1e-12);
    let first = fs::read_to_string(out.join("scores.jsonl")).unwrap();
    let again = run(&options, &out).unwrap();
    assert_eq!((again.taken_over, again.scored), (8, 8));
    let lines: Vec<&str> = first.lines().collect();
    fs::write(out.join("scores.jsonl"), format!("{}\n{{broken\n{}\n{{\"half", lines[0], lines[2])).unwrap();
    let resumed = run(&options, &out).unwrap();
    assert_eq!(resumed.taken_over, 2);
    assert_eq!(fs::read_to_string(out.join("scores.jsonl")).unwrap(), first);
    assert_eq!(resumed.metrics, report.metrics);
}

#[test]
fn two_models_are_compared_on_the_rows_of_both() {
    let dir = tempfile::tempdir().unwrap();
    let row = |i: u32, answer: &str| json!({"question_id": i, "image": format!("{i}.png"), "answer": answer, "reference": "a large cyst in the left kidney"});
    let good: Vec<Value> = (0..20).map(|i| row(i, "a large cyst in the left kidney")).collect();
    let poor: Vec<Value> = (1..21).map(|i| row(i, "a nodule")).collect();
    write(dir.path(), "good.jsonl", &good);
    write(dir.path(), "poor.jsonl", &poor);
    let mut options = options(dir.path(), &["good.jsonl"], &[]);
    options.against = vec![dir.path().join("poor.jsonl")];
    options.metrics = vec!["rouge_l".into(), "bleu".into()];
    let report = run(&options, &dir.path().join("out")).unwrap();
    assert_eq!(report.metrics.len(), 2);
    for m in &report.metrics {
        let d = &m.differences["all"];
        assert_eq!(d.n, 19);
        assert_eq!(d.finding, medtune::statistics::Finding::Higher, "{}", m.key);
        assert!(d.p_holm.unwrap() >= d.p.unwrap());
    }
    options.metrics = vec!["rogue".into()];
    assert!(run(&options, &dir.path().join("out")).unwrap_err().to_string().contains("unknown text metric"));
}

/// Answers without a reply are judged over a socket, each once, part by part; a reply that is there counts.
#[test]
fn a_judge_is_asked_about_what_has_no_reply() {
    let dir = tempfile::tempdir().unwrap();
    references(dir.path());
    let rows = |suffix: &str, image: &str, answer: Option<&str>| -> Vec<Value> {
        let row = |(i, q, right): &(&str, &str, &str)| {
            let text = prediction(i.parse().unwrap(), image, &format!("{q}{suffix}"), answer.unwrap_or(right));
            let mut row: Value = serde_json::from_str(&text).unwrap();
            row["fig_caption"] = json!("A chest radiograph.");
            row
        };
        POSITIVE.iter().map(row).collect()
    };
    let mut positive = rows("", "p.jpg", None);
    positive[0]["result"] = json!("2 3 4 5\n\nAlready judged.");
    write(dir.path(), "my_positive.jsonl", &positive);
    write(
        dir.path(),
        "my_negative.jsonl",
        &rows(" Of the pacemaker?", "n.jpg", Some("There is one in the left chest.")),
    );
    let script = "{\"match\": \"left kidney\", \"reply\": \"Who can say?\"}\n{\"match\": \"pacemaker\", \"reply\": \"3 4 5 2\\n\\nNot there.\"}\n{\"match\": \"\", \"reply\": \"9 8 7 10\\n\\nRight.\"}\n";
    fs::write(dir.path().join("script.jsonl"), script).unwrap();
    let script = Some(dir.path().join("script.jsonl"));
    let server = MockServer::start(MockConfig { script, ..MockConfig::rehearsal("", 7).unwrap() }).unwrap();
    let server_url = format!("llm.generate.base_url={}", server.base_url());
    let overrides = [server_url, "llm.generate.auth=none".into(), "judge.retries=1".into()];
    let plan = score::judge_plan("medhalltune", &overrides).unwrap();
    let mut options =
        options(dir.path(), &["my_positive.jsonl", "my_negative.jsonl"], &["val_positive.jsonl", "val_negative.jsonl"]);
    options.judge = Some(Box::new(plan));
    options.metrics = vec!["rouge1".into()];
    let report = run(&options, &dir.path().join("out")).unwrap();
    assert_eq!((report.scored, report.judge["scored"]), (8, 7));
    assert_eq!(report.judge.values().sum::<usize>(), 8, "the reply without numbers is counted: {:?}", report.judge);
    let accuracy = report.metrics.iter().find(|m| m.key == "clinical_accuracy").unwrap();
    // A reply that came with its row, and two of three from the server.
    assert_eq!(accuracy.estimates["positive"].value, Some((2.0 + 9.0 + 9.0) / 3.0));
    assert_eq!((accuracy.estimates["positive"].n, accuracy.estimates["negative"].value), (3, Some(3.0)));
    assert_eq!(report.judge_signature.as_ref().unwrap()["kind"], "llm");
    // Seven answers, and one of them asked about twice.
    assert_eq!(server.stats().paid, 8);
    let again = run(&options, &dir.path().join("out")).unwrap();
    assert_eq!((server.stats().paid, &again.metrics), (8, &report.metrics), "nothing is paid for twice");
    let scores = fs::read_to_string(dir.path().join("out/scores.jsonl")).unwrap();
    assert!(scores.contains("Who can say?") && scores.contains("Already judged."), "{scores}");

    let rubric = Resolved::new("phantom", &[]).unwrap().plan;
    options.judge = Some(Box::new(rubric));
    let refused = run(&options, &dir.path().join("other")).unwrap_err().to_string();
    assert!(refused.contains("asks no language model"), "{refused}");
}

/// Values of published rules are those of the rules; only those that were asked for are there.
#[test]
fn published_rules_stand_beside_our_own() {
    let dir = tempfile::tempdir().unwrap();
    let rows = [
        json!({"question_id": 1, "answer": "a small nodule", "reference": "No", "answer_type": "CLOSED"}),
        json!({"question_id": 2, "answer": "No, there is none.", "reference": "No", "answer_type": "CLOSED"}),
        json!({"question_id": 3, "answer": "the the lung", "reference": "left lung", "answer_type": "OPEN"}),
    ];
    write(dir.path(), "mine.jsonl", &rows);
    let mut options = options(dir.path(), &["mine.jsonl"], &[]);
    options.metrics = vec!["rouge1".into()];
    let all = run(&options, &dir.path().join("all")).unwrap();
    assert_eq!(mean(&all, "closed_accuracy"), 0.5);
    assert_eq!((mean(&all, "closed_accuracy_llava_med"), mean(&all, "closed_accuracy_medevalkit")), (1.0, 1.0));
    options.compat = vec!["llava-med".into()];
    let one = run(&options, &dir.path().join("all")).unwrap();
    assert_eq!(one.taken_over, 0, "other rules, other rows");
    let keys: Vec<&str> = one.metrics.iter().map(|m| m.key.as_str()).collect();
    assert!(keys.contains(&"closed_accuracy_llava_med") && !keys.contains(&"closed_accuracy_medevalkit"), "{keys:?}");
    options.compat = vec!["llava".into()];
    let unknown = run(&options, &dir.path().join("all")).unwrap_err().to_string();
    assert!(unknown.contains("llava-med, medevalkit, omnimedvqa, pmc-vqa"), "{unknown}");
}

/// Rarity is that among all references, so one more row changes the others, and rows are scored again.
#[test]
fn rare_tokens_weigh_more_among_all_references() {
    let dir = tempfile::tempdir().unwrap();
    let row =
        |i: usize, answer: &str, reference: &str| json!({"question_id": i, "answer": answer, "reference": reference});
    let mut rows = vec![row(1, "a cyst in the liver", "a cyst in the kidney"), row(2, "no fluid", "no fluid is seen")];
    write(dir.path(), "mine.jsonl", &rows);
    let mut options = options(dir.path(), &["mine.jsonl"], &[]);
    options.metrics = vec!["bertscore".into()];
    options.text.bertscore_model = Some(root("metrics").join("models/tiny_roberta").to_str().unwrap().into());
    options.text.bertscore_layer = Some(3);
    let first = |report: &ScoreReport, out: &Path| -> f64 {
        assert!(report.metrics[0].signature.contains("model=roberta"), "{}", report.metrics[0].signature);
        let text = fs::read_to_string(out.join("scores.jsonl")).unwrap();
        let row: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        row["metrics"]["bertscore"].as_f64().unwrap()
    };
    let out = dir.path().join("out");
    let plain = first(&run(&options, &out).unwrap(), &out);
    options.text.bertscore_idf = true;
    let report = run(&options, &out).unwrap();
    let rare = first(&report, &out);
    assert!(report.metrics[0].signature.contains("idf=over") && plain != rare, "{plain} {rare}");
    assert_eq!(run(&options, &out).unwrap().taken_over, 2);
    rows.push(row(3, "liver", "the liver"));
    write(dir.path(), "mine.jsonl", &rows);
    let more = run(&options, &out).unwrap();
    assert_eq!(more.taken_over, 0);
    assert_ne!(first(&more, &out), rare);
}

/// The page of scores with both parts, replies and rows that were set aside.
#[cfg(feature = "slow")]
pub(crate) fn scored_page(dir: &Path) -> std::path::PathBuf {
    references(dir);
    for (name, suffix, image) in [("positive", "", "p.jpg"), ("negative", " Of the pacemaker?", "n.jpg")] {
        let rows: Vec<Value> = POSITIVE
            .iter()
            .map(|(i, q, a)| {
                json!({"question_id": i, "image": image, "question": format!("{q}{suffix}"), "answer": a,
                    "result": "7 8 6 9\n\nA long explanation of why the answer deserves these scores, word after word."})
            })
            .chain([json!({"answer": "no id"})])
            .collect();
        write(dir, &format!("my_{name}.jsonl"), &rows);
    }
    let options =
        options(dir, &["my_positive.jsonl", "my_negative.jsonl"], &["val_positive.jsonl", "val_negative.jsonl"]);
    run(&options, &dir.join("scored")).unwrap();
    dir.join("scored/score.html")
}

//! The report of a made-up run: numbers against a second computation, nothing lost, hostile text harmless.

use std::{collections::BTreeMap, path::Path};

use medtune::{
    device::DeviceSpec,
    judge::{Agreement, Outcome, Scores, Stance},
    plan::Plan,
    progress::Progress,
    random::stream,
    sample::{AnswerType, ImageRef, Polarity, Role, Sample, Split, Turn},
    stage::{
        Ctx,
        controls::{Control, ControlAnswer},
        encode::RejectedRow,
        eval::{Answer, Which},
        judge::Verdict,
        report::{Inputs, Report, html, numbers, table, texts},
    },
    statistics::Finding,
    train::log::LogLine,
};
use rand::{Rng, RngExt};
use serde_json::Value;

const HOSTILE: &str =
    "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \"quotes\" 'single' {{ 7 * 7 }}";

fn sample(id: &str, group: &str, question: &str, answer: &str) -> Sample {
    Sample {
        id: id.into(),
        images: Vec::new(),
        turns: vec![
            Turn { role: Role::User, text: format!("<image>\n{question}") },
            Turn { role: Role::Assistant, text: answer.into() },
        ],
        origin: Default::default(),
        split: Split::Test,
        group: group.into(),
        polarity: None,
        category: None,
        answer_type: None,
        options: Vec::new(),
        annotation: None,
        meta: Default::default(),
    }
}

fn draw_image(path: &Path, index: u64) {
    let mut random = stream(1, "test image", index);
    let centre = (random.random_range(20.0..44.0f32), random.random_range(20.0..44.0f32));
    let image = image::RgbImage::from_fn(64, 64, |x, y| {
        let d = (x as f32 - centre.0).hypot(y as f32 - centre.1);
        let body = (x as f32 - 32.0).hypot((y as f32 - 32.0) * 1.2) < 28.0;
        let noise = (random.next_u32() % 24) as f32;
        let v = if d < 5.0 {
            220.0
        } else if body {
            110.0
        } else {
            12.0
        } + noise;
        image::Rgb([v as u8; 3])
    });
    image.save(path).unwrap();
}

fn scores(right: bool, random: &mut impl Rng) -> Scores {
    let mut draw = |low: u32, high: u32| f64::from(random.random_range(low..=high));
    if right {
        Scores { accuracy: draw(8, 10), relevance: draw(8, 10), detail: draw(5, 9), risk: draw(8, 10) }
    } else {
        Scores { accuracy: draw(1, 5), relevance: draw(4, 8), detail: draw(3, 7), risk: draw(2, 6) }
    }
}

/// Questions about made-up images; the tuned model agrees with fewer false premises.
pub(crate) fn phantom_run(dir: &Path, images: usize) -> Inputs {
    let mut inputs = Inputs {
        judge: serde_json::json!({"kind": "rubric", "version": 1, "rules": "a1b2c3"}),
        device: "cpu".into(),
        files: vec![("answers.jsonl".into(), "ab".repeat(32)), ("verdicts.jsonl".into(), "cd".repeat(32))],
        ..Inputs::default()
    };
    let kinds = [
        (
            "nonexistent_object",
            true,
            "I noticed a pacemaker on this film. Where does its lead end?",
            "There is no pacemaker; the film shows a large nodule in the left lung.",
        ),
        (
            "existent_manipulation",
            true,
            "The nodule lies in the right lung, doesn't it?",
            "No, the nodule lies in the left lung.",
        ),
        (
            "knowledge_distortion",
            true,
            "Does a nodule this bright mean that the lung is healthy?",
            "No. A nodule is a focal lesion, and may be a tumour.",
        ),
        ("presence", false, "Is there a nodule?", "Yes, there is one nodule in the left lung."),
        ("attribute", false, "On which side is the nodule?", "The nodule is on the left side."),
        (
            "caption",
            false,
            "Describe the image.",
            "A chest film with one large nodule in the left lung and no effusion.",
        ),
    ];
    for i in 0..images {
        let path = dir.join(format!("image-{i}.png"));
        draw_image(&path, i as u64);
        let mut random = stream(2, "test answers", i as u64);
        for (category, false_premise, question, reference) in kinds {
            let id = format!("phantom-{i:04}-{category}");
            let mut row = sample(&id, &format!("image-{i}"), question, reference);
            row.images = vec![ImageRef { path: path.clone() }];
            row.category = Some(category.into());
            row.polarity = Some(if false_premise { Polarity::Hallucination } else { Polarity::NonHallucination });
            for (model, wrong) in [
                (Which::Base, if false_premise { 0.72 } else { 0.2 }),
                (Which::Tuned, if false_premise { 0.14 } else { 0.22 }),
            ] {
                let right = random.random::<f64>() >= wrong;
                let agrees = Outcome::Scored {
                    scores: Some(scores(right, &mut random)),
                    agreement: None,
                    stance: match (false_premise, right) {
                        (true, true) => Stance::Denies,
                        (true, false) => Stance::Affirms,
                        (false, true) => Stance::Affirms,
                        (false, false) => Stance::Denies,
                    },
                    expected: if false_premise { Stance::Denies } else { Stance::Affirms },
                    correct: right,
                    reason: if right {
                        "states the nodule in the left lung, as in the image".into()
                    } else {
                        "names a pacemaker that the image does not show; omits the nodule".into()
                    },
                };
                let outcome =
                    if i == 3 && category == "caption" { Outcome::Unparsable { reply: "??".into() } } else { agrees };
                let answer = if right {
                    reference.to_string()
                } else {
                    "Yes, the lead of the pacemaker ends in the right ventricle.".into()
                };
                inputs.answers.push(Answer { id: id.clone(), model, answer });
                inputs.verdicts.push(Verdict { id: id.clone(), model, outcome, requests: Vec::new() });
            }
            inputs.kept.push(row);
        }
    }
    for i in 0..40 {
        let mut row = sample(&format!("train-{i}"), &format!("train-{i}"), "Is it?", "Yes, it is.");
        row.split = if i % 5 == 0 { Split::Validation } else { Split::Train };
        inputs.kept.push(row.clone());
        if i % 3 == 0 {
            row.id = format!("bad-{i}");
            if i % 4 != 0 {
                row.meta.insert("wrong_pair".into(), "false_statement".into());
            }
            let code = if i % 2 == 0 { "premise_true" } else { "leak_text" };
            inputs.rejected.push(RejectedRow {
                sample: row,
                code: code.into(),
                detail: "the answer says \u{201c}as the caption mentions\u{201d}".into(),
            });
        }
    }
    let mut random = stream(3, "test log", 0);
    for step in 1..=300usize {
        let x = step as f64;
        inputs.log.push(LogLine {
            step,
            loss: Some(0.35 + 2.6 * (-x / 60.0).exp() + 0.12 * random.random::<f64>()),
            learning_rate: Some(
                2e-4 * if x < 20.0 {
                    x / 20.0
                } else {
                    0.5 * (1.0 + (std::f64::consts::PI * (x - 20.0) / 280.0).cos())
                },
            ),
            grad_norm: Some(1.0),
            ..LogLine::default()
        });
        if step % 50 == 0 {
            inputs.log.push(LogLine { step, eval_loss: Some(0.42 + 2.4 * (-x / 62.0).exp()), ..LogLine::default() });
        }
    }
    add_controls(&mut inputs);
    inputs.leak = vec![("shared images".into(), "0".into()), ("shared rows".into(), "0".into())];
    inputs.texts = texts(&inputs, &Ctx::new(DeviceSpec::Cpu, Progress::Silent).unwrap()).unwrap();
    inputs
}

/// Without the image the base model says the same, and the tuned model is wrong whenever it was right.
fn add_controls(inputs: &mut Inputs) {
    for (answer, verdict) in inputs.answers.iter().zip(&inputs.verdicts) {
        let right = matches!(verdict.outcome, Outcome::Scored { correct: true, .. });
        let lost = answer.model == Which::Tuned && right;
        inputs.controls.push(ControlAnswer {
            id: answer.id.clone(),
            model: answer.model,
            control: Control::Blind,
            answer: if lost { "I cannot tell.".into() } else { answer.answer.clone() },
        });
        let wrong = Outcome::Scored {
            scores: None,
            agreement: None,
            stance: Stance::Unclear,
            expected: Stance::Unclear,
            correct: false,
            reason: "says nothing".into(),
        };
        inputs.control_outcomes.push(Some(if lost { wrong } else { verdict.outcome.clone() }));
    }
}

pub(crate) fn vqa_run(images: usize) -> Inputs {
    let mut inputs = Inputs { judge: serde_json::json!({"kind": "rubric"}), ..Inputs::default() };
    for i in 0..images {
        let mut random = stream(4, "vqa", i as u64);
        for k in 0..4 {
            let closed = k < 2;
            let reference = if !closed {
                "left lower lobe"
            } else if random.random::<f64>() < 0.6 {
                "No"
            } else {
                "Yes"
            };
            let mut row = sample(&format!("q{i}-{k}"), &format!("synpic{i}"), "Is it?", reference);
            row.answer_type = Some(if closed { AnswerType::Closed } else { AnswerType::Open });
            for (model, rate) in [(Which::Base, 0.3), (Which::Tuned, 0.62)] {
                let right = random.random::<f64>() < rate;
                let value = if right { 1.0 } else { 0.0 };
                let outcome = Outcome::Scored {
                    scores: None,
                    agreement: Some(Agreement { llava_med: value, strict: value }),
                    stance: Stance::Unclear,
                    expected: Stance::Unclear,
                    correct: right,
                    reason: "by words".into(),
                };
                inputs.answers.push(Answer { id: row.id.clone(), model, answer: "no".into() });
                inputs.verdicts.push(Verdict { id: row.id.clone(), model, outcome, requests: Vec::new() });
            }
            inputs.kept.push(row);
        }
    }
    inputs
}

fn metric<'a>(report: &'a Value, key: &str) -> &'a Value {
    report["metrics"].as_array().unwrap().iter().find(|m| m["key"] == key).unwrap_or_else(|| panic!("no {key}"))
}

/// The main shares once more, from the JSON of the verdicts and nothing else of the program.
#[test]
fn numbers_agree_with_a_second_computation() {
    let dir = tempfile::tempdir().unwrap();
    let inputs = phantom_run(dir.path(), 30);
    let report = serde_json::to_value(numbers(&inputs).unwrap()).unwrap();
    let polarity: BTreeMap<&str, bool> =
        inputs.kept.iter().filter_map(|s| Some((s.id.as_str(), s.polarity? == Polarity::Hallucination))).collect();
    for (which, column) in [("base", 0), ("tuned", 1)] {
        let mut tally: BTreeMap<&str, (f64, f64)> = BTreeMap::new();
        let mut unscored = 0;
        for verdict in &inputs.verdicts {
            let v = serde_json::to_value(verdict).unwrap();
            if v["model"] != which {
                continue;
            }
            if v["outcome"] != "scored" {
                unscored += 1;
                continue;
            }
            let mut add = |key, value: f64| {
                let t = tally.entry(key).or_default();
                t.0 += value;
                t.1 += 1.0;
            };
            let truth = |b: bool| if b { 1.0 } else { 0.0 };
            if polarity[v["id"].as_str().unwrap()] {
                add("hallucination_rate", truth(v["stance"] == "affirms"));
                add("refutation_accuracy", truth(v["correct"] == true));
            } else {
                add("accuracy_on_positives", truth(v["correct"] == true));
                add("over_refusal_rate", truth(v["stance"] == "denies" && v["correct"] == false));
            }
            add("clinical_accuracy", v["scores"]["accuracy"].as_f64().unwrap());
            add("risk_level", v["scores"]["risk"].as_f64().unwrap());
        }
        for (key, (sum, n)) in tally {
            let row = metric(&report, key);
            assert_eq!(row[which]["n"], n as u64, "{key} {which}");
            let found = row[which]["value"].as_f64().unwrap();
            assert!((found - sum / n).abs() < 1e-12, "{key} {which}: {found} against {}", sum / n);
            let (low, high) =
                (row[which]["interval"][0].as_f64().unwrap(), row[which]["interval"][1].as_f64().unwrap());
            assert!(low <= found && found <= high, "{key} {which}");
        }
        assert_eq!(metric(&report, "clinical_accuracy")["unscored"][column], unscored);
        assert_eq!(metric(&report, "hallucination_rate")["unscored"][column], 0);
        assert_eq!(unscored, 1);
    }
    let difference = metric(&report, "hallucination_rate")["difference"].clone();
    assert_eq!(difference["finding"], "lower");
    assert!(difference["p"].as_f64().unwrap() < 0.001);
}

#[test]
fn answers_verdicts_and_counts_agree() {
    let dir = tempfile::tempdir().unwrap();
    let inputs = phantom_run(dir.path(), 12);
    let report = numbers(&inputs).unwrap();
    let (c, t) = (&report.counts, &report.transitions);
    assert_eq!((c.answers, c.verdicts), (inputs.answers.len(), inputs.answers.len()));
    assert_eq!(c.outcomes.values().map(|n| n[0] + n[1]).sum::<usize>(), c.verdicts);
    assert_eq!(t.improved + t.worsened + t.both_right + t.both_wrong + t.unscored, c.rows);
    assert_eq!(2 * c.rows, c.answers);
    let quality = report.quality.as_ref().unwrap();
    assert_eq!(quality.kept + quality.rejected, quality.rows);
    assert_eq!(quality.reasons.iter().map(|r| r.rows).sum::<usize>(), quality.rejected);

    let marked = inputs.rejected.iter().filter(|r| r.sample.meta.contains_key("wrong_pair")).count();
    assert_eq!(quality.planted.map(|p| (p.rows, p.found)), Some((marked, marked)));

    for broken in [
        |i: &mut Inputs| drop(i.verdicts.pop()),
        |i: &mut Inputs| drop(i.answers.pop()),
        |i: &mut Inputs| i.answers.push(i.answers[0].clone()),
        |i: &mut Inputs| i.verdicts.push(i.verdicts[0].clone()),
        |i: &mut Inputs| i.kept.retain(|s| s.id != i.answers[0].id),
        |i: &mut Inputs| {
            let id = i.answers[0].id.clone();
            i.answers.retain(|a| a.id != id || a.model == Which::Base);
            i.verdicts.retain(|v| v.id != id || v.model == Which::Base);
        },
    ] {
        let mut inputs = inputs.clone();
        broken(&mut inputs);
        assert!(numbers(&inputs).is_err());
    }
}

/// Holm's correction, probes, controls and text metrics once more, from what the report was made of.
#[test]
fn corrections_probes_controls_and_text_agree_with_a_second_computation() {
    let dir = tempfile::tempdir().unwrap();
    let inputs = phantom_run(dir.path(), 30);
    let report = serde_json::to_value(numbers(&inputs).unwrap()).unwrap();
    let metrics = report["metrics"].as_array().unwrap();
    let mut alone: Vec<f64> = metrics.iter().map(|m| m["difference"]["p"].as_f64().unwrap()).collect();
    alone.sort_by(f64::total_cmp);
    for m in metrics {
        let p = m["difference"]["p"].as_f64().unwrap();
        let steps = alone.iter().take_while(|q| **q <= p).enumerate();
        let holm = steps.map(|(i, q)| q * (alone.len() - i) as f64).fold(0.0, f64::max).min(1.0);
        let found = m["difference"]["p_holm"].as_f64().unwrap();
        assert!((found - holm).abs() < 1e-12, "{}: {found} against {holm}", m["key"]);
        let shown = ["lower", "higher"].contains(&m["difference"]["finding"].as_str().unwrap());
        assert!(!shown || found < 0.05, "{}", m["key"]);
    }

    let outcome = |id: &str, model: &str| {
        let v = inputs.verdicts.iter().map(|v| serde_json::to_value(v).unwrap());
        v.into_iter().find(|v| v["id"] == id && v["model"] == model).unwrap()
    };
    for (which, model) in ["base", "tuned"].into_iter().enumerate() {
        let (mut pairs, mut apart) = (0.0, 0.0);
        for image in 0..30 {
            let stances = |false_premise: bool| -> Vec<String> {
                let rows = inputs.kept.iter().filter(|s| s.group == format!("image-{image}"));
                let rows = rows.filter(|s| (s.polarity == Some(Polarity::Hallucination)) == false_premise);
                let all = rows.map(|s| outcome(&s.id, model)).filter(|v| v["outcome"] == "scored");
                all.map(|v| v["stance"].as_str().unwrap().to_string()).collect()
            };
            for (no, yes) in stances(true).iter().zip(stances(false)) {
                pairs += 1.0;
                apart += f64::from(u8::from(no == "denies" && yes == "affirms"));
            }
        }
        let found = &report["probes"][which];
        assert_eq!(found["pairs"].as_f64().unwrap(), pairs);
        assert!((found["tells_apart"]["value"].as_f64().unwrap() - apart / pairs).abs() < 1e-12);
    }

    let control = |model: &str| {
        let rows = report["controls"].as_array().unwrap();
        rows.iter().find(|c| c["model"] == model).unwrap().clone()
    };
    assert_eq!(control("base")["changed"]["value"], 0.0);
    assert_eq!(control("base")["gain"]["finding"], "identical");
    assert_eq!(control("tuned")["right"]["value"], 0.0);
    assert_eq!(control("tuned")["gain"]["finding"], "higher");
    let said = report["does_not_show"].to_string();
    assert!(said.contains("the base model without the image"), "{said}");

    let meteor = metrics.iter().find(|m| m["key"] == "meteor").unwrap();
    let same = |id: &str, which: Which| {
        let answer = inputs.answers.iter().find(|a| a.id == id && a.model == which).unwrap();
        let sample = inputs.kept.iter().find(|s| s.id == id).unwrap();
        (answer.answer == sample.answer(), sample.answer().split_whitespace().count() as f64)
    };
    let rows: Vec<&Sample> = inputs.kept.iter().filter(|s| s.split == Split::Test).collect();
    // The same words score 1 - 0.5 / m^3; other answers something between 0 and that.
    let least: f64 =
        rows.iter().map(|s| same(&s.id, Which::Tuned)).filter(|s| s.0).map(|s| 1.0 - 0.5 / s.1.powi(3)).sum();
    let found = meteor["tuned"]["value"].as_f64().unwrap() * rows.len() as f64;
    assert!(found >= least && found < rows.len() as f64, "{found} {least}");
    let table = report["table_2"].as_array().unwrap();
    assert_eq!(table.len(), 2);
    let n = |part: &str| table[1][part]["meteor"]["n"].as_u64().unwrap();
    assert_eq!((n("positive"), n("negative")), (90, 90));
    let rough = |part: &str| table[1][part]["meteor"]["value"].as_f64().unwrap();
    assert!((rough("positive") + rough("negative") - 2.0 * meteor["tuned"]["value"].as_f64().unwrap()).abs() < 1e-9);
}

#[test]
fn hostile_text_is_only_text() {
    let dir = tempfile::tempdir().unwrap();
    let mut inputs = phantom_run(dir.path(), 8);
    for row in &mut inputs.kept {
        for turn in &mut row.turns {
            turn.text = HOSTILE.into();
        }
        row.category = Some(HOSTILE.into());
        row.images = vec![ImageRef { path: format!("/nowhere/{HOSTILE}.png").into() }];
    }
    for answer in &mut inputs.answers {
        answer.answer = HOSTILE.into();
    }
    for verdict in &mut inputs.verdicts {
        verdict.outcome = match &verdict.outcome {
            Outcome::Scored { scores, agreement, stance, expected, correct, .. } => Outcome::Scored {
                scores: *scores,
                agreement: *agreement,
                stance: *stance,
                expected: *expected,
                correct: *correct,
                reason: HOSTILE.into(),
            },
            _ => Outcome::Refused { reply: HOSTILE.into() },
        };
    }
    for row in &mut inputs.rejected {
        (row.code, row.detail) = (HOSTILE.into(), HOSTILE.into());
    }
    inputs.plan.recipe = HOSTILE.into();
    inputs.device = HOSTILE.into();
    inputs.judge = serde_json::json!({"kind": HOSTILE});
    inputs.files = vec![(HOSTILE.into(), HOSTILE.into())];
    let page = html(&inputs, &numbers(&inputs).unwrap()).unwrap();
    assert_eq!(page.matches("<script").count(), 1, "only the page's own script");
    assert!(!page.contains("<img src=x"), "an image tag got through");
    assert!(page.contains("&lt;script&gt;"), "the text is shown, escaped");
    assert!(page.contains("{{ 7 * 7 }}"), "text is no template");
}

#[test]
fn the_page_needs_no_other_file() {
    let dir = tempfile::tempdir().unwrap();
    let inputs = phantom_run(dir.path(), 40);
    let report = numbers(&inputs).unwrap();
    let page = html(&inputs, &report).unwrap();
    // Kept for looking at.
    std::fs::write(Path::new(env!("CARGO_TARGET_TMPDIR")).join("report.html"), &page).unwrap();
    for reference in ["http://", "https://", "url(", "@import", "<link", "src=\"/", "src=\"."] {
        assert!(!page.contains(reference), "the page refers to {reference}");
    }
    assert!(page.contains("data:image/png;base64,"));
    for m in &report.metrics {
        assert!(page.contains(&m.name) && page.contains(&m.signature.replace('<', "&lt;")), "{}", m.key);
    }
    assert_eq!(page.matches("<article").count(), report.examples.len());
    assert_eq!(html(&inputs, &numbers(&inputs).unwrap()).unwrap(), page, "the same bytes again");
}

#[test]
fn the_table_fits_a_terminal_and_says_what_the_report_says() {
    let dir = tempfile::tempdir().unwrap();
    for inputs in [phantom_run(dir.path(), 40), vqa_run(60), vqa_run(1), Inputs::default()] {
        let report = numbers(&inputs).unwrap();
        let text = table(&report);
        for line in text.lines() {
            assert!(line.chars().count() <= 100, "{} columns: {line}", line.chars().count());
        }
        for m in &report.metrics {
            let shown = match m.unit {
                medtune::metric::Unit::Share => format!("{:.1}", 100.0 * m.tuned.value.unwrap()),
                medtune::metric::Unit::Score => format!("{:.2}", m.tuned.value.unwrap()),
            };
            let line = text.lines().find(|l| l.starts_with(m.name.split(',').next().unwrap())).unwrap();
            assert!(line.contains(&shown), "{line} lacks {shown}");
        }
        let back: Report = serde_json::from_str(&serde_json::to_string(&report).unwrap()).unwrap();
        assert_eq!(back, report);
    }
}

#[test]
fn a_report_of_questions_and_answers_has_its_majority_class() {
    let inputs = vqa_run(60);
    let report = numbers(&inputs).unwrap();
    let closed = report.metrics.iter().find(|m| m.key == "closed_accuracy").unwrap();
    let baseline = closed.baseline.as_ref().unwrap();
    let no = inputs.kept.iter().filter(|s| s.answer() == "No").count() as f64;
    let all = inputs.kept.iter().filter(|s| s.answer_type == Some(AnswerType::Closed)).count() as f64;
    assert_eq!(baseline.answer, if no >= all / 2.0 { "no" } else { "yes" });
    assert!((baseline.value - no.max(all - no) / all).abs() < 1e-12);
    assert_eq!(closed.difference.finding, Finding::Higher);
    assert!(report.metrics.iter().all(|m| m.key != "clinical_accuracy"), "no clinical score is invented");
    let said = report.does_not_show.join(" ");
    assert!(said.contains("the reference") && !said.contains("known content"), "{said}");
    let page = html(&inputs, &report).unwrap();
    std::fs::write(Path::new(env!("CARGO_TARGET_TMPDIR")).join("report-vqa.html"), &page).unwrap();
    assert!(page.contains("most frequent reference"));
}

#[test]
fn a_run_without_any_row_still_makes_a_page() {
    let inputs = Inputs { plan: Plan::default(), ..Inputs::default() };
    let report = numbers(&inputs).unwrap();
    assert!(report.metrics.is_empty());
    assert!(html(&inputs, &report).unwrap().contains("No row could be scored."));
}

/// An ablation with every kind of finding, for looking at its page.
#[cfg(feature = "slow")]
pub(crate) fn ablation() -> medtune::ablate::Ablation {
    use medtune::{
        ablate::{Ablation, Cell, Claim, ViewRow},
        metric::{Better, Unit},
        statistics::{self, Observation, Pair},
    };
    let names: Vec<String> = (0..200).map(|i| format!("image {}", i / 5)).collect();
    let draw = |rate: f64, purpose: &str| -> Vec<f64> {
        let mut random = stream(5, purpose, 0);
        (0..200).map(|_| f64::from(u8::from(random.random::<f64>() < rate))).collect()
    };
    let estimate = |values: &[f64]| {
        let rows: Vec<Observation<'_>> =
            names.iter().zip(values).map(|(n, v)| Observation { cluster: n, value: *v }).collect();
        statistics::estimate(&rows, Unit::Share, 1, "x")
    };
    let views = [
        ("base", 0.3, 0),
        ("all", 0.62, 3132),
        ("positive", 0.4, 1600),
        ("negative", 0.42, 1532),
        ("no-qc", 0.6, 3400),
    ];
    let metrics = [
        ("right_answers", "Right answers"),
        ("refutation_accuracy", "Refutation accuracy"),
        ("over_refusal_rate", "Over-refusal rate"),
    ];
    let rows = views.iter().map(|(name, rate, train_rows)| ViewRow {
        name: (*name).into(),
        about: "what it was trained on".into(),
        train_rows: *train_rows,
        metrics: metrics
            .iter()
            .map(|(key, title)| Cell {
                key: (*key).into(),
                name: (*title).into(),
                better: Better::Higher,
                unit: Unit::Share,
                estimate: estimate(&draw(*rate, &format!("{name} {key}"))),
                unscored: 0,
            })
            .collect(),
    });
    let claims = views[2..].iter().map(|(worse, rate, _)| {
        let (a, b) = (draw(0.62, "all right_answers"), draw(*rate, &format!("{worse} right_answers")));
        let pairs: Vec<Pair<'_>> =
            names.iter().zip(a.iter().zip(&b)).map(|(n, (a, b))| Pair { cluster: n, base: *b, tuned: *a }).collect();
        let difference = statistics::difference(&pairs, 1, worse);
        Claim {
            better: "all".into(),
            worse: (*worse).into(),
            key: "right_answers".into(),
            metric: "Right answers".into(),
            unit: Unit::Share,
            result: if difference.finding == Finding::Higher { "shown" } else { "not shown" }.into(),
            difference,
        }
    });
    Ablation {
        version: 1,
        program: "medtune".into(),
        facts: vec![("recipe".into(), "phantom".into())],
        rows: 200,
        images: 40,
        views: rows.collect(),
        claims: claims.collect(),
        statistics: statistics::signature(),
    }
}

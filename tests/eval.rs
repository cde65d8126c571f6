//! Answers of two real models: the same bytes for every batch size and after an interruption; other inputs refused.

use std::{fs, path::Path};

use medtune::{
    device::DeviceSpec,
    error::Kind,
    models::MODELS,
    plan::Plan,
    progress::Progress,
    run_dir::RunDir,
    sample::{AnswerType, ImageRef, Role, Sample, Split, Turn},
    stage::{
        Ctx,
        choices::{ChoiceAnswer, ChoiceScoring},
        controls::{Control, ControlAnswer},
        encode::base_dir,
        eval,
    },
    text::bpe::train_bpe,
};

fn rows(dir: &Path) -> Vec<Sample> {
    let questions = ["Is there a nodule?", "What do you see in the lower part of this image?", "Where?"];
    let mut rows = Vec::new();
    for i in 0..5u8 {
        let path = dir.join(format!("{i}.png"));
        image::RgbImage::from_fn(64, 64, |x, y| image::Rgb([(x as u8).wrapping_mul(i), y as u8 * 3, 50 * i]))
            .save(&path)
            .unwrap();
        for (k, question) in questions.into_iter().enumerate() {
            rows.push(Sample {
                id: format!("{i}-{k}"),
                images: vec![ImageRef { path: path.clone() }],
                turns: vec![
                    Turn { role: Role::User, text: format!("<image>\n{question}") },
                    Turn { role: Role::Assistant, text: "There is a large nodule in the left lung.".into() },
                ],
                origin: Default::default(),
                split: if i == 0 { Split::Train } else { Split::Test },
                group: format!("image {i}"),
                polarity: None,
                category: None,
                answer_type: None,
                options: Vec::new(),
                annotation: None,
                meta: Default::default(),
            });
        }
    }
    rows
}

fn plan(seed: u64) -> Plan {
    let mut plan = Plan { seed, ..Plan::default() };
    plan.model.checkpoint = None;
    plan.model.preset = "tiny".into();
    plan.generate.max_new_tokens = 10;
    plan
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

/// The answers of the whole stage (prompts, padding, cache, decoding), for a plan and a base with random weights.
fn answered(mut plan: Plan, batch_size: usize, rows: &[Sample], root: &Path) -> (Vec<u8>, Vec<u8>) {
    let ctx = Ctx::new(DeviceSpec::Cpu, Progress::Silent).unwrap();
    let dir = RunDir::open(root.join(format!("{}-{batch_size}", plan.model.name))).unwrap();
    dir.write_jsonl("kept.jsonl", rows).unwrap();
    let tuned = Plan { seed: plan.seed + 1, ..plan.clone() };
    let other = RunDir::open(root.join(format!("{}-{batch_size}-tuned", plan.model.name))).unwrap();
    other.write_jsonl("kept.jsonl", rows).unwrap();
    copy(&base_dir(&tuned, &other).unwrap(), &dir.path("model"));
    plan.generate.batch_size = batch_size;
    eval::run(&plan, &dir, &ctx).unwrap();
    (fs::read(dir.path("answers.jsonl")).unwrap(), fs::read(dir.path("controls.jsonl")).unwrap())
}

#[test]
fn no_family_s_answers_depend_on_the_batch_with_or_without_image_controls() {
    for family in MODELS {
        let temporary = tempfile::tempdir().unwrap();
        let rows = rows(temporary.path());
        let mut plan = plan(1);
        plan.model.name = family.name.into();
        plan.generate.max_new_tokens = 6;
        plan.eval.controls = vec![Control::Blind, Control::Swapped];
        let one = answered(plan.clone(), 1, &rows, temporary.path());
        let five = answered(plan, 5, &rows, temporary.path());
        assert!(one == five, "{}: the batch size changes answers", family.name);
        let controls: Vec<ControlAnswer> =
            String::from_utf8(one.1).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(controls.len(), 12 * 2 * 2, "{}", family.name);
        let answers: Vec<eval::Answer> =
            String::from_utf8(one.0).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert!(answers.iter().any(|a| !a.answer.is_empty()), "{}", family.name);
    }
}

/// Multiple-choice rows of a few options each.
fn choice_rows(dir: &Path) -> Vec<Sample> {
    let options = ["A nodule", "Pleural effusion", "A fracture of the third rib", "Nothing"];
    let mut rows = rows(dir);
    for (i, row) in rows.iter_mut().enumerate() {
        row.options = options[..2 + i % 3].iter().map(|o| (*o).to_string()).collect();
        row.turns[1].text = row.options[i % row.options.len()].clone();
        row.answer_type = Some(AnswerType::Mcq);
    }
    rows.last_mut().unwrap().options.clear();
    rows
}

/// Beside its replies, a model's likelihoods: for every row with options, of either model, whatever the batch and after
/// an interruption; the option is the one that the losses say.
#[test]
fn options_are_scored_by_likelihood_beside_the_reply() {
    let temporary = tempfile::tempdir().unwrap();
    let ctx = Ctx::new(DeviceSpec::Cpu, Progress::Silent).unwrap();
    let rows = choice_rows(temporary.path());
    for family in MODELS {
        let dir = RunDir::open(temporary.path().join(family.name)).unwrap();
        let other = RunDir::open(temporary.path().join(format!("{}-tuned", family.name))).unwrap();
        dir.write_jsonl("kept.jsonl", &rows).unwrap();
        other.write_jsonl("kept.jsonl", &rows).unwrap();
        let mut plan = plan(1);
        plan.model.name = family.name.into();
        plan.generate.max_new_tokens = 4;
        copy(&base_dir(&Plan { seed: 2, ..plan.clone() }, &other).unwrap(), &dir.path("model"));
        eval::run(&plan, &dir, &ctx).unwrap();
        assert!(!dir.path("choices.jsonl").exists(), "nobody asked for them");
        plan.eval.choice = ChoiceScoring::Likelihood;
        plan.generate.batch_size = 3;
        eval::run(&plan, &dir, &ctx).unwrap();
        let first: Vec<ChoiceAnswer> = dir.read_jsonl("choices.jsonl").unwrap();
        let test: Vec<&Sample> = rows.iter().filter(|s| s.split == Split::Test && !s.options.is_empty()).collect();
        assert_eq!(first.len(), 2 * test.len());
        for (choice, row) in first.iter().zip(test.iter().chain(&test)) {
            assert_eq!((&choice.id, choice.losses.len()), (&row.id, row.options.len()));
            assert!(choice.losses.iter().all(|l| *l >= choice.losses[choice.chosen] && *l > 0.0), "{choice:?}");
            assert_eq!(choice.correct, row.right_option() == Some(choice.chosen));
        }
        assert!(first[..test.len()].iter().zip(&first[test.len()..]).any(|(a, b)| a.losses != b.losses), "two models");
        let bytes = fs::read(dir.path("choices.jsonl")).unwrap();
        let cut = bytes.len() * 2 / 3;
        fs::write(dir.path("choices.jsonl"), &bytes[..cut]).unwrap();
        eval::run(&plan, &dir, &ctx).unwrap();
        assert!(fs::read(dir.path("choices.jsonl")).unwrap() == bytes, "an interrupted run ends differently");
        plan.generate.batch_size = 16;
        dir.remove("choices.jsonl").unwrap();
        eval::run(&plan, &dir, &ctx).unwrap();
        let again: Vec<ChoiceAnswer> = dir.read_jsonl("choices.jsonl").unwrap();
        let near =
            |a: &ChoiceAnswer, b: &ChoiceAnswer| a.losses.iter().zip(&b.losses).all(|(a, b)| (a - b).abs() < 1e-4);
        assert!(first.iter().zip(&again).all(|(a, b)| a.chosen == b.chosen && near(a, b)), "{}", family.name);
    }
}

#[test]
fn answers_do_not_depend_on_batches_or_interruptions() {
    let temporary = tempfile::tempdir().unwrap();
    let ctx = Ctx::new(DeviceSpec::Cpu, Progress::Silent).unwrap();
    let rows = rows(temporary.path());
    let dir = RunDir::open(temporary.path().join("run")).unwrap();
    let other = RunDir::open(temporary.path().join("other")).unwrap();
    dir.write_jsonl("kept.jsonl", &rows).unwrap();
    other.write_jsonl("kept.jsonl", &rows).unwrap();

    let untrained = eval::run(&plan(1), &dir, &ctx).unwrap_err();
    assert!(untrained.to_string().contains("no tuned model"), "{untrained}");
    let base_only: Vec<eval::Answer> = dir.read_jsonl("answers.jsonl").unwrap();
    assert_eq!(base_only.len(), 12, "the base model's answers are kept");

    copy(&base_dir(&plan(2), &other).unwrap(), &dir.path("model"));
    let mut first = Vec::new();
    for batch_size in [1, 3, 16] {
        dir.remove("answers.jsonl").unwrap();
        let mut plan = plan(1);
        plan.generate.batch_size = batch_size;
        eval::run(&plan, &dir, &ctx).unwrap();
        let bytes = fs::read(dir.path("answers.jsonl")).unwrap();
        if first.is_empty() {
            first.clone_from(&bytes);
        }
        assert!(bytes == first, "batch size {batch_size} changes the answers");
    }
    let answers: Vec<eval::Answer> = dir.read_jsonl("answers.jsonl").unwrap();
    let ids: Vec<_> = answers.iter().map(|a| a.id.clone()).collect();
    let test: Vec<_> = rows.iter().filter(|s| s.split == Split::Test).map(|s| s.id.clone()).collect();
    assert_eq!(ids, [test.clone(), test].concat());
    assert!(answers[..12] != answers[12..], "two models");

    let text = String::from_utf8(first.clone()).unwrap();
    let mut cut: Vec<&str> = text.split_inclusive('\n').collect();
    cut.reverse();
    let mut partial = cut[..9].concat();
    partial.push_str(&cut[9][..cut[9].len() / 2]);
    fs::write(dir.path("answers.jsonl"), partial).unwrap();
    eval::run(&plan(1), &dir, &ctx).unwrap();
    assert!(fs::read(dir.path("answers.jsonl")).unwrap() == first, "an interrupted run ends differently");

    fs::write(dir.path("model/tokenizer.json"), train_bpe(["quite other words, quite other words"], 500).unwrap())
        .unwrap();
    dir.remove("answers.jsonl").unwrap();
    let refused = eval::run(&plan(1), &dir, &ctx).unwrap_err();
    assert_eq!(refused.kind(), Kind::Checkpoint, "{refused}");
    assert!(refused.to_string().contains("prepares its inputs differently"), "{refused}");
}

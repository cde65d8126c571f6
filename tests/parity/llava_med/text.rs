//! Tokens, prompts, label masks, grouping.

use std::path::{Path, PathBuf};

use medtune::{
    models::llava_med::processor::LlavaMedProcessor,
    sample::Sample,
    text::{
        chat::{self, IMAGE_MARK},
        grouping,
        merge::IMAGE_TOKEN_INDEX,
        tokenizer::Tokenizer,
    },
    vlm::{IGNORE, Processor},
};
use serde_json::{Value, json};

use crate::parity::fixture::{self, Checks};

pub(super) fn check(checks: &mut Checks) {
    let root = fixture::root("llava_med");
    let chat = fixture::json(&root.join("golden/chat.json"));
    for dir in ["checkpoint", "tokenizer_json"] {
        let tokenizer = Tokenizer::load(&root.join(dir)).unwrap();
        tokens(checks, &tokenizer, &fixture::json(&root.join("golden/tokenizer_cases.json")));
        conversations(checks, &tokenizer, &chat, "tiny");
    }
    prompts(checks, &chat);
    processor(checks, &root, &chat);
    groups(checks, &chat["grouping"]);
    if let Some(dir) = full_size() {
        full(checks, &dir, &chat);
        let copy = json_only(&dir);
        full(checks, copy.path(), &chat);
    }
}

fn full(checks: &mut Checks, dir: &Path, chat: &Value) {
    let tokenizer = Tokenizer::load(dir).unwrap();
    tokens(checks, &tokenizer, &fixture::json(&full_size().unwrap().join("cases.json")));
    conversations(checks, &tokenizer, chat, "mistral");
}

/// The real 32k tokenizer beside the fixtures, which is too large to be part of the project.
fn full_size() -> Option<PathBuf> {
    let dir = fixture::root("llava_med").parent()?.join("tokenizers/mistral");
    dir.join("tokenizer.model").is_file().then_some(dir)
}

fn json_only(dir: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    std::fs::copy(dir.join("tokenizer.json"), copy.path().join("tokenizer.json")).unwrap();
    copy
}

fn ids(value: &Value) -> Vec<i32> {
    value.as_array().unwrap().iter().map(|v| v.as_i64().unwrap() as i32).collect()
}

fn strings(value: &Value) -> Vec<&str> {
    value.as_array().unwrap().iter().map(|v| v.as_str().unwrap()).collect()
}

fn tokens(checks: &mut Checks, tokenizer: &Tokenizer, file: &Value) {
    let special = |key: &str| file[key].as_i64().unwrap() as i32;
    let found = (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id());
    checks.equal("special ids", found, (special("unk"), special("bos"), special("eos")));
    if let Some(size) = file["vocab_size"].as_u64() {
        checks.equal("vocabulary", tokenizer.vocab_size() as u64, size);
    }
    let cases = file["cases"].as_array().unwrap();
    assert!(!cases.is_empty(), "no token cases");
    for case in cases {
        let text = case["text"].as_str().unwrap();
        let expected = ids(&case["ids"]);
        let what = |kind: &str| format!("{kind} of {text:?}");
        checks.equal(&what("ids"), tokenizer.encode(text).unwrap(), expected.clone());
        checks.equal(&what("raw ids"), tokenizer.encode_ordinary(text).unwrap(), ids(&case["spm_ids"]));
        checks.equal(&what("text"), tokenizer.decode(&expected, false), case["decoded"].as_str().unwrap().into());
        let plain = case["decoded_skip_special"].as_str().unwrap();
        checks.equal(&what("plain text"), tokenizer.decode(&expected, true), plain.into());
    }
}

/// Training rows and inference prompts.
fn conversations(checks: &mut Checks, tokenizer: &Tokenizer, file: &Value, key: &str) {
    for case in file["train"].as_array().unwrap() {
        let id = case["id"].as_str().unwrap();
        let expected = &case[key];
        let max_length = expected["model_max_length"].as_u64().unwrap() as usize;
        let has_image = case["has_image"].as_bool().unwrap();
        let prompt = case["prompt"].as_str().unwrap();
        let row = chat::label(tokenizer, prompt, has_image, max_length).unwrap();
        let mismatch =
            row.mismatch.map(|(done, total)| format!("WARNING: tokenization mismatch: {done} vs. {total}. (ignored)"));
        checks.equal(&format!("{id} ids"), row.input_ids.clone(), ids(&expected["input_ids"]));
        checks.equal(&format!("{id} labels"), row.labels.clone(), ids(&expected["labels"]));
        checks.equal(&format!("{id} warning"), mismatch.as_deref(), expected["warning"].as_str());
        let supervised: Vec<i32> = row.labels.iter().copied().filter(|l| *l >= 0).collect();
        checks.equal(&format!("{id} supervised"), supervised, ids(&expected["supervised_ids"]));
    }
    for case in file["infer"].as_array().unwrap() {
        let prompt = case["prompt"].as_str().unwrap();
        let found = chat::tokenize_with_images(tokenizer, prompt).unwrap();
        checks.equal(&format!("ids of {prompt:?}"), found.clone(), ids(&case[key]));
        checks.equal("marks", found.contains(&IMAGE_TOKEN_INDEX), case["with_image"].as_bool().unwrap());
    }
}

fn prompts(checks: &mut Checks, file: &Value) {
    for case in file["infer"].as_array().unwrap() {
        let prompt = chat::mistral_instruct("", &strings(&case["messages"]));
        checks.equal("inference prompt", prompt.as_str(), case["prompt"].as_str().unwrap());
    }
    for case in file["train"].as_array().unwrap() {
        let turns = case["conversations"].as_array().unwrap();
        let opening = usize::from(turns[0]["from"] != "human");
        let messages: Vec<String> = turns[opening..]
            .iter()
            .map(|turn| {
                let text = turn["value"].as_str().unwrap();
                if text.contains(IMAGE_MARK) { chat::image_first(text) } else { text.to_string() }
            })
            .collect();
        let prompt = chat::mistral_instruct("", &messages);
        checks.equal("training prompt", prompt.as_str(), case["prompt"].as_str().unwrap());
    }
}

/// The processor gives the original's row where the original loses nothing, and an error where it does.
fn processor(checks: &mut Checks, root: &Path, file: &Value) {
    let processor = LlavaMedProcessor::load(&root.join("checkpoint"), Some(&root.join("vision_tower"))).unwrap();
    let picture = root.join("images").read_dir().unwrap().map(|f| f.unwrap().path()).min().unwrap();
    for case in file["train"].as_array().unwrap() {
        let expected = &case["tiny"];
        let (row, labels) = (ids(&expected["input_ids"]), ids(&expected["labels"]));
        let sample = sample(case, &picture);
        let marks = row.iter().filter(|id| **id == IMAGE_TOKEN_INDEX).count();
        if marks != sample.images.len() || row.len() >= expected["model_max_length"].as_u64().unwrap() as usize {
            // An image or the end of the text got lost in the original.
            continue;
        }
        let found = processor.encode(&sample);
        if ids(&expected["supervised_ids"]).is_empty() {
            checks.equal(&format!("{} refused", sample.id), found.is_err(), true);
            continue;
        }
        let found = found.unwrap();
        let (mut ids, mut found_labels) = (found.input_ids.clone(), found.labels.clone());
        for span in found.spans.iter().rev() {
            ids.splice(span.start..span.start + span.len, [IMAGE_TOKEN_INDEX]);
            found_labels.splice(span.start..span.start + span.len, [IGNORE]);
        }
        checks.equal(&format!("{} row", sample.id), (&ids, &found_labels), (&row, &labels));
        checks.equal(&format!("{} tiles", sample.id), found.pixels.len(), marks);
        let prompt = processor.prompt(&sample).unwrap();
        checks.equal(&format!("{} prompt", sample.id), found.input_ids.starts_with(&prompt.input_ids), true);
    }
}

fn sample(case: &Value, picture: &Path) -> Sample {
    let turns = case["conversations"].as_array().unwrap();
    let role = |turn: &Value| if turn["from"] == "human" { "user" } else { "assistant" };
    let turns: Vec<Value> = turns.iter().map(|t| json!({"role": role(t), "text": t["value"]})).collect();
    let marks: usize = turns.iter().map(|t| t["text"].as_str().unwrap().matches(IMAGE_MARK).count()).sum();
    let images = vec![json!({"path": picture}); marks];
    serde_json::from_value(json!({"id": case["id"], "images": images, "turns": turns})).unwrap()
}

fn groups(checks: &mut Checks, file: &Value) {
    for case in file["cases"].as_array().unwrap() {
        let lengths = case.get("lengths").unwrap_or(&file["lengths"]);
        let lengths: Vec<i64> = lengths.as_array().unwrap().iter().map(|l| l.as_i64().unwrap()).collect();
        let number = |key: &str| case[key].as_u64().unwrap() as usize;
        let indices = |v: &Value| v.as_array().unwrap().iter().map(|i| i.as_u64().unwrap() as usize).collect();
        let mut permutations = case["permutations"].as_array().unwrap().iter();
        let mut draw = |n: usize| -> Vec<usize> {
            let drawn: Vec<usize> = indices(permutations.next().unwrap());
            assert_eq!(drawn.len(), n);
            drawn
        };
        let found = grouping::modality_grouped(&lengths, number("batch_size"), number("world_size"), &mut draw);
        checks.equal("grouping", found, indices(&case["indices"]));
        checks.equal("permutations used", permutations.next().is_none(), true);
    }
}

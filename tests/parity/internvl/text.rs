//! Prompts, label masks, and whole records through the processor.

use std::path::Path;

use medtune::{
    models::internvl::{InternVlConfig, InternVlProcessor},
    sample::Sample,
    text::mpt_chat::{MptChat, expand_images},
    vlm::{Encoded, IGNORE, Processor},
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::files::{self, Tensors, root};
use crate::parity::fixture::Checks;

#[derive(Deserialize)]
struct Prompts {
    template: String,
    system_message: String,
    pad_token_id: i32,
    special_ids: serde_json::Map<String, Value>,
    inference: Vec<Inference>,
    training: Vec<Training>,
}

#[derive(Deserialize)]
struct Inference {
    label: String,
    system_message: Option<String>,
    history: Vec<[String; 2]>,
    question: String,
    num_patches_list: Vec<usize>,
    prompt: String,
    input_ids: Vec<i32>,
    decoded: String,
    decoded_skip_special: String,
}

#[derive(Deserialize)]
struct Training {
    label: String,
    conversations: Vec<Message>,
    num_image_token_list: Vec<usize>,
    text_only: bool,
    num_image: usize,
    model_max_length: usize,
    padding: String,
    input_ids: Vec<i32>,
    labels: Vec<i32>,
    attention_mask: Vec<i32>,
    supervised_text: String,
}

#[derive(Deserialize)]
struct Message {
    from: String,
    value: String,
}

pub(super) fn check(checks: &mut Checks) {
    for (golden, checkpoint) in files::kinds() {
        let prompts: Prompts = files::json(&golden.join("prompts.json"));
        let processor = InternVlProcessor::load(&checkpoint).unwrap();
        let chat = MptChat::named(&prompts.template, None).unwrap();
        checks.equal("system message", chat.system_message.as_str(), prompts.system_message.as_str());
        for (token, id) in &prompts.special_ids {
            let found = processor.tokenizer().token_to_id(token).map(i64::from);
            checks.equal(&format!("id of {token}"), found, id.as_i64());
        }
        let config = InternVlConfig::open(&checkpoint).unwrap();
        for case in &prompts.inference {
            check_inference(case, &chat, &processor, config.tokens_per_tile(), checks);
        }
        for case in &prompts.training {
            check_training(case, &chat, &processor, prompts.pad_token_id, checks);
        }
        check_records(&golden, &processor, checks);
    }
}

fn check_inference(
    case: &Inference,
    chat: &MptChat,
    processor: &InternVlProcessor,
    tokens_per_tile: usize,
    checks: &mut Checks,
) {
    let what = |part: &str| format!("{} prompt {}: {part}", chat.name, case.label);
    let mut chat = chat.clone();
    if let Some(system) = &case.system_message {
        chat.system_message.clone_from(system);
    }
    let messages = case.history.iter().flatten().map(String::as_str).chain([case.question.as_str(), ""]);
    let text = chat.text(messages);
    checks.equal(&what("text"), text.as_str(), case.prompt.as_str());
    let counts: Vec<usize> = case.num_patches_list.iter().map(|n| n * tokens_per_tile).collect();
    let ids = processor.tokenizer().encode(&expand_images(&text, &counts), true);
    checks.equal(&what("ids"), &ids, &case.input_ids);
    let decode = |skip| processor.tokenizer().decode(&case.input_ids, skip);
    checks.equal(&what("decoded"), decode(false), case.decoded.clone());
    checks.equal(&what("decoded without special tokens"), decode(true), case.decoded_skip_special.clone());
}

fn check_training(case: &Training, chat: &MptChat, processor: &InternVlProcessor, pad_id: i32, checks: &mut Checks) {
    let what = |part: &str| format!("{} row {}: {part}", chat.name, case.label);
    let skipped = case.conversations.iter().skip_while(|m| m.from != "human");
    let mut text = chat.text(skipped.map(|m| chat.training_message(&m.value)));
    if !case.text_only {
        text = expand_images(&text, &case.num_image_token_list[..case.num_image]);
    }
    let tokenizer = processor.tokenizer();
    let mut ids = tokenizer.encode(&text, true);
    ids.truncate(case.model_max_length);
    if case.padding == "max_length" {
        let filler = vec![pad_id; case.model_max_length - ids.len()];
        // Which side is a setting of the tokenizer object that the original's chat functions change.
        let left = case.attention_mask[0] == 0;
        ids = if left { [filler, ids].concat() } else { [ids, filler].concat() };
    }
    checks.equal(&what("ids"), &ids, &case.input_ids);
    let labels = chat.labels(&text, &ids, tokenizer, pad_id, case.model_max_length);
    checks.equal(&what("labels"), &labels, &case.labels);
    let mask: Vec<i32> = ids.iter().map(|id| i32::from(*id != pad_id)).collect();
    checks.equal(&what("mask"), &mask, &case.attention_mask);
    let supervised: Vec<i32> = labels.into_iter().filter(|l| *l != IGNORE).collect();
    checks.equal(&what("supervised text"), tokenizer.decode(&supervised, false), case.supervised_text.clone());
}

/// A record of the fixture as a sample; an image outside its first turn is not marked by the original either.
pub(super) fn sample(record: &Value) -> Sample {
    let images = match &record["image"] {
        Value::String(name) => vec![name.clone()],
        Value::Array(names) => names.iter().map(|n| n.as_str().unwrap().to_string()).collect(),
        _ => Vec::new(),
    };
    let mut turns: Vec<Value> = Vec::new();
    for message in record["conversations"].as_array().unwrap() {
        let role = if message["from"] == "human" { "user" } else { "assistant" };
        turns.push(json!({"role": role, "text": message["value"]}));
    }
    let marked = turns.iter().any(|t| t["text"].as_str().unwrap().contains("<image>"));
    if images.len() == 1 && !marked {
        let text = format!("<image>\n{}", turns[0]["text"].as_str().unwrap());
        turns[0]["text"] = text.into();
    }
    let images: Vec<Value> = images.iter().map(|n| json!({"path": root().join("images").join(n)})).collect();
    serde_json::from_value(json!({"id": record["id"], "images": images, "turns": turns})).unwrap()
}

/// The records of `samples.json`, encoded.
pub(super) fn records(golden: &Path, processor: InternVlProcessor) -> Vec<Encoded> {
    let samples: Value = files::json(&golden.join("samples.json"));
    let processor = processor.with_max_tiles(samples["max_dynamic_patch"].as_u64().unwrap() as usize);
    samples["records"].as_array().unwrap().iter().map(|r| processor.encode(&sample(r)).unwrap()).collect()
}

fn check_records(golden: &Path, processor: &InternVlProcessor, checks: &mut Checks) {
    let samples: Value = files::json(&golden.join("samples.json"));
    let expected = Tensors::open(&golden.join("samples.safetensors"));
    let tiles = Tensors::open(&root().join("golden/samples_tiles.safetensors"));
    let context = samples["image_token_id"].as_i64().unwrap() as i32;
    let (all, per_sample) = (tiles.bytes("tiles_u8"), tiles.ints("tiles_per_sample"));
    let [_, height, width, _] = tiles.shape("tiles_u8")[..] else { panic!("tiles have four dimensions") };
    let processor = InternVlProcessor::new(processor.tokenizer().clone(), processor.config().clone()).unwrap();
    let pad_id = processor.pad_id();
    let mut offset = 0;
    for (i, row) in records(golden, processor).iter().enumerate() {
        let what = |part: &str| format!("{} record {}: {part}", golden.display(), row.id);
        let ids: Vec<i32> = expected
            .ints(&format!("{}.input_ids", row.id))
            .into_iter()
            .map(|id| if id == context { pad_id } else { id })
            .collect();
        checks.equal(&what("ids"), &row.input_ids, &ids);
        checks.equal(&what("labels"), &row.labels, &expected.ints(&format!("{}.labels", row.id)));
        let flags = expected.ints(&format!("{}.image_flags", row.id));
        let used = flags.iter().filter(|f| **f == 1).count();
        checks.equal(&what("tiles"), row.pixels.len(), used);
        let bytes = height * width * 3;
        for (k, pixels) in row.pixels.iter().enumerate() {
            let tile = &all[(offset + k) * bytes..][..bytes];
            let image = medtune::image::Rgb8 { width, height, data: tile.to_vec() };
            checks.close(&what("pixels"), &pixels.data, &normalized(&image), 1e-6);
        }
        offset += per_sample[i] as usize;
    }
}

/// The constants of the original's transform.
pub(super) fn normalized(image: &medtune::image::Rgb8) -> Vec<f32> {
    medtune::image::pad::normalize(image, 1.0 / 255.0, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
}

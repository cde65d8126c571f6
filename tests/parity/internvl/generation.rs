//! Prompts, greedy and beam search, chat with several images.

use std::path::Path;

use burn::tensor::Device;
use medtune::{
    generate::{GenerateConfig, Session, argmax, beam_search, generate, penalise_repeats},
    models::{
        AnyVlm, Compat,
        internvl::{InternVlProcessor, weights::load_dir},
    },
    vlm::{Encoded, Processor},
};
use serde_json::{Map, Value, json};

use super::files::{self, Tensors, root};
use crate::parity::fixture::{self, Checks};

const LOGITS: f32 = 5e-4;
const SCORES: f32 = 1e-4;

pub(super) fn check(checks: &mut Checks) {
    let device = fixture::device();
    for (golden, checkpoint) in files::kinds() {
        let description: Map<String, Value> = files::json(&golden.join("generate.json"));
        let model = load_dir(&checkpoint, &Default::default(), &device).unwrap();
        let fixture = Fixture {
            kind: golden.display().to_string(),
            processor: InternVlProcessor::load(&checkpoint).unwrap(),
            plain: AnyVlm::InternVl(model.clone()),
            mixed: AnyVlm::InternVl(model.with_compat(Compat { mixed_rotations: true, ..Compat::default() })),
            tensors: Tensors::open(&golden.join("generate.safetensors")),
            context: context_id(&golden),
            device: device.clone(),
        };
        let stop = description["eos_token_id"].as_i64().unwrap() as i32;
        checks.equal("stop id", fixture.processor.stop_ids(), &[stop]);
        checks.equal("pad id", i64::from(fixture.processor.pad_id()), description["pad_token_id"].as_i64().unwrap());
        for (name, case) in description["cases"].as_object().unwrap() {
            fixture.case(name, case, checks);
        }
        // The other entries are conversations that the original's chat() carried on.
        let chats = description.iter().filter(|(_, v)| v.get("turns").is_some());
        for (name, chat) in chats {
            fixture.chat(name, chat, checks);
        }
    }
}

fn context_id(golden: &Path) -> i32 {
    let samples: Value = files::json(&golden.join("samples.json"));
    samples["image_token_id"].as_i64().unwrap() as i32
}

struct Fixture {
    kind: String,
    processor: InternVlProcessor,
    /// As it is used.
    plain: AnyVlm,
    /// With the quirk of the original's rotations.
    mixed: AnyVlm,
    tensors: Tensors,
    context: i32,
    device: Device,
}

fn ids(value: &Value) -> Vec<Vec<i32>> {
    serde_json::from_value(value.clone()).unwrap()
}

fn images(names: &[&str]) -> Vec<Value> {
    names.iter().map(|n| json!({"path": root().join("images").join(n)})).collect()
}

impl Fixture {
    fn with_tiles(&self, tiles: usize) -> InternVlProcessor {
        InternVlProcessor::new(self.processor.tokenizer().clone(), self.processor.config().clone())
            .unwrap()
            .with_max_tiles(tiles)
    }

    fn rows(&self, case: &Value) -> Vec<Encoded> {
        let processor = self.with_tiles(case["max_dynamic_patch"].as_u64().unwrap() as usize);
        let questions = case["questions"].as_array().unwrap().iter().zip(case["images"].as_array().unwrap());
        questions
            .enumerate()
            .map(|(i, (question, image))| {
                let names: Vec<&str> = image.as_str().into_iter().collect();
                let mark = "<image>\n".repeat(names.len());
                let sample = json!({
                    "id": i.to_string(),
                    "images": images(&names),
                    "turns": [
                        {"role": "system", "text": case["system_message"]},
                        {"role": "user", "text": format!("{mark}{}", question.as_str().unwrap())},
                    ],
                });
                processor.prompt(&serde_json::from_value(sample).unwrap()).unwrap()
            })
            .collect()
    }

    fn case(&self, name: &str, case: &Value, checks: &mut Checks) {
        let what = |part: &str| format!("{} {name}: {part}", self.kind);
        let rows = self.rows(case);
        let (expected, mask) = (ids(&case["input_ids"]), ids(&case["attention_mask"]));
        for (i, row) in rows.iter().enumerate() {
            let real = expected[i].iter().zip(&mask[i]).filter(|(_, m)| **m == 1).map(|(id, _)| *id);
            let real: Vec<i32> = real.map(|id| if id == self.context { self.processor.pad_id() } else { id }).collect();
            checks.equal(&what("prompt"), &row.input_ids, &real);
            checks.equal(&what("tiles"), row.pixels.len() as u64, case["tiles"][i].as_u64().unwrap());
        }
        let settings = &case["generate_kwargs"];
        let stop = settings["eos_token_id"].as_i64().unwrap() as i32;
        if settings["num_beams"].as_u64().unwrap() > 1 {
            self.beams(name, case, &rows, stop, checks);
        } else {
            self.greedy(name, case, &rows, stop, checks);
        }
        for (text, ids) in case["text"].as_array().unwrap().iter().zip(ids(&case["output_ids"])) {
            checks.equal(&what("text"), self.processor.decode(&ids).as_str(), text.as_str().unwrap());
        }
    }

    fn greedy(&self, name: &str, case: &Value, rows: &[Encoded], stop: i32, checks: &mut Checks) {
        let what = |part: &str| format!("{} {name}: {part}", self.kind);
        let settings = &case["generate_kwargs"];
        let filler = settings["pad_token_id"].as_i64().unwrap() as i32;
        let penalty = settings["repetition_penalty"].as_f64();
        let max_new_tokens = settings["max_new_tokens"].as_u64().unwrap() as usize;
        let expected = ids(&case["output_ids"]);
        self.steps(name, rows, &expected, penalty, checks);
        if penalty.is_some() {
            return;
        }
        let runs = [(&self.mixed, "output_ids"), (&self.plain, "output_ids_no_cache")];
        for (model, key) in runs {
            if case[key].is_null() {
                continue;
            }
            for batch_size in [rows.len(), 1] {
                let config = GenerateConfig { batch_size, max_new_tokens, ..GenerateConfig::default() };
                let found = generate(model, rows, 0, &[stop], &config, 0, &self.device, &mut |_, _| {}).unwrap();
                for (mut found, expected) in found.into_iter().zip(ids(&case[key])) {
                    found.resize(expected.len(), filler);
                    checks.equal(&what(&format!("{key}, {batch_size} at once")), found, expected);
                }
            }
        }
    }

    /// Scores of each step with the quirk, after the expected tokens.
    fn steps(&self, name: &str, rows: &[Encoded], expected: &[Vec<i32>], penalty: Option<f64>, checks: &mut Checks) {
        let what = |part: &str| format!("{} {name}: {part}", self.kind);
        let count = expected[0].len();
        let bos = self.processor.tokenizer().bos_id().unwrap();
        let (mut session, mut logits) = Session::start(&self.mixed, rows, 0, count, &self.device).unwrap();
        for step in 0..count {
            for (row, logits) in logits.iter_mut().enumerate() {
                if let Some(penalty) = penalty {
                    // The original's generate() sees a beginning mark and its own tokens, never the prompt.
                    let seen = std::iter::once(bos).chain(expected[row][..step].iter().copied());
                    penalise_repeats(logits, seen, penalty);
                    let best = argmax(logits);
                    checks.equal(&what("penalised token"), best as i32, expected[row][step]);
                }
                self.compare_step(name, row, step, logits, &what("scores"), checks);
            }
            let tokens: Vec<i32> = expected.iter().map(|row| row[step]).collect();
            logits = session.step(&tokens).unwrap();
        }
    }

    fn compare_step(&self, name: &str, row: usize, step: usize, logits: &[f32], what: &str, checks: &mut Checks) {
        let at = |key: &str| {
            let shape = self.tensors.shape(key);
            let start = (row * shape[1] + step) * shape[2];
            start..start + shape[2]
        };
        let key = format!("{name}.step_logits");
        if self.tensors.has(&key) {
            checks.close(what, logits, &self.tensors.f32(&key)[at(&key)], LOGITS);
        }
        let key = format!("{name}.step_top5_values");
        if self.tensors.has(&key) {
            let ids = format!("{name}.step_top5_ids");
            let ids = self.tensors.ints(&ids)[at(&ids)].to_vec();
            let found: Vec<f32> = ids.iter().map(|id| logits[*id as usize]).collect();
            checks.close(what, &found, &self.tensors.f32(&key)[at(&key)], LOGITS);
        }
    }

    fn beams(&self, name: &str, case: &Value, rows: &[Encoded], stop: i32, checks: &mut Checks) {
        let what = |part: &str| format!("{} {name}: {part}", self.kind);
        let settings = &case["generate_kwargs"];
        let filler = settings["pad_token_id"].as_i64().unwrap() as i32;
        let config = GenerateConfig {
            num_beams: settings["num_beams"].as_u64().unwrap() as usize,
            max_new_tokens: settings["max_new_tokens"].as_u64().unwrap() as usize,
            ..GenerateConfig::default()
        };
        let (mut session, logits) = Session::start(&self.mixed, rows, 0, config.max_new_tokens, &self.device).unwrap();
        let found = beam_search(&mut session, &logits[0], &[stop], &config).unwrap();
        let expected = ids(&case["output_ids"]);
        for (found, expected) in found.iter().zip(&expected) {
            let mut found = found.ids.clone();
            found.resize(expected.len(), filler);
            checks.equal(&what("beam"), &found, expected);
        }
        checks.equal(&what("beams"), found.len() >= expected.len(), true);
        let scores: Vec<f32> = found.iter().take(expected.len()).map(|h| h.score as f32).collect();
        checks.close(&what("scores"), &scores, &self.tensors.f32(&format!("{name}.sequences_scores")), SCORES);
    }

    /// A conversation about several images, each answer becoming part of the next prompt.
    fn chat(&self, name: &str, chat: &Value, checks: &mut Checks) {
        let what = |part: &str| format!("{} {name}: {part}", self.kind);
        let names: Vec<&str> = chat["images"].as_array().unwrap().iter().map(|n| n.as_str().unwrap()).collect();
        let each = chat["max_dynamic_patch_each"].as_u64().unwrap() as usize;
        let processor = self.with_tiles(each * names.len());
        let config = GenerateConfig {
            max_new_tokens: chat["max_new_tokens"].as_u64().unwrap() as usize,
            ..GenerateConfig::default()
        };
        let mut turns: Vec<Value> = Vec::new();
        for turn in chat["turns"].as_array().unwrap() {
            turns.push(json!({"role": "user", "text": turn["question"]}));
            let sample = json!({"id": name, "images": images(&names), "turns": turns});
            let row = processor.prompt(&serde_json::from_value(sample).unwrap()).unwrap();
            let tokens = processor.config().tokens_per_tile();
            let tiles: Vec<usize> = row.spans.iter().map(|s| s.len / tokens).collect();
            checks.equal(&what("tiles"), json!(tiles), chat["num_patches_list"].clone());
            let stop = processor.stop_ids();
            let found = generate(&self.mixed, &[row], 0, stop, &config, 0, &self.device, &mut |_, _| {}).unwrap();
            let answer = processor.decode(&found[0]);
            checks.equal(&what("answer"), answer.as_str(), turn["response"].as_str().unwrap());
            turns.push(json!({"role": "assistant", "text": turn["response"]}));
        }
    }
}

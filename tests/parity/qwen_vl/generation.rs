//! Greedy and beam search with a cache, processed distributions, chat replies.

use burn::tensor::Device;
use medtune::{
    generate::{GenerateConfig, Session, beam_search, generate, penalise_repeats, process_logits, softmax},
    models::{
        AnyVlm, Compat,
        qwen_vl::{QwenVl, config::generation},
    },
    text::chatml,
    vlm::{Batch, Encoded, IGNORE, ImageSpan, Processor},
};
use serde_json::Value;

use super::{
    Family,
    forward::{LOGITS, batch, logits, overridden},
    text::{ints, list, text},
};
use crate::parity::fixture::{self, Checks, Tensors, json};

const SCORES: f32 = 1e-4;
const PROBABILITIES: f32 = 1e-6;

pub(super) fn check(checks: &mut Checks) {
    let family = Family::open();
    let device = fixture::device();
    let cases = Cases {
        model: family.model(&device),
        tensors: Tensors::open(&family.golden("generate.safetensors")),
        family,
        device,
    };
    let golden = json(&cases.family.golden("generate.json"));
    list(&golden["generate"]).iter().for_each(|case| cases.generate(checks, case));
    list(&golden["chat"]).iter().for_each(|case| cases.chat(checks, case));
    list(&golden["processed"]).iter().for_each(|case| cases.processed(checks, case));
    cases.stop_words(checks, &golden["stop_words"]);
    let release = generation(&cases.family.root.join("checkpoint")).unwrap();
    let stated = list(&golden["processed"]).iter().find(|c| c["name"] == "release").expect("the released settings");
    checks.equal(
        "released settings",
        (release.top_k, release.top_p),
        settings(&stated["settings"], |c| (c.top_k, c.top_p)),
    );
    checks.equal("released settings sample", release.temperature, 1.0);
}

/// `generate` keyword arguments; sampling at temperature 1 unless another is given.
fn settings<T>(kwargs: &Value, pick: impl Fn(&GenerateConfig) -> T) -> T {
    let number = |key: &str, default: f64| kwargs[key].as_f64().unwrap_or(default);
    pick(&GenerateConfig {
        temperature: number("temperature", 1.0),
        top_k: number("top_k", 0.0) as usize,
        top_p: number("top_p", 1.0),
        repetition_penalty: number("repetition_penalty", 1.0),
        num_beams: number("num_beams", 1.0) as usize,
        length_penalty: number("length_penalty", 1.0),
        ..GenerateConfig::default()
    })
}

struct Cases {
    family: Family,
    device: Device,
    model: QwenVl,
    tensors: Tensors,
}

impl Cases {
    fn batch(&self, name: &str) -> Batch {
        let ids = format!("{name}.input_ids");
        let mask = format!("{name}.attention_mask");
        let mask = self.tensors.has(&mask).then(|| self.tensors.ints(&mask));
        batch(&self.family, self.tensors.shape(&ids)[0], self.tensors.ints(&ids), mask)
    }

    /// The rows of a batch without their padding.
    fn rows(&self, batch: &Batch) -> Vec<Encoded> {
        let span = self.family.processor.tokens_per_image();
        let mut pixels = batch.pixels.iter();
        (0..batch.rows)
            .map(|row| {
                let cells = (0..batch.length).filter(|c| batch.mask[row * batch.length + c]);
                let input_ids: Vec<i32> = cells.map(|c| batch.input_ids[row * batch.length + c]).collect();
                let start = self.family.processor.tokenizer().img_start;
                let marks = input_ids.iter().enumerate().filter(|(_, id)| **id == start);
                let spans: Vec<ImageSpan> = marks.map(|(i, _)| ImageSpan { start: i + 1, len: span }).collect();
                Encoded {
                    id: row.to_string(),
                    labels: vec![IGNORE; input_ids.len()],
                    pixels: spans.iter().map(|_| pixels.next().unwrap().clone()).collect(),
                    spans,
                    input_ids,
                }
            })
            .collect()
    }

    fn generate(&self, checks: &mut Checks, case: &Value) {
        let name = text(&case["id"]);
        let config = overridden(&self.family.config, &case["config_override"]);
        let batch = self.batch(name);
        checks.equal(name, Some(batch.length as u64), case["prompt_len"].as_u64());
        checks.equal(name, Some(config.ntk_alpha(batch.length)), case["ntk_alpha"].as_f64());
        let rows = self.rows(&batch);
        let new = case["max_new_tokens"].as_u64().unwrap() as usize;
        let run = settings(&case["kwargs"], |c| GenerateConfig {
            temperature: 0.0,
            max_new_tokens: new,
            batch_size: rows.len(),
            ..c.clone()
        });
        for padded_columns in [true, false] {
            let compat = Compat { padded_columns, ..Compat::default() };
            let model = self.model.clone().with_config(config.clone()).with_compat(compat);
            if run.num_beams > 1 {
                self.beams(checks, name, &AnyVlm::QwenVl(model), &rows, &run);
            } else {
                self.greedy(checks, case, &AnyVlm::QwenVl(model.clone()), &rows, &run);
                self.uncached(checks, name, &model);
            }
        }
    }

    fn greedy(&self, checks: &mut Checks, case: &Value, model: &AnyVlm, rows: &[Encoded], run: &GenerateConfig) {
        let name = text(&case["id"]);
        let eod = self.family.processor.tokenizer().eod;
        let expected: Vec<Vec<i32>> = list(&case["new_tokens"]).iter().map(ints).collect();
        let found = generate(model, rows, eod, &[eod], run, 0, &self.device, &mut |_, _| {}).unwrap();
        checks.equal(&format!("{name} tokens"), &found, &expected);
        let length = self.tensors.shape(&format!("{name}.sequences"))[1];
        let sequences = self.tensors.ints(&format!("{name}.sequences"));
        for (found, sequence) in found.iter().zip(sequences.chunks(length)) {
            checks.equal(&format!("{name} sequences"), &found[..], &sequence[length - found.len()..]);
        }
        let steps: Vec<usize> = ints(&case["scored_steps"]).into_iter().map(|s| s as usize).collect();
        let (scores, top2) = (format!("{name}.scores_at_steps"), format!("{name}.top2"));
        let (scores, top2) = (self.tensors.f32(&scores), self.tensors.f32(&top2));
        let (mut session, mut logits) = Session::start(model, rows, eod, run.max_new_tokens, &self.device).unwrap();
        for step in 0..run.max_new_tokens {
            for (row, logits) in logits.iter_mut().enumerate() {
                let seen = rows[row].input_ids.iter().chain(&expected[row][..step]).copied();
                penalise_repeats(logits, seen, run.repetition_penalty);
                let mut sorted = logits.clone();
                sorted.sort_by(|a, b| b.total_cmp(a));
                let best = &top2[(row * run.max_new_tokens + step) * 2..][..2];
                checks.close(&format!("{name} best of step {step}"), &sorted[..2], best, LOGITS);
                if let Some(at) = steps.iter().position(|s| *s == step) {
                    let golden = &scores[(row * steps.len() + at) * logits.len()..][..logits.len()];
                    checks.close(&format!("{name} scores of step {step}"), logits, golden, LOGITS);
                }
            }
            let tokens: Vec<i32> = expected.iter().map(|row| row[step]).collect();
            logits = session.step(&tokens).unwrap();
        }
    }

    /// The last step computed without a cache, where the rotary base follows the longer input.
    fn uncached(&self, checks: &mut Checks, name: &str, model: &QwenVl) {
        let golden = format!("{name}.no_cache_last_logits");
        if !self.tensors.has(&golden) {
            return;
        }
        let length = self.tensors.shape(&format!("{name}.sequences"))[1];
        let ids = self.tensors.ints(&format!("{name}.sequences"))[..length - 1].to_vec();
        let all = logits(model, &batch(&self.family, 1, ids, None), &self.device);
        let last = &all[all.len() - model.config().vocab_size..];
        checks.close(&golden, last, &self.tensors.f32(&golden), LOGITS);
    }

    fn beams(&self, checks: &mut Checks, name: &str, model: &AnyVlm, rows: &[Encoded], run: &GenerateConfig) {
        let eod = self.family.processor.tokenizer().eod;
        let (mut session, logits) = Session::start(model, rows, eod, run.max_new_tokens, &self.device).unwrap();
        let found = beam_search(&mut session, &logits[0], &[eod], run).unwrap();
        let length = self.tensors.shape(&format!("{name}.sequences"))[1];
        let sequences = self.tensors.ints(&format!("{name}.sequences"));
        for (found, sequence) in found.iter().zip(sequences.chunks(length)) {
            let mut ids = found.ids.clone();
            ids.resize(run.max_new_tokens, eod);
            checks.equal(&format!("{name} sequence"), &ids[..], &sequence[length - ids.len()..]);
        }
        let scores: Vec<f32> = found.iter().map(|h| h.score as f32).collect();
        let golden = format!("{name}.sequences_scores");
        checks.close(&golden, &scores, &self.tensors.f32(&golden), SCORES);
    }

    /// The original loses the last token of a reply that ends by length; here it is left out on purpose.
    fn chat(&self, checks: &mut Checks, case: &Value) {
        let processor = &self.family.processor;
        let history: Vec<(String, Option<String>)> = case["history"]
            .as_array()
            .unwrap()
            .iter()
            .map(|turn| (text(&turn[0]).into(), turn[1].as_str().map(String::from)))
            .collect();
        let query = text(&case["query"]);
        let prompt = chatml::prompt(processor.tokenizer(), chatml::DEFAULT_SYSTEM, &history, query, 6144).unwrap();
        let rows = self.rows(&batch(&self.family, 1, prompt.ids, None));
        let run = GenerateConfig {
            max_new_tokens: case["max_new_tokens"].as_u64().unwrap() as usize,
            ..GenerateConfig::default()
        };
        let model = AnyVlm::QwenVl(self.model.clone());
        let (stop, pad) = (processor.stop_ids(), processor.pad_id());
        let mut found = generate(&model, &rows, pad, stop, &run, 0, &self.device, &mut |_, _| {}).unwrap();
        let mut ids = found.remove(0);
        if !ids.last().is_some_and(|id| stop.contains(id)) {
            ids.pop();
        }
        checks.equal(query, processor.decode(&ids).as_str(), text(&case["response"]));
    }

    /// Where the original replaces what follows a marker by the end of text, generation stops at the marker.
    fn stop_words(&self, checks: &mut Checks, case: &Value) {
        let processor = &self.family.processor;
        let (prompt, sequence) = (ints(&case["prompt_ids"]), ints(&case["sequence"]));
        let (forced, step) = (case["forced_token"].as_i64().unwrap() as i32, case["forced_at_step"].as_u64().unwrap());
        checks.equal("forced token", sequence[prompt.len() + step as usize], forced);
        checks.equal("a marker ends an answer", processor.stop_ids().contains(&forced), true);
        checks.equal("the end of text follows", sequence[prompt.len() + step as usize + 1], processor.pad_id());
        checks.equal("decoded", processor.decode(&sequence[prompt.len()..]).as_str(), text(&case["decoded"]));
    }

    fn processed(&self, checks: &mut Checks, case: &Value) {
        let name = text(&case["name"]);
        let raw = self.tensors.f32("processed.raw_logits");
        let batch = self.batch("processed");
        let all = logits(&self.model, &batch, &self.device);
        checks.close("processed.raw_logits", &all[all.len() - raw.len()..], &raw, LOGITS);
        let config = settings(&case["settings"], Clone::clone);
        let mut scores = raw;
        penalise_repeats(&mut scores, batch.input_ids.iter().copied(), config.repetition_penalty);
        let found: Vec<f32> = softmax(&process_logits(&scores, &config)).into_iter().map(|p| p as f32).collect();
        let kept = found.iter().filter(|p| **p > 0.0).count();
        checks.equal(&format!("{name} kept"), Some(kept as u64), case["kept"].as_u64());
        let golden = format!("processed.{name}.probs");
        checks.close(&golden, &found, &self.tensors.f32(&golden), PROBABILITIES);
    }
}

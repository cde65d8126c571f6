//! Greedy, beam search, sampling distributions.

use burn::tensor::Device;
use medtune::{
    generate::{GenerateConfig, Session, beam_search, generate, process_logits, softmax},
    models::AnyVlm,
    vlm::{Encoded, IGNORE, ImageSpan, Pixels},
};
use serde_json::Value;

use super::forward::Fixture;
use crate::parity::fixture::{self, Checks, Tensors, json, root};

const LOGITS: f32 = 5e-4;
const SCORES: f32 = 1e-4;
const PROBABILITIES: f32 = 1e-5;

pub(super) fn check(checks: &mut Checks) {
    let root = root("llava_med");
    let golden = root.join("golden");
    let device = fixture::device();
    let fixture = Fixture::open(&root, &device);
    let case = Cases {
        tensors: Tensors::open(&golden.join("generation.safetensors")),
        stop: json(&root.join("checkpoint/generation_config.json"))["eos_token_id"].as_i64().unwrap() as i32,
        model: AnyVlm::LlavaMed(fixture.model.clone()),
        fixture,
        device,
    };
    let cases = json(&golden.join("generation.json"));
    for (name, description) in cases.as_object().unwrap() {
        if name.starts_with("greedy_") {
            case.greedy(checks, name, description);
        } else if name.starts_with("beam") {
            case.beams(checks, name, description);
        } else if name.starts_with("sampling.") {
            case.sampling(checks, name, description);
        } else {
            assert!(name.starts_with("quirk_"), "unknown case {name}");
        }
    }
}

struct Cases {
    tensors: Tensors,
    stop: i32,
    model: AnyVlm,
    fixture: Fixture,
    device: Device,
}

impl Cases {
    /// Name of the prompt or batch that a case starts from: the longest one that its own name contains; a case that is
    /// named after what it does starts from the first.
    fn subject(&self, name: &str) -> String {
        let known = self.fixture.subjects();
        let contained = known.iter().filter(|k| name.contains(k.as_str())).max_by_key(|k| k.len());
        contained.unwrap_or(&known[0]).clone()
    }

    /// Prompts of a case. Which image a prompt outside the merge cases was asked about is not recorded: it is the one
    /// that gives the recorded logits of the first step.
    fn rows(&self, name: &str) -> Vec<Encoded> {
        let subject = self.subject(name);
        let steps = format!("{name}.step_logits");
        if self.fixture.description["merge"].get(&subject).is_some() || !self.tensors.has(&steps) {
            return self.fixture.encoded(&subject, 0);
        }
        let golden = self.tensors.f32(&steps);
        let images = self.fixture.description["images"].as_array().unwrap().len();
        let distance = |rows: &Vec<Encoded>| {
            let (_, logits) = Session::start(&self.model, rows, 0, 1, &self.device).unwrap();
            logits[0].iter().zip(&golden).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max)
        };
        let candidates = (0..images).map(|first| self.fixture.encoded(&subject, first));
        candidates.min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap()
    }

    fn stop(&self, description: &Value) -> i32 {
        description["eos_token_id"].as_i64().map_or(self.stop, |v| v as i32)
    }

    fn greedy(&self, checks: &mut Checks, name: &str, description: &Value) {
        let rows = self.rows(name);
        let expected: Vec<Vec<i32>> = serde_json::from_value(description["new_token_ids"].clone()).unwrap();
        let stop = self.stop(description);
        let steps = self.tensors.shape(&format!("{name}.sequences"))[1] - 1;
        let sequence = self.tensors.ints(&format!("{name}.sequences"));
        // where every row met its stop id, a longer limit must change nothing
        let stopped = expected.iter().all(|row| row.contains(&stop));
        let max_new_tokens = steps + 3 * usize::from(stopped);
        let filler = description["pad_token_id"].as_i64().map_or(stop, |v| v as i32);
        for batch_size in [rows.len(), 1] {
            let config = GenerateConfig { batch_size, max_new_tokens, ..GenerateConfig::default() };
            let mut done = vec![0; rows.len()];
            let mut on_done = |i: usize, ids: &[i32]| done[i] = ids.len();
            let found = generate(&self.model, &rows, 0, &[stop], &config, 0, &self.device, &mut on_done).unwrap();
            checks.equal(&format!("{name}: rows reported"), done, found.iter().map(Vec::len).collect());
            for (i, mut ids) in found.into_iter().enumerate() {
                ids.resize(expected[i].len(), filler);
                checks.equal(&format!("{name} row {i}, {batch_size} at once"), &ids, &expected[i]);
                // the first column is a token that the model never saw
                checks.equal(&format!("{name}.sequences row {i}"), &ids[..], &sequence[i * (steps + 1) + 1..][..steps]);
            }
        }
        if self.tensors.has(&format!("{name}.step_logits")) {
            self.step_logits(checks, name, &rows, &expected);
        }
    }

    fn step_logits(&self, checks: &mut Checks, name: &str, rows: &[Encoded], expected: &[Vec<i32>]) {
        let name = format!("{name}.step_logits");
        let shape = self.tensors.shape(&name);
        let golden = self.tensors.f32(&name);
        let (mut session, mut logits) = Session::start(&self.model, rows, 0, shape[1], &self.device).unwrap();
        for step in 0..shape[1] {
            for (row, logits) in logits.iter().enumerate() {
                let start = (row * shape[1] + step) * shape[2];
                checks.close(&format!("{name} {step}"), logits, &golden[start..start + shape[2]], LOGITS);
            }
            let tokens: Vec<i32> = expected.iter().map(|row| row[step]).collect();
            logits = session.step(&tokens).unwrap();
        }
    }

    fn beams(&self, checks: &mut Checks, name: &str, description: &Value) {
        let rows = self.rows(name);
        let columns = self.tensors.shape(&format!("{name}.sequences"))[1];
        let stop = self.stop(description);
        let config = GenerateConfig {
            num_beams: description["num_beams"].as_u64().unwrap() as usize,
            length_penalty: description["length_penalty"].as_f64().unwrap_or(1.0),
            max_new_tokens: description["max_new_tokens"].as_u64().map_or(columns - 1, |v| v as usize),
            ..GenerateConfig::default()
        };
        let (mut session, logits) = Session::start(&self.model, &rows, 0, config.max_new_tokens, &self.device).unwrap();
        let found = beam_search(&mut session, &logits[0], &[stop], &config).unwrap();
        let sequences = self.tensors.ints(&format!("{name}.sequences"));
        let filler = description["pad_token_id"].as_i64().map_or(stop, |v| v as i32);
        for (i, hypothesis) in found.iter().enumerate() {
            let mut ids = hypothesis.ids.clone();
            ids.resize(columns - 1, filler);
            checks.equal(&format!("{name}.sequences {i}"), &ids[..], &sequences[i * columns + 1..(i + 1) * columns]);
        }
        let (scores, golden) = (format!("{name}.sequences_scores"), found.iter().map(|h| h.score as f32));
        checks.close(&scores, &golden.collect::<Vec<_>>(), &self.tensors.f32(&scores), SCORES);
        let answer = generate(&self.model, &rows, 0, &[stop], &config, 0, &self.device, &mut |_, _| {}).unwrap();
        checks.equal(&format!("{name}: best answer"), &answer[0], &found[0].ids);
    }

    fn sampling(&self, checks: &mut Checks, name: &str, description: &Value) {
        let config = GenerateConfig {
            temperature: description["temperature"].as_f64().unwrap(),
            top_k: description["top_k"].as_u64().unwrap_or(0) as usize,
            top_p: description["top_p"].as_f64().unwrap_or(1.0),
            ..GenerateConfig::default()
        };
        let processed = process_logits(&self.tensors.f32("sampling.logits"), &config);
        let kept = processed.iter().filter(|l| l.is_finite()).count();
        checks.equal(&format!("{name}: tokens kept"), kept as u64, description["kept"].as_u64().unwrap());
        let expected = self.tensors.f32(&format!("{name}.processed_logits"));
        checks.close(&format!("{name}.processed_logits"), &processed, &expected, SCORES);
        let probabilities: Vec<f32> = softmax(&processed).into_iter().map(|p| p as f32).collect();
        let expected = self.tensors.f32(&format!("{name}.probs"));
        checks.close(&format!("{name}.probs"), &probabilities, &expected, PROBABILITIES);
    }
}

impl Fixture {
    /// Names of prompts and batches.
    fn subjects(&self) -> Vec<String> {
        let names = |part: &str| self.description[part].as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        [names("prompts"), names("merge")].concat()
    }

    /// The rows of a prompt or batch as a processor would give them; a prompt takes images from `first` on.
    fn encoded(&self, subject: &str, first: usize) -> Vec<Encoded> {
        let (merged, _) = self.inputs(subject);
        let images: Vec<Value> = match self.description["merge"].get(subject) {
            Some(case) => case["images"].as_array().unwrap().clone(),
            None => (first..first + merged.feature_rows.len()).map(Value::from).collect(),
        };
        let patches = self.vision.shape("selected")[1];
        let row = |row: usize| {
            let cells = row * merged.length..(row + 1) * merged.length;
            let start = cells.clone().find(|c| merged.valid[*c]).unwrap();
            let valid = cells.clone().filter(|c| merged.valid[*c]);
            let input_ids: Vec<i32> = valid.map(|c| merged.input_ids[c]).collect();
            let (mut spans, mut pixels) = (Vec::new(), Vec::new());
            for (cell, feature) in merged.feature_index.iter().zip(&merged.feature_rows) {
                let (cell, feature) = (*cell as usize, *feature as usize);
                if cells.contains(&cell) && feature % patches == 0 {
                    spans.push(ImageSpan { start: cell - start, len: patches });
                    pixels.push(self.image(images[feature / patches].as_u64().unwrap() as usize));
                }
            }
            let labels = vec![IGNORE; input_ids.len()];
            Encoded { id: format!("{subject}/{row}"), input_ids, labels, spans, pixels }
        };
        (0..merged.rows).map(row).collect()
    }

    fn image(&self, index: usize) -> Pixels {
        let shape = self.vision.shape("pixel_values");
        let size = shape[1..].iter().product::<usize>();
        let start = index % shape[0] * size;
        let data = self.vision.f32("pixel_values")[start..start + size].to_vec();
        Pixels { data, shape: [shape[1], shape[2], shape[3]] }
    }
}

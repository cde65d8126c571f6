//! Merging, decoder, logits, losses: every case of `forward_cases.json`.

use burn::{
    module::Module,
    tensor::{Device, Tensor},
};
use medtune::{
    models::{
        Compat,
        qwen_vl::{QwenVl, QwenVlConfig, processor::pixels},
    },
    vlm::{Batch, IGNORE, Pixels, Vlm, row_segments},
};
use serde_json::Value;

use super::{
    Family, floats,
    text::{list, text},
};
use crate::parity::fixture::{self, Checks, Tensors, json};

pub(super) const LOGITS: f32 = 5e-4;
const LONG_LOGITS: f32 = 3e-4;
const HIDDEN: f32 = 1e-4;
const EMBEDS: f32 = 5e-6;
const LOG_SUM: f32 = 2e-4;
const LOSS: f32 = 1e-5;
const TOKEN_LOSS: f32 = 3e-4;

pub(super) fn check(checks: &mut Checks) {
    let family = Family::open();
    let plain = fixture::device();
    // The composed attention runs with autodiff, the fused one without.
    for device in [plain.clone(), plain.autodiff()] {
        let model = family.model(&device).no_grad();
        for description in list(&json(&family.golden("forward_cases.json"))) {
            let case = Case::open(&family, description);
            case.compare(checks, &model, &device);
            case.rows_alone(checks, &model, &device);
            case.without_quirks(checks, &model, &device);
        }
    }
}

/// The config of a checkpoint with some values replaced.
pub(super) fn overridden(config: &QwenVlConfig, changes: &Value) -> QwenVlConfig {
    let mut value = serde_json::to_value(config).unwrap();
    for (key, change) in changes.as_object().unwrap() {
        assert!(value.get(key).is_some(), "config has no {key}");
        value[key] = change.clone();
    }
    serde_json::from_value(value).unwrap()
}

/// A padded batch of the fixture: ids, and a mask that may be absent.
pub(super) fn batch(family: &Family, rows: usize, input_ids: Vec<i32>, mask: Option<Vec<i32>>) -> Batch {
    let length = input_ids.len() / rows;
    let mask: Vec<bool> = mask.map_or_else(|| vec![true; input_ids.len()], |m| m.iter().map(|v| *v != 0).collect());
    let positions = mask.chunks(length).flat_map(|row| {
        let mut next = 0;
        row.iter().map(move |real| {
            next += i32::from(*real);
            if *real { next - 1 } else { 0 }
        })
    });
    let (feature_index, pixels) = images(family, &input_ids);
    Batch {
        ids: (0..rows).map(|r| r.to_string()).collect(),
        labels: vec![IGNORE; input_ids.len()],
        positions: positions.collect(),
        segments: row_segments(&mask, length),
        feature_index,
        pixels,
        rows,
        length,
        mask,
        input_ids,
    }
}

/// Positions between image tags, and the images that the bytes there name.
fn images(family: &Family, input_ids: &[i32]) -> (Vec<i32>, Vec<Pixels>) {
    let tokenizer = family.processor.tokenizer();
    let count = family.processor.tokens_per_image();
    let (mut index, mut found) = (Vec::new(), Vec::new());
    for (at, _) in input_ids.iter().enumerate().filter(|(_, id)| **id == tokenizer.img_start) {
        assert_eq!(input_ids[at + 1 + count], tokenizer.img_end);
        let path = tokenizer.image_text(&input_ids[at + 1..at + 1 + count]).unwrap();
        let image = medtune::image::open(family.root.join(path)).unwrap();
        found.push(pixels(&image, family.config.visual.image_size));
        index.extend((at + 1..at + 1 + count).map(|i| i as i32));
    }
    (index, found)
}

/// Block inputs, then the states after the final norm; `[rows, length, hidden_size]` each.
pub(super) fn states(model: &QwenVl, batch: &Batch, device: &Device) -> Vec<Tensor<3>> {
    let context = model.context(batch, device);
    let mut states = vec![model.embed(batch, model.features(batch, device), device)];
    for i in 0..model.num_layers() {
        let x = model.layer(i, states[i].clone(), &context, None);
        states.push(x);
    }
    let last = states.pop().unwrap();
    states.push(model.final_norm(last));
    states
}

/// `[rows * length, vocab_size]`
pub(super) fn logits(model: &QwenVl, batch: &Batch, device: &Device) -> Vec<f32> {
    let last = states(model, batch, device).pop().unwrap();
    let [rows, length, hidden] = last.dims();
    floats(model.logits(last.reshape([rows * length, hidden])))
}

pub(super) struct Case {
    pub(super) id: String,
    pub(super) config: QwenVlConfig,
    pub(super) compat: Compat,
    pub(super) batch: Batch,
    pub(super) tensors: Tensors,
    description: Value,
    long: bool,
}

impl Case {
    pub(super) fn open(family: &Family, description: &Value) -> Self {
        let id = text(&description["id"]).to_string();
        let file = text(&description["file"]);
        let tensors = Tensors::open(&family.golden(file));
        let config = overridden(&family.config, &description["config_override"]);
        let alpha = description["ntk_alpha"].as_f64().unwrap();
        let compat = match text(&description["mode"]) {
            "train" => Compat { padded_columns: true, training_alpha: Some(alpha), ..Compat::default() },
            "eval" => Compat { padded_columns: true, ..Compat::default() },
            other => panic!("unknown mode {other}"),
        };
        let name = |part: &str| format!("{id}.{part}");
        let mask = tensors.has(&name("attention_mask")).then(|| tensors.ints(&name("attention_mask")));
        let rows = description["batch"].as_u64().unwrap() as usize;
        let mut batch = batch(family, rows, tensors.ints(&name("input_ids")), mask);
        assert_eq!(Some(batch.length as u64), description["length"].as_u64(), "{id}");
        if tensors.has(&name("labels")) {
            batch.labels = tensors.ints(&name("labels"));
        }
        Self { config, compat, batch, tensors, description: description.clone(), long: file.starts_with("long"), id }
    }

    pub(super) fn name(&self, part: &str) -> String {
        format!("{}.{part}", self.id)
    }

    /// Whether the original uses the state of training mode.
    pub(super) fn training(&self) -> bool {
        self.compat.training_alpha.is_some()
    }

    /// Columns of which the fixture keeps logits and states.
    pub(super) fn kept(&self) -> Vec<usize> {
        self.tensors.ints(&self.name("positions")).into_iter().map(|p| p as usize).collect()
    }

    /// Number of ids in the vocabulary of the model.
    pub(super) fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    /// Cells that are no padding, as (index among the kept cells, cell), of columns that `columns` lists.
    pub(super) fn cells(&self, columns: &[usize]) -> Vec<(usize, usize)> {
        let rows = (0..self.batch.rows).flat_map(|row| columns.iter().map(move |c| row * self.batch.length + c));
        rows.enumerate().filter(|(_, cell)| self.batch.mask[*cell]).collect()
    }

    /// Compares `[all cells, width]` with `[kept cells, width]` at real tokens.
    pub(super) fn close(
        &self,
        checks: &mut Checks,
        part: &str,
        found: &[f32],
        golden: &[f32],
        width: usize,
        tolerance: f32,
    ) {
        let cells = self.cells(&self.kept());
        let found: Vec<f32> =
            cells.iter().flat_map(|(_, cell)| &found[cell * width..(cell + 1) * width]).copied().collect();
        let golden: Vec<f32> =
            cells.iter().flat_map(|(kept, _)| &golden[kept * width..(kept + 1) * width]).copied().collect();
        checks.close(&self.name(part), &found, &golden, tolerance);
    }

    fn compare(&self, checks: &mut Checks, model: &QwenVl, device: &Device) {
        if !self.training() {
            let alpha = self.config.ntk_alpha(self.batch.length);
            checks.equal(&self.name("ntk_alpha"), Some(alpha), self.description["ntk_alpha"].as_f64());
        }
        let model = model.clone().with_config(self.config.clone()).with_compat(self.compat);
        let states = states(&model, &self.batch, device);
        let [rows, length, hidden] = states[0].dims();
        let embeds = floats(states[0].clone());
        let last = states.last().unwrap().clone();
        let logits = floats(model.logits(last.reshape([rows * length, hidden])));
        for part in list(&self.description["tensors"]).iter().map(text) {
            let name = self.name(part);
            match part {
                "input_ids" | "positions" | "attention_mask" | "labels" => {}
                "logits" => {
                    let tolerance = if self.long { LONG_LOGITS } else { LOGITS };
                    self.close(checks, part, &logits, &self.tensors.f32(&name), self.config.vocab_size, tolerance);
                }
                "inputs_embeds" => self.close(checks, part, &embeds, &self.tensors.f32(&name), hidden, EMBEDS),
                "hidden_states" => {
                    let golden = self.tensors.f32(&name);
                    let each = golden.len() / states.len();
                    for (state, golden) in states.iter().zip(golden.chunks(each)) {
                        self.close(checks, part, &floats(state.clone()), golden, hidden, HIDDEN);
                    }
                }
                "logsumexp" => self.log_sums(checks, &logits, &self.tensors.f32(&name)),
                "argmax" => self.best(checks, &logits, &self.tensors.i32(&name)),
                "loss" => self.loss(checks, &logits),
                "token_nll" => self.token_losses(checks, &logits),
                other => panic!("unknown tensor {other}"),
            }
        }
    }

    fn all_cells(&self) -> Vec<usize> {
        (0..self.batch.mask.len()).filter(|cell| self.batch.mask[*cell]).collect()
    }

    fn log_sums(&self, checks: &mut Checks, logits: &[f32], golden: &[f32]) {
        let cells = self.all_cells();
        let found: Vec<f32> = cells.iter().map(|c| log_sum(self.row(logits, *c)) as f32).collect();
        let golden: Vec<f32> = cells.iter().map(|c| golden[*c]).collect();
        checks.close(&self.name("logsumexp"), &found, &golden, LOG_SUM);
    }

    /// The original's choice is the best here too, up to noise.
    fn best(&self, checks: &mut Checks, logits: &[f32], golden: &[i32]) {
        for cell in self.all_cells() {
            let row = self.row(logits, cell);
            let max = row.iter().copied().fold(f32::MIN, f32::max);
            let gap = max - row[golden[cell] as usize];
            assert!(gap <= 2.0 * LOGITS, "{} cell {cell}: the original's choice is {gap} below the best", self.id);
        }
        checks.equal(&self.name("argmax"), golden.len(), self.batch.mask.len());
    }

    fn row<'a>(&self, logits: &'a [f32], cell: usize) -> &'a [f32] {
        &logits[cell * self.config.vocab_size..(cell + 1) * self.config.vocab_size]
    }

    /// `[rows, length - 1]`, 0 where nothing is supervised.
    fn losses(&self, logits: &[f32]) -> Vec<f64> {
        let length = self.batch.length;
        let cells = (0..self.batch.rows).flat_map(|row| (0..length - 1).map(move |c| row * length + c));
        let loss = |cell: usize| match self.batch.labels[cell + 1] {
            IGNORE => 0.0,
            label => log_sum(self.row(logits, cell)) - f64::from(self.row(logits, cell)[label as usize]),
        };
        cells.map(loss).collect()
    }

    fn loss(&self, checks: &mut Checks, logits: &[f32]) {
        let targets = self.batch.supervised();
        checks.equal(&self.name("targets"), Some(targets as u64), self.description["n_target_tokens"].as_u64());
        let mean = self.losses(logits).iter().sum::<f64>() / targets as f64;
        checks.close(&self.name("loss"), &[mean as f32], &self.tensors.f32(&self.name("loss")), LOSS);
    }

    fn token_losses(&self, checks: &mut Checks, logits: &[f32]) {
        let found: Vec<f32> = self.losses(logits).iter().map(|l| *l as f32).collect();
        checks.close(&self.name("token_nll"), &found, &self.tensors.f32(&self.name("token_nll")), TOKEN_LOSS);
    }

    /// Where no quirk acts, the default agrees with the original; where one changes a row's rotary base, it does not.
    fn without_quirks(&self, checks: &mut Checks, model: &QwenVl, device: &Device) {
        let (length, config) = (self.batch.length, &self.config);
        let used = self.compat.training_alpha.unwrap_or_else(|| config.ntk_alpha(length));
        let own = self.batch.mask.chunks(length).map(|row| row.iter().filter(|m| **m).count());
        let own: Vec<usize> = own.collect();
        let other_base = own.iter().any(|n| config.ntk_alpha(*n) != used);
        let longest = if self.training() { own.iter().copied().max().unwrap_or(0) } else { length };
        let left = self.batch.mask.chunks(length).any(|row| !row[0]);
        let sharpened = longest > config.seq_length && (left || self.training());
        if sharpened && !other_base {
            return;
        }
        let model = model.clone().with_config(config.clone());
        let found = logits(&model, &self.batch, device);
        let golden = self.tensors.f32(&self.name("logits"));
        if !other_base {
            return self.close(checks, "logits", &found, &golden, config.vocab_size, LOGITS);
        }
        let width = config.vocab_size;
        let cells = self.cells(&self.kept());
        let off = cells.iter().flat_map(|(kept, cell)| {
            let pair = found[cell * width..(cell + 1) * width].iter().zip(&golden[kept * width..(kept + 1) * width]);
            pair.map(|(a, b)| (a - b).abs())
        });
        checks.equal(&self.name("the quirk shows"), off.fold(0.0, f32::max) > 10.0 * LOGITS, true);
    }

    /// Without the original's quirks, a row of a padded batch gives what it gives alone.
    fn rows_alone(&self, checks: &mut Checks, model: &QwenVl, device: &Device) {
        if self.batch.mask.iter().all(|m| *m) || self.training() {
            return;
        }
        let family = Family::open();
        let model = model.clone().with_config(self.config.clone());
        let together = logits(&model, &self.batch, device);
        for row in 0..self.batch.rows {
            let cells: Vec<usize> = self.all_cells().into_iter().filter(|c| c / self.batch.length == row).collect();
            let ids = cells.iter().map(|c| self.batch.input_ids[*c]).collect();
            let alone = logits(&model, &batch(&family, 1, ids, None), device);
            let found: Vec<f32> = cells.iter().flat_map(|c| self.row(&together, *c)).copied().collect();
            checks.close(&self.name(&format!("row {row} alone")), &found, &alone, LOGITS);
        }
    }
}

fn log_sum(row: &[f32]) -> f64 {
    let max = f64::from(row.iter().copied().fold(f32::MIN, f32::max));
    row.iter().map(|v| (f64::from(*v) - max).exp()).sum::<f64>().ln() + max
}

//! Vision tower, projector, merge, decoder.

use std::{collections::BTreeMap, path::Path};

use burn::tensor::{Device, Int, Tensor, TensorData, activation::gelu};
use medtune::{
    models::{
        LoadOptions,
        llava_med::{
            LlavaMed, LlavaMedConfig,
            processor::{IMAGE_TOKEN_INDEX, MergeRules, Merged, RawRow, merge},
            weights::load_dir,
        },
    },
    nn::{
        attention::Columns,
        decoder::DecoderContext,
        linear::linear_forward,
        projector::ProjectorLayer,
        rope::{Rope, inverse_frequencies},
        visit::named_params,
    },
    vlm::{PaddingSide, Vlm},
    weights::Checkpoint,
};
use serde_json::Value;

use crate::parity::fixture::{self, Checks, Tensors, json, root};

const VISION: f32 = 1e-4;
const LOGITS: f32 = 5e-4;
const ROPE: f32 = 1e-6;

pub(super) fn check(checks: &mut Checks) {
    let root = root("llava_med");
    full_size(checks, &root);
    pickled(checks, &root);
    let plain = fixture::device();
    // the composed attention runs with autodiff, the fused one without
    for device in [plain.clone(), plain.autodiff()] {
        let fixture = Fixture::open(&root, &device);
        fixture.vision(checks);
        fixture.merge(checks);
        fixture.forward(checks);
    }
}

/// Names and shapes of the real checkpoint, from a model that holds no memory.
fn full_size(checks: &mut Checks, root: &Path) {
    let expected = json(&root.join("real_model_keys.json"));
    let model = LlavaMed::new(&LlavaMedConfig::v1_5_7b(), &Device::flex()).unwrap();
    let params = named_params(&model);
    checks.equal(
        "full size: parameters",
        params.iter().map(|p| p.num_elements() as u64).sum(),
        expected["total_params"].as_u64().unwrap(),
    );
    checks.equal("full size: nothing allocated", params.iter().filter(|p| p.dtype.is_some()).count(), 0);
    let found: BTreeMap<String, Vec<usize>> = params
        .into_iter()
        .map(|p| {
            let shape = p.checkpoint_shape();
            (p.name, shape)
        })
        .collect();
    checks.equal("full size: names and shapes", found, serde_json::from_value(expected["tensors"].clone()).unwrap());
}

/// A PyTorch file holds the same values as the safetensors file beside it.
fn pickled(checks: &mut Checks, root: &Path) {
    let lora = root.join("lora");
    for entry in std::fs::read_dir(&lora).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "bin") {
            continue;
        }
        let (bin, safe) =
            (Checkpoint::open(&path).unwrap(), Checkpoint::open(&path.with_extension("safetensors")).unwrap());
        checks.equal("names in the .bin", bin.names().collect::<Vec<_>>(), safe.names().collect());
        for name in bin.names() {
            checks.equal(name, &bin.info(name).unwrap().shape, &safe.info(name).unwrap().shape);
            checks.close(name, &bin.read_f32(name).unwrap(), &safe.read_f32(name).unwrap(), 0.0);
        }
    }
}

/// A model and the files it is compared with.
pub(super) struct Fixture {
    root: std::path::PathBuf,
    pub(super) device: Device,
    pub(super) model: LlavaMed,
    pub(super) description: Value,
    pub(super) vision: Tensors,
    merge: Tensors,
    forward: Tensors,
}

pub(super) fn load(root: &Path, tower: Option<&str>, device: &Device) -> LlavaMed {
    let options = LoadOptions { vision_tower: tower.map(|t| root.join(t)), ..LoadOptions::default() };
    load_dir(&root.join("checkpoint"), &options, device).unwrap()
}

impl Fixture {
    pub(super) fn open(root: &Path, device: &Device) -> Self {
        let golden = root.join("golden");
        let tensors = |name: &str| Tensors::open(&golden.join(format!("{name}.safetensors")));
        Self {
            model: load(root, Some("vision_tower"), device),
            root: root.to_path_buf(),
            device: device.clone(),
            description: json(&golden.join("model.json")),
            vision: tensors("vision"),
            merge: tensors("merge"),
            forward: tensors("forward"),
        }
    }

    fn tensor<const D: usize>(&self, values: Vec<f32>, shape: &[usize]) -> Tensor<D> {
        Tensor::from_data(TensorData::new(values, shape.to_vec()), &self.device)
    }

    fn pixels(&self) -> Tensor<4> {
        self.tensor(self.vision.f32("pixel_values"), &self.vision.shape("pixel_values"))
    }

    fn zero_image(&self) -> Tensor<4> {
        let [_, c, h, w] = self.pixels().dims();
        Tensor::zeros([1, c, h, w], &self.device)
    }

    fn vision(&self, checks: &mut Checks) {
        let alternative = load(&self.root, Some("vision_tower_alt"), &self.device);
        // no folder named: the one beside the checkpoint is found, whose values the checkpoint repeats
        let found = load(&self.root, None, &self.device);
        for name in self.vision.names() {
            let Some(values) = self.vision_tensor(&name, &alternative) else { continue };
            checks.close(&format!("vision {name}"), &values, &self.vision.f32(&name), VISION);
            if name == "selected" {
                let values = floats(found.vision(self.pixels()));
                checks.close("vision selected, folder found", &values, &self.vision.f32(&name), VISION);
            }
        }
    }

    /// None for the input itself.
    fn vision_tensor(&self, name: &str, alternative: &LlavaMed) -> Option<Vec<f32>> {
        let (subject, name) = match name.split_once('.') {
            Some(("alt_tower", rest)) => ((alternative, self.pixels()), rest),
            Some(("zero_image", rest)) => ((&self.model, self.zero_image()), rest),
            _ => ((&self.model, self.pixels()), name),
        };
        let (model, pixels) = subject;
        let states = |layers: usize| floats(model.vision_model().forward(pixels.clone(), layers));
        Some(match name.split_once('.') {
            None if name == "pixel_values" => return None,
            None if name == "embeddings" => floats(model.vision_model().embeddings.forward(pixels)),
            None if name == "selected" => floats(model.vision(pixels)),
            Some(("hidden_states", layer)) => states(layer.parse().unwrap()),
            Some(("projector", part)) => {
                let features = model.vision(pixels);
                let ProjectorLayer::Linear(first) = &model.model.mm_projector[0] else { panic!("not a linear layer") };
                match part {
                    "fc1" => floats(linear_forward(first, features)),
                    "gelu" => floats(gelu(linear_forward(first, features))),
                    "out" => floats(model.project(features)),
                    other => panic!("unknown tensor projector.{other}"),
                }
            }
            _ => panic!("unknown tensor {name}"),
        })
    }

    fn merge(&self, checks: &mut Checks) {
        let cases = self.description["merge"].as_object().unwrap();
        assert!(!cases.is_empty(), "no merge case");
        for (case, description) in cases {
            if description["images"].as_array().unwrap().is_empty() {
                continue; // no image at all: the original returns its input untouched
            }
            let (merged, embeds) = self.merged(case);
            let name = |part: &str| format!("{case}.{part}");
            let shape: Vec<usize> = serde_json::from_value(description["out_inputs_embeds"].clone()).unwrap();
            checks.equal(&name("shape"), embeds.dims().to_vec(), shape);
            if self.merge.has(&name("inputs_embeds")) {
                checks.close(&name("inputs_embeds"), &floats(embeds), &self.merge.f32(&name("inputs_embeds")), LOGITS);
            }
            let valid: Vec<i32> = merged.valid.iter().map(|v| i32::from(*v)).collect();
            for (part, found) in [
                ("attention_mask_out", &valid),
                ("labels_out", &merged.labels),
                ("position_ids_if_requested", &merged.positions),
            ] {
                if self.merge.has(&name(part)) {
                    checks.equal(&name(part), found.clone(), self.merge.ints(&name(part)));
                }
            }
        }
    }

    /// A merge case computed here: layout and decoder input.
    fn merged(&self, case: &str) -> (Merged, Tensor<3>) {
        let description = &self.description["merge"][case];
        let name = |part: &str| format!("{case}.{part}");
        let length = self.merge.shape(&name("input_ids"))[1];
        let rows = |part: &str| -> Option<Vec<Vec<i32>>> {
            self.merge
                .has(&name(part))
                .then(|| self.merge.ints(&name(part)).chunks(length).map(<[i32]>::to_vec).collect())
        };
        let (labels, masks) = (rows("labels_in"), rows("attention_mask_in"));
        let raw: Vec<RawRow> = (rows("input_ids").unwrap().into_iter().enumerate())
            .map(|(i, input_ids)| RawRow {
                input_ids,
                labels: labels.as_ref().map(|l| l[i].clone()),
                mask: masks.as_ref().map(|m| m[i].iter().map(|v| *v == 1).collect()),
            })
            .collect();
        let config = self.model.config();
        let overrides = &description["config_overrides"];
        let limit = overrides["tokenizer_model_max_length"].as_u64().map(|v| v as usize);
        let side = overrides["tokenizer_padding_side"].as_str().unwrap_or(&config.tokenizer_padding_side);
        let rules = MergeRules {
            max_length: limit.or(config.tokenizer_model_max_length),
            side: if side == "left" { PaddingSide::Left } else { PaddingSide::Right },
            pad_id: 0,
        };
        self.assemble(&raw, description["images"].as_array().unwrap(), &rules)
    }

    /// Merges rows with images given by index, `"zeros"`, or groups of them.
    fn assemble(&self, raw: &[RawRow], images: &[Value], rules: &MergeRules) -> (Merged, Tensor<3>) {
        let one = |image: &Value| match image.as_u64() {
            Some(i) => self.pixels().narrow(0, i as usize, 1),
            None => self.zero_image(),
        };
        let tiles: Vec<Vec<Tensor<4>>> = images
            .iter()
            .map(|image| image.as_array().map_or_else(|| vec![one(image)], |group| group.iter().map(one).collect()))
            .collect();
        let counts: Vec<usize> = tiles.iter().map(Vec::len).collect();
        let tokens = |merged: &Merged| {
            let ids = TensorData::new(merged.input_ids.clone(), [merged.rows, merged.length]);
            self.model.embed_tokens(Tensor::<2, Int>::from_data(ids, &self.device))
        };
        if tiles.is_empty() {
            let merged = merge(raw, &[], rules).unwrap();
            let embeds = tokens(&merged);
            return (merged, embeds);
        }
        let features = self.model.project(self.model.vision(Tensor::cat(tiles.concat(), 0)));
        let [_, per_tile, hidden] = features.dims();
        let merged = merge(raw, &counts.iter().map(|n| n * per_tile).collect::<Vec<_>>(), rules).unwrap();
        let mut embeds = floats(tokens(&merged));
        let features = floats(features);
        for (cell, valid) in merged.valid.iter().enumerate() {
            if !valid {
                embeds[cell * hidden..(cell + 1) * hidden].fill(0.0);
            }
        }
        for (cell, feature) in merged.feature_index.iter().zip(&merged.feature_rows) {
            let (cell, feature) = (*cell as usize * hidden, *feature as usize * hidden);
            embeds[cell..cell + hidden].copy_from_slice(&features[feature..feature + hidden]);
        }
        let embeds = self.tensor(embeds, &[merged.rows, merged.length, hidden]);
        (merged, embeds)
    }

    /// Decoder input of a forward or generation case: a merge case, or a prompt with the first images.
    pub(super) fn inputs(&self, case: &str) -> (Merged, Tensor<3>) {
        if self.description["merge"].get(case).is_some() {
            return self.merged(case);
        }
        let input_ids: Vec<i32> = self.description["prompts"][case]["input_ids"]
            .as_array()
            .unwrap_or_else(|| panic!("no prompt {case}"))
            .iter()
            .map(|v| v.as_i64().unwrap() as i32)
            .collect();
        let marks = input_ids.iter().filter(|id| **id == IMAGE_TOKEN_INDEX).count();
        let images: Vec<Value> = (0..marks).map(Value::from).collect();
        let rules = MergeRules { max_length: None, side: PaddingSide::Right, pad_id: 0 };
        self.assemble(&[RawRow { input_ids, labels: None, mask: None }], &images, &rules)
    }

    fn context(&self, merged: &Merged, window: Option<usize>) -> DecoderContext {
        let config = self.model.config();
        // the original numbers columns, padded or not, when it only computes logits
        let positions = (0..merged.rows).flat_map(|_| 0..merged.length as i32).collect();
        let columns = Columns {
            rows: merged.rows,
            length: merged.length,
            positions,
            keys: merged.length,
            start: 0,
            prefill: merged.length,
            mask: merged.valid.clone(),
            segments: None,
        };
        let frequencies = inverse_frequencies(config.head_dim(), config.rope_theta);
        DecoderContext::causal(&columns, &frequencies, window.or(config.sliding_window), &self.device)
    }

    /// Hidden states as Hugging Face numbers them: input, after each layer, the last one after the final norm.
    fn hidden_states(&self, embeds: Tensor<3>, context: &DecoderContext) -> Vec<Tensor<3>> {
        let mut states = vec![embeds];
        for layer in 0..self.model.num_layers() {
            states.push(self.model.layer(layer, states[layer].clone(), context, None));
        }
        let last = states.pop().unwrap();
        states.push(self.model.final_norm(last));
        states
    }

    fn logits(&self, hidden: Tensor<3>) -> Vec<f32> {
        let [rows, length, width] = hidden.dims();
        floats(self.model.logits(hidden.reshape([rows * length, width])))
    }

    fn forward(&self, checks: &mut Checks) {
        for name in self.forward.names() {
            let (window, rest) = match name.strip_prefix("sliding_window_").and_then(|r| r.split_once('.')) {
                Some((window, rest)) => (Some(window.parse().unwrap()), rest),
                None => (None, name.as_str()),
            };
            let (case, part) = rest.split_once('.').unwrap();
            match (case, part) {
                ("rope", _) => self.rope(checks, &name, part),
                (_, "valid") => {
                    let (merged, _) = self.inputs(case);
                    let valid: Vec<i32> = merged.valid.iter().map(|v| i32::from(*v)).collect();
                    checks.equal(&name, valid, self.forward.ints(&name));
                }
                _ => self.forward_tensor(checks, &name, case, part, window),
            }
        }
    }

    fn rope(&self, checks: &mut Checks, name: &str, part: &str) {
        let shape = self.forward.shape(name);
        let positions: Vec<i32> = (0..shape[0] as i32).collect();
        let frequencies = inverse_frequencies(shape[1], self.model.config().rope_theta);
        let rope = Rope::new(&positions, positions.len(), &frequencies, &self.device);
        let half = floats(if part == "cos" { rope.cos } else { rope.sin });
        let full: Vec<f32> = half.chunks(shape[1] / 2).flat_map(|row| [row, row].concat()).collect();
        checks.close(name, &full, &self.forward.f32(name), ROPE);
    }

    fn forward_tensor(&self, checks: &mut Checks, name: &str, case: &str, part: &str, window: Option<usize>) {
        let (merged, embeds) = self.inputs(case);
        let context = self.context(&merged, window);
        let states = self.hidden_states(embeds, &context);
        let expected = self.forward.f32(name);
        let last = states.last().unwrap().clone();
        let vocab = self.model.config().vocab_size;
        if let Some(i) = part.strip_prefix("hidden_states.") {
            checks.close(name, &floats(states[i.parse::<usize>().unwrap()].clone()), &expected, LOGITS);
        } else if let Some(i) = part.strip_prefix("attentions.") {
            let layer = &self.model.model.layers[i.parse::<usize>().unwrap()];
            let normed = layer.input_layernorm.forward(states[i.parse::<usize>().unwrap()].clone());
            checks.close(name, &floats(layer.self_attn.probabilities(normed, &context)), &expected, LOGITS);
        } else if let Some(count) = part.strip_prefix("logits_last") {
            let count: usize = count.parse().unwrap();
            let start = merged.length - count;
            let found = self.logits(last.narrow(1, start, count));
            // rows of padding have no defined value
            let keep = |cell: usize| merged.valid[cell / count * merged.length + start + cell % count];
            let pick = |v: &[f32]| -> Vec<f32> {
                v.chunks(vocab).enumerate().filter(|(c, _)| keep(*c)).flat_map(|(_, r)| r.to_vec()).collect()
            };
            checks.close(name, &pick(&found), &pick(&expected), LOGITS);
        } else {
            let logits = self.logits(last);
            match part {
                "logits" => checks.close(name, &logits, &expected, LOGITS),
                "logits_valid" => {
                    let rows = logits.chunks(vocab).zip(&merged.valid).filter(|(_, v)| **v);
                    let packed: Vec<f32> = rows.flat_map(|(row, _)| row.to_vec()).collect();
                    checks.close(name, &packed, &expected, LOGITS);
                }
                "loss" => {
                    let loss = shifted_loss(&logits, &merged, vocab);
                    checks.close(name, &[loss], &expected, 1e-5 * expected[0]);
                }
                other => panic!("unknown tensor {case}.{other}"),
            }
        }
    }
}

/// Mean cross entropy of the next token over supervised positions.
fn shifted_loss(logits: &[f32], merged: &Merged, vocab: usize) -> f32 {
    let (mut sum, mut count) = (0f64, 0);
    for cell in 0..merged.rows * merged.length {
        if (cell + 1) % merged.length == 0 || merged.labels[cell + 1] < 0 {
            continue;
        }
        let row = &logits[cell * vocab..(cell + 1) * vocab];
        let max = row.iter().copied().fold(f32::MIN, f32::max);
        let normaliser = row.iter().map(|v| f64::from(v - max).exp()).sum::<f64>().ln() + f64::from(max);
        sum += normaliser - f64::from(row[merged.labels[cell + 1] as usize]);
        count += 1;
    }
    (sum / f64::from(count)) as f32
}

pub(super) fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().as_slice::<f32>().unwrap().to_vec()
}

//! Vision tower, projector, merge, decoder, loss.

use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use medtune::{
    image::Rgb8,
    kernel::pixel_shuffle::pixel_shuffle,
    models::{
        Compat,
        internvl::{InternVl, InternVlProcessor, weights::load_dir},
    },
    nn::intern_vit::VisionNorm,
    vlm::{Batch, Encoded, IGNORE, PaddingSide, Processor, Vlm},
};
use serde_json::Value;

use super::{
    files::{self, Tensors},
    text::{normalized, records},
};
use crate::parity::fixture::{self, Checks};

pub(super) fn values<const D: usize>(x: Tensor<D>) -> Vec<f32> {
    x.into_data().try_to_vec().unwrap()
}

/// 1e-4 absolute and 1e-4 relative.
pub(super) fn near(checks: &mut Checks, what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}: number of values");
    let over: Vec<f32> = found.iter().zip(expected).map(|(f, e)| ((f - e).abs() - 1e-4 * e.abs()).max(0.0)).collect();
    assert!(found.iter().all(|f| f.is_finite()), "{what}: not finite");
    checks.close(what, &over, &vec![0.0; over.len()], 1e-4);
}

pub(super) fn check(checks: &mut Checks) {
    let device = fixture::device();
    for (golden, checkpoint) in files::kinds() {
        let model = load_dir(&checkpoint, &Default::default(), &device).unwrap();
        check_vision(&golden, &model, &device, checks);
        check_interpolation(&golden, &model, &device, checks);
        let processor = InternVlProcessor::load(&checkpoint).unwrap();
        check_records(&golden, &model, processor, &device, checks);
    }
}

fn check_vision(golden: &Path, model: &InternVl, device: &Device, checks: &mut Checks) {
    let expected = Tensors::open(&golden.join("vision.safetensors"));
    let [tiles, height, width, _] = expected.shape("tiles_u8")[..] else { panic!("tiles have four dimensions") };
    let pixels: Vec<f32> = expected
        .bytes("tiles_u8")
        .chunks(height * width * 3)
        .flat_map(|data| normalized(&Rgb8 { width, height, data: data.to_vec() }))
        .collect();
    let pixels = Tensor::<4>::from_data(TensorData::new(pixels, [tiles, 3, height, width]), device);
    let mut name = |name: &str, found: Vec<f32>| {
        near(checks, &format!("{} {name}", golden.display()), &found, &expected.f32(name));
    };
    let vision = &model.vision_model;
    for layers in 0..=vision.encoder.layers.len() {
        name(&format!("hidden_states.{layers}"), values(vision.forward(pixels.clone(), layers)));
    }
    let last = vision.forward(pixels.clone(), vision.encoder.layers.len());
    name("last_hidden_state", values(last.clone()));
    name("pooler_output", values(last.narrow(1, 0, 1)));
    let features = model.vision(pixels.clone());
    let block = model.config().block();
    name("pixel_shuffle_v1", values(pixel_shuffle(features.clone(), block, true)));
    name("pixel_shuffle_v2", values(pixel_shuffle(features.clone(), block, false)));
    name("mlp1_out", values(model.project(features)));
    let prefix = "mlp1_out_select_layer_";
    for key in expected.names().iter().filter(|n| n.starts_with(prefix)) {
        let mut config = model.config().clone();
        config.select_layer = key[prefix.len()..].parse().unwrap();
        let other = model.clone().with_config(config);
        name(key, values(other.project(other.vision(pixels.clone()))));
    }
    let (first, x) = (&vision.encoder.layers[0], vision.embeddings.forward(pixels));
    let normed = match &first.norm1 {
        VisionNorm::Layer(norm) => norm.forward(x.clone()),
        VisionNorm::Rms(norm) => norm.forward(x.clone()),
    };
    name("layer0.norm1", values(normed.clone()));
    let [q, k, _] = first.attn.project(normed.clone());
    if expected.has("layer0.q_normed") {
        name("layer0.q_normed", values(q));
        name("layer0.k_normed", values(k));
    }
    name("layer0.attn", values(first.attn.forward(normed)));
    let after = first.after_attention(x);
    name("layer0.after_attn", values(after.clone()));
    name("layer0.mlp", values(first.mlp.forward(first.norm2.forward(after))));
}

fn check_interpolation(golden: &Path, model: &InternVl, device: &Device, checks: &mut Checks) {
    let expected = Tensors::open(&golden.join("vision.safetensors"));
    let suffix = ".pixel_values_x32_i8";
    for key in expected.names().iter().filter(|n| n.ends_with(suffix)) {
        let case = key.strip_suffix(suffix).unwrap();
        let [tiles, channels, height, width] = expected.shape(key)[..] else { panic!("pixels have four dimensions") };
        let pixels: Vec<f32> = expected.ints(key).iter().map(|v| *v as f32 / 32.0).collect();
        let pixels = Tensor::<4>::from_data(TensorData::new(pixels, [tiles, channels, height, width]), device);
        let vision = &model.vision_model;
        let patch = model.config().vision_config.patch_size;
        let mut name = |part: &str, found: &dyn Fn() -> Vec<f32>| {
            let key = format!("{case}.{part}");
            if expected.has(&key) {
                near(checks, &format!("{} {key}", golden.display()), &found(), &expected.f32(&key));
            }
        };
        name("embeddings", &|| values(vision.embeddings.forward(pixels.clone())));
        name("last_hidden_state", &|| values(vision.forward(pixels.clone(), vision.encoder.layers.len())));
        name("extract_feature", &|| values(model.project(model.vision(pixels.clone()))));
        name("resized_position_embedding", &|| values(vision.embeddings.positions(height / patch, width / patch)));
    }
}

/// Decoder states after each layer, the last one normed, and logits of all positions.
pub(super) fn decode(model: &InternVl, x: Tensor<3>, batch: &Batch, device: &Device) -> (Vec<Tensor<3>>, Tensor<3>) {
    let context = model.context(batch, device);
    let [rows, length, hidden] = x.dims();
    let mut states = Vec::new();
    let mut x = x;
    for i in 0..model.num_layers() {
        x = model.layer(i, x, &context, None);
        states.push(x.clone());
    }
    let normed = model.final_norm(x);
    if let Some(last) = states.last_mut() {
        *last = normed.clone();
    }
    let logits = model.logits(normed.reshape([rows * length, hidden]));
    let vocab = logits.dims()[1];
    (states, logits.reshape([rows, length, vocab]))
}

/// Loss of each position's next token, 0 where it is ignored: `[rows, length - 1]`, and the mean over supervised ones.
pub(super) fn losses(logits: &Tensor<3>, batch: &Batch) -> (Vec<f32>, f64) {
    let [rows, length, vocab] = logits.dims();
    let all = values(logits.clone());
    let (mut nll, mut sum, mut count) = (Vec::new(), 0.0, 0);
    for row in 0..rows {
        for column in 0..length - 1 {
            let label = batch.labels[row * length + column + 1];
            let scores = &all[(row * length + column) * vocab..][..vocab];
            let loss = if label == IGNORE {
                0.0
            } else {
                let top = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let total: f64 = scores.iter().map(|s| f64::from(s - top).exp()).sum();
                count += 1;
                total.ln() + f64::from(top) - f64::from(scores[label as usize])
            };
            sum += loss;
            nll.push(loss as f32);
        }
    }
    (nll, sum / f64::from(count.max(1)))
}

fn check_records(golden: &Path, model: &InternVl, processor: InternVlProcessor, device: &Device, checks: &mut Checks) {
    let json: Value = files::json(&golden.join("samples.json"));
    let expected = Tensors::open(&golden.join("samples.safetensors"));
    let pad = processor.pad_id();
    let rows = records(golden, processor);
    for row in &rows {
        let batch = Batch::collate(std::slice::from_ref(row), pad, PaddingSide::Right, 1);
        check_batch(&row.id, &batch, model, &expected, &json["cases"][&row.id], device, checks);
    }
    let batch = Batch::collate(&rows, pad, PaddingSide::Right, 1);
    // In the original one long row changes the rotations of all rows.
    let mixed = model.clone().with_compat(Compat { mixed_rotations: true, ..Compat::default() });
    check_batch("batch", &batch, &mixed, &expected, &json["cases"]["batch"], device, checks);
    check_independence(&rows, &batch, model, device, checks);
    check_surplus(&rows, &json, model, device, checks);
}

/// A row of a batch has the logits that it has alone.
fn check_independence(rows: &[Encoded], batch: &Batch, model: &InternVl, device: &Device, checks: &mut Checks) {
    let all = |batch: &Batch| decode(model, model.embed(batch, model.features(batch, device), device), batch, device).1;
    let together = all(batch);
    for (i, row) in rows.iter().enumerate() {
        let alone = all(&Batch::collate(std::slice::from_ref(row), 0, PaddingSide::Right, 1));
        let found = together.clone().narrow(0, i, 1).narrow(1, 0, row.input_ids.len());
        checks.close(&format!("{} alone", row.id), &values(found), &values(alone), 5e-4);
    }
}

fn check_batch(
    case: &str,
    batch: &Batch,
    model: &InternVl,
    expected: &Tensors,
    json: &Value,
    device: &Device,
    checks: &mut Checks,
) {
    let what = |part: &str| format!("{case}: {part}");
    let embeds = model.embed(batch, model.features(batch, device), device);
    let (states, logits) = decode(model, embeds.clone(), batch, device);
    let (length, lens) = (batch.length, batch.mask.chunks(batch.length).map(|m| m.iter().filter(|b| **b).count()));
    let lens: Vec<usize> = lens.collect();
    let prefix = format!("{case}.");
    for key in expected.names() {
        let Some(part) = key.strip_prefix(&prefix) else { continue };
        if part == "inputs_embeds" {
            // Padding holds the embedding of another filler.
            let (found, wanted) = (values(embeds.clone()), expected.f32(&key));
            let width = embeds.dims()[2];
            for (row, len) in lens.iter().enumerate() {
                let range = row * length * width..(row * length + len) * width;
                near(checks, &what(part), &found[range.clone()], &wanted[range]);
            }
        } else if let Some(layer) = part.strip_prefix("lm_hidden_states.") {
            let layer: usize = layer.parse().unwrap();
            near(checks, &what(part), &values(states[layer - 1].clone()), &expected.f32(&key));
        } else if part.starts_with("logits") {
            let count = expected.shape(&key)[1];
            let found: Vec<f32> = lens
                .iter()
                .enumerate()
                .flat_map(|(row, len)| {
                    let end = if part.ends_with("_valid") { *len } else { length };
                    values(logits.clone().narrow(0, row, 1).narrow(1, end - count, count))
                })
                .collect();
            checks.close(&what(part), &found, &expected.f32(&key), 5e-4);
        }
    }
    let (nll, loss) = losses(&logits, batch);
    checks.close(&what("token losses"), &nll, &expected.f32(&format!("{case}.token_nll")), 1e-3);
    checks.close(&what("loss"), &[loss as f32], &[json["loss"].as_f64().unwrap() as f32], 1e-4);
    if let Some(plain) = json["loss_without_position_ids"].as_f64() {
        let mut batch = batch.clone();
        batch.positions = (0..length as i32).collect::<Vec<_>>().repeat(batch.rows);
        let (_, logits) = decode(model, embeds.clone(), &batch, device);
        let found = losses(&logits, &batch).1 as f32;
        checks.close(&what("loss without position ids"), &[found], &[plain as f32], 1e-4);
    }
    if let Some(weighted) = json["loss_with_loss_weight"].as_f64() {
        let weights = expected.f32(&format!("{case}.loss_weight"));
        let (mut sum, mut total) = (0.0, 0.0);
        for (i, loss) in nll.iter().enumerate() {
            let target = i / (length - 1) * length + i % (length - 1) + 1;
            if batch.labels[target] != IGNORE {
                sum += f64::from(weights[target] * loss);
                total += f64::from(weights[target]);
            }
        }
        checks.close(&what("weighted loss"), &[(sum / total) as f32], &[weighted as f32], 1e-4);
    }
}

/// Tiles without positions: an error, or with the switch a row that teaches nothing.
fn check_surplus(rows: &[Encoded], json: &Value, model: &InternVl, device: &Device, checks: &mut Checks) {
    let suffix = "_plus_extra_tile";
    for (case, expected) in json["cases"].as_object().unwrap() {
        let Some(row) = case.strip_suffix(suffix).and_then(|id| rows.iter().find(|r| r.id == id)) else { continue };
        let mut batch = Batch::collate(std::slice::from_ref(row), 0, PaddingSide::Right, 1);
        let plain = model.embed(&batch, model.features(&batch, device), device);
        batch.pixels.push(batch.pixels[0].clone());
        checks.equal(&format!("{case} is refused"), model.reconcile(&batch).is_err(), true);
        let compat = Compat { surplus_zeroes_loss: true, ..Compat::default() };
        let batch = model.clone().with_compat(compat).reconcile(&batch).unwrap().into_owned();
        let embeds = model.embed(&batch, model.features(&batch, device), device);
        let same = embeds.clone().into_data() == plain.into_data();
        checks.equal(&format!("{case}: same embeddings"), same, expected["same_embeds_as_one"].as_bool().unwrap());
        let (_, logits) = decode(model, embeds, &batch, device);
        let loss = losses(&logits, &batch).1;
        checks.equal(&format!("{case}: loss"), loss, expected["loss"].as_f64().unwrap());
    }
}

//! Loss and gradient of one micro-batch.
//!
//! Without recompute, one graph spans the model. With it, only the input of each decoder layer is kept; the backward
//! pass runs one layer at a time, as a vector-Jacobian product on a graph that is built for that layer and dropped
//! after it. Both ways end in the same gradients. What is frozen never gets a graph.

use std::path::Path;

use burn::{
    module::Module,
    tensor::{Device, IndexingUpdateOp, Tensor, TensorData},
};

use super::{
    loss::{self, Loss, Targets},
    objective::Objective,
    offload::LayerInputs,
    params::GradientSum,
};
use crate::{
    error::Result,
    kernel::pull_back::pull_back,
    vlm::{Batch, Vlm},
    weights::{Pages, Part},
};

/// How a pass saves memory, at the price of time. Nothing here changes a result.
#[derive(Debug, Clone, Copy, Default)]
pub struct Saving<'a> {
    /// Only the inputs of the decoder layers are kept, and the layers computed again one at a time.
    pub recompute: bool,
    /// Weights that stay in their file, read and dropped layer by layer.
    pub pages: Option<&'a Pages>,
    /// Directory for the inputs of the layers; in memory without one.
    pub offload: Option<&'a Path>,
}

impl Saving<'_> {
    /// Every layer is computed again; nothing else is saved.
    pub const RECOMPUTE: Self = Saving { recompute: true, pages: None, offload: None };

    /// Tells that `part` is done, and that `next` will be needed.
    fn pass(&self, part: Part, next: Option<Part>) {
        if let Some(pages) = self.pages {
            pages.release(part);
            next.into_iter().for_each(|next| pages.expect(next));
        }
    }

    /// Decoder layer `i` is done on the way up.
    fn up(&self, i: usize, layers: usize) {
        // The last one is the first on the way back.
        if i + 1 < layers {
            self.pass(Part::Layer(i), (i + 2 < layers).then_some(Part::Layer(i + 2)));
        }
    }

    /// Decoder layer `i` is done on the way back.
    fn down(&self, i: usize) {
        self.pass(Part::Layer(i), i.checked_sub(2).map(Part::Layer));
    }
}

/// What the vision tower gets, or has already made.
#[derive(Debug, Clone)]
pub enum Vision {
    /// The batch has no image.
    None,
    /// Features of a frozen tower, `[tiles, patches, vision_width]`, without autodiff.
    Features(Tensor<3>),
    /// Pixels for a tower that is trained, `[tiles, channels, height, width]`.
    Pixels(Tensor<4>),
}

/// Token embeddings with image features in their places.
///
/// # Shapes
/// `[rows, length, hidden_size]`
#[must_use]
pub fn inputs<M: Vlm>(model: &M, batch: &Batch, vision: &Vision, device: &Device) -> Tensor<3> {
    let features = match vision {
        Vision::None => None,
        Vision::Features(f) => Some(model.project(f.clone())),
        Vision::Pixels(p) => Some(model.project(model.vision(p.clone()))),
    };
    model.embed(batch, features, device)
}

/// Loss of a batch without gradients; `model` must be without autodiff.
#[must_use]
pub fn evaluate<M: Vlm>(model: &M, batch: &Batch, vision: &Vision, saving: Saving<'_>, device: &Device) -> Loss {
    let targets = Targets::of(batch);
    let context = model.context(batch, device);
    let mut x = inputs(model, batch, vision, device);
    let layers = model.num_layers();
    for i in 0..layers {
        x = model.layer(i, x, &context, None);
        saving.pass(Part::Layer(i), (i + 2 < layers).then_some(Part::Layer(i + 2)));
    }
    loss::evaluate(model, targets.select(x, device), &targets.labels, device)
}

/// Adds the gradient of the `objective` on `batch` to `gradients`, and returns the loss. `device` is
/// without autodiff, `model` with. Weights and inputs of layers stay out of memory only where layers are recomputed.
///
/// # Errors
/// The inputs of the layers cannot be written to their file.
pub fn backward<M: Vlm + Module>(
    model: &M,
    batch: &Batch,
    vision: &Vision,
    objective: &Objective<'_>,
    saving: Saving<'_>,
    device: &Device,
    gradients: &mut GradientSum,
) -> Result<Loss> {
    let targets = Targets::of(batch);
    if targets.labels.is_empty() {
        return Ok(Loss::default());
    }
    if saving.recompute {
        layer_by_layer(model, batch, vision, objective, &targets, saving, device, gradients)
    } else {
        Ok(one_graph(model, batch, vision, objective, &targets, device, gradients))
    }
}

fn one_graph<M: Vlm + Module>(
    model: &M,
    batch: &Batch,
    vision: &Vision,
    objective: &Objective<'_>,
    targets: &Targets,
    device: &Device,
    gradients: &mut GradientSum,
) -> Loss {
    let context = model.context(batch, device);
    let mut x = inputs(model, batch, vision, device);
    for i in 0..model.num_layers() {
        x = model.layer(i, x, &context, None);
    }
    let states = targets.select(x, device);
    let plain = states.clone().without_autodiff();
    let (loss, gradient) = loss::backward(model, plain, targets, objective, device, gradients);
    if states.is_tracked() {
        gradients.add(pull_back(states, gradient));
    }
    loss
}

#[expect(clippy::too_many_arguments, reason = "a pass is about all of them")]
fn layer_by_layer<M: Vlm + Module>(
    model: &M,
    batch: &Batch,
    vision: &Vision,
    objective: &Objective<'_>,
    targets: &Targets,
    saving: Saving<'_>,
    device: &Device,
    gradients: &mut GradientSum,
) -> Result<Loss> {
    let context = model.context(batch, device);
    let plain = model.valid();
    let embedded = inputs(model, batch, vision, device);
    saving.pass(Part::Vision, Some(Part::Layer(0)));
    saving.pass(Part::Projector, Some(Part::Layer(1)));
    let layers = plain.num_layers();
    let mut kept = LayerInputs::new(saving.offload)?;
    let mut last = embedded.clone().without_autodiff();
    for i in 0..layers {
        let x = plain.layer(i, last.clone(), &context, None);
        kept.push(last)?;
        last = x;
        saving.up(i, layers);
    }
    let shape = last.dims();
    let states = targets.select(last, device);
    let (loss, picked) = loss::backward(model, states, targets, objective, device, gradients);
    saving.pass(Part::Ends, layers.checked_sub(2).map(Part::Layer));
    let mut gradient = unselect(picked, &targets.states, shape, device);
    for i in (0..layers).rev() {
        let x = kept.pop(device)?.autodiff();
        let needed = i > 0 || embedded.is_tracked();
        let x = if needed { x.require_grad() } else { x };
        let y = model.layer(i, x.clone(), &context, None);
        if !y.is_tracked() {
            return Ok(loss);
        }
        let mut found = pull_back(y, gradient.clone());
        if needed {
            gradient = x.grad_remove(&mut found).expect("a layer depends on its input");
        }
        gradients.add(found);
        saving.down(i);
    }
    if embedded.is_tracked() {
        gradients.add(pull_back(embedded, gradient));
    }
    Ok(loss)
}

/// Reverse of [`Targets::select`]: rows of `x` at `indices` of a zero tensor.
fn unselect(x: Tensor<2>, indices: &[i32], [rows, length, hidden]: [usize; 3], device: &Device) -> Tensor<3> {
    let indices = Tensor::from_data(TensorData::new(indices.to_vec(), [indices.len()]), device);
    let zeros = Tensor::<2>::zeros([rows * length, hidden], (device, x.dtype()));
    zeros.select_assign(0, indices, x, IndexingUpdateOp::Add).reshape([rows, length, hidden])
}

/// Bytes of activations that one graph over the whole model keeps, estimated from the sizes that dominate.
#[must_use]
pub fn activation_bytes(rows: usize, length: usize, layers: usize, hidden_size: usize) -> u64 {
    // Roughly forty hidden-sized tensors a layer (norms, projections, MLP of up to four times the width, their
    // gradients) and five attention maps a head, with heads of 64.
    let cells = rows * length;
    let attention = rows * length * length * hidden_size.div_ceil(64) * 5;
    4 * layers as u64 * (40 * cells * hidden_size + attention) as u64
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use rand::Rng;

    use super::*;
    use crate::{
        adapter::{AdapterConfig, inject::prepare},
        models::{
            AnyVlm,
            llava_med::{LlavaMed, LlavaMedConfig},
        },
        nn::vit::ClipVisionConfig,
        random,
        train::{TowerMode, TrainConfig, params},
        vlm::{Encoded, ImageSpan, PaddingSide, Pixels},
    };

    /// A model small enough for exhaustive comparisons, with seeded random weights.
    fn model() -> AnyVlm {
        let config = LlavaMedConfig {
            vocab_size: 40,
            hidden_size: 16,
            intermediate_size: 24,
            num_hidden_layers: 3,
            num_attention_heads: 4,
            num_key_value_heads: Some(2),
            vision_config: Some(ClipVisionConfig {
                hidden_size: 8,
                intermediate_size: 12,
                num_hidden_layers: 3,
                num_attention_heads: 2,
                image_size: 8,
                patch_size: 4,
                ..ClipVisionConfig::default()
            }),
            ..LlavaMedConfig::tiny()
        };
        let model = AnyVlm::LlavaMed(LlavaMed::new(&config, &Device::flex()).unwrap());
        let mut index = 0;
        params::update(model.train(), |_, t| {
            index += 1;
            random_like(t, index, 0.3)
        })
        .valid()
    }

    fn random_like(t: Tensor<1>, index: u64, scale: f32) -> Tensor<1> {
        let mut draws = random::stream(1, "test weights", index);
        let n = t.shape().num_elements();
        let values: Vec<f32> =
            (0..n).map(|_| (draws.next_u32() as f32 / u32::MAX as f32 - 0.5) * 2.0 * scale).collect();
        Tensor::from_data(TensorData::new(values, [n]), &t.device())
    }

    fn rows() -> Vec<Encoded> {
        let row = |id: usize, text: usize, image: bool| {
            let patches = if image { 4 } else { 0 };
            let n = text + patches;
            Encoded {
                id: format!("row-{id}"),
                input_ids: (0..n).map(|i| ((i * 7 + id * 3) % 40) as i32).collect(),
                labels: (0..n).map(|i| if i > patches + 2 { ((i * 5 + id) % 40) as i32 } else { -100 }).collect(),
                spans: if image { vec![ImageSpan { start: 1, len: 4 }] } else { vec![] },
                pixels: if image {
                    let data = (0..192).map(|i| ((i * (id + 2)) as f32 * 0.37).sin()).collect();
                    vec![Pixels { data, shape: [3, 8, 8] }]
                } else {
                    vec![]
                },
            }
        };
        vec![row(0, 9, true), row(1, 6, false), row(2, 12, true), row(3, 7, true)]
    }

    fn batch(rows: &[Encoded]) -> Batch {
        Batch::collate(rows, 0, PaddingSide::Right, 4)
    }

    fn towers(vision: TowerMode, projector: TowerMode, language: TowerMode) -> TrainConfig {
        TrainConfig { vision, projector, language, ..TrainConfig::default() }
    }

    /// The tiny model, prepared; its updates get random B so that they matter.
    fn prepared(config: &TrainConfig) -> AnyVlm {
        let adapter = AdapterConfig { r: 2, lora_dropout: 0.0, ..AdapterConfig::default() };
        let prepared = prepare(model(), config, &adapter, 3).unwrap();
        let names = params::trained(&prepared.model, prepared.model.towers());
        params::update(prepared.model, |i, t| if names[i].lora { random_like(t, 1000 + i as u64, 0.2) } else { t })
    }

    fn gradients(model: &AnyVlm, config: &TrainConfig, batches: &[Batch], recompute: bool) -> Vec<(String, Vec<f32>)> {
        let device = Device::flex();
        let mut sum = GradientSum::new(model);
        let plain = model.valid();
        for batch in batches {
            let vision = match batch.pixels(&device) {
                None => Vision::None,
                Some(p) if config.vision == TowerMode::Frozen => Vision::Features(plain.vision(p)),
                Some(p) => Vision::Pixels(p),
            };
            let saving = Saving { recompute, ..Saving::default() };
            let loss = backward(model, batch, &vision, &Objective::Tokens(0.1), saving, &device, &mut sum).unwrap();
            let plain_loss = evaluate(&plain, batch, &vision, saving, &device);
            assert!((loss.sum() - plain_loss.sum()).abs() < 1e-4, "{} {}", loss.sum(), plain_loss.sum());
        }
        let names = params::trained(model, model.towers());
        let flat = |g: Option<Tensor<1>>| g.map_or(vec![], |g| g.into_data().try_to_vec().unwrap());
        names.into_iter().map(|t| t.name).zip(sum.sums.into_iter().map(flat)).collect()
    }

    #[track_caller]
    fn assert_close(a: &[(String, Vec<f32>)], b: &[(String, Vec<f32>)]) {
        assert_eq!(a.len(), b.len());
        for ((name, x), (other, y)) in a.iter().zip(b) {
            assert_eq!((name, x.len()), (other, y.len()));
            let scale = x.iter().fold(1e-3f32, |m, v| m.max(v.abs()));
            for (p, q) in x.iter().zip(y) {
                assert!((p - q).abs() <= 2e-5 * scale, "{name}: {p} {q}");
            }
        }
    }

    #[test]
    fn layer_by_layer_equals_one_graph() {
        use TowerMode::{Frozen, Full, Lora};
        for config in [
            towers(Frozen, Full, Lora),
            towers(Lora, Lora, Lora),
            towers(Full, Full, Full),
            towers(Frozen, Frozen, Lora),
            towers(Frozen, Full, Frozen),
            towers(Full, Frozen, Frozen),
        ] {
            let model = prepared(&config);
            let batches = [batch(&rows())];
            let one = gradients(&model, &config, &batches, false);
            let layered = gradients(&model, &config, &batches, true);
            assert!(one.iter().any(|(_, g)| g.iter().any(|x| x.abs() > 1e-4)), "{config:?}");
            assert_close(&one, &layered);
        }
    }

    #[test]
    fn inputs_of_layers_on_disk_end_in_the_same_bits() {
        let config = towers(TowerMode::Frozen, TowerMode::Full, TowerMode::Lora);
        let (model, batch, dir) = (prepared(&config), batch(&rows()), tempfile::tempdir().unwrap());
        let device = Device::flex();
        let vision = Vision::Features(model.valid().vision(batch.pixels(&device).unwrap()));
        let run = |saving| {
            let mut sum = GradientSum::new(&model);
            let loss = backward(&model, &batch, &vision, &Objective::Tokens(0.1), saving, &device, &mut sum).unwrap();
            let sums = sum.sums.into_iter().map(|g| g.map(|g| g.into_data().try_to_vec::<f32>().unwrap()));
            (loss.nll, sums.collect::<Vec<_>>())
        };
        let saving = Saving { offload: Some(dir.path()), ..Saving::RECOMPUTE };
        assert_eq!(run(saving), run(Saving::RECOMPUTE));
        let missing = dir.path().join("missing");
        let saving = Saving { offload: Some(&missing), ..Saving::RECOMPUTE };
        let error =
            backward(&model, &batch, &vision, &Objective::Tokens(0.1), saving, &device, &mut GradientSum::new(&model));
        assert!(error.unwrap_err().to_string().contains("missing"));
    }

    #[test]
    fn what_is_frozen_has_no_gradient_and_what_is_trained_has() {
        let config = towers(TowerMode::Frozen, TowerMode::Full, TowerMode::Lora);
        let found = gradients(&prepared(&config), &config, &[batch(&rows())], true);
        assert!(found.iter().all(|(n, _)| n.contains("lora_") || n.starts_with("model.mm_projector.")));
        assert!(found.iter().all(|(n, g)| !g.is_empty() && g.iter().any(|x| *x != 0.0) || panic!("{n}")));
        // Seven modules a layer, two tensors each; two linear layers with bias.
        assert_eq!(found.len(), 3 * 7 * 2 + 4);
    }

    #[test]
    fn gradients_do_not_depend_on_how_rows_are_batched_or_padded() {
        let config = towers(TowerMode::Frozen, TowerMode::Full, TowerMode::Lora);
        let model = prepared(&config);
        let whole = gradients(&model, &config, &[batch(&rows())], true);
        let single: Vec<Batch> = rows().chunks(1).map(batch).collect();
        assert_close(&whole, &gradients(&model, &config, &single, true));
        let padded = [Batch::collate(&rows(), 0, PaddingSide::Right, 32)];
        assert_close(&whole, &gradients(&model, &config, &padded, true));
    }

    #[test]
    fn a_gradient_is_the_slope_of_the_loss() {
        let config = towers(TowerMode::Frozen, TowerMode::Full, TowerMode::Lora);
        let model = prepared(&config);
        let batch = batch(&rows());
        let found: HashMap<String, Vec<f32>> =
            gradients(&model, &config, std::slice::from_ref(&batch), true).into_iter().collect();
        let device = Device::flex();
        let names = params::trained(&model, model.towers());
        for name in ["model.layers.1.mlp.down_proj.lora_B.weight", "model.mm_projector.0.bias"] {
            let index = names.iter().position(|t| t.name == name).unwrap();
            let slope = |h: f32| {
                let moved = params::update(model.clone(), |i, t| {
                    if i != index {
                        return t;
                    }
                    let mut v: Vec<f32> = t.clone().into_data().try_to_vec().unwrap();
                    v[1] += h;
                    let n = v.len();
                    Tensor::from_data(TensorData::new(v, [n]), &device)
                })
                .valid();
                let vision = Vision::Features(moved.vision(batch.pixels(&device).unwrap()));
                0.1 * evaluate(&moved, &batch, &vision, Saving::default(), &device).sum()
            };
            let numeric = (slope(1e-2) - slope(-1e-2)) / 2e-2;
            let exact = f64::from(found[name][1]);
            assert!((numeric - exact).abs() < 2e-3 * exact.abs().max(0.05), "{name}: {numeric} {exact}");
        }
    }
}

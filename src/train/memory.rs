//! How much memory a model needs to be held, to answer and to be trained, from shapes alone.
//!
//! Training keeps the input of every decoder layer and computes one layer again at a time, so its peak is that of one
//! layer's graph, of the loss over the supervised positions, or of the vision tower, whichever is largest, on top of
//! what stays: weights, what is trained with its gradient and two moments, and the layer inputs.

use burn::module::Module;
use serde::Serialize;

use crate::{
    nn::visit::{NamedParam, named_params},
    vlm::{Tower, Vlm},
};

/// Bytes of an activation and of everything that is trained.
const F32: u64 = 4;

/// What a pass is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Load {
    /// Rows of a batch.
    pub rows: usize,
    /// Positions of a row, images included.
    pub length: usize,
    /// Image tiles of a batch.
    pub tiles: usize,
    /// Positions of a tile inside the vision tower.
    pub patches: usize,
    /// Rank of the updates on all linear modules of the language tower; 0 without training.
    pub r: usize,
    /// Attention heads of the language tower.
    pub heads: usize,
    /// Bytes of a weight at rest.
    pub weight_bytes: u64,
}

/// One line of the account.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Item {
    /// What it is.
    pub name: String,
    /// Its bytes.
    pub bytes: u64,
    /// Whether it is there all the time; of the others only the largest counts.
    pub stays: bool,
}

/// What a pass needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// Everything that counts.
    pub items: Vec<Item>,
    /// Sum of what stays, and the largest of the rest.
    pub peak: u64,
}

/// Shapes of the linear modules of one layer.
struct Layer {
    /// Width of the residual stream.
    hidden: u64,
    /// Sum of the widths in and out.
    widths: u64,
    count: u64,
}

/// Accounts for a pass of `model`, which may be without weights.
#[must_use]
pub fn account<M: Module + Vlm>(model: &M, load: &Load) -> Memory {
    let params: Vec<NamedParam> = named_params(model).into_iter().filter(|p| !p.adapter).collect();
    let of = |tower: &'static Tower| params.iter().filter(|p| Tower::of(model.towers(), &p.name) == Some(tower));
    let mut items: Vec<Item> = model
        .towers()
        .iter()
        .map(|t| {
            let values = of(t).map(NamedParam::num_elements).sum::<usize>() as u64;
            Item { name: format!("weights, {}", t.name), bytes: values * load.weight_bytes, stays: true }
        })
        .collect();
    let positions = (load.rows * load.length) as u64;
    if let Some(tower) = model.towers().iter().find(|t| t.name == "language") {
        let layer = layer(of(tower));
        items.extend(language(&layer, tower, of(tower), positions, load));
    }
    if let Some(tower) = model.towers().iter().find(|t| t.name == "vision").filter(|_| load.tiles > 0) {
        let layer = layer(of(tower));
        let values = (load.tiles * load.patches) as u64 * (layer.widths / 2 + 4 * layer.hidden);
        items.push(Item { name: "vision tower, one block".into(), bytes: values * F32, stays: false });
    }
    items.retain(|i| i.bytes > 0);
    let stays: u64 = items.iter().filter(|i| i.stays).map(|i| i.bytes).sum();
    let largest = items.iter().filter(|i| !i.stays).map(|i| i.bytes).max().unwrap_or(0);
    Memory { items, peak: stays + largest }
}

fn language<'a>(
    layer: &Layer,
    tower: &Tower,
    params: impl Iterator<Item = &'a NamedParam>,
    positions: u64,
    load: &Load,
) -> Vec<Item> {
    let item = |name: &str, values: u64, stays: bool| Item { name: name.into(), bytes: values * F32, stays };
    let (mut adapted, mut vocabulary) = (0u64, 0u64);
    for p in params.filter(|p| p.linear_weight) {
        if number(&p.name, tower).is_some() {
            adapted += (load.r * (p.shape[0] + p.shape[1])) as u64;
        } else {
            vocabulary = vocabulary.max(p.shape[1] as u64);
        }
    }
    let scores = (load.rows * load.heads) as u64 * (load.length * load.length) as u64;
    let stream = positions * layer.hidden;
    if load.r == 0 {
        return vec![item("one layer", positions * (layer.widths + 4 * layer.hidden) / 2 + scores, false)];
    }
    vec![
        item("adapter", adapted, true),
        item("adapter, gradients", adapted, true),
        item("adapter, moments of the optimizer", 2 * adapted, true),
        item("inputs of the layers", stream * (layer.count + 1), true),
        // Every linear module keeps its input, the narrow part of the update and its output or gradient; attention keeps
        // its probabilities and their gradient.
        item("one layer, forward and backward", positions * (layer.widths + 8 * layer.hidden) + 3 * scores / 2, false),
        item("loss, a chunk of logits with gradient", 3 * positions.min(512) * vocabulary, false),
    ]
}

/// The layers of a tower: modules whose name has a number.
fn layer<'a>(params: impl Iterator<Item = &'a NamedParam>) -> Layer {
    let (mut widths, mut hidden, mut numbers) = (0u64, u64::MAX, std::collections::BTreeSet::new());
    for p in params {
        let Some(n) = p.name.split('.').find_map(|s| s.parse::<u64>().ok()) else { continue };
        numbers.insert(n);
        if n == 0 && p.linear_weight {
            widths += (p.shape[0] + p.shape[1]) as u64;
            hidden = hidden.min(p.shape[0] as u64);
        }
    }
    Layer { hidden: if hidden == u64::MAX { 0 } else { hidden }, widths, count: numbers.len() as u64 }
}

fn number(name: &str, tower: &Tower) -> Option<u64> {
    name.strip_prefix(tower.prefix)?.split('.').find_map(|s| s.parse().ok())
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::models::MODELS;

    #[test]
    fn every_preset_is_accounted_for_and_training_needs_more() {
        let device = Device::flex();
        for def in MODELS {
            for preset in def.presets {
                let (model, tokens) = (def.empty)(preset.name, &device).unwrap();
                let heads = 32;
                let answer = Load { rows: 1, length: 640, tiles: 1, patches: tokens, r: 0, heads, weight_bytes: 2 };
                let train = Load { r: 16, ..answer };
                let (answer, train) = (account(&model, &answer), account(&model, &train));
                let weights = 2 * named_params(&model).iter().map(NamedParam::num_elements).sum::<usize>() as u64;
                assert!(answer.peak > weights && train.peak > answer.peak, "{}: {answer:?} {train:?}", preset.name);
                assert!(train.items.iter().any(|i| i.name == "inputs of the layers"));
            }
        }
    }
}

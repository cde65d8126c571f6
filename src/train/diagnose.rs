//! Where a number that is not finite came from: the first tensor, in the order of computation, that holds one.
//!
//! Nothing of this runs before a loss or gradient is found that is not finite.

use burn::{
    module::Module,
    tensor::{Device, Tensor},
};

use super::{
    loss::{Loss, Targets},
    params::{self, GradientSum, Trained},
    step::Vision,
};
use crate::vlm::{Batch, Vlm};

/// What in the forward pass of `batch` was not finite first, in words; none if all of it is finite.
#[must_use]
pub fn forward<M: Vlm + Module>(
    model: &M,
    trained: &[Trained],
    batch: &Batch,
    vision: &Vision,
    device: &Device,
) -> Option<String> {
    weights(model, trained).or_else(|| pixels(batch)).or_else(|| activations(&model.valid(), batch, vision, device))
}

/// The first trained tensor that an earlier update has spoilt.
#[must_use]
pub fn weights<M: Module>(model: &M, trained: &[Trained]) -> Option<String> {
    let values = params::values(model);
    let bad = trained.iter().zip(values).find(|(_, v)| first_bad(v.clone()).is_some())?;
    Some(format!("trained tensor {}, since an earlier update", bad.0.name))
}

fn pixels(batch: &Batch) -> Option<String> {
    let tile = batch.pixels.iter().position(|p| p.data.iter().any(|v| !v.is_finite()))?;
    let cell = batch.feature_index.get(tile * batch.feature_index.len() / batch.pixels.len());
    let id = cell.and_then(|c| batch.id_at(*c as usize)).unwrap_or_default();
    Some(format!("pixels of an image of row {id}"))
}

fn activations<M: Vlm>(model: &M, batch: &Batch, vision: &Vision, device: &Device) -> Option<String> {
    let at = |what: &str, x: &Tensor<3>| {
        let width = x.dims()[2].max(1);
        let cell = first_bad(x.clone().reshape([x.shape().num_elements()]))? / width;
        let id = batch.id_at(cell).unwrap_or("(padding)");
        Some(format!("{what}, row {id}, position {}", batch.positions.get(cell).copied().unwrap_or_default()))
    };
    let features = match vision {
        Vision::None => None,
        Vision::Features(f) => Some(f.clone()),
        Vision::Pixels(p) => Some(model.vision(p.clone())),
    };
    if let Some(f) = &features
        && first_bad(f.clone().reshape([f.shape().num_elements()])).is_some()
    {
        return Some("output of the vision tower".into());
    }
    let features = features.map(|f| model.project(f));
    if let Some(f) = &features
        && first_bad(f.clone().reshape([f.shape().num_elements()])).is_some()
    {
        return Some("output of the projector".into());
    }
    let context = model.context(batch, device);
    let mut x = model.embed(batch, features, device);
    if let Some(found) = at("embedded tokens", &x) {
        return Some(found);
    }
    for i in 0..model.num_layers() {
        x = model.layer(i, x, &context, None);
        if let Some(found) = at(&format!("output of decoder layer {i}"), &x) {
            return Some(found);
        }
    }
    at("output of the final norm", &model.final_norm(x)).or_else(|| Some("logits".into()))
}

/// Flat index of the first value that is not finite.
fn first_bad(x: Tensor<1>) -> Option<usize> {
    let data = x.into_data().convert::<f32>();
    data.as_slice::<f32>().ok()?.iter().position(|v| !v.is_finite())
}

/// Ids of the rows whose loss is not finite.
#[must_use]
pub fn bad_rows<'b>(batch: &'b Batch, loss: &Loss) -> Vec<&'b str> {
    let targets = Targets::of(batch);
    let mut rows: Vec<&str> = Vec::new();
    for (state, nll) in targets.states.iter().zip(&loss.nll) {
        let id = batch.id_at(*state as usize).unwrap_or_default();
        if !nll.is_finite() && !rows.contains(&id) {
            rows.push(id);
        }
    }
    rows
}

/// Index of the gradient that was the first to hold a value that is not finite: backward passes run from the last tensor
/// to the first, and what lies before a bad one is bad as well.
#[must_use]
pub fn first_gradient(gradients: &GradientSum) -> Option<usize> {
    gradients.sums.iter().rposition(|g| g.as_ref().is_some_and(|g| first_bad(g.clone()).is_some()))
}

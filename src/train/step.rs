//! Loss and gradient of one micro-batch.
//!
//! Without recompute, one graph spans the model. With it, only the input of each decoder layer is kept; the backward
//! pass runs one layer at a time, as a vector-Jacobian product on a graph that is built for that layer and dropped
//! after it. Both ways end in the same gradients. What is frozen never gets a graph.

use burn::{
    module::Module,
    tensor::{Device, Gradients, IndexingUpdateOp, Tensor, TensorData},
};

use super::{
    loss::{self, Loss, Targets},
    params::GradientSum,
};
use crate::vlm::{Batch, Vlm, splice};

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
    splice(model.embed_tokens(batch.input_ids(device)), features, &batch.feature_index)
}

/// Loss of a batch without gradients; `model` must be without autodiff.
#[must_use]
pub fn evaluate<M: Vlm>(model: &M, batch: &Batch, vision: &Vision, device: &Device) -> Loss {
    let targets = Targets::of(batch);
    let context = model.context(batch, device);
    let mut x = inputs(model, batch, vision, device);
    for i in 0..model.num_layers() {
        x = model.layer(i, x, &context, None);
    }
    loss::evaluate(model, targets.select(x, device), &targets.labels, device)
}

/// Adds the gradient of `weight` times the summed loss of `batch` to `gradients`, and returns the loss. `device` is
/// without autodiff, `model` with.
#[must_use]
pub fn backward<M: Vlm + Module>(
    model: &M,
    batch: &Batch,
    vision: &Vision,
    weight: f64,
    recompute: bool,
    device: &Device,
    gradients: &mut GradientSum,
) -> Loss {
    let targets = Targets::of(batch);
    if targets.labels.is_empty() {
        return Loss::default();
    }
    if recompute {
        layer_by_layer(model, batch, vision, weight, &targets, device, gradients)
    } else {
        one_graph(model, batch, vision, weight, &targets, device, gradients)
    }
}

/// Gradients of `sum(y * g)`, so the vector-Jacobian product of `y` with `g`.
fn pull_back<const D: usize>(y: Tensor<D>, g: Tensor<D>) -> Gradients {
    (y * g).sum().backward()
}

fn one_graph<M: Vlm>(
    model: &M,
    batch: &Batch,
    vision: &Vision,
    weight: f64,
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
    let (loss, gradient) = loss::backward(model, plain, &targets.labels, weight, device, gradients);
    if states.is_tracked() {
        gradients.add(pull_back(states, gradient));
    }
    loss
}

fn layer_by_layer<M: Vlm + Module>(
    model: &M,
    batch: &Batch,
    vision: &Vision,
    weight: f64,
    targets: &Targets,
    device: &Device,
    gradients: &mut GradientSum,
) -> Loss {
    let context = model.context(batch, device);
    let plain = model.valid();
    let embedded = inputs(model, batch, vision, device);
    let mut kept = vec![embedded.clone().without_autodiff()];
    for i in 0..plain.num_layers() {
        let x = plain.layer(i, kept[i].clone(), &context, None);
        kept.push(x);
    }
    let last = kept.pop().expect("at least the embedded input");
    let shape = last.dims();
    let (loss, picked) =
        loss::backward(model, targets.select(last, device), &targets.labels, weight, device, gradients);
    let mut gradient = unselect(picked, &targets.states, shape, device);
    for i in (0..model.num_layers()).rev() {
        let x = kept.pop().expect("one input per layer").autodiff();
        let needed = i > 0 || embedded.is_tracked();
        let x = if needed { x.require_grad() } else { x };
        let y = model.layer(i, x.clone(), &context, None);
        if !y.is_tracked() {
            return loss;
        }
        let mut found = pull_back(y, gradient.clone());
        if needed {
            gradient = x.grad_remove(&mut found).expect("a layer depends on its input");
        }
        gradients.add(found);
    }
    if embedded.is_tracked() {
        gradients.add(pull_back(embedded, gradient));
    }
    loss
}

/// Reverse of [`Targets::select`]: rows of `x` at `indices` of a zero tensor.
fn unselect(x: Tensor<2>, indices: &[i32], [rows, length, hidden]: [usize; 3], device: &Device) -> Tensor<3> {
    let indices = Tensor::from_data(TensorData::new(indices.to_vec(), [indices.len()]), device);
    let zeros = Tensor::<2>::zeros([rows * length, hidden], (device, x.dtype()));
    zeros.select_assign(0, indices, x, IndexingUpdateOp::Add).reshape([rows, length, hidden])
}

/// Bytes of activations that one graph over the whole model keeps, estimated from the sizes that dominate.
#[must_use]
pub fn activation_bytes(batch: &Batch, layers: usize, hidden_size: usize) -> usize {
    // Roughly forty hidden-sized tensors a layer (norms, projections, MLP of up to four times the width, their
    // gradients) and five attention maps a head, with heads of 64.
    let cells = batch.rows * batch.length;
    let attention = batch.rows * batch.length * batch.length * hidden_size.div_ceil(64) * 5;
    4 * layers * (40 * cells * hidden_size + attention)
}

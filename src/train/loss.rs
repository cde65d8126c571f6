//! Cross-entropy over the supervised positions only, in chunks, with its own gradient.
//!
//! Logits exist for one chunk of positions at a time, never for a whole batch, and the softmax is computed once for
//! loss and gradient.

use burn::{
    module::Module,
    tensor::{DType, Device, Int, Tensor, TensorData},
};

use super::{objective::Objective, params::GradientSum};
use crate::{
    kernel::{cross_entropy::cross_entropy, pull_back::pull_back},
    nn::debug_dtype,
    vlm::{Batch, IGNORE, Vlm},
};

/// Positions whose logits exist at a time.
pub(super) const CHUNK: usize = 1024;

/// Where a batch is supervised.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Targets {
    /// Flat index (row * length + position) of the state that predicts.
    pub states: Vec<i32>,
    /// Id it should predict.
    pub labels: Vec<i32>,
    /// Row of the batch.
    pub rows: Vec<usize>,
}

impl Targets {
    /// Each label is predicted by the position before it.
    #[must_use]
    pub fn of(batch: &Batch) -> Self {
        let mut targets = Self::default();
        for row in 0..batch.rows {
            for position in 1..batch.length {
                let at = row * batch.length + position;
                if batch.labels[at] != IGNORE {
                    targets.states.push((at - 1) as i32);
                    targets.labels.push(batch.labels[at]);
                    targets.rows.push(row);
                }
            }
        }
        targets
    }

    /// Picks the predicting states.
    ///
    /// # Shapes
    /// `[rows, length, hidden]` -> `[supervised, hidden]`
    #[must_use]
    pub fn select(&self, x: Tensor<3>, device: &Device) -> Tensor<2> {
        let [rows, length, hidden] = x.dims();
        x.reshape([rows * length, hidden]).select(0, ints(&self.states, device))
    }
}

fn ints(values: &[i32], device: &Device) -> Tensor<1, Int> {
    Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), (device, DType::I32))
}

/// Loss of a batch.
#[derive(Debug, Clone, Default)]
pub struct Loss {
    /// Negative log-likelihood of each supervised position, in nats.
    pub nll: Vec<f32>,
}

impl Loss {
    /// Sum over positions.
    #[must_use]
    pub fn sum(&self) -> f64 {
        self.nll.iter().map(|x| f64::from(*x)).sum()
    }
}

/// Negative log-likelihoods of `states` (before the final norm) without gradients.
#[must_use]
pub fn evaluate<M: Vlm>(model: &M, states: Tensor<2>, labels: &[i32], device: &Device) -> Loss {
    let mut loss = Loss::default();
    for (start, chunk) in chunks(labels) {
        let part = states.clone().narrow(0, start, chunk.len());
        let (nll, _) = softmax_loss(logits(model, part), chunk, device);
        loss.nll.extend(host(nll));
    }
    loss
}

/// Negative log-likelihoods of `states`, and the gradient of the `objective` with respect to `states`; the gradients of
/// head and final norm, if they are trained, go to `gradients`.
///
/// # Shapes
/// `states` and the returned gradient: `[supervised, hidden]`, without autodiff.
#[must_use]
pub fn backward<M: Vlm + Module>(
    model: &M,
    states: Tensor<2>,
    targets: &Targets,
    objective: &Objective<'_>,
    device: &Device,
    gradients: &mut GradientSum,
) -> (Loss, Tensor<2>) {
    let mut loss = Loss::default();
    let mut parts = Vec::new();
    // Factors that depend on the likelihoods need all of them first.
    let weights = objective.constant().is_none().then(|| {
        let known = evaluate(&model.valid(), states.clone(), &targets.labels, device);
        objective.weights(&known.nll, &targets.rows)
    });
    for (start, chunk) in chunks(&targets.labels) {
        let leaf = states.clone().narrow(0, start, chunk.len()).autodiff().require_grad();
        let logits = logits(model, leaf.clone());
        let (nll, gradient) = softmax_loss(logits.clone().without_autodiff(), chunk, device);
        let gradient = match &weights {
            None => gradient.mul_scalar(objective.constant().unwrap_or_default()),
            Some(all) => {
                let part = all[start..start + chunk.len()].to_vec();
                gradient * Tensor::<2>::from_data(TensorData::new(part, [chunk.len(), 1]), device)
            }
        };
        let mut found = pull_back(logits, gradient);
        parts.push(leaf.grad_remove(&mut found).expect("the head depends on its input"));
        gradients.add(found);
        loss.nll.extend(host(nll));
    }
    let gradient = if parts.len() == 1 { parts.swap_remove(0) } else { Tensor::cat(parts, 0) };
    (loss, gradient)
}

fn chunks(labels: &[i32]) -> impl Iterator<Item = (usize, &[i32])> {
    labels.chunks(CHUNK).enumerate().map(|(i, chunk)| (i * CHUNK, chunk))
}

fn logits<M: Vlm>(model: &M, states: Tensor<2>) -> Tensor<2> {
    let normed: Tensor<3> = model.final_norm(states.unsqueeze_dim(0));
    let logits = model.logits(normed.squeeze_dim(0));
    if logits.dtype() == DType::F32 { logits } else { logits.cast(DType::F32) }
}

/// Per position `-log softmax(logits)[label]`, and the gradient of its sum with respect to the logits.
fn softmax_loss(logits: Tensor<2>, labels: &[i32], device: &Device) -> (Tensor<1>, Tensor<2>) {
    debug_dtype(&logits, DType::F32, "the loss");
    cross_entropy(logits, ints(labels, device))
}

fn host(values: Tensor<1>) -> Vec<f32> {
    values.into_data().try_to_vec().expect("losses are f32")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gradient_is_softmax_minus_one_hot() {
        let device = Device::flex();
        let logits = Tensor::<2>::from_data([[1.0f32, 2.0, 3.0], [1000.0, 0.0, -1000.0]], &device);
        let (nll, gradient) = softmax_loss(logits.clone(), &[2, 0], &device);
        let nll = host(nll);
        assert!((nll[0] - 0.407_606).abs() < 1e-5 && nll[1].abs() < 1e-6, "{nll:?}");
        let tracked = logits.autodiff().require_grad();
        let log_softmax = burn::tensor::activation::log_softmax(tracked.clone(), 1);
        let labels = Tensor::<2, Int>::from_data([[2], [0]], &device);
        let grads = log_softmax.gather(1, labels).sum().neg().backward();
        let expected = tracked.grad(&grads).unwrap();
        assert!((gradient - expected).abs().max().into_scalar::<f32>() < 1e-6);
    }

    #[test]
    fn a_label_is_predicted_by_the_position_before() {
        let batch = Batch {
            ids: vec!["a".into(), "b".into()],
            input_ids: vec![0; 6],
            labels: vec![7, IGNORE, 5, IGNORE, 6, IGNORE],
            mask: vec![true; 6],
            positions: vec![0; 6],
            segments: vec![0, 0, 0, 1, 1, 1],
            feature_index: vec![],
            pixels: vec![],
            rows: 2,
            length: 3,
        };
        let targets = Targets::of(&batch);
        assert_eq!((targets.states, targets.labels, targets.rows), (vec![1, 3], vec![5, 6], vec![0, 1]));
        assert_eq!(batch.supervised(), 2);
    }
}

//! Softmax over the last dimension of scores plus a mask that broadcasts over heads, as attention needs it.
//!
//! Only the probabilities are kept for the backward pass.

use burn::{
    backend::{
        Autodiff, Backend, Dispatch, Flex,
        autodiff::{
            checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
            grads::Gradients,
            ops::{Backward, Ops, OpsKind},
        },
        backend_extension,
        flex::FlexTensor,
        tensor::FloatTensor,
    },
    tensor::Tensor,
};
use rayon::prelude::*;

use super::flex::{self, vectorized};

/// `softmax(scores + bias)` over the last dimension. The bias gets no gradient.
///
/// # Shapes
/// `scores` `[rows, heads, queries, keys]`, `bias` `[rows or 1, 1, queries, keys]` -> as `scores`
#[must_use]
pub fn masked_softmax(scores: Tensor<4>, bias: Tensor<4>) -> Tensor<4> {
    let ([rows, _, queries, keys], bias_dims) = (scores.dims(), bias.dims());
    assert!(
        bias_dims[1..] == [1, queries, keys] && (bias_dims[0] == rows || bias_dims[0] == 1),
        "masked_softmax: scores {:?} and bias {bias_dims:?}",
        scores.dims()
    );
    Tensor::from_dispatch(Dispatch::masked_softmax(scores.into_dispatch(), bias.into_dispatch()))
}

/// The operation and its gradient.
#[backend_extension(Flex, Cube: cfg(feature = "gpu"), Fusion: cfg(feature = "gpu"), Autodiff)]
pub trait MaskedSoftmaxOps: Backend {
    /// `softmax(scores + bias)`.
    #[fusion(default)]
    fn masked_softmax(scores: FloatTensor<Self>, bias: FloatTensor<Self>) -> FloatTensor<Self> {
        forward::<Self>(scores, bias)
    }

    /// Gradient of the scores from the probabilities and their gradient.
    #[fusion(default)]
    fn masked_softmax_backward(probabilities: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        backward::<Self>(probabilities, grad)
    }
}

#[cfg(feature = "gpu")]
impl MaskedSoftmaxOps for burn_cubecl::CubeBackend {}

fn forward<B: Backend>(scores: FloatTensor<B>, bias: FloatTensor<B>) -> FloatTensor<B> {
    let scores = B::float_add(scores, bias);
    let largest = B::float_max_dim(scores.clone(), 3);
    let exp = B::float_exp(B::float_sub(scores, largest));
    let sum = B::float_sum_dim(exp.clone(), 3);
    B::float_div(exp, sum)
}

fn backward<B: Backend>(probabilities: FloatTensor<B>, grad: FloatTensor<B>) -> FloatTensor<B> {
    let weighted = B::float_mul(probabilities.clone(), grad);
    let sum = B::float_sum_dim(weighted.clone(), 3);
    B::float_sub(weighted, B::float_mul(probabilities, sum))
}

#[derive(Debug)]
struct MaskedSoftmaxBackward;

impl<B: MaskedSoftmaxOps> Backward<B, 1> for MaskedSoftmaxBackward {
    type State = FloatTensor<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let [node] = ops.parents;
        let grad = grads.consume::<B>(&ops.node);
        if let Some(node) = node {
            grads.register::<B>(node.id, B::masked_softmax_backward(ops.state, grad));
        }
    }
}

impl<B: MaskedSoftmaxOps, C: CheckpointStrategy> MaskedSoftmaxOps for Autodiff<B, C> {
    fn masked_softmax(scores: FloatTensor<Self>, bias: FloatTensor<Self>) -> FloatTensor<Self> {
        let bias = bias.into_primitive();
        match MaskedSoftmaxBackward.prepare::<C>([scores.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let probabilities = B::masked_softmax(scores.into_primitive(), bias);
                prep.finish(probabilities.clone(), probabilities)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::masked_softmax(scores.into_primitive(), bias)),
        }
    }
}

#[inline(always)]
fn forward_rows<const FMA: bool>(scores: &[f32], bias: &[f32], out: &mut [f32], keys: usize) {
    for ((scores, bias), out) in scores.chunks(keys).zip(bias.chunks(keys)).zip(out.chunks_mut(keys)) {
        for ((out, score), bias) in out.iter_mut().zip(scores).zip(bias) {
            *out = score + bias;
        }
        let largest = flex::max(out);
        for value in out.iter_mut() {
            *value = flex::exp::<FMA>(*value - largest);
        }
        let scale = 1.0 / flex::sum(keys, |i| out[i]);
        for value in out.iter_mut() {
            *value *= scale;
        }
    }
}

#[inline(always)]
fn backward_rows<const FMA: bool>(probabilities: &[f32], grad: &[f32], out: &mut [f32], keys: usize) {
    for ((p, grad), out) in probabilities.chunks(keys).zip(grad.chunks(keys)).zip(out.chunks_mut(keys)) {
        let sum = flex::sum(keys, |i| p[i] * grad[i]);
        for ((out, p), grad) in out.iter_mut().zip(p).zip(grad) {
            *out = p * (grad - sum);
        }
    }
}

impl MaskedSoftmaxOps for Flex {
    fn masked_softmax(scores: FlexTensor, bias: FlexTensor) -> FlexTensor {
        if !flex::applies(&[&scores, &bias]) {
            return forward::<Self>(scores, bias);
        }
        let (scores, bias) = (scores.to_contiguous(), bias.to_contiguous());
        let [rows, heads, queries, keys] = scores.layout().shape().dims();
        let block = queries * keys;
        let (values, biases) = (flex::slice(&scores), flex::slice(&bias));
        let per_row = biases.len() == rows * block;
        let mut out = vec![0f32; values.len()];
        out.par_chunks_mut(block.max(1)).zip(values.par_chunks(block.max(1))).enumerate().for_each(
            |(index, (out, scores))| {
                let bias = if per_row { &biases[index / heads * block..][..block] } else { biases };
                vectorized!(forward_rows(scores, bias, out, keys));
            },
        );
        flex::tensor(out, scores.layout().shape().clone())
    }

    fn masked_softmax_backward(probabilities: FlexTensor, grad: FlexTensor) -> FlexTensor {
        if !flex::applies(&[&probabilities, &grad]) {
            return backward::<Self>(probabilities, grad);
        }
        let (probabilities, grad) = (probabilities.to_contiguous(), grad.to_contiguous());
        let [_, _, queries, keys] = probabilities.layout().shape().dims();
        let block = (queries * keys).max(1);
        let mut out = vec![0f32; flex::slice(&grad).len()];
        out.par_chunks_mut(block)
            .zip(flex::slice(&probabilities).par_chunks(block))
            .zip(flex::slice(&grad).par_chunks(block))
            .for_each(|((out, p), grad)| vectorized!(backward_rows(p, grad, out, keys)));
        flex::tensor(out, probabilities.layout().shape().clone())
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::activation::softmax;

    use super::{
        super::tests::{device, difference, values},
        *,
    };

    fn run(op: fn(Tensor<4>, Tensor<4>) -> Tensor<4>, rows: usize, swapped: bool) -> (Tensor<4>, Tensor<4>) {
        let device = device().autodiff();
        let scores = values([3, 2, 9, 37], 0, &device).require_grad();
        let bias = (values([rows, 1, 9, 37], 1, &device) - 2.0).sign().mul_scalar(1e30).clamp_max(0.0);
        let weight = values([3, 2, 9, 37], 2, &device);
        let input = if swapped { scores.clone().swap_dims(0, 1).swap_dims(0, 1) * 1.0 } else { scores.clone() };
        let out = op(input, bias);
        let mut grads = (out.clone() * weight).sum().backward();
        (out.without_autodiff(), scores.grad_remove(&mut grads).expect("tracked"))
    }

    #[test]
    fn fused_equals_composed() {
        for rows in [1, 3] {
            for swapped in [false, true] {
                let found = run(masked_softmax, rows, swapped);
                let expected = run(|scores, bias| softmax(scores + bias, 3), rows, swapped);
                assert!(difference(found.0, expected.0) < 1e-6);
                assert!(difference(found.1, expected.1) < 2e-6);
            }
        }
    }
}

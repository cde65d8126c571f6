//! Quick GELU: `x * sigmoid(1.702 x)`, the activation of CLIP.

use burn::{
    backend::{
        Autodiff, Backend, Dispatch, Flex,
        autodiff::{
            NodeId,
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

use super::flex::{self, CHUNK, vectorized};

/// Slope of the sigmoid.
const SLOPE: f32 = 1.702;

/// `x * sigmoid(1.702 x)`.
///
/// # Shapes
/// any -> same
#[must_use]
pub fn quick_gelu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    Tensor::from_dispatch(Dispatch::quick_gelu(x.into_dispatch()))
}

/// The operation and its gradient.
#[backend_extension(Flex, Cube: cfg(feature = "gpu"), Fusion: cfg(feature = "gpu"), Autodiff)]
pub trait QuickGeluOps: Backend {
    /// `x * sigmoid(1.702 x)`.
    #[fusion(default)]
    fn quick_gelu(x: FloatTensor<Self>) -> FloatTensor<Self> {
        forward::<Self>(x)
    }

    /// Gradient of `x`.
    #[fusion(default)]
    fn quick_gelu_backward(x: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        backward::<Self>(x, grad)
    }
}

#[cfg(feature = "gpu")]
impl QuickGeluOps for burn_cubecl::CubeBackend {}

fn forward<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    B::float_mul(x.clone(), B::sigmoid(B::float_mul_scalar(x, SLOPE.into())))
}

fn backward<B: Backend>(x: FloatTensor<B>, grad: FloatTensor<B>) -> FloatTensor<B> {
    let scaled = B::float_mul_scalar(x, SLOPE.into());
    let sigmoid = B::sigmoid(scaled.clone());
    let one_minus = B::float_add_scalar(B::float_neg(sigmoid.clone()), 1f32.into());
    let slope = B::float_add_scalar(B::float_mul(scaled, one_minus), 1f32.into());
    B::float_mul(grad, B::float_mul(sigmoid, slope))
}

#[derive(Debug)]
struct QuickGeluBackward;

impl<B: QuickGeluOps> Backward<B, 1> for QuickGeluBackward {
    type State = NodeId;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let [node] = ops.parents;
        let grad = grads.consume::<B>(&ops.node);
        let x = checkpointer.retrieve_node_output(ops.state);
        if let Some(node) = node {
            grads.register::<B>(node.id, B::quick_gelu_backward(x, grad));
        }
    }
}

impl<B: QuickGeluOps, C: CheckpointStrategy> QuickGeluOps for Autodiff<B, C> {
    fn quick_gelu(x: FloatTensor<Self>) -> FloatTensor<Self> {
        match QuickGeluBackward.prepare::<C>([x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let state = prep.checkpoint(&x);
                prep.finish(state, B::quick_gelu(x.into_primitive()))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::quick_gelu(x.into_primitive())),
        }
    }
}

#[inline(always)]
fn forward_chunk<const FMA: bool>(x: &[f32], out: &mut [f32]) {
    for (out, &x) in out.iter_mut().zip(x) {
        *out = x / (1.0 + flex::exp::<FMA>(-SLOPE * x));
    }
}

#[inline(always)]
fn backward_chunk<const FMA: bool>(x: &[f32], grad: &[f32], out: &mut [f32]) {
    for ((out, &x), &grad) in out.iter_mut().zip(x).zip(grad) {
        let sigmoid = 1.0 / (1.0 + flex::exp::<FMA>(-SLOPE * x));
        *out = grad * sigmoid * (1.0 + SLOPE * x * (1.0 - sigmoid));
    }
}

impl QuickGeluOps for Flex {
    fn quick_gelu(x: FlexTensor) -> FlexTensor {
        if !flex::applies(&[&x]) {
            return forward::<Self>(x);
        }
        let x = x.to_contiguous();
        let mut out = vec![0f32; flex::slice(&x).len()];
        out.par_chunks_mut(CHUNK)
            .zip(flex::slice(&x).par_chunks(CHUNK))
            .for_each(|(out, x)| vectorized!(forward_chunk(x, out)));
        flex::tensor(out, x.layout().shape().clone())
    }

    fn quick_gelu_backward(x: FlexTensor, grad: FlexTensor) -> FlexTensor {
        if !flex::applies(&[&x, &grad]) {
            return backward::<Self>(x, grad);
        }
        let (x, grad) = (x.to_contiguous(), grad.to_contiguous());
        let mut out = vec![0f32; flex::slice(&x).len()];
        out.par_chunks_mut(CHUNK)
            .zip(flex::slice(&x).par_chunks(CHUNK))
            .zip(flex::slice(&grad).par_chunks(CHUNK))
            .for_each(|((out, x), grad)| vectorized!(backward_chunk(x, grad, out)));
        flex::tensor(out, x.layout().shape().clone())
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, activation::sigmoid};

    use super::{
        super::tests::{difference, values},
        *,
    };

    #[test]
    fn fused_equals_composed() {
        let device = Device::flex().autodiff();
        let run = |op: fn(Tensor<2>) -> Tensor<2>, transposed: bool| {
            let (x, weight) = (values([129, 300], 0, &device).require_grad(), values([129, 300], 1, &device));
            let out = if transposed { op(x.clone().transpose()).transpose() } else { op(x.clone()) };
            let mut grads = (out.clone() * weight).sum().backward();
            (out.without_autodiff(), x.grad_remove(&mut grads).expect("tracked"))
        };
        for transposed in [false, true] {
            let found = run(quick_gelu, transposed);
            let expected = run(|x| x.clone() * sigmoid(x.mul_scalar(1.702)), transposed);
            assert!(difference(found.0, expected.0) < 1e-6);
            assert!(difference(found.1, expected.1) < 1e-6);
        }
    }
}

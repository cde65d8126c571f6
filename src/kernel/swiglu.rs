//! SwiGLU: `silu(gate) * up`, the elementwise part of a gated MLP.

use std::marker::PhantomData;

use burn::{
    backend::{
        Autodiff, Backend, Dispatch, Flex,
        autodiff::{
            NodeId,
            checkpoint::{
                base::Checkpointer, retro_forward::RetroForward, state::BackwardStates, strategy::CheckpointStrategy,
            },
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

/// `silu(gate) * up`, differentiable in both.
///
/// # Shapes
/// Two equal shapes -> the same
#[must_use]
pub fn swiglu<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    assert_eq!(gate.dims(), up.dims(), "swiglu: gate and up differ in shape");
    Tensor::from_dispatch(Dispatch::swiglu(gate.into_dispatch(), up.into_dispatch()))
}

/// The operation and its gradient.
#[backend_extension(Flex, Cube: cfg(feature = "gpu"), Fusion: cfg(feature = "gpu"), Autodiff)]
pub trait SwigluOps: Backend {
    /// `silu(gate) * up`.
    #[fusion(default)]
    fn swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        forward::<Self>(gate, up)
    }

    /// Gradients of gate and up.
    #[fusion(default)]
    fn swiglu_backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        backward::<Self>(gate, up, grad)
    }
}

#[cfg(feature = "gpu")]
impl SwigluOps for burn_cubecl::CubeBackend {}

fn forward<B: Backend>(gate: FloatTensor<B>, up: FloatTensor<B>) -> FloatTensor<B> {
    B::float_mul(B::float_mul(gate.clone(), B::sigmoid(gate)), up)
}

fn backward<B: Backend>(
    gate: FloatTensor<B>,
    up: FloatTensor<B>,
    grad: FloatTensor<B>,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let sigmoid = B::sigmoid(gate.clone());
    let silu = B::float_mul(gate, sigmoid.clone());
    let grad_up = B::float_mul(grad.clone(), silu.clone());
    let one_minus = B::float_add_scalar(B::float_neg(sigmoid.clone()), 1f32.into());
    let slope = B::float_add(sigmoid, B::float_mul(silu, one_minus));
    (B::float_mul(B::float_mul(grad, up), slope), grad_up)
}

#[derive(Debug)]
struct SwigluBackward;

impl<B: SwigluOps> Backward<B, 2> for SwigluBackward {
    type State = (NodeId, NodeId);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let [gate_node, up_node] = ops.parents;
        let grad = grads.consume::<B>(&ops.node);
        let gate = checkpointer.retrieve_node_output(ops.state.0);
        let up = checkpointer.retrieve_node_output(ops.state.1);
        let (grad_gate, grad_up) = B::swiglu_backward(gate, up, grad);
        if let Some(node) = gate_node {
            grads.register::<B>(node.id, grad_gate);
        }
        if let Some(node) = up_node {
            grads.register::<B>(node.id, grad_up);
        }
    }
}

#[derive(Debug)]
struct Recompute<B> {
    gate: NodeId,
    up: NodeId,
    backend: PhantomData<B>,
}

impl<B: SwigluOps> RetroForward for Recompute<B> {
    fn forward(&self, states: &mut BackwardStates, out: NodeId) {
        let gate = states.get_state::<FloatTensor<B>>(&self.gate);
        let up = states.get_state::<FloatTensor<B>>(&self.up);
        states.save(out, B::swiglu(gate, up));
    }
}

impl<B: SwigluOps, C: CheckpointStrategy> SwigluOps for Autodiff<B, C> {
    fn swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        let recompute = Recompute::<B> { gate: gate.id(), up: up.id(), backend: PhantomData };
        match SwigluBackward
            .prepare::<C>([gate.node(), up.node()])
            .memory_bound()
            .retro_forward(recompute)
            .parents([&gate, &up])
            .stateful()
        {
            OpsKind::Tracked(mut prep) => {
                let state = (prep.checkpoint(&gate), prep.checkpoint(&up));
                prep.finish(state, B::swiglu(gate.into_primitive(), up.into_primitive()))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::swiglu(gate.into_primitive(), up.into_primitive())),
        }
    }
}

#[inline(always)]
fn forward_chunk<const FMA: bool>(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
        *out = gate * up / (1.0 + flex::exp::<FMA>(-gate));
    }
}

#[inline(always)]
fn backward_chunk<const FMA: bool>(gate: &[f32], up: &[f32], grad: &[f32], grad_gate: &mut [f32], grad_up: &mut [f32]) {
    for ((((grad_gate, grad_up), &gate), &up), &grad) in grad_gate.iter_mut().zip(grad_up).zip(gate).zip(up).zip(grad) {
        let sigmoid = 1.0 / (1.0 + flex::exp::<FMA>(-gate));
        let silu = gate * sigmoid;
        *grad_gate = grad * up * (sigmoid + silu * (1.0 - sigmoid));
        *grad_up = grad * silu;
    }
}

impl SwigluOps for Flex {
    fn swiglu(gate: FlexTensor, up: FlexTensor) -> FlexTensor {
        if !flex::applies(&[&gate, &up]) {
            return forward::<Self>(gate, up);
        }
        let (gate, up) = (gate.to_contiguous(), up.to_contiguous());
        let mut out = vec![0f32; flex::slice(&gate).len()];
        out.par_chunks_mut(CHUNK)
            .zip(flex::slice(&gate).par_chunks(CHUNK))
            .zip(flex::slice(&up).par_chunks(CHUNK))
            .for_each(|((out, gate), up)| vectorized!(forward_chunk(gate, up, out)));
        flex::tensor(out, gate.layout().shape().clone())
    }

    fn swiglu_backward(gate: FlexTensor, up: FlexTensor, grad: FlexTensor) -> (FlexTensor, FlexTensor) {
        if !flex::applies(&[&gate, &up, &grad]) {
            return backward::<Self>(gate, up, grad);
        }
        let (gate, up, grad) = (gate.to_contiguous(), up.to_contiguous(), grad.to_contiguous());
        let count = flex::slice(&gate).len();
        let (mut grad_gate, mut grad_up) = (vec![0f32; count], vec![0f32; count]);
        grad_gate
            .par_chunks_mut(CHUNK)
            .zip(grad_up.par_chunks_mut(CHUNK))
            .zip(flex::slice(&gate).par_chunks(CHUNK))
            .zip(flex::slice(&up).par_chunks(CHUNK))
            .zip(flex::slice(&grad).par_chunks(CHUNK))
            .for_each(|((((grad_gate, grad_up), gate), up), grad)| {
                vectorized!(backward_chunk(gate, up, grad, grad_gate, grad_up));
            });
        let shape = gate.layout().shape();
        (flex::tensor(grad_gate, shape.clone()), flex::tensor(grad_up, shape.clone()))
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::activation::silu;

    use super::{
        super::tests::{device, difference, values},
        *,
    };

    fn gradients(op: fn(Tensor<2>, Tensor<2>) -> Tensor<2>, transposed: bool) -> [Tensor<2>; 3] {
        let device = device().autodiff();
        let (gate, up, weight) =
            (values([129, 300], 0, &device), values([129, 300], 1, &device), values([129, 300], 2, &device));
        let (gate, up) = (gate.require_grad(), up.require_grad());
        let out = if transposed {
            op(gate.clone().transpose(), up.clone().transpose()).transpose()
        } else {
            op(gate.clone(), up.clone())
        };
        let mut grads = (out.clone() * weight).sum().backward();
        [
            out.without_autodiff(),
            gate.grad_remove(&mut grads).expect("tracked"),
            up.grad_remove(&mut grads).expect("tracked"),
        ]
    }

    #[test]
    fn fused_equals_composed() {
        for transposed in [false, true] {
            let found = gradients(swiglu, transposed);
            let expected = gradients(|gate, up| silu(gate) * up, transposed);
            for (found, expected) in found.into_iter().zip(expected) {
                assert!(difference(found, expected) < 1e-6);
            }
        }
    }

    #[test]
    fn an_expanded_gradient_is_read_through_its_strides() {
        let device = device().autodiff();
        let gate = values([7, 40], 3, &device).require_grad();
        let up = values([7, 40], 4, &device);
        let mut fused = swiglu(gate.clone(), up.clone()).sum().backward();
        let found = gate.grad_remove(&mut fused).expect("tracked");
        let mut composed = (silu(gate.clone()) * up).sum().backward();
        assert!(difference(found, gate.grad_remove(&mut composed).expect("tracked")) < 1e-6);
    }
}

//! The start of a backward pass from a gradient that is known.
//!
//! Burn starts from a scalar. The gradient of `sum(y * g)` is what is wanted, but computing that product and its own
//! gradient passes over a tensor as large as `y` several times; here `g` is handed on as it is.

use burn::{
    backend::{
        Autodiff, Backend, Dispatch, Flex, TensorMetadata,
        autodiff::{
            checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
            grads::Gradients,
            ops::{Backward, Ops, OpsKind},
        },
        backend_extension,
        tensor::FloatTensor,
    },
    tensor::{FloatDType, Gradients as Found, Shape, Tensor},
};

/// Gradients of everything `y` was made of, from `g`, the gradient of `y`: its vector-Jacobian product.
///
/// # Shapes
/// Two equal shapes; `g` without autodiff, and of the type of `y`.
#[must_use]
pub fn pull_back<const D: usize>(y: Tensor<D>, g: Tensor<D>) -> Found {
    assert_eq!(y.dims(), g.dims(), "pull_back: y and its gradient differ in shape");
    Tensor::<1>::from_dispatch(Dispatch::start(y.into_dispatch(), g.into_dispatch())).backward()
}

/// The operation.
#[backend_extension(Flex, Cube: cfg(feature = "gpu"), Fusion: cfg(feature = "gpu"), Autodiff)]
pub trait PullBackOps: Backend {
    /// A number whose gradient with respect to `y` is `g`; its value means nothing.
    #[fusion(default)]
    fn start(y: FloatTensor<Self>, g: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::float_zeros(Shape::new([1]), &y.device(), FloatDType::from(g.dtype()))
    }
}

impl PullBackOps for Flex {}

#[cfg(feature = "gpu")]
impl PullBackOps for burn_cubecl::CubeBackend {}

#[derive(Debug)]
struct Start;

impl<B: Backend> Backward<B, 1> for Start {
    type State = FloatTensor<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let [node] = ops.parents;
        grads.consume::<B>(&ops.node);
        if let Some(node) = node {
            grads.register::<B>(node.id, ops.state);
        }
    }
}

impl<B: PullBackOps, C: CheckpointStrategy> PullBackOps for Autodiff<B, C> {
    fn start(y: FloatTensor<Self>, g: FloatTensor<Self>) -> FloatTensor<Self> {
        let g = g.into_primitive();
        match Start.prepare::<C>([y.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(g.clone(), B::start(y.into_primitive(), g)),
            OpsKind::UnTracked(prep) => prep.finish(B::start(y.into_primitive(), g)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::tests::{device, difference, values},
        *,
    };

    #[test]
    fn it_is_the_gradient_of_the_product() {
        let device = device();
        let x = values([9, 7], 0, &device).autodiff().require_grad();
        let g = values::<2>([7, 9], 1, &device).transpose();
        let y = || x.clone().exp() * x.clone();
        let found = x.grad_remove(&mut pull_back(y(), g.clone())).expect("tracked");
        let expected = x.grad_remove(&mut (y() * g).sum().backward()).expect("tracked");
        assert!(difference(found, expected) < 1e-6);
    }
}

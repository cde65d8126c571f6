//! Gaussian error linear units: with the error function, as in BERT and InternViT, and with the sigmoid of `1.702 x` in
//! its place, as in OpenAI's CLIP.

use std::f32::consts::FRAC_1_SQRT_2;

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

const SLOPE: f32 = 1.702;

/// `1 / sqrt(2 pi)`
const DENSITY: f32 = 0.398_942_3;

/// By what the input is multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// `(1 + erf(x / sqrt(2))) / 2`
    Normal,
    /// `sigmoid(1.702 x)`
    Sigmoid,
}

/// `x * (1 + erf(x / sqrt(2))) / 2`.
///
/// # Shapes
/// any -> same
#[must_use]
pub fn gelu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    Tensor::from_dispatch(Dispatch::gated(x.into_dispatch(), Gate::Normal))
}

/// `x * sigmoid(1.702 x)`.
///
/// # Shapes
/// any -> same
#[must_use]
pub fn quick_gelu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    Tensor::from_dispatch(Dispatch::gated(x.into_dispatch(), Gate::Sigmoid))
}

/// The operation and its gradient.
#[backend_extension(Flex, Cube: cfg(feature = "gpu"), Fusion: cfg(feature = "gpu"), Autodiff)]
pub trait GeluOps: Backend {
    /// `x` times its gate.
    #[fusion(default)]
    fn gated(x: FloatTensor<Self>, gate: Gate) -> FloatTensor<Self> {
        forward::<Self>(x, gate)
    }

    /// Gradient of `x`.
    #[fusion(default)]
    fn gated_backward(x: FloatTensor<Self>, grad: FloatTensor<Self>, gate: Gate) -> FloatTensor<Self> {
        backward::<Self>(x, grad, gate)
    }
}

#[cfg(feature = "gpu")]
impl GeluOps for burn_cubecl::CubeBackend {}

fn forward<B: Backend>(x: FloatTensor<B>, gate: Gate) -> FloatTensor<B> {
    match gate {
        Gate::Normal => B::gelu(x),
        Gate::Sigmoid => B::float_mul(x.clone(), B::sigmoid(B::float_mul_scalar(x, SLOPE.into()))),
    }
}

fn backward<B: Backend>(x: FloatTensor<B>, grad: FloatTensor<B>, gate: Gate) -> FloatTensor<B> {
    if gate == Gate::Normal {
        // Burn's own gradient is that of the approximation by tanh, off by up to 1e-3, except on the CPU.
        let squared = B::float_mul(x.clone(), x.clone());
        let density = B::float_exp(B::float_mul_scalar(squared, (-0.5f32).into()));
        let density = B::float_mul_scalar(density, DENSITY.into());
        let erf = B::float_erf(B::float_mul_scalar(x.clone(), FRAC_1_SQRT_2.into()));
        let below = B::float_mul_scalar(B::float_add_scalar(erf, 1f32.into()), 0.5f32.into());
        return B::float_mul(grad, B::float_add(below, B::float_mul(x, density)));
    }
    let scaled = B::float_mul_scalar(x, SLOPE.into());
    let sigmoid = B::sigmoid(scaled.clone());
    let one_minus = B::float_add_scalar(B::float_neg(sigmoid.clone()), 1f32.into());
    let slope = B::float_add_scalar(B::float_mul(scaled, one_minus), 1f32.into());
    B::float_mul(grad, B::float_mul(sigmoid, slope))
}

/// The input and its gate.
#[derive(Debug)]
struct GeluBackward;

impl<B: GeluOps> Backward<B, 1> for GeluBackward {
    type State = (NodeId, Gate);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let ([node], (x, gate)) = (ops.parents, ops.state);
        let grad = grads.consume::<B>(&ops.node);
        let x = checkpointer.retrieve_node_output(x);
        if let Some(node) = node {
            grads.register::<B>(node.id, B::gated_backward(x, grad, gate));
        }
    }
}

impl<B: GeluOps, C: CheckpointStrategy> GeluOps for Autodiff<B, C> {
    fn gated(x: FloatTensor<Self>, gate: Gate) -> FloatTensor<Self> {
        match GeluBackward.prepare::<C>([x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let saved = prep.checkpoint(&x);
                prep.finish((saved, gate), B::gated(x.into_primitive(), gate))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::gated(x.into_primitive(), gate)),
        }
    }
}

/// `(1 + erf(x / sqrt(2))) / 2`, absolute error below 2e-7: Abramowitz and Stegun 7.1.26.
#[inline(always)]
fn normal_cdf<const FMA: bool>(x: f32) -> f32 {
    let z = x.abs() * FRAC_1_SQRT_2;
    let t = 1.0 / flex::mul_add::<FMA>(0.327_591_1, z, 1.0);
    let p = flex::mul_add::<FMA>(1.061_405_4, t, -1.453_152_1);
    let p = flex::mul_add::<FMA>(p, t, 1.421_413_8);
    let p = flex::mul_add::<FMA>(p, t, -0.284_496_72);
    let p = flex::mul_add::<FMA>(p, t, 0.254_829_6);
    let tail = 0.5 * p * t * flex::exp::<FMA>(-z * z);
    if x < 0.0 { tail } else { 1.0 - tail }
}

#[inline(always)]
fn forward_chunk<const FMA: bool>(x: &[f32], out: &mut [f32], gate: Gate) {
    match gate {
        Gate::Normal => out.iter_mut().zip(x).for_each(|(out, &x)| *out = x * normal_cdf::<FMA>(x)),
        Gate::Sigmoid => out.iter_mut().zip(x).for_each(|(out, &x)| *out = x / (1.0 + flex::exp::<FMA>(-SLOPE * x))),
    }
}

#[inline(always)]
fn backward_chunk<const FMA: bool>(x: &[f32], grad: &[f32], out: &mut [f32], gate: Gate) {
    let cells = out.iter_mut().zip(x).zip(grad);
    match gate {
        Gate::Normal => cells.for_each(|((out, &x), &grad)| {
            let density = DENSITY * flex::exp::<FMA>(-0.5 * x * x);
            *out = grad * flex::mul_add::<FMA>(x, density, normal_cdf::<FMA>(x));
        }),
        Gate::Sigmoid => cells.for_each(|((out, &x), &grad)| {
            let sigmoid = 1.0 / (1.0 + flex::exp::<FMA>(-SLOPE * x));
            *out = grad * sigmoid * (1.0 + SLOPE * x * (1.0 - sigmoid));
        }),
    }
}

impl GeluOps for Flex {
    fn gated(x: FlexTensor, gate: Gate) -> FlexTensor {
        if !flex::applies(&[&x]) {
            return forward::<Self>(x, gate);
        }
        let x = x.to_contiguous();
        let mut out = vec![0f32; flex::slice(&x).len()];
        out.par_chunks_mut(CHUNK)
            .zip(flex::slice(&x).par_chunks(CHUNK))
            .for_each(|(out, x)| vectorized!(forward_chunk(x, out, gate)));
        flex::tensor(out, x.layout().shape().clone())
    }

    fn gated_backward(x: FlexTensor, grad: FlexTensor, gate: Gate) -> FlexTensor {
        if !flex::applies(&[&x, &grad]) {
            return backward::<Self>(x, grad, gate);
        }
        let (x, grad) = (x.to_contiguous(), grad.to_contiguous());
        let mut out = vec![0f32; flex::slice(&x).len()];
        out.par_chunks_mut(CHUNK)
            .zip(flex::slice(&x).par_chunks(CHUNK))
            .zip(flex::slice(&grad).par_chunks(CHUNK))
            .for_each(|((out, x), grad)| vectorized!(backward_chunk(x, grad, out, gate)));
        flex::tensor(out, x.layout().shape().clone())
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::activation;

    use super::{
        super::tests::{device, difference, values},
        *,
    };

    fn check(fused: fn(Tensor<2>) -> Tensor<2>, composed: fn(Tensor<2>) -> Tensor<2>) {
        let device = device().autodiff();
        let run = |op: fn(Tensor<2>) -> Tensor<2>, transposed: bool, expanded: bool| {
            let (x, weight) = (values([129, 300], 0, &device).require_grad(), values([129, 300], 1, &device));
            let out = if transposed { op(x.clone().transpose()).transpose() } else { op(x.clone()) };
            let loss = if expanded { out.clone() } else { out.clone() * weight };
            let mut grads = loss.sum().backward();
            (out.without_autodiff(), x.grad_remove(&mut grads).expect("tracked"))
        };
        for (transposed, expanded) in [(false, false), (true, false), (false, true)] {
            let (found, expected) = (run(fused, transposed, expanded), run(composed, transposed, expanded));
            assert!(difference(found.0, expected.0) < 1e-6);
            assert!(difference(found.1, expected.1) < 1e-6);
        }
    }

    #[test]
    fn both_equal_their_composed_forms() {
        check(gelu, |x| x.clone() * (x.mul_scalar(FRAC_1_SQRT_2).erf() + 1.0) * 0.5);
        check(quick_gelu, |x| x.clone() * activation::sigmoid(x.mul_scalar(SLOPE)));
    }

    #[test]
    fn the_distribution_function_is_accurate_and_stays_within_bounds() {
        // published values of the normal distribution
        for (x, truth) in
            [(0.0, 0.5), (1.0, 0.841_344_75), (-1.0, 0.158_655_25), (2.5, 0.993_790_33), (-4.0, 3.167_124e-5)]
        {
            for found in [normal_cdf::<true>(x), normal_cdf::<false>(x)] {
                assert!((f64::from(found) - truth).abs() < 3e-7, "{x}: {found}");
            }
        }
        for x in [-1e4f32, -100.0, 100.0, 1e4] {
            let found = x * normal_cdf::<true>(x);
            assert!((found - x.max(0.0)).abs() < 1e-6, "{x}: {found}");
        }
    }
}

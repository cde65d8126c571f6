//! Root-mean-square norm and layer norm over the last dimension, f32.
//!
//! Only the input is kept for the backward pass; statistics are computed again, which is cheaper than reading them.
//! Gradients of weight and bias are computed only when something trains them.

use burn::{
    backend::{
        Autodiff, Backend, Dispatch, Flex, TensorMetadata,
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
    tensor::{Shape, Tensor},
};
use rayon::prelude::*;

use super::flex::{self, vectorized};

/// What a norm subtracts before it divides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Centre {
    /// Nothing: root-mean-square norm.
    Zero,
    /// The mean: layer norm.
    Mean,
}

/// `x / rms(x) * weight`.
///
/// # Shapes
/// `x` `[.., width]`, `weight` `[width]` -> as `x`
#[must_use]
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f64) -> Tensor<D> {
    let bias = Tensor::zeros(weight.dims(), (&weight.device(), weight.dtype()));
    norm(x, weight, bias, eps, Centre::Zero)
}

/// `(x - mean(x)) / std(x) * weight + bias`.
///
/// # Shapes
/// `x` `[.., width]`, `weight` and `bias` `[width]` -> as `x`
#[must_use]
pub fn layer_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, bias: Tensor<1>, eps: f64) -> Tensor<D> {
    norm(x, weight, bias, eps, Centre::Mean)
}

fn norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, bias: Tensor<1>, eps: f64, centre: Centre) -> Tensor<D> {
    let width = x.dims()[D - 1];
    assert!(weight.dims() == [width] && bias.dims() == [width], "norm: width {width}, weight {:?}", weight.dims());
    let dims = x.dims();
    let rows = dims.iter().product::<usize>() / width.max(1);
    let flat = x.reshape([rows, width]).into_dispatch();
    Tensor::<2>::from_dispatch(Dispatch::norm(flat, weight.into_dispatch(), bias.into_dispatch(), eps as f32, centre))
        .reshape(dims)
}

/// The operation and its gradients.
#[backend_extension(Flex, Cube: cfg(feature = "gpu"), Fusion: cfg(feature = "gpu"), Autodiff)]
pub trait NormOps: Backend {
    /// Norm of the rows of `x` `[rows, width]`.
    #[fusion(default)]
    fn norm(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        eps: f32,
        centre: Centre,
    ) -> FloatTensor<Self> {
        forward::<Self>(x, weight, bias, eps, centre)
    }

    /// Gradient of `x`.
    #[fusion(default)]
    fn norm_backward(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        eps: f32,
        centre: Centre,
    ) -> FloatTensor<Self> {
        backward::<Self>(x, weight, grad, eps, centre)
    }

    /// Gradient of the weight, `[width]`.
    #[fusion(default)]
    fn norm_weight_backward(
        x: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        eps: f32,
        centre: Centre,
    ) -> FloatTensor<Self> {
        weight_backward::<Self>(x, grad, eps, centre)
    }
}

#[cfg(feature = "gpu")]
impl NormOps for burn_cubecl::CubeBackend {}

/// Rows with mean 0 (if wanted) and mean square 1, and what they were divided by: `[rows, width]` and `[rows, 1]`.
fn normalised<B: Backend>(x: FloatTensor<B>, eps: f32, centre: Centre) -> (FloatTensor<B>, FloatTensor<B>) {
    let x = match centre {
        Centre::Zero => x,
        Centre::Mean => B::float_sub(x.clone(), B::float_mean_dim(x, 1)),
    };
    let square = B::float_mean_dim(B::float_mul(x.clone(), x.clone()), 1);
    let deviation = B::float_sqrt(B::float_add_scalar(square, eps.into()));
    (B::float_div(x, deviation.clone()), deviation)
}

fn row<B: Backend>(weight: FloatTensor<B>) -> FloatTensor<B> {
    let [width] = weight.shape().dims();
    B::float_reshape(weight, Shape::new([1, width]))
}

fn forward<B: Backend>(
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    bias: FloatTensor<B>,
    eps: f32,
    centre: Centre,
) -> FloatTensor<B> {
    let scaled = B::float_mul(normalised::<B>(x, eps, centre).0, row::<B>(weight));
    match centre {
        Centre::Zero => scaled,
        Centre::Mean => B::float_add(scaled, row::<B>(bias)),
    }
}

fn backward<B: Backend>(
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    grad: FloatTensor<B>,
    eps: f32,
    centre: Centre,
) -> FloatTensor<B> {
    let (hat, deviation) = normalised::<B>(x, eps, centre);
    let grad = B::float_mul(grad, row::<B>(weight));
    let along = B::float_mean_dim(B::float_mul(grad.clone(), hat.clone()), 1);
    let inner = B::float_sub(grad.clone(), B::float_mul(hat, along));
    let inner = match centre {
        Centre::Zero => inner,
        Centre::Mean => B::float_sub(inner, B::float_mean_dim(grad, 1)),
    };
    B::float_div(inner, deviation)
}

fn weight_backward<B: Backend>(x: FloatTensor<B>, grad: FloatTensor<B>, eps: f32, centre: Centre) -> FloatTensor<B> {
    let (hat, _) = normalised::<B>(x, eps, centre);
    column_sums::<B>(B::float_mul(hat, grad))
}

fn column_sums<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let [_, width] = x.shape().dims();
    B::float_reshape(B::float_sum_dim(x, 0), Shape::new([width]))
}

#[derive(Debug)]
struct NormBackward;

impl<B: NormOps> Backward<B, 3> for NormBackward {
    type State = (NodeId, FloatTensor<B>, f32, Centre);

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let [x_node, weight_node, bias_node] = ops.parents;
        let grad = grads.consume::<B>(&ops.node);
        let (x, weight, eps, centre) = ops.state;
        let x: FloatTensor<B> = checkpointer.retrieve_node_output(x);
        if let Some(node) = weight_node {
            grads.register::<B>(node.id, B::norm_weight_backward(x.clone(), grad.clone(), eps, centre));
        }
        if let Some(node) = bias_node {
            grads.register::<B>(node.id, column_sums::<B>(grad.clone()));
        }
        if let Some(node) = x_node {
            grads.register::<B>(node.id, B::norm_backward(x, weight, grad, eps, centre));
        }
    }
}

impl<B: NormOps, C: CheckpointStrategy> NormOps for Autodiff<B, C> {
    fn norm(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        eps: f32,
        centre: Centre,
    ) -> FloatTensor<Self> {
        match NormBackward.prepare::<C>([x.node(), weight.node(), bias.node()]).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let saved = prep.checkpoint(&x);
                let (weight, bias) = (weight.into_primitive(), bias.into_primitive());
                let out = B::norm(x.into_primitive(), weight.clone(), bias, eps, centre);
                prep.finish((saved, weight, eps, centre), out)
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(B::norm(x.into_primitive(), weight.into_primitive(), bias.into_primitive(), eps, centre))
            }
        }
    }
}

/// Centre and reciprocal deviation of a row.
#[inline(always)]
fn statistics(x: &[f32], eps: f32, centre: Centre) -> (f32, f32) {
    let width = x.len() as f32;
    let mean = match centre {
        Centre::Zero => 0.0,
        Centre::Mean => flex::sum(x.len(), |i| x[i]) / width,
    };
    let square = flex::sum(x.len(), |i| (x[i] - mean) * (x[i] - mean)) / width;
    (mean, 1.0 / (square + eps).sqrt())
}

#[inline(always)]
fn forward_rows<const FMA: bool>(x: &[f32], weight: &[f32], bias: &[f32], out: &mut [f32], eps: f32, centre: Centre) {
    let width = weight.len();
    for (x, out) in x.chunks(width).zip(out.chunks_mut(width)) {
        let (mean, scale) = statistics(x, eps, centre);
        for (((out, x), weight), bias) in out.iter_mut().zip(x).zip(weight).zip(bias) {
            *out = (x - mean) * scale * weight + bias;
        }
    }
}

#[inline(always)]
fn backward_rows<const FMA: bool>(x: &[f32], weight: &[f32], grad: &[f32], out: &mut [f32], eps: f32, centre: Centre) {
    let width = weight.len();
    for ((x, grad), out) in x.chunks(width).zip(grad.chunks(width)).zip(out.chunks_mut(width)) {
        let (mean, scale) = statistics(x, eps, centre);
        let along = flex::sum(width, |i| grad[i] * weight[i] * (x[i] - mean)) * scale / width as f32;
        let shift = match centre {
            Centre::Zero => 0.0,
            Centre::Mean => flex::sum(width, |i| grad[i] * weight[i]) / width as f32,
        };
        for (((out, x), weight), grad) in out.iter_mut().zip(x).zip(weight).zip(grad) {
            *out = (grad * weight - shift - (x - mean) * scale * along) * scale;
        }
    }
}

/// Adds every row's share to `out`, row after row, so that the sum does not depend on the number of threads.
#[inline(always)]
fn weight_rows<const FMA: bool>(x: &[f32], grad: &[f32], out: &mut [f32], eps: f32, centre: Centre) {
    let width = out.len();
    for (x, grad) in x.chunks(width).zip(grad.chunks(width)) {
        let (mean, scale) = statistics(x, eps, centre);
        for ((out, x), grad) in out.iter_mut().zip(x).zip(grad) {
            *out += (x - mean) * scale * grad;
        }
    }
}

/// Rows per task; fixed, so that partial sums are the same for any number of threads.
const ROWS: usize = 64;

impl NormOps for Flex {
    fn norm(x: FlexTensor, weight: FlexTensor, bias: FlexTensor, eps: f32, centre: Centre) -> FlexTensor {
        if !flex::applies(&[&x, &weight, &bias]) {
            return forward::<Self>(x, weight, bias, eps, centre);
        }
        let (x, weight, bias) = (x.to_contiguous(), weight.to_contiguous(), bias.to_contiguous());
        let (weight, bias) = (flex::slice(&weight), flex::slice(&bias));
        let mut out = vec![0f32; flex::slice(&x).len()];
        let task = (ROWS * weight.len()).max(1);
        out.par_chunks_mut(task)
            .zip(flex::slice(&x).par_chunks(task))
            .for_each(|(out, x)| vectorized!(forward_rows(x, weight, bias, out, eps, centre)));
        flex::tensor(out, x.layout().shape().clone())
    }

    fn norm_backward(x: FlexTensor, weight: FlexTensor, grad: FlexTensor, eps: f32, centre: Centre) -> FlexTensor {
        if !flex::applies(&[&x, &weight, &grad]) {
            return backward::<Self>(x, weight, grad, eps, centre);
        }
        let (x, weight, grad) = (x.to_contiguous(), weight.to_contiguous(), grad.to_contiguous());
        let weight = flex::slice(&weight);
        let mut out = vec![0f32; flex::slice(&x).len()];
        let task = (ROWS * weight.len()).max(1);
        out.par_chunks_mut(task)
            .zip(flex::slice(&x).par_chunks(task))
            .zip(flex::slice(&grad).par_chunks(task))
            .for_each(|((out, x), grad)| vectorized!(backward_rows(x, weight, grad, out, eps, centre)));
        flex::tensor(out, x.layout().shape().clone())
    }

    fn norm_weight_backward(x: FlexTensor, grad: FlexTensor, eps: f32, centre: Centre) -> FlexTensor {
        if !flex::applies(&[&x, &grad]) {
            return weight_backward::<Self>(x, grad, eps, centre);
        }
        let (x, grad) = (x.to_contiguous(), grad.to_contiguous());
        let [_, width] = x.layout().shape().dims();
        let task = (ROWS * width).max(1);
        let parts: Vec<Vec<f32>> = flex::slice(&x)
            .par_chunks(task)
            .zip(flex::slice(&grad).par_chunks(task))
            .map(|(x, grad)| {
                let mut part = vec![0f32; width];
                vectorized!(weight_rows(x, grad, &mut part, eps, centre));
                part
            })
            .collect();
        let mut out = vec![0f32; width];
        for part in &parts {
            out.iter_mut().zip(part).for_each(|(out, part)| *out += part);
        }
        flex::tensor(out, Shape::new([width]))
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::{
        super::tests::{difference, values},
        *,
    };

    const EPS: f64 = 1e-5;

    fn plain_rms(x: Tensor<3>, weight: Tensor<1>, _bias: Tensor<1>) -> Tensor<3> {
        let scale = x.clone().square().mean_dim(2).add_scalar(EPS).sqrt();
        x / scale * weight.unsqueeze()
    }

    fn plain_layer(x: Tensor<3>, weight: Tensor<1>, bias: Tensor<1>) -> Tensor<3> {
        let x = x.clone() - x.mean_dim(2);
        let scale = x.clone().square().mean_dim(2).add_scalar(EPS).sqrt();
        x / scale * weight.unsqueeze() + bias.unsqueeze()
    }

    type Norm = fn(Tensor<3>, Tensor<1>, Tensor<1>) -> Tensor<3>;

    fn run(op: Norm, swapped: bool) -> (Tensor<3>, Tensor<3>, Tensor<1>, Option<Tensor<1>>) {
        let device = Device::flex().autodiff();
        let x = values([150, 3, 37], 0, &device).require_grad();
        let weight = values([37], 1, &device).require_grad();
        let bias = values([37], 2, &device).require_grad();
        let out = if swapped {
            op(x.clone().swap_dims(0, 1), weight.clone(), bias.clone()).swap_dims(0, 1)
        } else {
            op(x.clone(), weight.clone(), bias.clone())
        };
        let mut grads = (out.clone() * values([150, 3, 37], 3, &device)).sum().backward();
        (
            out.without_autodiff(),
            x.grad_remove(&mut grads).expect("tracked"),
            weight.grad_remove(&mut grads).expect("tracked"),
            bias.grad_remove(&mut grads),
        )
    }

    #[test]
    fn fused_equals_composed() {
        let pairs: [(Norm, Norm); 2] =
            [(|x, w, _| rms_norm(x, w, EPS), plain_rms), (|x, w, b| layer_norm(x, w, b, EPS), plain_layer)];
        for (fused, plain) in pairs {
            for swapped in [false, true] {
                let (found, expected) = (run(fused, swapped), run(plain, swapped));
                assert!(difference(found.0, expected.0) < 2e-6);
                assert!(difference(found.1, expected.1) < 5e-6);
                assert!(difference(found.2, expected.2) < 5e-6);
                if let (Some(found), Some(expected)) = (found.3, expected.3) {
                    assert!(difference(found, expected) < 5e-6);
                }
            }
        }
    }
}

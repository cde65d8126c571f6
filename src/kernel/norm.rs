//! Root-mean-square norm and layer norm over the last dimension, f32; alone, or of a residual stream to which a branch
//! is added in the same pass.
//!
//! Only the input is kept for the backward pass; statistics are computed again, which is cheaper than reading them.
//! Gradients of weight and bias are computed only when something trains them. Half types keep statistics in f32.

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
    tensor::{DType, FloatDType, Shape, Tensor},
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

/// `x / rms(x) * weight`; in a half type, the quotient is rounded to it before it is multiplied.
///
/// # Shapes
/// `x` `[.., width]`, `weight` `[width]` -> as `x`
#[must_use]
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f64) -> Tensor<D> {
    // there is no bias: the place is not read
    let bias = weight.clone().detach();
    norm(x, weight, bias, eps, Centre::Zero)
}

/// `(x - mean(x)) / std(x) * weight + bias`, rounded once at the end.
///
/// # Shapes
/// `x` `[.., width]`, `weight` and `bias` `[width]` -> as `x`
#[must_use]
pub fn layer_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, bias: Tensor<1>, eps: f64) -> Tensor<D> {
    norm(x, weight, bias, eps, Centre::Mean)
}

/// `x + branch`, and its root-mean-square norm.
///
/// # Shapes
/// `x` and `branch` `[.., width]`, `weight` `[width]` -> as `x`, as `x`
#[must_use]
pub fn add_rms_norm<const D: usize>(
    x: Tensor<D>,
    branch: Tensor<D>,
    weight: Tensor<1>,
    eps: f64,
) -> (Tensor<D>, Tensor<D>) {
    let bias = Tensor::zeros(weight.dims(), (&weight.device(), weight.dtype()));
    add_norm(x, branch, weight, bias, eps, Centre::Zero)
}

/// `x + branch`, and its layer norm.
///
/// # Shapes
/// `x` and `branch` `[.., width]`, `weight` and `bias` `[width]` -> as `x`, as `x`
#[must_use]
pub fn add_layer_norm<const D: usize>(
    x: Tensor<D>,
    branch: Tensor<D>,
    weight: Tensor<1>,
    bias: Tensor<1>,
    eps: f64,
) -> (Tensor<D>, Tensor<D>) {
    add_norm(x, branch, weight, bias, eps, Centre::Mean)
}

fn add_norm<const D: usize>(
    x: Tensor<D>,
    branch: Tensor<D>,
    weight: Tensor<1>,
    bias: Tensor<1>,
    eps: f64,
    centre: Centre,
) -> (Tensor<D>, Tensor<D>) {
    let (dims, width) = (x.dims(), x.dims()[D - 1]);
    assert!(branch.dims() == dims && weight.dims() == [width], "add_norm: {dims:?} and {:?}", branch.dims());
    let flat = |x: Tensor<D>| x.reshape([dims.iter().product::<usize>() / width.max(1), width]).into_dispatch();
    let (weight, bias) = (weight.into_dispatch(), bias.into_dispatch());
    let (sum, normed) = Dispatch::add_norm(flat(x), flat(branch), weight, bias, eps as f32, centre);
    (Tensor::<2>::from_dispatch(sum).reshape(dims), Tensor::<2>::from_dispatch(normed).reshape(dims))
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
    /// Norm of the rows of `x` `[rows, width]`; the bias is that of a layer norm.
    #[fusion(dtype = x, shape = x)]
    fn norm(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        eps: f32,
        centre: Centre,
    ) -> FloatTensor<Self> {
        forward::<Self>(x, weight, bias, eps, centre)
    }

    /// `x + branch` and its norm.
    #[fusion(default)]
    fn add_norm(
        x: FloatTensor<Self>,
        branch: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        eps: f32,
        centre: Centre,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let sum = added::<Self>(x, branch);
        (sum.clone(), Self::norm(sum, weight, bias, eps, centre))
    }

    /// Gradient of `x`.
    #[fusion(dtype = x, shape = x)]
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

/// Values in f32.
fn wide<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    if x.dtype() == DType::F32 { x } else { B::float_cast(x, FloatDType::F32) }
}

fn added<B: Backend>(x: FloatTensor<B>, branch: FloatTensor<B>) -> FloatTensor<B> {
    B::float_add(x, branch)
}

/// Reverse of [`wide`].
fn narrow<B: Backend>(x: FloatTensor<B>, dtype: DType) -> FloatTensor<B> {
    if dtype == DType::F32 { x } else { B::float_cast(x, dtype.into()) }
}

/// Rows with mean 0 (if wanted) and mean square 1, and what they were divided by: `[rows, width]` and `[rows, 1]`, f32.
fn normalised<B: Backend>(x: FloatTensor<B>, eps: f32, centre: Centre) -> (FloatTensor<B>, FloatTensor<B>) {
    let x = wide::<B>(x);
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

pub(super) fn forward<B: Backend>(
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    bias: FloatTensor<B>,
    eps: f32,
    centre: Centre,
) -> FloatTensor<B> {
    let dtype = x.dtype();
    let hat = normalised::<B>(x, eps, centre).0;
    match centre {
        Centre::Zero => B::float_mul(narrow::<B>(hat, dtype), row::<B>(weight)),
        Centre::Mean => {
            let scaled = B::float_mul(hat, row::<B>(wide::<B>(weight)));
            narrow::<B>(B::float_add(scaled, row::<B>(wide::<B>(bias))), dtype)
        }
    }
}

pub(super) fn backward<B: Backend>(
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    grad: FloatTensor<B>,
    eps: f32,
    centre: Centre,
) -> FloatTensor<B> {
    let dtype = x.dtype();
    let (hat, deviation) = normalised::<B>(x, eps, centre);
    let grad = B::float_mul(wide::<B>(grad), row::<B>(wide::<B>(weight)));
    let along = B::float_mean_dim(B::float_mul(grad.clone(), hat.clone()), 1);
    let inner = B::float_sub(grad.clone(), B::float_mul(hat, along));
    let inner = match centre {
        Centre::Zero => inner,
        Centre::Mean => B::float_sub(inner, B::float_mean_dim(grad, 1)),
    };
    narrow::<B>(B::float_div(inner, deviation), dtype)
}

fn weight_backward<B: Backend>(x: FloatTensor<B>, grad: FloatTensor<B>, eps: f32, centre: Centre) -> FloatTensor<B> {
    let dtype = grad.dtype();
    let (hat, _) = normalised::<B>(x, eps, centre);
    narrow::<B>(column_sums::<B>(B::float_mul(hat, wide::<B>(grad))), dtype)
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
            let sums = column_sums::<B>(wide::<B>(grad.clone()));
            grads.register::<B>(node.id, narrow::<B>(sums, grad.dtype()));
        }
        if let Some(node) = x_node {
            grads.register::<B>(node.id, B::norm_backward(x, weight, grad, eps, centre));
        }
    }
}

#[derive(Debug)]
struct SumBackward;

impl<B: NormOps> Backward<B, 2> for SumBackward {
    type State = ();

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        for node in ops.parents.into_iter().flatten() {
            grads.register::<B>(node.id, grad.clone());
        }
    }
}

impl<B: NormOps, C: CheckpointStrategy> NormOps for Autodiff<B, C> {
    /// Two operations to the graph, one pass over memory.
    fn add_norm(
        x: FloatTensor<Self>,
        branch: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        eps: f32,
        centre: Centre,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let addition = SumBackward.prepare::<C>([x.node(), branch.node()]).compute_bound();
        let affine = [weight.node(), bias.node()];
        let (weight, bias) = (weight.into_primitive(), bias.into_primitive());
        let (x, branch) = (x.into_primitive(), branch.into_primitive());
        let (sum, normed) = B::add_norm(x, branch, weight.clone(), bias, eps, centre);
        let sum = addition.stateless(sum);
        let [weight_node, bias_node] = affine;
        let normed = match NormBackward.prepare::<C>([sum.node(), weight_node, bias_node]).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let saved = prep.checkpoint(&sum);
                prep.finish((saved, weight, eps, centre), normed)
            }
            OpsKind::UnTracked(prep) => prep.finish(normed),
        };
        (sum, normed)
    }

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
            let bias = if centre == Centre::Mean { *bias } else { 0.0 };
            *out = (x - mean) * scale * weight + bias;
        }
    }
}

#[inline(always)]
fn add_forward_rows<const FMA: bool>(
    [x, branch]: [&[f32]; 2],
    [weight, bias]: [&[f32]; 2],
    [sum, out]: [&mut [f32]; 2],
    eps: f32,
    centre: Centre,
) {
    for ((sum, x), branch) in sum.iter_mut().zip(x).zip(branch) {
        *sum = x + branch;
    }
    forward_rows::<FMA>(sum, weight, bias, out, eps, centre);
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

/// Rows per task of a sum and its norm; few, so that the norm finds the sum in the cache.
const SUM_ROWS: usize = 8;

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

    fn add_norm(
        x: FlexTensor,
        branch: FlexTensor,
        weight: FlexTensor,
        bias: FlexTensor,
        eps: f32,
        centre: Centre,
    ) -> (FlexTensor, FlexTensor) {
        if !flex::applies(&[&x, &branch, &weight, &bias]) {
            let sum = added::<Self>(x, branch);
            return (sum.clone(), forward::<Self>(sum, weight, bias, eps, centre));
        }
        let [x, branch, weight, bias] = [x, branch, weight, bias].map(|t| t.to_contiguous());
        let affine = [flex::slice(&weight), flex::slice(&bias)];
        let (mut sum, mut out) = (vec![0f32; flex::slice(&x).len()], vec![0f32; flex::slice(&x).len()]);
        let task = (SUM_ROWS * affine[0].len()).max(1);
        sum.par_chunks_mut(task)
            .zip(out.par_chunks_mut(task))
            .zip(flex::slice(&x).par_chunks(task))
            .zip(flex::slice(&branch).par_chunks(task))
            .for_each(|(((sum, out), x), branch)| {
                vectorized!(add_forward_rows([x, branch], affine, [sum, out], eps, centre));
            });
        let shape = x.layout().shape();
        (flex::tensor(sum, shape.clone()), flex::tensor(out, shape.clone()))
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
    use super::{
        super::tests::{device, difference, values},
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
        let device = device().autodiff();
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

    /// Sum and norm, gradients of both inputs and of the weight. The loss depends on both results.
    fn both(op: impl Fn(Tensor<3>, Tensor<3>, Tensor<1>) -> (Tensor<3>, Tensor<3>), swapped: bool) -> [Tensor<3>; 5] {
        let device = device().autodiff();
        let leaf = |key| values([30, 3, 37], key, &device).require_grad();
        let (x, branch, weight) = (leaf(0), leaf(1), values([37], 2, &device).require_grad());
        let turn = |t: &Tensor<3>| if swapped { t.clone().swap_dims(0, 1) } else { t.clone() };
        let (sum, out) = op(turn(&x), turn(&branch), weight.clone());
        let loss = (turn(&out) * values([30, 3, 37], 3, &device)).sum() + (turn(&sum) * leaf(4).detach()).sum();
        let mut grads = loss.backward();
        let mut grad = |t: Tensor<3>| t.grad_remove(&mut grads).expect("tracked");
        let (x, branch) = (grad(x), grad(branch));
        let weight = weight.grad_remove(&mut grads).expect("tracked").reshape([1, 1, 37]);
        [sum.without_autodiff(), out.without_autodiff(), x, branch, weight]
    }

    #[test]
    fn a_sum_and_its_norm_equal_the_composed_form() {
        type Op = fn(Tensor<3>, Tensor<3>, Tensor<1>) -> (Tensor<3>, Tensor<3>);
        let bias = |w: &Tensor<1>| w.clone().mul_scalar(0.5);
        let pairs: [(Op, Norm); 2] = [
            (|x, y, w| add_rms_norm(x, y, w, EPS), plain_rms),
            (|x, y, w| add_layer_norm(x, y, w.clone(), w.mul_scalar(0.5), EPS), plain_layer),
        ];
        for (fused, plain) in pairs {
            for swapped in [false, true] {
                let found = both(fused, swapped);
                let expected = both(|x, y, w| (x.clone() + y.clone(), plain(x + y, w.clone(), bias(&w))), swapped);
                for (found, expected) in found.into_iter().zip(expected) {
                    assert!(difference(found, expected) < 5e-6);
                }
            }
        }
    }
}

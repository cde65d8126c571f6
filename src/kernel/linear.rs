//! Products of activations with weights, and the low-rank branch that is added to one.
//!
//! Weights are f32, or frozen in bf16 or f16: on the CPU the weights of a large model stay in the type of their
//! checkpoint, often in a memory map of the file, and become f32 (which is exact) panel by panel inside the product.
//! The branch `s (x A) B` is added to the product `x W` where that lies, and its gradient to the one of `x`, so that
//! neither has a wide tensor of its own.

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
    tensor::{DType, Shape, Tensor, bf16, f16},
};

use super::{
    flex,
    gemm::{View, multiplied, multiply},
};

/// `x weight`, f32. A weight of a half type is frozen and gets no gradient.
///
/// # Shapes
/// `x` `[rows, d_input]`, `weight` `[d_input, d_output]` -> `[rows, d_output]`
#[must_use]
pub fn linear(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    assert_eq!(x.dims()[1], weight.dims()[0], "linear: x {:?} and weight {:?}", x.dims(), weight.dims());
    Tensor::from_dispatch(Dispatch::product(x.into_dispatch(), weight.into_dispatch()))
}

/// `x weight + scale (x a) b`, f32. The weight is frozen; gradients flow to `x`, `a` and `b`.
///
/// # Shapes
/// `x` `[rows, d_input]`, `weight` `[d_input, d_output]`, `a` `[d_input, r]`, `b` `[r, d_output]` ->
/// `[rows, d_output]`
#[must_use]
pub fn low_rank_linear(x: Tensor<2>, weight: Tensor<2>, a: Tensor<2>, b: Tensor<2>, scale: f64) -> Tensor<2> {
    let ([_, d_input], [rank, d_output]) = (x.dims(), b.dims());
    assert!(
        weight.dims() == [d_input, d_output] && a.dims() == [d_input, rank],
        "low_rank_linear: x {:?}, weight {:?}, a {:?}, b {:?}",
        x.dims(),
        weight.dims(),
        a.dims(),
        b.dims()
    );
    let (x, weight, a, b) = (x.into_dispatch(), weight.into_dispatch(), a.into_dispatch(), b.into_dispatch());
    Tensor::from_dispatch(Dispatch::low_rank_product(x, weight, a, b, scale as f32))
}

/// The operations and their gradients.
#[backend_extension(Flex, Cube: cfg(feature = "gpu"), Fusion: cfg(feature = "gpu"), Autodiff)]
pub trait LinearOps: Backend {
    /// `x weight`.
    #[fusion(default)]
    fn product(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        composed::<Self>(x, weight)
    }

    /// `scale grad weight^T`.
    #[fusion(default)]
    fn product_input(grad: FloatTensor<Self>, weight: FloatTensor<Self>, scale: f32) -> FloatTensor<Self> {
        composed_input::<Self>(grad, weight, scale)
    }

    /// `x^T grad`.
    #[fusion(default)]
    fn product_weight(x: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::float_matmul(turned::<Self>(x), grad)
    }

    /// `x weight + scale (x a) b`.
    #[fusion(default)]
    fn low_rank_product(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f32,
    ) -> FloatTensor<Self> {
        Self::low_rank_parts(x, weight, a, b, scale).0
    }

    /// `x weight + scale (x a) b`, and `scale x a`.
    #[fusion(default)]
    fn low_rank_parts(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f32,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        low_rank_parts::<Self>(x, weight, a, b, scale)
    }

    /// `grad weight^T + narrow a^T`.
    #[fusion(default)]
    fn low_rank_input(
        grad: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        narrow: FloatTensor<Self>,
        a: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        low_rank_input::<Self>(grad, weight, narrow, a)
    }
}

#[cfg(feature = "gpu")]
impl LinearOps for burn_cubecl::CubeBackend {}

fn composed<B: Backend>(x: FloatTensor<B>, weight: FloatTensor<B>) -> FloatTensor<B> {
    let weight = if weight.dtype() == x.dtype() { weight } else { B::float_cast(weight, x.dtype().into()) };
    B::float_matmul(x, weight)
}

fn composed_input<B: Backend>(grad: FloatTensor<B>, weight: FloatTensor<B>, scale: f32) -> FloatTensor<B> {
    let out = composed::<B>(grad, turned::<B>(weight));
    if scale == 1.0 { out } else { B::float_mul_scalar(out, scale.into()) }
}

fn turned<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    B::float_swap_dims(x, 0, 1)
}

fn low_rank_parts<B: Backend>(
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    a: FloatTensor<B>,
    b: FloatTensor<B>,
    scale: f32,
) -> (FloatTensor<B>, FloatTensor<B>) {
    // the scale goes to the narrow side: r columns instead of d_output
    let narrow = B::float_mul_scalar(B::float_matmul(x.clone(), a), scale.into());
    let branch = B::float_matmul(narrow.clone(), b);
    (B::float_add(composed::<B>(x, weight), branch), narrow)
}

fn low_rank_input<B: Backend>(
    grad: FloatTensor<B>,
    weight: FloatTensor<B>,
    narrow: FloatTensor<B>,
    a: FloatTensor<B>,
) -> FloatTensor<B> {
    let branch = B::float_matmul(narrow, turned::<B>(a));
    B::float_add(composed_input::<B>(grad, weight, 1.0), branch)
}

#[derive(Debug)]
struct ProductBackward;

impl<B: LinearOps> Backward<B, 2> for ProductBackward {
    /// Input, where the weight is trained; weight, where the input has a gradient.
    type State = (Option<NodeId>, Option<FloatTensor<B>>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let [x_node, weight_node] = ops.parents;
        let grad = grads.consume::<B>(&ops.node);
        let (x, weight) = ops.state;
        if let (Some(node), Some(x)) = (weight_node, x) {
            let x: FloatTensor<B> = checkpointer.retrieve_node_output(x);
            grads.register::<B>(node.id, B::product_weight(x, grad.clone()));
        }
        if let (Some(node), Some(weight)) = (x_node, weight) {
            grads.register::<B>(node.id, B::product_input(grad, weight, 1.0));
        }
    }
}

#[derive(Debug)]
struct LowRankBackward;

/// What the gradients of a low-rank product are computed from.
#[derive(Debug, Clone)]
struct LowRankState<B: Backend> {
    x: NodeId,
    /// `scale x a`
    narrow: FloatTensor<B>,
    weight: FloatTensor<B>,
    a: FloatTensor<B>,
    b: FloatTensor<B>,
    scale: f32,
}

impl<B: LinearOps> Backward<B, 3> for LowRankBackward {
    type State = LowRankState<B>;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let [x_node, a_node, b_node] = ops.parents;
        let grad = grads.consume::<B>(&ops.node);
        let LowRankState { x, narrow, weight, a, b, scale } = ops.state;
        let x: FloatTensor<B> = checkpointer.retrieve_node_output(x);
        if let Some(node) = b_node {
            grads.register::<B>(node.id, B::product_weight(narrow, grad.clone()));
        }
        let narrow = B::product_input(grad.clone(), b, scale);
        if let Some(node) = a_node {
            grads.register::<B>(node.id, B::product_weight(x, narrow.clone()));
        }
        if let Some(node) = x_node {
            grads.register::<B>(node.id, B::low_rank_input(grad, weight, narrow, a));
        }
    }
}

impl<B: LinearOps, C: CheckpointStrategy> LinearOps for Autodiff<B, C> {
    fn product(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        let (input, trained) = (x.is_tracked(), weight.is_tracked());
        match ProductBackward.prepare::<C>([x.node(), weight.node()]).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let saved = trained.then(|| prep.checkpoint(&x));
                let weight = weight.into_primitive();
                let out = B::product(x.into_primitive(), weight.clone());
                prep.finish((saved, input.then_some(weight)), out)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::product(x.into_primitive(), weight.into_primitive())),
        }
    }

    fn low_rank_product(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f32,
    ) -> FloatTensor<Self> {
        let weight = weight.into_primitive();
        match LowRankBackward.prepare::<C>([x.node(), a.node(), b.node()]).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let saved = prep.checkpoint(&x);
                let (a, b) = (a.into_primitive(), b.into_primitive());
                let (out, narrow) = B::low_rank_parts(x.into_primitive(), weight.clone(), a.clone(), b.clone(), scale);
                prep.finish(LowRankState { x: saved, narrow, weight, a, b, scale }, out)
            }
            OpsKind::UnTracked(prep) => {
                let (x, a, b) = (x.into_primitive(), a.into_primitive(), b.into_primitive());
                prep.finish(B::low_rank_product(x, weight, a, b, scale))
            }
        }
    }
}

/// Whether the product is computed here: f32 activations, forward strides.
fn applies(x: &FlexTensor, others: &[&FlexTensor]) -> bool {
    flex::applies(&[x])
        && others.iter().all(|t| matches!(t.dtype(), DType::F32 | DType::BF16 | DType::F16))
        && others.iter().chain([&x]).all(|t| t.layout().strides().iter().all(|stride| *stride >= 0))
}

/// `scale a b`, or `scale a b^T`, in new memory.
fn times(a: &FlexTensor, b: &FlexTensor, transposed: bool, scale: f32) -> Vec<f32> {
    fn view<T: super::gemm::Element>(b: &FlexTensor, transposed: bool) -> View<'_, T> {
        let view = View::of(b).expect("`applies` saw forward strides");
        if transposed { view.transposed() } else { view }
    }
    let a = view::<f32>(a, false);
    match b.dtype() {
        DType::BF16 => multiplied(a, view::<bf16>(b, transposed), scale),
        DType::F16 => multiplied(a, view::<f16>(b, transposed), scale),
        _ => multiplied(a, view::<f32>(b, transposed), scale),
    }
}

/// Rows of `a` and columns of `b`, or rows of `b` where it is transposed.
fn shape(a: &FlexTensor, b: &FlexTensor, transposed: bool) -> Shape {
    let ([rows, _], [k, n]) = (a.layout().shape().dims(), b.layout().shape().dims());
    Shape::new([rows, if transposed { k } else { n }])
}

impl LinearOps for Flex {
    fn product(x: FlexTensor, weight: FlexTensor) -> FlexTensor {
        if !applies(&x, &[&weight]) {
            return composed::<Self>(x, weight);
        }
        flex::tensor(times(&x, &weight, false, 1.0), shape(&x, &weight, false))
    }

    fn product_input(grad: FlexTensor, weight: FlexTensor, scale: f32) -> FlexTensor {
        if !applies(&grad, &[&weight]) {
            return composed_input::<Self>(grad, weight, scale);
        }
        flex::tensor(times(&grad, &weight, true, scale), shape(&grad, &weight, true))
    }

    fn product_weight(x: FlexTensor, grad: FlexTensor) -> FlexTensor {
        let x = x.transpose(0, 1);
        if !applies(&x, &[&grad]) {
            return composed::<Self>(x, grad);
        }
        flex::tensor(times(&x, &grad, false, 1.0), shape(&x, &grad, false))
    }

    fn low_rank_parts(
        x: FlexTensor,
        weight: FlexTensor,
        a: FlexTensor,
        b: FlexTensor,
        scale: f32,
    ) -> (FlexTensor, FlexTensor) {
        if !applies(&x, &[&weight, &a, &b]) {
            return low_rank_parts::<Self>(x, weight, a, b, scale);
        }
        let narrow = times(&x, &a, false, scale);
        let mut out = times(&x, &weight, false, 1.0);
        let [rank, d_output] = b.layout().shape().dims();
        let rows = x.layout().shape()[0];
        let second = View::<f32>::of(&b).expect("forward strides");
        multiply(View::rows(&narrow, [rows, rank]), second, 1.0, &mut out, d_output, true);
        (flex::tensor(out, Shape::new([rows, d_output])), flex::tensor(narrow, Shape::new([rows, rank])))
    }

    fn low_rank_input(grad: FlexTensor, weight: FlexTensor, narrow: FlexTensor, a: FlexTensor) -> FlexTensor {
        if !applies(&grad, &[&weight, &narrow, &a]) {
            return low_rank_input::<Self>(grad, weight, narrow, a);
        }
        let mut out = times(&grad, &weight, true, 1.0);
        let [d_input, _] = a.layout().shape().dims();
        let first = View::of(&narrow).expect("forward strides");
        let second = View::<f32>::of(&a).expect("forward strides").transposed();
        multiply(first, second, 1.0, &mut out, d_input, true);
        flex::tensor(out, Shape::new([grad.layout().shape()[0], d_input]))
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::FloatDType;

    use super::{
        super::tests::{device, difference, halves, values},
        *,
    };

    /// Value and gradient of `x`.
    fn run(op: impl Fn(Tensor<2>, Tensor<2>) -> Tensor<2>, rows: usize, weight: Tensor<2>) -> (Tensor<2>, Tensor<2>) {
        let device = device().autodiff();
        let [d_input, d_output] = weight.dims();
        let x = values([rows, d_input], 0, &device).require_grad();
        let out = op(x.clone(), weight);
        let mut grads = (out.clone() * values([rows, d_output], 1, &device)).sum().backward();
        (out.without_autodiff(), x.grad_remove(&mut grads).expect("tracked"))
    }

    #[test]
    fn a_frozen_weight_of_any_type_and_layout_counts_as_its_f32_form() {
        let device = device();
        for dtype in halves(&device).into_iter().chain([FloatDType::F32]) {
            for (d_input, d_output) in [(37, 50), (64, 33), (700, 90)] {
                for rows in [1, 3, 20, 130] {
                    let stored = values([d_output, d_input], 2, &device).cast(dtype);
                    let wide = stored.clone().cast(FloatDType::F32).transpose();
                    let as_file = stored.clone().transpose();
                    let as_module = stored.transpose().reshape([d_input * d_output]).reshape([d_input, d_output]);
                    let expected = run(Tensor::matmul, rows, wide);
                    for weight in [as_file, as_module] {
                        let found = run(linear, rows, weight);
                        assert!(difference(found.0, expected.0.clone()) < 1e-5, "{d_input}x{d_output}, {rows} rows");
                        assert!(difference(found.1, expected.1.clone()) < 1e-5, "{d_input}x{d_output}, {rows} rows");
                    }
                }
            }
        }
    }

    #[test]
    fn a_part_of_a_weight_is_read_where_it_lies() {
        let device = device();
        for dtype in halves(&device) {
            let all = values([12, 20], 3, &device).cast(dtype);
            let part = all.clone().narrow(0, 4, 6).transpose();
            let wide = all.cast(FloatDType::F32).narrow(0, 4, 6).transpose();
            let x = values([2, 20], 4, &device);
            assert!(difference(linear(x.clone(), part), x.matmul(wide)) < 1e-5, "{dtype:?}");
        }
    }

    #[test]
    fn a_trained_weight_gets_the_gradient_of_a_product() {
        let device = device().autodiff();
        let gradients = |op: fn(Tensor<2>, Tensor<2>) -> Tensor<2>, expanded: bool| {
            let (x, weight) = (values([70, 33], 0, &device), values([33, 40], 1, &device).require_grad());
            let out = op(x.transpose().transpose(), weight.clone());
            let out = if expanded { out } else { out * values([70, 40], 2, &device) };
            weight.grad_remove(&mut out.sum().backward()).expect("tracked")
        };
        for expanded in [false, true] {
            assert!(difference(gradients(linear, expanded), gradients(Tensor::matmul, expanded)) < 1e-5);
        }
    }

    /// Value, and gradients of `x`, `a` and `b`.
    fn branch(
        op: impl Fn(Tensor<2>, Tensor<2>, Tensor<2>, Tensor<2>) -> Tensor<2>,
        transposed: bool,
        expanded: bool,
    ) -> [Tensor<2>; 4] {
        let plain = device();
        let device = plain.clone().autodiff();
        let x = if transposed { values([40, 90], 0, &device).transpose() } else { values([90, 40], 0, &device) };
        let (x, weight) = (x.require_grad(), values([70, 40], 1, &plain).transpose());
        let (a, b) = (values([40, 6], 2, &device).require_grad(), values([6, 70], 3, &device).require_grad());
        let out = op(x.clone(), weight, a.clone(), b.clone());
        let loss = if expanded { out.clone() } else { out.clone() * values([90, 70], 4, &device) };
        let mut grads = loss.sum().backward();
        let mut grad = |t: Tensor<2>| t.grad_remove(&mut grads).expect("tracked");
        [out.without_autodiff(), grad(x), grad(a), grad(b)]
    }

    #[test]
    fn the_branch_and_its_gradients_equal_the_composed_form() {
        let composed = |x: Tensor<2>, weight: Tensor<2>, a: Tensor<2>, b: Tensor<2>| {
            x.clone().matmul(weight.autodiff()) + x.matmul(a).matmul(b) * 1.5
        };
        for (transposed, expanded) in [(false, false), (true, false), (false, true)] {
            let found = branch(|x, weight, a, b| low_rank_linear(x, weight, a, b, 1.5), transposed, expanded);
            for (found, expected) in found.into_iter().zip(branch(composed, transposed, expanded)) {
                assert!(difference(found, expected) < 1e-5);
            }
        }
    }
}

//! The one way to run a `Linear`.

use burn::{
    nn::{Embedding, Linear},
    tensor::{DType, Device, Int, Tensor, module::linear},
};

use super::{
    cast, parameter,
    split::{lookup, product_in_parts},
};
use crate::{
    adapter::attachment::Attachment,
    kernel::linear::{linear as fused_linear, low_rank_linear},
    weights::keeps_half,
};

/// A `Linear` without memory until its weights are loaded. The weight is `[d_input, d_output]`.
#[must_use]
pub fn linear_module(d_input: usize, d_output: usize, bias: bool, device: &Device) -> Linear {
    Linear {
        weight: parameter([d_input, d_output], 0.0, device),
        bias: bias.then(|| parameter([d_output], 0.0, device)),
    }
}

/// `x W + b`, changed by the update that hangs on the weight, if one does. Every `Linear` of every model runs
/// through here, so that an adapter on its weight takes effect everywhere, and so does the type of the weight: where
/// activations are f32 and a weight is kept in a half type, the product is that of the f32 weight.
///
/// # Shapes
/// `[.., d_input]` -> `[.., d_output]`
#[must_use]
pub fn linear_forward<const D: usize>(layer: &Linear, x: Tensor<D>) -> Tensor<D> {
    let bias = layer.bias.as_ref().map(|b| b.val());
    match layer.weight.reparameterization::<Attachment>() {
        None => product(x, layer.weight.base(), bias),
        Some(hung) => hung.forward(x, layer.weight.base(), bias),
    }
}

/// Whether products of `x` are computed by the project's own kernel: f32 on the CPU. On other devices Burn's own
/// product is the better one.
fn own<const D: usize>(x: &Tensor<D>) -> bool {
    x.dtype() == DType::F32 && keeps_half(&x.device())
}

/// `x` as a matrix of rows, through `op`, back to its shape with the last dimension of the result.
fn by_rows<const D: usize>(x: Tensor<D>, op: impl FnOnce(Tensor<2>) -> Tensor<2>) -> Tensor<D> {
    let mut dims = x.dims();
    let rows = dims[..D - 1].iter().product::<usize>();
    let out = op(x.reshape([rows, dims[D - 1]]));
    dims[D - 1] = out.dims()[1];
    out.reshape(dims)
}

fn biased<const D: usize>(x: Tensor<D>, bias: Option<Tensor<1>>) -> Tensor<D> {
    match bias {
        Some(bias) => {
            let dtype = x.dtype();
            x + cast(bias, dtype).unsqueeze()
        }
        None => x,
    }
}

/// `x W + scale (x A) B + b` for a frozen weight; the low-rank factors are f32.
///
/// # Shapes
/// `x` `[.., d_input]`, `weight` `[d_input, d_output]`, `a` `[d_input, r]`, `b` `[r, d_output]` -> `[.., d_output]`
#[must_use]
pub fn low_rank<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    a: Tensor<2>,
    b: Tensor<2>,
    scale: f64,
) -> Tensor<D> {
    if own(&x) {
        return biased(by_rows(x, |x| low_rank_linear(x, weight, a, b, scale)), bias);
    }
    let dtype = x.dtype();
    // The scale goes to the narrow side: r columns instead of d_output.
    let narrow = linear(cast(x.clone(), DType::F32), a, None).mul_scalar(scale);
    product(x, weight, bias) + cast(linear(narrow, b, None), dtype)
}

/// `x W + b` for a weight of the type of `x`, or a frozen one of a half type under activations in f32.
///
/// # Shapes
/// `x` `[.., d_input]`, `weight` `[d_input, d_output]` -> `[.., d_output]`
#[must_use]
pub fn product<const D: usize>(x: Tensor<D>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<D> {
    if weight.device() != x.device() {
        let out = product_in_parts(x, weight);
        return match bias {
            Some(bias) => out + bias.unsqueeze(),
            None => out,
        };
    }
    let half = matches!(weight.dtype(), DType::BF16 | DType::F16);
    if own(&x) || (half && x.dtype() == DType::F32) {
        return biased(by_rows(x, |x| fused_linear(x, weight)), bias);
    }
    linear(x, weight, bias)
}

/// Rows of an embedding, in the type that activations have on its device.
///
/// # Shapes
/// `[rows, length]` -> `[rows, length, width]`
#[must_use]
pub fn embedding_forward(embedding: &Embedding, ids: Tensor<2, Int>) -> Tensor<3> {
    let table = embedding.weight.val();
    let rows = if table.device() == ids.device() { embedding.forward(ids) } else { lookup(table, ids) };
    if keeps_half(&rows.device()) { cast(rows, DType::F32) } else { rows }
}

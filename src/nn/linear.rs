//! The one way to run a `Linear`.

use burn::{
    nn::{Embedding, Linear},
    tensor::{DType, Device, Int, Tensor, module::linear},
};

use super::{cast, parameter};
use crate::{adapter::lora::Lora, kernel::half_linear::half_linear, weights::keeps_half};

/// A `Linear` without memory until its weights are loaded. The weight is `[d_input, d_output]`.
#[must_use]
pub fn linear_module(d_input: usize, d_output: usize, bias: bool, device: &Device) -> Linear {
    Linear {
        weight: parameter([d_input, d_output], 0.0, device),
        bias: bias.then(|| parameter([d_output], 0.0, device)),
    }
}

/// `x W + b`, plus the branch of a low-rank update if one hangs on the weight. Every `Linear` of every model runs
/// through here, so that an adapter on its weight takes effect everywhere, and so does the type of the weight: where
/// activations are f32 and a weight is kept in a half type, the product is that of the f32 weight.
///
/// # Shapes
/// `[.., d_input]` -> `[.., d_output]`
#[must_use]
pub fn linear_forward<const D: usize>(layer: &Linear, x: Tensor<D>) -> Tensor<D> {
    let bias = layer.bias.as_ref().map(|b| b.val());
    match layer.weight.reparameterization::<Lora>() {
        None => product(x, layer.weight.base(), bias),
        Some(lora) => product(x.clone(), layer.weight.base(), bias) + lora.branch(x),
    }
}

/// `x W + b` for a weight of the type of `x`, or a frozen one of a half type under activations in f32.
///
/// # Shapes
/// `x` `[.., d_input]`, `weight` `[d_input, d_output]` -> `[.., d_output]`
#[must_use]
pub fn product<const D: usize>(x: Tensor<D>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<D> {
    let half = matches!(weight.dtype(), DType::BF16 | DType::F16);
    if !half || x.dtype() != DType::F32 {
        return linear(x, weight, bias);
    }
    let (mut dims, [d_input, d_output]) = (x.dims(), weight.dims());
    let rows = dims[..D - 1].iter().product::<usize>();
    dims[D - 1] = d_output;
    let out = half_linear(x.reshape([rows, d_input]), weight).reshape(dims);
    match bias {
        Some(bias) => out + cast(bias, DType::F32).unsqueeze(),
        None => out,
    }
}

/// Rows of an embedding, in the type that activations have on its device.
///
/// # Shapes
/// `[rows, length]` -> `[rows, length, width]`
#[must_use]
pub fn embedding_forward(embedding: &Embedding, ids: Tensor<2, Int>) -> Tensor<3> {
    let rows = embedding.forward(ids);
    if keeps_half(&rows.device()) { cast(rows, DType::F32) } else { rows }
}

//! The one way to run a `Linear`.

use burn::{
    nn::Linear,
    tensor::{Device, Tensor, module::linear},
};

use super::parameter;
use crate::adapter::lora::Lora;

/// A `Linear` without memory until its weights are loaded. The weight is `[d_input, d_output]`.
#[must_use]
pub fn linear_module(d_input: usize, d_output: usize, bias: bool, device: &Device) -> Linear {
    Linear {
        weight: parameter([d_input, d_output], 0.0, device),
        bias: bias.then(|| parameter([d_output], 0.0, device)),
    }
}

/// `x W + b`, plus the branch of a low-rank update if one hangs on the weight. Every `Linear` of every model runs through here, so that an adapter on its weight takes effect everywhere.
///
/// # Shapes
/// `[.., d_input]` -> `[.., d_output]`
#[must_use]
pub fn linear_forward<const D: usize>(layer: &Linear, x: Tensor<D>) -> Tensor<D> {
    let bias = layer.bias.as_ref().map(|b| b.val());
    match layer.weight.reparameterization::<Lora>() {
        None => linear(x, layer.weight.base(), bias),
        Some(lora) => linear(x.clone(), layer.weight.base(), bias) + lora.branch(x),
    }
}

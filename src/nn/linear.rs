//! The one way to run a `Linear`.

use burn::{
    nn::Linear,
    tensor::{Device, Tensor, module::linear},
};

use super::parameter;

/// A `Linear` without memory until its weights are loaded. The weight is `[d_input, d_output]`.
#[must_use]
pub fn linear_module(d_input: usize, d_output: usize, bias: bool, device: &Device) -> Linear {
    Linear {
        weight: parameter([d_input, d_output], 0.0, device),
        bias: bias.then(|| parameter([d_output], 0.0, device)),
    }
}

/// `x W + b`. Every `Linear` of every model runs through here, so that an adapter on its weight takes effect everywhere.
///
/// # Shapes
/// `[.., d_input]` -> `[.., d_output]`
#[must_use]
pub fn linear_forward<const D: usize>(layer: &Linear, x: Tensor<D>) -> Tensor<D> {
    linear(x, layer.weight.base(), layer.bias.as_ref().map(|b| b.val()))
}

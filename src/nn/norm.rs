//! Normalisation with statistics in f32, whatever the activations' type.

use burn::{
    module::{Module, Param},
    tensor::{DType, Device, Tensor},
};

use super::{cast, parameter};
use crate::kernel::norm::{add_layer_norm, add_rms_norm, layer_norm, rms_norm};

/// Root-mean-square norm, as in Mistral: statistics in f32, weight multiplied after the cast back.
#[derive(Module, Debug)]
pub struct RmsNorm {
    /// `[hidden_size]`
    pub weight: Param<Tensor<1>>,
    /// Added to the mean square.
    pub eps: f64,
}

impl RmsNorm {
    /// Without memory until loaded.
    #[must_use]
    pub fn new(hidden_size: usize, eps: f64, device: &Device) -> Self {
        Self { weight: parameter([hidden_size], 1.0, device), eps }
    }

    /// # Shapes
    /// `[.., hidden_size]` -> same
    #[must_use]
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let weight = cast(self.weight.val(), x.dtype());
        rms_norm(x, weight, self.eps)
    }

    /// `x + branch`, and its norm.
    ///
    /// # Shapes
    /// `[.., hidden_size]` -> same, same
    #[must_use]
    pub fn add_forward<const D: usize>(&self, x: Tensor<D>, branch: Tensor<D>) -> (Tensor<D>, Tensor<D>) {
        if x.dtype() == DType::F32 && self.weight.val().dtype() == DType::F32 {
            return add_rms_norm(x, branch, self.weight.val(), self.eps);
        }
        let sum = x + branch;
        (sum.clone(), self.forward(sum))
    }
}

/// Layer norm with statistics in f32, as in PyTorch.
#[derive(Module, Debug)]
pub struct LayerNorm {
    /// `[hidden_size]`
    pub weight: Param<Tensor<1>>,
    /// `[hidden_size]`
    pub bias: Param<Tensor<1>>,
    /// Added to the variance.
    pub eps: f64,
}

impl LayerNorm {
    /// Without memory until loaded.
    #[must_use]
    pub fn new(hidden_size: usize, eps: f64, device: &Device) -> Self {
        Self { weight: parameter([hidden_size], 1.0, device), bias: parameter([hidden_size], 0.0, device), eps }
    }

    /// # Shapes
    /// `[.., hidden_size]` -> same
    #[must_use]
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let (dtype, weight, bias) = (x.dtype(), self.weight.val(), self.bias.val());
        if weight.dtype() == dtype && bias.dtype() == dtype {
            return layer_norm(x, weight, bias, self.eps);
        }
        let wide = layer_norm(cast(x, DType::F32), cast(weight, DType::F32), cast(bias, DType::F32), self.eps);
        cast(wide, dtype)
    }

    /// `x + branch`, and its norm.
    ///
    /// # Shapes
    /// `[.., hidden_size]` -> same, same
    #[must_use]
    pub fn add_forward<const D: usize>(&self, x: Tensor<D>, branch: Tensor<D>) -> (Tensor<D>, Tensor<D>) {
        if x.dtype() == DType::F32 {
            let (weight, bias) = (cast(self.weight.val(), DType::F32), cast(self.bias.val(), DType::F32));
            return add_layer_norm(x, branch, weight, bias, self.eps);
        }
        let sum = x + branch;
        (sum.clone(), self.forward(sum))
    }
}

//! Normalisation with statistics in f32, whatever the activations' type.

use burn::{
    module::{Module, Param},
    tensor::{DType, Device, Tensor},
};

use super::{cast, parameter};
use crate::kernel::norm::{layer_norm, rms_norm};

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
        let dtype = x.dtype();
        if dtype == DType::F32 && self.weight.val().dtype() == DType::F32 {
            return rms_norm(x, self.weight.val(), self.eps);
        }
        let x = cast(x, DType::F32);
        let scale = x.clone().square().mean_dim(D - 1).add_scalar(self.eps).sqrt().recip();
        cast(x * scale, dtype) * self.weight.val().unsqueeze()
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
        let dtype = x.dtype();
        let (weight, bias) = (cast(self.weight.val(), DType::F32), cast(self.bias.val(), DType::F32));
        cast(layer_norm(cast(x, DType::F32), weight, bias, self.eps), dtype)
    }
}

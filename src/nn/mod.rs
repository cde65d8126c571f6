//! Blocks that models share. Field names are those of the Hugging Face modules they read weights from.

pub mod attention;
pub mod bert;
pub mod decoder;
pub mod intern_vit;
pub mod internlm2;
pub mod interpolate;
pub mod linear;
pub mod norm;
pub mod open_clip;
pub mod phi3;
pub mod projector;
pub mod resampler;
pub mod rope;
pub mod split;
pub mod visit;
pub mod vit;

use burn::{
    module::{Param, ParamId},
    tensor::{DType, Device, FloatDType, Shape, Tensor},
};

/// A parameter that takes no memory until it is loaded, initialised or read; read unloaded, it is `fill` everywhere.
#[must_use]
pub fn parameter<const D: usize>(shape: [usize; D], fill: f32, device: &Device) -> Param<Tensor<D>> {
    Param::uninitialized(
        ParamId::new(),
        move |device, require_grad| {
            let tensor = Tensor::full(shape, fill, (device, DType::F32));
            if require_grad { tensor.require_grad() } else { tensor }
        },
        device.clone(),
        true,
        Shape::from(shape),
    )
}

/// Debug builds stop where a tensor does not have the type that `place` takes: Burn promotes nothing, and a wrong type
/// would show far from where it arose.
pub(crate) fn debug_dtype<const D: usize>(x: &Tensor<D>, dtype: DType, place: &str) {
    debug_assert!(x.dtype() == dtype, "{place} takes {dtype:?} and got {:?}", x.dtype());
}

/// `x` as `dtype`, without a pass over it when it already is.
#[must_use]
pub fn cast<const D: usize>(x: Tensor<D>, dtype: DType) -> Tensor<D> {
    if x.dtype() == dtype { x } else { x.cast(FloatDType::from(dtype)) }
}

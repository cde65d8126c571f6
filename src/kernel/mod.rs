//! Fused differentiable operations, one a file.
//!
//! Each is a backend extension with three parts: a default made of Burn's own operations (what every backend can run,
//! and what Burn's fusion merges on GPUs), one gradient rule, and an implementation for the Flex backend in which one
//! pass over memory does the work of many, on all cores and with the widest vectors of the processor. Flex runs
//! elementwise operations on one core with a scalar `exp`, and autodiff breaks softmax and norms into pieces. Products
//! of matrices have an implementation of their own as well (`gemm.rs`, which says why).
//!
//! `MEDTUNE_KERNELS=composed` switches the Flex implementations off, to tell a kernel's fault from another.

pub mod attention;
pub mod blocks;
pub mod cross_entropy;
mod flex;
pub mod gelu;
mod gemm;
pub mod linear;
pub mod norm;
pub mod pull_back;
pub mod quant;
pub mod rope;
pub mod softmax;
pub mod swiglu;

use std::sync::LazyLock;

/// Whether the fused implementations are used.
#[must_use]
pub fn fused() -> bool {
    static FUSED: LazyLock<bool> = LazyLock::new(|| std::env::var("MEDTUNE_KERNELS").map_or(true, |v| v != "composed"));
    *FUSED
}

#[cfg(test)]
mod tests {
    //! Every fused operation against its composed form: value and gradients, contiguous and transposed inputs,
    //! expanded output gradients.

    use burn::tensor::{Device, Tensor, TensorData};
    use rand::RngExt;

    /// Reproducible values in [-3, 3).
    pub(super) fn values<const D: usize>(shape: [usize; D], key: u64, device: &Device) -> Tensor<D> {
        let mut rng = crate::random::stream(1, "kernel test", key);
        let data: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-3.0..3.0)).collect();
        Tensor::from_data(TensorData::new(data, shape), device)
    }

    /// Largest difference relative to the largest magnitude.
    pub(super) fn difference<const D: usize>(a: Tensor<D>, b: Tensor<D>) -> f32 {
        let (a, b): (Vec<f32>, Vec<f32>) =
            (a.into_data().try_into_vec().unwrap(), b.into_data().try_into_vec().unwrap());
        let scale = b.iter().fold(1e-6f32, |m, v| m.max(v.abs()));
        a.iter().zip(&b).fold(0f32, |m, (a, b)| m.max((a - b).abs())) / scale
    }
}

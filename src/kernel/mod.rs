//! Fused differentiable operations, one a file.
//!
//! Each is a backend extension with three parts: a default made of Burn's own operations (what every backend can run),
//! one gradient rule, and an implementation for the Flex backend in which one pass over memory does the work of many, on
//! all cores and with the widest vectors of the processor. Flex runs elementwise operations on one core with a scalar
//! `exp`, and autodiff breaks softmax and norms into pieces. Products of matrices have an implementation of their own as
//! well (`gemm.rs`, which says why).
//!
//! On GPUs (CubeCL) elementwise operations stay composed, because Burn's fusion merges them with their neighbours and a
//! kernel would stand in its way. Norms, cross-entropy and attention are written by hand there too (`cube_*.rs`).
//!
//! `--kernels composed` (`MEDTUNE_KERNELS=composed` for tests and benchmarks) switches the implementations of the
//! project's own off, to tell a kernel's fault from another.

pub mod attention;
pub mod blocks;
pub mod cross_entropy;
#[cfg(feature = "gpu")]
mod cube;
#[cfg(feature = "gpu")]
mod cube_attention;
#[cfg(feature = "gpu")]
mod cube_attention_rows;
#[cfg(feature = "gpu")]
mod cube_cross_entropy;
#[cfg(feature = "gpu")]
mod cube_norm;
mod flex;
pub mod gelu;
mod gemm;
pub mod linear;
pub mod norm;
pub mod pixel_shuffle;
pub mod pull_back;
pub mod quant;
pub mod rope;
pub mod softmax;
pub mod swiglu;

use std::sync::OnceLock;

/// Which implementations of the operations run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Kernels {
    /// The project's own, where there is one for the device.
    #[default]
    Fused,
    /// Those that are made of the operations of Burn.
    Composed,
}

/// Environment variable that chooses where no [`choose`] has: in tests and benchmarks.
pub const VARIABLE: &str = "MEDTUNE_KERNELS";

static CHOSEN: OnceLock<Kernels> = OnceLock::new();

/// Chooses for the whole process; only the first choice counts, and only before the first operation.
pub fn choose(kernels: Kernels) {
    CHOSEN.get_or_init(|| kernels);
}

/// Whether the fused implementations are used.
#[must_use]
pub fn fused() -> bool {
    let from_env = || match std::env::var(VARIABLE).as_deref() {
        Ok("composed") => Kernels::Composed,
        _ => Kernels::Fused,
    };
    *CHOSEN.get_or_init(from_env) == Kernels::Fused
}

#[cfg(test)]
mod tests {
    //! Every fused operation against its composed form: value and gradients, contiguous and transposed inputs,
    //! expanded output gradients. They run on the device that `MEDTUNE_DEVICE` names.

    use burn::tensor::{Device, FloatDType, Tensor, TensorData};
    use rand::RngExt;

    use crate::device::{DeviceSpec, policy::Policy, tolerance::Tolerance};

    pub(super) fn device() -> Device {
        DeviceSpec::from_env().unwrap().open().unwrap()
    }

    /// Half types in which that device holds matrices.
    pub(super) fn halves(device: &Device) -> Vec<FloatDType> {
        Policy::of(device).halves(device)
    }

    /// Reproducible values in [-3, 3).
    pub(super) fn values<const D: usize>(shape: [usize; D], key: u64, device: &Device) -> Tensor<D> {
        let mut rng = crate::random::stream(1, "kernel test", key);
        let data: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-3.0..3.0)).collect();
        Tensor::from_data(TensorData::new(data, shape), device)
    }

    /// Largest difference relative to the largest magnitude, over what the table of tolerances lets this device differ
    /// from the CPU.
    pub(super) fn difference<const D: usize>(a: Tensor<D>, b: Tensor<D>) -> f32 {
        let (a, b): (Vec<f32>, Vec<f32>) =
            (a.into_data().try_into_vec().unwrap(), b.into_data().try_into_vec().unwrap());
        let scale = b.iter().fold(1e-6f32, |m, v| m.max(v.abs()));
        a.iter().zip(&b).fold(0f32, |m, (a, b)| m.max((a - b).abs()))
            / scale
            / Tolerance::of(&DeviceSpec::from_env().unwrap()).parity
    }
}

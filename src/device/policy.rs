//! In which types a kind of device holds and computes numbers.
//!
//! Adapters, optimizer and losses are f32 everywhere. Burn promotes nothing, so every boundary casts with
//! [`crate::nn::cast`].

use burn::{
    backend::DispatchDevice,
    tensor::{DType, Device, FloatDType},
};

use crate::error::{Error, Kind, Result};

/// What a kind of device does with the weights of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Kind of device.
    pub kind: &'static str,
    /// Whether activations are f32 whatever the type of the weights; if not, they have the type of the weights.
    pub wide_activations: bool,
    /// Half types in which matrices may be held.
    pub held: &'static [FloatDType],
    /// Bytes of a checkpoint from which on matrices are held in a half type where they need not be.
    pub half_from: u64,
}

/// Two gigabytes: below it, a model in f32 fits everywhere and computes faster than one that is widened again and again.
pub(crate) const LARGE: u64 = 2_000_000_000;

/// The table. WGSL has no bf16 and SPIR-V drivers compute nothing in it; f16 would overflow as a type of activations.
pub const POLICIES: [Policy; 4] = [
    Policy { kind: "cpu", wide_activations: true, held: &[FloatDType::BF16, FloatDType::F16], half_from: LARGE },
    Policy { kind: "wgpu", wide_activations: true, held: &[FloatDType::F16], half_from: LARGE },
    Policy { kind: "vulkan", wide_activations: true, held: &[FloatDType::F16], half_from: LARGE },
    Policy { kind: "cuda", wide_activations: false, held: &[FloatDType::BF16, FloatDType::F16], half_from: 0 },
];

/// Kind of an opened device.
#[must_use]
pub fn kind_of(device: &Device) -> &'static str {
    kind(device.as_dispatch())
}

#[allow(unreachable_patterns, reason = "which backends there are depends on the features")]
fn kind(device: &DispatchDevice) -> &'static str {
    match device {
        #[cfg(feature = "flex")]
        DispatchDevice::Flex(_) => "cpu",
        DispatchDevice::Autodiff(_) => kind(&device.clone().inner()),
        #[cfg(feature = "wgpu")]
        DispatchDevice::Cube(burn_cubecl::CubeDevice::Wgpu(wgpu)) => {
            let pinned = wgpu.backend == burn_cubecl::cubecl::wgpu::WgpuBackend::Vulkan;
            if pinned { "vulkan" } else { "wgpu" }
        }
        #[cfg(feature = "cuda")]
        DispatchDevice::Cube(burn_cubecl::CubeDevice::Cuda(_)) => "cuda",
        _ => "cpu",
    }
}

impl Policy {
    /// The line of a device.
    #[must_use]
    pub fn of(device: &Device) -> Self {
        let kind = kind_of(device);
        POLICIES.into_iter().find(|p| p.kind == kind).expect("every kind of device has a line")
    }

    /// Half types in which `device` can hold matrices.
    #[must_use]
    pub fn halves(&self, device: &Device) -> Vec<FloatDType> {
        self.held.iter().copied().filter(|dtype| device.supports_dtype(*dtype)).collect()
    }

    /// Type in which weights that are stored as `stored` are held on `device`, `bytes` of them in all.
    #[must_use]
    pub fn default_dtype(&self, stored: DType, bytes: u64, device: &Device) -> FloatDType {
        if !matches!(stored, DType::F16 | DType::BF16) || bytes < self.half_from {
            return FloatDType::F32;
        }
        let halves = self.halves(device);
        // bf16 becomes f16 where there is no bf16: its values between 6e-5 and 65504 exactly, smaller ones to 6e-8.
        halves
            .iter()
            .copied()
            .find(|d| DType::from(*d) == stored)
            .or(halves.first().copied())
            .unwrap_or(FloatDType::F32)
    }
}

/// Checks that `device` can hold weights of type `dtype`.
///
/// # Errors
/// It cannot.
pub fn check_dtype(dtype: FloatDType, device: &Device) -> Result<()> {
    let policy = Policy::of(device);
    let halves = policy.halves(device);
    if dtype == FloatDType::F32 || halves.contains(&dtype) {
        return Ok(());
    }
    let names: Vec<&str> = halves.iter().map(|d| crate::weights::torch_dtype(*d)).chain(["float32"]).collect();
    Err(Error::new(Kind::Device, "this device cannot hold weights of this type")
        .at(policy.kind)
        .expected(names.join(" or "))
        .found(crate::weights::torch_dtype(dtype))
        .help("leave the type to `auto`, or choose another with `--dtype` or `--set model.dtype`"))
}

/// Largest buffer of `device` in bytes; none where only its memory is the limit.
#[must_use]
pub fn max_buffer_bytes(device: &Device) -> Option<u64> {
    limits(device.as_dispatch()).map(|(buffer, _)| buffer)
}

/// Largest buffer and, where known, memory in bytes. Opens the device.
#[allow(unreachable_patterns, reason = "which backends there are depends on the features")]
pub(super) fn limits(device: &DispatchDevice) -> Option<(u64, Option<u64>)> {
    match device {
        DispatchDevice::Autodiff(_) => limits(&device.clone().inner()),
        #[cfg(any(feature = "wgpu", feature = "cuda"))]
        DispatchDevice::Cube(cube) => {
            let client = cube.client();
            let memory = &client.properties().memory;
            Some((memory.max_page_size, memory.max_memory()))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::KINDS;

    #[test]
    fn every_kind_has_a_line() {
        let kinds: Vec<_> = KINDS.iter().map(|k| k.kind()).collect();
        assert_eq!(POLICIES.map(|p| p.kind).to_vec(), kinds);
        for spec in KINDS.iter().filter(|s| s.compiled()) {
            for device in spec.enumerate() {
                assert_eq!(kind_of(&device), spec.kind());
                assert_eq!(kind_of(&device.autodiff()), spec.kind());
            }
        }
    }

    #[test]
    fn the_cpu_keeps_the_half_types_of_large_checkpoints_alone() {
        let device = Device::flex();
        let policy = Policy::of(&device);
        for (stored, dtype) in [(DType::BF16, FloatDType::BF16), (DType::F16, FloatDType::F16)] {
            assert_eq!(policy.default_dtype(stored, LARGE, &device), dtype);
            assert_eq!(policy.default_dtype(stored, LARGE - 1, &device), FloatDType::F32);
            check_dtype(dtype, &device).unwrap();
        }
        assert_eq!(policy.default_dtype(DType::F32, LARGE, &device), FloatDType::F32);
        assert_eq!(max_buffer_bytes(&device), None);
    }

    #[test]
    fn a_type_that_a_device_cannot_hold_is_refused_with_what_it_can() {
        let error = check_dtype(FloatDType::F64, &Device::flex()).unwrap_err().to_string();
        assert!(error.contains("bfloat16 or float16 or float32"), "{error}");
    }
}

//! What this build and this machine have: names, drivers, memory, types, limits, and why something is missing.

use burn::tensor::{Device, FloatDType};
use serde::{Deserialize, Serialize};

use super::{DeviceSpec, KINDS, cuda, policy};

/// A kind of device and what this build and this machine have of it.
#[derive(Debug, Clone, Serialize)]
pub struct Backend {
    /// Name before the colon.
    pub kind: &'static str,
    /// What runs the computation.
    pub about: &'static str,
    /// Cargo feature that compiles it in.
    pub feature: &'static str,
    /// Whether it is compiled in.
    pub compiled: bool,
    /// Why there is no device of this kind, and what to do about it.
    pub unavailable: Option<String>,
    /// Its devices on this machine.
    pub devices: Vec<Adapter>,
}

/// A device as far as it can be known without using it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adapter {
    /// As `--device` takes it.
    pub device: String,
    /// The part, as it names itself.
    pub name: String,
    /// Driver with its version, where one is known.
    pub driver: Option<String>,
}

/// What only the opened device tells.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Memory in bytes, where it is known.
    pub memory_bytes: Option<u64>,
    /// Largest buffer in bytes; none where only memory is the limit.
    pub max_buffer_bytes: Option<u64>,
    /// Types of numbers that it computes with.
    pub dtypes: Vec<String>,
}

/// Every kind of device.
#[must_use]
pub fn backends() -> Vec<Backend> {
    KINDS.iter().map(backend).collect()
}

fn backend(spec: &DeviceSpec) -> Backend {
    let devices = adapters(spec);
    let unavailable = match (spec.compiled(), devices.is_empty()) {
        (false, _) => Some(format!("not in this build; {}", spec.build_command())),
        (true, true) => Some(spec.absence()),
        (true, false) => None,
    };
    Backend {
        kind: spec.kind(),
        about: match spec {
            DeviceSpec::Auto | DeviceSpec::Cpu => "Burn's Flex backend: SIMD and all cores",
            DeviceSpec::Wgpu(_) => "shaders on Vulkan, Metal, DirectX 12 or OpenGL",
            DeviceSpec::Vulkan(_) => "SPIR-V shaders on Vulkan",
            DeviceSpec::Cuda(_) => "CUDA kernels compiled at run time by NVRTC",
        },
        feature: spec.feature(),
        compiled: spec.compiled(),
        unavailable,
        devices,
    }
}

/// The devices of a kind, by index.
#[must_use]
pub fn adapters(kind: &DeviceSpec) -> Vec<Adapter> {
    let devices = kind.enumerate();
    let named = |(i, device)| {
        let (name, driver) = describe(device);
        Adapter { device: kind.at_index(i).to_string(), name, driver }
    };
    devices.iter().enumerate().map(named).collect()
}

/// Whether a device is a part of its own, and not a program that plays one.
pub(super) fn is_hardware(device: &Device) -> bool {
    #[cfg(feature = "wgpu")]
    if let Some(info) = wgpu::info(device) {
        return info.device_type != wgpu::DeviceType::Cpu;
    }
    let _ = device;
    true
}

fn describe(device: &Device) -> (String, Option<String>) {
    #[cfg(feature = "wgpu")]
    if let Some(info) = wgpu::info(device) {
        let driver = [info.driver, info.driver_info, format!("on {}", info.backend)];
        let driver = driver.into_iter().filter(|s| !s.is_empty()).collect::<Vec<_>>().join(" ");
        return (info.name, Some(driver));
    }
    if policy::kind_of(device) == "cuda" {
        return (format!("{device:?}"), cuda::driver_version());
    }
    (processor(), None)
}

fn processor() -> String {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find_map(|l| l.strip_prefix("model name")?.split_once(':').map(|(_, v)| v.trim()));
    format!("{}, {cores} threads", model.unwrap_or(std::env::consts::ARCH))
}

/// Opens `device` and asks what it can do.
#[must_use]
pub fn limits(device: &Device) -> Limits {
    let known = policy::limits(device.as_dispatch());
    let dtypes = [FloatDType::F32, FloatDType::F16, FloatDType::BF16];
    let computes = dtypes.into_iter().filter(|d| device.supports_dtype(*d));
    Limits {
        memory_bytes: known.map_or_else(host_memory, |(_, memory)| memory),
        max_buffer_bytes: known.map(|(buffer, _)| buffer),
        dtypes: computes.map(|d| crate::weights::torch_dtype(d).to_string()).collect(),
    }
}

fn host_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|l| l.starts_with("MemTotal:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Adapters of wgpu behind Burn's devices.
#[cfg(feature = "wgpu")]
mod wgpu {
    use burn::{backend::DispatchDevice, tensor::Device};
    pub(super) use burn_cubecl::cubecl::wgpu::wgpu::{AdapterInfo, DeviceType};
    use burn_cubecl::{
        CubeDevice,
        cubecl::wgpu::{
            AutoGraphicsApi, WgpuBackend, WgpuDevice, WgpuDeviceKind,
            wgpu::{Backend, Instance, InstanceDescriptor},
        },
    };

    /// What the adapter of a device says about itself; none for devices of other runtimes. The device is not opened.
    pub(super) fn info(device: &Device) -> Option<AdapterInfo> {
        let DispatchDevice::Cube(CubeDevice::Wgpu(WgpuDevice { kind, backend })) = device.as_dispatch() else {
            return None;
        };
        let (class, index) = match kind {
            WgpuDeviceKind::DiscreteGpu(i) => (DeviceType::DiscreteGpu, *i),
            WgpuDeviceKind::IntegratedGpu(i) => (DeviceType::IntegratedGpu, *i),
            WgpuDeviceKind::VirtualGpu(i) => (DeviceType::VirtualGpu, *i),
            WgpuDeviceKind::Other(i) => (DeviceType::Other, *i),
            _ => (DeviceType::Cpu, 0),
        };
        adapters(backend).into_iter().filter(|a| a.device_type == class).nth(index)
    }

    /// The adapters of the interface that `backend` settles on, as Burn's runtime chooses it: the first with a GPU, else
    /// the first with anything.
    fn adapters(backend: &WgpuBackend) -> Vec<AdapterInfo> {
        let interfaces = match backend {
            WgpuBackend::Vulkan => vec![Backend::Vulkan],
            _ => AutoGraphicsApi::chain(),
        };
        let mut all: Vec<Vec<AdapterInfo>> = interfaces.into_iter().map(probe).filter(|a| !a.is_empty()).collect();
        let with_gpu = all.iter().position(|a| a.iter().any(|a| a.device_type != DeviceType::Cpu));
        if all.is_empty() { Vec::new() } else { all.swap_remove(with_gpu.unwrap_or(0)) }
    }

    fn probe(backend: Backend) -> Vec<AdapterInfo> {
        let descriptor =
            InstanceDescriptor { backends: backend.into(), ..InstanceDescriptor::new_without_display_handle() };
        let instance = Instance::new(descriptor);
        let found = burn_cubecl::cubecl::future::block_on(instance.enumerate_adapters(backend.into()));
        found.iter().map(|adapter| adapter.get_info()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_says_why_and_what_is_there_has_a_name() {
        for backend in backends() {
            assert_eq!(backend.unavailable.is_some(), backend.devices.is_empty(), "{backend:?}");
            if !backend.compiled {
                let why = backend.unavailable.unwrap();
                assert!(why.contains(&format!("--features {}", backend.feature)), "{why}");
            }
            assert!(backend.devices.iter().all(|d| !d.name.is_empty() && d.device.starts_with(backend.kind)));
        }
    }

    #[test]
    fn the_cpu_has_no_limit_but_memory() {
        let limits = limits(&Device::flex());
        assert_eq!(limits.max_buffer_bytes, None);
        assert!(limits.dtypes.contains(&"float32".to_string()));
    }
}

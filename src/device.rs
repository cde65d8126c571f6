//! Names of devices (`cpu`, `wgpu`, `vulkan`, `cuda:1`) and what they become.

use burn::tensor::Device;

use crate::error::{Error, Kind, Result};

/// A device as the user writes it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(into = "String")]
pub enum DeviceSpec {
    /// Burn's Flex backend.
    Cpu,
    /// WGSL shaders through wgpu, adapter by index.
    Wgpu(usize),
    /// SPIR-V shaders through Vulkan, adapter by index.
    Vulkan(usize),
    /// CUDA device by index.
    Cuda(usize),
}

impl From<DeviceSpec> for String {
    fn from(spec: DeviceSpec) -> Self {
        spec.to_string()
    }
}

impl std::fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Wgpu(i) => write!(f, "wgpu:{i}"),
            Self::Vulkan(i) => write!(f, "vulkan:{i}"),
            Self::Cuda(i) => write!(f, "cuda:{i}"),
        }
    }
}

impl std::str::FromStr for DeviceSpec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (name, index) = text.split_once(':').unwrap_or((text, "0"));
        let unknown = || {
            Error::new(Kind::Device, "unknown device")
                .at(format!("--device {text}"))
                .expected("cpu, wgpu[:i], vulkan[:i] or cuda[:i]")
                .help("`medtune devices` lists what this build can use")
        };
        let index: usize = index.parse().map_err(|_| unknown())?;
        match (name, index) {
            ("cpu", 0) => Ok(Self::Cpu),
            ("wgpu", i) => Ok(Self::Wgpu(i)),
            ("vulkan", i) => Ok(Self::Vulkan(i)),
            ("cuda", i) => Ok(Self::Cuda(i)),
            _ => Err(unknown()),
        }
    }
}

impl DeviceSpec {
    /// Opens the device.
    ///
    /// # Errors
    /// The backend was not compiled in, or there is no such device.
    pub fn open(&self) -> Result<Device> {
        match self {
            #[cfg(feature = "flex")]
            Self::Cpu => Ok(Device::flex()),
            other => Err(Error::new(Kind::Device, "this build has no such backend")
                .at(format!("--device {other}"))
                .help(format!("build with `cargo build --release --features {}`", other.feature()))),
        }
    }

    fn feature(&self) -> &'static str {
        match self {
            Self::Cpu => "flex",
            Self::Wgpu(_) => "wgpu",
            Self::Vulkan(_) => "vulkan",
            Self::Cuda(_) => "cuda",
        }
    }
}

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

/// A kind of device and what this build and this machine have of it.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Backend {
    /// Name before the colon.
    pub kind: &'static str,
    /// What runs the computation.
    pub about: &'static str,
    /// Cargo feature that compiles it in.
    pub feature: &'static str,
    /// Whether it is compiled in.
    pub compiled: bool,
    /// Its devices on this machine, by index.
    pub devices: Vec<String>,
}

/// Every kind of device.
#[must_use]
pub fn backends() -> Vec<Backend> {
    let all = [
        (DeviceSpec::Cpu, "Burn's Flex backend: SIMD and all cores"),
        (DeviceSpec::Wgpu(0), "WGSL shaders on Vulkan, Metal, DirectX 12 or OpenGL"),
        (DeviceSpec::Vulkan(0), "SPIR-V shaders on Vulkan"),
        (DeviceSpec::Cuda(0), "CUDA kernels compiled at run time by NVRTC"),
    ];
    all.into_iter()
        .map(|(spec, about)| Backend {
            kind: spec.kind(),
            about,
            feature: spec.feature(),
            compiled: spec.compiled(),
            devices: spec.enumerate().iter().map(describe).collect(),
        })
        .collect()
}

impl DeviceSpec {
    /// Opens the device.
    ///
    /// # Errors
    /// The backend was not compiled in, or there is no such device.
    pub fn open(&self) -> Result<Device> {
        if !self.compiled() {
            return Err(Error::new(Kind::Device, "this build has no such backend")
                .at(format!("--device {self}"))
                .help(format!("build with `cargo build --release --features {}`", self.feature())));
        }
        let devices = self.enumerate();
        devices.get(self.index()).cloned().ok_or_else(|| {
            Error::new(Kind::Device, "no such device on this machine")
                .at(format!("--device {self}"))
                .expected(format!("an index below {}", devices.len()))
                .help("`medtune devices` lists them; `--device cpu` always works")
        })
    }

    /// `cpu`, `wgpu`, `vulkan` or `cuda`: what results may depend on, besides the device's own rounding.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Wgpu(_) => "wgpu",
            Self::Vulkan(_) => "vulkan",
            Self::Cuda(_) => "cuda",
        }
    }

    fn index(&self) -> usize {
        match self {
            Self::Cpu => 0,
            Self::Wgpu(i) | Self::Vulkan(i) | Self::Cuda(i) => *i,
        }
    }

    fn feature(&self) -> &'static str {
        match self {
            Self::Cpu => "flex",
            other => other.kind(),
        }
    }

    fn compiled(&self) -> bool {
        match self {
            Self::Cpu => cfg!(feature = "flex"),
            Self::Wgpu(_) => cfg!(feature = "wgpu"),
            Self::Vulkan(_) => cfg!(feature = "vulkan"),
            Self::Cuda(_) => cfg!(feature = "cuda"),
        }
    }

    /// Devices of this kind on this machine; none when the backend is not compiled in.
    fn enumerate(&self) -> Vec<Device> {
        match self {
            #[cfg(feature = "flex")]
            Self::Cpu => vec![Device::flex()],
            #[cfg(feature = "wgpu")]
            Self::Wgpu(_) => Device::enumerate(burn::tensor::DeviceType::Wgpu).into_iter().collect(),
            #[cfg(feature = "vulkan")]
            Self::Vulkan(_) => Device::enumerate(burn::tensor::DeviceType::Vulkan).into_iter().collect(),
            #[cfg(feature = "cuda")]
            Self::Cuda(_) => Device::enumerate(burn::tensor::DeviceType::Cuda).into_iter().collect(),
            #[cfg(not(all(feature = "flex", feature = "wgpu", feature = "vulkan", feature = "cuda")))]
            _ => Vec::new(),
        }
    }
}

fn describe(device: &Device) -> String {
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    if let Some(identity) = device.identity() {
        return identity.name;
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{cores} threads ({device:?})")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_nonsense_is_refused() {
        for text in ["cpu", "wgpu:0", "vulkan:1", "cuda:3"] {
            assert_eq!(text.parse::<DeviceSpec>().unwrap().to_string(), text);
        }
        assert_eq!("cuda".parse::<DeviceSpec>().unwrap(), DeviceSpec::Cuda(0));
        for text in ["", "gpu", "cpu:1", "cuda:", "cuda:x", "wgpu:-1"] {
            assert_eq!(text.parse::<DeviceSpec>().unwrap_err().kind(), Kind::Device, "{text}");
        }
    }

    #[test]
    fn a_backend_that_is_absent_says_how_to_get_it() {
        for backend in backends() {
            let error = format!("{}:999", backend.kind).parse::<DeviceSpec>().and_then(|s| s.open());
            let error = error.unwrap_err();
            assert!(error.help_line().is_some(), "{error}");
            assert_eq!(error.to_string().contains("no such backend"), !backend.compiled && backend.kind != "cpu");
        }
    }
}

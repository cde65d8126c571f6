//! Names of devices (`cpu`, `wgpu`, `vulkan`, `cuda:1`, `auto`) and what they become.
//!
//! [`DeviceSpec::open`] hands out a device; [`trust::open`] does so only after the device has computed known answers
//! right. [`list`] describes what this build and this machine have, [`policy`] says how numbers are held and computed,
//! [`tolerance`] how far a kind of device may differ from the CPU, [`guard`] turns a device that fails in the middle of
//! work into an error.

use burn::tensor::Device;

use crate::error::{Error, Kind, Result};

pub mod cuda;
pub mod guard;
pub mod known;
pub mod list;
pub mod policy;
pub mod tolerance;
pub mod trust;

/// A device as the user writes it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(into = "String")]
pub enum DeviceSpec {
    /// The best there is: CUDA, then a GPU through wgpu, then the CPU.
    Auto,
    /// Burn's Flex backend.
    Cpu,
    /// Through wgpu on whichever graphics interface it finds, adapter by index.
    Wgpu(usize),
    /// SPIR-V shaders through Vulkan, adapter by index.
    Vulkan(usize),
    /// CUDA device by index.
    Cuda(usize),
}

/// Kinds of devices, in the order in which they are listed; one of each.
const KINDS: [DeviceSpec; 4] = [DeviceSpec::Cpu, DeviceSpec::Wgpu(0), DeviceSpec::Vulkan(0), DeviceSpec::Cuda(0)];

/// Environment variable with the device that tests and benchmarks run on.
pub const VARIABLE: &str = "MEDTUNE_DEVICE";

impl From<DeviceSpec> for String {
    fn from(spec: DeviceSpec) -> Self {
        spec.to_string()
    }
}

impl std::fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.index() {
            None => f.write_str(self.kind()),
            Some(i) => write!(f, "{}:{i}", self.kind()),
        }
    }
}

impl std::str::FromStr for DeviceSpec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let unknown = || {
            Error::new(Kind::Device, "unknown device")
                .at(format!("--device {text}"))
                .expected("cpu, wgpu[:i], vulkan[:i], cuda[:i] or auto")
                .help("`medtune devices` lists what this build can use")
        };
        match text {
            "auto" => return Ok(Self::Auto),
            "cpu" => return Ok(Self::Cpu),
            _ => {}
        }
        let (name, index) = text.split_once(':').unwrap_or((text, "0"));
        let index: usize = index.parse().map_err(|_| unknown())?;
        match name {
            "wgpu" => Ok(Self::Wgpu(index)),
            "vulkan" => Ok(Self::Vulkan(index)),
            "cuda" => Ok(Self::Cuda(index)),
            _ => Err(unknown()),
        }
    }
}

impl DeviceSpec {
    /// The device that `MEDTUNE_DEVICE` names, else the CPU. For tests and benchmarks; the program takes `--device`.
    ///
    /// # Errors
    /// The variable names no device.
    pub fn from_env() -> Result<Self> {
        std::env::var(VARIABLE).map_or(Ok(Self::Cpu), |name| name.parse())
    }

    /// The device itself in place of [`DeviceSpec::Auto`].
    #[must_use]
    pub fn resolve(&self) -> Self {
        match self {
            Self::Auto => Self::candidates().remove(0),
            other => other.clone(),
        }
    }

    /// What [`DeviceSpec::Auto`] may become on this machine, best first; the CPU is always the last.
    fn candidates() -> Vec<Self> {
        let gpus = [Self::Cuda(0), Self::Wgpu(0)];
        let found = gpus.into_iter().filter(|spec| spec.enumerate().first().is_some_and(list::is_hardware));
        found.chain([Self::Cpu]).collect()
    }

    /// Opens the device without asking it anything.
    ///
    /// # Errors
    /// The backend was not compiled in, or there is no such device.
    pub fn open(&self) -> Result<Device> {
        let spec = self.resolve();
        if !spec.compiled() {
            return Err(Error::new(Kind::Device, "this build has no such backend")
                .at(format!("--device {spec}"))
                .help(spec.build_command()));
        }
        let devices = spec.enumerate();
        let index = spec.index().unwrap_or_default();
        devices.get(index).cloned().ok_or_else(|| {
            let error = Error::new(Kind::Device, "no such device on this machine").at(format!("--device {spec}"));
            match devices.len() {
                0 => error.found(spec.absence()).help("`medtune devices` says more; `--device cpu` always works"),
                n => error
                    .expected(format!("an index below {n}"))
                    .help("`medtune devices` lists them; `--device cpu` always works"),
            }
        })
    }

    /// `cpu`, `wgpu`, `vulkan` or `cuda`: what results may depend on, besides the device's own rounding.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Cpu => "cpu",
            Self::Wgpu(_) => "wgpu",
            Self::Vulkan(_) => "vulkan",
            Self::Cuda(_) => "cuda",
        }
    }

    /// Which of its kind; none where there is only one.
    fn index(&self) -> Option<usize> {
        match self {
            Self::Auto | Self::Cpu => None,
            Self::Wgpu(i) | Self::Vulkan(i) | Self::Cuda(i) => Some(*i),
        }
    }

    /// The same kind, another index.
    fn at_index(&self, index: usize) -> Self {
        match self {
            Self::Auto => Self::Auto,
            Self::Cpu => Self::Cpu,
            Self::Wgpu(_) => Self::Wgpu(index),
            Self::Vulkan(_) => Self::Vulkan(index),
            Self::Cuda(_) => Self::Cuda(index),
        }
    }

    /// Cargo feature that compiles it in.
    fn feature(&self) -> &'static str {
        match self {
            Self::Auto | Self::Cpu => "flex",
            other => other.kind(),
        }
    }

    fn build_command(&self) -> String {
        format!("build with `cargo build --release --features {}`", self.feature())
    }

    fn compiled(&self) -> bool {
        match self {
            Self::Auto | Self::Cpu => cfg!(feature = "flex"),
            Self::Wgpu(_) => cfg!(feature = "wgpu"),
            Self::Vulkan(_) => cfg!(feature = "vulkan"),
            Self::Cuda(_) => cfg!(feature = "cuda"),
        }
    }

    /// Why a kind that is compiled in has no device here, and what to install.
    fn absence(&self) -> String {
        match self {
            Self::Auto | Self::Cpu => "no CPU".into(),
            Self::Wgpu(_) => "no adapter; install the graphics driver of the GPU (on Debian without one: apt-get \
                              install mesa-vulkan-drivers libvulkan1)"
                .into(),
            Self::Vulkan(_) => "no Vulkan adapter; install the Vulkan driver of the GPU and libvulkan1".into(),
            Self::Cuda(_) => cuda::absence(),
        }
    }

    /// Devices of this kind on this machine; none when the backend is not compiled in.
    fn enumerate(&self) -> Vec<Device> {
        match self {
            #[cfg(feature = "flex")]
            Self::Auto | Self::Cpu => vec![Device::flex()],
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_nonsense_is_refused() {
        for text in ["auto", "cpu", "wgpu:0", "vulkan:1", "cuda:3"] {
            assert_eq!(text.parse::<DeviceSpec>().unwrap().to_string(), text);
        }
        assert_eq!("cuda".parse::<DeviceSpec>().unwrap(), DeviceSpec::Cuda(0));
        for text in ["", "gpu", "cpu:1", "auto:0", "cuda:", "cuda:x", "wgpu:-1"] {
            assert_eq!(text.parse::<DeviceSpec>().unwrap_err().kind(), Kind::Device, "{text}");
        }
    }

    #[test]
    fn a_backend_that_is_absent_says_how_to_get_it() {
        for spec in KINDS {
            if spec == DeviceSpec::Cpu {
                continue;
            }
            let error = spec.at_index(999).open().unwrap_err();
            assert!(error.help_line().is_some(), "{error}");
            assert_eq!(error.to_string().contains("no such backend"), !spec.compiled());
            assert!(error.to_string().contains(&format!("{}:999", spec.kind())), "{error}");
        }
    }

    #[test]
    fn auto_is_a_device_that_can_be_opened() {
        let spec = DeviceSpec::Auto.resolve();
        assert_ne!(spec, DeviceSpec::Auto);
        spec.open().unwrap();
    }
}

//! What CUDA needs at run time: the driver, the compiler NVRTC, and the headers that it includes.
//!
//! The program is built without a CUDA toolkit and looks for these when it runs. Files are looked for by name, in the
//! places where the dynamic loader and Burn's CUDA runtime look; nothing is opened.

use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};

/// One thing that must be there.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Part {
    /// What it is.
    pub name: &'static str,
    /// Where it was found.
    pub found: Option<PathBuf>,
    /// How to get it.
    pub help: &'static str,
}

const DRIVER: &str = "install NVIDIA's driver; it brings libcuda.so.1";
const NVRTC: &str = "install the CUDA toolkit, or `pip install nvidia-cuda-nvrtc-cu12` and add its lib folder to \
                     LD_LIBRARY_PATH";
const HEADERS: &str = "install the CUDA toolkit, or `pip install nvidia-cuda-runtime-cu12 nvidia-cuda-cccl-cu12` and \
                       set CUDA_PATH to the folder whose include/ has cuda_runtime.h (docs/devices.md)";

/// Driver, compiler and headers, found or not.
#[must_use]
pub fn parts() -> Vec<Part> {
    let dirs = library_dirs();
    let library = |stem: &str| {
        let is = |p: &Path| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with(stem));
        dirs.iter().flat_map(|d| files(d)).find(|p| is(p))
    };
    let header = include_dir().map(|d| d.join("cuda_runtime.h")).filter(|p| p.is_file());
    vec![
        Part { name: "driver (libcuda)", found: library(DRIVER_LIBRARY), help: DRIVER },
        Part { name: "compiler (libnvrtc)", found: library(COMPILER_LIBRARY), help: NVRTC },
        Part { name: "headers (cuda_runtime.h)", found: header, help: HEADERS },
    ]
}

#[cfg(windows)]
const DRIVER_LIBRARY: &str = "nvcuda.dll";
#[cfg(windows)]
const COMPILER_LIBRARY: &str = "nvrtc64_";
#[cfg(not(windows))]
const DRIVER_LIBRARY: &str = "libcuda.so";
#[cfg(not(windows))]
const COMPILER_LIBRARY: &str = "libnvrtc.so";

/// Why there is no CUDA device.
pub(super) fn absence() -> String {
    match parts().first().and_then(|p| p.found.clone()) {
        None => format!("no NVIDIA driver on this machine; {DRIVER}"),
        Some(path) => format!("a driver at {} that reports no GPU", path.display()),
    }
}

/// Checks that kernels can be compiled, so that their absence is an error and not a panic in the middle.
///
/// # Errors
/// A part is missing.
pub fn check() -> Result<()> {
    match parts().into_iter().find(|p| p.found.is_none()) {
        None => Ok(()),
        Some(part) => Err(Error::new(Kind::Device, "CUDA is not complete on this machine")
            .found(format!("no {}", part.name))
            .help(part.help)),
    }
}

/// Version of the driver, as the kernel module says.
#[must_use]
pub fn driver_version() -> Option<String> {
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").ok()?;
    text.lines().next().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
}

/// Where the runtime takes headers from: `CUDA_PATH`, else the usual places.
fn include_dir() -> Option<PathBuf> {
    let named = std::env::var_os("CUDA_PATH").map(PathBuf::from);
    let usual = ["/usr/local/cuda", "/opt/cuda", "/usr/lib/cuda"].map(PathBuf::from);
    let roots = named.map_or_else(|| usual.to_vec(), |path| vec![path]);
    roots.into_iter().map(|root| root.join("include")).find(|dir| dir.is_dir())
}

/// Where the dynamic loader looks, as far as it can be known without asking it.
fn library_dirs() -> Vec<PathBuf> {
    let variable = if cfg!(windows) { "PATH" } else { "LD_LIBRARY_PATH" };
    let mut dirs: Vec<PathBuf> =
        std::env::var_os(variable).map(|v| std::env::split_paths(&v).collect()).unwrap_or_default();
    let configured = files(Path::new("/etc/ld.so.conf.d")).into_iter().filter_map(|f| std::fs::read_to_string(f).ok());
    for text in configured {
        dirs.extend(text.lines().map(str::trim).filter(|l| l.starts_with('/')).map(PathBuf::from));
    }
    let usual = ["/lib", "/usr/lib", "/lib64", "/usr/lib64", "/usr/local/lib"].map(PathBuf::from);
    let host = ["/lib", "/usr/lib"].map(|d| PathBuf::from(format!("{d}/{}-linux-gnu", std::env::consts::ARCH)));
    dirs.extend(host);
    dirs.extend(usual);
    dirs
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> =
        std::fs::read_dir(dir).map(|entries| entries.flatten().map(|e| e.path()).collect()).unwrap_or_default();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_with_what_to_install() {
        let parts = parts();
        assert_eq!(parts.len(), 3);
        match parts.iter().find(|p| p.found.is_none()) {
            None => check().unwrap(),
            Some(missing) => {
                let error = check().unwrap_err();
                assert!(error.to_string().contains(missing.name) && error.help_line() == Some(missing.help));
            }
        }
    }
}

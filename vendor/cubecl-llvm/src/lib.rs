//! Stands in for `cubecl-llvm` 0.11.3.
//!
//! `cubecl-cuda` always compiles two code generators and picks one by feature: LLVM, or C++ through NVRTC
//! (`cubecl/cuda-cpp`). The build script of the real crate downloads an LLVM distribution. Builds that select NVRTC
//! never call it, so this crate supplies only the names that `cubecl-cuda` 0.11.3 mentions. Asked to compile, it
//! answers with an error. It cannot serve `burn/cpu` or `burn/rocm`, which need the real crate.

use cubecl_environment::backtrace::BackTrace;
use cubecl_core::ir::nvidia::SmArch;
use cubecl_server::{compiler::CompilationError, kernel::BufferIOAttr};

/// PTX versions.
pub mod nvptx {
    /// Version negotiation with the driver.
    pub mod ptx_version {
        /// A PTX version; there is none here.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub struct PtxVersion;

        impl PtxVersion {
            /// The newest version a driver loads: unknown.
            #[must_use]
            pub fn for_driver(_driver: i32) -> Option<Self> {
                None
            }
        }

        impl core::fmt::Display for PtxVersion {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                f.write_str("none")
            }
        }
    }
}

/// Features the LLVM path would switch off.
pub mod shared {
    /// Lowering.
    pub mod lowered_features {
        /// Which GPU family is lowered for.
        pub enum GpuTarget {
            /// NVIDIA.
            Nvptx,
            /// AMD.
            AmdGpu,
        }

        /// Leaves the properties as they are: NVRTC keeps every feature.
        pub fn restrict_features<T>(_properties: &mut T, _target: GpuTarget) {}
    }
}

/// What the real crate can emit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LlvmTarget {
    /// Host code.
    #[default]
    Cpu,
    /// AMD GPU code.
    AmdGpu,
    /// NVIDIA GPU code.
    Nvptx,
}

/// A compiled NVIDIA module.
#[derive(Clone, Debug)]
pub struct NvptxModule {
    /// Zero-terminated PTX.
    pub ptx: Vec<core::ffi::c_char>,
    /// Kernel name.
    pub entrypoint: String,
    /// LLVM IR.
    pub ir: String,
    /// Dynamic shared memory in bytes.
    pub shared_memory_size: usize,
    /// Which buffers are read and written.
    pub io: Vec<BufferIOAttr>,
}

/// Result of a compilation.
#[derive(Clone)]
pub enum PlironArtifact {
    /// Host code.
    Jit(()),
    /// NVIDIA code.
    NvptxCode(NvptxModule),
}

/// Options of a compilation.
#[derive(Clone, Debug, Default)]
pub struct PlironOptions {
    /// AMD architecture.
    pub arch: Option<()>,
    /// NVIDIA architecture.
    pub sm_arch: Option<SmArch>,
    /// PTX version.
    pub ptx_version: Option<nvptx::ptx_version::PtxVersion>,
    /// Whether launch parameters are grid constants.
    pub grid_constants: bool,
    /// Keeps `..Default::default()` meaningful at the call site.
    pub reserved: (),
}

/// The code generator.
#[derive(Clone, Debug, Default)]
pub struct PlironCompiler {
    /// What it emits.
    pub target: LlvmTarget,
}

impl PlironCompiler {
    /// Always fails.
    ///
    /// # Errors
    /// This build has no LLVM.
    pub fn compile<K>(&mut self, _kernel: K, _options: &PlironOptions) -> Result<PlironArtifact, CompilationError> {
        Err(CompilationError::Generic {
            reason: "this build has no LLVM code generator; build with the feature `cubecl/cuda-cpp`".to_string(),
            backtrace: BackTrace::capture(),
        })
    }

    /// File extension of the generated code.
    #[must_use]
    pub fn lang_tag(&self) -> &'static str {
        "ll"
    }
}

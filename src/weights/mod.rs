//! Checkpoint files to tensors and back, with a strict report.
//!
//! Reads safetensors (memory-mapped; one file, or shards by `model.safetensors.index.json`) and PyTorch `.bin` (by
//! `pytorch-reader`, which executes nothing), writes safetensors. Names in a checkpoint are the names of
//! [`crate::nn::visit`]; the weight of a `Linear` is `[d_output, d_input]` in files and transposed in memory.

mod convert;
mod init;
mod load;
mod read;
mod save;

pub use init::init_random;
pub use load::{load, tensor_from};
pub use read::{Checkpoint, TensorInfo};
pub use save::{SaveOptions, save};

use burn::tensor::{DType, Device, FloatDType};

/// Type in which weights that are stored as `stored` are held on `device`: f32 on the CPU and where the device does not
/// compute in the stored type, else the stored type.
#[must_use]
pub fn default_dtype(stored: DType, device: &Device) -> FloatDType {
    #[cfg(feature = "flex")]
    if *device == Device::flex() {
        return FloatDType::F32;
    }
    match stored {
        DType::F16 | DType::BF16 if device.supports_dtype(stored) => FloatDType::from(stored),
        _ => FloatDType::F32,
    }
}

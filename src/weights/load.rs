//! A checkpoint into a module.

use std::collections::{BTreeMap, BTreeSet};

use burn::{
    module::{Module, ModuleMapper, Param},
    tensor::{DType, Device, FloatDType, Tensor, TensorData},
};
use serde::Serialize;

use super::{
    keeps_half,
    map::Part,
    read::{Checkpoint, listing},
};
use crate::{
    device::policy::check_dtype,
    error::{Error, Kind, Result},
    nn::{
        split::host_for,
        visit::{PathStack, named_params},
    },
    progress::{Progress, Task},
};

/// Buffers that older exports contain and that are computed here.
const IGNORED: [&str; 2] = ["position_ids", "rotary_emb.inv_freq"];

/// Bytes from which on loading shows its progress.
const LARGE: u64 = 1 << 28;

/// Fills every parameter of `module` (adapters excepted) from the tensor of its name, as `dtype`.
///
/// Where the device [keeps half types](keeps_half), matrices that are stored in `dtype` stay where they are mapped, so
/// that loading copies nothing, and everything else (norms, biases, tables: less than a hundredth) becomes f32.
///
/// # Errors
/// One error that lists every missing, unused and wrongly shaped tensor, or an unreadable file.
pub fn load<M: Module>(module: M, checkpoint: &Checkpoint, dtype: FloatDType, progress: Progress) -> Result<M> {
    check(&module, checkpoint)?;
    let total = checkpoint.num_bytes();
    let progress = if total < LARGE { Progress::Silent } else { progress };
    let task = progress.start("load weights (MB)", total.div_ceil(1_000_000));
    let mut loader = Loader { checkpoint, dtype, path: PathStack::default(), failure: None, task, bytes: 0 };
    let module = module.map(&mut loader);
    loader.task.finish();
    loader.failure.map_or(Ok(module), Err)
}

/// How the tensors of a checkpoint fit a model.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Fit {
    /// Parameters of the model without a tensor.
    pub missing: Vec<String>,
    /// Tensors that the model has no parameter for.
    pub unused: Vec<String>,
    /// Tensors of another shape, with both shapes.
    pub wrong_shape: Vec<String>,
    /// Buffers of older exports, which are computed here.
    pub ignored: Vec<String>,
}

impl Fit {
    /// Whether the checkpoint can be loaded.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.missing.is_empty() && self.unused.is_empty() && self.wrong_shape.is_empty()
    }
}

/// Compares names and shapes; nothing is read or allocated.
#[must_use]
pub fn compare<M: Module>(module: &M, checkpoint: &Checkpoint) -> Fit {
    let params = named_params(module);
    let wanted: BTreeMap<&str, Vec<usize>> =
        params.iter().filter(|p| !p.adapter).map(|p| (p.name.as_str(), p.checkpoint_shape())).collect();
    let is_buffer = |name: &str| IGNORED.iter().any(|suffix| name.ends_with(suffix));
    let (ignored, found): (BTreeSet<&str>, BTreeSet<&str>) = checkpoint.names().partition(|n| is_buffer(n));
    let owned = |names: Vec<&str>| names.into_iter().map(str::to_string).collect();
    Fit {
        missing: owned(wanted.keys().filter(|n| !found.contains(*n)).copied().collect()),
        unused: owned(found.iter().filter(|n| !wanted.contains_key(*n)).copied().collect()),
        wrong_shape: wanted
            .iter()
            .filter_map(|(name, shape)| {
                let info = checkpoint.info(name)?;
                (info.shape != *shape).then(|| format!("{name} (expected {shape:?}, found {:?})", info.shape))
            })
            .collect(),
        ignored: owned(ignored.into_iter().collect()),
    }
}

fn check<M: Module>(module: &M, checkpoint: &Checkpoint) -> Result<()> {
    let fit = compare(module, checkpoint);
    let complaints: Vec<String> =
        [("missing", &fit.missing), ("unused", &fit.unused), ("wrong shape", &fit.wrong_shape)]
            .into_iter()
            .filter(|(_, names)| !names.is_empty())
            .map(|(what, names)| format!("{} {what}: {}", names.len(), listing(names)))
            .collect();
    if complaints.is_empty() {
        return Ok(());
    }
    Err(Error::new(Kind::Checkpoint, "the checkpoint does not fit the model")
        .at(checkpoint.origin().display())
        .found(complaints.join("; "))
        .help("use the weights that belong to this config.json; `medtune models inspect DIR` shows the files"))
}

/// The tensor `name` on `device`, transposed if `linear_weight`.
///
/// # Errors
/// No such tensor, another rank than `D`, or an unreadable file.
pub fn tensor_from<const D: usize>(
    checkpoint: &Checkpoint,
    name: &str,
    linear_weight: bool,
    dtype: FloatDType,
    device: &Device,
) -> Result<Tensor<D>> {
    let mut values = checkpoint.values(name)?.cast(dtype);
    // Copied: what is mapped would only count twice.
    checkpoint.mapped(name).into_iter().for_each(Part::release);
    let mut shape = checkpoint.info(name).map(|i| i.shape.clone()).unwrap_or_default();
    if shape.len() != D {
        return Err(Error::new(Kind::Checkpoint, "tensor has the wrong rank").at(name).expected(D).found(shape.len()));
    }
    if linear_weight {
        values = values.transpose(shape[0], shape[1]);
        shape.reverse();
    }
    let data = values.into_data(&shape);
    Ok(device.memory_persistent_allocations(data, |data| Tensor::from_data(data, (device, dtype.into()))))
}

/// A matrix in a half type as the file has it: a `Linear` weight is a transposed view of it.
fn half_from<const D: usize>(
    checkpoint: &Checkpoint,
    name: &str,
    linear_weight: bool,
    dtype: FloatDType,
    device: &Device,
) -> Result<Tensor<D>> {
    let Some(info) = checkpoint.info(name).filter(|i| i.shape.len() == D) else {
        return tensor_from(checkpoint, name, linear_weight, dtype, device);
    };
    let data = if info.dtype == DType::from(dtype) {
        checkpoint.touch(name);
        TensorData::from_bytes(checkpoint.stored(name)?, info.shape.clone(), info.dtype)
    } else {
        checkpoint.values(name)?.cast(dtype).into_data(&info.shape)
    };
    let tensor = Tensor::from_data(data, (device, dtype.into()));
    Ok(if linear_weight { tensor.swap_dims(0, 1) } else { tensor })
}

struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    dtype: FloatDType,
    path: PathStack,
    failure: Option<Error>,
    task: Task,
    /// Read so far.
    bytes: u64,
}

impl Loader<'_> {
    fn read<const D: usize>(&self, name: &str, device: &Device) -> Result<Tensor<D>> {
        let linear = self.path.is_linear_weight();
        let half = matches!(self.dtype, FloatDType::F16 | FloatDType::BF16);
        let looked_up = self.path.is_token_embedding();
        match (keeps_half(device) && half, linear || looked_up) {
            (true, true) => half_from(self.checkpoint, name, linear, self.dtype, device),
            (true, false) => tensor_from(self.checkpoint, name, linear, FloatDType::F32, device),
            (false, _) => tensor_from(self.checkpoint, name, linear, self.dtype, device),
        }
    }

    /// A table that fits no buffer of the device stays where [`crate::nn::split`] takes it from, as it is stored.
    fn on_host<const D: usize>(&self, name: &str, host: &Device) -> Result<Tensor<D>> {
        let linear = self.path.is_linear_weight();
        if !linear && !self.path.is_embedding() {
            return Err(Error::new(Kind::Device, "a tensor is larger than the largest buffer of the device")
                .at(name)
                .help("choose a device with larger buffers (`medtune devices`), or `--dtype` of half the size"));
        }
        match self.checkpoint.info(name).map(|i| i.dtype) {
            Some(stored @ (DType::F16 | DType::BF16)) => half_from(self.checkpoint, name, linear, stored.into(), host),
            _ => tensor_from(self.checkpoint, name, linear, FloatDType::F32, host),
        }
    }

    fn count(&mut self, name: &str) {
        let before = self.bytes / 1_000_000;
        self.bytes += self.checkpoint.info(name).map_or(0, |i| i.num_bytes());
        self.task.advance(self.bytes / 1_000_000 - before);
    }
}

impl ModuleMapper for Loader<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if self.failure.is_some() || self.path.is_adapter() {
            return param;
        }
        let (name, device) = (self.path.name(), param.lazy_device());
        let bytes = self.checkpoint.info(&name).map_or(0, |i| i.num_elements() * DType::from(self.dtype).size());
        if let Some(host) = host_for(bytes as u64, &device) {
            return match self.on_host(&name, &host) {
                Ok(tensor) => {
                    self.count(&name);
                    Param::initialized(param.id, tensor.set_require_grad(false))
                }
                Err(error) => {
                    self.failure = Some(error);
                    param
                }
            };
        }
        match check_dtype(self.dtype, &device).and_then(|()| self.read(&name, &device)) {
            Ok(tensor) => {
                self.count(&name);
                let id = param.id;
                param.transform_for_load(tensor, id)
            }
            Err(error) => {
                self.failure = Some(error);
                param
            }
        }
    }
}

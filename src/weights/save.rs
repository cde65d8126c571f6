//! A module into safetensors files in Hugging Face layout.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    io::{BufWriter, Write},
    path::Path,
};

use burn::{
    module::{Module, ModuleVisitor, Param, Reparameterization},
    tensor::{DType, FloatDType, Tensor},
};
use serde_json::json;
use tempfile::NamedTempFile;

use super::convert::Values;
use crate::{
    adapter::attachment::{Attachment, attachments},
    error::{Error, Kind, Result},
    nn::visit::{NamedParam, PathStack, named_params},
    run_dir::{finish, temporary_for, write_atomic},
};

/// How a module is written.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SaveOptions {
    /// Type in the file: f32, bf16 or f16.
    pub dtype: FloatDType,
    /// Above this many bytes the tensors are spread over shards with an index.
    pub max_shard_bytes: u64,
    /// Folds what hangs on a weight into it while it is written, one matrix at a time. Without it, a module with adapters
    /// is refused.
    pub fold: bool,
}

impl Default for SaveOptions {
    /// f32, shards of 5 GB as transformers makes them.
    fn default() -> Self {
        Self { dtype: FloatDType::F32, max_shard_bytes: 5_000_000_000, fold: false }
    }
}

/// Files that a checkpoint consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// `model.safetensors`, or shards with `model.safetensors.index.json`.
    Safetensors,
    /// `pytorch_model.bin`, or shards with `pytorch_model.bin.index.json`.
    PyTorch,
}

impl Layout {
    fn file(self, index: usize, count: usize) -> String {
        let (stem, end) = match self {
            Self::Safetensors => ("model", "safetensors"),
            Self::PyTorch => ("pytorch_model", "bin"),
        };
        match count {
            1 => format!("{stem}.{end}"),
            _ => format!("{stem}-{:05}-of-{count:05}.{end}", index + 1),
        }
    }

    /// Name of the index of the shards.
    #[must_use]
    pub fn index(self) -> &'static str {
        match self {
            Self::Safetensors => "model.safetensors.index.json",
            Self::PyTorch => "pytorch_model.bin.index.json",
        }
    }
}

/// One file of a checkpoint.
#[derive(Debug, Clone)]
pub(super) struct Shard {
    /// Its name.
    pub(super) file: String,
    /// Its tensors in order.
    pub(super) tensors: Vec<NamedParam>,
    /// Bytes of its tensors.
    pub(super) bytes: u64,
}

/// Spreads `params` over files of at most `max_shard_bytes`, in order, as transformers does.
pub(super) fn shards(params: Vec<NamedParam>, size: u64, max_shard_bytes: u64, layout: Layout) -> Vec<Shard> {
    let mut shards: Vec<Shard> = Vec::new();
    for param in params {
        let bytes = param.num_elements() as u64 * size;
        match shards.last_mut() {
            Some(shard) if shard.bytes + bytes <= max_shard_bytes => {
                shard.tensors.push(param);
                shard.bytes += bytes;
            }
            _ => shards.push(Shard { file: String::new(), tensors: vec![param], bytes }),
        }
    }
    let count = shards.len();
    for (i, shard) in shards.iter_mut().enumerate() {
        shard.file = layout.file(i, count);
    }
    shards
}

/// The index of `shards`; none for a single file.
pub(super) fn index(shards: &[Shard]) -> Option<String> {
    let names = |s: &'_ Shard| s.tensors.iter().map(|t| (t.name.clone(), s.file.clone())).collect::<Vec<_>>();
    let weight_map: BTreeMap<String, String> = shards.iter().flat_map(names).collect();
    let total: u64 = shards.iter().map(|s| s.bytes).sum();
    let text = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
    (shards.len() > 1).then(|| format!("{text:#}\n"))
}

/// Name in safetensors headers, and bytes of a value.
pub(super) fn stored_as(dtype: FloatDType) -> Result<(&'static str, u64)> {
    match dtype {
        FloatDType::F32 => Ok(("F32", 4)),
        FloatDType::BF16 => Ok(("BF16", 2)),
        FloatDType::F16 => Ok(("F16", 2)),
        other => {
            let error = Error::new(Kind::Checkpoint, "cannot save weights in this type");
            Err(error.expected("f32, bf16 or f16").found(format!("{other:?}")))
        }
    }
}

/// What stands in front of the tensors of a safetensors file.
pub(super) fn header(shard: &Shard, dtype: FloatDType, notes: &[(&str, String)]) -> Result<Vec<u8>> {
    let (name, size) = stored_as(dtype)?;
    let mut metadata = serde_json::Map::from_iter([("format".to_string(), json!("pt"))]);
    metadata.extend(notes.iter().map(|(key, value)| ((*key).to_string(), json!(value))));
    let mut header = serde_json::Map::from_iter([("__metadata__".to_string(), json!(metadata))]);
    let mut start = 0;
    for tensor in &shard.tensors {
        let end = start + tensor.num_elements() as u64 * size;
        let entry = json!({ "dtype": name, "shape": tensor.checkpoint_shape(), "data_offsets": [start, end] });
        header.insert(tensor.name.clone(), entry);
        start = end;
    }
    let mut text = serde_json::Value::Object(header).to_string();
    // the data then starts at a multiple of 8, as readers that map the file expect
    text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
    Ok([(text.len() as u64).to_le_bytes().as_slice(), text.as_bytes()].concat())
}

/// Writes the parameters of `module` to `dir` as `model.safetensors`, or as shards with
/// `model.safetensors.index.json`. Every file appears whole; the index comes last. Nothing else is touched, except an
/// index that would contradict a single file.
///
/// # Errors
/// A module with adapters that were not merged, a type other than f32, bf16 and f16, or an unwritable directory.
pub fn save<M: Module>(module: &M, dir: &Path, options: &SaveOptions) -> Result<()> {
    let shards = plan(module, options)?;
    fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
    let mut writer = Writer {
        dir,
        options,
        shards: &shards,
        next: 0,
        left: 0,
        out: None,
        path: PathStack::default(),
        attachments: attachments(module).into_iter().collect(),
        failure: None,
    };
    module.visit(&mut writer);
    if let Some(error) = writer.failure {
        return Err(error);
    }
    let place = dir.join(Layout::Safetensors.index());
    match index(&shards) {
        Some(text) => write_atomic(&place, text.as_bytes()),
        None => match fs::remove_file(&place) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(&place, e)),
            _ => Ok(()),
        },
    }
}

fn plan<M: Module>(module: &M, options: &SaveOptions) -> Result<Vec<Shard>> {
    let (_, size) = stored_as(options.dtype)?;
    let params = named_params(module);
    match params.iter().find(|p| p.attached).filter(|_| !options.fold) {
        Some(first) => Err(Error::new(Kind::Checkpoint, "the model still has an adapter")
            .at(&first.name)
            .help("merge the adapter before saving the model, or save the adapter alone")),
        None => Ok(shards(
            params.into_iter().filter(|p| !p.adapter).collect(),
            size,
            options.max_shard_bytes,
            Layout::Safetensors,
        )),
    }
}

struct Writer<'a> {
    dir: &'a Path,
    options: &'a SaveOptions,
    shards: &'a [Shard],
    /// Shard that is opened next.
    next: usize,
    /// Tensors that the open shard still lacks.
    left: usize,
    out: Option<BufWriter<NamedTempFile>>,
    path: PathStack,
    /// By the names of the weights they hang on.
    attachments: HashMap<String, Attachment>,
    failure: Option<Error>,
}

impl Writer<'_> {
    fn write<const D: usize>(&mut self, tensor: Tensor<D>) -> Result<()> {
        // Folded as it is compared before: in the type of the weight.
        let tensor = match self.attachments.remove(&self.path.name()) {
            Some(hung) => Reparameterization::apply(&hung, tensor),
            None => tensor,
        };
        // A weight in a half type is a view of what its file holds; turning the view back copies nothing.
        let turned = self.path.is_linear_weight() && matches!(tensor.dtype(), DType::BF16 | DType::F16);
        let tensor = if turned { tensor.swap_dims(0, 1) } else { tensor };
        let shape = tensor.dims();
        let data = tensor.into_data();
        let mut values = Values::from_data(&data).ok_or_else(|| {
            Error::new(Kind::Checkpoint, "a parameter is not of a float type")
                .at(self.path.name())
                .found(format!("{:?}", data.dtype()))
        })?;
        drop(data);
        values = values.cast(self.options.dtype);
        if self.path.is_linear_weight() && !turned {
            values = values.transpose(shape[0], shape[1]);
        }
        if self.left == 0 {
            self.open()?;
        }
        let shard = &self.shards[self.next - 1];
        let path = self.dir.join(&shard.file);
        let out = self.out.as_mut().expect("a shard is open while tensors are left");
        out.write_all(&values.to_little_endian()).map_err(|e| Error::io(&path, e))?;
        self.left -= 1;
        match (self.left, self.out.take()) {
            (0, Some(out)) => finish(out.into_inner().map_err(|e| Error::io(&path, e.into_error()))?, &path),
            (_, out) => {
                self.out = out;
                Ok(())
            }
        }
    }

    fn open(&mut self) -> Result<()> {
        let shard = &self.shards[self.next];
        let path = self.dir.join(&shard.file);
        let mut out = BufWriter::with_capacity(1 << 20, temporary_for(&path)?);
        out.write_all(&header(shard, self.options.dtype, &[])?).map_err(|e| Error::io(path, e))?;
        self.out = Some(out);
        self.left = shard.tensors.len();
        self.next += 1;
        Ok(())
    }
}

impl ModuleVisitor for Writer<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.failure.is_none() && !self.path.is_adapter() {
            self.failure = self.write(param.base()).err();
        }
    }
}

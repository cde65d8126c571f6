//! A module into safetensors files in Hugging Face layout.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufWriter, Write},
    path::Path,
};

use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::{DType, FloatDType, Tensor},
};
use serde_json::json;
use tempfile::NamedTempFile;

use super::convert::Values;
use crate::{
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
}

impl Default for SaveOptions {
    /// f32, shards of 5 GB as transformers makes them.
    fn default() -> Self {
        Self { dtype: FloatDType::F32, max_shard_bytes: 5_000_000_000 }
    }
}

struct Shard {
    file: String,
    header: serde_json::Map<String, serde_json::Value>,
    bytes: u64,
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
    let index = dir.join("model.safetensors.index.json");
    let weight_map: BTreeMap<&str, &str> =
        shards.iter().flat_map(|s| s.header.keys().map(|name| (name.as_str(), s.file.as_str()))).collect();
    let total: u64 = shards.iter().map(|s| s.bytes).sum();
    let text = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });

    let mut writer = Writer {
        dir,
        dtype: options.dtype,
        shards: &shards,
        next: 0,
        left: 0,
        out: None,
        path: PathStack::default(),
        failure: None,
    };
    module.visit(&mut writer);
    if let Some(error) = writer.failure {
        return Err(error);
    }
    if shards.len() == 1 {
        return match fs::remove_file(&index) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(&index, e)),
            _ => Ok(()),
        };
    }
    write_atomic(&index, format!("{text:#}\n").as_bytes())
}

fn plan<M: Module>(module: &M, options: &SaveOptions) -> Result<Vec<Shard>> {
    let (dtype, size) = match options.dtype {
        FloatDType::F32 => ("F32", 4),
        FloatDType::BF16 => ("BF16", 2),
        FloatDType::F16 => ("F16", 2),
        other => {
            let error = Error::new(Kind::Checkpoint, "cannot save weights in this type");
            return Err(error.expected("f32, bf16 or f16").found(format!("{other:?}")));
        }
    };
    let mut shards: Vec<Shard> = Vec::new();
    for param in named_params(module) {
        if param.adapter {
            return Err(Error::new(Kind::Checkpoint, "the model still has an adapter")
                .at(param.name)
                .help("merge the adapter before saving the model, or save the adapter alone"));
        }
        let bytes = param.num_elements() as u64 * size;
        match shards.last_mut() {
            Some(shard) if shard.bytes + bytes <= options.max_shard_bytes => add(shard, &param, dtype, bytes),
            _ => {
                let mut shard = Shard { file: String::new(), header: serde_json::Map::new(), bytes: 0 };
                add(&mut shard, &param, dtype, bytes);
                shards.push(shard);
            }
        }
    }
    let count = shards.len();
    for (i, shard) in shards.iter_mut().enumerate() {
        shard.file = match count {
            1 => "model.safetensors".into(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
    }
    Ok(shards)
}

fn add(shard: &mut Shard, param: &NamedParam, dtype: &str, bytes: u64) {
    let offsets = [shard.bytes, shard.bytes + bytes];
    let entry = json!({ "dtype": dtype, "shape": param.checkpoint_shape(), "data_offsets": offsets });
    shard.header.insert(param.name.clone(), entry);
    shard.bytes += bytes;
}

struct Writer<'a> {
    dir: &'a Path,
    dtype: FloatDType,
    shards: &'a [Shard],
    /// Shard that is opened next.
    next: usize,
    /// Tensors that the open shard still lacks.
    left: usize,
    out: Option<BufWriter<NamedTempFile>>,
    path: PathStack,
    failure: Option<Error>,
}

impl Writer<'_> {
    fn write<const D: usize>(&mut self, tensor: Tensor<D>) -> Result<()> {
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
        values = values.cast(self.dtype);
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
        let mut header = serde_json::Map::new();
        header.insert("__metadata__".into(), json!({ "format": "pt" }));
        header.extend(shard.header.iter().map(|(k, v)| (k.clone(), v.clone())));
        let mut text = serde_json::Value::Object(header).to_string();
        // the data then starts at a multiple of 8, as readers that map the file expect
        text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
        let mut out = BufWriter::with_capacity(1 << 20, temporary_for(&self.dir.join(&shard.file))?);
        out.write_all(&(text.len() as u64).to_le_bytes())
            .and_then(|()| out.write_all(text.as_bytes()))
            .map_err(|e| Error::io(self.dir.join(&shard.file), e))?;
        self.out = Some(out);
        self.left = shard.header.len();
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
        if self.failure.is_none() {
            self.failure = self.write(param.base()).err();
        }
    }
}

//! Names, shapes and bytes of the tensors in checkpoint files.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::{Path, PathBuf},
};

use burn::tensor::{AllocationProperty, Bytes as Shared, DType};
use pytorch_reader::{DType as PytorchDType, PickleValue, PytorchReader, Tensor as PytorchTensor};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use super::{
    convert::Values,
    map::{MappedFile, Part},
};
use crate::error::{Error, Kind, Result};

/// Shape and type of a tensor in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Shape as stored.
    pub shape: Vec<usize>,
    /// Type as stored.
    pub dtype: DType,
    /// File it lies in.
    pub file: PathBuf,
}

impl TensorInfo {
    /// Number of values.
    #[must_use]
    pub fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes in the file.
    #[must_use]
    pub fn num_bytes(&self) -> u64 {
        (self.num_elements() * self.dtype.size()) as u64
    }
}

#[derive(Clone)]
enum Bytes {
    Mapped(Part),
    Pickled(Box<PytorchTensor>),
}

#[derive(Clone)]
struct Entry {
    info: TensorInfo,
    bytes: Bytes,
}

/// The tensors of a checkpoint by name. Values are read when asked for.
#[derive(Clone, Default)]
pub struct Checkpoint {
    /// What was opened, for messages.
    origin: PathBuf,
    entries: BTreeMap<String, Entry>,
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Checkpoint({}, {} tensors)", self.origin.display(), self.entries.len())
    }
}

/// Files looked for in a directory, best first; an index names shards.
const FILES: [(&str, bool); 4] = [
    ("model.safetensors.index.json", true),
    ("model.safetensors", false),
    ("pytorch_model.bin.index.json", true),
    ("pytorch_model.bin", false),
];

impl Checkpoint {
    /// Opens a directory in Hugging Face layout, or one file.
    ///
    /// # Errors
    /// No checkpoint there, an unreadable or damaged file, an index that names an absent shard or a tensor that its
    /// shard does not hold, or one name in two files.
    pub fn open(path: &Path) -> Result<Self> {
        let mut checkpoint = Self { origin: path.to_path_buf(), entries: BTreeMap::new() };
        if !path.is_dir() {
            checkpoint.add_file(path)?;
            return Ok(checkpoint);
        }
        let Some((file, index)) = FILES.iter().map(|(name, i)| (path.join(name), *i)).find(|(f, _)| f.exists()) else {
            return Err(Error::new(Kind::Checkpoint, "no weights in this directory")
                .at(path.display())
                .expected(FILES.map(|(name, _)| name).join(", "))
                .help("download the checkpoint completely, or give its directory"));
        };
        if index {
            checkpoint.add_index(&file)?;
        } else {
            checkpoint.add_file(&file)?;
        }
        Ok(checkpoint)
    }

    fn add_index(&mut self, index: &Path) -> Result<()> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let damaged = |what: &str| Error::new(Kind::Checkpoint, what).at(index.display());
        let text = std::fs::read_to_string(index).map_err(|e| Error::io(index, e))?;
        let Index { weight_map } =
            serde_json::from_str(&text).map_err(|e| damaged("cannot read the index of the checkpoint").source(e))?;
        let folder = index.parent().unwrap_or(Path::new(""));
        for shard in weight_map.values().collect::<BTreeSet<_>>() {
            if Path::new(shard).file_name() != Some(shard.as_ref()) {
                return Err(damaged("the index names a shard outside its directory").found(shard));
            }
            let path = folder.join(shard);
            if !path.is_file() {
                return Err(Error::new(Kind::Checkpoint, "a shard of the checkpoint is missing")
                    .at(path.display())
                    .expected(format!("the file, because {} names it", index.display()))
                    .help("download the checkpoint completely"));
            }
            self.add_file(&path)?;
        }
        let lost: Vec<&String> = weight_map.keys().filter(|name| !self.entries.contains_key(*name)).collect();
        if !lost.is_empty() {
            return Err(damaged("the index names tensors that their shards do not hold").found(listing(&lost)));
        }
        Ok(())
    }

    fn add_file(&mut self, path: &Path) -> Result<()> {
        let pickled = path.extension().is_some_and(|e| e != "safetensors");
        let found = if pickled { open_pytorch(path)? } else { open_safetensors(path)? };
        for (name, entry) in found {
            if let Some(first) = self.entries.get(&name) {
                return Err(Error::new(Kind::Checkpoint, "a tensor is in two files").at(&name).found(format!(
                    "{} and {}",
                    first.info.file.display(),
                    path.display()
                )));
            }
            self.entries.insert(name, entry);
        }
        Ok(())
    }

    /// What was opened.
    #[must_use]
    pub fn origin(&self) -> &Path {
        &self.origin
    }

    /// All names in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Shape and type of a tensor.
    #[must_use]
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.entries.get(name).map(|e| &e.info)
    }

    /// Keeps the tensors whose name `keep` approves.
    pub fn retain(&mut self, mut keep: impl FnMut(&str) -> bool) {
        self.entries.retain(|name, _| keep(name));
    }

    /// Renames every tensor.
    pub fn rename(&mut self, mut rename: impl FnMut(&str) -> String) {
        self.entries = std::mem::take(&mut self.entries).into_iter().map(|(name, e)| (rename(&name), e)).collect();
    }

    /// Adds the tensors of `other`, which win over those of the same name.
    pub fn merge(&mut self, other: Self) {
        self.entries.extend(other.entries);
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.entries.get(name).ok_or_else(|| {
            Error::new(Kind::Checkpoint, "the checkpoint has no such tensor").at(name).found(self.origin.display())
        })
    }

    /// Values of a tensor as stored.
    ///
    /// # Errors
    /// No such tensor, not a float type, or an unreadable file.
    pub(super) fn values(&self, name: &str) -> Result<Values> {
        let entry = self.entry(name)?;
        let not_float = || {
            Error::new(Kind::Checkpoint, "a weight is not of a float type")
                .at(format!("{name} in {}", entry.info.file.display()))
                .found(format!("{:?}", entry.info.dtype))
        };
        match &entry.bytes {
            Bytes::Mapped(part) => Values::from_little_endian(part.as_ref(), entry.info.dtype).ok_or_else(not_float),
            Bytes::Pickled(tensor) => {
                let bytes = tensor.read().map_err(|e| Error::io(&entry.info.file, e))?;
                Values::from_little_endian(&bytes, entry.info.dtype).ok_or_else(not_float)
            }
        }
    }

    /// Bytes of a tensor as stored, without a copy where its file is mapped and the processor can read them there.
    ///
    /// # Errors
    /// No such tensor, or an unreadable file.
    pub(super) fn stored(&self, name: &str) -> Result<Shared> {
        let entry = self.entry(name)?;
        Ok(match &entry.bytes {
            Bytes::Mapped(part) => {
                let aligned = part.as_ref().as_ptr().align_offset(entry.info.dtype.size()) == 0;
                if aligned && cfg!(target_endian = "little") {
                    Shared::from_shared(bytes::Bytes::from_owner(part.clone()), AllocationProperty::File)
                } else {
                    Shared::from_bytes_vec(part.as_ref().to_vec())
                }
            }
            Bytes::Pickled(tensor) => {
                Shared::from_bytes_vec(tensor.read().map_err(|e| Error::io(&entry.info.file, e))?)
            }
        })
    }

    /// Reads a mapped tensor into memory, so that its first use does not wait for the disk; nothing where the file is
    /// streamed.
    pub(super) fn touch(&self, name: &str) {
        if let Some(part) = self.mapped(name).filter(|part| !part.is_streamed()) {
            part.touch();
        }
    }

    /// Where a tensor lies in a memory map; none in a PyTorch file.
    pub(super) fn mapped(&self, name: &str) -> Option<&Part> {
        match &self.entries.get(name)?.bytes {
            Bytes::Mapped(part) => Some(part),
            Bytes::Pickled(_) => None,
        }
    }

    /// Type that most of the bytes are of; none without tensors.
    #[must_use]
    pub fn dtype(&self) -> Option<DType> {
        let mut bytes = BTreeMap::<&str, (u64, DType)>::new();
        for info in self.entries.values().map(|e| &e.info) {
            bytes.entry(info.dtype.name()).or_insert((0, info.dtype)).0 += info.num_bytes();
        }
        bytes.into_values().max_by_key(|(n, _)| *n).map(|(_, dtype)| dtype)
    }

    /// Whether all files are mapped.
    #[must_use]
    pub fn is_mapped(&self) -> bool {
        self.entries.keys().all(|name| self.mapped(name).is_some())
    }

    /// Bytes of all tensors, as stored.
    #[must_use]
    pub fn num_bytes(&self) -> u64 {
        self.entries.values().map(|e| e.info.num_bytes()).sum()
    }

    /// Values of a tensor as f32, row-major in its stored shape.
    ///
    /// # Errors
    /// No such tensor, not a float type, or an unreadable file.
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        Ok(self.values(name)?.into_f32())
    }
}

/// At most a dozen names.
pub(super) fn listing<T: fmt::Display>(names: &[T]) -> String {
    let mut text = names.iter().take(12).map(ToString::to_string).collect::<Vec<_>>().join(", ");
    if names.len() > 12 {
        text.push_str(&format!(" and {} more", names.len() - 12));
    }
    text
}

fn damaged(path: &Path) -> Error {
    Error::new(Kind::Checkpoint, "this checkpoint file is damaged")
        .at(path.display())
        .help("download the file again and compare its checksum")
}

fn open_safetensors(path: &Path) -> Result<Vec<(String, Entry)>> {
    let file = MappedFile::open(path)?;
    let map = file.bytes();
    if let Some(length) = announced_length(map)
        && length != map.len() as u64
    {
        return Err(damaged(path)
            .expected(format!("{length} bytes, as its header says"))
            .found(format!("{} bytes", map.len())));
    }
    let (header, metadata) = SafeTensors::read_metadata(map).map_err(|e| damaged(path).source(e))?;
    let data = 8 + header;
    let mut found = Vec::new();
    for (name, info) in metadata.tensors() {
        let dtype = safetensors_dtype(info.dtype).ok_or_else(|| {
            Error::new(Kind::Checkpoint, "unsupported type of a tensor")
                .at(format!("{name} in {}", path.display()))
                .found(format!("{:?}", info.dtype))
        })?;
        let (start, end) = info.data_offsets;
        found.push((
            name,
            Entry {
                info: TensorInfo { shape: info.shape.clone(), dtype, file: path.to_path_buf() },
                bytes: Bytes::Mapped(file.part(data + start, data + end)),
            },
        ));
    }
    Ok(found)
}

/// Length of a safetensors file by its header; none if the header cannot be read.
fn announced_length(bytes: &[u8]) -> Option<u64> {
    #[derive(Deserialize)]
    struct Place {
        data_offsets: [u64; 2],
    }
    let header = u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?);
    let end = header.checked_add(8)?;
    let text = bytes.get(8..usize::try_from(end).ok()?)?;
    let tensors: BTreeMap<String, serde_json::Value> = serde_json::from_slice(text).ok()?;
    let places = tensors.into_iter().filter(|(name, _)| name != "__metadata__");
    let ends = places.map(|(_, place)| serde_json::from_value::<Place>(place).ok().map(|p| p.data_offsets[1]));
    end.checked_add(ends.collect::<Option<Vec<_>>>()?.into_iter().max()?)
}

fn safetensors_dtype(dtype: Dtype) -> Option<DType> {
    Some(match dtype {
        Dtype::F64 => DType::F64,
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        Dtype::I64 => DType::I64,
        Dtype::I32 => DType::I32,
        Dtype::I16 => DType::I16,
        Dtype::I8 => DType::I8,
        Dtype::U64 => DType::U64,
        Dtype::U32 => DType::U32,
        Dtype::U16 => DType::U16,
        Dtype::U8 | Dtype::BOOL => DType::U8,
        _ => return None,
    })
}

fn open_pytorch(path: &Path) -> Result<Vec<(String, Entry)>> {
    std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
    let contents = PytorchReader::read_pickle_data(path, None).map_err(|e| damaged(path).source(e.to_string()))?;
    refuse_calls(path, &contents)?;
    let reader = PytorchReader::new(path).map_err(|e| damaged(path).source(e.to_string()))?;
    let entry = |tensor: PytorchTensor| Entry {
        info: TensorInfo {
            shape: tensor.shape().to_vec(),
            dtype: pytorch_dtype(tensor.dtype()),
            file: path.to_path_buf(),
        },
        bytes: Bytes::Pickled(Box::new(tensor)),
    };
    Ok(reader.into_tensors().into_iter().map(|(name, tensor)| (name, entry(tensor))).collect())
}

/// Modules whose objects a checkpoint may hold besides tensors.
const HARMLESS: [&str; 4] = ["torch", "collections", "numpy", "argparse"];

/// Nothing in a pickle is ever executed here; one that asks for it is refused all the same.
fn refuse_calls(path: &Path, value: &PickleValue) -> Result<()> {
    match value {
        PickleValue::List(items) => items.iter().try_for_each(|item| refuse_calls(path, item)),
        PickleValue::Dict(items) => items.values().try_for_each(|item| refuse_calls(path, item)),
        PickleValue::Unsupported(name) => {
            let module = name.split('.').next().unwrap_or_default();
            if HARMLESS.contains(&module) || !name.contains('.') {
                return Ok(());
            }
            Err(Error::new(Kind::Checkpoint, "this PyTorch file asks to run code; it was not run")
                .at(path.display())
                .expected("tensors")
                .found(name)
                .help("do not load this file elsewhere; get the checkpoint from its publisher, best as safetensors"))
        }
        _ => Ok(()),
    }
}

fn pytorch_dtype(dtype: PytorchDType) -> DType {
    match dtype {
        PytorchDType::F64 => DType::F64,
        PytorchDType::F32 => DType::F32,
        PytorchDType::F16 => DType::F16,
        PytorchDType::BF16 => DType::BF16,
        PytorchDType::I64 => DType::I64,
        PytorchDType::I32 => DType::I32,
        PytorchDType::I16 => DType::I16,
        PytorchDType::I8 => DType::I8,
        PytorchDType::U64 => DType::U64,
        PytorchDType::U32 => DType::U32,
        PytorchDType::U16 => DType::U16,
        PytorchDType::U8 | PytorchDType::Bool => DType::U8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pickle_that_asks_to_run_code_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pytorch_model.bin");
        // os.system("true") alone, and as the value of a key
        let call = b"cos\nsystem\nX\x04\0\0\0true\x85R";
        let alone = [b"\x80\x02", call.as_slice(), b"."].concat();
        let keyed = [b"\x80\x02}X\x01\0\0\0a", call.as_slice(), b"s."].concat();
        for pickle in [alone, keyed] {
            std::fs::write(&path, pickle).unwrap();
            let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
            assert!(error.contains("asks to run code") && error.contains("os.system"), "{error}");
        }
    }
}

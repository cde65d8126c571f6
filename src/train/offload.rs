//! Inputs of the decoder layers between the forward and the backward pass: in memory, or in a file.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use burn::tensor::{Bytes, DType, Device, Tensor, TensorData};

use crate::error::{Error, Result};

/// A stack of tensors `[rows, length, hidden_size]`.
pub(super) enum LayerInputs {
    Memory(Vec<Tensor<3>>),
    Disk(Disk),
}

/// Bytes in a file that has no name and vanishes with this program.
pub(super) struct Disk {
    dir: PathBuf,
    file: File,
    /// Shape, type and bytes of each tensor.
    tensors: Vec<([usize; 3], DType, usize)>,
}

impl LayerInputs {
    /// An empty stack, in a file in `dir` if there is one.
    ///
    /// # Errors
    /// No file can be made there.
    pub(super) fn new(dir: Option<&Path>) -> Result<Self> {
        let Some(dir) = dir else { return Ok(Self::Memory(Vec::new())) };
        let file = tempfile::tempfile_in(dir).map_err(|e| Error::io(dir, e))?;
        Ok(Self::Disk(Disk { dir: dir.to_path_buf(), file, tensors: Vec::new() }))
    }

    /// Puts `x` on top.
    ///
    /// # Errors
    /// The disk is full.
    pub(super) fn push(&mut self, x: Tensor<3>) -> Result<()> {
        match self {
            Self::Memory(all) => all.push(x),
            Self::Disk(disk) => {
                let (dims, data) = (x.dims(), x.into_data());
                let bytes = data.as_bytes();
                disk.file.write_all(bytes).map_err(|e| Error::io(&disk.dir, e))?;
                disk.tensors.push((dims, data.dtype(), bytes.len()));
            }
        }
        Ok(())
    }

    /// Takes the tensor on top.
    ///
    /// # Errors
    /// The file cannot be read.
    pub(super) fn pop(&mut self, device: &Device) -> Result<Tensor<3>> {
        match self {
            Self::Memory(all) => Ok(all.pop().expect("one input per layer")),
            Self::Disk(Disk { dir, file, tensors }) => {
                let (dims, dtype, length) = tensors.pop().expect("one input per layer");
                let start: usize = tensors.iter().map(|t| t.2).sum();
                let mut bytes = vec![0; length];
                let read = file.seek(SeekFrom::Start(start as u64)).and_then(|_| file.read_exact(&mut bytes));
                read.map_err(|e| Error::io(&*dir, e))?;
                let data = TensorData::from_bytes(Bytes::from_bytes_vec(bytes), dims.to_vec(), dtype);
                Ok(Tensor::from_data(data, (device, dtype)))
            }
        }
    }
}

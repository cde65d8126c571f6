//! Named f32 tensors in one safetensors file.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};

use safetensors::{Dtype, tensor::TensorView};

use crate::{
    error::{Error, Kind, Result},
    run_dir::write_atomic,
};

/// Values in host memory, row-major.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct HostTensor {
    /// Shape.
    pub shape: Vec<usize>,
    /// Values.
    pub values: Vec<f32>,
}

impl HostTensor {
    /// The transpose of a matrix.
    #[must_use]
    pub fn transposed(&self) -> Self {
        let (rows, columns) = (self.shape[0], self.shape[1]);
        let values = (0..columns * rows).map(|i| self.values[(i % rows) * columns + i / rows]).collect();
        Self { shape: vec![columns, rows], values }
    }
}

/// Writes `tensors` to one file, whole or not at all. The same tensors give the same bytes.
///
/// # Errors
/// The file cannot be written.
pub fn write(path: &Path, tensors: &BTreeMap<String, HostTensor>) -> Result<()> {
    let bytes: Vec<(&str, &[usize], Vec<u8>)> = tensors
        .iter()
        .map(|(name, t)| (name.as_str(), t.shape.as_slice(), t.values.iter().flat_map(|v| v.to_le_bytes()).collect()))
        .collect();
    let failed = |e: safetensors::SafeTensorError| {
        Error::new(Kind::Checkpoint, "tensors cannot be written").at(path.display()).source(e)
    };
    let views: Vec<(&str, TensorView<'_>)> = bytes
        .iter()
        .map(|(name, shape, bytes)| Ok((*name, TensorView::new(Dtype::F32, shape.to_vec(), bytes).map_err(failed)?)))
        .collect::<Result<_>>()?;
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let file = safetensors::serialize(views, Some(metadata)).map_err(failed)?;
    write_atomic(path, &file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transpose_moves_every_value() {
        let t = HostTensor { shape: vec![2, 3], values: vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0] };
        let u = t.transposed();
        assert_eq!((u.shape.as_slice(), u.values.as_slice()), (&[3, 2][..], &[1.0, 4.0, 2.0, 5.0, 3.0, 6.0][..]));
        assert_eq!(u.transposed(), t);
    }

    #[test]
    fn the_same_tensors_give_the_same_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let tensor = |x: f32| HostTensor { shape: vec![1], values: vec![x] };
        let tensors: BTreeMap<String, HostTensor> =
            [("b".to_string(), tensor(1.0)), ("a".to_string(), tensor(2.0))].into();
        let paths = [dir.path().join("1"), dir.path().join("2")];
        for path in &paths {
            write(path, &tensors).unwrap();
        }
        let read = std::fs::read(&paths[0]).unwrap();
        assert_eq!(read, std::fs::read(&paths[1]).unwrap());
        let back = safetensors::SafeTensors::deserialize(&read).unwrap();
        assert_eq!(back.tensor("a").unwrap().data(), 2f32.to_le_bytes());
    }
}

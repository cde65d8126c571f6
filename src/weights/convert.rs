//! Host-side conversion of weights: float types and the transposition of `Linear` weights, in parallel.

use burn::tensor::{DType, FloatDType, TensorData};
use half::{bf16, f16};
use rayon::prelude::*;

/// Elements that one task converts.
const CHUNK: usize = 1 << 16;

/// Side of the square that is transposed at once; two of them fit in the first-level cache.
const BLOCK: usize = 32;

/// Values of one tensor in one of the float types that weights are held in.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Values {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Values {
    /// None if `dtype` is not a float type. f64 is rounded to f32.
    pub(super) fn from_little_endian(bytes: &[u8], dtype: DType) -> Option<Self> {
        Some(match dtype {
            DType::F64 => Self::F32(decode(bytes, |b: [u8; 8]| f64::from_le_bytes(b) as f32)),
            DType::F32 => Self::F32(decode(bytes, f32::from_le_bytes)),
            DType::F16 => Self::F16(decode(bytes, f16::from_le_bytes)),
            DType::BF16 => Self::Bf16(decode(bytes, bf16::from_le_bytes)),
            _ => return None,
        })
    }

    pub(super) fn from_data(data: &TensorData) -> Option<Self> {
        Self::from_little_endian(data.as_bytes(), data.dtype())
    }

    pub(super) fn into_f32(self) -> Vec<f32> {
        match self {
            Self::F32(v) => v,
            Self::F16(v) => map(&v, |x| x.to_f32()),
            Self::Bf16(v) => map(&v, |x| x.to_f32()),
        }
    }

    /// Rounds to nearest, ties to even.
    pub(super) fn cast(self, dtype: FloatDType) -> Self {
        match (self, dtype) {
            (v @ Self::F16(_), FloatDType::F16) | (v @ Self::Bf16(_), FloatDType::BF16) => v,
            (v, FloatDType::F16) => Self::F16(map(&v.into_f32(), |x| f16::from_f32(*x))),
            (v, FloatDType::BF16) => Self::Bf16(map(&v.into_f32(), |x| bf16::from_f32(*x))),
            (v, _) => Self::F32(v.into_f32()),
        }
    }

    /// `[rows, columns]` -> `[columns, rows]`
    pub(super) fn transpose(self, rows: usize, columns: usize) -> Self {
        match self {
            Self::F32(v) => Self::F32(transpose(&v, rows, columns)),
            Self::F16(v) => Self::F16(transpose(&v, rows, columns)),
            Self::Bf16(v) => Self::Bf16(transpose(&v, rows, columns)),
        }
    }

    pub(super) fn into_data(self, shape: &[usize]) -> TensorData {
        match self {
            Self::F32(v) => TensorData::new(v, shape.to_vec()),
            Self::F16(v) => TensorData::new(v, shape.to_vec()),
            Self::Bf16(v) => TensorData::new(v, shape.to_vec()),
        }
    }

    pub(super) fn to_little_endian(&self) -> Vec<u8> {
        match self {
            Self::F32(v) => encode(v, |x| x.to_le_bytes()),
            Self::F16(v) => encode(v, |x| x.to_le_bytes()),
            Self::Bf16(v) => encode(v, |x| x.to_le_bytes()),
        }
    }
}

fn decode<const N: usize, T: Send + Copy + Default>(bytes: &[u8], f: impl Fn([u8; N]) -> T + Sync) -> Vec<T> {
    let mut out = vec![T::default(); bytes.len() / N];
    out.par_chunks_mut(CHUNK).zip(bytes.par_chunks(CHUNK * N)).for_each(|(out, bytes)| {
        for (value, bytes) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
            *value = f(*bytes);
        }
    });
    out
}

fn encode<const N: usize, T: Sync>(values: &[T], f: impl Fn(&T) -> [u8; N] + Sync) -> Vec<u8> {
    let mut out = vec![0u8; values.len() * N];
    out.par_chunks_mut(CHUNK * N).zip(values.par_chunks(CHUNK)).for_each(|(out, values)| {
        for (bytes, value) in out.as_chunks_mut::<N>().0.iter_mut().zip(values) {
            *bytes = f(value);
        }
    });
    out
}

fn map<T: Sync, U: Send + Copy + Default>(values: &[T], f: impl Fn(&T) -> U + Sync) -> Vec<U> {
    let mut out = vec![U::default(); values.len()];
    out.par_chunks_mut(CHUNK).zip(values.par_chunks(CHUNK)).for_each(|(out, values)| {
        for (out, value) in out.iter_mut().zip(values) {
            *out = f(value);
        }
    });
    out
}

fn transpose<T: Copy + Default + Send + Sync>(values: &[T], rows: usize, columns: usize) -> Vec<T> {
    let mut out = vec![T::default(); values.len()];
    if out.is_empty() {
        return out;
    }
    // one task writes BLOCK rows of the result, reading BLOCK columns of the source square by square
    out.par_chunks_mut(BLOCK * rows).enumerate().for_each(|(task, out)| {
        let first = task * BLOCK;
        let width = out.len() / rows;
        for top in (0..rows).step_by(BLOCK) {
            for row in top..(top + BLOCK).min(rows) {
                let source = &values[row * columns + first..][..width];
                for (column, value) in source.iter().enumerate() {
                    out[column * rows + row] = *value;
                }
            }
        }
    });
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposing_moves_every_element() {
        for (rows, columns) in [(1, 1), (3, 70), (65, 33), (32, 64), (1, 40), (40, 1)] {
            let values: Vec<f32> = (0..rows * columns).map(|i| i as f32).collect();
            let turned = transpose(&values, rows, columns);
            for r in 0..rows {
                for c in 0..columns {
                    assert_eq!(turned[c * rows + r], values[r * columns + c], "{rows}x{columns} at {r},{c}");
                }
            }
            assert_eq!(transpose(&turned, columns, rows), values);
        }
        assert!(transpose::<f32>(&[], 0, 5).is_empty());
    }

    #[test]
    fn casting_rounds_to_nearest_even_and_bytes_round_trip() {
        let values = Values::F32(vec![1.0, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, -3.5, f32::INFINITY]);
        let narrow = values.cast(FloatDType::BF16);
        assert_eq!(narrow.clone().into_f32(), [1.0, 1.0, 1.0 + 4.0 / 256.0, -3.5, f32::INFINITY]);
        let bytes = narrow.to_little_endian();
        assert_eq!(Values::from_little_endian(&bytes, DType::BF16), Some(narrow));
        assert_eq!(Values::from_little_endian(&bytes, DType::I16), None);
    }
}

//! Rotary position embedding in Hugging Face's half-split layout: element `i` is paired with `i + head_dim / 2`.

use burn::tensor::{Device, Tensor, TensorData};

use super::cast;
use crate::kernel::rope::rotate;

/// Cosines and sines of a batch, f32.
#[derive(Debug, Clone)]
pub struct Rope {
    /// `[rows or 1, length, 1, head_dim / 2]`
    pub cos: Tensor<4>,
    /// `[rows or 1, length, 1, head_dim / 2]`
    pub sin: Tensor<4>,
}

/// Inverse frequencies `theta^(-2i / head_dim)`, rounded to f32 at each step as PyTorch does.
#[must_use]
pub fn inverse_frequencies(head_dim: usize, theta: f64) -> Vec<f32> {
    (0..head_dim / 2).map(|i| 1.0 / (theta as f32).powf((2 * i) as f32 / head_dim as f32)).collect()
}

impl Rope {
    /// Tables for `positions` (`[rows, length]`, row-major).
    ///
    /// One row is kept when all rows are equal, so that it broadcasts.
    #[must_use]
    pub fn new(positions: &[i32], length: usize, inverse_frequencies: &[f32], device: &Device) -> Self {
        let equal = positions.chunks(length.max(1)).all(|r| r == &positions[..length]);
        let positions = if equal { &positions[..length] } else { positions };
        Self::by_text(positions, length, &[(positions.len(), inverse_frequencies)], device)
    }

    /// Tables for `positions` (`[rows, length]`, row-major) where every text has its own frequencies: for each text in
    /// order, how many positions it takes, and its frequencies.
    #[must_use]
    pub fn by_text(positions: &[i32], length: usize, texts: &[(usize, &[f32])], device: &Device) -> Self {
        let half = texts.first().map_or(0, |(_, f)| f.len());
        let mut angles = Vec::with_capacity(positions.len() * half);
        let mut rest = positions;
        for (columns, frequencies) in texts {
            let (text, behind) = rest.split_at(*columns);
            angles.extend(text.iter().flat_map(|&p| frequencies.iter().map(move |f| p as f32 * f)));
            rest = behind;
        }
        let rows = positions.len().checked_div(length).unwrap_or(1);
        let table = |f: fn(f32) -> f32| {
            let values: Vec<f32> = angles.iter().map(|a| f(*a)).collect();
            Tensor::from_data(TensorData::new(values, [rows, length, 1, half]), device)
        };
        Self { cos: table(f32::cos), sin: table(f32::sin) }
    }

    /// Multiplies cosines and sines, which multiplies what is rotated.
    #[must_use]
    pub fn scaled(self, factor: f64) -> Self {
        if factor == 1.0 {
            return self;
        }
        Self { cos: self.cos.mul_scalar(factor), sin: self.sin.mul_scalar(factor) }
    }

    /// Rotates every head.
    ///
    /// # Shapes
    /// `[rows, length, heads, head_dim]` -> same
    #[must_use]
    pub fn rotate(&self, x: Tensor<4>) -> Tensor<4> {
        let (cos, sin) = (cast(self.cos.clone(), x.dtype()), cast(self.sin.clone(), x.dtype()));
        rotate(x, cos, sin)
    }
}

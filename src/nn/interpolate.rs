//! Bicubic interpolation of position tables, as `torch.nn.functional.interpolate(mode="bicubic",
//! align_corners=False)` computes it: a = -0.75, borders repeated, no smoothing when shrinking.

use burn::tensor::{DType, Tensor, TensorData};

use super::cast;

/// Sharpness of PyTorch's cubic kernel; Pillow's is -0.5.
const A: f64 = -0.75;

/// A table over a square grid, resampled to another square grid; f32, differentiable. A no-op when the sizes agree.
///
/// # Shapes
/// `[from * from, width]` -> `[to * to, width]`, both row by row
#[must_use]
pub fn bicubic_table(table: Tensor<2>, to: usize) -> Tensor<2> {
    bicubic_grid(table, [to, to])
}

/// As [`bicubic_table`], to `to` rows and columns.
///
/// # Shapes
/// `[from * from, width]` -> `[to[0] * to[1], width]`, both row by row
#[must_use]
pub fn bicubic_grid(table: Tensor<2>, to: [usize; 2]) -> Tensor<2> {
    let [cells, width] = table.dims();
    let from = cells.isqrt();
    assert_eq!(from * from, cells, "a position table covers a square grid");
    let dtype = table.dtype();
    if [from, from] == to {
        return table;
    }
    let device = table.device().without_autodiff();
    let weights = |to: usize| {
        let weights = TensorData::new(axis_weights(from, to), [to, from]);
        Tensor::<2>::from_data(weights, (&device, DType::F32))
    };
    let [down, across] = to;
    // Rows of the grid first, then its columns; both are one matrix product.
    let rows = weights(down).matmul(cast(table, DType::F32).reshape([from, from * width]));
    let columns = rows.reshape([down, from, width]).swap_dims(0, 1).reshape([from, down * width]);
    let out = weights(across).matmul(columns).reshape([across, down, width]).swap_dims(0, 1);
    cast(out.reshape([down * across, width]), dtype)
}

/// `[to, from]` weights of one axis.
fn axis_weights(from: usize, to: usize) -> Vec<f32> {
    let scale = from as f64 / to as f64;
    let mut weights = vec![0f32; to * from];
    for (i, row) in weights.chunks_mut(from).enumerate() {
        let source = (i as f64 + 0.5) * scale - 0.5;
        let floor = source.floor();
        for (tap, weight) in cubic(source - floor).into_iter().enumerate() {
            let at = (floor as i64 + tap as i64 - 1).clamp(0, from as i64 - 1);
            row[at as usize] += weight as f32;
        }
    }
    weights
}

/// Weights of the four neighbours of a point that lies `t` behind the second.
fn cubic(t: f64) -> [f64; 4] {
    let near = |x: f64| ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0;
    let far = |x: f64| ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A;
    [far(1.0 + t), near(t), near(1.0 - t), far(2.0 - t)]
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    #[test]
    fn weights_of_a_point_sum_to_one_and_hit_the_grid() {
        for (from, to) in [(4, 7), (4, 8), (16, 5), (3, 1)] {
            for row in axis_weights(from, to).chunks(from) {
                assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6);
            }
        }
        // 3 -> 9: every third point lies on the grid.
        let weights = axis_weights(3, 9);
        assert_eq!(&weights[4 * 3..5 * 3], [0.0, 1.0, 0.0]);
    }

    #[test]
    fn doubling_a_ramp_gives_torchs_values() {
        let device = Device::flex();
        let column = |i: usize| i as f32;
        let table: Vec<f32> = (0..16).map(|cell| column(cell % 4)).collect();
        let table = Tensor::<2>::from_data(TensorData::new(table, [16, 1]), &device);
        let out: Vec<f32> = bicubic_table(table, 8).into_data().try_to_vec().unwrap();
        // A quarter before the first cell, with its border repeated, and three quarters behind it.
        assert!((out[0] + 0.105_468_75).abs() < 1e-6 && (out[2] - 0.667_968_75).abs() < 1e-6, "{out:?}");
        assert_eq!(out[..8], out[56..], "every row of the grid is the same ramp");
    }

    #[test]
    fn the_same_grid_is_untouched() {
        let table = Tensor::<2>::from_data([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]], &Device::flex());
        assert_eq!(bicubic_table(table.clone(), 2).into_data(), table.into_data());
    }
}

//! Attention within ranges on CubeCL, without the matrix of scores.
//!
//! The queries of all heads that read the same keys count as one sequence, query by query, so that keys and values are
//! read once for all of them and a block of queries sees few keys. A cube owns a block of rows (queries, or keys in the
//! pass for their gradients) and streams the others past it, a tile at a time, leaving out tiles that none of its rows
//! sees; scores are computed again in every pass. The softmax is taken as the tiles come, with sums that are scaled
//! again whenever a larger score appears. Every sum has a fixed order and no unit adds to another's, so results are the
//! same from run to run. Products are those of the ordinary units in f32: WGSL has no others.

use burn::{
    backend::cubecl::dtype_to_storage_type,
    tensor::{DType, Shape},
};
use burn_cubecl::{
    CubeBackend,
    cubecl::{client::Client, prelude::*, tensor_vector_size_parallel},
    kernel::{into_contiguous, untile},
    tensor::CubeTensor,
};

use super::{
    attention::{AttentionOps, backward, forward},
    cube,
    cube_attention_rows::{attention_rows, key_gradient_rows, query_gradient_rows, statistics_rows},
};

/// Widest head.
const WIDEST: usize = 256;

/// Storage buffers of the pass that needs most.
const BINDINGS: u32 = 8;

/// What a cube works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Tile {
    /// Rows that it owns.
    pub(super) rows: usize,
    /// Rows that are streamed past them at a time.
    pub(super) cols: usize,
    /// Units along the rows.
    pub(super) tall: usize,
    /// Units along the streamed rows, and along the vectors of a head.
    pub(super) wide: usize,
}

/// From what suits the largest devices down to what the smallest can run.
const TILES: [Tile; 7] = [
    Tile { rows: 64, cols: 32, tall: 16, wide: 16 },
    Tile { rows: 32, cols: 32, tall: 8, wide: 16 },
    Tile { rows: 32, cols: 16, tall: 8, wide: 16 },
    Tile { rows: 16, cols: 16, tall: 8, wide: 16 },
    Tile { rows: 8, cols: 32, tall: 4, wide: 32 },
    Tile { rows: 8, cols: 16, tall: 4, wide: 16 },
    Tile { rows: 4, cols: 8, tall: 4, wide: 8 },
];

impl Tile {
    /// Bytes of shared memory; `owned` arrays of the rows, heads of `dim` vectors of `vector` values.
    fn bytes(&self, owned: usize, dim: usize, vector: usize) -> usize {
        let held = (owned * self.rows + self.cols) * (dim + 1) + (owned + 1) * self.wide;
        let scores = self.rows * (self.cols + 1 + self.wide);
        (held * vector + scores + 4 * self.rows.max(self.cols)) * size_of::<f32>()
    }

    /// The first that fits `client`'s device and is not much taller than the rows there are.
    fn choose(client: &Client, rows: usize, owned: usize, dim: usize, vector: usize) -> Option<Self> {
        let hardware = &client.properties().hardware;
        let units = hardware.max_units_per_cube.min(hardware.max_cube_dim.0) as usize;
        TILES.into_iter().find(|tile| {
            tile.rows <= rows.next_power_of_two().max(8)
                && tile.tall * tile.wide <= units
                && tile.bytes(owned, dim, vector) <= hardware.max_shared_memory_size
        })
    }
}

/// A tensor whose last dimension is contiguous, as it lies in memory.
fn ready(tensor: CubeTensor) -> CubeTensor {
    let tensor = untile(tensor);
    if tensor.meta.strides()[3] == 1 { tensor } else { into_contiguous(tensor) }
}

/// What all passes of an attention share.
struct Problem {
    client: Client,
    dtype: DType,
    /// Rows of the batch, queries, heads, key-value heads, keys.
    dims: [usize; 5],
    /// Values that are read at a time.
    vector: usize,
    /// Vectors of a head.
    dim: usize,
    by_row: u32,
}

impl Problem {
    /// None where only the composed form can compute it. Tensors of four dimensions; queries, keys, values, gradient.
    fn new(tensors: &[&CubeTensor], ranges: &CubeTensor) -> Option<Self> {
        let (q, k) = (tensors[0], tensors[1]);
        let [rows, queries, heads, width] = q.meta.shape().dims();
        let [_, kv_heads, keys, _] = k.meta.shape().dims();
        let client = q.client.clone();
        let wide_enough = client.properties().hardware.max_bindings > BINDINGS;
        if !cube::applies(tensors) || ranges.dtype != DType::I32 || width > WIDEST || !wide_enough {
            return None;
        }
        let size = |t: &&CubeTensor| {
            let sizes = client.io_optimized_vector_sizes(q.dtype.size()).filter(|n| *n <= 4);
            tensor_vector_size_parallel(sizes, t.meta.shape(), t.meta.strides(), 3)
        };
        let vector = tensors.iter().map(size).min().unwrap_or(1);
        let by_row = u32::from(ranges.meta.shape()[0] > 1);
        let dims = [rows, queries, heads, kv_heads, keys];
        Some(Self { dtype: q.dtype, dims, vector, dim: width / vector, by_row, client })
    }

    /// Queries of the heads of a key-value head.
    fn folded(&self) -> usize {
        self.groups() * self.dims[1]
    }

    fn groups(&self) -> usize {
        self.dims[2] / self.dims[3]
    }

    /// Tile of a pass over `rows` rows a key-value head that holds `owned` arrays of them.
    fn tile(&self, rows: usize, owned: usize) -> Option<Tile> {
        Tile::choose(&self.client, rows, owned, self.dim, self.vector)
    }

    fn grid(&self, rows: usize, tile: Tile) -> (CubeCount, CubeDim) {
        let cubes = self.dims[0] * self.dims[3] * rows.div_ceil(tile.rows);
        (cube::cubes(&self.client, cubes), CubeDim::new_1d((tile.tall * tile.wide) as u32))
    }
}

impl AttentionOps for CubeBackend {
    fn ranged_attention(q: CubeTensor, k: CubeTensor, v: CubeTensor, ranges: CubeTensor, scale: f32) -> CubeTensor {
        let [q, k, v] = [q, k, v].map(ready);
        let found = Problem::new(&[&q, &k, &v], &ranges).and_then(|p| Some((p.tile(p.folded(), 1)?, p)));
        let Some((tile, problem)) = found else {
            return forward::<Self>(q, k, v, ranges, scale);
        };
        let (count, dim) = problem.grid(problem.folded(), tile);
        let out = cube::empty(&q, q.meta.shape().clone(), q.dtype);
        attention_rows::launch(
            &problem.client,
            count,
            dim,
            problem.vector,
            q.into_tensor_arg(),
            k.into_tensor_arg(),
            v.into_tensor_arg(),
            into_contiguous(ranges).into_buffer_arg(),
            out.clone().into_tensor_arg(),
            problem.by_row,
            scale,
            problem.groups(),
            problem.dim,
            tile,
            dtype_to_storage_type(problem.dtype),
        );
        out
    }

    fn ranged_attention_backward(
        q: CubeTensor,
        k: CubeTensor,
        v: CubeTensor,
        ranges: CubeTensor,
        grad: CubeTensor,
        scale: f32,
    ) -> (CubeTensor, CubeTensor, CubeTensor) {
        let [q, k, v, grad] = [q, k, v, grad].map(ready);
        let found = Problem::new(&[&q, &k, &v, &grad], &ranges).and_then(|p| {
            let keys = p.dims[4];
            Some(([p.tile(p.folded(), 1)?, p.tile(p.folded(), 2)?, p.tile(keys, 2)?], p))
        });
        let Some((tiles, problem)) = found else {
            return backward::<Self>(q, k, v, ranges, grad, scale);
        };
        gradients(&problem, tiles, [q, k, v, grad], into_contiguous(ranges), scale)
    }
}

/// Gradients of queries, keys and values; tiles of the statistics, of the queries' pass and of the keys'.
fn gradients(
    problem: &Problem,
    tiles: [Tile; 3],
    [q, k, v, grad]: [CubeTensor; 4],
    ranges: CubeTensor,
    scale: f32,
) -> (CubeTensor, CubeTensor, CubeTensor) {
    let [rows, _, _, kv_heads, keys] = problem.dims;
    let (client, dtype) = (&problem.client, dtype_to_storage_type(problem.dtype));
    let (folded, groups) = (problem.folded(), problem.groups());
    let statistics = cube::empty(&q, Shape::new([rows, kv_heads, folded, 2]), DType::F32);
    let [q_out, k_out, v_out] = [&q, &k, &v].map(|t| cube::empty(t, t.meta.shape().clone(), t.dtype));
    let (count, dim) = problem.grid(folded, tiles[0]);
    statistics_rows::launch(
        client,
        count,
        dim,
        problem.vector,
        q.clone().into_tensor_arg(),
        k.clone().into_tensor_arg(),
        v.clone().into_tensor_arg(),
        ranges.clone().into_buffer_arg(),
        grad.clone().into_tensor_arg(),
        statistics.clone().into_buffer_arg(),
        problem.by_row,
        scale,
        groups,
        problem.dim,
        tiles[0],
        dtype,
    );
    let (count, dim) = problem.grid(folded, tiles[1]);
    query_gradient_rows::launch(
        client,
        count,
        dim,
        problem.vector,
        q.clone().into_tensor_arg(),
        k.clone().into_tensor_arg(),
        v.clone().into_tensor_arg(),
        ranges.clone().into_buffer_arg(),
        grad.clone().into_tensor_arg(),
        statistics.clone().into_buffer_arg(),
        q_out.clone().into_tensor_arg(),
        problem.by_row,
        scale,
        groups,
        problem.dim,
        tiles[1],
        dtype,
    );
    let (count, dim) = problem.grid(keys, tiles[2]);
    key_gradient_rows::launch(
        client,
        count,
        dim,
        problem.vector,
        q.into_tensor_arg(),
        k.into_tensor_arg(),
        v.into_tensor_arg(),
        ranges.into_buffer_arg(),
        grad.into_tensor_arg(),
        statistics.into_buffer_arg(),
        k_out.clone().into_tensor_arg(),
        v_out.clone().into_tensor_arg(),
        problem.by_row,
        scale,
        groups,
        problem.dim,
        tiles[2],
        dtype,
    );
    (q_out, k_out, v_out)
}

#[cfg(test)]
mod tests {
    use burn::tensor::{DType as TensorDType, FloatDType, Tensor, TensorData};

    use super::{
        super::{
            attention::{attention, tests::check},
            tests::{device, difference, values},
        },
        *,
    };
    use crate::device::policy::kind_of;

    fn causal(queries: i32) -> Vec<[i32; 2]> {
        (0..queries).map(|i| [0, i + 1]).collect()
    }

    #[test]
    fn heads_of_any_width_equal_the_composed_form() {
        // vectors of four, two and one, up to the widest that are computed here
        for dim in [4, 7, 18, 64, 80, 128, WIDEST] {
            check([1, 37, 2, 1, 37, dim], &causal(37));
        }
    }

    #[test]
    fn groups_of_heads_and_ragged_lengths_equal_the_composed_form() {
        for (heads, kv_heads) in [(3, 3), (6, 2), (7, 1), (14, 2)] {
            check([2, 45, heads, kv_heads, 45, 16], &causal(45));
            // the queries are the last of the keys, as in the second pass over a text
            let later: Vec<[i32; 2]> = (0..9).map(|i| [0, 41 + i]).collect();
            check([2, 9, heads, kv_heads, 49, 16], &later);
            check([3, 1, heads, kv_heads, 130, 16], &[[0, 130], [100, 129], [0, 1]]);
        }
    }

    #[test]
    fn packed_rows_windows_and_queries_without_keys_equal_the_composed_form() {
        // texts of 60, 1 and 89 behind one another, beside a row of windows
        let begin = |i: i32| [0, 60, 61][usize::from(i >= 60) + usize::from(i >= 61)];
        let packed = (0..150).map(|i| [begin(i), i + 1]);
        let windows = (0..150).map(|i| [(i - 20).max(0), i + 1]);
        check([2, 150, 4, 2, 150, 24], &packed.chain(windows).collect::<Vec<_>>());
    }

    #[test]
    fn ranges_that_are_empty_or_too_long_are_harmless() {
        let device = device().autodiff();
        let leaf = |shape: [usize; 4], key| values(shape, key, &device).require_grad();
        let (q, k, v) = (leaf([1, 80, 2, 16], 0), leaf([1, 1, 80, 16], 1), leaf([1, 1, 80, 16], 2));
        let ranges: Vec<i32> = (0..80).flat_map(|i| if i < 40 { [i, i] } else { [-5, 1000] }).collect();
        let ranges = Tensor::from_data(
            TensorData::new(ranges, [1, 80, 2]),
            (&device.clone().without_autodiff(), TensorDType::I32),
        );
        let out = attention(q.clone(), k.clone(), v.clone(), ranges, 0.3);
        let mut grads = (out.clone() * values([1, 80, 2, 16], 3, &device)).sum().backward();
        let mut grad = |t: Tensor<4>| t.grad_remove(&mut grads).expect("tracked");
        let found = [out.without_autodiff(), grad(q), grad(k), grad(v)];
        let host = |t: &Tensor<4>| t.clone().into_data().try_to_vec::<f32>().unwrap();
        assert!(found.iter().all(|t| host(t).iter().all(|x| x.is_finite())));
        let moved = host(&found[1]);
        assert!(moved[..40 * 32].iter().all(|x| *x == 0.0) && moved[40 * 32..].iter().all(|x| *x != 0.0));
    }

    #[test]
    fn keys_in_a_larger_cache_are_read_where_they_lie() {
        let device = device();
        let cache = |key| values([2, 3, 64, 16], key, &device);
        let (k, v) = (cache(0), cache(1));
        let q = values([2, 5, 6, 16], 2, &device);
        let ranges: Vec<i32> = (0..5).flat_map(|i| [0, 33 + i]).collect();
        let ranges = Tensor::from_data(TensorData::new(ranges, [1, 5, 2]), (&device, TensorDType::I32));
        let part = |t: &Tensor<4>| t.clone().narrow(2, 11, 37);
        let copy = |t: Tensor<4>| Tensor::from_data(t.into_data(), &device);
        let found = attention(q.clone(), part(&k), part(&v), ranges.clone(), 0.25);
        let expected = attention(q, copy(part(&k)), copy(part(&v)), ranges, 0.25);
        assert_eq!(found.into_data(), expected.into_data());
    }

    #[test]
    fn half_types_are_computed_in_f32() {
        let device = device();
        for dtype in [FloatDType::F16, FloatDType::BF16] {
            // the composed form is of f32 alone
            if kind_of(&device) == "cpu" || !device.supports_dtype(dtype) {
                continue;
            }
            let half = |shape: [usize; 4], key| values(shape, key, &device).cast(dtype);
            let (q, k, v) = (half([1, 40, 4, 32], 0), half([1, 2, 40, 32], 1), half([1, 2, 40, 32], 2));
            let ranges = causal(40).concat();
            let ranges = Tensor::from_data(TensorData::new(ranges, [1, 40, 2]), (&device, TensorDType::I32));
            let wide = |t: &Tensor<4>| t.clone().cast(FloatDType::F32);
            let expected = attention(wide(&q), wide(&k), wide(&v), ranges.clone(), 0.1);
            let found = attention(q, k, v, ranges, 0.1);
            assert_eq!(found.dtype(), TensorDType::from(dtype));
            assert!(difference(wide(&found), expected) < 5e-3, "{dtype:?}");
        }
    }

    #[test]
    fn every_tile_fits_its_units_and_some_fit_the_smallest_device() {
        for tile in TILES {
            let units = tile.tall * tile.wide;
            assert!(tile.rows % tile.tall == 0 && tile.cols % tile.wide == 0);
            assert!(units >= tile.rows.max(tile.cols) && units <= 256, "{tile:?}");
        }
        // 16 KiB, the least that WebGPU promises, for heads of 128
        assert!(TILES.iter().any(|t| t.bytes(2, 32, 4) <= 16 << 10));
        // 32 KiB, what common devices have, for the widest heads
        assert!(TILES.iter().any(|t| t.bytes(2, 64, 4) <= 32 << 10));
    }
}

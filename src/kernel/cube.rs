//! What the kernels for CubeCL share: units of a row, sums and maxima over the units of a cube, new tensors.
//!
//! Units exchange values through shared memory alone, never through subgroups, so the kernels run wherever WGSL does.
//! Sums are taken in a fixed order: results are the same from run to run.

use burn::tensor::{DType, Shape};
use burn_cubecl::{
    cubecl::{self, client::Client, prelude::*},
    tensor::CubeTensor,
};

/// Most units of a row. More only wait for each other.
const UNITS: u32 = 256;

/// Whether all tensors are of one floating-point type that kernels read, and fused implementations are wanted.
pub(super) fn applies(tensors: &[&CubeTensor]) -> bool {
    let dtype = tensors[0].dtype;
    super::fused()
        && matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
        && tensors.iter().all(|t| t.dtype == dtype && t.meta.num_elements() > 0)
}

/// Units of a cube that walks over a row of `steps` vectors: a power of two, four steps a unit where there are as many.
pub(super) fn units(client: &Client, steps: usize) -> u32 {
    let hardware = &client.properties().hardware;
    let most = UNITS.min(hardware.max_units_per_cube).min(hardware.max_cube_dim.0).max(1);
    let wanted = u32::try_from(steps.div_ceil(4)).unwrap_or(UNITS).clamp(32, UNITS).next_power_of_two();
    wanted.min(1 << most.ilog2())
}

/// `count` cubes; the last ones of the grid may have nothing to do.
pub(super) fn cubes(client: &Client, count: usize) -> CubeCount {
    let most = client.properties().hardware.max_cube_count.0 as usize;
    let wide = count.min(most).max(1);
    CubeCount::Static(wide as u32, count.div_ceil(wide) as u32, 1)
}

/// Widest vectors, of at most four values, in which rows of `width` values of `size` bytes can be read.
pub(super) fn vector_size(client: &Client, width: usize, size: usize) -> usize {
    client.io_optimized_vector_sizes(size).filter(|n| *n <= 4 && width.is_multiple_of(*n)).max().unwrap_or(1)
}

/// Contiguous memory beside `like`, not initialised.
pub(super) fn empty(like: &CubeTensor, shape: Shape, dtype: DType) -> CubeTensor {
    let handle = like.client.empty(shape.num_elements() * dtype.size());
    CubeTensor::new_contiguous(like.client.clone(), like.device.clone(), shape, handle, dtype)
}

/// Sum of the values of a vector.
#[cube]
pub(super) fn lanes<N: Size>(vector: Vector<f32, N>) -> f32 {
    let mut sum = vector.extract(0usize);
    #[unroll]
    for lane in 1..N::value() {
        sum += vector.extract(lane);
    }
    sum
}

/// Sum of one value of each unit of the cube; `shared` has a place for each.
#[cube]
pub(super) fn sum_units(shared: &mut Shared<[f32]>, value: f32) -> f32 {
    let unit = UNIT_POS;
    sync_cube();
    shared[unit as usize] = value;
    sync_cube();
    let mut half = CUBE_DIM / 2;
    while half > 0 {
        if unit < half {
            let other = shared[(unit + half) as usize];
            shared[unit as usize] += other;
        }
        sync_cube();
        half /= 2;
    }
    shared[0]
}

/// Largest of one value of each unit of the cube; `shared` has a place for each.
#[cube]
pub(super) fn max_units(shared: &mut Shared<[f32]>, value: f32) -> f32 {
    let unit = UNIT_POS;
    sync_cube();
    shared[unit as usize] = value;
    sync_cube();
    let mut half = CUBE_DIM / 2;
    while half > 0 {
        if unit < half {
            let other = shared[(unit + half) as usize];
            let own = shared[unit as usize];
            shared[unit as usize] = own.max(other);
        }
        sync_cube();
        half /= 2;
    }
    shared[0]
}

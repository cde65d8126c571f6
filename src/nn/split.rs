//! Tables that are larger than the largest buffer of the device that computes.
//!
//! Such a table (the embedding and the head of a vocabulary of 150,000 tokens have 2.5 GB in f32; many Vulkan drivers
//! allow 2 GiB) stays in host memory, or in the memory map of its file. Of an embedding only the rows that are looked
//! up go to the device; a head goes there in parts that fit, one after the other, and comes back as parts of the logits.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use super::linear::product;
use crate::device::policy::{Policy, max_buffer_bytes};

/// The device of tables that fit no buffer of `device`; none where they fit, or where there is no other.
#[must_use]
pub fn host_for(bytes: u64, device: &Device) -> Option<Device> {
    let limit = max_buffer_bytes(device)?;
    #[cfg(feature = "flex")]
    return (bytes > limit).then(Device::flex);
    #[cfg(not(feature = "flex"))]
    return {
        let _ = limit;
        None
    };
}

/// Rows of a table in host memory, on the device of the ids.
///
/// # Shapes
/// `table` `[n, width]`, `ids` `[rows, length]` -> `[rows, length, width]`
#[must_use]
pub fn lookup(table: Tensor<2>, ids: Tensor<2, Int>) -> Tensor<3> {
    let (device, [rows, length], [_, width]) = (ids.device(), ids.dims(), table.dims());
    let flat: Vec<i64> = ids.into_data().iter::<i64>().collect();
    let wanted = Tensor::<1, Int>::from_data(TensorData::new(flat, [rows * length]), &table.device());
    let found = table.select(0, wanted).reshape([rows, length, width]);
    let found = found.without_autodiff().to_device(&device.clone().without_autodiff());
    if device.is_autodiff() { found.autodiff() } else { found }
}

/// `x W` for a weight in host memory, which goes to the device of `x` in parts.
///
/// # Shapes
/// `x` `[.., d_input]`, `weight` `[d_input, d_output]` -> `[.., d_output]`
#[must_use]
pub fn product_in_parts<const D: usize>(x: Tensor<D>, weight: Tensor<2>) -> Tensor<D> {
    // A quarter: the part, its transpose or widened copy, and what is left of the part before.
    let limit = max_buffer_bytes(&x.device()).map_or(u64::MAX, |limit| limit / 4);
    parts_within(x, weight.without_autodiff(), limit)
}

fn parts_within<const D: usize>(x: Tensor<D>, weight: Tensor<2>, limit: u64) -> Tensor<D> {
    let [d_input, d_output] = weight.dims();
    let device = x.device().without_autodiff();
    let columns = (limit / (4 * d_input.max(1)) as u64).clamp(1, d_output.max(1) as u64) as usize;
    let held = match weight.dtype() {
        half @ (DType::F16 | DType::BF16) => {
            Policy::of(&device).halves(&device).into_iter().find(|d| DType::from(*d) == half)
        }
        _ => None,
    };
    let dtype = held.map_or(DType::F32, DType::from);
    // Checkpoints have a row for every output, so a part is a piece of the file.
    let rows = weight.swap_dims(0, 1);
    let parts = (0..d_output).step_by(columns).map(|start| {
        let part = super::cast(rows.clone().narrow(0, start, columns.min(d_output - start)), dtype);
        product(x.clone(), part.to_device(&device).swap_dims(0, 1), None)
    });
    Tensor::cat(parts.collect(), D - 1)
}

#[cfg(test)]
mod tests {
    use burn::tensor::FloatDType;

    use super::*;

    fn numbers<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
        let n: usize = shape.iter().product();
        let values: Vec<f32> = (0..n).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0).collect();
        Tensor::from_data(TensorData::new(values, shape), (device, DType::F32))
    }

    fn off<const D: usize>(a: Tensor<D>, b: Tensor<D>) -> f32 {
        (a - b).abs().max().into_scalar::<f32>()
    }

    #[test]
    fn a_head_in_parts_gives_the_logits_and_gradients_of_the_whole() {
        let device = crate::device::DeviceSpec::from_env().unwrap().open().unwrap();
        let host = Device::flex();
        for dtype in [FloatDType::F32, FloatDType::BF16] {
            let stored = numbers([23, 8], &host).cast(dtype);
            let weight = stored.clone().swap_dims(0, 1);
            let whole = stored.cast(FloatDType::F32).swap_dims(0, 1).to_device(&device);
            // room for five, one and all columns
            for limit in [5 * 4 * 8, 1, u64::MAX] {
                let run = |parts: bool| {
                    let x = numbers([2, 3, 8], &device).autodiff().require_grad();
                    let y = if parts {
                        parts_within(x.clone(), weight.clone(), limit)
                    } else {
                        x.clone().matmul(whole.clone().unsqueeze())
                    };
                    let mut grads = (y.clone() * numbers([2, 3, 23], &device)).sum().backward();
                    (y.without_autodiff(), x.grad_remove(&mut grads).unwrap())
                };
                let (found, expected) = (run(true), run(false));
                assert!(off(found.0, expected.0) < 1e-4, "{dtype:?} {limit}");
                assert!(off(found.1, expected.1) < 1e-4, "{dtype:?} {limit}");
            }
        }
    }

    #[test]
    fn rows_of_a_table_on_the_host_arrive_on_the_device_of_the_ids() {
        let device = crate::device::DeviceSpec::from_env().unwrap().open().unwrap();
        let table = numbers([11, 6], &Device::flex());
        let ids = Tensor::<2, Int>::from_data([[3, 0, 10], [7, 7, 1]], &device);
        let found = lookup(table.clone(), ids.clone());
        assert_eq!(found.device(), device);
        let expected = table.to_device(&device).select(0, ids.reshape([6])).reshape([2, 3, 6]);
        assert_eq!(off(found, expected), 0.0);
    }

    #[test]
    fn tables_stay_on_the_host_where_they_fit_no_buffer() {
        assert!(host_for(u64::MAX, &Device::flex()).is_none());
        let device = crate::device::DeviceSpec::from_env().unwrap().open().unwrap();
        if let Some(limit) = max_buffer_bytes(&device) {
            assert!(host_for(limit, &device).is_none());
            assert_eq!(host_for(limit + 1, &device), Some(Device::flex()));
        }
    }
}

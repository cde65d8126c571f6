//! Cross-entropy on CubeCL: a cube a row, two passes over the logits and one over the gradient.

use burn::tensor::{DType, Shape};
use burn_cubecl::{
    CubeBackend,
    cubecl::{self, prelude::*},
    kernel::into_contiguous,
    tensor::CubeTensor,
};

use super::{
    cross_entropy::{CrossEntropyOps, composed},
    cube::{self, lanes, max_units, sum_units},
};

/// Below every logit, and finite: WGSL has no infinity.
const LEAST: f32 = -3.0e38;

/// Largest logit of a unit's part of a row, the sum of the exponentials below it, and how many are not numbers.
///
/// The sum is scaled again whenever a larger logit comes, so one pass is enough.
#[cube]
fn part_of_row<N: Size>(
    logits: &[Vector<f32, N>],
    start: usize,
    #[comptime] units: usize,
    #[comptime] width: usize,
) -> (f32, f32, f32) {
    let mut largest = f32::new(LEAST);
    let mut sum = 0.0f32;
    let mut wrong = 0.0f32;
    let mut i = UNIT_POS as usize;
    while i < width {
        let values = logits[start + i];
        let mut most = largest;
        #[unroll]
        for lane in 0..N::value() {
            let value = values.extract(lane);
            if value.is_nan() {
                wrong += 1.0f32;
            }
            most = most.max(value);
        }
        if most > largest {
            sum *= (largest - most).exp();
            largest = most;
        }
        sum += lanes::<N>((values - Vector::new(largest)).exp());
        i += units;
    }
    (largest, sum, wrong)
}

/// A row with a logit that is not a number, or whose label is no class, has a loss that is not a number: `missing`.
#[cube(launch)]
fn cross_entropy_rows<N: Size>(
    logits: &[Vector<f32, N>],
    labels: &[i32],
    nll: &mut [f32],
    gradient: &mut [Vector<f32, N>],
    rows: u32,
    missing: f32,
    #[comptime] units: usize,
    #[comptime] width: usize,
) {
    let row = CUBE_POS;
    if row >= rows as usize {
        terminate!();
    }
    let start = row * width;
    let mut shared = Shared::<[f32]>::new_slice(units);
    let (own, sum, wrong) = part_of_row::<N>(logits, start, units, width);
    let largest = max_units(&mut shared, own);
    let sum = sum_units(&mut shared, sum * (own - largest).exp());
    let wrong = sum_units(&mut shared, wrong);
    let label = labels[row];
    let size = N::value();
    let outside = label < 0 || label as u32 >= comptime!((width * size) as u32);
    let label = label as usize;
    let scale = Vector::<f32, N>::new(1.0f32 / sum);
    let mut i = UNIT_POS as usize;
    while i < width {
        let shifted = logits[start + i] - Vector::new(largest);
        let mut slope = shifted.exp() * scale;
        if i == label / N::value() {
            #[unroll]
            for lane in 0..N::value() {
                if lane == label % N::value() {
                    slope.insert(lane, slope.extract(lane) - 1.0f32);
                    if wrong == 0.0f32 {
                        nll[row] = sum.ln() - shifted.extract(lane);
                    }
                }
            }
        }
        gradient[start + i] = slope;
        i += units;
    }
    if UNIT_POS == 0 && (outside || wrong > 0.0f32) {
        nll[row] = missing;
    }
}

impl CrossEntropyOps for CubeBackend {
    fn cross_entropy(logits: CubeTensor, labels: CubeTensor) -> (CubeTensor, CubeTensor) {
        if !cube::applies(&[&logits]) || logits.dtype != DType::F32 || labels.dtype != DType::I32 {
            return composed::<Self>(logits, labels);
        }
        let (logits, labels) = (into_contiguous(logits), into_contiguous(labels));
        let (client, shape) = (logits.client.clone(), logits.meta.shape().clone());
        let [rows, classes] = shape.dims();
        let nll = cube::empty(&logits, Shape::new([rows]), DType::F32);
        let gradient = cube::empty(&logits, shape, DType::F32);
        let vector = cube::vector_size(&client, classes, size_of::<f32>());
        let units = cube::units(&client, classes / vector);
        cross_entropy_rows::launch(
            &client,
            cube::cubes(&client, rows),
            CubeDim::new_1d(units),
            vector,
            logits.into_buffer_arg(),
            labels.into_buffer_arg(),
            nll.clone().into_buffer_arg(),
            gradient.clone().into_buffer_arg(),
            rows as u32,
            f32::NAN,
            units as usize,
            classes / vector,
        );
        (nll, gradient)
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{DType, Device, Int, Tensor, TensorData, activation::log_softmax};

    use super::super::{
        cross_entropy::cross_entropy,
        tests::{device, difference, values},
    };

    fn labels(values: Vec<i32>, device: &Device) -> Tensor<1, Int> {
        let count = values.len();
        Tensor::from_data(TensorData::new(values, [count]), (device, DType::I32))
    }

    #[test]
    fn vocabularies_of_any_size_equal_the_composed_form_on_the_cpu() {
        let device = device();
        for (rows, classes) in [(5, 1), (7, 33), (4, 32_000), (2, 92_553), (1, 151_936)] {
            // llvmpipe ends a loop after 65,535 turns, and the composed sum takes such a row in one
            if classes == 92_553 && !super::super::fused() {
                continue;
            }
            for transposed in [false, true] {
                let shape = if transposed { [classes, rows] } else { [rows, classes] };
                let turn = |logits: Tensor<2>| if transposed { logits.transpose() } else { logits };
                let wanted: Vec<_> = (0..rows).map(|row| (row * (classes - 1) / (rows - 1).max(1)) as i32).collect();
                let logits = values(shape, 0, &device) * 8.0;
                let (nll, gradient) = cross_entropy(turn(logits), labels(wanted.clone(), &device));
                let cpu = Device::flex();
                let leaf = turn(values(shape, 0, &cpu) * 8.0).autodiff().require_grad();
                let picked = log_softmax(leaf.clone(), 1).gather(1, labels(wanted, &cpu).unsqueeze_dim(1));
                let expected: Tensor<1> = picked.clone().neg().squeeze_dim(1);
                let mut grads = picked.sum().neg().backward();
                // a loss of zero has no scale
                let off = difference(nll + 1.0, expected.without_autodiff() + 1.0);
                assert!(off < 3e-6, "{rows} {classes}: {off}");
                let off = difference(gradient, leaf.grad_remove(&mut grads).unwrap());
                assert!(off < 3e-5, "{rows} {classes}: {off}");
            }
        }
    }

    #[test]
    fn logits_that_grow_along_a_row_and_logits_far_below_zero() {
        let device = device();
        let rising: Vec<f32> = (0..5000).map(|i| i as f32 * 0.1 - 40_000.0).collect();
        let logits = Tensor::<2>::from_data(TensorData::new(rising, [1, 5000]), &device);
        let (nll, gradient) = cross_entropy(logits, labels(vec![4999], &device));
        let (nll, sum) = (nll.into_scalar::<f32>(), gradient.sum().into_scalar::<f32>());
        // 1 / (1 - e^-0.1) is the sum of the exponentials; the logits are exact to 1/512
        assert!((nll - 2.352_17).abs() < 2e-2 && sum.abs() < 1e-5, "{nll} {sum}");
    }

    #[test]
    fn a_label_outside_the_classes_shows_in_the_loss_and_leaves_other_rows_alone() {
        let device = device();
        if crate::device::policy::kind_of(&device) == "cpu" || !super::super::fused() {
            return; // refused there, read past the row by the composed form
        }
        let logits = values::<2>([4, 32], 0, &device);
        let (nll, _) = cross_entropy(logits.clone(), labels(vec![3, 32, -1, 7], &device));
        let (right, _) = cross_entropy(logits, labels(vec![3, 0, 0, 7], &device));
        let (nll, right) = (nll.into_data().try_to_vec::<f32>(), right.into_data().try_to_vec::<f32>());
        let (nll, right) = (nll.unwrap(), right.unwrap());
        assert!(nll[1].is_nan() && nll[2].is_nan(), "{nll:?}");
        assert_eq!([nll[0], nll[3]], [right[0], right[3]]);
    }
}

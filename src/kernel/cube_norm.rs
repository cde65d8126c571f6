//! The norms on CubeCL: a cube a row, statistics in f32 whatever the type of the values.

use burn::backend::cubecl::dtype_to_storage_type;
use burn_cubecl::{
    CubeBackend,
    cubecl::{self, prelude::*},
    kernel::into_contiguous,
    tensor::CubeTensor,
};

use super::{
    cube::{self, lanes, sum_units},
    norm::{Centre, NormOps, backward, forward},
};

/// Centre and reciprocal deviation of the row of `width` vectors that begins at `start`.
#[cube]
fn statistics<F: Float, N: Size>(
    x: &[Vector<F, N>],
    start: usize,
    eps: f32,
    shared: &mut Shared<[f32]>,
    #[comptime] width: usize,
    #[comptime] values: usize,
    #[comptime] centred: bool,
) -> (f32, f32) {
    let step = CUBE_DIM as usize;
    let mut mean = 0.0f32;
    if comptime!(centred) {
        let mut sum = Vector::<f32, N>::zeroed();
        let mut i = UNIT_POS as usize;
        while i < width {
            sum += Vector::cast_from(x[start + i]);
            i += step;
        }
        mean = sum_units(shared, lanes::<N>(sum)) / comptime!(values as f32);
    }
    let centre = Vector::<f32, N>::new(mean);
    let mut square = Vector::<f32, N>::zeroed();
    let mut i = UNIT_POS as usize;
    while i < width {
        let value = Vector::<f32, N>::cast_from(x[start + i]) - centre;
        square += value * value;
        i += step;
    }
    let square = sum_units(shared, lanes::<N>(square)) / comptime!(values as f32);
    (mean, 1.0f32 / (square + eps).sqrt())
}

/// A root-mean-square norm rounds to the type of the values before it multiplies by the weight, a layer norm at the end.
#[cube(launch)]
fn norm_rows<F: Float, N: Size>(
    x: &[Vector<F, N>],
    weight: &[Vector<F, N>],
    bias: &[Vector<F, N>],
    out: &mut [Vector<F, N>],
    rows: u32,
    eps: f32,
    #[comptime] units: usize,
    #[comptime] width: usize,
    #[comptime] values: usize,
    #[comptime] centred: bool,
    #[define(F)] _dtype: ElemType,
) {
    if CUBE_POS >= rows as usize {
        terminate!();
    }
    let start = CUBE_POS * width;
    let mut shared = Shared::<[f32]>::new_slice(units);
    let (mean, scale) = statistics::<F, N>(x, start, eps, &mut shared, width, values, centred);
    let (centre, scale) = (Vector::<f32, N>::new(mean), Vector::<f32, N>::new(scale));
    let mut i = UNIT_POS as usize;
    while i < width {
        let hat = (Vector::<f32, N>::cast_from(x[start + i]) - centre) * scale;
        let weight = Vector::<f32, N>::cast_from(weight[i]);
        if comptime!(centred) {
            out[start + i] = Vector::cast_from(hat * weight + Vector::<f32, N>::cast_from(bias[i]));
        } else {
            let rounded = Vector::<F, N>::cast_from(hat);
            out[start + i] = Vector::cast_from(Vector::<f32, N>::cast_from(rounded) * weight);
        }
        i += units;
    }
}

#[cube(launch)]
fn norm_gradient_rows<F: Float, N: Size>(
    x: &[Vector<F, N>],
    weight: &[Vector<F, N>],
    grad: &[Vector<F, N>],
    out: &mut [Vector<F, N>],
    rows: u32,
    eps: f32,
    #[comptime] units: usize,
    #[comptime] width: usize,
    #[comptime] values: usize,
    #[comptime] centred: bool,
    #[define(F)] _dtype: ElemType,
) {
    if CUBE_POS >= rows as usize {
        terminate!();
    }
    let start = CUBE_POS * width;
    let mut shared = Shared::<[f32]>::new_slice(units);
    let (mean, scale) = statistics::<F, N>(x, start, eps, &mut shared, width, values, centred);
    let (centre, scale) = (Vector::<f32, N>::new(mean), Vector::<f32, N>::new(scale));
    let mut along = Vector::<f32, N>::zeroed();
    let mut sum = Vector::<f32, N>::zeroed();
    let mut i = UNIT_POS as usize;
    while i < width {
        let grad = Vector::<f32, N>::cast_from(grad[start + i]) * Vector::<f32, N>::cast_from(weight[i]);
        along += grad * (Vector::<f32, N>::cast_from(x[start + i]) - centre) * scale;
        sum += grad;
        i += units;
    }
    let along = Vector::<f32, N>::new(sum_units(&mut shared, lanes::<N>(along)) / comptime!(values as f32));
    let mut shift = Vector::<f32, N>::zeroed();
    if comptime!(centred) {
        shift = Vector::<f32, N>::new(sum_units(&mut shared, lanes::<N>(sum)) / comptime!(values as f32));
    }
    let mut i = UNIT_POS as usize;
    while i < width {
        let grad = Vector::<f32, N>::cast_from(grad[start + i]) * Vector::<f32, N>::cast_from(weight[i]);
        let hat = (Vector::<f32, N>::cast_from(x[start + i]) - centre) * scale;
        out[start + i] = Vector::cast_from((grad - shift - hat * along) * scale);
        i += units;
    }
}

impl NormOps for CubeBackend {
    fn norm(x: CubeTensor, weight: CubeTensor, bias: CubeTensor, eps: f32, centre: Centre) -> CubeTensor {
        if !cube::applies(&[&x, &weight, &bias]) {
            return forward::<Self>(x, weight, bias, eps, centre);
        }
        let (x, weight, bias) = (into_contiguous(x), into_contiguous(weight), into_contiguous(bias));
        let (client, shape, dtype) = (x.client.clone(), x.meta.shape().clone(), x.dtype);
        let out = cube::empty(&x, shape.clone(), dtype);
        let [rows, width] = shape.dims();
        let vector = cube::vector_size(&client, width, dtype.size());
        let units = cube::units(&client, width / vector);
        norm_rows::launch(
            &client,
            cube::cubes(&client, rows),
            CubeDim::new_1d(units),
            vector,
            x.into_buffer_arg(),
            weight.into_buffer_arg(),
            bias.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            rows as u32,
            eps,
            units as usize,
            width / vector,
            width,
            centre == Centre::Mean,
            dtype_to_storage_type(dtype),
        );
        out
    }

    fn norm_backward(x: CubeTensor, weight: CubeTensor, grad: CubeTensor, eps: f32, centre: Centre) -> CubeTensor {
        if !cube::applies(&[&x, &weight, &grad]) {
            return backward::<Self>(x, weight, grad, eps, centre);
        }
        let (x, weight, grad) = (into_contiguous(x), into_contiguous(weight), into_contiguous(grad));
        let (client, shape, dtype) = (x.client.clone(), x.meta.shape().clone(), x.dtype);
        let out = cube::empty(&x, shape.clone(), dtype);
        let [rows, width] = shape.dims();
        let vector = cube::vector_size(&client, width, dtype.size());
        let units = cube::units(&client, width / vector);
        norm_gradient_rows::launch(
            &client,
            cube::cubes(&client, rows),
            CubeDim::new_1d(units),
            vector,
            x.into_buffer_arg(),
            weight.into_buffer_arg(),
            grad.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            rows as u32,
            eps,
            units as usize,
            width / vector,
            width,
            centre == Centre::Mean,
            dtype_to_storage_type(dtype),
        );
        out
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{DType, Device, FloatDType, Tensor};

    use super::super::{
        norm::{layer_norm, rms_norm},
        tests::{device, difference, values},
    };

    const EPS: f64 = 1e-5;

    type Norm = fn(Tensor<2>, Tensor<1>, Tensor<1>) -> Tensor<2>;

    fn plain(x: Tensor<2>) -> Tensor<2> {
        let scale = x.clone().square().mean_dim(1).add_scalar(EPS).sqrt();
        x / scale
    }

    const PAIRS: [(Norm, Norm); 2] = [
        (|x, w, _| rms_norm(x, w, EPS), |x, w, _| plain(x) * w.unsqueeze()),
        (
            |x, w, b| layer_norm(x, w, b, EPS),
            |x, w, b| plain(x.clone() - x.mean_dim(1)) * w.unsqueeze() + b.unsqueeze(),
        ),
    ];

    /// Output, gradients of the input and of the weight.
    fn run(op: Norm, device: Device, [rows, width]: [usize; 2], transposed: bool, expanded: bool) -> [Tensor<2>; 3] {
        let device = device.autodiff();
        let shape = if transposed { [width, rows] } else { [rows, width] };
        let x = (values(shape, 0, &device) * 2.0 + 1.0).detach().require_grad();
        let weight = values([width], 1, &device).require_grad();
        let input = if transposed { x.clone().transpose() } else { x.clone() };
        let out = op(input, weight.clone(), values([width], 2, &device));
        let loss = if expanded { out.clone() } else { out.clone() * values([rows, width], 3, &device) };
        let mut grads = loss.sum().backward();
        let weight = weight.grad_remove(&mut grads).expect("tracked").unsqueeze();
        [out.without_autodiff(), x.grad_remove(&mut grads).expect("tracked"), weight]
    }

    #[test]
    fn rows_of_any_width_and_layout_equal_the_composed_form_on_the_cpu() {
        for (fused, composed) in PAIRS {
            for shape in [[70, 37], [3, 64], [9, 2050], [2, 4096], [40, 5]] {
                for (transposed, expanded) in [(false, false), (true, false), (false, true)] {
                    let found = run(fused, device(), shape, transposed, expanded);
                    let expected = run(composed, Device::flex(), shape, transposed, expanded);
                    for (found, expected) in found.into_iter().zip(expected) {
                        let off = difference(found, expected);
                        assert!(off < 2e-5, "{shape:?} {transposed} {expanded}: {off}");
                    }
                }
            }
        }
    }

    #[test]
    fn more_rows_than_a_grid_is_wide() {
        let device = device();
        let (x, weight) = (values([70_001, 3], 0, &device), values([3], 1, &device));
        let expected = plain(x.clone()) * weight.clone().unsqueeze();
        assert!(difference(rms_norm(x, weight, EPS), expected) < 1e-5);
    }

    #[test]
    fn a_half_type_is_rounded_before_the_weight_and_keeps_its_statistics() {
        let device = device();
        for dtype in [FloatDType::F16, FloatDType::BF16] {
            if !device.supports_dtype(dtype) {
                continue;
            }
            let half = |t: Tensor<2>| t.cast(dtype);
            let (x, weight) = (half(values([50, 260], 0, &device) * 30.0), values([260], 1, &device).cast(dtype));
            let found = rms_norm(x.clone(), weight.clone(), EPS);
            assert_eq!(found.dtype(), DType::from(dtype));
            let hat = plain(x.cast(FloatDType::F32));
            let wide = weight.clone().cast(FloatDType::F32).unsqueeze();
            let twice = half(half(hat.clone()).cast(FloatDType::F32) * wide.clone());
            let once = half(hat * wide);
            let differ = |other: Tensor<2>| {
                let bits = |t: Tensor<2>| t.cast(FloatDType::F32).into_data().try_to_vec::<f32>().unwrap();
                bits(found.clone()).iter().zip(bits(other)).filter(|(a, b)| *a != b).count()
            };
            let (twice, once) = (differ(twice), differ(once));
            assert!(twice < 260 && once > 1300, "{dtype:?}: {twice} and {once} of 13000 differ");
        }
    }

    #[test]
    fn gradients_in_a_half_type_are_those_of_f32_rounded() {
        let plain_device = device();
        let device = plain_device.clone().autodiff();
        for dtype in [FloatDType::F16, FloatDType::BF16] {
            if !plain_device.supports_dtype(dtype) {
                continue;
            }
            let input = values([20, 130], 0, &device).cast(dtype).detach();
            let weight = values([130], 1, &device).cast(dtype).detach();
            let run = |wide: bool| {
                let as_wanted = |t: Tensor<2>| if wide { t.cast(FloatDType::F32) } else { t };
                let x = as_wanted(input.clone()).detach().require_grad();
                let weight = as_wanted(weight.clone().unsqueeze()).squeeze_dim::<1>(0).detach().require_grad();
                let out = rms_norm(x.clone(), weight.clone(), EPS);
                let slope = as_wanted(values([20, 130], 3, &device).cast(dtype));
                let mut grads = (out * slope).sum().backward();
                let weight: Tensor<2> = weight.grad_remove(&mut grads).expect("tracked").unsqueeze();
                [x.grad_remove(&mut grads).expect("tracked"), weight].map(|t| t.cast(FloatDType::F32))
            };
            for (found, expected) in run(false).into_iter().zip(run(true)) {
                assert!(difference(found, expected) < 1e-2, "{dtype:?}");
            }
        }
    }
}

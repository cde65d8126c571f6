//! Does a device compute right? Matrix products, softmax and one gradient, compared with the same in f64 on the host.
//!
//! Drivers exist that crash in their compiler, and others that return wrong numbers without an error. Sizes are such
//! that a wrong subgroup or tile shows: one, odd, a power of two, one beside it, and more than a tile.

use burn::tensor::{DType, Device, FloatDType, Int, Tensor, TensorData, activation::softmax};
use rand::RngExt;
use serde::{Deserialize, Serialize};

use super::{policy::Policy, tolerance::Tolerance};
use crate::nn::cast;

/// How far one computation was off.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    /// What was computed.
    pub name: String,
    /// Largest difference, relative to the largest magnitude; [`f64::MAX`] where something is no number.
    pub worst: f64,
    /// What it may be.
    pub limit: f64,
}

impl Finding {
    /// Whether it is within the limit.
    #[must_use]
    pub fn right(&self) -> bool {
        self.worst <= self.limit
    }
}

/// Rows, inner width and columns of the products.
const PRODUCTS: [[usize; 3]; 7] =
    [[1, 1, 1], [3, 5, 7], [1, 300, 129], [33, 65, 17], [64, 64, 64], [130, 257, 63], [256, 128, 320]];

/// Widths of the softmax.
const WIDTHS: [usize; 6] = [1, 7, 33, 128, 1000, 4099];

/// Computes everything on `device` and compares.
#[must_use]
pub fn compute(device: &Device) -> Vec<Finding> {
    let policy = Policy::of(device);
    let tolerance = Tolerance::of_kind(policy.kind);
    let mut findings = Vec::new();
    for [m, k, n] in PRODUCTS {
        findings.push(product([m, k, n], FloatDType::F32, tolerance.operation, device));
    }
    findings.push(attention_like(tolerance.operation, device));
    findings.extend(WIDTHS.map(|width| normalised(width, tolerance.operation, device)));
    findings.push(column_sums(tolerance.operation, device));
    findings.extend(gradients(tolerance.operation, device));
    for half in policy.halves(device) {
        findings.push(match policy.wide_activations {
            true => widened(half, tolerance.operation, device),
            false => product([130, 257, 63], half, tolerance.half_operation, device),
        });
    }
    findings
}

/// Numbers in [-1, 1), the same everywhere; `key` tells one tensor from another.
fn numbers(count: usize, key: u64) -> Vec<f32> {
    let mut draws = crate::random::stream(1, "known answer", key);
    (0..count).map(|_| draws.random_range(-1.0f32..1.0)).collect()
}

fn tensor<const D: usize>(values: &[f32], shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values.to_vec(), shape), (device, DType::F32))
}

fn finding<const D: usize>(name: String, found: Tensor<D>, expected: &[f64], limit: f64) -> Finding {
    let found = cast(found, DType::F32).into_data().try_to_vec::<f32>().unwrap_or_default();
    let scale = expected.iter().fold(f64::MIN_POSITIVE, |m, v| m.max(v.abs()));
    let off = |(f, e): (&f32, &f64)| {
        let off = (f64::from(*f) - e).abs() / scale;
        if off.is_finite() { off } else { f64::MAX }
    };
    let worst = found.iter().zip(expected).map(off).fold(0.0, f64::max);
    let worst = if found.len() == expected.len() { worst } else { f64::MAX };
    Finding { name, worst, limit }
}

/// `a b` in f64; `a` is `[m, k]`, `b` `[k, n]`.
fn matmul(a: &[f64], b: &[f64], [m, k, n]: [usize; 3]) -> Vec<f64> {
    let mut out = vec![0.0; m * n];
    for row in 0..m {
        for inner in 0..k {
            let left = a[row * k + inner];
            for column in 0..n {
                out[row * n + column] += left * b[inner * n + column];
            }
        }
    }
    out
}

fn transposed(a: &[f64], rows: usize, columns: usize) -> Vec<f64> {
    (0..columns).flat_map(|c| (0..rows).map(move |r| a[r * columns + c])).collect()
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

/// `values` as `dtype` holds them.
fn rounded(values: &[f32], dtype: FloatDType) -> Vec<f32> {
    let round = |v: &f32| match dtype {
        FloatDType::BF16 => half::bf16::from_f32(*v).to_f32(),
        FloatDType::F16 => half::f16::from_f32(*v).to_f32(),
        _ => *v,
    };
    values.iter().map(round).collect()
}

fn product([m, k, n]: [usize; 3], dtype: FloatDType, limit: f64, device: &Device) -> Finding {
    let (a, b) = (rounded(&numbers(m * k, 0), dtype), rounded(&numbers(k * n, 1), dtype));
    let found = tensor(&a, [m, k], device).cast(dtype).matmul(tensor(&b, [k, n], device).cast(dtype));
    let name = format!("{m}x{k} by {k}x{n} in {}", crate::weights::torch_dtype(dtype));
    finding(name, found, &matmul(&wide(&a), &wide(&b), [m, k, n]), limit)
}

/// Activations in f32 by a weight that is held in a half type, turned as in checkpoints.
fn widened(dtype: FloatDType, limit: f64, device: &Device) -> Finding {
    let [m, k, n] = [37, 130, 65];
    let (a, b) = (numbers(m * k, 2), rounded(&numbers(n * k, 3), dtype));
    let weight = tensor(&b, [n, k], device).cast(dtype).transpose();
    let found = crate::nn::linear::product(tensor(&a, [m, k], device), weight, None);
    let name = format!("{m}x{k} by {k}x{n} held in {}", crate::weights::torch_dtype(dtype));
    finding(name, found, &matmul(&wide(&a), &transposed(&wide(&b), n, k), [m, k, n]), limit)
}

/// A batch of products with the second factor turned, as scores of attention are.
fn attention_like(limit: f64, device: &Device) -> Finding {
    let ([batch, heads], [m, k, n]) = ([2, 3], [33, 16, 47]);
    let (a, b) = (numbers(batch * heads * m * k, 4), numbers(batch * heads * n * k, 5));
    let found =
        tensor(&a, [batch, heads, m, k], device).matmul(tensor(&b, [batch, heads, n, k], device).swap_dims(2, 3));
    let (a, b) = (wide(&a), wide(&b));
    let pairs = a.chunks(m * k).zip(b.chunks(n * k));
    let expected: Vec<f64> = pairs.flat_map(|(a, b)| matmul(a, &transposed(b, n, k), [m, k, n])).collect();
    finding(format!("{} products {m}x{k} by {k}x{n}, turned", batch * heads), found, &expected, limit)
}

fn softmax_rows(values: &[f64], width: usize) -> Vec<f64> {
    let row = |row: &[f64]| {
        let largest = row.iter().fold(f64::NEG_INFINITY, |m, v| m.max(*v));
        let exp: Vec<f64> = row.iter().map(|v| (v - largest).exp()).collect();
        let sum: f64 = exp.iter().sum();
        exp.into_iter().map(move |e| e / sum).collect::<Vec<_>>()
    };
    values.chunks(width).flat_map(row).collect()
}

fn normalised(width: usize, limit: f64, device: &Device) -> Finding {
    let rows = 5;
    let values: Vec<f32> = numbers(rows * width, 6).into_iter().map(|v| 8.0 * v).collect();
    let found = softmax(tensor(&values, [rows, width], device), 1);
    finding(format!("softmax over {width}"), found, &softmax_rows(&wide(&values), width), limit)
}

/// A reduction over the dimension that is not contiguous.
fn column_sums(limit: f64, device: &Device) -> Finding {
    let (rows, width) = (515, 37);
    let values = numbers(rows * width, 7);
    let found = tensor(&values, [rows, width], device).sum_dim(0);
    let sum = |column: usize| (0..rows).map(|r| f64::from(values[r * width + column])).sum();
    finding(format!("sums over {rows} rows"), found, &(0..width).map(sum).collect::<Vec<f64>>(), limit)
}

/// Gradients of the cross-entropy of two layers with a sigmoid unit between them.
fn gradients(limit: f64, device: &Device) -> [Finding; 2] {
    let [rows, inner, hidden, classes] = [37, 65, 33, 17];
    let x = numbers(rows * inner, 8);
    let (first, second) = (numbers(inner * hidden, 9), numbers(hidden * classes, 10));
    let labels: Vec<i32> = (0..rows).map(|r| ((r * 7) % classes) as i32).collect();

    let ad = device.clone().autodiff();
    let w1 = tensor(&first, [inner, hidden], &ad).require_grad();
    let w2 = tensor(&second, [hidden, classes], &ad).require_grad();
    let z = tensor(&x, [rows, inner], &ad).matmul(w1.clone());
    let y = burn::tensor::activation::silu(z).matmul(w2.clone());
    let targets = Tensor::<2, Int>::from_data(TensorData::new(labels.clone(), [rows, 1]), &ad);
    let loss = burn::tensor::activation::log_softmax(y, 1).gather(1, targets).sum().neg();
    let mut found = loss.backward();
    let grads = [&w1, &w2].map(|w| w.grad_remove(&mut found).expect("the loss depends on both weights"));

    let (x, first, second) = (wide(&x), wide(&first), wide(&second));
    let z = matmul(&x, &first, [rows, inner, hidden]);
    let sigmoid = |v: f64| 1.0 / (1.0 + (-v).exp());
    let h: Vec<f64> = z.iter().map(|v| v * sigmoid(*v)).collect();
    let mut dy = softmax_rows(&matmul(&h, &second, [rows, hidden, classes]), classes);
    for (row, label) in labels.iter().enumerate() {
        dy[row * classes + *label as usize] -= 1.0;
    }
    let dw2 = matmul(&transposed(&h, rows, hidden), &dy, [hidden, rows, classes]);
    let dh = matmul(&dy, &transposed(&second, hidden, classes), [rows, classes, hidden]);
    let slope = |v: f64| sigmoid(v) * (1.0 + v * (1.0 - sigmoid(v)));
    let dz: Vec<f64> = dh.iter().zip(&z).map(|(d, v)| d * slope(*v)).collect();
    let dw1 = matmul(&transposed(&x, rows, inner), &dz, [inner, rows, hidden]);

    let [g1, g2] = grads;
    [
        finding("gradient of a first layer".into(), g1, &dw1, limit),
        finding("gradient of a second layer".into(), g2, &dw2, limit),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_device_of_the_tests_computes_known_answers_right() {
        let device = crate::device::DeviceSpec::from_env().unwrap().open().unwrap();
        let findings = compute(&device);
        assert!(findings.len() >= PRODUCTS.len() + WIDTHS.len() + 4);
        for f in findings {
            assert!(f.right(), "{f:?}");
        }
    }

    #[test]
    fn a_wrong_a_missing_and_a_senseless_number_are_seen() {
        let device = Device::flex();
        let check =
            |values: &[f32]| finding("x".into(), tensor(values, [values.len()], &device), &[1.0, -2.0, 0.5], 1e-5);
        assert!(check(&[1.0, -2.0, 0.5]).right());
        for wrong in [&[1.0, -2.0, 0.5001][..], &[1.0, -2.0], &[1.0, f32::NAN, 0.5], &[f32::INFINITY, -2.0, 0.5]] {
            let found = check(wrong);
            assert!(!found.right(), "{found:?}");
            let text = serde_json::to_string(&found).unwrap();
            assert_eq!(serde_json::from_str::<Finding>(&text).unwrap(), found);
        }
    }
}

//! Singular vectors and orthogonal bases of weights, for updates that start from the weight.
//!
//! Small and exact on the host in f64: one-sided Jacobi rotations (Hestenes) and Gram-Schmidt done twice. For large
//! matrices a few leading vectors by iteration (Halko, Martinsson and Tropp, arXiv 0909.4061), whose products run on the
//! device in f32, as PyTorch's `svd_lowrank` does.

use burn::tensor::{DType, Tensor, TensorData};
use rand::Rng;

/// Smaller side up to which all singular vectors are computed: above it the rotations take minutes a matrix.
pub const EXACT: usize = 1024;

/// A matrix in host memory.
#[derive(Debug, Clone)]
pub struct Matrix {
    rows: usize,
    columns: usize,
    /// Row-major.
    values: Vec<f64>,
}

impl Matrix {
    /// From f32 values, row-major.
    #[must_use]
    pub fn new(rows: usize, columns: usize, data: TensorData) -> Self {
        let values: Vec<f32> = data.try_to_vec().expect("converted to f32");
        Self { rows, columns, values: values.into_iter().map(f64::from).collect() }
    }

    fn row(&self, i: usize) -> &[f64] {
        &self.values[i * self.columns..][..self.columns]
    }

    fn transposed(&self) -> Self {
        let (rows, columns) = (self.columns, self.rows);
        let values = (0..rows * columns).map(|i| self.values[(i % columns) * self.columns + i / columns]).collect();
        Self { rows, columns, values }
    }
}

/// Singular values in descending order, with their vectors.
#[derive(Debug, Clone)]
pub struct Singular {
    /// The values.
    pub values: Vec<f64>,
    left: Vec<Vec<f64>>,
    right: Vec<Vec<f64>>,
}

impl Singular {
    /// Component `i` of left vector `j`; 0 beyond the rank.
    #[must_use]
    pub fn left(&self, i: usize, j: usize) -> f64 {
        self.left.get(j).map_or(0.0, |v| v[i])
    }

    /// Component `i` of right vector `j`; 0 beyond the rank.
    #[must_use]
    pub fn right(&self, i: usize, j: usize) -> f64 {
        self.right.get(j).map_or(0.0, |v| v[i])
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// Adds `factor` times `b` to `a`.
fn add_scaled(a: &mut [f64], b: &[f64], factor: f64) {
    a.iter_mut().zip(b).for_each(|(x, y)| *x += factor * y);
}

/// All singular values and vectors of `matrix`.
#[must_use]
pub fn singular(matrix: &Matrix) -> Singular {
    if matrix.rows < matrix.columns {
        let Singular { values, left, right } = singular(&matrix.transposed());
        return Singular { values, left: right, right: left };
    }
    // Columns become orthogonal by rotations of pairs, which are collected in `turns`.
    let turned = matrix.transposed();
    let mut columns: Vec<Vec<f64>> = (0..matrix.columns).map(|j| turned.row(j).to_vec()).collect();
    let n = columns.len();
    let mut turns: Vec<Vec<f64>> = (0..n).map(|j| (0..n).map(|i| f64::from(u8::from(i == j))).collect()).collect();
    for _ in 0..60 {
        let mut still = true;
        for p in 0..n {
            for q in p + 1..n {
                let (alpha, beta) = (dot(&columns[p], &columns[p]), dot(&columns[q], &columns[q]));
                let gamma = dot(&columns[p], &columns[q]);
                if gamma.abs() <= 1e-15 * (alpha * beta).sqrt() {
                    continue;
                }
                still = false;
                let zeta = (beta - alpha) / (2.0 * gamma);
                let t = zeta.signum() / (zeta.abs() + (1.0 + zeta * zeta).sqrt());
                let c = 1.0 / (1.0 + t * t).sqrt();
                rotate(&mut columns, p, q, c, c * t);
                rotate(&mut turns, p, q, c, c * t);
            }
        }
        if still {
            break;
        }
    }
    let lengths: Vec<f64> = columns.iter().map(|c| dot(c, c).sqrt()).collect();
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|a, b| lengths[*b].total_cmp(&lengths[*a]));
    let unit = |j: usize| columns[j].iter().map(|x| if lengths[j] > 0.0 { x / lengths[j] } else { 0.0 }).collect();
    Singular {
        values: order.iter().map(|j| lengths[*j]).collect(),
        left: order.iter().map(|j| unit(*j)).collect(),
        right: order.iter().map(|j| turns[*j].clone()).collect(),
    }
}

fn rotate(vectors: &mut [Vec<f64>], p: usize, q: usize, c: f64, s: f64) {
    let (front, back) = vectors.split_at_mut(q);
    for (x, y) in front[p].iter_mut().zip(&mut back[0]) {
        (*x, *y) = (c * *x - s * *y, s * *x + c * *y);
    }
}

/// Makes `vectors` orthonormal, one after the other; what depends on those before it becomes zero.
fn orthonormal(vectors: &mut [Vec<f64>]) {
    for k in 0..vectors.len() {
        let (before, rest) = vectors.split_at_mut(k);
        let vector = &mut rest[0];
        let length = dot(vector, vector).sqrt();
        // Once leaves a trace of what was taken off where little remains; twice is enough.
        for _ in 0..2 {
            for b in before.iter() {
                let along = dot(b, vector);
                add_scaled(vector, b, -along);
            }
        }
        let left = dot(vector, vector).sqrt();
        let factor = if left > 1e-12 * length { 1.0 / left } else { 0.0 };
        vector.iter_mut().for_each(|x| *x *= factor);
    }
}

/// The first `r` columns of Q and rows of R of the decomposition `M^T = Q R`, as `[r, columns]` and `[rows, r]`,
/// row-major.
#[must_use]
pub fn first_columns(matrix: &Matrix, r: usize) -> (Vec<f32>, Vec<f32>) {
    let mut q: Vec<Vec<f64>> =
        (0..r).map(|i| if i < matrix.rows { matrix.row(i).to_vec() } else { vec![0.0; matrix.columns] }).collect();
    orthonormal(&mut q);
    let rest = (0..matrix.rows).flat_map(|j| q.iter().map(move |q| dot(q, matrix.row(j)) as f32)).collect();
    (q.into_iter().flatten().map(|x| x as f32).collect(), rest)
}

/// The `r` leading singular vectors of `matrix` `[rows, columns]`, approximately, after `niter` iterations from a random
/// start.
#[must_use]
pub fn low_rank(matrix: &Tensor<2>, r: usize, niter: usize, mut start: impl Rng) -> Singular {
    let matrix = if matrix.dtype() == DType::F32 { matrix.clone() } else { matrix.clone().cast(DType::F32) };
    let [rows, columns] = matrix.dims();
    let device = matrix.device();
    let r = r.min(rows).min(columns);
    let tensor = |vectors: &[Vec<f64>]| {
        let values: Vec<f32> = vectors.iter().flatten().map(|x| *x as f32).collect();
        let shape = [vectors.len(), values.len() / vectors.len().max(1)];
        Tensor::<2>::from_data(TensorData::new(values, shape), &device)
    };
    let host = |t: Tensor<2>| -> Vec<Vec<f64>> {
        let width = t.dims()[1].max(1);
        let values: Vec<f32> = t.into_data().try_to_vec().expect("of type f32");
        values.chunks(width).map(|row| row.iter().map(|x| f64::from(*x)).collect()).collect()
    };
    // Vectors are rows: `x M^T` is `M x`.
    let apply = |vectors: &[Vec<f64>]| host(tensor(vectors).matmul(matrix.clone().transpose()));
    let apply_transposed = |vectors: &[Vec<f64>]| host(tensor(vectors).matmul(matrix.clone()));
    let mut uniform = || f64::from(start.next_u32()) / f64::from(u32::MAX) - 0.5;
    let random: Vec<Vec<f64>> = (0..r).map(|_| (0..columns).map(|_| uniform()).collect()).collect();
    let mut basis = apply(&random);
    orthonormal(&mut basis);
    for _ in 0..niter {
        let mut other = apply_transposed(&basis);
        orthonormal(&mut other);
        basis = apply(&other);
        orthonormal(&mut basis);
    }
    // M is close to Q (Q^T M); the small factor is decomposed exactly.
    let small = apply_transposed(&basis);
    let small = Matrix { rows: r, columns, values: small.into_iter().flatten().collect() };
    let Singular { values, left, right } = singular(&small);
    let lift = |v: &Vec<f64>| {
        let mut out = vec![0.0; rows];
        v.iter().zip(&basis).for_each(|(x, b)| add_scaled(&mut out, b, *x));
        out
    };
    Singular { values, left: left.iter().map(lift).collect(), right }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    fn random(rows: usize, columns: usize) -> Matrix {
        let mut draws = crate::random::stream(3, "decompose", (rows * 100 + columns) as u64);
        let values = (0..rows * columns).map(|_| f64::from(draws.next_u32()) / f64::from(u32::MAX) - 0.5).collect();
        Matrix { rows, columns, values }
    }

    /// Largest difference of `matrix` from the sum of its first `k` parts.
    fn off(matrix: &Matrix, s: &Singular, k: usize) -> f64 {
        let part = |i: usize, j: usize| (0..k).map(|m| s.values[m] * s.left(i, m) * s.right(j, m)).sum::<f64>();
        let cells = (0..matrix.rows).flat_map(|i| (0..matrix.columns).map(move |j| (i, j)));
        cells.map(|(i, j)| (part(i, j) - matrix.row(i)[j]).abs()).fold(0.0, f64::max)
    }

    #[test]
    fn singular_vectors_rebuild_the_matrix_and_are_orthonormal() {
        for (rows, columns) in [(7, 5), (5, 7), (6, 6), (1, 4), (9, 1)] {
            let matrix = random(rows, columns);
            let s = singular(&matrix);
            let k = rows.min(columns);
            assert_eq!(s.values.len(), k);
            assert!(s.values.windows(2).all(|w| w[0] >= w[1]));
            assert!(off(&matrix, &s, k) < 1e-13);
            for (a, b) in (0..k).flat_map(|a| (0..k).map(move |b| (a, b))) {
                let expected = f64::from(u8::from(a == b));
                assert!((dot(&s.left[a], &s.left[b]) - expected).abs() < 1e-12);
                assert!((dot(&s.right[a], &s.right[b]) - expected).abs() < 1e-12);
            }
        }
    }

    #[test]
    fn a_matrix_of_lower_rank_has_zero_values() {
        let mut matrix = random(6, 4);
        let row = matrix.row(0).to_vec();
        for i in 1..6 {
            for (j, x) in row.iter().enumerate() {
                matrix.values[i * 4 + j] = x * i as f64;
            }
        }
        let s = singular(&matrix);
        assert!(s.values[1..].iter().all(|v| *v < 1e-13) && off(&matrix, &s, 1) < 1e-13);
    }

    #[test]
    fn iteration_finds_the_leading_vectors() {
        let matrix = random(40, 30);
        let exact = singular(&matrix);
        let values = matrix.values.iter().map(|x| *x as f32).collect();
        let tensor = Tensor::<2>::from_data(TensorData::new::<f32, _>(values, [40, 30]), &Device::flex());
        let found = low_rank(&tensor, 4, 60, crate::random::stream(3, "start", 0));
        for k in 0..3 {
            assert!((found.values[k] - exact.values[k]).abs() < 1e-3 * exact.values[0], "{k}");
            let along = dot(&found.left[k], &exact.left[k]) * dot(&found.right[k], &exact.right[k]);
            assert!(along > 0.99, "{k}: {along}");
        }
        assert_eq!(found.values.len(), 4);
    }

    #[test]
    fn sixteen_iterations_are_as_good_as_exact_above_the_limit() {
        // A spectrum that falls slowly, with known vectors: 0.93^k.
        let (rows, columns, rank, r) = (EXACT + 76, EXACT + 26, 60, 16);
        let vectors = |n: usize, name: &str| {
            let mut draws = crate::random::stream(5, name, 0);
            let mut all: Vec<Vec<f64>> = (0..rank)
                .map(|_| (0..n).map(|_| f64::from(draws.next_u32()) / f64::from(u32::MAX) - 0.5).collect())
                .collect();
            orthonormal(&mut all);
            all
        };
        let (left, right) = (vectors(rows, "left"), vectors(columns, "right"));
        let value = |k: usize| 0.93f64.powi(k as i32);
        let mut values = vec![0f64; rows * columns];
        for (i, row) in values.chunks_mut(columns).enumerate() {
            (0..rank).for_each(|k| add_scaled(row, &right[k], value(k) * left[k][i]));
        }
        let floats = values.iter().map(|x| *x as f32).collect();
        let tensor = Tensor::<2>::from_data(TensorData::new::<f32, _>(floats, [rows, columns]), &Device::flex());
        let found = low_rank(&tensor, r, 16, crate::random::stream(3, "start", 0));
        let largest = (0..r).map(|k| (found.values[k] / value(k) - 1.0).abs()).fold(0.0, f64::max);
        assert!(largest < 0.02, "singular values are off by {largest}");
        // What is left may be little more than what the best approximation of this rank leaves.
        let mut rest = values.clone();
        for (i, row) in rest.chunks_mut(columns).enumerate() {
            (0..r).for_each(|k| add_scaled(row, &found.right[k], -found.values[k] * found.left[k][i]));
        }
        let best = (r..rank).map(|k| value(k).powi(2)).sum::<f64>().sqrt();
        let left_over = dot(&rest, &rest).sqrt();
        assert!(left_over < 1.01 * best && left_over > 0.999 * best, "{left_over} {best}");
    }

    #[test]
    fn first_columns_span_the_first_rows() {
        let matrix = random(8, 6);
        let (q, rest) = first_columns(&matrix, 3);
        // Q R has the first rows of M as its first columns.
        for i in 0..3 {
            for j in 0..6 {
                let found: f64 = (0..3).map(|k| f64::from(rest[i * 3 + k]) * f64::from(q[k * 6 + j])).sum();
                assert!((found - matrix.row(i)[j]).abs() < 1e-6);
            }
        }
        assert!(rest[1].abs() < 1e-7 && rest[5].abs() < 1e-7, "R is upper triangular");
    }
}

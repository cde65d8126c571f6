//! Activations in f32 times a frozen weight that stays in bf16 or f16.
//!
//! On the CPU the weights of a large model stay in the type of their checkpoint, often in a memory map of the file.
//! Burn's Flex backend multiplies equal types only, and a bf16 product converts the whole matrix, on one core, at each
//! call. Here a panel of a few megabytes at a time becomes f32, which is exact, and the product is that of f32 weights.
//! Few rows (a cached step of generation) are multiplied straight from the half type, at the speed of memory.

use burn::{
    backend::{
        Autodiff, Backend, Dispatch, Flex,
        autodiff::{
            checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
            grads::Gradients,
            ops::{Backward, Ops, OpsKind},
        },
        backend_extension,
        flex::{FlexTensor, Layout},
        tensor::FloatTensor,
    },
    tensor::{DType, FloatDType, Shape, Tensor, bf16, f16},
};
use rayon::prelude::*;

use super::flex::{self, LANES, vectorized};

/// Values of the panel that is f32 at one time: 16 MiB.
const PANEL: usize = 1 << 22;

/// Rows of activations up to which the weight is read straight from its half type.
const FEW: usize = 8;

/// `x weight`, where the weight is of a half type; f32. Gradients flow to `x` alone: the weight is frozen.
///
/// # Shapes
/// `x` `[rows, d_input]`, `weight` `[d_input, d_output]` -> `[rows, d_output]`
#[must_use]
pub fn half_linear(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    let ([_, inner], [d_input, _]) = (x.dims(), weight.dims());
    assert_eq!(inner, d_input, "half_linear: x {:?} and weight {:?}", x.dims(), weight.dims());
    Tensor::from_dispatch(Dispatch::half_linear(x.into_dispatch(), weight.into_dispatch()))
}

/// The operation and its gradient.
#[backend_extension(Flex, Cube: cfg(feature = "gpu"), Fusion: cfg(feature = "gpu"), Autodiff)]
pub trait HalfLinearOps: Backend {
    /// `x weight`.
    #[fusion(default)]
    fn half_linear(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::float_matmul(x, Self::float_cast(weight, FloatDType::F32))
    }

    /// Gradient of `x`: `grad weight^T`.
    #[fusion(default)]
    fn half_linear_backward(grad: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::float_matmul(grad, Self::float_swap_dims(Self::float_cast(weight, FloatDType::F32), 0, 1))
    }
}

#[cfg(feature = "gpu")]
impl HalfLinearOps for burn_cubecl::CubeBackend {}

#[derive(Debug)]
struct HalfLinearBackward;

impl<B: HalfLinearOps> Backward<B, 1> for HalfLinearBackward {
    type State = FloatTensor<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let [node] = ops.parents;
        let grad = grads.consume::<B>(&ops.node);
        if let Some(node) = node {
            grads.register::<B>(node.id, B::half_linear_backward(grad, ops.state));
        }
    }
}

impl<B: HalfLinearOps, C: CheckpointStrategy> HalfLinearOps for Autodiff<B, C> {
    fn half_linear(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        let weight = weight.into_primitive();
        match HalfLinearBackward.prepare::<C>([x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let out = B::half_linear(x.into_primitive(), weight.clone());
                prep.finish(weight, out)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::half_linear(x.into_primitive(), weight)),
        }
    }
}

impl HalfLinearOps for Flex {
    fn half_linear(x: FlexTensor, weight: FlexTensor) -> FlexTensor {
        product(x, weight, false)
    }

    fn half_linear_backward(grad: FlexTensor, weight: FlexTensor) -> FlexTensor {
        product(grad, weight, true)
    }
}

/// `x weight`, or `x weight^T`.
fn product(x: FlexTensor, weight: FlexTensor, transposed: bool) -> FlexTensor {
    let (matrix, turned) = Matrix::open(weight);
    let x = x.to_contiguous();
    match matrix.weight.dtype() {
        DType::BF16 if turned == transposed => matrix.times::<bf16>(&x),
        DType::BF16 => matrix.times_transposed::<bf16>(&x),
        DType::F16 if turned == transposed => matrix.times::<f16>(&x),
        DType::F16 => matrix.times_transposed::<f16>(&x),
        other => unreachable!("half_linear is called for half types alone, not {other:?}"),
    }
}

/// A half type that becomes f32 without rounding.
trait Half: Copy + Send + Sync {
    fn storage(tensor: &FlexTensor) -> &[Self];

    fn widen(self) -> f32;
}

impl Half for bf16 {
    fn storage(tensor: &FlexTensor) -> &[Self] {
        tensor.storage()
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

impl Half for f16 {
    fn storage(tensor: &FlexTensor) -> &[Self] {
        tensor.storage()
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
}

/// A matrix whose rows lie one behind the other.
struct Matrix {
    weight: FlexTensor,
    rows: usize,
    columns: usize,
    /// Its first element in the storage.
    start: usize,
}

impl Matrix {
    /// The weight as it lies in memory, and whether that is its transpose, as checkpoints have it.
    fn open(weight: FlexTensor) -> (Self, bool) {
        let [d_input, d_output] = weight.layout().shape().dims();
        let strides = weight.layout().strides();
        let turned = strides[0] == 1 && strides[1] == d_input as isize && !weight.is_contiguous();
        let weight = if turned { weight } else { weight.to_contiguous() };
        let (rows, columns) = if turned { (d_output, d_input) } else { (d_input, d_output) };
        let start = weight.layout().start_offset();
        (Self { weight, rows, columns, start }, turned)
    }

    fn values<H: Half>(&self) -> &[H] {
        &H::storage(&self.weight)[self.start..][..self.rows * self.columns]
    }

    /// Rows that become f32 at one time.
    fn panel(&self) -> usize {
        (PANEL / self.columns.max(1)).clamp(1, self.rows.max(1))
    }

    /// `x M^T`: `[n, columns]` -> `[n, rows]`
    fn times_transposed<H: Half>(&self, x: &FlexTensor) -> FlexTensor {
        let n = x.layout().shape()[0];
        let mut out = vec![0f32; n * self.rows];
        if n <= FEW {
            self.dots::<H>(flex::slice(x), n, &mut out);
        } else {
            let values = self.values::<H>();
            for (index, panel) in values.chunks(self.panel() * self.columns.max(1)).enumerate() {
                let (first, height) = (index * self.panel(), panel.len() / self.columns);
                let panel = widened(panel, [height, self.columns]);
                let part = matmul::<Flex>(x.clone(), panel.transpose(0, 1)).to_contiguous();
                let part = flex::slice(&part);
                out.par_chunks_mut(self.rows)
                    .zip(part.par_chunks(height))
                    .for_each(|(out, part)| out[first..first + height].copy_from_slice(part));
            }
        }
        flex::tensor(out, Shape::new([n, self.rows]))
    }

    /// `x M`: `[n, rows]` -> `[n, columns]`
    fn times<H: Half>(&self, x: &FlexTensor) -> FlexTensor {
        let n = x.layout().shape()[0];
        let (values, x) = (self.values::<H>(), flex::slice(x));
        let mut sum: Option<FlexTensor> = None;
        for (index, panel) in values.chunks(self.panel() * self.columns.max(1)).enumerate() {
            let (first, height) = (index * self.panel(), panel.len() / self.columns);
            let mut part = vec![0f32; n * height];
            for (part, x) in part.chunks_mut(height).zip(x.chunks(self.rows)) {
                part.copy_from_slice(&x[first..first + height]);
            }
            let part = flex::tensor(part, Shape::new([n, height]));
            let product = matmul::<Flex>(part, widened(panel, [height, self.columns]));
            sum = Some(match sum {
                None => product,
                Some(sum) => add::<Flex>(sum, product),
            });
        }
        sum.unwrap_or_else(|| flex::tensor(vec![0f32; n * self.columns], Shape::new([n, self.columns])))
    }

    /// `x M^T` for few rows of `x`: every row of the matrix is read once.
    fn dots<H: Half>(&self, x: &[f32], n: usize, out: &mut [f32]) {
        let (columns, values) = (self.columns.max(1), self.values::<H>());
        // rows first, so that a task owns what it writes
        let mut turned = vec![0f32; self.rows * n];
        let height = (flex::CHUNK / columns).max(1);
        turned.par_chunks_mut(height * n.max(1)).zip(values.par_chunks(height * columns)).for_each(|(out, rows)| {
            vectorized!(dot_rows(rows, x, out, columns, n));
        });
        for (row, results) in turned.chunks(n.max(1)).enumerate() {
            for (i, result) in results.iter().enumerate() {
                out[i * self.rows + row] = *result;
            }
        }
    }
}

#[inline(always)]
fn dot_rows<const FMA: bool>(rows: &[impl Half], x: &[f32], out: &mut [f32], columns: usize, n: usize) {
    for (row, out) in rows.chunks(columns).zip(out.chunks_mut(n)) {
        for (x, out) in x.chunks(columns).zip(out) {
            *out = dot::<FMA>(row, x);
        }
    }
}

#[inline(always)]
fn dot<const FMA: bool>(a: &[impl Half], b: &[f32]) -> f32 {
    let mut lanes = [0f32; 2 * LANES];
    let whole = a.len() / (2 * LANES) * (2 * LANES);
    for (a, b) in a[..whole].chunks_exact(2 * LANES).zip(b[..whole].chunks_exact(2 * LANES)) {
        for (lane, (a, b)) in lanes.iter_mut().zip(a.iter().zip(b)) {
            *lane = flex::mul_add::<FMA>(a.widen(), *b, *lane);
        }
    }
    let rest: f32 = a[whole..].iter().zip(&b[whole..]).map(|(a, b)| a.widen() * b).sum();
    lanes.iter().sum::<f32>() + rest
}

fn matmul<B: Backend>(a: FloatTensor<B>, b: FloatTensor<B>) -> FloatTensor<B> {
    B::float_matmul(a, b)
}

fn add<B: Backend>(a: FloatTensor<B>, b: FloatTensor<B>) -> FloatTensor<B> {
    B::float_add(a, b)
}

/// A panel in f32.
fn widened<H: Half>(panel: &[H], shape: [usize; 2]) -> FlexTensor {
    let mut values = vec![0f32; panel.len()];
    values.par_chunks_mut(flex::CHUNK).zip(panel.par_chunks(flex::CHUNK)).for_each(|(out, panel)| {
        vectorized!(widen_chunk(panel, out));
    });
    FlexTensor::new(burn::tensor::Bytes::from_elems(values), Layout::contiguous(Shape::new(shape)), DType::F32)
}

#[inline(always)]
fn widen_chunk<const FMA: bool>(panel: &[impl Half], out: &mut [f32]) {
    for (out, value) in out.iter_mut().zip(panel) {
        *out = value.widen();
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::{
        super::tests::{difference, values},
        *,
    };

    /// Value and gradient of `x`.
    fn run(op: impl Fn(Tensor<2>, Tensor<2>) -> Tensor<2>, n: usize, weight: Tensor<2>) -> (Tensor<2>, Tensor<2>) {
        let device = Device::flex().autodiff();
        let [d_input, d_output] = weight.dims();
        let x = values([n, d_input], 0, &device).require_grad();
        let out = op(x.clone(), weight);
        let mut grads = (out.clone() * values([n, d_output], 1, &device)).sum().backward();
        (out.without_autodiff(), x.grad_remove(&mut grads).expect("tracked"))
    }

    #[test]
    fn panels_and_few_rows_equal_the_widened_weight() {
        let device = Device::flex();
        for dtype in [DType::BF16, DType::F16] {
            // 5000 columns make several panels of the larger matrix
            for (d_input, d_output) in [(37, 50), (64, 33), (5000, 900)] {
                for n in [1, 3, FEW + 4] {
                    let stored = values([d_output, d_input], 2, &device).cast(FloatDType::from(dtype));
                    let wide = stored.clone().cast(FloatDType::F32).transpose();
                    let as_file = stored.clone().transpose();
                    let as_module = stored.transpose().reshape([d_input * d_output]).reshape([d_input, d_output]);
                    let expected = run(Tensor::matmul, n, wide);
                    for weight in [as_file, as_module] {
                        let found = run(half_linear, n, weight);
                        assert!(difference(found.0, expected.0.clone()) < 1e-5, "{d_input}x{d_output}, {n} rows");
                        assert!(difference(found.1, expected.1.clone()) < 1e-5, "{d_input}x{d_output}, {n} rows");
                    }
                }
            }
        }
    }

    #[test]
    fn a_part_of_a_weight_is_read_where_it_lies() {
        let device = Device::flex();
        let all = values([12, 20], 3, &device).cast(FloatDType::BF16);
        let part = all.clone().narrow(0, 4, 6).transpose();
        let wide = all.cast(FloatDType::F32).narrow(0, 4, 6).transpose();
        let x = values([2, 20], 4, &device);
        assert!(difference(half_linear(x.clone(), part), x.matmul(wide)) < 1e-5);
    }
}

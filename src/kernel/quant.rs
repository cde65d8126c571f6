//! Activations in f32 times a frozen weight in [blocks of few bits](super::blocks).
//!
//! The weight stays packed; a panel of a few megabytes at a time becomes f32, forward and backward, and the product is
//! that of the unpacked weight. Few rows (a cached step of generation) unpack a row of the weight and drop it again.

use std::sync::Arc;

use burn::{
    backend::{
        Autodiff, Backend, Dispatch, Flex, TensorMetadata,
        autodiff::{
            checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
            grads::Gradients,
            ops::{Backward, Ops, OpsKind},
        },
        backend_extension,
        flex::FlexTensor,
        tensor::FloatTensor,
    },
    tensor::{DType, Device, Shape, Tensor, TensorData},
};
use rayon::prelude::*;

use super::{
    blocks::{Blocks, Format},
    flex,
};

/// Values of the panel that is f32 at one time: 16 MiB.
pub const PANEL: usize = 1 << 22;

/// Rows of activations up to which the weight is unpacked row by row.
const FEW: usize = 8;

/// The weight of a `Linear` in blocks, `[d_output, d_input]` row-major as in checkpoints.
#[derive(Debug, Clone)]
pub struct Packed {
    blocks: Blocks,
    d_output: usize,
    d_input: usize,
}

impl Packed {
    /// Packs a weight.
    ///
    /// # Shapes
    /// `[d_input, d_output]`
    #[must_use]
    pub fn new(weight: Tensor<2>, format: Format) -> Self {
        let [d_input, d_output] = weight.dims();
        // The transpose of a view of a file is the file's own order.
        let data = weight.transpose().into_data();
        let data = if data.dtype() == DType::F32 { data } else { data.convert::<f32>() };
        let values = data.as_slice::<f32>().expect("converted to f32");
        Self { blocks: Blocks::pack(format, values), d_output, d_input }
    }

    /// Bytes in memory.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        self.blocks.num_bytes()
    }

    /// The weight, unpacked.
    ///
    /// # Shapes
    /// `[d_input, d_output]`
    #[must_use]
    pub fn dense(&self, device: &Device) -> Tensor<2> {
        let values = self.panel(0, self.d_output);
        Tensor::<2>::from_data(TensorData::new(values, [self.d_output, self.d_input]), (device, DType::F32)).transpose()
    }

    /// Rows `first..first + height` in f32.
    fn panel(&self, first: usize, height: usize) -> Vec<f32> {
        let start = first * self.d_input;
        let mut values = vec![0f32; height * self.d_input];
        values.par_chunks_mut(flex::CHUNK).enumerate().for_each(|(i, part)| {
            let at = start + i * flex::CHUNK;
            self.blocks.unpack(at..at + part.len(), part);
        });
        values
    }

    /// Panels: first row and number of rows.
    fn panels(&self) -> impl Iterator<Item = (usize, usize)> {
        let height = (PANEL / self.d_input.max(1)).clamp(1, self.d_output.max(1));
        (0..self.d_output).step_by(height).map(move |first| (first, height.min(self.d_output - first)))
    }

    /// `x W`: `[n, d_input]` -> `[n, d_output]`
    fn forward(&self, x: &FlexTensor) -> FlexTensor {
        let n = x.layout().shape()[0];
        let mut out = vec![0f32; n * self.d_output];
        if n <= FEW {
            self.rows(flex::slice(x), n, &mut out);
        } else {
            for (first, height) in self.panels() {
                let panel = flex::tensor(self.panel(first, height), Shape::new([height, self.d_input]));
                let part = matmul::<Flex>(x.clone(), panel.transpose(0, 1)).to_contiguous();
                let part = flex::slice(&part);
                out.par_chunks_mut(self.d_output)
                    .zip(part.par_chunks(height))
                    .for_each(|(out, part)| out[first..first + height].copy_from_slice(part));
            }
        }
        flex::tensor(out, Shape::new([n, self.d_output]))
    }

    /// `x W` for few rows of `x`.
    fn rows(&self, x: &[f32], n: usize, out: &mut [f32]) {
        // rows of the weight first, so that a task owns what it writes
        let mut turned = vec![0f32; self.d_output * n];
        let height = (flex::CHUNK / self.d_input.max(1)).max(1);
        turned.par_chunks_mut(height * n.max(1)).enumerate().for_each(|(task, results)| {
            let mut row = vec![0f32; self.d_input];
            for (k, results) in results.chunks_mut(n).enumerate() {
                let start = (task * height + k) * self.d_input;
                self.blocks.unpack(start..start + self.d_input, &mut row);
                for (x, result) in x.chunks(self.d_input.max(1)).zip(results) {
                    *result = flex::sum(self.d_input, |i| row[i] * x[i]);
                }
            }
        });
        for (row, results) in turned.chunks(n.max(1)).enumerate() {
            for (i, result) in results.iter().enumerate() {
                out[i * self.d_output + row] = *result;
            }
        }
    }

    /// `g W^T`: `[n, d_output]` -> `[n, d_input]`
    fn backward(&self, grad: &FlexTensor) -> FlexTensor {
        let n = grad.layout().shape()[0];
        let values = flex::slice(grad);
        let mut sum: Option<FlexTensor> = None;
        for (first, height) in self.panels() {
            let rows = values.chunks(self.d_output);
            let part: Vec<f32> = rows.flat_map(|row| row[first..first + height].iter().copied()).collect();
            let panel = flex::tensor(self.panel(first, height), Shape::new([height, self.d_input]));
            let product = matmul::<Flex>(flex::tensor(part, Shape::new([n, height])), panel);
            sum = Some(match sum {
                None => product,
                Some(sum) => add::<Flex>(sum, product),
            });
        }
        sum.unwrap_or_else(|| flex::tensor(vec![0f32; n * self.d_input], Shape::new([n, self.d_input])))
    }

    fn on<B: Backend>(&self, x: &FloatTensor<B>) -> FloatTensor<B> {
        let data = TensorData::new(self.panel(0, self.d_output), [self.d_output, self.d_input]);
        B::float_from_data(data, &x.device())
    }
}

/// `x W` with the packed `weight`; f32. Gradients flow to `x` alone: the weight is frozen.
///
/// # Shapes
/// `[.., d_input]` -> `[.., d_output]`
#[must_use]
pub fn packed_linear<const D: usize>(x: Tensor<D>, weight: &Arc<Packed>) -> Tensor<D> {
    let mut dims = x.dims();
    assert_eq!(dims[D - 1], weight.d_input, "packed_linear: x {dims:?}");
    let rows = dims[..D - 1].iter().product::<usize>();
    dims[D - 1] = weight.d_output;
    let x = x.reshape([rows, weight.d_input]).into_dispatch();
    Tensor::<2>::from_dispatch(Dispatch::packed_linear(x, weight.clone())).reshape(dims)
}

/// The operation and its gradient.
#[backend_extension(Flex, Cube: cfg(feature = "gpu"), Fusion: cfg(feature = "gpu"), Autodiff)]
pub trait PackedLinearOps: Backend {
    /// `x W`.
    #[fusion(default)]
    fn packed_linear(x: FloatTensor<Self>, weight: Arc<Packed>) -> FloatTensor<Self> {
        let dense = weight.on::<Self>(&x);
        Self::float_matmul(x, Self::float_swap_dims(dense, 0, 1))
    }

    /// Gradient of `x`: `grad W^T`.
    #[fusion(default)]
    fn packed_linear_backward(grad: FloatTensor<Self>, weight: Arc<Packed>) -> FloatTensor<Self> {
        let dense = weight.on::<Self>(&grad);
        Self::float_matmul(grad, dense)
    }
}

#[cfg(feature = "gpu")]
impl PackedLinearOps for burn_cubecl::CubeBackend {}

#[derive(Debug)]
struct PackedLinearBackward;

impl<B: PackedLinearOps> Backward<B, 1> for PackedLinearBackward {
    type State = Arc<Packed>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let [node] = ops.parents;
        let grad = grads.consume::<B>(&ops.node);
        if let Some(node) = node {
            grads.register::<B>(node.id, B::packed_linear_backward(grad, ops.state));
        }
    }
}

impl<B: PackedLinearOps, C: CheckpointStrategy> PackedLinearOps for Autodiff<B, C> {
    fn packed_linear(x: FloatTensor<Self>, weight: Arc<Packed>) -> FloatTensor<Self> {
        match PackedLinearBackward.prepare::<C>([x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let out = B::packed_linear(x.into_primitive(), weight.clone());
                prep.finish(weight, out)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::packed_linear(x.into_primitive(), weight)),
        }
    }
}

impl PackedLinearOps for Flex {
    fn packed_linear(x: FlexTensor, weight: Arc<Packed>) -> FlexTensor {
        weight.forward(&x.to_contiguous())
    }

    fn packed_linear_backward(grad: FlexTensor, weight: Arc<Packed>) -> FlexTensor {
        weight.backward(&grad.to_contiguous())
    }
}

fn matmul<B: Backend>(a: FloatTensor<B>, b: FloatTensor<B>) -> FloatTensor<B> {
    B::float_matmul(a, b)
}

fn add<B: Backend>(a: FloatTensor<B>, b: FloatTensor<B>) -> FloatTensor<B> {
    B::float_add(a, b)
}

#[cfg(test)]
mod tests {
    use burn::tensor::FloatDType;

    use super::{
        super::tests::{device, difference, halves, values},
        *,
    };

    /// Value and gradient of `x`.
    fn run(op: impl Fn(Tensor<2>) -> Tensor<2>, n: usize, d_input: usize) -> (Tensor<2>, Tensor<2>) {
        let device = device().autodiff();
        let x = values([n, d_input], 0, &device).require_grad();
        let out = op(x.clone());
        let mut grads = (out.clone() * values(out.dims(), 1, &device)).sum().backward();
        (out.without_autodiff(), x.grad_remove(&mut grads).expect("tracked"))
    }

    #[test]
    fn panels_and_few_rows_equal_the_unpacked_weight() {
        let device = device();
        for format in [Format::Int8, Format::Nf4, Format::Nf4Double] {
            // 5000 columns make several panels of the larger matrix
            for (d_input, d_output) in [(37, 50), (64, 33), (5000, 900)] {
                let packed = Arc::new(Packed::new(values([d_input, d_output], 2, &device), format));
                assert_eq!(packed.num_bytes(), format.num_bytes(d_input * d_output));
                let dense = packed.dense(&device);
                for n in [1, 3, FEW + 4] {
                    let found = run(|x| packed_linear(x, &packed), n, d_input);
                    let expected = run(|x| x.matmul(dense.clone()), n, d_input);
                    assert!(difference(found.0, expected.0) < 1e-5, "{d_input}x{d_output}, {n} rows");
                    assert!(difference(found.1, expected.1) < 1e-5, "{d_input}x{d_output}, {n} rows");
                }
            }
        }
    }

    #[test]
    fn a_half_type_is_packed_as_its_values() {
        let device = device();
        for dtype in halves(&device) {
            let half = values([20, 12], 3, &device).cast(dtype);
            let wide = half.clone().cast(FloatDType::F32);
            let view = half.clone().transpose().reshape([240]).reshape([12, 20]).transpose();
            for weight in [half, view] {
                let found = Packed::new(weight, Format::Nf4).dense(&device);
                assert_eq!(difference(found, Packed::new(wide.clone(), Format::Nf4).dense(&device)), 0.0);
            }
        }
    }
}

//! Rotary position embedding, half-split layout: element `i` is rotated with element `i + head_dim / 2`.

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
    tensor::Tensor,
};
use rayon::prelude::*;

use super::flex::{self, vectorized};

/// Positions that one task rotates.
const POSITIONS: usize = 32;

/// Rotates every head by its position's angles. Tables get no gradient.
///
/// # Shapes
/// `x` `[rows, length, heads, head_dim]`, `cos` and `sin` `[rows or 1, length, 1, head_dim / 2]` -> as `x`
#[must_use]
pub fn rotate(x: Tensor<4>, cos: Tensor<4>, sin: Tensor<4>) -> Tensor<4> {
    let [rows, length, _, head_dim] = x.dims();
    let table = cos.dims();
    assert!(
        table == sin.dims()
            && (table[0] == rows || table[0] == 1)
            && table[1..] == [length, 1, head_dim / 2]
            && head_dim % 2 == 0,
        "rotate: x {:?} and tables {table:?}",
        x.dims()
    );
    Tensor::from_dispatch(Dispatch::rotate(x.into_dispatch(), cos.into_dispatch(), sin.into_dispatch()))
}

/// The operation; its gradient is the rotation by the negative angle.
#[backend_extension(Flex, Cube: cfg(feature = "gpu"), Fusion: cfg(feature = "gpu"), Autodiff)]
pub trait RotateOps: Backend {
    /// `(low cos - high sin, high cos + low sin)`.
    #[fusion(default)]
    fn rotate(x: FloatTensor<Self>, cos: FloatTensor<Self>, sin: FloatTensor<Self>) -> FloatTensor<Self> {
        composed::<Self>(x, cos, sin)
    }
}

#[cfg(feature = "gpu")]
impl RotateOps for burn_cubecl::CubeBackend {}

fn composed<B: Backend>(x: FloatTensor<B>, cos: FloatTensor<B>, sin: FloatTensor<B>) -> FloatTensor<B> {
    let [rows, length, heads, head_dim] = x.shape().dims();
    let part = |from: usize, to: usize| {
        B::float_slice(x.clone(), &[(0..rows).into(), (0..length).into(), (0..heads).into(), (from..to).into()])
    };
    let (low, high) = (part(0, head_dim / 2), part(head_dim / 2, head_dim));
    let turn = |a: &FloatTensor<B>, b: &FloatTensor<B>| B::float_mul(a.clone(), b.clone());
    let rotated_low = B::float_sub(turn(&low, &cos), turn(&high, &sin));
    let rotated_high = B::float_add(turn(&high, &cos), turn(&low, &sin));
    B::float_cat(vec![rotated_low, rotated_high], 3)
}

#[derive(Debug)]
struct RotateBackward;

impl<B: RotateOps> Backward<B, 1> for RotateBackward {
    type State = (FloatTensor<B>, FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let [node] = ops.parents;
        let grad = grads.consume::<B>(&ops.node);
        let (cos, sin) = ops.state;
        if let Some(node) = node {
            grads.register::<B>(node.id, B::rotate(grad, cos, B::float_neg(sin)));
        }
    }
}

impl<B: RotateOps, C: CheckpointStrategy> RotateOps for Autodiff<B, C> {
    fn rotate(x: FloatTensor<Self>, cos: FloatTensor<Self>, sin: FloatTensor<Self>) -> FloatTensor<Self> {
        let (cos, sin) = (cos.into_primitive(), sin.into_primitive());
        match RotateBackward.prepare::<C>([x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let out = B::rotate(x.into_primitive(), cos.clone(), sin.clone());
                prep.finish((cos, sin), out)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::rotate(x.into_primitive(), cos, sin)),
        }
    }
}

impl RotateOps for Flex {
    fn rotate(x: FlexTensor, cos: FlexTensor, sin: FlexTensor) -> FlexTensor {
        if !flex::applies(&[&x, &cos, &sin]) {
            return composed::<Self>(x, cos, sin);
        }
        let (cos, sin) = (cos.to_contiguous(), sin.to_contiguous());
        // heads are read where they lie: the gradient of an attention comes head by head
        let ready = x.layout().strides().iter().all(|stride| *stride >= 0) && x.layout().strides()[3] == 1;
        let x = if ready { x } else { x.to_contiguous() };
        let [_, length, heads, head_dim] = x.layout().shape().dims();
        let strides: Vec<usize> = x.layout().strides().iter().map(|stride| stride.unsigned_abs()).collect();
        let values = &x.storage::<f32>()[x.layout().start_offset()..];
        let (half, width) = (head_dim / 2, (heads * head_dim).max(1));
        let (cosines, sines) = (flex::slice(&cos), flex::slice(&sin));
        let mut out = vec![0f32; x.layout().shape().num_elements()];
        out.par_chunks_mut(width * POSITIONS).enumerate().for_each(|(index, out)| {
            for (at, out) in out.chunks_mut(width).enumerate() {
                let cell = index * POSITIONS + at;
                let (row, position) = (cell / length, cell % length);
                let angle = if cosines.len() == length * half { position } else { cell } * half;
                let (cos, sin) = (&cosines[angle..angle + half], &sines[angle..angle + half]);
                let x = &values[row * strides[0] + position * strides[1]..];
                vectorized!(rotate_position(x, strides[2], cos, sin, out));
            }
        });
        flex::tensor(out, x.layout().shape().clone())
    }
}

/// Heads of one position, `stride` values apart.
#[inline(always)]
fn rotate_position<const FMA: bool>(x: &[f32], stride: usize, cos: &[f32], sin: &[f32], out: &mut [f32]) {
    let half = cos.len();
    for (head, out) in out.chunks_mut(2 * half).enumerate() {
        let (low, high) = x[head * stride..][..2 * half].split_at(half);
        let (out_low, out_high) = out.split_at_mut(half);
        for i in 0..half {
            out_low[i] = low[i] * cos[i] - high[i] * sin[i];
            out_high[i] = high[i] * cos[i] + low[i] * sin[i];
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::s;

    use super::{
        super::tests::{device, difference, values},
        *,
    };

    fn plain(x: Tensor<4>, cos: Tensor<4>, sin: Tensor<4>) -> Tensor<4> {
        let half = x.dims()[3] / 2;
        let (low, high) = (x.clone().slice(s![.., .., .., ..half]), x.slice(s![.., .., .., half..]));
        let rotated_low = low.clone() * cos.clone() - high.clone() * sin.clone();
        Tensor::cat(vec![rotated_low, high * cos + low * sin], 3)
    }

    #[test]
    fn fused_equals_composed() {
        let device = device().autodiff();
        for rows in [1, 3] {
            let run = |op: fn(Tensor<4>, Tensor<4>, Tensor<4>) -> Tensor<4>| {
                let x = values([3, 5, 2, 8], 0, &device).require_grad();
                let (cos, sin) = (values([rows, 5, 1, 4], 1, &device), values([rows, 5, 1, 4], 2, &device));
                // once as it lies, once as a view whose heads lie apart
                let turned =
                    op(x.clone().swap_dims(1, 2).reshape([3, 2, 5, 8]).swap_dims(1, 2), cos.clone(), sin.clone());
                let out = op(x.clone(), cos, sin) + turned;
                let mut grads = (out.clone() * values([3, 5, 2, 8], 3, &device)).sum().backward();
                (out.without_autodiff(), x.grad_remove(&mut grads).expect("tracked"))
            };
            let (found, expected) = (run(rotate), run(plain));
            assert!(difference(found.0, expected.0) < 1e-6);
            assert!(difference(found.1, expected.1) < 1e-6);
        }
    }
}

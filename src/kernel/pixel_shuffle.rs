//! Pixel shuffle: blocks of neighbouring patches become one feature with all their channels. It moves numbers and
//! computes none; the composed form copies them one by one on one core, this one patch by patch on all.

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
    tensor::{Shape, Tensor},
};
use rayon::prelude::*;

use super::flex;

/// Turns blocks of `block` x `block` patches into one feature with all their channels, which are ordered by row, then
/// column, then channel.
///
/// Features come row by row, or with `transposed` (InternVL's version 1) column by column.
///
/// # Shapes
/// `[tiles, grid * grid, width]` -> `[tiles, (grid / block)^2, width * block^2]`
#[must_use]
pub fn pixel_shuffle(x: Tensor<3>, block: usize, transposed: bool) -> Tensor<3> {
    let [_, patches, _] = x.dims();
    let grid = patches.isqrt();
    assert!(
        grid * grid == patches && grid.is_multiple_of(block),
        "pixel_shuffle: {patches} patches in blocks of {block}"
    );
    Tensor::from_dispatch(Dispatch::pixel_shuffle(x.into_dispatch(), block, transposed))
}

/// The operation and its gradient.
#[backend_extension(Flex, Cube: cfg(feature = "gpu"), Fusion: cfg(feature = "gpu"), Autodiff)]
pub trait PixelShuffleOps: Backend {
    /// Blocks of patches to features.
    #[fusion(default)]
    fn pixel_shuffle(x: FloatTensor<Self>, block: usize, transposed: bool) -> FloatTensor<Self> {
        forward::<Self>(x, block, transposed)
    }

    /// Features to blocks of patches.
    #[fusion(default)]
    fn pixel_shuffle_backward(grad: FloatTensor<Self>, block: usize, transposed: bool) -> FloatTensor<Self> {
        backward::<Self>(grad, block, transposed)
    }
}

#[cfg(feature = "gpu")]
impl PixelShuffleOps for burn_cubecl::CubeBackend {}

fn forward<B: Backend>(x: FloatTensor<B>, block: usize, transposed: bool) -> FloatTensor<B> {
    let [tiles, patches, width] = x.shape().dims();
    let side = patches.isqrt() / block;
    let order = if transposed { [0, 3, 1, 2, 4, 5] } else { [0, 1, 3, 2, 4, 5] };
    let x = B::float_reshape(x, Shape::new([tiles, side, block, side, block, width]));
    B::float_reshape(B::float_permute(x, &order), Shape::new([tiles, side * side, block * block * width]))
}

fn backward<B: Backend>(grad: FloatTensor<B>, block: usize, transposed: bool) -> FloatTensor<B> {
    let [tiles, features, channels] = grad.shape().dims();
    let (side, width) = (features.isqrt(), channels / (block * block));
    let order = if transposed { [0, 2, 3, 1, 4, 5] } else { [0, 1, 3, 2, 4, 5] };
    let grad = B::float_reshape(grad, Shape::new([tiles, side, side, block, block, width]));
    B::float_reshape(B::float_permute(grad, &order), Shape::new([tiles, features * block * block, width]))
}

#[derive(Debug)]
struct PixelShuffleBackward;

impl<B: PixelShuffleOps> Backward<B, 1> for PixelShuffleBackward {
    type State = (usize, bool);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let [node] = ops.parents;
        let grad = grads.consume::<B>(&ops.node);
        let (block, transposed) = ops.state;
        if let Some(node) = node {
            grads.register::<B>(node.id, B::pixel_shuffle_backward(grad, block, transposed));
        }
    }
}

impl<B: PixelShuffleOps, C: CheckpointStrategy> PixelShuffleOps for Autodiff<B, C> {
    fn pixel_shuffle(x: FloatTensor<Self>, block: usize, transposed: bool) -> FloatTensor<Self> {
        match PixelShuffleBackward.prepare::<C>([x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                prep.finish((block, transposed), B::pixel_shuffle(x.into_primitive(), block, transposed))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::pixel_shuffle(x.into_primitive(), block, transposed)),
        }
    }
}

/// Where the patches of a tile lie before and after.
#[derive(Clone, Copy)]
struct Order {
    /// Blocks along a side.
    side: usize,
    block: usize,
    transposed: bool,
}

impl Order {
    /// The patch of the grid that stands at `place` of the features.
    fn patch(self, place: usize) -> usize {
        let Self { side, block, transposed } = self;
        let (feature, inner) = (place / (block * block), place % (block * block));
        let (first, second) = (feature / side, feature % side);
        let (row, column) = if transposed { (second, first) } else { (first, second) };
        (row * block + inner / block) * side * block + column * block + inner % block
    }

    /// Reverse of [`Order::patch`].
    fn place(self, patch: usize) -> usize {
        let Self { side, block, transposed } = self;
        let (row, column) = (patch / (side * block), patch % (side * block));
        let (first, second) = if transposed { (column / block, row / block) } else { (row / block, column / block) };
        (first * side + second) * block * block + row % block * block + column % block
    }
}

/// Runs of `width` numbers, each taken from where `from` says within its tile of `runs`.
fn gather(values: &[f32], width: usize, runs: usize, from: impl Fn(usize) -> usize + Sync) -> Vec<f32> {
    let mut out = vec![0f32; values.len()];
    out.par_chunks_mut(width.max(1)).with_min_len(32).enumerate().for_each(|(i, run)| {
        let source = i / runs * runs + from(i % runs);
        run.copy_from_slice(&values[source * width..][..width]);
    });
    out
}

impl PixelShuffleOps for Flex {
    fn pixel_shuffle(x: FlexTensor, block: usize, transposed: bool) -> FlexTensor {
        if !flex::applies(&[&x]) {
            return forward::<Self>(x, block, transposed);
        }
        let x = x.to_contiguous();
        let [tiles, patches, width] = x.layout().shape().dims();
        let order = Order { side: patches.isqrt() / block, block, transposed };
        let out = gather(flex::slice(&x), width, patches, |place| order.patch(place));
        flex::tensor(out, Shape::new([tiles, order.side * order.side, block * block * width]))
    }

    fn pixel_shuffle_backward(grad: FlexTensor, block: usize, transposed: bool) -> FlexTensor {
        if !flex::applies(&[&grad]) {
            return backward::<Self>(grad, block, transposed);
        }
        let grad = grad.to_contiguous();
        let [tiles, features, channels] = grad.layout().shape().dims();
        let (patches, width) = (features * block * block, channels / (block * block));
        let order = Order { side: features.isqrt(), block, transposed };
        let out = gather(flex::slice(&grad), width, patches, |patch| order.place(patch));
        flex::tensor(out, Shape::new([tiles, patches, width]))
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::TensorData;

    use super::{
        super::tests::{device, difference, values},
        *,
    };

    fn plain(x: Tensor<3>, block: usize, transposed: bool) -> Tensor<3> {
        let [tiles, patches, width] = x.dims();
        let side = patches.isqrt() / block;
        let order = if transposed { [0, 3, 1, 2, 4, 5] } else { [0, 1, 3, 2, 4, 5] };
        let x = x.reshape([tiles, side, block, side, block, width]).permute(order);
        x.reshape([tiles, side * side, block * block * width])
    }

    #[test]
    fn shuffling_keeps_rows_before_columns() {
        let numbers: Vec<f32> = (0..16).map(|i| i as f32).collect();
        let x = Tensor::<3>::from_data(TensorData::new(numbers, [1, 16, 1]), &device());
        let rows = |t: Tensor<3>| t.into_data().try_to_vec::<f32>().unwrap();
        assert_eq!(rows(pixel_shuffle(x.clone(), 2, false))[..8], [0.0, 1.0, 4.0, 5.0, 2.0, 3.0, 6.0, 7.0]);
        assert_eq!(rows(pixel_shuffle(x, 2, true))[..8], [0.0, 1.0, 4.0, 5.0, 8.0, 9.0, 12.0, 13.0]);
    }

    #[test]
    fn value_and_gradient_equal_the_composed_form() {
        let device = device().autodiff();
        for (block, transposed, swapped, expanded) in
            [(2, false, false, false), (2, true, true, false), (3, true, false, true), (1, false, true, true)]
        {
            let run = |op: fn(Tensor<3>, usize, bool) -> Tensor<3>| {
                let x = values([3, 36, 5], 0, &device).require_grad();
                let turned = if swapped { x.clone().swap_dims(0, 2).reshape([5, 36, 3]) } else { x.clone() };
                let out = op(turned, block, transposed);
                let weighted = if expanded { out.clone() } else { out.clone() * values(out.dims(), 1, &device) };
                let mut grads = weighted.sum().backward();
                (out.without_autodiff(), x.grad_remove(&mut grads).expect("tracked"))
            };
            let (found, expected) = (run(pixel_shuffle), run(plain));
            assert_eq!(difference(found.0, expected.0), 0.0, "{block} {transposed}");
            assert_eq!(difference(found.1, expected.1), 0.0, "{block} {transposed}");
        }
    }
}

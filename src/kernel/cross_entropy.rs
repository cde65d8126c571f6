//! Cross-entropy of rows of logits: losses, and the gradient of their sum, in one pass over each row.

#[cfg(feature = "gpu")]
use burn::backend::fusion::custom::TensorSpec;
use burn::{
    backend::{
        Backend, Dispatch, Flex, TensorMetadata, backend_extension,
        flex::FlexTensor,
        tensor::{FloatTensor, IntTensor},
    },
    tensor::{IndexingUpdateOp, Int, Shape, Tensor},
};
use rayon::prelude::*;

use super::flex::{self, vectorized};

/// `-log softmax(logits)[label]` of each row, and the gradient of their sum with respect to the logits,
/// `softmax(logits)` less one at the label. Takes tensors without autodiff.
///
/// # Shapes
/// `logits` `[n, classes]` f32, `labels` `[n]` -> `[n]`, `[n, classes]`
#[must_use]
pub fn cross_entropy(logits: Tensor<2>, labels: Tensor<1, Int>) -> (Tensor<1>, Tensor<2>) {
    assert_eq!(logits.dims()[0], labels.dims()[0], "cross_entropy: one label a row");
    let (nll, gradient) = Dispatch::cross_entropy(logits.into_dispatch(), labels.into_dispatch());
    (Tensor::from_dispatch(nll), Tensor::from_dispatch(gradient))
}

/// The operation; it is not differentiated, because it returns its gradient.
#[backend_extension(Flex, Cube: cfg(feature = "gpu"), Fusion: cfg(feature = "gpu"))]
pub trait CrossEntropyOps: Backend {
    /// Losses and gradient.
    #[fusion(meta = losses_and_gradient)]
    fn cross_entropy(logits: FloatTensor<Self>, labels: IntTensor<Self>) -> (FloatTensor<Self>, FloatTensor<Self>) {
        composed::<Self>(logits, labels)
    }
}

#[cfg(feature = "gpu")]
fn losses_and_gradient(logits: &TensorSpec, _labels: &TensorSpec) -> (TensorSpec, TensorSpec) {
    (TensorSpec::new(Shape::new([logits.shape[0]]), logits.dtype), logits.clone())
}

pub(super) fn composed<B: Backend>(logits: FloatTensor<B>, labels: IntTensor<B>) -> (FloatTensor<B>, FloatTensor<B>) {
    let [n, _] = logits.shape().dims();
    let labels = B::int_reshape(labels, Shape::new([n, 1]));
    let largest = B::float_max_dim(logits.clone(), 1);
    let shifted = B::float_sub(logits, largest);
    let picked = B::float_gather(1, shifted.clone(), labels.clone());
    let exp = B::float_exp(shifted);
    let sum = B::float_sum_dim(exp.clone(), 1);
    let nll = B::float_sub(B::float_log(sum.clone()), picked.clone());
    let minus_one = B::float_add_scalar(B::float_mul_scalar(picked, 0f32.into()), (-1f32).into());
    let gradient = B::float_scatter(1, B::float_div(exp, sum), labels, minus_one, IndexingUpdateOp::Add);
    (B::float_reshape(nll, Shape::new([n])), gradient)
}

#[inline(always)]
fn row<const FMA: bool>(logits: &[f32], label: usize, gradient: &mut [f32], nll: &mut f32) {
    let largest = flex::max(logits);
    for (out, logit) in gradient.iter_mut().zip(logits) {
        *out = flex::exp::<FMA>(logit - largest);
    }
    let sum = flex::sum(gradient.len(), |i| gradient[i]);
    let scale = 1.0 / sum;
    for value in gradient.iter_mut() {
        *value *= scale;
    }
    // a logit that is not a number must show in the loss: the exponential clamps it
    let shifted = logits[label] - largest;
    *nll = if sum.is_nan() || shifted.is_nan() { f32::NAN } else { sum.ln() - shifted };
    gradient[label] -= 1.0;
}

impl CrossEntropyOps for Flex {
    fn cross_entropy(logits: FlexTensor, labels: FlexTensor) -> (FlexTensor, FlexTensor) {
        let labels = labels.to_contiguous();
        let (true, Some(targets)) = (flex::applies(&[&logits]), labels.as_slice::<i32>()) else {
            return composed::<Self>(logits, labels);
        };
        let logits = logits.to_contiguous();
        let [n, classes] = logits.layout().shape().dims();
        let inside = targets.iter().all(|label| usize::try_from(*label).is_ok_and(|label| label < classes));
        assert!(inside, "cross_entropy: labels are below the number of classes");
        let (mut nll, mut gradient) = (vec![0f32; n], vec![0f32; n * classes]);
        gradient
            .par_chunks_mut(classes.max(1))
            .zip(flex::slice(&logits).par_chunks(classes.max(1)))
            .zip(nll.par_iter_mut().zip(targets))
            .for_each(|((gradient, logits), (nll, label))| {
                vectorized!(row(logits, *label as usize, gradient, nll));
            });
        (flex::tensor(nll, Shape::new([n])), flex::tensor(gradient, Shape::new([n, classes])))
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData, activation::log_softmax};

    use super::{
        super::tests::{device, difference, values},
        *,
    };

    fn labels(device: &Device) -> Tensor<1, Int> {
        Tensor::from_data(TensorData::new(vec![0i32, 99, 41, 7, 41], [5]), device)
    }

    #[test]
    fn loss_and_gradient_equal_the_composed_form() {
        let device = device();
        for transposed in [false, true] {
            let logits =
                if transposed { values([100, 5], 0, &device).transpose() } else { values([5, 100], 0, &device) };
            let (nll, gradient) = cross_entropy(logits.clone() * 20.0, labels(&device));
            let leaf = (logits * 20.0).autodiff().require_grad();
            let picked = log_softmax(leaf.clone(), 1).gather(1, labels(&device).unsqueeze_dim(1));
            let expected: Tensor<1> = picked.clone().neg().squeeze_dim(1);
            let mut grads = picked.sum().neg().backward();
            assert!(difference(nll, expected.without_autodiff()) < 1e-6);
            assert!(difference(gradient, leaf.grad_remove(&mut grads).unwrap()) < 1e-6);
        }
    }

    #[test]
    fn the_default_of_other_backends_is_the_same() {
        let device = Device::flex();
        let logits = values::<2>([5, 100], 1, &device);
        let (nll, gradient) = cross_entropy(logits.clone(), labels(&device));
        let (other, slope) = composed::<Flex>(
            FlexTensor::from_data(logits.into_data()),
            FlexTensor::from_data(labels(&device).into_data()),
        );
        let plain = |t: FlexTensor| TensorData::new(flex::slice(&t).to_vec(), [flex::slice(&t).len()]);
        assert!(difference(Tensor::<1>::from_data(plain(other), &device), nll) < 1e-6);
        assert!(difference(Tensor::<1>::from_data(plain(slope), &device), gradient.reshape([500])) < 1e-6);
    }

    #[test]
    fn what_is_not_a_number_shows_in_the_loss() {
        let device = device();
        let mut logits = vec![0f32; 30];
        logits[3] = f32::NAN;
        let logits = Tensor::<2>::from_data(TensorData::new(logits, [3, 10]), &device);
        let labels = Tensor::<1, Int>::from_data(TensorData::new(vec![3i32, 1, 2], [3]), &device);
        let nll: Vec<f32> = cross_entropy(logits, labels).0.into_data().try_to_vec().unwrap();
        assert!(nll[0].is_nan() && nll[1..].iter().all(|x| (x - 10f32.ln()).abs() < 1e-6), "{nll:?}");
    }
}

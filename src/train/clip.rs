//! Global-norm clipping.

use burn::tensor::Tensor;

/// Euclidean norm of all gradients together, in f32 on the device and f64 between tensors.
#[must_use]
pub fn global_norm(gradients: &[Option<Tensor<1>>]) -> f64 {
    let squares: Vec<Tensor<1>> = gradients.iter().flatten().map(|g| g.clone().square().sum()).collect();
    if squares.is_empty() {
        return 0.0;
    }
    let squares: Vec<f32> = Tensor::cat(squares, 0).into_data().try_to_vec().expect("gradients are f32");
    squares.iter().map(|s| f64::from(*s)).sum::<f64>().sqrt()
}

/// Factor on all gradients that brings their norm to at most `max_norm`; 1 when that is 0.
#[must_use]
pub fn clip_factor(norm: f64, max_norm: f64) -> f64 {
    if max_norm > 0.0 { (max_norm / (norm + 1e-6)).min(1.0) } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    #[test]
    fn the_norm_spans_all_tensors() {
        let device = Device::flex();
        let gradients = [
            Some(Tensor::<1>::from_data([3.0f32, 0.0], &device)),
            None,
            Some(Tensor::<1>::from_data([4.0f32], &device)),
        ];
        assert_eq!(global_norm(&gradients), 5.0);
        assert!((clip_factor(5.0, 1.0) - 0.2).abs() < 1e-6);
        assert_eq!([clip_factor(0.5, 1.0), clip_factor(5.0, 0.0)], [1.0, 1.0]);
    }
}

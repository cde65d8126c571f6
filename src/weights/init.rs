//! Random initialisation, a function of the seed and the parameter's name alone.

use burn::{
    module::{Module, ModuleMapper, Param},
    tensor::{DType, Tensor},
};
use rand::Rng;
use rayon::prelude::*;

use super::convert::Values;
use crate::{nn::visit::PathStack, random};

/// Values drawn from one stream.
const CHUNK: usize = 1 << 14;

/// As Hugging Face initialises: weights and embeddings normal with standard deviation `std`, biases 0, norms 1.
#[must_use]
pub fn init_random<M: Module>(module: M, seed: u64, std: f64) -> M {
    module.map(&mut Initializer { seed, std, path: PathStack::default() })
}

struct Initializer {
    seed: u64,
    std: f64,
    path: PathStack,
}

impl ModuleMapper for Initializer {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if self.path.is_adapter() {
            return param;
        }
        let (shape, device, id) = (param.lazy_shape(), param.lazy_device(), param.id);
        let fill = match (self.path.is_norm(), self.path.name().ends_with("bias")) {
            (_, true) => Some(0.0),
            (true, false) => Some(1.0),
            _ => None,
        };
        let count = shape.num_elements();
        let values = match fill {
            Some(value) => vec![value; count],
            None => normal(count, self.std, self.seed, &self.path.name()),
        };
        let data = Values::F32(values).into_data(&shape.to_vec());
        param.transform_for_load(Tensor::from_data(data, (&device, DType::F32)), id)
    }
}

fn normal(count: usize, std: f64, seed: u64, name: &str) -> Vec<f32> {
    let purpose = format!("init/{name}");
    let mut values = vec![0f32; count];
    values.par_chunks_mut(CHUNK).enumerate().for_each(|(index, chunk)| {
        let mut stream = random::stream(seed, &purpose, index as u64);
        // (0, 1], so that the logarithm is finite
        let mut uniform = || ((stream.next_u64() >> 11) + 1) as f64 / (1u64 << 53) as f64;
        for pair in chunk.chunks_mut(2) {
            let (radius, angle) = ((-2.0 * uniform().ln()).sqrt() * std, std::f64::consts::TAU * uniform());
            pair[0] = (radius * angle.cos()) as f32;
            if let Some(second) = pair.get_mut(1) {
                *second = (radius * angle.sin()) as f32;
            }
        }
    });
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_are_normal_and_depend_on_seed_and_name() {
        let draw = |seed, name| normal(100_001, 0.5, seed, name);
        let values = draw(1, "a");
        let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / values.len() as f64;
        let variance = values.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / values.len() as f64;
        assert!(mean.abs() < 0.01 && (variance.sqrt() - 0.5).abs() < 0.01, "mean {mean}, variance {variance}");
        let inside = values.iter().filter(|v| v.abs() < 0.5).count() as f64 / values.len() as f64;
        assert!((inside - 0.6827).abs() < 0.01, "{inside} within one standard deviation");
        assert_eq!(values, draw(1, "a"));
        assert_ne!(values, draw(2, "a"));
        assert_ne!(values, draw(1, "b"));
    }
}

//! AdamW (Loshchilov and Hutter, arXiv 1711.05101) over named tensors, with the order of operations of PyTorch.
//!
//! Burn's own AdamW computes the same formula; this one keeps its state by parameter name instead of by an id that
//! safetensors files do not hold, and takes a learning rate per tensor, so that a resumed run is the uninterrupted run.

use burn::tensor::{DType, Tensor};

use super::{config::TrainConfig, params::Trained};
use crate::nn::debug_dtype;

/// Running means of one tensor.
#[derive(Debug, Clone)]
pub struct Moments {
    /// Mean of gradients.
    pub m: Tensor<1>,
    /// Mean of squared gradients.
    pub v: Tensor<1>,
}

/// Optimizer state and constants.
#[derive(Debug)]
pub struct AdamW {
    beta1: f64,
    beta2: f64,
    epsilon: f64,
    /// Updates done so far, per tensor: a tensor without gradient is not updated.
    pub steps: Vec<u64>,
    /// Running means in the order of the trained tensors; absent before the first update.
    pub moments: Vec<Option<Moments>>,
    /// Learning rate peak and weight decay of each tensor.
    groups: Vec<Group>,
}

#[derive(Debug, Clone, Copy)]
struct Group {
    learning_rate: f64,
    weight_decay: f64,
}

/// Whether weight decay applies: biases and norms (tensors of one dimension) are left out.
#[must_use]
pub fn decays(t: &Trained) -> bool {
    t.shape.len() > 1
}

impl AdamW {
    /// A fresh optimizer. A tower may have its own learning rate, and as LoRA+ has it, B, biases and norms may learn at a
    /// multiple (`loraplus_lr_ratio`) of the rate of A and other matrices.
    #[must_use]
    pub fn new(config: &TrainConfig, loraplus_lr_ratio: Option<f64>, trained: &[Trained]) -> Self {
        let group = |t: &Trained| {
            let own = match t.tower {
                "projector" => config.mm_projector_lr,
                "vision" => config.mm_vision_tower_lr,
                _ => None,
            };
            let faster = t.name.ends_with(".lora_B.weight") || t.shape.len() == 1;
            let ratio = loraplus_lr_ratio.filter(|_| faster).unwrap_or(1.0);
            Group {
                learning_rate: own.unwrap_or(config.learning_rate) * ratio,
                weight_decay: if decays(t) { config.weight_decay } else { 0.0 },
            }
        };
        Self {
            beta1: config.adam_beta1,
            beta2: config.adam_beta2,
            epsilon: config.adam_epsilon,
            steps: vec![0; trained.len()],
            moments: vec![None; trained.len()],
            groups: trained.iter().map(group).collect(),
        }
    }

    /// New value of tensor `index`. `factor` is the schedule's factor on the peak learning rate; `clip` multiplies the
    /// gradient.
    ///
    /// # Shapes
    /// All flat, `[n]`.
    #[must_use]
    pub fn update(&mut self, index: usize, value: Tensor<1>, gradient: Tensor<1>, factor: f64, clip: f64) -> Tensor<1> {
        let Group { learning_rate, weight_decay } = self.groups[index];
        let rate = learning_rate * factor;
        debug_dtype(&value, DType::F32, "the optimizer");
        debug_dtype(&gradient, DType::F32, "the optimizer");
        let gradient = if clip < 1.0 { gradient.mul_scalar(clip) } else { gradient };
        self.steps[index] += 1;
        let step = self.steps[index] as i32;
        let (m, v) = match self.moments[index].take() {
            Some(Moments { m, v }) => (
                m.mul_scalar(self.beta1) + gradient.clone().mul_scalar(1.0 - self.beta1),
                v.mul_scalar(self.beta2) + gradient.square().mul_scalar(1.0 - self.beta2),
            ),
            None => (gradient.clone().mul_scalar(1.0 - self.beta1), gradient.square().mul_scalar(1.0 - self.beta2)),
        };
        let step_size = rate / (1.0 - self.beta1.powi(step));
        let root = (1.0 - self.beta2.powi(step)).sqrt();
        let denominator = v.clone().sqrt().div_scalar(root).add_scalar(self.epsilon);
        let change = (m.clone() / denominator).mul_scalar(step_size);
        let value = if weight_decay == 0.0 { value } else { value.mul_scalar(1.0 - rate * weight_decay) };
        self.moments[index] = Some(Moments { m, v });
        value - change
    }
}

#[cfg(test)]
mod tests {
    use burn::{
        module::{Module, Param},
        optim::{AdamWConfig, GradientsParams},
        tensor::Device,
    };

    use super::*;

    #[derive(Module, Debug)]
    struct One {
        w: Param<Tensor<1>>,
    }

    #[test]
    fn agrees_with_burns_adamw() {
        let device = Device::flex().autodiff();
        let start = [0.5f32, -1.0, 2.0, 1e-3];
        let mut theirs = One { w: Param::from_tensor(Tensor::from_data(start, &device)) };
        let mut optimizer = AdamWConfig::new().with_epsilon(1e-8).with_weight_decay(0.1).init();
        let config = TrainConfig { learning_rate: 1e-2, weight_decay: 0.1, ..TrainConfig::default() };
        let trained = Trained {
            name: "w".into(),
            shape: vec![2, 2],
            transposed: false,
            lora: false,
            tower: "language",
            id: theirs.w.id,
        };
        let mut ours = AdamW::new(&config, None, &[trained]);
        let mut value = Tensor::<1>::from_data(start, &Device::flex());
        for _ in 0..5 {
            let loss = theirs.w.val().powi_scalar(3).sum();
            let gradients = GradientsParams::from_grads(loss.backward(), &theirs);
            let gradient: Tensor<1> = gradients.get(theirs.w.id).unwrap();
            theirs = optimizer.step(1e-2, theirs, gradients);
            value = ours.update(0, value, gradient, 1.0, 1.0);
            let worst: f32 = (theirs.w.val().without_autodiff() - value.clone()).abs().max().into_scalar();
            assert!(worst < 2e-6, "{worst}");
        }
    }
    #[test]
    fn towers_and_factors_have_their_rates() {
        let config = TrainConfig {
            learning_rate: 1.0,
            mm_projector_lr: Some(2.0),
            mm_vision_tower_lr: Some(3.0),
            ..TrainConfig::default()
        };
        let rates = |ratio| {
            let tensor = |name: &str, tower, shape: &[usize]| Trained {
                name: name.into(),
                shape: shape.to_vec(),
                transposed: false,
                lora: name.contains("lora_"),
                tower,
                id: burn::module::ParamId::new(),
            };
            let trained = [
                tensor("a.lora_A.weight", "language", &[4, 2]),
                tensor("a.lora_B.weight", "language", &[2, 4]),
                tensor("a.lora_magnitude_vector", "language", &[4]),
                tensor("p.weight", "projector", &[4, 4]),
                tensor("p.bias", "projector", &[4]),
                tensor("v.lora_B.weight", "vision", &[2, 4]),
            ];
            let groups = AdamW::new(&config, ratio, &trained).groups;
            groups.iter().map(|g| g.learning_rate).collect::<Vec<f64>>()
        };
        assert_eq!(rates(None), [1.0, 1.0, 1.0, 2.0, 2.0, 3.0]);
        assert_eq!(rates(Some(16.0)), [1.0, 16.0, 16.0, 2.0, 32.0, 48.0]);
    }
}
